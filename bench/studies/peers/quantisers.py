"""Other tools' INT8 quantisers on the same graph and clips, each used as its documentation says.

Each takes a float ONNX graph with one input `frames` (1, T, H, W, 3) uint8, calibration clips, and the file to write.
"""

from __future__ import annotations

import subprocess
import tempfile
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


def constant_products(source: Path) -> list[str]:
    """Names of the MatMuls by a constant."""
    graph = onnx.load(source).graph
    constant = {tensor.name for tensor in graph.initializer}
    return [n.name for n in graph.node if n.op_type == "MatMul" and n.input[1] in constant]


def ort_defaults(source: Path, clips: Sequence[np.ndarray], target: Path) -> None:
    """`quantize_static` with no option at all."""
    ortq.quantize_static(source, target, Reader(clips))


def ort_linear_only(source: Path, clips: Sequence[np.ndarray], target: Path) -> None:
    """`quantize_static` of the products with weights alone, weights per channel: the usual advice for transformers."""
    _linears(source, clips, target)


def _linears(source: Path, clips: Sequence[np.ndarray], target: Path, **options: Any) -> None:
    ortq.quantize_static(
        source,
        target,
        Reader(clips),
        op_types_to_quantize=["MatMul"],
        nodes_to_quantize=constant_products(source),
        per_channel=True,
        **options,
    )


def ort_linear_only_uint8(source: Path, clips: Sequence[np.ndarray], target: Path) -> None:
    """The same with uint8 activations and a zero point: what ONNX Runtime's documentation advises on x86."""
    _linears(source, clips, target, activation_type=ortq.QuantType.QUInt8)


def ort_dynamic(source: Path, clips: Sequence[np.ndarray], target: Path) -> None:
    """`quantize_dynamic` of the products with weights, per channel: activations are measured while it runs."""
    linears = constant_products(source)
    ortq.quantize_dynamic(source, target, op_types_to_quantize=["MatMul"], nodes_to_quantize=linears, per_channel=True)


def nncf_transformer(source: Path, clips: Sequence[np.ndarray], target: Path) -> None:
    """NNCF's post-training quantisation with `model_type=TRANSFORMER`; writes OpenVINO's `.xml` and `.bin`."""
    import nncf

    from edgetube.runtimes.openvino import ov

    model = ov.Core().read_model(source)
    data = nncf.Dataset(list(clips), lambda clip: {"frames": clip[None]})
    quantised = nncf.quantize(
        model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(clips), fast_bias_correction=True
    )
    ov.save_model(quantised, target)


def modelopt(python: Path, source: Path, clips: Sequence[np.ndarray], target: Path) -> None:
    """NVIDIA's Model Optimizer at its defaults (entropy), float32 outside of the integers.

    Args:
        python: of an environment with `nvidia-modelopt[onnx]`, which wants older packages than edgetube is tested with.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "clips.npy"
        np.save(data, np.stack(clips))
        command = [python, "-m", "modelopt.onnx.quantization", "--onnx_path", source, "--quantize_mode", "int8"]
        command += ["--calibration_data_path", data, "--calibration_eps", "cpu", "--high_precision_dtype", "fp32"]
        subprocess.run([*command, "--output_path", target], check=True, capture_output=True)


PEERS: dict[str, tuple[Quantiser, str]] = {
    "ORT quantize_static, defaults": (ort_defaults, ".onnx"),
    "ORT quantize_static, linears": (ort_linear_only, ".onnx"),
    "ORT quantize_static, linears, uint8": (ort_linear_only_uint8, ".onnx"),
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


def open_xml(path: Path, precision: str = "f32") -> Callable[[np.ndarray], list[np.ndarray]]:
    """clip -> outputs, in OpenVINO; arithmetic outside of the integers in `precision`, or in OpenVINO's "default"."""
    from edgetube.runtimes.openvino import ov

    hints = {"PERFORMANCE_HINT": "LATENCY"} | (
        {} if precision == "default" else {"INFERENCE_PRECISION_HINT": precision}
    )
    request = ov.Core().compile_model(path, "CPU", hints).create_infer_request()
    return lambda clip: [np.array(value) for value in request.infer([clip[None]], share_inputs=True).values()]


def open_model(path: Path, precision: str = "f32") -> Callable[[np.ndarray], list[np.ndarray]]:
    """clip -> outputs, in the runtime that the file is for; `precision` is of OpenVINO's floats."""
    return open_onnx(path) if path.suffix == ".onnx" else open_xml(path, precision)


def size(path: Path) -> int:
    """Bytes of a file and of the weights beside it."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.stem}.*") if file.stem == path.stem)
