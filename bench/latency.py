"""How long does it take? Contestants take turns in one run, so that a busy machine is busy for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one contestant: median and percentiles of `runs` calls, warm-up not counted."""

    p50_ms: float
    p10_ms: float
    p90_ms: float
    runs: int

    def to_json(self) -> dict[str, Any]:
        return {key: round(value, 4) for key, value in asdict(self).items()}


BLOCK = 3
"""Counted calls of one turn. A first call is not counted: the caches are the previous contestant's then, and its
threads may still be waiting for work on the same cores (measured: twice the time, call by call)."""


def interleave(
    contestants: Mapping[str, Callable[[], object]], *, seconds: float = 1.0, minimum: int = 5, warmup: int = 3
) -> dict[str, Timing]:
    """Time callables in turns of `BLOCK` calls, A B C A B C ..., for about `seconds` each, at least `minimum` turns."""
    for call in contestants.values():
        for _ in range(warmup):
            call()
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    end = time.perf_counter() + seconds * len(contestants)
    while time.perf_counter() < end or len(next(iter(taken.values()))) < minimum * BLOCK:
        for name, call in contestants.items():
            call()
            for _ in range(BLOCK):
                start = time.perf_counter()
                call()
                taken[name].append((time.perf_counter() - start) * 1e3)
    return {name: _timing(values) for name, values in taken.items()}


def _timing(values: list[float]) -> Timing:
    p10, p50, p90 = (float(v) for v in np.percentile(values, [10, 50, 90]))
    return Timing(p50, p10, p90, len(values))
