"""What calibration sees of a canonical graph: its linears, its stages, and how fake quantisation is put into it.

A graph is an ONNX `ModelProto` whose tensors carry the names of the modules (`blocks.3.attn.qkv`); initializers of
MatMul are (K, N). Nothing here knows the model: a stage is a block by its name, a linear is a MatMul by a constant.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgetube.calibration.table import Activations, Range

Array = npt.NDArray[np.float32]
Evaluate = Callable[[Mapping[str, npt.NDArray[np.generic]]], list[Array]]
"""Feeds by input name -> the outputs that it was opened for."""

Open = Callable[[onnx.ModelProto], Evaluate]
"""Opens a graph for running: how calibration reaches a runtime without knowing which."""

SCALED, CENTRED = ".scaled", ".centred"
CONSTANTS = {SCALED: ".gain", CENTRED: ".centre"}
"""How the names of tensors end that `prepared` puts behind a GELU, and those of the constants that make them."""

BLOCK = re.compile(r"blocks\.(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Linear:
    """A matrix product by a constant, with its bias.

    Attributes:
        name: the scope, `blocks.3.attn.qkv`.
        node: name of the MatMul.
        activation: the tensor that it reads (..., K).
        weight: initializer (K, N).
        bias: initializer (N,), None where it has none of its own.
    """

    name: str
    node: str
    activation: str
    weight: str
    bias: str | None

    @property
    def in_block(self) -> bool:
        """Whether it belongs to the encoder, where nearly all the work is."""
        return BLOCK.match(self.name) is not None


@dataclass(frozen=True)
class Stage:
    """A run of consecutive nodes: the tokenizer, one block, or what follows the blocks.

    Attributes:
        name: `tokenizer`, `blocks.3`, `classifier`.
        nodes: in order.
        inputs: tensors of the graph's input or of earlier stages that it reads.
        outputs: its tensors that later stages read, or that the graph gives out.
    """

    name: str
    nodes: tuple[onnx.NodeProto, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def digest(model: onnx.ModelProto) -> str:
    """sha256 of a graph: operators, attributes, names and weights; not of who made it."""
    found = hashlib.sha256()
    for node in model.graph.node:
        found.update(node.SerializeToString(deterministic=True))
    for tensor in model.graph.initializer:
        found.update(f"{tensor.name}:{tensor.data_type}:{list(tensor.dims)}".encode())
        found.update(tensor.raw_data or tensor.SerializeToString(deterministic=True))
    for value in [*model.graph.input, *model.graph.output]:
        found.update(value.SerializeToString(deterministic=True))
    return found.hexdigest()


def weights(model: onnx.ModelProto) -> dict[str, npt.NDArray[np.generic]]:
    """Initializers by name; read only."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def replaced(model: onnx.ModelProto, values: Mapping[str, Array]) -> onnx.ModelProto:
    """The graph with other values in some initializers of the same shapes."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for tensor in result.graph.initializer:
        if tensor.name in values:
            new = np.asarray(values[tensor.name], np.float32).reshape(tuple(tensor.dims))
            tensor.CopyFrom(numpy_helper.from_array(new, tensor.name))
    return result


def linears(model: onnx.ModelProto) -> tuple[Linear, ...]:
    """Every MatMul by a constant matrix with more than one column, in the graph's order."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    adds = {name: node for node in model.graph.node if node.op_type == "Add" for name in node.input}
    found = []
    for node in model.graph.node:
        if node.op_type != "MatMul" or len(shape := shapes.get(node.input[1], ())) != 2 or shape[1] == 1:
            continue
        weight, add = node.input[1], adds.get(node.output[0])
        bias = next((name for name in add.input if shapes.get(name) == shape[1:]), None) if add else None
        found.append(Linear(weight.removesuffix(".weight"), node.name, node.input[0], weight, bias))
    return tuple(found)


@dataclass(frozen=True)
class Place:
    """Where an equalisation is folded in behind a GELU, which can neither be scaled nor shifted itself.

    Attributes:
        gain: initializer (K,) that multiplies the GELU's output.
        centre: initializer (1,) that is added then; None where zero points do that.
    """

    gain: str
    centre: str | None


def prepared(model: onnx.ModelProto, activations: Activations) -> onnx.ModelProto:
    """The graph with a `Place` behind every GELU that a linear reads; its values do not change anything yet."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    known = {value.name: value for value in graph.value_info}
    readers = {linear.activation: linear.node for linear in linears(model)}
    nodes: list[onnx.NodeProto] = []
    moved: dict[str, str] = {}
    for source in model.graph.node:
        node = _copied(source)
        if node.input and node.input[0] in moved and node.name == readers[node.input[0]]:
            node.input[0] = moved[node.input[0]]
        nodes.append(node)
        if node.op_type != "Gelu" or (tensor := node.output[0]) not in readers:
            continue
        width = known[tensor].type.tensor_type.shape.dim[-1].dim_value
        steps = [("Mul", tensor, SCALED, np.ones(width, np.float32))]
        if activations == "int8":
            steps.append(("Add", f"{tensor}{SCALED}", CENTRED, np.zeros(1, np.float32)))
        for kind, before, suffix, idle in steps:
            after, constant = f"{tensor}{suffix}", f"{tensor}{CONSTANTS[suffix]}"
            nodes.append(helper.make_node(kind, [before, constant], [after], name=after))
            graph.initializer.append(numpy_helper.from_array(idle, constant))
            value = graph.value_info.add()
            value.CopyFrom(known[tensor])
            value.name = moved[tensor] = after
    del graph.node[:]
    graph.node.extend(nodes)
    return result


def places(model: onnx.ModelProto) -> dict[str, Place]:
    """By the tensor that a linear reads from it."""
    constants = {tensor.name for tensor in model.graph.initializer}
    found = {}
    for linear in linears(model):
        tensor = linear.activation.removesuffix(CENTRED).removesuffix(SCALED)
        gain, centre = (f"{tensor}{CONSTANTS[suffix]}" for suffix in (SCALED, CENTRED))
        if gain in constants:
            found[linear.activation] = Place(gain, centre if centre in constants else None)
    return found


def without_idle_places(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph without those operators of `prepared` that multiply by one or add zero."""
    known = weights(model)
    idle: dict[str, str] = {}
    for node in model.graph.node:
        for suffix, nothing in ((SCALED, 1), (CENTRED, 0)):
            constant = node.output[0].removesuffix(suffix) + CONSTANTS[suffix]
            if node.output[0].endswith(suffix) and constant in node.input and np.all(known[constant] == nothing):
                idle[node.output[0]] = idle.get(node.input[0], node.input[0])
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    nodes = [_copied(node) for node in model.graph.node if node.output[0] not in idle]
    for node in nodes:
        node.input[:] = [idle.get(name, name) for name in node.input]
    used = {name for node in nodes for name in node.input}
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in used]
    types = [value for value in model.graph.value_info if value.name not in idle]
    for field, items in ((graph.node, nodes), (graph.initializer, tensors), (graph.value_info, types)):
        del field[:]
        field.extend(items)
    return result


def products(model: onnx.ModelProto) -> dict[str, tuple[str, str]]:
    """The products of two activations in the encoder, queries by keys and attention by values: node -> operands."""
    constant = {tensor.name for tensor in model.graph.initializer}
    return {
        node.name: (node.input[0], node.input[1])
        for node in model.graph.node
        if node.op_type == "MatMul" and BLOCK.match(node.name) and not constant & set(node.input)
    }


def macs(model: onnx.ModelProto) -> dict[str, int]:
    """Multiply-accumulates of every linear, by its name."""
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.value_info}
    rows = {found.name: int(np.prod(shapes[found.activation][:-1])) for found in linears(model)}
    return {name: rows[name] * size for name, size in sizes(model).items()}


def sizes(model: onnx.ModelProto) -> dict[str, int]:
    """Weights of every linear, by its name."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    return {found.name: int(np.prod(shapes[found.weight])) for found in linears(model)}


def stages(model: onnx.ModelProto) -> tuple[Stage, ...]:
    """The graph cut at the outputs of its blocks."""
    groups: dict[str, list[onnx.NodeProto]] = {}
    name = "tokenizer"
    for node in model.graph.node:
        if match := BLOCK.match(node.name):
            name = match[0].rstrip(".")
        elif name != "tokenizer":
            name = "classifier"
        groups.setdefault(name, []).append(node)
    constant = {tensor.name for tensor in model.graph.initializer}
    wanted = {value.name for value in model.graph.output}
    found = []
    for name, nodes in reversed(groups.items()):
        made = [output for node in nodes for output in node.output]
        read = dict.fromkeys(i for node in nodes for i in node.input if i and i not in constant and i not in set(made))
        found.append(Stage(name, tuple(nodes), tuple(read), tuple(o for o in made if o in wanted)))
        wanted |= set(read)
    return tuple(reversed(found))


def part(model: onnx.ModelProto, stage: Stage) -> onnx.ModelProto:
    """One stage as a graph of its own."""
    types = {value.name: value for value in [*model.graph.input, *model.graph.value_info, *model.graph.output]}
    used = {name for node in stage.nodes for name in node.input}
    graph = helper.make_graph(
        list(stage.nodes),
        stage.name,
        [types[name] for name in stage.inputs],
        [types[name] for name in stage.outputs],
        [tensor for tensor in model.graph.initializer if tensor.name in used],
        value_info=[types[name] for node in stage.nodes for name in node.output if name in types],
    )
    return helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=model.ir_version)


def only(model: onnx.ModelProto, outputs: Sequence[str]) -> onnx.ModelProto:
    """What a graph computes for `outputs`, which may be any of its tensors, and nothing else."""
    source = model.graph
    types = {value.name: value for value in [*source.output, *source.value_info]}
    nodes, wanted = [], set(outputs)
    for node in reversed(source.node):
        if wanted & set(node.output):
            nodes.append(node)
            wanted |= set(node.input)
    graph = helper.make_graph(
        nodes[::-1],
        source.name,
        [value for value in source.input if value.name in wanted],
        [types.get(name) or helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [tensor for tensor in source.initializer if tensor.name in wanted],
    )
    return helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=model.ir_version)


def quantise_activations(
    model: onnx.ModelProto, tensors: Mapping[str, Range], nodes: Iterable[str], activations: Activations
) -> onnx.ModelProto:
    """A copy in which the MatMuls called `nodes` read the activations in `tensors` through QuantizeLinear,
    DequantizeLinear.

    One pair per tensor, whatever the number of readers; other readers of the tensor keep the float value.

    Args:
        tensors: range of each tensor to quantise.
        activations: "int8" (zero point 0) or "uint8".
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph, readers = result.graph, set(nodes)
    made: set[str] = set()
    ordered: list[onnx.NodeProto] = []
    for node in graph.node:
        for index, name in enumerate(node.input if node.name in readers else ()):
            if name not in tensors:
                continue
            if name not in made:
                made.add(name)
                ordered.extend(_pair(name))
                graph.initializer.extend(_parameters(name, tensors[name], activations))
            node.input[index] = dequantised(name)
        ordered.append(node)
    ordered = [_copied(node) for node in ordered]
    del graph.node[:]
    graph.node.extend(ordered)
    return result


def dequantised(name: str) -> str:
    """The name of an activation behind its Q/DQ pair."""
    return f"{name}.dequantized"


def _copied(node: onnx.NodeProto) -> onnx.NodeProto:
    new = onnx.NodeProto()
    new.CopyFrom(node)
    return new


def _pair(name: str) -> list[onnx.NodeProto]:
    parameters = [f"{name}.scale", f"{name}.zero_point"]
    quantized, back = f"{name}.quantized", dequantised(name)
    return [
        helper.make_node("QuantizeLinear", [name, *parameters], [quantized], name=quantized),
        helper.make_node("DequantizeLinear", [quantized, *parameters], [back], name=back),
    ]


def _parameters(name: str, found: Range, activations: Activations) -> list[TensorProto]:
    scale, zero = (found.symmetric, 0) if activations == "int8" else found.asymmetric
    kind = np.int8 if activations == "int8" else np.uint8
    return [
        numpy_helper.from_array(np.array(scale, np.float32), f"{name}.scale"),
        numpy_helper.from_array(np.array(zero, kind), f"{name}.zero_point"),
    ]
