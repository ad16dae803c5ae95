"""Android, reached by its own client `adb`, as the user that its shell has."""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote

from edgetube.remote.client import Client

CLIENT = Client("adb", "EDGETUBE_ADB", "adb -P 5038", "Android's platform tools (on Debian: apt-get install adb)")

TEMPORARY = "/data/local/tmp"
"""What Android's shell may write to, and start programs from; it has no home."""

FOLDER = f"{TEMPORARY}/edgetube"
"""Where edgetube's files are there, unless `EDGETUBE_CACHE` there says otherwise."""

PYTHON = f"{FOLDER}/python"
"""Where `edgetube.remote.portable` makes a Python for."""

PREPARE = f'export EDGETUBE_CACHE="${{EDGETUBE_CACHE:-{FOLDER}}}" TMPDIR="${{TMPDIR:-{TEMPORARY}}}"; '

FAILED = 1
"""Exit code of adb when it failed itself, of which it says why; a program's own may be the same."""

CUT = (0, 255)
"""Exit codes of adb when it lost the device and does not know how the program there ended: of older ones, of newer."""

SPEAKS = r"(?:error|adb(?:\.exe)?): "
"""Begins what adb says of itself."""

REASONS = (
    (
        r"unauthorized|still authorizing",
        "it does not trust this machine yet: unlock its screen and allow USB debugging for this computer; if it asks "
        "nothing, revoke the authorisations in its developer options and plug it in again",
    ),
    (
        r"device offline|still connecting",
        "adb sees it, and it does not answer: unlock it and plug it in again, or `adb reconnect`",
    ),
    (
        r"device '.*' not found",
        "no device has that serial number: `{adb} devices` lists what is there; one in the network needs `{adb} "
        "connect HOST:PORT` first",
    ),
    (
        r"no devices/emulators found|no devices found",
        "adb sees no device: plug one in and turn on USB debugging in its developer options, or `{adb} connect "
        "HOST:PORT`",
    ),
    (
        r"more than one device",
        "adb sees several devices: choose one by adb://SERIAL; `{adb} devices` lists them",
    ),
    (
        r"[Nn]o permissions|insufficient permissions",
        "this user may not open its USB port: on Debian, apt-get install android-sdk-platform-tools-common, and plug "
        "it in again",
    ),
    (
        r"only supports allocating a pty",
        "its adb hands no bytes through, which needs Android 7 or newer, and an adb here that is as new",
    ),
    (
        r"cannot connect to daemon|failed to check server version|protocol fault",
        "adb's server on this machine does not answer: `{adb} kill-server`, and run the command again",
    ),
)
"""What adb says -> what is wrong, and what to do."""


@dataclass(frozen=True)
class Adb:
    """An Android device.

    Attributes:
        serial: what `adb devices` calls it; empty for the only one.
    """

    name: str
    serial: str = ""
    python: str | None = None
    pythons = (f"{PYTHON}/bin/python3",)
    install = (
        "Android has none; make one by `python -m edgetube.remote.portable` on a Debian or Ubuntu, and push it as that "
        "says"
    )
    elsewhere = f"remove {FOLDER}/device there: what is in it is made again"

    @property
    def silent(self) -> str:
        """adb keeps a device of the network in its list for minutes after that has gone."""
        return (
            f"see that it is on, and plugged in or in this network; one in the network has to be connected again: "
            f"`{CLIENT.shown} disconnect`, `{CLIENT.shown} connect HOST:PORT`"
        )

    @property
    def command(self) -> list[str]:
        """adb for this device, without what it shall do."""
        return [*CLIENT.command, *(["-s", self.serial] if self.serial else [])]

    def run(self, script: str, words: int) -> subprocess.Popen[bytes]:
        return CLIENT.start(self.name, [*self.command, "shell", "-T", PREPARE + script], words)

    def explain(self, code: int, said: str, *, begun: bool) -> str | None:
        if code < 0:
            return CLIENT.ended(-code)
        # Behind its start adb says nothing, and a program there may say "error: ", too.
        lines = [] if begun else [line for line in said.splitlines() if re.match(SPEAKS, line)]
        if code in CUT and not lines:  # the program there does not end by itself without a fault
            return "the line was cut: see that it is plugged in, and run the command again; what was sent is kept there"
        if code not in (FAILED, *CUT) or not lines:
            return None
        known = ((advice, line) for line in reversed(lines) for pattern, advice in REASONS if re.search(pattern, line))
        advice, last = next(known, ("try by hand: `{by_hand}`", lines[-1]))
        by_hand = shlex.join([*self.command, "shell"])
        return f"{advice.format(adb=CLIENT.shown, by_hand=by_hand)} (adb says: {re.sub(SPEAKS, '', last, count=1)})"


def read(parts: SplitResult, python: str | None) -> Adb:
    """See `edgetube.remote.transport.SCHEMES`. A serial number is as adb writes it: `R58M`, `192.168.1.5:5555`."""
    serial = unquote(parts.netloc)
    if serial.startswith("-") or not serial.isprintable() or "@" in serial:
        raise ValueError(f"{serial!r} is no serial number")
    return Adb(f"adb://{parts.netloc}", serial, python)
