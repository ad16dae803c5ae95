"""Decoders of one file are compared window by window."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgetube
from edgetube import bundle as bundles
from edgetube import decoding, hwdecode
from edgetube.bench import decoders
from edgetube.errors import InputError

VIDEO = Path(edgetube.__file__).parent / "demo/videos/pan-left.mp4"


@pytest.fixture
def brighter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that decodes everything 3 grey levels brighter."""
    opened, rgb = decoding.opened, decoding.rgb
    bright: list[bool] = []

    @contextmanager
    def open_(source: Any, decoder: str = "cpu") -> Iterator[Any]:
        with opened(source) as reader:
            reader.decoder = decoder
            film = reader.film

            def marked() -> Iterator[Any]:
                for item in film():
                    bright[:] = [decoder == "nvdec"]
                    yield item

            reader.film = marked  # type: ignore[method-assign]
            yield reader

    monkeypatch.setattr(hwdecode, "lacks", lambda name: None if name == "nvdec" else "there is none")
    monkeypatch.setattr(decoding, "opened", open_)
    monkeypatch.setattr(decoders, "rgb", lambda frame: np.minimum(rgb(frame), 252) + np.uint8(3 * bright[0]))


@pytest.mark.usefixtures("brighter")
def test_a_decoder_that_differs_is_measured(tiny_bundle: Path) -> None:
    opened = [bundles.load(tiny_bundle)]
    (cost,) = decoders.compare(opened, VIDEO, decoders.parse("cpu,nvdec"), 4)
    assert (cost.decoder, cost.pixels) == ("nvdec", pytest.approx(3.0))
    assert cost.max_abs_error > 0
    assert cost.sqnr_db is not None
    with edgetube.Runtime(tiny_bundle) as rt, rt.stream(VIDEO, hop=4) as stream:
        assert cost.windows == len(list(stream))


@pytest.mark.usefixtures("brighter")
def test_the_same_frames_cost_nothing(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "rgb", decoding.rgb)
    (cost,) = decoders.compare([bundles.load(tiny_bundle)], VIDEO, ("cpu", "nvdec"), 4)
    assert (cost.pixels, cost.max_abs_error, cost.sqnr_db, cost.agreement) == (0, 0, None, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cpu", "--decoder is 'cpu'; expected different decoders with commas, like cpu,nvdec"),
        ("cpu,cpu", "expected different decoders"),
        ("cpu,gpu", "--decoder is 'cpu,gpu'; expected some of cpu, nvdec, vaapi"),
        ("auto,cpu", "expected some of cpu, nvdec, vaapi"),
        ("cpu,vaapi", "vaapi cannot decode here: no such device; decoders here: cpu"),
    ],
)
def test_what_cannot_be_compared_is_refused(text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hwdecode, "lacks", lambda name: "no such device")
    with pytest.raises(InputError, match=re.escape(message)):
        decoders.parse(text)
