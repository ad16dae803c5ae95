"""Energy, where the machine has a counter, or shows its power.

RAPL on x86 under Linux counts joules. Of others the power is read again and again and multiplied by the time: by
`tegrastats` on NVIDIA Jetson, by the firmware of a Raspberry Pi 5, by INA sensors of other boards (hwmon). All include
idle power and other processes; so the meter is read around turns in which one candidate runs and the others wait.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import Self

from edgetube.bench.conditions import FIRMWARE, text_of

POWERCAP = Path("/sys/class/powercap")
"""The kernel's power capping framework; `intel-rapl:N` are the processor packages, AMD's included."""

TEGRASTATS = "tegrastats"
INTERVAL_MS = 50
RAIL = re.compile(r"(?:VDD_IN|POM_5V_IN|VDD_SYS_5V0|SYS5V) (\d+)(?:mW)?/")
"""The rail that feeds the module, in mW: `VDD_IN 4182mW/4182mW` on Orin, `POM_5V_IN 2104/2104` on Nano."""


FIRMWARE_S = 0.25
"""Seconds between two questions to the firmware, each a process that takes time from what is measured."""

HWMON = Path("/sys/class/hwmon")
"""The kernel's sensors of boards."""

ADC = re.compile(r"^\s*(\w+)_([AV]) (?:current|volt)\(\d+\)=([\d.]+)[AV]\s*$", re.MULTILINE)
"""A rail's current or voltage: `VDD_CORE_A current(7)=0.91A`, `VDD_CORE_V volt(15)=0.87V`."""


class Meter:
    """A meter that always reads 0, and the base class of real ones. A context manager."""

    def joules(self) -> float:
        """Energy since an arbitrary moment; only differences are meaningful."""
        return 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop counting."""


class Rapl(Meter):
    """RAPL counters of the packages, in microjoules; they wrap around after `max_energy_range_uj`."""

    def __init__(self, zones: list[Path]) -> None:
        self.zones = zones
        self.ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in zones]
        self.last = self._read()
        self.total = 0

    def _read(self) -> list[int]:
        return [int((zone / "energy_uj").read_text()) for zone in self.zones]

    def joules(self) -> float:
        now = self._read()
        self.total += sum(
            (after - before) % size for after, before, size in zip(now, self.last, self.ranges, strict=True)
        )
        self.last = now
        return self.total / 1e6


class Sampled(Meter):
    """Integrates a power that is read from time to time; between two readings it is that of the first."""

    def __init__(self) -> None:
        self._watts = self._joules = 0.0
        self._since = time.perf_counter()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        """Say each power by `_is` until the meter ends."""
        raise NotImplementedError

    def _is(self, watts: float) -> None:
        """From now on."""
        self.joules()
        with self._lock:
            self._watts = watts

    def joules(self) -> float:
        with self._lock:
            now = time.perf_counter()
            self._joules += self._watts * (now - self._since)
            self._since = now
            return self._joules

    def __exit__(self, *_: object) -> None:
        self._ended.set()


class Tegra(Sampled):
    """The power that `tegrastats` prints."""

    def __init__(self, command: str) -> None:
        self._process = subprocess.Popen(
            [command, "--interval", str(INTERVAL_MS)], stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL
        )
        super().__init__()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if found := RAIL.search(line):
                self._is(int(found[1]) / 1e3)

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


class Polled(Sampled):
    """A power that a function reads, in watts; None where it cannot just now.

    Args:
        read: the function.
        interval: seconds between two calls.
    """

    def __init__(self, read: Callable[[], float | None], interval: float) -> None:
        self._power, self._interval = read, interval
        super().__init__()

    def _listen(self) -> None:
        while not self._ended.wait(self._interval):
            if (watts := self._power()) is not None:
                self._is(watts)


def _pmic(command: str) -> float | None:
    """Watts of all rails whose current and voltage a Raspberry Pi 5's power chip measures; None of other ones.

    What USB devices take from its 5 V is not among them.
    """
    said = subprocess.run([command, "pmic_read_adc"], capture_output=True, text=True).stdout
    found = {(rail, kind): float(value) for rail, kind, value in ADC.findall(said)}
    rails = [rail for rail, kind in found if kind == "A" and (rail, "V") in found]
    return sum(found[rail, "A"] * found[rail, "V"] for rail in rails) if rails else None


def _sensors() -> list[Path]:
    """Files of INA sensors, which boards have in their supply, in microwatts."""
    devices = HWMON.glob("hwmon*") if HWMON.is_dir() else ()
    return sorted(
        file
        for device in devices
        if (text_of(device / "name") or "").startswith("ina")
        for file in device.glob("power*_input")
    )


def _supply(files: list[Path]) -> float | None:
    values = [text_of(file) or "" for file in files]
    return sum(int(value) for value in values) / 1e6 if all(value.isdecimal() for value in values) else None


@dataclass(frozen=True)
class Source:
    """What a machine's energy is read from.

    Attributes:
        name: for people.
        open: starts a meter.
    """

    name: str
    open: Callable[[], Meter]


def _found() -> tuple[Source | None, str | None]:
    """The first source that this machine has, or why it has none."""
    zones, reason = _rapl()
    if zones:
        return Source(f"RAPL, {len(zones)} package(s)", lambda: Rapl(zones)), None
    if tegrastats := shutil.which(TEGRASTATS):
        return Source(TEGRASTATS, lambda: Tegra(tegrastats)), None
    firmware = shutil.which(FIRMWARE)
    if firmware and _pmic(firmware) is not None:
        return Source(f"{FIRMWARE} pmic_read_adc", lambda: Polled(lambda: _pmic(firmware), FIRMWARE_S)), None
    sensors = _sensors()
    if sensors and _supply(sensors) is not None:
        return Source(
            f"hwmon, {len(sensors)} INA sensor(s)", lambda: Polled(lambda: _supply(sensors), INTERVAL_MS / 1e3)
        ), None
    return None, reason or (
        f"this machine shows no counter: no {POWERCAP}/intel-rapl:0, no {TEGRASTATS}, no rails of a Raspberry Pi 5 "
        f"({FIRMWARE} pmic_read_adc) and no INA sensor in {HWMON}"
    )


def meter() -> Meter:
    """The meter of this machine; a `Meter` that reads 0 where there is no counter."""
    found, _ = _found()
    return found.open() if found else Meter()


def source() -> dict[str, Any]:
    """{"source", "reason"}: what `meter` reads, or why it reads nothing."""
    found, reason = _found()
    return {"source": found and found.name, "reason": reason}


def _rapl() -> tuple[list[Path], str | None]:
    """The packages' counters; none where there are none, or with the reason why they cannot be read."""
    zones = sorted(POWERCAP.glob("intel-rapl:?")) if POWERCAP.is_dir() else []
    zones = [zone for zone in zones if (zone / "energy_uj").exists()]
    if not zones:
        return [], None
    try:
        for zone in zones:
            (zone / "energy_uj").read_text()
    except PermissionError:
        return [], f"{zones[0]}/energy_uj may be read by root only; run as root, or: sudo chmod a+r that file"
    return zones, None
