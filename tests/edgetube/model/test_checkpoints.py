"""Weights in, weights out: nothing lost on the way, and nothing accepted that does not fit to the last tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from edgetube import demo, formats
from edgetube.bundle import Bundle
from edgetube.contract import InputContract
from edgetube.errors import CheckpointError, InputError, SpecError
from edgetube.model import checkpoints
from edgetube.model.checkpoints import Checkpoint
from edgetube.model.transformer import VideoTransformer, shapes
from edgetube.precision import Precision
from edgetube.spec import ModelSpec, TubeSpec, named

SPEC = ModelSpec(
    tubes=(TubeSpec((2, 8, 8), (2, 16, 16), space_to_depth=(1, 2, 2)), TubeSpec((1, 8, 8), (4, 8, 8))),
    frames=4,
    size=(24, 24),
    width=24,
    depth=2,
    heads=2,
    classifiers=(("motion", 3), ("place", 2)),
    gates=(1,),
)
CONTRACT = InputContract(4, 24, 24, fps=8.0, mean=(0.4, 0.5, 0.6))
LABELS = ("left", "right", "none")
OTHERS = {"place": ("inside", "outside")}


@st.composite
def models(draw: st.DrawFn) -> ModelSpec:
    merge = draw(st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 2, 2)]))
    tubes = (TubeSpec((2, 3, 4), (2, 4, 4), space_to_depth=merge), TubeSpec((1, 4, 4), (2, 4, 4)))
    depth = draw(st.integers(1, 3))
    heads = draw(st.lists(st.sampled_from(["a", "b-1", "c_2"]), min_size=1, unique=True))
    return ModelSpec(
        tubes=tubes[: draw(st.integers(1, 2))],
        frames=draw(st.integers(4, 6)),
        size=(draw(st.integers(8, 12)), 12),
        width=draw(st.sampled_from([8, 16])),
        depth=depth,
        heads=draw(st.sampled_from([1, 2])),
        classifiers=tuple((name, draw(st.integers(1, 4))) for name in heads),
        hidden=draw(st.sampled_from([0, 5])),
        channels=draw(st.integers(1, 3)),
        kernel=draw(st.none() | st.just((2, 4, 4))),
        prefix=draw(st.integers(0, 2)),
        readout=draw(st.sampled_from([("attention",), ("mean",), ("attention", "mean")])),
        activation=draw(st.sampled_from(["gelu", "gelu-tanh", "quick-gelu", "silu"])),
        gated_mlp=draw(st.booleans()),
        embedding_norm=draw(st.booleans()),
        positions=draw(st.sampled_from(["fixed", "stored"])),
        gates=tuple(draw(st.lists(st.integers(0, depth - 1), unique=True))),
    )


@pytest.fixture
def checkpoint() -> Checkpoint:
    torch.manual_seed(0)
    model = VideoTransformer(SPEC).eval()
    return Checkpoint("mine", model, CONTRACT, LABELS, digest="", other_labels=OTHERS)


@pytest.fixture
def clips() -> torch.Tensor:
    return torch.randn(2, 3, 4, 24, 24, generator=torch.Generator().manual_seed(1))


def rewrite(path: Path, header: Any = None, drop: Any = (), **tensors: Any) -> Path:
    """The same file with an entry of the header or some tensors changed."""
    with safe_open(path, "pt") as file:
        document = json.loads(file.metadata()[checkpoints.HEADER])
    state = {key: value for key, value in (load_file(path) | tensors).items() if key not in drop}
    document = header(document) if header else document
    text = document if isinstance(document, str) else json.dumps(document)
    save_file(state, path, metadata={checkpoints.HEADER: text})
    return path


class TestRoundTrip:
    @pytest.mark.parametrize(
        "change",
        [{}, {"kernel": (4, 8, 8)}, {"positions": "stored"}, {"readout": ("mean",)}, {"gates": ()}],
        ids=lambda change: next(iter(change), "plain"),
    )
    def test_a_loaded_model_is_the_saved_one(
        self, tmp_path: Path, clips: torch.Tensor, checkpoint: Checkpoint, change: dict[str, Any]
    ) -> None:
        torch.manual_seed(1)
        saved = replace(checkpoint, model=VideoTransformer(replace(SPEC, **change)).eval())
        path = checkpoints.save(saved, tmp_path / "motion.safetensors")
        loaded = checkpoints.load(path)
        assert loaded.spec == saved.spec
        assert (loaded.name, loaded.source) == ("motion", str(path))
        assert (loaded.contract, loaded.labels, loaded.other_labels) == (CONTRACT, LABELS, OTHERS)
        assert loaded.digest == hashlib.sha256(path.read_bytes()).hexdigest()
        assert not loaded.model.training
        written, read = saved.model.state_dict(), loaded.model.state_dict()
        assert read.keys() == written.keys()
        assert all(torch.equal(read[name], written[name]) for name in written)
        for head in ("motion", "place"):  # sums are made in another order where a mapped tensor is not aligned
            torch.testing.assert_close(loaded.model(clips, head), saved.model(clips, head), atol=1e-6, rtol=0)

    def test_half_precision_weights_become_single(self, tmp_path: Path, checkpoint: Checkpoint) -> None:
        path = checkpoints.save(replace(checkpoint, model=VideoTransformer(SPEC).half()), tmp_path / "half.safetensors")
        assert {value.dtype for value in checkpoints.load(path).model.state_dict().values()} == {torch.float32}

    def test_saving_replaces_the_file_and_leaves_nothing_beside_it(
        self, tmp_path: Path, checkpoint: Checkpoint
    ) -> None:
        path = tmp_path / "motion.safetensors"
        path.write_bytes(b"older")
        checkpoints.save(checkpoint, path)
        assert [p.name for p in tmp_path.iterdir()] == ["motion.safetensors"]
        assert checkpoints.load(path).spec == SPEC

    def test_a_save_that_fails_keeps_the_older_file(
        self, tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = checkpoints.save(checkpoint, tmp_path / "motion.safetensors")
        before = path.read_bytes()

        def full(state: Any, partial: Any, metadata: Any) -> None:
            partial.write_bytes(b"half of it")
            raise OSError("no space left on device")

        monkeypatch.setattr(checkpoints, "save_file", full)
        with pytest.raises(OSError, match="no space left"):
            checkpoints.save(checkpoint, path)
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["motion.safetensors"]


def test_divided_attention_survives_a_file(tmp_path: Path, clips: torch.Tensor) -> None:
    tubes = (TubeSpec((1, 8, 8), (1, 8, 8)),)
    spec = replace(SPEC, tubes=tubes, gates=(), positions="stored", position_resize="nearest", attention="divided")
    torch.manual_seed(0)
    made = Checkpoint("mine", VideoTransformer(spec).eval(), CONTRACT, LABELS, digest="", other_labels=OTHERS)
    path = checkpoints.save(made, tmp_path / "mine.safetensors")
    found = checkpoints.load(path)
    assert found.spec == spec
    assert torch.equal(found.model(clips), made.model(clips))
    with pytest.raises(CheckpointError, match=r"missing blocks\.0\.time_attn"):
        checkpoints.load(rewrite(path, drop=["blocks.0.time_attn.qkv.weight"]))


class TestShapes:
    def test_those_of_divided_attention(self) -> None:
        spec = replace(SPEC, tubes=SPEC.tubes[-1:], gates=(), attention="divided", gated_mlp=True)
        assert shapes(spec) == {name: tuple(value.shape) for name, value in VideoTransformer(spec).state_dict().items()}

    @given(models())
    @settings(max_examples=20)
    def test_they_are_those_of_the_model(self, spec: ModelSpec) -> None:
        assert shapes(spec) == {name: tuple(value.shape) for name, value in VideoTransformer(spec).state_dict().items()}


class TestWhereACheckpointIs:
    """A bundle knows its checkpoint by hash, wherever it lies."""

    @pytest.fixture
    def path(self, tmp_path: Path, checkpoint: Checkpoint) -> Path:
        (tmp_path / "a").mkdir()
        return checkpoints.save(checkpoint, tmp_path / "a" / "my model (2).safetensors")

    @pytest.fixture
    def bundle(self, path: Path) -> Bundle:
        made = checkpoints.load(path)
        known = {"name": made.name, "source": made.source, "sha256": made.digest}
        return Bundle(
            Path("/b"), "b", "onnx-fp32", Precision.FP32, "onnxruntime", SPEC, CONTRACT, LABELS, 1, "m", "built", known
        )

    def test_names_can_be_those_of_files(self, path: Path) -> None:
        assert checkpoints.load(path).name == "my-model-2-"
        assert checkpoints.load(path.rename(path.with_name("...safetensors"))).name == "model"

    def test_the_working_folder_may_change(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(path.parent)
        assert checkpoints.load(path.name).source == str(path)

    def test_it_is_where_it_was(self, bundle: Bundle) -> None:
        assert formats.of_bundle(bundle).digest == bundle.checkpoint["sha256"]

    def test_it_was_moved(self, tmp_path: Path, path: Path, bundle: Bundle) -> None:
        moved = path.rename(tmp_path / "other.safetensors")
        message = r"made from the checkpoint .*my model .*, which is not there; give --checkpoint FILE_OR_FOLDER"
        with pytest.raises(CheckpointError, match=message):
            formats.of_bundle(bundle)
        torch.save({}, tmp_path / "no.safetensors")
        for where in (moved, tmp_path):
            found = formats.locate(bundle, where)
            assert found.checkpoint == {**bundle.checkpoint, "source": str(moved)}
            assert formats.of_bundle(found).digest == bundle.checkpoint["sha256"]

    def test_other_weights_are_there_now(self, path: Path, bundle: Bundle, checkpoint: Checkpoint) -> None:
        checkpoints.save(replace(checkpoint, labels=("a", "b", "c")), path)
        with pytest.raises(
            CheckpointError, match=r"/b was made from other weights than .* holds now; give --checkpoint"
        ):
            formats.of_bundle(bundle)
        for where in (path, path.parent):
            with pytest.raises(CheckpointError, match=r"is not at .*: [12] checkpoints were looked at"):
                formats.locate(bundle, where)


class TestOtherClipsAndClassifiers:
    def test_another_clip_takes_the_same_weights(self, clips: torch.Tensor, checkpoint: Checkpoint) -> None:
        longer = checkpoint.with_clip(frames=6, size=(32, 24))
        assert longer.spec.clip == (6, 32, 24)
        assert longer.contract == replace(CONTRACT, frames=6, height=32)
        for key, value in checkpoint.model.state_dict().items():
            torch.testing.assert_close(longer.model.state_dict()[key], value, atol=0, rtol=0)
        assert checkpoint.with_clip(frames=4) is checkpoint
        image = checkpoint.with_clip(frames=1)
        torch.testing.assert_close(image.model(clips[:, :, :1]), checkpoint.model(clips[:, :, :1]))

    def test_a_clip_that_does_not_fit_is_refused(self, checkpoint: Checkpoint) -> None:
        with pytest.raises(SpecError, match=r"tube 0 .* height is 8, minimum 16"):
            checkpoint.with_clip(size=(8, 24))

    def test_one_classifier_of_several(self, clips: torch.Tensor, checkpoint: Checkpoint) -> None:
        place = checkpoint.select("place")
        assert (place.spec.classifiers, place.labels, place.other_labels) == ((("place", 2),), OTHERS["place"], {})
        torch.testing.assert_close(place.model(clips), checkpoint.model(clips, "place"), atol=0, rtol=0)
        with pytest.raises(InputError, match="mine has no classifier 'kinetics'; it has motion, place"):
            checkpoint.select("kinetics")


class TestRandom:
    def test_a_named_architecture_is_the_same_every_time(self) -> None:
        one, two = (checkpoints.load("random:tubevit-ti") for _ in range(2))
        assert (one.spec, len(one.labels)) == (named("tubevit-ti"), 400)
        assert (one.name, one.source) == ("tubevit-ti", "random:tubevit-ti")
        assert one.contract.shape == (32, 224, 224, 3)
        other = checkpoints.random("tubevit-ti", seed=1)
        assert one.digest == two.digest != other.digest
        same = [torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True)]
        assert all(same)
        assert not torch.equal(one.model.tubes.weights[0], other.model.tubes.weights[0])

    def test_it_leaves_the_caller_s_random_numbers_alone(self) -> None:
        torch.manual_seed(7)
        expected = torch.rand(3)
        torch.manual_seed(7)
        checkpoints.random("tubevit-ti")
        assert torch.equal(torch.rand(3), expected)

    def test_an_unknown_architecture(self) -> None:
        with pytest.raises(SpecError, match="no architecture is called 'tubevit-xl'"):
            checkpoints.load("random:tubevit-xl")


class TestRefusals:
    @pytest.fixture
    def path(self, tmp_path: Path, checkpoint: Checkpoint) -> Path:
        return checkpoints.save(checkpoint, tmp_path / "motion.safetensors")

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(
            InputError, match=r"no checkpoint at .*gone.safetensors; give a .safetensors file, demo, or"
        ):
            checkpoints.load(tmp_path / "gone.safetensors")
        with pytest.raises(InputError, match=r"a folder is at .*; give a .safetensors file"):
            checkpoints.load(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"PK\x03\x04 a zip file of another framework"])
    def test_not_a_safetensors_file(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "weights.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"weights.safetensors is not a safetensors file: "):
            checkpoints.load(path)

    @pytest.mark.parametrize("size", [4, 200, -1])
    def test_a_truncated_file(self, path: Path, size: int) -> None:
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(CheckpointError, match="is not a safetensors file"):
            checkpoints.load(path)

    @pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
    def test_somebody_else_s_safetensors(self, tmp_path: Path, metadata: dict[str, str] | None) -> None:
        save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors", metadata=metadata)
        with pytest.raises(CheckpointError, match=r"other.safetensors has no 'edgetube' header; write it with"):
            checkpoints.load(tmp_path / "other.safetensors")

    @pytest.mark.parametrize(
        ("header", "message"),
        [
            (lambda _: "not json", "damaged"),
            (lambda _: [], "damaged"),
            (lambda d: {key: value for key, value in d.items() if key != "spec"}, "damaged .*it lacks the field spec"),
            (lambda d: d | {"more": 1}, "damaged .*it has no field more; it has input, labels"),
            (lambda d: d | {"spec": d["spec"] | {"depth": 10**9}}, "damaged .*depth is 1000000000"),
            (
                lambda d: d | {"spec": d["spec"] | {"frames": 60000, "size": [60000, 60000]}},
                "damaged .*voxels of a clip",
            ),
            (lambda d: json.dumps(d)[:-1] + ', "labels": []}', "damaged .*the key 'labels' stands twice"),
            (lambda _: "[" * 100_000, "damaged .*nested deeper than 32 levels"),
            (lambda d: d | {"labels": ["left", "right", "\x1b[2J"]}, "damaged .*has control characters"),
            (lambda d: d | {"labels": ["left", "right", 3]}, "damaged .*labels of motion is 3; expected text"),
            (lambda d: d | {"other_labels": {"room": ["a"]}}, "damaged .*other_labels has no field room; it has place"),
            (lambda d: d | {"spec": d["spec"] | {"dropout": 0.1}}, "damaged .*ModelSpec has no field dropout"),
            (lambda d: d | {"spec": d["spec"] | {"pool": "max"}}, "damaged .*pool is 'max'"),
            (lambda d: d | {"input": d["input"] | {"frames": 8}}, r"input is \(8, 24, 24, 3\) but .* \(4, 24, 24, 3\)"),
            (lambda d: d | {"spec": d["spec"] | {"channels": 1}}, r"\(4, 24, 24, 3\) but .* \(4, 24, 24, 1\)"),
            (lambda d: d | {"labels": ["left"]}, "1 labels for the 3 classes of motion"),
            (lambda d: d | {"other_labels": {}}, "0 labels for the 2 classes of place"),
            (lambda d: d | {"labels": ["left", "none", "left"]}, "labels of motion has 'left' more than once"),
        ],
    )
    def test_a_header_that_does_not_fit(self, path: Path, header: Callable[..., Any], message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            checkpoints.load(rewrite(path, header))

    def test_a_spec_that_does_not_fit_the_weights_is_refused_before_a_model_is_made(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def made(*_: object) -> None:
            raise AssertionError("a model was made")

        monkeypatch.setattr(checkpoints, "VideoTransformer", made)
        wide = {"width": 24576, "depth": 1000, "classifiers": [["motion", 1 << 20]], "positions": "stored"}
        spec = {"labels": [str(i) for i in range(1 << 20)], "other_labels": {}}
        with pytest.raises(CheckpointError, match=r"does not fit its own spec: missing blocks.10.attn.proj.bias"):
            checkpoints.load(rewrite(path, lambda d: d | spec | {"spec": d["spec"] | wide | {"gates": []}}))

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_weights_that_are_no_numbers(self, path: Path, value: float) -> None:
        weights = load_file(path)["blocks.1.mlp.fc1.weight"]
        weights[3, 2] = value
        with pytest.raises(CheckpointError, match=r"blocks.1.mlp.fc1.weight has weights that are NaN or infinite"):
            checkpoints.load(rewrite(path, **{"blocks.1.mlp.fc1.weight": weights}))

    def test_weights_that_float32_cannot_hold(self, path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"norm.bias has weights that are NaN or infinite"):
            checkpoints.load(rewrite(path, **{"norm.bias": torch.full((24,), 1e300, dtype=torch.float64)}))

    def test_integers_are_no_weights(self, path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"norm.bias is I64; expected one of F32, F16, BF16, F64"):
            checkpoints.load(rewrite(path, **{"norm.bias": torch.zeros(24, dtype=torch.int64)}))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"PK\x03\x04" + b"\0" * 60, "it was written by torch.save"),
            (b"\x80\x02}q\x00." + b"\0" * 60, "it was written by torch.save"),
            (b"\x89HDF\r\n\x1a\n" + b"\0" * 60, "it is an HDF5 file"),
            (b"GGUF\x03\0\0\0" + b"\0" * 60, "it is a GGUF file"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7\nsize 6\n", "git lfs pull"),
            (b"<!DOCTYPE html><html></html>", "it is a web page; the download did not work"),
        ],
    )
    def test_files_of_other_kinds_are_called_by_their_names(self, tmp_path: Path, content: bytes, message: str) -> None:
        path = tmp_path / "model.pt"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"model.pt is not a safetensors file: .*{message}"):
            checkpoints.load(path)

    def test_what_torch_saves(self, tmp_path: Path, checkpoint: Checkpoint) -> None:
        for zipped in (True, False):
            torch.save(checkpoint.model.state_dict(), tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
            with pytest.raises(CheckpointError, match=r"m.pt is not a safetensors file: it was written by torch.save"):
                checkpoints.load(tmp_path / "m.pt")

    @pytest.mark.parametrize(
        ("prefix", "message"),
        [
            ("module.", r"all tensors are module.\*: DataParallel .*; save model.module"),
            ("_orig_mod.", r"all tensors are _orig_mod.\*: torch.compile .*model._orig_mod"),
            ("_orig_mod.module.", r"all tensors are _orig_mod.\*"),
            ("model.", r"all tensors are model.\*: a training module"),
        ],
    )
    def test_models_that_something_wrapped(self, path: Path, prefix: str, message: str) -> None:
        state = {f"{prefix}{name}": value for name, value in load_file(path).items()}
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        save_file(state, path, metadata=metadata)
        with pytest.raises(CheckpointError, match=f"does not fit its own spec: {message}"):
            checkpoints.load(path)
        save_file(state, path)
        with pytest.raises(CheckpointError, match=f"no 'edgetube' header; .*{message}"):
            checkpoints.load(path)

    def test_a_model_that_something_wraps_is_not_saved(self, tmp_path: Path, checkpoint: Checkpoint) -> None:
        wrapped = torch.nn.DataParallel(checkpoint.model)
        with pytest.raises(CheckpointError, match="a DataParallel; save the VideoTransformer inside of it"):
            checkpoints.save(replace(checkpoint, model=wrapped), tmp_path / "x.safetensors")  # type: ignore[arg-type]
        assert not list(tmp_path.iterdir())

    def test_a_missing_tensor(self, path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"motion.safetensors does not fit .*: missing tubes.weights.0$"):
            checkpoints.load(rewrite(path, drop=["tubes.weights.0"]))

    def test_an_unknown_tensor(self, path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"does not fit its own spec: unknown cls_token$"):
            checkpoints.load(rewrite(path, cls_token=torch.zeros(1, 1, 24)))

    def test_a_misshapen_tensor(self, path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"blocks.0.norm1.bias is \(25,\), expected \(24,\)$"):
            checkpoints.load(rewrite(path, **{"blocks.0.norm1.bias": torch.zeros(25)}))

    def test_many_faults_are_counted_not_listed(self, path: Path) -> None:
        gone = [f"blocks.1.norm{i}.{part}" for i in (1, 2) for part in ("weight", "bias")]
        with pytest.raises(CheckpointError, match=r"(missing [^;]*; ){2}missing \S+ and 1 more$"):
            checkpoints.load(rewrite(path, drop=gone))

    def test_stored_positions_of_another_clip(self, tmp_path: Path, checkpoint: Checkpoint) -> None:
        model = VideoTransformer(replace(SPEC, positions="stored"))
        path = checkpoints.save(replace(checkpoint, model=model), tmp_path / "stored.safetensors")
        with pytest.raises(CheckpointError, match=r"positions is \(5, 24\), expected \(11, 24\)"):
            checkpoints.load(rewrite(path, positions=torch.zeros(5, 24)))
        with pytest.raises(SpecError, match="stores its positions"):
            checkpoints.load(checkpoints.save(replace(checkpoint, model=model), path)).with_clip(frames=6)


@pytest.mark.skipif(not demo.WEIGHTS.is_file(), reason="the built-in model is not trained yet")
def test_the_built_in_model_ships_with_the_package() -> None:
    motion = checkpoints.load()
    assert (motion.name, motion.source, len(motion.labels)) == ("demo", "demo", 9)
    assert set(motion.labels) == set(demo.LABELS)
    assert demo.WEIGHTS.stat().st_size <= 8e6


def test_a_stored_table_is_resized_from_what_was_stored(clips: torch.Tensor) -> None:
    """By way of a small grid nothing is lost: the answers are those of the way straight there."""
    spec = replace(SPEC, gates=(), positions="stored", position_resize="bicubic")
    torch.manual_seed(0)
    model = VideoTransformer(spec).eval()
    torch.nn.init.normal_(model.positions)
    stored = Checkpoint("mine", model, CONTRACT, LABELS, digest="", other_labels=OTHERS)
    straight, detour = (
        stored.with_clip(8, (48, 32)),
        stored.with_clip(4, (16, 16)).select("motion").with_clip(8, (48, 32)),
    )
    assert torch.equal(straight.model.positions, detour.model.positions)
    back = detour.with_clip(4, (24, 24))
    assert torch.equal(back.model.positions, model.positions)
    assert torch.equal(back.model(clips), model(clips))
