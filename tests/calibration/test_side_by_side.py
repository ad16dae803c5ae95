"""Work of several threads, taken in order."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from edgetube import processes
from edgetube.arrays import DiskArray
from edgetube.calibration.side_by_side import in_order


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "cores", lambda: 5)


def test_results_come_in_order_and_work_overlaps() -> None:
    """Each waits for one that was begun later, or before: alone it would wait for ever."""
    met = [threading.Barrier(2, timeout=10) for _ in range(3)]

    def work(index: int) -> int:
        met[index // 2].wait()
        return 10 * index

    assert list(in_order(work, range(6))) == [0, 10, 20, 30, 40, 50]
    assert list(in_order(work, [])) == []


def test_an_error_is_raised_in_its_turn() -> None:
    found = in_order(lambda index: 6 // index, [3, 2, 1, 0, 1, 1, 1])
    assert [next(found) for _ in range(3)] == [2, 3, 6]
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_who_stops_early_leaves_the_rest() -> None:
    begun: list[int] = []
    work = in_order(lambda index: begun.append(index) or index, range(100))
    assert next(work) == 0
    work.close()
    assert len(begun) <= 3
    assert not any(each.name.startswith("ThreadPoolExecutor") and each.is_alive() for each in threading.enumerate())


def test_threads_read_rows_of_one_file(tmp_path: Path) -> None:
    rows = DiskArray(tmp_path, (64, 1000), np.int64)
    for index in range(64):
        rows[index] = np.full(1000, index)
    for index, row in enumerate(in_order(lambda index: rows[index % 64], range(640))):
        np.testing.assert_array_equal(row, index % 64)
