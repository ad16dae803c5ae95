"""The search on measurements that nobody made, then a whole sweep of the tiny model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetube import datasets, demo, metrics
from edgetube.bench import sweep, workers
from edgetube.bench.answer_cache import AnswerCache
from edgetube.bench.sweep import Rule, Standing
from edgetube.bundle import Bundle
from edgetube.errors import BackendError, InputError
from edgetube.progress import Progress
from edgetube.spec import ModelSpec, TubeSpec
from edgetube.views import SINGLE, Views

Cli = Callable[..., tuple[int, str, str]]

SPEC = ModelSpec(
    (TubeSpec((4, 8, 8), (4, 16, 16)), TubeSpec((1, 16, 16), (8, 16, 16))), 8, (32, 48), 24, 2, 2, (("motion", 9),)
)  # 12 + 6 tokens


def point(name: str, ms: float, noise: float = 0.0, right: int = 0, clips: int = 0) -> Standing:
    return Standing(name, ms, ms * (1 - noise), ms * (1 + noise), right, clips)


class Fake:
    """Points whose answers to every clip are known; remembers who was asked about what."""

    def __init__(self, answers: Mapping[str, Sequence[bool]]) -> None:
        self.answers, self.asked = answers, dict.fromkeys(answers, 0)

    def __call__(self, names: Sequence[str], start: int, stop: int) -> dict[str, int | str]:
        for name in names:
            assert self.asked[name] == start  # every clip once, in order
            self.asked[name] = stop
        return {name: sum(self.answers[name][start:stop]) for name in names}


@st.composite
def measured(draw: st.DrawFn) -> tuple[list[Standing], dict[str, list[bool]]]:
    """Up to six points, and their answers to up to 120 clips."""
    clips = draw(st.integers(1, 120))
    points, answers = [], {}
    for index in range(draw(st.integers(1, 6))):
        name = f"p{index}"
        points.append(point(name, draw(st.integers(1, 40)) / 4, draw(st.sampled_from((0.0, 0.02, 0.3)))))
        skill = draw(st.sampled_from((0.0, 0.2, 0.6, 0.9, 1.0)))
        random = draw(st.randoms(use_true_random=False))
        answers[name] = [random.random() < skill for _ in range(clips)]
    return points, answers


RULES = st.one_of(
    st.just(Rule()),
    st.integers(1, 40).map(lambda ms: Rule(budget_ms=ms / 4)),
    st.integers(0, 20).map(lambda share: Rule(min_accuracy=share / 20)),
)


def finished(known: Mapping[str, Standing], left: Mapping[str, str]) -> list[Standing]:
    return [one for one in known.values() if one.name not in left]


# ----------------------------------------------------------------------------------------------------------- the search


def test_rounds_are_a_quarter_then_twice_as_many() -> None:
    assert sweep.rounds(100) == [25, 50, 100]
    assert sweep.rounds(101) == [26, 52, 101]
    assert sweep.rounds(3) == [1, 2, 3]
    assert sweep.rounds(1) == [1]


@given(measured(), RULES)
def test_every_point_ends_the_clips_or_leaves_with_a_reason(
    found: tuple[list[Standing], dict[str, list[bool]]], rule: Rule
) -> None:
    points, answers = found
    fake, clips = Fake(answers), len(answers["p0"])
    known, left = sweep.search(points, clips, rule, fake)
    assert set(known) == set(answers)
    for name, one in known.items():
        assert one.clips == fake.asked[name]
        assert one.right == sum(answers[name][: one.clips])
        assert one.clips == clips or left[name]


@given(measured(), RULES)
def test_points_leave_only_where_intervals_say_so(
    found: tuple[list[Standing], dict[str, list[bool]]], rule: Rule
) -> None:
    points, answers = found
    known, left = sweep.search(points, len(answers["p0"]), rule, Fake(answers))

    def interval(name: str, clips: int) -> tuple[float, float]:
        return metrics.wilson(sum(answers[name][:clips]) / clips, clips)

    for name in left:
        one = known[name]
        if one.clips == 0:
            assert rule.budget_ms is not None
            assert one.low_ms > rule.budget_ms
            continue
        high = interval(name, one.clips)[1]
        below = rule.min_accuracy is not None and high < rule.min_accuracy
        assert below or any(
            other.high_ms <= one.low_ms and other.clips >= one.clips and interval(other.name, one.clips)[0] > high
            for other in known.values()
        )


@given(measured())
def test_the_front_is_what_nothing_beats(found: tuple[list[Standing], dict[str, list[bool]]]) -> None:
    points, answers = found
    clips = len(answers["p0"])
    whole = [replace(one, right=sum(answers[one.name]), clips=clips) for one in points]
    best = sweep.front(whole)
    assert best
    assert [one.p50_ms for one in best] == sorted(one.p50_ms for one in best)
    for one in whole:
        loses = False
        for other in whole:
            faster, better = other.p50_ms < one.p50_ms, other.right > one.right
            loses |= (faster and other.right >= one.right) or (better and other.p50_ms <= one.p50_ms)
        assert (one in best) != loses
        assert (one.name in sweep.reasons(whole, Rule())) == loses


@given(measured(), RULES)
def test_the_winner_keeps_the_rule_and_none_that_keeps_it_is_better(
    found: tuple[list[Standing], dict[str, list[bool]]], rule: Rule
) -> None:
    points, answers = found
    known, left = sweep.search(points, len(answers["p0"]), rule, Fake(answers))
    ended = finished(known, left)
    won = sweep.winner(ended, rule)
    if rule.budget_ms is not None:
        allowed = [one for one in ended if one.p50_ms <= rule.budget_ms]
        assert (won is None) == (not allowed)
        assert won is None or (won in allowed and all(one.accuracy <= won.accuracy for one in allowed))
    elif rule.min_accuracy is not None:
        allowed = [one for one in ended if one.accuracy >= rule.min_accuracy]
        assert (won is None) == (not allowed)
        assert won is None or (won in allowed and all(one.p50_ms >= won.p50_ms for one in allowed))
    else:
        assert won is None
    assert won is None or won in sweep.front(ended)


def test_a_bad_point_leaves_after_the_first_quarter_and_says_for_whom() -> None:
    fake = Fake({"good": [True] * 100, "bad": [False] * 100, "quick": [False] * 100})
    points = [point("good", 2.0), point("bad", 3.0), point("quick", 1.0)]
    known, left = sweep.search(points, 100, Rule(), fake)
    assert fake.asked == {"good": 100, "bad": 25, "quick": 100}
    assert list(left) == ["bad"]
    assert "25 clips" in left["bad"]
    assert "good has at least 86.7% in 2 ms" in left["bad"]
    assert [one.name for one in sweep.front(finished(known, left))] == ["quick", "good"]


def test_a_point_that_may_be_as_fast_goes_on() -> None:
    fake = Fake({"good": [True] * 100, "bad": [False] * 100})
    _, left = sweep.search([point("good", 2.0, 0.3), point("bad", 2.5, 0.3)], 100, Rule(), fake)
    assert not left
    assert fake.asked["bad"] == 100


def test_over_the_budget_and_below_the_smallest_accuracy() -> None:
    fake = Fake({"slow": [True] * 40, "near": [True] * 40, "quick": [True] * 40})
    points = [point("slow", 9.0, 0.1), point("near", 5.2, 0.1), point("quick", 1.0)]
    known, left = sweep.search(points, 40, Rule(budget_ms=5.0), fake)
    assert list(left) == ["slow"]
    assert left["slow"] == "over the budget: 9 ms, 5 ms are allowed"
    assert fake.asked == {"slow": 0, "near": 40, "quick": 40}
    won = sweep.winner([known["near"]], Rule(budget_ms=5.0))
    assert won is None
    assert sweep.reasons([known["near"]], Rule(budget_ms=5.0)) == {"near": "over the budget"}
    fake = Fake({"weak": [False, True] * 20})
    _, left = sweep.search([point("weak", 1.0)], 40, Rule(min_accuracy=0.9), fake)
    assert fake.asked == {"weak": 10}
    assert "90.0% are asked for" in left["weak"]


def test_a_point_that_fails_leaves_with_what_it_said() -> None:
    def ask(names: Sequence[str], start: int, stop: int) -> dict[str, int | str]:
        return {name: "no memory" if name == "b" and start else stop - start for name in names}

    known, left = sweep.search([point("a", 1.0), point("b", 1.0)], 8, Rule(), ask)
    assert left == {"b": "no memory"}
    assert known["b"].clips == 2
    assert known["a"].right == 8


@pytest.mark.parametrize(
    ("given_rule", "said"),
    [
        ({"budget_ms": 1.0, "min_accuracy": 0.5}, "one of the two"),
        ({"budget_ms": 0.0}, "more than 0"),
        ({"budget_ms": math.nan}, "more than 0"),
        ({"min_accuracy": 97.0}, "0 to 1"),
    ],
)
def test_rules_that_are_none(given_rule: dict[str, float], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Rule(**given_rule)


# ------------------------------------------------------------------------------------------------------------- the grid


def test_the_grid_has_all_tokens_once_and_each_kind_of_fewer() -> None:
    points = sweep.grid(SPEC, ["a", "b", "a"], keep_tokens=["12", "50%", "12"], reduce=["merge", "drop"])
    assert [one.name for one in points] == [
        "a", "b", "a keep12", "b keep12", "a drop12", "b drop12", "a keep9", "b keep9", "a drop9", "b drop9",
    ]  # fmt: skip
    assert [one.tokens for one in points] == [18] * 2 + [12] * 4 + [9] * 4
    assert points[0].reduce is None
    assert points[4].spec is not None
    assert points[4].spec.reduction is not None
    assert points[4].spec.reduction.kind == "drop"


def test_several_clips_are_named_and_have_their_own_shares() -> None:
    points = sweep.grid(SPEC, ["a"], [8, 16], [(32, 48)], ["50%"])
    assert [one.name for one in points] == [
        "a 8x32x48", "a keep9 8x32x48", "a 16x32x48", "a keep18 16x32x48"
    ]  # fmt: skip


def test_points_that_cannot_exist_say_why() -> None:
    points = sweep.grid(SPEC, ["a"], [1, 8], keep_tokens=["2"])
    problems = {one.name: one.problem for one in points}
    assert problems["a 8x32x48"] == ""
    assert "can merge" in problems["a keep2 8x32x48"]
    with pytest.raises(InputError, match="--keep-tokens has 'few'"):
        sweep.grid(SPEC, ["a"], keep_tokens=["few"])
    with pytest.raises(InputError, match="in different ways"):
        sweep.grid(SPEC, ["a"], keep_tokens=["12", "14,12"])


def test_views_are_points_of_their_own_that_cost_their_number_of_calls() -> None:
    points = sweep.grid(SPEC, ["a", "b"], keep_tokens=["9"], views=[SINGLE, Views(2, 3), SINGLE])
    assert [one.name for one in points][:4] == ["a 1x1 views", "a 2x3 views", "b 1x1 views", "b 2x3 views"]
    assert points[1].macs == 6 * SPEC.macs()
    assert points[0].macs == SPEC.macs()
    assert len(points) == 8
    (alone,) = sweep.grid(SPEC, ["a"], views=[Views(2, 3)])
    assert (alone.name, alone.macs) == ("a", 6 * SPEC.macs())


def test_tubes_are_points_besides_those_of_the_trained_model(tmp_path: Path) -> None:
    points = sweep.grid(SPEC, ["a"], keep_tokens=["50%"], tubes=["1", "0,1", "default"])
    assert [one.name for one in points] == ["a", "a keep9", "a tubes1", "a tubes1 keep3"]
    assert [one.tubes for one in points] == ["default", "default", "1", "1"]
    assert [one.tokens for one in points] == [18, 9, 6, 3]
    assert points[2].spec is not None
    assert points[2].spec.left_out == (0,)
    assert points[2].macs == points[2].spec.macs() < SPEC.macs() / 2
    short = sweep.grid(SPEC, ["a"], [2], tubes=["1"])  # tube 0 has 4 frames
    assert [(one.name, bool(one.problem)) for one in short] == [("a", True), ("a tubes1", False)]
    with pytest.raises(InputError, match="there is no tube 7"):
        sweep.grid(SPEC, ["a"], tubes=["7"])
    one = SPEC.tubes[1].to_json()
    for name, stride in (("wide", (8, 16, 32)), ("high", (8, 32, 16))):
        (tmp_path / f"{name}.json").write_text(json.dumps([one | {"kernel": [1, 16, 16], "stride": stride}]), "utf-8")
    assert sweep.grid(SPEC, ["a"], tubes=[str(tmp_path / "wide.json")])[1].name == "a tubes1-4"
    tall = replace(SPEC, size=(48, 48))
    with pytest.raises(InputError, match=r"high.json --keep-tokens all both leave 6 tokens, in different ways"):
        sweep.grid(tall, ["a"], tubes=[str(tmp_path / f"{name}.json") for name in ("wide", "high")])


# ------------------------------------------------------------------------------------------------------------ the sweep


def test_clips_with_and_without_labels_do_not_mix() -> None:
    source = datasets.built_in(4, ())
    assert not sweep.is_labelled(source)
    some = (replace(source.items[0], label="pan-left"), *source.items[1:])
    with pytest.raises(InputError, match="1 of 4 clips"):
        sweep.is_labelled(replace(source, items=some))
    with pytest.raises(InputError, match="no clips"):
        sweep.is_labelled(replace(source, items=()))


def test_no_place_is_reached_where_no_point_could_be_exported(tmp_path: Path) -> None:
    """A device may be off by then, and there is nothing to ask it."""

    def reach(_: Progress) -> AbstractContextManager[sweep.Place]:
        raise AssertionError("a device is opened")

    def make(points: Sequence[sweep.Point]) -> list[tuple[sweep.Point, Bundle | str]]:
        return [(point, "no room") for point in points]

    checkpoint: Any = SimpleNamespace(spec=SPEC, labels=demo.LABELS, record=dict)
    source = datasets.built_in(9, demo.LABELS)
    with AnswerCache(tmp_path / "answers") as cache:
        points = sweep.grid(SPEC, ["onnx-fp32"], keep_tokens=["9"])
        document, made = sweep.run(points, make, source, checkpoint, Rule(min_accuracy=0.5), cache, reach=reach)
    assert made == {}
    assert [row["reason"] for row in document["points"]] == ["no room", "no room"]
    assert (document["device"], document["conditions"], document["winner"], document["front"]) == (None, None, None, [])
    assert document["result"].endswith("no point; the points say why")


@pytest.mark.slow
def test_clips_without_labels_are_judged_by_the_trained_model(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgetube import bundle as bundles
    from edgetube import formats
    from edgetube.bench.answer_cache import AnswerCache
    from edgetube.bench.model_set import Artifact

    bundle = bundles.load(tiny_bundle)
    checkpoint = formats.load(tiny_checkpoint)
    other = replace(bundle, name="broken", build={**bundle.build, "notes": ["another"]})  # with answers of its own
    source = datasets.built_in(6, ())
    assert source.items[0].label is None
    usual = Artifact.open

    def opened(self: Artifact, threads: int | None) -> Any:
        if self.name == "broken":
            raise BackendError("no such device")
        return usual(self, threads)

    monkeypatch.setattr(Artifact, "open", opened)
    with AnswerCache(tmp_path / "answers") as cache:
        ask = sweep.Answers({"one": bundle}, source, checkpoint, cache)
        assert ask(["one"], 0, 2) == {"one": 2}
        assert ask(["one"], 2, 6) == {"one": 4}
    with AnswerCache(tmp_path / "others") as cache:
        ask = sweep.Answers({"one": bundle, "two": other}, source, checkpoint, cache)
        assert ask(["one", "two"], 0, 2) == {"one": 2, "two": "no such device"}


@pytest.mark.slow
def test_clips_may_be_answered_in_other_processes(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    from edgetube import bundle as bundles
    from edgetube import formats
    from edgetube.bench.answer_cache import AnswerCache

    made, source = {"one": bundles.load(tiny_bundle)}, datasets.built_in(6, ())
    with AnswerCache(tmp_path / "answers") as cache:
        runner = partial(workers.in_processes, workers=2)
        ask = sweep.Answers(made, source, formats.load(tiny_checkpoint), cache, 1, runner=runner)
        assert ask(["one"], 0, 6) == {"one": 6}


def row(name: str, ms: float | None, accuracy: float | None, front: bool) -> dict[str, Any]:
    times = {"p50_ms": ms, "p10_ms": ms and 0.9 * ms, "p90_ms": ms and 1.2 * ms}
    ends = {"accuracy_low": accuracy and accuracy - 0.03, "accuracy_high": accuracy and min(1.0, accuracy + 0.02)}
    return (
        {
            "name": name,
            "target": "onnx-fp32",
            "precision": "fp32",
            "front": front,
            "winner": False,
            "macs_ratio": 0.5 if " " in name else 1.0,
            "accuracy": accuracy,
        }
        | times
        | ends
    )


def test_the_picture_is_one_file_with_its_own_colours() -> None:
    rows = [row("onnx-fp32", 8.0, 0.98, True), row("onnx-fp32 <keep9>", 4.0, 0.9, True), row("gone", None, None, False)]
    text = sweep.picture({"points": rows, "data": {"quality": "top1"}})
    root = ElementTree.fromstring(text)  # well-formed
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "--c0: #" in text
    assert "prefers-color-scheme: dark" in text
    assert "#000001" not in text
    words = "".join(root.itertext())
    assert "onnx-fp32 <keep9>" in words
    assert "gone" not in words
    assert "top-1, %" in words
    with pytest.raises(InputError, match="nothing to draw"):
        sweep.picture({"points": rows[2:], "data": {"quality": "top1"}})


def test_of_many_points_the_picture_names_the_front_and_the_trained_model() -> None:
    some = [row(f"onnx-fp32 keep{n}", 9.0 - 0.1 * n, 0.9 - 0.001 * n, False) for n in range(6)]
    found = [row("onnx-fp32", 8.0, 0.98, False), row("onnx-fp32 keep60", 4.0, 0.98, True)]
    for rows, names in ((some + found, 8), ([*some, *found, row("onnx-fp32 keep70", 9.0, 0.9, False)], 2)):
        root = ElementTree.fromstring(sweep.picture({"points": rows, "data": {"quality": "top1"}}))
        words = [each.text or "" for each in root.iter("{http://www.w3.org/2000/svg}text")]
        shown = [word for word in words if word.startswith("onnx-fp32")]
        assert len(shown) == names
        assert {"onnx-fp32", "onnx-fp32 keep60"} <= set(shown)


@pytest.mark.slow
def test_a_sweep_of_two_points_and_again(
    edgetube_cli: Cli, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgetube import bundle as bundles
    from edgetube import runtimes

    out = tmp_path / "out"
    args = [
        "sweep", "--target", "onnx-fp32", "--checkpoint", tiny_checkpoint, "--keep-tokens", "6;1", "--pareto",
        "--head", "motion", "--clips", 9, "--seconds", 0.05, "--lowering", "gather", "--out", out, "--json",
    ]  # fmt: skip
    code, text, _ = edgetube_cli(*args)
    assert code == 0
    document = json.loads(text)
    assert json.loads((out / "sweep.json").read_text("utf-8")) == document
    assert ElementTree.parse(out / "sweep.svg").getroot().tag.endswith("svg")
    full, fewer, none = document["points"]
    assert (full["name"], full["macs_ratio"], full["tokens"]) == ("onnx-fp32", 1.0, 12)
    assert fewer["name"] == "onnx-fp32 keep6"
    assert 0.5 < fewer["macs_ratio"] < 1
    assert "can merge" in none["reason"]
    assert none["accuracy"] is None
    names = [one["name"] for one in document["points"] if one["front"]]
    assert sorted(document["front"]) == sorted(names)
    assert names
    assert len(document["kept"]) == len(names)
    for path in document["kept"]:
        assert bundles.load(path).status == "executed"  # complete, and its files are those of the proof
    answered = [one for one in document["points"] if one["clips"] == 9]
    assert answered
    source = datasets.built_in(9, demo.LABELS)
    for one in answered:
        bundle = bundles.load(one["bundle"])
        with runtimes.open_bundle(bundle) as backend:
            right = [
                bundle.labels[int(backend(item.read(bundle.contract).frames[None]).argmax())] == item.label
                for item in source.items
            ]
        assert one["accuracy"] == pytest.approx(sum(right) / 9)

    def refuse(*_: object) -> None:
        raise AssertionError("a resumed sweep exports or answers again")

    monkeypatch.setattr("edgetube.export.points.ExportSession", refuse)
    monkeypatch.setattr("edgetube.bench.model_set.OpenedModels.ask", refuse)
    code, text, _ = edgetube_cli(*args)
    assert code == 0
    before, after = (
        {one["name"]: one["accuracy"] for one in points if one["clips"] == 9}
        for points in (document["points"], json.loads(text)["points"])
    )
    both = before.keys() & after.keys()  # times differ, so another point may have left
    assert both
    assert {name: before[name] for name in both} == {name: after[name] for name in both}


@pytest.mark.slow
def test_views_multiply_the_time_and_average_the_answers(
    edgetube_cli: Cli, tiny_checkpoint: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    from edgetube import bundle as bundles
    from edgetube import formats, runtimes
    from edgetube.bench.answer_cache import AnswerCache

    data, out = tmp_path / "clips", tmp_path / "out"
    for index in range(6):  # of another size and length than the model's, so that views differ
        (folder := data / demo.LABELS[index % 2]).mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{index}.npy", rng.integers(0, 256, (24, 40, 90, 3), np.uint8))
    code, text, _ = edgetube_cli(
        "sweep", "--target", "onnx-fp32", "--checkpoint", tiny_checkpoint, "--pareto", "--head", "motion",
        "--views", "1x1", "--views", "2x3", "--data", data, "--seconds", 0.05, "--lowering", "gather", "--out", out,
        "--json",
    )  # fmt: skip
    assert code == 0
    document = json.loads(text)
    one, six = document["points"]
    assert (one["name"], six["name"]) == ("onnx-fp32 1x1 views", "onnx-fp32 2x3 views")
    assert (one["views"], six["views"]) == ({"temporal": 1, "spatial": 1}, {"temporal": 2, "spatial": 3})
    assert (one["macs_ratio"], six["macs_ratio"]) == (1.0, 6.0)
    assert one["bundle"] == six["bundle"]
    kept = [Path(path) for path in document["kept"]]
    assert len(kept) == len({*kept}) >= 1
    assert {path.parent for path in kept} == {out}
    for key in ("p50_ms", "p50_low_ms", "p50_high_ms", "p10_ms", "p90_ms"):
        assert six[key] == pytest.approx(6 * one[key])
    assert six["noise"] == one["noise"]
    assert "all views of a clip, 2x3 at most" in document["notes"][0]
    bundle = bundles.load(six["bundle"])
    source = datasets.load(data, bundle.contract)
    right = 0
    with runtimes.open_bundle(bundle) as backend:
        for item in source.items:
            shown = np.stack([clip.frames for clip in item.clips(bundle.contract, Views(2, 3))])
            logits = np.concatenate([backend(frames[None]) for frames in shown]).astype(np.float64)
            scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
            right += bundle.labels[int(scores.mean(axis=0).argmax())] == item.label
    with AnswerCache(tmp_path / "answers") as cache:
        ask = sweep.Answers({"six": bundle}, source, formats.load(tiny_checkpoint), cache, views={"six": Views(2, 3)})
        assert ask(["six"], 0, 6) == {"six": right}
    assert one["clips"] == 6


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--pareto", "--views", "2x2"], "expected 1 or 3"),
        (["--pareto", "--views", "2x3"], "have one view, not 2x3"),
        ([], "one of --budget-ms, --min-top1, --min-agreement and --pareto"),
        (["--pareto", "--budget-ms", 3], "one of --budget-ms"),
        (["--min-top1", 97], "0 to 1"),
        (["--min-top1", "nan"], "--min-top1 is nan"),
        (["--pareto", "--reduce", "shrink"], "merge or drop"),
        (["--pareto", "--clips", 0], "--clips is 0"),
        (["--pareto", "--keep-tokens", "12;few"], "'few'"),
        (["--pareto", "--size", "wide"], "--size is 'wide'"),
        (["--pareto", "--target", "nothing"], "nothing"),
        (["--min-agreement", 0.9], "give --min-top1 instead"),
    ],
)
def test_command_lines_that_are_refused(
    edgetube_cli: Cli, tiny_checkpoint: Path, tmp_path: Path, more: list[Any], said: str
) -> None:
    out = tmp_path / "out"
    code, text, err = edgetube_cli(
        "sweep", "--target", "onnx-fp32", "--checkpoint", tiny_checkpoint, "--out", out, *more
    )
    assert code == 2
    assert said in err
    assert not text
    assert not out.exists()
