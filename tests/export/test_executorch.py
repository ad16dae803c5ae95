"""Export for ExecuTorch: the programs answer like PyTorch, and XNNPACK computes what it is said to."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from edgetube.export.tokenizer import LOWERINGS
from tests.export import models
from tests.marks import but

pytest.importorskip("executorch.exir", reason="needs executorch: pip install 'edgetube[export,executorch]'")

from edgetube import export, metrics
from edgetube.calibration import graphs
from edgetube.calibration.table import CalibrationTable, Range
from edgetube.errors import ParityError
from edgetube.export import executorch as exporter
from edgetube.export import quantize
from edgetube.export.base import BuildContext
from edgetube.export.onnxruntime import evaluate
from edgetube.roles import LOGITS
from edgetube.runtimes.executorch import Runtime
from edgetube.runtimes.torch import normalise
from tests.export.test_torchgraph import table_of


def answers(model: onnx.ModelProto, frames: np.ndarray, path: Path) -> np.ndarray:
    """Logits of the program of a graph."""
    exporter.save(exporter.lower(model), path)
    return run(path, frames)


def run(path: Path, frames: np.ndarray) -> np.ndarray:
    """Logits of a program, by ExecuTorch itself."""
    method = Runtime.get().load_program(path).load_method("forward")
    assert method is not None
    (logits,) = method.execute([torch.from_numpy(frames)])
    assert logits.dtype == torch.float32
    return logits.numpy()


def check(name: str, lowering: str, path: Path) -> None:
    frames, expected = models.noise(name), models.reference(name, models.noise(name))
    tolerance = export.target("executorch-fp32").tolerance
    assert tolerance is not None
    error = np.abs(answers(models.trace(name, lowering).model, frames, path) - expected).max()
    assert error <= tolerance / 4 * max(1, np.abs(expected).max())


@pytest.mark.slow
def test_a_program_takes_bytes_and_answers_like_pytorch(tmp_path: Path) -> None:
    """This one has GELUs by tanh, which XNNPACK's delegate computes as if they were exact."""
    check("class-token", "gather", tmp_path / "model.pte")


@pytest.mark.slow
@pytest.mark.parametrize("lowering", but(LOWERINGS, pytest.mark.long, "gather"))
@pytest.mark.parametrize("name", but(models.SPECS, pytest.mark.long, "paper", "rotary", "divided"))
def test_every_model_answers_like_pytorch(name: str, lowering: str, tmp_path: Path) -> None:
    check(name, lowering, tmp_path / "model.pte")


@pytest.mark.slow
def test_the_parts_of_a_block_are_delegated() -> None:
    """What is left are pixels and LayerNorms: no copies between the products of an attention."""
    found = exporter.delegation(exporter.lower(models.trace_vit("plain").model))
    assert found["delegated"]["BatchMatrixMultiply"] == 2 * 2
    assert found["delegated"]["FullyConnected"] == 2 * 4 + 2
    assert found["delegated"]["Softmax"] == found["delegated"]["Gelu"] == 2
    assert found["delegates"] == 6
    assert found["portable"].keys() <= {
        "aten.native_layer_norm.default",
        "aten.view_copy.default",
        "aten.index_select.default",
        "aten.mean.dim",
        "dim_order_ops._to_dim_order_copy.default",
    }


def observed(name: str) -> CalibrationTable:
    """All linears in integers, with the ranges of their inputs and outputs on the noise that the tests answer."""
    model = models.trace(name).model
    table = table_of(model, "uint8")
    given = [tensor for tensors in graphs.inner_linear_outputs(model).values() for tensor in tensors]
    wanted = sorted({*table.ranges, *given})
    part = graphs.extract_subgraph(model, wanted)
    session = ort.InferenceSession(part.SerializeToString(), providers=["CPUExecutionProvider"])
    ranges = {
        tensor: Range(min(0.0, float(values.min())), max(0.0, float(values.max())), "test")
        for tensor, values in zip(wanted, session.run(None, {"frames": models.noise(name)}), strict=True)
    }
    pixels = {tensor: found for tensor, found in table.ranges.items() if found.method == "pixels"}
    return replace(table, ranges={**ranges, **pixels})


@pytest.mark.slow
def test_linears_are_integer_kernels_and_answer_like_their_simulation(tmp_path: Path) -> None:
    """ONNX Runtime computes the Q/DQ graph in float32; the only linear in float is the one that gives the logits."""
    graph, frames, table = models.trace("class-token"), models.noise("class-token"), observed("class-token")
    target = export.target("executorch-int8")
    built = exporter.build(BuildContext(graph, target, tmp_path, table))
    linears = graphs.linears(graph.model)
    assert built.details["integers"] == {
        "asked": len(linears) - 1,
        "executed": len(linears) - 1,
        "kernels": {"FullyConnected qint8 qcint8 qint8": len(linears) - 1 + 2 * 2},  # two blocks' q, k and v
        "saturates": False,
    }
    macs = graphs.macs(graph.model)
    assert built.integer_macs == sum(macs.values()) - macs[linears[-1].name]
    assert built.notes == (f"{linears[-1].name} in float: XNNPACK would round the logits to 8 bits",)
    kept, _ = exporter.answers_in_float(graph.model, table)
    assert built.table == kept
    assert [plan.name for plan in kept.linears if plan.precision == "float"] == [linears[-1].name]
    assert {plan.activation for plan in kept.linears} - kept.ranges.keys() == {linears[-1].activation}
    simulated = models.run(quantize.qdq(graph.model, kept, outputs=True), frames)
    noise = np.abs(simulated - models.run(graph.model, frames)).max()
    assert noise > 1e-3
    assert np.abs(run(tmp_path / built.artifact, frames) - simulated).max() < 0.1 * noise


@pytest.mark.slow
def test_a_product_that_is_left_in_float_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, table = models.trace("class-token"), observed("class-token")
    monkeypatch.setattr(exporter, "INTEGERS", ("qint8", "qcint8", "quint8"))
    with pytest.raises(ParityError, match="XNNPACK computes 13 of 13 quantised products in float; nothing was written"):
        exporter.build(BuildContext(graph, export.target("executorch-int8"), tmp_path, table))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
@pytest.mark.parametrize("name", models.REDUCED)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_fewer_tokens_are_shown_to_a_proof_and_answer_like_the_model_that_follows(
    name: str, precision: str, tmp_path: Path
) -> None:
    graph, frames, target = models.trace(name), models.noise(name), export.target(f"executorch-{precision}")
    decisions, table = graph.roles.decisions, observed(name) if precision == "int8" else None
    built = exporter.build_showing(BuildContext(graph, target, tmp_path, table), decisions)
    method = Runtime.get().load_program(tmp_path / built.artifact).load_method("forward")
    assert method is not None
    logits, *decided = (np.array(value.numpy()) for value in method.execute([torch.from_numpy(frames)]))
    assert {value.dtype for value in decided} == {np.dtype(np.int32)}
    if table is None:
        assert models.following_sqnr(name, frames, logits, dict(zip(decisions, decided, strict=True))) > 100
        return
    kept, _ = exporter.answers_in_float(graph.model, table)
    simulation = quantize.qdq(graph.model, kept, outputs=True)
    simulated, *chosen = evaluate(graphs.extract_subgraph(simulation, [LOGITS, *decisions]))({"frames": frames})
    for which, one, other in zip(decisions, decided, chosen, strict=True):
        np.testing.assert_array_equal(one, other, which)
    assert metrics.sqnr(simulated, logits) > 30  # integers at the border of two; what they cost is 10 to 20 dB
    (tmp_path / "published").mkdir()
    published = exporter.build(BuildContext(graph, target, tmp_path / "published", table))
    np.testing.assert_array_equal(run(tmp_path / "published" / published.artifact, frames), logits)


@pytest.mark.slow
def test_the_usual_export_of_the_same_model_does_not_run(tmp_path: Path) -> None:
    """As `docs/executorch.md` says: neither XNNPACK nor ExecuTorch's own operators have 3-D convolutions."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    model, contract = models.model_of("class-token")
    frames = normalise(torch.from_numpy(models.noise("class-token")), contract)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (frames,))
        exporter.save(to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]), tmp_path / "model.pte")
    with pytest.raises(RuntimeError, match=r"error: 0x"):
        Runtime.get().load_program(tmp_path / "model.pte").load_method("forward")
