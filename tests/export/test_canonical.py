"""The canonical graph: what is in it, what it is called, and that ONNX Runtime answers like PyTorch."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from edgetube.errors import SpecError
from edgetube.export import canonical
from edgetube.export.canonical import Graph
from edgetube.export.static import LOWERINGS, StaticTokenizer, StaticTubeViT
from edgetube.model.tubevit import TubeViT
from edgetube.runtimes.torch import normalise
from edgetube.spec import PAPER_TUBES, PAPER_TUBES_S2D, InputContract, ModelSpec, TubeSpec

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BASE = ModelSpec(PAPER_TUBES, 32, (64, 64), width=24, depth=2, heads=2, classifiers=(("motion", 5), ("other", 3)))
SPECS = {
    "paper": BASE,
    "gates": ModelSpec(PAPER_TUBES_S2D, 32, (64, 64), 24, 2, 2, (("motion", 5),), kernel=(8, 8, 8), gates=(0, 1)),
    "mean": ModelSpec((TubeSpec((2, 8, 8), (2, 8, 8)),), 5, (20, 24), 24, 1, 2, (("motion", 5),), pool="mean"),
    "image": BASE.with_clip(frames=1),
}


@cache
def model_of(name: str) -> tuple[TubeViT, InputContract]:
    """A model none of whose biases, LayerNorms and gates is neutral."""
    torch.manual_seed(0)
    spec = SPECS[name]
    model = TubeViT(spec).eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.ndim < 2):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, InputContract(spec.frames, *spec.size, mean=MEAN, std=STD)


@cache
def trace(name: str, lowering: str = "gather", batch: int = 1, head: str | None = None) -> Graph:
    model, contract = model_of(name)
    return canonical.trace(StaticTubeViT(model, contract, lowering, head, batch), model.spec, contract, batch)


def noise(name: str, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (batch, *model_of(name)[1].shape), dtype=np.uint8)


def reference(name: str, frames: np.ndarray, head: str | None = None) -> np.ndarray:
    model, contract = model_of(name)
    with torch.no_grad():
        return model(normalise(torch.from_numpy(frames), contract), head).numpy()


def run(model: onnx.ModelProto, frames: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"frames": frames})[0]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def nodes(model: onnx.ModelProto, kind: str) -> Iterator[onnx.NodeProto]:
    return (node for node in model.graph.node if node.op_type == kind)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("name", SPECS)
def test_onnxruntime_answers_like_pytorch(name: str, lowering: str) -> None:
    frames = noise(name)
    np.testing.assert_allclose(run(trace(name, lowering).model, frames), reference(name, frames), atol=1e-4)


def test_batch_is_static_and_every_clip_gets_its_own_answer() -> None:
    frames = noise("paper", batch=2)
    model = trace("paper", batch=2).model
    np.testing.assert_allclose(run(model, frames), reference("paper", frames), atol=1e-4)
    assert abs(np.diff(run(model, frames), axis=0)).max() > 1e-3
    assert canonical.shapes(model)["frames"] == (2, 32, 64, 64, 3)


def test_any_head() -> None:
    frames = noise("paper")
    model = trace("paper", head="other").model
    np.testing.assert_allclose(run(model, frames), reference("paper", frames, "other"), atol=1e-4)
    assert "classifiers.other.weight" in constants(model)
    assert "classifiers.motion.weight" not in constants(model)


def test_tokenizer_alone() -> None:
    model, contract = model_of("paper")
    tokens = canonical.trace(StaticTokenizer(model, contract), model.spec, contract)
    assert [value.name for value in tokens.model.graph.output] == ["tokens"]
    with torch.no_grad():
        frames = noise("paper")
        expected = model.tubes(normalise(torch.from_numpy(frames), contract)) + model.positions
    np.testing.assert_allclose(run(tokens.model, frames), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("name", SPECS)
def test_static_and_of_rank_five_at_most(name: str, lowering: str) -> None:
    model = trace(name, lowering).model
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    known = canonical.shapes(inferred)
    made = {name for node in model.graph.node for name in node.output}
    assert made <= known.keys()
    assert all(len(known[name]) <= 5 and min(known[name]) > 0 for name in made)
    allowed = {"Add", "Cast", "Concat", "Conv", "Gather", "Gelu", "LayerNormalization", "MatMul", "Mul", "ReduceMean"}
    allowed |= {"Reshape", "Slice", "Softmax", "Split", "Sub", "Transpose", "Unsqueeze"}
    assert {node.op_type for node in model.graph.node} <= allowed
    assert all(len(known[node.input[1]]) == 4 for node in nodes(model, "Conv"))  # no Conv3d
    values = constants(model)
    assert all(values[node.input[1]].min() > 0 for node in nodes(model, "Reshape"))
    assert all(values[node.input[1]].dtype == np.int32 for node in nodes(model, "Gather"))


def test_attention_is_of_rank_four_and_operators_are_whole() -> None:
    model = trace("paper").model
    known = canonical.shapes(model)
    encoder = [name for node in model.graph.node if node.name.startswith("blocks") for name in node.output]
    assert max(len(known[name]) for name in encoder) == 4
    counts = canonical.statistics(model)["operators"]
    assert counts["LayerNormalization"] == 2 * 2 + 1
    assert counts["Gelu"] == 2
    assert counts["Softmax"] == 2 + 1
    assert not {"Erf", "Tanh", "Pow", "Sqrt", "Div", "Exp", "ReduceMean"} & counts.keys()


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("name", SPECS)
def test_only_voxels_that_tubes_touch_become_float(name: str, lowering: str) -> None:
    model = trace(name, lowering).model
    types = {v.name: v.type.tensor_type.elem_type for v in [*model.graph.input, *model.graph.value_info]}
    known = canonical.shapes(model)
    cast = sum(math.prod(known[n.input[0]]) for n in nodes(model, "Cast") if types[n.input[0]] == TensorProto.UINT8)
    spec = SPECS[name]
    touched = sum(
        3 * math.prod(spec.tubes[i].kernel) * spec.tubes[i].merge * math.prod(grid)
        for i, grid in zip(spec.active, spec.grids, strict=True)
    )
    assert cast == touched == canonical.statistics(model)["voxels"]


def test_names_are_those_of_the_modules() -> None:
    model = trace("paper").model
    by_name = {node.name: node for node in model.graph.node}
    assert len(by_name) == len(model.graph.node)
    values = constants(model)
    source = model_of("paper")[0]
    for block in ("blocks.0", "blocks.1"):
        for linear in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            name = f"{block}.{linear}"
            assert list(by_name[f"{name}.matmul"].input)[1] == f"{name}.weight"
            assert list(by_name[name].input) == [f"{name}.matmul", f"{name}.bias"]
            assert list(by_name[name].output) == [name]
        expected = source.get_parameter(f"{block}.mlp.fc1.weight").detach().numpy().T
        np.testing.assert_array_equal(values[f"{block}.mlp.fc1.weight"], expected)
        for norm in ("norm1", "norm2"):
            assert list(by_name[f"{block}.{norm}"].output) == [f"{block}.{norm}"]
        assert list(by_name[f"{block}.attn.scores"].input) == [f"{block}.attn.q", f"{block}.attn.k"]
        assert list(by_name[f"{block}.attn.context"].input) == [f"{block}.attn.softmax", f"{block}.attn.v"]
        assert by_name[f"{block}.mlp.act"].op_type == "Gelu"
        assert block in by_name
    for i in range(4):
        assert list(by_name[f"tubes.{i}"].input) == [f"tubes.{i}.cast", f"tubes.{i}.weight"]
        assert by_name[f"tubes.{i}.gather"].input[1] == f"tubes.{i}.gather.index"
    assert list(by_name["tubes"].output) == ["tubes"]
    assert values["tubes.bias"].shape == (SPECS["paper"].tokens, 24)
    assert list(by_name["pool.score"].input) == ["norm", "pool.score.weight"]
    assert list(by_name["classifiers.motion"].output) == ["logits"]
    assert not [name for name in [*by_name, *values] if name.startswith(("val_", "node_"))]
    assert [value.name for value in model.graph.input] == ["frames"]


def test_the_softmax_scale_is_in_the_query_weights() -> None:
    qkv = model_of("paper")[0].get_parameter("blocks.0.attn.qkv.weight").detach().numpy()
    weight = constants(trace("paper").model)["blocks.0.attn.qkv.weight"]
    np.testing.assert_allclose(weight[:, :24], qkv.T[:, :24] / math.sqrt(12), rtol=1e-6)
    np.testing.assert_array_equal(weight[:, 24:], qkv.T[:, 24:])


def test_equal_constants_keep_their_own_names() -> None:
    """A quantiser that shifts one bias must not shift another that happened to be equal."""
    spec = SPECS["paper"]
    model = TubeViT(spec).eval()  # fresh: all biases are zero
    contract = InputContract(spec.frames, *spec.size)
    values = constants(canonical.trace(StaticTubeViT(model, contract), spec, contract).model)
    assert {f"blocks.{i}.{n}.bias" for i in (0, 1) for n in ("norm1", "attn.proj", "mlp.fc2")} <= values.keys()


def test_versions_and_description_but_nothing_of_this_machine() -> None:
    traced = trace("paper")
    model = traced.model
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    assert model.ir_version == 9
    assert model.producer_name == "edgetube"
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata.keys() == {"spec", "input", "lowering"}
    assert metadata["lowering"] == traced.lowering == "gather"
    data = model.SerializeToString()
    for trail in (str(Path.cwd()), str(Path(canonical.__file__).parent), "File ", "static.py", "torch", "onnxscript"):
        assert trail.encode() not in data


def test_bytes_are_the_same_every_time() -> None:
    model, contract = model_of("paper")
    again = canonical.trace(StaticTubeViT(model, contract), model.spec, contract)
    assert again.model.SerializeToString() == trace("paper").model.SerializeToString()


@pytest.mark.slow
def test_bytes_are_the_same_in_another_process() -> None:
    code = (
        "import hashlib; from edgetube.export import canonical, static; from edgetube.model import checkpoints as c;"
        "x = c.random('tubevit-ti'); m = static.StaticTubeViT(x.model, x.contract);"
        "print(hashlib.sha256(canonical.trace(m, x.spec, x.contract).model.SerializeToString()).hexdigest())"
    )
    digests = set()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        digests.add(done.stdout.split()[-1])
    assert len(digests) == 1
    assert len(digests.pop()) == hashlib.sha256().digest_size * 2


def test_statistics_count_what_the_formulas_count() -> None:
    traced = trace("paper")
    statistics = canonical.statistics(traced.model)
    assert statistics["macs"] == SPECS["paper"].macs()
    assert statistics["max_rank"] == 5
    assert statistics["nodes"] == len(traced.model.graph.node) == sum(statistics["operators"].values())
    model = model_of("paper")[0]
    learned = sum(parameter.numel() for parameter in model.parameters())
    table = SPECS["paper"].tokens * 24  # biases and positions of the tubes
    other = sum(p.numel() for p in model.classifiers["other"].parameters())
    assert statistics["parameters"] == learned + table - other - 4 * 24 - 1  # tube biases folded, pool bias dropped


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("name", SPECS)
def test_half_precision_answers_like_pytorch(name: str, lowering: str) -> None:
    frames = noise(name)
    model = canonical.convert_to_fp16(trace(name, lowering).model)
    onnx.checker.check_model(model, full_check=True)
    answer = run(model, frames)
    assert answer.dtype == np.float32
    assert cosine(answer, reference(name, frames)) > 0.9999
    assert model.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert all(types[n.input[1]] == TensorProto.FLOAT16 for n in nodes(model, "MatMul") if n.input[1] in types)
    assert canonical.size(model) < 0.65 * canonical.size(trace(name, lowering).model)


def test_half_precision_in_an_evaluator_that_computes_in_half_precision() -> None:
    """ONNX Runtime computes half precision in float on most CPUs; numpy does not."""
    frames = noise("mean")
    (answer,) = ReferenceEvaluator(canonical.convert_to_fp16(trace("mean").model)).run(None, {"frames": frames})
    assert cosine(np.asarray(answer), reference("mean", frames)) > 0.9995


def test_half_precision_keeps_the_range_of_layernorm_and_softmax() -> None:
    """One channel of 1500, as trained ViTs have: its square is 34 times the largest float16."""
    spec = SPECS["paper"]
    model, contract = TubeViT(spec).eval(), model_of("paper")[1]
    with torch.no_grad():
        model.get_parameter("blocks.0.mlp.fc2.bias")[3] = 1500.0
        model.get_parameter("blocks.0.attn.qkv.weight").mul_(6)
    narrow = canonical.convert_to_fp16(canonical.trace(StaticTubeViT(model, contract), spec, contract).model)
    frames = noise("paper")
    with torch.no_grad():
        expected = model(normalise(torch.from_numpy(frames), contract)).numpy()
    (by_numpy,) = ReferenceEvaluator(narrow).run(None, {"frames": frames})
    for answer in (run(narrow, frames), np.asarray(by_numpy)):
        assert cosine(answer, expected) > 0.999
    types = {value.name: value.type.tensor_type.elem_type for value in narrow.graph.value_info}
    wide = [node for kind in ("LayerNormalization", "Softmax") for node in nodes(narrow, kind)]
    assert len(wide) == 5 + 3
    assert all(types[name] == TensorProto.FLOAT for node in wide for name in [node.input[0], *node.output])
    assert types["blocks.0"] == types["blocks.1.norm1"] == TensorProto.FLOAT16
    with np.errstate(over="ignore"):
        assert np.isinf(np.float16(1500) ** 2)  # what would have happened


def test_half_precision_keeps_tube_weights_out_of_the_subnormals() -> None:
    model = canonical.convert_to_fp16(trace("paper").model)
    values = constants(model)
    for i in range(4):
        weight = values[f"tubes.{i}.weight"].astype(np.float64)
        exact = constants(trace("paper").model)[f"tubes.{i}.weight"].astype(np.float64)
        assert np.median(abs(exact)) < 2**-11  # unscaled, they would lose digits
        np.testing.assert_allclose(weight / canonical.PIXEL_SCALE, exact, rtol=2**-10, atol=1e-9)


def test_half_precision_refuses_what_it_cannot_hold() -> None:
    model = onnx.ModelProto()
    model.CopyFrom(trace("paper").model)
    for tensor in model.graph.initializer:
        if tensor.name == "blocks.1.mlp.fc2.bias":
            tensor.CopyFrom(numpy_helper.from_array(np.full(24, 7e4, np.float32), tensor.name))
    with pytest.raises(SpecError, match=r"blocks\.1\.mlp\.fc2\.bias reaches 7e\+04; float16 ends at 65504"):
        canonical.convert_to_fp16(model)


@pytest.mark.parametrize(
    ("shape", "body", "message"),
    [
        ("2,3", "s = Shape(x) y = Cast<to=1>(s)", "not static: Shape left"),
        ("2,N", "y = Relu(x)", r"the shape of y \(Relu\) is \(2, -1\)"),
        ("1,1,1,1,1,2", "y = Relu(x)", r"y \(Relu\) has rank 6"),
    ],
)
def test_check_refuses(shape: str, body: str, message: str) -> None:
    output = "2" if "Shape" in body else shape
    text = f'<ir_version: 9, opset_import: ["": 20]> g (float[{shape}] x) => (float[{output}] y) {{ {body} }}'
    with pytest.raises(SpecError, match=message):
        canonical.check(parser.parse_model(text))


def test_weights_beyond_the_limit_of_protobuf_go_beside_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trace("paper").model
    monkeypatch.setattr(canonical, "PROTOBUF_LIMIT", 1000)
    canonical.check(model)
    canonical.save(model, tmp_path / "model.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    frames = noise("paper")
    np.testing.assert_array_equal(session.run(None, {"frames": frames})[0], run(model, frames))
