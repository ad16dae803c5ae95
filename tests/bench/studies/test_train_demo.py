from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from edgetube import demo
from edgetube.demo.moves import DIRECTIONS, LABELS
from edgetube.demo.render import Photo
from edgetube.video import Clip, Frames
from tests.edgetube.demo import oracle as independent

torch = pytest.importorskip("torch")

from edgetube.bench.studies import train_demo  # noqa: E402  (needs torch)

# Written out by hand: what a viewer of the changed clip would say.
EXPECTED = {
    "mirror": {"pan-left": "pan-right", "pan-right": "pan-left", "roll-cw": "roll-ccw", "roll-ccw": "roll-cw"},
    "upside-down": {"tilt-up": "tilt-down", "tilt-down": "tilt-up", "roll-cw": "roll-ccw", "roll-ccw": "roll-cw"},
    "reverse": {
        "pan-left": "pan-right",
        "pan-right": "pan-left",
        "tilt-up": "tilt-down",
        "tilt-down": "tilt-up",
        "zoom-in": "zoom-out",
        "zoom-out": "zoom-in",
        "roll-cw": "roll-ccw",
        "roll-ccw": "roll-cw",
    },
    "transpose": {
        "pan-left": "tilt-up",
        "pan-right": "tilt-down",
        "tilt-up": "pan-left",
        "tilt-down": "pan-right",
        "roll-cw": "roll-ccw",
        "roll-ccw": "roll-cw",
    },
}


@pytest.fixture(scope="module")
def oracle() -> ModuleType:
    return independent


def change(name: str, frames: Frames) -> Frames:
    """The operation on one clip (T, H, W, 3)."""
    return train_demo.SYMMETRIES[name][0](torch.from_numpy(frames)[None])[0].numpy()


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return list(demo.evaluation(train_demo.CONTRACT, 54))


@pytest.mark.parametrize("name", EXPECTED)
def test_label_table(name: str) -> None:
    became = [LABELS[i] for i in train_demo.relabel(train_demo.SYMMETRIES[name][1])]
    assert became == [EXPECTED[name].get(label, label) for label in LABELS]


@pytest.mark.parametrize("name", EXPECTED)
def test_label_table_against_the_frames(name: str, clips: list[Clip], oracle: ModuleType) -> None:
    """The estimated travel of a changed clip is the estimated travel of the clip, changed."""
    matrix = train_demo.SYMMETRIES[name][1]
    for clip in clips[:18]:
        before, after = oracle.travel(clip.frames), oracle.travel(change(name, clip.frames))
        np.testing.assert_allclose(after, matrix @ before, atol=0.02)


def test_augment_keeps_frames_travel_and_label_together(clips: list[Clip], oracle: ModuleType) -> None:
    torch.manual_seed(0)
    frames = torch.from_numpy(np.stack([clip.frames for clip in clips]))
    label = torch.tensor([LABELS.index(clip.label) for clip in clips])
    travel = torch.tensor([DIRECTIONS[str(clip.label)] for clip in clips], dtype=torch.float32)
    changed, moved, named = train_demo.augment(frames, travel, label)
    assert changed.shape == frames.shape
    assert changed.dtype == torch.uint8
    assert (named != label).float().mean() > 0.4
    for direction, index in zip(moved.int().tolist(), named.tolist(), strict=True):
        assert DIRECTIONS[LABELS[index]] == tuple(direction)
    seen = [oracle.label(clip) for clip in changed.numpy()]
    assert np.mean([guess == LABELS[index] for guess, index in zip(seen, named.tolist(), strict=True)]) >= 0.85


def test_true_flow_is_the_renderers(clips: list[Clip]) -> None:
    """The flow that the probe learns, against where the renderer itself puts the points of the photo."""
    from edgetube.demo import render

    trainee = train_demo.Trainee()
    view = render.View((300.0, 200.0), 100.0, 0.0)
    size = train_demo.SPEC.size
    at = trainee.at.numpy().T * (np.array(size)[::-1, None] - 1)
    for step in np.diag([0.01, 0.01, 0.01, 0.01]):
        path = np.stack([np.zeros(4), step]).astype(np.float32)
        seen = render.project(view, path, size, at.astype(np.float32))  # where on the photo each tube looks
        flow = (seen[:, 0] - seen[:, 1]) / view.scale  # a point of the photo moves the other way
        expected = trainee.true_flow(torch.tensor(step, dtype=torch.float32)[None])[0].numpy().T
        np.testing.assert_allclose(flow, expected, atol=4e-4)


def test_flow_tells_gabors_apart() -> None:
    torch.manual_seed(0)
    weight = train_demo.gabors(8, 3, 8, 8, 8)
    assert weight.shape == (8, 3, 8, 8, 8)
    assert weight.sum(dim=(2, 3, 4)).abs().max() < 1e-3  # blind to brightness
    pairs = weight.mean(dim=1).flatten(1).unflatten(0, (4, 2))
    cosine = (pairs[:, 0] * pairs[:, 1]).sum(-1) / pairs.norm(dim=-1).prod(-1)
    assert cosine.abs().max() < 0.3  # in quadrature


def write_pictures(folder: Path, count: int) -> None:
    import av

    folder.mkdir(exist_ok=True)
    for seed in range(count):
        coarse = np.random.default_rng(seed).uniform(0, 255, (25, 25, 3))
        pixels = np.kron(coarse, np.ones((8, 8, 1))).astype(np.uint8)
        with av.open(str(folder / f"{seed:02d}.png"), "w", format="image2") as container:
            stream = container.add_stream("png", rate=1)
            stream.width, stream.height, stream.pix_fmt = 200, 200, "rgb24"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())


def test_sources_are_distinct_textured_and_not_the_shipped_ones(tmp_path: Path) -> None:
    write_pictures(tmp_path / "a", 6)
    write_pictures(tmp_path / "b", 2)  # the same as the first two of a
    shipped = demo.photo_files()[0]
    (tmp_path / "copy.jpg").write_bytes(shipped.read_bytes())
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "broken.png").write_bytes(b"no picture either")
    sources = train_demo.load_sources([tmp_path])
    assert len(sources) == 6
    assert not any(train_demo.alike(source.look, train_demo.look(Photo.read(shipped).pixels)) for source in sources)
    held_out = [source for source in sources if source.held_out]
    assert len(held_out) == sum(int(source.digest, 16) % train_demo.HELD_OUT == 0 for source in sources)


def test_a_shrunk_or_recompressed_picture_looks_alike() -> None:
    looks = {}
    for path in demo.photo_files():
        pixels = Photo.read(path).pixels
        small = train_demo.resize(pixels.astype(np.float32), 128).astype(np.uint8)
        looks[path.stem] = train_demo.look(pixels)
        assert train_demo.alike(looks[path.stem], train_demo.look(small)), path.stem
    assert not any(train_demo.alike(a, b) for a, b in itertools.combinations(looks.values(), 2))


def test_plain_pictures_are_recognised() -> None:
    flat = np.full((200, 200, 3), 70, np.uint8)
    assert train_demo.plain(flat)
    assert not train_demo.plain(np.random.default_rng(0).integers(0, 255, (200, 200, 3)).astype(np.uint8))


def test_made_up_pictures(tmp_path: Path) -> None:
    write_pictures(tmp_path, 3)
    sources = train_demo.load_sources([tmp_path])
    for seed in range(20):
        made = train_demo.picture(sources, np.random.default_rng(seed))
        assert made.dtype == np.uint8
        assert 160 <= made.shape[0] == made.shape[1] < 480
        assert not train_demo.plain(made)


def test_schedule() -> None:
    values = [train_demo.schedule(step, 1000) for step in range(1001)]
    assert values[0] < 0.01
    assert max(values) == values[300] == 1.0
    assert values[1000] == 0.0
    assert values[800] == pytest.approx(0.5)


@pytest.mark.long
def test_a_run_goes_on_after_a_stop(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", 6)
    script = Path(train_demo.__file__).resolve()
    command = [sys.executable, script, "--sources", tmp_path / "pictures", "--work", tmp_path / "run"]
    command += ["--pool", "32", "--batch", "8", "--workers", "1", "--trainers", "2", "--steps"]
    for steps in ("2", "4"):
        done = subprocess.run([*map(str, command), steps], capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        assert f"step {steps} evaluation" in done.stdout
    assert "goes on after step 2" in done.stdout
    from edgetube.model import checkpoints

    assert checkpoints.load(tmp_path / "run" / "motion.safetensors").labels == LABELS
