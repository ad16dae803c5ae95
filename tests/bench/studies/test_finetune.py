"""The three starts of the study: one geometry, and what each begins with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgetube import formats
from edgetube.bench.studies import finetune
from edgetube.train import start
from tests.edgetube.formats import test_dinov2
from tests.edgetube.formats.families import answers, frames_of, save


@pytest.mark.slow
def test_the_starts_have_one_geometry_and_two_of_them_the_image_model(tmp_path: Path) -> None:
    image = formats.load(save(test_dinov2.plain(), tmp_path / "m", test_dinov2.processor_of()))
    made = {name: make(image) for name, make in finetune.STARTS.items()}
    assert len({one.spec for one in made.values()}) == 1
    assert len({one.contract for one in made.values()}) == 1
    for name in ("tubes", "transfer"):
        assert start.image_error(image, made[name]) <= 1e-5
    clips = frames_of(made["tubes"], 1)
    found = [answers(one, clips) for one in made.values()]
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(found, [*found[1:], found[0]], strict=True))
