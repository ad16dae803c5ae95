"""Temperature, clocks and throttling, read from files laid as the kernel lays them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgetube.bench import conditions
from edgetube.errors import InputError
from edgetube.progress import silent


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty /sys, no board's name and no firmware."""
    monkeypatch.setattr(conditions, "SYS", tmp_path)
    monkeypatch.setattr(conditions, "MODEL", (tmp_path / "model",))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    return tmp_path


def lay(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_a_machine_that_shows_nothing(sysfs: Path) -> None:
    assert set(conditions.read().values()) == {None}
    assert conditions.throttled(conditions.read(), conditions.read()) is None


def test_a_board(sysfs: Path) -> None:
    lay(sysfs, "model", "Raspberry Pi 5 Model B Rev 1.0\0")
    lay(sysfs, "class/thermal/thermal_zone0/temp", "48250\n")
    lay(sysfs, "class/thermal/thermal_zone1/temp", "51000\n")
    lay(sysfs, "class/thermal/thermal_zone2/temp", "-256000\n")  # a zone that is off
    lay(sysfs, "devices/system/cpu/cpu0/cpufreq/scaling_governor", "ondemand\n")
    lay(sysfs, "devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", "1500000\n")
    lay(sysfs, "devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq", "2400000\n")
    assert conditions.read() == {
        "board": "Raspberry Pi 5 Model B Rev 1.0", "celsius": 51.0, "governor": "ondemand", "mhz": 1500.0,
        "max_mhz": 2400.0, "throttles": None, "firmware": None,
    }  # fmt: skip


def test_a_processor_that_counts_its_throttling(sysfs: Path) -> None:
    for core in range(2):
        lay(sysfs, f"devices/system/cpu/cpu{core}/thermal_throttle/core_throttle_count", "3\n")
    before = conditions.read()
    assert conditions.throttled(before, conditions.read()) is False
    lay(sysfs, "devices/system/cpu/cpu1/thermal_throttle/core_throttle_count", "5\n")
    assert conditions.read()["throttles"] == before["throttles"] + 2
    assert conditions.throttled(before, conditions.read()) is True


def firmware(root: Path, bits: str) -> dict[str, Any]:
    """The conditions of a Raspberry Pi whose firmware says so."""
    command = root / "bin" / "vcgencmd"
    command.write_text(f"#!/bin/sh\necho throttled={bits}\n")
    command.chmod(0o755)
    return conditions.read()


@pytest.mark.parametrize(
    ("before", "after", "throttled"),
    [
        ("0x0", "0x0", False),
        ("0x0", "0x50000", True),  # it did meanwhile, and does not any more
        ("0x50000", "0x50005", True),
        ("0x50005", "0x50000", True),
        ("0x50000", "0xd0000", True),  # the soft limit, for the first time
        ("0x50000", "0x50000", None),  # it did once, perhaps again
        ("0x0", "what", None),
    ],
)
def test_a_firmware_that_says_it(sysfs: Path, before: str, after: str, throttled: bool | None) -> None:
    first, last = firmware(sysfs, before), firmware(sysfs, after)
    assert (first["firmware"], last["firmware"]) == (before, after if after != "what" else None)
    assert first["throttles"] is None
    assert conditions.throttled(first, last) is throttled


def test_a_start_waits_until_it_is_cool(sysfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    degrees = iter(["61000", "52000", "44900"])
    lay(sysfs, "class/thermal/thermal_zone0/temp", "70000")
    waited, told = list[float](), list[tuple[str, int, int]]()

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        lay(sysfs, "class/thermal/thermal_zone0/temp", next(degrees))

    monkeypatch.setattr("time.sleep", sleep)
    conditions.wait_below(45.0, lambda *told_now: told.append(told_now))
    assert len(waited) == 3
    assert told == [("cool to 45 C", done, 25) for done in (0, 9, 18, 25)]


def test_a_start_that_cannot_wait(sysfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="this machine shows none"):
        conditions.wait_below(45.0, silent)
    lay(sysfs, "class/thermal/thermal_zone0/temp", "70000")
    monkeypatch.setattr(conditions, "LONGEST_S", -1.0)
    with pytest.raises(InputError, match=r"start-below is 45 C, and after -1 s it is 70\.0 C still"):
        conditions.wait_below(45.0, silent)
