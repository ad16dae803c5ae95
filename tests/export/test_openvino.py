"""Export for OpenVINO: which types its float arithmetic may run in."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from edgetube import export, metrics
from edgetube.contract import InputContract
from edgetube.export import canonical, static
from edgetube.export.canonical import Graph
from edgetube.model import checkpoints
from edgetube.model.transformer import VideoTransformer
from edgetube.runtimes.torch import Reference
from tests.export import models

pytest.importorskip("openvino", reason="needs openvino: pip install 'edgetube[openvino]'")

from edgetube.export import openvino as exporter
from edgetube.runtimes import openvino as runtime


@pytest.mark.slow
@pytest.mark.parametrize("lowering", ["gather", "conv2d"])
def test_convolutions_are_not_computed_in_bfloat16(lowering: str, tmp_path: Path) -> None:
    """On a processor with AMX, OpenVINO's convolutions in bfloat16 miss the built-in model's logits by their size."""
    checkpoint = checkpoints.load("demo")
    module = static.StaticTransformer(checkpoint.model, checkpoint.contract, lowering, batch=1)
    graph = canonical.trace(module, checkpoint.spec, checkpoint.contract, 1)
    for name in ("openvino-fp16", "openvino-int8"):
        types = exporter.inference_precision(graph.model, export.target(name))
        assert ("bf16" in types) == (lowering == "gather")
    exporter.convert(graph.model, tmp_path / "model.xml", compress=False)
    frames = np.random.default_rng(0).integers(0, 256, (1, *checkpoint.contract.shape), np.uint8)
    expected = Reference(checkpoint.model, checkpoint.contract)(frames)
    request = runtime.compile_model(tmp_path / "model.xml", types).create_infer_request()
    np.testing.assert_allclose(request.infer([frames])[0], expected, atol=0.05 * np.abs(expected).max())


@pytest.mark.parametrize("name", models.OTHERS)
def test_other_transformers_answer_like_pytorch(name: str, tmp_path: Path) -> None:
    """Computed in float32, whatever the file holds; bfloat16 is too coarse for a random model."""
    frames = models.noise(name)
    expected = models.reference(name, frames)
    for target in map(export.target, ("openvino-fp32", "openvino-fp16")):
        exporter.convert(models.trace(name).model, tmp_path / "model.xml", compress=target.name == "openvino-fp16")
        answer = runtime.compile_model(tmp_path / "model.xml", ["f32"]).create_infer_request().infer([frames])[0]
        assert target.tolerance is not None
        assert np.abs(answer - expected).max() <= target.tolerance / 4 * max(1, np.abs(expected).max())


def test_epsilons_are_no_constants_of_the_graph(tmp_path: Path) -> None:
    """Compressed to float16, 1e-12 would be 0."""
    exporter.convert(models.trace("dense").model, tmp_path / "model.xml", compress=True)
    operations = runtime.core().read_model(tmp_path / "model.xml").get_ops()
    epsilons = {op.get_attributes()["eps"] for op in operations if op.get_type_name() == "MVN"}
    assert epsilons == {float(np.float32(1e-12)), float(np.float32(1e-5))}


def trace_divided(frames: int) -> tuple[Graph, Reference]:
    """2 heads at each of 4 places: over time, as many as tokens where there are 8 frames."""
    spec = dataclasses.replace(models.SPECS["divided"], frames=frames, size=(16, 16))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VideoTransformer(spec).eval()
    contract = InputContract(frames, 16, 16)
    return canonical.trace(static.StaticTransformer(model, contract), spec, contract), Reference(model, contract)


@pytest.mark.parametrize(("frames", "sound"), [(7, True), (8, False)])
def test_attention_with_as_many_heads_as_tokens_is_not_computed_in_bfloat16(
    frames: int, sound: bool, tmp_path: Path
) -> None:
    """On a processor with AMX, OpenVINO computes that attention wrongly: its error is as large as the values are."""
    graph, reference = trace_divided(frames)
    for name in ("openvino-fp16", "openvino-int8"):
        types = exporter.inference_precision(graph.model, export.target(name))
        assert ("bf16" in types) == sound
    exporter.convert(graph.model, tmp_path / "model.xml", compress=False)
    clips = np.random.default_rng(0).integers(0, 256, (4, *reference.contract.shape), np.uint8)
    request = runtime.compile_model(tmp_path / "model.xml", types).create_infer_request()
    answers = np.concatenate([np.array(request.infer([clip[None]])[0]) for clip in clips])
    expected = np.concatenate([reference(clip[None]) for clip in clips])
    assert metrics.sqnr(expected, answers) > 25


def executed_layers(graph: Graph, path: Path) -> list[tuple[str, str]]:
    """Kind of each layer of OpenVINO's compiled graph, and the names of the nodes that were fused into it."""
    exporter.convert(graph.model, path, compress=False)
    layers = runtime.compile_model(path, ["f32"]).get_runtime_model().get_ops()
    found = [{k: str(op.get_rt_info()[k].astype(str)) for k in ("layerType", "originalLayersNames")} for op in layers]
    return [(f["layerType"], f["originalLayersNames"]) for f in found if f["layerType"] not in ("Const", "Input")]


def test_rotary_positions_and_divided_attention_leave_attention_fused(tmp_path: Path) -> None:
    """Scores, softmax and context are one layer a block; rotated in another layout they are that too, no faster."""
    kinds = ("plain", "rotary", "divided")
    found = [executed_layers(models.trace_vit(kind), tmp_path / "model.xml") for kind in kinds]
    for layers, count in zip(found, (2, 2, 4), strict=True):
        fused = [names for _, names in layers if "attn.softmax" in names]
        assert len(fused) == count
        assert all("attn.scores" in names and "attn.context" in names for names in fused)
        assert "Softmax" not in {kind for kind, _ in layers}
    plain, turned, divided = map(len, found)
    assert turned <= 1.5 * plain
    assert divided <= 2.2 * plain
