"""What is the NPU backend's own; what every backend promises is in `test_conformance.py`."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from edgetube import bundle as bundles
from edgetube import runtimes
from edgetube.bundle import Bundle
from edgetube.errors import BackendError, BundleError, FormatError, InputError
from edgetube.export import pipeline

pytest.importorskip("onnxruntime_qnn", reason="needs onnxruntime-qnn: pip install 'edgetube[qnn]'")

from edgetube.runtimes import qnn


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    options = pipeline.Options(lowering="gather", settings={"soc": "sm8650"})
    return pipeline.export_model("qnn-fp16", tiny_checkpoint, tmp_path_factory.mktemp("out"), options)


def clips_of(bundle: Bundle) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (1, *bundle.contract.shape), np.uint8)


def test_it_says_that_the_processor_is_emulated(exported: Bundle) -> None:
    with runtimes.open_bundle(exported) as backend:
        said = backend.describe()
    assert (said["device"], said["soc"], said["htp_arch"]) == ("htp (emulated on x86)", "sm8650", 75)
    assert said["opened"] == "sm8650.onnx"


def test_a_soc_without_a_context_compiles_the_file(exported: Bundle) -> None:
    with runtimes.open_bundle(exported) as backend, runtimes.open_bundle(exported, device="SM8850") as other:
        assert other.describe()["opened"] == "model.onnx"
        clips = clips_of(exported)
        np.testing.assert_allclose(backend(clips), other(clips), atol=5e-3)


def test_the_context_of_a_newer_sdk_is_not_opened(exported: Bundle) -> None:
    newer = replace(exported, build={**exported.build, "qairt": "99.0.0"})
    with runtimes.open_bundle(newer) as backend:
        assert backend.describe()["opened"] == "model.onnx"
    older = replace(exported, build={**exported.build, "qairt": "2.9.10"})
    with runtimes.open_bundle(older) as backend:
        assert backend.describe()["opened"] == "sm8650.onnx"


def test_an_unknown_soc(exported: Bundle) -> None:
    with pytest.raises(InputError, match=r"no SoC is called 'cpu' here; known are sm8450, .*sm8850"):
        runtimes.open_bundle(exported, device="cpu")


def test_a_damaged_binary_says_what_the_vendor_says(exported: Bundle, tmp_path: Path) -> None:
    for name in ("model.onnx", "sm8650.onnx"):
        (tmp_path / name).write_bytes((exported.path / name).read_bytes())
    (tmp_path / "sm8650_qnn.bin").write_bytes((exported.path / "sm8650_qnn.bin").read_bytes()[:1000])
    with pytest.raises(BackendError, match=r"cannot open .*sm8650.onnx: .*[Cc]ontext binary"):
        runtimes.open_bundle(replace(exported, path=tmp_path))


def test_a_binary_that_the_manifest_does_not_list(exported: Bundle) -> None:
    files = {name: record for name, record in exported.files.items() if not name.endswith(".bin")}
    with pytest.raises(BundleError, match=r"'sm8650_qnn\.bin' is not among the files of the manifest"):
        runtimes.open_bundle(replace(exported, files=files))


def test_a_manifest_with_contexts_of_another_form(exported: Bundle) -> None:
    with pytest.raises(FormatError, match=r"build\.contexts"):
        runtimes.open_bundle(replace(exported, build={**exported.build, "contexts": ["sm8650"]}))


def test_refused_operators_are_named(tmp_path: Path) -> None:
    """Nothing falls back to the CPU."""
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 3, 2, 3, 2, 3]) for name in ("x", "y")]
    node = helper.make_node("Transpose", ["x"], ["y"], name="blocks.7.odd", perm=[0, 1, 2, 3, 4, 5])
    graph = helper.make_graph([node], "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), tmp_path / "x.onnx")
    with pytest.raises(BackendError, match=r"the NPU of sm8650 does not take blocks\.7\.odd \(Transpose\)"):
        qnn.open_strictly(tmp_path / "x.onnx", "sm8650", {}, "cannot open it")


OPENING = """
import json, sys
from edgetube import bundle, runtimes

with runtimes.open_bundle(bundle.load(sys.argv[1])) as backend:
    print(json.dumps(backend.describe()))
"""


def test_the_emulator_prints_nothing_between_the_lines_of_a_command(exported: Bundle) -> None:
    made = subprocess.run([sys.executable, "-c", OPENING, exported.path], capture_output=True, text=True, check=True)
    assert made.stdout.startswith('{"onnxruntime"')
    assert made.stdout.count("\n") == 1


def test_inner_tensors_are_those_of_the_file(exported: Bundle) -> None:
    clips = clips_of(exported)
    with runtimes.open_bundle(exported) as backend:
        names = backend.layers(["tubes", "blocks.0", "logits", "nothing"])
        assert names == ("tubes", "blocks.0", "logits")
        shown = backend.tap(names)(clips)
        np.testing.assert_allclose(shown["logits"], backend(clips), atol=5e-3)
    assert bundles.load(exported.path).artifact == "model.onnx"


def test_a_soc_is_that_of_the_system_on_a_device(
    exported: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is guessed: a context of another one would be opened, or compiled for."""
    assert qnn._own_soc({"sm8650": ""}) == "sm8650"
    monkeypatch.setattr(qnn, "SIMULATED", False)
    monkeypatch.setattr(qnn, "MACHINE", tmp_path / "machine")
    with pytest.raises(InputError, match=r"machine does not say which SoC this is; name it as the device: sm8450, "):
        runtimes.open_bundle(exported)
    (tmp_path / "machine").write_text("SM8650\n")
    assert qnn.find_soc(qnn._own_soc({})) == "sm8650"
    (tmp_path / "machine").write_text("SM9999\n")
    with pytest.raises(InputError, match=r"machine says 'SM9999', a SoC that is not known here; name the one that is "):
        runtimes.open_bundle(exported)
