"""Frames in and out: video files, images, cameras, arrays."""

from __future__ import annotations

import glob
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgetube import address, listing, preprocess, resize
from edgetube.address import Address, Source, parse
from edgetube.contract import InputContract
from edgetube.decoding import Reader, opened, rgb, vendor_errors
from edgetube.errors import InputError
from edgetube.files import replacing
from edgetube.listing import IMAGES, VIDEOS
from edgetube.resize import Frames
from edgetube.views import SINGLE, View, Views

if TYPE_CHECKING:  # PyAV takes half as long to import as numpy; `import edgetube` does not wait for it
    import av

__all__ = ["IMAGES", "VIDEOS", "Clip", "Frames", "Source", "frames", "load", "load_views", "sources", "write"]


@dataclass(frozen=True)
class Clip:
    """One clip that a model can take, with what is known about it.

    Attributes:
        name: where it comes from, unique in its set.
        frames: (T, H, W, 3) uint8 RGB, already through `edgetube.preprocess`.
        label: the true class, or None.
        start, end: seconds of the source that it covers, when the source has a clock.
    """

    name: str
    frames: Frames
    label: str | None = None
    start: float | None = None
    end: float | None = None


# --------------------------------------------------------------------------------------------------------------- public


def load(path: str | Path | Address, contract: InputContract, start: float | None = None) -> Clip:
    """The clip of a video file, or of an image file where the contract takes images.

    Frames are found by their timestamps and resized as they are decoded, so memory does not grow with the video, and
    only the part around the clip is decoded.

    Args:
        start: second at which the clip begins; None takes the middle of the video.

    Returns:
        A clip whose `start` is the timestamp of its first frame and whose `end` is when its last frame leaves.

    Raises:
        InputError: no such file, no video in it, damaged or cut off within the clip, a still image for a model that
            takes several frames, or a `start` outside the video, or for segments of the whole video.
    """
    return load_views(path, contract, SINGLE, start)[0]


def load_views(
    path: str | Path | Address, contract: InputContract, views: Views, start: float | None = None
) -> tuple[Clip, ...]:
    """The views of a file, the crops of each temporal view together; the file is decoded once for each temporal view.

    Raises:
        InputError: as `load` raises, or several temporal views of a still image, or with a `start`.
    """
    found = path if isinstance(path, Address) else address.of_file(Path(path))
    return tuple(clip for crops in views for clip in _load(found, contract, start, crops))


def _load(file: Address, contract: InputContract, start: float | None, views: Sequence[View]) -> list[Clip]:
    """The clips of one temporal view, one for each of its crops."""
    out = np.empty((len(views), *contract.shape), np.uint8)
    path = file.name
    with opened(file) as reader:
        is_still = reader.is_still  # of an animation known by reading through it, so asked once
        if is_still:
            if not contract.is_image:
                remedy = "give a video, or export the model for images (--input image)"
                raise InputError(f"{path} is a still image; the model needs {contract.frames} frames: {remedy}")
            if start is not None:
                raise InputError(f"start is {start} s, but {path} is a still image and has no clock")
            preprocess.check_still(path, views[0])
            times = _fill(out, reader.frames(), contract, views)
        elif contract.sampling == "segments":
            times = _fill_segments(out, reader, contract, start, views)
        else:
            begin = preprocess.window(contract, reader.duration(), reader.rate, start, views[0])
            times = _fill(out, preprocess.pick(reader.frames(begin), contract, begin), contract, views)
        if not times:
            raise InputError(f"{path} holds no frame that can be decoded")
        start, end = (None, None) if is_still else (times[0], times[-1] + 1 / reader.rate)
        return [Clip(path, frames, start=start, end=end) for frames in out]


def _fill(
    out: Frames, chosen: Iterable[tuple[float, av.VideoFrame]], contract: InputContract, views: Sequence[View]
) -> list[float]:
    """Resize chosen frames into clips, the same frame once; returns their times. Reads no more than fit.

    Args:
        out: (V, T, H, W, 3), a clip for the crop of each of the views.
    """
    times: list[float] = []
    previous = None
    for slots, (seconds, frame) in zip(out.swapaxes(0, 1), chosen, strict=False):
        if frame is not previous:
            whole = rgb(frame)[None]
            crops = [resize.spatial(whole, contract, view.side)[0] for view in views]
        previous, slots[...] = frame, crops
        times.append(seconds)
    return times


def _fill_segments(
    out: Frames, reader: Reader, contract: InputContract, start: float | None, views: Sequence[View]
) -> list[float]:
    """The frames of equal parts of a whole file, see `_fill`.

    How many frames there are is known when all are decoded. So the number of packets is taken for it, and where that
    was wrong (packets that show nothing, or cannot be decoded) the file is decoded once more.
    """
    count = reader.packets()
    for source in (reader.frames(), reader.frames_again()):
        wanted = preprocess.segments(count, contract, start, views[0])
        decoded = _Counted(source)
        times = _fill(out, _numbered(decoded, wanted), contract, views)
        deque(decoded, maxlen=0)  # to the end, where it shows that the file is whole
        if decoded.count == count:
            break
        count = decoded.count
    return times


class _Counted:
    """An iterator that counts what it gives."""

    def __init__(self, items: Iterator[tuple[float, av.VideoFrame]]) -> None:
        self.items, self.count = items, 0

    def __iter__(self) -> Iterator[tuple[float, av.VideoFrame]]:
        for item in self.items:
            self.count += 1
            yield item


def _numbered(
    decoded: Iterable[tuple[float, av.VideoFrame]], wanted: Iterable[int]
) -> Iterator[tuple[float, av.VideoFrame]]:
    """The frames with the numbers `wanted`, which never descend; fewer if there are fewer."""
    following = enumerate(decoded)
    number, item = -1, None
    for index in wanted:
        while number < index:
            if (found := next(following, None)) is None:
                return
            number, item = found
        if item is not None:
            yield item


def frames(source: Source) -> Iterator[tuple[float, Frames]]:
    """The frames of a file, a camera or a URL, as they come.

    Args:
        source: a path, a camera's index as a number or digits, or a URL (rtsp://, http://, ...).

    Yields:
        (seconds, frame (H, W, 3) uint8 RGB, upright); files count from their beginning, live sources from their
        first frame. A frame that was lost on the way is skipped in a live source and an error in a file.

    Raises:
        InputError: the source cannot be opened or decoded, ends before its time, or stays silent for
            `edgetube.decoding.TIMEOUT` s.
    """
    with opened(parse(source)) as reader:
        for seconds, frame in reader.film():
            yield seconds, rgb(frame)


def rate(source: Source) -> float:
    """Frames per second of a source, as its header says or FFmpeg guesses.

    Raises:
        InputError: the source cannot be opened.
    """
    with opened(parse(source)) as reader:
        return reader.rate


def sources(source: Source) -> list[Source]:
    """The sources of a command line argument: a file, the files of a folder or a glob, a camera, a URL; see `search`.

    Raises:
        InputError: nothing is found.
    """
    return search(source)[0]


def search(source: Source, contract: InputContract | None = None) -> tuple[list[Source], str]:
    """The sources of an argument, and one line about skipped files of a folder, or "".

    A folder is searched, in sorted order, for the suffixes `VIDEOS` and `IMAGES`; links are followed, hidden files are
    skipped.

    Args:
        contract: of the model; still images are skipped if it takes several frames.

    Raises:
        InputError: nothing is found.
    """
    parsed = parse(source)
    if not isinstance(parsed, Path) or parsed.is_file():
        return [parsed], ""
    if parsed.is_dir():
        wanted = VIDEOS if contract and not contract.is_image else VIDEOS | IMAGES
        found = listing.walk(parsed, wanted)
        return list(found.required(parsed, wanted)), found.note(parsed)
    if parsed.exists():
        raise InputError(f"{parsed} is neither a file nor a folder: a pipe or a device cannot be read")
    # `Path.glob` has no patterns that are absolute.
    matches = sorted(glob.glob(str(parsed), recursive=True))  # noqa: PTH207
    files = [p for p in map(Path, matches) if p.is_file()]
    if not files:
        raise InputError(f"there is no file, folder or match for {parsed}")
    return list(files), ""


def check_output(path: str | Path, source: Source | None = None) -> Path:
    """Check that a video can be written to a path; called before the work starts, and by `write`.

    Raises:
        InputError: no .mp4, no folder, a folder by that name, or the file of `source` itself.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise InputError(f"cannot write {path}: expected a name that ends in .mp4")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder")
    if isinstance(source, Path) and path.exists() and path.samefile(source):
        raise InputError(f"cannot write {path}: it is the video that is read; give another name")
    return path


def write(path: str | Path, frames: Iterable[Frames | tuple[float, Frames]], fps: float) -> Path:
    """Encode frames (H, W, 3) uint8 RGB as mp4: H.264 where PyAV has it, else MPEG-4 part 2.

    The file is written under a temporary name and renamed when complete. Odd sides repeat their last row or column,
    because 4:2:0 chroma needs even ones.

    Args:
        frames: frames, of which number i is shown at i / fps; or (seconds, frame), ascending, as `frames` gives them.
        fps: frames per second; of frames with times the nominal rate.

    Raises:
        InputError: no frames, frames of different or wrong shapes, a rate that is not positive, or a path that
            cannot be written.
    """
    path = check_output(path)
    if not 0 < fps < 1000:
        raise InputError(f"fps is {fps}; expected a rate in (0, 1000)")
    with replacing(path) as part, vendor_errors(path):
        _encode(part, iter(frames), Fraction(fps).limit_denominator(1001))
    return path


# --------------------------------------------------------------------------------------------------------------- encode


TICKS = 60_000
"""Most ticks a second of a file that is written: MPEG-4 part 2 has 16 bits for them."""


def _encode(path: Path, frames: Iterator[Frames | tuple[float, Frames]], rate: Fraction) -> None:
    import av

    timed = (item if isinstance(item, tuple) else (float(i / rate), item) for i, item in enumerate(frames))
    first = next(timed, None)
    if first is None:
        raise InputError("there are no frames to write")
    shape = np.shape(first[1])
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    tick = Fraction(1, rate.numerator * max(1, TICKS // rate.numerator))  # a whole number of them is one frame
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = (side + side % 2 for side in shape[:2])
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", tick
        stamp, begin = -1, min(0.0, first[0])
        for i, (seconds, pixels) in enumerate(chain([first], timed)):
            given = np.asarray(pixels)
            if given.shape != shape or given.ndim != 3 or given.shape[2] != 3 or given.dtype != np.uint8:
                expected = f"{shape} as the first" if len(shape) == 3 and shape[2] == 3 else "(height, width, 3)"
                raise InputError(f"frame {i} is {given.dtype} {given.shape}; expected uint8 {expected}")
            even = np.pad(given, ((0, shape[0] % 2), (0, shape[1] % 2), (0, 0)), mode="edge")
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
            shown = round((preprocess.seconds(seconds, f"the time of frame {i}") - begin) / tick)
            if shown <= stamp:
                raise InputError(f"frame {i} is at {seconds} s; expected a time after that of the frame before it")
            stamp = shown
            frame.pts, frame.time_base = stamp, tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
