"""Which cores are counted, and how many processes are worth starting."""

import os
import subprocess
import sys
from multiprocessing import get_context
from multiprocessing.connection import Connection

import pytest

from edgetube import processes


def test_workers_are_as_many_as_cores() -> None:
    assert 1 <= processes.workers() == processes.cores() <= (os.cpu_count() or 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind processes to cores")
def test_cores_are_those_that_the_process_may_use() -> None:
    first = min(os.sched_getaffinity(0))
    program = (
        f"import os; os.sched_setaffinity(0, {{{first}}}); from edgetube import processes; print(processes.cores())"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout == "1\n"


def _tell(answer: Connection) -> None:
    answer.send((processes.workers(), processes.cores()))


def test_a_daemon_may_start_none_and_has_all_cores() -> None:
    context = get_context("spawn")
    mine, other = context.Pipe()
    daemon = context.Process(target=_tell, args=(other,), daemon=True)
    daemon.start()
    assert mine.poll(60)
    assert mine.recv() == (1, processes.cores())
    daemon.join()
