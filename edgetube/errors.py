"""The exceptions of edgetube.

::

    EdgetubeError            exit code
    ├─ InputError            2   the caller's data: wrong shape, broken video, unknown label
    ├─ BundleError           2   a bundle that is incomplete, tampered with, foreign or too new
    ├─ FormatError           2   a file that does not follow its format; says where in it
    ├─ SpecError             2   a model that cannot exist or cannot be lowered
    ├─ CheckpointError       2   weights that do not fit the model they claim to be
    ├─ MissingPackageError   2   an optional package is absent; says the pip line
    ├─ BackendError          2   a vendor runtime refused, with what it said
    ├─ DeviceError           2   another machine cannot be reached or used
    └─ ParityError           1   an artifact does not answer like the reference

A message says what is wrong, with which value, and what to do: `given`, `expected`, `remedy`.

Python's `warnings` carry an `InputWarning` where data is used although something about it is wrong, and a
`DeviceWarning` where another machine is used although something is missing there.
"""

from __future__ import annotations

import re
import unicodedata


class EdgetubeError(Exception):
    """Base class of edgetube's errors; the CLI prints it as one line and exits with `exit_code`."""

    exit_code = 2

    def __str__(self) -> str:
        """The message as one line, with control characters escaped."""
        return printable(_BREAK.sub(" ", super().__str__()))


_BREAK = re.compile(r"\s*[\r\n]\s*")


class InputError(EdgetubeError):
    """Frames, a video, an image, a label or an option that cannot be used as given."""


class InputWarning(UserWarning):
    """Data that was used although something about it is wrong: lost packets, a clock that leaps."""


class BundleError(EdgetubeError):
    """A bundle that cannot be trusted or understood."""


class DeviceWarning(UserWarning):
    """Another machine that is used although something is missing there: the packages of a runtime."""


WARNINGS = (InputWarning, DeviceWarning)
"""What the CLI prints as one line."""


class FormatError(EdgetubeError, ValueError):
    """A file, or a value in it, that does not follow its format."""


class SpecError(EdgetubeError, ValueError):
    """A model description that is impossible, or that static lowering cannot express."""


class CheckpointError(EdgetubeError):
    """Weights that are missing, superfluous, of the wrong shape, or of an unknown layout."""


class MissingPackageError(EdgetubeError, ImportError):
    """An optional package is not installed."""


class BackendError(EdgetubeError):
    """A vendor runtime failed; the message carries its last relevant words."""


class DeviceError(EdgetubeError):
    """Another machine that cannot be reached, or cannot run edgetube; the message starts with its address."""


class ParityError(EdgetubeError):
    """An artifact does not answer like the reference within the stated tolerance."""

    exit_code = 1


def of_system(error: Exception) -> str:
    """The message, in one line, of an OSError, MemoryError, RecursionError or EOFError."""
    if isinstance(error, MemoryError):
        said = f" ({error})" if str(error) else ""
        return f"this machine has not enough memory for it{said}; close other programs, or give less at a time"
    if isinstance(error, RecursionError):
        return f"something is nested too deeply to be read ({error})"
    if isinstance(error, OSError) and error.strerror:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return f"{' -> '.join(names)}: {error.strerror}" if names else f"the system refuses: {error.strerror}"
    return str(error) or type(error).__name__


_ESCAPED = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
"""Unicode categories that a terminal interprets instead of showing: controls, directions, surrogates, line ends."""

_JOINERS = frozenset("\u200c\u200d")
"""Format characters that are part of words and emoji."""


def printable(text: object) -> str:
    """`str(text)` as one line that is safe on a terminal: characters that a terminal interprets are escaped.

    For untrusted text: file names, manifests, checkpoints, vendors' errors. A byte of a file name that is not valid
    UTF-8 (a surrogate escape) becomes `\\xNN`.
    """
    plain = str(text)
    return plain if plain.isprintable() else "".join(map(_escape, plain))


def _escape(character: str) -> str:
    if unicodedata.category(character) not in _ESCAPED or character in _JOINERS:
        return character
    if 0xDC80 <= (code := ord(character)) <= 0xDCFF:  # os.fsdecode's way to carry a byte
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
