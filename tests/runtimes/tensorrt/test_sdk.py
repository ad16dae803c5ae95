"""The SDKs: what is used of them, and what is said where one is missing."""

from __future__ import annotations

import pytest

import edgetube
from edgetube.bundle import Bundle
from edgetube.errors import MissingPackageError
from edgetube.runtimes.tensorrt import sdk
from edgetube.runtimes.tensorrt.sdk import FAMILIES, LEAN, Sdk, Vendor, load_runner, load_sdk
from edgetube.targets import installed


def test_a_missing_sdk_says_the_pip_line(deferred: Bundle) -> None:
    if installed("tensorrt"):
        pytest.skip("TensorRT is installed")
    load_sdk.cache_clear()
    with pytest.raises(MissingPackageError, match=r"pip install 'edgetube\[tensorrt\]'"):
        edgetube.Runtime(deferred)


def test_the_names_that_are_used_are_real() -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx: pip install 'edgetube[rtx]'")
    for name in set(Vendor.__annotations__) - {"IInt8EntropyCalibrator2"}:  # TensorRT 8 to 10 alone
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


RUNS_ENGINES = {"ILogger", "LayerInformationFormat", "Runtime"}
"""The parts of the SDK that a session uses."""


def test_the_lean_runtime_has_what_runs_engines_and_nothing_that_builds() -> None:
    """Its bindings load without a driver."""
    lean = pytest.importorskip(LEAN.module, reason="needs tensorrt_lean: pip install 'edgetube[tensorrt-lean]'")
    assert Sdk(LEAN).version == lean.__version__
    assert not [name for name in RUNS_ENGINES if not hasattr(lean, name)]
    assert not [name for name in ("Builder", "OnnxParser", "INetworkDefinition") if hasattr(lean, name)]
    for owner, names in {
        lean.ICudaEngine: [
            "create_execution_context",
            "create_engine_inspector",
            "get_tensor_name",
            "get_tensor_shape",
            "num_io_tensors",
        ],
        lean.IExecutionContext: ["execute_async_v3", "set_tensor_address"],
        lean.Runtime: ["deserialize_cuda_engine", "engine_host_code_allowed"],
    }.items():
        assert not [name for name in names if not hasattr(owner, name)]


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
