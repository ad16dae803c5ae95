"""Tokens that leave the encoder, against loops over single tokens, and against the model that has them all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgetube.model.reduction import Reduce, TokenState, leaving_first
from edgetube.model.transformer import VideoTransformer, rotate
from edgetube.reduction import Kind, Reduction, evenly
from edgetube.spec import AXES, ModelSpec, QueryPool, Rotary, TubeSpec

SPEC = ModelSpec(
    tubes=(TubeSpec((2, 16, 16), (2, 16, 16)),),
    frames=8,
    size=(48, 64),
    width=48,
    depth=3,
    heads=2,
    classifiers=(("all", 5),),
    prefix=2,
    readout=("mean", "prefix.0", "attention"),
    positions="stored",
)


def model_of(spec: ModelSpec) -> VideoTransformer:
    torch.manual_seed(1)
    model = VideoTransformer(spec).eval()
    for value in model.parameters():
        value.data.add_(0.1 * torch.randn_like(value))
    return model


def clips_of(spec: ModelSpec, count: int = 2) -> Tensor:
    return torch.randn(count, 3, *spec.clip, generator=torch.Generator().manual_seed(3))


def merged_by_loops(x: Tensor, keys: Tensor, sizes: Tensor, prefix: int, r: int) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching of one clip, x (P + N, D), token by token, as the paper describes it."""
    tokens = list(range(prefix, len(x)))
    even, odd = tokens[0::2], tokens[1::2]
    edges = []
    for i in even:
        cosines = [F.cosine_similarity(keys[i], keys[j], dim=0).item() for j in odd]
        edges.append((max(cosines), odd[cosines.index(max(cosines))]))
    leaving = sorted(range(len(even)), key=lambda i: (-edges[i][0], i))[:r]
    sums, counts = x * sizes, sizes.clone()
    for i in leaving:
        sums[edges[i][1]] += x[even[i]] * sizes[even[i]]
        counts[edges[i][1]] += sizes[even[i]]
    kept = [*range(prefix), *(e for i, e in enumerate(even) if i not in leaving), *odd]
    return sums[kept] / counts[kept], counts[kept]


@pytest.mark.parametrize(("n", "r"), [(14, 3), (15, 8), (15, 1), (9, 4), (2, 1)])
@pytest.mark.parametrize("prefix", [0, 2])
def test_merging_is_bipartite_soft_matching(n: int, r: int, prefix: int) -> None:
    generator = torch.Generator().manual_seed(n)
    x, keys = (torch.randn(2, prefix + n, width, generator=generator) for width in (7, 5))
    sizes = torch.randint(1, 5, (2, prefix + n, 1), generator=generator).float()
    state = TokenState(keep=(n - r,), z0=2 * x, sizes=sizes, keys=keys)
    found = Reduce("merge", prefix, 0)(x, state)
    assert state.sizes is not None
    assert state.z0 is not None
    for clip in range(2):
        expected, counts = merged_by_loops(x[clip], keys[clip], sizes[clip], prefix, r)
        torch.testing.assert_close(found[clip], expected)
        torch.testing.assert_close(state.sizes[clip], counts)
        torch.testing.assert_close(state.z0[clip], 2 * expected)
    torch.testing.assert_close(state.sizes.sum(dim=1), sizes.sum(dim=1))


def test_equally_good_tokens_leave_by_their_index() -> None:
    assert leaving_first(torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0]]), 2).tolist() == [[1, 2, 0, 3, 4]]
    same = torch.ones(1, 8, 4)
    state = TokenState(keep=(6,), keys=same)
    module = Reduce("merge", 0, 0)
    seen: dict[str, Any] = {}
    for name in ("order", "target"):
        part: nn.Module = getattr(module, name)
        part.register_forward_hook(lambda _, __, value, name=name: seen.update({name: value.tolist()}))
    module(torch.arange(8.0).reshape(1, 8, 1), state)
    assert seen == {"order": [[0, 1, 2, 3]], "target": [[0, 0]]}


def test_dropping_keeps_what_receives_most_attention_in_order() -> None:
    received = torch.tensor([[0.9, 0.1, 0.3, 0.3, 0.2, 0.3]])  # a prefix token, then tokens
    state = TokenState(keep=(3,), attention=received, z0=torch.arange(6.0).reshape(1, 6, 1))
    found = Reduce("drop", 1, 0)(10 * torch.arange(6.0).reshape(1, 6, 1), state)
    assert found.flatten().tolist() == [0, 20, 30, 50]
    assert state.z0 is not None
    assert state.z0.flatten().tolist() == [0, 2, 3, 5]
    tie = TokenState(keep=(2,), attention=received)
    assert Reduce("drop", 1, 0)(10 * torch.arange(6.0).reshape(1, 6, 1), tie).flatten().tolist() == [0, 30, 50]


class TestModels:
    def test_copies_that_merge_change_nothing(self) -> None:
        """Tokens that are equal, without positions, merge into one that counts as all of them: attention, every
        readout and the MLPs see no difference."""
        spec = replace(SPEC, size=(16, 32), frames=8)  # pairs of neighbours
        model = model_of(spec)
        with torch.no_grad():
            table = model.positions
            table[1::2] = table[0::2]
            x = clips_of(spec)
            x[..., 16:] = x[..., :16]
            n = spec.tokens
            reduced = VideoTransformer(replace(spec, reduction=Reduction("merge", (n // 2, n // 2, n // 2)))).eval()
            reduced.load_state_dict(model.state_dict())
            torch.testing.assert_close(reduced(x), model(x), atol=2e-5, rtol=1e-5)

    @pytest.mark.parametrize("pool", [None, QueryPool(2, 96, depth=1, norm=True)])
    def test_the_same_with_a_query_pool(self, pool: QueryPool | None) -> None:
        readout = ("attention",) if pool is None else ("query",)
        spec = replace(SPEC, size=(16, 32), readout=readout, query_pool=pool)
        model, x = model_of(spec), clips_of(spec)
        with torch.no_grad():
            model.positions[1::2] = model.positions[0::2]
            x[..., 16:] = x[..., :16]
            reduced = VideoTransformer(replace(spec, reduction=Reduction("merge", (4, 4, 4)))).eval()
            reduced.load_state_dict(model.state_dict())
            torch.testing.assert_close(reduced(x), model(x), atol=2e-5, rtol=1e-5)

    @pytest.mark.parametrize("kind", ["merge", "drop"])
    def test_rotary_positions_follow_their_tokens(self, kind: Kind) -> None:
        spec = replace(SPEC, positions="rotary", rotary=Rotary(AXES), readout=("mean",))
        n = spec.tokens
        model = model_of(replace(spec, reduction=Reduction(kind, (n - 8, n - 8, n - 8))))
        x = clips_of(spec, 1)
        states: list[TokenState] = []
        model.blocks[1].register_forward_pre_hook(lambda _, given: states.append(given[1]))
        orders: list[Tensor] = []
        block: Any = model.blocks[0]
        block.reduce.order.register_forward_hook(lambda _, __, value: orders.append(value))
        with torch.no_grad():
            model(x)
        (order,) = orders
        kept = order[0, 8:] if kind == "drop" else torch.cat([2 * order[0, 8:], torch.arange(1, n, 2)])
        assert model.rotation is not None
        rows = torch.cat([torch.arange(spec.prefix), spec.prefix + kept])
        assert states[0].rotation is not None
        torch.testing.assert_close(states[0].rotation[:, 0, 0], model.rotation[:, rows])
        queries = torch.randn(1, 2, len(rows), 24)
        torch.testing.assert_close(rotate(queries, states[0].rotation), rotate(queries, model.rotation[:, rows]))

    def test_an_image_through_the_model_of_videos(self) -> None:
        tubes = (TubeSpec((4, 16, 16), (4, 16, 16)), TubeSpec((1, 16, 16), (4, 16, 16)))
        spec = replace(SPEC, tubes=tubes, positions="fixed", prefix=0, readout=("mean",))
        reduced = replace(spec, reduction=evenly("merge", spec.tokens, spec.depth, spec.tokens // 2))
        model = model_of(reduced)
        image = VideoTransformer(reduced.with_clip(frames=1)).eval()
        image.load_state_dict(model.state_dict())
        x = clips_of(spec)[:, :, :1]
        torch.testing.assert_close(model(x), image(x))

    def test_the_weights_are_those_of_the_model_with_all_tokens(self) -> None:
        reduced = VideoTransformer(replace(SPEC, reduction=evenly("merge", SPEC.tokens, 3, 20)))
        assert reduced.state_dict().keys() == VideoTransformer(SPEC).state_dict().keys()
