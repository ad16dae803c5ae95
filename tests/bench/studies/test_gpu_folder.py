"""`gpu_folder.py`: weights that are left out and made again, plans, and a folder that needs PyTorch and numpy alone."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgetube import bundle as bundles
from edgetube.bench.studies import gpu_folder, gpu_graph, gpu_witness
from edgetube.bench.studies.gpu_folder import Entry, Plan, Weights
from edgetube.contract import InputContract
from edgetube.errors import InputError
from edgetube.export import pipeline
from tests.bench.studies import bare


def test_weights_are_the_same_everywhere() -> None:
    """The first bytes of SHAKE128 of "0", as int8: b0 49 4f ... ; -128 has no counterpart and becomes -127."""
    raw = hashlib.shake_128(b"0").digest(4096)
    signed = np.array([byte - 256 if byte > 127 else byte for byte in raw])
    assert -128 in signed
    int8 = Weights("int8", 4096, 0, 0.0).values(0)
    np.testing.assert_array_equal(int8, np.maximum(signed, -127))
    halves = Weights("float16", 4096, 0, 0.25).values(0)
    assert halves.dtype == np.float16
    np.testing.assert_array_equal(halves, (signed * (0.25 / 128)).astype(np.float16))
    assert (Weights("int8", 4096, 0, 0.0).values(1) != int8).any()


def test_a_ramp_takes_no_room_and_is_not_flat() -> None:
    contract = InputContract(frames=4, height=16, width=24)
    clip = gpu_folder.ramp(contract)
    assert (clip.shape, clip.dtype) == (contract.shape, np.uint8)
    assert clip[2, 3, 5, 1] == 3 * 2 + 3 + 2 * 5 + 64
    assert all((np.diff(clip.astype(int), axis=axis) != 0).all() for axis in range(4))


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    weights = (Weights("int8", 100, 0, 0.0), Weights("float16", 7, 4096, 0.5))
    entries = (Entry("bundles/a", "demo", "trt-int8", 1, 10), Entry("bundles/b", "b", "trt-fp16", 8, 20, weights))
    plan = Plan("a machine", entries, (("b", 8, "rtx-fp16", "too large"),))
    plan.save(tmp_path)
    assert gpu_folder.read_plan(tmp_path) == plan


def test_a_folder_without_a_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no plan.json; make such a folder with: gpu.py prepare --out"):
        gpu_folder.read_plan(tmp_path)
    Plan("", (), ()).save(tmp_path)
    text = (tmp_path / "plan.json").read_text().replace('"schema": 1', '"schema": 9')
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(InputError, match=r"has schema 9, this gpu\.py reads 1: prepare the folder again"):
        gpu_folder.read_plan(tmp_path)


def test_a_folder_that_is_there_is_not_touched(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists; give another --out"):
        gpu_folder.prepare(tmp_path, ["demo"], [1], ["trt-fp16"], 9, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["trt-int8", "onnx-fp16"])
def test_weights_are_left_out_and_made_again(
    target: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_folder, "LARGE", 256)
    source = pipeline.export_model(target, tiny_checkpoint, tmp_path, pipeline.Options(lowering="gather", max_drop=100))
    folder, scratch = tmp_path / "folder", tmp_path / "scratch"
    weights = gpu_folder.thin(source, folder / "x")
    assert not (folder / "x" / gpu_folder.WEIGHTS).exists()
    thinned = sum(path.stat().st_size for path in (folder / "x").iterdir() if path.suffix == ".onnx")
    assert thinned < source.artifact_bytes - sum(w.count for w in weights) / 2
    bundle = gpu_folder.fill(folder, Entry("x", "m", target, 1, 0, weights), scratch)  # compares the hashes
    before, after = (gpu_graph.read(b.artifact_path) for b in (source, bundle))
    assert before.nodes == after.nodes
    made = [name for name, values in before.constants.items() if not np.array_equal(values, after.constants[name])]
    assert len(made) == len(weights)
    for name, values in before.constants.items():
        assert after.constants[name].shape == values.shape
        assert after.constants[name].dtype == values.dtype
        if name in made and values.dtype != np.int8:
            assert after.constants[name].std() == pytest.approx(values.std(), rel=0.2)
    if target == "trt-int8":
        with gpu_witness.Witness(bundle, "cpu") as witness:
            assert np.isfinite(witness(bundle.golden()[0])).all()


@pytest.mark.slow
def test_a_bundle_without_its_engine(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = pipeline.export_model("trt-fp16", tiny_checkpoint, tmp_path, pipeline.Options(lowering="gather"))
    (bundle.path / "model.engine").write_bytes(b"an engine")
    built = bundles.seal(replace(bundle, build={**bundle.build, "engine": {"file": "model.engine"}, "layers": {}}))
    gpu_folder.without_engine(built, tmp_path / "out")
    copy = bundles.load(tmp_path / "out")
    assert set(copy.files) == set(built.files) - {"model.engine"}
    assert not {"engine", "layers"} & set(copy.build)


@pytest.mark.long
def test_a_folder_needs_pytorch_and_numpy_alone(tmp_path: Path) -> None:
    """The whole command as one gives it where the GPU is, rehearsed on the CPU."""
    folder, written = tmp_path / "folder", tmp_path / "gpu.json"
    plan = gpu_folder.prepare(folder, ["demo"], [1], ["trt-int8", "no-such"], 9, tmp_path / "exports")
    assert [entry.target for entry in plan.entries] == ["trt-int8"]
    command = [str(bare.python(tmp_path / "bare")), str(folder / "run.py"), "--device", "cpu", "--seconds", "0.1"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [*command, "--compile", "", "--minutes", "60", "--json", str(written)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(written.read_text("utf-8"))
    graph, sdk = document["answers"]
    assert (graph["name"], graph["clips"], graph["agreement"]) == ("trt-int8's graph in PyTorch", 9, 1.0)
    assert graph["status"] == "evaluated on the CPU, not TensorRT"
    assert graph["runtime"]["integer_products"] == 28
    assert graph["emulation_error"] < 0.05 * graph["largest_logit"]
    assert sdk["reason"].startswith("tensorrt is not installed")
    times = {row["name"]: row["p50_ms"] for row in document["rows"]}
    assert list(times) == ["PyTorch eager fp16", "trt-int8", "trt-int8's graph in PyTorch"]
    assert times["trt-int8"] is None
    assert times["trt-int8's graph in PyTorch"] > 0
    assert "A rehearsal on a CPU" in done.stdout
    assert "Not prepared: no-such of demo, batch 1: no target is called 'no-such'" in done.stdout
