"""The runtime of engines, over the doubles of `doubles.py`; the tests of bundles also on a GPU, marked `gpu`."""

from __future__ import annotations

import gc
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import pytest

import edgetube
from edgetube import bundle as bundles
from edgetube import cache, cuda, datasets, export
from edgetube.bench import parity
from edgetube.bundle import Bundle, FileRecord
from edgetube.errors import BackendError, BundleError, InputError, MissingPackageError
from edgetube.export import pipeline
from edgetube.model import checkpoints
from edgetube.runtimes import tensorrt as runtime
from edgetube.runtimes.torch import Reference
from edgetube.targets import installed
from tests.runtimes import doubles
from tests.runtimes.doubles import HostStream, Machine, vendor

Record: TypeAlias = dict[str, Any]

GATHER = pipeline.Options(lowering="gather")


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[doubles.Machine]:
    """A machine of doubles: a GPU, both SDKs, and a builder that writes the graph's bytes."""
    with doubles.machine(tmp_path / "cache") as here:
        yield here


@pytest.fixture(scope="module")
def deferred(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A trt-fp16 bundle without an engine, two clips a call."""
    target = export.target("trt-fp16")
    if not target.missing(target.run_needs):
        pytest.skip("this machine builds the engine when it exports")
    options = replace(GATHER, batch=2)
    return pipeline.export_model("trt-fp16", tiny_checkpoint, tmp_path_factory.mktemp("trt"), options)


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


def test_the_first_load_builds_and_the_next_ones_do_not(
    machine: doubles.Machine, deferred: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    with edgetube.Runtime(deferred) as rt:
        assert rt.describe()["engine"] == "built here: the bundle has no engine; first load on this machine"
    assert "building the engine of tiny.trt-fp16 for RTX 4070" in caplog.text
    assert "built in 0 s; kept in" in caplog.text
    with edgetube.Runtime(deferred) as rt:
        assert rt.describe()["engine"] == "built here earlier: the bundle has no engine"
    assert len(machine.builds) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": "10.7.0"}, "TensorRT 10.3.0 -> 10.7.0"),
        ({"name": "Orin", "capability": "8.7"}, r"GPU RTX 4070 (8.9) -> Orin (8.7)"),
        ({"driver": "13.0"}, "driver 12.4 -> 13.0"),
        ({"settings": {"workspace_mb": 64}}, "settings default -> workspace_mb=64"),
    ],
)
def test_what_changed_is_said_and_built_anew(
    machine: doubles.Machine, deferred: Bundle, change: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    edgetube.Runtime(deferred).close()
    if "version" in change:
        machine.use(version=change["version"])
    elif "name" in change:
        machine.stream = change
    elif "driver" in change:
        original = HostStream.__init__

        def newer(self: Any, *arguments: Any, **names: Any) -> None:
            original(self, *arguments, **names)
            self.driver = change["driver"]

        monkeypatch.setattr(HostStream, "__init__", newer)
    else:
        settings = deferred.build["settings"] | change["settings"]
        deferred = replace(deferred, build={**deferred.build, "settings": settings})
    with edgetube.Runtime(deferred) as rt:
        assert rt.describe()["engine"].endswith(f"changed: {said}")
    assert len(machine.builds) == 2


def test_another_graph_under_the_same_name_builds_anew(machine: doubles.Machine, deferred: Bundle) -> None:
    edgetube.Runtime(deferred).close()
    record = replace(deferred.files["model.onnx"], sha256="0" * 64)
    other = replace(deferred, files={**deferred.files, "model.onnx": record})
    with edgetube.Runtime(other, verify=False) as rt:
        assert "changed: graph " in rt.describe()["engine"]


class TestTheBundlesOwnEngine:
    @pytest.fixture
    def record(self) -> dict[str, Any]:
        return {
            "file": "model.onnx",  # the double opens ONNX files
            "version": "10.3.0",
            "version_compatible": False,
            "capabilities": [],
            "gpu": "RTX 4070",
        }

    def test_it_is_used_where_it_fits(self, machine: doubles.Machine, deferred: Bundle, record: dict[str, Any]) -> None:
        with edgetube.Runtime(replace(deferred, build={**deferred.build, "engine": record})) as rt:
            assert rt.describe()["engine"] == "the bundle's"
        assert machine.builds == []

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"version": "10.7.0"}, "the bundle's engine is for TensorRT 10.7.0, here is 10.3.0"),
            ({"gpu": "Orin"}, "the bundle's engine is for Orin, here is RTX 4070"),
            ({"capabilities": ["86", "120"]}, "for compute capability 86, 120, here is 8.9"),
        ],
    )
    def test_else_both_sides_are_named_and_one_is_built(
        self, machine: doubles.Machine, deferred: Bundle, record: dict[str, Any], change: dict[str, Any], said: str
    ) -> None:
        with edgetube.Runtime(replace(deferred, build={**deferred.build, "engine": record | change})) as rt:
            assert said in rt.describe()["engine"]
        assert len(machine.builds) == 1

    @pytest.mark.parametrize(
        "change",
        [
            {"version": "10.2.1", "version_compatible": True},
            {"version": "10.3.0", "version_compatible": True},
            {"gpu": ""},
            {"capabilities": ["86", "89"]},
            {"platform": runtime.system()},
        ],
    )
    def test_what_was_built_to_travel_travels(
        self, machine: Machine, deferred: Bundle, record: Record, change: Record
    ) -> None:
        with edgetube.Runtime(replace(deferred, build={**deferred.build, "engine": record | change})) as rt:
            assert rt.describe()["engine"] == "the bundle's"

    @pytest.mark.parametrize("version", ["10.3.1", "10.7.0", "11.0.0", "9.3.0", "8.6.1"])
    def test_it_does_not_travel_to_older_versions_nor_to_other_majors(
        self, machine: Machine, deferred: Bundle, record: Record, version: str
    ) -> None:
        """Older engines run in newer TensorRT of their major, "not in older runtimes" (its documentation)."""
        engine = record | {"version": version, "version_compatible": True}
        with edgetube.Runtime(replace(deferred, build={**deferred.build, "engine": engine})) as rt:
            assert f"the bundle's engine is for TensorRT {version}, here is 10.3.0" in rt.describe()["engine"]

    def test_one_that_does_not_open_after_all_is_built_anew(
        self, machine: Machine, deferred: Bundle, record: Record, tmp_path: Path
    ) -> None:
        shutil.copytree(deferred.path, tmp_path / "b")
        (tmp_path / "b" / "model.engine").write_bytes(b"an engine of who knows which GPU")
        files = {**deferred.files, "model.engine": FileRecord(32, "0" * 64)}
        build = {**deferred.build, "engine": record | {"file": "model.engine"}}
        bundle = replace(deferred, path=tmp_path / "b", build=build, files=files)
        machine.use(opens=lambda plan: not plan.startswith(b"an engine"))
        with edgetube.Runtime(bundle, verify=False) as rt:
            assert rt.describe()["engine"].startswith(
                "built here: the engine that was there does not open (Error Code 6"
            )
        assert len(machine.builds) == 1

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"file": "../model.engine"}, "build.engine.file is '../model.engine'"),
            ({"file": "unlisted.engine"}, "'unlisted.engine' is not among the files of the manifest"),
            ({"version": 10}, "build.engine.version is 10"),
            ({"version": "ten"}, "build.engine.version is 'ten'"),
            ({"version_compatible": 1}, "version_compatible is 1; expected true or false"),
            ({"capabilities": "89"}, "capabilities is '89'; expected a list"),
            ({"capabilities": [89]}, "capabilities is 89; expected text"),
            ({"gpu": None}, "build.engine.gpu is None"),
            ({"more": 1}, "build.engine has no field more"),
        ],
    )
    def test_a_damaged_record_is_refused(
        self, machine: Machine, deferred: Bundle, record: Record, change: Record, message: str
    ) -> None:
        with pytest.raises(BundleError, match=message):
            edgetube.Runtime(replace(deferred, build={**deferred.build, "engine": record | change}))


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


class TestWhatIsKeptOnTheMachine:
    def test_a_kept_engine_that_does_not_open_any_more_is_built_anew_once(
        self, machine: Machine, deferred: Bundle
    ) -> None:
        edgetube.Runtime(deferred).close()
        refusals = iter([False])
        machine.use(opens=lambda plan: next(refusals, True))
        with edgetube.Runtime(deferred) as rt:
            said = rt.describe()["engine"]
        assert said.startswith("built here: the engine that was there does not open")
        assert said.endswith("; the one in the cache was refused")
        with edgetube.Runtime(deferred) as rt:
            assert rt.describe()["engine"] == "built here earlier: the bundle has no engine"
        assert len(machine.builds) == 2

    def test_timings_are_the_host_s_and_not_the_bundle_s(
        self, machine: Machine, deferred: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings = deferred.build["settings"] | {"timing_cache": "/etc/passwd"}  # of an older bundle
        bundle = replace(deferred, build={**deferred.build, "settings": settings})
        edgetube.Runtime(bundle).close()
        monkeypatch.setenv("EDGETUBE_TIMING_CACHE", str(tmp_path / "timings"))
        machine.stream = {"name": "Orin", "capability": "8.7"}
        edgetube.Runtime(bundle).close()
        assert machine.timing_caches == [None, tmp_path / "timings"]
        assert "timing_cache" not in runtime.Settings().to_json()

    @pytest.fixture
    def on_rtx(self, machine: Machine, deferred: Bundle) -> Bundle:
        return replace(deferred, target="rtx-fp16", name="m.rtx-fp16")

    def kernels(self, tmp_path: Path) -> list[Path]:
        return sorted((tmp_path / "cache").glob("*.jit"))

    def test_kernels_belong_to_a_driver_and_a_gpu(self, machine: Machine, on_rtx: Bundle, tmp_path: Path) -> None:
        for count, stream in enumerate(({}, {}, {"name": "RTX 4080"}, {"driver": "13.0"}), start=1):
            machine.stream = stream
            edgetube.Runtime(on_rtx).close()
            assert len(self.kernels(tmp_path)) == max(1, count - 1)

    def test_kernels_that_are_refused_are_replaced(self, machine: Machine, on_rtx: Bundle, tmp_path: Path) -> None:
        edgetube.Runtime(on_rtx).close()
        (path,) = self.kernels(tmp_path)
        path.write_bytes(b"of another driver")
        machine.use(kernels=lambda data: data == b"kernels")
        edgetube.Runtime(on_rtx).close()
        assert path.read_bytes() == b"kernels"


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


def test_a_missing_sdk_says_the_pip_line(deferred: Bundle) -> None:
    if installed("tensorrt"):
        pytest.skip("TensorRT is installed")
    runtime.sdk.cache_clear()
    with pytest.raises(MissingPackageError, match=r"pip install 'edgetube\[tensorrt\]'"):
        edgetube.Runtime(deferred)


class TestLayerTruth:
    TEXT = """Layers:
Name: __myl_Cast_0, LayerType: kgen, Inputs: [ { Name: frames, Dimensions: [1,2], Datatype: UInt8 }], Outputs: []
Name: s_1, LayerType: signal, Inputs: [], Outputs: []
Name: q_2, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [1], Datatype: Int8 }], Metadata: [ONNX Layer: q.matmul]
Name: __myl_FcAdd_3, LayerType: runtime_fusion, Inputs: [ { Name: y, Datatype: Half }], Metadata: [ONNX Layer: fc1]\
[ONNX Layer: fc1.matmul]
Name: __myl_CastMulFc_6, LayerType: runtime_fusion, Inputs: [ { Name: y, Datatype: Int8 }, { Name: w, Datatype: Half }]
Name: CaskGemm, LayerType: CaskGemmMatrixMultiply, Inputs: [ { Name: z, Format/Datatype: Row major linear FP32 }]
Name: _gemm_mha_v2_4, LayerType: kgen, Inputs: [ { Name: q, Datatype: Half }]
Name: __myl_AddReshTranReshMove_5, LayerType: kgen, Inputs: [ { Name: q, Datatype: Half }]
Name: Reformatting CopyNode for Input, LayerType: Reformat, Inputs: [ { Name: q, Datatype: Half }]
Bindings: frames
"""

    def test_counts(self) -> None:
        assert runtime.summarize_engine_layers(self.TEXT) == {
            "kernels": 8,
            "gemms": {"int8": 1, "fp16": 2, "fp32": 1},
            "attention": {"fp16": 1},
            "reformats": 2,
            "float_gemms": ["fc1.matmul", "__myl_CastMulFc_6", "CaskGemm"],
        }

    def test_nothing_was_told(self) -> None:
        assert runtime.summarize_engine_layers("")["kernels"] == 0


@pytest.mark.parametrize(("version", "works"), [("8.6.1", False), ("9.3.0", False), ("10.0.1", True), ("11.0.0", True)])
def test_versions_of_typed_networks(monkeypatch: pytest.MonkeyPatch, version: str, works: bool) -> None:
    trt = vendor(version=version)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    flags = {"STRONGLY_TYPED": 1} if version.startswith("10") else {}
    trt.NetworkDefinitionCreationFlag = SimpleNamespace(**flags)
    sdk = runtime.Sdk(runtime.FAMILIES["trt"])
    if works:
        assert runtime._strongly_typed(sdk) == (2 if flags else 0)
    else:
        with pytest.raises(BackendError, match=r"needs TensorRT 10\.0 or newer"):
            runtime._strongly_typed(sdk)


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
    def sdk(self, monkeypatch: pytest.MonkeyPatch) -> runtime.Sdk:
        layers = [
            layer("norm"), layer("fc.matmul"), layer("scores"), layer("weights", kind="constant"),
            layer("gather", dtype="int32"),
        ]  # fmt: skip
        trt = old_vendor(layers)
        trt.recorded = layers
        monkeypatch.setitem(sys.modules, "tensorrt", trt)
        return runtime.Sdk(runtime.FAMILIES["trt"])

    @pytest.mark.parametrize(
        ("precision", "flags"), [("fp32", []), ("fp16", ["FP16", "OBEY"]), ("int8", ["FP16", "OBEY", "INT8"])]
    )
    def test_flags(self, sdk: runtime.Sdk, precision: str, flags: list[Any], tmp_path: Path) -> None:
        settings = runtime.Settings(legacy=precision)
        assert runtime.build(sdk, tmp_path / "legacy.onnx", settings, calibrator=cast(Any, "ours")) == b"plan"
        assert cast(Any, sdk.api).flags == [1]  # an explicit batch, and no types
        calls = cast(Any, sdk.api).config.calls
        assert ("clear_flag", "TF32") in calls
        assert [call[1] for call in calls if call[0] == "set_flag"] == flags
        assert (("int8_calibrator", "ours") in calls) == (precision == "int8")

    def test_each_layer_computes_in_what_it_was_given(self, sdk: runtime.Sdk, tmp_path: Path) -> None:
        runtime.build(sdk, tmp_path / "legacy.onnx", runtime.Settings(legacy="int8", layers=self.LAYERS))
        norm, linear, scores, weights, gather = (layer.calls for layer in cast(Any, sdk.api).recorded)
        assert norm == [("precision", "fp32"), ("set_output_type", 0, "fp32")]
        assert linear == [("precision", "int8")]
        assert scores == [("precision", "fp16")]
        assert weights == gather == []

    def test_the_calibrator_gives_every_clip_once_and_keeps_what_tensorrt_found(
        self, sdk: runtime.Sdk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
    ) -> None:
        monkeypatch.setenv("EDGETUBE_CACHE", str(tmp_path / "cache"))
        clips = rng.integers(0, 256, (5, 2, 4, 4, 3), np.uint8)
        np.save(tmp_path / bundles.CALIBRATION_CLIPS, clips)
        (tmp_path / runtime.LEGACY).write_bytes(b"graph")
        gpu = HostStream(0)

        def make(version: str = "8.6.1") -> Any:
            sdk.api.__version__ = version
            return runtime.calibrator(sdk, tmp_path, runtime.Settings(legacy="int8"), gpu, batch=2)

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
    def test_others_need_no_calibrator(self, sdk: runtime.Sdk, tmp_path: Path, precision: str) -> None:
        assert runtime.calibrator(sdk, tmp_path, runtime.Settings(legacy=precision), HostStream(0), 1) is None

    def test_a_kept_engine_is_told_by_its_layers_without_listing_them(self, sdk: runtime.Sdk, deferred: Bundle) -> None:
        gpu = HostStream(0)
        keys = [
            runtime.engine_key(sdk, deferred, gpu, runtime.Settings(legacy="int8", layers=layers))["settings"]
            for layers in (self.LAYERS, self.LAYERS[:2], ())
        ]
        assert len(set(keys)) == 3
        assert keys[2] == "legacy=int8"
        assert all(key.startswith("legacy=int8") and "norm" not in key for key in keys)

    def test_tensorrt_11_says_what_to_do(self, sdk: runtime.Sdk, tmp_path: Path) -> None:
        del sdk.api.IInt8EntropyCalibrator2
        sdk.api.__version__ = "11.0.0"
        with pytest.raises(BackendError, match=r"TensorRT 11\.0\.0 knows typed networks only"):
            runtime.build(sdk, tmp_path / "legacy.onnx", runtime.Settings(legacy="fp16"))


def test_the_names_that_are_used_are_real() -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx: pip install 'edgetube[rtx]'")
    for name in set(runtime.Vendor.__annotations__) - {"IInt8EntropyCalibrator2"}:  # TensorRT 8 to 10 alone
        assert hasattr(rtx, name), name
    for owner, names in {
        rtx.Builder: ["create_network", "create_builder_config", "build_serialized_network"],
        rtx.IBuilderConfig: [
            "progress_monitor",
            "profiling_verbosity",
            "set_compute_capability",
            "set_timing_cache",
        ],
        rtx.ICudaEngine: ["create_execution_context", "create_runtime_config", "create_engine_inspector"],
        rtx.IExecutionContext: ["execute_async_v3", "set_tensor_address"],
        rtx.IRuntimeConfig: ["create_runtime_cache", "set_runtime_cache"],
        rtx.IRuntimeCache: ["serialize", "deserialize"],
        rtx.Runtime: ["deserialize_cuda_engine", "engine_host_code_allowed"],
    }.items():
        assert not [name for name in names if not hasattr(owner, name)]


def test_the_builder_reports_its_phases(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx: pip install 'edgetube[rtx]'")
    bundle = pipeline.export_model("rtx-fp16", tiny_checkpoint, tmp_path, GATHER)
    told = []
    settings = runtime.Settings(workspace_mb=256, capabilities=("86",))
    runtime.build(runtime.sdk("rtx"), bundle.artifact_path, settings, lambda *step: told.append(step))
    assert told
    assert all(0 <= step <= steps for _, step, steps in told)


def test_a_long_build_says_where_it_is_but_not_at_every_step(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = iter([0.0, 0.5, 1.0, 2.5, 3.0, 5.0])
    monkeypatch.setattr(runtime, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    caplog.set_level("INFO", "edgetube")
    report = runtime._Report()
    for step in range(5):
        report("Building engine", step, 5)
    assert [r.message for r in caplog.records] == ["2 s: Building engine, 2 of 5", "5 s: Building engine, 4 of 5"]


def targets_here() -> Iterator[Any]:
    """Every target of the two SDKs, on the doubles, and marked `gpu` on this machine's GPU."""
    for target in export.targets().values():
        if target.backend == "tensorrt":
            slow = [] if target.name == "trt-fp16" else [pytest.mark.slow]
            yield pytest.param((target.name, True), id=f"{target.name}-double", marks=slow)
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
        yield pytest.param(name, True, id=f"{name}-double", marks=pytest.mark.slow)
        yield pytest.param(name, False, id=name, marks=pytest.mark.gpu)


@pytest.mark.parametrize(("name", "double"), list(legacy_targets()))
def test_on_a_gpu_networks_without_types(
    name: str, double: bool, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGETUBE_CACHE", str(tmp_path / "cache"))
    with doubles.machine(tmp_path / "cache") if double else nullcontext():
        skip_where_it_cannot_run(name)
        if int((version := runtime.sdk("trt").version).split(".")[0]) > 10:
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


def test_bundle_round_trip_keeps_the_settings(deferred: Bundle) -> None:
    again = bundles.load(deferred.path)
    assert runtime.Settings.from_json(again.build["settings"]) == runtime.Settings()
