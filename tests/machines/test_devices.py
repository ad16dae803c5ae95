"""Devices of another processor, from nothing but Python, and from nothing: `--on` makes an environment there."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgetube import demo
from edgetube.remote import adb, portable
from edgetube.runtime import Runtime

SCRIPTED_ADB = Path(__file__).parents[1] / "edgetube" / "remote" / "scripted_adb.py"

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


@pytest.fixture
def phone(emulation: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder, and in `EDGETUBE_ADB` a scripted adb that sees one phone: aarch64, a shell, no libc, no Python."""
    folder = emulation.CACHE / "phone"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        described = emulation.phone(folder)
        emulation.portable_python(folder)
    except emulation.Absent as error:
        pytest.skip(str(error))
    (folder / "phones.json").write_text(json.dumps({"PHONE": described}))
    monkeypatch.setenv("EDGETUBE_ADB", shlex.join([sys.executable, str(SCRIPTED_ADB), str(folder / "phones.json")]))
    monkeypatch.setenv("EDGETUBE_CACHE", str(tmp_path))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_a_phone_without_python_answers_with_one_that_is_pushed(
    phone: Path,
    tiny_bundle: Path,
    edgetube_cli: Callable[..., tuple[int, str, str]],
) -> None:
    """Not an Android: an aarch64 root under QEMU, and a program in the place of adb's client (see `phone`)."""
    code, out, err = edgetube_cli("doctor", tiny_bundle, "--on", "adb://PHONE")
    assert code == 1
    assert "there is no python3" in out + err
    assert "edgetube.remote.portable" in out + err

    lines = portable.push(phone / "python")
    subprocess.run(["sh", "-ec", "\n".join([f'adb() {{ {os.environ["EDGETUBE_ADB"]} "$@"; }}', *lines])], check=True)

    code, out, err = edgetube_cli("doctor", tiny_bundle, "--on", "adb://PHONE", "--json")
    assert (code, [check["name"] for check in json.loads(out) if not check["ok"]]) == (0, []), err
    clip = demo.videos()["pan-left"]
    code, out, err = edgetube_cli("run", tiny_bundle, clip, "--on", "adb://", "--json")
    assert code == 0, err
    with Runtime(tiny_bundle) as runtime:
        here = runtime.predict(clip)
    assert json.loads(out)["logits"] == pytest.approx(list(here.logits), abs=0.02 * max(map(abs, here.logits)))
    made = phone / "phone" / adb.FOLDER.strip("/") / "device" / "environments"
    (programs,) = made.glob("*/bin")
    assert str((programs / "python3").readlink()) == f"{adb.PYTHON}/bin/python3"  # a path of the phone
