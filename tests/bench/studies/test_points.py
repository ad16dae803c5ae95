"""The study of fewer tubes and blocks: its features are those of the model, and its ridge is least squares."""

from __future__ import annotations

import numpy as np
import torch

from edgetube import datasets, formats
from edgetube.bench.studies import points


def test_behind_all_blocks_the_head_gives_the_answers_of_the_model() -> None:
    trained = formats.load("demo")
    clips = points.Clips(datasets.built_in(3, trained.labels), trained)
    x = points.features(trained, clips, trained.spec.depth)
    with torch.no_grad():
        logits = trained.model.classifier()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(logits, points.answers(trained, clips), atol=1e-4)
    fewer = points.features(trained, clips, trained.spec.depth - 1)
    assert fewer.shape == x.shape
    assert not np.allclose(fewer, x, atol=1e-2)


def test_a_ridge_is_least_squares_with_rows_for_the_penalty(rng: np.random.Generator) -> None:
    x, labels = rng.normal(3, 2, (40, 5)), rng.integers(0, 3, 40)
    found_weight, bias = points.ridge(x, labels, 3, 7.0)
    found = x[:4] @ found_weight + bias
    centre, spread = x.mean(axis=0), x.std() + 1e-6
    target = 2.0 * np.eye(3)[labels] - 1
    rows = np.concatenate([(x - centre) / spread, 7.0**0.5 * np.eye(5)])
    weight = np.linalg.lstsq(rows, np.concatenate([target - target.mean(axis=0), np.zeros((5, 3))]))[0]
    np.testing.assert_allclose(found, (x[:4] - centre) / spread @ weight + target.mean(axis=0), atol=1e-8)
    _, penalty = points.fitted(x, labels, 3)
    assert penalty in points.PENALTIES
