"""Decisions: what an app acts on, made from a sequence of scores.

Scores jitter, and an app wants a few statements: *this began at 12.4 s, and ended at 15.0 s*. Here scores are smoothed
over time, a label is on between two thresholds (hysteresis), and what was on for long enough is a span.

The time of an answer is the end of its window: the moment at which an app could know. So the start of a span is when
its smoothed score reached `enter`, and its end when it fell below `leave`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from edgetube import metrics, strict
from edgetube.errors import FormatError, InputError
from edgetube.spec import MOST_CLASSES, Prediction

Scores: TypeAlias = Literal["softmax", "sigmoid"]
Floats = npt.NDArray[np.float64]

LONGEST = 86400.0
"""Longest time of a rule, in seconds: a day, a guard against a slip of the keyboard."""

TICK = 1e-6
"""Seconds by which a duration may be short of `minimum`: the rounding of a clock that counts fractions."""

OFF = "off"
"""What a rule says of a label that makes no spans."""


class Thresholds(NamedTuple):
    """A label is on from the moment its smoothed score is at least `enter` until it is below `leave`."""

    enter: float
    leave: float


@dataclass(frozen=True)
class DecisionRule:
    """How scores become spans. Checked on construction, and the same after a round trip through JSON.

    Attributes:
        tau: time constant of the smoothing in seconds; 0 does not smooth. After a step of the scores, the smoothed ones
            have come 63 % of the way in `tau` seconds.
        enter, leave: thresholds of every label that has none of its own, 0 < leave <= enter <= 1.
        minimum: seconds that a label must be on before its span is opened; shorter ones are dropped.
        gap: longest time in seconds between two answers; after a longer one everything starts anew.
        scores: "softmax", as in a `Prediction`: the labels exclude one another; "sigmoid": each label on its own, for
            models that were trained with it.
        labels: thresholds of single labels; None for a label that makes no spans.

    Raises:
        InputError: a value of another type, or out of bounds.
    """

    tau: float = 1.0
    enter: float = 0.6
    leave: float = 0.4
    minimum: float = 0.5
    gap: float = 10.0
    scores: Scores = "softmax"
    labels: Mapping[str, tuple[float, float] | None] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        try:
            found: dict[str, Any] = {
                name: strict.number(getattr(self, name), f"{name} of a decision rule", 0, LONGEST)
                for name in ("tau", "minimum", "gap")
            }
            found["scores"] = strict.choice(self.scores, "scores of a decision rule", get_args(Scores))
            found |= _thresholds((self.enter, self.leave), "a decision rule")._asdict()
            if not isinstance(self.labels, Mapping) or len(self.labels) > MOST_CLASSES:
                raise FormatError(f"labels of a decision rule are {self.labels!r:.60}; expected thresholds by label")
            found["labels"] = {
                strict.text(label, "a label of a decision rule"): None if own is None else _thresholds(own, repr(label))
                for label, own in self.labels.items()
            }
        except FormatError as error:
            raise InputError(str(error)) from error
        for name, value in found.items():
            object.__setattr__(self, name, value)

    def to_json(self) -> dict[str, Any]:
        labels = {label: None if own is None else Thresholds(*own)._asdict() for label, own in self.labels.items()}
        return asdict(replace(self, labels={})) | {"labels": labels}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DecisionRule:
        """
        Raises:
            FormatError: an unknown field.
            InputError: a value out of bounds.
        """
        data = strict.fields_of(cls, data)
        if isinstance(labels := data.get("labels"), Mapping):
            data["labels"] = {label: None if own is None else _pair(own, label) for label, own in labels.items()}
        return cls(**data)

    @classmethod
    def parse(cls, text: str) -> DecisionRule:
        """A rule as the command line writes it: `default`, a `.json` file, or settings with commas between them.

        `tau=1,enter=0.6,leave=0.4,min=0.5s,gap=10s,scores=softmax`, each at most once, what is left out as in
        `DecisionRule()`; times in `s`, `ms` or bare seconds. `fall=0.3/0.2` are the thresholds of the label *fall*,
        `static=off` makes no spans of *static*. A label with a comma or an equals sign in it needs a file.

        Raises:
            InputError: something else.
        """
        if text == "default":
            return cls()
        if text.lower().endswith(".json"):
            try:
                return cls.from_json(strict.read_json(Path(text)))
            except (FormatError, OSError) as error:
                raise InputError(f"{text} is no decision rule: {error}") from error
        given: dict[str, Any] = {}
        labels: dict[str, tuple[float, float] | None] = {}
        for item in text.split(","):
            name, equals, value = (part.strip() for part in item.partition("="))
            if not (name and equals and value):
                raise InputError(f"{item!r:.60} in the decision rule; expected NAME=VALUE, like enter=0.6")
            if name in given or name in labels:
                raise InputError(f"the decision rule says {name} twice")
            if name in _SETTINGS:
                given[name] = _setting(name, value)
            else:
                labels[name] = _label_setting(name, value)
        return cls(**{_SETTINGS[name]: value for name, value in given.items()}, labels=labels)


_SETTINGS = {
    "tau": "tau", "enter": "enter", "leave": "leave", "min": "minimum", "gap": "gap", "scores": "scores",
}  # fmt: skip
"""The name of each setting on a command line, and in the rule."""


def _setting(name: str, value: str) -> float | str:
    if name == "scores":
        return value
    unit = 1.0
    if name in ("tau", "min", "gap") and (timed := re.fullmatch(r"(.*?)(ms|s)", value)):
        value, unit = timed[1], 1e-3 if timed[2] == "ms" else 1.0
    return _number(value, name) * unit


def _label_setting(label: str, value: str) -> Thresholds | None:
    if value == OFF:
        return None
    enter, slash, leave = value.partition("/")
    if not slash:
        known = ", ".join(_SETTINGS)
        raise InputError(
            f"{label}={value} in the decision rule; expected one of {known}, or LABEL=ENTER/LEAVE, or LABEL={OFF}"
        )
    return Thresholds(_number(enter, label), _number(leave, label))


def _number(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"{name} of the decision rule is {text!r:.60}; expected a number") from error


def _pair(value: Any, label: str) -> Thresholds:
    if not isinstance(value, Mapping) or set(value) != set(Thresholds._fields):
        raise FormatError(f"thresholds of {label!r:.60} are {value!r:.60}; expected enter and leave")
    return Thresholds(**value)


def _thresholds(value: Any, where: str) -> Thresholds:
    enter, leave = strict.items(value, f"thresholds of {where}", 2, 2)
    enter, leave = (
        strict.number(number, f"{name} of {where}", 0, 1)
        for name, number in zip(Thresholds._fields, (enter, leave), strict=True)
    )
    if not 0 < leave <= enter:
        raise FormatError(f"{where} has enter {enter:g} and leave {leave:g}; expected 0 < leave <= enter <= 1")
    return Thresholds(enter, leave)


@dataclass(frozen=True)
class Span:
    """A stretch of time in which a label was on.

    Attributes:
        start, end: seconds of the source; `end` of an open span is that of the newest answer.
        peak: highest smoothed score in it.
    """

    label: str
    start: float
    end: float
    peak: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Event:
    """A span that was opened or closed.

    Attributes:
        kind: "opened" once the span is `minimum` seconds long; "closed" once for each opened one.
        seconds: time of the answer that decided it.
        span: as it is known then.
    """

    kind: Literal["opened", "closed"]
    seconds: float
    span: Span

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Decider:
    """Turns the answers to one source into events. Not thread-safe: one for each source.

    Events come in the order of time; in one answer, spans close before others open, each in the order of the labels.
    Work and memory of an answer are O(labels), however long the source runs.

    Args:
        labels: of the bundle, in the order of its logits.

    Raises:
        InputError: the rule names a label that is not among them.
    """

    def __init__(self, rule: DecisionRule, labels: Sequence[str]) -> None:
        if unknown := [label for label in rule.labels if label not in labels]:
            raise InputError(f"the decision rule names {unknown[0]!r:.60}, which is no label of the model")
        self.rule, self.labels = rule, tuple(labels)
        own = [rule.labels.get(label, Thresholds(rule.enter, rule.leave)) for label in self.labels]
        never = Thresholds(math.inf, math.inf)
        self._enter, self._leave = np.array([never if pair is None else pair for pair in own], np.float64).T
        self._smoothed: Floats | None = None
        self._newest = math.nan
        self._since = np.full(len(self.labels), math.nan)  # when each label that is on reached `enter`
        self._peak = np.zeros(len(self.labels))
        self._open = np.zeros(len(self.labels), bool)

    @property
    def smoothed(self) -> Floats | None:
        """Smoothed scores (labels,) after the newest answer; None before the first, and after a restart."""
        return None if self._smoothed is None else self._smoothed.copy()

    @property
    def open(self) -> tuple[Span, ...]:
        """The spans that are open, in the order of the labels."""
        return tuple(self._span(i) for i in np.flatnonzero(self._open))

    def update(self, prediction: Prediction) -> list[Event]:
        """The events of the next answer of `Runtime.stream`; where its window restarted, everything begins anew.

        Raises:
            InputError: it has no time, or logits of another model.
        """
        if prediction.end is None:
            raise InputError("a prediction without a time; decisions need those of a stream")
        return self.push(prediction.end, prediction.logits, prediction.restarted is not None)

    def push(self, seconds: float, logits: npt.ArrayLike, restarted: bool = False) -> list[Event]:
        """The events of an answer whose window ended at `seconds`: logits (labels,).

        An answer that is earlier than the one before it, or more than `gap` later, or whose window has restarted, does
        not continue it: open spans are closed at the older answer, and smoothing starts anew.

        Raises:
            InputError: a time or a logit that is not finite, or another number of logits.
        """
        scores, seconds = self._scores(logits), float(seconds)
        if not math.isfinite(seconds):
            raise InputError(f"the time of an answer is {seconds}; expected finite seconds")
        step = seconds - self._newest
        events = self.flush() if restarted or step < 0 or step > self.rule.gap else []
        self._newest = seconds
        if self._smoothed is None or self.rule.tau == 0:
            self._smoothed = scores
        else:
            self._smoothed = self._smoothed - math.expm1(-step / self.rule.tau) * (scores - self._smoothed)
        return events + self._leaving(self._smoothed) + self._entering(self._smoothed)

    def flush(self) -> list[Event]:
        """End the source, or begin it anew: closes what is open at the newest answer, and forgets all answers."""
        events = [Event("closed", self._newest, span) for span in self.open]
        self._smoothed, self._newest = None, math.nan
        self._since[:] = math.nan
        self._open[:] = False
        return events

    def _leaving(self, smoothed: Floats) -> list[Event]:
        leaving = ~np.isnan(self._since) & (smoothed < self._leave)
        events = [Event("closed", self._newest, self._span(i)) for i in np.flatnonzero(leaving & self._open)]
        self._since[leaving] = math.nan
        self._open[leaving] = False
        return events

    def _entering(self, smoothed: Floats) -> list[Event]:
        entering = np.isnan(self._since) & (smoothed >= self._enter)
        self._since[entering] = self._newest
        self._peak = np.where(entering, smoothed, np.maximum(self._peak, smoothed))
        opening = ~self._open & (self._newest - self._since >= self.rule.minimum - TICK)
        self._open |= opening
        return [Event("opened", self._newest, self._span(i)) for i in np.flatnonzero(opening)]

    def _span(self, index: np.intp) -> Span:
        return Span(self.labels[index], float(self._since[index]), self._newest, float(self._peak[index]))

    def _scores(self, logits: npt.ArrayLike) -> Floats:
        found = np.asarray(logits, np.float64)
        if found.shape != (len(self.labels),) or not np.isfinite(found).all():
            what = "not all finite" if found.shape == (len(self.labels),) else f"of shape {found.shape}"
            raise InputError(f"logits are {what}; expected {len(self.labels)} finite ones, one for each label")
        return metrics.softmax(found) if self.rule.scores == "softmax" else metrics.sigmoid(found)


def spans(
    rule: DecisionRule, labels: Sequence[str], times: Iterable[float], logits: Iterable[npt.ArrayLike]
) -> tuple[Span, ...]:
    """All spans of a source that has ended, in the order in which they closed: what a `Decider` gives.

    Args:
        times: (N,) seconds at which the windows end.
        logits: (N, labels).

    Raises:
        InputError: as `Decider.push` raises.
    """
    decider = Decider(rule, labels)
    events = [event for at, row in zip(times, logits, strict=True) for event in decider.push(at, row)]
    return tuple(event.span for event in [*events, *decider.flush()] if event.kind == "closed")
