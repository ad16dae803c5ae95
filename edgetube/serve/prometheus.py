"""Metrics in the text format of Prometheus, version 0.0.4
(https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, get_args

from edgetube.live.cameras import Cameras
from edgetube.live.frame import DropCause, State
from edgetube.live.scheduler import Statistics
from edgetube.serve.board import BOUNDS, Board, Histogram, Track

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Kind = Literal["counter", "gauge", "histogram"]
Sample = tuple[str, Mapping[str, str], float]
"""What is added to the name of the metric, labels, value."""


def metric(name: str, kind: Kind, text: str, samples: Iterable[Sample]) -> Iterator[str]:
    """The lines of one metric."""
    yield f"# HELP {name} {_escaped(text, quotes=False)}"
    yield f"# TYPE {name} {kind}"
    for suffix, labels, value in samples:
        inside = ",".join(f'{label}="{_escaped(given)}"' for label, given in labels.items())
        yield f"{name}{suffix}{{{inside}}} {_number(value)}" if inside else f"{name}{suffix} {_number(value)}"


def _escaped(text: str, quotes: bool = True) -> str:
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")  # file names may hold what is not UTF-8
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quotes else text


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(value)


def histogram(labels: Mapping[str, str], found: Histogram) -> Iterator[Sample]:
    """The samples of a histogram: how many are at most as large as each bound, their sum, how many there are."""
    count = 0
    for bound, own in zip((*BOUNDS, math.inf), found.counts, strict=True):
        count += own
        yield "_bucket", {**labels, "le": _number(bound)}, count
    yield "_sum", labels, found.total
    yield "_count", labels, count


def text(board: Board, cameras: Cameras | None, requests: Mapping[tuple[str, str], int]) -> str:
    """All metrics of a server.

    Args:
        requests: how many by (what was asked for, how it ended).
    """
    statistics = {} if cameras is None else cameras.statistics()
    known = [(track, statistics[track.name]) for track in board.tracks() if track.name in statistics]
    lines = [line for lines in _metrics(known, requests) for line in lines]
    return "\n".join(lines) + "\n"


def _metrics(known: list[tuple[Track, Statistics]], requests: Mapping[tuple[str, str], int]) -> Iterator[Iterator[str]]:
    def of_sources(
        name: str, kind: Kind, text: str, samples: Callable[[Track, Statistics], Iterable[Sample]]
    ) -> Iterator[str]:
        return metric(
            name, kind, text,
            [
                (suffix, {"source": track.name, **labels}, value)
                for track, one in known
                for suffix, labels, value in samples(track, one)
            ],
        )  # fmt: skip

    yield of_sources(
        "edgetube_frames_captured_total", "counter", "Frames that came.", lambda _, one: _single(one.account.captured)
    )
    yield of_sources(
        "edgetube_frames_used", "gauge", "Frames that a window took, less those that it dropped later.",
        lambda _, one: _single(one.account.used),
    )  # fmt: skip
    yield of_sources(
        "edgetube_frames_waiting", "gauge", "Frames that no window has taken yet.",
        lambda _, one: _single(one.account.waiting),
    )  # fmt: skip
    yield of_sources(
        "edgetube_frames_dropped_total", "counter", "Frames that no answer shows, by cause.",
        lambda _, one: [("", {"cause": cause}, one.account.dropped.get(cause, 0)) for cause in get_args(DropCause)],
    )  # fmt: skip
    yield of_sources(
        "edgetube_predictions_total", "counter", "Answers of the model.", lambda _, one: _single(one.predictions)
    )
    yield of_sources(
        "edgetube_predictions_skipped_total", "counter", "Answers that were repeated, because nothing had changed.",
        lambda track, _: _single(track.skipped),
    )  # fmt: skip
    yield of_sources(
        "edgetube_spans_total", "counter", "Spans that were opened.", lambda track, _: _single(track.opened)
    )
    yield of_sources(
        "edgetube_latency_seconds", "histogram", "Work for an answer, without waiting.",
        lambda track, _: _locked(track, track.latency),
    )  # fmt: skip
    yield of_sources(
        "edgetube_age_seconds", "histogram", "From the arrival of the newest frame to the answer.",
        lambda track, _: _locked(track, track.age),
    )  # fmt: skip
    yield of_sources("edgetube_quiet_seconds", "gauge", "Since the last frame.", lambda _, one: _single(one.quiet_s))
    yield of_sources(
        "edgetube_source_state", "gauge", "1 for the state that the source is in.",
        lambda _, one: [("", {"state": state}, int(one.state == state)) for state in get_args(State)],
    )  # fmt: skip
    yield metric(
        "edgetube_requests_total", "counter", "Files and frames that clients sent, by how that ended.",
        [("", {"what": what, "result": result}, count) for (what, result), count in requests.items()],
    )  # fmt: skip


def _single(value: float | None) -> list[Sample]:
    return [] if value is None else [("", {}, value)]


def _locked(track: Track, found: Histogram) -> list[Sample]:
    with track.lock:
        return list(histogram({}, found))
