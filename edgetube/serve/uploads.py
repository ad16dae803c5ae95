"""A file that a client sends: taken in pieces, checked, classified, and deleted."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import anyio
import anyio.to_thread
import numpy as np

from edgetube import address
from edgetube.address import Untrusted
from edgetube.decoding import opened
from edgetube.errors import BackendError, InputError
from edgetube.runtime import Runtime
from edgetube.serve.limits import Limits
from edgetube.spec import Prediction

NAME = "the file"

FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,ivf,flv,asf,ogg,mxf,yuv4mpegpipe,gif,"
    "apng,jpeg_pipe,png_pipe,webp_pipe,bmp_pipe,tiff_pipe,ppm_pipe,pgm_pipe,qoi_pipe"
)
"""FFmpeg's names of what is read of strangers: formats that name no other files or servers, as playlists do."""


class TooLarge(InputError):
    """A file of more bytes than are taken."""


class TooSlow(InputError):
    """A file that did not come in time."""


class Ending(InputError):
    """The server ends before a file is classified."""


@contextmanager
def folder() -> Iterator[Path]:
    """A folder that only this user can read, deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="edgetube-serve-") as made:
        yield Path(made)


async def receive(body: AsyncIterator[bytes], place: Path, limits: Limits) -> None:
    """Write what comes to a new file.

    Args:
        body: its pieces; their lengths are counted, whatever a header said.

    Raises:
        TooLarge: more came than `limits.upload_bytes`.
        TooSlow: not all came within `limits.upload_seconds`.
    """
    with place.open("xb") as file:
        with anyio.move_on_after(limits.upload_seconds):
            await _write(body, file, limits.upload_bytes)
            return
    raise TooSlow(f"{NAME} did not come within {limits.upload_seconds:g} s; send a shorter part of it")


async def _write(body: AsyncIterator[bytes], file: BinaryIO, most: int) -> None:
    count = 0
    async for piece in body:
        count += len(piece)
        if count > most:
            raise TooLarge(f"{NAME} has more than {most} bytes, the most that is taken; send a shorter part of it")
        await anyio.to_thread.run_sync(file.write, piece)


def predict(runtime: Runtime, place: Path, limits: Limits, top_k: int, stopping: threading.Event) -> Prediction:
    """The prediction of a stranger's file.

    Args:
        stopping: gives it up when it is set.

    Raises:
        InputError: it cannot be used, or is larger than the limits; names no path.
        Ending: `stopping` was set.
        BackendError: the model failed, or its answer is not finite.
    """
    until = time.monotonic() + limits.decode_seconds

    def check() -> None:
        if stopping.is_set():
            raise Ending("the server ends; send it again later")
        if time.monotonic() > until:
            raise InputError(f"{NAME} was not decoded within {limits.decode_seconds:g} s; send a shorter part of it")

    file = address.of_file(place, Untrusted(NAME, FORMATS, limits.frame_pixels, check))
    with opened(file) as reader:
        width, height = reader.size
        frames = 1 if reader.is_still else reader.packets()
        if (pixels := frames * width * height) > limits.decoded_pixels:
            raise InputError(
                f"{NAME} has {frames} frames of {width}x{height}, {pixels / 1e9:.1f} billion pixels; at most "
                f"{limits.decoded_pixels / 1e9:.1f} are decoded here: send a shorter part of it, or smaller frames"
            )
    found = runtime.predict(file, top_k=top_k)
    if not np.isfinite(found.logits).all():
        raise BackendError(f"the model's answer to {NAME} is not finite")
    return found
