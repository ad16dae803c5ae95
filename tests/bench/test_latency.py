"""Interleaving is fair: everybody has the same number of turns, in turn, after a warm-up."""

import time

from edgetube.bench.latency import interleave


def test_contestants_take_turns_after_a_warm_up():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    timings = interleave(calls, seconds=0.0, minimum=6, warmup=2)
    assert order == ["a", "a", "b", "b", *"aaaabbbb" * 6]
    assert {t.runs for t in timings.values()} == {18}


def test_times_are_milliseconds_and_ordered():
    timing = interleave({"sleep": lambda: time.sleep(0.02)}, seconds=0.0, minimum=2, warmup=0)["sleep"]
    assert 20 <= timing.p10_ms <= timing.p50_ms <= timing.p90_ms
    assert timing.to_json()["runs"] == 6
