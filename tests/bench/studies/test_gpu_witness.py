"""`gpu_witness.py`: the graph in PyTorch answers like the same graph in ONNX Runtime, and multiplies integers."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edgetube import runtimes
from edgetube.bench.studies import gpu_graph, gpu_witness
from edgetube.bundle import Bundle
from edgetube.errors import BackendError
from edgetube.export import pipeline

TARGETS = ["trt-fp32", "trt-fp16", "trt-int8"]


@pytest.fixture(scope="module", params=TARGETS)
def bundle(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    options = pipeline.Options(lowering="gather", batch=2, max_drop=100.0)
    return pipeline.export_model(request.param, tiny_checkpoint, tmp_path_factory.mktemp("witness"), options)


@pytest.mark.slow
def test_it_answers_like_onnx_runtime(bundle: Bundle, rng: np.random.Generator) -> None:
    clips = rng.integers(0, 256, (4, *bundle.contract.shape), np.uint8)
    with gpu_witness.Witness(bundle, "cpu") as witness, runtimes.open_bundle(bundle, device="emulated") as emulated:
        ours, theirs = witness(clips), emulated(clips)
    allowed = {"trt-fp32": 1e-5, "trt-fp16": 5e-3, "trt-int8": 2e-2}[bundle.target]
    np.testing.assert_allclose(ours, theirs, atol=allowed * np.abs(theirs).max())


@pytest.mark.slow
def test_every_linear_of_the_table_multiplies_integers(bundle: Bundle) -> None:
    with gpu_witness.Witness(bundle, "cpu") as witness:
        assert (witness.program.integer_products > 0) == bundle.precision.quantises_activations
        assert witness.describe()["integer_products"] == witness.program.integer_products


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch has a GPU here")
@pytest.mark.slow
def test_without_a_gpu_it_says_so(bundle: Bundle) -> None:
    with pytest.raises(BackendError, match="sees no GPU"):
        gpu_witness.Witness(bundle)


@pytest.mark.gpu
def test_on_a_gpu_it_answers_like_onnx_runtime(bundle: Bundle, rng: np.random.Generator) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a PyTorch that sees an NVIDIA GPU")
    clips = rng.integers(0, 256, (4, *bundle.contract.shape), np.uint8)
    with gpu_witness.Witness(bundle) as witness, runtimes.open_bundle(bundle, device="emulated") as emulated:
        ours, theirs = witness(clips), emulated(clips)
    allowed = {"trt-fp32": 1e-4, "trt-fp16": 5e-3, "trt-int8": 2e-2}[bundle.target]
    np.testing.assert_allclose(ours, theirs, atol=allowed * np.abs(theirs).max())


@pytest.mark.parametrize(("rows", "k", "n"), [(1, 8, 8), (33, 64, 24), (40, 13, 5), (7, 96, 1)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_integer_products_are_exact(
    tmp_path: Path, rng: np.random.Generator, rows: int, k: int, n: int, device: str
) -> None:
    """Q/DQ around one MatMul, with scales that are powers of two: float32 holds every sum, so all bits must agree."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a PyTorch that sees an NVIDIA GPU")
    weight = rng.integers(-127, 128, (k, n)).astype(np.int8)
    scales = (2.0 ** rng.integers(-9, -3, n)).astype(np.float32)
    x = rng.integers(-160, 160, (1, rows, k)).astype(np.float32) / 4  # some are beyond the range of int8
    program = gpu_witness.Program(_one_product(tmp_path, weight, scales), torch.device(device))
    assert program.integer_products == 1
    found = program(torch.from_numpy(x).to(device)).cpu().numpy()
    quantised = np.clip(np.rint(x * 8), -128, 127).astype(np.int64)
    np.testing.assert_array_equal(found, (quantised @ weight.astype(np.int64)) * (scales / 8))


def _one_product(folder: Path, weight: npt.NDArray[np.int8], scales: npt.NDArray[np.float32]) -> gpu_graph.Graph:
    constants = {
        "w": weight,
        "w_scale": scales,
        "w_zero": np.zeros(len(scales), np.int8),
        "x_scale": np.float32(0.125),
        "x_zero": np.int8(0),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "x_scale", "x_zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["v"], axis=1),
        helper.make_node("MatMul", ["d", "v"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    tensors = [numpy_helper.from_array(np.asarray(values), name) for name, values in constants.items()]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [x], [y], tensors)), folder / "model.onnx")
    return gpu_graph.read(folder / "model.onnx")
