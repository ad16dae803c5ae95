"""Graphs answer several clips at a time, each in a thread of its own; what they give is taken in the clips' order.

Threads that share the operators of one clip wait for each other behind each of them; those of several clips do not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from edgetube import processes

T = TypeVar("T")


def in_order(work: Callable[[int], T], indices: Iterable[int]) -> Generator[T, None, None]:
    """`work` of each index, in order, by `edgetube.processes.side_by_side` threads; as many results may wait.

    Whoever stops early closes the generator, which waits for the work that has begun.
    """
    threads = processes.side_by_side()
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for index in indices:
                waiting.append(pool.submit(work, index))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for left in waiting:
                left.cancel()
