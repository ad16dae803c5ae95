"""Every example runs on a file, as its first lines say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import edgetube
from edgetube import demo

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"

CV2 = '''
"""As much of OpenCV as the example uses: BGR, read into the caller's buffer."""
import numpy as np
from edgetube import video

COLOR_BGR2RGB, CAP_PROP_POS_MSEC = 4, 0


class VideoCapture:
    def __init__(self, source):
        self.frames, self.seconds = video.frames(source), 0.0

    def read(self, image=None):
        item = next(self.frames, None)
        if item is None:
            return False, None
        self.seconds, rgb = item
        image = np.empty_like(rgb) if image is None else image
        image[...] = rgb[..., ::-1]
        return True, image

    def get(self, what):
        return self.seconds * 1e3

    def release(self):
        pass


def cvtColor(source, code, target=None):
    target = np.empty_like(source) if target is None else target
    target[...] = source[..., ::-1]
    return target
'''


@pytest.fixture
def clip() -> str:
    return str(demo.videos()["pan-left"])


def run(name: str, arguments: Sequence[object], path: Path) -> list[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{path}"}
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"camera.py", "many_cameras.py", "opencv.py"}


def test_camera(tiny_bundle: Path, tmp_path: Path, clip: str) -> None:
    *answers, account = run("camera.py", [tiny_bundle, clip, "--hop", "0.2s"], tmp_path)
    assert len(answers) > 3
    assert answers[0].startswith("   0.00-0.80 s")
    assert "waiting=0" in account


def test_camera_says_what_is_wrong(tiny_bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "camera.py"), str(tiny_bundle), str(tmp_path / "none.mp4")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_many_cameras(tiny_bundle: Path, tmp_path: Path, clip: str) -> None:
    tilt = demo.videos()["tilt-up"]
    lines = run("many_cameras.py", [tiny_bundle, f"one={clip}", f"two={tilt}"], tmp_path)
    for name in ("one", "two"):
        own = [line for line in lines if line.startswith(name)]
        assert sum("ms old" in line for line in own) > 1
        assert "closed" in own[-1]
        assert "waiting=0" in own[-1]


def test_opencv(tiny_bundle: Path, tmp_path: Path, clip: str) -> None:
    """One buffer for every frame, BGR: the answers are those of the file."""
    (tmp_path / "cv2.py").write_text(CV2)
    lines = run("opencv.py", [tiny_bundle, clip], tmp_path)
    expected = run("camera.py", [tiny_bundle, clip, "--hop", "2"], tmp_path)[:-1]
    assert [line.split() for line in lines] == [line.split()[: len(lines[0].split())] for line in expected][
        : len(lines)
    ]
    assert len(expected) - len(lines) <= 1  # a file's last frame stays on display, a camera's does not


BLOCKS = re.findall(r"```python\n(.+?)```", (ROOT / "docs" / "runtime.md").read_text("utf-8"), re.DOTALL)


@pytest.mark.parametrize("what", ["rt.predict(", "rt.stream(", "cameras.wait()", "edgetube.Window("])
def test_the_page_on_the_runtime(what: str, tiny_bundle: Path, clip: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its programs run, with a file in place of each camera."""
    (code,) = [block for block in BLOCKS if what in block]
    for given, here in {
        "out/demo.onnx-fp32": str(tiny_bundle), "out/demo.onnx-int8": str(tiny_bundle), "clip.mp4": clip,
        "rtsp://camera/stream": clip, "rtsp://door/stream": clip, '"yard": 0': f'"yard": {clip!r}',
    }.items():  # fmt: skip
        code = code.replace(given, here)
    with edgetube.Runtime(tiny_bundle, threads=1) as rt:
        exec(code, {"edgetube": edgetube, "rt": rt})
    assert len(capsys.readouterr().out.splitlines()) >= 1
