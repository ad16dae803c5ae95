"""What is ExecuTorch's own; what every backend promises is in `test_conformance.py`."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgetube import runtimes
from edgetube.bundle import Bundle
from edgetube.errors import BackendError, InputError
from edgetube.export import pipeline

pytest.importorskip("executorch.runtime", reason="needs executorch: pip install 'edgetube[export,executorch]'")


pytestmark = pytest.mark.slow  # an export takes its time


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    options = pipeline.Options(lowering="gather")
    return pipeline.export_model("executorch-fp32", tiny_checkpoint, tmp_path_factory.mktemp("out"), options)


def damaged(bundle: Bundle, folder: Path, content: bytes) -> Bundle:
    (folder / bundle.artifact).write_bytes(content)
    return replace(bundle, path=folder)


@pytest.fixture
def threads() -> Iterator[int]:
    """The number that ExecuTorch takes by itself; programs of other tests are closed."""
    from edgetube.runtimes import executorch

    assert executorch.THREADS.users == 0
    yield executorch.DEFAULT_THREADS
    assert executorch.THREADS.users == 0


def test_threads_and_device_are_said(exported: Bundle, threads: int) -> None:
    with runtimes.open_bundle(exported, threads=1, device="CPU") as backend:
        assert backend.describe() == {"executorch": backend.describe()["executorch"], "device": "cpu", "threads": 1}
        frames, logits = exported.golden()
        np.testing.assert_allclose(backend(frames), logits, atol=1e-4)
    with runtimes.open_bundle(exported) as backend:
        assert backend.describe()["threads"] == threads


def test_programs_of_a_process_share_their_threads(exported: Bundle, threads: int) -> None:
    with runtimes.open_bundle(exported, threads=1):
        with runtimes.open_bundle(exported, threads=1), runtimes.open_bundle(exported) as backend:
            assert backend.describe()["threads"] == 1
        with pytest.raises(BackendError, match=r"already runs it with 1 threads, .* before one is opened with 3"):
            runtimes.open_bundle(exported, threads=3)
    with runtimes.open_bundle(exported, threads=3) as backend:
        assert backend.describe()["threads"] == 3


def test_a_program_that_nobody_closes_keeps_no_threads(exported: Bundle, threads: int) -> None:
    backend = runtimes.open_bundle(exported, threads=1)
    del backend
    gc.collect()
    with runtimes.open_bundle(exported, threads=3) as other:
        assert other.describe()["threads"] == 3


def test_answers_are_the_caller_s(exported: Bundle, rng: np.random.Generator) -> None:
    """The program's buffers are planned ahead and used by the next call."""
    clips = rng.integers(0, 256, (2, 1, *exported.contract.shape), np.uint8)
    with runtimes.open_bundle(exported) as backend:
        first = backend.infer(clips[0])
        kept = first.copy()
        second = backend.infer(clips[1])
    assert (first == kept).all()
    assert (first != second).any()


def test_frames_may_be_read_only(exported: Bundle) -> None:
    frames, logits = exported.golden()
    frames.flags.writeable = False
    with runtimes.open_bundle(exported) as backend:
        np.testing.assert_allclose(backend(frames), logits, atol=1e-4)


def test_unknown_device(exported: Bundle, threads: int) -> None:
    with pytest.raises(InputError, match=r"no device is called 'abacus' here; .* runs on cpu alone"):
        runtimes.open_bundle(exported, device="abacus")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "File size is too small"),
        (lambda data: data[:4] + b"ET99" + data[8:], "Program identifier 'ET99' != expected 'ET12'"),
        (lambda data: b"", "offset"),
        (lambda data: b"hello" * 20, "Program identifier"),
        (lambda data: data[:200] + b"\xff" * 64 + data[264:], "Verification failed; data may be truncated or corrupt"),
        (lambda data: data.replace(b"XnnpackBackend", b"AbacusBackend\0"), "AbacusBackend is not registered"),
        (lambda data: data.replace(b"forward", b"forwand"), "forward"),
    ],
)  # fmt: skip
def test_a_program_that_cannot_be_opened_is_one_line(
    exported: Bundle,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    threads: int,
    damage: Callable[[bytes], bytes],
    message: str,
) -> None:
    """The runtime gives a number and writes the reason to the standard error."""
    bundle = damaged(exported, tmp_path, damage(exported.artifact_path.read_bytes()))
    with pytest.raises(BackendError, match=r"^ExecuTorch \S+: cannot open [^\n]+model\.pte: [^\n]+$") as caught:
        runtimes.open_bundle(bundle)
    assert message in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_healthy_run_writes_nothing(exported: Bundle) -> None:
    code = (
        "import sys\nfrom edgetube import bundle, runtimes\n"
        "b = bundle.load(sys.argv[1])\nwith runtimes.open_bundle(b, threads=1) as backend: backend(b.golden()[0])\n"
        "print('ran', file=sys.stderr)"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(exported.path)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (made.returncode, made.stdout, made.stderr) == (0, "", "ran\n")


def test_what_others_write_meanwhile_is_passed_on(capfd: pytest.CaptureFixture[str]) -> None:
    from edgetube.runtimes import executorch

    with executorch._log() as lines:
        os.write(2, b"[program.cpp:168] Program identifier\nsomebody else\nI 00:00:01.2 executorch:a.cpp:1] b\n")
        print("[program.cpp:1] c\na third", file=sys.stderr)
    assert lines == ["Program identifier", "b", "c"]
    assert capfd.readouterr().err == "somebody else\na third\n"
