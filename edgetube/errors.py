"""Everything that edgetube raises on purpose.

::

    EdgetubeError            exit code
    ├─ InputError            2   the caller's data: wrong shape, broken video, unknown label
    ├─ BundleError           2   a bundle that is incomplete, tampered with, foreign or too new
    ├─ SpecError             2   a model that cannot exist or cannot be lowered
    ├─ CheckpointError       2   weights that do not fit the model they claim to be
    ├─ MissingPackageError   2   an optional package is absent; says the pip line
    ├─ BackendError          2   a vendor runtime refused, with what it said
    └─ ParityError           1   an artifact does not answer like the reference

A message says what is wrong, with which value, and what to do: `given`, `expected`, `remedy`.
"""

from __future__ import annotations


class EdgetubeError(Exception):
    """Base of all errors raised on purpose; the CLI prints it as one line and exits with `exit_code`."""

    exit_code = 2


class InputError(EdgetubeError):
    """Frames, a video, an image, a label or an option that cannot be used as given."""


class BundleError(EdgetubeError):
    """A bundle that cannot be trusted or understood."""


class SpecError(EdgetubeError, ValueError):
    """A model description that is impossible, or that static lowering cannot express."""


class CheckpointError(EdgetubeError):
    """Weights that are missing, superfluous, of the wrong shape, or of an unknown layout."""


class MissingPackageError(EdgetubeError, ImportError):
    """An optional package is not installed."""


class BackendError(EdgetubeError):
    """A vendor runtime failed; the message carries its last relevant words."""


class ParityError(EdgetubeError):
    """An artifact does not answer like the reference within the stated tolerance."""

    exit_code = 1
