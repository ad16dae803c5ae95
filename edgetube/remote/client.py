"""A program of this machine by which others are reached; the user may name another command for it."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from edgetube.errors import DeviceError, InputError


@dataclass(frozen=True)
class Client:
    """A program such as ssh.

    Attributes:
        program: its name.
        variable: environment variable with another command, and its options.
        example: of such a command, for messages.
        install: where the program comes from, for messages.
    """

    program: str
    variable: str
    example: str
    install: str

    @property
    def shown(self) -> str:
        """The command as the user writes it."""
        return os.environ.get(self.variable) or self.program

    @property
    def command(self) -> list[str]:
        """The command as words.

        Raises:
            InputError: the environment variable cannot be read as a command.
        """
        try:
            words = shlex.split(self.shown)
            if not any(words[:1]):
                raise ValueError("no program is named")
        except ValueError as error:
            raise InputError(
                f"{self.variable} cannot be read ({error}); expected a command, like: {self.example}"
            ) from error
        return words

    def start(self, name: str, command: Sequence[str], words: int) -> subprocess.Popen[bytes]:
        """Start it with its stdin and stdout as pipes.

        Args:
            name: the address of the device, for messages.
            words: file descriptor that gets what it says on stderr.

        Raises:
            DeviceError: it is not here.
        """
        try:
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words)
        except OSError as error:
            raise DeviceError(
                f"{name}: {command[0]} cannot be started ({error.strerror}); install {self.install}, or name another "
                f"command in {self.variable}"
            ) from error

    def ended(self, number: int) -> str:
        """What is said when a signal ended it here."""
        return f"{self.program} was ended here by signal {number}: run the command again"
