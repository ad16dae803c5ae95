"""Decisions against arithmetic by hand, and against an oracle that looks at a whole source at once, label by label."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from edgetube.errors import EdgetubeError, InputError
from edgetube.live.decisions import Decider, DecisionRule, Event, Span, Thresholds, spans
from edgetube.spec import Prediction

LABELS = ("a", "b", "c")
BARE = DecisionRule(tau=0, minimum=0, scores="sigmoid")


def logit(*shares: float) -> np.ndarray:
    """The logits whose sigmoids are these."""
    return np.array([math.log(share / (1 - share)) for share in shares])


def smoothed(decider: Decider) -> list[float]:
    assert decider.smoothed is not None
    return decider.smoothed.tolist()


def short(events: list[Event]) -> list[tuple[str, str, float, float, float]]:
    return [(e.kind, e.span.label, e.span.start, e.span.end, round(e.span.peak, 9)) for e in events]


# ------------------------------------------------------------------------------------------------------------- by hand


def test_a_label_is_on_between_two_thresholds() -> None:
    decider = Decider(BARE, ("a",))
    told = [short(decider.push(t, logit(score))) for t, score in enumerate([0.5, 0.7, 0.5, 0.45, 0.3, 0.5, 0.6])]
    assert told == [
        [], [("opened", "a", 1, 1, 0.7)], [], [], [("closed", "a", 1, 4, 0.7)], [], [("opened", "a", 6, 6, 0.6)],
    ]  # fmt: skip
    assert [(span.label, span.start, span.end) for span in decider.open] == [("a", 6, 6)]
    assert short(decider.flush()) == [("closed", "a", 6, 6, 0.6)]
    assert not [*decider.open, *decider.flush()]


def test_smoothing_depends_on_the_time_that_passed_and_not_on_how_many_answers_came() -> None:
    """From 0 to 1 in tau seconds: 1 - 1/e of the way, in one step or in many of any length."""
    rule = replace(BARE, tau=2.0)
    for steps in ([2.0], [0.5, 0.1, 1.4], [0.25] * 8):
        decider = Decider(rule, ("a",))
        decider.push(10.0, logit(0.2))
        for at in 10 + np.cumsum(steps):
            decider.push(at, logit(0.9))
        assert smoothed(decider) == [pytest.approx(0.2 + 0.7 * (1 - math.exp(-1)))]


def test_a_span_shorter_than_the_minimum_is_dropped_and_a_longer_one_opens_late_with_its_true_start() -> None:
    decider = Decider(replace(BARE, minimum=0.5), ("a",))
    given = [(0.1, 0.9), (0.4, 0.9), (0.5, 0.1), (0.7, 0.8), (0.9, 0.95), (1.2, 0.7), (1.5, 0.7), (1.6, 0.1)]
    told = [(t, e) for t, score in given for e in decider.push(t, logit(score))]
    assert [(t, *short([e])[0]) for t, e in told] == [
        (1.2, "opened", "a", 0.7, 1.2, 0.95),  # 1.2 - 0.7 is below a half in binary
        (1.6, "closed", "a", 0.7, 1.6, 0.95),
    ]
    assert [e.seconds for _, e in told] == [1.2, 1.6]


def test_labels_are_told_in_order_and_closed_before_others_open() -> None:
    decider = Decider(BARE, LABELS)
    decider.push(0, logit(0.9, 0.1, 0.9))
    assert [(e.kind, e.span.label) for e in decider.push(1, logit(0.1, 0.9, 0.1))] == [
        ("closed", "a"), ("closed", "c"), ("opened", "b"),
    ]  # fmt: skip


def test_thresholds_of_single_labels() -> None:
    rule = replace(BARE, labels={"a": (0.9, 0.85), "c": None})
    decider = Decider(rule, LABELS)
    assert [e.span.label for e in decider.push(0, logit(0.8, 0.8, 0.99))] == ["b"]
    assert [e.span.label for e in decider.push(1, logit(0.95, 0.8, 0.99))] == ["a"]
    assert short(decider.push(2, logit(0.84, 0.8, 0.99))) == [("closed", "a", 1, 2, 0.95)]
    with pytest.raises(InputError, match="names 'd', which is no label of the model"):
        Decider(replace(BARE, labels={"d": None}), LABELS)


def test_softmax_scores_are_those_of_a_prediction() -> None:
    logits = np.array([1.0, 3.0, 0.5])
    decider = Decider(replace(BARE, scores="softmax"), LABELS)
    decider.update(Prediction("b", 0.8, {}, tuple(logits), start=0.0, end=1.0))
    np.testing.assert_allclose(smoothed(decider), np.exp(logits) / np.exp(logits).sum())
    assert [span.label for span in decider.open] == ["b"]


@pytest.mark.parametrize("later", [0.5, 14.0])
def test_a_clock_that_jumps_closes_what_is_open_and_smooths_anew(later: float) -> None:
    decider = Decider(replace(BARE, tau=5.0), ("a",))
    decider.push(1.0, logit(0.9))
    decider.push(3.0, logit(0.8))
    events = decider.push(later, logit(0.7))
    assert [(e.kind, e.seconds, e.span.start, e.span.end) for e in events] == [
        ("closed", 3.0, 1.0, 3.0), ("opened", later, later, later),
    ]  # fmt: skip
    assert smoothed(decider) == [pytest.approx(0.7)]


def test_a_window_that_restarted_does_not_continue_what_was_before() -> None:
    decider = Decider(replace(BARE, tau=5.0), ("a",))
    first = Prediction("a", 0.9, {}, tuple(logit(0.9)), start=0.0, end=1.0)
    decider.update(first)
    events = decider.update(replace(first, end=1.5, logits=tuple(logit(0.7)), restarted="frames 7 to 9 are missing"))
    assert short(events) == [("closed", "a", 1.0, 1.0, 0.9), ("opened", "a", 1.5, 1.5, 0.7)]
    assert smoothed(decider) == [pytest.approx(0.7)]


def test_a_gap_that_the_rule_allows_goes_on() -> None:
    decider = Decider(replace(BARE, gap=11.0), ("a",))
    decider.push(3.0, logit(0.8))
    assert decider.push(14.0, logit(0.7)) == []


@pytest.mark.parametrize(
    ("seconds", "logits", "message"),
    [
        (math.nan, [0.0], "time of an answer is nan"),
        (0.0, [0.0, 1.0], r"of shape \(2,\); expected 1 finite"),
        (0.0, [math.nan], "not all finite; expected 1"),
        (0.0, 1.0, r"of shape \(\)"),
    ],
)
def test_answers_that_cannot_be_used(seconds: float, logits: Any, message: str) -> None:
    decider = Decider(BARE, ("a",))
    decider.push(0.0, logit(0.8))
    with pytest.raises(InputError, match=message):
        decider.push(seconds, logits)
    assert short(decider.push(1.0, logit(0.1))) == [("closed", "a", 0, 1, 0.8)], "a refused answer changes nothing"


def test_a_prediction_without_a_time_is_refused() -> None:
    with pytest.raises(InputError, match="without a time"):
        Decider(BARE, ("a",)).update(Prediction("a", 1.0, {}, (0.0,)))


# ---------------------------------------------------------------------------------------------------------- the oracle


def oracle_smoothed(tau: float, times: list[float], scores: np.ndarray) -> np.ndarray:
    """Each smoothed score as one weighted mean of all scores before it: a sum, not a recursion."""
    decay = [0.0] + [math.exp(-(b - a) / tau) if tau else 0.0 for a, b in pairwise(times)]
    rows = []
    for n in range(len(times)):
        weights = [(1 - decay[k]) * math.prod(decay[k + 1 : n + 1]) for k in range(n + 1)]
        rows.append(sum(w * row for w, row in zip(weights, scores[: n + 1], strict=True)))
    return np.array(rows)


def oracle_events(rule: DecisionRule, labels: tuple[str, ...], times: list[float], scores: np.ndarray) -> list[Event]:
    """Events of one unbroken stretch, each label on its own, then sorted."""
    means, found = oracle_smoothed(rule.tau, times, scores), []
    for place, label in enumerate(labels):
        pair = rule.labels.get(label, Thresholds(rule.enter, rule.leave))
        if pair is None:
            continue
        enter, leave = pair
        own, first = means[:, place], 0
        assume(min(abs(own - enter).min(), abs(own - leave).min()) > 1e-9)
        while (first := next((i for i in range(first, len(own)) if own[i] >= enter), len(own))) < len(own):
            last = next((i for i in range(first, len(own)) if own[i] < leave), len(own))
            inside = range(first, last)
            opened = next((i for i in inside if times[i] - times[first] >= rule.minimum - 1e-6), None)
            if opened is not None:
                begun = Span(label, times[first], times[opened], own[first : opened + 1].max())
                found.append((opened, 1, place, Event("opened", times[opened], begun)))
                end = min(last, len(own) - 1)
                whole = Span(label, times[first], times[end], own[first:last].max())
                found.append((last, 0, place, Event("closed", times[end], whole)))
            first = last
    return [event for *_, event in sorted(found, key=lambda item: item[:3])]


thresholds = st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)).map(lambda pair: Thresholds(max(pair), min(pair)))


@st.composite
def rules(draw: st.DrawFn) -> DecisionRule:
    enter, leave = draw(thresholds)
    return DecisionRule(
        tau=draw(st.sampled_from([0.0, 0.3, 1.0, 7.0])), enter=enter, leave=leave,
        minimum=draw(st.sampled_from([0.0, 0.5, 1.25])), gap=draw(st.sampled_from([2.0, 10.0])), scores="sigmoid",
        labels=draw(st.dictionaries(st.sampled_from(LABELS), st.none() | thresholds)),
    )  # fmt: skip


@given(
    rules(),
    st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.1, 0.25, 0.4, 1.0, 3.0, -5.0]),
            st.lists(st.sampled_from([0.02, 0.3, 0.5, 0.7, 0.98]), min_size=3, max_size=3),
        ),
        min_size=1,
        max_size=40,
    ),
)
def test_events_are_those_of_the_oracle(rule: DecisionRule, answers: list[tuple[float, list[float]]]) -> None:
    times = [float(t) for t in np.cumsum([step for step, _ in answers])]
    scores = np.array([row for _, row in answers])
    steps = np.diff(times)
    cuts = [0, *(i + 1 for i, step in enumerate(steps) if step < 0 or step > rule.gap), len(times)]
    expected = [
        event
        for first, end in pairwise(cuts)
        for event in oracle_events(rule, LABELS, times[first:end], scores[first:end])
    ]
    decider = Decider(rule, LABELS)
    got = [event for at, row in zip(times, scores, strict=True) for event in decider.push(at, logit(*row))]
    got += decider.flush()
    plain = [replace(event, span=replace(event.span, peak=0)) for event in got]
    assert plain == [replace(event, span=replace(event.span, peak=0)) for event in expected]
    assert [event.span.peak for event in got] == pytest.approx([event.span.peak for event in expected])
    whole = spans(rule, LABELS, times, [logit(*row) for row in scores])
    assert list(whole) == [event.span for event in got if event.kind == "closed"]


# ---------------------------------------------------------------------------------------------------------- the rule


@given(rules())
def test_a_rule_survives_json(rule: DecisionRule) -> None:
    assert DecisionRule.from_json(json.loads(json.dumps(rule.to_json()))) == rule


def test_a_rule_as_the_command_line_writes_it(tmp_path: Path) -> None:
    assert DecisionRule.parse("default") == DecisionRule()
    assert DecisionRule.parse("tau=1,enter=0.6,leave=0.4,min=0.5s") == DecisionRule()
    assert DecisionRule.parse("min=250ms, gap=3s,scores=sigmoid,fall=0.3/0.2,no fall=off") == DecisionRule(
        minimum=0.25, gap=3, scores="sigmoid", labels={"fall": Thresholds(0.3, 0.2), "no fall": None}
    )
    path = tmp_path / "rule.json"
    path.write_text('{"tau": 2, "labels": {"a,b": {"enter": 0.5, "leave": 0.25}, "c": null}}')
    assert DecisionRule.parse(str(path)) == DecisionRule(tau=2.0, labels={"a,b": Thresholds(0.5, 0.25), "c": None})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected NAME=VALUE"),
        ("tau", "'tau' in the decision rule; expected NAME=VALUE"),
        ("tau=", "expected NAME=VALUE"),
        ("tau=1,tau=2", "says tau twice"),
        ("a=off,a=0.3/0.2", "says a twice"),
        ("tua=1", "tua=1 in the decision rule; expected one of tau, enter, leave, min, gap, scores, or LABEL="),
        ("tau=fast", "tau of the decision rule is 'fast'; expected a number"),
        ("min=1h", "min of the decision rule is '1h'"),
        ("enter=0.5s", "enter of the decision rule is '0.5s'"),
        ("tau=-1", "tau of a decision rule is -1.0; expected a finite number, 0 to 86400"),
        ("tau=nan", "expected a finite number"),
        ("min=inf", "expected a finite number"),
        ("enter=0.3", "a decision rule has enter 0.3 and leave 0.4; expected 0 < leave <= enter <= 1"),
        ("leave=0", "leave 0; expected 0 < leave"),
        ("enter=1.5", "enter of a decision rule is 1.5"),
        ("scores=logits", "expected one of softmax, sigmoid"),
        ("fall=0.2/0.3", "'fall' has enter 0.2 and leave 0.3"),
        ("fall=0.2/x", "fall of the decision rule is 'x'"),
        ("none.json", "none.json is no decision rule"),
    ],
)
def test_a_rule_that_cannot_be_used_is_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        DecisionRule.parse(text)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "data",
    [
        {"tua": 1},
        {"tau": "1"},
        {"enter": True},
        {"labels": []},
        {"labels": {"a": 0.5}},
        {"labels": {"a": {"enter": 0.5}}},
        {"labels": {"a": {"enter": 0.5, "leave": "0.2"}}},
        [],
    ],
)
def test_json_that_is_no_rule(data: Any, tmp_path: Path) -> None:
    with pytest.raises(EdgetubeError):
        DecisionRule.from_json(data)
    path = tmp_path / "rule.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError):
        DecisionRule.parse(str(path))


def test_events_are_plain_json() -> None:
    event = Event("opened", 1.5, Span("a", 1.0, 1.5, 0.75))
    assert json.loads(json.dumps(event.to_json())) == {
        "kind": "opened", "seconds": 1.5, "span": {"label": "a", "start": 1.0, "end": 1.5, "peak": 0.75},
    }  # fmt: skip
    assert event.span.seconds == 0.5
