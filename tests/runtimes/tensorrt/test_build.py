"""How engines are built: settings, networks with and without types, the calibrator and progress."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias, cast

import numpy as np
import pytest

import edgetube
from edgetube import bundle as bundles
from edgetube.bundle import Bundle
from edgetube.errors import BackendError, BundleError
from edgetube.export import pipeline
from edgetube.runtimes.tensorrt import build as builder
from edgetube.runtimes.tensorrt.build import LEGACY, Settings
from edgetube.runtimes.tensorrt.sdk import FAMILIES, Sdk, load_sdk
from tests.runtimes.doubles import HostStream, Machine, vendor

Record: TypeAlias = dict[str, Any]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workspace_mb": 0}, "workspace_mb is 0"),
        ({"workspace_mb": True}, "workspace_mb is True"),
        ({"version_compatible": "yes"}, "version_compatible is 'yes'"),
        ({"hardware_compatible": "turing"}, "hardware_compatible is 'turing'"),
        ({"legacy": "int4"}, "legacy is 'int4'"),
        ({"layers": [["*"]]}, "layers has 1 entries; expected 2"),
        ({"layers": [["*", "fp8"]]}, r"layers.\* is 'fp8'"),
        ({"capabilities": ["SM89"]}, "capabilities is 'SM89'"),
        ({"plugins": "x.so"}, "build.settings has no field plugins"),
    ],
)
def test_damaged_settings_are_refused(machine: Machine, deferred: Bundle, change: Record, message: str) -> None:
    settings = deferred.build["settings"] | change
    with pytest.raises(BundleError, match=rf"build is damaged \({message}"):
        edgetube.Runtime(replace(deferred, build={**deferred.build, "settings": settings}))


def test_bundle_round_trip_keeps_the_settings(deferred: Bundle) -> None:
    again = bundles.load(deferred.path)
    assert Settings.from_json(again.build["settings"]) == Settings()


@pytest.mark.parametrize(("version", "works"), [("8.6.1", False), ("9.3.0", False), ("10.0.1", True), ("11.0.0", True)])
def test_versions_of_typed_networks(monkeypatch: pytest.MonkeyPatch, version: str, works: bool) -> None:
    trt = vendor(version=version)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    flags = {"STRONGLY_TYPED": 1} if version.startswith("10") else {}
    trt.NetworkDefinitionCreationFlag = SimpleNamespace(**flags)
    sdk = Sdk(FAMILIES["trt"])
    if works:
        assert builder._strongly_typed(sdk) == (2 if flags else 0)
    else:
        with pytest.raises(BackendError, match=r"needs TensorRT 10\.0 or newer"):
            builder._strongly_typed(sdk)


class Recorder:
    """Stands for any object of TensorRT 8 to 10 and records what is called and set: full TensorRT needs its GPU."""

    def __init__(self, **known: Any) -> None:
        self.__dict__.update(known, calls=[])

    def __setattr__(self, name: Any, value: Any) -> None:
        self.calls.append((name, value))

    def __getattr__(self, name: Any) -> Any:
        return lambda *arguments: self.calls.append((name, *arguments))


def old_vendor(layers: Any) -> Any:
    """A module like TensorRT 8.6's: networks without types, precision flags and calibrators."""
    trt = vendor(version="8.6.1")

    trt.float32, trt.float16, trt.int8, trt.int32 = "fp32", "fp16", "int8", "int32"
    trt.BuilderFlag = SimpleNamespace(FP16="FP16", INT8="INT8", TF32="TF32", OBEY_PRECISION_CONSTRAINTS="OBEY")
    trt.NetworkDefinitionCreationFlag = SimpleNamespace(EXPLICIT_BATCH=0)
    trt.LayerType = SimpleNamespace(CONSTANT="constant")
    trt.ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
    trt.config = Recorder()
    trt.network = SimpleNamespace(num_layers=len(layers), get_layer=layers.__getitem__)

    def create_network(flags: Any) -> Any:
        trt.flags.append(flags)
        return trt.network

    trt.Builder = lambda log: SimpleNamespace(
        create_network=create_network,
        create_builder_config=lambda: trt.config,
        build_serialized_network=lambda network, config: b"plan",
    )
    trt.OnnxParser = lambda network, log: SimpleNamespace(parse_from_file=lambda path: True)
    return trt


def layer(name: Any, kind: str = "matmul", dtype: str = "fp32") -> Any:
    return Recorder(name=name, type=kind, num_outputs=1, get_output=lambda i: SimpleNamespace(dtype=dtype))


class TestLegacy:
    """TensorRT 8.6 to 10 without typed networks, as far as calls can tell; types are checked against the stubs."""

    LAYERS = (("*", "fp16"), ("norm", "fp32"), ("fc.matmul", "int8"))

    @pytest.fixture
    def sdk(self, monkeypatch: pytest.MonkeyPatch) -> Sdk:
        layers = [
            layer("norm"), layer("fc.matmul"), layer("scores"), layer("weights", kind="constant"),
            layer("gather", dtype="int32"),
        ]  # fmt: skip
        trt = old_vendor(layers)
        trt.recorded = layers
        monkeypatch.setitem(sys.modules, "tensorrt", trt)
        return Sdk(FAMILIES["trt"])

    @pytest.mark.parametrize(
        ("precision", "flags"), [("fp32", []), ("fp16", ["FP16", "OBEY"]), ("int8", ["FP16", "OBEY", "INT8"])]
    )
    def test_flags(self, sdk: Sdk, precision: str, flags: list[Any], tmp_path: Path) -> None:
        settings = Settings(legacy=precision)
        assert builder.build(sdk, tmp_path / "legacy.onnx", settings, calibrator=cast(Any, "ours")) == b"plan"
        assert cast(Any, sdk.api).flags == [1]  # an explicit batch, and no types
        calls = cast(Any, sdk.api).config.calls
        assert ("clear_flag", "TF32") in calls
        assert [call[1] for call in calls if call[0] == "set_flag"] == flags
        assert (("int8_calibrator", "ours") in calls) == (precision == "int8")

    def test_each_layer_computes_in_what_it_was_given(self, sdk: Sdk, tmp_path: Path) -> None:
        builder.build(sdk, tmp_path / "legacy.onnx", Settings(legacy="int8", layers=self.LAYERS))
        norm, linear, scores, weights, gather = (layer.calls for layer in cast(Any, sdk.api).recorded)
        assert norm == [("precision", "fp32"), ("set_output_type", 0, "fp32")]
        assert linear == [("precision", "int8")]
        assert scores == [("precision", "fp16")]
        assert weights == gather == []

    def test_the_calibrator_gives_every_clip_once_and_keeps_what_tensorrt_found(
        self, sdk: Sdk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
    ) -> None:
        monkeypatch.setenv("EDGETUBE_CACHE", str(tmp_path / "cache"))
        clips = rng.integers(0, 256, (5, 2, 4, 4, 3), np.uint8)
        np.save(tmp_path / bundles.CALIBRATION_CLIPS, clips)
        (tmp_path / LEGACY).write_bytes(b"graph")
        gpu = HostStream(0)

        def make(version: str = "8.6.1") -> Any:
            sdk.api.__version__ = version
            return builder.calibrator(sdk, tmp_path, Settings(legacy="int8"), gpu, batch=2)

        with gpu.current():
            calibrator = make()
            assert calibrator.base_was_initialised
            assert calibrator.get_batch_size() == 2
            assert calibrator.read_calibration_cache() is None
            for start in (0, 2):
                (address,) = calibrator.get_batch(["frames"])
                np.testing.assert_array_equal(gpu.memory[address], clips[start : start + 2].reshape(-1))
            assert calibrator.get_batch(["frames"]) == []
            calibrator.write_calibration_cache(memoryview(b"TRT-8601-EntropyCalibration2"))
            assert make().read_calibration_cache() == b"TRT-8601-EntropyCalibration2"
            assert make("10.3.0").read_calibration_cache() is None
            clips[0, 0, 0, 0, 0] += 1
            np.save(tmp_path / bundles.CALIBRATION_CLIPS, clips)
            assert make().read_calibration_cache() is None

    @pytest.mark.parametrize("precision", ["", "fp16"])
    def test_others_need_no_calibrator(self, sdk: Sdk, tmp_path: Path, precision: str) -> None:
        assert builder.calibrator(sdk, tmp_path, Settings(legacy=precision), HostStream(0), 1) is None

    def test_tensorrt_11_says_what_to_do(self, sdk: Sdk, tmp_path: Path) -> None:
        del sdk.api.IInt8EntropyCalibrator2
        sdk.api.__version__ = "11.0.0"
        with pytest.raises(BackendError, match=r"TensorRT 11\.0\.0 knows typed networks only"):
            builder.build(sdk, tmp_path / "legacy.onnx", Settings(legacy="fp16"))


def test_the_builder_reports_its_phases(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx: pip install 'edgetube[rtx]'")
    bundle = pipeline.export_model("rtx-fp16", tiny_checkpoint, tmp_path, pipeline.Options(lowering="gather"))
    told = []
    settings = Settings(workspace_mb=256, capabilities=("86",))
    builder.build(load_sdk("rtx"), bundle.artifact_path, settings, lambda *step: told.append(step))
    assert told
    assert all(0 <= step <= steps for _, step, steps in told)
