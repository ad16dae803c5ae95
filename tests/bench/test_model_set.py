"""The answer to a clip of several views, on models whose answer to each view is known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from edgetube import bundle as bundles
from edgetube import runtimes
from edgetube.bench import workers
from edgetube.bench.model_set import Artifact, Job, ModelSet, OpenedModels, own_threads
from edgetube.contract import InputContract
from edgetube.datasets import Item
from edgetube.video import Clip
from edgetube.views import SINGLE, Views

CONTRACT = InputContract(2, 4, 4)


@dataclass(frozen=True)
class Known:
    """A model and its own backend: the first pixel of a clip is the row of its logits."""

    name: str
    rows: tuple[tuple[float, ...], ...]

    def identity(self) -> Mapping[str, Any]:
        return {"name": self.name}

    def open(self, threads: int | None) -> Known:
        return self

    def __call__(self, clips: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        return np.array([self.rows[clip[0, 0, 0, 0]] for clip in clips], np.float32)

    def __enter__(self) -> Known:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass


ROWS = ((3.0, 0.0, -1.0), (0.0, 4.0, 1.0), (0.5, 0.0, 0.0), (-2.0, 1.0, 5.0))
MODELS = (Known("reference", ROWS), Known("artifact", tuple(tuple(2 * x for x in row) for row in ROWS)))


def model_set(views: Views) -> ModelSet:
    return ModelSet(cast(Any, MODELS), CONTRACT, ("a", "b", "c"), views=views)


def job(*firsts: int) -> Job:
    """Clips whose view number v has the pixel first + v; the clip itself has the pixel 3."""

    def clip(value: int) -> Clip:
        return Clip(str(value), np.full(CONTRACT.shape, value, np.uint8), "abc"[value % 3])

    def read(first: int, contract: InputContract, views: Views) -> tuple[Clip, ...]:
        return tuple(clip(first + v) for v in range(views.count))

    items = tuple(Item(str(first), None, lambda _: clip(3), read_views=partial(read, first)) for first in firsts)
    return Job(tuple(range(len(firsts))), items, (0, 1))


def softmax(row: tuple[float, ...]) -> list[float]:
    powers = [math.exp(x) for x in row]
    return [x / sum(powers) for x in powers]


@pytest.mark.parametrize("views", [Views(3, 1), Views(1, 3)])
def test_the_answer_is_the_mean_of_the_softmax_over_the_views(views: Views) -> None:
    with OpenedModels(model_set(views)) as opened:
        result = opened.ask(job(1, 0))
    assert result.labels == ("b", "a")
    for index, model in enumerate(MODELS):
        for first, logits in zip((1, 0), result.logits[index], strict=True):
            seen = [softmax(row) for row in model.rows[first : first + 3]]
            mean = [sum(of) / 3 for of in zip(*seen, strict=True)]
            assert softmax(tuple(map(float, logits))) == pytest.approx(mean, abs=1e-6)
            assert sum(logits) == pytest.approx(0, abs=1e-5)


def test_the_mean_is_not_that_of_the_logits() -> None:
    """One sure view and two that lean to another class: the means of softmax and of logits choose differently."""
    rows = ((0.0, 9.0), (1.0, 0.0), (1.0, 0.0), (1.0, 0.0))
    models = ModelSet(cast(Any, (Known("x", rows),)), CONTRACT, ("a", "b"), views=Views(4, 1))
    with OpenedModels(models) as opened:
        (logits,) = opened.ask(Job((0,), job(0).items, (0,))).logits[0]
    assert np.mean(rows, axis=0).argmax() == 1
    assert logits.argmax() == 0


def test_one_view_gives_the_logits_of_the_model() -> None:
    with OpenedModels(model_set(SINGLE)) as opened:
        result = opened.ask(job(0, 1))
    np.testing.assert_array_equal(result.logits[0], [ROWS[3]] * 2)


def test_a_process_does_not_mix_the_views_of_two_comparisons() -> None:
    try:
        for views in (SINGLE, Views(3, 1), SINGLE):
            with OpenedModels(model_set(views)) as opened:
                expected = opened.ask(job(0)).logits[0]
            np.testing.assert_array_equal(workers._ask(model_set(views), job(0)).logits[0], expected)
    finally:
        workers._opened.clear()


def test_a_job_has_as_many_views_as_it_would_have_clips() -> None:
    assert [model_set(views).chunk for views in (SINGLE, Views(2, 1), Views(1, 3), Views(5, 3))] == [8, 4, 2, 1]


def test_runtimes_that_choose_their_threads_get_no_share(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--workers` shares the cores, `--threads` is a number: neither reaches them, and a note says so of the second."""
    artifact = Artifact(bundles.load(tiny_bundle))
    models = ModelSet((artifact,), CONTRACT, ("a", "b"), share=2)
    assert models.threads_of(artifact) == 2
    assert replace(models, threads=3).threads_of(artifact) == 3
    monkeypatch.setattr(runtimes.runtime(artifact.bundle.backend), "OWN_THREADS", True, raising=False)
    assert models.threads_of(artifact) is None
    assert replace(models, threads=3).threads_of(artifact) is None
    assert own_threads([artifact.bundle], None) == []
    (note,) = own_threads([artifact.bundle], 3)
    assert note.startswith("tiny.onnx-fp32: its runtime chooses its threads itself")
