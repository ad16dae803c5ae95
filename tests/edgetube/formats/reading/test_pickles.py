"""What training scripts leave in files of `torch.save` is read; nothing in them runs."""

from __future__ import annotations

import argparse
import functools
import os
import pathlib
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgetube.errors import CheckpointError
from edgetube.formats.reading import pickles

STATE = {"a.weight": torch.ones(2, 3)}
BOTH = pytest.mark.parametrize("zipped", [True, False])
"""The present form, and that before PyTorch 1.6."""


def saved(value: Any, path: Path, zipped: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


@BOTH
def test_options_and_numbers_beside_the_weights(zipped: bool, tmp_path: Path) -> None:
    beside = {
        "args": argparse.Namespace(lr=0.1, out=pathlib.PosixPath("/data"), mean=np.array([0.5, 0.25])),
        "best": np.float64(0.75), "count": np.int64(3), "flag": np.bool_(True), "half": np.float16(0.5),
        "names": np.array(["a", "b"]), "rng": torch.get_rng_state(), "size": torch.Size([3, 4]),
    }  # fmt: skip
    found = pickles.load(saved({"model": STATE, **beside}, tmp_path / "m.pth", zipped))
    assert torch.equal(found["model"]["a.weight"], STATE["a.weight"])
    assert (found["best"], found["count"], found["args"].lr) == (0.75, 3, 0.1)
    assert (str(found["args"].out), found["args"].mean.tolist()) == ("/data", [0.5, 0.25])
    assert found["names"].tolist() == ["a", "b"]


def renamed(path: Path, old: bytes, new: bytes) -> Path:
    """The archive with another name of a module in its pickle, as another version of a library writes it."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    changed = path.with_name(f"renamed-{path.name}")
    with zipfile.ZipFile(changed, "w") as archive:
        for name, data in content.items():
            assert not name.endswith("data.pkl") or old in data
            archive.writestr(name, data.replace(old, new) if name.endswith("data.pkl") else data)
    return changed


def test_numbers_of_numpy_1(tmp_path: Path) -> None:
    """Its module is `numpy.core`; numpy 2 calls it `numpy._core`."""
    path = saved({"model": STATE, "best": np.float64(0.75)}, tmp_path / "m.pth")
    old = renamed(path, b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert pickles.load(old)["best"] == 0.75


def test_paths_of_windows_and_of_python_3_13(tmp_path: Path) -> None:
    path = saved({"model": STATE, "out": pathlib.PosixPath("/data")}, tmp_path / "m.pth")
    assert str(pickles.load(renamed(path, b"pathlib\nPosixPath", b"pathlib._local\nPosixPath"))["out"]) == "/data"
    found = pickles.load(renamed(path, b"pathlib\nPosixPath", b"pathlib\nWindowsPath"))["out"]
    assert isinstance(found, pathlib.PureWindowsPath)


class Runs:
    """Code that runs when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@BOTH
@pytest.mark.parametrize(
    ("function", "named"),
    [(os.mkdir, "mkdir"), (os.system, "system"), (exec, "exec"), (functools.partial, "functools.partial")],
)
def test_nothing_is_executed(
    function: Callable[..., Any], named: str, zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argument = {os.system: "mkdir made", exec: "import os; os.mkdir('made')"}.get(function, "made")
    target: Any = os.mkdir if function is functools.partial else argument
    path = saved({"model": STATE, "x": Runs(function, target)}, tmp_path / "m.pth", zipped)
    with pytest.raises(CheckpointError, match=f"holds Python objects, .*{named}.*, which are not loaded because"):
        pickles.load(path)
    assert not (tmp_path / "made").exists()


def test_the_code_above_would_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Runs(os.mkdir, "made")))
    assert (tmp_path / "made").is_dir()


@BOTH
def test_whole_modules_are_refused_by_name(zipped: bool, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds Python objects, .*torch\.nn\.modules\.linear\.Linear"):
        pickles.load(saved(torch.nn.Linear(2, 2), tmp_path / "m.pt", zipped))


def test_torchscript_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "clip.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py", "version"):
            archive.writestr(f"clip/{name}", b"")
    with pytest.raises(CheckpointError, match=r"TorchScript archive.*torch\.jit\.load\(path, map_location='cpu'\)"):
        pickles.load(tmp_path / "clip.pt")


def test_what_torchscript_writes_has_these_names(tmp_path: Path) -> None:
    """The archive above is a double: making a real one is deprecated, and warns."""
    with pytest.warns(DeprecationWarning, match="jit"):
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "real.pt")
    with pytest.raises(CheckpointError, match="TorchScript archive"):
        pickles.load(tmp_path / "real.pt")


def test_archives_that_are_cut_off_or_of_something_else(tmp_path: Path) -> None:
    data = saved(STATE, tmp_path / "m.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="cut off or damaged"):
        pickles.load(tmp_path / "cut.pt")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("model/weights.bin", b"x")
    with pytest.raises(CheckpointError, match=r"a zip archive, and not one of torch\.save"):
        pickles.load(tmp_path / "other.pt")
