"""What another decoder of a video costs in the logits: the same windows of one file, read by several decoders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from edgetube import decoding, hwdecode, metrics, runtimes
from edgetube.bundle import Bundle
from edgetube.contract import InputContract
from edgetube.decoding import rgb
from edgetube.errors import InputError
from edgetube.hwdecode import DEVICES, Decoder
from edgetube.live.frame import Frame
from edgetube.live.window import Hop, LiveClip, Window
from edgetube.runtime import Runtime


@dataclass(frozen=True)
class DecoderCost:
    """One bundle on what one decoder gives, compared with the first decoder.

    Attributes:
        name: of the bundle.
        pixels: mean absolute difference of the preprocessed clips, in grey levels.
        max_abs_error: of the logits.
        sqnr_db: of the logits; None where they are the same.
        agreement: share of windows with the same class.
    """

    name: str
    decoder: str
    windows: int
    pixels: float
    max_abs_error: float
    sqnr_db: float | None
    agreement: float


def parse(text: str) -> tuple[Decoder, ...]:
    """Two decoders or more, with commas between them, of which the first is compared with.

    Raises:
        InputError: fewer, one twice, one that there is not, or one that cannot be used here; says why.
    """
    names = tuple(name.strip() for name in text.split(","))
    if len(names) < 2 or len(set(names)) < len(names):
        raise InputError(f"--decoder is {text!r:.60}; expected different decoders with commas, like cpu,nvdec")
    for name in names:
        if name not in ("cpu", *DEVICES):
            raise InputError(f"--decoder is {text!r:.60}; expected some of {', '.join(('cpu', *DEVICES))}")
    here = ["cpu", *(name for name in DEVICES if hwdecode.lacks(name) is None)]
    for name in names:
        if name not in here:
            raise InputError(f"{name} cannot decode here: {hwdecode.lacks(name)}; decoders here: {', '.join(here)}")
    return cast("tuple[Decoder, ...]", names)


def compare(
    bundles: Sequence[Bundle], path: Path, decoders: Sequence[Decoder], hop: Hop | None, threads: int | None = None
) -> tuple[DecoderCost, ...]:
    """Run every window of a video through each bundle, as each decoder gives it.

    Args:
        decoders: as `parse` gives them.

    Raises:
        InputError: the video cannot be read, or a decoder does not decode it.
    """
    return tuple(cost for bundle in bundles for cost in _compare(bundle, path, decoders, hop, threads))


def _compare(
    bundle: Bundle, path: Path, decoders: Sequence[Decoder], hop: Hop | None, threads: int | None
) -> Iterator[DecoderCost]:
    with Runtime(bundle, threads=threads if runtimes.takes_threads(bundle.backend) else None) as rt:
        logits: list[list[np.ndarray]] = [[] for _ in decoders]
        pixels = np.zeros(len(decoders))
        for clips in zip(*(_clips(path, decoder, rt.contract, hop) for decoder in decoders), strict=True):
            first = clips[0].frames.astype(np.int16)
            for i, clip in enumerate(clips):
                pixels[i] += np.abs(clip.frames - first).mean()
                logits[i].append(rt(clip.frames[None])[0])
    reference, *others = (np.stack(rows) for rows in logits)
    for i, (decoder, found) in enumerate(zip(decoders[1:], others, strict=True), 1):
        quality = metrics.sqnr(reference, found)
        yield DecoderCost(
            bundle.name,
            decoder,
            len(reference),
            float(pixels[i] / len(reference)),
            metrics.max_abs_error(reference, found),
            quality if np.isfinite(quality) else None,
            metrics.agreement(reference, found),
        )


def _clips(path: Path, decoder: Decoder, contract: InputContract, hop: Hop | None) -> Iterator[LiveClip]:
    window = Window(contract, hop)
    with decoding.opened(path, decoder) as reader:
        if reader.decoder != decoder:
            raise InputError(f"{path} is not decoded by {decoder}: {'; '.join(reader.fallbacks)}")
        for number, (seconds, frame) in enumerate(reader.film()):
            yield from window.each(Frame(rgb(frame), number, 0.0, seconds))
    yield from window.finish()


def to_json(decoders: Sequence[Decoder], costs: Sequence[DecoderCost]) -> dict[str, Any]:
    """`decoders` of the document of `edgetube parity --json`."""
    return {"reference": decoders[0], "bundles": [asdict(cost) for cost in costs]}
