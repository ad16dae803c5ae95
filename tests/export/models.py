"""Small models, their canonical graphs, and their logits in PyTorch and ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import get_args

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import numpy_helper

from edgetube import metrics
from edgetube.calibration import graphs
from edgetube.contract import InputContract
from edgetube.export import canonical
from edgetube.export.canonical import Graph
from edgetube.export.onnxruntime import evaluate
from edgetube.export.static import StaticTransformer
from edgetube.model.transformer import VideoTransformer
from edgetube.reduction import Kind, Reduction
from edgetube.runtimes.torch import Reference, normalise
from edgetube.spec import PAPER_TUBES, PAPER_TUBES_S2D, ModelSpec, QueryPool, Rotary, TubeSpec

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BASE = ModelSpec(PAPER_TUBES, 32, (64, 64), width=24, depth=2, heads=2, classifiers=(("motion", 5), ("other", 3)))
SPECS = {
    "paper": BASE,
    "gates": ModelSpec(PAPER_TUBES_S2D, 32, (64, 64), 24, 2, 2, (("motion", 5),), kernel=(8, 8, 8), gates=(0, 1)),
    "mean": ModelSpec((TubeSpec((2, 8, 8), (2, 8, 8)),), 5, (20, 24), 24, 1, 2, (("motion", 5),), readout=("mean",)),
    "image": BASE.with_clip(frames=1),
    "dense": ModelSpec(
        (TubeSpec((2, 8, 8), (2, 8, 8)),),
        4,
        (16, 24),
        24,
        2,
        2,
        (("motion", 5),),
        readout=("mean",),
        final_norm="readout",
        final_norm_eps=1e-5,
        positions="stored",
        norm_eps=1e-12,
    ),
    "class-token": ModelSpec(
        (TubeSpec((1, 8, 8), (1, 8, 8)),),
        1,
        (24, 16),
        24,
        2,
        2,
        (("motion", 5),),
        hidden=40,
        prefix=3,
        readout=("prefix.0", "mean"),
        positions="stored",
        activation="gelu-tanh",
        embedding_norm=True,
    ),
    "rotary": ModelSpec(
        (TubeSpec((2, 8, 8), (2, 8, 8)),),
        4,
        (16, 24),
        48,
        2,
        3,
        (("motion", 5),),
        prefix=1,
        readout=("query",),
        query_pool=QueryPool(heads=4, hidden=32, depth=1, norm=True, projection=False),
        positions="rotary",
        rotary=Rotary(("time", "height", "width"), frequencies="channels"),
        activation="quick-gelu",
    ),
    "gated-mlp": ModelSpec(
        (TubeSpec((1, 8, 8), (1, 8, 8)),),
        3,
        (16, 24),
        24,
        2,
        2,
        (("motion", 5),),
        hidden=20,
        prefix=1,
        readout=("prefix.0",),
        positions="rotary",
        rotary=Rotary(("height", "width"), base=100.0, coordinates="centred"),
        activation="silu",
        gated_mlp=True,
        final_norm="none",
        per_frame=True,
    ),
    "cosine": ModelSpec(
        (TubeSpec((1, 8, 8), (1, 8, 8)),),
        1,
        (24, 16),
        24,
        2,
        2,
        (("motion", 5),),
        prefix=1,
        readout=("prefix.0",),
        projection=64,
        final_norm="readout",
        positions="stored",
    ),
    "divided": ModelSpec(
        (TubeSpec((1, 8, 8), (1, 8, 8)),),
        3,
        (16, 24),
        24,
        2,
        2,
        (("motion", 5),),
        hidden=40,
        prefix=2,
        readout=("prefix.0",),
        positions="stored",
        position_resize="nearest",
        attention="divided",
    ),
}


REDUCED: dict[str, ModelSpec] = {
    kind: replace(SPECS["rotary"], reduction=Reduction(kind, (9, 6))) for kind in get_args(Kind)
}
"""Of 12 tokens, 3 leave in each block."""

OTHERS = ("dense", "class-token", "rotary", "gated-mlp", "divided", "cosine")
"""Those that are no sparse-tube models."""


@cache
def model_of(name: str) -> tuple[VideoTransformer, InputContract]:
    """A model none of whose biases, LayerNorms and gates is neutral."""
    torch.manual_seed(0)
    spec = (SPECS | REDUCED)[name]
    model = VideoTransformer(spec).eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.ndim < 2 or p is model.prefix):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, InputContract(spec.frames, *spec.size, mean=MEAN, std=STD)


@cache
def trace(name: str, lowering: str = "gather", batch: int = 1, head: str | None = None) -> Graph:
    model, contract = model_of(name)
    return canonical.trace(StaticTransformer(model, contract, lowering, head, batch), model.spec, contract, batch)


@cache
def trace_vit(kind: str) -> Graph:
    """One ViT, "plain", with "rotary" positions or with "divided" attention: 2 blocks, heads of 32 channels.

    Runtimes fuse its attention.
    """
    spec = ModelSpec((TubeSpec((2, 8, 8), (2, 8, 8)),), 8, (32, 32), 64, 2, 2, (("motion", 5),), readout=("mean",))
    if kind == "rotary":
        spec = replace(spec, positions="rotary", rotary=Rotary(("time", "height", "width")))
    if kind == "divided":
        spec = replace(spec, attention="divided", prefix=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VideoTransformer(spec).eval()
    contract = InputContract(spec.frames, *spec.size)
    return canonical.trace(StaticTransformer(model, contract), spec, contract)


def noise(name: str, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (batch, *model_of(name)[1].shape), dtype=np.uint8)


def reference(name: str, frames: np.ndarray, head: str | None = None) -> np.ndarray:
    model, contract = model_of(name)
    with torch.no_grad():
        return model(normalise(torch.from_numpy(frames), contract), head).numpy()


def run(model: onnx.ModelProto, frames: np.ndarray) -> np.ndarray:
    """Q/DQ graphs in float32, not fused to integer kernels: those overflow on x86 without VNNI."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"frames": frames})[0]


def following_sqnr(name: str, frames: np.ndarray, logits: np.ndarray, decided: Mapping[str, np.ndarray]) -> float:
    """SQNR of the logits for one clip against the model that lets the same tokens leave, dB."""
    found = Reference(*model_of(name))
    with found.following({each: np.asarray(value, np.float32) for each, value in decided.items()}):
        return metrics.sqnr(found(frames), logits)


def simulated_sqnr(name: str, frames: np.ndarray, model: onnx.ModelProto) -> float:
    """The same of a graph of it, Q/DQ or float, in ONNX Runtime."""
    decisions = trace(name).roles.decisions
    logits, *decided = evaluate(graphs.extract_subgraph(model, ["logits", *decisions]))({"frames": frames})
    return following_sqnr(name, frames, logits, dict(zip(decisions, decided, strict=True)))


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def nodes(model: onnx.ModelProto, kind: str) -> Iterator[onnx.NodeProto]:
    return (node for node in model.graph.node if node.op_type == kind)
