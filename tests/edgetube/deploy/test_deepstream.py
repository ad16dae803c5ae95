"""The configuration of DeepStream. Nothing of DeepStream runs here: values are held against edgetube's own, and keys
against those that NVIDIA documents for nvinfer and nvdspreprocess, and reads in its library for sequences."""

from __future__ import annotations

import configparser
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetube import bundle as bundles
from edgetube import demo, preprocess
from edgetube.bundle import Bundle
from edgetube.contract import InputContract
from edgetube.deploy import deepstream
from edgetube.deploy.deepstream import Source
from edgetube.errors import BundleError, InputError
from edgetube.export import pipeline
from edgetube.model import checkpoints
from edgetube.runtime import Runtime
from edgetube.runtimes.tensorrt.build import Settings, build, parse
from edgetube.runtimes.tensorrt.sdk import load_sdk
from edgetube.targets import installed
from tests.marks import but

needs_rtx = pytest.mark.skipif(not installed("tensorrt_rtx"), reason="needs tensorrt_rtx: pip install 'edgetube[rtx]'")

Cli = Callable[..., tuple[int, str, str]]

CAMERA = Source(1080, 1920, 30.0)

PREPROCESS_KEYS = {
    "enable", "unique-id", "gpu-id", "target-unique-ids", "process-on-frame", "network-input-order",
    "network-input-shape", "processing-width", "processing-height", "network-color-format", "tensor-data-type",
    "tensor-name", "maintain-aspect-ratio", "symmetric-padding", "scaling-filter", "scaling-buf-pool-size",
    "tensor-buf-pool-size", "scaling-pool-memory-type", "scaling-pool-compute-hw", "custom-lib-path",
    "custom-tensor-preparation-function", "operate-on-gie-id",
}  # fmt: skip
"""Of the group [property] of nvdspreprocess."""

INFER_KEYS = {
    "gpu-id", "gie-unique-id", "process-mode", "network-type", "input-tensor-from-meta", "batch-size", "onnx-file",
    "model-engine-file", "network-mode", "output-blob-names", "labelfile-path", "classifier-threshold",
    "output-tensor-meta", "int8-calib-file", "interval", "net-scale-factor", "offsets",
}  # fmt: skip
"""Of the group [property] of nvinfer."""


@pytest.fixture(scope="session", params=but(["trt-fp32", "trt-fp16"], pytest.mark.slow, "trt-fp16"))
def exported(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    options = pipeline.Options(lowering="gather")
    return pipeline.export_model(request.param, tiny_checkpoint, tmp_path_factory.mktemp("trt"), options)


def read(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), comment_prefixes=("#",))
    parser.read_string(path.read_text())
    return parser


def test_the_adapted_graph_answers_like_the_bundle(exported: Bundle, tmp_path: Path) -> None:
    deepstream.folder(exported, tmp_path / "ds", CAMERA)
    model = onnx.load(tmp_path / "ds" / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    # TensorRT takes no uint8 inside of a network, only at its input.
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.value_info
    assert not [value.name for value in inferred if value.type.tensor_type.elem_type == onnx.TensorProto.UINT8]
    clips = np.random.default_rng(0).integers(0, 256, (4, *exported.contract.shape), np.uint8)
    with Runtime(exported, device="emulated") as runtime:
        logits = runtime(clips)
    session = ort.InferenceSession(model.SerializeToString())
    for clip, expected in zip(clips, logits, strict=True):
        tensor = np.ascontiguousarray(np.moveaxis(clip[None], 4, 1)).astype(np.float32)
        (found,) = session.run(["probabilities"], {"clip": tensor})
        powers = np.exp(expected - expected.max())
        np.testing.assert_allclose(found[0], powers / powers.sum(), rtol=0, atol=1e-5)


@needs_rtx
def test_a_real_parser_takes_it(exported: Bundle, tmp_path: Path) -> None:
    deepstream.folder(exported, tmp_path / "ds", CAMERA)
    sdk = load_sdk("rtx")
    _, network, parser = parse(sdk, tmp_path / "ds" / "model.onnx")
    assert tuple(cast(Any, network.get_input(0).shape)) == (exported.batch, 3, *exported.contract.shape[:3])
    assert network.get_input(0).dtype == network.get_output(0).dtype == cast(Any, sdk.api).float32
    del parser


@needs_rtx
@pytest.mark.slow
def test_int8_becomes_an_engine(tmp_path: Path, tiny_checkpoint: Path) -> None:
    found = int8_bundle(tiny_checkpoint, tmp_path)
    deepstream.folder(found, tmp_path / "ds", CAMERA)
    assert build(load_sdk("rtx"), tmp_path / "ds" / "model.onnx", Settings(capabilities=("86",)))


def int8_bundle(checkpoint: Path, folder: Path) -> Bundle:
    shown = demo.evaluation(checkpoints.load(checkpoint).contract, 12)
    np.save(folder / "clips.npy", np.stack([clip.frames for clip in shown]))
    options = pipeline.Options(lowering="gather", calib=folder / "clips.npy", max_drop=100.0)
    return pipeline.export_model("trt-int8", checkpoint, folder / "out", options)


def test_the_configuration(exported: Bundle, tmp_path: Path) -> None:
    notes = deepstream.folder(exported, tmp_path / "ds", CAMERA, hop=3)
    assert len(notes) == 1
    found, contract = read(tmp_path / "ds" / "config_preprocess.txt"), exported.contract
    assert set(found["property"]) <= PREPROCESS_KEYS
    shape = [int(size) for size in found["property"]["network-input-shape"].split(";")]
    session = ort.InferenceSession(tmp_path / "ds" / "model.onnx")
    assert shape == session.get_inputs()[0].shape
    assert found["property"]["tensor-name"] == session.get_inputs()[0].name
    assert (found["user-configs"]["stride"], found["user-configs"]["subsample"]) == ("3", "2")  # 30 / 10 fps
    assert found["group-0"]["roi-params-src-0"] == "150;0;1620;1080"  # 48:32 of 1920x1080
    infer = read(tmp_path / "ds" / "config_infer.txt")["property"]
    assert set(infer) <= INFER_KEYS
    assert infer["network-mode"] == {"trt-fp32": "0", "trt-fp16": "2"}[exported.target]
    assert infer["output-blob-names"] == session.get_outputs()[0].name
    assert (tmp_path / "ds" / infer["labelfile-path"]).read_text().rstrip("\n").split(";") == list(exported.labels)
    assert infer["model-engine-file"] in str(exported.build["command"])
    assert str(exported.build["command"]) in (tmp_path / "ds" / "config_infer.txt").read_text()
    assert contract.frames == shape[2]


contracts = st.builds(
    InputContract,
    frames=st.just(1),
    height=st.integers(8, 40),
    width=st.integers(8, 40),
    resize=st.sampled_from(["short-side", "stretch"]),
)


@settings(max_examples=60, deadline=None)
@given(contracts, st.integers(0, 20), st.integers(60, 250), st.integers(60, 250))
def test_the_region_is_what_preprocessing_leaves(contract: InputContract, more: int, height: int, width: int) -> None:
    """Frames whose colours are the coordinates show which of them preprocessing takes."""
    if more:
        size: Any = max(contract.height, contract.width) + more
        contract = replace(contract, resize_size=size if contract.resize == "short-side" else (size, size))
    rows, columns = np.mgrid[:height, :width]
    frame = np.stack([columns, rows, np.zeros_like(rows)], axis=-1).astype(np.uint8)
    (shown,) = preprocess.prepare(frame[None], contract).astype(float)
    left, top, wide, high = deepstream.region(contract, height, width)
    step = wide / contract.width, high / contract.height
    near = [max(2.0, 1.5 * each) for each in step]
    assert shown[:, 0, 0].mean() == pytest.approx(left + step[0] / 2 - 0.5, abs=near[0])
    assert shown[:, -1, 0].mean() == pytest.approx(left + wide - step[0] / 2 - 0.5, abs=near[0])
    assert shown[0, :, 1].mean() == pytest.approx(top + step[1] / 2 - 0.5, abs=near[1])
    assert shown[-1, :, 1].mean() == pytest.approx(top + high - step[1] / 2 - 0.5, abs=near[1])


@pytest.mark.parametrize(
    ("fps", "stream", "step", "noted"),
    [
        (15.0, 30.0, 2, False),
        (15.0, 25.0, 2, True),
        (10.0, 30.0, 3, False),
        (30.0, 10.0, 1, True),
        (None, 25.0, 1, False),
    ],
)
def test_every_so_many_frames(fps: float | None, stream: float, step: int, noted: bool) -> None:
    found, notes = deepstream.every(InputContract(8, 32, 32, fps=fps), stream)
    assert (found, bool(notes)) == (step, noted)


def test_models_that_stride_or_sample_whole_videos() -> None:
    assert deepstream.every(InputContract(8, 32, 32, sampling="stride", stride=4), 30.0) == (4, [])
    with pytest.raises(InputError, match="samples segments"):
        deepstream.every(InputContract(8, 32, 32, sampling="segments"), 30.0)


def test_refusals(tiny_bundle: Path, exported: Bundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="DeepStream builds engines of trt"):
        deepstream.folder(bundles.load(tiny_bundle), tmp_path / "ds", CAMERA)
    with pytest.raises(InputError, match="--hop is 9"):
        deepstream.folder(exported, tmp_path / "ds", CAMERA, hop=9)
    (tmp_path / "ds").mkdir()
    with pytest.raises(BundleError, match="is not a configuration of DeepStream"):
        deepstream.folder(exported, tmp_path / "ds", CAMERA)
    assert list((tmp_path / "ds").iterdir()) == []
    with pytest.raises(InputError, match="too small"):
        deepstream.region(InputContract(8, 200, 8), 1, 4000)


def test_the_command(exported: Bundle, tmp_path: Path, edgetube_cli: Cli) -> None:
    options = ("--out", tmp_path / "ds", "--size", "720x1280", "--fps", "25", "--json")
    code, out, _ = edgetube_cli("deploy", "deepstream", exported.path, *options)
    assert code == 0
    notes = json.loads(out)["notes"]
    assert notes[0] == "the model wants 10 frames a second, and takes 12.5 of the 25 there are"
    assert "streams of 1280x720" in (tmp_path / "ds" / "config_preprocess.txt").read_text()
    for wrong in (("--fps", "0"), ("--size", "²"), ("--hop", "0")):
        code, _, err = edgetube_cli("deploy", "deepstream", exported.path, "--out", tmp_path / "ds", *wrong)
        assert (code, err.count("\n")) == (2, 1), err
