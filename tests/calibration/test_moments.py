"""Input moments of linears: of the right tensors, and of one block at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgetube import export
from edgetube.calibration import graphs, moments
from edgetube.calibration.clips import Clips
from edgetube.export.canonical import Graph


@pytest.mark.parametrize("linear", ["fc2", "qkv", "motion"])
def test_moments_are_those_of_what_linears_read(
    hard_graph: Graph, clips: tuple[Clips, Clips], tmp_path: Path, linear: str
) -> None:
    """Of a block's last linear, whose input is the output of its GELU; of the first; of what follows the blocks."""
    frames = list(clips[0].frames)[:3]
    found = moments.measure(hard_graph.model, hard_graph.roles, frames, export.evaluator(), tmp_path)
    with_bias = [each for each in graphs.linears(hard_graph.model) if each.bias]
    assert set(found) == {each.weight for each in with_bias}
    assert len(found) == len(with_bias)
    last = [each for each in with_bias if each.name.endswith(linear)][-1]
    call = export.evaluator()(graphs.extract_subgraph(hard_graph.model, [last.activation]))
    mean, second = found[last.weight].mean, found[last.weight].second
    every = np.concatenate([call({"frames": clip[None]})[0].reshape(-1, len(mean)) for clip in frames])
    np.testing.assert_allclose(mean, every.mean(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(second, np.einsum("ri,rj->ij", every, every) / len(every), rtol=1e-4, atol=1e-5)


def test_no_graph_that_runs_has_the_linears_of_two_blocks(
    hard_graph: Graph, clips: tuple[Clips, Clips], tmp_path: Path
) -> None:
    opened: list[list[str]] = []

    def spy(model: onnx.ModelProto) -> Any:
        opened.append([linear.name for linear in graphs.linears(model)])
        return export.evaluator()(model)

    moments.measure(hard_graph.model, hard_graph.roles, list(clips[0].frames)[:1], spy, tmp_path)
    blocks = [{name.split(".")[1] for name in names if name.startswith("blocks.")} for names in opened]
    assert [len(part) for part in blocks if part] == [1] * len(hard_graph.roles.blocks)
