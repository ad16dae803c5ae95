"""Sets of clips from whatever people have, sampled by name and not by order."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgetube import datasets, demo, preprocess, video
from edgetube.contract import InputContract
from edgetube.datasets import ClipSet, Item
from edgetube.errors import InputError
from edgetube.video import Clip
from edgetube.views import SINGLE, Views

CONTRACT = InputContract(4, 16, 24, fps=10.0)


@pytest.fixture
def clips(rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    return rng.integers(0, 256, (3, 4, 16, 24, 3), np.uint8)


def unread(names: Any, labels: Any) -> Any:
    return ClipSet(
        "x",
        tuple(
            Item(n, label, lambda _: Clip("unread", np.empty(0, np.uint8)))
            for n, label in zip(names, labels, strict=True)
        ),
    )


class TestSample:
    names = tuple(f"clip-{i}" for i in range(40))
    labels = ("a",) * 30 + ("b",) * 6 + ("c",) * 4

    def test_classes_are_as_equal_as_they_can_be(self) -> None:
        found = unread(self.names, self.labels).sample(15)
        assert Counter(item.label for item in found.items) == {"a": 6, "b": 5, "c": 4}

    def test_order_does_not_matter_but_the_seed_does(self) -> None:
        first = unread(self.names, self.labels).sample(10)
        second = unread(self.names[::-1], self.labels[::-1]).sample(10)
        assert [i.name for i in first.items] == [i.name for i in second.items]
        assert {i.name for i in first.items} != {i.name for i in unread(self.names, self.labels).sample(10, 1).items}

    def test_a_larger_sample_begins_with_a_smaller_one(self) -> None:
        whole = unread(self.names, self.labels)
        assert whole.sample(20).items[:7] == whole.sample(7).items
        assert whole.sample(100).count == 40


class TestArrays:
    def test_a_file_of_many_clips(self, clips: npt.NDArray[np.uint8], tmp_path: Path) -> None:
        np.savez(tmp_path / "set.npz", clips=clips, labels=np.array(["a", "b", "a"]))
        found = list(datasets.load(tmp_path / "set.npz").clips(CONTRACT))
        assert [(c.name, c.label) for c in found] == [("set#00000", "a"), ("set#00001", "b"), ("set#00002", "a")]
        np.testing.assert_array_equal([c.frames for c in found], clips)

    def test_a_folder_of_arrays_by_class(self, clips: npt.NDArray[np.uint8], tmp_path: Path) -> None:
        for i, label in enumerate(("run", "walk", "walk")):
            (tmp_path / label).mkdir(exist_ok=True)
            np.save(tmp_path / label / f"{i}.npy", clips[i])
        found = list(datasets.load(tmp_path).clips(CONTRACT))
        assert [(c.name, c.label) for c in found] == [
            ("run/0.npy", "run"),
            ("walk/1.npy", "walk"),
            ("walk/2.npy", "walk"),
        ]
        np.testing.assert_array_equal(found[1].frames, clips[1])

    @pytest.mark.parametrize(
        "change", [{"sampling": "stride", "stride": 4, "fps": None}, {"resize_size": 40}, {"filter": "bicubic"}]
    )
    def test_a_clip_that_is_ready_is_not_preprocessed_again(
        self, clips: npt.NDArray[np.uint8], tmp_path: Path, change: dict[str, Any]
    ) -> None:
        """What was stored for a contract reads back as it is; anything else is a source."""
        contract = replace(CONTRACT, **change)
        np.save(tmp_path / "set.npy", clips)
        for found, clip in zip(datasets.load(tmp_path / "set.npy").clips(contract), clips, strict=True):
            np.testing.assert_array_equal(found.frames, clip)
        longer = np.concatenate([clips[0], clips[1]])
        np.save(tmp_path / "longer.npy", longer)
        (found,) = datasets.load(tmp_path / "longer.npy").clips(contract)
        np.testing.assert_array_equal(found.frames, preprocess.prepare(longer, contract))

    def test_other_sizes_go_through_the_one_preprocessing(self, rng: np.random.Generator, tmp_path: Path) -> None:
        np.save(tmp_path / "large.npy", rng.integers(0, 256, (9, 32, 48, 3), np.uint8))
        (clip,) = datasets.load(tmp_path / "large.npy").clips(CONTRACT)
        assert clip.frames.shape == CONTRACT.shape

    @pytest.mark.parametrize(
        ("array", "message"),
        [
            (np.full((4, 16, 24, 3), np.nan, np.float32), "NaN or infinite pixels"),
            (np.zeros((4, 16, 24, 3), np.float32), "bad.npy: the frames: dtype float32; expected uint8"),
            (np.zeros((4, 16, 24), np.uint8), "bad.npy: the frames: shape"),
        ],
    )
    def test_bad_arrays_are_named(self, array: npt.NDArray[Any], message: str, tmp_path: Path) -> None:
        np.save(tmp_path / "bad.npy", array)
        with pytest.raises(InputError, match=message):
            list(datasets.load(tmp_path / "bad.npy").clips(CONTRACT))

    def test_labels_must_be_as_many(self, clips: npt.NDArray[np.uint8], tmp_path: Path) -> None:
        np.savez(tmp_path / "set.npz", clips=clips, labels=np.array(["a"]))
        with pytest.raises(InputError, match="3 clips and 1 labels"):
            datasets.load(tmp_path / "set.npz")

    def test_an_archive_of_something_else(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "set.npz", weights=np.zeros(3))
        with pytest.raises(InputError, match="holds weights; expected an array called frames or clips"):
            datasets.load(tmp_path / "set.npz")


class TestManifest:
    def test_rows_become_clips(self, clips: npt.NDArray[np.uint8], tmp_path: Path) -> None:
        video.write(tmp_path / "a.mp4", np.repeat(clips[0], 4, axis=0), 10.0)
        np.save(tmp_path / "b.npy", clips[1])
        (tmp_path / "set.csv").write_text("path,label,start\na.mp4,run,0.5\na.mp4,run,\nb.npy,walk,\n")
        found = list(datasets.load(tmp_path / "set.csv").clips(CONTRACT))
        assert [(c.name, c.label) for c in found] == [("a.mp4@0.5", "run"), ("a.mp4", "run"), ("b.npy", "walk")]
        assert found[0].start == pytest.approx(0.5, abs=0.11)

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    def test_encodings_that_a_mark_tells_apart(self, tmp_path: Path, encoding: str, end: str) -> None:
        (tmp_path / "Ünï, 影.mp4").touch()
        lines = ["path,label", "", '"Ünï, 影.mp4",é', ""]
        (tmp_path / "set.CSV").write_bytes(end.join(lines).encode(encoding))
        (item,) = datasets.load(tmp_path / "set.CSV").items
        assert (item.name, item.label) == ("Ünï, 影.mp4", "é")

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (
                "path\na.mp4\nÜ.mp4\n".encode("cp1252"),
                r"line 3: byte 0xdc is not UTF-8; save the file as UTF-8 \(in Excel",
            ),
            ("path\na.mp4\n".encode("utf-16-le"), "line 1 has a zero byte, as UTF-16 has it; save the file as UTF-8"),
            (b"\xff\xfep\x00a", "line 1: byte 0x61 is not UTF-16"),
            (b"\xff\xfep", "is not UTF-16"),
            (b"path,label\na.mp4,tilt\x00up\n", "line 2 has a zero byte"),
            (b'path,label\n"a.mp4,x\n', "line 2 is not CSV"),
            (b"path,label\na.mp4," + b"x" * 200_000 + b"\n", "line 2 is not CSV: field larger than field limit"),
        ],
    )
    def test_other_encodings_are_named_with_the_line(self, tmp_path: Path, data: bytes, message: str) -> None:
        (tmp_path / "a.mp4").touch()
        (tmp_path / "set.csv").write_bytes(data)
        with pytest.raises(InputError, match=message):
            datasets.load(tmp_path / "set.csv")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("file\nx.mp4\n", r"line 1 has the columns 'file'; expected path"),
            ("", "line 1 has the columns nothing"),
            ("path;label\nx;y\n", r"columns 'path;label'; expected path\[,label\]\[,start\], separated by commas"),
            ("path, label\nx,y\n", "columns 'path', ' label'"),
            ("path,path\nx,y\n", "columns 'path', 'path'"),
            ("\n\npath,label,split\nx,y,z\n", "line 3 has the columns 'path', 'label', 'split'"),
            ("path\nnone.mp4\n", "line 2: there is no file 'none.mp4'"),
            ("path\n", "names no clips"),
            ("path,start\na.mp4,soon\n", "start is 'soon'; expected seconds, like 1.5"),
            ('path,start\na.mp4,"0,5"\n', "start is '0,5'; expected seconds, like 1.5"),
            ("path,start\na.mp4,nan\n", "start is 'nan'; expected seconds from 0 on"),
            ("path,start\na.mp4,inf\n", "start is 'inf'"),
            ("path,start\na.mp4,-1\n", "start is '-1'"),
            ("label,path\nx\n", "line 2 has 1 cells; expected 2$"),
            ("path,label\na, b.mp4,x\n", "line 2 has 3 cells; expected 2; write names that have a comma in quotes"),
            ("path,label\na.mp4,x\n\n./a.mp4,y\n", r"line 4 names './a.mp4' again, as line 2 does"),
            ("path,start\na.mp4,1\na.mp4,1.0\n", "line 3 names 'a.mp4' again, as line 2 does"),
            ("path\nsub\n", "line 2: 'sub' is a folder; expected a file"),
            ("path\n a.mp4\n", "no file ' a.mp4'; there is one without the spaces around its name"),
            ("path\nsub\\b.mp4\n", r"there is one with / for \\"),
            ("path\ncafe\u0301.mp4\n", r"there is one in Unicode's composed form \(NFC\)"),
        ],
    )
    def test_mistakes_are_named(self, text: str, message: str, tmp_path: Path) -> None:
        (tmp_path / "sub").mkdir()
        for name in ("a.mp4", "sub/b.mp4", "caf\u00e9.mp4"):
            (tmp_path / name).touch()
        (tmp_path / "set.csv").write_text(text, "utf-8")
        with pytest.raises(InputError, match=message):
            datasets.load(tmp_path / "set.csv")

    def test_clips_late_in_a_long_video_have_names_of_their_own(self, tmp_path: Path) -> None:
        """Six digits are not enough behind a quarter of an hour; what they say exactly keeps its name."""
        (tmp_path / "a.mp4").touch()
        (tmp_path / "set.csv").write_text("path,start\na.mp4,1234.567\na.mp4,1234.5671\na.mp4,2.50\na.mp4,1e3\n")
        names = [item.name for item in datasets.load(tmp_path / "set.csv").items]
        assert names == ["a.mp4@1234.567", "a.mp4@1234.5671", "a.mp4@2.5", "a.mp4@1000"]

    def test_the_clip_is_named_when_its_start_is_outside(self, clips: np.ndarray, tmp_path: Path) -> None:
        video.write(tmp_path / "a.mp4", clips[0], 10.0)
        (tmp_path / "set.csv").write_text("path,start\na.mp4,60\n")
        with pytest.raises(InputError, match=r"a\.mp4: start is 60"):
            list(datasets.load(tmp_path / "set.csv").clips(CONTRACT))


class TestFolders:
    def test_linked_classes_hidden_files_and_suffixes_in_capitals(self, clips: np.ndarray, tmp_path: Path) -> None:
        store, folder = tmp_path / "store", tmp_path / "set"
        store.mkdir()
        (folder / "walk" / ".ipynb_checkpoints").mkdir(parents=True)
        np.save(store / "a.npy", clips[0])
        np.save(folder / "walk" / "b.npy", clips[1])
        (folder / "walk" / "b.npy").rename(folder / "walk" / "B.NPY")
        np.save(folder / "walk" / ".ipynb_checkpoints" / "b.npy", clips[2])
        (folder / "walk" / "._b.npy").write_bytes(b"\0\5\26\7")
        (folder / "walk" / "b.json").write_text("{}")
        (folder / "run").symlink_to(store)
        found = datasets.load(folder)
        assert [(c.name, c.label) for c in found.clips(CONTRACT)] == [("run/a.npy", "run"), ("walk/B.NPY", "walk")]
        assert found.notes == (f"1 file of {folder} left out, not clips: 1 .json",)
        assert found.sample(1).notes == found.notes

    def test_still_images_are_left_out_where_the_model_takes_clips(self, clips: np.ndarray, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", clips[0])
        (tmp_path / "a.jpg").touch()
        assert [item.name for item in datasets.load(tmp_path, CONTRACT).items] == ["a.npy"]
        assert [item.name for item in datasets.load(tmp_path, InputContract(1, 16, 24)).items] == ["a.jpg", "a.npy"]

    def test_a_damaged_file_is_missed_when_it_is_read(self, clips: np.ndarray, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", clips[0])
        (tmp_path / "b.npz").write_bytes(b"PK")
        (tmp_path / "c.mp4").symlink_to("nowhere")
        found = datasets.load(tmp_path)
        assert [item.name for item in found.items] == ["a.npy", "b.npz", "c.mp4"]
        for item, message in zip(found.items[1:], ("b.npz cannot be read", "c.mp4 is a link to nowhere"), strict=True):
            with pytest.raises(InputError, match=message):
                item.read(CONTRACT)
        assert found.sample(2).count == 2

    def test_names_that_are_not_text(self, clips: np.ndarray, tmp_path: Path) -> None:
        with open(os.fsencode(tmp_path) + b"/caf\xe9.npy", "wb") as file:  # noqa: PTH123
            np.save(file, clips[0])
        (clip,) = datasets.load(tmp_path).sample(1).clips(CONTRACT)
        assert os.fsencode(clip.name) == b"caf\xe9.npy"

    @pytest.mark.parametrize("kind", ["folder", "csv", "npy"])
    def test_a_set_does_not_move_with_the_current_folder(
        self, kind: str, clips: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        np.save(tmp_path / "a.npy", clips[0])
        (tmp_path / "set.csv").write_text("path\na.npy\n")
        monkeypatch.chdir(tmp_path)
        found = datasets.load({"folder": ".", "csv": "set.csv", "npy": "a.npy"}[kind])
        monkeypatch.chdir("/")
        (clip,) = found.clips(CONTRACT)
        np.testing.assert_array_equal(clip.frames, clips[0])
        assert found.source is not None
        assert datasets.load(found.source).items[0].version == found.items[0].version


def test_a_folder_mixes_videos_and_arrays(clips: npt.NDArray[np.uint8], tmp_path: Path) -> None:
    video.write(tmp_path / "a.mp4", clips[0], 10.0)
    np.save(tmp_path / "b.npy", clips[1])
    assert [c.name for c in datasets.load(tmp_path).clips(CONTRACT)] == ["a.mp4", "b.npy"]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no clips at"):
        datasets.load(tmp_path / "none")
    (tmp_path / "x.pdf").write_text("")
    with pytest.raises(InputError, match="not a set of clips"):
        datasets.load(tmp_path / "x.pdf")


def test_the_built_in_sets_are_those_of_the_demo() -> None:
    for given, expected in (
        (datasets.built_in(12, demo.LABELS), demo.evaluation(CONTRACT, 12)),
        (datasets.built_in_calibration(12, demo.LABELS), demo.calibration(CONTRACT, 12)),
    ):
        for a, item, b in zip(given.clips(CONTRACT), given.items, expected, strict=True):
            assert (a.name, a.label) == (item.name, item.label) == (b.name, b.label)
            np.testing.assert_array_equal(a.frames, b.frames)


def test_labels_of_another_model_are_refused() -> None:
    known = unread(["1", "2"], ["a", None]).check_labels(("a",))
    assert known.count == 2
    with pytest.raises(InputError, match="among them 'z'"):
        unread(["1"], ["z"]).check_labels(("a",))


def test_an_item_is_found_by_its_name(clips: npt.NDArray[np.uint8], tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", frames=clips, labels=["a", "b", "a"])
    found = datasets.load(tmp_path / "set.npz")
    assert found.source == tmp_path / "set.npz"
    np.testing.assert_array_equal(found.item("set#00001").read(CONTRACT).frames, clips[1])
    with pytest.raises(InputError, match="has no clip 'set#9'; it has 3, 'set#00000' first"):
        found.item("set#9")


class TestSingle:
    def test_an_array_with_one_clip_and_one_of_several(self, clips: npt.NDArray[np.uint8], tmp_path: Path) -> None:
        np.save(tmp_path / "one.npy", clips[0])
        np.savez(tmp_path / "all.npz", frames=clips, labels=np.array(["a", "b", "c"]))
        np.testing.assert_array_equal(datasets.single(str(tmp_path / "one.npy")).read(CONTRACT).frames, clips[0])
        found = datasets.single(f"{tmp_path / 'all.npz'}#2").read(CONTRACT)
        assert found.label == "c"
        np.testing.assert_array_equal(found.frames, clips[2])
        for source in ("all.npz", "all.npz#3"):
            with pytest.raises(InputError, match=r"all.npz holds 3 clips; name one: .*all.npz#0 to .*all.npz#2"):
                datasets.single(str(tmp_path / source))
        with pytest.raises(InputError, match=r"one.npy holds 1 clips"):
            datasets.single(f"{tmp_path / 'one.npy'}#4")

    def test_a_name_with_a_hash_is_a_name(self, clips: npt.NDArray[np.uint8], tmp_path: Path) -> None:
        np.save(tmp_path / "take#1", clips[0])
        (tmp_path / "take#1.npy").rename(tmp_path / "take.npy#1")
        np.save(tmp_path / "take.npy", clips)
        with pytest.raises(InputError):  # a file by that name, which is no array by its suffix
            datasets.single(str(tmp_path / "take.npy#1")).read(CONTRACT)

    def test_a_video_from_its_middle_or_a_second(self, tmp_path: Path, rng: np.random.Generator) -> None:
        still = rng.integers(0, 256, (6, 8, 3), np.uint8).repeat(16, axis=0).repeat(16, axis=1)
        path = video.write(tmp_path / "v.mp4", (np.roll(still, 2 * i, axis=1) for i in range(40)), 20.0)
        for start in (None, 0.5):
            found, expected = datasets.single(str(path), (), start).read(CONTRACT), video.load(path, CONTRACT, start)
            np.testing.assert_array_equal(found.frames, expected.frames)
            assert (found.name, found.start) == ("v.mp4", expected.start)

    def test_built_in_clips_by_their_names(self) -> None:
        items = datasets.built_in(20, demo.LABELS).items
        for source, item in (("demo", items[0]), (items[13].name, items[13])):
            found = datasets.single(source, demo.LABELS)
            assert (found.name, found.label) == (item.name, item.label)
            np.testing.assert_array_equal(found.read(CONTRACT).frames, item.read(CONTRACT).frames)
        assert datasets.single("demo").label is None

    @pytest.mark.parametrize("source", ["evaluation/nobody/0000", "evaluation/astronaut/0013", "x#1", "nothing", ""])
    def test_what_is_no_clip_is_refused(self, source: str) -> None:
        with pytest.raises(InputError, match="expected"):
            datasets.single(source)

    def test_a_start_is_of_a_video(self, clips: npt.NDArray[np.uint8], tmp_path: Path) -> None:
        np.save(tmp_path / "one.npy", clips[0])
        with pytest.raises(InputError, match=r"one\.npy is not a video"):
            datasets.single(str(tmp_path / "one.npy"), (), 1.0)


def test_a_file_that_changes_is_another_version(clips: npt.NDArray[np.uint8], tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, frames=clips)
    before = datasets.load(path)
    np.savez(path, frames=clips[:, ::-1][:2])
    after = datasets.load(path)
    assert before.items[0].version != after.items[0].version
    np.testing.assert_array_equal(after.items[0].read(CONTRACT).frames, clips[0, ::-1])


def test_windows_of_one_video(tmp_path: Path, rng: np.random.Generator) -> None:
    still = rng.integers(0, 256, (4, 6, 3), np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    path = video.write(tmp_path / "v.mp4", (np.roll(still, 3 * i, axis=1) for i in range(20)), 10.0)
    found = datasets.windows(path, [0.0, 0.5])
    assert [item.name for item in found.items] == ["0.000s", "0.500s"]
    clip = found.item("0.500s").read(CONTRACT)
    np.testing.assert_array_equal(clip.frames, video.load(path, CONTRACT, 0.5).frames)
    assert clip.name == "0.500s"


class TestViews:
    def test_of_arrays_that_hold_a_source(self, rng: np.random.Generator, tmp_path: Path) -> None:
        frames = rng.integers(0, 256, (2, 30, 16, 40, 3), np.uint8)
        np.savez(tmp_path / "set.npz", frames=frames, labels=np.array(["a", "b"]))
        views = Views(2, 3)
        for item, source in zip(datasets.load(tmp_path / "set.npz").check_views(views).items, frames, strict=True):
            found = item.clips(CONTRACT, views)
            assert {(clip.name, clip.label) for clip in found} == {(item.name, item.label)}
            expected = [source[t : t + 4, :, left : left + 24] for t in (0, 26) for left in (0, 8, 16)]
            np.testing.assert_array_equal([clip.frames for clip in found], expected)

    def test_a_single_one_is_the_clip(self, clips: npt.NDArray[np.uint8], tmp_path: Path) -> None:
        np.save(tmp_path / "set.npy", clips)
        found = [item.clips(CONTRACT, SINGLE) for item in datasets.load(tmp_path / "set.npy").items]
        np.testing.assert_array_equal([clip.frames for (clip,) in found], clips)

    @pytest.mark.parametrize("views", [Views(2, 1), Views(1, 3)])
    def test_an_array_that_is_exactly_one_clip_has_one(
        self, clips: npt.NDArray[np.uint8], tmp_path: Path, views: Views
    ) -> None:
        np.save(tmp_path / "set.npy", clips)
        for item in datasets.load(tmp_path / "set.npy").check_views(views).items:
            with pytest.raises(
                InputError, match=r"set\.npy holds exactly the model's clip, .* and has one view: leave"
            ):
                item.clips(CONTRACT, views)

    def test_what_is_made_for_the_model_has_one(self) -> None:
        built_in = datasets.built_in(2, demo.LABELS)
        assert built_in.check_views(SINGLE) is built_in
        message = "built-in clips are made for the model's input and have one view, not 1x3: leave out --views, or give"
        with pytest.raises(InputError, match=message):
            built_in.check_views(Views(1, 3))
        with pytest.raises(InputError, match="is one clip, made for the model's input, and has no 1x3 views"):
            built_in.items[0].clips(CONTRACT, Views(1, 3))

    def test_a_start_of_a_manifest_has_crops_and_no_temporal_views(
        self, rng: np.random.Generator, tmp_path: Path
    ) -> None:
        frames = rng.integers(0, 256, (30, 16, 48, 3), np.uint8)
        video.write(tmp_path / "a.mp4", iter(frames), 10.0)
        (tmp_path / "set.csv").write_text("path,start\na.mp4,1.5\n")
        (item,) = datasets.load(tmp_path / "set.csv").items
        assert [clip.start for clip in item.clips(CONTRACT, Views(1, 3))] == pytest.approx([1.5] * 3)
        with pytest.raises(
            InputError, match=r"a\.mp4: start is 1\.5 s, but 2 temporal views are spread over the whole"
        ):
            item.clips(CONTRACT, Views(2, 3))

    def test_a_file_that_cannot_be_read_says_why(self, tmp_path: Path) -> None:
        (tmp_path / "a.npy").write_bytes(b"nothing")
        (item,) = datasets.load(tmp_path).check_views(Views(2, 3)).items
        with pytest.raises(InputError, match=r"a\.npy cannot be read"):
            item.clips(CONTRACT, Views(2, 3))
