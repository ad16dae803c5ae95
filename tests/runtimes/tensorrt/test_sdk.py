"""The SDKs: what is used of them, and what is said where one is missing."""

from __future__ import annotations

import pytest

import edgetube
from edgetube.bundle import Bundle
from edgetube.errors import MissingPackageError
from edgetube.runtimes.tensorrt.sdk import Vendor, load_sdk
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
