"""What decides how fast a machine is just now: its temperature, clocks and governor, and whether it throttled.

Read from Linux's sysfs, and from a Raspberry Pi's firmware; a value that a machine does not show is None.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgetube.errors import InputError
from edgetube.progress import Progress

SYS = Path("/sys")
MODEL = (Path("/proc/device-tree/model"), Path("/sys/devices/virtual/dmi/id/product_name"))
"""Where a board, or a PC, states its name."""

FIRMWARE = "vcgencmd"
"""The command that asks a Raspberry Pi's firmware."""

THROTTLED_NOW, THROTTLED_EVER = 0xF, 0xF0000
"""Bits of `get_throttled`: too little voltage, clock capped, throttled, soft limit; now, and since the start."""

POLL_S, LONGEST_S = 2.0, 900.0
"""Seconds between two looks at the temperature, and the most that a start waits."""


def read() -> dict[str, Any]:
    """The conditions of this moment.

    Returns:
        `board`: its name; `celsius`: of the hottest zone; `governor`, `mhz`, `max_mhz`: of the first core; `throttles`:
        the kernel's counter of throttling; `firmware`: the bits of a Raspberry Pi's `get_throttled`, as it shows them.
    """
    cpu = SYS / "devices/system/cpu/cpu0/cpufreq"
    return {
        "board": next((text for path in MODEL if (text := text_of(path))), None),
        "celsius": celsius(),
        "governor": text_of(cpu / "scaling_governor"),
        "mhz": _thousandth(text_of(cpu / "scaling_cur_freq")),
        "max_mhz": _thousandth(text_of(cpu / "cpuinfo_max_freq")),
        "throttles": _throttles(),
        "firmware": _firmware(),
    }


def celsius() -> float | None:
    """Temperature of the hottest thermal zone, in degrees Celsius."""
    zones = (text_of(path) for path in sorted((SYS / "class/thermal").glob("thermal_zone*/temp")))
    found = [degrees for text in zones if (degrees := _thousandth(text)) is not None and 0 < degrees < 150]
    return max(found, default=None)


def throttled(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool | None:
    """Whether the machine throttled between two readings; None where it does not say.

    The firmware says what is so now, and what ever was; what was before, and is not now, it does not say again.
    """
    if before["throttles"] is not None and after["throttles"] is not None:
        return bool(after["throttles"] > before["throttles"])
    if before["firmware"] is None or after["firmware"] is None:
        return None
    first, last = int(before["firmware"], 16), int(after["firmware"], 16)
    if (first | last) & THROTTLED_NOW or last & ~first & THROTTLED_EVER:
        return True
    return None if last & THROTTLED_EVER else False


def known_celsius() -> float:
    """`celsius`, which `wait_below` needs.

    Raises:
        InputError: the machine shows no temperature.
    """
    now = celsius()
    if now is None:
        raise InputError("start-below needs a temperature, and this machine shows none; leave it out")
    return now


def wait_below(limit: float, progress: Progress) -> None:
    """Wait until the machine is cooler than `limit` degrees Celsius.

    Raises:
        InputError: it shows no temperature, or is not cooler after `LONGEST_S`.
    """
    began, first = time.monotonic(), known_celsius()
    degrees = max(1, math.ceil(first - limit))
    while (now := known_celsius()) >= limit:
        if time.monotonic() - began > LONGEST_S:
            raise InputError(f"start-below is {limit:g} C, and after {LONGEST_S:.0f} s it is {now:.1f} C still")
        progress(f"cool to {limit:g} C", max(0, min(int(first - now), degrees - 1)), degrees)
        time.sleep(POLL_S)
    progress(f"cool to {limit:g} C", degrees, degrees)


def _throttles() -> int | None:
    """Events of throttling so far, which the kernel counts on x86."""
    counters = (SYS / "devices/system/cpu").glob("cpu*/thermal_throttle/*_throttle_count")
    counts = [int(text) for path in counters if (text := text_of(path)) is not None and text.isdigit()]
    return sum(counts) if counts else None


def _firmware() -> str | None:
    """What a Raspberry Pi's firmware says of throttling: 0x50005."""
    command = shutil.which(FIRMWARE)
    if command is None:
        return None
    said = subprocess.run([command, "get_throttled"], capture_output=True, text=True).stdout
    try:
        return f"{int(said.strip().partition('=')[2], 16):#x}"
    except ValueError:
        return None


def text_of(path: Path) -> str | None:
    """A short file of the system, without its end; None where there is none, or nothing in it."""
    try:
        return path.read_text("utf-8", "replace").strip("\0 \n") or None
    except OSError:
        return None


def _thousandth(text: str | None) -> float | None:
    try:
        return None if text is None else float(text) / 1000
    except ValueError:
        return None
