"""Still pictures and animations: whether a file goes on to its end, and what this FFmpeg cannot read."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np

from edgetube.errors import InputError
from edgetube.targets import need


def _whole_bmp(bmp: bytes) -> bool:
    """Whether a BMP has all its rows. FFmpeg takes rows without their padding for granted when bytes are missing."""
    if len(bmp) < 54 or bmp[30:34] not in (b"\0\0\0\0", b"\3\0\0\0"):  # compressed ones are refused when cut
        return True
    offset, width, height = (int.from_bytes(bmp[at : at + 4], "little", signed=True) for at in (10, 18, 22))
    bits = abs(width) * int.from_bytes(bmp[28:30], "little")
    found = len(bmp) - offset
    return found >= (bits + 31) // 32 * 4 * abs(height) or found == (bits + 7) // 8 * abs(height)


def whole_jpeg(jpeg: bytes) -> bool:
    """Whether a JPEG goes on to its end marker: segments with a length each, then data in which 0xff is escaped."""
    at = 2
    while 0 <= (at := jpeg.find(b"\xff", at)) < len(jpeg) - 1:
        marker = jpeg[at + 1]
        if marker == 0xD9:
            return True
        if marker == 0xFF:  # padding
            at += 1
        elif marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # an escaped 0xff, or a marker without a segment
            at += 2
        else:
            at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return False


def _whole_gif(gif: bytes) -> bool:
    """Whether a GIF does not end within a block."""

    def table(flags: int) -> int:
        return 3 << (flags & 7) + 1 if flags & 0x80 else 0

    if len(gif) < 13:
        return False
    at = 13 + table(gif[10])
    while at < len(gif) and gif[at] in b"\x21\x2c":
        if gif[at] == 0x2C:
            if at + 10 > len(gif):
                return False
            at += 9 + table(gif[at + 9])
        at += 2
        while at < len(gif) and gif[at]:  # blocks of data up to an empty one
            at += 1 + gif[at]
        at += 1
    return at <= len(gif)


def _whole_webp(webp: bytes) -> bool:
    """Whether a WebP is as long as it says."""
    return int.from_bytes(webp[4:8], "little") + 8 <= len(webp)


WHOLE: dict[str, Callable[[bytes], bool]] = {
    "mjpeg": whole_jpeg, "bmp": _whole_bmp, "gif": _whole_gif, "webp_anim": _whole_webp,
    "apng": lambda data: data[:4] == b"RIFF" or b"IEND" in data,  # a WebP was checked when it became an APNG
}  # fmt: skip
"""By codec, or by format of an animation: whether a file goes on to its end, where the decoder does not ask."""


def is_animated_webp(head: bytes) -> bool:
    """Whether a file is an animated WebP that this FFmpeg (before 9) cannot read."""
    import av

    if len(head) < 21 or head[:4] + head[8:16] != b"RIFFWEBPVP8X" or not head[20] & 2:
        return False
    return "webp_anim" not in av.formats_available


def as_apng(path: Path) -> io.BytesIO:
    """An animated WebP as APNG, the same pixels at the same times.

    Raises:
        InputError: damaged or cut off.
        MissingPackageError: Pillow is not installed.
    """
    need("PIL", "plot")
    import av
    from PIL import Image, ImageSequence

    found, shown = io.BytesIO(), 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image, av.open(found, "w", format="apng") as container:
                stream = container.add_stream("apng", rate=1000)
                stream.width, stream.height = image.size
                stream.pix_fmt = "rgb24"
                for picture in ImageSequence.Iterator(image):
                    frame = av.VideoFrame.from_ndarray(np.asarray(picture.convert("RGB")))
                    frame.pts, frame.time_base = shown, Fraction(1, 1000)
                    shown += picture.info["duration"]
                    container.mux(stream.encode(frame))
                container.mux(stream.encode())
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be used: {error}") from error
    except (OSError, EOFError, ValueError, SyntaxError) as error:
        raise InputError(f"{path} is cut off or damaged: copy or record it again") from error
    found.seek(0)
    return found
