"""Which tubes make tokens, and where: what users state, what models refuse, and the logits, computed in other ways."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgetube import formats, tubesets
from edgetube import spec as specs
from edgetube.contract import InputContract
from edgetube.errors import InputError, SpecError
from edgetube.model.checkpoints import Checkpoint
from edgetube.model.transformer import VideoTransformer
from edgetube.reduction import evenly
from edgetube.spec import PAPER_TUBES, ModelSpec, Rotary, TubeSpec

PAPER = specs.named("tubevit-ti")
TUBES = (
    TubeSpec((4, 8, 8), (4, 16, 16), space_to_depth=(2, 1, 1)),
    TubeSpec((8, 4, 4), (8, 16, 16), (0, 2, 2)),
    TubeSpec((1, 16, 16), (8, 16, 16)),
)
SPEC = ModelSpec(TUBES, 8, (32, 48), 24, 2, 2, (("motion", 9),))


def checkpoint(spec: ModelSpec) -> Checkpoint:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = VideoTransformer(spec).eval()
        if spec.positions == "stored":
            model.positions.normal_()
    return Checkpoint("tiny", model, InputContract(*spec.clip, fps=10.0), tuple("abcdefghi"), "")


def written(path: Path, tubes: Any) -> str:
    path.write_text(json.dumps(tubes), "utf-8")
    return str(path)


# ------------------------------------------------------------------------------------------------- what a user states


@pytest.mark.parametrize(
    ("text", "tokens", "label"),
    [
        ("392", 392, "tubes0.2.3"),
        ("0,2,3", 392, "tubes0.2.3"),
        (" 3 , 0 ", 98 + 196, "tubes0.3"),
        ("1", 147, "tubes1"),
        ("default", 539, ""),
    ],
)
def test_presets_and_indices(text: str, tokens: int, label: str) -> None:
    found = tubesets.parse(text, PAPER)
    spec = PAPER.with_clip(tubes=found)
    assert spec.tokens == tokens
    assert spec.tubes == PAPER.tubes
    assert (found is None) == (text == "default")
    assert spec.tubes_label(PAPER) == label


def test_all_tubes_by_other_words_are_the_default(tmp_path: Path) -> None:
    assert tubesets.parse("0,1,2,3", PAPER) is None
    assert tubesets.parse(written(tmp_path / "t.json", [tube.to_json() for tube in PAPER_TUBES]), PAPER) is None


def test_a_preset_keeps_the_strides_of_the_model() -> None:
    moved = replace(PAPER, tubes=(replace(PAPER_TUBES[0], stride=(8, 16, 16)), *PAPER_TUBES[1:]))
    assert tubesets.parse("392", moved) == {0: moved.tubes[0], 2: PAPER_TUBES[2], 3: PAPER_TUBES[3]}


def test_tubes_of_a_file_are_known_by_their_kernels(tmp_path: Path) -> None:
    wide = TubeSpec((1, 16, 16), (16, 32, 32), (4, 8, 8))
    text = written(tmp_path / "t.json", [wide.to_json(), {"kernel": [8, 8, 8], "stride": [16, 32, 32]}])
    found = tubesets.parse(text, PAPER)
    assert found == {0: PAPER_TUBES[0], 3: wide}
    spec = PAPER.with_clip(tubes=found)
    assert spec.left_out == (1, 2)
    assert spec.grids == ((2, 7, 7), (2, 7, 7))
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert "left_out" not in PAPER.to_json()


def test_two_tubes_with_one_kernel_take_their_own_weights_first(tmp_path: Path) -> None:
    far = TubeSpec((4, 8, 8), (8, 16, 16), (0, 8, 8))
    near, moved = replace(far, offset=(0, 0, 0)), replace(far, stride=(8, 32, 32))
    spec = replace(SPEC, tubes=(near, far), left_out=())
    found = tubesets.parse(written(tmp_path / "t.json", [moved.to_json(), near.to_json()]), spec)
    assert found == {0: near, 1: moved}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("4", "there is no tube 4; the model has 0: 8x8x8, 1: 16x4x4"),
        ("0,0", "named twice"),
        ("few", "expected default, 392, indices of the model's tubes"),
        ("nothing.json", "a .json file that exists"),
        ("-1", "'-1'"),
        ("", "''"),
    ],
)
def test_what_is_no_set_of_tubes(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        tubesets.parse(text, PAPER)


@pytest.mark.parametrize(
    ("tubes", "said"),
    [
        ([{"kernel": [8, 8, 9], "stride": [16, 32, 32]}], "no weights for a tube 8x8x9"),
        ([{"kernel": [8, 8, 8], "stride": [16, 32, 32], "space_to_depth": [2, 1, 1]}], "no weights for a tube 8x8x8"),
        ([PAPER_TUBES[0].to_json()] * 2, "no weights for a tube 8x8x8"),
        ([{"kernel": [8, 8, 8]}], "stride"),
        ({"tubes": []}, "expected a list of tubes"),
        ([], "expected a list of tubes"),
    ],
)
def test_files_that_are_refused(tubes: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        tubesets.parse(written(tmp_path / "t.json", tubes), PAPER)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_bytes(b"\xff[")
    with pytest.raises(InputError, match=r"--tubes .*t\.json: expected a list of tubes .* is not JSON"):
        tubesets.parse(str(tmp_path / "t.json"), PAPER)


def test_the_preset_is_of_the_tubes_of_the_paper() -> None:
    with pytest.raises(InputError, match=r"preset is of the tubes 8x8x8, 16x4x4, .* the model has 0: 4x8x8"):
        tubesets.parse("392", SPEC)


# -------------------------------------------------------------------------------------------------- what models allow


def test_positions_that_belong_to_a_grid_allow_no_other_strides() -> None:
    stored = replace(SPEC, positions="stored")
    moved = replace(TUBES[2], stride=(8, 32, 32))
    assert stored.with_clip(tubes={2: TUBES[2]}).tokens == 6
    with pytest.raises(SpecError, match="tube 2 cannot have another stride or offset: the stored positions"):
        stored.with_clip(tubes={2: moved})
    rotary = replace(SPEC, tubes=TUBES[2:], positions="rotary", rotary=Rotary(("height", "width")))
    with pytest.raises(SpecError, match="the rotary positions"):
        rotary.with_clip(tubes={0: moved})


def test_anchored_positions_are_at_the_centres_of_moved_tokens() -> None:
    anchored = replace(SPEC, positions="anchored")
    with pytest.raises(SpecError, match="tube 2 cannot have another stride or offset: the anchored positions"):
        anchored.with_clip(tubes={2: replace(TUBES[2], stride=(8, 32, 32))})
    trained = checkpoint(anchored)
    assert trained.model.anchor is not None
    with torch.no_grad():
        trained.model.anchor.grid.normal_()
        moved = replace(TUBES[1], offset=(0, 6, 6))  # from 6 + 1.5, every 16: on the places of the 2-D tube, 7.5 + 16 i
        model = trained.with_clip(tubes={1: moved}).model
        assert model.anchor is not None
        np.testing.assert_allclose(model.anchor(), trained.model.anchor.grid, atol=1e-6)


def test_neighbours_that_are_joined_keep_their_distance() -> None:
    assert SPEC.with_clip(tubes={0: replace(TUBES[0], stride=(4, 32, 16))}).grids == ((1, 1, 3),)
    with pytest.raises(SpecError, match=r"tube 0 joins 2 neighbours .* time stride apart; that stride is 4"):
        SPEC.with_clip(tubes={0: replace(TUBES[0], stride=(8, 16, 16))})


def test_a_clip_too_short_for_one_tube_is_possible_without_it() -> None:
    with pytest.raises(SpecError, match="does not fit"):
        SPEC.with_clip(6)
    short = SPEC.with_clip(6, tubes={0: TUBES[0], 2: TUBES[2]})
    assert short.tokens == 6 + 6
    assert short.with_clip(8).left_out == (1,)
    with pytest.raises(SpecError, match="an image needs a 2-D tube"):
        SPEC.with_clip(1, tubes={0: TUBES[0]})
    assert not SPEC.with_clip(tubes={0: TUBES[0]}).accepts_images
    with pytest.raises(SpecError, match="all 3 tubes are left out"):
        SPEC.with_clip(tubes={})
    for wrong in ((1, 0), (0, 0), (3,)):
        with pytest.raises(SpecError, match="left_out"):
            replace(SPEC, left_out=wrong)


def test_shares_of_the_tokens_stay_when_tubes_leave() -> None:
    reduced = replace(SPEC, reduction=evenly("drop", SPEC.tokens, SPEC.depth, SPEC.tokens // 2))
    fewer = reduced.with_clip(tubes={1: TUBES[1], 2: TUBES[2]})
    assert fewer.reduction is not None
    assert fewer.left == fewer.tokens // 2


# ---------------------------------------------------------------------------------------------------------- the logits


@pytest.mark.parametrize("positions", ["fixed", "stored"])
def test_without_a_tube_the_logits_are_those_of_a_model_that_never_had_it(positions: Any) -> None:
    trained = checkpoint(replace(SPEC, positions=positions))
    fewer = trained.with_clip(tubes={0: TUBES[0], 2: TUBES[2]})
    assert fewer.label == "tiny-tubes0.2"
    alone = VideoTransformer(replace(SPEC, positions=positions, tubes=(TUBES[0], TUBES[2]))).eval()
    state = trained.model.state_dict()
    for part in ("weights", "biases"):
        state[f"tubes.{part}.1"] = state.pop(f"tubes.{part}.2")
    if positions == "stored":
        grids = [int(np.prod(grid)) for grid in SPEC.grids]
        rows = state["positions"].split(grids)
        state["positions"] = torch.cat([rows[0], rows[2]])
    alone.load_state_dict(state)
    x = torch.randn(2, 3, *SPEC.clip, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(fewer.model(x), alone(x))
        assert not torch.allclose(fewer.model(x), trained.model(x))
        back = fewer.with_clip(tubes=dict(enumerate(TUBES)))
        assert back.label == "tiny"
        assert torch.equal(back.model(x), trained.model(x))


def test_a_moved_tube_reads_and_sits_where_its_stride_says() -> None:
    moved = TubeSpec((1, 16, 16), (3, 8, 24), (1, 3, 5))
    model = checkpoint(SPEC).with_clip(tubes={2: moved}).model
    x = np.random.default_rng(0).standard_normal((3, *SPEC.clip)).astype(np.float32)
    weight, bias = (getattr(model.tubes, part)[2].detach().numpy() for part in ("weights", "biases"))
    omega = 10000.0 ** (-np.arange(4) / 4)
    tokens, places = [], []
    for t in range(1, 8, 3):
        for top in range(3, 32 - 16 + 1, 8):
            for left in range(5, 48 - 16 + 1, 24):
                tokens.append(
                    (x[:, t : t + 1, top : top + 16, left : left + 16] * weight).sum(axis=(1, 2, 3, 4)) + bias
                )
                angles = [axis * omega for axis in (t, left + 7.5, top + 7.5)]
                waves = [f(angle) for angle in angles for f in (np.sin, np.cos)]
                places.append(np.stack(waves, axis=1).reshape(-1))
    with torch.no_grad():
        got = model.tubes(torch.from_numpy(x)[None])[0].numpy()
    np.testing.assert_allclose(got, np.stack(tokens), atol=1e-4)
    np.testing.assert_allclose(model.positions.numpy(), np.stack(places), atol=1e-6)


# -------------------------------------------------------------------------------------------------------- the artifact


@pytest.mark.slow
def test_an_exported_subset_is_proven_and_found_again(tiny_checkpoint: Path, tmp_path: Path, edgetube_cli: Any) -> None:
    from edgetube import bundle as bundles
    from edgetube import runtimes
    from edgetube.bench import model_set

    tubes = written(tmp_path / "t.json", [{"kernel": [1, 16, 16], "stride": [4, 16, 8]}])
    args = ["export", "--target", "onnx-fp32", "--checkpoint", tiny_checkpoint, "--lowering", "gather"]
    args += ["--out", tmp_path, "--head", "motion", "--json"]
    code, text, _ = edgetube_cli(*args, "--tubes", tubes, "--keep-tokens", 14)
    assert code == 0
    (row,) = json.loads(text)
    assert Path(row["bundle"]).name == "tiny-tubes1-20-keep14.onnx-fp32"
    bundle = bundles.load(row["bundle"])
    assert (bundle.spec.left_out, bundle.spec.tubes[1].stride, bundle.spec.left) == ((0,), (4, 16, 8), 14)
    found = formats.of_bundle(bundle)
    assert found.spec == replace(bundle.spec, classifiers=found.spec.classifiers)
    frames, expected = bundle.golden()
    with runtimes.open_bundle(bundle) as backend:
        np.testing.assert_allclose(backend(frames), expected, atol=1e-3)
    whole = bundles.load(next(iter(json.loads(edgetube_cli(*args)[1])))["bundle"])
    with pytest.raises(InputError, match="have different tubes, so their references differ"):
        model_set.of_bundles([whole, bundle])
    code, text, said = edgetube_cli(
        "parity", bundle.path, "--reference", whole.path, "--clips", 9, "--layers", "--json"
    )
    assert code < 2, said  # 1: the answers of this random model differ
    document = json.loads(text)
    assert document["bundles"][0]["order_agreement"] is None
    assert document["bundles"][0]["layer_jump"] is None
    (layers,) = document["layers"]
    assert layers["curve"] == []
    assert layers["note"] == "the tokens are of other tubes than the reference's"
