"""A device of another processor, from nothing but Python: `--on` makes its environment there, and it answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgetube import demo
from edgetube.runtime import Runtime

pytestmark = [pytest.mark.machines, pytest.mark.long]


@pytest.fixture
def device(emulation: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The address of an aarch64 Debian without packages of Python."""
    folder = emulation.CACHE / "device"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        monkeypatch.setenv("EDGETUBE_SSH", str(emulation.aarch64_device(folder)))
    except emulation.Absent as error:
        pytest.skip(str(error))
    monkeypatch.setenv("EDGETUBE_CACHE", str(tmp_path))
    yield "ssh://emulated"
    shutil.rmtree(folder, ignore_errors=True)


def test_a_bare_aarch64_answers_like_this_machine(
    device: str, tiny_bundle: Path, edgetube_cli: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = edgetube_cli("doctor", tiny_bundle, "--on", device, "--json")
    assert (code, [check["name"] for check in json.loads(out) if not check["ok"]]) == (0, []), err
    clip = demo.videos()["pan-left"]
    code, out, err = edgetube_cli("run", tiny_bundle, clip, "--on", device, "--json")
    assert code == 0, err
    with Runtime(tiny_bundle) as runtime:
        here = runtime.predict(clip)
    assert json.loads(out)["logits"] == pytest.approx(list(here.logits), abs=0.02 * max(map(abs, here.logits)))
    code, out, err = edgetube_cli("parity", tiny_bundle, "--on", device, "--clips", "2", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["bundles"][0]["relative_error"] < 1e-4
    assert document["bundles"][0]["clips"] == 2
