"""The reference model against others' and slower ones: PyTorch's encoder layer, loops over voxels, algebra."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from edgetube.errors import InputError
from edgetube.model.reduction import TokenState
from edgetube.model.transformer import Attention, Readout, Tubes, VideoTransformer, tube_tokens
from edgetube.spec import ModelSpec, QueryPool, TubeSpec, named

SMALL = ModelSpec(
    tubes=(
        TubeSpec((4, 4, 4), (4, 8, 8), (1, 2, 0), space_to_depth=(2, 1, 2)),
        TubeSpec((2, 6, 6), (4, 8, 8), (0, 1, 3)),
        TubeSpec((1, 8, 8), (8, 8, 8)),
    ),
    frames=9,
    size=(24, 32),
    width=28,  # not divisible by 6
    depth=3,
    heads=4,
    classifiers=(("motion", 5), ("place", 2)),
)


DIVIDED = replace(
    SMALL,
    tubes=(TubeSpec((2, 8, 8), (3, 8, 8)),),
    prefix=1,
    readout=("prefix.0",),
    positions="stored",
    position_resize="nearest",
    attention="divided",
)


def model_of(spec: ModelSpec, seed: int = 0) -> VideoTransformer:
    """A model in which nothing is zero, so that nothing can be left out unnoticed."""
    torch.manual_seed(seed)
    model = VideoTransformer(spec).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def clips_of(spec: ModelSpec, batch: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, spec.channels, *spec.clip, generator=generator)


def tokens_by_loops(x: Any, tube: Any, weight: Any, bias: Any) -> Any:
    """Tokens (B, n, D) by sliding over voxels; D = S * D/S with the neighbours (dt, dh, dw) outermost."""
    x, weight, bias = (value.detach().double().numpy() for value in (x, weight, bias))
    finer = tube.conv_stride
    low = tube.offset
    tokens = []
    for start in product(*(range(low[a], x.shape[2 + a], tube.stride[a]) for a in range(3))):
        parts = []
        for neighbour in product(*map(range, tube.space_to_depth)):
            at = [s + n * f for s, n, f in zip(start, neighbour, finer, strict=True)]
            t, h, w = (slice(a, a + k) for a, k in zip(at, tube.kernel, strict=True))
            window = x[:, :, t, h, w]
            if window.shape[2:] == tube.kernel:
                parts.append([(window * k).sum(axis=(1, 2, 3, 4)) + b for k, b in zip(weight, bias, strict=True)])
        if len(parts) == tube.merge:
            tokens.append(np.concatenate(parts))
    return np.stack(tokens).transpose(2, 0, 1)


class TestTubes:
    @given(st.data())
    def test_tokens_are_those_of_a_loop_over_voxels(self, data: Any) -> None:
        merge = data.draw(st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 2, 2), (1, 1, 3), (2, 2, 1)]), "merge")
        draw = [data.draw(st.tuples(*[st.integers(1, 3)] * 3), name) for name in ("kernel", "stride", "offset", "more")]
        kernel, finer, offset, more = draw
        stride = tuple(s * m for s, m in zip(finer, merge, strict=True))
        tube = TubeSpec(kernel, stride, tuple(v - 1 for v in offset), merge)
        clip = tuple(low + extra - 1 for low, extra in zip(tube.minimum(), more, strict=True))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed"))
        x = torch.randn(2, 2, *clip, generator=generator)
        weight = torch.randn(3, 2, *kernel, generator=generator)
        bias = torch.randn(3, generator=generator)

        tokens = tube_tokens(x, tube, weight, bias, tube.grid(clip))

        expected = tokens_by_loops(x, tube, weight, bias)
        assert tokens.shape == expected.shape == (2, tube.tokens(clip), 3 * tube.merge)
        np.testing.assert_allclose(tokens, expected, atol=1e-4)

    def test_all_tubes_end_to_end_in_their_order(self) -> None:
        model, x = model_of(SMALL), clips_of(SMALL)
        expected = [
            tokens_by_loops(x, t, model.tubes.weight(i), model.tubes.biases[i]) for i, t in enumerate(SMALL.tubes)
        ]
        tokens = model.tubes(x)
        assert tokens.shape == (2, SMALL.tokens, SMALL.width)
        np.testing.assert_allclose(tokens.detach(), np.concatenate(expected, axis=1), atol=1e-4)

    def test_a_flat_16x16_tube_is_the_patch_embedding_of_an_image_vit(self) -> None:
        spec = ModelSpec((TubeSpec((1, 16, 16), (1, 16, 16)),), 1, (48, 64), 32, 1, 4, (("a", 2),))
        vit = nn.Conv2d(3, 32, kernel_size=16, stride=16)
        model = VideoTransformer(spec)
        with torch.no_grad():
            model.tubes.weights[0].copy_(vit.weight.unsqueeze(2))
            model.tubes.biases[0].copy_(vit.bias)
        image = torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(3))
        expected = vit(image).flatten(2).transpose(1, 2)
        torch.testing.assert_close(model.tubes(image.unsqueeze(2)), expected, atol=1e-5, rtol=0)

    def test_a_shared_kernel_is_resized_trilinearly_to_each_tube(self) -> None:
        spec = replace(SMALL, kernel=(3, 5, 4))
        tubes = Tubes(spec)
        assert [name for name, _ in tubes.named_parameters()] == ["kernel", "biases.0", "biases.1", "biases.2"]
        assert tubes.kernel.shape == (28, 3, 3, 5, 4)
        for i, (tube, width) in enumerate(zip(spec.tubes, (7, 28, 28), strict=True)):
            weight = tubes.weight(i)
            expected = F.interpolate(tubes.kernel[:width], tube.kernel, mode="trilinear", align_corners=False)
            assert weight.shape == (width, 3, *tube.kernel)
            torch.testing.assert_close(weight, expected)
            np.testing.assert_allclose(weight.detach(), linear_by_hand(tubes.kernel[:width], tube.kernel), atol=1e-6)

    def test_a_shared_kernel_of_a_tube_s_own_shape_is_used_as_it_is(self) -> None:
        tubes = Tubes(replace(SMALL, kernel=(2, 6, 6)))
        torch.testing.assert_close(tubes.weight(1), tubes.kernel, atol=0, rtol=0)


def linear_by_hand(kernel: Any, shape: Any) -> Any:
    """Resize (D, C, t, h, w) linearly, one axis after the other: pixel centres at half integers, borders held."""
    result = kernel.detach().double().numpy()
    for axis, size in enumerate(shape, start=2):
        old = result.shape[axis]
        at = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
        low = np.minimum(at.astype(int), old - 1)
        high = np.minimum(low + 1, old - 1)
        part = (at - low).reshape([-1 if a == axis else 1 for a in range(5)])
        result = result.take(low, axis) * (1 - part) + result.take(high, axis) * part
    return result


def attention_of(attention: Any) -> nn.MultiheadAttention:
    """PyTorch's own attention with the same weights."""
    made = nn.MultiheadAttention(28, attention.heads, batch_first=True)
    state = {"in_proj_weight": attention.qkv.weight, "in_proj_bias": attention.qkv.bias}
    state |= {f"out_proj.{part}": getattr(attention.proj, part) for part in ("weight", "bias")}
    made.load_state_dict(state)
    return made.eval()


class TestEncoder:
    @pytest.mark.parametrize("eps", [1e-6, 1e-2])
    def test_a_block_is_pytorch_s_pre_norm_encoder_layer(self, eps: float) -> None:
        block: Any = model_of(replace(SMALL, norm_eps=eps)).blocks[1]
        layer = nn.TransformerEncoderLayer(
            28,
            4,
            dim_feedforward=112,
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=eps,
            batch_first=True,
            norm_first=True,
        )
        copies = {
            "self_attn.in_proj_": block.attn.qkv,
            "self_attn.out_proj.": block.attn.proj,
            "linear1.": block.mlp.fc1,
            "linear2.": block.mlp.fc2,
            "norm1.": block.norm1,
            "norm2.": block.norm2,
        }
        state = {
            f"{name}{part}": getattr(module, part) for name, module in copies.items() for part in ("weight", "bias")
        }
        layer.load_state_dict(state)
        x = torch.randn(2, 17, 28, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(block(x, TokenState(z0=torch.randn_like(x))), layer(x), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("prefix", [0, 1, 3])
    def test_a_divided_block_by_place_and_by_time(self, prefix: int) -> None:
        """PyTorch's attention, one place and then one time after the other."""
        block: Any = model_of(DIVIDED if prefix == 1 else replace(DIVIDED, prefix=prefix, readout=("mean",))).blocks[1]
        ((times, rows, columns),) = DIVIDED.grids
        places = rows * columns
        x = torch.randn(2, prefix + times * places, 28, generator=torch.Generator().manual_seed(2))
        over_time, over_space = attention_of(block.time_attn), attention_of(block.attn)
        first, tokens = x[:, :prefix].clone(), x[:, prefix:].clone()
        for place in range(places):
            series = block.time_norm(x[:, prefix + place :: places])
            tokens[:, place::places] += over_time(series, series, series)[0]
        y, added = torch.cat([first, tokens], dim=1), torch.zeros_like(first)
        for time in range(times):
            own = slice(time * places, (time + 1) * places)
            frame = block.norm1(torch.cat([first, tokens[:, own]], dim=1))
            found = over_space(frame, frame, frame)[0]
            added += found[:, :prefix] / times
            y[:, prefix:][:, own] += found[:, prefix:]
        y[:, :prefix] += added
        expected = y + block.mlp(block.norm2(y))
        torch.testing.assert_close(block(x, times), expected, atol=1e-5, rtol=1e-5)

    def test_a_gate_adds_tanh_alpha_of_the_bare_tube_tokens(self) -> None:
        plain = model_of(SMALL).blocks[0]
        gated = VideoTransformer(replace(SMALL, gates=(0,))).blocks[0]
        assert gated.alpha == 0
        gated.load_state_dict(plain.state_dict() | {"alpha": torch.tensor(0.7)})
        x, z0 = torch.randn(2, 2, 9, 28, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(gated(x, TokenState(z0=z0)), plain(x) + 0.6043677771 * z0)  # tanh(0.7)

    def test_gates_see_the_tokens_before_the_positions_are_added(self) -> None:
        gated = model_of(replace(SMALL, gates=(0, 2)))
        plain = VideoTransformer(SMALL).eval()
        alphas = [gated.get_parameter(f"blocks.{i}.alpha").item() for i in (0, 2)]
        plain.load_state_dict({k: v for k, v in gated.state_dict().items() if not k.endswith("alpha")})
        assert [b.alpha is None for b in gated.blocks] == [False, True, False]
        x = clips_of(SMALL)
        z0 = plain.tubes(x)
        z = plain.blocks[0](z0 + plain.positions) + np.tanh(alphas[0]) * z0
        z = plain.blocks[2](plain.blocks[1](z)) + np.tanh(alphas[1]) * z0
        torch.testing.assert_close(gated(x), plain.classify(plain.norm(z)))
        assert not torch.allclose(gated(x), plain(x), atol=1e-3)

    def test_closed_gates_change_nothing(self) -> None:
        gated, plain = model_of(replace(SMALL, gates=(1,))), VideoTransformer(SMALL).eval()
        with torch.no_grad():
            gated.get_parameter("blocks.1.alpha").zero_()
        plain.load_state_dict({k: v for k, v in gated.state_dict().items() if not k.endswith("alpha")})
        x = clips_of(SMALL)
        torch.testing.assert_close(gated(x), plain(x), atol=0, rtol=0)


class TestHead:
    def test_attention_pooling_is_a_softmax_weighted_sum(self) -> None:
        pool = Readout(replace(SMALL, readout=("attention",)))
        assert pool.score is not None
        x = torch.randn(2, 5, SMALL.width, generator=torch.Generator().manual_seed(4))
        scores = x @ pool.score.weight[0] + pool.score.bias
        weights = scores.exp() / scores.exp().sum(dim=1, keepdim=True)
        expected = torch.einsum("bn,bnd->bd", weights, x)
        torch.testing.assert_close(pool(x), expected)
        assert not torch.allclose(pool(x), x.mean(dim=1), atol=1e-3)

    def test_mean_pooling(self) -> None:
        x = torch.arange(24.0).reshape(2, 3, 4)
        assert Readout(replace(SMALL, readout=("mean",)))(x).tolist() == [[4, 5, 6, 7], [16, 17, 18, 19]]

    def test_prefix_tokens_are_read_one_by_one_and_not_averaged(self) -> None:
        x = torch.arange(24.0).reshape(2, 3, 4)
        spec = replace(SMALL, prefix=2, readout=("prefix.1", "mean"))
        assert Readout(spec)(x).tolist() == [[4, 5, 6, 7, 8, 9, 10, 11], [16, 17, 18, 19, 20, 21, 22, 23]]

    @pytest.mark.parametrize("part", ["attention", "mean"])
    def test_each_classifier_is_its_own_linear_layer_on_the_pooled_tokens(self, part: str) -> None:
        model = model_of(replace(SMALL, readout=(part,)))
        x = clips_of(SMALL)
        z0 = model.tubes(x)
        pooled = model.pool(model.encode(z0 + model.positions, TokenState(z0=z0)))
        for name, classes in SMALL.classifiers:
            logits = model(x, name)
            assert logits.shape == (2, classes)
            linear = model.classifiers[name]
            torch.testing.assert_close(logits, pooled @ linear.weight.T + linear.bias)
        torch.testing.assert_close(model(x), model(x, "motion"), atol=0, rtol=0)

    def test_a_query_pool_has_heads_and_an_epsilon_of_its_own(self) -> None:
        pool = QueryPool(heads=7, hidden=8, depth=1, norm=True, norm_eps=0.5)
        spec = replace(SMALL, readout=("query",), query_pool=pool)
        model = VideoTransformer(spec)
        norms = [m for m in model.pool.modules() if isinstance(m, nn.LayerNorm)]
        assert [norm.eps for norm in norms] == [0.5] * 4
        assert [m.heads for m in model.modules() if isinstance(m, Attention)] == [SMALL.heads] * SMALL.depth + [7]
        usual = VideoTransformer(replace(spec, query_pool=replace(pool, norm_eps=0.0)))
        assert usual.pool.query.mlp_norm.eps == SMALL.norm_eps

    def test_an_unknown_classifier_is_refused_with_the_known_ones(self) -> None:
        with pytest.raises(InputError, match="no classifier 'kinetics'; it has motion, place"):
            model_of(SMALL)(clips_of(SMALL), "kinetics")


class TestImages:
    @pytest.mark.parametrize("gates", [(), (1,)])
    def test_logits_are_those_of_the_frame_s_2d_tokens_alone(self, gates: tuple[int, ...]) -> None:
        """Video tokens of the flat tube at t = 0, sent through the encoder without the other tubes' tokens."""
        model, clips = model_of(replace(SMALL, gates=gates)), clips_of(SMALL)
        flat = SMALL.tubes[2].tokens((1, *SMALL.size))
        first = slice(SMALL.tokens - 2 * flat, SMALL.tokens - flat)  # the flat tube looks at frames 0 and 8
        assert SMALL.grids[2] == (2, 3, 4)
        z0 = model.tubes(clips)[:, first]
        expected = model.classify(model.encode(z0 + model.positions[first], TokenState(z0=z0)))

        logits = model(clips[:, :, :1])

        torch.testing.assert_close(logits, expected)
        assert not torch.allclose(logits, model(clips), atol=1e-3)

    def test_the_image_form_with_the_same_weights_agrees(self) -> None:
        model, image = model_of(SMALL), VideoTransformer(SMALL.with_clip(frames=1)).eval()
        image.load_state_dict(model.state_dict())
        x = clips_of(SMALL)[:, :, :1]
        torch.testing.assert_close(image(x), model(x))

    @pytest.mark.parametrize(
        "shape", [(2, 3, 8, 24, 32), (2, 1, 9, 24, 32), (2, 3, 9, 32, 24), (3, 9, 24, 32)], ids=str
    )
    def test_other_shapes_are_refused_with_given_and_expected(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(InputError, match=r"takes clips \('B', 3, 9, 24, 32\), or images.* given \(") as caught:
            model_of(SMALL)(torch.zeros(shape))
        assert str(shape) in str(caught.value)

    def test_a_model_without_a_2d_tube_refuses_images(self) -> None:
        with pytest.raises(InputError, match=r"given \(2, 3, 1, 24, 32\)"):
            model_of(replace(SMALL, tubes=SMALL.tubes[:2]))(clips_of(SMALL)[:, :, :1])


class TestWhole:
    @pytest.mark.parametrize(("name", "millions"), [("tubevit-b", 90), ("tubevit-l", 311), ("tubevit-h", 635)])
    def test_parameters_of_the_published_sizes(self, name: str, millions: int) -> None:
        with torch.device("meta"):
            model = VideoTransformer(named(name))
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)

    def test_parameters_by_hand(self) -> None:
        d, h = 28, 112
        tubes = 7 * 3 * 64 + 7 + 28 * 3 * 72 + 28 + 28 * 3 * 64 + 28
        block = 2 * 2 * d + (3 * d * d + 3 * d) + (d * d + d) + (d * h + h) + (h * d + d)
        head = 2 * d + (d + 1) + (5 * d + 5) + (2 * d + 2)
        assert sum(p.numel() for p in VideoTransformer(SMALL).parameters()) == tubes + 3 * block + head

    def test_multiply_accumulates_are_those_that_pytorch_counts(self) -> None:
        """On a dense tube: with sparse ones the convolution makes outputs that become no token."""
        spec = replace(SMALL, tubes=(TubeSpec((1, 8, 8), (3, 8, 8)),))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused kernels go uncounted
            model_of(spec)(clips_of(spec, batch=1))
        weighted_sum = spec.tokens * spec.width  # of the pool: elementwise, which PyTorch does not count
        assert counter.get_total_flops() / 2 == spec.macs() - weighted_sum

    def test_multiply_accumulates_of_divided_attention(self) -> None:
        spec = replace(DIVIDED, tubes=(TubeSpec((1, 8, 8), (3, 8, 8)),))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model_of(spec)(clips_of(spec, batch=1))
        assert counter.get_total_flops() / 2 == spec.macs()

    def test_stored_positions_are_weights_and_fixed_ones_are_not(self) -> None:
        assert "positions" not in VideoTransformer(SMALL).state_dict()
        stored = model_of(replace(SMALL, positions="stored"))
        x = clips_of(SMALL)
        before = stored(x)
        stored.load_state_dict(stored.state_dict() | {"positions": torch.zeros(SMALL.tokens, 28)})
        z0 = stored.tubes(x)
        torch.testing.assert_close(stored(x), stored.classify(stored.encode(z0, TokenState(z0=z0))))
        assert not torch.allclose(stored(x), before, atol=1e-3)

    def test_every_parameter_learns(self) -> None:
        model = VideoTransformer(replace(SMALL, gates=(1,), classifiers=(("motion", 5),)))
        F.cross_entropy(model(clips_of(SMALL)), torch.tensor([1, 3])).backward()
        idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        # The bias of a softmax's scores moves all of them alike.
        assert idle in ([], ["pool.score.bias"])

    def test_a_clip_s_logits_do_not_depend_on_its_batch(self) -> None:
        model, x = model_of(SMALL), clips_of(SMALL, batch=3)
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]))
