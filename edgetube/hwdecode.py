"""Decoding on a device of its own: which decoders FFmpeg has here, and why not the others."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from edgetube.errors import InputError

if TYPE_CHECKING:
    from av.codec.hwaccel import HWAccel

Decoder: TypeAlias = Literal["auto", "cpu", "nvdec", "vaapi"]
"""auto: of a live source the first of nvdec and vaapi that is here, else the CPU; files are decoded by the CPU."""


class _Device(NamedTuple):
    kind: str  # FFmpeg's name
    node: str  # of Linux, below /dev
    what: str


DEVICES = {
    "nvdec": _Device("cuda", "nvidia[0-9]*", "NVIDIA GPU"),
    "vaapi": _Device("vaapi", "dri/renderD*", "graphics device"),
}


def check(decoder: object) -> None:
    """Check a caller's choice.

    Raises:
        InputError: there is no such decoder.
    """
    known = ("auto", "cpu", *DEVICES)
    if decoder not in known:
        raise InputError(f"decoder is {decoder!r:.60}; expected one of {', '.join(known)}")


def choose(decoder: Decoder, live: bool) -> tuple[str, HWAccel | None, tuple[str, ...]]:
    """The decoder to open a source with.

    Returns:
        (name, PyAV's settings of it, why each decoder that comes first is not used); ("cpu", None, ...) for the CPU.
    """
    wanted = tuple(DEVICES) if decoder == "auto" and live else (decoder,) if decoder in DEVICES else ()
    reasons: list[str] = []
    for name in wanted:
        why = lacks(name)
        if why is None:
            from av.codec.hwaccel import HWAccel

            return name, HWAccel(DEVICES[name].kind, allow_software_fallback=True), tuple(reasons)
        reasons.append(f"{name}: {why}")
    return "cpu", None, tuple(reasons)


@cache
def lacks(name: str) -> str | None:
    """Why a decoder cannot be used on this machine; None if it can."""
    import av
    from av.codec.hwaccel import HWAccel, hwdevices_available

    device = DEVICES[name]
    if device.kind not in hwdevices_available():
        return f"the FFmpeg of this PyAV is built without {device.kind}"
    if sys.platform == "linux" and not any(Path("/dev").glob(device.node)) and not Path("/dev/dxg").exists():
        return f"there is no {device.what} here (/dev/{device.node})"
    try:
        HWAccel(device.kind).create(av.Codec("h264", "r"))
    except (av.FFmpegError, NotImplementedError, RuntimeError) as error:
        return f"the {device.what} cannot be opened: {error}"
    return None
