"""Export for Core AI: every operator, lowering, precision and layout, executed by Apple's runtime on the CPU."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgetube import export
from edgetube.calibration import graphs
from edgetube.errors import SpecError
from edgetube.export import quantize
from edgetube.export.base import BuildContext
from edgetube.export.float16 import convert_to_fp16
from edgetube.export.tokenizer import LOWERINGS
from tests.export.models import REDUCED, SPECS, following_sqnr, noise, reference, run, trace
from tests.export.test_torchgraph import table_of

pytest.importorskip("coreai", reason="needs Core AI: pip install 'edgetube[coreai]'", exc_type=ImportError)
pytest.importorskip("coreai_torch", reason="needs Core AI: pip install 'edgetube[coreai]'", exc_type=ImportError)

from coreai.authoring import AIModelAsset
from coreai.runtime import NDArray

from edgetube.export import coreai as exporter


def answer(path: Path, frames: np.ndarray) -> np.ndarray:
    """The asset's first output; the asset is called without anything of edgetube."""

    async def call() -> np.ndarray:
        async with AIModelAsset.load(path).executable() as model:
            (name,) = model.function_names
            (output,) = (await model.load_function(name)({"frames": NDArray(frames)})).values()
            return np.array(output.numpy())

    return asyncio.run(call())


def error(model: onnx.ModelProto, frames: np.ndarray, expected: np.ndarray, path: Path, columns: bool = False) -> float:
    """Largest error of a logit, as `Target.tolerance` counts it."""
    exporter.convert(model, path, columns)
    return float(np.abs(answer(path, frames) - expected).max() / max(1, np.abs(expected).max()))


QUICK = {("paper", "conv2d"), ("dense", "gather")}
CASES = [
    pytest.param(name, lowering, marks=() if (name, lowering) in QUICK else pytest.mark.slow)
    for name in SPECS
    for lowering in LOWERINGS
]


@pytest.mark.parametrize(("name", "lowering"), CASES)
def test_assets_answer_like_pytorch(name: str, lowering: str, tmp_path: Path) -> None:
    frames, graph = noise(name), trace(name, lowering).model
    assert error(graph, frames, reference(name, frames), tmp_path / "a.aimodel") < 1e-5


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "dense")) for n in SPECS])
def test_float16(name: str, tmp_path: Path) -> None:
    """The runtime on the CPU adds up matrix products in float16, so a part of the tolerance is its own."""
    traced = trace(name, "conv2d")
    frames, graph = noise(name), convert_to_fp16(traced.model, exporter.answer_operators(traced))
    tolerance = export.target("coreai-fp16").tolerance
    assert tolerance is not None
    assert error(graph, frames, reference(name, frames), tmp_path / "a.aimodel") < tolerance / 2


@pytest.mark.parametrize(
    ("name", "lowering"),
    [("dense", "gather"), pytest.param("paper", "conv2d", marks=pytest.mark.slow)],
)
def test_integers_are_those_of_the_table(name: str, lowering: str, tmp_path: Path) -> None:
    """With a float32 rest, the asset's error is that of float32, far below the noise of the integers."""
    frames, source = noise(name), trace(name, lowering).model
    model = quantize.qdq(source, table_of(source, "int8"))
    expected = run(model, frames)
    assert np.abs(expected - run(source, frames)).max() > 1e-3
    assert error(model, frames, expected, tmp_path / "a.aimodel") < 1e-5
    exporter.convert(convert_to_fp16(model), tmp_path / "b.aimodel")
    summary = AIModelAsset.load(tmp_path / "b.aimodel").summary()
    assert summary is not None
    found, stored = dict(summary.operation_distribution), dict(summary.storage_types)
    weights, quantised = graphs.initializers(source), table_of(source, "int8").quantised
    count = len(quantised)
    assert [found[kind] for kind in ("quantize", "dequantize", exporter.WEIGHTS)] == [count] * 3
    assert stored["Int8"] >= sum(weights[plan.weight].size for plan in quantised)
    assert stored.get("Float32", 0) < 1000


@pytest.mark.parametrize("name", ["dense", pytest.param("rotary", marks=pytest.mark.slow)])
def test_linears_of_columns_are_convolutions_with_the_same_answers(name: str, tmp_path: Path) -> None:
    frames, graph = noise(name), trace(name, "gather").model
    assert error(graph, frames, reference(name, frames), tmp_path / "a.aimodel", columns=True) < 1e-5
    rows, columns = (exporter.convert(graph, tmp_path / "b.aimodel", columns=columns) for columns in (False, True))
    weights = [node for node in graph.graph.node if node.op_type == "MatMul" and ".attn." not in node.name]
    gone = rows["batch_matmul"] - columns.get("batch_matmul", 0)
    assert gone >= len([node for node in weights if node.input[1].endswith(".weight")]) > 0
    assert any("conv" in kind for kind in columns)
    assert not any("conv" in kind for kind in rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", REDUCED)
def test_fewer_tokens_are_shown_to_a_proof_and_answer_like_the_model_that_follows(name: str, tmp_path: Path) -> None:
    graph, frames, decisions = trace(name), noise(name), trace(name).roles.decisions
    shown = exporter.build_showing(BuildContext(graph, export.target("coreai-fp32"), tmp_path), decisions)

    async def call() -> dict[str, np.ndarray]:
        async with AIModelAsset.load(tmp_path / shown.artifact).executable() as model:
            found = await model.load_function(*model.function_names)({"frames": NDArray(frames)})
            return {key: np.array(value.numpy()) for key, value in found.items()}

    values = asyncio.run(call())
    assert {values[each].dtype for each in decisions} == {np.dtype(np.int32)}
    assert following_sqnr(name, frames, values["logits"], {each: values[each] for each in decisions}) > 100
    exporter.convert(graph.model, tmp_path / "published.aimodel")
    np.testing.assert_array_equal(answer(tmp_path / "published.aimodel", frames), values["logits"])


def test_an_operator_that_the_converter_refuses_is_named_with_its_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coreai_torch import _aten_to_core, _validate

    for module in (_aten_to_core, _validate):
        resolver = dict(module._aten_to_core_resolver)
        resolver.pop("gelu.default")
        monkeypatch.setattr(module, "_aten_to_core_resolver", resolver)
    with pytest.raises(SpecError, match=r"^blocks\.0\.mlp\.act \(aten\.gelu\.default\): Core AI's converter [^\n]+$"):
        exporter.convert(trace("paper", "conv2d").model, tmp_path / "a.aimodel")
    assert not (tmp_path / "a.aimodel").exists()


def test_an_asset_says_what_it_takes_and_nothing_of_the_machine(tmp_path: Path) -> None:
    graph = trace("paper", "conv2d")
    exporter.convert(graph.model, tmp_path / "a.aimodel", stated=exporter.metadata(graph))
    record = AIModelAsset.load(tmp_path / "a.aimodel").metadata
    assert record.model_description.startswith("Video transformer: ")
    assert '"frames": 32' in record.creator_defined_metadata["edgetube.input"]
    everything = b"".join(path.read_bytes() for path in (tmp_path / "a.aimodel").iterdir())
    assert str(Path(exporter.__file__).parent).encode() not in everything
    assert b"torchgraph.py" not in everything
