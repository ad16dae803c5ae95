"""Sessions over the doubles of `doubles.py`; the tests of whole bundles also on a GPU, marked `gpu`."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import edgetube
from edgetube import cache, cuda, datasets, export
from edgetube.bench import parity
from edgetube.bundle import Bundle
from edgetube.errors import BackendError, InputError
from edgetube.export import pipeline
from edgetube.model import checkpoints
from edgetube.runtimes.tensorrt.sdk import load_sdk
from edgetube.runtimes.torch import Reference
from tests.runtimes import doubles
from tests.runtimes.doubles import Machine

GATHER = pipeline.Options(lowering="gather")


@pytest.mark.parametrize("count", [1, 2, 5])
def test_clips_go_up_and_logits_come_down(
    machine: doubles.Machine, deferred: Bundle, tiny_checkpoint: Path, count: int, rng: np.random.Generator
) -> None:
    checkpoint = checkpoints.load(tiny_checkpoint)
    clips = rng.integers(0, 256, (count, *deferred.contract.shape), np.uint8)
    expected = Reference(checkpoint.model, checkpoint.contract)(clips)
    with edgetube.Runtime(deferred) as rt:
        np.testing.assert_allclose(rt(clips), expected, atol=2e-2)
        assert rt.describe()["replay"] == "CUDA graph"
    assert machine.opened[-1].closed


@pytest.mark.parametrize("target", ["trt-fp16", "rtx-fp16"])
def test_no_memory_for_a_context_is_one_error(machine: Machine, deferred: Bundle, target: str) -> None:
    machine.use(has_context=False)
    with pytest.raises(BackendError, match=r"10\.3\.0: cannot make a context for .* on RTX 4070, perhaps for memory"):
        edgetube.Runtime(replace(deferred, target=target))
    assert machine.opened[-1].closed


def test_pinned_memory_is_given_back_in_its_context(machine: Machine, deferred: Bundle) -> None:
    rt = edgetube.Runtime(deferred)
    rt(np.zeros((1, *deferred.contract.shape), np.uint8))
    stream = machine.opened[-1]
    rt.close()
    del rt
    gc.collect()
    assert stream.freed == [1, 1]
    assert stream.closed


def test_without_a_cuda_graph_it_runs_and_says_so(
    machine: doubles.Machine, deferred: Bundle, rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    machine.stream = {"can_capture": False}
    clips = rng.integers(0, 256, (1, *deferred.contract.shape), np.uint8)
    with edgetube.Runtime(deferred) as rt:
        first = rt(clips)
        np.testing.assert_array_equal(first, rt(clips))
        assert rt.describe()["replay"].startswith("none: CUDA cannot record")
    assert "kernel by kernel" in caplog.text


def test_no_call_allocates(machine: doubles.Machine, deferred: Bundle, rng: np.random.Generator) -> None:
    clips = rng.integers(0, 256, (2, *deferred.contract.shape), np.uint8)
    with edgetube.Runtime(deferred) as rt:
        before = len(machine.opened[-1].memory)
        for _ in range(3):
            rt(clips)
        assert len(machine.opened[-1].memory) == before == 2


def test_several_runtimes_in_one_process_and_threads(
    machine: doubles.Machine, deferred: Bundle, rng: np.random.Generator
) -> None:
    clips = rng.integers(0, 256, (4, 1, *deferred.contract.shape), np.uint8)
    with edgetube.Runtime(deferred) as rt:
        expected = [rt(clip) for clip in clips]
        got: dict[int, npt.NDArray[np.float32]] = {}

        def ask(i: Any) -> None:
            got[i] = rt(clips[i])

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(clips))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    np.testing.assert_array_equal(np.stack([got[i] for i in range(len(clips))]), np.stack(expected))
    opened = len(machine.opened)
    with edgetube.Runtime(deferred), edgetube.Runtime(deferred):
        assert len(machine.opened) == opened + 2


def test_an_engine_that_does_not_open_says_what_the_sdk_said(machine: doubles.Machine, deferred: Bundle) -> None:
    machine.use(opens=False)
    with pytest.raises(BackendError, match=r"TensorRT 10\.3\.0: cannot open .* on RTX 4070: .*incompatible device$"):
        edgetube.Runtime(deferred)
    assert machine.opened[-1].closed


def test_a_call_that_fails_says_what_the_sdk_said(machine: doubles.Machine, deferred: Bundle) -> None:
    machine.use(runs=False)
    with pytest.raises(BackendError, match=r"cannot run the engine: .*Cuda Runtime \(illegal address\)"):
        edgetube.Runtime(deferred)
    assert machine.opened[-1].closed


@pytest.mark.parametrize("device", ["cpu", "gpu", "cuda:x"])
def test_an_unknown_device(machine: doubles.Machine, deferred: Bundle, device: str) -> None:
    with pytest.raises(InputError, match=f"no device is called '{device}' here; expected cuda"):
        edgetube.Runtime(deferred, device=device)


def targets_here() -> Iterator[Any]:
    """Every target of the two SDKs, on the doubles, and marked `gpu` on this machine's GPU."""
    for target in export.targets().values():
        if target.backend == "tensorrt":
            marks = {"trt-fp16": [], "trt-int8": [pytest.mark.slow]}.get(target.name, [pytest.mark.long])
            yield pytest.param((target.name, True), id=f"{target.name}-double", marks=marks)
            yield pytest.param((target.name, False), id=target.name, marks=pytest.mark.gpu)


@pytest.fixture(scope="class")
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """The built-in model for one target, exported where its engine can run; `request.param` says what and where."""
    (name, double), folder = request.param, tmp_path_factory.mktemp("gpu")
    with doubles.machine(folder / "cache") if double else pytest.MonkeyPatch.context() as here:
        if isinstance(here, pytest.MonkeyPatch):
            here.setenv("EDGETUBE_CACHE", str(folder / "cache"))
        yield export_here(name, tmp_path_factory.getbasetemp() / "out", GATHER)  # int8 calibrates once


@pytest.mark.parametrize("bundle", list(targets_here()), indirect=True)
class TestOnAGpu:
    def test_it_answers_like_pytorch_and_says_what_ran(self, bundle: Bundle, rng: np.random.Generator) -> None:
        checkpoint = checkpoints.load("demo")
        clips = rng.integers(0, 256, (3, *bundle.contract.shape), np.uint8)
        expected = Reference(checkpoint.model, checkpoint.contract)(clips)
        assert bundle.status == "executed"
        with edgetube.Runtime(bundle) as rt:
            error = np.abs(rt(clips) - expected).max()
            described = rt.describe()
        assert error <= (export.target(bundle.target).tolerance or 0.1) * max(1, np.abs(expected).max())
        assert described["replay"] == "CUDA graph"
        assert described["layers"]["kernels"] > 0

    def test_an_engine_built_on_the_first_load_is_kept(self, bundle: Bundle) -> None:
        bare = replace(bundle, build={k: v for k, v in bundle.build.items() if k != "engine"})
        with edgetube.Runtime(bare) as rt:
            assert rt.describe()["engine"].startswith("built here: the bundle has no engine")
        with edgetube.Runtime(bare) as rt:
            assert rt.describe()["engine"] == "built here earlier: the bundle has no engine"
        assert list(cache.folder().glob("*.engine"))

    def test_two_runtimes_in_two_threads(self, bundle: Bundle, rng: np.random.Generator) -> None:
        clips = rng.integers(0, 256, (8, 1, *bundle.contract.shape), np.uint8)
        with edgetube.Runtime(bundle) as first, edgetube.Runtime(bundle) as second:
            expected = [first(clip) for clip in clips]
            got = {}

            def ask(rt: Any, part: Any) -> None:
                got.update({i: rt(clips[i]) for i in part})

            threads = [
                threading.Thread(target=ask, args=pair) for pair in ((first, range(0, 8, 2)), (second, range(1, 8, 2)))
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for i, logits in got.items():
            np.testing.assert_allclose(logits, expected[i], atol=1e-3)
        assert len(got) == 8

    def test_the_golden_clip(self, bundle: Bundle) -> None:
        with edgetube.Runtime(bundle) as rt:
            rt.check()

    def test_the_evaluation_set(self, bundle: Bundle, request: pytest.FixtureRequest) -> None:
        double = "double" in request.node.name  # its answers are those of the processor, which takes its time
        found = parity.measure([bundle], datasets.built_in(27 if double else 252, bundle.labels))
        (measured,) = found.measured
        assert measured.parity.status == "executed"
        assert measured.parity.agreement >= 0.99
        assert (measured.parity.top1 or 0.0) >= (measured.parity.top1_reference or 1) - 0.01


def legacy_targets() -> Iterator[Any]:
    for name in ("trt-fp32", "trt-fp16", "trt-int8"):
        yield pytest.param(name, True, id=f"{name}-double", marks=pytest.mark.long)
        yield pytest.param(name, False, id=name, marks=pytest.mark.gpu)


@pytest.mark.parametrize(("name", "double"), list(legacy_targets()))
def test_on_a_gpu_networks_without_types(
    name: str, double: bool, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGETUBE_CACHE", str(tmp_path / "cache"))
    with doubles.machine(tmp_path / "cache") if double else nullcontext():
        skip_where_it_cannot_run(name)
        if int((version := load_sdk("trt").version).split(".")[0]) > 10:
            pytest.skip(f"TensorRT {version} knows typed networks only")
        out = tmp_path_factory.getbasetemp() / "out"
        bundle = export_here(name, out, replace(GATHER, settings={"legacy": "yes"}))
        assert bundle.status == "executed"
        with edgetube.Runtime(bundle) as rt:
            assert (rt.describe()["layers"]["gemms"].get("int8", 0) > 0) == (name == "trt-int8")


def skip_where_it_cannot_run(name: str) -> None:
    target = export.target(name)
    if missing := target.missing(target.run_needs):
        pytest.skip(f"{name} cannot run here: that needs {', '.join(missing)}")


def export_here(name: str, out: Path, options: pipeline.Options) -> Bundle:
    """A bundle of the built-in model; skipped with the SDK's own words where it does not take this GPU."""
    skip_where_it_cannot_run(name)
    gpu = cuda.open_stream(0, "rtx")
    gpu.close()
    try:
        return pipeline.export_model(name, "demo", out, options)
    except BackendError as error:
        if name.startswith("rtx") and gpu.capability in ("9.0", "10.0"):  # in no list of TensorRT for RTX
            pytest.skip(f"{gpu.name} ({gpu.capability}): {error}")
        raise
