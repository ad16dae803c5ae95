"""`gpu_witness.py`: the graph in PyTorch answers like the same graph in ONNX Runtime, and multiplies integers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from edgetube import runtimes
from edgetube.bench.studies import gpu_witness
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
