"""Rounding as a calibration table rounds, with a gradient, in the linears of the blocks alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from edgetube.bench.studies import quantisation_aware as study
from edgetube.calibration import numeric
from edgetube.calibration.table import Range
from edgetube.model import checkpoints
from edgetube.runtimes.torch import Reference

FOUND = Range(-1.0, 3.0, "min-max")


def test_values_are_rounded_as_the_table_does_and_gradients_pass_inside_the_range() -> None:
    x = torch.linspace(-2, 4, 601, requires_grad=True)
    rounded = study.rounded(x, FOUND)
    expected = numeric.fake_quantize_activations(x.detach().numpy(), FOUND, "uint8")
    np.testing.assert_allclose(rounded.detach().numpy(), expected, atol=1e-6)
    rounded.sum().backward()
    assert x.grad is not None
    np.testing.assert_array_equal(x.grad.numpy(), ((x >= -1) & (x <= 3)).float().numpy())


def test_weights_are_rounded_row_by_row() -> None:
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    rounded = study.rounded_rows(weight)
    columns = weight.detach().numpy().T
    expected = numeric.fake_quantize_weights(columns, numeric.absmax_scales(columns)).T
    np.testing.assert_allclose(rounded.detach().numpy(), expected, atol=1e-6)
    rounded.sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.ones(5, 8))


def test_the_linears_of_the_blocks_are_rounded_and_left_as_they_were(tiny_checkpoint: Path) -> None:
    checkpoint = checkpoints.load(tiny_checkpoint).select("motion")
    contract = checkpoint.contract
    clips = np.random.default_rng(0).integers(0, 256, (3, 1, *contract.shape), np.uint8)
    with Reference(checkpoint.model, contract) as reference:
        before = reference(clips[0])
        found = study.ranges(checkpoint.model, reference, [clip[0] for clip in clips])
        assert set(found) == set(study.linears(checkpoint.model))
        with study.quantised(checkpoint.model, found):
            during = reference(clips[0])
        assert np.array_equal(reference(clips[0]), before)
    assert 0 < np.abs(during - before).max() < 0.2 * np.abs(before).max()
