"""Every lowering gives the tokens of the reference's Conv3d, for any tubes that fit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from edgetube.contract import InputContract
from edgetube.errors import SpecError
from edgetube.export import static, tokenizer
from edgetube.model.transformer import VideoTransformer
from edgetube.spec import PAPER_TUBES, PAPER_TUBES_S2D, ModelSpec, TubeSpec

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make(spec: ModelSpec, seed: int = 0) -> tuple[VideoTransformer, InputContract]:
    """A model whose biases, gates and LayerNorms are not the neutral ones that fresh models have."""
    torch.manual_seed(seed)
    model = VideoTransformer(spec).eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.ndim < 2):
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model, InputContract(spec.frames, *spec.size, mean=MEAN, std=STD)


def spec_of(
    tubes: tuple[TubeSpec, ...], frames: int = 32, size: tuple[int, int] = (64, 64), **more: object
) -> ModelSpec:
    base: dict[str, object] = {"width": 24, "depth": 1, "heads": 2, "classifiers": (("a", 5), ("b", 3))}
    return ModelSpec(tubes=tubes, frames=frames, size=size, **(base | more))  # type: ignore[arg-type]


def noise(spec: ModelSpec, batch: int = 1, seed: int = 0) -> torch.Tensor:
    values = np.random.default_rng(seed).integers(0, 256, (batch, *spec.clip, 3), dtype=np.uint8)
    return torch.from_numpy(values)


def photograph(spec: ModelSpec) -> torch.Tensor:
    """A clip that pans over a real photograph."""
    from skimage import data

    picture = data.astronaut()
    height, width = spec.size
    frames = [picture[2 * t : 2 * t + height, 3 * t : 3 * t + width] for t in range(spec.frames)]
    return torch.from_numpy(np.stack(frames))[None]


SPECS = {
    "paper": spec_of(PAPER_TUBES),
    "space-to-depth": spec_of(PAPER_TUBES_S2D),
    "shared kernel": spec_of(PAPER_TUBES_S2D, kernel=(8, 8, 8)),
    "image": spec_of(PAPER_TUBES, frames=1),
    "odd": spec_of(
        (TubeSpec((3, 5, 7), (2, 9, 6), (1, 2, 3)), TubeSpec((1, 4, 4), (7, 5, 3))), frames=9, size=(37, 41)
    ),
    "dense": spec_of((TubeSpec((2, 16, 16), (2, 16, 16)),), frames=8, size=(48, 64), readout=("mean",)),
    "one voxel": spec_of((TubeSpec((1, 1, 1), (1, 1, 1)),), frames=2, size=(3, 4)),
}


@pytest.mark.parametrize("name", SPECS)
def test_lowerings_equal_conv3d(name: str) -> None:
    model, contract = make(SPECS[name])
    for clips in (noise(model.spec, batch=2), photograph(model.spec)):
        errors = tokenizer.tokenizer_errors(model, contract, clips.numpy())
        assert set(errors) == set(tokenizer.LOWERINGS)
        assert max(error.max_abs for error in errors.values()) < 2e-5
        assert all(error.sound for error in errors.values())


def test_tokens_from_an_oracle_that_shares_no_code() -> None:
    """Loops over voxels in numpy float64: normalise, multiply, add bias and position."""
    spec = SPECS["odd"]
    model, contract = make(spec)
    clip = noise(spec)[0].numpy()
    pixels = (clip / 255.0 - np.array(MEAN)) / np.array(STD)
    rows = []
    for i, tube in enumerate(spec.tubes):
        weight, bias = (p.detach().double().numpy() for p in (model.tubes.weight(i), model.tubes.biases[i]))
        (kt, kh, kw), (st_, sh, sw), (ot, oh, ow) = tube.kernel, tube.stride, tube.offset
        for t in range(ot, spec.frames - kt + 1, st_):
            for h in range(oh, spec.size[0] - kh + 1, sh):
                for w in range(ow, spec.size[1] - kw + 1, sw):
                    rows.append(np.einsum("thwc,dcthw->d", pixels[t : t + kt, h : h + kh, w : w + kw], weight) + bias)
    expected = np.array(rows) + model.positions.double().numpy()
    for lowering in tokenizer.LOWERINGS:
        tokens = tokenizer.StaticTokenizer(model, contract, lowering)(torch.from_numpy(clip)[None])[0]
        np.testing.assert_allclose(tokens.detach().numpy(), expected, atol=2e-5)


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    """Any tubes, on a clip that is as small as they allow, or a little larger."""
    small = st.integers(1, 4)
    tubes = []
    for _ in range(draw(st.integers(1, 3))):
        merge = draw(st.sampled_from([(1, 1, 1), (1, 1, 1), (2, 1, 1), (1, 2, 2), (1, 1, 3), (2, 2, 1)]))
        kernel, offset = (draw(st.tuples(*[st.integers(low, low + 5)] * 3)) for low in (1, 0))
        across, down, along = (draw(small) * draw(st.integers(1, 3)) * m for m in merge)
        stride = (across, down, along)
        tubes.append(TubeSpec(kernel, stride, offset, merge))
    low = [max(axis) for axis in zip(*(tube.minimum() for tube in tubes), strict=True)]
    clip = [size + draw(st.integers(0, 9)) for size in low]
    if clip[0] == 1 and not any(tube.is_2d for tube in tubes):
        clip[0] = 2
    shared = draw(st.sampled_from([None, (2, 3, 3)]))
    return spec_of(tuple(tubes), clip[0], (clip[1], clip[2]), width=12, depth=1, heads=1, kernel=shared)


@given(spec=specs(), batch=st.integers(1, 2), seed=st.integers(0, 99))
def test_lowerings_equal_conv3d_for_any_tubes(spec: ModelSpec, batch: int, seed: int) -> None:
    model, contract = make(spec, seed)
    clips = noise(spec, batch, seed)
    errors = tokenizer.tokenizer_errors(model, contract, clips.numpy())
    assert max(error.max_abs for error in errors.values()) < 1e-4
    assert all(error.sound for error in errors.values()), errors
    tokens = [tokenizer.StaticTokenizer(model, contract, lowering)(clips) for lowering in tokenizer.LOWERINGS]
    assert all(token.shape == (batch, spec.tokens, spec.width) for token in tokens)
    for other in tokens[1:]:
        assert float((other - tokens[0]).abs().max()) < 1e-5 * max(1.0, float(tokens[0].abs().max()))


def test_large_weights_are_judged_by_what_float32_can_do() -> None:
    """Bright pixels against a large mean cancel: 1.4e-4 off where the token is 0.02, and still only rounding."""
    spec = spec_of((TubeSpec((16, 16, 16), (16, 16, 16)),), frames=16, size=(32, 32))
    model, contract = make(spec)
    with torch.no_grad():
        model.tubes.weights[0].mul_(30)
    errors = tokenizer.tokenizer_errors(model, contract, noise(spec).numpy())
    assert max(error.max_abs for error in errors.values()) > 1e-4
    assert all(error.sound for error in errors.values()), errors


def test_one_wrong_voxel_is_more_than_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single voxel of 3072 taken from its neighbour is found in whatever lowering makes the mistake."""
    spec = spec_of((TubeSpec((4, 16, 16), (4, 16, 16)),), frames=8, size=(32, 32))
    model, contract = make(spec)
    right = tokenizer.gemm_weight

    def wrong(weight: torch.Tensor) -> torch.Tensor:
        moved = right(weight)
        moved[[100, 103]] = moved[[103, 100]]
        return moved

    monkeypatch.setattr(tokenizer, "gemm_weight", wrong)
    errors = tokenizer.tokenizer_errors(model, contract, photograph(spec).numpy())
    assert {name: error.sound for name, error in errors.items()} == {"gather": False, "slice": False, "conv2d": True}
    only = tokenizer.tokenizer_errors(model, contract, photograph(spec).numpy(), ["conv2d"])
    assert set(only) == {"conv2d"}


def test_runs_are_whole_and_as_long_as_the_geometry_allows() -> None:
    assert [tokenizer.run_length(tube, 224) for tube in PAPER_TUBES] == [8, 4, 4, 16]
    assert tokenizer.run_length(TubeSpec((1, 4, 4), (1, 4, 4)), 9) == 1  # rows of 9 pixels do not end on a run


def test_indices_cover_just_the_voxels_of_the_kernels() -> None:
    spec = SPECS["space-to-depth"]
    seen = np.zeros(math.prod(spec.clip), bool)
    for tube in spec.tubes:
        run = tokenizer.run_length(tube, spec.size[1])
        index = tokenizer.run_indices(tube, spec.clip)
        assert len(index) * run == tube.tokens(spec.clip) * tube.merge * math.prod(tube.kernel)
        seen[(index[:, None] * run + np.arange(run)).reshape(-1)] = True
    x = torch.zeros(1, 1, *spec.clip, requires_grad=True)  # the oracle: where does a convolution have a gradient?
    for tube in spec.tubes:
        t, h, w = tube.offset
        y = F.conv3d(x[:, :, t:, h:, w:], torch.ones(1, 1, *tube.kernel), stride=tube.conv_stride)
        grid = [g * s for g, s in zip(tube.grid(spec.clip), tube.space_to_depth, strict=True)]
        y[:, :, : grid[0], : grid[1], : grid[2]].sum().backward()
    assert x.grad is not None
    np.testing.assert_array_equal(seen, x.grad.numpy().reshape(-1) > 0)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("start", "stride", "kernel"), [(0, 4, 4), (3, 5, 2), (2, 7, 3), (1, 2, 5), (0, 9, 1)])
@pytest.mark.parametrize("slack", [0, 1, 20])
def test_windows_are_those_of_unfold(start: int, stride: int, kernel: int, count: int, slack: int) -> None:
    size = start + (count - 1) * stride + kernel + slack
    x = torch.arange(2 * size).reshape(2, size)
    expected = x[:, start:].unfold(1, kernel, stride)[:, :count]
    assert torch.equal(tokenizer.windows(x, 1, start, stride, kernel, count), expected)


def test_refusals_say_what_would_do() -> None:
    model, contract = make(SPECS["paper"])
    with pytest.raises(SpecError, match=r"no lowering is called 'conv3d'; there are gather, slice, conv2d"):
        tokenizer.StaticTokenizer(model, contract, "conv3d")
    with pytest.raises(SpecError, match=r"the input is \(16, 64, 64\) but the model takes clips \(32, 64, 64\)"):
        tokenizer.StaticTokenizer(model, contract.with_clip(16))
    with pytest.raises(SpecError, match=r"no classifier is called 'c'; the model has a, b"):
        static.StaticTransformer(model, contract, head="c")
    with pytest.raises(SpecError, match=r"batch is 0; expected >= 1"):
        static.StaticTransformer(model, contract, batch=0)
    grey, contract = make(spec_of(PAPER_TUBES, channels=1))
    with pytest.raises(SpecError, match=r"the model has 1 channels; frames \(T, H, W, 3\) have 3"):
        tokenizer.StaticTokenizer(grey, contract)
    with pytest.raises(SpecError, match=r"tube 1 \(16x4x4, offset \(4, 8, 8\)\) does not fit: time is 19, minimum 20"):
        spec_of(PAPER_TUBES, frames=19)
