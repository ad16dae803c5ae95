"""Which layers are compared, where an error is said to jump, and what is looked at in each kind of artifact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from edgetube import bundle as bundles
from edgetube import datasets, runtimes
from edgetube.bench import layers
from edgetube.bench.layers import Layer
from edgetube.datasets import ClipSet
from edgetube.errors import BackendError, InputError
from edgetube.export import pipeline
from edgetube.model import checkpoints
from edgetube.model.reduction import TokenState
from edgetube.roles import roles_of
from edgetube.runtimes.base import Backend
from edgetube.video import Frames


def curve(*ratios: float) -> list[Layer]:
    return [Layer(str(i), ratio) for i, ratio in enumerate(ratios)]


@pytest.mark.parametrize(
    ("ratios", "place"),
    [
        ((120, 118, 117), None),
        ((120, 70, 69), None),  # still far better than anybody can see
        ((49, 40, 41, 39), None),  # int8
        ((48, 22, 21, 20), "1"),
        ((10, 60, 60), "0"),
        ((49, 40, 31, 20, 5), "2"),
        ((float("inf"), 119, float("-inf")), "2"),
        ((), None),
    ],
)
def test_the_first_jump(ratios: tuple[float, ...], place: str | None) -> None:
    assert layers.first_jump(curve(*ratios)) == place


@pytest.mark.parametrize(("rows", "batch", "kept"), [(2, 2, 1), (1, 1, 1), (12, 2, 6), (6, 1, 6)])
def test_all_frames_of_the_first_clip_are_compared(rows: int, batch: int, kept: int) -> None:
    values = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    np.testing.assert_array_equal(layers._first_clip(values, batch), values[:kept])


def test_names_are_those_of_the_graph(tiny_bundle: Path) -> None:
    import onnx

    bundle = bundles.load(tiny_bundle)
    made = {name for node in onnx.load(bundle.artifact_path).graph.node for name in node.output}
    assert set(roles_of(bundle.spec).layers) <= made
    with runtimes.open_bundle(bundle) as backend:
        assert backend.layers(("nothing", *roles_of(bundle.spec).layers)) == roles_of(bundle.spec).layers


def test_a_tap_shows_what_the_modules_compute(
    tiny_bundle: Path, tiny_checkpoint: Path, rng: np.random.Generator
) -> None:
    """Against PyTorch alone, module by module and by hand."""
    bundle = bundles.load(tiny_bundle)
    model = checkpoints.load(tiny_checkpoint).model
    clip = rng.integers(0, 256, (1, *bundle.contract.shape), np.uint8)
    mean, std = np.array(bundle.contract.mean, np.float32), np.array(bundle.contract.std, np.float32)
    pixels = torch.from_numpy(((clip / np.float32(255) - mean) / std).transpose(0, 4, 1, 2, 3))
    with torch.no_grad():
        z0 = model.tubes(pixels)
        x = z0 + model.positions
        block: Any = model.blocks[0]
        normed = block.norm1(x)
        qkv = block.attn.qkv(normed).numpy()
        qkv[..., : model.spec.width] /= (model.spec.width / model.spec.heads) ** 0.5
        logits = model.classify(model.encode(x, TokenState(z0=z0)))
    with runtimes.open_bundle(bundle) as backend:
        got = backend.tap(["tubes", "blocks.0.norm1", "blocks.0.attn.qkv", "logits"])(clip)
        np.testing.assert_array_equal(got["logits"], backend(clip))
    for name, expected in (("tubes", x), ("blocks.0.norm1", normed), ("blocks.0.attn.qkv", qkv), ("logits", logits)):
        np.testing.assert_allclose(got[name], np.asarray(expected), atol=1e-4, err_msg=name)


def test_a_float_artifact_is_the_model_in_every_layer(tiny_bundle: Path) -> None:
    bundle = bundles.load(tiny_bundle)
    (found,) = layers.curves([bundle], datasets.built_in(2, bundle.labels))
    names = [layer.layer for layer in found.curve]
    assert {"tubes", "blocks.0.attn.qkv", "blocks.1.mlp.fc2", "blocks.1", "norm", "pool", "logits"} <= set(names)
    assert names == [name for name in roles_of(bundle.spec).layers if name in names]
    assert min(layer.sqnr_db for layer in found.curve) > 90
    assert found.to_json()["first_jump"] is None


def test_a_bundle_as_the_reference_shows_what_lies_between_modules(tiny_bundle: Path) -> None:
    bundle = bundles.load(tiny_bundle)
    (found,) = layers.curves([bundle], datasets.built_in(1, bundle.labels), reference=bundle)
    assert "blocks.0.attn.softmax" in [layer.layer for layer in found.curve]
    assert {layer.sqnr_db for layer in found.curve} == {float("inf")}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("target", "settings", "lowest"),
    [
        ("onnx-fp16", {}, 55),
        ("openvino-fp32", {}, 80),
        ("coreml-fp16", {}, 45),
        ("coreml-fp16", {"layout": "columns"}, 45),
    ],
)
@pytest.mark.slow
def test_the_layers_of_other_artifacts(
    tiny_checkpoint: Path, tmp_path: Path, target: str, settings: dict[str, Any], lowest: int, batch: int
) -> None:
    from edgetube import export

    made = export.target(target)
    if missing := made.missing(made.build_needs):
        pytest.skip(f"{target} needs {', '.join(missing)}: {made.remedy}")
    options = pipeline.Options(lowering="gather", batch=batch, settings=settings)
    bundle = pipeline.export_model(target, tiny_checkpoint, tmp_path, options)
    (found,) = layers.curves([bundle], datasets.built_in(2, bundle.labels))
    names = {layer.layer for layer in found.curve}
    inside = {f"blocks.{i}.{part}" for i in range(2) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert {"tubes", "logits", "blocks.0", "blocks.1"} | inside <= names
    assert min(layer.sqnr_db for layer in found.curve) > lowest
    assert found.first_jump is None


class Blind(Backend):
    """A runtime that shows nothing of what is inside."""

    def infer(self, clips: Frames) -> npt.NDArray[np.float32]:
        return np.zeros((1, 9), np.float32)

    def release(self) -> None:
        pass


def test_a_runtime_that_shows_nothing_says_so(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bundles.load(tiny_bundle)
    monkeypatch.setattr(runtimes, "open_bundle", lambda bundle, **_: Blind(bundle.contract, bundle.batch))
    (found,) = layers.curves([bundle], datasets.built_in(1, bundle.labels))
    assert found.curve == ()
    assert found.note == "this bundle's runtime shows no inner tensors"
    with pytest.raises(BackendError, match="shows no layers; leave out --reference"):
        layers.curves([bundle], datasets.built_in(1, bundle.labels), reference=bundle)
    with pytest.raises(BackendError, match="shows no inner tensors"):
        Blind(bundle.contract, 1).tap(["tubes"])


def test_no_clips_are_refused(tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match="no clips to look at layers on"):
        layers.curves([bundles.load(tiny_bundle)], ClipSet("empty", ()))


def test_what_equalisation_moves_is_not_compared(tiny_bundle: Path) -> None:
    bundle = bundles.load(tiny_bundle)
    record = next(iter(bundle.files.values()))
    equalised = replace(bundle, files={**bundle.files, bundles.CALIBRATION: record})
    (found,) = layers.curves([equalised], datasets.built_in(1, bundle.labels))
    names = {layer.layer for layer in found.curve}
    assert "blocks.0.attn.qkv" in names
    assert not {"blocks.0.norm1", "blocks.0.norm2"} & names
