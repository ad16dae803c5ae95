"""Geometry and arithmetic of a spec against counts made another way, its refusals, and JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetube.errors import SpecError
from edgetube.spec import (
    PAPER_TUBES,
    PAPER_TUBES_S2D,
    SIZES,
    ModelSpec,
    Prediction,
    QueryPool,
    Rotary,
    TubeSpec,
    named,
)

SMALL = ModelSpec(
    tubes=(TubeSpec((2, 4, 4), (2, 4, 4)), TubeSpec((1, 8, 8), (4, 8, 8))),
    frames=4,
    size=(16, 16),
    width=12,
    depth=1,
    heads=2,
    classifiers=(("motion", 3),),
)

triples = st.tuples(*[st.integers(1, 6)] * 3)


@st.composite
def tubes(draw: st.DrawFn) -> TubeSpec:
    merge = draw(st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 2, 2), (1, 1, 3)]))
    stride = tuple(s * m for s, m in zip(draw(triples), merge, strict=True))
    offset = tuple(v - 1 for v in draw(triples))
    return TubeSpec(draw(triples), stride, offset, merge)


@st.composite
def models(draw: st.DrawFn) -> ModelSpec:
    chosen = tuple(draw(st.lists(tubes(), min_size=1, max_size=3)))
    least = [max(axis) for axis in zip(*(tube.minimum() for tube in chosen), strict=True)]
    frames, height, width = (low + draw(st.integers(0, 8)) for low in least)
    depth = draw(st.integers(1, 3))
    names = draw(st.lists(st.sampled_from(["a", "kinetics-400", "ssv2"]), min_size=1, max_size=3, unique=True))
    return ModelSpec(
        tubes=chosen,
        frames=max(frames, 2),
        size=(height, width),
        width=24 * draw(st.integers(1, 3)),
        depth=depth,
        heads=draw(st.sampled_from([1, 2, 3, 4])),
        classifiers=tuple((name, draw(st.integers(1, 9))) for name in names),
        hidden=draw(st.sampled_from([0, 1, 25, 96])),
        kernel=draw(st.none() | triples),
        readout=draw(st.sampled_from([("attention",), ("mean",), ("attention", "mean")])),
        positions=draw(st.sampled_from(["fixed", "stored"])),
        gates=tuple(draw(st.sets(st.integers(0, depth - 1)))),
        norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
    )


def positions_that_fit(tube: TubeSpec, axis: int, size: int) -> int:
    """Count tokens along an axis by sliding: every voxel of every neighbour of a token lies inside the clip."""
    finer = tube.stride[axis] // tube.space_to_depth[axis]
    count, start = 0, tube.offset[axis]
    while all(
        start + neighbour * finer + k < size
        for neighbour in range(tube.space_to_depth[axis])
        for k in range(tube.kernel[axis])
    ):
        count, start = count + 1, start + tube.stride[axis]
    return count


class TestTokens:
    @pytest.mark.parametrize("tubes", [PAPER_TUBES, PAPER_TUBES_S2D], ids=["plain", "space-to-depth"])
    def test_the_paper_s_tubes_give_98_147_98_and_196_tokens(
        self, tubes: tuple[TubeSpec, TubeSpec, TubeSpec, TubeSpec]
    ) -> None:
        assert [tube.tokens((32, 224, 224)) for tube in tubes] == [98, 147, 98, 196]
        assert [tube.grid((32, 224, 224)) for tube in tubes] == [(2, 7, 7), (3, 7, 7), (2, 7, 7), (1, 14, 14)]

    @pytest.mark.parametrize(("frames", "tokens"), [(32, 539), (20, 392), (64, 1176), (1, 196)])
    @pytest.mark.parametrize("name", ["tubevit-b", "tubevit-b-s2d"])
    def test_a_model_s_tokens_by_number_of_frames(self, name: str, frames: int, tokens: int) -> None:
        assert named(name, frames).tokens == tokens

    @given(tubes(), triples)
    def test_the_formula_counts_the_places_where_a_token_fits(self, tube: Any, clip: Any) -> None:
        clip = tuple(6 * size for size in clip)
        assert tube.grid(clip) == tuple(positions_that_fit(tube, axis, size) for axis, size in enumerate(clip))

    @given(tubes())
    def test_the_minimum_holds_one_token_and_one_voxel_less_holds_none(self, tube: Any) -> None:
        low = tube.minimum()
        assert tube.tokens(low) == 1
        for axis in range(3):
            assert tube.tokens(tuple(v - (i == axis) for i, v in enumerate(low))) == 0

    def test_without_its_first_tubes_a_model_is_an_image_model(self) -> None:
        image = named("tubevit-ti").with_clip(frames=1)
        assert (image.is_image, image.active, image.grids) == (True, (3,), ((1, 14, 14),))

    @pytest.mark.parametrize(
        "tube",
        [TubeSpec((1, 4, 4), (1, 4, 4), (1, 0, 0)), TubeSpec((1, 4, 4), (2, 4, 4), space_to_depth=(2, 1, 1))],
        ids=["late", "two frames"],
    )
    def test_a_flat_tube_that_needs_a_second_frame_makes_no_image_tokens(self, tube: TubeSpec) -> None:
        assert not tube.is_2d
        assert not replace(SMALL, tubes=(tube,)).accepts_images


class TestArithmetic:
    """Multiply-accumulates in units of 1e9; the published figures leave the tokenizer out."""

    @pytest.mark.parametrize(("size", "macs"), [("ti", 4.2), ("s", 14.1), ("b", 51.1), ("l", 177), ("h", 363)])
    def test_encoder(self, size: str, macs: float) -> None:
        spec = named(f"tubevit-{size}")
        assert (spec.macs() - spec.tokenizer_macs()) / 1e9 == pytest.approx(macs, rel=0.02)

    def test_tokenizer_and_image(self) -> None:
        spec = named("tubevit-b")
        assert spec.tokenizer_macs() / 1e9 == pytest.approx(0.45, rel=0.02)
        assert spec.with_clip(frames=1).macs() / 1e9 == pytest.approx(17.4, rel=0.02)

    def test_space_to_depth_costs_the_same(self) -> None:
        assert named("tubevit-b-s2d").macs() == named("tubevit-b").macs()

    @pytest.mark.parametrize(("tubes", "share"), [(PAPER_TUBES, 0.105), (PAPER_TUBES_S2D, 0.175)])
    def test_share_of_the_voxels_that_the_tubes_touch(
        self, tubes: tuple[TubeSpec, TubeSpec, TubeSpec, TubeSpec], share: float
    ) -> None:
        touched: set[tuple[int, ...]] = set()
        for tube in tubes:
            grid, finer = tube.grid((32, 224, 224)), tube.conv_stride
            per_axis = [
                {
                    tube.offset[a] + tube.stride[a] * i + finer[a] * n + k
                    for i in range(grid[a])
                    for n in range(tube.space_to_depth[a])
                    for k in range(tube.kernel[a])
                }
                for a in range(3)
            ]
            touched.update(product(*per_axis))
        assert len(touched) / (32 * 224 * 224) == pytest.approx(share, abs=0.0005)


class TestRefusals:
    @pytest.mark.parametrize("name", ["kernel", "stride", "offset", "space_to_depth"])
    @pytest.mark.parametrize("value", [(1, 2), (1, 2, -1), (1, 2, 2.5), 4, None, ("1", "2", "3")])
    def test_a_tube_of_anything_but_three_integers(self, name: str, value: Any) -> None:
        with pytest.raises(SpecError, match=rf"tube {name} is .*; expected three integers >= [01]"):
            TubeSpec(**{"kernel": (1, 1, 1), "stride": (2, 2, 2)} | {name: value})

    def test_zero_is_an_offset_but_no_size(self) -> None:
        assert TubeSpec((1, 1, 1), (1, 1, 1), (0, 0, 0)).offset == (0, 0, 0)
        with pytest.raises(SpecError, match="kernel"):
            TubeSpec((0, 1, 1), (1, 1, 1))

    @pytest.mark.parametrize(("axis", "merge"), [("time", (3, 1, 1)), ("height", (1, 3, 1)), ("width", (1, 1, 3))])
    def test_a_stride_that_space_to_depth_does_not_divide(self, axis: str, merge: tuple[int, int, int]) -> None:
        with pytest.raises(SpecError, match=f"tube 4x4x4: the {axis} stride 8 is not divisible by space_to_depth 3"):
            TubeSpec((4, 4, 4), (8, 8, 8), space_to_depth=merge)

    @pytest.mark.parametrize(
        ("clip", "message"),
        [
            ((19, 224, 224), r"tube 1 \(16x4x4, offset \(4, 8, 8\)\) does not fit: time is 19, minimum 20"),
            ((32, 27, 224), r"tube 2 \(4x12x12, .*\) does not fit: height is 27, minimum 28"),
            ((32, 224, 15), r"tube 2 .*: width is 15, minimum 28"),
        ],
    )
    def test_a_clip_that_a_tube_does_not_fit_names_tube_axis_and_minimum(
        self, clip: tuple[int, int, int], message: str
    ) -> None:
        with pytest.raises(SpecError, match=message):
            named("tubevit-ti", clip[0], clip[1:])

    def test_the_smallest_clip_that_is_named_is_accepted(self) -> None:
        spec = named("tubevit-ti", 20, (28, 28))
        assert spec.grids == ((1, 1, 1), (1, 1, 1), (2, 1, 1), (1, 1, 1))  # the 4-frame tube also sits at 16..19

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"tubes": ()}, "at least one tube"),
            ({"frames": 0}, "frames is 0; expected an integer, 1 to 65536"),
            ({"size": (16, 0)}, r"size \(height, width\) is 0; expected an integer, 1 to 65536"),
            ({"depth": 0}, "depth is 0"),
            ({"heads": 5}, "width 12 is not divisible by 5 attention heads"),
            ({"hidden": -1}, "hidden is -1"),
            ({"norm_eps": 0.0}, "norm_eps is 0.0; expected > 0"),
            ({"kernel": (0, 8, 8)}, r"shared kernel is \(0, 8, 8\)"),
            ({"readout": ("max",)}, "readout 'max'; this model can read attention, mean, query"),
            ({"readout": ("prefix.1",), "prefix": 1}, "readout 'prefix.1'; this model can read .*, prefix.0$"),
            ({"readout": ("mean", "mean")}, "names a part twice"),
            ({"readout": ("query",)}, "they go together, and alone"),
            ({"query_pool": QueryPool(2, 8)}, "they go together, and alone"),
            ({"readout": ("query",), "query_pool": QueryPool(5, 8)}, "not divisible by 5 heads of the query pool"),
            ({"readout": ("mean", "attention"), "final_norm": "readout"}, "is over one vector"),
            ({"positions": "learned"}, "positions is 'learned'; this version knows fixed, stored, rotary"),
            ({"positions": "rotary"}, "rotary is None; they go together"),
            ({"rotary": Rotary(("time",))}, "positions are 'fixed' .*; they go together"),
            ({"activation": "relu"}, "activation is 'relu'; this version knows gelu, gelu-tanh, quick-gelu, silu"),
            ({"final_norm": "head"}, "final_norm is 'head'; this version knows tokens, readout, none"),
            ({"gated_mlp": 1}, "gated_mlp is 1; expected true or false"),
            ({"prefix": -1}, "prefix is -1"),
            ({"classifiers": ()}, "expected at least one"),
            ({"classifiers": (("a", 0),)}, "classes of a is 0; expected an integer, 1 to 1048576"),
            ({"classifiers": (("a", 2), ("a", 3))}, "distinct names"),
            ({"classifiers": (("kinetics.400", 2),)}, r"name of a classifier is 'kinetics.400'; expected \\w"),
            ({"frames": True}, "frames is True; expected an integer"),
            ({"width": 12.0}, "width is 12.0; expected an integer"),
            ({"depth": 10**9}, "depth is 1000000000; expected an integer, 1 to 1024"),
            ({"hidden": 2.5}, "hidden is 2.5; expected an integer"),
            ({"norm_eps": math.nan}, "norm_eps is nan; expected a finite number"),
            ({"tubes": [{}]}, "something else than a TubeSpec"),
            ({"kernel": (2, True, 8)}, r"shared kernel is \(2, True, 8\); expected three integers"),
            ({"kernel": (60000, 60000, 60000)}, "parameters of a tube; this version goes up to"),
            ({"frames": 60000, "size": (60000, 60000)}, "648000000000000 voxels of a clip"),
            (
                {"frames": 64, "size": (512, 512), "tubes": (TubeSpec((1, 1, 1), (1, 1, 1)),)},
                "16777216 tokens; this version goes up to 65536",
            ),
            ({"hidden": 3600000000, "width": 60000}, "3600000000 channels of the MLP"),
            ({"attention": "axial"}, "attention is 'axial'; this version knows joint, divided"),
            ({"attention": None}, "attention is None; this version knows joint, divided"),
            ({"position_resize": "area"}, "knows none, bilinear, bicubic, bicubic-antialias, nearest"),
            ({"gates": (0, 0)}, "name a block twice"),
            ({"gates": (1,)}, r"gates \[1\] are outside the 1 blocks"),
            (
                {"tubes": (TubeSpec((2, 4, 4), (4, 4, 4), space_to_depth=(1, 1, 4)),), "width": 6},
                "width 6 is not divisible by the 4 neighbours of tube 2x4x4",
            ),
            ({"frames": 1, "tubes": (TubeSpec((2, 4, 4), (2, 4, 4)),)}, "an image needs a 2-D tube .* are 2x4x4"),
        ],
    )
    def test_a_model_that_cannot_be(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(SpecError, match=message):
            replace(SMALL, **change)

    @pytest.mark.parametrize(
        ("change", "found"),
        [
            ({"tubes": SMALL.tubes}, "2 tubes"),
            ({"positions": "rotary", "rotary": Rotary(("time",))}, "rotary positions"),
            ({"readout": ("query",), "query_pool": QueryPool(2, 8)}, "a query pool"),
            ({"gates": (0,)}, "gates"),
            ({"per_frame": True, "tubes": SMALL.tubes[1:]}, "frames that are sequences of their own"),
            ({"tubes": SMALL.tubes, "gates": (0,)}, "2 tubes, gates"),
        ],
    )
    def test_what_divided_attention_cannot_be_combined_with(self, change: dict[str, Any], found: str) -> None:
        message = f"is for one grid of tokens over time and space; the model has {found}: leave that out"
        with pytest.raises(SpecError, match=message):
            replace(SMALL, **{"tubes": SMALL.tubes[:1], "attention": "divided"} | change)

    def test_a_query_pool_without_an_epsilon(self) -> None:
        with pytest.raises(SpecError, match="norm_eps of the query pool is -1e-06"):
            QueryPool(2, 8, norm_eps=-1e-6)

    @pytest.mark.parametrize("name", ["tubevit-xl", "tubevit-b-s2d-s2d", "tubevit-b-s2dx", ""])
    def test_an_unknown_name_lists_the_known_ones(self, name: str) -> None:
        with pytest.raises(SpecError, match="there are tubevit-ti, tubevit-s, tubevit-b, tubevit-l, tubevit-h"):
            named(name)

    def test_zero_frames_are_not_taken_for_the_model_s_own(self) -> None:
        with pytest.raises(SpecError, match="frames is 0"):
            SMALL.with_clip(frames=0)

    def test_stored_positions_belong_to_one_clip(self) -> None:
        stored = replace(SMALL, positions="stored")
        assert stored.with_clip(frames=4) == stored
        assert stored.accepts_images  # of its own size: the rows of the 2-D tubes at time 0
        assert stored.with_clip(frames=1).is_image
        with pytest.raises(SpecError, match=r"it cannot run on \(1, 20, 16\)"):
            stored.with_clip(1, (20, 16))
        with pytest.raises(SpecError, match=r"positions for clip \(4, 16, 16\); it cannot run on \(6, 16, 16\)"):
            stored.with_clip(frames=6)
        assert replace(stored, position_resize="bicubic").with_clip(frames=6).frames == 6


class TestJson:
    """Everything survives a file: a round trip through JSON text gives an equal object."""

    @given(tubes())
    def test_tube(self, tube: Any) -> None:
        assert TubeSpec.from_json(json.loads(json.dumps(tube.to_json()))) == tube

    @given(models())
    def test_model(self, spec: Any) -> None:
        assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec

    def test_prediction(self) -> None:
        prediction = Prediction("pan-left", 0.9, {"pan-left": 0.9, "static": 0.1}, (2.5, 0.5), 1.0, 2.0, 3.5)
        assert Prediction.from_json(json.loads(json.dumps(prediction.to_json()))) == prediction

    @pytest.mark.parametrize("value", [SMALL.tubes[0], SMALL], ids=lambda value: type(value).__name__)
    def test_a_missing_field_and_what_is_no_object_are_refused(self, value: TubeSpec | ModelSpec) -> None:
        data = value.to_json()
        first = next(iter(data))
        with pytest.raises(SpecError, match=f"{type(value).__name__} lacks the field {first}"):
            type(value).from_json({key: item for key, item in data.items() if key != first})
        with pytest.raises(SpecError, match=f"{type(value).__name__} is 3; expected an object"):
            type(value).from_json(3)  # type: ignore[arg-type]

    def test_optional_fields_may_be_left_out(self) -> None:
        assert TubeSpec.from_json({"kernel": [1, 2, 3], "stride": [4, 5, 6]}) == TubeSpec((1, 2, 3), (4, 5, 6))

    def test_what_digests_of_older_bundles_are_made_of_stays(self) -> None:
        """The fields of schema 2 as it was first written; JSON has others where they differ from their defaults."""
        assert set(SMALL.to_json()) == {
            "activation", "channels", "classifiers", "depth", "embedding_norm", "final_norm", "final_norm_eps",
            "frames", "gated_mlp", "gates", "heads", "hidden", "kernel", "norm_eps", "per_frame", "position_resize",
            "positions", "prefix", "query_pool", "readout", "rotary", "size", "tubes", "width",
        }  # fmt: skip
        cosine = replace(SMALL, projection=7)
        assert cosine.to_json() == SMALL.to_json() | {"projection": 7}
        assert ModelSpec.from_json(cosine.to_json()) == cosine

    def test_a_model_without_the_field_has_joint_attention(self) -> None:
        """As older bundles; what their digests are made of stays what it was."""
        data = SMALL.to_json()
        assert "attention" not in data
        divided = replace(SMALL, tubes=SMALL.tubes[:1], attention="divided")
        assert divided.to_json() == data | {"tubes": data["tubes"][:1], "attention": "divided"}
        assert ModelSpec.from_json(divided.to_json()) == divided
        assert ModelSpec.from_json(data | {"attention": "joint"}) == SMALL
        with pytest.raises(SpecError, match="attention is 'both'"):
            ModelSpec.from_json(data | {"attention": "both"})

    @pytest.mark.parametrize("value", [SMALL.tubes[0], SMALL], ids=lambda value: type(value).__name__)
    def test_an_unknown_field_is_refused_by_name(self, value: TubeSpec | ModelSpec) -> None:
        with pytest.raises(SpecError, match=f"{type(value).__name__} has no field dropout; it has "):
            type(value).from_json(value.to_json() | {"dropout": 0.1})


def test_the_named_sizes() -> None:
    assert SIZES == {
        "tubevit-ti": (192, 12, 3),
        "tubevit-s": (384, 12, 6),
        "tubevit-b": (768, 12, 12),
        "tubevit-l": (1024, 24, 16),
        "tubevit-h": (1280, 32, 16),
    }
