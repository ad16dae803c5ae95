"""What integers a processor multiplies exactly: this one, and x86 without VNNI and without AVX, which QEMU emulates."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("overflow.py")
QEMU = shutil.which("qemu-x86_64-static")


def found(*emulator: str) -> dict[str, dict[str, bool]]:
    done = subprocess.run([*emulator, sys.executable, SCRIPT], capture_output=True, text=True, check=True)
    answer: dict[str, dict[str, bool]] = json.loads(done.stdout)
    return answer


def check(runtimes: dict[str, dict[str, bool]]) -> None:
    assert {name: one["safe"] for name, one in runtimes.items()} == dict.fromkeys(runtimes, True)
    for name, one in runtimes.items():  # the probe says what is true
        assert one["saturates"] is not one["free"], name
    assert runtimes["onnxruntime"]["exact_form"]


def test_here() -> None:
    check(found())


@pytest.mark.slow
@pytest.mark.skipif(QEMU is None, reason="qemu-x86_64-static is not here; on Debian: apt-get install qemu-user-static")
@pytest.mark.parametrize(
    ("cpu", "runtime"), [("Haswell", "onnxruntime"), ("Haswell", "openvino"), ("Nehalem", "openvino")]
)
def test_where_sums_have_16_bits(cpu: str, runtime: str) -> None:
    """Weights that fill int8 are multiplied wrongly there, and those that edgetube writes are not."""
    assert QEMU is not None
    runtimes = found(QEMU, "-cpu", cpu)
    check(runtimes)
    if runtime not in runtimes:
        pytest.skip(f"{runtime} is not installed")
    assert not runtimes[runtime]["free"]
