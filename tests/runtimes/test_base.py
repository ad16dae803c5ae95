"""Backends whose runtimes show only what an artifact was made to return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from edgetube import bundle as bundles
from edgetube.bundle import Bundle
from edgetube.errors import BackendError, FormatError
from edgetube.roles import LOGITS
from edgetube.runtimes.base import FixedOutputs
from edgetube.video import Frames


class Given(FixedOutputs):
    """Returns the same values for every clip."""

    def returned(self, clips: Frames) -> Sequence[npt.NDArray[np.float32]]:
        return [np.full((1, 2), i, np.float32) for i in range(1 + len(self.shown))]


def given(path: Path, shown: object) -> Bundle:
    bundle = bundles.load(path)
    return replace(bundle, build={**bundle.build, "shown": shown})


def test_an_artifact_shows_what_it_was_made_to_return(tiny_bundle: Path) -> None:
    backend = Given(given(tiny_bundle, ["a", "b"]))
    assert backend.layers(["b", "c", LOGITS]) == ("b", LOGITS)
    clip = np.zeros((1, *backend.contract.shape), np.uint8)
    assert {name: value[0, 0] for name, value in backend.tap(["b", LOGITS])(clip).items()} == {"b": 2, LOGITS: 0}
    assert backend(clip).tolist() == [[0, 0]]
    with pytest.raises(BackendError, match="shows no inner tensors"):
        backend.tap(["a", "c"])


def test_a_published_one_shows_nothing(tiny_bundle: Path) -> None:
    backend = Given(bundles.load(tiny_bundle))
    assert backend.layers([LOGITS]) == ()


def test_a_damaged_manifest_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(FormatError, match=r"build\.shown"):
        Given(given(tiny_bundle, [3]))
