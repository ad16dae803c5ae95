"""What is said to be missing is missing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgetube import export, targets
from edgetube.precision import Precision


class Driver:
    def __init__(self, starts: int = 0, gpus: int = 1) -> None:
        self.starts, self.gpus = starts, gpus

    def cuInit(self, _: Any) -> Any:
        return self.starts

    def cuDeviceGetCount(self, pointer: Any) -> int:
        pointer._obj.value = self.gpus
        return 0


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    targets._gpus.cache_clear()
    yield
    targets._gpus.cache_clear()


def test_modules() -> None:
    assert targets.missing(("json", "abacus", "abacus.beads", "os.path")) == ("abacus", "abacus.beads")


def test_one_of_two_is_enough() -> None:
    assert targets.missing(("abacus|json",)) == ()
    assert targets.missing(("abacus|quipu",)) == ("abacus or quipu",)


def test_a_folder_of_type_stubs_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stubbed").mkdir()
    (tmp_path / "stubbed" / "__init__.pyi").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert not targets.installed("stubbed")


@pytest.mark.parametrize(
    ("driver", "there"), [(Driver(), True), (Driver(gpus=0), False), (Driver(starts=100), False), (None, False)]
)
def test_a_gpu_is_there_when_its_driver_says_so(monkeypatch: pytest.MonkeyPatch, driver: Any, there: bool) -> None:
    def load(_: Any) -> Any:
        if driver is None:
            raise OSError("libcuda.so.1: cannot open shared object file")
        return driver

    monkeypatch.setattr("edgetube.targets.ctypes.CDLL", load)
    assert (targets.missing((targets.GPU,)) == ()) is there


def test_platforms() -> None:
    here = {"linux": "Linux", "darwin": "macOS", "win32": "Windows"}[sys.platform]
    assert targets.missing(tuple(targets.PLATFORMS)) == tuple(name for name in targets.PLATFORMS if name != here)


@pytest.mark.parametrize(
    ("build", "run", "remedy"),
    [
        (("json",), ("json",), ""),
        (("abacus",), ("json",), "pip install 'edgetube[beads]'"),
        (("json",), ("abacus|quipu",), "pip install 'edgetube[beads]'"),
        (("json",), ("Atlantis",), ""),
        (("json",), (targets.GPU, "abacus"), ""),
        (("abacus",), ("Atlantis", "abacus"), "pip install 'edgetube[beads]'"),
    ],
    ids=["all there", "to build", "to run", "no such system here", "no GPU for the package", "to build at least"],
)
def test_a_remedy_is_what_pip_can_bring(
    monkeypatch: pytest.MonkeyPatch, build: tuple[str], run: tuple[str, ...], remedy: str
) -> None:
    """A pip line brings neither a Mac nor a GPU, and a package that runs on one of these only is of no use without."""
    monkeypatch.setitem(targets.PLATFORMS, "Atlantis", "atlantis")
    monkeypatch.setattr("edgetube.targets.ctypes.CDLL", lambda _: Driver(gpus=0))
    target = targets.Target("x-fp32", Precision.FP32, "x", "for the test", build, run, extra="beads")
    assert target.remedy == remedy


def test_a_setting_goes_to_the_targets_that_have_it() -> None:
    both = [export.target(name) for name in ("onnx-fp32", "onnx-int8")]
    plain, integer = targets.choose(both, {"cpu": "arm"})
    assert plain == both[0]
    assert (integer.setting("cpu"), both[1].setting("cpu")) == ("arm", "any")
