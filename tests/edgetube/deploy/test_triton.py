"""Model repositories, and what Triton says of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from edgetube import bundle as bundles
from edgetube.deploy import triton
from edgetube.errors import BundleError, InputError
from edgetube.runtime import Runtime
from tests.edgetube.deploy.conftest import Server

Cli = Callable[..., tuple[int, str, str]]


def test_the_artifact_alone(tiny_bundle: Path, tmp_path: Path) -> None:
    found = bundles.load(tiny_bundle)
    written = triton.repository(found, tmp_path)
    assert written == triton.Written(found.name, "onnxruntime", "triton")
    model = tmp_path / found.name
    names = sorted(str(path.relative_to(model)) for path in model.rglob("*") if path.is_file())
    assert names == ["1/model.onnx", "config.pbtxt", "labels.txt", "warmup/golden"]
    assert (model / "labels.txt").read_text().splitlines() == list(found.labels)
    clip = np.frombuffer((model / "warmup" / "golden").read_bytes(), np.uint8).reshape(1, *found.contract.shape)
    assert np.array_equal(clip, found.golden()[0][:1])
    session = ort.InferenceSession(model / "1" / "model.onnx")
    text = (model / "config.pbtxt").read_text()
    for tensor, kind in ((session.get_inputs()[0], "UINT8"), (session.get_outputs()[0], "FP32")):
        assert f'name: "{tensor.name}" data_type: TYPE_{kind} dims: {tensor.shape}' in text


def test_the_bundle_with_edgetube(tiny_bundle: Path, tmp_path: Path) -> None:
    found = bundles.load(tiny_bundle)
    assert triton.repository(found, tmp_path, name="m", run_by="edgetube").backend == "python"
    bundles.load(tmp_path / "m" / "1" / "bundle").verify()
    assert (tmp_path / "m" / "1" / "model.py").is_file()
    assert "max_batch_size: 64" in (tmp_path / "m" / "config.pbtxt").read_text()


def test_a_model_is_replaced_and_nothing_else_is(tiny_bundle: Path, tmp_path: Path) -> None:
    found = bundles.load(tiny_bundle)
    triton.repository(found, tmp_path, name="m")
    triton.repository(found, tmp_path, name="m", run_by="edgetube")
    assert not (tmp_path / "m" / "1" / "model.onnx").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").write_text("1")
    with pytest.raises(BundleError, match="is not a model of Triton"):
        triton.repository(found, tmp_path, name="other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "other"]


@pytest.mark.parametrize("name", ["", "..", "a/b", 'say "x"', "a\\b"])
def test_a_name_that_is_no_folder(name: str, tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected the name of a folder"):
        triton.repository(bundles.load(tiny_bundle), tmp_path, name=name)


def test_what_triton_cannot_run_by_itself(tiny_bundle: Path, tmp_path: Path) -> None:
    foreign = replace(bundles.load(tiny_bundle), backend="executorch", target="executorch-fp32")
    with pytest.raises(InputError, match="Triton has no backend of its own"):
        triton.repository(foreign, tmp_path, run_by="triton")
    with pytest.raises(InputError, match="--run-by is 'x'"):
        triton.repository(foreign, tmp_path, run_by="x")


def test_a_damaged_bundle_is_not_deployed(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for each in tiny_bundle.iterdir():
        (copy / each.name).write_bytes(each.read_bytes())
    with (copy / "model.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(BundleError):
        triton.repository(bundles.load(copy), tmp_path / "models")
    assert not (tmp_path / "models" / "copy").exists()


@pytest.mark.slow
def test_a_real_server_answers_as_the_runtime_does(
    tiny_bundle: Path, tmp_path: Path, serve: Callable[[Path], Server]
) -> None:
    """Triton's Python backend runs `model.py`; its core reads the other configuration, and lacks only the backend."""
    found, models = bundles.load(tiny_bundle), tmp_path / "models"
    triton.repository(found, models, name="by-edgetube", run_by="edgetube")
    triton.repository(found, models, name="by-triton")
    triton.repository(found, models, name="wrong")
    config = models / "wrong" / "config.pbtxt"
    config.write_text(config.read_text().replace("data_type: TYPE_FP32", "data_type: TYPE_FP33"))
    server = serve(models)
    states = server.states()
    assert states["by-edgetube"] == ("READY", ""), server.log.read_text()
    assert "unable to find backend library for backend 'onnxruntime'" in states["by-triton"][1]
    assert states.get("wrong", ("", ""))[0] != "READY"
    assert "TYPE_FP33" in server.log.read_text()

    clips = np.random.default_rng(0).integers(0, 256, (3, *found.contract.shape), np.uint8)
    given = {"name": "frames", "datatype": "UINT8", "shape": list(clips.shape), "data": clips.ravel().tolist()}
    (answer,) = server.ask("v2/models/by-edgetube/infer", {"inputs": [given]})["outputs"]
    with Runtime(tiny_bundle) as runtime:
        expected = runtime(clips)
    np.testing.assert_allclose(np.reshape(answer["data"], answer["shape"]), expected, rtol=0, atol=1e-5)

    # Labels come as bytes only, each behind its length: asked for as JSON, Triton 2.51 fails with an error of its own.
    best = {"name": "logits", "parameters": {"classification": 1, "binary_data": True}}
    _, data = server.ask_bytes("v2/models/by-edgetube/infer", {"inputs": [given], "outputs": [best]})
    for logits in expected:
        size = int.from_bytes(data[:4], "little")
        score, index, label = data[4 : 4 + size].decode().split(":")
        data = data[4 + size :]
        assert (int(index), label) == (logits.argmax(), found.labels[logits.argmax()])
        assert float(score) == pytest.approx(logits.max(), abs=1e-4)
    assert not data
    stated = server.ask("v2/models/by-edgetube/config")["parameters"]
    assert json.loads(stated["input"]["string_value"]) == json.loads(json.dumps(found.contract.to_json()))


def test_the_command(tiny_bundle: Path, tmp_path: Path, edgetube_cli: Cli) -> None:
    code, out, err = edgetube_cli("deploy", "triton", tiny_bundle, "--out", tmp_path / "models")
    assert code == 0
    assert "Triton runs it in its backend onnxruntime" in out
    assert "tritonserver --model-repository=" in out
    code, out, _ = edgetube_cli(
        "deploy", "triton", tiny_bundle, "--out", tmp_path / "models", "--run-by", "edgetube", "--json"
    )
    assert json.loads(out) == {
        "model": str(tmp_path / "models" / tiny_bundle.name), "backend": "python", "run_by": "edgetube",
    }  # fmt: skip
    code, _, err = edgetube_cli("deploy", "triton", tiny_bundle, "--out", tmp_path, "--run-by", "me")
    assert (code, err.count("\n")) == (2, 1)
