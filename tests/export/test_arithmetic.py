"""Simulated rounding against sums that are really made in float16, one product after the other."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from edgetube.export import arithmetic, static
from edgetube.export.reduction import MatMul
from edgetube.export.tokenizer import Conv2d, Gather, Linear, Slice
from edgetube.spec import TubeSpec
from tests.export.models import REDUCED, model_of, noise

TUBE, CLIP = TubeSpec((2, 4, 4), (2, 4, 4), space_to_depth=(2, 1, 1)), (4, 8, 8)


def summed_in_float16(x: npt.NDArray[np.float32], weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """x (R, K) @ weight (K, N); each product is added exactly and the sum rounded, as a fused multiply-add does."""
    total = np.zeros((len(x), weight.shape[1]), np.float16)
    for column, row in zip(x.T.astype(np.float64), weight.astype(np.float64), strict=True):
        total = (total.astype(np.float64) + np.outer(column, row)).astype(np.float16)
    return total.astype(np.float64)


@pytest.mark.parametrize("offset", [0.0, 4.0])
def test_the_noise_of_a_sum_is_what_float16_does(rng: np.random.Generator, offset: float) -> None:
    """Also where large partial sums cancel in the end, as those of pixels do with a kernel of mean zero."""
    x = (rng.normal(size=(64, 300)) + offset).astype(np.float16).astype(np.float32)
    weight = rng.normal(size=(300, 24))
    weight = (weight - weight.mean(axis=0)).astype(np.float16).astype(np.float32)
    error = summed_in_float16(x, weight) - x.astype(np.float64) @ weight
    module = Linear(torch.from_numpy(weight.T.copy()))
    given = (torch.from_numpy(x),)
    walk = 300 * arithmetic._mean_square_of_partial_sums(module, given, 300)
    simulated = arithmetic.SUM_ROUNDOFF["float16"] ** 2 / 3 * walk
    # A rounding error is u |s| at most, and half of that where the mantissa of s is near 2: the formula's is 1.7 times.
    assert 0.4 < np.square(error).mean() / float(simulated.mean()) < 1.0


@pytest.mark.parametrize("name", REDUCED)
def test_noise_may_let_other_tokens_leave_or_not(name: str) -> None:
    """With the decisions of the exact model, the noise is in proportion to the square of the roundoff."""
    module = static.StaticTransformer(*model_of(name))
    simulation = arithmetic.NoiseSimulation(module, noise(name, 2))
    assert {len(kept) for kept in simulation.decisions.values()} == {2}
    half, single = (simulation.logit_noise(kind, decided=True) for kind in ("float16", "float32"))
    assert 0.2 < half / single / 2.0**26 < 5
    with arithmetic._replayed({part: [y.flip(1) for y in kept] for part, kept in simulation.decisions.items()}):
        assert not torch.allclose(module(torch.from_numpy(noise(name, 2)[:1])).double(), simulation.exact[:1])


def products(rng: np.random.Generator) -> list[tuple[torch.nn.Module, tuple[Tensor, ...], int]]:
    frames = torch.from_numpy(rng.integers(0, 256, (2, *CLIP, 3), np.uint8))
    kernel = torch.from_numpy(rng.normal(size=(6, 3, 2, 4, 4)).astype(np.float32))
    x, y = (torch.from_numpy(rng.normal(size=shape).astype(np.float32)) for shape in ((2, 5, 7), (2, 7, 3)))
    linear = Linear(torch.from_numpy(rng.normal(size=(4, 7)).astype(np.float32)), torch.ones(4))
    made: list[tuple[torch.nn.Module, tuple[Tensor, ...], int]] = [(linear, (x,), 7), (MatMul(), (x, y), 7)]
    return made + [(kind(TUBE, CLIP, kernel), (frames,), 96) for kind in (Gather, Slice, Conv2d)]


@pytest.mark.parametrize("index", range(5))
def test_partial_sums_begin_at_zero_and_end_at_the_product(rng: np.random.Generator, index: int) -> None:
    part, given, count = products(rng)[index]
    assert arithmetic.products_per_sum(part, given) == count
    whole = part(*given) - (part.bias if isinstance(part, Linear) and part.bias is not None else 0)
    torch.testing.assert_close(arithmetic.partial_sums(part, given, count), whole)
    assert not arithmetic.partial_sums(part, given, 0).any()
    first, second = (arithmetic.partial_sums(part, given, n) for n in (count // 2, count // 2 + 1))
    assert (first != second).any()
    torch.testing.assert_close(part(*given), whole + (1 if isinstance(part, Linear) else 0))


@pytest.mark.parametrize("name", ["dense", "class-token", "paper"])
def test_bfloat16_is_noisier_by_its_constants_where_tokens_are_averaged(name: str) -> None:
    """Against PyTorch in bfloat16. A constant's error is the same in all tokens, so that no mean takes it away."""
    model, contract = model_of(name)
    clips = np.random.default_rng(2).integers(0, 256, (3, *contract.shape), np.uint8)
    module = static.StaticTransformer(model, contract)
    simulation = arithmetic.NoiseSimulation(module, clips)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    simulated = simulation.logit_noise("bfloat16")
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        narrow = torch.cat([module(torch.from_numpy(clip[None])) for clip in clips]).double()
    measured = float((narrow - simulation.exact).square().sum() / simulation.exact.square().sum())
    assert simulated / 10 < measured < arithmetic.ARITHMETIC_MARGIN * simulated
