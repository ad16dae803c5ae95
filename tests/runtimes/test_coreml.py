"""What the Core ML backend does around Core ML, with a stand-in; the conformance tests run the real one on macOS."""

from __future__ import annotations

import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetube import mlpackage
from edgetube.bundle import Bundle
from edgetube.errors import BackendError, InputError
from edgetube.export import pipeline
from edgetube.runtimes import coreml, mil

pytest.importorskip("coremltools")


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    options = pipeline.Options(
        lowering="gather", settings={"functions": "video+image", "deployment": "iOS18", "input": "int32"}
    )
    return pipeline.export_model("coreml-fp16", tiny_checkpoint, tmp_path_factory.mktemp("out"), options)


class MLNeuralEngineComputeDevice:
    pass


class MLCPUComputeDevice:
    pass


class Model:
    """Core ML's model: evaluates, and keeps the array that it was given."""

    def __init__(self, path: Any, compute_units: Any, function_name: Any) -> None:
        self.program = mil.Program(mlpackage.load(path), function_name)
        self.units = compute_units
        self.kept: list[Any] = []

    def predict(self, inputs: Any) -> Any:
        self.kept.append(inputs["frames"])
        return self.program(inputs)

    def get_compiled_model_path(self) -> str:
        return "model.mlmodelc"


class Plan:
    @classmethod
    def load_from_path(cls, path: Any, compute_units: Any) -> Any:
        block = types.SimpleNamespace(operations=["a", "b", "c", "const"])
        functions = {name: types.SimpleNamespace(block=block) for name in ("video", "image")}
        plan: Any = cls()
        plan.model_structure = types.SimpleNamespace(program=types.SimpleNamespace(functions=functions))
        return plan

    def get_compute_device_usage_for_mlprogram_operation(self, operation: Any) -> Any:
        devices = {"a": MLNeuralEngineComputeDevice(), "b": MLNeuralEngineComputeDevice(), "c": MLCPUComputeDevice()}
        return types.SimpleNamespace(preferred_compute_device=devices[operation]) if operation in devices else None


@pytest.fixture
def vendor(monkeypatch: pytest.MonkeyPatch) -> Any:
    units = types.SimpleNamespace(ALL=0, CPU_ONLY=1, CPU_AND_GPU=2, CPU_AND_NE=3)
    models = types.SimpleNamespace(MLModel=Model, compute_plan=types.SimpleNamespace(MLComputePlan=Plan))
    fake = types.SimpleNamespace(ComputeUnit=units, models=models, __version__="9.0")
    monkeypatch.setattr(coreml, "missing", lambda _: ())
    monkeypatch.setattr(coreml, "need", lambda *_: fake)
    return fake


def test_it_answers_and_owns_its_buffers(vendor: Any, bundle: Bundle, rng: np.random.Generator) -> None:
    clips = rng.integers(0, 256, (3, *bundle.contract.shape), np.uint8)
    expected = mil.Session(bundle)(clips)
    with coreml.Session(bundle) as backend:
        np.testing.assert_array_equal(backend(clips), expected)
        first, second, third = backend.model.kept
        assert first is third
        assert not np.shares_memory(first, second)
        assert not any(np.shares_memory(clips, kept) for kept in (first, second))
        assert first.dtype == np.int32
        np.testing.assert_array_equal(second, clips[1:2])  # what Core ML may hold is the clip that it was shown


def test_units_and_plan(vendor: Any, bundle: Bundle) -> None:
    with coreml.Session(bundle, device="ane") as backend:
        assert backend.model.units == vendor.ComputeUnit.CPU_AND_NE
        assert backend.describe()["operations"] == {"ane": 2, "cpu": 1}
        assert backend.describe()["function"] == "video"


def test_a_system_without_plans_predicts_all_the_same(
    vendor: Any, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    def refuse(**_: Any) -> None:
        raise ValueError("MLComputePlan is not supported.")

    monkeypatch.setattr(Plan, "load_from_path", refuse)
    frames = rng.integers(0, 256, (1, *bundle.contract.shape), np.uint8)
    with coreml.Session(bundle) as backend:
        assert backend.describe()["operations"] == {}
        np.testing.assert_array_equal(backend(frames), mil.Session(bundle)(frames))


def test_the_function_that_takes_the_clips_is_chosen(vendor: Any, bundle: Bundle, rng: np.random.Generator) -> None:
    image = replace(bundle, spec=bundle.spec.with_clip(frames=1), contract=bundle.contract.with_clip(1))
    frames = rng.integers(0, 256, (1, *image.contract.shape), np.uint8)
    with coreml.Session(image) as backend:
        assert backend.function == "image"
        np.testing.assert_array_equal(backend(frames), mil.Session(image)(frames))


def test_what_cannot_be_chosen(vendor: Any, bundle: Bundle) -> None:
    with pytest.raises(
        InputError, match="no device is called 'cuda' here; Core ML knows all, cpu, gpu, ane, and emulated"
    ):
        coreml.Session(bundle, device="cuda")
    with pytest.raises(InputError, match="threads is 4; Core ML chooses"):
        coreml.Session(bundle, threads=4)


def test_its_refusals_are_ours(vendor: Any, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("Error compiling model:\n bad")

    clips = np.zeros((1, *bundle.contract.shape), np.uint8)
    with coreml.Session(bundle) as backend:
        monkeypatch.setattr(backend.model, "predict", refuse)
        with pytest.raises(BackendError, match="the prediction failed: Error compiling model: bad"):
            backend(clips)
    monkeypatch.setattr(vendor.models, "MLModel", refuse)
    with pytest.raises(BackendError, match=r"Core ML cannot open .*model\.mlpackage: Error compiling model: bad"):
        coreml.Session(bundle)
