"""One suite for every backend: what `edgetube.runtimes.base` promises, whoever keeps it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

from edgetube import bundle as bundles
from edgetube import demo, export, runtimes
from edgetube.bundle import Bundle
from edgetube.contract import InputContract
from edgetube.errors import BackendError, BundleError, InputError, MissingPackageError
from edgetube.export import pipeline
from edgetube.model import checkpoints
from edgetube.runtimes.base import Backend
from edgetube.runtimes.torch import Reference
from edgetube.targets import Target

Opened: TypeAlias = tuple[Backend, Target]

TARGETS = export.targets()


@pytest.fixture(scope="module", params=sorted({t.backend for t in TARGETS.values()}))
def exported(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, str | None]:
    """The first target of each backend, exported at batch 2, and the device that runs it here."""
    target = next(t for t in TARGETS.values() if t.backend == request.param and t.tolerance is not None)
    device = runtimes.proof_device(target.name, target.backend)
    if missing := target.missing(target.build_needs + (() if device else target.run_needs)):
        pytest.skip(f"{target.name} needs {', '.join(missing)} {target.remedy}")
    options = pipeline.Options(batch=2, lowering="gather")
    return pipeline.export_model(target.name, tiny_checkpoint, tmp_path_factory.mktemp("out"), options), device


@pytest.fixture(scope="module")
def opened(exported: tuple[Bundle, str | None]) -> Iterator[tuple[Backend, Target]]:
    """The exported bundle, opened."""
    bundle, device = exported
    with runtimes.open_bundle(bundle, device=device) as backend:
        yield backend, TARGETS[bundle.target]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_clips_answers_like_pytorch(
    opened: tuple[Backend, Target], tiny_checkpoint: Path, count: int, rng: np.random.Generator
) -> None:
    backend, target = opened
    checkpoint = checkpoints.load(tiny_checkpoint)
    clips = rng.integers(0, 256, (count, *checkpoint.contract.shape), np.uint8)
    expected = Reference(checkpoint.model, checkpoint.contract)(clips)
    got = backend(clips)
    assert got.dtype == np.float32
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= (target.tolerance or 0) * max(1, np.abs(expected).max())


def test_input_is_neither_changed_nor_kept(opened: tuple[Backend, Target], rng: np.random.Generator) -> None:
    backend, _ = opened
    clips = rng.integers(0, 256, (2, *backend.contract.shape), np.uint8)
    before = clips.copy()
    first = backend(clips).copy()
    np.testing.assert_array_equal(clips, before)
    clips[:] = 0
    np.testing.assert_array_equal(backend(before), first)


def test_wrong_input_is_refused_before_the_vendor_sees_it(opened: tuple[Backend, Target]) -> None:
    backend, _ = opened
    with pytest.raises(InputError, match="float64"):
        backend(np.zeros((1, *backend.contract.shape)))
    with pytest.raises(InputError, match="expected"):
        backend(np.zeros((1, 2, 3, 4, 3), np.uint8))


def test_it_says_what_runs_it(opened: tuple[Backend, Target]) -> None:
    backend, _ = opened
    assert backend.describe()


def test_closing_is_final(tiny_bundle: Path, rng: np.random.Generator) -> None:
    backend = runtimes.open_bundle(bundles.load(tiny_bundle))
    clips = np.zeros((1, *backend.contract.shape), np.uint8)
    backend(clips)
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend(clips)


def test_without_calls_inner_tensors_are_still_shown(
    exported: tuple[Bundle, str | None], rng: np.random.Generator
) -> None:
    bundle, device = exported
    clips = rng.integers(0, 256, (bundle.batch, *bundle.contract.shape), np.uint8)
    with runtimes.open_bundle(bundle, device=device) as backend:
        names = backend.layers(["blocks.0", "logits"])
        before = backend.tap(names)(clips) if names else {}
        backend.only_tap()
        backend.only_tap()
        with pytest.raises(BackendError, match="closed"):
            backend(clips)
        assert backend.layers(["blocks.0", "logits"]) == names
        after = backend.tap(names)(clips) if names else {}
        assert before.keys() == after.keys() == {*names}
        for name in names:
            np.testing.assert_array_equal(before[name], after[name])
    backend.close()


def test_a_missing_package_is_named(exported: tuple[Bundle, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, _ = exported
    package = "vendor_of_" + bundle.backend

    def absent(_: str) -> None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(runtimes, "runtime", absent)
    with pytest.raises(MissingPackageError, match=rf"needs the package {package}, .* 'edgetube\[{bundle.backend}\]'"):
        runtimes.open_bundle(bundle)


def test_a_bundle_of_an_unknown_backend_says_to_upgrade(tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"needs the backend 'abacus'; this edgetube has .*: upgrade"):
        runtimes.open_bundle(replace(bundles.load(tiny_bundle), backend="abacus"))


@pytest.mark.parametrize("backend", ["openvino", "torch", "mil", "coreml"])
def test_a_bundle_whose_backend_is_that_of_other_targets_is_refused(tiny_bundle: Path, backend: str) -> None:
    with pytest.raises(BundleError, match=rf"the target is onnx-fp32, but the backend is {backend}"):
        runtimes.open_bundle(replace(bundles.load(tiny_bundle), backend=backend))


def test_every_target_is_one_of_its_backend() -> None:
    for target in TARGETS.values():
        assert target.name.partition("-")[0] in importlib.import_module(f"edgetube.runtimes.{target.backend}").RUNS


def test_what_an_artifact_takes_and_gives_is_what_the_manifest_says(opened: Opened) -> None:
    backend, _ = opened
    interface = backend.interface()
    assert interface is not None
    (clips,), (logits,) = interface.inputs, interface.outputs
    assert clips == (2, *backend.contract.shape)
    assert logits == (2, len(demo.LABELS))


@pytest.mark.parametrize(
    "change",
    [
        {"batch": 2},
        {"labels": ("a", "b")},
        {"contract": InputContract(8, 32, 64)},
        {"contract": InputContract(16, 32, 48)},
    ],
)
def test_a_manifest_that_its_artifact_contradicts_is_refused(tiny_bundle: Path, change: dict[str, Any]) -> None:
    message = r"model.onnx takes \(1, 8, 32, 48, 3\) and gives \(1, 9\), but the manifest says"
    with pytest.raises(BundleError, match=message):
        runtimes.open_bundle(replace(bundles.load(tiny_bundle), **change))


def test_base_is_not_a_backend() -> None:
    assert "base" not in runtimes.names()
    assert {"onnxruntime", "torch"} <= runtimes.names()
