"""Metrics in the text format of Prometheus, version 0.0.4
(https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
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
    def of(track: Track) -> dict[str, str]:
        return {"source": track.name}

    yield metric(
        "edgetube_frames_captured_total", "counter", "Frames that came.",
        [("", of(track), one.account.captured) for track, one in known],
    )  # fmt: skip
    yield metric(
        "edgetube_frames_used", "gauge", "Frames that a window took, less those that it dropped later.",
        [("", of(track), one.account.used) for track, one in known],
    )  # fmt: skip
    yield metric(
        "edgetube_frames_waiting", "gauge", "Frames that no window has taken yet.",
        [("", of(track), one.account.waiting) for track, one in known],
    )  # fmt: skip
    yield metric(
        "edgetube_frames_dropped_total", "counter", "Frames that no answer shows, by cause.",
        [
            ("", of(track) | {"cause": cause}, one.account.dropped.get(cause, 0))
            for track, one in known
            for cause in get_args(DropCause)
        ],
    )  # fmt: skip
    yield metric(
        "edgetube_predictions_total", "counter", "Answers of the model.",
        [("", of(track), one.predictions) for track, one in known],
    )  # fmt: skip
    yield metric(
        "edgetube_predictions_skipped_total", "counter", "Answers that were repeated, because nothing had changed.",
        [("", of(track), track.skipped) for track, _ in known],
    )  # fmt: skip
    yield metric(
        "edgetube_spans_total", "counter", "Spans that were opened.",
        [("", of(track), track.opened) for track, _ in known],
    )  # fmt: skip
    yield metric(
        "edgetube_latency_seconds", "histogram", "Work for an answer, without waiting.",
        [sample for track, _ in known for sample in _locked(track, "latency")],
    )  # fmt: skip
    yield metric(
        "edgetube_age_seconds", "histogram", "From the arrival of the newest frame to the answer.",
        [sample for track, _ in known for sample in _locked(track, "age")],
    )  # fmt: skip
    yield metric(
        "edgetube_quiet_seconds", "gauge", "Since the last frame.",
        [("", of(track), one.quiet_s) for track, one in known if one.quiet_s is not None],
    )  # fmt: skip
    yield metric(
        "edgetube_source_state", "gauge", "1 for the state that the source is in.",
        [
            ("", of(track) | {"state": state}, int(one.state == state))
            for track, one in known
            for state in get_args(State)
        ],
    )  # fmt: skip
    yield metric(
        "edgetube_requests_total", "counter", "Files and frames that clients sent, by how that ended.",
        [("", {"what": what, "result": result}, count) for (what, result), count in requests.items()],
    )  # fmt: skip


def _locked(track: Track, which: Literal["latency", "age"]) -> list[Sample]:
    with track.lock:
        return list(histogram({"source": track.name}, getattr(track, which)))
