"""What is Core AI's own; what every backend promises is in `test_conformance.py`."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgetube import bundle as bundles
from edgetube import runtimes
from edgetube.bundle import Bundle
from edgetube.errors import BackendError, BundleError, InputError
from edgetube.export import pipeline

pytest.importorskip("coreai", reason="needs Core AI: pip install 'edgetube[coreai]'", exc_type=ImportError)
pytest.importorskip("coreai_torch", reason="needs Core AI: pip install 'edgetube[coreai]'", exc_type=ImportError)

from edgetube.runtimes import coreai as runtime


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return pipeline.export_model("coreai-fp32", tiny_checkpoint, tmp_path_factory.mktemp("out"))


def test_every_file_of_the_asset_is_in_the_manifest(exported: Bundle) -> None:
    found = {f"model.aimodel/{path.name}" for path in exported.artifact_path.iterdir()}
    assert found == set(exported.artifact_files) >= {"model.aimodel/main.mlirb"}
    if runtime.SIMULATED:
        assert exported.build["lowering"]["chosen"] == "conv2d"
        assert exported.build["lowering"]["why"].startswith("not timed: ")


def test_it_may_be_called_from_a_thread_with_an_event_loop(exported: Bundle) -> None:
    frames, logits = exported.golden()

    async def inside() -> np.ndarray:
        return backend(frames)

    with runtimes.open_bundle(exported) as backend:
        np.testing.assert_allclose(asyncio.run(inside()), logits, atol=1e-4)
        assert backend.describe() == {"coreai": runtime.version(), "device": "cpu"}


@pytest.mark.parametrize("ending", ["pass", "raise SystemExit(3)", "runtime.close()"])
def test_a_process_may_end_a_moment_after_a_call(exported: Bundle, ending: str) -> None:
    code = f"""
import sys
from edgetube import bundle, runtimes
found = bundle.load(sys.argv[1])
runtime = runtimes.open_bundle(found)
runtime(found.golden()[0])
{ending}
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, exported.path], capture_output=True, text=True, check=False
    )
    assert done.returncode == (3 if "3" in ending else 0), done.stderr


def damaged(exported: Bundle, folder: Path, change: Callable[[Path], object]) -> Bundle:
    shutil.copytree(exported.path, folder / "bundle")
    change(folder / "bundle" / "model.aimodel")
    return replace(exported, path=folder / "bundle")


def set_program(content: bytes) -> Callable[[Path], object]:
    """Another program, with its hash."""

    def change(asset: Path) -> None:
        (asset / "main.mlirb").write_bytes(content)
        (asset / "main.hash").write_bytes(hashlib.sha256(content).digest())

    return change


def set_version(asset: Path) -> None:
    stated = json.loads((asset / "metadata.json").read_text())
    (asset / "metadata.json").write_text(json.dumps({**stated, "assetVersion": "99.0"}))


def cut(asset: Path) -> None:
    (asset / "main.mlirb").write_bytes((asset / "main.mlirb").read_bytes()[:1000])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_program(b"no program"), "its main.mlirb is not known to this version of Core AI: upgrade coreai-core"),
        (set_program(b"ML\xefR\x63MLIR99.0\x00"), "upgrade coreai-core, or export the bundle again"),
        (cut, "its main.mlirb is damaged, it is not that of its main.hash; export or copy the bundle again"),
        (set_version, 'Asset version "99.0" is not supported'),
        (lambda asset: (asset / "metadata.json").write_text("{"), "not in the correct format"),
        (lambda asset: (asset / "main.mlirb").unlink(), "No such file or directory"),
        (shutil.rmtree, "cannot open"),
    ],
)
def test_an_asset_that_cannot_be_read_is_one_line(
    exported: Bundle, tmp_path: Path, change: Callable[[Path], object], words: str
) -> None:
    """Core AI's compiler would end the process at some of them."""
    with pytest.raises(BackendError, match=r"^Core AI \S+: cannot open \S+model\.aimodel: [^\n]+$") as told:
        runtimes.open_bundle(damaged(exported, tmp_path, change))
    assert words in str(told.value)


def test_a_file_that_the_manifest_does_not_list_is_refused(exported: Bundle) -> None:
    files = {name: record for name, record in exported.files.items() if not name.endswith(".mlirb")}
    with pytest.raises(BundleError, match=r"'model\.aimodel/main\.mlirb' is not among the files"):
        runtimes.open_bundle(replace(exported, files=files))
    bundles.load(exported.path)


def test_devices_and_threads(exported: Bundle) -> None:
    with pytest.raises(InputError, match="no device is called 'abacus' here; Core AI knows cpu, gpu, ane"):
        runtimes.open_bundle(exported, device="abacus")
    assert not runtimes.takes_threads(exported.backend)
    with pytest.raises(InputError, match="threads is 2; Core AI chooses them itself"):
        runtimes.open_bundle(exported, threads=2)


@pytest.mark.skipif(sys.platform == "darwin", reason="there are other devices")
def test_other_devices_need_macos(exported: Bundle) -> None:
    with pytest.raises(InputError, match="the device 'ane' needs macOS 27 or newer; on Linux Core AI computes"):
        runtimes.open_bundle(exported, device="ane")
