"""How another machine is reached: `ssh://user@host:port`, `adb://SERIAL`, or `local://` for this one.

Each way has a module, which reads its own addresses.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from edgetube import address
from edgetube.errors import InputError
from edgetube.remote import adb, ssh

EXPECTED = "expected ssh://user@host[:port], adb://[SERIAL] or local://; each may have ?python=/path/of/python3"


class Transport(Protocol):
    """Runs a program on another machine. What is sent there, and what comes back, goes through its pipes.

    Attributes:
        name: the address, for messages.
        python: the Python of the user's own environment there; None looks for one.
        pythons: paths where one may lie that the shell there does not find by its name.
        install: how a Python comes there, for messages.
        elsewhere: what helps if edgetube's folder there cannot be written, or its disk is full, for messages.
        silent: what helps if nothing comes from there any more, for messages.
    """

    @property
    def name(self) -> str: ...

    @property
    def python(self) -> str | None: ...

    @property
    def pythons(self) -> tuple[str, ...]: ...

    @property
    def install(self) -> str: ...

    @property
    def elsewhere(self) -> str: ...

    @property
    def silent(self) -> str: ...

    def run(self, script: str, words: int) -> subprocess.Popen[bytes]:
        """Run a line for a POSIX shell there, with its stdin and stdout as pipes.

        Args:
            script: one line, without "!".
            words: file descriptor that gets what it says on stderr.
        """

    def explain(self, code: int, said: str, *, begun: bool) -> str | None:
        """Why the transport itself failed, and what to do; None if it did not, and the program ended by itself.

        Args:
            code: exit code of what `run` started here.
            said: what came on stderr.
            begun: whether the program there had said something.
        """


@dataclass(frozen=True)
class Local:
    """This machine, through the same line as another."""

    name: str
    python: str | None
    pythons = ()
    install = ssh.INSTALL
    elsewhere = ssh.ELSEWHERE
    silent = "see that nothing stopped what runs there"

    def run(self, script: str, words: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words)

    def explain(self, code: int, said: str, *, begun: bool) -> str | None:
        return None


def read_local(parts: SplitResult, python: str | None) -> Local:
    """See `SCHEMES`."""
    if parts.netloc:
        raise ValueError
    return Local("local://", python)


SCHEMES: Mapping[str, Callable[[SplitResult, str | None], Transport]] = {
    "ssh": ssh.read,
    "adb": adb.read,
    "local": read_local,
}
"""Scheme -> what reads an address without password, folder and query, and the Python that it names.

A ValueError says what is no part of one; its words may be shown.
"""


def parse(text: str) -> Transport:
    """The transport of an address.

    Raises:
        InputError: it is no address of a device.
    """
    shown = address.plain(text) if "://" in text else re.sub(r".*@", "***@", text, flags=re.DOTALL)
    try:
        parts = urlsplit(text)
    except ValueError:
        raise InputError(f"the device is {shown!r}; {EXPECTED}") from None  # its cause may show a part of a password
    options = parse_qs(parts.query, keep_blank_values=True)
    python = options.pop("python", [None])[-1]
    if parts.password is not None or ":" in unquote(parts.username or ""):
        raise InputError(f"the device {shown!r} has a password; edgetube takes none: use a key and ssh's agent")
    odd = options or parts.fragment or parts.path.strip("/") or (python is not None and not python.startswith("/"))
    if odd or parts.scheme not in SCHEMES:
        raise InputError(f"the device is {shown!r}; {EXPECTED}")
    try:
        return SCHEMES[parts.scheme](parts, python)
    except ValueError as error:
        reason = f": {error}" if str(error) else ""
        raise InputError(f"the device is {shown!r}{reason}; {EXPECTED}") from None
