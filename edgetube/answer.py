"""From logits to the answer that an application gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgetube import metrics
from edgetube.metrics import Array
from edgetube.spec import Prediction


def prediction(logits: Array, labels: Sequence[str], top_k: int, **facts: Any) -> Prediction:
    """The answer of one clip: softmax, and the classes from the most probable one down; of equal ones the first.

    Args:
        logits: (classes,), finite or not.
        labels: their names.
        top_k: how many `scores` holds.
        facts: the other attributes of the prediction.
    """
    scores = metrics.softmax(logits)
    best = [int(i) for i in np.argsort(-scores, kind="stable")[:top_k]]
    return Prediction(
        label=labels[best[0]],
        score=float(scores[best[0]]),
        scores={labels[i]: float(scores[i]) for i in best},
        logits=tuple(float(v) for v in logits),
        **facts,
    )
