"""Which linears fall back: the search against trying every number of them, verdicts against counting by hand."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from edgetube.calibration import search
from edgetube.calibration.clips import Clips
from edgetube.calibration.graphs import linears
from edgetube.calibration.layerwise import CalibrationState
from edgetube.calibration.search import AccuracyBudget, Judged, SearchResult, Verdict
from edgetube.errors import ParityError
from edgetube.roles import GraphRoles
from edgetube.video import Frames

HOLDS = Verdict(100, True, 1.0, 1.0, 1.0, 40.0, 0.0, 1.0)
FAILS = Verdict(100, True, 0.5, 1.0, 0.5, 3.0, 50.0, 1.0)


def graph(sizes: dict[str, tuple[int, int, int]]) -> onnx.ModelProto:
    """Linears by name, each of its own input: (rows, K, N)."""
    nodes, inputs, types, tensors = [], [], [], []
    for name, (rows, depth, width) in sizes.items():
        nodes.append(helper.make_node("MatMul", [f"{name}.in", f"{name}.weight"], [f"{name}.out"], name=name))
        types.append(helper.make_tensor_value_info(f"{name}.in", onnx.TensorProto.FLOAT, [1, rows, depth]))
        inputs.append(types[-1])
        tensors.append(numpy_helper.from_array(np.zeros((depth, width), np.float32), f"{name}.weight"))
    out = [helper.make_tensor_value_info(nodes[-1].output[0], onnx.TensorProto.FLOAT, None)]
    return helper.make_model(helper.make_graph(nodes, "g", inputs, out, tensors, value_info=types))


@dataclass
class Stub:
    """What the search asks of a calibrator."""

    model: onnx.ModelProto

    def __post_init__(self) -> None:
        self.linears = linears(self.model)
        self.roles = GraphRoles("tokens", linears=tuple(each.name for each in self.linears if each.name != "head"))


def clips(labels: list[int]) -> Clips:
    names = tuple(f"{i}" for i in range(len(labels)))
    return Clips("x", np.zeros((len(labels), 1, 1, 1, 3), np.uint8), np.array(labels), names, "")


def run(
    monkeypatch: pytest.MonkeyPatch,
    sizes: dict[str, tuple[int, int, int]],
    sensitive: dict[str, float],
    ranking: dict[str, float] | None = None,
    hidden: Collection[str] = (),
) -> tuple[SearchResult, list[frozenset[str]]]:
    """A search where the budget holds when nothing in `sensitive` is quantised; what was tried, too.

    Args:
        hidden: of `sensitive`, those that only all of the clips tell.
    """
    tried: list[frozenset[str]] = []

    def attempt(
        calibrator: Any, state: Any, budget: Any, quantised: frozenset[str], most: Any = None, known: Any = None
    ) -> Judged:
        if known is None:
            tried.append(quantised)
        state.biases = {name: np.zeros(1, np.float32) for name in quantised}
        fails = quantised & ({*sensitive} - ({*hidden} if most else {*()}))
        return Judged(FAILS if fails else HOLDS, np.zeros((1, 2), np.float32), state.biases)

    monkeypatch.setattr(search, "_evaluate", attempt)
    found = {name: sensitive.get(name, 0.001) for name in sizes} if ranking is None else ranking
    monkeypatch.setattr(search, "rank", lambda calibrator, state, budget, names: {n: found[n] for n in names})
    stub: Any = Stub(graph(sizes))
    state, budget = CalibrationState(), AccuracyBudget(clips([0]), np.zeros((1, 2), np.float32), None)
    result = search.search(stub, state, budget)
    assert state.biases.keys() == result.quantised  # biases are those of the result
    return result, tried


BLOCKS = {f"blocks.{i}.mlp.fc1": (10, 4, 8) for i in range(8)}


class TestWhatIsQuantised:
    def test_everything_when_the_budget_holds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found, tried = run(monkeypatch, BLOCKS, {})
        assert (found.quantised, found.reasons, found.ranking) == (frozenset(BLOCKS), {}, {})
        assert tried == [frozenset(BLOCKS)]
        assert found.verdict is HOLDS

    @pytest.mark.parametrize(
        ("head", "admitted"),
        [
            ((1, 4, 8), True),  # 1.2 % of the work, 11 % of the weights
            ((100, 1, 2), True),  # 7 % of the work, 0.8 % of the weights
            ((1, 1, 2), True),  # 0.08 % of the work, 0.8 % of the weights
        ],
    )
    def test_a_linear_outside_of_the_blocks_has_to_be_worth_it(
        self, monkeypatch: pytest.MonkeyPatch, head: tuple[int, int, int], admitted: bool
    ) -> None:
        found, _ = run(monkeypatch, {**BLOCKS, "head": head}, {})
        assert ("head" in found.quantised) == admitted

    def test_one_that_is_not_says_what_it_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A block has 4000 weights and 40000 multiplications; half a percent is the bound."""
        large = {"blocks.0.x": (10, 80, 50)}
        found, _ = run(monkeypatch, {**large, "head": (1, 2, 2)}, {})
        assert found.quantised == frozenset(large)
        assert found.reasons == {"head": "0.0% of the work, 0.1% of the weights"}
        found, _ = run(monkeypatch, {**large, "head": (1, 10, 2)}, {})
        assert found.reasons == {"head": "0.0% of the work, 0.5% of the weights"}  # 20 / 4020 = 0.4975 %
        found, _ = run(monkeypatch, {**large, "head": (1, 3, 7)}, {})
        assert found.quantised == {*large, "head"}  # 21 / 4021 = 0.5223 %
        found, _ = run(monkeypatch, {**large, "blocks.0.small": (1, 1, 2)}, {})
        assert found.quantised == {*large, "blocks.0.small"}


class TestFallback:
    @pytest.mark.parametrize("count", [1, 2, 3, 4])
    def test_as_few_as_possible_fall_back(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        """The worst first; half of the work may."""
        sensitive = {f"blocks.{i}.mlp.fc1": 0.9 - 0.1 * i for i in range(count)}
        found, tried = run(monkeypatch, BLOCKS, sensitive)
        assert found.quantised == frozenset(BLOCKS) - {*sensitive}
        assert found.reasons == {n: f"fell back: alone it moves the logits by {r:.1%}" for n, r in sensitive.items()}
        assert found.ranking.keys() == BLOCKS.keys()
        assert found.verdict is HOLDS
        assert tried[0] == frozenset(BLOCKS)
        assert len({*tried}) == len(tried)  # each takes minutes: no number is tried again

    @pytest.mark.parametrize("hidden", [1, 2, 3, 4])
    def test_what_passes_by_some_clips_has_to_pass_by_all(self, monkeypatch: pytest.MonkeyPatch, hidden: int) -> None:
        names = list(BLOCKS)[:4]
        sensitive = {name: 0.9 - 0.1 * i for i, name in enumerate(names)}
        found, tried = run(monkeypatch, BLOCKS, sensitive, hidden=names[4 - hidden :])
        assert found.quantised == frozenset(BLOCKS) - {*sensitive}
        assert found.verdict is HOLDS
        assert len({*tried}) == len(tried)

    def test_none_passes_by_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sensitive = dict.fromkeys(BLOCKS, 0.5)
        with pytest.raises(ParityError, match=r"INT8 loses 50\.00 points .* with the 4 most sensitive of 8 linears in"):
            run(monkeypatch, BLOCKS, sensitive, hidden=BLOCKS)

    def test_no_more_than_half_of_the_work(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sensitive = {f"blocks.{i}.mlp.fc1": 0.9 - 0.1 * i for i in range(5)}
        with pytest.raises(ParityError, match=r"INT8 loses 50\.00 points .* with the 4 most sensitive of 8 linears in"):
            run(monkeypatch, BLOCKS, sensitive)

    def test_the_ranking_decides_who_falls(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Three in front of the one that hurts fall with it."""
        names = list(BLOCKS)
        ranking = {name: 0.9 - 0.1 * i for i, name in enumerate(names)}
        found, _ = run(monkeypatch, BLOCKS, {names[3]: 1.0}, ranking)
        assert found.quantised == frozenset(names[4:])

    @given(work=st.lists(st.integers(1, 20), min_size=1, max_size=12), budget=st.integers(0, 150))
    def test_what_may_fall_back(self, work: list[int], budget: int) -> None:
        names = [f"{i}" for i in range(len(work))]
        by_hand = max(count for count in range(len(work) + 1) if sum(work[:count]) <= budget)
        assert search._max_fallbacks(names, dict(zip(names, work, strict=True)), budget) == by_hand


@given(high=st.integers(0, 40), answer=st.integers(1, 41), low=st.integers(1, 41), guess=st.integers(-3, 60))
def test_the_smallest_that_fits_is_found_from_any_guess(high: int, answer: int, low: int, guess: int) -> None:
    tried: list[int] = []

    def fits(count: int) -> bool:
        assert low <= count <= high
        tried.append(count)
        return count >= answer

    expected = min((count for count in range(low, high + 1) if count >= answer), default=high + 1)
    assert search._smallest(low, high, fits, guess) == max(expected, min(low, high + 1)) or low > high
    assert len({*tried}) == len(tried)
    if guess in (answer, answer - 1) and low <= guess <= high:
        assert len(tried) <= 3


class TestGuess:
    def test_by_hand(self) -> None:
        """100 clips without labels, gaps of 0.2 and of 2, logits of 1 on average: what is left has to be well below."""
        logits = np.tile(np.array([[1.0, 1.0]], np.float32), (100, 1))
        logits[:50] += [0.1, -0.1]
        logits[50:] += [1, -1]
        budget = AccuracyBudget(clips([-1] * 100), logits, None)
        assert search._guess(budget, [1.0, 0.5, 0.3, 0.01, 0.01]) == 3
        assert search._guess(budget, [1.0, 0.01, 0.01]) == 1
        assert search._guess(budget, [1.0, 1.0, 1.0]) == 3
        assert search._guess(AccuracyBudget(clips([-1] * 100), logits, 30.0), [1.0, 0.5, 0.3, 0.01]) == 1

    def test_one_class(self) -> None:
        assert search._guess(AccuracyBudget(clips([0]), np.ones((1, 1), np.float32), None), [1.0, 0.5]) == 1


class TestVerdict:
    def answers(self, picks: list[int]) -> npt.NDArray[np.float32]:
        return np.eye(4, dtype=np.float32)[picks]

    def test_by_hand(self) -> None:
        """Ten clips of one label: nine right in floating point, seven of them in int8, and one that was wrong."""
        budget = AccuracyBudget(clips([1] * 10), self.answers([1] * 9 + [2]), None)
        found = budget.verdict(self.answers([1] * 7 + [0, 0, 1]))
        assert (found.clips, found.labelled) == (10, True)
        assert (found.top1_float, found.top1) == (0.9, 0.8)
        assert found.agreement == 0.7
        assert found.loss == pytest.approx(10)
        assert found.sqnr == pytest.approx(10 * np.log10(10 / 6))
        assert found.budget == 10  # one clip of ten
        assert found.within_budget
        assert str(found) == "10.00 points of top-1 on 10 clips, 10.00 allowed"

    def test_without_a_label_agreement_counts(self) -> None:
        budget = AccuracyBudget(clips([1] * 9 + [-1]), self.answers([1] * 10), None)
        found = budget.verdict(self.answers([1] * 8 + [0, 0]))
        assert (found.labelled, found.top1, found.top1_float) == (False, None, None)
        assert found.loss == pytest.approx(20)
        assert not found.within_budget
        assert str(found) == "20.00 % of the answers on 10 clips, 10.00 allowed"
        assert found.to_json()["loss"] == found.loss

    @pytest.mark.parametrize(
        ("labels", "budget"),
        [([1] * 400, 0.5), ([-1] * 400, 1.0), ([1] * 100, 1.0), ([1] * 18, 100 / 18), ([-1] * 64, 100 / 64)],
    )
    def test_budgets(self, labels: list[int], budget: float) -> None:
        """Half a point of accuracy, one of agreement, and never less than one clip."""
        exact = self.answers([1] * len(labels))
        assert AccuracyBudget(clips(labels), exact, None).verdict(exact).budget == budget

    def test_the_first_label_is_a_label(self) -> None:
        budget = AccuracyBudget(clips([0] * 4), self.answers([0] * 4), None)
        found = budget.verdict(self.answers([0, 0, 0, 1]))
        assert (found.labelled, found.top1_float, found.top1) == (True, 1.0, 0.75)

    @pytest.mark.parametrize(("labels", "holds"), [([1] * 18, 1.0), ([-1] * 18, 12.0)])
    def test_a_budget_that_was_given_is_never_loosened(self, labels: list[int], holds: float) -> None:
        """18 clips: one of them is 5.6 points, two are 11.1."""
        budget = AccuracyBudget(clips(labels), self.answers([1] * 18), holds)
        found = budget.verdict(self.answers([1] * 16 + [0] * 2))
        assert found.loss == pytest.approx(200 / 18)
        assert (found.within_budget, found.budget) == (holds == 12, holds)

    @pytest.mark.parametrize(
        ("max_drop", "says"),
        [
            (
                1.0,
                "a budget of 1 points can be decided by at least 100 clips; 18 judged, one of which is 5.6 points, so "
                "none may be lost: give --calib more clips",
            ),
            (0.3, "by at least 334 clips"),
            (0.0, "by no number of clips"),
            (5.5, "by at least 19 clips"),
            (6.0, ""),
            (None, ""),
        ],
    )
    def test_how_many_clips_a_budget_takes_is_said(self, max_drop: float | None, says: str) -> None:
        note = AccuracyBudget(clips([1] * 18), self.answers([1] * 18), max_drop).note
        assert says in note
        assert bool(note) == bool(says)
        assert AccuracyBudget(clips([1] * 20), self.answers([1] * 20), 5.0).note == ""  # just one clip

    def test_exactly_the_budget_holds(self) -> None:
        budget = AccuracyBudget(clips([1] * 1000), self.answers([1] * 1000), None)
        for wrong, holds in ((5, True), (6, False)):
            assert budget.verdict(self.answers([1] * (1000 - wrong) + [0] * wrong)).within_budget == holds

    @pytest.mark.parametrize("label", [1, -1])
    def test_one_clip_may_change_its_mind(self, label: int) -> None:
        """Of 18, where that is 5.6 points."""
        budget = AccuracyBudget(clips([label] * 18), self.answers([1] * 18), None)
        for wrong, holds in ((1, True), (2, False)):
            assert budget.verdict(self.answers([1] * (18 - wrong) + [0] * wrong)).within_budget == holds


class TestExceeded:
    """Judging stops where no verdict could change."""

    def outcomes(self, labels: list[int], exact: list[int], found: list[int], max_drop: float | None) -> int:
        """After how many clips the budget is exceeded; 0 if it never is. Checks that against every continuation."""
        classes = np.eye(3, dtype=np.float32)
        budget = AccuracyBudget(clips(labels), classes[exact], max_drop)
        for count in range(1, len(found) + 1):
            rests = itertools.product(range(3), repeat=len(found) - count)
            lost = not any(budget.verdict(classes[[*found[:count], *rest]]).within_budget for rest in rests)
            assert budget.verdict(classes[found[:count]]).within_budget != lost
            if lost:
                return count
        return 0

    @given(data=st.data(), size=st.integers(1, 5), max_drop=st.sampled_from([None, 0.0, 20.0, 34.0, 70.0]))
    def test_only_when_every_continuation_exceeds_it(self, data: Any, size: int, max_drop: float | None) -> None:
        picks = st.lists(st.integers(0, 2), min_size=size, max_size=size)
        labels = data.draw(st.one_of(picks, st.just([-1] * size)))
        stopped = self.outcomes(labels, data.draw(picks), found := data.draw(picks), max_drop)
        assert 0 <= stopped <= len(found)

    def test_the_clips_that_follow_are_not_shown(self) -> None:
        """Of ten clips without labels one may change; the third and the fifth do."""
        frames = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1, 1)
        seen = Clips("x", frames, np.full(10, -1), tuple("abcdefghij"), "")
        shown: list[int] = []

        def answer(frames: Frames) -> npt.NDArray[np.float32]:
            shown.append(int(frames.flat[0]))
            return np.eye(2, dtype=np.float32)[[int(shown[-1] in (2, 4))]]

        budget = AccuracyBudget(seen, np.eye(2, dtype=np.float32)[[0] * 10], None)
        verdict = search.judge(answer, budget).verdict
        assert shown == [0, 1, 2, 3, 4]
        assert (verdict.clips, verdict.left, verdict.agreement, verdict.within_budget) == (5, 5, 0.6, False)
        assert str(verdict) == "at least 20.00 % of the answers on 10 clips, 10.00 allowed"

        shown.clear()  # near ties are asked first
        exact = np.eye(2, dtype=np.float32)[[0] * 10]
        exact[[7, 4, 2], 1] = 0.5, 0.6, 0.7
        budget = AccuracyBudget(seen, exact, None)
        assert search.judge(answer, budget).verdict.clips == 2
        assert shown == [2, 4]

        shown.clear()  # what is known is not asked again, and a whole verdict is that of the clips in their order
        budget = AccuracyBudget(seen, exact, 20.0)
        some = search.judge(answer, budget, most=4)
        assert (some.verdict.clips, some.verdict.left, some.verdict.within_budget) == (4, 6, True)
        assert shown == [2, 4, 7, 0]
        whole = search.judge(answer, budget, known=some.logits)
        assert shown == [2, 4, 7, 0, 1, 3, 5, 6, 8, 9]
        answers = np.eye(2, dtype=np.float32)[[int(i in (2, 4)) for i in range(10)]]
        np.testing.assert_array_equal(whole.logits[np.argsort(budget.order)], answers)
        assert whole.verdict == budget.verdict(answers)
        assert (whole.verdict.left, whole.verdict.agreement) == (0, 0.8)


class TestSafeMargins:
    """Judging stops where no answer that is left can change."""

    def budget(self, count: int = 120, max_drop: float | None = None, label: int = -1) -> AccuracyBudget:
        """Clip i has a margin of i + 1, and all have 3 classes."""
        frames = np.arange(count, dtype=np.uint8).reshape(count, 1, 1, 1, 1)
        exact = np.zeros((count, 3), np.float32)
        exact[:, 1] = np.arange(1, count + 1)
        seen = Clips("x", frames, np.full(count, label), tuple(f"{i:03}" for i in range(count)), "")
        return AccuracyBudget(seen, exact, max_drop)

    def judge(self, budget: AccuracyBudget, errors: npt.NDArray[Any], **how: Any) -> tuple[Judged, list[int]]:
        """Judge the float answers plus errors (N, 3); what was shown, too."""
        shown: list[int] = []

        def answer(frames: Frames) -> npt.NDArray[np.float32]:
            shown.append(int(frames.flat[0]))
            return np.float32(budget.logits[shown[-1]] + errors[shown[-1]])[None]

        return search.judge(answer, budget, **how), shown

    def test_the_nearest_come_first_then_some_of_all(self) -> None:
        order = self.budget().order.tolist()
        assert order[:32] == list(range(32))
        assert order[32:47] == list(range(32, 120, 6))
        assert order[47:] == [i for i in range(32, 120) if (i - 32) % 6]
        assert sorted(order) == list(range(120))
        assert self.budget(20).order.tolist() == list(range(20))
        large = self.budget(200).order.tolist()  # whose first quarter screens
        assert (large[:50], large[50:65]) == (list(range(50)), list(range(50, 200, 10)))

    def test_by_hand(self) -> None:
        """Each clip moves by 0.9 towards a class and 1.2 towards the other: 8 deviations are 8.5, the smallest margin
        after 48 clips is 35. Only the first clip, with a margin of 1, changes."""
        errors = np.tile([0.9, 0.0, 1.2], (120, 1))
        found, shown = self.judge(self.budget(), errors)
        assert shown == self.budget().order.tolist()[:48]
        verdict = found.verdict
        assert (verdict.clips, verdict.left, verdict.certain, verdict.within_budget) == (48, 0, 72, True)
        assert verdict.agreement == 1 - 1 / 120
        assert verdict.loss == pytest.approx(100 / 120)
        assert str(verdict) == "0.83 % of the answers on 120 clips, 1.00 allowed"
        signal = np.square(self.budget().logits[shown]).sum()
        assert verdict.sqnr == pytest.approx(10 * np.log10(signal / (48 * (0.9**2 + 1.2**2))))

    @pytest.mark.parametrize("size", [4.0, 4.4, 6.0, 10.0, 14.0, 30.0])
    def test_margins_are_8_deviations_of_the_worst_clip(self, size: float) -> None:
        """One clip of the 48 moves away from all others by `size`, which changes nothing; margins have to exceed 8
        times that."""
        errors = np.zeros((120, 3))
        errors[110, 1] = size
        budget = self.budget()
        assert 110 in budget.order[:48]
        found, shown = self.judge(budget, errors)
        order = budget.order.tolist()
        by_hand = next(n for n in range(48, 121) if all(i + 1 > 8 * size for i in order[n:]))
        assert len(shown) == by_hand == found.verdict.clips
        assert (by_hand == 48) == (size < 35 / 8)

    def test_margins_are_twice_the_largest_movement(self) -> None:
        """With 600 classes one may move much further than 8 deviations."""
        budget = self.budget()
        exact = np.concatenate([budget.logits, np.zeros((120, 597), np.float32)], axis=1)
        wide = AccuracyBudget(budget.clips, exact, None)
        found = exact[wide.order[:48]].copy()
        found[40, 7] += 17.4
        assert 8 * 17.4 / np.sqrt(599) < 17.4
        assert wide.decided(found)
        found[40, 7] += 0.2
        assert not wide.decided(found)

    def test_all_are_answered_with_a_budget_that_was_given(self) -> None:
        found, shown = self.judge(self.budget(max_drop=5.0), np.zeros((120, 3)))
        assert (len(shown), found.verdict.clips, found.verdict.certain) == (120, 120, 0)

    def test_least(self) -> None:
        found, shown = self.judge(self.budget(), np.zeros((120, 3)), least=60)
        assert (len(shown), found.verdict.certain) == (60, 60)

    def test_what_is_known_may_decide(self) -> None:
        budget = self.budget()
        _, shown = self.judge(budget, np.zeros((120, 3)), known=budget.logits[budget.order[:50]])
        assert not shown

    def test_labels(self) -> None:
        """Answers that are certain are right where the float graph's are."""
        found, _ = self.judge(self.budget(label=1), np.zeros((120, 3)))
        assert (found.verdict.top1, found.verdict.top1_float, found.verdict.certain) == (1.0, 1.0, 72)
        found, _ = self.judge(self.budget(label=2), np.zeros((120, 3)))
        assert (found.verdict.top1, found.verdict.top1_float, found.verdict.agreement) == (0.0, 0.0, 1.0)

    def test_one_class_is_never_decided(self) -> None:
        budget = AccuracyBudget(clips([-1] * 60), np.ones((60, 1), np.float32), None)
        assert not budget.decided(np.ones((50, 1), np.float32))

    @pytest.mark.parametrize("seed", range(6))
    def test_the_verdict_is_that_of_all_clips(self, seed: int) -> None:
        """With Gaussian errors of any size."""
        rng = np.random.default_rng(seed)
        exact = rng.normal(size=(200, 5)).astype(np.float32)
        frames = np.arange(200, dtype=np.uint8).reshape(200, 1, 1, 1, 1)
        budget = AccuracyBudget(Clips("x", frames, np.full(200, -1), tuple(map(str, range(200))), ""), exact, None)
        errors = rng.normal(size=(200, 5)) * 10.0 ** -rng.integers(1, 4)
        found, _ = self.judge(budget, errors)
        whole = budget.verdict(np.float32(exact + errors))
        assert found.verdict.within_budget == whole.within_budget
        if found.verdict.within_budget:
            assert (found.verdict.agreement, found.verdict.loss) == (whole.agreement, whole.loss)
            assert found.verdict.clips + found.verdict.certain == 200


def test_answers_are_those_to_every_clip_in_its_order(tmp_path: Path) -> None:
    frames = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1, 1).repeat(3, axis=-1)
    seen = Clips("x", frames, np.zeros(5, int), tuple("abcde"), "")
    stages: list[Any] = []

    def open_graph(model: onnx.ModelProto) -> Any:
        return lambda feeds: [np.array([[feeds["a.in"].sum(), 1]], np.float32)]

    found = search.compute_logits(graph({"a": (1, 1, 2)}), seen, open_graph, "s", lambda *s: stages.append(s))
    np.testing.assert_array_equal(found, [[0, 1], [3, 1], [6, 1], [9, 1], [12, 1]])
    assert stages[0] == ("s", 0, 5)
    some = search.compute_logits(graph({"a": (1, 1, 2)}), seen, open_graph, "s", some=np.array([3, 1]))
    np.testing.assert_array_equal(some, [[9, 1], [3, 1]])


class RankStub(Stub):
    """A calibrator whose graphs are the names of what they quantise, with the clips that each was run on."""

    input = "frames"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seen: dict[str, list[int]] = {}
        self.steps: list[tuple[str, int, int]] = []

    def progress(self, *step: Any) -> None:
        self.steps.append(step)

    def one_by_one(self, state: CalibrationState, names: frozenset[str], clips: list[Any]) -> Any:
        assert not state.biases
        for name in sorted(names):
            new = [int(clip.flat[0]) for clip in clips]
            self.seen[name] = [*self.seen.get(name, []), *new]
            yield name, np.array([[1, clip] for clip in new], np.float32) * (1 + 0.1 * int(name))


@pytest.mark.parametrize(
    ("count", "few", "step"),
    [
        (1, [0], 1),
        (2, [0, 1], 1),
        (3, [0, 1], 1),
        (7, [0, 3], 1),
        (8, [0, 4], 1),
        (15, [0, 4], 1),
        (16, [0, 8], 2),
        (25, [0, 12], 3),
    ],
)
@pytest.mark.parametrize(("expected", "again"), [(1, "89"), (2, "6789"), (9, "123456789")])
def test_the_ranking_is_the_relative_error_of_each_alone(
    monkeypatch: pytest.MonkeyPatch, count: int, few: list[int], step: int, expected: int, again: str
) -> None:
    """On two clips; that of a sixth, or of twice as many as are expected to fall back, on 8 spread evenly or on all."""
    monkeypatch.setattr(search, "_guess", lambda *_: expected)
    frames = np.arange(count, dtype=np.uint8).reshape(count, 1, 1, 1, 1)
    exact = np.stack([np.ones(count), np.arange(count)], axis=1).astype(np.float32)
    seen = Clips("x", frames, np.zeros(count, int), tuple(map(str, range(count))), "")
    ranker = RankStub(graph({"a": (1, 1, 2)}))
    stub: Any = ranker
    state = CalibrationState(biases={"x": np.array([1], np.float32)})
    found = search.rank(stub, state, AccuracyBudget(seen, exact, None), frozenset("123456789"))
    assert found == {str(i): pytest.approx(0.1 * i, rel=1e-5) for i in range(1, 10)}
    some = [i * step for i in range(min(count, 8))]
    whole = again if count > 2 else ""
    every = [*few, *(i for i in some if i not in few)]
    assert ranker.seen == {name: every if name in whole else few for name in "123456789"}
    steps = [("rank linears", done, 9) for done in range(10)]
    steps += [("rank the most sensitive", done, len(whole)) for done in range(len(whole) + 1) if whole]
    assert ranker.steps == steps


@pytest.mark.parametrize(("macs", "count"), [(5e10, 8), (1e11, 4), (9e11, 2)])
def test_the_ranking_takes_fewer_clips_of_much_work(monkeypatch: pytest.MonkeyPatch, macs: float, count: int) -> None:
    """As many as take 4e11 multiply-accumulates, and at least 2."""
    monkeypatch.setattr("edgetube.calibration.graphs.macs", lambda _: {"a": macs / 2, "b": macs / 2})
    frames = np.arange(20, dtype=np.uint8).reshape(20, 1, 1, 1, 1)
    seen = Clips("x", frames, np.zeros(20, int), tuple(map(str, range(20))), "")
    ranker = RankStub(graph({"a": (1, 1, 2)}))
    stub: Any = ranker
    search.rank(stub, CalibrationState(), AccuracyBudget(seen, np.ones((20, 2), np.float32), None), frozenset({"1"}))
    assert len(ranker.seen["1"]) == count


def test_a_budget_on_the_first_clips_knows_nothing_of_the_others() -> None:
    """Two answers of 32 that changed are 6 points of those, whatever 220 others might give."""
    logits = np.random.default_rng(0).normal(size=(252, 5)).astype(np.float32)
    budget = AccuracyBudget(clips([-1] * 252), logits, None)
    few = budget.first(32)
    assert (len(few.clips), few.clips.names[-1], few.points) == (32, "31", 100 / 32)
    changed = logits[:32].copy()
    changed[:2] *= -1
    found = few.verdict(changed)
    assert (found.clips, found.left, found.loss) == (32, 0, pytest.approx(100 * 2 / 32))
    assert not found.within_budget
    assert budget.verdict(changed).within_budget  # at best
