"""Metrics, read by a reader that was written from the format's description."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgetube.live.decisions import DecisionRule
from edgetube.live.frame import Account
from edgetube.live.scheduler import Statistics
from edgetube.serve import prometheus
from edgetube.serve.board import Board, Histogram
from edgetube.serve.watched import WatchedSource
from edgetube.spec import Prediction

LINE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{((?:[a-zA-Z_]\w*="(?:[^"\\\n]|\\["\\n])*",?)*)\})? (\S+)')
LABEL = re.compile(r'([a-zA-Z_]\w*)="((?:[^"\\\n]|\\["\\n])*)"')


def read(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Values by (name, labels)."""
    assert text.endswith("\n")
    found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    types: dict[str, str] = {}
    for line in text[:-1].split("\n"):
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in types
            types[name] = kind
            continue
        if line.startswith("# HELP "):
            continue
        match = LINE.fullmatch(line)
        assert match, line
        name = re.sub("_(bucket|sum|count)$", "", match[1])
        assert name in types or match[1] in types
        labels = tuple(
            (key, re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], value))
            for key, value in LABEL.findall(match[2] or "")
        )
        assert (match[1], labels) not in found
        found[match[1], labels] = math.inf if match[3] == "+Inf" else float(match[3])
    return found


@pytest.mark.parametrize("name", ['a "quoted" \\ name\nof two lines', "türe, {yard}=1", "a\\nb", "\udcff"])
def test_any_name_of_a_source(name: str) -> None:
    board = Board(DecisionRule(tau=0, minimum=0), ("a", "b"))
    account = Account(10, 6, 1, {"sampling": 2, "overrun": 1})
    one = Statistics("live", None, 15.0, account, 3, 1.0, 2.0, 3.0, 4.0, 0.25)
    cameras: Any = SimpleNamespace(statistics=lambda: {name: one})
    with WatchedSource.pushed(name) as source:
        board.add(name, source)
        for i, (latency, age) in enumerate([(4.0, 30.0), (5.0, 700.0), (9000.0, 9000.0)]):
            logits = (5.0, 0.0)
            board.answered(
                Prediction("a", 1.0, {"a": 1.0}, logits, 0.0, float(i), latency_ms=latency, source=name, age_ms=age)
            )
        found = read(prometheus.text(board, cameras, {("file", "done"): 7}))
    shown = name.encode("utf-8", "backslashreplace").decode()

    def value(metric: str, **labels: str) -> float:
        return found[metric, (("source", shown), *labels.items())]

    assert value("edgetube_frames_captured_total") == 10
    assert value("edgetube_frames_dropped_total", cause="sampling") == 2
    assert value("edgetube_frames_dropped_total", cause="damaged") == 0
    dropped = sum(v for (metric, _), v in found.items() if metric == "edgetube_frames_dropped_total")
    assert value("edgetube_frames_used") + value("edgetube_frames_waiting") + dropped == 10
    assert value("edgetube_source_state", state="live") == 1
    assert sum(v for (metric, _), v in found.items() if metric == "edgetube_source_state") == 1
    assert value("edgetube_spans_total") == 1
    assert value("edgetube_latency_seconds_bucket", le="0.005") == 2  # 4 ms, and 5 ms: a bound is within
    assert value("edgetube_latency_seconds_bucket", le="5.0") == 2
    assert value("edgetube_latency_seconds_bucket", le="+Inf") == 3
    assert value("edgetube_latency_seconds_count") == 3
    assert value("edgetube_latency_seconds_sum") == pytest.approx(9.009)
    assert value("edgetube_age_seconds_bucket", le="0.5") == 1
    assert found["edgetube_requests_total", (("what", "file"), ("result", "done"))] == 7


def test_buckets_count_like_numpy(rng: np.random.Generator) -> None:
    found, values = Histogram(), rng.exponential(0.5, 1000)
    for one in values:
        found.add(float(one))
    samples = {labels["le"]: v for suffix, labels, v in prometheus.histogram({}, found) if suffix == "_bucket"}
    assert samples == {le: np.count_nonzero(values <= float(le)) for le in samples}
    assert samples["+Inf"] == 1000
