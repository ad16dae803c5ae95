"""Pools of spawned processes that share this machine's cores and end with their parent, whatever ends it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

from edgetube import interrupts

if TYPE_CHECKING:  # its import adds a tenth to that of `edgetube.runtime`, which asks for cores only
    from concurrent.futures import ProcessPoolExecutor

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Read by BLAS libraries once, when they are loaded."""


def cores() -> int:
    """Cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)  # Linux; a container has fewer than the machine
    return len(allowed(0)) if allowed else os.cpu_count() or 1


MOST_SIDE_BY_SIDE = 2
"""Clips that a graph answers at a time at most: each takes the memory of a call."""


def side_by_side() -> int:
    """Clips that calibration lets a graph answer at a time; with more cores, threads share the work of each."""
    return min(MOST_SIDE_BY_SIDE, cores())


def workers() -> int:
    """Processes that make use of all cores; 1 where this one may not start any, as a daemon of multiprocessing."""
    from multiprocessing import current_process

    return 1 if current_process().daemon else cores()


@contextmanager
def pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Spawned processes, because forking a process with threads may deadlock. An error in the block ends them.

    They start when jobs are submitted, which is done inside of `interrupts.kept_from_children`.
    """
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    made = ProcessPoolExecutor(workers, get_context("spawn"), interrupts.end_with_parent)
    done = False
    try:
        yield made
        done = True
    finally:
        processes = list((made._processes or {}).values())
        if not done:
            for process in processes:
                process.terminate()
        made.shutdown(cancel_futures=True)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Processes that are started in the block use `count` threads for linear algebra."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(count)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def without_main() -> Iterator[None]:
    """Processes that are spawned in the block do not import the program's main module.

    multiprocessing imports it in every process, so a script without `if __name__ == "__main__"` would run again there.
    """
    before = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = before
