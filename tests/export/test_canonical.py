"""The canonical graph: what is in it, what it is called, and that ONNX Runtime answers like PyTorch."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import parser

from edgetube.calibration import storage
from edgetube.contract import InputContract
from edgetube.errors import SpecError
from edgetube.export import canonical
from edgetube.export.static import StaticTransformer
from edgetube.export.statistics import graph_statistics, tensor_shapes
from edgetube.export.tokenizer import LOWERINGS, StaticTokenizer
from edgetube.model.transformer import VideoTransformer
from edgetube.runtimes.torch import normalise
from tests.export.models import SPECS, constants, model_of, nodes, noise, reference, run, trace
from tests.marks import but


@pytest.mark.parametrize("lowering", but(LOWERINGS, pytest.mark.slow, "gather"))
@pytest.mark.parametrize("name", SPECS)
def test_onnxruntime_answers_like_pytorch(name: str, lowering: str) -> None:
    frames = noise(name)
    np.testing.assert_allclose(run(trace(name, lowering).model, frames), reference(name, frames), atol=1e-4)


def test_batch_is_static_and_every_clip_gets_its_own_answer() -> None:
    frames = noise("paper", batch=2)
    model = trace("paper", batch=2).model
    np.testing.assert_allclose(run(model, frames), reference("paper", frames), atol=1e-4)
    assert abs(np.diff(run(model, frames), axis=0)).max() > 1e-3
    assert tensor_shapes(model)["frames"] == (2, 32, 64, 64, 3)


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


@pytest.mark.parametrize("lowering", but(LOWERINGS, pytest.mark.slow, "gather"))
@pytest.mark.parametrize("name", SPECS)
def test_static_and_of_rank_five_at_most(name: str, lowering: str) -> None:
    model = trace(name, lowering).model
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    known = tensor_shapes(inferred)
    made = {name for node in model.graph.node for name in node.output}
    assert made <= known.keys()
    assert all(len(known[name]) <= 5 and min(known[name]) > 0 for name in made)
    allowed = {"Add", "Cast", "Concat", "Conv", "Gather", "Gelu", "LayerNormalization", "MatMul", "Mul", "ReduceMean"}
    allowed |= {"Reshape", "Sigmoid", "Slice", "Softmax", "Split", "Sub", "Transpose", "Unsqueeze"}
    assert {node.op_type for node in model.graph.node} <= allowed
    assert all(len(known[node.input[1]]) == 4 for node in nodes(model, "Conv"))  # no Conv3d
    values = constants(model)
    assert all(values[node.input[1]].min() > 0 for node in nodes(model, "Reshape"))
    assert all(values[node.input[1]].dtype == np.int32 for node in nodes(model, "Gather"))


def test_attention_is_of_rank_four_and_operators_are_whole() -> None:
    model = trace("paper").model
    known = tensor_shapes(model)
    encoder = [name for node in model.graph.node if node.name.startswith("blocks") for name in node.output]
    assert max(len(known[name]) for name in encoder) == 4
    counts = graph_statistics(model)["operators"]
    assert counts["LayerNormalization"] == 2 * 2 + 1
    assert counts["Gelu"] == 2
    assert counts["Softmax"] == 2 + 1
    assert not {"Erf", "Tanh", "Pow", "Sqrt", "Div", "Exp", "ReduceMean"} & counts.keys()


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
    model = VideoTransformer(spec).eval()  # fresh: all biases are zero
    contract = InputContract(spec.frames, *spec.size)
    values = constants(canonical.trace(StaticTransformer(model, contract), spec, contract).model)
    assert {f"blocks.{i}.{n}.bias" for i in (0, 1) for n in ("norm1", "attn.proj", "mlp.fc2")} <= values.keys()


def test_tables_of_rotary_positions_are_stored_once() -> None:
    """For queries (N, C) and for keys (C, N), whatever the number of blocks."""
    for name in ("rotary", "gated-mlp"):
        model, spec = trace(name).model, SPECS[name]
        tables = [each for each in constants(model) if ".turn_" in each]
        assert tables == [f"blocks.0.attn.turn_{side}.{table}" for side in "qk" for table in ("cos", "sin")]
        readers = [node for node in nodes(model, "Mul") if set(tables) & set(node.input)]
        assert len(readers) == 4 * spec.depth


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
    again = canonical.trace(StaticTransformer(model, contract), model.spec, contract)
    assert again.model.SerializeToString() == trace("paper").model.SerializeToString()


@pytest.mark.slow
def test_bytes_are_the_same_in_another_process() -> None:
    code = (
        "import hashlib; from edgetube.export import canonical, static; from edgetube.model import checkpoints as c;"
        "x = c.random('tubevit-ti'); m = static.StaticTransformer(x.model, x.contract);"
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
    monkeypatch.setattr(canonical, "MAX_ONE_FILE", 1000)
    canonical.check(model)
    canonical.save(model, tmp_path / "model.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    frames = noise("paper")
    np.testing.assert_array_equal(session.run(None, {"frames": frames})[0], run(model, frames))


@pytest.mark.parametrize("name", ["paper", "rotary"])
def test_a_large_graph_keeps_its_weights_in_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, contract = model_of(name)
    monkeypatch.setattr(storage, "LIMIT", 1000)
    monkeypatch.setattr(storage, "SMALL", 1000)
    found = canonical.trace(StaticTransformer(model, contract), model.spec, contract, folder=tmp_path).model
    assert storage.folder_of(found) == tmp_path
    assert storage.total(found) == storage.total(trace(name).model)
    assert found.ByteSize() < storage.total(found)
    storage.write(found, tmp_path / "files.onnx")
    storage.write(trace(name).model, tmp_path / "memory.onnx")
    assert (tmp_path / "files.onnx").read_bytes() == (tmp_path / "memory.onnx").read_bytes()
