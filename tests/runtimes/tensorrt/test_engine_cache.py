"""Which engine runs: the bundle's, a cached one or a new one; over the doubles of `doubles.py`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import pytest

import edgetube
from edgetube import runtimes, targets
from edgetube.bundle import Bundle, FileRecord
from edgetube.errors import BackendError, BundleError
from edgetube.export import pipeline
from edgetube.model import checkpoints
from edgetube.runtimes.tensorrt import engine_cache
from edgetube.runtimes.tensorrt.build import Settings
from edgetube.runtimes.tensorrt.engine_cache import engine_key
from edgetube.runtimes.tensorrt.sdk import FAMILIES, load_sdk, system
from edgetube.runtimes.torch import Reference
from tests.runtimes import doubles
from tests.runtimes.doubles import HostStream, Machine

Record: TypeAlias = dict[str, Any]


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


def test_a_kept_engine_is_told_by_its_layers_without_listing_them(machine: Machine, deferred: Bundle) -> None:
    sdk, gpu, layers = load_sdk("trt"), HostStream(0), (("*", "fp16"), ("norm", "fp32"), ("fc.matmul", "int8"))
    keys = [
        engine_key(sdk, deferred, gpu, Settings(legacy="int8", layers=some))["settings"]
        for some in (layers, layers[:2], ())
    ]
    assert len(set(keys)) == 3
    assert keys[2] == "legacy=int8"
    assert all(key.startswith("legacy=int8") and "norm" not in key for key in keys)


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
            {"platform": system()},
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


class TestTheLeanRuntime:
    """The full TensorRT is not installed."""

    @pytest.fixture
    def travels(self, machine: Machine, deferred: Bundle) -> Callable[..., Bundle]:
        """The bundle with a version-compatible engine, whose record can be changed; a machine with the lean runtime."""
        machine.use_lean(version="11.4.0")

        def make(**changes: Any) -> Bundle:
            record = {
                "file": "model.onnx",
                "version": "11.1.0",
                "version_compatible": True,
                "capabilities": [],
                "gpu": "",
            }
            settings = deferred.build["settings"] | {"version_compatible": True}
            return replace(deferred, build={**deferred.build, "settings": settings, "engine": record | changes})

        return make

    def test_it_runs_a_version_compatible_engine(
        self, travels: Callable[..., Bundle], machine: Machine, tiny_checkpoint: Path, rng: np.random.Generator
    ) -> None:
        checkpoint, bundle = checkpoints.load(tiny_checkpoint), travels()
        clips = rng.integers(0, 256, (3, *bundle.contract.shape), np.uint8)
        expected = Reference(checkpoint.model, checkpoint.contract)(clips)
        with edgetube.Runtime(bundle) as rt:
            np.testing.assert_allclose(rt(clips), expected, atol=2e-2)
            said = rt.describe()
        assert (said["tensorrt_lean"], said["engine"]) == ("11.4.0", "the bundle's")
        assert "layers" not in said
        assert machine.builds == []

    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"version": "11.6.0"}, r"the bundle's engine is for TensorRT 11\.6\.0, here is 11\.4\.0"),
            ({"version": "10.16.0"}, r"the bundle's engine is for TensorRT 10\.16\.0, here is 11\.4\.0"),
            ({"version": "11.4.0", "version_compatible": False}, "the bundle's engine is not version-compatible"),
            ({"gpu": "Orin"}, "the bundle's engine is for Orin, here is RTX 4070"),
        ],
    )
    def test_it_builds_none_and_says_where_to(
        self, travels: Callable[..., Bundle], machine: Machine, changes: dict[str, Any], why: str
    ) -> None:
        said = rf"{why}, and TensorRT's lean runtime 11\.4\.0 builds none; export the bundle .* where the full TensorRT"
        with pytest.raises(BackendError, match=said):
            edgetube.Runtime(travels(**changes))
        assert machine.builds == []
        assert machine.opened[-1].closed

    def test_without_an_engine_or_with_one_that_does_not_open(
        self, travels: Callable[..., Bundle], machine: Machine
    ) -> None:
        bundle = travels()
        build = {key: value for key, value in bundle.build.items() if key != "engine"}
        with pytest.raises(BackendError, match=r"the bundle has no engine, and TensorRT's lean runtime .* builds none"):
            edgetube.Runtime(replace(bundle, build=build))
        machine.use_lean(version="11.4.0", opens=False)
        with pytest.raises(
            BackendError, match=r"does not open \(Error Code 6: .*\), and TensorRT's lean .* builds none"
        ):
            edgetube.Runtime(bundle)

    def test_a_comparison_runs_such_an_engine_and_emulates_other_bundles(
        self, travels: Callable[..., Bundle], machine: Machine, deferred: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert runtimes.device_of(travels()) is None
        assert runtimes.device_of(travels(version_compatible=False)) == runtimes.EMULATED
        assert runtimes.device_of(deferred) == runtimes.EMULATED
        assert runtimes.proof_device("trt-fp16", "tensorrt") == runtimes.EMULATED
        monkeypatch.setattr(targets, "_gpus", lambda: 0)
        assert runtimes.device_of(travels()) == runtimes.EMULATED

    def test_an_export_beside_it_builds_no_engine(
        self, machine: Machine, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        machine.use_lean()
        monkeypatch.setitem(sys.modules, FAMILIES["rtx"].module, None)  # whose parser would check the graph
        options = pipeline.Options(lowering="gather", settings={"version-compatible": "yes"})
        made = pipeline.export_model("trt-fp16", tiny_checkpoint, tmp_path, options)
        assert made.status == "deferred"
        assert machine.builds == []


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
        assert "timing_cache" not in Settings().to_json()

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


def test_a_long_build_says_where_it_is_but_not_at_every_step(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = iter([0.0, 0.5, 1.0, 2.5, 3.0, 5.0])
    monkeypatch.setattr(engine_cache, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    caplog.set_level("INFO", "edgetube")
    report = engine_cache._Report()
    for step in range(5):
        report("Building engine", step, 5)
    assert [r.message for r in caplog.records] == ["2 s: Building engine, 2 of 5", "5 s: Building engine, 4 of 5"]
