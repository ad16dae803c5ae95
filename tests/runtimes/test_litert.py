"""What is LiteRT's own; what every backend promises is in `test_conformance.py`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from edgetube import runtimes
from edgetube.bundle import Bundle
from edgetube.errors import BackendError, InputError
from edgetube.export import pipeline
from edgetube.model import checkpoints
from edgetube.precision import Precision
from edgetube.runtimes.torch import Reference

pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert: pip install 'edgetube[litert]'")

from ai_edge_litert import schema_py_generated as schema

from edgetube.runtimes import litert
from edgetube.runtimes.litert import flatbuffer


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Bundles of the float targets by precision."""
    options, out = pipeline.Options(lowering="gather"), tmp_path_factory.mktemp("out")
    made = pipeline.export_models(["litert-fp32", "litert-fp16"], tiny_checkpoint, out, options)
    return {bundle.precision: bundle for bundle in made}


def test_half_precision_halves_the_file(exported: dict[str, Bundle]) -> None:
    sizes = {precision: bundle.artifact_path.stat().st_size for precision, bundle in exported.items()}
    assert 0.45 < sizes["fp16"] / sizes["fp32"] < 0.7


def test_it_says_what_runs_it(exported: dict[str, Bundle]) -> None:
    with runtimes.open_bundle(exported["fp32"], threads=1, device="CPU") as backend:
        said = backend.describe()
    assert said["delegate"] == "XNNPACK"
    assert said["threads"] == 1


def test_inner_tensors_are_those_that_the_delegate_computes(
    exported: dict[str, Bundle], tiny_checkpoint: Path, rng: np.random.Generator
) -> None:
    checkpoint = checkpoints.load(tiny_checkpoint)
    reference = Reference(checkpoint.model, checkpoint.contract)
    clips = rng.integers(0, 256, (1, *checkpoint.contract.shape), np.uint8)
    with runtimes.open_bundle(exported["fp32"]) as backend:
        names = backend.layers(["blocks.0", "logits", "nothing"])
        assert names == ("blocks.0", "logits")
        shown = backend.tap(names)(clips)
        np.testing.assert_array_equal(shown["logits"], backend(clips))
    expected = reference.tap(("blocks.0",))(clips)["blocks.0"]
    np.testing.assert_allclose(shown["blocks.0"], expected, atol=1e-4 * np.abs(expected).max())
    more = flatbuffer.with_outputs(exported["fp32"].artifact_path.read_bytes(), names)
    assert litert.partitions(litert.open_file(more, 1)) == 1


def test_a_device_that_is_not_there(exported: dict[str, Bundle]) -> None:
    with pytest.raises(InputError, match="no device is called 'npu' here; LiteRT runs these files on the cpu"):
        runtimes.open_bundle(exported["fp32"], device="npu")


def test_a_damaged_file_is_one_line(exported: dict[str, Bundle], tmp_path: Path) -> None:
    whole = exported["fp32"].artifact_path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no model"):
        (tmp_path / "model.tflite").write_bytes(content)
        with pytest.raises(BackendError, match=r"^LiteRT \S+: cannot open .*model\.tflite: [^\n]+$"):
            runtimes.open_bundle(replace(exported["fp32"], path=tmp_path))


@pytest.mark.parametrize(("version", "words"), [(4, "schema version 4"), (3, r"version '99'.* newer model")])
def test_a_file_of_a_newer_version_is_one_line(
    version: int, words: str, exported: dict[str, Bundle], tmp_path: Path
) -> None:
    """Of the schema, or of one operator."""
    import flatbuffers

    data = bytearray(exported["fp32"].artifact_path.read_bytes())
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    model.version, model.operatorCodes[0].version = version, 99
    builder = flatbuffers.Builder(len(data))
    builder.Finish(model.Pack(builder), flatbuffer.IDENTIFIER)
    (tmp_path / "model.tflite").write_bytes(builder.Output())
    with pytest.raises(BackendError, match=rf"^LiteRT \S+: cannot open [^\n]*{words}"):
        runtimes.open_bundle(replace(exported["fp32"], path=tmp_path))


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.W8A8])
def test_the_product_of_the_peak_is_run_by_the_delegate(precision: Precision) -> None:
    call = litert.product(precision, 32, 1)
    assert call is not None
    call()
    data = flatbuffer.matrix_product(32, precision is Precision.W8A8)
    interpreter = litert.open_file(data, 1)
    assert litert.partitions(interpreter) == 1
    one = np.ones((32, 32), np.int8 if precision is Precision.W8A8 else np.float32)
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], one)
    interpreter.invoke()
    assert (interpreter.get_tensor(interpreter.get_output_details()[0]["index"]) == 32).all()


def test_integers_are_told_from_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    assert litert.multiplies_integers()

    def floats(rows: npt.NDArray[np.float32], weight: npt.NDArray[np.float32]) -> bytes:
        writer = flatbuffer.Writer("a product of floats")
        left, right = writer.tensor("left", rows.shape, "float32"), writer.constant("right", weight)
        result = writer.tensor("result", (len(rows), len(weight)), "float32")
        writer.operator("FULLY_CONNECTED", [left, right, -1], [result], schema.FullyConnectedOptionsT())
        return writer.pack(["left"], ["result"])

    monkeypatch.setattr(flatbuffer, "hybrid_product", floats)
    assert not litert.multiplies_integers()


def test_sums_of_the_largest_products_do_not_overflow() -> None:
    """Where neighbouring products were added in 16 bits, 255 * 127 twice would be too much."""
    rows, weight = np.zeros((1, 64), np.float32), np.full((8, 64), 127, np.float32)
    for rows[:] in (255, -255):
        interpreter = litert.open_file(flatbuffer.hybrid_product(rows, weight), 1)
        (found,) = litert._run(interpreter, rows, [interpreter.get_output_details()[0]["index"]])
        np.testing.assert_allclose(found, rows @ weight.T, rtol=1e-6)


def test_there_is_no_product_in_half_precision() -> None:
    assert litert.product(Precision.FP16, 32, 1) is None
