"""Machines reached by OpenSSH's own client, with its configuration, keys, agent and known hosts."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from dataclasses import dataclass

from edgetube.errors import DeviceError, InputError

OPTIONS = (
    "-T", "-x", "-a",
    "-o", "BatchMode=yes",
    "-o", "ConnectTimeout=15",
    "-o", "ServerAliveInterval=5",
    "-o", "ServerAliveCountMax=4",
)  # fmt: skip
"""No terminal, no questions, and a line that is silent for 20 seconds counts as cut."""

COMMAND = "EDGETUBE_SSH"
"""Environment variable with another command than `ssh`, and its options."""

FAILED = 255
"""Exit code of ssh when it failed itself."""

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

    @property
    def command(self) -> list[str]:
        """ssh to this machine, without a remote command.

        Raises:
            InputError: the environment variable cannot be read as a command.
        """
        try:
            own = shlex.split(os.environ.get(COMMAND) or "ssh")
        except ValueError as error:
            raise InputError(f"{COMMAND} cannot be read ({error}); expected a command, like: ssh -F file") from error
        user = ["-l", self.user] if self.user else []
        port = ["-p", str(self.port)] if self.port else []
        return [*own, *OPTIONS, *user, *port, "--", self.host]

    def run(self, script: str, words: int) -> subprocess.Popen[bytes]:
        command = self.command
        try:
            return subprocess.Popen(
                [*command, f"exec sh -c {shlex.quote(script)}"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words,
            )  # fmt: skip
        except OSError as error:
            raise DeviceError(
                f"{self.name}: {command[0]} cannot be started ({error.strerror}); install OpenSSH's client, or name "
                f"another command in {COMMAND}"
            ) from error

    def explain(self, code: int, said: str) -> str | None:
        if code < 0:
            return f"ssh was ended here by signal {-code}: run the command again"
        if code != FAILED:
            return None
        lines = said.strip().splitlines() or ["ssh said nothing"]
        known = ((advice, line) for line in reversed(lines) for pattern, advice in REASONS if re.search(pattern, line))
        advice, last = next(known, ("try by hand: {by_hand}", lines[-1]))
        port, user = ["-p", str(self.port)] if self.port else [], f"{self.user}@" if self.user else ""
        known_as = f"[{self.host}]:{self.port}" if self.port else self.host
        by_hand = " ".join([os.environ.get(COMMAND) or "ssh", *port, f"{user}{self.host}"])
        return f"{advice.format(by_hand=f'`{by_hand}`', host=known_as)} (ssh says: {last})"
