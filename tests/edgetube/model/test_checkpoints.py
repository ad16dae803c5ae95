"""Weights in, weights out: nothing lost on the way, and nothing accepted that does not fit to the last tensor."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from edgetube import demo
from edgetube.errors import CheckpointError, InputError, SpecError
from edgetube.model import checkpoints
from edgetube.model.checkpoints import Checkpoint
from edgetube.model.tubevit import TubeViT
from edgetube.spec import InputContract, ModelSpec, TubeSpec, named

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


@pytest.fixture
def checkpoint():
    torch.manual_seed(0)
    model = TubeViT(SPEC).eval()
    return Checkpoint("mine", model, CONTRACT, LABELS, digest="", other_labels=OTHERS)


@pytest.fixture
def clips():
    return torch.randn(2, 3, 4, 24, 24, generator=torch.Generator().manual_seed(1))


def rewrite(path, header=None, drop=(), **tensors):
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
        [{}, {"kernel": (4, 8, 8)}, {"positions": "stored"}, {"pool": "mean"}, {"gates": ()}],
        ids=lambda change: next(iter(change), "plain"),
    )
    def test_a_loaded_model_is_the_saved_one(self, tmp_path, clips, checkpoint, change):
        torch.manual_seed(1)
        saved = replace(checkpoint, model=TubeViT(replace(SPEC, **change)).eval())
        path = checkpoints.save(saved, tmp_path / "motion.safetensors")
        loaded = checkpoints.load(path)
        assert loaded.spec == saved.spec
        assert (loaded.name, loaded.source) == ("motion", str(path))
        assert (loaded.contract, loaded.labels, loaded.other_labels) == (CONTRACT, LABELS, OTHERS)
        assert loaded.digest == hashlib.sha256(path.read_bytes()).hexdigest()
        assert not loaded.model.training
        assert loaded.model.state_dict().keys() == saved.model.state_dict().keys()
        for head in ("motion", "place"):
            torch.testing.assert_close(loaded.model(clips, head), saved.model(clips, head), atol=0, rtol=0)

    def test_half_precision_weights_become_single(self, tmp_path, checkpoint):
        path = checkpoints.save(replace(checkpoint, model=TubeViT(SPEC).half()), tmp_path / "half.safetensors")
        assert {value.dtype for value in checkpoints.load(path).model.state_dict().values()} == {torch.float32}

    def test_saving_replaces_the_file_and_leaves_nothing_beside_it(self, tmp_path, checkpoint):
        path = tmp_path / "motion.safetensors"
        path.write_bytes(b"older")
        checkpoints.save(checkpoint, path)
        assert [p.name for p in tmp_path.iterdir()] == ["motion.safetensors"]
        assert checkpoints.load(path).spec == SPEC

    def test_a_save_that_fails_keeps_the_older_file(self, tmp_path, checkpoint, monkeypatch):
        path = checkpoints.save(checkpoint, tmp_path / "motion.safetensors")
        before = path.read_bytes()

        def full(state, partial, metadata):
            partial.write_bytes(b"half of it")
            raise OSError("no space left on device")

        monkeypatch.setattr(checkpoints, "save_file", full)
        with pytest.raises(OSError, match="no space left"):
            checkpoints.save(checkpoint, path)
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["motion.safetensors"]


class TestOtherClipsAndClassifiers:
    def test_another_clip_takes_the_same_weights(self, clips, checkpoint):
        longer = checkpoint.at(frames=6, size=(32, 24))
        assert longer.spec.clip == (6, 32, 24)
        assert longer.contract == replace(CONTRACT, frames=6, height=32)
        for key, value in checkpoint.model.state_dict().items():
            torch.testing.assert_close(longer.model.state_dict()[key], value, atol=0, rtol=0)
        assert checkpoint.at(frames=4) is checkpoint
        image = checkpoint.at(frames=1)
        torch.testing.assert_close(image.model(clips[:, :, :1]), checkpoint.model(clips[:, :, :1]))

    def test_a_clip_that_does_not_fit_is_refused(self, checkpoint):
        with pytest.raises(SpecError, match=r"tube 0 .* height is 8, minimum 16"):
            checkpoint.at(size=(8, 24))

    def test_one_classifier_of_several(self, clips, checkpoint):
        place = checkpoint.select("place")
        assert (place.spec.classifiers, place.labels, place.other_labels) == ((("place", 2),), OTHERS["place"], {})
        torch.testing.assert_close(place.model(clips), checkpoint.model(clips, "place"), atol=0, rtol=0)
        with pytest.raises(InputError, match="mine has no classifier 'kinetics'; it has motion, place"):
            checkpoint.select("kinetics")


class TestRandom:
    def test_a_named_architecture_is_the_same_every_time(self):
        one, two = (checkpoints.load("random:tubevit-ti") for _ in range(2))
        assert (one.spec, len(one.labels)) == (named("tubevit-ti"), 400)
        assert (one.name, one.source) == ("tubevit-ti", "random:tubevit-ti")
        assert one.contract.shape == (32, 224, 224, 3)
        other = checkpoints.random("tubevit-ti", seed=1)
        assert one.digest == two.digest != other.digest
        same = [torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True)]
        assert all(same)
        assert not torch.equal(one.model.tubes.weights[0], other.model.tubes.weights[0])

    def test_it_leaves_the_caller_s_random_numbers_alone(self):
        torch.manual_seed(7)
        expected = torch.rand(3)
        torch.manual_seed(7)
        checkpoints.random("tubevit-ti")
        assert torch.equal(torch.rand(3), expected)

    def test_an_unknown_architecture(self):
        with pytest.raises(SpecError, match="no architecture is called 'tubevit-xl'"):
            checkpoints.load("random:tubevit-xl")


class TestRefusals:
    @pytest.fixture
    def path(self, tmp_path, checkpoint):
        return checkpoints.save(checkpoint, tmp_path / "motion.safetensors")

    def test_no_file(self, tmp_path):
        with pytest.raises(
            InputError, match=r"no checkpoint at .*gone.safetensors; give a .safetensors file, demo, or"
        ):
            checkpoints.load(tmp_path / "gone.safetensors")
        with pytest.raises(InputError, match="no checkpoint at"):
            checkpoints.load(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"PK\x03\x04 a zip file of another framework"])
    def test_not_a_safetensors_file(self, tmp_path, content):
        path = tmp_path / "weights.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"weights.safetensors is not a safetensors file: "):
            checkpoints.load(path)

    @pytest.mark.parametrize("size", [4, 200, -1])
    def test_a_truncated_file(self, path, size):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(CheckpointError, match="is not a safetensors file"):
            checkpoints.load(path)

    @pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
    def test_somebody_else_s_safetensors(self, tmp_path, metadata):
        save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors", metadata=metadata)
        with pytest.raises(CheckpointError, match=r"other.safetensors has no 'edgetube' header; write it with"):
            checkpoints.load(tmp_path / "other.safetensors")

    @pytest.mark.parametrize(
        ("header", "message"),
        [
            (lambda _: "not json", "damaged"),
            (lambda _: [], "damaged"),
            (lambda d: {key: value for key, value in d.items() if key != "spec"}, r"damaged \('spec'\)"),
            (lambda d: d | {"spec": d["spec"] | {"dropout": 0.1}}, "damaged .*ModelSpec has no field dropout"),
            (lambda d: d | {"spec": d["spec"] | {"pool": "max"}}, "damaged .*pool is 'max'"),
            (lambda d: d | {"input": d["input"] | {"frames": 8}}, r"input is \(8, 24, 24, 3\) but .* \(4, 24, 24, 3\)"),
            (lambda d: d | {"spec": d["spec"] | {"channels": 1}}, r"\(4, 24, 24, 3\) but .* \(4, 24, 24, 1\)"),
            (lambda d: d | {"labels": ["left"]}, "1 labels for the 3 classes of motion"),
            (lambda d: d | {"other_labels": {}}, "0 labels for the 2 classes of place"),
            (lambda d: d | {"labels": ["left", "none", "left"]}, "labels of motion have left more than once"),
        ],
    )
    def test_a_header_that_does_not_fit(self, path, header, message):
        with pytest.raises(CheckpointError, match=message):
            checkpoints.load(rewrite(path, header))

    def test_a_missing_tensor(self, path):
        with pytest.raises(CheckpointError, match=r"motion.safetensors does not fit .*: missing tubes.weights.0$"):
            checkpoints.load(rewrite(path, drop=["tubes.weights.0"]))

    def test_an_unknown_tensor(self, path):
        with pytest.raises(CheckpointError, match=r"does not fit its own spec: unknown cls_token$"):
            checkpoints.load(rewrite(path, cls_token=torch.zeros(1, 1, 24)))

    def test_a_misshapen_tensor(self, path):
        with pytest.raises(CheckpointError, match=r"blocks.0.norm1.bias is \(25,\), expected \(24,\)$"):
            checkpoints.load(rewrite(path, **{"blocks.0.norm1.bias": torch.zeros(25)}))

    def test_many_faults_are_counted_not_listed(self, path):
        gone = [f"blocks.1.norm{i}.{part}" for i in (1, 2) for part in ("weight", "bias")]
        with pytest.raises(CheckpointError, match=r"(missing [^;]*; ){2}missing \S+ and 1 more$"):
            checkpoints.load(rewrite(path, drop=gone))

    def test_stored_positions_of_another_clip(self, tmp_path, checkpoint):
        model = TubeViT(replace(SPEC, positions="stored"))
        path = checkpoints.save(replace(checkpoint, model=model), tmp_path / "stored.safetensors")
        with pytest.raises(CheckpointError, match=r"positions is \(5, 24\), expected \(11, 24\)"):
            checkpoints.load(rewrite(path, positions=torch.zeros(5, 24)))
        with pytest.raises(SpecError, match="stores its positions"):
            checkpoints.load(checkpoints.save(replace(checkpoint, model=model), path)).at(frames=6)


@pytest.mark.skipif(not demo.WEIGHTS.is_file(), reason="the built-in model is not trained yet")
def test_the_built_in_model_ships_with_the_package():
    motion = checkpoints.load()
    assert (motion.name, motion.source, len(motion.labels)) == ("demo", "demo", 9)
    assert set(motion.labels) == set(demo.LABELS)
    assert demo.WEIGHTS.stat().st_size <= 8e6
