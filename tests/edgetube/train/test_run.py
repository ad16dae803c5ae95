"""Trainings from a folder of clips to a file, stopped and resumed, with what users get wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgetube import formats, interrupts
from edgetube.errors import BackendError, CheckpointError, InputError, SpecError
from edgetube.model.checkpoints import Checkpoint
from edgetube.train import data, loop, prepare, ranks, run
from edgetube.train.ranks import Ranks
from edgetube.train.recipe import Recipe
from edgetube.train.run import Sources
from tests.edgetube.formats.families import answers

QUICK = Recipe(epochs=3, batch=8, lr=0.01, average=0.9)


def trained(start: Checkpoint, clips: Path, out: Path, recipe: Recipe = QUICK, **sources: Any) -> dict[str, Any]:
    document = run.run(start, Sources(str(clips), **sources), recipe, out, "cpu")
    assert document is not None
    return document


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(formats.load(path).model.state_dict())


def goes_on_to_the_same(start: Checkpoint, clips: Path, folder: Path, whole: Mapping[str, Any]) -> None:
    """The training in `parts`, which was stopped, ends with the rows and the weights of the one in `whole`."""
    parts = trained(formats.load(start.source), clips, folder / "parts")
    assert parts["rows"] == whole["rows"]
    first, second = (weights(folder / name / "last.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_model_learns_what_the_clips_show(start: Checkpoint, clips: Path, tmp_path: Path) -> None:
    document = trained(start, clips, tmp_path / "run", replace(QUICK, epochs=12), share=0.25)
    assert document["best"]["top1"] == 1.0
    assert document["rows"][-1]["loss"] < document["rows"][0]["loss"] - 0.1
    assert (document["clips"], document["held_out"], document["labels"]) == (18, 6, ["fall", "rise"])
    assert json.loads((tmp_path / "run" / "log.json").read_text()) == document
    best = formats.load(tmp_path / "run" / "best.safetensors")
    assert best.spec.classifiers == (("video", 2), ("classes", 2))
    assert (best.labels, best.other_labels) == (("fall", "rise"), {"classes": ("a", "b")})
    frames = np.load(clips / "rise" / "03.npy")
    assert answers(best, frames[None]).argmax() == 1


def test_only_what_the_recipe_names_changes(start: Checkpoint, clips: Path, tmp_path: Path) -> None:
    before = dict(start.model.state_dict())
    before = {name: value.clone() for name, value in before.items()}
    trained(start, clips, tmp_path / "run")
    after = weights(tmp_path / "run" / "last.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"tubes.weights.0", "tubes.biases.0", "anchor.time", "blocks.0.alpha"}
    assert set(after) - set(before) == {"classifiers.video.weight", "classifiers.video.bias"}


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_training_that_was_stopped_ends_with_the_same_bits(
    stop: int, start: Checkpoint, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = str(pictures(tmp_path))
    whole = trained(start, clips, tmp_path / "whole", images=images)
    steps = []
    real = loop.Training._step

    def step(self: loop.Training) -> None:
        real(self)
        steps.append(self.state.step)
        if len(steps) == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.Training, "_step", step)
    again = formats.load(start.source)
    with pytest.raises(KeyboardInterrupt):
        trained(again, clips, tmp_path / "parts", images=images)
    parts = trained(formats.load(start.source), clips, tmp_path / "parts", images=images)
    assert steps == list(range(1, 10))
    assert parts["rows"] == whole["rows"]
    first, second = (weights(tmp_path / name / "last.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_training_that_was_stopped_while_it_judged_goes_on_with_its_own_weights(
    start: Checkpoint, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(start, clips, tmp_path / "whole")
    real, calls = loop.Training.evaluate, []

    def evaluate(self: loop.Training, *given: Any) -> tuple[float, int]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, *given)

    monkeypatch.setattr(loop.Training, "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        trained(formats.load(start.source), clips, tmp_path / "parts")
    goes_on_to_the_same(start, clips, tmp_path, whole)


def test_a_signal_waits_for_weights_and_state_alone(
    start: Checkpoint, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(start, clips, tmp_path / "whole")
    real_part, real_update, done = loop.Training._part, torch.optim.AdamW.step, []

    def part(self: loop.Training, *given: Any) -> Any:
        if self.state.step == 4 and "part" not in done:
            done.append("part")
            signal.raise_signal(signal.SIGTERM)
            done.append("the part goes on")
        return real_part(self, *given)

    def update(self: Any, *given: Any) -> Any:
        if "part" in done and "update" not in done:
            done.append("update")
            signal.raise_signal(signal.SIGTERM)
            done.append("the update goes on")
        return real_update(self, *given)

    monkeypatch.setattr(loop.Training, "_part", part)
    monkeypatch.setattr(torch.optim.AdamW, "step", update)
    for step in (4, 5):
        with pytest.raises(KeyboardInterrupt), interrupts.Handled():
            trained(formats.load(start.source), clips, tmp_path / "parts")
        assert torch.load(tmp_path / "parts" / "state.pt", weights_only=True)["step"] == step
    assert done == ["part", "update", "the update goes on"]
    goes_on_to_the_same(start, clips, tmp_path, whole)


def test_data_that_end_a_training_leave_the_state_before(
    start: Checkpoint, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, bad = loop.Training._part, [4]

    def part(self: loop.Training, *given: Any) -> Any:
        if self.state.step in bad:
            raise InputError("too many clips cannot be read")
        return real(self, *given)

    monkeypatch.setattr(loop.Training, "_part", part)
    with pytest.raises(InputError, match="too many"):
        trained(start, clips, tmp_path / "run")
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] == 4
    bad[0] = 0
    with pytest.raises(InputError, match="too many"):
        trained(formats.load(start.source), clips, tmp_path / "new")
    bad.clear()
    assert len(trained(formats.load(start.source), clips, tmp_path / "run")["rows"]) == 3
    trained(formats.load(start.source), clips, tmp_path / "new", replace(QUICK, epochs=1))  # of which nothing was done


def pictures(folder: Path) -> Path:
    """Images of two classes, bright and dark."""
    rng = np.random.default_rng(0)
    for name, level in (("bright", 200), ("dark", 50)):
        (folder / "pictures" / name).mkdir(parents=True, exist_ok=True)
        for i in range(6):
            frames = np.clip(level + rng.normal(0, 10, (1, 8, 8, 3)), 0, 255).astype(np.uint8)
            np.save(folder / "pictures" / name / f"{i}.npy", frames)
    return folder / "pictures"


def test_images_are_learned_beside_clips_with_a_classifier_of_their_own(
    start: Checkpoint, clips: Path, tmp_path: Path
) -> None:
    options = replace(QUICK, epochs=15, train="all")
    document = trained(start, clips, tmp_path / "run", options, images=str(pictures(tmp_path)))
    assert document["images"] == 12
    found = formats.load(tmp_path / "run" / "last.safetensors")
    assert [name for name, _ in found.spec.classifiers] == ["video", "image", "classes"]
    image = found.select("image").with_clip(frames=1)
    assert image.labels == ("bright", "dark")
    shown = np.stack([np.full((1, 8, 8, 3), level, np.uint8) for level in (200, 50)])
    assert answers(image, shown).argmax(axis=1).tolist() == [0, 1]


def test_every_image_is_seen_as_often_as_the_others(
    start: Checkpoint, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = data.Clips.batch, Counter[str]()

    def batch(self: data.Clips, *given: Any) -> Any:
        found = real(self, *given)
        seen.update(found[2] if "bright" in self.labels else [])
        return found

    monkeypatch.setattr(data.Clips, "batch", batch)
    trained(
        start, clips, tmp_path / "run", replace(QUICK, accumulate=2), images=str(pictures(tmp_path))
    )  # 9 steps of 8
    assert seen == {f"{name}/{i}.npy": 6 for name in ("bright", "dark") for i in range(6)}


def test_parts_of_a_batch_add_up_to_its_gradient(start: Checkpoint, clips: Path, tmp_path: Path) -> None:
    plain = replace(QUICK, epochs=1, jitter=0.0, mirror=False)
    trained(start, clips, tmp_path / "one", plain)
    trained(formats.load(start.source), clips, tmp_path / "four", replace(plain, accumulate=4))
    first, second = (weights(tmp_path / name / "last.safetensors") for name in ("one", "four"))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-4)


def test_the_moving_average_is_what_is_kept(
    start: Checkpoint, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, real = weights(Path(start.source))["tubes.weights.0"].clone(), loop.Training._step
    steps: list[float] = []

    def step(self: loop.Training) -> None:
        real(self)
        keep = min(0.5, (len(steps) + 1) / (len(steps) + 10))
        expected.mul_(keep).add_((1 - keep) * self.parameters["tubes.weights.0"].detach())
        steps.append(keep)

    monkeypatch.setattr(loop.Training, "_step", step)
    trained(start, clips, tmp_path / "run", replace(QUICK, average=0.5))
    assert max(steps) == 0.5
    torch.testing.assert_close(weights(tmp_path / "run" / "last.safetensors")["tubes.weights.0"], expected)


def test_a_known_classifier_is_trained_further(start: Checkpoint, clips: Path, tmp_path: Path) -> None:
    trained(start, clips, tmp_path / "run")
    best = formats.load(tmp_path / "run" / "last.safetensors")
    task, _ = prepare.task(best, Sources(str(clips)), 0)
    assert (task.head, task.start.spec) == ("video", best.spec)


def test_a_loss_that_is_no_number_stops_and_keeps_the_state_before(
    start: Checkpoint, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = loop.Training._part, []

    def part(self: loop.Training, *given: Any) -> Any:
        loss, right, names = real(self, *given)
        calls.append(names)
        return (loss * float("nan") if len(calls) == 3 else loss), right, names

    monkeypatch.setattr(loop.Training, "_part", part)
    with pytest.raises(
        BackendError,
        match=r"step 3: the loss is nan .* the clips were (rise|fall)/\d+.npy, .*lower --lr, and another --out",
    ):
        trained(start, clips, tmp_path / "run")
    saved = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert saved["step"] == 2
    assert all(value.isfinite().all() for value in saved["weights"].values())


def test_clips_that_cannot_be_read_give_way_up_to_a_limit(start: Checkpoint, clips: Path, tmp_path: Path) -> None:
    (clips / "rise" / "00.npy").write_bytes(b"x")
    document = trained(
        start, clips, tmp_path / "run", unreadable=0.2, held_out=str(shutil.copytree(clips, tmp_path / "v"))
    )
    assert list(document["unread"]) == ["rise/00.npy"]
    assert document["rows"][0]["held_out_clips"] == 23
    for i in range(1, 8):
        (clips / "rise" / f"{i:02d}.npy").write_bytes(b"x")
    with pytest.raises(
        InputError, match=r"3 of 22 clips cannot be read, more than 10%; the first is .*npy cannot be read"
    ):
        trained(formats.load(start.source), clips, tmp_path / "other")


def test_clips_that_could_not_be_read_before_a_stop_are_listed_after_it(
    start: Checkpoint, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = str(shutil.copytree(clips, tmp_path / "held"))
    images = pictures(tmp_path)
    for broken in (clips / "rise" / "00.npy", images / "dark" / "1.npy", Path(held) / "fall" / "07.npy"):
        broken.write_bytes(b"x")
    real, judged = loop.Training.evaluate, []

    def evaluate(self: loop.Training, *given: Any) -> tuple[float, int]:
        judged.append(real(self, *given))
        if len(judged) == 3:
            raise KeyboardInterrupt
        return judged[-1]

    monkeypatch.setattr(loop.Training, "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        trained(start, clips, tmp_path / "run", held_out=held, images=str(images))
    document = trained(formats.load(start.source), clips, tmp_path / "run", held_out=held, images=str(images))
    assert set(document["unread"]) == {"rise/00.npy", "dark/1.npy", "fall/07.npy"}
    assert "cannot be read" in document["unread"]["dark/1.npy"]


@pytest.mark.parametrize(
    ("change", "sources", "message"),
    [
        (lambda clips: shutil.rmtree(clips / "fall"), {}, "all 12 clips of .* are 'rise'; a classifier needs two"),
        (
            lambda clips: shutil.move(clips / "fall" / "00.npy", clips),
            {},
            "1 of 24 clips of .* have no label, '00.npy'",
        ),
        (lambda clips: None, {"head": "classes"}, "the classifier 'classes' does not know 'fall', 'rise'; it has 2"),
        (lambda clips: None, {"head": "a b"}, "--head is 'a b'"),
        *(
            (lambda clips: None, {"head": name}, f"a classifier cannot be called '{name}', which PyTorch uses itself")
            for name in ("keys", "type", "training")
        ),
        (lambda clips: None, {"share": 0.0}, "--val-share is 0; expected a share between 0 and 1"),
        (lambda clips: None, {"share": 1.0}, "--val-share is 1;"),
        (lambda clips: None, {"share": -0.1}, "--val-share is -0.1;"),
        (lambda clips: None, {"share": float("nan")}, "--val-share is nan;"),
        (lambda clips: None, {"unreadable": -0.1}, "--max-unreadable is -0.1; expected a share of 0 to 1"),
        (lambda clips: None, {"unreadable": 2.0}, "--max-unreadable is 2;"),
        (
            lambda clips: [shutil.rmtree(clips / "fall"), shutil.rmtree(clips / "rise")],
            {},
            "nothing in .* can be read|no ",
        ),
        (lambda clips: None, {"held_out": "demo"}, "labels, among them .*which the model does not know"),
    ],
)
def test_data_that_does_not_fit(
    change: Any, sources: dict[str, Any], message: str, start: Checkpoint, clips: Path, tmp_path: Path
) -> None:
    change(clips)
    with pytest.raises((InputError, SpecError), match=message):
        trained(start, clips, tmp_path / "run", **sources)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_training_is_refused(start: Checkpoint, clips: Path, tmp_path: Path) -> None:
    trained(start, clips, tmp_path / "run")
    for other in (replace(QUICK, lr=0.02), replace(QUICK, train="all")):
        with pytest.raises(InputError, match="holds a training with other options, clips or model; give another --out"):
            trained(formats.load(start.source), clips, tmp_path / "run", other)
    changed = formats.load(start.source).with_clip(frames=8)
    with pytest.raises(InputError, match="holds a training with other options, clips or model"):
        trained(changed, clips, tmp_path / "run")
    (tmp_path / "run" / "state.pt").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"state\.pt is damaged"):
        trained(formats.load(start.source), clips, tmp_path / "run")


def test_another_classifier_is_another_training(start: Checkpoint, clips: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        trained(start, clips, tmp_path / name, replace(QUICK, epochs=1), head=name)
        start = formats.load(tmp_path / name / "last.safetensors")
    trained(formats.load(start.source), clips, tmp_path / "run", head="first")
    with pytest.raises(InputError, match="holds a training with other options, clips or model"):
        trained(formats.load(start.source), clips, tmp_path / "run", head="second")


def test_what_tells_trainings_apart(start: Checkpoint, clips: Path, tmp_path: Path) -> None:
    task, _ = prepare.task(start, Sources(str(clips), images=str(pictures(tmp_path))), 0)
    assert task.images is not None
    others = [
        task,
        replace(task, start=replace(task.start, options={"ema": "yes"})),
        replace(task, image_head="classes"),
        replace(task, clips=replace(task.clips, labels=("rise", "fall"))),
        replace(task, images=replace(task.images, labels=("dark", "bright"))),
        replace(task, images=None),
    ]
    keys = [one.key(options, 1) for one in others for options in (QUICK, replace(QUICK, average=0.5))]
    assert len({*keys, task.key(QUICK, 2)}) == 2 * len(others) + 1
    again, _ = prepare.task(formats.load(start.source), Sources(str(clips), images=str(tmp_path / "pictures")), 0)
    assert again.key(QUICK, 1) == task.key(QUICK, 1)


def test_a_state_that_the_system_refuses_is_not_called_damaged(
    start: Checkpoint, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(start, clips, tmp_path / "run", replace(QUICK, epochs=1))
    for refused in (PermissionError(13, "Permission denied"), MemoryError()):
        monkeypatch.setattr(torch, "load", lambda *_, error=refused, **__: (_ for _ in ()).throw(error))
        with pytest.raises(type(refused)):
            trained(formats.load(start.source), clips, tmp_path / "run", replace(QUICK, epochs=1))


def test_images_of_the_same_classes_have_their_own_classifier(start: Checkpoint, clips: Path, tmp_path: Path) -> None:
    images = pictures(tmp_path)
    for old, new in (("bright", "rise"), ("dark", "fall")):
        (images / old).rename(images / new)

    def heads_of(made: Checkpoint, **given: Any) -> tuple[str, str]:
        task, _ = prepare.task(made, Sources(str(clips), images=str(images), **given), 0)
        assert task.start.labels == ("fall", "rise")
        assert task.start.spec.classifiers[0][0] == task.head
        return task.head, task.image_head

    assert heads_of(start) == ("video", "image")
    document = trained(start, clips, tmp_path / "run", replace(QUICK, epochs=1), images=str(images))
    assert document["head"] == "video"
    both = formats.load(tmp_path / "run" / "last.safetensors")
    assert heads_of(both) == ("video", "image")
    assert heads_of(both, head="image") == ("image", "video")
    assert heads_of(both, image_head="video") == ("video", "video")  # asked for
    with pytest.raises(InputError, match=r"'image' is that of the clips; .* another name with --image-head"):
        heads_of(start, head="image")
    with pytest.raises(InputError, match=r"'classes' does not know 'fall', 'rise'; .* with --image-head"):
        heads_of(start, image_head="classes")
    with pytest.raises(InputError, match="--image-head is 'a b'"):
        heads_of(start, image_head="a b")


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert ranks._device(None, 1) == torch.device("cuda", 1)
    assert ranks._device("cpu", 5) == torch.device("cpu")
    with pytest.raises(InputError, match="process 3 of this machine has no GPU: there are 2; give --nproc-per-node 2"):
        ranks._device("cuda", 2)


def test_batches_that_processes_cannot_share(start: Checkpoint, clips: Path, tmp_path: Path) -> None:
    task, _ = prepare.task(start, Sources(str(clips)), 0)
    with pytest.raises(InputError, match="--batch 8 is not divisible by 3 processes times --accumulate 1"):
        loop.Training(task, QUICK, tmp_path, Ranks(0, 3, torch.device("cpu")))


def command(start: Checkpoint, clips: Path, out: Path, *more: str) -> list[str]:
    given = (
        "--data",
        clips,
        "--epochs",
        3,
        "--batch",
        8,
        "--lr",
        0.01,
        "--average",
        0.9,
        "--out",
        out,
        "--device",
        "cpu",
    )
    return ["finetune", start.source, *map(str, given), *more]


def test_the_command_trains_and_prints_json(edgetube_cli: Any, start: Checkpoint, clips: Path, tmp_path: Path) -> None:
    expected = trained(start, clips, tmp_path / "api", Recipe(epochs=3, batch=8, lr=0.01, average=0.9))
    code, out, _ = edgetube_cli(*command(start, clips, tmp_path / "run", "--json"))
    assert code == 0
    assert json.loads(out)["rows"] == expected["rows"]
    code, out, _ = edgetube_cli(*command(start, clips, tmp_path / "shown"))
    assert code == 0
    assert out.startswith("epoch 1 of 3  loss ")
    assert "of 2 held out" in out
    code, _, err = edgetube_cli(*command(start, clips, tmp_path / "none", "--threads", "0"))
    assert (code, "threads is 0; expected 1 to" in err) == (2, True)


@pytest.mark.slow
def test_a_signal_ends_a_training_that_then_goes_on(start: Checkpoint, clips: Path, tmp_path: Path) -> None:
    arguments = command(start, clips, tmp_path / "run")
    arguments[arguments.index("--epochs") + 1] = "4000"
    process = subprocess.Popen([sys.executable, "-m", "edgetube", *arguments])
    deadline = time.monotonic() + 300
    while not (tmp_path / "run" / "best.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 128 + signal.SIGTERM
    saved = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert saved["step"] > 0
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_two_processes_train_the_model_of_one(start: Checkpoint, clips: Path, tmp_path: Path) -> None:
    """Without augmentation, whose random numbers are each process's own."""
    plain = ("--no-mirror", "--jitter", "0", "--images", str(pictures(tmp_path)))
    recipe = Recipe(epochs=3, batch=8, lr=0.01, average=0.9, mirror=False, jitter=0.0)
    one = trained(start, clips, tmp_path / "one", recipe, images=str(pictures(tmp_path)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, "-m", "edgetube"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    found = subprocess.run(
        [sys.executable, *arguments, *command(start, clips, tmp_path / "two", *plain, "--json")],
        capture_output=True, text=True, env=environment, timeout=240,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    two = json.loads(found.stdout)
    assert two["processes"] == 2
    for first, second in zip(one["rows"], two["rows"], strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-3)
        assert second["held_out_top1"] == first["held_out_top1"]
    first, second = (weights(tmp_path / name / "last.safetensors") for name in ("one", "two"))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-3)
