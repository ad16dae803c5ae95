"""Where an export's time goes: every second belongs to one stage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from edgetube.bench.studies import waiting
from edgetube.bench.studies.waiting import CHILDREN, StageTimer


def test_every_second_belongs_to_one_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processor seconds of processes that have ended are apart."""
    clock = iter([(0.0, 0.0, 0.0), (1.0, 2.0, 0.0), (3.0, 5.0, 0.5), (4.0, 6.0, 4.0), (4.5, 6.5, 4.0), (7.0, 9.0, 4.0)])
    monkeypatch.setattr(waiting, "_now", lambda: next(clock))
    timer = StageTimer()
    for stage, done in (("read", 0), ("read", 1), ("read", 2), ("judge", 0), ("judge", 1)):
        timer(stage, done, 2)
    expected = {"before read": (1.0, 2.0), "read": (3.0, 4.0), "before judge": (0.5, 0.5), "judge": (2.5, 2.5)}
    assert timer.times == {**expected, CHILDREN: (0.0, 4.0)}


@pytest.mark.long
def test_an_export_in_a_process_of_its_own(tmp_path: Path) -> None:
    record = tmp_path / "all.json"
    record.write_text('{"other": 1}')
    command = [sys.executable, waiting.__file__, "demo", "--target", "onnx-fp32", "--json", str(record)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.startswith("demo onnx-fp32: ")
    found = json.loads(record.read_text())
    assert found["other"] == 1
    (row,) = found["waiting"]["exports"]
    assert {"load checkpoint", "reference answers", CHILDREN} <= row["stages"].keys()
    for kind in ("seconds", "processor_seconds"):
        assert sum(spent[kind] for spent in row["stages"].values()) == pytest.approx(row[kind], rel=0.05, abs=0.1)
