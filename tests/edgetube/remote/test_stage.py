"""Files on a device: by their sha256, resumed, verified, complete or not there."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgetube.errors import DeviceError
from edgetube.remote import bootstrap, stage
from edgetube.remote.stage import Store

DATA = bytes(range(256)) * 40
DIGEST = hashlib.sha256(DATA).hexdigest()
ELSEWHERE = "look for another disk"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "device", ELSEWHERE)


def put(store: Store, data: bytes = DATA, step: int = 1000, offset: int = 0, clips: bool = False) -> str:
    digest = hashlib.sha256(data).hexdigest()
    for start in range(offset, max(len(data), 1), step):
        store.put(digest, start, len(data), (data[start : start + step],), clips=clips)
    return digest


class TestFiles:
    def test_a_file_in_pieces(self, store: Store) -> None:
        assert store.have([DIGEST]) == {DIGEST: 0}
        assert put(store) == DIGEST
        assert store.have([DIGEST]) == {DIGEST: -1}
        assert store.read(DIGEST) == DATA

    def test_an_empty_file(self, store: Store) -> None:
        digest = put(store, b"")
        assert store.read(digest) == b""

    def test_it_goes_on_where_it_broke_off(self, store: Store) -> None:
        store.put(DIGEST, 0, len(DATA), (DATA[:3000],))
        assert Store(store.root, ELSEWHERE).have([DIGEST]) == {DIGEST: 3000}
        put(store, offset=3000)
        assert store.read(DIGEST) == DATA

    def test_a_damaged_file_is_refused_and_sent_again(self, store: Store) -> None:
        store.put(DIGEST, 0, len(DATA), (DATA[:3000],))
        with pytest.raises(DeviceError, match="arrived damaged"):
            store.put(DIGEST, 3000, len(DATA), (b"x" * (len(DATA) - 3000),))
        assert store.have([DIGEST]) == {DIGEST: 0}

    def test_a_file_that_decayed_is_sent_again(self, store: Store) -> None:
        put(store)
        (store.root / "files" / DIGEST).write_bytes(DATA[:-1] + b"?")
        assert store.have([DIGEST]) == {DIGEST: 0}

    @pytest.mark.parametrize("digest", ["../../etc/passwd", "", "A" * 64, "a" * 63])
    def test_only_digests_are_names(self, store: Store, digest: str) -> None:
        with pytest.raises(DeviceError, match="is no sha256"):
            store.put(digest, 0, 1, (b"x",))

    def test_a_full_disk(self, store: Store) -> None:
        message = r"its disk is full: 1000000000 MB more are needed, \d+ MB are free in .*, or look for another disk$"
        with pytest.raises(DeviceError, match=message):
            store.put(DIGEST, 0, 10**15, (b"x",))

    def test_a_disk_that_fills_up(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(DeviceError, match="its disk is full"):
            put(store)

    def test_what_is_not_used_for_long_is_removed(self, store: Store) -> None:
        old, new = put(store), put(store, b"new")
        long_ago = time.time() - 2 * stage.KEEP_S
        os.utime(store.root / "files" / old, (long_ago, long_ago))
        assert Store(store.root, ELSEWHERE).have([old, new]) == {old: 0, new: -1}

    def test_a_clock_that_was_set_back_removes_nothing(self, store: Store) -> None:
        digest = put(store)
        later = time.time() + 10 * stage.KEEP_S
        os.utime(store.root / "files" / digest, (later, later))
        assert Store(store.root, ELSEWHERE).have([digest]) == {digest: -1}


class TestClips:
    def put(self, store: Store, count: int) -> list[str]:
        """So many clips of 1000 bytes, each a second newer than the last."""
        digests = [put(store, bytes([number]) * 1000, clips=True) for number in range(count)]
        for age, digest in enumerate(reversed(digests)):
            at = time.time() - age - 1
            os.utime(store.root / "clips" / digest, (at, at))
        return digests

    def test_the_oldest_leave_when_others_come(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        bundle, clips = put(store), self.put(store, 5)
        assert store.have(clips, clips=True) == dict.fromkeys(clips, -1)
        self.put(store, 5)
        monkeypatch.setattr(stage, "CLIPS", 3000)
        new = hashlib.sha256(b"new").hexdigest()
        assert store.have([new], clips=True) == {new: 0}
        assert {path.name for path in (store.root / "clips").iterdir()} == {*clips[2:]}
        assert store.read(clips[2], clips=True) == bytes([2]) * 1000
        assert store.have([bundle]) == {bundle: -1}

    def test_those_that_are_asked_for_stay(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of one answer there may be more than are kept."""
        clips = self.put(store, 5)
        monkeypatch.setattr(stage, "CLIPS", 2000)
        assert store.have(clips[:4], clips=True) == dict.fromkeys(clips[:4], -1)
        assert {path.name for path in (store.root / "clips").iterdir()} == {*clips[:4]}

    def test_they_take_at_most_half_of_a_small_disk(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        clips = self.put(store, 5)
        monkeypatch.setattr("edgetube.remote.stage.shutil.disk_usage", lambda _: SimpleNamespace(free=3000))
        store.have([], clips=True)
        assert {path.name for path in (store.root / "clips").iterdir()} == {*clips[1:]}

    def test_they_are_kept_for_a_week(self, store: Store) -> None:
        (clip,) = self.put(store, 1)
        long_ago = time.time() - stage.KEEP_S / 7
        os.utime(store.root / "clips" / clip, (long_ago, long_ago))
        assert Store(store.root, ELSEWHERE).have([clip], clips=True) == {clip: 0}


class TestIdentity:
    def test_it_is_of_the_folder(self, store: Store, tmp_path: Path) -> None:
        assert re.fullmatch("[0-9a-f]{32}", store.id)
        assert Store(store.root, ELSEWHERE).id == store.id
        assert Store(tmp_path / "other", ELSEWHERE).id != store.id

    def test_one_that_was_not_written_to_the_end_is_made_again(self, store: Store) -> None:
        (store.root / "identity" / "id").write_text("")
        found = Store(store.root, ELSEWHERE).id
        assert re.fullmatch("[0-9a-f]{32}", found)
        assert Store(store.root, ELSEWHERE).id == found


class TestTrees:
    def test_a_folder_of_files(self, store: Store) -> None:
        other = put(store, b"other")
        files = {"bundle/edgetube.json": put(store), "bundle/model/weights.bin": other}
        place = Path(store.tree(files))
        assert (place / "bundle" / "edgetube.json").read_bytes() == DATA
        assert (place / "bundle" / "model" / "weights.bin").read_bytes() == b"other"
        assert store.tree(files) == str(place)
        assert list((store.root / "parts").iterdir()) == []

    def test_a_folder_that_lost_a_file_is_made_again(self, store: Store) -> None:
        place = Path(store.tree({"a": put(store), "b": put(store, b"b")}))
        (place / "b").unlink()
        assert (Path(store.tree({"a": DIGEST, "b": put(store, b"b")})) / "b").read_bytes() == b"b"

    def test_a_file_that_decayed_is_that_of_the_store_again(self, store: Store) -> None:
        """The file of a folder is a link to that of the store, so both decay; the store's is sent again."""
        place = Path(store.tree({"a": put(store)}))
        (place / "a").write_bytes(DATA[:-1] + b"?")
        assert store.have([DIGEST]) == {DIGEST: 0}
        assert (Path(store.tree({"a": put(store)})) / "a").read_bytes() == DATA

    def test_a_file_system_without_links(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", fail)
        place = Path(store.tree({"a": put(store)}))
        before = (place / "a").stat().st_ino
        assert (Path(store.tree({"a": DIGEST})) / "a").stat().st_ino == before
        (place / "a").write_bytes(DATA[:-1] + b"?")
        assert (Path(store.tree({"a": DIGEST})) / "a").read_bytes() == DATA

    def test_a_name_that_leaves_the_folder(self, store: Store) -> None:
        with pytest.raises(DeviceError, match="leaves its folder"):
            store.tree({"../../x": put(store)})


class TestEnvironments:
    def test_wheels_become_an_environment(self, store: Store) -> None:
        wheel = io.BytesIO()
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("thing/__init__.py", "value = 42\n")
            archive.writestr("thing-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: thing\nVersion: 1\n")
            archive.writestr("thing-1.data/purelib/more.py", "value = 43\n")
            archive.writestr("thing-1.data/scripts/thing", "no\n")
        assert store.environment(DIGEST) is None
        python = store.environment(DIGEST, [put(store, wheel.getvalue())])
        assert python is not None
        script = "import thing, more, importlib.metadata as m; print(thing.value, more.value, m.version('thing'))"
        assert subprocess.run([python, "-c", script], capture_output=True, text=True).stdout == "42 43 1\n"
        assert store.environment(DIGEST) == python
        assert store.environment(hashlib.sha256(b"other").hexdigest()) is None
        (Path(python).parent.parent / "made").unlink()
        assert store.environment(DIGEST) is None
        assert store.environment(DIGEST, []) == python
        assert list((store.root / "parts").iterdir()) == []

    def test_one_that_cannot_be_made(self, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        broken = tmp_path / "python3"
        broken.write_text("#!/bin/sh\necho No module named venv >&2\nexit 1\n")
        broken.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(broken))
        with pytest.raises(DeviceError, match=r"No module named venv; on Debian: apt-get install python3-venv"):
            store.environment(DIGEST, [])
        assert list((store.root / "parts").iterdir()) == []


class TestStart:
    @pytest.mark.parametrize("made", [True, False])
    def test_packages_of_the_user_are_for_the_user_s_python_only(
        self, made: bool, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        python, started = str(store.root / "environments" / "x" / "bin" / "python") if made else sys.executable, []

        def execv(path: str, words: list[str]) -> None:
            started.append((path, words[-1], os.environ.get("PYTHONNOUSERSITE"), os.environ["EDGETUBE_CACHE"]))

        monkeypatch.setenv("EDGETUBE_CACHE", "x")
        monkeypatch.setenv("PYTHONNOUSERSITE", "")  # so that what `start` sets is undone
        monkeypatch.setattr(os, "execv", execv)
        monkeypatch.setattr(os, "dup2", lambda *_: None)
        stage.start(python, store, 1)
        assert started == [(python, ELSEWHERE, "1" if made else "", str(store.root.parent))]


class TestFolder:
    @pytest.fixture(autouse=True)
    def temporary(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A home, and folders in the place of /var/tmp and /tmp."""
        monkeypatch.setattr(stage, "TEMPORARY", (tmp_path / "nothing" / "var", tmp_path / "temporary"))
        (tmp_path / "nothing").touch()
        (tmp_path / "home").mkdir()
        monkeypatch.delenv("EDGETUBE_CACHE", raising=False)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def test_the_chosen_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("EDGETUBE_CACHE", str(tmp_path / "x"))
        assert stage.folder(ELSEWHERE) == tmp_path / "x" / "device"

    def test_a_relative_one_is_below_the_folder_of_the_login(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The first program changes into its own folder."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("EDGETUBE_CACHE", "x")
        assert stage.folder(ELSEWHERE) == tmp_path / "x" / "device"

    def test_a_chosen_one_that_cannot_be_written_is_not_replaced(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("EDGETUBE_CACHE", str(tmp_path / "file"))
        message = r"no folder there can be written \(.*file: File exists\); look for another disk$"
        with pytest.raises(DeviceError, match=message):
            stage.folder(ELSEWHERE)

    def test_that_of_the_user_s_home(self, tmp_path: Path) -> None:
        assert stage.folder(ELSEWHERE) == tmp_path / "home" / ".cache" / "edgetube" / "device"

    def test_a_home_that_cannot_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path / "nothing"))
        found = stage.folder(ELSEWHERE)
        assert found == tmp_path / "temporary" / f"edgetube-{os.getuid()}" / "device"
        assert found.parent.stat().st_mode & 0o077 == 0

    def test_a_link_of_the_user_s_own_is_followed(self, tmp_path: Path) -> None:
        """Many have their cache on a larger disk."""
        (tmp_path / "disk").mkdir()
        (tmp_path / "home" / ".cache").mkdir()
        (tmp_path / "home" / ".cache" / "edgetube").symlink_to(tmp_path / "disk")
        assert stage.folder(ELSEWHERE) == tmp_path / "home" / ".cache" / "edgetube" / "device"

    @pytest.mark.skipif(os.geteuid() != 0, reason="a file is given to another user by root only")
    @pytest.mark.parametrize("whose", ["link", "folder"])
    def test_somebody_else_s_folder_is_not_taken(self, whose: str, tmp_path: Path) -> None:
        """A link that was laid in /var/tmp or /tmp would lead files elsewhere."""
        (tmp_path / "elsewhere").mkdir()
        link = tmp_path / "home" / ".cache" / "edgetube"
        link.parent.mkdir()
        link.symlink_to(tmp_path / "elsewhere")
        os.chown(link, 12345, 12345, follow_symlinks=whose == "folder")
        assert stage.folder(ELSEWHERE) == tmp_path / "temporary" / f"edgetube-{os.getuid()}" / "device"


class TestCode:
    def test_an_installed_wheel_is_the_code_that_runs_here(self, tmp_path: Path) -> None:
        made = bootstrap.wheel()
        assert made == bootstrap.wheel()
        with zipfile.ZipFile(io.BytesIO(made)) as archive:
            assert archive.testzip() is None
            archive.extractall(tmp_path)
        assert stage.code(tmp_path / "edgetube") == bootstrap.code()
        (tmp_path / "edgetube" / "wire.py").write_text("")
        assert stage.code(tmp_path / "edgetube") != bootstrap.code()

    def test_the_wheel_has_the_packages_of_the_project_and_no_studies(self) -> None:
        names = set(bootstrap.modules())
        assert {"edgetube/__main__.py", "edgetube/bench/worker.py", "edgetube/runtimes/base.py"} <= names
        assert not [name for name in names if "studies" in name or "photos" in name]
