"""Machines reached by OpenSSH's own client, with its configuration, keys, agent and known hosts."""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote

from edgetube.remote.client import Client

OPTIONS = (
    "-T", "-x", "-a",
    "-o", "BatchMode=yes",
    "-o", "ConnectTimeout=15",
    "-o", "ServerAliveInterval=5",
    "-o", "ServerAliveCountMax=4",
)  # fmt: skip
"""No terminal, no questions, and a line that is silent for 20 seconds counts as cut."""

CLIENT = Client("ssh", "EDGETUBE_SSH", "ssh -F file", "OpenSSH's client")

FAILED = 255
"""Exit code of ssh when it failed itself."""

INSTALL = "install it there, on Debian: apt-get install python3"
"""How a Python comes to a machine with a login."""

ELSEWHERE = "set EDGETUBE_CACHE there to a folder on another disk"
"""What helps if edgetube's folder on such a machine cannot be written, or its disk is full."""

REASONS = (
    (
        r"Host key verification failed|REMOTE HOST IDENTIFICATION HAS CHANGED",
        "its host key is not the one that is known here: connect once with {by_hand}, compare the fingerprint with "
        "the device's own, and accept it; if you know why it changed, remove the old one first: ssh-keygen -R {host}",
    ),
    (
        r"Unable to negotiate|no matching .* found",
        "its ssh server is too old or too new for the ssh here: update one, or allow what it offers in your ssh config",
    ),
    (
        r"Permission denied|Too many authentication failures|No more authentication methods",
        "it refuses the login: {by_hand} has to work without a password; copy your key there with ssh-copy-id, or "
        "start ssh-agent",
    ),
    (r"Could not resolve hostname", "no machine of that name is known here: check the address, or your ssh config"),
    (
        r"Connection refused|No route to host|Network is unreachable|[Cc]onnection timed out|Operation timed out",
        "it cannot be reached: is it on, in this network, and does it run an ssh server at that port?",
    ),
    (
        r"[Tt]imeout, server .* not responding|Broken pipe|closed by remote host|Connection reset|Connection closed",
        "the line was cut: run the command again, what was already sent is kept there",
    ),
)
"""What ssh says -> what is wrong, and what to do."""


@dataclass(frozen=True)
class Ssh:
    """A machine at the other end of `ssh`."""

    name: str
    host: str
    user: str | None = None
    port: int | None = None
    python: str | None = None
    pythons = ()
    install = INSTALL
    elsewhere = ELSEWHERE
    silent = "see that it is on and in this network"

    @property
    def command(self) -> list[str]:
        """ssh to this machine, without a remote command."""
        user = ["-l", self.user] if self.user else []
        port = ["-p", str(self.port)] if self.port else []
        return [*CLIENT.command, *OPTIONS, *user, *port, "--", self.host]

    def run(self, script: str, words: int) -> subprocess.Popen[bytes]:
        return CLIENT.start(self.name, [*self.command, f"exec sh -c {shlex.quote(script)}"], words)

    def explain(self, code: int, said: str, *, begun: bool) -> str | None:
        if code < 0:
            return CLIENT.ended(-code)
        if code != FAILED:
            return None
        lines = said.strip().splitlines() or ["ssh said nothing"]
        known = ((advice, line) for line in reversed(lines) for pattern, advice in REASONS if re.search(pattern, line))
        advice, last = next(known, ("try by hand: {by_hand}", lines[-1]))
        port, user = ["-p", str(self.port)] if self.port else [], f"{self.user}@" if self.user else ""
        known_as = f"[{self.host}]:{self.port}" if self.port else self.host
        by_hand = " ".join([CLIENT.shown, *port, f"{user}{self.host}"])
        return f"{advice.format(by_hand=f'`{by_hand}`', host=known_as)} (ssh says: {last})"


def read(parts: SplitResult, python: str | None) -> Ssh:
    """See `edgetube.remote.transport.SCHEMES`."""
    place = parts.netloc.rpartition("@")[2]
    # `urlsplit` lowers the case of a host, and names in a configuration of ssh have one.
    host = place[1:].partition("]")[0] if place.startswith("[") else place.partition(":")[0]
    try:
        port = parts.port
    except ValueError:
        raise ValueError from None  # its words are not for users
    if not host:
        raise ValueError
    user = unquote(parts.username) if parts.username else None
    for word in (host, user):
        if word is not None and (word.startswith("-") or not word.isprintable() or " " in word):
            raise ValueError(f"{word!r} is no host or user")
    return Ssh(f"ssh://{f'{user}@' if user else ''}{place}", host, user, port, python)
