"""How another machine is reached: `ssh://user@host:port`, or `local://` for this one through the same line."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import parse_qs, unquote, urlsplit

from edgetube import address
from edgetube.errors import InputError

EXPECTED = "expected ssh://user@host[:port][?python=/path/of/python3] or local://"


class Transport(Protocol):
    """Runs a program on another machine. What is sent there, and what comes back, goes through its pipes.

    Attributes:
        name: the address, for messages.
        python: the Python of the user's own environment there; None looks for one.
    """

    @property
    def name(self) -> str: ...

    @property
    def python(self) -> str | None: ...

    def run(self, script: str, words: int) -> subprocess.Popen[bytes]:
        """Run a line for a POSIX shell there, with its stdin and stdout as pipes.

        Args:
            script: one line, without "!".
            words: file descriptor that gets what it says on stderr.
        """

    def explain(self, code: int, said: str) -> str | None:
        """Why the transport itself failed, and what to do; None if it did not, and the program ended by itself."""


@dataclass(frozen=True)
class Local:
    """This machine, through the same line as another."""

    name: str
    python: str | None

    def run(self, script: str, words: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words)

    def explain(self, code: int, said: str) -> str | None:
        return None


def parse(text: str) -> Transport:
    """The transport of an address.

    Raises:
        InputError: it is no address of a device.
    """
    from edgetube.remote.ssh import Ssh

    shown = address.plain(text) if "://" in text else re.sub(r".*@", "***@", text, flags=re.DOTALL)
    try:
        parts = urlsplit(text)
        host, port = _host(parts.netloc), parts.port
    except ValueError:
        raise InputError(f"the device is {shown!r}; {EXPECTED}") from None  # its cause may show a part of a password
    options = parse_qs(parts.query, keep_blank_values=True)
    python = options.pop("python", [None])[-1]
    if parts.password is not None or ":" in unquote(parts.username or ""):
        raise InputError(f"the device {shown!r} has a password; edgetube takes none: use a key and ssh's agent")
    if options or parts.fragment or parts.path.strip("/") or (python is not None and not python.startswith("/")):
        raise InputError(f"the device is {shown!r}; {EXPECTED}")
    if parts.scheme == "local" and not parts.netloc:
        return Local("local://", python)
    if parts.scheme != "ssh" or not host:
        raise InputError(f"the device is {shown!r}; {EXPECTED}")
    user = unquote(parts.username) if parts.username else None
    for word in (host, user):
        if word is not None and (word.startswith("-") or not word.isprintable() or " " in word):
            raise InputError(f"the device is {shown!r}: {word!r} is no host or user; {EXPECTED}")
    return Ssh(f"ssh://{f'{user}@' if user else ''}{parts.netloc.rpartition('@')[2]}", host, user, port, python)


def _host(netloc: str) -> str:
    """The host as it is written: `urlsplit` lowers its case, and names in a configuration of ssh have one."""
    place = netloc.rpartition("@")[2]
    return place[1:].partition("]")[0] if place.startswith("[") else place.partition(":")[0]
