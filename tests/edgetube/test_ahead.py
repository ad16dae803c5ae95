"""Processes read the same clips in the same order, and end with whoever waits for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from edgetube import ahead
from edgetube.contract import InputContract
from edgetube.datasets import Item
from edgetube.errors import BackendError, InputError
from edgetube.video import Clip

CONTRACT = InputContract(2, 8, 8)


def slow(index: int, parent: int, contract: InputContract) -> Clip:
    """A clip of noise whose start is the process that read it; number 3 takes longest, number 5 cannot be read."""
    if index == 5:
        raise InputError("5 is broken")
    if os.getpid() != parent:
        time.sleep(0.05 if index == 3 else 0)
    return Clip(str(index), np.random.default_rng(index).integers(0, 256, contract.shape, np.uint8), None, os.getpid())


def deadly(index: int, parent: int, contract: InputContract) -> Clip:
    if index == 6 and os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    return slow(index - 1 if index == 5 else index, parent, contract)


def items(count: int, how: Callable[[int, int, InputContract], Clip] = slow) -> list[Item]:
    return [Item(str(i), None, partial(how, i, os.getpid())) for i in range(count)]


@pytest.mark.slow
def test_the_first_are_read_here_and_the_rest_in_order_by_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "WORTH_S", 0.0)
    before = dict(os.environ)
    alone = list(ahead.read(items(12), CONTRACT))
    shared = list(ahead.read(items(12), CONTRACT, workers=2))
    assert dict(os.environ) == before
    assert [item.name for item, _ in shared] == [str(i) for i in range(12)]
    readers = []
    for (_, one), (_, other) in zip(alone, shared, strict=True):
        if isinstance(one, InputError) or isinstance(other, InputError):
            assert str(one) == str(other) == "5 is broken"
            continue
        np.testing.assert_array_equal(one.frames, other.frames)
        readers.append(other.start)
    assert readers[: ahead.TRIED] == [os.getpid()] * ahead.TRIED
    assert os.getpid() not in readers[ahead.TRIED :]


def test_quick_clips_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_by_processes", None)
    assert len(list(ahead.read(items(12), CONTRACT, workers=2))) == 12


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_process_is_one_error_that_names_its_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "WORTH_S", 0.0)
    with pytest.raises(BackendError, match=r"a process that read clips was killed.*in work were .*6"):
        list(ahead.read(items(8, deadly), CONTRACT, workers=2))


SCRIPT = """
import os, sys, time
from functools import partial
from edgetube import ahead, interrupts
from edgetube.contract import InputContract
from tests.edgetube.test_ahead import items
ahead.WORTH_S = 0.0
print("main", flush=True)
with interrupts.Handled() as handled:
    try:
        for item, clip in ahead.read(items(400), InputContract(2, 8, 8), workers=2):
            if clip.start != os.getpid() if not isinstance(clip, Exception) else False:
                print(clip.start, flush=True)
            time.sleep(0.01)
    except KeyboardInterrupt:
        pass
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no process groups")
def test_ctrl_c_leaves_no_process_and_a_script_without_a_guard_runs_once(tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(SCRIPT)
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        start_new_session=True,
    ) as run:  # fmt: skip
        assert run.stdout is not None
        assert run.stderr is not None
        assert run.stdout.readline() == "main\n"
        readers = {int(run.stdout.readline())}
        os.killpg(run.pid, signal.SIGINT)
        rest, errors = run.stdout.read(), run.stderr.read()
        run.wait(20)
    readers |= {int(line) for line in rest.split() if line.isdigit()}
    assert "main" not in rest
    assert errors.count("Traceback") <= 1, errors
    for reader in readers:
        with pytest.raises(ProcessLookupError):
            os.kill(reader, 0)
