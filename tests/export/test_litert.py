"""Export for LiteRT: the translation of the canonical graph, against PyTorch and ONNX Runtime."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgetube import export, metrics
from edgetube.calibration import graphs
from edgetube.calibration.table import CalibrationTable, LinearPlan, Range
from edgetube.errors import ParityError, SpecError
from edgetube.export import litert as exporter
from edgetube.export import quantize
from edgetube.export.base import BuildContext
from edgetube.export.canonical import Graph
from tests.export import models
from tests.export.test_torchgraph import table_of
from tests.marks import but

pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert: pip install 'edgetube[litert]'")

from ai_edge_litert import schema_py_generated as schema

from edgetube.export.litert.lowering import Lowering
from edgetube.runtimes import litert as runtime
from edgetube.runtimes.litert import flatbuffer

Array = np.ndarray[Any, Any]


def write(model: onnx.ModelProto, path: Path, half: bool = False) -> Path:
    Lowering(model, half).run().save(path, [v.name for v in model.graph.input], [model.graph.output[0].name])
    return path


def answer(path: Path, *feeds: Array) -> Array:
    interpreter = runtime.open_file(path, 1)
    for tensor, feed in zip(interpreter.get_input_details(), feeds, strict=True):
        interpreter.set_tensor(tensor["index"], feed)
    interpreter.invoke()
    return np.array(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]))


def graph_of(path: Path) -> Any:
    """The only graph of a file."""
    model = schema.ModelT.InitFromPackedBuf(bytearray(path.read_bytes()), 0)
    (graph,) = model.subgraphs
    return graph


LOWERED = [
    pytest.param(name, lowering, marks=[pytest.mark.slow] if lowering != "gather" and name != "gates" else [])
    for name in models.SPECS
    for lowering in ("gather", "slice", "conv2d")
]


@pytest.mark.parametrize(("name", "lowering"), LOWERED)
def test_every_model_answers_like_pytorch(name: str, lowering: str, tmp_path: Path) -> None:
    frames = models.noise(name)
    expected = models.reference(name, frames)
    graph = models.trace(name, lowering)
    for half, tolerance in ((False, 1e-5), (True, 5e-3)):
        found = answer(write(graph.model, tmp_path / f"{half}.tflite", half), frames)
        assert found.dtype == np.float32
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("batch", but([1, 2], pytest.mark.slow, 1))
@pytest.mark.parametrize("name", models.REDUCED)
def test_fewer_tokens_answer_like_pytorch(name: str, batch: int, tmp_path: Path) -> None:
    frames = models.noise(name, batch)
    path = write(models.trace(name, batch=batch).model, tmp_path / "model.tflite")
    np.testing.assert_allclose(answer(path, frames), models.reference(name, frames), atol=1e-5)


@pytest.mark.parametrize("name", models.REDUCED)
def test_fewer_tokens_in_integers_answer_like_the_model_that_follows(name: str, tmp_path: Path) -> None:
    """Each row is quantised by its own range, so the noise is below that of the simulation, which has one range."""
    graph, frames, target = models.trace(name), models.noise(name), export.target("litert-int8")
    table = table_of(graph.model, "uint8")
    built = exporter.build(BuildContext(graph, target, tmp_path, table))
    decisions = graph.roles.decisions
    path = tmp_path / "shown.tflite"
    path.write_bytes(flatbuffer.with_outputs((tmp_path / built.artifact).read_bytes(), decisions))
    interpreter = runtime.open_file(path, 1)
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], frames)
    interpreter.invoke()
    logits, *shown = (np.array(interpreter.get_tensor(each["index"])) for each in interpreter.get_output_details())
    decided = dict(zip(decisions, shown, strict=True))
    found = models.following_sqnr(name, frames, logits, decided)
    assert found > models.simulated_sqnr(name, frames, quantize.qdq(graph.model, table))


def test_batches_answer_like_pytorch(tmp_path: Path) -> None:
    frames = models.noise("divided", 2)
    found = answer(write(models.trace("divided", batch=2).model, tmp_path / "model.tflite"), frames)
    np.testing.assert_allclose(found, models.reference("divided", frames), atol=1e-4)


@pytest.mark.parametrize("name", models.SPECS)
def test_one_delegate_runs_all_that_computes(name: str, tmp_path: Path) -> None:
    interpreter = runtime.open_file(write(models.trace(name).model, tmp_path / "model.tflite"), 1)
    assert runtime.partitions(interpreter) == 1


def test_tensors_keep_their_names_and_ranks(tmp_path: Path) -> None:
    graph = models.trace("rotary", "slice").model
    tensors = graph_of(write(graph, tmp_path / "model.tflite")).tensors
    names = {tensor.name.decode() for tensor in tensors}
    assert {"frames", "logits", "blocks.0", "blocks.1.attn.qkv", "blocks.0.mlp.act"} <= names
    assert max(len(tensor.shape) for tensor in tensors if tensor.shape is not None) <= 5


def test_the_file_is_the_same_every_time(tmp_path: Path) -> None:
    files = [write(models.trace("paper").model, tmp_path / name).read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]
    assert files[0][4:8] == b"TFL3"


def test_half_precision_stores_matrices_in_float16_and_nothing_else(tmp_path: Path) -> None:
    path = write(models.trace("dense").model, tmp_path / "model.tflite", half=True)
    graph = graph_of(path)
    kinds = {t.name.decode(): (t.type, len(t.shape)) for t in graph.tensors if t.buffer}
    halves = {name for name, (kind, _) in kinds.items() if kind == schema.TensorType.FLOAT16}
    assert "blocks.0.mlp.fc1.weight.fp16" in halves
    assert all(rank < 2 for name, (kind, rank) in kinds.items() if kind == schema.TensorType.FLOAT32)
    assert all(kinds[name][1] >= 2 for name in halves)


@pytest.mark.parametrize("name", ["gates", "rotary"])
def test_half_precision_is_float32_arithmetic_on_rounded_weights(name: str, tmp_path: Path) -> None:
    """The weights of the tubes, 256 times as large, are rounded in that size."""
    graph, frames = models.trace(name).model, models.noise(name)
    rounded = onnx.ModelProto()
    rounded.CopyFrom(graph)
    for tensor in rounded.graph.initializer:
        array, factor = numpy_helper.to_array(tensor), 256 if tensor.name.startswith("tubes.") else 1
        if array.ndim > 1 and array.dtype == np.float32:
            half = (array * np.float32(factor)).astype(np.float16).astype(np.float32) / np.float32(factor)
            tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
    found = answer(write(graph, tmp_path / "half.tflite", half=True), frames)
    expected = models.run(rounded, frames)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_the_smallest_epsilon_survives(tmp_path: Path) -> None:
    """1e-12, of a token without variance: beta, not a NaN."""
    feed, gamma, beta = np.full((2, 4), 3, np.float32), np.ones(4, np.float32), np.arange(4, dtype=np.float32)
    node = helper.make_node("LayerNormalization", ["x", "g", "b"], ["y"], name="y", axis=-1, epsilon=1e-12)
    path = write(model([node], feed, (2, 4), {"g": gamma, "b": beta}), tmp_path / "model.tflite")
    np.testing.assert_array_equal(answer(path, feed), np.stack([beta, beta]))


def model(
    nodes: list[onnx.NodeProto], feed: Array, shape: tuple[int, ...], constants: dict[str, Array]
) -> onnx.ModelProto:
    """A graph `x` -> `y` with one node or more; every other tensor has the shape of `y`."""
    kind = helper.np_dtype_to_tensor_dtype(feed.dtype)
    inner = [name for node in nodes for name in node.output if name != "y"]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, feed.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
        value_info=[helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in inner],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate: str, tmp_path: Path) -> None:
    import torch

    feed = np.linspace(-8, 8, 257, dtype=np.float32)[None]
    node = helper.make_node("Gelu", ["x"], ["y"], name="y", approximate=approximate)
    found = answer(write(translated(node, feed), tmp_path / "model.tflite"), feed)
    expected = torch.nn.functional.gelu(torch.from_numpy(feed), approximate=approximate).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-6)


def translated(node: onnx.NodeProto, feed: Array) -> onnx.ModelProto:
    return model([node], feed, feed.shape, {})


def test_a_slice_with_steps(tmp_path: Path) -> None:
    feed = np.arange(24, dtype=np.float32).reshape(2, 12)
    node = helper.make_node("Slice", ["x", "starts", "ends", "axes", "steps"], ["y"], name="y")
    bounds = {name: np.array([value]) for name, value in (("starts", 1), ("ends", 99), ("axes", 1), ("steps", 3))}
    path = write(model([node], feed, (2, 4), bounds), tmp_path / "model.tflite")
    np.testing.assert_array_equal(answer(path, feed), feed[:, 1::3])


def test_an_operator_without_translation_is_named_with_its_layer() -> None:
    node = helper.make_node("Erf", ["x"], ["y"], name="blocks.7.odd")
    with pytest.raises(
        SpecError, match=r"^blocks\.7\.odd: no translation for the operator Erf; there are Add, And, Cast,"
    ):
        Lowering(translated(node, np.zeros((1, 4), np.float32)))


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (helper.make_node("Softmax", ["x"], ["y"], name="odd", axis=0), "odd: only softmax over the last axis"),
        (
            helper.make_node("Slice", ["x", "back", "last", "axis", "step"], ["y"], name="odd"),
            "odd: slices from the end or backwards",
        ),
    ],
)
def test_forms_without_translation(node: onnx.NodeProto, words: str) -> None:
    constants = {"back": np.array([-2]), "last": np.array([4]), "axis": np.array([1]), "step": np.array([1])}
    with pytest.raises(SpecError, match=words):
        Lowering(model([node], np.zeros((2, 4), np.float32), (2, 4), constants)).run()


@pytest.mark.parametrize("sizes", [(3, 1), (1, 3), (2, 2)])
def test_splits_into_parts(sizes: tuple[int, int], tmp_path: Path) -> None:
    feed = np.arange(8, dtype=np.float32).reshape(2, 4)
    node = helper.make_node("Split", ["x", "sizes"], ["part", "y"], name="odd", axis=1)
    graph = model([node], feed, (2, sizes[1]), {"sizes": np.array(sizes)})
    graph.graph.value_info[0].type.tensor_type.shape.dim[1].dim_value = sizes[0]
    np.testing.assert_array_equal(answer(write(graph, tmp_path / "model.tflite"), feed), feed[:, sizes[0] :])


def test_float16_that_overflows_names_the_weight() -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="y")
    graph = model([node], np.zeros((1, 2), np.float32), (1, 2), {"w": np.full((2, 2), 1e5, np.float32)})
    with pytest.raises(SpecError, match=r"w reaches 1e\+05; float16 ends at 65504: export this model to fp32"):
        Lowering(graph, half=True).run()
    Lowering(graph).run()


def test_weights_above_the_limit_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flatbuffer, "MAX_BYTES", 100_000)
    with pytest.raises(SpecError, match=r"exceed 0.0001 GB, the most that a TFLite file can hold; nothing was written"):
        Lowering(models.trace("paper").model).run()


def hybrid(rows: Array, integers: Array, scales: Array) -> Array:
    """XNNPACK's product, by its definition: a row's range holds 0, and 255 steps of it."""
    low, high = np.minimum(rows.min(-1, keepdims=True), 0), np.maximum(rows.max(-1, keepdims=True), 0)
    scale = np.where(high > low, (high - low) / 255, 1)
    zero = np.clip(np.rint(-128 - low / scale), -128, 127)
    rounded = np.clip(np.rint(rows / scale) + zero, -128, 127)
    return np.asarray((rounded - zero) @ integers * scale * scales)


def test_an_integer_linear_is_the_product_by_hand(tmp_path: Path, rng: np.random.Generator) -> None:
    """Rows of very different ranges, one of zeros, weights of one sign and of the largest magnitude, a zero channel."""
    rows = (rng.normal(size=(5, 70)) * np.array([[1e-3], [1], [1e4], [0], [1]])).astype(np.float32)
    rows[4] = np.abs(rows[4])
    integers = rng.integers(-127, 128, (70, 6)).astype(np.float32)
    integers[:, 0], integers[:, 1], integers[:, 2] = 127, -127, 0
    scales = np.array([1e-3, 2e-2, 1, 1e-30, 5, 0.1], np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "l.weight"], ["m"], name="m"),
        helper.make_node("Add", ["m", "bias"], ["y"], name="y"),
    ]
    bias = np.arange(6, dtype=np.float32)
    graph = model(nodes, rows, (5, 6), {"l.weight": integers * scales, "bias": bias})
    plan = LinearPlan("l", "x", "l.weight", tuple(map(float, scales)), "int8")
    lowering = Lowering(graph, plans=[plan])
    lowering.run().save(tmp_path / "model.tflite", ["x"], ["y"])
    assert lowering.integer_products == [5 * 70 * 6]
    found, expected = answer(tmp_path / "model.tflite", rows), hybrid(rows, integers, scales) + bias
    plain = rows @ (integers * scales) + bias
    step = (rows.max(-1) - rows.min(-1))[:, None] / 255 * np.abs(integers).max(0) * scales
    assert (np.abs(found - expected) <= 1.1 * step + 1e-5 * np.abs(expected)).all()  # one value may round the other way
    assert metrics.sqnr(expected, found) > metrics.sqnr(plain, found) + 20
    assert found[3].tolist() == bias.tolist()


def test_integer_linears_are_stored_by_rows_with_a_scale_each(tmp_path: Path) -> None:
    graph = models.trace("dense").model
    constants = models.constants(graph)
    plans = []
    for linear in graphs.linears(graph)[:-1]:
        scales: Array = np.abs(constants[linear.weight]).max(axis=0) / 127
        plans.append(LinearPlan(linear.name, linear.activation, linear.weight, tuple(map(float, scales)), "int8"))
    lowering = Lowering(graph, plans=plans)
    writer = lowering.run()
    writer.save(tmp_path / "model.tflite", ["frames"], ["logits"])
    tensors = {tensor.name.decode(): tensor for tensor in graph_of(tmp_path / "model.tflite").tensors}
    for plan in plans:
        stored, weight = tensors[f"{plan.weight}.int8"], constants[plan.weight]
        assert list(stored.shape) == [*weight.shape[::-1]]
        assert stored.quantization.quantizedDimension == 0
        assert not np.any(stored.quantization.zeroPoint)
        np.testing.assert_array_equal(stored.quantization.scale, np.array(plan.weight_scales, np.float32))
    assert writer.operators[flatbuffer.HYBRID] == len(plans) == len(lowering.integer_products)
    assert f"{graphs.linears(graph)[-1].weight}.int8" not in tensors
    frames = models.noise("dense")
    assert metrics.sqnr(models.reference("dense", frames), answer(tmp_path / "model.tflite", frames)) > 25
    (parts,) = {runtime.partitions(runtime.open_file(tmp_path / "model.tflite", 1))}
    assert parts == 1


def test_the_table_of_an_artifact_has_no_ranges_that_it_does_not_use(tmp_path: Path) -> None:
    graph = models.trace("dense")
    table = CalibrationTable(graphs.digest(graph.model), {}, "uint8", *whole(graph))
    built = exporter.build(BuildContext(graph, export.target("litert-int8"), tmp_path, table))
    assert built.table == replace(table, ranges={})


def test_a_runtime_that_multiplies_floats_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = models.trace("dense")
    table = CalibrationTable(graphs.digest(graph.model), {}, "uint8", *whole(graph))
    assert exporter._integers(graph, table, 1)["kernels"] == {"FULLY_CONNECTED hybrid": 1}
    monkeypatch.setattr(runtime, "multiplies_integers", lambda: False)
    with pytest.raises(ParityError, match="LiteRT computes 1 of 1 quantised products in float; nothing was written"):
        exporter._integers(graph, table, 1)


def whole(graph: Graph) -> tuple[dict[str, Range], tuple[LinearPlan, ...]]:
    """The ranges and plans of a table that quantises the first linear of a block."""
    linear = graphs.linears(graph.model)[1]
    scales = tuple(map(float, np.abs(models.constants(graph.model)[linear.weight]).max(axis=0) / 127))
    plan = LinearPlan(linear.name, linear.activation, linear.weight, scales, "int8")
    return {linear.activation: Range(-4.0, 4.0, "by hand")}, (plan,)


def test_constants_lie_where_kernels_can_read_them(tmp_path: Path) -> None:
    data = bytearray(write(models.trace("dense").model, tmp_path / "model.tflite").read_bytes())
    found = schema.Model.GetRootAs(data, 0)
    base = np.frombuffer(data, np.uint8).ctypes.data
    buffers = [found.Buffers(i) for i in range(found.BuffersLength())]
    starts = [buffer.DataAsNumpy().ctypes.data - base for buffer in buffers if buffer.DataLength()]
    assert starts
    assert all(start % flatbuffer.ALIGNMENT == 0 for start in starts)
