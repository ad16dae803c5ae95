"""What pip gives: the wheel without constraints, on every Python that it allows, newest and oldest packages."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgetube import demo, export

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text("utf-8")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
BASE = [t.name for t in export.targets().values() if t.run_needs == ("onnxruntime",)]

ON_ANOTHER = "6"
"""Windows that are answered on an emulated processor without VNNI, where one takes seconds."""


SYSTEM_CERTIFICATES = {"UV_SYSTEM_CERTS": "true", "UV_NATIVE_TLS": "true"}
"""uv trusts whom pip trusts, also behind a company's proxy; two names, by its version."""


def interpreter(version: str) -> str:
    """A Python of that version: on the PATH, or one that pyenv keeps. Skips where there is none."""
    kept = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [shutil.which(f"python{version}"), *map(str, sorted(kept.glob(f"{version}.*/bin/python"), reverse=True))]
    for path in filter(None, found):
        asked = subprocess.run([path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True)
        if asked.stdout.decode().strip() == version:
            return path
    pytest.skip(f"no Python {version} here")


@pytest.fixture(scope="session")
def resolver(tmp_path_factory: pytest.TempPathFactory) -> str:
    """uv, in an environment of its own: it can take the lowest versions that have a wheel for an interpreter."""
    folder = tmp_path_factory.mktemp("uv")
    run([sys.executable, "-m", "venv", folder])
    run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv"])
    return str(folder / "bin" / "uv")


@pytest.fixture(scope="session")
def bundles(exported: Callable[..., Path]) -> dict[str, Path]:
    """The built-in model for the runtime of the base install."""
    return {name: exported(name) for name in BASE}


def run(command: Sequence[str | Path], folder: Path | None = None) -> str:
    """Standard output of a command; where it fails, its last words are the test's."""
    environment = {**os.environ, **SYSTEM_CERTIFICATES}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, f"{command[1:4]}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def newest(python: Path, wheel: Path, _: Callable[[], str]) -> None:
    """As a user would."""
    run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel])


def oldest(python: Path, wheel: Path, resolver: Callable[[], str]) -> None:
    """Of each direct dependency the lowest version that pyproject allows and that has a wheel for this Python."""
    pip: list[str | Path] = [resolver(), "pip", "install", "--quiet", "--python", python]
    run([*pip, "--resolution=lowest-direct", "--no-build", "-r", ROOT / "pyproject.toml"])
    run([*pip, "--no-deps", wheel])


@pytest.fixture(
    params=[(version, ages) for version in PYTHONS for ages in (newest, oldest)],
    ids=lambda p: f"{p[0]}-{p[1].__name__}",
)
def installed(request: pytest.FixtureRequest, wheel: Path, tmp_path: Path) -> Iterator[Path]:
    """The folder of an environment that holds the wheel and what was installed with it."""
    version, install = request.param
    environment = tmp_path / "venv"
    run([interpreter(version), "-m", "venv", environment])
    install(environment / "bin" / "python", wheel, lambda: request.getfixturevalue("resolver"))
    yield environment
    shutil.rmtree(environment)


@pytest.mark.machines
def test_an_install_without_constraints_runs_what_was_exported(
    installed: Path,
    bundles: dict[str, Path],
    windows: Path,
    emulation: SimpleNamespace,
    tmp_path: Path,
) -> None:
    edgetube, python = installed / "bin" / "edgetube", installed / "bin" / "python"
    video = demo.videos()["pan-left"]
    for bundle in bundles.values():
        run([edgetube, "doctor", bundle], tmp_path)
        (line,) = run([edgetube, "run", bundle, video, "--json"], tmp_path).splitlines()
        assert json.loads(line)["label"] == video.stem
    (name,) = (name for name in bundles if export.target(name).precision.quantises_activations)
    run([python, HERE / "windows.py", "judge", bundles[name], windows], tmp_path)
    try:
        elsewhere = emulation.x86("Haswell", python)
    except emulation.Absent:
        return
    done = elsewhere.run(HERE / "windows.py", "judge", bundles[name], windows, ON_ANOTHER)
    assert done.returncode == 0, f"{done.stdout}{done.stderr[-2000:]}"


def test_every_python_that_is_allowed_is_tried() -> None:
    (lowest,) = re.findall(r'requires-python = ">=([\d.]+)"', PYPROJECT)
    assert lowest == PYTHONS[0]
