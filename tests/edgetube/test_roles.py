"""The roles that `roles_of` states from a spec, against the graphs that are traced of such models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace

import numpy as np
import onnx
import pytest

from edgetube.calibration import graphs
from edgetube.export import canonical
from edgetube.export.canonical import Graph
from edgetube.export.statistics import byte_casts, tensor_shapes
from edgetube.export.tokenizer import LOWERINGS, StaticTokenizer
from edgetube.reduction import Reduction
from edgetube.roles import FoldSite, GraphRoles, roles_of
from edgetube.runtimes.torch import Reference
from edgetube.spec import ModelSpec, named
from tests.export.models import SPECS, model_of, trace

GRAPHS = [
    pytest.param((name, lowering), id=f"{name}-{lowering}", marks=[] if lowering == "gather" else pytest.mark.long)
    for name in SPECS
    for lowering in LOWERINGS
]
MOVES = {"Reshape", "Transpose", "Concat", "Slice", "Gather", "Unsqueeze", "Squeeze", "Identity"}
"""Operators that keep every value."""


@pytest.fixture(scope="module", params=GRAPHS)
def graph(request: pytest.FixtureRequest) -> Graph:
    return trace(*request.param)


def makers(graph: Graph) -> Mapping[str, onnx.NodeProto]:
    return {name: node for node in graph.model.graph.node for name in node.output}


def readers(graph: Graph, tensor: str) -> list[onnx.NodeProto]:
    return [node for node in graph.model.graph.node if tensor in node.input]


def product(graph: Graph, linear: str) -> onnx.NodeProto:
    """The only node that reads a layer's weight."""
    (found,) = readers(graph, f"{linear}.weight")
    return found


def origin(graph: Graph, tensor: str) -> onnx.NodeProto:
    """The node that computes the values of a tensor, which others may only move."""
    node = makers(graph)[tensor]
    return origin(graph, node.input[0]) if node.op_type in MOVES else node


def test_a_graph_carries_the_roles_of_its_spec(graph: Graph) -> None:
    assert graph.roles == roles_of(graph.spec) == roles_of(graph.spec, "motion")
    assert json.loads(json.dumps(asdict(graph.roles)))["blocks"] == list(graph.roles.blocks)


def test_blocks_follow_one_another_behind_the_tokens(graph: Graph) -> None:
    order = {name: index for index, node in enumerate(graph.model.graph.node) for name in node.output}
    places = [order[name] for name in (graph.roles.tokens, *graph.roles.blocks)]
    assert places == sorted(places)
    spec, shapes = graph.spec, tensor_shapes(graph.model)
    assert len(graph.roles.blocks) == spec.depth + (spec.query_pool.depth if spec.query_pool else 0)
    sequences = graph.batch * (spec.frames if spec.per_frame else 1)
    assert shapes[graph.roles.tokens] == (sequences, spec.tokens, spec.width)
    assert {shapes[name] for name in graph.roles.blocks} == {(sequences, spec.sequence, spec.width)}


def test_layers_that_read_pixels_are_all_there_are(graph: Graph) -> None:
    """What they multiply is a cast of the frames; no other product reads one."""
    casts = {node.output[0] for node in byte_casts(graph.model)}
    products = [node for node in graph.model.graph.node if node.op_type in ("MatMul", "Conv")]
    reading = {node.input[1] for node in products if node.input[0] in casts}
    assert {f"{name}.weight" for name in graph.roles.pixels} == reading


def test_linears_of_the_blocks_are_all_there_are(graph: Graph) -> None:
    """Every other product by a matrix stands before or behind all blocks: of tubes, pooling and classifier."""
    weights = {tensor.name for tensor in graph.model.graph.initializer if len(tensor.dims) == 2}
    order = {name: index for index, node in enumerate(graph.model.graph.node) for name in node.output}
    first, last = order[graph.roles.tokens], order[graph.roles.blocks[-1]]
    inside = [
        node.input[1].removesuffix(".weight")
        for index, node in enumerate(graph.model.graph.node)
        if node.op_type == "MatMul" and node.input[1] in weights and first < index < last
    ]
    assert list(graph.roles.linears) == inside


def test_fold_sites_are_what_they_are_called(graph: Graph) -> None:
    known = makers(graph)
    for site in graph.roles.fold_sites:
        node = product(graph, site.linear)
        assert node.op_type == "MatMul"
        if site.kind == "norm":
            assert known[site.producer].op_type == "LayerNormalization"
            assert readers(graph, site.producer) == [node]
        elif site.kind == "activation":
            plain = graph.spec.activation.startswith("gelu") and not known[site.producer].name.endswith(".mul")
            assert known[site.producer].op_type == ("Gelu" if plain else "Mul")
            assert node.input[0] == site.producer
        else:
            assert site.columns is not None
            (attention,) = (a for a in graph.roles.attention if a.projection == site.producer)
            assert origin(graph, node.input[0]) is known[attention.context]
            split, part = columns_of(graph, known[attention.context].input[1])
            assert known[split.input[0]] is known[site.producer]
            assert site.columns == part
    assert len({site.linear for site in graph.roles.fold_sites}) == len(graph.roles.fold_sites)


def test_calibration_finds_them(graph: Graph) -> None:
    """An activation keeps its name, and the linear reads the operators behind it; a stage for each block."""
    sites = [site for site in graph.roles.fold_sites if site.kind == "activation"]
    prepared = graphs.insert_equalization_sites(graph.model, graph.roles, "int8")
    onnx.checker.check_model(prepared)
    assert {*graphs.equalization_sites(prepared)} == {f"{site.producer}.centred" for site in sites}
    stages = graphs.stages(prepared, graph.roles)
    assert [stage.name for stage in stages] == ["tokenizer", *graph.roles.blocks, "classifier"]
    inside = [node.name for stage in stages[1:-1] for node in stage.nodes]
    linears = graphs.select_linears(prepared, graph.roles.linears)
    assert [name for name in inside if name in {linear.node for linear in linears}] == [each.node for each in linears]


def columns_of(graph: Graph, tensor: str) -> tuple[onnx.NodeProto, tuple[int, int]]:
    """The Split that a moved tensor comes from, and the columns of its input that it is."""
    known, shapes = makers(graph), tensor_shapes(graph.model)
    while (node := known[tensor]).op_type != "Split":
        assert node.op_type in MOVES
        tensor = node.input[0]
    widths = [shapes[name][-1] for name in node.output]
    place = list(node.output).index(tensor)
    return node, (sum(widths[:place]), sum(widths[: place + 1]))


def test_every_norm_that_one_linear_reads_is_a_fold_site(graph: Graph) -> None:
    weights = {tensor.name for tensor in graph.model.graph.initializer}
    expected = set()
    for node in graph.model.graph.node:
        read = readers(graph, node.output[0])
        products = [r.input[1] for r in read if r.op_type == "MatMul" and r.input[1] in weights]
        if node.op_type == "LayerNormalization" and len(read) == len(products) == 1:
            expected.add((node.output[0], products[0].removesuffix(".weight")))
    assert {(site.producer, site.linear) for site in graph.roles.fold_sites if site.kind == "norm"} == expected


def test_attention_is_queries_by_keys_softmax_and_values(graph: Graph) -> None:
    known, shapes = makers(graph), tensor_shapes(graph.model)
    spec, pool = graph.spec, graph.spec.query_pool
    own = [(spec.heads, 1, spec.sequence)]
    if spec.attention == "divided":  # (16, 24) in patches of 8, 2 prefix tokens
        own = [(spec.heads, 6, 3), (spec.heads, 1, 8)]
    expected = own * spec.depth + ([(pool.heads, 1, spec.sequence)] * pool.depth if pool else [])
    for attention, (heads, places, tokens) in zip(graph.roles.attention, expected, strict=True):
        assert attention.scale == (graph.spec.width / heads) ** -0.5
        assert {known[name].op_type for name in (attention.scores, attention.context)} == {"MatMul"}
        assert shapes[attention.scores][1:] == (places * heads, tokens, tokens)
        softmax = known[known[attention.context].input[0]]
        assert (softmax.op_type, softmax.input[0]) == ("Softmax", attention.scores)
        split, queries = columns_of(graph, unturned(graph, known[attention.scores].input[0]))
        assert queries == attention.queries
        assert known[split.input[0]] is known[attention.projection]
        assert product(graph, attention.projection).op_type == "MatMul"
    softmaxes = [node for node in graph.model.graph.node if node.op_type == "Softmax"]
    pooled = {"attention", "query"} & {*graph.spec.readout}
    assert len(graph.roles.attention) == len(softmaxes) - len(pooled)


def unturned(graph: Graph, tensor: str) -> str:
    """Queries before their rotation x cos + (x2 | x1) sin; without one, unchanged."""
    total = makers(graph)[tensor]
    return makers(graph)[total.input[0]].input[0] if total.op_type == "Add" else tensor


def test_the_queries_are_scaled_by_what_is_stated(graph: Graph) -> None:
    model, _ = model_of(next(name for name, spec in SPECS.items() if spec == graph.spec))
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.model.graph.initializer}
    for attention in graph.roles.attention:
        scale = np.ones(3 * graph.spec.width, np.float32)
        scale[slice(*attention.queries)] = attention.scale
        trained = model.get_parameter(f"{attention.projection}.weight").detach().numpy()
        np.testing.assert_allclose(weights[f"{attention.projection}.weight"], trained.T * scale, rtol=1e-6)


def test_compared_layers_come_in_the_order_of_the_graph(graph: Graph) -> None:
    order = {name: index for index, node in enumerate(graph.model.graph.node) for name in node.output}
    places = [order[name] for name in graph.roles.layers]
    assert places == sorted(set(places))
    assert graph.roles.layers[-1] == graph.model.graph.output[0].name
    landmarks = graph.roles.landmarks
    assert landmarks == tuple(name for name in graph.roles.layers if name in landmarks)
    assert landmarks == (graph.roles.tokens, *graph.roles.blocks, "logits")


def test_the_reference_calls_its_layers_alike(graph: Graph) -> None:
    """All but what lies between its modules; the tensors have the same shapes there, but for axes of length 1."""
    model, contract = model_of(next(name for name, spec in SPECS.items() if spec == graph.spec))
    reference = Reference(model, contract)
    inner = {name for name in graph.roles.layers if name.endswith((".softmax", ".context"))}
    shown = reference.layers(graph.roles.layers)
    assert {*shown} == {*graph.roles.layers} - inner
    shapes = tensor_shapes(graph.model)
    for name, value in reference.tap(shown)(np.zeros((1, *contract.shape), np.uint8)).items():
        assert value.squeeze().shape == tuple(size for size in shapes[name] if size > 1), name


def test_the_classifier_behind_a_norm_is_the_one_in_the_graph() -> None:
    spec = replace(SPECS["dense"], classifiers=(("motion", 5), ("other", 3)))
    assert FoldSite("norm", "classifiers.motion", "norm") in roles_of(spec).fold_sites
    assert FoldSite("norm", "classifiers.other", "norm") in roles_of(spec, "other").fold_sites
    assert trace("paper", head="other").roles == roles_of(SPECS["paper"], "other")


@pytest.mark.parametrize("name", SPECS)
def test_roles_of_a_tokenizer(name: str) -> None:
    model, contract = model_of(name)
    graph = canonical.trace(StaticTokenizer(model, contract), model.spec, contract)
    casts = {node.output[0] for node in byte_casts(graph.model)}
    assert {product(graph, name).input[0] for name in graph.roles.pixels} <= casts
    assert graph.roles.layers == graph.roles.landmarks == (graph.model.graph.output[0].name,)
    assert graph.roles.blocks == graph.roles.linears == graph.roles.fold_sites == graph.roles.attention == ()


def test_a_spec_is_enough() -> None:
    """By hand, of a model with one block whose first tube makes no token of an image."""
    image: ModelSpec = SPECS["image"]
    found: GraphRoles = roles_of(image)
    assert found.pixels == ("tubes.3",)
    assert found.landmarks == ("tubes", "blocks.0", "blocks.1", "logits")
    assert found.attention[1].queries == (0, 24)
    assert found.attention[1].scale == pytest.approx(12**-0.5)
    (values,) = (site for site in found.fold_sites if site.linear == "blocks.1.attn.proj")
    assert (values.producer, values.columns) == ("blocks.1.attn.qkv", (48, 72))


def test_layers_at_which_no_token_has_left() -> None:
    spec = named("tubevit-ti")
    roles = roles_of(replace(spec, reduction=Reduction("merge", (539, 539, 400, *[300] * 9))))
    assert roles.whole[-2:] == ("blocks.2.attn.proj", "logits")
    assert set(roles.whole) < set(roles.layers)
    assert roles.decisions[:2] == ("blocks.2.reduce.order", "blocks.2.reduce.target")
    assert len(roles.decisions) == 4
    assert roles.regrets == ("blocks.2.reduce.regret", "blocks.3.reduce.regret")
    assert roles_of(spec).whole == roles_of(spec).layers
