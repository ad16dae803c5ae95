"""The soak finds what it looks for, and nothing where nothing is wrong."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgetube.bench.studies import servers, soak, soak_faults
from edgetube.bench.studies.soak_faults import FAULTS, Row
from edgetube.errors import InputError
from edgetube.live.frame import Account


def test_frames_of_a_week_are_all_accounted_for() -> None:
    """Counts by hand: of 5 frames of a recording 3 are sampled, and no clip of 16 is ever full; of 40, 20 are."""
    found = soak.endure(500)
    assert found["balanced"]
    assert found["account"] == {
        "captured": 500,
        "used": 0,
        "waiting": 0,
        "dropped": {"sampling": 200, "restart": 297, "closed": 3},
    }
    found = soak.endure(4000)
    assert (found["predictions"], found["wrong"], found["restarted"]) == (200, 0, 99)
    assert found["account"]["used"] == 2000
    assert found["simulated_s"] == pytest.approx(soak.WEEK_S, abs=1.0)
    assert len(found["rss_mb"]) == len(found["threads"]) == soak.LOOKS
    assert max(found["threads"]) == min(found["threads"])


def test_a_clip_of_other_frames_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def skip(_: soak.Instant, clips: npt.ArrayLike) -> npt.NDArray[np.float32]:
        greys = np.asarray(clips)[:, :, 0, 0, 0].astype(np.float32)
        greys[:, 7] += 1
        return greys

    monkeypatch.setattr(soak.Instant, "__call__", skip)
    found = soak.endure(4000)
    assert found["wrong"] == found["predictions"] > 0


def test_memory_that_grows_is_told() -> None:
    looks = soak.Looks()
    looks.look()
    kept = np.ones(50_000_000, np.uint8)
    looks.look()
    assert looks.rss_mb[1] - looks.rss_mb[0] == pytest.approx(len(kept) / 1e6, abs=5)
    assert looks.summary()["growth_percent"] == pytest.approx(100 * (looks.rss_mb[1] / looks.rss_mb[0] - 1))


@pytest.mark.parametrize(
    ("account", "balanced"),
    [
        (Account(10, 6, 0, {"sampling": 4}), True),
        (Account(10, 6, 1, {"sampling": 3}), False),
        (Account(10, 11, 0, {"sampling": -1}), False),
        (Account(10, 6, 0, {"sampling": 3}), False),
    ],
)
def test_an_account_that_does_not_balance_is_found(account: Account, balanced: bool) -> None:
    assert soak_faults.totals([Account(1, 1, 0, {}), account])["balanced"] == balanced


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({}, True),
        ({"survived": False}, False),
        ({"recovery_s": 2.5}, False),
        ({"balanced": False}, False),
        ({"survived": False, "note": "not run: no server"}, True),
    ],
)
def test_what_passes(changes: dict[str, Any], passes: bool) -> None:
    row = Row(**{"name": "x", "cause": "y", "survived": True, "recovery_s": 1.0, "balanced": True, **changes})
    assert soak.passed(row) == passes
    assert "| x | y |" in soak.table([row])


def test_whatever_does_not_hold_out_is_a_complaint() -> None:
    good = Row("stall", "y", survived=True, recovery_s=1.0, balanced=True)
    even = {"growth_percent": 1.9, "threads": [4, 4], "files": [6, 6]}
    document: dict[str, Any] = {
        "endurance": {"balanced": True, "wrong": 0, **even},
        "answers": even,
        "threads": {"differ": 0},
        "faults": [asdict(good)],
    }
    assert soak.complaints(document) == []
    document["endurance"] |= {"balanced": False, "wrong": 2}
    document["answers"] = {"growth_percent": 2.1, "threads": [4, 5], "files": [6, 7]}
    document["threads"] = {"differ": 3}
    document["faults"] = [asdict(replace(good, survived=False))]
    assert len(soak.complaints(document)) == 7


def test_faults_are_chosen_by_name() -> None:
    assert soak.chosen("all") == list(FAULTS)
    assert soak.chosen("none") == []
    assert soak.chosen("stall,close") == ["stall", "close"]
    with pytest.raises(InputError, match="there is no fault 'flood'; expected all, none, or some of killed, "):
        soak.chosen("stall,flood")


def test_eight_threads_on_one_model() -> None:
    assert soak.together(soak.Instant()) == {"threads": 8, "answers": 512, "differ": 0}  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model-fails", "size", "close"])
def test_faults_are_survived(name: str) -> None:
    row = FAULTS[name](soak.Instant())  # type: ignore[arg-type]
    assert soak.passed(row), row
    assert row.balanced


@pytest.mark.slow
def test_a_fault_that_is_not_survived_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that stays away."""
    start = servers.Server.start
    started: list[servers.Server] = []

    def once(server: servers.Server) -> None:
        if not started:
            start(server)
        started.append(server)

    monkeypatch.setattr(soak_faults, "PATIENCE_S", 4.0)
    monkeypatch.setattr(servers.Server, "start", once)
    row = FAULTS["killed"](soak.Instant())  # type: ignore[arg-type]
    assert len(started) == 2
    assert not soak.passed(row)
    assert row.recovery_s is None
