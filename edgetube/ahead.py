"""Clips read ahead by processes, one for each core, in the order of the set."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

from edgetube import interrupts, processes
from edgetube.contract import InputContract
from edgetube.datasets import Item
from edgetube.errors import BackendError, InputError
from edgetube.video import Clip

Read = Clip | InputError
"""A clip, or why it cannot be read."""

TRIED = 3
"""Clips that are read here before the time of the others is estimated."""

WORTH_S = 3.0
"""Seconds of reading from which starting processes pays; one starts in less than one."""

AHEAD = 3
"""Clips in work or waiting to be taken, for each process."""


def read(items: Sequence[Item], contract: InputContract, workers: int = 1) -> Generator[tuple[Item, Read], None, None]:
    """Read each clip, in order; the same whatever `workers` is.

    The first clips are read here. If the others would take longer than `WORTH_S`, processes read them.

    Args:
        items: with several workers their `read` must be one that pickle takes.
        workers: most processes.

    Raises:
        BackendError: a process was killed; names the clips that were being read.
    """
    spent = 0.0
    for done, item in enumerate(items):
        if workers > 1 and done >= TRIED and spent / done * (len(items) - done) > WORTH_S:
            yield from _by_processes(items[done:], contract, workers)
            return
        begin = time.perf_counter()
        found = _read(item, contract)
        spent += time.perf_counter() - begin
        yield item, found


def _by_processes(
    items: Sequence[Item], contract: InputContract, workers: int
) -> Generator[tuple[Item, Read], None, None]:
    waiting: deque[tuple[Item, Future[Read]]] = deque()
    try:
        with processes.threads(1), processes.pool(min(workers, len(items))) as pool:
            for item in items:
                if len(waiting) >= AHEAD * workers:
                    yield _first(waiting)
                with interrupts.kept_from_children(), processes.without_main():
                    waiting.append((item, pool.submit(_read, item, contract)))
            while waiting:
                yield _first(waiting)
    except BrokenProcessPool as error:
        names = [item.name for item, future in waiting if not future.done() or future.exception()]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise BackendError(
            f"a process that read clips was killed, perhaps because memory ran out; in work were "
            f"{', '.join(names[:3])}{more}: run the command again, or leave out the clip at fault"
        ) from error


def _first(waiting: deque[tuple[Item, Future[Read]]]) -> tuple[Item, Read]:
    """Wait for the first clip and take it."""
    item, future = waiting[0]
    found = future.result()
    waiting.popleft()
    return item, found


def _read(item: Item, contract: InputContract) -> Read:
    try:
        return item.read(contract)
    except InputError as error:
        return error
