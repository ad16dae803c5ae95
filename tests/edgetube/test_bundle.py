"""Bundles that cannot be trusted are refused in one line; nothing half-written ever stands in a bundle's place."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetube import bundle as bundles
from edgetube import strict
from edgetube.bundle import MANIFEST, Bundle
from edgetube.contract import InputContract
from edgetube.errors import BundleError
from edgetube.precision import Precision
from edgetube.runtime import Runtime
from edgetube.spec import ModelSpec, TubeSpec

CONTRACT = InputContract(4, 16, 16, fps=8.0)
SPEC = ModelSpec((TubeSpec((2, 8, 8), (2, 8, 8)),), 4, (16, 16), 12, 1, 2, (("main", 2),))


def write(out: Path, weights: bytes = b"weights") -> Path:
    with bundles.staging(out) as folder:
        (folder / "model.onnx").write_bytes(weights)
        bundle = Bundle(
            path=folder,
            name=out.name,
            target="onnx-fp32",
            precision=Precision.FP32,
            backend="onnxruntime",
            spec=SPEC,
            contract=CONTRACT,
            labels=("a", "b"),
            batch=1,
            artifact="model.onnx",
            checkpoint={"name": "x", "source": "x", "sha256": "0" * 64},
            parity={"max_abs_error": 1e-6, "golden": {"clips": 2, "sqnr": None, "min_sqnr": 80.0}},
        )
        bundles.save_golden(bundle, np.zeros((2, *CONTRACT.shape), np.uint8), np.array([[1, 2], [3, 4]], np.float32))
        bundles.seal(bundle)
    return out


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return write(tmp_path / "x.onnx-fp32")


def edit(out: Path, **changes: Any) -> None:
    """Change fields of the manifest, those of records by `record__field`."""
    data = json.loads((out / MANIFEST).read_text())
    for key, value in changes.items():
        *path, last = key.split("__")
        inner = data
        for part in path:
            inner = inner[part]
        inner[last] = value
    (out / MANIFEST).write_text(json.dumps(data))


def test_round_trip_keeps_everything(out: Path) -> None:
    read = bundles.load(out)
    assert (read.spec, read.contract, read.labels, read.batch) == (SPEC, CONTRACT, ("a", "b"), 1)
    assert set(read.files) == {"model.onnx", "golden.npz"}
    assert read.artifact_bytes == len(b"weights")
    assert bundles.load(out, verify=False) == read
    frames, logits = read.golden()
    assert frames.shape == (2, *CONTRACT.shape)
    assert logits.tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_nothing_is_left_beside_the_bundle(out: Path) -> None:
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_a_changed_file_is_found(out: Path) -> None:
    (out / "model.onnx").write_bytes(b"WEIGHTS")
    with pytest.raises(BundleError, match=r"model\.onnx is not the file that was proven"):
        bundles.load(out)


def test_a_missing_file_is_named(out: Path) -> None:
    (out / "golden.npz").unlink()
    with pytest.raises(BundleError, match=r"incomplete: golden\.npz is missing"):
        bundles.load(out)


def test_a_newer_schema_says_to_upgrade(out: Path) -> None:
    edit(out, schema=3)
    with pytest.raises(BundleError, match="schema 3; this edgetube reads schemas up to 2: upgrade"):
        bundles.load(out)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"schema": 1}', "\x00\x01", '{"schema": 1, "files": 3}', '{"schema": true}', '{"schema": 0}',
     '{"schema": "1"}', '{"schema": 1.0}', '{"schema": 1, "schema": 1}', "[" * 200_000, '{"a": ' * 200_000],
)  # fmt: skip
def test_a_damaged_manifest_is_one_error(out: Path, text: str) -> None:
    (out / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match=r"edgetube\.json is damaged \(.*; export or copy the bundle again") as caught:
        bundles.load(out)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("old", "new"), [("1e-06", "Infinity"), ("1e-06", "NaN"), ("1e-06", "1e999"), ("8.0", "-Infinity")]
)
def test_numbers_that_json_does_not_have(out: Path, old: str, new: str) -> None:
    text = (out / MANIFEST).read_text()
    assert old in text
    (out / MANIFEST).write_text(text.replace(old, new))
    with pytest.raises(BundleError, match="damaged"):
        bundles.load(out)


def test_a_field_twice(out: Path) -> None:
    text = (out / MANIFEST).read_text()
    (out / MANIFEST).write_text(text.replace('"batch": 1', '"batch": 2, "batch": 1'))
    with pytest.raises(BundleError, match="the key 'batch' stands twice"):
        bundles.load(out)


def test_every_field_is_needed_and_no_other_is_known(out: Path) -> None:
    data = json.loads((out / MANIFEST).read_text())
    for key in data:
        (out / MANIFEST).write_text(json.dumps({k: v for k, v in data.items() if k != key}))
        with pytest.raises(BundleError, match=f"the manifest lacks the field {key}"):
            bundles.load(out)
    (out / MANIFEST).write_text(json.dumps(data | {"extra": 1}))
    with pytest.raises(BundleError, match="the manifest has no field extra; it has artifact, backend"):
        bundles.load(out)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"name": "a b"}, "name is 'a b'"),
    ({"name": ""}, "name is ''"),
    ({"name": "../x"}, "name is '../x'"),
    ({"name": "-x"}, "name is '-x'"),
    ({"name": "x" * 201}, "name is .*expected text of at most 200 characters"),
    ({"name": "x\x1b[2J"}, "name|control characters"),
    ({"target": "onnx fp32"}, "target is"),
    ({"backend": "onnxruntime;"}, "backend is"),
    ({"backend": None}, "backend is None"),
    ({"precision": "fp12"}, "precision is 'fp12'; expected one of fp32, fp16, int8"),
    ({"precision": "int8"}, "the target is onnx-fp32, but the precision is int8"),
    ({"target": "onnx-int8"}, "the target is onnx-int8, but the precision is fp32"),
    ({"status": "great"}, "status is 'great'"),
    ({"batch": 0}, "batch is 0; expected an integer, 1 to 4096"),
    ({"batch": 4097}, "batch is 4097"),
    ({"batch": True}, "batch is True"),
    ({"batch": 1.0}, "batch is 1.0"),
    ({"batch": "1"}, "batch is '1'"),
    ({"model": {}}, "ModelSpec lacks the field"),
    ({"model__depth": 10**9}, "depth is 1000000000"),
    ({"model__frames": True}, "frames is True"),
    ({"model__tubes": 3}, "tubes is 3"),
    ({"input": {"x": 1}}, "InputContract lacks the field"),
    ({"input__fps": -1}, "fps is -1"),
    ({"input__height": 32}, r"the input is \(4, 32, 16, 3\), but the model takes clips \(4, 16, 16, 3\)"),
    ({"model__channels": 1}, r"the input is \(4, 16, 16, 3\), but the model takes clips \(4, 16, 16, 1\)"),
    ({"labels": ["a"]}, "there are 1 labels, but the classifier main has 2 classes"),
    ({"labels": ["a", "b", "c"]}, "there are 3 labels"),
    ({"labels": ["a", "a"]}, "labels has 'a' more than once"),
    ({"labels": ["a", 7]}, "labels is 7; expected text"),
    ({"labels": ["a", "x" * 1001]}, "labels is .*at most 1000 characters"),
    ({"labels": ["a", "b\x1b[31m"]}, "control characters"),
    ({"labels": "ab"}, "labels is 'ab'; expected a list"),
    ({"labels": []}, "labels has 0 entries"),
    ({"artifact": "/etc/passwd"}, "artifact is '/etc/passwd'; expected a path inside the folder"),
    ({"artifact": "../other/model.onnx"}, "expected a path inside"),
    ({"artifact": "C:\\model.onnx"}, "expected a path inside"),
    ({"artifact": "other.onnx"}, "the artifact other.onnx is not in files"),
    ({"artifact": "model"}, "the artifact model is not in files"),
    ({"checkpoint": {}}, "checkpoint lacks the field name, source, sha256"),
    ({"checkpoint__sha256": "0"}, r"checkpoint.sha256 is '0'"),
    ({"checkpoint__sha256": 0}, "checkpoint.sha256 is 0"),
    ({"checkpoint__more": "x"}, "checkpoint has no field more"),
    ({"build": []}, r"build is \[\]; expected an object"),
    ({"build": {"lowering": 3}}, "build.lowering is 3"),
    ({"build": {"lowering": {"chosen": "gather"}}}, "build.lowering.why is None"),
    ({"build": {"lowering": {"why": "asked for"}}}, "build.lowering.chosen is None"),
    ({"build": {"lowering": {"chosen": "a", "why": "b", "timings": {"a": {}}}}}, "timings.a lacks the field p50_ms"),
    ({"build": {"lowering": {"chosen": "a", "why": "b", "timings": {"a": {"p50_ms": "1"}}}}}, "p50_ms is '1'"),
    ({"build": {"int8": {"notes": []}}}, "build.int8.summary is None"),
    ({"build": {"notes": "x"}}, "build.notes is"),
    ({"build": {"notes": [3]}}, "build.notes is 3"),
    ({"build": {"graph": {"operators": {"Add": "many"}}}}, "build.graph.operators.Add is 'many'"),
    ({"build": {"command": ["trtexec"]}}, "build.command is"),
    ({"build": {"settings": []}}, "build.settings is"),
    ({"build": {"engine": "x"}}, "build.engine is"),
    ({"build": {"layers": "x"}}, "build.layers is"),
    ({"build": {"integers": "x"}}, "build.integers is"),
    ({"build": {"free": {"deep": "\x07"}}}, "control characters"),
    ({"parity": None}, "parity is None"),
    ({"parity": {"max_abs_error": -1}}, "parity.max_abs_error is -1"),
    ({"parity": {"max_abs_error": "0"}}, "parity.max_abs_error is '0'"),
    ({"parity": {"max_abs_error": 2e30}}, "parity.max_abs_error is 2e"),
    ({"parity": {"image": {"max_abs_error": -1}}}, "parity.image.max_abs_error is -1"),
    ({"parity": {"clips": True}}, "parity.clips is True"),
    ({"parity": {"kl": -1.1e30}}, "parity.kl is -1.1e"),
    ({"parity": {"kl": 1.1e30}}, "parity.kl is 1.1e"),
    ({"parity__golden": {"clips": 0, "min_sqnr": 80}}, "parity.golden.clips is 0; expected an integer, 1 to 64"),
    ({"parity__golden": {"clips": 65, "min_sqnr": 80}}, "parity.golden.clips is 65"),
    ({"parity__golden": {"clips": 2}}, "parity.golden lacks the field min_sqnr"),
    ({"parity__golden": {"clips": 2, "min_sqnr": -301}}, "parity.golden.min_sqnr is -301; .*, -300 to 300"),
    ({"parity__golden": {"clips": 2, "min_sqnr": 301}}, "parity.golden.min_sqnr is 301"),
    ({"build": {"graph": {"operators": {"Add": -1}}}}, "build.graph.operators.Add is -1; .*, 0 to 2147483648"),
    ({"build": {"graph": {"operators": {"Add": (1 << 31) + 1}}}}, "build.graph.operators.Add is 2147483649"),
    ({"build": {"lowering": {"chosen": "a", "why": "b", "timings": {"a": {"p50_ms": -1}}}}}, "p50_ms is -1"),
    ({"parity": {"clips": [1]}}, "parity.clips is"),
    ({"parity": {"a b": 1}}, "a name in parity is 'a b'"),
    ({"versions": {"edgetube": 1}}, "versions.edgetube is 1; expected text"),
    ({"versions": []}, "versions is"),
    ({"files": {}}, "golden.npz is not in files"),
    ({"files": []}, "files is"),
    ({"files__golden.npz": 3}, "files.golden.npz is 3"),
    ({"files__golden.npz__bytes": -1}, "files.golden.npz.bytes is -1"),
    ({"files__golden.npz__bytes": 1.5}, "files.golden.npz.bytes is 1.5"),
    ({"files__golden.npz__bytes": (1 << 50) + 1}, "files.golden.npz.bytes is"),
    ({"files__golden.npz__sha256": "x" * 64}, "files.golden.npz.sha256 is"),
    ({"files__golden.npz__sha256": "0" * 63}, "files.golden.npz.sha256 is"),
    ({"files__golden.npz__mode": "0"}, "files.golden.npz has no field mode"),
    ({"files__../x": {"bytes": 1, "sha256": "0" * 64}}, "a name in files is '../x'; expected a path inside"),
    ({"files__nul": {"bytes": 1, "sha256": "0" * 64}}, "a name in files is 'nul'"),
    ({"files__edgetube.json": {"bytes": 1, "sha256": "0" * 64}}, "cannot hold its own hash"),
    ({"files__MODEL.onnx": {"bytes": 1, "sha256": "0" * 64}}, "differ in case alone"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[f"{next(iter(c))}-{m[:20]}" for c, m in WRONG])
def test_impossible_values_are_refused(out: Path, change: dict[str, Any], message: str) -> None:
    edit(out, **change)
    with pytest.raises(BundleError, match=message) as caught:
        bundles.load(out, verify=False)
    assert str(caught.value).isprintable()
    assert str(caught.value).startswith(f"{out / MANIFEST} is damaged (")


@pytest.mark.parametrize(
    "change",
    [
        {"batch": 4096},
        {"parity__golden": {"clips": 1, "min_sqnr": -300}},
        {"parity__golden": {"clips": 64, "min_sqnr": 300}},
        {"parity": {"kl": -1e30, "max_abs_error": 1e30}},
        {"build": {"graph": {"operators": {"Add": 0, "Mul": 1 << 31}}}},
        {"build": {"lowering": {"chosen": "a", "why": "b", "timings": {"a": {"p50_ms": 0}}}}},
        {"checkpoint__source": ""},
        {"name": "x" * 200},
        {"name": "モデル-1.onnx_fp32"},
        {"labels": ["", "x" * 1000]},
        {"checkpoint__sha256": ""},
        {"parity": {"max_abs_error": 0, "note": "not run here", "top1": None, "image": {"agreement": 1.0}}},
        {"build": {"anything": [{"at": {"all": [None, True, 1.5, "x"]}}]}},
        {"files__golden.npz__bytes": 1 << 50},
        {"versions": {}},
    ],
)
def test_what_is_at_a_bound_is_read(out: Path, change: dict[str, Any]) -> None:
    edit(out, **change)
    data = json.loads((out / MANIFEST).read_text())
    assert json.loads(json.dumps(bundles.load(out, verify=False).to_json())) == data


def test_the_folder_of_an_artifact_is_in_files(out: Path) -> None:
    (out / "model.mlpackage" / "Data").mkdir(parents=True)
    (out / "model.mlpackage" / "Data" / "weights.bin").write_bytes(b"12345")
    sealed = bundles.seal(replace(bundles.load(out), artifact="model.mlpackage"))
    assert sealed.artifact_files == ("model.mlpackage/Data/weights.bin",)
    assert bundles.load(out).artifact_bytes == 5 + len(b"weights")
    (out / "model.mlpackage" / "Data" / "more.bin").write_bytes(b"1")
    with pytest.raises(BundleError, match=r"'model.mlpackage/Data/more.bin' is not among the files of the manifest"):
        bundles.load(out)


def test_what_lies_beside_the_artifact_is_hashed_or_refused(out: Path) -> None:
    (out / "model.onnx.data").write_bytes(b"weights of somebody else")
    with pytest.raises(BundleError, match=r"'model.onnx.data' is not among the files of the manifest; remove it"):
        bundles.load(out)


def test_other_files_in_the_folder_do_no_harm(out: Path) -> None:
    (out / "README.txt").write_text("how we made this")
    (out / "model.engine").write_bytes(b"built by hand")
    assert set(bundles.load(out).files) == {"model.onnx", "golden.npz"}


def test_only_listed_files_are_opened(out: Path) -> None:
    (out / "extra.bin").touch()
    found = bundles.load(out)
    assert found.file("golden.npz") == out / "golden.npz"
    with pytest.raises(BundleError, match=r"'extra.bin' is not among the files of the manifest"):
        found.file("extra.bin")
    assert replace(found, files={}).file("extra.bin") == out / "extra.bin"  # while it is made


def test_a_bundle_that_would_be_refused_is_not_written(tmp_path: Path) -> None:
    old = write(tmp_path / "y")

    def write_badly() -> None:
        with bundles.staging(tmp_path / "x") as folder:
            shutil.copytree(old, folder, dirs_exist_ok=True)
            bundles.seal(replace(bundles.load(folder), name="a b"))

    with pytest.raises(BundleError, match=r"its manifest would be refused .*name is 'a b'.*; nothing was written"):
        write_badly()
    assert [p.name for p in tmp_path.iterdir()] == ["y"]


def test_paths_hold_when_the_working_folder_changes(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(out.parent)
    found = bundles.load(out.name)
    monkeypatch.chdir("/")
    assert found.path == out
    found.verify()
    assert found.golden()[1].tolist() == [[1.0, 2.0], [3.0, 4.0]]


OLD = Path(__file__).parent / "schema1"


@pytest.mark.parametrize(("target", "size"), [("onnx-fp32", 152199), ("onnx-int8", 48618)])
def test_bundles_that_were_made_before_the_manifest_was_checked_still_load(target: str, size: int) -> None:
    found = bundles.load(OLD / f"old.{target}")
    assert (found.name, found.target, found.batch) == (f"old.{target}", target, 1)
    assert (found.contract.shape, found.contract.fps, found.spec.tokens) == ((4, 16, 32, 3), 8.0, 18)
    assert (len(found.labels), found.labels[1]) == (9, "pan-left")
    assert found.files["model.onnx"].bytes == size
    frames, logits = found.golden()
    with Runtime(found) as rt:
        assert np.abs(rt(frames) - logits).max() <= 2 * found.parity["max_abs_error"]


def test_no_bundle_there(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such folder"):
        bundles.load(tmp_path / "nothing")
    with pytest.raises(BundleError, match=r"it has no edgetube\.json"):
        bundles.load(tmp_path)


def test_a_failed_export_leaves_the_old_bundle(out: Path) -> None:
    before = bundles.load(out)

    def fail() -> None:
        with bundles.staging(out) as folder:
            (folder / "model.onnx").write_bytes(b"half")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert bundles.load(out) == before
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_a_new_export_replaces_the_old_one(out: Path) -> None:
    write(out, b"newer weights")
    assert bundles.load(out).artifact_bytes == len(b"newer weights")
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years")
    with pytest.raises(BundleError, match="is not a bundle; choose another --out"):
        write(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years"


@pytest.mark.parametrize("swaps", [True, False])
def test_the_older_bundle_stays_until_the_new_one_has_its_name(
    out: Path, monkeypatch: pytest.MonkeyPatch, swaps: bool
) -> None:
    if not swaps:
        monkeypatch.setattr(bundles, "exchange", lambda *_: False)
    write(out, b"newer weights")
    assert bundles.load(out).artifact_bytes == len(b"newer weights")
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_a_rename_that_fails_puts_the_older_bundle_back(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, rename = bundles.load(out), Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.suffix == ".staging":
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(bundles, "exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(BundleError, match="Permission denied; nothing was changed"):
        write(out, b"newer weights")
    assert bundles.load(out) == before
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_a_link_to_a_bundle_stays_a_link(out: Path) -> None:
    link = out.parent / "linked"
    link.symlink_to(out, target_is_directory=True)
    with bundles.staging(link) as folder:
        shutil.copytree(out, folder, dirs_exist_ok=True)
        (folder / "model.onnx").write_bytes(b"newer weights")
        bundles.seal(bundles.load(folder, verify=False))
    assert link.is_symlink()
    assert bundles.load(out).artifact_bytes == len(b"newer weights")


KILLED = """
import os, sys
from pathlib import Path
from edgetube import bundle as bundles
out = Path(sys.argv[1])
if sys.argv[2] == "while it writes":
    with bundles.staging(out) as folder:
        (folder / "model.onnx").write_bytes(b"half of the weights")
        os._exit(1)
bundles.exchange = lambda *_: False
Path.rename = lambda self, target: (os.rename(self, target), os._exit(1))
with bundles.staging(out) as folder:
    pass
"""


@pytest.mark.parametrize("when", ["while it writes", "while it publishes"])
def test_what_a_killed_export_left_is_cleaned_up(out: Path, when: str) -> None:
    ended = subprocess.run([sys.executable, "-c", KILLED, out, when], check=False)
    assert ended.returncode == 1
    assert len(list(out.parent.iterdir())) == 3
    assert out.exists() == (when == "while it writes")
    write(out.parent / "y")
    assert sorted(p.name for p in out.parent.iterdir()) == [out.name, "y"]
    assert bundles.load(out).artifact_bytes == len(b"weights")


def test_an_export_that_still_runs_is_left_alone(out: Path) -> None:
    with bundles.staging(out.parent / "y") as folder:
        (folder / "part").write_bytes(b"weights")
        write(out, b"newer")
        assert (folder / "part").read_bytes() == b"weights"
        (folder / "edgetube.json").write_bytes((out / "edgetube.json").read_bytes())
    assert sorted(p.name for p in out.parent.iterdir()) == [out.name, "y"]


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="No space left on device"), bundles.staging(tmp_path / "x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_golden_must_fit_the_manifest(out: Path) -> None:
    bundle = bundles.load(out)
    bundles.save_golden(bundle, np.zeros((2, 2, 16, 16, 3), np.uint8), np.zeros((2, 2), np.float32))
    with pytest.raises(BundleError, match=r"is \(2, 2, 16, 16, 3\) uint8; expected \(2, 4, 16, 16, 3\) uint8"):
        bundles.load(out, verify=False).golden()
    bundles.save_golden(bundle, np.zeros((2, *CONTRACT.shape), np.uint8), np.array([[1, np.nan], [1, 1]], np.float32))
    with pytest.raises(BundleError, match="holds logits that are not finite"):
        bundles.load(out, verify=False).golden()
    (out / "golden.npz").write_bytes(b"not a zip")
    with pytest.raises(BundleError, match="cannot be read"):
        bundles.load(out, verify=False).golden()


def test_one_golden_clip_of_an_older_bundle_is_still_read(out: Path) -> None:
    np.savez(out / "golden.npz", frames=np.zeros(CONTRACT.shape, np.uint8), logits=np.ones(2, np.float32))
    edit(out, parity={"max_abs_error": 1e-6})
    frames, logits = bundles.load(out, verify=False).golden()
    assert (frames.shape, logits.shape) == ((1, *CONTRACT.shape), (1, 2))


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": ["b", "a"]},
        {"input": {"fps": 30.0}},
        {"input": {"mean": [0.45, 0.45, 0.45]}},
        {"input": {"std": [0.3, 0.3, 0.3]}},
        {"input": {"resize": "stretch"}},
        {"target": "onnx-fp16", "precision": "fp16"},
        {"checkpoint": {"name": "x", "source": "x", "sha256": "1" * 64}},
    ],
)
def test_an_edited_manifest_is_not_that_of_the_golden_clips(out: Path, changes: dict[str, Any]) -> None:
    """Every hash in it still fits: only what was proven tells."""
    given = {key: CONTRACT.to_json() | value if key == "input" else value for key, value in changes.items()}
    edit(out, **given)
    with pytest.raises(BundleError, match="not those that were proven: somebody has edited it"):
        bundles.load(out).golden()


def test_bundle_is_frozen(out: Path) -> None:
    read = bundles.load(out)
    assert replace(read, batch=2).batch == 2
    with pytest.raises(AttributeError):
        read.batch = 2  # type: ignore[misc]


def test_the_manifest_as_it_is_written(out: Path) -> None:
    text = (out / MANIFEST).read_text()
    data = json.loads(text)
    assert text == json.dumps(data, indent=2) + "\n"
    assert (data["schema"], data["name"], data["artifact"], data["batch"]) == (2, "x.onnx-fp32", "model.onnx", 1)
    assert (data["status"], data["precision"], data["backend"]) == ("built", "fp32", "onnxruntime")
    assert list(data["files"]) == ["golden.npz", "model.onnx"]
    digest = hashlib.sha256(b"weights").hexdigest()
    assert data["files"]["model.onnx"] == {"bytes": 7, "sha256": digest}


def test_what_belongs_to_the_proof_is_not_the_artifact_s_size(out: Path) -> None:
    for name, size in (("calibration.json", 10), ("calibration.npy", 100), ("model.onnx.data", 1000)):
        (out / name).write_bytes(bytes(size))
    assert bundles.seal(bundles.load(out, verify=False)).artifact_bytes == 7 + 1000


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 5 << 19])
def test_hashes_of_files_larger_than_a_piece(tmp_path: Path, size: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "x").write_bytes(data[:size])
    assert bundles.sha256(tmp_path / "x") == hashlib.sha256(data[:size]).hexdigest()


def test_a_file_of_another_size_or_content(out: Path) -> None:
    for data in (b"weight", b"weights ", b"Weights"):
        (out / "model.onnx").write_bytes(data)
        with pytest.raises(BundleError, match=r"model\.onnx is not the file that was proven"):
            bundles.load(out).verify()
    (out / "model.onnx").write_bytes(b"weights")
    bundles.load(out).verify()


def test_a_signal_before_the_folder_is_there_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Path, **_: Any) -> None:
        if bundles.STAGED in self.name:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "mkdir", interrupted)
    with pytest.raises(KeyboardInterrupt), bundles.staging(tmp_path / "x"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_staged_bundle_is_hidden_and_locked(tmp_path: Path) -> None:
    def stage() -> None:
        with bundles.staging(tmp_path / "a" / "x") as folder:
            assert folder.parent == tmp_path / "a"
            assert sorted(p.suffix for p in folder.parent.iterdir()) == [".lock", ".staging"]
            assert all(p.name.startswith(".edgetube-") for p in folder.parent.iterdir())
            raise RuntimeError

    for _ in range(2):
        with pytest.raises(RuntimeError):
            stage()
    assert list((tmp_path / "a").iterdir()) == []


def test_files_of_others_are_not_swept(out: Path) -> None:
    theirs = out.parent / "notes.staging"
    theirs.mkdir()
    write(out.parent / "y")
    assert theirs.is_dir()


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match=r"cannot write to .*file: "), bundles.staging(tmp_path / "file" / "x"):
        pass


def test_a_manifest_that_cannot_be_read(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(strict, "read_json", refuse)
    with pytest.raises(BundleError, match=r"edgetube\.json cannot be read: Permission denied"):
        bundles.load(out)
