"""Export for ExecuTorch: the programs answer like PyTorch, and XNNPACK computes what it is said to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from edgetube.export.tokenizer import LOWERINGS
from tests.export import models

pytest.importorskip("executorch.exir", reason="needs executorch: pip install 'edgetube[export,executorch]'")

from edgetube import export
from edgetube.export import executorch as exporter
from edgetube.runtimes.executorch import Runtime


def answers(model: onnx.ModelProto, frames: np.ndarray, path: Path) -> np.ndarray:
    """Logits of the program of a graph, by ExecuTorch itself."""
    exporter.save(exporter.lower(model), path)
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


def test_a_program_takes_bytes_and_answers_like_pytorch(tmp_path: Path) -> None:
    """This one has GELUs by tanh, which XNNPACK's delegate computes as if they were exact."""
    check("class-token", "gather", tmp_path / "model.pte")


@pytest.mark.slow
@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("name", models.SPECS)
def test_every_model_answers_like_pytorch(name: str, lowering: str, tmp_path: Path) -> None:
    check(name, lowering, tmp_path / "model.pte")


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
