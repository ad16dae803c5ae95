"""The peak rate of this machine: the best that any runtime reaches on one large matrix product.

It is measured, not theoretical; the rates of models are compared with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np

from edgetube import runtimes
from edgetube.bench.worker import Benchmarkable, StageTimer
from edgetube.precision import Precision

OPENER = "edgetube.bench.peak:open_products"

SIZE = 1024
"""Rows and columns of both matrices: 1.07 GMAC, and the three of them fit into a last-level cache."""

SECONDS, LEAST = 0.4, 5
"""Seconds and minimum number of calls of each product; the fastest call counts."""


def open_products(stage_timer: StageTimer, threads: int | None) -> Benchmarkable:
    """Measure on opening; `about["peak"]` has a line for each precision that can be computed here."""
    best: dict[Precision, tuple[float, str]] = {}
    for precision in Precision:
        products = runtimes.products(precision, SIZE, threads)
        if precision is Precision.FP32:
            matrices = np.random.default_rng(0).standard_normal((2, SIZE, SIZE), np.float32)
            products["numpy"] = partial(np.matmul, *matrices)
        if products:
            best[precision] = max((rate(call), name) for name, call in products.items())
    lines = [
        {"precision": str(precision), "threads": threads, "gmacs_per_s": gmacs, "by": name}
        for precision, (gmacs, name) in best.items()
    ]
    return Benchmarkable(lambda: None, about={"peak": lines})


def rate(product: Callable[[], object]) -> float:
    """1e9 multiply-accumulates per second of one product of `SIZE`."""
    product()
    taken: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(taken) < LEAST or time.perf_counter() < end:
        start = time.perf_counter()
        product()
        taken.append(time.perf_counter() - start)
    return SIZE**3 / min(taken) / 1e9
