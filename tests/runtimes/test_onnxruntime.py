"""What is ONNX Runtime's own; what every backend promises is in `test_conformance.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from edgetube import bundle as bundles
from edgetube import runtimes
from edgetube.bundle import Bundle
from edgetube.errors import BackendError
from edgetube.precision import Precision
from edgetube.runtimes import onnxruntime


@pytest.fixture
def plain(tiny_bundle: Path) -> Bundle:
    return bundles.load(tiny_bundle)


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
class TestADeviceThatCannotBeUsed:
    """A build for CUDA without CUDA's libraries lists the provider, and opens every session on the CPU."""

    REFUSAL = "could not load CUDAExecutionProvider and took CPUExecutionProvider: "

    @pytest.fixture(autouse=True)
    def built_for_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])

    def test_it_is_not_replaced_by_another(self, plain: Bundle) -> None:
        with pytest.raises(BackendError, match=self.REFUSAL) as error:
            runtimes.open_bundle(plain, device="cuda")
        assert "\n" not in str(error.value)

    def test_nor_where_inner_tensors_are_shown(self, plain: Bundle) -> None:
        with runtimes.open_bundle(plain) as backend:
            assert isinstance(backend, onnxruntime.Session)
            backend.provider = "CUDAExecutionProvider"
            with pytest.raises(BackendError, match=self.REFUSAL):
                backend.tap(backend.layers(["tubes"]))


SATURATING: Mapping[str, bool] = {"": True, onnxruntime.EXACT: False}
"""x86 without VNNI: sums overflow unless ONNX Runtime is told."""

HELPLESS: Mapping[str, bool] = {"": True, onnxruntime.EXACT: True}
"""The same with an ONNX Runtime that does not know the option, as 1.23."""


def entries(
    bundle: Bundle, processor: Mapping[str, bool], monkeypatch: pytest.MonkeyPatch, **fields: Any
) -> dict[str, str]:
    monkeypatch.setattr(onnxruntime, "_saturates", processor.__getitem__)
    return onnxruntime._entries(replace(bundle, **fields))


def test_an_old_int8_artifact_takes_the_exact_form_or_is_refused(
    plain: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    build: dict[str, Any] = {"integers": {"asked": 1, "executed": 1, "cpu": "any"}}
    old: dict[str, Any] = {"precision": Precision.W8A8, "build": build}
    assert entries(plain, {"": False}, monkeypatch, **old) == {}
    assert entries(plain, SATURATING, monkeypatch, **old) == {onnxruntime.EXACT: "1"}
    builds: tuple[dict[str, Any], ...] = ({}, {"integers": 5}, {"integers": {}}, {"integers": {"saturates": True}})
    for build in builds:
        found = entries(plain, SATURATING, monkeypatch, precision=Precision.W8A8, build=build)
        assert found == {onnxruntime.EXACT: "1"}
    with pytest.raises(BackendError, match=r"sums of its 8-bit products overflow here.*; export it again") as e:
        entries(plain, HELPLESS, monkeypatch, **old)
    assert "\n" not in str(e.value)
    with pytest.raises(BackendError, match="export it again"):  # the exact form has no int8 activations
        entries(plain, SATURATING, monkeypatch, precision=Precision.W8A8, build={"integers": {"cpu": "arm"}})


def test_an_artifact_that_cannot_saturate_and_one_in_float_are_opened_as_they_are(
    plain: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert entries(plain, HELPLESS, monkeypatch) == {}
    assert (
        entries(plain, HELPLESS, monkeypatch, precision=Precision.W8A8, build={"integers": {"saturates": False}}) == {}
    )


def test_the_graph_of_another_backend_is_computed_as_it_stands(plain: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """An emulated artifact is not fused into integer kernels, which may saturate."""
    found = entries(plain, HELPLESS, monkeypatch, precision=Precision.W8A8, backend="other")
    assert found == {onnxruntime.AS_THEY_STAND: "1"}


def test_the_probe_multiplies_what_would_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbouring products of 255 and 127 do not fit in 16 bits; a kernel that cuts them off is seen."""

    class Saturating:
        def run(self, outputs: None, feeds: Mapping[str, Any]) -> list[Any]:
            (x,) = feeds.values()
            pairs = x.astype(np.int64).reshape(len(x), -1, 2) * 127
            total = np.clip(pairs.sum(axis=2), -(2**15), 2**15 - 1).sum(axis=1)
            return [np.repeat(total[:, None], x.shape[1], axis=1).astype(np.float32)]

    probe = onnxruntime._saturates.__wrapped__
    assert isinstance(probe(""), bool)
    monkeypatch.setattr(onnxruntime, "_open", lambda *_: Saturating())
    assert probe("") is True
