"""JPEG in and out, in memory."""

from __future__ import annotations

from fractions import Fraction

from edgetube import pictures
from edgetube.decoding import rgb
from edgetube.errors import InputError
from edgetube.resize import Frames

QUALITY = 4
"""FFmpeg's scale of MJPEG, from 2, the best, to 31."""


def encode(frame: Frames, width: int) -> bytes:
    """A JPEG of a frame (H, W, 3) uint8 RGB; a wider one is made `width` pixels wide."""
    import av

    height, own = frame.shape[:2]
    size = (own, height) if own <= width else (width, max(1, round(height * width / own)))
    picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(size[0], size[1], "yuvj420p")
    coder = av.CodecContext.create("mjpeg", "w")
    assert isinstance(coder, av.VideoCodecContext)
    coder.width, coder.height = size
    coder.pix_fmt = "yuvj420p"
    coder.time_base = picture.time_base = Fraction(1)
    coder.options = {"flags": "+qscale", "global_quality": str(QUALITY * 118)}  # FF_QP2LAMBDA
    picture.pts = 0
    return b"".join(bytes(packet) for packet in [*coder.encode(picture), *coder.encode(None)])


def decode(data: bytes, max_pixels: int) -> Frames:
    """The frame (H, W, 3) uint8 RGB of a JPEG.

    Raises:
        InputError: it is none, is damaged or cut off, or has more than `max_pixels`.
    """
    import av

    if data[:2] != b"\xff\xd8":
        raise InputError(f"the frame is no JPEG: it begins with {data[:2].hex() or 'nothing'}; expected ffd8")
    if not pictures.whole_jpeg(data):
        raise InputError("the frame is cut off: its JPEG has no end marker; send each frame whole, in one message")
    decoder = av.CodecContext.create("mjpeg", "r")
    assert isinstance(decoder, av.VideoCodecContext)
    decoder.options = {"err_detect": "explode", "max_pixels": str(2 * max_pixels)}  # it counts padding, too
    decoder.thread_count = 1
    large = f"it has more than {max_pixels} pixels, the most that is taken: send smaller ones"
    try:
        found = [*decoder.decode(av.Packet(data)), *decoder.decode(None)]
    except (av.FFmpegError, ValueError) as error:
        raise InputError(f"the frame cannot be decoded: its JPEG is damaged, or {large}") from error
    if len(found) != 1:
        raise InputError(f"the frame is {len(found)} pictures; expected one JPEG")
    if found[0].width * found[0].height > max_pixels:
        raise InputError(f"the frame cannot be used: {large}")
    return rgb(found[0])
