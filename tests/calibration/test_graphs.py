"""What calibration reads in a graph and puts into it, on graphs that can be read at a glance."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgetube.calibration import graphs
from edgetube.calibration.graphs import EqualizationSite, Linear
from edgetube.calibration.table import ActivationScheme, Range
from edgetube.errors import SpecError
from edgetube.roles import Attention, Columns, FoldKind, FoldSite, GraphRoles

SHAPES = {
    "cast": (3, 4), "tubes.0": (3, 6), "tubes.0.sum": (3, 6), "blocks.0.norm1": (3, 6), "blocks.0.mlp.fc1.mm": (3, 8),
    "blocks.0.mlp.fc1": (3, 8), "blocks.0.mlp.act": (3, 8), "blocks.0.mlp.fc2.mm": (3, 6), "blocks.0.mlp.fc2": (3, 6),
    "blocks.0.scores": (3, 3), "blocks.1.x": (3, 6), "head.mm": (3, 2), "score": (3, 1),
}  # fmt: skip


ROLES = GraphRoles(
    "tubes.0.sum",
    pixels=("tubes.0",),
    blocks=("blocks.0.scores", "blocks.1.x"),
    linears=("blocks.0.mlp.fc1", "blocks.0.mlp.fc2"),
    fold_sites=(
        FoldSite("blocks.0.norm1", "blocks.0.mlp.fc1", "norm"),
        FoldSite("blocks.0.mlp.act", "blocks.0.mlp.fc2", "activation"),
    ),
    attention=(Attention("blocks.0.mlp.fc2", (0, 6), 1.0, "blocks.0.scores", "blocks.1.x"),),
)


def node(kind: str, name: str, *inputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, list(inputs), [name], name=name, **attributes)


@pytest.fixture
def weights(rng: np.random.Generator) -> dict[str, npt.NDArray[np.float32]]:
    shapes = {
        "tubes.0.weight": (4, 6), "position": (3, 6), "gamma": (6,), "beta": (6,), "blocks.0.mlp.fc1.weight": (6, 8),
        "blocks.0.mlp.fc1.bias": (8,), "blocks.0.mlp.fc2.weight": (8, 6), "blocks.0.mlp.fc2.bias": (6,),
        "head.weight": (6, 2), "head.bias": (2,), "pool.score": (6, 1),
    }  # fmt: skip
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def model(weights: dict[str, npt.NDArray[np.float32]]) -> onnx.ModelProto:
    """A tube, one block with an MLP and a product of two activations, another block, a head and a score."""
    block = "blocks.0."
    nodes = [
        node("Cast", "cast", "frames", to=TensorProto.FLOAT),
        node("MatMul", "tubes.0", "cast", "tubes.0.weight"),
        node("Add", "tubes.0.sum", "tubes.0", "position"),  # (3, 6): positions, not a bias
        node("LayerNormalization", f"{block}norm1", "tubes.0.sum", "gamma", "beta"),
        node("MatMul", f"{block}mlp.fc1.mm", f"{block}norm1", f"{block}mlp.fc1.weight"),
        node("Add", f"{block}mlp.fc1", f"{block}mlp.fc1.bias", f"{block}mlp.fc1.mm"),  # the bias on the left
        node("Gelu", f"{block}mlp.act", f"{block}mlp.fc1"),
        node("MatMul", f"{block}mlp.fc2.mm", f"{block}mlp.act", f"{block}mlp.fc2.weight"),
        node("Add", f"{block}mlp.fc2", f"{block}mlp.fc2.mm", f"{block}mlp.fc2.bias"),
        node("MatMul", f"{block}scores", f"{block}mlp.fc2", f"{block}turned"),
        node("MatMul", "blocks.1.x", f"{block}scores", "tubes.0.sum"),
        node("MatMul", "head.mm", "blocks.1.x", "head.weight"),
        node("Add", "logits", "head.mm", "head.bias"),
        node("MatMul", "score", "blocks.1.x", "pool.score"),
    ]
    nodes.insert(9, node("Transpose", f"{block}turned", "tubes.0.sum"))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("frames", TensorProto.UINT8, (3, 4))],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, (3, 2))],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
        value_info=[
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in {**SHAPES, f"{block}turned": (6, 3)}.items()
        ],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(made)
    return made


FRAMES = np.arange(12, dtype=np.uint8).reshape(3, 4)


def run(model: onnx.ModelProto, feeds: dict[str, Any] | None = None) -> list[Any]:
    return list(ReferenceEvaluator(model).run(None, feeds or {"frames": FRAMES}))


def test_linears_are_products_by_a_constant_matrix(model: onnx.ModelProto) -> None:
    one = "blocks.0.mlp."
    assert graphs.linears(model) == (
        Linear("tubes.0", "tubes.0", "cast", "tubes.0.weight", None),
        Linear(f"{one}fc1", f"{one}fc1.mm", "blocks.0.norm1", f"{one}fc1.weight", f"{one}fc1.bias"),
        Linear(f"{one}fc2", f"{one}fc2.mm", f"{one}act", f"{one}fc2.weight", f"{one}fc2.bias"),
        Linear("head", "head.mm", "blocks.1.x", "head.weight", "head.bias"),
    )


def test_linears_give_what_is_behind_their_bias(model: onnx.ModelProto) -> None:
    found = graphs.linear_outputs(model)
    assert list(found) == [linear.name for linear in graphs.linears(model)]
    makers = graphs.producers(model.graph.node)
    assert found["tubes.0"] == "tubes.0"
    for linear in graphs.linears(model)[1:]:
        assert makers[found[linear.name]].op_type == "Add"
        assert set(makers[found[linear.name]].input) == {linear.node, linear.bias}


def test_what_targets_quantise_of_what_linears_give(model: onnx.ModelProto) -> None:
    """Queries, keys and values apart, which have ranges of their own; not the logits."""
    found, given = graphs.inner_linear_outputs(model), graphs.linear_outputs(model)
    splits = {node.input[0]: tuple(node.output) for node in model.graph.node if node.op_type == "Split"}
    answer = model.graph.output[0].name
    for name, tensor in given.items():
        assert found[name] == (() if tensor == answer else splits.get(tensor, (tensor,)))
    assert [name for name, tensors in found.items() if not tensors] == [list(given)[-1]]


@pytest.mark.parametrize("kind", ["Identity", "Slice", "Concat"])
def test_what_is_moved_on_the_way_to_the_answer_is_the_answer(model: onnx.ModelProto, kind: str) -> None:
    (answer,) = (value.name for value in model.graph.output)
    moved = onnx.ModelProto.FromString(model.SerializeToString())
    moved.graph.node.append(onnx.helper.make_node(kind, [answer], ["moved"], name="moved"))
    moved.graph.output[0].name = "moved"
    assert graphs.inner_linear_outputs(moved) == graphs.inner_linear_outputs(model)


def test_linears_by_name(model: onnx.ModelProto) -> None:
    assert [linear.name for linear in graphs.select_linears(model, ["head", "tubes.0"])] == ["head", "tubes.0"]
    with pytest.raises(SpecError, match=r"the graph has no linear pool, a, b and 1 more, which its roles name"):
        graphs.select_linears(model, ["head", "pool", "a", "b", "c"])


def test_work_and_sizes_by_hand(model: onnx.ModelProto) -> None:
    sizes = {"tubes.0": 24, "blocks.0.mlp.fc1": 48, "blocks.0.mlp.fc2": 48, "head": 12}
    assert graphs.weight_counts(model) == sizes
    assert graphs.macs(model) == {name: 3 * size for name, size in sizes.items()}


def test_operands_of_attention(model: onnx.ModelProto) -> None:
    expected = ("blocks.0.mlp.fc2", "blocks.0.turned", "blocks.0.scores", "tubes.0.sum")
    assert graphs.attention_operands(model, ROLES) == expected
    (attention,) = ROLES.attention
    for scores in ("blocks.0.turned", "nothing"):  # a Transpose, no tensor
        with pytest.raises(SpecError, match=f"has no product {scores}, which its roles name"):
            graphs.attention_operands(model, replace(ROLES, attention=(replace(attention, scores=scores),)))
    with pytest.raises(SpecError, match="name no attention"):
        graphs.attention_operands(model, GraphRoles("tubes.0.sum"))


class TestFoldSites:
    def test_those_of_the_graph(self, model: onnx.ModelProto) -> None:
        graphs.check_fold_sites(model, ROLES)
        graphs.check_fold_sites(model, with_site("blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "values", (2, 8)))
        graphs.check_fold_sites(graphs.insert_equalization_sites(model, ROLES, "int8"), ROLES)

    @pytest.mark.parametrize(
        ("site", "says"),
        [
            (("blocks.0.norm1", "pool", "norm", None), "no linear pool"),
            (("blocks.0.norm2", "blocks.0.mlp.fc1", "norm", None), "no tensor blocks.0.norm2"),
            (("tubes.0.sum", "blocks.0.mlp.fc1", "norm", None), "sum is not a LayerNorm that blocks.0.mlp.fc1 alone"),
            (("blocks.0.norm1", "head", "norm", None), "norm1 is not a LayerNorm that head alone reads"),
            (("blocks.0.mlp.act", "head", "activation", None), "act is not what head reads"),
            (("blocks.0.norm1", "blocks.0.mlp.fc2", "values", (0, 3)), "no linear blocks.0.norm1"),
            (("tubes.0", "blocks.0.mlp.fc2", "values", (0, 3)), "tubes.0 is not a linear with a bias"),
            (("blocks.0.mlp.fc1", "head", "values", (3, 9)), "not a linear with a bias and the columns 3 to 9"),
            (("blocks.0.mlp.fc1", "head", "values", None), "not a linear with a bias and the columns 0 to 0"),
        ],
    )
    def test_others_are_refused(self, model: onnx.ModelProto, site: Any, says: str) -> None:
        with pytest.raises(SpecError, match=says):
            graphs.insert_equalization_sites(model, with_site(*site), "int8")

    def test_a_norm_with_a_second_reader(self, model: onnx.ModelProto) -> None:
        model.graph.node[-1].input[0] = "blocks.0.norm1"
        with pytest.raises(SpecError, match=r"is not a LayerNorm that blocks\.0\.mlp\.fc1 alone reads"):
            graphs.check_fold_sites(model, ROLES)


def with_site(producer: str, linear: str, kind: FoldKind, columns: Columns | None = None) -> GraphRoles:
    return replace(ROLES, fold_sites=(FoldSite(producer, linear, kind, columns),))


class TestStages:
    def test_the_graph_is_cut_at_its_blocks(self, model: onnx.ModelProto) -> None:
        found = graphs.stages(model, ROLES)
        assert [stage.name for stage in found] == ["tokenizer", "blocks.0.scores", "blocks.1.x", "classifier"]
        assert [len(stage.nodes) for stage in found] == [3, 8, 1, 3]
        assert [n.name for stage in found for n in stage.nodes] == [n.name for n in model.graph.node]
        assert [stage.inputs for stage in found] == [
            ("frames",), ("tubes.0.sum",), ("blocks.0.scores", "tubes.0.sum"), ("blocks.1.x",)
        ]  # fmt: skip
        assert [stage.outputs for stage in found] == [
            ("tubes.0.sum",), ("blocks.0.scores",), ("blocks.1.x",), ("logits",)
        ]  # fmt: skip

    def test_the_order_of_the_nodes_does_not_matter(self, model: onnx.ModelProto) -> None:
        """A block's nodes are what its output is computed from; the score is of no block, wherever it stands."""
        expected = [{n.name for n in stage.nodes} for stage in graphs.stages(model, ROLES)]
        turned = model.graph.node.pop(9)
        model.graph.node.insert(3, turned)
        assert [{n.name for n in stage.nodes} for stage in graphs.stages(model, ROLES)] == expected

    def test_a_block_that_is_not_there(self, model: onnx.ModelProto) -> None:
        with pytest.raises(SpecError, match=r"the graph has no tensor blocks\.2, which its roles name"):
            graphs.stages(model, replace(ROLES, blocks=("blocks.0.scores", "blocks.2")))

    def test_parts_compute_what_the_whole_does(self, model: onnx.ModelProto) -> None:
        known: dict[str, Any] = {"frames": FRAMES}
        for stage in graphs.stages(model, ROLES):
            part = graphs.extract_stage(model, stage)
            onnx.checker.check_model(part)
            used = {tensor.name for tensor in part.graph.initializer}
            assert used == {name for n in stage.nodes for name in n.input} & {t.name for t in model.graph.initializer}
            known |= dict(zip(stage.outputs, run(part, {n: known[n] for n in stage.inputs}), strict=True))
        np.testing.assert_array_equal(known["logits"], run(model)[0])

    def test_a_stage_is_cut_at_its_tensors(self, model: onnx.ModelProto) -> None:
        whole = graphs.stages(model, ROLES)[1]
        cuts = {"blocks.0.norm1", "blocks.0.mlp.act", "tubes.0.sum", "logits"}  # two of which it does not make
        parts = graphs.split_stage(model, whole, cuts)
        assert [part.name for part in parts] == [
            "blocks.0.scores to blocks.0.norm1", "blocks.0.scores to blocks.0.mlp.act", "blocks.0.scores"
        ]  # fmt: skip
        assert [n.name for part in parts for n in part.nodes] == [n.name for n in whole.nodes]
        known: dict[str, Any] = {"tubes.0.sum": run(graphs.extract_subgraph(model, ["tubes.0.sum"]))[0]}
        for part in parts:
            made = run(graphs.extract_stage(model, part), {n: known[n] for n in part.inputs})
            known |= dict(zip(part.outputs, made, strict=True))
        assert {*known} >= {"blocks.0.norm1", "blocks.0.mlp.act"}
        np.testing.assert_array_equal(
            known["blocks.0.scores"], run(graphs.extract_subgraph(model, ["blocks.0.scores"]))[0]
        )
        assert graphs.split_stage(model, whole, ()) == (whole,)
        assert graphs.split_stage(model, whole, {"blocks.0.scores"})[0].nodes == whole.nodes

    def test_the_rest_of_a_graph_as_one_stage(self, model: onnx.ModelProto) -> None:
        rest = graphs.join_stages(model, graphs.stages(model, ROLES)[2:])
        assert (rest.inputs, rest.outputs) == (("blocks.0.scores", "tubes.0.sum"), ("logits",))
        before = dict(zip(rest.inputs, run(graphs.extract_subgraph(model, list(rest.inputs))), strict=True))
        np.testing.assert_array_equal(run(graphs.extract_stage(model, rest), before)[0], run(model)[0])


def test_only_what_is_asked_for(model: onnx.ModelProto) -> None:
    part = graphs.extract_subgraph(model, ["blocks.0.mlp.act", "cast"])
    assert [value.name for value in part.graph.output] == ["blocks.0.mlp.act", "cast"]
    assert len(part.graph.node) == 7
    names = {"tubes.0.weight", "position", "gamma", "beta", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc1.bias"}
    assert {tensor.name for tensor in part.graph.initializer} == names
    act, cast = run(part)
    assert act.shape == (3, 8)
    np.testing.assert_array_equal(cast, FRAMES)
    assert [
        value.name
        for value in graphs.extract_subgraph(
            graphs.extract_stage(model, graphs.stages(model, ROLES)[1]), []
        ).graph.input
    ] == []


def test_replaced_values_have_the_old_shapes(
    model: onnx.ModelProto, weights: dict[str, npt.NDArray[np.float32]]
) -> None:
    new = graphs.replace_initializers(
        model, {"head.bias": np.array([[1], [2]], np.float64), "nobody": np.zeros(1, np.float32)}
    )
    found = graphs.initializers(new)
    assert found.keys() == weights.keys()
    assert found["head.bias"].dtype == np.float32
    np.testing.assert_array_equal(found["head.bias"], [1, 2])
    np.testing.assert_array_equal(graphs.initializers(model)["head.bias"], weights["head.bias"])
    np.testing.assert_array_equal(run(new)[0], run(model)[0] - weights["head.bias"] + np.array([1, 2], np.float32))


class TestDigest:
    def changes(self, model: onnx.ModelProto) -> dict[str, onnx.ModelProto]:
        def copy() -> onnx.ModelProto:
            new = onnx.ModelProto()
            new.CopyFrom(model)
            return new

        found = {name: copy() for name in ("node", "order", "weight", "name", "input", "output", "dims")}
        found["node"].graph.node[0].name = "other"
        found["order"].graph.node.insert(0, found["order"].graph.node.pop())
        found["weight"] = graphs.replace_initializers(model, {"head.bias": np.zeros(2, np.float32)})
        found["name"].graph.initializer[0].name = "other"
        found["input"].graph.input[0].name = "other"
        found["output"].graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
        found["dims"].graph.initializer[0].dims[:] = [6, 4]
        return found

    def test_whatever_changes_the_graph_changes_it(self, model: onnx.ModelProto) -> None:
        digests = {name: graphs.digest(changed) for name, changed in self.changes(model).items()}
        assert len({*digests.values(), graphs.digest(model)}) == len(digests) + 1

    def test_who_made_the_graph_does_not(self, model: onnx.ModelProto) -> None:
        before = graphs.digest(model)
        model.producer_name, model.doc_string = "somebody", "else"
        assert graphs.digest(onnx.load_from_string(model.SerializeToString())) == before


class TestEqualizationSites:
    @pytest.mark.parametrize("activations", ["int8", "uint8"])
    def test_behind_a_gelu(self, model: onnx.ModelProto, activations: ActivationScheme) -> None:
        found = graphs.insert_equalization_sites(model, ROLES, activations)
        onnx.checker.check_model(found)
        act, centred = "blocks.0.mlp.act", activations == "int8"
        tensor = f"{act}.centred" if centred else f"{act}.scaled"
        assert graphs.equalization_sites(found) == {
            tensor: EqualizationSite(f"{act}.gain", f"{act}.centre" if centred else None)
        }
        assert graphs.equalization_sites(model) == {}
        constants = graphs.initializers(found)
        np.testing.assert_array_equal(constants[f"{act}.gain"], np.ones(8, np.float32))
        assert (f"{act}.centre" in constants) == centred
        read = {linear.name: linear.activation for linear in graphs.linears(found)}
        assert read["blocks.0.mlp.fc2"] == tensor
        assert read["blocks.0.mlp.fc1"] == "blocks.0.norm1"
        np.testing.assert_array_equal(run(found)[0], run(model)[0])
        types = {value.name: value.type.tensor_type.shape.dim[1].dim_value for value in found.graph.value_info}
        assert types[tensor] == 8
        assert graphs.macs(found) == graphs.macs(model)

    def test_what_they_compute(self, model: onnx.ModelProto, rng: np.random.Generator) -> None:
        gain = rng.uniform(0.5, 2, 8).astype(np.float32)
        act = "blocks.0.mlp.act"
        values = {f"{act}.gain": gain, f"{act}.centre": np.array([-0.5], np.float32)}
        found = graphs.replace_initializers(graphs.insert_equalization_sites(model, ROLES, "int8"), values)
        (before,), (after,) = (
            run(graphs.extract_subgraph(found, [act])),
            run(graphs.extract_subgraph(found, [f"{act}.centred"])),
        )
        np.testing.assert_allclose(after, before * gain - 0.5, rtol=1e-6)

    @pytest.mark.parametrize(
        ("gain", "centre", "left"),
        [(1.0, 0.0, set()), (2.0, 0.0, {"Mul"}), (1.0, 3.0, {"AddC"}), (2.0, 3.0, {"Mul", "AddC"})],
    )
    def test_identities_are_removed(self, model: onnx.ModelProto, gain: float, centre: float, left: set[str]) -> None:
        act = "blocks.0.mlp.act"
        values = {f"{act}.gain": np.full(8, gain, np.float32), f"{act}.centre": np.full(1, centre, np.float32)}
        full = graphs.replace_initializers(graphs.insert_equalization_sites(model, ROLES, "int8"), values)
        found = graphs.remove_identity_sites(full)
        onnx.checker.check_model(found)
        names = {n.name for n in found.graph.node} - {n.name for n in model.graph.node}
        assert names == {{"Mul": f"{act}.scaled", "AddC": f"{act}.centred"}[kind] for kind in left}
        assert len(found.graph.node) == len(model.graph.node) + len(left)
        constants = {tensor.name for tensor in found.graph.initializer}
        expected = {{"Mul": f"{act}.gain", "AddC": f"{act}.centre"}[kind] for kind in left}
        assert constants == {tensor.name for tensor in model.graph.initializer} | expected
        np.testing.assert_array_equal(run(found)[0], run(full)[0])
        assert {value.name for value in found.graph.value_info} >= names


class TestQuantised:
    @pytest.mark.parametrize("activations", ["int8", "uint8"])
    def test_named_readers_see_the_rounded_tensor(self, model: onnx.ModelProto, activations: ActivationScheme) -> None:
        norm, fc1 = "blocks.0.norm1", "blocks.0.mlp.fc1.mm"
        found = graphs.quantize_activations(model, {norm: Range(-1.0, 1.5, "x")}, [fc1, "head.mm"], activations)
        onnx.checker.check_model(found)
        inputs = {n.name: list(n.input) for n in found.graph.node}
        assert inputs[fc1][0] == f"{norm}.dequantized" == graphs.dequantized_name(norm)
        assert inputs["head.mm"][0] == "blocks.1.x"
        (exact,), (fake,) = (
            run(graphs.extract_subgraph(model, [norm])),
            run(graphs.extract_subgraph(found, [graphs.dequantized_name(norm)])),
        )
        if activations == "int8":
            scale, zero, low, high = 1.5 / 127, 0, -128, 127
        else:
            scale, zero, low, high = 2.5 / 255, 102, 0, 255
        by_hand = (np.clip(np.rint(exact / scale) + zero, low, high) - zero) * scale
        np.testing.assert_allclose(fake, by_hand, atol=1e-6)
        assert np.abs(fake - exact).max() > 0.1  # some are beyond the range
        assert len(found.graph.node) == len(model.graph.node) + 2
        assert len(model.graph.node) == 15

    def test_one_pair_for_all_readers(self, model: onnx.ModelProto) -> None:
        ranges = {"tubes.0.sum": Range(-1.0, 1.0, "x"), "blocks.0.scores": Range(-1.0, 1.0, "x")}
        readers = ["blocks.1.x"]
        found = graphs.quantize_activations(model, ranges, readers, "int8")
        inputs = {n.name: list(n.input) for n in found.graph.node}
        assert inputs["blocks.1.x"] == ["blocks.0.scores.dequantized", "tubes.0.sum.dequantized"]
        assert inputs["blocks.0.norm1"][0] == "tubes.0.sum"
        more = graphs.quantize_activations(model, ranges, [*readers, "blocks.0.turned"], "int8")
        assert sum(n.op_type == "QuantizeLinear" for n in more.graph.node) == 2
        constants = graphs.initializers(more)
        assert constants["tubes.0.sum.zero_point"].dtype == np.int8
        assert constants["tubes.0.sum.scale"] == np.float32(1 / 127)
