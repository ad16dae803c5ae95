"""A calibration of awkward models: one token, odd widths, dead and constant activations, NaN."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgetube import export, metrics
from edgetube.calibration import calibrate, graphs, input_moments
from edgetube.calibration.clips import Clips
from edgetube.calibration.layerwise import ActivationStats
from edgetube.calibration.table import ActivationScheme, IntegerFormat
from edgetube.contract import InputContract
from edgetube.errors import InputError
from edgetube.export import canonical, integer, static
from edgetube.export.canonical import Graph
from edgetube.export.quantize import apply, qdq
from edgetube.spec import ModelSpec, TubeSpec

CONTRACT = InputContract(4, 8, 8, fps=10.0)


def traced(tube: TubeSpec, width: int, change: Callable[[Any], None] = lambda state: None) -> Graph:
    """The canonical graph of a random model of one block and one head; `change` gets its weights by name."""
    import torch

    from edgetube.model.tubevit import TubeViT

    spec = ModelSpec((tube,), 4, (8, 8), width, 1, 1, (("x", 3),), positions="stored")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = TubeViT(spec).eval()
    state = model.state_dict()
    with torch.no_grad():
        for name in state:  # biases and positions of a new model are zero
            if name.endswith("bias") or name == "positions":
                state[name].normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
        change(state)
    return canonical.trace(static.StaticTubeViT(model, CONTRACT, "gather"), spec, CONTRACT)


WHOLE, PARTS = TubeSpec((4, 8, 8), (4, 8, 8)), TubeSpec((2, 3, 3), (2, 4, 4))
"""One token, and eight of them; kernels of 768 and 54 voxels."""


def noise(count: int, seed: int, prefix: str) -> Clips:
    frames = np.random.default_rng(seed).integers(0, 256, (count, *CONTRACT.shape), np.uint8)
    return Clips("noise", frames, np.full(count, -1), tuple(f"{prefix}{i}" for i in range(count)), f"{seed}")


def logits(model: Any, clips: Clips) -> npt.NDArray[np.float32]:
    call = export.evaluator()(model)
    return np.concatenate([call({"frames": np.asarray(frames)[None]})[0] for frames in clips.frames])


def ratio(graph: Graph, activations: ActivationScheme, folder: Path) -> float:
    """dB of the logits of the written forms on other clips, the worse one."""
    judged = noise(12, 2, "b")
    found = calibrate(
        graph.model,
        noise(12, 1, "a"),
        judged,
        export.evaluator(),
        activations=activations,
        form=IntegerFormat(safe_pairs=True),  # exact in the integer kernels of every processor
        workspace=folder,
        max_drop=100.0,
    )
    equalised, table = apply(found, graph)
    exact = logits(graph.model, judged)
    forms = qdq(equalised.model, table), integer.to_integer_kernels(equalised.model, table)
    assert all(np.isfinite(plan.weight_scales).all() for plan in table.linears)
    return min(metrics.sqnr(exact, logits(form, judged)) for form in forms)


@pytest.mark.parametrize(("tube", "width", "activations"), [(WHOLE, 13, "int8"), (PARTS, 13, "uint8")])
def test_one_token_and_odd_widths(tube: TubeSpec, width: int, activations: ActivationScheme, tmp_path: Path) -> None:
    assert ratio(traced(tube, width), activations, tmp_path) > 20


@pytest.mark.parametrize(("offset", "activations"), [(0.0, "int8"), (2.5, "uint8"), (-1e-6, "int8")])
def test_an_activation_that_never_changes(offset: float, activations: ActivationScheme, tmp_path: Path) -> None:
    """What `qkv` reads is one number everywhere: nothing, a constant, or next to nothing."""

    def dead(state: Any) -> None:
        state["blocks.0.norm1.weight"].zero_()
        state["blocks.0.norm1.bias"].fill_(offset)

    assert ratio(traced(PARTS, 16, dead), activations, tmp_path) > 20


def test_a_linear_of_zeros(tmp_path: Path) -> None:
    def dead(state: Any) -> None:
        state["blocks.0.mlp.fc1.weight"].zero_()

    assert ratio(traced(PARTS, 16, dead), "int8", tmp_path) > 20


class TestNotFinite:
    def broken(self, state: Any) -> None:
        state["blocks.0.mlp.fc1.weight"][3].fill_(3e38)

    def test_logits(self, tmp_path: Path) -> None:
        model = traced(PARTS, 16, self.broken).model
        seen, judged = noise(3, 1, "a"), noise(4, 2, "b")
        options: dict[str, Any] = {"activations": "uint8", "workspace": tmp_path}
        with pytest.raises(InputError, match=r"NaN or infinite logits on 4 of 4 clips, b0 among them; check weights"):
            calibrate(model, seen, judged, export.evaluator(), **options)

    def test_an_activation_is_named(self, tmp_path: Path) -> None:
        model = traced(PARTS, 16, self.broken).model
        with pytest.raises(InputError, match=r"NaN or infinite values in blocks\.0\.mlp\.act; check its weights"):
            input_moments(model, list(noise(2, 1, "a").frames), export.evaluator())
        for bad in (np.nan, np.inf, -np.inf):
            stats = ActivationStats("blocks.0.mlp.act", 2)
            stats.add(0, np.zeros((1, 3, 4), np.float32))
            with pytest.raises(InputError, match=r"in blocks\.0\.mlp\.act on calibration clip 1; check weights and"):
                stats.add(1, np.array([[[0, 0, bad, 0]]], np.float32))


class TestActivationStats:
    def test_rows_are_drawn_evenly_and_without_repeats(self) -> None:
        """2048 rows of 8 channels at most, 512 at least: of 4 clips 512 each."""
        stats = ActivationStats("x", 4)
        seen = []
        for index in range(4):
            values = (np.arange(1000)[:, None] + 1000 * index + np.zeros(8)).astype(np.float32)
            stats.add(index, values[None])
            seen.append(values)
        assert stats.rows.shape == (2048, 8)
        per_clip = stats.rows[:, 0].astype(int) // 1000
        assert np.bincount(per_clip).tolist() == [512] * 4
        assert len(np.unique(stats.rows[:, 0])) == 2048
        assert (np.diff(stats.rows[:, 0]) > 0).all()
        np.testing.assert_allclose(stats.means[:, 0], [499.5, 1499.5, 2499.5, 3499.5])
        np.testing.assert_array_equal(stats.channels.low, 0)
        np.testing.assert_array_equal(stats.channels.high, 3999)
        again = ActivationStats("x", 4)
        other = ActivationStats("y", 4)
        for index, values in enumerate(seen):
            again.add(index, values)
            other.add(index, values)
        np.testing.assert_array_equal(again.rows, stats.rows)
        assert (other.rows != stats.rows).any()

    @pytest.mark.parametrize(
        ("channels", "clips", "rows"), [(3072, 1, 512), (3072, 100, 600), (1000, 3, 1500), (8, 1, 2048), (8, 7, 2051)]
    )
    def test_how_many_rows_there_are(self, channels: int, clips: int, rows: int) -> None:
        """1.5 million values, between 512 and 2048 rows, rounded up to as many of each clip."""
        stats = ActivationStats("x", clips)
        for index in range(clips):
            stats.add(index, np.zeros((1, 3000, channels), np.float32))
        assert len(stats.rows) == rows

    def test_fewer_rows_than_wanted_are_all(self) -> None:
        stats = ActivationStats("x", 2)
        stats.add(0, np.arange(6, dtype=np.float32).reshape(1, 3, 2))
        stats.add(1, np.array([[[7, 8]]], np.float32))
        np.testing.assert_array_equal(stats.rows, [[0, 1], [2, 3], [4, 5], [7, 8]])

    @pytest.mark.parametrize(
        ("clips", "first", "second"),
        [
            (1, [0], [0]),
            (2, [0], [1]),
            (5, [0, 2, 4], [1, 3]),
            (8, [0, 2, 4, 6], [1, 3, 5, 7]),
            (16, [0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]),
            (17, [0, 1, 2, 6, 7, 8, 12, 13, 14], [3, 4, 5, 9, 10, 11, 15, 16]),
        ],
    )
    def test_halves_are_groups_of_neighbours(self, clips: int, first: list[int], second: list[int]) -> None:
        """Eight groups, in turns; of a single clip both halves know the same."""
        stats = ActivationStats("x", clips)
        for index in range(clips):
            stats.add(index, np.full((1, 2, 3), index, np.float32))
        for half, expected in zip(stats.halves, (first, second), strict=True):
            np.testing.assert_array_equal(half.rows[:, 0], np.repeat(expected, 2))
            np.testing.assert_array_equal(half.channels.low, expected[0])
            np.testing.assert_array_equal(half.channels.high, expected[-1])

    def test_everything_is_kept_of_what_is_whole(self, rng: np.random.Generator) -> None:
        stats, parts = ActivationStats("x", 3, whole=True), rng.standard_normal((3, 50, 4)).astype(np.float32)
        for index, part in enumerate(parts):
            stats.add(index, part[None])
        every = parts.reshape(-1, 4)
        assert stats.gram is not None
        assert stats.histogram is not None
        np.testing.assert_allclose(stats.gram.total, every.T @ every, rtol=1e-5, atol=1e-5)
        assert stats.histogram.counts.sum() == every.size
        assert ActivationStats("x", 3).histogram is None


def test_linears_of_a_graph_are_found(tmp_path: Path) -> None:
    found = graphs.linears(traced(PARTS, 16).model)
    assert [linear.name for linear in found if linear.in_block] == [
        f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
