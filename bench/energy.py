"""Energy, where the machine has a counter: RAPL on x86 under Linux, `tegrastats` on NVIDIA Jetson.

Both count the whole processor or module, idle power and other processes included; so the meter is read around turns in
which one candidate runs and the others wait.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from typing_extensions import Self

POWERCAP = Path("/sys/class/powercap")
"""The kernel's power capping framework; `intel-rapl:N` are the processor packages, AMD's included."""

TEGRASTATS = "tegrastats"
INTERVAL_MS = 50
RAIL = re.compile(r"(?:VDD_IN|POM_5V_IN|VDD_SYS_5V0|SYS5V) (\d+)(?:mW)?/")
"""The rail that feeds the module, in mW: `VDD_IN 4182mW/4182mW` on Orin, `POM_5V_IN 2104/2104` on Nano."""


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


class Tegra(Meter):
    """Integrates the power that `tegrastats` prints."""

    def __init__(self, command: str) -> None:
        self._process = subprocess.Popen(
            [command, "--interval", str(INTERVAL_MS)], stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL
        )
        self._watts = self._joules = 0.0
        self._since = time.perf_counter()
        self._lock = threading.Lock()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if found := RAIL.search(line):
                self._add()
                with self._lock:
                    self._watts = int(found[1]) / 1e3

    def _add(self) -> float:
        with self._lock:
            now = time.perf_counter()
            self._joules += self._watts * (now - self._since)
            self._since = now
            return self._joules

    def joules(self) -> float:
        return self._add()

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def meter() -> Meter:
    """The meter of this machine; a `Meter` that reads 0 where there is no counter."""
    zones, _ = _rapl()
    if zones:
        return Rapl(zones)
    command = shutil.which(TEGRASTATS)
    return Tegra(command) if command else Meter()


def source() -> dict[str, Any]:
    """{"source", "reason"}: what `meter` reads, or why it reads nothing."""
    zones, reason = _rapl()
    if zones:
        return {"source": f"RAPL, {len(zones)} package(s)", "reason": None}
    if shutil.which(TEGRASTATS):
        return {"source": TEGRASTATS, "reason": None}
    return {"source": None, "reason": reason}


def _rapl() -> tuple[list[Path], str | None]:
    zones = sorted(POWERCAP.glob("intel-rapl:?")) if POWERCAP.is_dir() else []
    zones = [zone for zone in zones if (zone / "energy_uj").exists()]
    if not zones:
        return [], f"this machine shows no counter: no {POWERCAP}/intel-rapl:0 and no {TEGRASTATS}"
    try:
        for zone in zones:
            (zone / "energy_uj").read_text()
    except PermissionError:
        return [], f"{zones[0]}/energy_uj may be read by root only; run as root, or: sudo chmod a+r that file"
    return zones, None
