"""Run jobs in this process, in several processes, or on a Ray cluster. Each way gives the same results.

A job is a pure function of models and clips (`edgetube.bench.model_set`), so a job whose process dies is run again.
`concurrent.futures` and Ray manage the processes; this module decides how often a job is retried, and names a clip
that crashes every process that runs it.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from edgetube import interrupts, processes
from edgetube.bench.model_set import Job, JobResult, ModelSet, OpenedModels
from edgetube.errors import BackendError, InputError
from edgetube.targets import need

Results: TypeAlias = "Iterator[tuple[Job, JobResult]]"

Runner = Callable[[ModelSet, Iterable[Job]], Results]
"""Runs all jobs, in any order; a job may come back in parts."""

ALONE = 2
"""How often a clip that was running when a process died is retried, alone, before it is blamed."""

CONNECT_S = 10.0
"""Seconds to wait for a connection to a cluster."""


def here(model_set: ModelSet, jobs: Iterable[Job]) -> Results:
    """In this process."""
    with OpenedModels(model_set) as opened:
        for job in jobs:
            yield job, opened.ask(job)


def in_processes(model_set: ModelSet, jobs: Iterable[Job], *, workers: int) -> Results:
    """In `workers` processes of this machine, which share its cores.

    When a process dies, the pool ends the others. The jobs that were running are then run again one by one, each in a
    process of its own, so that only the clip at fault can fail.

    Raises:
        InputError: workers < 1.
        BackendError: a clip crashed its process `ALONE` times while it ran alone; names the clip.
    """
    if workers < 1:
        raise InputError(f"workers is {workers}; expected >= 1")
    model_set = replace(model_set, share=max(1, processes.cores() // workers))
    source, suspects = iter(jobs), deque[Job]()
    with processes.threads(model_set.threads or model_set.share):
        while True:
            yield from _alone(model_set, suspects)
            running: dict[Future[JobResult], Job] = {}
            with processes.pool(workers) as pool:
                try:
                    _submit(pool, model_set, islice(source, workers), running, suspects)
                    while running:
                        for done in wait(running, return_when=FIRST_COMPLETED).done:
                            result = done.result()
                            yield running.pop(done), result
                            _submit(pool, model_set, islice(source, 1), running, suspects)
                    return
                except BrokenProcessPool:
                    suspects.extend(running.values())


def _submit(
    pool: ProcessPoolExecutor,
    model_set: ModelSet,
    jobs: Iterable[Job],
    running: dict[Future[JobResult], Job],
    suspects: deque[Job],
) -> None:
    """Submit jobs to a pool; a job that it refuses, because a process died, goes to `suspects`."""
    for job in jobs:
        try:
            with interrupts.kept_from_children():
                running[pool.submit(_ask, model_set, job)] = job
        except BrokenProcessPool:
            suspects.append(job)
            raise


def _alone(model_set: ModelSet, suspects: deque[Job]) -> Results:
    """Run jobs one at a time; a job that crashes its process is split, and a single clip is tried `ALONE` times."""
    tries = 0
    while suspects:
        with processes.pool(1) as pool:
            try:
                while suspects:
                    with interrupts.kept_from_children():
                        answer = pool.submit(_ask, model_set, suspects[0])
                    result = answer.result()
                    yield suspects.popleft(), result
                    tries = 0
            except BrokenProcessPool as error:
                job = suspects.popleft()
                tries = tries + 1 if len(job.items) == 1 else 0
                if tries >= ALONE:
                    raise _blame(job) from error
                suspects.extendleft(reversed(list(job.singles())))


def on_cluster(model_set: ModelSet, jobs: Iterable[Job], *, address: str) -> Results:
    """On a Ray cluster, one job a core; Ray retries a job when its process or node is lost.

    Every node needs this edgetube, the bundles and the clips at the same paths.

    Args:
        address: of the cluster: `auto` for the one that this machine belongs to, or `ray://host:10001`.

    Raises:
        MissingPackageError: Ray is not installed.
        InputError: there is no cluster at that address.
        BackendError: a clip crashed its process each time that Ray tried it; names the clip.
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
    model_set = replace(model_set, share=1)
    shared = ray.put(model_set)
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
    """Check that a server listens at `[ray://]host:port`; Ray itself would retry for minutes.

    Raises:
        OSError: none does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()


_opened: dict[str, OpenedModels] = {}
"""The model set that this process has open, at most one."""


def _ask(model_set: ModelSet, job: Job) -> JobResult:
    key = f"{model_set.keys} {model_set.threads} {model_set.share} {model_set.views}"
    if key not in _opened:
        for old in _opened.values():
            old.close()
        _opened.clear()
        _opened[key] = OpenedModels(model_set)
    return _opened[key].ask(job)


def _ask_from(folder: str, model_set: ModelSet, job: Job) -> JobResult:
    """As `_ask`, in the caller's working directory, so that relative paths stay valid."""
    if Path(folder).is_dir():
        os.chdir(folder)
    return _ask(model_set, job)


def _blame(job: Job) -> BackendError:
    models = f"{len(job.models)} models" if len(job.models) > 1 else "a model"
    return BackendError(
        f"the clip {job.items[0].name} ends the process that asks {models} about it, each time that it is tried; look "
        "at it alone with edgetube run, or leave it out"
    )
