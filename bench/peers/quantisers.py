"""Other people's INT8 quantisers on the same graph and the same clips, each as its documentation says.

Each takes a float ONNX graph with one input `frames` (1, T, H, W, 3) uint8, calibration clips, and the file to write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime import quantization as ortq

Quantiser = Callable[[Path, Sequence[np.ndarray], Path], None]


class Reader(ortq.CalibrationDataReader):
    """Clips one by one, as ONNX Runtime's calibrators ask for them."""

    def __init__(self, clips: Sequence[np.ndarray]) -> None:
        self.clips = iter(clips)

    def get_next(self) -> dict[str, Any] | None:
        clip = next(self.clips, None)
        return None if clip is None else {"frames": clip[None]}


def ort_defaults(source: Path, clips: Sequence[np.ndarray], target: Path) -> None:
    """`quantize_static` with no option at all."""
    ortq.quantize_static(source, target, Reader(clips))


def ort_linear_only(source: Path, clips: Sequence[np.ndarray], target: Path) -> None:
    """`quantize_static` of the products with weights alone, weights per channel: the usual advice for transformers."""
    graph = onnx.load(source).graph
    constant = {tensor.name for tensor in graph.initializer}
    linears = [n.name for n in graph.node if n.op_type == "MatMul" and n.input[1] in constant]
    ortq.quantize_static(
        source, target, Reader(clips), op_types_to_quantize=["MatMul"], nodes_to_quantize=linears, per_channel=True
    )


def ort_dynamic(source: Path, clips: Sequence[np.ndarray], target: Path) -> None:
    """`quantize_dynamic` of the products with weights, per channel: activations are measured while it runs."""
    graph = onnx.load(source).graph
    constant = {tensor.name for tensor in graph.initializer}
    linears = [n.name for n in graph.node if n.op_type == "MatMul" and n.input[1] in constant]
    ortq.quantize_dynamic(source, target, op_types_to_quantize=["MatMul"], nodes_to_quantize=linears, per_channel=True)


def nncf_transformer(source: Path, clips: Sequence[np.ndarray], target: Path) -> None:
    """NNCF's post-training quantisation with `model_type=TRANSFORMER`; writes OpenVINO's `.xml` and `.bin`."""
    import nncf
    import openvino as ov

    model = ov.Core().read_model(source)
    data = nncf.Dataset(list(clips), lambda clip: {"frames": clip[None]})
    quantised = nncf.quantize(
        model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(clips), fast_bias_correction=True
    )
    ov.save_model(quantised, target)


PEERS: dict[str, tuple[Quantiser, str]] = {
    "ORT quantize_static, defaults": (ort_defaults, ".onnx"),
    "ORT quantize_static, linears": (ort_linear_only, ".onnx"),
    "ORT quantize_dynamic, linears": (ort_dynamic, ".onnx"),
    "NNCF quantize(TRANSFORMER)": (nncf_transformer, ".xml"),
}
"""Name -> quantiser and the kind of file that it writes."""


def open_onnx(path: Path) -> Callable[[np.ndarray], list[np.ndarray]]:
    """clip -> outputs, in ONNX Runtime."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda clip: [np.asarray(value) for value in session.run(None, {"frames": clip[None]})]


def open_xml(path: Path) -> Callable[[np.ndarray], list[np.ndarray]]:
    """clip -> outputs, in OpenVINO at full precision outside of the integers."""
    import openvino as ov

    compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"})
    return lambda clip: [np.asarray(value) for value in compiled({"frames": clip[None]}).values()]


def open_model(path: Path) -> Callable[[np.ndarray], list[np.ndarray]]:
    """clip -> outputs, in the runtime that the file is for."""
    return open_onnx(path) if path.suffix == ".onnx" else open_xml(path)
