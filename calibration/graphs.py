"""Queries and edits of a canonical graph for calibration: linears, stages, equalisation sites, fake quantisation.

A graph is an ONNX `ModelProto` whose tensors carry the names of the modules (`blocks.3.attn.qkv`); initializers of
MatMul are (K, N). Nothing here depends on the model: a linear is a MatMul by a constant, and what depends on more is
found by the graph's roles (`edgetube.roles`).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgetube.calibration import storage
from edgetube.calibration.storage import Weights
from edgetube.calibration.table import ActivationScheme, Range
from edgetube.errors import SpecError
from edgetube.roles import GraphRoles

Array = npt.NDArray[np.float32]
Evaluate = Callable[[Mapping[str, npt.NDArray[np.generic]]], list[Array]]
"""Feeds by input name -> the outputs that it was opened for."""

OpenGraph = Callable[[onnx.ModelProto], Evaluate]
"""Opens a graph for running in some runtime."""

SCALED, CENTRED = ".scaled", ".centred"
CONSTANTS = {SCALED: ".gain", CENTRED: ".centre"}
"""Suffixes of the tensors that `insert_equalization_sites` adds behind an activation, and of their constants."""


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


@dataclass(frozen=True)
class Stage:
    """Nodes that run together: the tokenizer, one block, or everything after the blocks.

    Attributes:
        name: `tokenizer`, that of a block's output (`blocks.3`), `classifier`.
        nodes: in order.
        inputs: tensors of the graph's input or of earlier stages that it reads.
        outputs: its tensors that later stages read, or that are graph outputs.
    """

    name: str
    nodes: tuple[onnx.NodeProto, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def digest(model: onnx.ModelProto) -> str:
    """sha256 of a graph: operators, attributes, names and weights, without metadata."""
    found = hashlib.sha256()
    for node in model.graph.node:
        found.update(node.SerializeToString(deterministic=True))
    for tensor in model.graph.initializer:
        found.update(f"{tensor.name}:{tensor.data_type}:{list(tensor.dims)}".encode())
        found.update(storage.digest(tensor).encode())
    for value in [*model.graph.input, *model.graph.output]:
        found.update(value.SerializeToString(deterministic=True))
    return found.hexdigest()


def initializers(model: onnx.ModelProto) -> Weights:
    """Initializers by name (read-only arrays)."""
    return Weights(model)


def replace_initializers(model: onnx.ModelProto, values: Mapping[str, Array]) -> onnx.ModelProto:
    """A copy of the graph with new values, of the same shapes, in some initializers."""
    folder, graph = storage.folder_of(model), storage.without(model.graph, "initializer")
    for tensor in model.graph.initializer:
        if tensor.name in values:
            new = np.asarray(values[tensor.name], np.float32).reshape(tuple(tensor.dims))
            graph.initializer.append(storage.make(tensor.name, new, folder))
        else:
            graph.initializer.append(tensor)
    return storage.with_graph(model, graph)


def producers(nodes: Iterable[onnx.NodeProto]) -> dict[str, onnx.NodeProto]:
    """The node that produces each tensor."""
    return {name: node for node in nodes for name in node.output}


def readers(nodes: Iterable[onnx.NodeProto]) -> dict[str, list[onnx.NodeProto]]:
    """The nodes that read each tensor, once for each time; an empty list for what nobody reads."""
    found: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in nodes:
        for name in node.input:
            found[name].append(node)
    return found


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


def linear_outputs(model: onnx.ModelProto) -> dict[str, str]:
    """The tensor that each linear gives, by its name: behind the bias where it has one of its own."""
    adds = {name: node.output[0] for node in model.graph.node if node.op_type == "Add" for name in node.input}
    makers = {node.name: node.output[0] for node in model.graph.node}
    found = {}
    for linear in linears(model):
        product = makers[linear.node]
        found[linear.name] = product if linear.bias is None else adds[product]
    return found


MOVES = ("Reshape", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Split", "Slice", "Gather")
"""Operators that only move values: those of their outputs are values of their first input, in whose range they are."""


def inner_linear_outputs(model: onnx.ModelProto) -> dict[str, tuple[str, ...]]:
    """What linears give, by their names, for targets that quantise that, too.

    It is the tensor of `linear_outputs`, or the parts that it is split into; none of a linear that gives the answer,
    which is not rounded to 8 bits.
    """
    users = readers(model.graph.node)
    answers = {value.name for value in model.graph.output}
    for node in reversed(model.graph.node):
        if node.op_type in (*MOVES, "Concat") and answers & {*node.output}:
            answers |= {*node.input}
    found: dict[str, tuple[str, ...]] = {}
    for linear, tensor in linear_outputs(model).items():
        parts: tuple[str, ...] = (tensor,)
        if [node.op_type for node in users[tensor]] == ["Split"]:
            parts = tuple(users[tensor][0].output)
        found[linear] = () if answers & {tensor, *parts} else parts
    return found


def select_linears(model: onnx.ModelProto, names: Iterable[str]) -> tuple[Linear, ...]:
    """The linears called `names`, in that order.

    Raises:
        SpecError: the graph lacks one.
    """
    found, names = {linear.name: linear for linear in linears(model)}, list(names)
    _require(names, found, "linear")
    return tuple(found[name] for name in names)


def _require(names: Iterable[str], known: Collection[str], what: str) -> None:
    """Check that the graph has what its roles name.

    Raises:
        SpecError: it lacks some.
    """
    if lacking := [name for name in names if name not in known]:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise SpecError(
            f"the graph has no {what} {', '.join(lacking[:3])}{more}, which its roles name: take the roles of the "
            "static model that the graph was traced from"
        )


def check_fold_sites(model: onnx.ModelProto, roles: GraphRoles) -> None:
    """Check that each fold site is what its kind says, see `FoldSite`.

    Raises:
        SpecError: one is not, or the graph lacks its producer or its linear.
    """
    known = {linear.name: linear for linear in linears(model)}
    makers = producers(model.graph.node)
    widths = {tensor.name: tensor.dims[-1] for tensor in model.graph.initializer if tensor.dims}
    _require([site.linear for site in roles.fold_sites], known, "linear")
    _require([site.producer for site in roles.fold_sites if site.kind == "values"], known, "linear")
    _require([site.producer for site in roles.fold_sites if site.kind != "values"], makers, "tensor")
    for site in roles.fold_sites:
        linear, readers = known[site.linear], [n.name for n in model.graph.node if site.producer in n.input]
        if site.kind == "norm":
            right = makers[site.producer].op_type == "LayerNormalization" and readers == [linear.node]
            wanted = f"a LayerNorm that {site.linear} alone reads"
        elif site.kind == "activation":
            right = linear.activation.removesuffix(CENTRED).removesuffix(SCALED) == site.producer
            wanted = f"what {site.linear} reads"
        else:
            maker, (first, end) = known[site.producer], site.columns or (0, 0)
            right = maker.bias is not None and 0 <= first < end <= widths[maker.weight]
            wanted = f"a linear with a bias and the columns {first} to {end}"
        if not right:
            raise SpecError(f"{site.producer} is not {wanted}, which the graph's roles call a {site.kind} fold site")


@dataclass(frozen=True)
class EqualizationSite:
    """Two constants behind an activation that hold an equalisation: it has no parameters to fold it into.

    Attributes:
        gain: initializer (K,) that multiplies the activation's output.
        centre: initializer (1,) that is added afterwards; None in a scheme with zero points.
    """

    gain: str
    centre: str | None


def insert_equalization_sites(
    model: onnx.ModelProto, roles: GraphRoles, activations: ActivationScheme
) -> onnx.ModelProto:
    """The graph with an `EqualizationSite` at every fold site of kind "activation": gain 1, centre 0.

    Raises:
        SpecError: the graph has not the fold sites of its roles.
    """
    check_fold_sites(model, roles)
    result = deepcopy(model)
    graph = result.graph
    known = {value.name: value for value in graph.value_info}
    sites = [site for site in roles.fold_sites if site.kind == "activation"]
    chosen = select_linears(model, [site.linear for site in sites])
    readers = {linear.activation: linear.node for linear in chosen}
    nodes: list[onnx.NodeProto] = []
    moved: dict[str, str] = {}
    for source in model.graph.node:
        node = deepcopy(source)
        if node.input and node.input[0] in moved and node.name == readers[node.input[0]]:
            node.input[0] = moved[node.input[0]]
        nodes.append(node)
        if (tensor := node.output[0]) not in readers:
            continue
        width = known[tensor].type.tensor_type.shape.dim[-1].dim_value
        steps = [("Mul", tensor, SCALED, np.ones(width, np.float32))]
        if activations == "int8":
            steps.append(("Add", f"{tensor}{SCALED}", CENTRED, np.zeros(1, np.float32)))
        for kind, before, suffix, neutral in steps:
            after, constant = f"{tensor}{suffix}", f"{tensor}{CONSTANTS[suffix]}"
            nodes.append(helper.make_node(kind, [before, constant], [after], name=after))
            graph.initializer.append(numpy_helper.from_array(neutral, constant))
            value = graph.value_info.add()
            value.CopyFrom(known[tensor])
            value.name = moved[tensor] = after
    del graph.node[:]
    graph.node.extend(nodes)
    return result


def equalization_sites(model: onnx.ModelProto) -> dict[str, EqualizationSite]:
    """The equalisation sites of a graph, by the tensor that the linear reads."""
    constants = {tensor.name for tensor in model.graph.initializer}
    found = {}
    for linear in linears(model):
        tensor = linear.activation.removesuffix(CENTRED).removesuffix(SCALED)
        gain, centre = (f"{tensor}{CONSTANTS[suffix]}" for suffix in (SCALED, CENTRED))
        if gain in constants:
            found[linear.activation] = EqualizationSite(gain, centre if centre in constants else None)
    return found


def remove_identity_sites(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph without those operators of equalisation sites that multiply by one or add zero."""
    known = initializers(model)
    identity: dict[str, str] = {}
    for node in model.graph.node:
        for suffix, neutral in ((SCALED, 1), (CENTRED, 0)):
            constant = node.output[0].removesuffix(suffix) + CONSTANTS[suffix]
            if node.output[0].endswith(suffix) and constant in node.input and np.all(known[constant] == neutral):
                identity[node.output[0]] = identity.get(node.input[0], node.input[0])
    result = deepcopy(model)
    graph = result.graph
    nodes = [deepcopy(node) for node in model.graph.node if node.output[0] not in identity]
    for node in nodes:
        node.input[:] = [identity.get(name, name) for name in node.input]
    used = {name for node in nodes for name in node.input}
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in used]
    types = [value for value in model.graph.value_info if value.name not in identity]
    for field, items in ((graph.node, nodes), (graph.initializer, tensors), (graph.value_info, types)):
        del field[:]
        field.extend(items)
    return result


def attention_operands(model: onnx.ModelProto, roles: GraphRoles) -> tuple[str, ...]:
    """The operands of the matrix products of attention, queries by keys and weights by values; each once.

    Raises:
        SpecError: the graph lacks a product of its roles, or they name none.
    """
    products = [name for attention in roles.attention for name in (attention.scores, attention.context)]
    if not products:
        raise SpecError("the graph's roles name no attention, so its products cannot be quantised")
    makers = producers(model.graph.node)
    _require(products, {name for name, node in makers.items() if node.op_type == "MatMul"}, "product")
    return tuple(dict.fromkeys(operand for name in products for operand in makers[name].input))


def macs(model: onnx.ModelProto) -> dict[str, int]:
    """Multiply-accumulates of every linear, by its name."""
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.value_info}
    rows = {found.name: int(np.prod(shapes[found.activation][:-1])) for found in linears(model)}
    return {name: rows[name] * size for name, size in weight_counts(model).items()}


def weight_counts(model: onnx.ModelProto) -> dict[str, int]:
    """Number of weights of every linear, by its name."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    return {found.name: int(np.prod(shapes[found.weight])) for found in linears(model)}


def stages(model: onnx.ModelProto, roles: GraphRoles) -> tuple[Stage, ...]:
    """The graph split into stages: what the tokens are computed from, what each block adds to that, and the rest.

    Raises:
        SpecError: the graph lacks the tokens or a block.
    """
    makers = producers(model.graph.node)
    _require([roles.tokens, *roles.blocks], makers, "tensor")
    groups: dict[str, list[onnx.NodeProto]] = {}
    left = list(model.graph.node)
    for name, output in [("tokenizer", roles.tokens), *zip(roles.blocks, roles.blocks, strict=True)]:
        needed = {output}
        for node in reversed(left):
            if needed & set(node.output):
                needed |= set(node.input)
        groups[name] = [node for node in left if needed & set(node.output)]
        left = [node for node in left if not needed & set(node.output)]
    groups |= {"classifier": left} if left else {}
    return _linked(model, list(groups.items()), {value.name for value in model.graph.output})


def split_stage(model: onnx.ModelProto, stage: Stage, cuts: Collection[str]) -> tuple[Stage, ...]:
    """A stage in parts that run one after the other: each of its tensors in `cuts` is an output of a part."""
    groups: list[tuple[str, list[onnx.NodeProto]]] = []
    left = list(stage.nodes)
    for cut in [name for node in stage.nodes for name in node.output if name in cuts]:
        needed = {cut}
        for node in reversed(left):
            if needed & set(node.output):
                needed |= set(node.input)
        if part := [node for node in left if needed & set(node.output)]:
            groups.append((f"{stage.name} to {cut}", part))
            left = [node for node in left if not needed & set(node.output)]
    groups += [(stage.name, left)] if left else []
    return _linked(model, groups, {*stage.outputs, *cuts})


def join_stages(model: onnx.ModelProto, stages: Sequence[Stage]) -> Stage:
    """The last stages of a graph as one."""
    nodes = [node for stage in stages for node in stage.nodes]
    (joined,) = _linked(model, [(stages[0].name, nodes)], {value.name for value in model.graph.output})
    return joined


def _linked(
    model: onnx.ModelProto, groups: Sequence[tuple[str, list[onnx.NodeProto]]], wanted: set[str]
) -> tuple[Stage, ...]:
    """Stages of nodes that run in this order; `wanted`: tensors that are read after the last one."""
    constant, wanted = {tensor.name for tensor in model.graph.initializer}, set(wanted)
    found = []
    for name, nodes in reversed(groups):
        made = [output for node in nodes for output in node.output]
        read = dict.fromkeys(i for node in nodes for i in node.input if i and i not in constant and i not in set(made))
        found.append(Stage(name, tuple(nodes), tuple(read), tuple(o for o in made if o in wanted)))
        wanted |= set(read)
    return tuple(reversed(found))


def extract_stage(model: onnx.ModelProto, stage: Stage) -> onnx.ModelProto:
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


def extract_subgraph(model: onnx.ModelProto, outputs: Sequence[str]) -> onnx.ModelProto:
    """The subgraph that computes `outputs`, any tensors of the graph."""
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


def quantize_activations(
    model: onnx.ModelProto,
    tensors: Mapping[str, Range],
    nodes: Iterable[str],
    activations: ActivationScheme,
    outputs: Collection[str] = (),
) -> onnx.ModelProto:
    """A copy in which the MatMuls called `nodes` read the activations in `tensors` through QuantizeLinear,
    DequantizeLinear.

    One pair per tensor, whatever the number of readers; other readers of the tensor keep the float value, except of
    those in `outputs`, which all nodes read through the pair.

    Args:
        tensors: range of each tensor to quantise.
        activations: the type of the integers; int8 has zero point 0. uint16 takes the graph to opset 21.
    """
    result = deepcopy(model)
    if activations == "uint16":
        allow_wide_integers(result)
    graph, readers = result.graph, set(nodes)
    made: set[str] = set()
    ordered: list[onnx.NodeProto] = []
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name not in tensors or not (node.name in readers or name in outputs):
                continue
            if name not in made:
                made.add(name)
                ordered.extend(_qdq_pair(name))
                graph.initializer.extend(_qdq_parameters(name, tensors[name], activations))
            node.input[index] = dequantized_name(name)
        ordered.append(node)
    ordered = [deepcopy(node) for node in ordered]
    del graph.node[:]
    graph.node.extend(ordered)
    return result


WIDE_OPSET, WIDE_IR = 21, 10
"""The first opset whose QuantizeLinear gives integers of 16 bits, and the version of the file format that has it."""


def allow_wide_integers(model: onnx.ModelProto) -> None:
    """Change a graph to an opset with integers of 16 bits; no operator of a canonical graph changes its meaning."""
    for opset in model.opset_import:
        if not opset.domain:
            opset.version = max(opset.version, WIDE_OPSET)
    model.ir_version = max(model.ir_version, WIDE_IR)


def dequantized_name(name: str) -> str:
    """The name of an activation behind its Q/DQ pair."""
    return f"{name}.dequantized"


def _qdq_pair(name: str) -> list[onnx.NodeProto]:
    parameters = [f"{name}.scale", f"{name}.zero_point"]
    quantized, back = f"{name}.quantized", dequantized_name(name)
    return [
        helper.make_node("QuantizeLinear", [name, *parameters], [quantized], name=quantized),
        helper.make_node("DequantizeLinear", [quantized, *parameters], [back], name=back),
    ]


def _qdq_parameters(name: str, found: Range, activations: ActivationScheme) -> list[TensorProto]:
    scale, zero = found.parameters(activations)
    return [
        numpy_helper.from_array(np.array(scale, np.float32), f"{name}.scale"),
        numpy_helper.from_array(np.array(zero, activations), f"{name}.zero_point"),
    ]
