"""Targets that are broken on purpose, in the ways that targets break: a gate catches each, the layers say where."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edgetube import bundle as bundles
from edgetube import cli, datasets, runtimes
from edgetube.bench import agree, layers, parity
from edgetube.bench.layers import Curve
from edgetube.bench.parity import Comparison
from edgetube.bundle import Bundle
from edgetube.errors import ParityError
from edgetube.export import canonical, proof, static, tokenizer
from edgetube.model import checkpoints
from edgetube.model.checkpoints import Checkpoint
from edgetube.precision import Precision
from edgetube.runtime import Runtime
from edgetube.runtimes.torch import Reference

CLIPS = 36
GATES = parity.DEFAULTS
"""The defaults of the command line. Half of what is broken here keeps every top-1 answer: agreement alone is blind."""

FIRST, PROJ, TUBE = "blocks.1.mlp.fc1", "blocks.2.attn.proj", "tubes.2"
"""The linears that some of them break; they have sound layers before and behind them."""

PRECISIONS: tuple[Precision, ...] = (Precision.W8A8, Precision.W4)

SMALL = ("frames", "mean45", "proj", "tube")
"""Small faults, which keep at least 99 % of the answers, or the cosine of the worst clip above 0.98."""


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    return checkpoints.load("demo")


@pytest.fixture(scope="module")
def sound(demo: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The built-in model, which has learned something; a bundle without the pipeline's own proof."""
    folder = tmp_path_factory.mktemp("sound")
    graph = canonical.trace(static.StaticTransformer(demo.model, demo.contract), demo.spec, demo.contract)
    canonical.save(graph.model, folder / "model.onnx")
    checkpoint = {"name": demo.name, "source": demo.source, "sha256": demo.digest}
    bundle = Bundle(
        folder, "sound", "onnx-fp32", Precision.FP32, "onnxruntime", demo.spec, demo.contract, demo.labels, 1,
        "model.onnx", checkpoint=checkpoint,
    )  # fmt: skip
    clips = proof.golden_clips(proof.clips(demo, 8))
    reference = Reference(demo.model, demo.contract)
    golden = proof.Golden(clips, np.concatenate([reference(clip[None]) for clip in clips]))
    with runtimes.open_bundle(bundle) as backend:
        bundle = replace(bundle, parity={"golden": golden.measure(backend, arithmetic_noise=0.0)})
    bundles.save_golden(bundle, golden.frames, golden.logits)
    return bundles.seal(bundle)


@pytest.fixture(scope="module")
def broken(sound: Bundle, demo: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """name -> bundle."""
    root = tmp_path_factory.mktemp("broken")
    makers = {
        "mean": wrong_mean,
        "channels": swapped_channels,
        "time": transposed_time,
        "scale": wrong_scale,
        "rounded": right_scale,
        "frames": swapped_frames,
        "mean45": slightly_wrong_mean,
        "proj": one_and_a_half_proj,
        "tube": one_and_a_quarter_tube,
    }
    made = {}
    for name, make in makers.items():
        folder = root / name
        folder.mkdir()
        onnx.save(make(demo, onnx.load(sound.artifact_path)), folder / sound.artifact)
        shutil.copy(sound.path / bundles.GOLDEN, folder)
        made[name] = bundles.seal(replace(sound, path=folder, name=name))
    return made


def wrong_mean(demo: Checkpoint, model: onnx.ModelProto) -> onnx.ModelProto:
    """Exported for pixels around 0: what happens when an exporter is not told of the mean."""
    tubes = tokenizer.StaticTokenizer(demo.model, replace(demo.contract, mean=(0.0, 0.0, 0.0)))
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "tubes.bias")
    bias.CopyFrom(numpy_helper.from_array(tubes.bias.numpy(), bias.name))
    return model


def slightly_wrong_mean(demo: Checkpoint, model: onnx.ModelProto) -> onnx.ModelProto:
    """0.45 for 0.5: half a thumb's breadth on the histogram."""
    tubes = tokenizer.StaticTokenizer(demo.model, replace(demo.contract, mean=(0.45, 0.45, 0.45)))
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "tubes.bias")
    bias.CopyFrom(numpy_helper.from_array(tubes.bias.numpy(), bias.name))
    return model


def swapped_frames(demo: Checkpoint, model: onnx.ModelProto) -> onnx.ModelProto:
    """Two neighbours of sixteen frames in each other's place."""
    order = np.arange(demo.spec.frames)
    order[[7, 8]] = order[[8, 7]]
    node = helper.make_node("Gather", ["frames", "order"], ["reordered"], name="reordered", axis=1)
    return behind_input(model, [node], [numpy_helper.from_array(order, "order")])


def one_and_a_half_proj(demo: Checkpoint, model: onnx.ModelProto) -> onnx.ModelProto:
    return scaled(model, f"{PROJ}.weight", 1.5)


def one_and_a_quarter_tube(demo: Checkpoint, model: onnx.ModelProto) -> onnx.ModelProto:
    return scaled(model, f"{TUBE}.weight", 1.25)


def scaled(model: onnx.ModelProto, name: str, factor: float) -> onnx.ModelProto:
    """A weight that is multiplied: a scale that was rounded, or looked up, wrongly."""
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(factor), name))
    return model


def swapped_channels(demo: Checkpoint, model: onnx.ModelProto) -> onnx.ModelProto:
    """BGR in, as image libraries deliver it."""
    swap = numpy_helper.from_array(np.array([2, 1, 0]), "swap")
    node = helper.make_node("Gather", ["frames", "swap"], ["swapped"], name="swapped", axis=4)
    return behind_input(model, [node], [swap])


def transposed_time(demo: Checkpoint, model: onnx.ModelProto) -> onnx.ModelProto:
    """Height before time, in a buffer of the same size."""
    shape = numpy_helper.from_array(np.array([1, *demo.contract.shape]), "shape")
    turn = helper.make_node("Transpose", ["frames"], ["turned"], name="turned", perm=[0, 2, 1, 3, 4])
    back = helper.make_node("Reshape", ["turned", "shape"], ["reshaped"], name="reshaped")
    return behind_input(model, [turn, back], [shape])


def behind_input(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], tensors: Sequence[onnx.TensorProto]
) -> onnx.ModelProto:
    for node in model.graph.node:
        node.input[:] = [nodes[-1].output[0] if name == "frames" else name for name in node.input]
    rest = list(model.graph.node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in (*nodes, *rest)]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    model.graph.initializer.extend(tensors)
    return model


def wrong_scale(demo: Checkpoint, model: onnx.ModelProto) -> onnx.ModelProto:
    """int8 weights of one linear whose stored scale is twice what they were rounded with."""
    return quantised(model, 2.0)


def right_scale(demo: Checkpoint, model: onnx.ModelProto) -> onnx.ModelProto:
    return quantised(model, 1.0)


def quantised(model: onnx.ModelProto, factor: float) -> onnx.ModelProto:
    name = f"{FIRST}.weight"
    weight = next(t for t in model.graph.initializer if t.name == name)
    values = numpy_helper.to_array(weight)
    scale = np.abs(values).max(axis=0) / 127
    integers = np.clip(np.rint(values / scale), -127, 127).astype(np.int8)
    model.graph.initializer.remove(weight)
    model.graph.initializer.extend(
        numpy_helper.from_array(v, f"{name}.{n}")
        for v, n in ((integers, "int8"), (scale * np.float32(factor), "scale"))
    )
    node = helper.make_node("DequantizeLinear", [f"{name}.int8", f"{name}.scale"], [name], name=name, axis=1)
    model.graph.node.insert(0, node)
    return model


@pytest.fixture(scope="module")
def comparison(sound: Bundle, broken: dict[str, Bundle]) -> Comparison:
    return parity.measure([sound, *broken.values()], datasets.built_in(CLIPS, sound.labels))


@pytest.fixture(scope="module")
def curves(sound: Bundle, broken: dict[str, Bundle]) -> dict[str, Curve]:
    found = layers.curves([sound, *broken.values()], datasets.built_in(2, sound.labels))
    return {curve.name: curve for curve in found}


@pytest.mark.parametrize(("name", "layer"), [("channels", "tubes"), ("scale", FIRST), ("proj", PROJ)])
def test_one_clip_names_the_artifact_and_its_layer(
    sound: Bundle, broken: dict[str, Bundle], name: str, layer: str
) -> None:
    """Beside the trained model and a sound artifact."""
    found = agree.measure([sound, broken[name]], datasets.single("demo", sound.labels).read(sound.contract))
    assert list(found.outliers()) == [(name, (layer,))]
    assert [pair.names for pair in found.pairs if pair.departs is None] == [("reference", "sound")]


@pytest.mark.parametrize("name", ["mean", "channels", "time", "scale", *SMALL])
def test_a_gate_catches_it(comparison: Comparison, name: str) -> None:
    failed = [verdict for verdict in GATES.judge(comparison) if not verdict.passed]
    assert name in {verdict.bundle for verdict in failed}


def test_agreement_alone_would_not_see_three_of_them(comparison: Comparison) -> None:
    """What `docs/parity.md` says of the defaults."""
    found = {one.bundle.name: one.parity for one in comparison.measured}
    blind = [found[name] for name in ("mean", "channels", "scale")]
    assert all(one.agreement >= 0.97 for one in blind)
    assert all(0.9 < one.cosine < 0.98 for one in blind), [one.cosine for one in blind]
    assert found["time"].agreement < 0.5
    assert min(found["sound"].cosine, found["rounded"].cosine) > 0.999


@pytest.mark.parametrize("name", SMALL)
def test_small_faults_pass_the_older_gates_and_fail_each_of_the_newer(comparison: Comparison, name: str) -> None:
    """Agreement and cosine pass what the SQNR of the logits and the error of the tokens or of a block do not."""
    one = next(one for one in comparison.measured if one.bundle.name == name)
    failed = {verdict.gate for verdict in GATES.verdicts(one) if not verdict.passed}
    assert failed >= {"min-sqnr", "max-layer-jump"}
    assert "min-order-agreement" in failed or name != "frames"
    assert "min-agreement" not in failed
    assert one.probe.jump is not None
    assert one.probe.jump[0] == {"proj": "blocks.2"}.get(name, "tubes")


def test_the_wider_limits_of_coarser_precisions_see_them_too(comparison: Comparison) -> None:
    """The faults alone, without the noise that int8 or 4-bit weights add to them."""
    found = {one.bundle.name: one for one in comparison.measured}
    for name in SMALL:
        for precision in PRECISIONS:
            one = replace(found[name], bundle=replace(found[name].bundle, precision=precision))
            assert any(not v.passed for v in GATES.verdicts(one)), (name, precision, one.parity.sqnr, one.probe)


@pytest.mark.parametrize("name", ["channels", *SMALL])
def test_the_golden_clips_see_it_on_the_device(broken: dict[str, Bundle], name: str) -> None:
    """The sound artifact's bound, on one that was broken afterwards and hashed anew."""
    with Runtime(broken[name].path) as device, pytest.raises(ParityError, match="golden clips have an SQNR of"):
        device.check()


def test_the_command_line_says_so_with_its_exit_code(
    broken: dict[str, Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["parity", str(broken["mean"].path), "--clips", "18", "--layers", "--layer-clips", "1", "--json"])
    assert stopped.value.code == 1
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["layers"][0]["first_jump"] == "tubes"
    assert [(gate["gate"], gate["passed"]) for gate in document["gates"]] == [
        ("min-agreement", True),
        ("min-cosine", False),
        ("min-sqnr", False),
        ("min-order-agreement", True),
        ("max-layer-jump", False),
    ]
    assert "mean: cosine is 0.9" in captured.err
    assert "layer jump at tubes is" in captured.err
    assert "--min-cosine asks for at least 0.98" in " ".join(captured.err.split())


def test_the_sound_ones_pass(comparison: Comparison, curves: dict[str, Curve], sound: Bundle) -> None:
    found = {one.bundle.name: one for one in comparison.measured}
    assert [str(verdict) for verdict in GATES.verdicts(found[sound.name]) if not verdict.passed] == []
    one = found["rounded"]  # one linear in int8: as good as int8 has to be, not as float32
    probe = replace(one.probe, jump=layers.largest_drop(curves["rounded"], Precision.W8A8))
    rounded = replace(one, bundle=replace(one.bundle, precision=Precision.W8A8), probe=probe)
    assert [str(verdict) for verdict in GATES.verdicts(rounded) if not verdict.passed] == []
    assert {verdict.gate for verdict in GATES.verdicts(one) if not verdict.passed} == {"max-layer-jump"}
    assert comparison.measured[0].parity.agreement == 1.0


@pytest.mark.parametrize(
    ("name", "place"),
    [
        *((name, "tubes") for name in ("mean", "channels", "time", "frames", "mean45", "tube")),
        ("scale", FIRST),
        ("proj", PROJ),
    ],
)
def test_the_layers_name_the_place(curves: dict[str, Curve], name: str, place: str) -> None:
    assert curves[name].first_jump == place


def test_nothing_is_named_in_sound_ones(curves: dict[str, Curve], sound: Bundle) -> None:
    assert curves[sound.name].first_jump is None
    assert curves["rounded"].first_jump is None
    assert min(found.sqnr_db for found in curves[sound.name].curve) > 90


def test_what_comes_before_the_broken_layer_is_untouched(curves: dict[str, Curve]) -> None:
    ratios = {found.layer: found.sqnr_db for found in curves["scale"].curve}
    assert ratios["blocks.1.norm2"] > 90
    assert ratios[FIRST] == pytest.approx(0, abs=6)  # twice the weights: the error is as large as the signal
