"""Answers that survive the process that made them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetube import bundle as bundles
from edgetube import datasets
from edgetube.bench import model_set, parity, workers
from edgetube.bench.answer_cache import AnswerCache, clip_key
from edgetube.datasets import ClipSet
from edgetube.errors import InputError
from edgetube.views import SINGLE, Views


def test_answers_come_back_as_they_were(tmp_path: Path, rng: np.random.Generator) -> None:
    logits = rng.normal(size=(1200, 3)).astype(np.float32)
    names = [f"clip {i}" for i in range(1200)]
    with AnswerCache(tmp_path / "answers") as answer_cache:
        answer_cache.put("model", zip(names, [None, "a"] * 600, logits, strict=True))
    with AnswerCache(tmp_path / "answers") as answer_cache:
        found = answer_cache.get("model", [*names, "another"])
        assert answer_cache.get("another model", names) == {}
    assert list(found) != []
    assert set(found) == set(names)
    np.testing.assert_array_equal(np.stack([found[name][1] for name in names]), logits)
    assert [found[name][0] for name in names[:2]] == [None, "a"]


def test_a_file_that_is_no_answer_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("x" * 5000)
    with pytest.raises(InputError, match="cannot be used as an answer cache"):
        AnswerCache(tmp_path / "text")
    with pytest.raises(InputError, match="give --resume a new file in a folder that exists"):
        AnswerCache(tmp_path / "nowhere" / "file")


def test_a_clip_is_known_by_name_version_and_input(tmp_path: Path, tiny_bundle: Path, rng: np.random.Generator) -> None:
    contract = bundles.load(tiny_bundle).contract
    file = tmp_path / "clip.npy"
    np.save(file, rng.integers(0, 256, contract.shape, np.uint8))
    (before,) = datasets.load(file).items
    assert clip_key(before, contract) == clip_key(datasets.load(file).items[0], contract)
    assert clip_key(before, contract) != clip_key(before, replace(contract, fps=5.0))
    np.save(file, rng.integers(0, 256, (3, *contract.shape[1:]), np.uint8))
    assert clip_key(before, contract) != clip_key(datasets.load(file).items[0], contract)


class Counting:
    """Runs jobs here, counts what is asked, and stops as if it were killed."""

    def __init__(self, stop_after: Any = None) -> None:
        self.asked: list[Any] = []
        self.stop_after = stop_after

    def __call__(self, models: Any, jobs: Any) -> Iterator[Any]:
        for job, result in workers.here(models, jobs):
            if len(self.asked) == self.stop_after:
                raise KeyboardInterrupt
            self.asked.append(job)
            yield job, result


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_set, "CHUNK", 2)


def test_a_run_that_is_cut_off_goes_on(tiny_bundle: Path, tmp_path: Path, small_chunks: Any) -> None:
    bundle = bundles.load(tiny_bundle)
    source = datasets.built_in(7, bundle.labels)
    whole = parity.measure([bundle], source)
    with AnswerCache(tmp_path / "answers") as answer_cache:
        with pytest.raises(KeyboardInterrupt):
            parity.measure([bundle], source, run=Counting(stop_after=2), answer_cache=answer_cache)
        rest, nothing = Counting(), Counting()
        resumed = parity.measure([bundle], source, run=rest, answer_cache=answer_cache)
        again = parity.measure([bundle], source, run=nothing, answer_cache=answer_cache)
    assert [job.positions for job in rest.asked] == [(4, 5), (6,)]
    assert nothing.asked == []
    assert resumed.to_json() == again.to_json() == whole.to_json()


def test_a_new_bundle_is_asked_alone(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = bundles.load(tiny_bundle)
    other = replace(bundle, name="other", build={**bundle.build, "changed": True})
    source = datasets.built_in(3, bundle.labels)
    with AnswerCache(tmp_path / "answers") as answer_cache:
        parity.measure([bundle], source, answer_cache=answer_cache)
        asked = Counting()
        both = parity.measure([bundle, other], source, run=asked, answer_cache=answer_cache)
    assert [job.models for job in asked.asked] == [(2,)]
    assert both.measured[0].parity == both.measured[1].parity
    assert both.data["labelled"] == 3


def test_labels_are_kept_with_the_answers(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = bundles.load(tiny_bundle)
    labelled = datasets.built_in(2, bundle.labels)
    with AnswerCache(tmp_path / "answers") as answer_cache:
        for _ in range(2):
            got = parity.measure([bundle], ClipSet("x", labelled.items), answer_cache=answer_cache)
            assert [clip.label for clip in got.measured[0].worst] != [None, None]


def test_answers_are_kept_apart_by_view(tiny_bundle: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    bundle = bundles.load(tiny_bundle)
    np.save(tmp_path / "a.npy", rng.integers(0, 256, (24, 40, 90, 3), np.uint8))
    source = datasets.load(tmp_path / "a.npy")
    keys = {clip_key(source.items[0], bundle.contract, Views.parse(text)) for text in ("1x1", "2x1", "1x3", "2x3")}
    assert len(keys) == 4
    assert clip_key(source.items[0], bundle.contract) in keys
    with AnswerCache(tmp_path / "answers") as answer_cache:
        for views in (Views(2, 3), SINGLE, Views(1, 3)):
            alone = parity.measure([bundle], source, views=views)
            first, second = Counting(), Counting()
            for counting in (first, second):
                got = parity.measure([bundle], source, run=counting, answer_cache=answer_cache, views=views)
                assert got.to_json() == alone.to_json()
            assert (len(first.asked), second.asked) == (1, [])
