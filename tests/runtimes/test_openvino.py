"""What is OpenVINO's own; what every backend promises is in `test_conformance.py`."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgetube import bundle as bundles
from edgetube import runtimes
from edgetube.bundle import Bundle
from edgetube.errors import BackendError, BundleError, FormatError, InputError
from edgetube.export import pipeline
from edgetube.precision import Precision

pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Bundles of the float targets by precision."""
    options, out = pipeline.Options(lowering="gather"), tmp_path_factory.mktemp("out")
    made = pipeline.export_models(["openvino-fp32", "openvino-fp16"], tiny_checkpoint, out, options)
    return {bundle.precision: bundle for bundle in made}


def test_float32_is_computed_in_float32_whatever_the_cpu_prefers(exported: dict[str, Bundle]) -> None:
    with runtimes.open_bundle(exported["fp32"]) as backend:
        assert backend.describe()["inference_precision"] == "f32"
    assert exported["fp32"].parity["max_abs_error"] < 1e-4


@pytest.mark.parametrize(
    ("machine", "flags", "capabilities", "types"),
    [
        ("x86_64", "flags : avx2", ["FP32", "INT8"], {"f32"}),
        ("x86_64", "flags : avx512_bf16", ["BF16", "FP32"], {"f32", "bf16"}),
        ("AMD64", "flags : amx_bf16 avx512_fp16", ["BF16", "FP32", "FP16"], {"f32", "bf16"}),
        ("x86_64", "flags : amx_bf16 amx_fp16", ["BF16", "FP32", "FP16"], {"f32", "bf16", "f16"}),
        ("aarch64", "Features : bf16", ["BF16", "FP32", "FP16"], {"f32", "bf16", "f16"}),
    ],
)
def test_float16_is_taken_where_a_matrix_unit_has_it(
    machine: str, flags: str, capabilities: list[str], types: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgetube.runtimes import openvino

    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{flags}\n")
    monkeypatch.setattr(openvino, "FLAGS", tmp_path / "cpuinfo")
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(openvino, "core", lambda: SimpleNamespace(get_property=lambda *_: capabilities))
    assert openvino.computed("CPU") == types
    assert openvino.computed("GPU") == {"f32", "bf16", "f16"} & {
        k for k, v in openvino.CAPABILITY.items() if v in capabilities
    }


def test_half_precision_takes_the_first_type_that_is_fast_here(exported: dict[str, Bundle]) -> None:
    from edgetube.runtimes.openvino import computed

    expected = next(kind for kind in ("f16", "bf16", "f32") if kind in computed("CPU"))
    names = {"f16": "float16", "bf16": "bfloat16", "f32": "f32"}
    with runtimes.open_bundle(exported["fp16"]) as backend:
        assert names[backend.describe()["inference_precision"]] == names[expected]


def test_half_precision_halves_the_weights(exported: dict[str, Bundle]) -> None:
    sizes = {precision: (bundle.path / "model.bin").stat().st_size for precision, bundle in exported.items()}
    assert 0.45 < sizes["fp16"] / sizes["fp32"] < 0.62  # indices of the gather stay whole numbers


SIGNALLED = """
import faulthandler, signal, sys
from edgetube import bundle, runtimes

faulthandler.enable()
opened = [runtimes.open_bundle(bundle.load(sys.argv[1])) for _ in range(3)]
while opened:
    opened.pop(0).close()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.usefixtures("heard_signals")
def test_a_signal_finds_its_stack_after_sessions_were_closed(exported: dict[str, Bundle]) -> None:
    """OpenVINO's CPU plugin replaces the stack of signal handlers, and unmaps its own; see `core`."""
    made = subprocess.run(
        [sys.executable, "-c", SIGNALLED, exported["fp32"].path], capture_output=True, text=True, check=False
    )
    assert (made.returncode, made.stdout) == (0, "interrupted\n"), made.stderr


THREADS = """
import threading, time
from edgetube.runtimes import openvino

def slow():
    made.append(1)
    time.sleep(0.2)
    return object()

made, got, openvino.ov.Core = [], [], slow
threads = [threading.Thread(target=lambda: got.append(openvino.core())) for _ in range(4)]
for step in (threading.Thread.start, threading.Thread.join):
    for thread in threads:
        step(thread)
print(len(made), len(got), len(set(map(id, got))))
"""


def test_threads_share_one_core() -> None:
    made = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=False)
    assert (made.returncode, made.stdout) == (0, "1 4 1\n"), made.stderr


def test_threads_and_device_are_said(exported: dict[str, Bundle]) -> None:
    with runtimes.open_bundle(exported["fp32"], threads=1, device="CPU") as backend:
        assert backend.describe()["threads"] == 1
        assert backend.describe()["device"] == ["CPU"]


def test_unknown_device(exported: dict[str, Bundle]) -> None:
    with pytest.raises(InputError, match=r"no device is called 'abacus' here; OpenVINO finds .*cpu"):
        runtimes.open_bundle(exported["fp32"], device="abacus")


def test_a_file_that_is_no_model_is_one_line(exported: dict[str, Bundle], tmp_path: Path) -> None:
    (tmp_path / "model.xml").write_text("<net")
    with pytest.raises(BackendError, match=r"^OpenVINO \S+: cannot open .*model\.xml: [^\n]+$"):
        runtimes.open_bundle(replace(exported["fp32"], path=tmp_path))


def test_weights_that_are_missing_are_one_line(exported: dict[str, Bundle], tmp_path: Path) -> None:
    (tmp_path / "model.xml").write_bytes(exported["fp32"].artifact_path.read_bytes())
    with pytest.raises(BackendError, match=r"^OpenVINO \S+: cannot open [^\n]+$"):
        runtimes.open_bundle(replace(exported["fp32"], path=tmp_path))


def test_the_bundle_opens_from_its_folder_alone(
    exported: dict[str, Bundle], tmp_path: Path, rng: np.random.Generator
) -> None:
    moved = tmp_path / "moved"
    exported["fp32"].path.rename(moved)
    try:
        frames, logits = bundles.load(moved).golden()
        with runtimes.open_bundle(bundles.load(moved)) as backend:
            np.testing.assert_allclose(backend(frames), logits, atol=1e-4)
    finally:
        moved.rename(exported["fp32"].path)


def test_importing_the_backend_tells_nobody(tmp_path: Path) -> None:
    """OpenVINO's own import writes an identifier to the home folder and reports to its vendor."""
    code = "import edgetube.runtimes.openvino, sys; assert 'openvino_telemetry' not in sys.modules"
    environment = {"HOME": str(tmp_path), "PATH": "", "USERPROFILE": str(tmp_path)}
    subprocess.run([sys.executable, "-W", "error", "-c", code], env=environment, check=True)
    assert list(tmp_path.iterdir()) == []


def test_an_old_int8_artifact_is_refused_where_its_sums_overflow(
    exported: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """x86 without VNNI: OpenVINO has no other form of a product of integers."""
    from edgetube.runtimes import openvino

    monkeypatch.setattr(openvino, "_saturates", lambda: True)
    old = replace(exported["fp32"], precision=Precision.W8A8)
    with pytest.raises(BackendError, match=r"sums of its 8-bit products overflow here; export it again") as e:
        runtimes.open_bundle(old)
    assert "\n" not in str(e.value)
    runtimes.open_bundle(exported["fp32"]).close()
    marked = {**old.build, "integers": {"saturates": False}}
    runtimes.open_bundle(replace(old, build=marked)).close()


def test_the_probe_is_a_product_of_integers_that_would_overflow() -> None:
    """What the CPU plugin runs is 8-bit, and 255 times 127 twice is more than 16 bits hold."""
    from edgetube.runtimes import openvino

    compiled = openvino.compile_model(openvino._integers(64, 127), ["f32"])
    kinds = [op.get_rt_info()["runtimePrecision"].astype(str) for op in compiled.get_runtime_model().get_ops()]
    assert {"i8", "u8"} & set(kinds)
    assert isinstance(openvino._saturates(), bool)


@pytest.mark.parametrize("value", [["f8"], "f32", [1], None])
def test_precisions_that_are_none(exported: dict[str, Bundle], value: Any) -> None:
    bundle = replace(exported["fp32"], build={**exported["fp32"].build, "inference_precision": value})
    with pytest.raises(FormatError, match=r"build.inference_precision is"):
        runtimes.open_bundle(bundle)


def test_weights_that_the_manifest_does_not_list_are_not_opened(exported: dict[str, Bundle]) -> None:
    files = {name: record for name, record in exported["fp32"].files.items() if name != "model.bin"}
    with pytest.raises(BundleError, match=r"'model.bin' is not among the files of the manifest"):
        runtimes.open_bundle(replace(exported["fp32"], files=files))
