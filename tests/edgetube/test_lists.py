"""Lists of videos as data sets are published with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgetube import datasets, demo
from edgetube.contract import InputContract
from edgetube.errors import InputError


def video_at(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(demo.videos()["zoom-in"], path))


def labels(path: Path) -> dict[str, str | None]:
    return {item.name: item.label for item in datasets.load(path).items}


def test_lines_of_path_and_label_are_split_at_the_last_space(tmp_path: Path) -> None:
    for name in ("a.mp4", "sub/b c.mp4"):
        video_at(tmp_path / name)
    for suffix in ("txt", "csv"):
        (tmp_path / f"train.{suffix}").write_text("a.mp4 3\n\nsub/b c.mp4 jump\n")
        assert labels(tmp_path / f"train.{suffix}") == {"a.mp4": "3", "sub/b c.mp4": "jump"}
    clip = next(datasets.load(tmp_path / "train.txt").clips(InputContract(2, 16, 16)))
    assert (clip.frames.shape, clip.label) == ((2, 16, 16, 3), "3")


def test_the_splits_of_ucf101_have_names_of_classes_and_lie_beside_the_videos(tmp_path: Path) -> None:
    for name in ("Archery/v_Archery_g01.avi", "YoYo/v_YoYo_g01.avi"):
        video_at(tmp_path / "UCF-101" / name)
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 Archery\n2 YoYo\n")
    (lists / "trainlist01.txt").write_text("Archery/v_Archery_g01.avi 1\r\nYoYo/v_YoYo_g01.avi 2\r\n")
    (lists / "testlist01.txt").write_text("YoYo/v_YoYo_g01.avi\n")
    assert labels(lists / "trainlist01.txt") == {"Archery/v_Archery_g01.avi": "Archery", "YoYo/v_YoYo_g01.avi": "YoYo"}
    assert labels(lists / "testlist01.txt") == {"YoYo/v_YoYo_g01.avi": "YoYo"}
    (lists / "trainlist02.txt").write_text("YoYo/v_YoYo_g01.avi 7\n")
    with pytest.raises(InputError, match=r"trainlist02\.txt, line 1: class '7' is not in classInd\.txt"):
        labels(lists / "trainlist02.txt")
    (lists / "classInd.txt").write_bytes("1 Archery\n2 Übung\n".encode("cp1252"))
    with pytest.raises(InputError, match=r"classInd\.txt, line 2: byte 0xdc is not UTF-8; save the file as UTF-8"):
        labels(lists / "trainlist01.txt")


def test_the_tables_of_kinetics_name_files_by_their_times_and_some_are_missing(tmp_path: Path) -> None:
    video_at(tmp_path / "videos" / "abc-_0_000010_000020.mp4")
    table = tmp_path / "validate.csv"
    table.write_text(
        "label,youtube_id,time_start,time_end,split\nriding a bike,abc-_0,10,20,val\nsurfing,zzz,5,15,val\n"
    )
    found = datasets.load(table)
    assert [(item.name, item.label) for item in found.items] == [
        ("abc-_0_000010_000020.mp4", "riding a bike"),
        ("zzz_000005_000015.mp4", "surfing"),
    ]
    assert found.notes == (f"1 of 2 videos of validate.csv are not in {tmp_path / 'videos'}",)
    with pytest.raises(InputError, match="there is no file"):
        found.items[1].read(InputContract(2, 16, 16))
    for start in ("x", "inf", "nan", ""):
        table.write_text(f"label,youtube_id,time_start,time_end\na,b,{start},3\n")
        with pytest.raises(InputError, match="line 2: time_start and time_end are no numbers"):
            datasets.load(table)
    table.write_text(f"label,youtube_id,time_start,time_end\n{140_000 * 'a'},b,1,3\n")
    with pytest.raises(InputError, match="line 2 is not CSV: field larger than"):
        datasets.load(table)
    table.write_text("label,youtube_id,time_start,time_end\n,abc-_0,10,20\n")
    assert labels(table) == {"abc-_0_000010_000020.mp4": None}


def test_the_json_of_something_something(tmp_path: Path) -> None:
    video_at(tmp_path / "20bn" / "74225.webm")
    split = tmp_path / "train.json"
    split.write_text(json.dumps([{"id": "74225", "label": "x", "template": "Spinning [something] quickly"}]))
    assert labels(split) == {"74225.webm": "Spinning something quickly"}
    split.write_text(json.dumps([{"id": "74225", "template": ""}]))
    assert labels(split) == {"74225.webm": None}
    split.write_text("{}")
    with pytest.raises(InputError, match="expected the JSON of Something-Something"):
        labels(split)


def test_lists_that_fit_nothing(tmp_path: Path) -> None:
    file = tmp_path / "inner" / "train.txt"
    file.parent.mkdir()
    file.write_text("x/y.mp4 1\n")
    with pytest.raises(InputError, match=r"names 'x/y\.mp4', which is neither in .* put the list beside its videos"):
        labels(file)
    video_at(tmp_path / "x" / "y.mp4")
    assert labels(file) == {"x/y.mp4": "1"}
    file.write_text("x/y.mp4 1\nx/y.mp4 2\n")
    with pytest.raises(InputError, match=r"names 'x/y\.mp4' twice"):
        labels(file)
    file.write_text("\n")
    with pytest.raises(InputError, match="names no clips"):
        labels(file)
