"""The command line as people and programs use it, through the installed entry point's function."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import av
import numpy as np
import pytest

import edgetube
from edgetube import bundle, cli, demo, export, interrupts, runtimes, video
from edgetube.errors import DeviceError, InputError
from edgetube.live.decisions import DecisionRule, spans
from edgetube.runtime import Runtime
from edgetube.spec import Prediction

Cli: TypeAlias = Callable[..., tuple[int, str, str]]


@pytest.fixture
def clip(tmp_path: Path, rng: np.random.Generator) -> Path:
    still = rng.integers(0, 256, (6, 8, 3), np.uint8).repeat(16, axis=0).repeat(16, axis=1)
    return video.write(tmp_path / "clip.mp4", (np.roll(still, 2 * i, axis=1) for i in range(30)), 20.0)


def test_targets(edgetube_cli: Cli) -> None:
    code, out, _ = edgetube_cli("targets")
    assert code == 0
    assert "onnx-fp32" in out
    code, out, _ = edgetube_cli("targets", "--json")
    assert {row["name"] for row in json.loads(out)} >= {"onnx-fp32", "onnx-fp16"}


def test_export_then_run_then_doctor(
    edgetube_cli: Callable[..., tuple[int, str, str]], tiny_checkpoint: Path, tmp_path: Path, clip: Path
) -> None:
    code, out, err = edgetube_cli(
        "export", "--target", "onnx-fp32", "--checkpoint", tiny_checkpoint, "--out", tmp_path, "--lowering", "gather",
        "--json",
    )  # fmt: skip
    assert code == 0
    assert "proof: done" in err
    (row,) = json.loads(out)
    assert (row["target"], row["status"], row["agreement"]) == ("onnx-fp32", "executed", 1.0)

    code, out, _ = edgetube_cli("run", row["bundle"], clip, "--json")
    assert code == 0
    (line,) = [json.loads(line) for line in out.splitlines()]
    with edgetube.Runtime(row["bundle"]) as rt:
        expected = rt.predict(clip)
    assert line["label"] == expected.label
    assert line["logits"] == pytest.approx(expected.logits)
    assert {"score", "start", "end", "latency_ms", "scores", "source"} <= set(line)

    code, out, _ = edgetube_cli("doctor", row["bundle"], "--json")
    assert code == 0
    assert [check["ok"] for check in json.loads(out)] == [True] * 4


def test_of_several_targets_one_that_fails_does_not_stop_the_others(
    edgetube_cli: Cli, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = replace(export.target("onnx-fp16"), tolerance=1e-9)
    known = {**export.targets(), "onnx-fp16": strict}
    monkeypatch.setattr(export, "target", known.__getitem__)
    options = ("--checkpoint", tiny_checkpoint, "--out", tmp_path, "--lowering", "gather", "--json")
    names = ("--target", "onnx-fp16", "--target", "onnx-fp32")
    code, out, err = edgetube_cli("export", *names, *options)
    made, refused = json.loads(out)
    assert (code, made["target"], made["status"], made["error"]) == (1, "onnx-fp32", "executed", None)
    assert bundle.load(Path(made["bundle"])).target == "onnx-fp32"
    assert set(refused) == set(made)
    assert (refused["target"], refused["status"], refused["bundle"]) == ("onnx-fp16", "refused", None)
    assert "onnx-fp16 allows 1e-09" in refused["error"]
    assert err.splitlines()[-1] == f"error: onnx-fp16: {refused['error']}"
    assert not (tmp_path / "tiny.onnx-fp16").exists()

    code, out, err = edgetube_cli("export", *names[:2], *options)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == f"error: {refused['error']}"

    def gone(*_: object) -> None:
        raise DeviceError("local://: the line was cut")

    monkeypatch.setattr("edgetube.remote.proof.prove", gone)
    code, out, err = edgetube_cli("export", *names, *options, "--prove-on", "local://")
    assert (code, out) == (2, "")
    assert err.splitlines()[-2:] == [f"error: onnx-fp16: {refused['error']}", "error: local://: the line was cut"]


def test_stream_prints_one_object_a_window(
    edgetube_cli: Callable[..., tuple[int, str, str]], tiny_bundle: Path, clip: Path
) -> None:
    code, out, _ = edgetube_cli("run", tiny_bundle, clip, "--stream", "--hop", 2, "--limit", 3, "--json")
    assert code == 0
    starts = [json.loads(line)["start"] for line in out.splitlines()]
    assert starts == pytest.approx([0.0, 0.2, 0.4], abs=0.01)


def test_a_folder_gives_a_line_a_file(
    edgetube_cli: Callable[..., tuple[int, str, str]], tiny_bundle: Path, clip: Path
) -> None:
    shutil.copy(clip, clip.parent / "second.mp4")
    code, out, _ = edgetube_cli("run", tiny_bundle, clip.parent)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["clip.mp4", "second.mp4"]


def test_a_folder_goes_on_past_what_cannot_be_read(edgetube_cli: Cli, tiny_bundle: Path, clip: Path) -> None:
    (clip.parent / "bad.mp4").write_bytes(clip.read_bytes()[:300])
    (clip.parent / "poster.jpg").touch()
    (clip.parent / "zero.mp4").touch()
    code, out, err = edgetube_cli("run", tiny_bundle, clip.parent)
    assert code == 1
    assert [line.split()[0] for line in out.splitlines()] == ["clip.mp4"]
    note, *errors = err.splitlines()
    assert note == f"note: 1 file of {clip.parent} left out, not clips: 1 .jpg"
    assert re.match(r"error: .*bad\.mp4 has no video in it", errors[0])
    assert errors[1].endswith("zero.mp4 is empty (0 bytes)")
    assert errors[2:] == ["error: 2 of 3 sources could not be read"]
    code, out, _ = edgetube_cli("run", tiny_bundle, clip.parent / "*.mp4", "--json")
    assert code == 1
    rows = [json.loads(line) for line in out.splitlines()]
    assert ["error" in row for row in rows] == [True, False, True]
    assert rows[0]["source"] == str(clip.parent / "bad.mp4")
    assert edgetube_cli("run", tiny_bundle, clip.parent / "zero.mp4")[0] == 2


@pytest.mark.slow
def test_int8_goes_on_past_calibration_clips_that_cannot_be_read(
    edgetube_cli: Cli, tiny_checkpoint: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    data = tmp_path / "clips"
    data.mkdir()
    for i in range(12):
        np.save(data / f"{i:02d}.npy", rng.integers(0, 256, (8, 32, 48, 3), np.uint8))
    (data / "05.npy").write_bytes(b"x")
    arguments = ("export", "--target", "onnx-int8", "--checkpoint", tiny_checkpoint, "--lowering", "gather",
                 "--calib", data, "--max-drop", 100, "--out", tmp_path / "out")  # fmt: skip
    code, out, err = edgetube_cli(*arguments, "--json")
    assert code == 1
    (row,) = json.loads(out)
    why, count = [line for line in err.splitlines() if line.startswith("error")]
    assert why.startswith(f"error: {data / '05.npy'} cannot be read: ")
    assert count == "error: 1 calibration clips were left out"
    report = bundle.load(row["bundle"]).build["int8"]
    assert list(report["unread"]) == ["05.npy"]
    assert report["clips"]["count"] == 11
    (data / "06.npy").write_bytes(b"x")
    code, _, err = edgetube_cli(*arguments)
    assert code == 2
    assert "2 of 12 clips of" in err


def test_save_writes_an_annotated_video(
    edgetube_cli: Callable[..., tuple[int, str, str]], tiny_bundle: Path, clip: Path, tmp_path: Path
) -> None:
    code, _, _ = edgetube_cli("run", tiny_bundle, clip, "--save", tmp_path / "annotated.mp4")
    assert code == 0
    before = [frame for _, frame in video.frames(clip)]
    after = [frame for _, frame in video.frames(tmp_path / "annotated.mp4")]
    assert len(before) == len(after)
    changed = np.abs(before[10].astype(int) - after[10]).mean(axis=(1, 2))
    assert changed[-8:].max() > 4 * changed[:40].mean()


def test_save_keeps_the_times_of_a_varying_rate(edgetube_cli: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    times = [*np.arange(15) / 30, *(0.5 + np.arange(10) / 3)]
    pairs = [(float(t), np.full((64, 96, 3), 10 * i, np.uint8)) for i, t in enumerate(times)]
    dark = video.write(tmp_path / "dark.mp4", pairs, 30.0)
    code, _, _ = edgetube_cli("run", tiny_bundle, dark, "--stream", "--save", tmp_path / "annotated.mp4")
    assert code == 0
    assert [t for t, _ in video.frames(tmp_path / "annotated.mp4")] == pytest.approx(times, abs=1e-4)


def test_run_shows_a_warning_about_its_source_as_a_line(
    edgetube_cli: Any, tiny_bundle: Path, clip: Path, tmp_path: Path
) -> None:
    with av.open(str(clip)) as source, av.open(str(tmp_path / "part"), "w", format="mpegts") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    joined = tmp_path / "joined.ts"
    joined.write_bytes((tmp_path / "part").read_bytes() * 2)
    code, out, err = edgetube_cli("run", tiny_bundle, joined, "--stream", "--json")
    assert code == 0
    assert json.loads(out.splitlines()[-1])["end"] == pytest.approx(3.0, abs=0.3)
    assert re.fullmatch(r"warning: \S*joined.ts is damaged or was joined at about 1.\d s: it is read, .*\n", err)


def test_save_never_replaces_the_video_that_is_read(edgetube_cli: Any, tiny_bundle: Path, clip: Path) -> None:
    before = clip.read_bytes()
    code, out, err = edgetube_cli("run", tiny_bundle, clip, "--save", clip.parent / "." / clip.name)
    assert (code, out) == (2, "")
    assert re.search("error: cannot write .*clip.mp4: it is the video that is read; give another name", err)
    assert clip.read_bytes() == before


def test_inspect_prints_and_draws(
    edgetube_cli: Callable[..., tuple[int, str, str]], tiny_bundle: Path, tmp_path: Path
) -> None:
    code, out, _ = edgetube_cli("inspect", tiny_bundle)
    assert code == 0
    assert "4x8x8" in out
    assert re.search(r"graph +.*2 Gelu", out, re.DOTALL)
    code, out, _ = edgetube_cli("inspect", tiny_bundle, "--plot", tmp_path / "tubes.png", "--json")
    assert code == 0
    assert json.loads(out)["target"] == "onnx-fp32"
    assert (tmp_path / "tubes.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_shows_what_is_in_a_checkpoint(edgetube_cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    code, out, _ = edgetube_cli("inspect", tiny_checkpoint)
    assert code == 0
    lines = {" ".join(line.split()) for line in out.splitlines()}
    assert {"labels of other 2: no, yes", "blocks.0-1.mlp.fc1.weight 96 x 24 blocks.0-1.mlp.fc1.weight"} <= lines
    code, out, _ = edgetube_cli("inspect", tiny_checkpoint, "--json")
    document = json.loads(out)
    assert (code, document["error"], document["source"]) == (0, None, str(tiny_checkpoint))
    assert {"name": "blocks.1.norm1.bias", "shape": [24], "used": "blocks.1.norm1.bias"} in document["keys"]
    code, _, err = edgetube_cli("inspect", tiny_checkpoint, "--checkpoint", tmp_path)
    assert code == 2
    assert "--checkpoint is for bundles" in err
    code, _, err = edgetube_cli("inspect", tiny_checkpoint, "--before", tiny_checkpoint)
    assert code == 2
    assert "--before is drawn beside the checkpoint; add --plot" in err


def test_inspect_draws_the_kernels_of_a_checkpoint(edgetube_cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    for more in ((), ("--before", tiny_checkpoint)):
        code, _, _ = edgetube_cli("inspect", tiny_checkpoint, "--plot", tmp_path / "x.png", *more, "--json")
        assert code == 0
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "x.png").unlink()
    code, _, err = edgetube_cli("inspect", tiny_checkpoint, "--plot", tmp_path / "x.png", "--before", "demo")
    assert code == 2
    assert "demo has other tubes than" in err


def test_inspect_checks_where_the_picture_goes_before_it_says_anything(
    edgetube_cli: Cli, tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    for source in (tiny_checkpoint, tiny_bundle, "demo"):
        for path, message in (
            (tmp_path / "x.jpg", "a name that ends in .png"),
            (tmp_path / "no" / "x.png", "no folder"),
        ):
            code, out, err = edgetube_cli("inspect", source, "--plot", path)
            assert (code, out) == (2, "")
            assert message in err


def test_inspect_of_a_refused_checkpoint_prints_its_tensors_then_the_error(edgetube_cli: Cli, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    weights = {f"layers.{i}.w": np.zeros((2, 3), np.float32) for i in range(3)}
    safetensors.save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "mystery"}')
    code, out, err = edgetube_cli("inspect", tmp_path)
    assert code == 2
    assert "layers.0-2.w" in out
    assert "model_type 'mystery'" in err
    code, out, _ = edgetube_cli("inspect", tmp_path, "--json")
    document = json.loads(out)
    assert (code, document["config"]) == (2, {"model_type": "mystery"})
    assert [key["name"] for key in document["keys"]] == sorted(weights)


def test_the_options_of_reading_are_those_of_a_checkpoint(edgetube_cli: Cli, tiny_bundle: Path) -> None:
    code, _, err = edgetube_cli("inspect", tiny_bundle, "--arch", "x")
    assert code == 2
    assert "--arch says something about a checkpoint" in err
    code, _, err = edgetube_cli("inspect", "demo", "--labels", "names.txt")
    assert code == 2
    assert "--labels does not apply" in err
    code, _, err = edgetube_cli("inspect", "no/such/thing")
    assert code == 2
    assert "no such folder" in err


def test_parity_of_the_built_in_clips_and_its_gate(
    edgetube_cli: Callable[..., tuple[int, str, str]], tiny_bundle: Path
) -> None:
    code, out, _ = edgetube_cli("parity", tiny_bundle, "--clips", 9, "--json")
    assert code == 0
    row = json.loads(out)["bundles"][0]
    assert (row["clips"], row["agreement"], row["status"]) == (9, 1.0, "executed")
    code, _, err = edgetube_cli("parity", tiny_bundle, "--clips", 9, "--min-agreement", 1.1)
    assert code == 1
    assert "agreement is 1, --min-agreement asks for at least 1.1" in " ".join(err.split())


def test_parity_for_people_with_layers_and_an_answer_cache(
    edgetube_cli: Callable[..., tuple[int, str, str]], tiny_bundle: Path, tmp_path: Path
) -> None:
    answer_cache = tmp_path / "answers"
    arguments = ("parity", tiny_bundle, "--clips", 3, "--layers", "--layer-clips", 1, "--resume", answer_cache)
    code, out, err = edgetube_cli(*arguments)
    assert code == 0
    assert "tiny.onnx-fp32: no layer where the error jumps" in out
    assert "blocks.1.mlp.fc2" in out
    assert "compare: done (3)" in err
    assert edgetube_cli(*arguments)[1] == out
    assert answer_cache.read_bytes().startswith(b"SQLite format 3")


def test_parity_over_a_video(edgetube_cli: Callable[..., tuple[int, str, str]], tiny_bundle: Path, clip: Path) -> None:
    code, out, _ = edgetube_cli(
        "parity", tiny_bundle, "--video", clip, "--reference", tiny_bundle, "--hop", 2, "--json"
    )
    assert code == 0
    document = json.loads(out)
    assert document["reference"]["target"] == "onnx-fp32"
    assert document["video"]["windows"] == document["data"]["clips"] == 4
    assert (document["video"]["stream"]["frames"], document["video"]["stream"]["dropped"]) == (30, 0)
    code, out, _ = edgetube_cli("parity", tiny_bundle, "--video", clip)
    assert code == 0
    assert "30 frames, 20.00 fps" in out
    code, _, err = edgetube_cli("parity", tiny_bundle, "--video", clip, "--workers", 2)
    assert code == 2
    assert "leave out --data, --views, --resume, --workers and --ray" in " ".join(err.split())
    code, _, err = edgetube_cli("parity", tiny_bundle, "--video", clip, "--views", "1x1")
    assert code == 2
    code, _, err = edgetube_cli("parity", tiny_bundle, "--clips", 2, "--views", "1x3")
    assert code == 2
    assert "have one view, not 1x3: leave out --views, or give videos with --data" in " ".join(err.split())


def test_what_is_on_ends_with_the_command(
    edgetube_cli: Callable[..., tuple[int, str, str]], tiny_bundle: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C, and an error after the first answers: each event that was opened is closed."""
    predictions = cli._predictions
    for error, code in ((KeyboardInterrupt(), 130), (InputError("the file was cut off"), 2)):

        def broken(*arguments: Any, error: BaseException = error) -> Iterator[Prediction]:
            yield from itertools.islice(predictions(*arguments), 2)
            raise error

        monkeypatch.setattr(cli, "_predictions", broken)
        rule = ("--decide", "tau=0,enter=0.01,leave=0.01,min=0")
        found, out, _ = edgetube_cli("run", tiny_bundle, clip, "--stream", "--hop", 2, *rule, "--json")
        kinds = [json.loads(line)["kind"] for line in out.splitlines()]
        assert (found, kinds.count("closed")) == (code, kinds.count("opened"))
        assert kinds.count("closed") > 0


def test_run_tells_when_labels_begin_and_end(
    edgetube_cli: Callable[..., tuple[int, str, str]], tiny_bundle: Path, clip: Path
) -> None:
    rule = ("--decide", "tau=0,enter=0.1,leave=0.05,min=0")
    with Runtime(tiny_bundle) as rt:
        answers = list(rt.stream(clip, hop=2))
        expected = spans(
            DecisionRule.parse(rule[1]), rt.labels, [p.end or 0.0 for p in answers], [p.logits for p in answers]
        )
    code, out, _ = edgetube_cli("run", tiny_bundle, clip, "--stream", "--hop", 2, *rule, "--json")
    assert code == 0
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["kind"] for event in events].count("opened") == len(expected) > 0
    assert [event["span"]["label"] for event in events if event["kind"] == "closed"] == [s.label for s in expected]
    code, out, _ = edgetube_cli("run", tiny_bundle, clip, "--stream", "--hop", 2, *rule)
    assert code == 0
    first = expected[0]
    assert re.search(
        rf"clip\.mp4 +[\d.]+ s  {first.label} closed  {first.start:.2f}-{first.end:.2f} s, peak 0\.\d\d", out
    )
    for options in (rule, ("--skip-still",)):
        code, _, err = edgetube_cli("run", tiny_bundle, clip, *options)
        assert code == 2
        assert f"{options[0]} is about answers over time; add --stream" in err
    code, out, _ = edgetube_cli("run", tiny_bundle, clip, "--stream", "--skip-still", "--json")
    assert code == 0
    assert {json.loads(line)["skipped"] for line in out.splitlines()} == {False}  # the picture moves


def test_parity_compares_spans_and_a_gate_over_a_video(
    edgetube_cli: Callable[..., tuple[int, str, str]], tiny_bundle: Path, clip: Path
) -> None:
    asked = ("parity", tiny_bundle, "--video", clip, "--reference", tiny_bundle)
    rule = "tau=0,enter=0.1,leave=0.05,min=0"
    code, out, _ = edgetube_cli(*asked, "--decide", rule, "--skip-still", "--still-threshold", 255, "--json")
    assert code == 0
    found = json.loads(out)["video"]
    assert found["decisions"]["rule"]["enter"] == 0.1
    assert found["decisions"]["bundles"][0]["iou"] == 1
    assert (found["still"]["threshold"], found["still"]["skipped"]) == (255, 1 - 1 / found["windows"])
    code, _, err = edgetube_cli(*asked, "--decoder", "cpu,cpu")
    assert code == 2
    assert "expected different decoders with commas" in err
    assert found["decoders"] is None
    code, out, _ = edgetube_cli(*asked, "--decide", "default", "--skip-still")
    assert code == 0
    assert re.search("the gate at 4 grey levels, at most 5 s without inference, skips", out)
    assert "decisions" in out
    for options, message in (
        (("--decide", "tua=1"), "tua=1 in the decision rule; expected one of tau"),
        (("--decide", "fly=off"), "'fly', which is no label of the model"),
        (("--still-threshold", 3), "--still-threshold is the threshold of --skip-still; add it"),
        (("--skip-still", "--still-threshold", 0), "skip_still"),
    ):
        code, _, err = edgetube_cli(*asked, *options)
        assert code == 2
        assert re.search(message, err)
    code, _, err = edgetube_cli("parity", tiny_bundle, "--skip-still")
    assert code == 2
    assert re.search("--decide and --skip-still are about answers over time; add --video FILE", err)


def test_parity_is_done_in_one_place(edgetube_cli: Callable[..., tuple[int, str, str]], tiny_bundle: Path) -> None:
    code, _, err = edgetube_cli("parity", tiny_bundle, "--workers", 2, "--ray", "auto")
    assert code == 2
    assert "give one of the two" in err


def test_parity_on_a_folder_of_classes(
    edgetube_cli: Callable[..., tuple[int, str, str]], tiny_bundle: Path, clip: Path, tmp_path: Path
) -> None:
    for label in ("static", "pan-left"):
        (tmp_path / "data" / label).mkdir(parents=True)
        shutil.copy(clip, tmp_path / "data" / label / "a.mp4")
    code, out, _ = edgetube_cli("parity", tiny_bundle, "--data", tmp_path / "data", "--json")
    assert code == 0
    assert json.loads(out)["bundles"][0]["labelled"] == 2


@pytest.mark.slow
def test_parity_with_views(
    edgetube_cli: Callable[..., tuple[int, str, str]], tiny_bundle: Path, tmp_path: Path
) -> None:
    """The same with one process, with two, and from the cache; and another answer than that to the middle."""
    rng = np.random.default_rng(5)
    for label in ("static", "pan-left"):
        (tmp_path / "data" / label).mkdir(parents=True)
        still = rng.integers(0, 256, (6, 15, 3), np.uint8).repeat(16, axis=0).repeat(16, axis=1)
        video.write(tmp_path / "data" / label / "a.mp4", (np.roll(still, i * i, axis=1) for i in range(40)), 20.0)
    arguments = ("parity", tiny_bundle, "--data", tmp_path / "data", "--threads", 1)
    documents = []
    for options in (["--resume", "A"], ["--resume", "A"], ["--workers", 2], ["--resume", "A", "--views", "1x1"]):
        given = [tmp_path / option if option == "A" else option for option in options]
        code, out, _ = edgetube_cli(*arguments, "--views", "3x3", *given, "--json")
        assert code == 0
        documents.append(json.loads(out) | {"date": None})
    first, again, processes, single = documents
    assert first == again == processes
    assert first["data"]["views"] == {"temporal": 3, "spatial": 3}
    assert single["data"]["views"] == {"temporal": 1, "spatial": 1}
    score = {key: [clip["reference"]["score"] for clip in document["bundles"][0]["worst"]]
             for key, document in (("views", first), ("single", single))}  # fmt: skip
    assert score["views"] != pytest.approx(score["single"], abs=1e-6)
    code, out, _ = edgetube_cli(*arguments, "--views", "3x3")
    assert code == 0
    assert "mean of the softmax over 3 x 3 views" in " ".join(out.split())


def test_agree_compares_runtimes_on_one_clip(edgetube_cli: Cli, tiny_bundle: Path, tmp_path: Path, clip: Path) -> None:
    copy = shutil.copytree(tiny_bundle, tmp_path / "copy.onnx-fp32")
    code, out, _ = edgetube_cli("agree", tiny_bundle, copy, clip, "--start", 0.3, "--json")
    assert code == 0
    document = json.loads(out)
    names = [row["name"] for row in document["rows"]]
    assert names == ["reference", str(tiny_bundle), str(copy)]
    assert document["difference"]["matrix"][1][2] == 0
    with edgetube.Runtime(tiny_bundle) as rt:
        cut = video.load(clip, rt.contract, 0.3)
        expected = rt.predict(cut.frames).logits
    assert document["clip"] == {"name": "clip.mp4", "label": None, "start": cut.start, "end": cut.end}
    assert document["rows"][1]["logits"] == pytest.approx(expected)

    code, out, err = edgetube_cli("agree", tiny_bundle, copy, "demo", "--max-difference", 1e-9)
    assert code == 1
    assert "evaluation/astronaut/0000, labelled static" in out
    assert "3 of 3 pairs depart at no layer" in out
    assert f"reference and {copy}: difference is" in err
    assert "--max-difference asks for at most 1e-09" in err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["demo", "--start", "1"], "start is 1 s, but demo is not a video"),
        (["nothing.mp4"], "there is no clip 'nothing.mp4'; expected a video, image or array file, demo, or the name"),
        (["."], ". is a folder; expected one clip"),
        (["demo", "--max-difference", "nan"], "--max-difference is nan; expected a number"),
    ],
)
def test_agree_refuses_what_is_no_clip(edgetube_cli: Cli, tiny_bundle: Path, args: list[str], said: str) -> None:
    code, _, err = edgetube_cli("agree", tiny_bundle, *args)
    assert code == 2
    assert said in " ".join(err.split())


@pytest.mark.slow
def test_bench_prints_tables_and_notes(edgetube_cli: Callable[..., tuple[int, str, str]], tiny_bundle: Path) -> None:
    options = ("--seconds", 0.1, "--starts", 1, "--camera-fps", 40, "--camera-seconds", 0.5, "--camera-size", "48x64")
    code, out, err = edgetube_cli("bench", tiny_bundle, *options)
    assert code == 0
    assert len(re.findall(r"tiny\.onnx-fp32 ", out)) == 2
    assert "camera, 40 fps" in out
    assert "turns: done" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "no/such/bundle", "x.mp4"], "is not a bundle: no such folder"),
        (["export", "--target", "onnx-fp8"], "no target is called 'onnx-fp8'"),
        (["export", "--target", "onnx-fp32", "--size", "big"], "--size is 'big'; expected 224 or 224x320"),
        (["export", "--target", "onnx-fp32", "--input", "sound"], "expected video or image"),
        (
            ["export", "--target", "onnx-fp32", "--checkpoint", "none.safetensors"],
            r"no checkpoint at .*none\.safetensors",
        ),
        (["bench", ".", "--threads", "many"], "--threads is 'many'; expected numbers like 1,2,4"),
        (["bench", ".", "--threads", "1,²"], "--threads is '1,²'; expected numbers like 1,2,4"),
        (["export", "--target", "onnx-fp32", "--size", "²"], "--size is '²'; expected 224 or 224x320"),
        (["bench", ".", "--camera-fps", "0"], "camera-fps is 0.0; expected more than 0, and finite"),
        (["report", "."], r"\. holds no bundles"),
        (["run", "x", "x.mp4", "--limit", "-1"], "--limit is -1; expected 1 to 1000000"),
        (["run", "x", "x.mp4", "--top-k", "0"], "--top-k is 0; expected 1 to 1000000"),
        (["run", "x", "x.mp4", "--hop", "0"], "hop is 0; expected >= 1"),
        (["run", "x", "x.mp4", "--threads", "20000"], r"threads is 20000; expected 1 to \d+ on this machine"),
        (["run", "x", "x.mp4", "--limit", "9" * 30], "--limit is 9+; expected 1 to 1000000"),
        (["run", "x", ""], "an argument is empty; is a variable of the shell not set"),
        (["export", "--target", "onnx-fp32", "--batch", "100000000"], "--batch is 100000000; expected 1 to 1024"),
        (["export", "--target", "onnx-fp32", "--out", __file__], "test_cli.py, which is a file; expected a folder"),
        (["parity", "x", "--clips", "0"], "--clips is 0; expected 1 to"),
        (["parity", "x", "--views", "5"], "views are '5'; expected temporal x spatial views like 5x3"),
        (["parity", "x", "--views", "5x2"], "views are 5x2, with 2 spatial crops; expected 1 or 3"),
        (["parity", "x", "--min-agreement", "nan"], "--min-agreement is nan; expected a number"),
        (["parity", "x", "--layer-clips", "0"], "--layer-clips is 0; expected 1 to"),
        (["bench", "x", "--seconds", "inf"], "seconds is inf; expected more than 0, and finite"),
        (["report", "x", "--out", "no/such/page.html"], "cannot write no/such/page.html: expected a file in a folder"),
        (["run", "x"], "Missing argument 'source'; see: edgetube run --help"),
        (["bench", ".", "--threads", "1,20000"], "threads is 20000; expected 1 to"),
        (["export", "--target", "onnx-fp32", "--calib", "x"], "--calib is for int8 targets; onnx-fp32 is none"),
        (["export", "--target", "onnx-fp32", "--max-drop", "1"], "--max-drop is for int8 targets"),
        (["export", "--target", "onnx-fp32", "--set", "cpu=arm"], "onnx-fp32 has no setting 'cpu'; it has"),
        (
            ["export", "--target", "onnx-fp32", "--target", "onnx-int8", "--set", "zz=1"],
            "none of onnx-fp32, onnx-int8 has",
        ),
        (["export", "--target", "onnx-int8", "--set", "cpu=arm", "--set", "cpu=x86"], "--set names a setting twice"),
        (["frobnicate"], "No such command 'frobnicate'; see: edgetube --help"),
        (["targets", "--jsn"], "No such option: --jsn.*; see: edgetube targets --help"),
        (["parity", "."], r"it has no edgetube\.json"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(
    edgetube_cli: Callable[..., tuple[int, str, str]], args: list[str], message: str
) -> None:
    code, out, err = edgetube_cli(*args)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert re.search(message, err)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (OSError(28, "No space left on device", "out/model.onnx"), 2, "error: out/model.onnx: No space left on device"),
        (OSError(28, "No space left on device"), 2, "error: the system refuses: No space left on device"),
        (PermissionError(13, "Permission denied", "a\x1b[2J"), 2, r"error: a\x1b[2J: Permission denied"),
        (MemoryError("4 GiB"), 2, "error: this machine has not enough memory for it (4 GiB); close other programs, or "
                                  "give less at a time"),
        (RecursionError("maximum depth"), 2, "error: something is nested too deeply to be read (maximum depth)"),
        (EOFError("no more"), 2, "error: no more"),
        (EOFError(), 2, "error: EOFError"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (InputError("two\nlines\x07"), 2, r"error: two lines\x07"),
    ],
)  # fmt: skip
def test_what_the_system_refuses_is_one_line(
    edgetube_cli: Cli, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("edgetube.export.targets", fail)
    assert edgetube_cli("targets") == (code, "", line + "\n")
    assert "Traceback" in edgetube_cli("targets", "--debug")[2]


@pytest.mark.usefixtures("heard_signals")
@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_a_signal_ends_a_command_with_its_code(edgetube_cli: Cli, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def swallow() -> dict[str, Any]:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt as error:
            raise RuntimeError("a library wraps it") from error
        return {}

    monkeypatch.setattr("edgetube.export.targets", swallow)
    assert edgetube_cli("targets") == (128 + number, "", "error: interrupted\n")


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgetube.export.targets", lambda: dict[str, str]()["x"])
    with pytest.raises(KeyError):
        cli.main(["targets"])


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
def test_who_reads_no_further_is_not_told_of_it() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "edgetube", "targets", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(
    ("stage", "command", "number"),
    [
        ("prove lowerings: done", "export --target onnx-fp32", signal.SIGTERM),
        ("onnx-fp32: build: done", "export --target onnx-fp32 --lowering gather", signal.SIGINT),
        (
            "onnx-fp32: proof: done",
            "export --target onnx-fp32 --target openvino-fp32 --lowering gather",
            signal.SIGTERM,
        ),
        ("read clips: done", "export --target onnx-int8 --lowering gather", signal.SIGINT),
    ],
)
def test_an_interrupted_export_publishes_nothing_more(
    tiny_checkpoint: Path, tmp_path: Path, stage: str, command: str, number: int
) -> None:
    arguments = [*command.split(), "--checkpoint", str(tiny_checkpoint), "--out", str(tmp_path / "out")]
    with subprocess.Popen(
        [sys.executable, "-m", "edgetube", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "EDGETUBE_CACHE": str(tmp_path / "cache")},  # without clips that were read before
    ) as process:
        assert process.stderr is not None
        seen = ""
        while not seen.startswith(stage):
            seen = process.stderr.readline()
            assert seen
        process.send_signal(number)
        rest = process.stderr.read().splitlines()
        assert process.wait() == 128 + number
    assert rest[-1] == "error: interrupted"
    assert "Traceback" not in "".join(rest)
    left = {path.name for path in (tmp_path / "out").glob("*")} - {".calibration"}
    assert left <= {"tiny.onnx-fp32"}
    for name in left:
        assert bundle.load(tmp_path / "out" / name).name == name


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize(
    ("options", "end"),
    [
        (["parity", "--clips", "5000", "--workers", "2"], signal.SIGKILL),
        (["parity", "--clips", "5000", "--workers", "2"], signal.SIGINT),
        (["bench", "--seconds", "60"], signal.SIGKILL),
        (["bench", "--seconds", "60"], signal.SIGTERM),
    ],
)
def test_processes_end_with_their_parent(tiny_bundle: Path, options: list[str], end: int) -> None:
    command = [sys.executable, "-m", "edgetube", options[0], str(tiny_bundle), *options[1:]]
    with subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True, text=True) as process:
        while len(session(process.pid)) < 2:
            time.sleep(0.05)
        time.sleep(1)
        process.send_signal(end)
        assert process.stderr is not None
        said = process.stderr.read()
        assert "Traceback" not in said, said
        assert process.wait() == (-end if end == signal.SIGKILL else 128 + end), said
        for _ in range(600):
            if not session(process.pid):
                break
            time.sleep(0.05)
        assert session(process.pid) == []


def session(leader: int) -> list[str]:
    """Processes that live in a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, of = path.read_text().rpartition(")")[2].split()[:4]
            if int(of) == leader and state != "Z":
                found.append(path.parent.name)
    return found


def test_debug_shows_the_traceback(edgetube_cli: Cli) -> None:
    code, _, err = edgetube_cli("inspect", "no/such/bundle", "--debug")
    assert code == 2
    assert "Traceback" in err


def test_unknown_options_are_typers_refusal(edgetube_cli: Cli) -> None:
    code, _, _ = edgetube_cli("export", "--tarrget", "onnx-fp32")
    assert code == 2


def test_a_broken_bundle_fails_the_doctor_with_exit_code_1(
    edgetube_cli: Callable[..., tuple[int, str, str]], tiny_bundle: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_bundle, tmp_path / "copy")
    (copy / "model.onnx").write_bytes(b"x")
    code, out, _ = edgetube_cli("doctor", copy, "--json")
    assert code == 1
    assert [check["ok"] for check in json.loads(out)] == [True, False]


@pytest.mark.parametrize(
    "command", ["targets", "export", "run", "inspect", "doctor", "parity", "agree", "bench", "report"]
)
def test_help_has_an_example(edgetube_cli: Callable[..., tuple[int, str, str]], command: str) -> None:
    code, out, _ = edgetube_cli(command, "--help")
    assert code == 0
    assert f"Example: edgetube {command}" in " ".join(out.split())


def test_built_in_labels_are_the_models() -> None:
    assert len(demo.LABELS) == 9


def test_a_checkpoint_that_moved_is_found_by_its_hash(
    edgetube_cli: Callable[..., tuple[int, str, str]], tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "tiny.onnx-fp32"
    shutil.copytree(tiny_bundle, moved)
    text = (moved / "edgetube.json").read_text()
    (moved / "edgetube.json").write_text(text.replace(str(tiny_checkpoint), "/gone/tiny.safetensors"))
    code, _, err = edgetube_cli("parity", moved, "--clips", 1)
    assert code == 2
    assert "made from the checkpoint /gone/tiny.safetensors, which is not there; give --checkpoint" in " ".join(
        err.split()
    )
    (tmp_path / "weights").mkdir()
    shutil.copy(tiny_checkpoint, tmp_path / "weights" / "renamed.safetensors")
    code, out, _ = edgetube_cli("parity", moved, "--clips", 1, "--json", "--checkpoint", tmp_path / "weights")
    assert code == 0
    assert json.loads(out)["agreement"] is not None
    code, _, err = edgetube_cli("inspect", moved, "--plot", tmp_path / "t.png", "--checkpoint", tmp_path / "weights")
    assert code == 0
    assert "without kernels" not in err


def test_all_leaves_out_what_is_simulated_here_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runtimes, "simulated", lambda backend: backend == "onnxruntime")
    names = cli._chosen(["all"])
    assert "onnx-fp32" not in names
    assert "without onnx-fp16, onnx-fp32, onnx-int8: the device is simulated here" in capsys.readouterr().err
    assert set(cli._chosen(["all", "onnx-fp32"])) == {*names, "onnx-fp32"}


def test_all_leaves_out_what_cannot_have_fewer_tokens_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = replace(export.target("onnx-fp16"), all_tokens="it has no Gather")
    known = {**{name: replace(t, all_tokens="") for name, t in export.targets().items()}, "onnx-fp16": refused}
    monkeypatch.setattr(export, "targets", lambda: known)
    names = cli._chosen(["all"], fewer_tokens=True)
    assert "onnx-int8" in names
    assert "onnx-fp16" not in names
    assert set(cli._chosen(["all"])) == {*names, "onnx-fp16"}
    assert "without onnx-fp16: these cannot have fewer tokens" in capsys.readouterr().err
