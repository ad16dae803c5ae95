"""Export for OpenVINO: which types its float arithmetic may run in."""

from pathlib import Path

import numpy as np
import pytest

from edgetube import export
from edgetube.export import canonical, static
from edgetube.model import checkpoints
from edgetube.runtimes.torch import Reference

pytest.importorskip("openvino", reason="needs openvino: pip install 'edgetube[openvino]'")

from edgetube.export import openvino as exporter
from edgetube.runtimes import openvino as runtime


@pytest.mark.slow
@pytest.mark.parametrize("lowering", ["gather", "conv2d"])
def test_convolutions_are_not_computed_in_bfloat16(lowering: str, tmp_path: Path) -> None:
    """On a processor with AMX, OpenVINO's convolutions in bfloat16 miss the built-in model's logits by their size."""
    checkpoint = checkpoints.load("demo")
    module = static.StaticTubeViT(checkpoint.model, checkpoint.contract, lowering, batch=1)
    graph = canonical.trace(module, checkpoint.spec, checkpoint.contract, 1)
    for name in ("openvino-fp16", "openvino-int8"):
        types = exporter.inference_precision(graph.model, export.target(name))
        assert ("bf16" in types) == (lowering == "gather")
    exporter.convert(graph.model, tmp_path / "model.xml", compress=False)
    frames = np.random.default_rng(0).integers(0, 256, (1, *checkpoint.contract.shape), np.uint8)
    expected = Reference(checkpoint.model, checkpoint.contract)(frames)
    request = runtime.compile_model(tmp_path / "model.xml", types).create_infer_request()
    np.testing.assert_allclose(request.infer([frames])[0], expected, atol=0.05 * np.abs(expected).max())
