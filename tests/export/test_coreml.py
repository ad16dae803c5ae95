"""Core ML packages: every way to build one converts, answers like PyTorch, and is what Apple's tools expect."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch

import edgetube
from edgetube import bundle as bundles
from edgetube import calibration, datasets, demo, export, metrics, mlpackage, runtimes
from edgetube.bundle import Bundle
from edgetube.calibration import Calibrated, numeric
from edgetube.calibration.clips import collect
from edgetube.calibration.table import CalibrationTable, Range
from edgetube.errors import BundleError, InputError, MissingPackageError, SpecError
from edgetube.export import canonical, coreml, int8, mlprogram, mlweights, pipeline, proof, quantize, static, tokenizer
from edgetube.export.base import BuildContext, Built
from edgetube.export.build import MOMENT_CLIPS
from edgetube.export.canonical import Graph
from edgetube.model import checkpoints
from edgetube.model.checkpoints import Checkpoint
from edgetube.model.transformer import VideoTransformer
from edgetube.precision import Precision
from edgetube.runtimes import mil
from edgetube.runtimes.torch import Reference
from edgetube.targets import Target
from tests.export import models
from tests.export.test_torchgraph import table_of
from tests.marks import but

ct = pytest.importorskip("coremltools")

FP16 = export.target("coreml-fp16")
CLOSE = 5e-3
"""A quarter of its tolerance."""


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return checkpoints.load(tiny_checkpoint)


@pytest.fixture(scope="module")
def traced(checkpoint: Checkpoint) -> Callable[..., Graph]:
    """The tiny model's graph by lowering, batch and kind of input."""
    known = {}

    def trace(lowering: str = "gather", batch: int = 1, image: bool = False) -> Any:
        if (lowering, batch, image) not in known:
            part = checkpoint.with_clip(1, None) if image else checkpoint
            module = static.StaticTransformer(part.model, part.contract, lowering, batch=batch)
            graph = canonical.trace(module, part.spec, part.contract, batch)
            known[lowering, batch, image] = dataclasses.replace(graph, labels=part.labels)
        return known[lowering, batch, image]

    return trace


def build(
    graph: Graph,
    target: Target,
    folder: Path,
    table: CalibrationTable | None = None,
    image: Callable[[], Graph] | None = None,
) -> Built:
    return coreml.build(BuildContext(graph, target, folder, table, image))


def evaluate(folder: Any, graph: Any, clips: npt.NDArray[np.uint8], function: Any = None) -> Any:
    """Logits of the package in `folder` for clips (batch, T, H, W, 3)."""
    program = mil.Program(mlpackage.load(folder / "model.mlpackage"), function)
    return program({"frames": clips})["logits"]


@pytest.fixture(scope="module")
def clips(checkpoint: Checkpoint) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(5).integers(0, 256, (2, *checkpoint.contract.shape), np.uint8)


@pytest.fixture(scope="module")
def reference(checkpoint: Checkpoint, clips: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    return Reference(checkpoint.model, checkpoint.contract)(clips)


def error(got: Any, reference: npt.NDArray[np.float32]) -> Any:
    return np.abs(got - reference[: len(got)]).max() / max(1, np.abs(reference).max())


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("lowering", tokenizer.LOWERINGS)
def test_every_lowering_in_every_layout(
    tmp_path: Path,
    traced: Callable[..., Graph],
    clips: npt.NDArray[np.uint8],
    reference: npt.NDArray[np.float32],
    lowering: str,
    layout: str,
) -> None:
    graph = traced(lowering, batch=2)
    build(graph, FP16.choose({"layout": layout}), tmp_path)
    assert error(evaluate(tmp_path, graph, clips), reference) < FP16.tolerance


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "w8", "w4"])
@pytest.mark.parametrize("deployment", ["iOS16", "iOS17", "iOS18"])
def test_every_precision_for_every_system(
    tmp_path: Path,
    traced: Callable[..., Graph],
    clips: npt.NDArray[np.uint8],
    reference: npt.NDArray[np.float32],
    precision: str,
    deployment: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mlweights, "MIN_COMPRESSED_SIZE", 64)  # the tiny model's weights are all small
    layout = "columns" if deployment == "iOS18" else "rows"
    target = export.target(f"coreml-{precision}").choose({"deployment": deployment, "layout": layout})
    build(traced("gather"), target, tmp_path)
    package = mlpackage.load(tmp_path / "model.mlpackage")
    assert package.version == {"iOS16": 7, "iOS17": 8, "iOS18": 9}[deployment]
    kinds = {operation.kind for operation in package.functions["main"].operations}
    integers = "constexpr_blockwise_shift_scale" if deployment == "iOS18" else "constexpr_affine_dequantize"
    expected = {"fp16": set(), "w8": {integers}, "w4": {integers, "constexpr_lut_to_dense"}}[precision]
    assert {kind for kind in kinds if kind.startswith("constexpr")} == expected
    validate(tmp_path / "model.mlpackage")
    assert error(evaluate(tmp_path, traced("gather"), clips[:1]), reference[:1]) < target.tolerance


def test_layouts_compute_the_same(tmp_path: Path, traced: Callable[..., Graph], clips: npt.NDArray[np.uint8]) -> None:
    """They differ by the order of float16 sums alone."""
    answers = []
    for layout in ("rows", "columns"):
        folder = tmp_path / layout
        folder.mkdir()
        build(traced("conv2d"), FP16.choose({"layout": layout}), folder)
        answers.append(evaluate(folder, traced("conv2d"), clips[:1]))
    np.testing.assert_allclose(answers[0], answers[1], atol=5e-3)
    kinds = [o.kind for o in mlpackage.load(tmp_path / "columns" / "model.mlpackage").functions["main"].operations]
    blocks, heads = 2, 2
    assert kinds.count("einsum") == blocks * heads * 2
    assert kinds.count("matmul") == 1  # the pooling
    assert kinds.count("linear") == 1  # the classifier


@pytest.mark.slow
def test_no_tensor_exceeds_rank_5_and_all_types_are_core_mls(tmp_path: Path, traced: Callable[..., Graph]) -> None:
    for layout in ("rows", "columns"):
        for lowering in tokenizer.LOWERINGS:
            folder = tmp_path / f"{layout}-{lowering}"
            folder.mkdir()
            build(traced(lowering), FP16.choose({"layout": layout}), folder)
            function = mlpackage.load(folder / "model.mlpackage").functions["main"]
            types = [kind for operation in function.operations for _, kind in operation.outputs]
            assert max(len(kind.shape) for kind in types) <= 5
            assert {kind.dtype for kind in types} <= {"fp16", "fp32", "int32", "bool", "string", "dictionary"}


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("name", models.OTHERS)
def test_other_transformers_answer_like_pytorch(tmp_path: Path, name: str, layout: str) -> None:
    build(models.trace(name, "conv2d"), FP16.choose({"layout": layout}), tmp_path)
    frames = models.noise(name)
    answer = evaluate(tmp_path, models.trace(name, "conv2d"), frames)
    assert error(answer, models.reference(name, frames)) < CLOSE
    kinds = Counter(o.kind for o in mlpackage.load(tmp_path / "model.mlpackage").functions["main"].operations)
    spec = models.SPECS[name]
    if layout == "columns":  # the tokens stay in columns from the embedding to the readout
        pooling = spec.query_pool.depth * spec.query_pool.heads if spec.query_pool else 0
        assert kinds["einsum"] == 2 * (spec.depth * spec.heads + pooling)
        # Into columns and back, behind the convolution, of every head's keys; each operand of a query pool; attention
        # over time, and what is cut into frames and joined again, which are in rows.
        apart = 11 * spec.depth if spec.attention == "divided" else 0
        assert kinds["transpose"] - kinds["einsum"] / 2 <= 4 + (4 if spec.query_pool else 0) + apart


@pytest.mark.parametrize("layout", but(["rows", "columns"], pytest.mark.slow, "rows"))
@pytest.mark.parametrize("name", models.REDUCED)
def test_fewer_tokens_answer_like_the_reference_that_follows(tmp_path: Path, name: str, layout: str) -> None:
    graph, frames = models.trace(name, batch=2), models.noise(name, 2)
    build(graph, FP16.choose({"layout": layout}), tmp_path)
    package, decisions = mlpackage.load(tmp_path / "model.mlpackage"), graph.roles.decisions
    types = {made: kind for o in package.functions["main"].operations for made, kind in o.outputs}
    assert {types[mlpackage.label(decision)].dtype for decision in decisions} == {"int32"}
    shown = mil.Program(package)({"frames": frames}, keep=[mlpackage.label(decision) for decision in decisions])
    reference = Reference(*models.model_of(name))
    for i in range(2):
        with reference.following({each: shown[mlpackage.label(each)][i : i + 1] for each in decisions}):
            expected = reference(frames[i : i + 1])
        assert error(shown["logits"][i : i + 1], expected) < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("precision", ["w8", "w4", "int8"])
@pytest.mark.parametrize("name", models.REDUCED)
def test_fewer_tokens_with_compressed_weights_and_in_integers(
    tmp_path: Path, name: str, precision: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What decides is not compressed: the model that follows is as near as without it, or as its simulation is."""
    monkeypatch.setattr(mlweights, "MIN_COMPRESSED_SIZE", 64)
    graph, frames, target = models.trace(name), models.noise(name), export.target(f"coreml-{precision}")
    table = table_of(graph.model, "int8") if target.precision.quantises_activations else None
    build(graph, target.choose({"layout": layout}), tmp_path, table)
    package, decisions = mlpackage.load(tmp_path / "model.mlpackage"), graph.roles.decisions
    types = {made: kind for o in package.functions["main"].operations for made, kind in o.outputs}
    assert {types[mlpackage.label(decision)].dtype for decision in decisions} == {"int32"}
    shown = mil.Program(package)({"frames": frames}, keep=[mlpackage.label(each) for each in decisions])
    decided = {each: shown[mlpackage.label(each)] for each in decisions}
    found = models.following_sqnr(name, frames, shown["logits"], decided)
    if table is None:
        assert found > {"w8": 30, "w4": 12}[precision]
    else:
        assert found > models.simulated_sqnr(name, frames, quantize.qdq(graph.model, table)) - 3


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["w8", "w4"])
@pytest.mark.parametrize("name", models.OTHERS)
def test_other_transformers_with_compressed_weights(
    tmp_path: Path, name: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlweights, "MIN_COMPRESSED_SIZE", 64)
    target = export.target(f"coreml-{precision}")
    frames = models.noise(name)
    for layout in ("rows", "columns"):
        (tmp_path / layout).mkdir()
        build(models.trace(name), target.choose({"layout": layout}), tmp_path / layout)
        answer = evaluate(tmp_path / layout, models.trace(name), frames)
        assert error(answer, models.reference(name, frames)) < (target.tolerance or 0)
        validate(tmp_path / layout / "model.mlpackage")


@pytest.mark.parametrize("pin", ["blocks.*.attn.turn_?*", "blocks.*.mlp.act*", "blocks.*.norm?"])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_rotations_and_activations_may_be_pinned(tmp_path: Path, layout: str, pin: str) -> None:
    build(models.trace("rotary"), FP16.choose({"layout": layout, "fp32": pin}), tmp_path)
    frames = models.noise("rotary")
    answer = evaluate(tmp_path, models.trace("rotary"), frames)
    assert error(answer, models.reference("rotary", frames)) < CLOSE


def layer_norm_epsilons(path: Path) -> set[float]:
    function = mlpackage.load(path).functions["main"]
    constants = {o.outputs[0][0]: o.inputs["val"][0] for o in function.operations if o.kind == "const"}
    found = [o.inputs["epsilon"][0] for o in function.operations if o.kind == "layer_norm"]
    return {float(constants[e.name] if isinstance(e, mlpackage.Ref) else e) for e in found}


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_a_small_epsilon_does_not_become_zero_in_float16(tmp_path: Path, layout: str) -> None:
    """Zeros as a class token: without an epsilon their norm is 0 / 0."""
    spec = dataclasses.replace(models.SPECS["dense"], prefix=1)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = VideoTransformer(spec).eval()
    contract = models.model_of("dense")[1]
    graph = canonical.trace(static.StaticTransformer(model, contract), spec, contract)
    build(graph, FP16.choose({"layout": layout}), tmp_path)
    assert layer_norm_epsilons(tmp_path / "model.mlpackage") == {2.0**-24, float(np.float16(1e-5))}
    frames = models.noise("dense")
    assert error(evaluate(tmp_path, graph, frames), Reference(model, contract)(frames)) < CLOSE


def test_the_smallest_epsilon_of_float16_changes_no_answer() -> None:
    """Even at the variance of a class token as it is initialised, 0.02^2, less than a rounding of float16."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(scale=0.02, size=(64, 384)))
    exact = torch.nn.functional.layer_norm(x, (384,), eps=1e-12)
    raised = torch.nn.functional.layer_norm(x, (384,), eps=mlprogram.SMALLEST_EPSILON)
    assert np.float16(mlprogram.SMALLEST_EPSILON) == np.nextafter(np.float16(0), np.float16(1))
    assert float((raised / exact - 1).abs().max()) < 2.0**-11 / 4


def test_frames_may_be_integers(
    tmp_path: Path, traced: Callable[..., Graph], clips: npt.NDArray[np.uint8], reference: npt.NDArray[np.float32]
) -> None:
    build(traced("slice"), FP16.choose({"input": "int32"}), tmp_path)
    package = mlpackage.load(tmp_path / "model.mlpackage")
    assert package.functions["main"].inputs["frames"].dtype == "int32"
    assert error(evaluate(tmp_path, traced("slice"), clips[:1]), reference[:1]) < FP16.tolerance


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_pinned_tensors_are_computed_in_float32(
    tmp_path: Path,
    traced: Callable[..., Graph],
    clips: npt.NDArray[np.uint8],
    reference: npt.NDArray[np.float32],
    layout: str,
) -> None:
    pins = ["blocks.*.norm?", "blocks.1.attn.scores", "blocks.0.mlp.fc1", "logits"]
    target = FP16.choose({"fp32": ",".join(pins), "layout": layout})
    build(traced("gather"), target, tmp_path)
    function = mlpackage.load(tmp_path / "model.mlpackage").functions["main"]
    wide = {name for o in function.operations for name, kind in o.outputs if kind.dtype == "fp32"}
    assert {"blocks_0_norm1", "blocks_1_norm2", "blocks_0_mlp_fc1", "logits"} <= wide
    assert not any("fc2" in name and "weight" in name for name in wide)
    assert error(evaluate(tmp_path, traced("gather"), clips[:1]), reference[:1]) < FP16.tolerance


INT8 = export.target("coreml-int8")


@pytest.fixture(scope="module")
def calibrated(
    checkpoint: Checkpoint, traced: Callable[..., Graph], tmp_path_factory: pytest.TempPathFactory
) -> Calibrated:
    """A calibration from few clips, whatever it costs."""
    folder = tmp_path_factory.mktemp("clips")
    source = datasets.built_in_calibration(12, checkpoint.labels)
    few = collect(source, checkpoint.contract, checkpoint.labels, folder)
    options: dict[str, Any] = {"activations": "int8", "workspace": folder, "max_drop": 100.0}
    return calibration.calibrate(traced().model, traced().roles, few, few, export.evaluator(), **options)


@pytest.fixture(scope="module")
def rendered(checkpoint: Checkpoint) -> npt.NDArray[np.uint8]:
    """Clips of the kind that was calibrated on, (4, T, H, W, 3)."""
    return np.stack([clip.frames for clip in datasets.built_in(4, ()).clips(checkpoint.contract)])


@pytest.mark.parametrize(
    ("lowering", "settings"),
    [("gather", {}), ("slice", {"input": "int32"}), ("conv2d", {"layout": "columns", "deployment": "iOS18"})],
    ids=["rows", "integers", "columns"],
)
def test_int8_computes_what_the_table_says(
    tmp_path: Path,
    traced: Callable[..., Graph],
    calibrated: Calibrated,
    rendered: npt.NDArray[np.uint8],
    lowering: str,
    settings: dict[str, Any],
) -> None:
    """Against ONNX Runtime on the Q/DQ graph of the same table: far nearer to it than to the float graph.

    The table's ranges are too narrow on purpose: in good ones, what float16 rounds to the other side of a step is
    nearly as much as the steps themselves.
    """
    graph, table = quantize.apply(calibrated, traced(lowering))
    narrow = {n: r if r.low == 0 else Range(r.low / 4, r.high / 4, r.method) for n, r in table.ranges.items()}
    table = dataclasses.replace(table, ranges=narrow)
    built = build(graph, INT8.choose(settings), tmp_path, table)
    oracle = export.evaluator()(quantize.qdq(graph.model, table, activations="int8"))
    plain = export.evaluator()(graph.model)
    expected = np.concatenate([oracle({"frames": clip[None]})[0] for clip in rendered])
    unquantised = np.concatenate([plain({"frames": clip[None]})[0] for clip in rendered])
    got = np.concatenate([evaluate(tmp_path, graph, clip[None]) for clip in rendered])
    assert metrics.sqnr(expected, got) > metrics.sqnr(expected, unquantised) + 15
    assert sum(built.details["integers"].values()) == len(table.quantised)


def test_what_calibration_adds_behind_gelu_does_not_turn_tokens_around(
    tmp_path: Path, traced: Callable[..., Graph], calibrated: Calibrated
) -> None:
    graph, table = quantize.apply(calibrated, traced("conv2d"))
    assert any(node.name.endswith(".centred") for node in graph.model.graph.node)
    counts = []
    for target, given, tables in ((FP16, traced("conv2d"), ()), (INT8, graph, (table,))):
        folder = tmp_path / target.name
        folder.mkdir()
        build(given, target.choose({"layout": "columns"}), folder, *tables)
        operations = mlpackage.load(folder / "model.mlpackage").functions["main"].operations
        counts.append(sum(o.kind == "transpose" for o in operations))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("lowering", ["gather", "conv2d"])
def test_int8_weights_and_scales_are_the_tables(
    tmp_path: Path, traced: Callable[..., Graph], calibrated: Calibrated, lowering: str
) -> None:
    graph, table = quantize.apply(calibrated, traced(lowering))
    build(graph, INT8, tmp_path, table)
    operations = mlpackage.load(tmp_path / "model.mlpackage").functions["main"].operations
    found = {o.outputs[0][0]: o.inputs for o in operations if o.kind == "constexpr_affine_dequantize"}
    scales = {o.outputs[0][0]: o.inputs["scale"][0] for o in operations if o.kind == "quantize"}
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.model.graph.initializer}
    makers = {name: node.op_type for node in graph.model.graph.node for name in node.output}
    assert len(found) == len(table.quantised) > 4
    assert len(scales) == len(table.ranges)
    constants = {o.outputs[0][0]: o.inputs["val"][0] for o in operations if o.kind == "const"}
    for plan in table.quantised:
        exact = numeric.quantize_weights(weights[plan.weight], np.array(plan.weight_scales, np.float32)).T
        stored = found[mlprogram.label(plan.weight)]["quantized_data"][0]
        assert np.abs(stored.astype(int) - exact).max() <= 1  # the scale was rounded to float16
        assert (stored == exact).mean() > 0.9
        pixels = makers[plan.activation] == "Cast"
        scale = scales[f"{mlprogram.label(plan.activation)}_int8"]
        scale = constants[scale.name] if isinstance(scale, mlpackage.Ref) else scale
        assert float(scale) == pytest.approx(table.ranges[plan.activation].symmetric / (256 if pixels else 1), rel=1e-3)


def test_a_pinned_linear_is_not_quantised(tmp_path: Path, traced: Callable[..., Graph], calibrated: Calibrated) -> None:
    graph, table = quantize.apply(calibrated, traced())
    built = build(graph, INT8.choose({"fp32": "blocks.0.mlp.fc1,blocks.1.attn.qkv"}), tmp_path, table)
    assert sum(built.details["integers"].values()) == len(table.quantised) - 2


def test_a_table_of_another_graph_is_refused(
    tmp_path: Path, traced: Callable[..., Graph], calibrated: Calibrated
) -> None:
    _, table = quantize.apply(calibrated, traced())
    with pytest.raises(InputError, match="a table does not carry over"):
        build(traced(), INT8, tmp_path, table)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"deployment": "iOS16"}, "deployment is 'iOS16'; expected one of iOS17, iOS18"),
        ({"functions": "video+image"}, "coreml-int8 has no setting 'functions'"),
    ],
)
def test_what_int8_cannot_be(settings: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        INT8.choose(settings)


@pytest.mark.slow
def test_an_int8_bundle(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rendered: npt.NDArray[np.uint8]
) -> None:
    """Judged by the evaluator, sealed with its table, read by Apple's loader, any number of clips."""
    monkeypatch.setattr(int8, "CALIBRATION_CLIPS", 9)
    monkeypatch.setattr(int8, "JUDGING_CLIPS", 36)
    options = pipeline.Options(lowering="gather", batch=2)
    bundle = pipeline.export_model("coreml-int8", tiny_checkpoint, tmp_path, options)
    assert bundle.status == ("emulated" if runtimes.proof_device(bundle.target, bundle.backend) else "executed")
    assert bundle.build["int8"]["accuracy"]["clips"] == 36
    table = CalibrationTable.load(bundle.path / bundles.CALIBRATION)
    assert bundle.build["integers"] == {"linear": len(table.quantised)}
    validate(bundle.artifact_path)
    with runtimes.open_bundle(bundle, device=runtimes.EMULATED) as backend:
        whole = backend(rendered[:3])
        for clip, answer in zip(rendered[:3], whole, strict=True):
            np.testing.assert_allclose(backend(clip[None])[0], answer, atol=1e-4)
    expected = Reference(checkpoints.load(tiny_checkpoint).model, bundle.contract)(rendered[:3])
    assert error(whole, expected) < 0.1


def test_a_pin_that_matches_nothing_is_refused(tmp_path: Path, traced: Callable[..., Graph]) -> None:
    with pytest.raises(InputError, match=r"fp32='blocks\.9\.\*' matches no tensor of the graph; it has tubes"):
        build(traced(), FP16.choose({"fp32": "blocks.9.*"}), tmp_path)


def test_an_unknown_operator_is_refused_by_name(tmp_path: Path, traced: Callable[..., Graph]) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(traced().model)
    next(node for node in model.graph.node if node.op_type == "Gelu").op_type = "Mish"
    with pytest.raises(SpecError, match=r"no translation for the operator Mish; there are Add, And, Cast, Concat"):
        build(dataclasses.replace(traced(), model=model), FP16, tmp_path)


def test_a_weight_beyond_float16_is_refused(tmp_path: Path, traced: Callable[..., Graph]) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(traced().model)
    weight = next(w for w in model.graph.initializer if w.name == "blocks.1.mlp.fc2.weight")
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * np.float32(1e8), weight.name))
    with pytest.raises(SpecError, match=r"blocks\.1\.mlp\.fc2\.weight reaches .*float16 ends at 65504"):
        build(dataclasses.replace(traced(), model=model), FP16, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layout": "diagonal"}, "layout is 'diagonal'; expected one of rows, columns"),
        ({"colour": "red"}, "coreml-fp16 has no setting 'colour'; it has deployment, layout"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FP16.choose(settings)


@pytest.mark.slow
def test_two_functions_need_a_system_that_knows_them(tmp_path: Path, traced: Callable[..., Graph]) -> None:
    with pytest.raises(InputError, match="needs deployment=iOS18"):
        build(traced(), FP16.choose({"functions": "video+image"}), tmp_path)
    both = FP16.choose({"functions": "video+image", "deployment": "iOS18"})
    with pytest.raises(InputError, match="needs a video model that accepts images"):
        build(traced(image=True), both, tmp_path)


def test_video_and_image_share_their_weights(
    tmp_path: Path,
    traced: Callable[..., Graph],
    checkpoint: Checkpoint,
    clips: npt.NDArray[np.uint8],
    reference: npt.NDArray[np.float32],
) -> None:
    folders = {}
    for name, settings in {"one": {}, "both": {"functions": "video+image"}}.items():
        folders[name] = tmp_path / name
        folders[name].mkdir()
        target = FP16.choose({"deployment": "iOS18", **settings})
        build(traced(), target, folders[name], image=partial(traced, image=True))

    def weights(folder: Any) -> Any:
        (file,) = folder.rglob("weight.bin")
        return file.stat().st_size

    package = mlpackage.load(folders["both"] / "model.mlpackage")
    assert (set(package.functions), package.default) == ({"video", "image"}, "video")
    positions = 2 * checkpoint.spec.with_clip(frames=1).tokens * checkpoint.spec.width  # float16, the image's own
    assert weights(folders["both"]) - weights(folders["one"]) < 2 * positions + 1024
    image = checkpoint.with_clip(1, None)
    expected = Reference(image.model, image.contract)(clips[:1, :1])
    assert error(evaluate(folders["both"], traced(), clips[:1, :1], "image"), expected) < FP16.tolerance
    assert error(evaluate(folders["both"], traced(), clips[:1], "video"), reference[:1]) < FP16.tolerance
    spec = ct.models.MLModel(str(folders["both"] / "model.mlpackage"), skip_model_load=True).get_spec()
    assert spec.description.metadata.author == "edgetube"


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "numbers"), [("w8", "data"), ("w4", "indices")])
def test_rounded_weights_are_the_same_in_both_functions_and_biases_are_not(
    tmp_path: Path, tiny_checkpoint: Path, precision: str, numbers: str
) -> None:
    options = pipeline.Options(settings={"functions": "video+image", "deployment": "iOS18"})
    bundle = pipeline.export_model(f"coreml-{precision}", tiny_checkpoint, tmp_path, options)
    found = {}
    for name, function in mlpackage.load(bundle.path / bundle.artifact).functions.items():
        found[name] = {operation.outputs[0][0]: operation.inputs for operation in function.operations}
    video, image = (found[name] for name in ("video", "image"))
    (one,), (other,) = (part["blocks_0_mlp_fc1_weight"][numbers] for part in (video, image))
    np.testing.assert_array_equal(one, other)
    (one,), (other,) = (part["blocks_0_mlp_fc1_bias_0"]["val"] for part in (video, image))
    assert (one != other).any()


def validate(path: Any) -> Any:
    """The package as coremltools opens it: its proto loader makes a valid program of the operations that we read."""
    from coremltools.converters.mil.frontend.milproto import load

    model = ct.models.MLModel(str(path), skip_model_load=True)
    spec = model.get_spec()
    program = load.load(spec, spec.specificationVersion, model.weights_dir)
    program.validate()
    for name, function in mlpackage.load(path).functions.items():
        theirs = [o.op_type for o in program.functions[name].operations if o.op_type != "const"]
        assert theirs == [o.kind for o in function.operations if o.kind != "const"]
    return spec


def test_apples_tools_read_it_and_xcode_has_something_to_show(
    tmp_path: Path, traced: Callable[..., Graph], checkpoint: Checkpoint
) -> None:
    build(traced(), FP16, tmp_path)
    path = tmp_path / "model.mlpackage"
    description = validate(path).description
    assert description.input[0].shortDescription.startswith("RGB frames")
    assert list(description.input[0].type.multiArrayType.shape) == [1, *checkpoint.contract.shape]
    assert {o.name for o in description.output} == {"logits", "label", "label_probs"}
    assert (description.predictedFeatureName, description.predictedProbabilitiesName) == ("label", "label_probs")
    metadata = mlpackage.load(path).metadata
    assert metadata["author"] == "edgetube"
    assert metadata["version"] == edgetube.__version__
    assert '"frames": 8' in metadata["edgetube.input"]


def test_the_class_scores_are_the_softmax_of_the_logits(
    tmp_path: Path, traced: Callable[..., Graph], checkpoint: Checkpoint, clips: npt.NDArray[np.uint8]
) -> None:
    build(traced(), FP16, tmp_path)
    answers = mil.Program(mlpackage.load(tmp_path / "model.mlpackage"))({"frames": clips[:1]})
    scores = metrics.softmax(answers["logits"][0])
    assert list(answers["label_probs"]) == list(checkpoint.labels)
    np.testing.assert_allclose(list(answers["label_probs"].values()), scores, rtol=1e-5)
    assert answers["label"] == checkpoint.labels[int(scores.argmax())]


def test_it_is_quiet(tmp_path: Path, traced: Callable[..., Graph], capfd: pytest.CaptureFixture[str]) -> None:
    both = FP16.choose({"functions": "video+image", "deployment": "iOS18"})
    build(traced(), both, tmp_path, image=partial(traced, image=True))
    assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A published bundle of both functions; nobody may write in it."""
    settings = {"functions": "video+image", "deployment": "iOS18"}
    options = pipeline.Options(settings=settings)
    return pipeline.export_model("coreml-fp16", tiny_checkpoint, tmp_path_factory.mktemp("out"), options)


def test_a_bundle_is_proven_by_the_evaluator_and_says_so(bundle: Bundle) -> None:
    device = runtimes.proof_device(bundle.target, bundle.backend)
    assert bundle.status == bundle.parity["status"] == ("executed" if device is None else "emulated")
    assert bundle.parity["image"]["clips"] == bundle.parity["clips"] == proof.PROOF_CLIPS
    assert bundle.parity["agreement"] == 1
    assert bundle.build["settings"]["functions"] == "video+image"
    assert bundle.build["lowering"]["chosen"] in tokenizer.LOWERINGS
    if device:
        assert bundle.build["lowering"]["chosen"] == "conv2d"
        assert "not timed" in bundle.build["lowering"]["why"]


def test_the_runtime_emulates_when_it_is_asked_to(
    bundle: Bundle, checkpoint: Checkpoint, clips: npt.NDArray[np.uint8], reference: npt.NDArray[np.float32]
) -> None:
    with edgetube.Runtime(bundle.path, device="emulated") as rt:
        assert error(rt(clips), reference) < FP16.tolerance
        assert "evaluator" in rt.describe()
        assert rt.check() < 0.05


def test_elsewhere_it_says_what_is_missing_and_how_to_emulate(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(MissingPackageError, match=r"runs on macOS, which is not here.*device 'emulated'"):
        edgetube.Runtime(bundle.path)


def test_what_nothing_emulates(tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match="nothing emulates onnxruntime"):
        edgetube.Runtime(tiny_bundle, device="emulated")


def test_a_bundle_with_a_corrupted_weight_file_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle.path, tmp_path / "copy")
    (weights,) = copy.rglob("weight.bin")
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BundleError, match=r"weight\.bin is not the file that was proven"):
        bundles.load(copy)


def test_targets_say_that_they_run_on_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    assert "macOS" in FP16.missing(FP16.run_needs)
    monkeypatch.setattr("sys.platform", "darwin")
    assert "macOS" not in FP16.missing(FP16.run_needs)


def test_palettes_are_the_best_sixteen_numbers(rng: np.random.Generator) -> None:
    """Against a k-means that somebody else wrote, started at the same kind of place, and no worse than it."""
    cluster = pytest.importorskip("sklearn.cluster")
    weights = (rng.normal(size=(64, 96)) * 0.02).astype(np.float32)
    lut = mlweights.palette(weights)
    indices = mlweights.Palettes(lut[None], 1).nearest(weights.reshape(-1, 1)).reshape(weights.shape)
    assert lut.dtype == np.float16
    assert indices.max() == 15
    ours = np.square(lut[indices].astype(np.float32) - weights).sum()
    theirs = cluster.KMeans(16, n_init=10, random_state=0).fit(weights.reshape(-1, 1)).inertia_
    assert ours <= theirs * 1.02
    nearest = np.abs(weights[..., None] - lut.astype(np.float32)).argmin(-1)
    np.testing.assert_array_equal(
        np.abs(lut[indices].astype(np.float32) - weights), np.abs(lut[nearest].astype(np.float32) - weights)
    )


def test_palettes_of_few_numbers_are_exact() -> None:
    weights = np.array([[0.0, 1.0, 2.0, 2.0], [0.0, 0.0, 1.0, 1.0]], np.float32)
    lut = mlweights.palette(weights)
    indices = mlweights.Palettes(lut[None], 1).nearest(weights.reshape(-1, 1)).reshape(weights.shape)
    np.testing.assert_allclose(lut[indices], weights, atol=1e-3)


def test_integers_are_half_a_step_away(rng: np.random.Generator) -> None:
    weights = rng.normal(size=(8, 50)).astype(np.float32) * np.logspace(-3, 1, 8, dtype=np.float32)[:, None]
    scales = mlweights.channel_scales(weights)
    back = mlweights.quantise(weights, scales) * scales[:, None]
    assert (np.abs(back - weights) <= scales[:, None] * 0.54).all()  # the scale itself is rounded to float16


def test_a_tube_is_rounded_for_pixels_and_a_linear_to_the_nearest(rng: np.random.Generator) -> None:
    """Bright flat pixels are what the errors of a kernel add up on."""
    integers = {}

    class Builder:
        def constexpr_affine_dequantize(self, quantized_data: Any, name: Any, **_: Any) -> None:
            integers[name] = quantized_data

    storage = mlweights.WeightStorage(Builder(), Precision.W8, None, (), {})
    tube = rng.normal(size=(8, 2 * 3, 8, 8)).astype(np.float32)
    for name, array in (("tube", tube), ("columns", tube.reshape(8, -1, 1, 1)), ("rows", tube.reshape(8, -1))):
        storage.int8(name, array, 1.0)
        assert integers[name].shape == array.shape
    scales = mlweights.channel_scales(tube)
    nearest = mlweights.quantise(tube, scales)
    np.testing.assert_array_equal(integers["columns"].reshape(tube.shape), nearest)
    np.testing.assert_array_equal(integers["rows"].reshape(tube.shape), nearest)
    drift = [
        np.abs((data.reshape(8, -1) * scales[:, None] - tube.reshape(8, -1)).sum(axis=1)).max()
        for data in (integers["tube"], nearest)
    ]
    assert drift[0] < 0.1 * drift[1]


class Builder:
    """Keeps the numbers that the stored weights stand for."""

    def __init__(self) -> None:
        self.stored: dict[str, Any] = {}

    def constexpr_affine_dequantize(self, quantized_data: Any, scale: Any, name: Any, **_: Any) -> None:
        self.stored[name] = quantized_data * np.float32(scale)[:, None]

    def constexpr_lut_to_dense(self, lut: Any, indices: Any, name: Any, shape: Any = None) -> None:
        if shape is None:  # (groups, 1, 16, 1), (O, I)
            groups = np.split(indices, len(lut))
            self.stored[name] = np.concatenate([t.reshape(-1)[i] for t, i in zip(lut, groups, strict=True)])
        else:
            pairs = np.stack([indices & 15, indices >> 4], axis=1).reshape(-1)
            self.stored[name] = lut[pairs].reshape(shape)


STORAGES = pytest.mark.parametrize(("precision", "blocks"), [("w8", None), ("w4", None), ("w4", np.uint8)])


def stored(precision: Any, blocks: Any, weight: Any, moments: Any) -> Any:
    """A weight as it is stored, and the storage."""
    builder = Builder()
    storage = mlweights.WeightStorage(
        builder, precision, blocks, ["a.weight"], {}, lambda: {"a.weight": moments} if moments else {}
    )
    storage.weight("a.weight", weight, 1.0)
    (matrix,) = builder.stored.values()
    return np.float32(matrix), storage


@pytest.fixture
def read(rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Rows of channels that know of one another, and whose mean is not zero."""
    mixed = 3 + rng.normal(size=(400, 20)) @ rng.normal(size=(20, 64)) * np.geomspace(5, 0.1, 64)
    return (mixed + 0.05 * rng.normal(size=(400, 64))).astype(np.float32)


def moments_of(rows: Any) -> Any:
    gram = numeric.GramAccumulator(rows.shape[1])
    gram.add(rows)
    return gram.moments


@STORAGES
def test_biases_take_up_the_mean_of_what_storing_does(
    rng: np.random.Generator, read: npt.NDArray[np.float32], precision: str, blocks: type[Any] | None
) -> None:
    """On the mean input, the product with the stored weight and its bias is the exact one."""
    weight, bias = rng.normal(size=(32, 64)).astype(np.float32), rng.normal(size=32).astype(np.float32)
    moments = moments_of(read)
    matrix, storage = stored(precision, blocks, weight, moments)
    found = storage.corrected_bias("a.weight", bias)
    np.testing.assert_allclose(matrix @ moments.mean + found, weight @ moments.mean + bias, atol=1e-3)
    assert np.abs(found - bias).max() > 1e-4
    np.testing.assert_array_equal(storage.corrected_bias("another", bias), bias)


@STORAGES
def test_errors_of_weights_cancel_for_what_they_read(
    rng: np.random.Generator, read: npt.NDArray[np.float32], precision: str, blocks: type[Any] | None
) -> None:
    """On rows that were not seen, and with numbers of the same palettes."""
    weight = rng.normal(size=(32, 64)).astype(np.float32)
    (ours, _), (plain, _) = (stored(precision, blocks, weight, moments) for moments in (moments_of(read[::2]), None))
    errors = [np.square(read[1::2] @ (matrix - weight).T).mean() for matrix in (ours, plain)]
    assert errors[0] < 0.3 * errors[1]
    groups = 2 if blocks else 1
    for one, other in zip(np.split(ours, groups), np.split(plain, groups), strict=True):
        assert precision == "w8" or set(one.ravel()) <= set(other.ravel())


@pytest.mark.slow
@pytest.mark.parametrize("frames", [None, 1])
def test_each_function_knows_the_moments_of_its_own_inputs(
    tiny_checkpoint: Path, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames: int | None
) -> None:
    """Against PyTorch: what `fc1` reads on the rendered clips, or on the rendered images."""
    found = []

    def spy(context: BuildContext, build: Any = coreml.build) -> Any:
        graph = context.image() if frames and context.image else context.graph
        found.append(context.moments(graph)["blocks.0.mlp.fc1.weight"].mean)
        return build(context)

    monkeypatch.setattr(coreml, "build", spy)
    options = pipeline.Options(settings={"functions": "video+image", "deployment": "iOS18"})
    pipeline.export_model("coreml-w8", tiny_checkpoint, tmp_path, options)
    part = checkpoint.with_clip(frames, None)
    first: Any = part.model.blocks[0]
    rendered = demo.scenes(part.contract, MOMENT_CLIPS)
    read: list[npt.NDArray[np.float32]] = []
    hook = first.mlp.fc1.register_forward_pre_hook(lambda _, x: read.append(x[0].detach().numpy()))
    Reference(part.model, part.contract)(np.stack([clip.frames for clip in rendered]))
    hook.remove()
    expected = np.concatenate(read).mean(axis=(0, 1))
    np.testing.assert_allclose(found[0], expected, atol=1e-4)


def test_scales_that_float16_does_not_have() -> None:
    scales = mlweights.channel_scales(np.array([[0.0, 0.0], [1e-9, -1e-9], [12.7, 1.0]], np.float32))
    np.testing.assert_allclose(scales, [1, 2**-14, 0.1], rtol=1e-3)  # nothing to scale; the smallest normal number
    assert (mlweights.quantise(np.array([[0.0], [1e-9], [12.7]], np.float32), scales) == [[0], [0], [127]]).all()
    with pytest.raises(SpecError, match=r"a weight needs a scale of 7.87e\+04; float16 ends at 65504"):
        mlweights.channel_scales(np.array([[1e7]], np.float32))


@pytest.mark.slow
def test_every_operator_of_the_canonical_graphs_is_translated(traced: Callable[..., Graph]) -> None:
    seen = {node.op_type for low in tokenizer.LOWERINGS for node in traced(low).model.graph.node}
    assert seen <= set(mlprogram.Lowering.operators())
    assert len(seen) > 12
