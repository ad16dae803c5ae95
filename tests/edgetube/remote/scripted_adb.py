"""A program that behaves like adb's client, for phones that a file describes; no Android has a part in it.

    python scripted_adb.py PHONES.json [-s SERIAL] shell -T SCRIPT...
    python scripted_adb.py PHONES.json [-s SERIAL] push FOLDER... FOLDER

The file has for each serial number its `state`, as `adb devices` has it; `shell`, a command that takes a script and is
the shell there; `root`, the folder that is `/` there; `old`, true for one that knows no shell protocol; and `lost`, the
exit code of a client that lost it: 0 of older ones, 255 of newer. What it says, and its exit codes, are those of AOSP's
`commandline.cpp` and `transport.cpp`. At SIGUSR1 the device is gone.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn

SAYS = {
    "offline": "device offline",
    "authorizing": "device still authorizing",
    "connecting": "device still connecting",
    "unauthorized": "device unauthorized.\nThis adb server's $ADB_VENDOR_KEYS is not set\n"
    "Try 'adb kill-server' if that seems wrong.\nOtherwise check for a confirmation dialog on your device.",
}
"""What is said of a device in a state but `device`."""


def fail(text: str) -> NoReturn:
    sys.exit(f"error: {text}")


def find(phones: dict[str, Any], serial: str | None) -> dict[str, Any]:
    if serial is not None and serial not in phones:
        fail(f"device '{serial}' not found")
    if not phones:
        fail("no devices/emulators found")
    if serial is None and len(phones) > 1:
        fail("more than one device/emulator")
    phone: dict[str, Any] = phones[serial] if serial is not None else next(iter(phones.values()))
    if phone["state"] != "device":
        fail(SAYS[phone["state"]])
    return phone


def shell(phone: dict[str, Any], words: list[str]) -> int:
    raw = words[:1] == ["-T"]
    if raw and phone.get("old"):
        fail("device only supports allocating a pty")
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(phone.get("lost", 0)))  # how the program ended is not known
    script = " ".join(words[1:] if raw else words)
    process = subprocess.Popen([*phone["shell"], script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    threading.Thread(target=copy, args=(0, process.stdin.fileno(), process.stdin), daemon=True).start()
    copy(process.stdout.fileno(), 1)
    code = process.wait()
    return 128 - code if code < 0 else code


def copy(source: int, target: int, to_close: IO[bytes] | None = None) -> None:
    with suppress(OSError):
        while data := os.read(source, 1 << 16):
            while data:
                data = data[os.write(target, data) :]
    if to_close is not None:
        with suppress(OSError):
            to_close.close()


def push(phone: dict[str, Any], sources: list[str], target: str) -> int:
    """As adb does: into a folder that is there, else as that folder."""
    place = Path(phone["root"]) / target.lstrip("/")
    for source in map(Path, sources):
        shutil.copytree(source, place / source.name if place.is_dir() else place, symlinks=True, dirs_exist_ok=True)
    return 0


def main(words: list[str]) -> int:
    phones = json.loads(Path(words.pop(0)).read_text())
    serial = None
    if words[:1] == ["-s"]:
        serial = words[1]
        del words[:2]
    phone = find(phones, serial)
    if words[0] == "push":
        return push(phone, words[1:-1], words[-1])
    assert words[0] == "shell"
    return shell(phone, words[1:])


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # a thread may still wait for more to copy
