"""`gpu_graph.py` reads ONNX files as onnx does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgetube.bench.studies import gpu_graph
from edgetube.errors import BackendError

TENSORS: dict[str, np.ndarray[Any, Any]] = {
    "f32": np.array([[1.5, -2.0]], np.float32),
    "f16": np.array([0.5, -1.25, 65504.0], np.float16),
    "i8": np.array([-128, 127, 0], np.int8),
    "u8": np.array([[0], [255]], np.uint8),
    "i32": np.array([-(2**31), 7], np.int32),
    "i64": np.array([-1, 2**40], np.int64),
    "scalar": np.array(3, np.int64),
    "empty": np.zeros((0, 2), np.float32),
}
ATTRIBUTES: dict[str, Any] = {"axis": -1, "zero": 0, "epsilon": 1e-6, "kind": "tanh", "perm": [0, 2, 1], "few": [0.5]}


def graph(tensors: list[TensorProto]) -> onnx.ModelProto:
    frames = helper.make_tensor_value_info("frames", TensorProto.UINT8, [1, 4])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 4])
    nodes = [
        helper.make_node("Cast", ["frames"], ["x"], name="first", to=TensorProto.FLOAT),
        helper.make_node("Anything", ["x", "", "f32"], ["logits"], **ATTRIBUTES),
    ]
    return helper.make_model(helper.make_graph(nodes, "g", [frames], [logits], tensors))


def as_lists(name: str, values: np.ndarray[Any, Any]) -> TensorProto:
    """A tensor whose numbers are in the fields of its type, not as bytes."""
    kind = helper.np_dtype_to_tensor_dtype(values.dtype)
    return helper.make_tensor(name, kind, values.shape, values.reshape(-1).tolist())


@pytest.mark.parametrize("make", [lambda name, values: numpy_helper.from_array(values, name), as_lists])
def test_it_reads_what_onnx_reads(tmp_path: Path, make: Any) -> None:
    model = graph([make(name, values) for name, values in TENSORS.items()])
    onnx.save(model, tmp_path / "model.onnx")
    found = gpu_graph.read(tmp_path / "model.onnx")
    assert (found.inputs, found.outputs) == (("frames",), ("logits",))
    assert [(n.name, n.operator, n.inputs, n.outputs) for n in found.nodes] == [
        ("first", "Cast", ("frames",), ("x",)),
        ("", "Anything", ("x", "", "f32"), ("logits",)),
    ]
    expected = {a.name: helper.get_attribute_value(a) for a in model.graph.node[1].attribute}
    assert found.nodes[1].attributes == expected
    assert set(expected) == set(ATTRIBUTES)
    assert set(found.constants) == set(TENSORS)
    for name, values in TENSORS.items():
        assert found.constants[name].dtype == values.dtype
        np.testing.assert_array_equal(found.constants[name], values)


def test_weights_beside_the_file(tmp_path: Path, rng: np.random.Generator) -> None:
    values = {name: rng.standard_normal((64, 33)).astype(np.float16) for name in "ab"}
    model = graph([numpy_helper.from_array(array, name) for name, array in values.items()])
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    found = gpu_graph.read(tmp_path / "model.onnx")
    for name, array in values.items():
        np.testing.assert_array_equal(found.constants[name], array)


def test_what_is_no_graph_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    for data in (b"", b"\x3a\xff", b"hello"):
        path.write_bytes(data)
        with pytest.raises(BackendError, match="is no ONNX graph that is known here"):
            gpu_graph.read(path)
    onnx.save(graph([helper.make_tensor("b", TensorProto.BFLOAT16, [1], [1.0])]), path)
    with pytest.raises(BackendError, match="tensor b has type 16"):
        gpu_graph.read(path)
