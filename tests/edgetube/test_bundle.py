"""Bundles that cannot be trusted are refused in one line; nothing half-written ever stands in a bundle's place."""

import errno
import json
from dataclasses import replace

import numpy as np
import pytest

from edgetube import bundle as bundles
from edgetube.bundle import MANIFEST, Bundle
from edgetube.errors import BundleError
from edgetube.spec import InputContract, ModelSpec, TubeSpec

CONTRACT = InputContract(4, 16, 16, fps=8.0)
SPEC = ModelSpec((TubeSpec((2, 8, 8), (2, 8, 8)),), 4, (16, 16), 12, 1, 2, (("main", 2),))


def write(out, weights=b"weights"):
    with bundles.staging(out) as folder:
        (folder / "model.onnx").write_bytes(weights)
        bundles.save_golden(folder, np.zeros(CONTRACT.shape, np.uint8), np.array([1.0, 2.0], np.float32))
        bundles.seal(
            Bundle(
                path=folder,
                name=out.name,
                target="onnx-fp32",
                precision="fp32",
                backend="onnxruntime",
                spec=SPEC,
                contract=CONTRACT,
                labels=("a", "b"),
                batch=1,
                artifact="model.onnx",
                checkpoint={"name": "x", "source": "x", "sha256": "0"},
                parity={"max_abs_error": 1e-6},
            )
        )
    return out


@pytest.fixture
def out(tmp_path):
    return write(tmp_path / "x.onnx-fp32")


def edit(out, **changes):
    data = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps(data | changes))


def test_round_trip_keeps_everything(out):
    read = bundles.load(out)
    assert (read.spec, read.contract, read.labels, read.batch) == (SPEC, CONTRACT, ("a", "b"), 1)
    assert set(read.files) == {"model.onnx", "golden.npz"}
    assert read.artifact_bytes == len(b"weights")
    assert bundles.load(out, verify=False) == read
    frames, logits = read.golden()
    assert frames.shape == CONTRACT.shape
    assert logits.tolist() == [1.0, 2.0]


def test_nothing_is_left_beside_the_bundle(out):
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_a_changed_file_is_found(out):
    (out / "model.onnx").write_bytes(b"WEIGHTS")
    with pytest.raises(BundleError, match=r"model\.onnx is not the file that was proven"):
        bundles.load(out)


def test_a_missing_file_is_named(out):
    (out / "golden.npz").unlink()
    with pytest.raises(BundleError, match=r"incomplete: golden\.npz is missing"):
        bundles.load(out)


def test_a_newer_schema_says_to_upgrade(out):
    edit(out, schema=99)
    with pytest.raises(BundleError, match="schema 99; this edgetube reads schema 1: upgrade"):
        bundles.load(out)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}', "\x00\x01", '{"schema": 1, "files": 3}'])
def test_a_damaged_manifest_is_one_error(out, text):
    (out / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match="damaged"):
        bundles.load(out)


@pytest.mark.parametrize("change", [{"precision": "fp12"}, {"status": "great"}, {"model": {}}, {"input": {"x": 1}}])
def test_impossible_values_are_refused(out, change):
    edit(out, **change)
    with pytest.raises(BundleError, match="damaged"):
        bundles.load(out)


@pytest.mark.parametrize("name", ["/etc/passwd", "../other/model.onnx"])
def test_a_manifest_cannot_point_outside(out, name):
    edit(out, artifact=name)
    with pytest.raises(BundleError, match="outside the bundle"):
        bundles.load(out)


def test_no_bundle_there(tmp_path):
    with pytest.raises(BundleError, match="no such folder"):
        bundles.load(tmp_path / "nothing")
    with pytest.raises(BundleError, match=r"it has no edgetube\.json"):
        bundles.load(tmp_path)


def test_a_failed_export_leaves_the_old_bundle(out):
    before = bundles.load(out)

    def fail():
        with bundles.staging(out) as folder:
            (folder / "model.onnx").write_bytes(b"half")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert bundles.load(out) == before
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_a_new_export_replaces_the_old_one(out):
    write(out, b"newer weights")
    assert bundles.load(out).artifact_bytes == len(b"newer weights")
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years")
    with pytest.raises(BundleError, match="is not a bundle; choose another --out"):
        write(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years"


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path):
    with pytest.raises(BundleError, match="No space left on device"), bundles.staging(tmp_path / "x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_golden_must_fit_the_manifest(out):
    bundles.save_golden(out, np.zeros((2, 16, 16, 3), np.uint8), np.zeros(2, np.float32))
    with pytest.raises(BundleError, match=r"holds a clip \(2, 16, 16, 3\)"):
        bundles.load(out, verify=False).golden()
    (out / "golden.npz").write_bytes(b"not a zip")
    with pytest.raises(BundleError, match="cannot be read"):
        bundles.load(out, verify=False).golden()


def test_bundle_is_frozen(out):
    read = bundles.load(out)
    assert replace(read, batch=2).batch == 2
    with pytest.raises(AttributeError):
        read.batch = 2
