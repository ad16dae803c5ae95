"""Where jobs are done: in this process, in several here, or on a Ray cluster. Each gives the same answers.

A job is a pure function of models and clips (`edgetube.bench.panel`), so one whose process dies is done again by
another. Processes are looked after by `concurrent.futures` and by Ray; what is said here is only how often a job is
tried, and that a clip that ends every process that touches it is named.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeAlias

from edgetube import interrupts
from edgetube.bench.panel import Job, Opened, Panel, Replies
from edgetube.errors import BackendError, InputError
from edgetube.targets import need

Results: TypeAlias = "Iterator[tuple[Job, Replies]]"

Runner = Callable[[Panel, Iterable[Job]], Results]
"""Does all jobs, in any order; a job may come back in parts."""

ALONE = 2
"""How often a clip that was being worked on when a process died is tried again, alone, before it is blamed."""

CONNECT_S = 10.0
"""Seconds that a cluster may take to answer at all."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""What libraries of linear algebra read once, when they are loaded."""


def here(panel: Panel, jobs: Iterable[Job]) -> Results:
    """In this process."""
    with Opened(panel) as opened:
        for job in jobs:
            yield job, opened.ask(job)


def in_processes(panel: Panel, jobs: Iterable[Job], *, workers: int) -> Results:
    """In `workers` processes of this machine, which share its cores.

    When a process dies, those of the others die with it; what was being worked on is then done again one by one, each
    in a process of its own, so that only a clip that is to blame can fail.

    Raises:
        InputError: workers < 1.
        BackendError: a clip ended its process `ALONE` times when nothing else was running; named.
    """
    if workers < 1:
        raise InputError(f"workers is {workers}; expected >= 1")
    panel = replace(panel, threads=panel.threads or max(1, (os.cpu_count() or 1) // workers))
    source, suspects = iter(jobs), deque[Job]()
    with _threads(panel.threads):
        while True:
            yield from _alone(panel, suspects)
            running: dict[Future[Replies], Job] = {}
            with _pool(workers) as pool:
                try:
                    _submit(pool, panel, islice(source, workers), running, suspects)
                    while running:
                        for done in wait(running, return_when=FIRST_COMPLETED).done:
                            replies = done.result()
                            yield running.pop(done), replies
                            _submit(pool, panel, islice(source, 1), running, suspects)
                    return
                except BrokenProcessPool:
                    suspects.extend(running.values())


def _submit(
    pool: ProcessPoolExecutor,
    panel: Panel,
    jobs: Iterable[Job],
    running: dict[Future[Replies], Job],
    suspects: deque[Job],
) -> None:
    """Hand jobs to a pool; one that it does not take any more, because a process died, is kept in `suspects`."""
    for job in jobs:
        try:
            with interrupts.kept_from_children():
                running[pool.submit(_ask, panel, job)] = job
        except BrokenProcessPool:
            suspects.append(job)
            raise


def _alone(panel: Panel, suspects: deque[Job]) -> Results:
    """Jobs one at a time; one that ends its process is taken apart, and a single clip is tried `ALONE` times."""
    tries = 0
    while suspects:
        with _pool(1) as pool:
            try:
                while suspects:
                    with interrupts.kept_from_children():
                        answer = pool.submit(_ask, panel, suspects[0])
                    replies = answer.result()
                    yield suspects.popleft(), replies
                    tries = 0
            except BrokenProcessPool as error:
                job = suspects.popleft()
                tries = tries + 1 if len(job.items) == 1 else 0
                if tries >= ALONE:
                    raise _blame(job) from error
                suspects.extendleft(reversed(list(job.singles())))


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that start from nothing: forking one that has threads may deadlock. An error in the block ends them."""
    pool = ProcessPoolExecutor(workers, get_context("spawn"), interrupts.end_with_parent)
    done = False
    try:
        yield pool
        done = True
    finally:
        processes = list((pool._processes or {}).values())
        if not done:
            for process in processes:
                process.terminate()
        pool.shutdown(cancel_futures=True)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Processes that are started here take so many threads for linear algebra."""
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


def on_cluster(panel: Panel, jobs: Iterable[Job], *, address: str) -> Results:
    """On a Ray cluster, one job a core; Ray does a job again when its process or node is lost.

    Every node needs this edgetube, the bundles and the clips at the same paths.

    Args:
        address: of the cluster: `auto` for the one that this machine belongs to, or `ray://host:10001`.

    Raises:
        MissingPackageError: Ray is not installed.
        InputError: there is no cluster at that address.
        BackendError: a clip ended its process each time that Ray tried it; named.
    """
    ray = need("ray", "ray")
    if not ray.is_initialized():
        try:
            _reach(address)
            ray.init(address=address, log_to_driver=False, logging_level="error")
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(
                f"no Ray cluster at {address}: {' '.join(str(error).split())}; start one with: ray start"
            ) from error
    panel = replace(panel, threads=panel.threads or 1)
    shared = ray.put(panel)
    ask = ray.remote(max_retries=ALONE)(_ask_from)
    folder = str(Path.cwd())
    waiting = iter(jobs)
    again: deque[Job] = deque()
    running: dict[Any, Job] = {}
    width = max(1, int(ray.cluster_resources().get("CPU", 1)))
    while True:
        while len(running) < width and (job := again.popleft() if again else next(waiting, None)) is not None:
            running[ask.remote(folder, shared, job)] = job
        if not running:
            return
        (done,), _ = ray.wait(list(running), num_returns=1)
        job = running.pop(done)
        try:
            yield job, ray.get(done)
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
            if len(job.items) == 1:
                raise _blame(job) from error
            again.extend(job.singles())
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None


def _reach(address: str) -> None:
    """That somebody listens at `[ray://]host:port`; Ray itself would try for minutes.

    Raises:
        OSError: nobody does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()


_opened: dict[str, Opened] = {}
"""The panel that this process has open; a process serves one at a time."""


def _ask(panel: Panel, job: Job) -> Replies:
    key = f"{panel.keys} {panel.threads}"
    if key not in _opened:
        for old in _opened.values():
            old.close()
        _opened.clear()
        _opened[key] = Opened(panel)
    return _opened[key].ask(job)


def _ask_from(folder: str, panel: Panel, job: Job) -> Replies:
    """As `_ask`, where relative paths mean what they mean to the caller."""
    if Path(folder).is_dir():
        os.chdir(folder)
    return _ask(panel, job)


def _blame(job: Job) -> BackendError:
    models = f"{len(job.models)} models" if len(job.models) > 1 else "a model"
    return BackendError(
        f"the clip {job.items[0].name} ends the process that asks {models} about it, each time that it is tried; look "
        "at it alone with edgetube run, or leave it out"
    )
