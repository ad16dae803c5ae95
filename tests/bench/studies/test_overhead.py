"""What a line adds to a call: the median of paired ratios, and how sure it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgetube.bench.studies import overhead


def drawn(ratio: float, between: float, within: float, starts: int = 20) -> list[list[float]]:
    """Ratios of pairs: starts differ by a share, and the pairs of one by another."""
    generator = np.random.default_rng(1)
    middles = ratio * (1 + between * generator.standard_normal(starts))
    return [list(middle * (1 + within * generator.standard_normal(15))) for middle in middles]


def test_an_interval_holds_the_ratio_and_little_more() -> None:
    found = overhead.interval(drawn(1.05, 0.005, 0.02))
    assert 1.03 < found["low"] < found["ratio"] < found["high"] < 1.07
    assert found["low"] > 1.0


def test_starts_that_differ_count_as_starts_and_not_as_pairs() -> None:
    """Fifteen pairs of one start say together what that start is, and no more."""
    apart, alike = (overhead.interval(drawn(1.0, between, 0.03)) for between in (0.1, 0.0))
    assert apart["high"] - apart["low"] > 4 * (alike["high"] - alike["low"])
    assert alike["low"] < 1.0 < alike["high"]


@pytest.mark.slow
def test_a_bundle_here_and_through_the_line(tiny_bundle: Path, tmp_path: Path) -> None:
    record = tmp_path / "overhead.json"
    command = [sys.executable, overhead.__file__, str(tiny_bundle), "--starts", "2", "--pairs", "3"]
    printed = subprocess.run([*command, "--json", str(record)], check=True, capture_output=True, text=True).stdout
    found = json.loads(record.read_text())
    assert [line.partition(":")[0] for line in printed.splitlines()] == ["line", "control"]
    assert found["on"] == "local://"
    assert [{name: len(times) for name, times in start.items()} for start in found["starts"]] == [
        {"here": 3, "control": 3, "there": 3}
    ] * 2
    ratios = [b / a for start in found["starts"] for a, b in zip(start["here"], start["there"], strict=True)]
    assert found["line"]["ratio"] == pytest.approx(np.median(ratios), rel=0.01)
