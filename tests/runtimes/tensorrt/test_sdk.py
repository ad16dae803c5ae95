"""The SDKs: what is used of them, and what is said where one is missing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import edgetube
from edgetube.bundle import Bundle
from edgetube.errors import MissingPackageError
from edgetube.runtimes.tensorrt import sdk
from edgetube.runtimes.tensorrt.sdk import FAMILIES, LEAN, Sdk, load_runner, load_sdk
from edgetube.targets import installed
from tests.runtimes.tensorrt.names_used import Uses


def test_a_missing_sdk_says_the_pip_line(deferred: Bundle) -> None:
    if installed("tensorrt"):
        pytest.skip("TensorRT is installed")
    load_sdk.cache_clear()
    with pytest.raises(MissingPackageError, match=r"pip install 'edgetube\[tensorrt\]'"):
        edgetube.Runtime(deferred)


BUILDS = {"Builder", "NetworkDefinitionCreationFlag", "OnnxParser"}
"""What builds engines, which the lean runtime lacks."""

RTX_ALONE = {"ComputeCapability", "IRuntimeConfig.create_runtime_cache", "IRuntimeConfig.set_runtime_cache"}

RUN = {
    "ICudaEngine.create_execution_context",
    "ICudaEngine.get_tensor_shape",
    "ICudaEngine.num_io_tensors",
    "IExecutionContext.execute_async_v3",
    "IExecutionContext.set_tensor_address",
    "ILogger.Severity.WARNING",
    "LayerInformationFormat.ONELINE",
    "Runtime.deserialize_cuda_engine",
    "Runtime.engine_host_code_allowed",
}
"""Some of the names that running an engine needs."""

BUILD = {
    "EngineInspector.get_engine_information",
    "Builder.build_serialized_network",
    "BuilderFlag.VERSION_COMPATIBLE",
    "IBuilderConfig.progress_monitor",
    "IBuilderConfig.set_timing_cache",
    "MemoryPoolType.WORKSPACE",
    "OnnxParser.parse_from_file",
    "ParserError.node_operator",
}
"""Some of those that building one and listing its layers need; the lean runtime does neither."""


@pytest.mark.parametrize(
    ("module", "lacks", "used"),
    [
        ("tensorrt", RTX_ALONE, RUN | BUILD),
        ("tensorrt_rtx", set(), RUN | BUILD),
        (LEAN.module, BUILDS | RTX_ALONE, RUN),
    ],
)
def test_the_names_that_are_used_are_real(module: str, lacks: set[str], used: set[str]) -> None:
    """The bindings load without a driver, and state the types of what their functions return."""
    api = pytest.importorskip(module, reason=f"needs {module}")
    uses = Uses(api)
    assert uses.missing == lacks
    assert not used - uses.found


def test_a_name_that_is_not_there_is_found() -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx: pip install 'edgetube[rtx]'")
    assert Uses(SimpleNamespace(**vars(rtx) | {"BuilderFlag": rtx.LayerType})).missing == {
        "BuilderFlag.TF32",
        "BuilderFlag.VERSION_COMPATIBLE",
    }


def test_a_keyword_that_is_not_taken_is_found() -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx: pip install 'edgetube[rtx]'")

    class IBuilderConfig(rtx.IBuilderConfig):  # type: ignore[misc, name-defined]
        def set_timing_cache(self, cache: object, ignore: bool) -> bool:
            """set_timing_cache(self: a.IBuilderConfig, cache: a.ITimingCache, ignore: bool) -> bool"""
            return bool(cache) and ignore

    uses = Uses(SimpleNamespace(**vars(rtx) | {"IBuilderConfig": IBuilderConfig}))
    assert uses.missing == {"IBuilderConfig.set_timing_cache(ignore_mismatch=)"}


def test_the_lean_runtime_has_a_version_and_lists_no_layers() -> None:
    lean = pytest.importorskip(LEAN.module, reason="needs tensorrt_lean: pip install 'edgetube[tensorrt-lean]'")
    assert Sdk(LEAN).version == lean.__version__
    assert not hasattr(lean, "EngineInspector")


@pytest.mark.parametrize(
    ("here", "family", "version_compatible", "runner"),
    [
        ({"tensorrt", "tensorrt_lean"}, "trt", True, "trt"),
        ({"tensorrt_lean"}, "trt", True, "lean"),
        ({"tensorrt_lean", "tensorrt_rtx"}, "rtx", True, "rtx"),
        ({"tensorrt"}, "trt", False, "trt"),
    ],
)
def test_the_lean_runtime_runs_what_the_full_one_is_not_here_for(
    monkeypatch: pytest.MonkeyPatch, here: set[str], family: str, version_compatible: bool, runner: str
) -> None:
    monkeypatch.setattr(sdk, "installed", here.__contains__)
    monkeypatch.setattr(sdk, "load_sdk", lambda name: name)
    assert load_runner(family, version_compatible) == runner


@pytest.mark.parametrize(
    ("here", "version_compatible", "said"),
    [
        (set(), True, r"\[tensorrt\]'; to run an engine and build none: pip install 'edgetube\[tensorrt-lean\]'$"),
        (set(), False, r"tensorrt is not installed; install it with: pip install 'edgetube\[tensorrt\]'$"),
        ({"tensorrt_lean"}, False, r"; the lean runtime, which is here, runs .* with --set version-compatible=yes$"),
    ],
)
def test_what_is_missing_is_told(
    monkeypatch: pytest.MonkeyPatch, here: set[str], version_compatible: bool, said: str
) -> None:
    def absent(name: str) -> Sdk:
        raise MissingPackageError(f"{FAMILIES[name].module} is not installed; install it with: "
                                  f"pip install 'edgetube[{FAMILIES[name].extra}]'")  # fmt: skip

    monkeypatch.setattr(sdk, "installed", here.__contains__)
    monkeypatch.setattr(sdk, "load_sdk", absent)
    with pytest.raises(MissingPackageError, match=said):
        load_runner("trt", version_compatible)
