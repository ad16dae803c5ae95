"""What holds for every test: one torch thread per process, seeded numbers, and Hypothesis without a clock."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest

# Two workers with two threads each on two cores spend their time waiting for one another. Set before torch and
# ONNX Runtime are imported, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests leave no clips in the user's cache folder.
os.environ["EDGETUBE_CLIPS_GB"] = "0"

# The same examples in every run, so that a failure is a change of the code; HYPOTHESIS_PROFILE=explore looks further.
hypothesis.settings.register_profile("repeat", derandomize=True, deadline=None, max_examples=50, database=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))


@pytest.fixture
def rng() -> np.random.Generator:
    """Seeded random numbers."""
    return np.random.default_rng(0)


@pytest.fixture
def heard_signals() -> Iterator[None]:
    """Signals reach the test, also under `nohup`, which starts it with some of them ignored."""
    from edgetube import interrupts

    ignored = [number for number in interrupts.SIGNALS if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture
def edgetube_cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line; gives (exit code, stdout, stderr)."""
    from edgetube import cli

    def run(*args: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(a) for a in args])
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of a few thousand weights that knows the built-in labels, saved as a user would save it."""
    import torch

    from edgetube import demo
    from edgetube.contract import InputContract
    from edgetube.model import checkpoints
    from edgetube.model.transformer import VideoTransformer
    from edgetube.spec import ModelSpec, TubeSpec

    tubes = (TubeSpec((4, 8, 8), (4, 16, 16), space_to_depth=(2, 1, 1)), TubeSpec((1, 16, 16), (8, 16, 16)))
    spec = ModelSpec(tubes, 8, (32, 48), 24, 2, 2, (("motion", len(demo.LABELS)), ("other", 2)))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = VideoTransformer(spec).eval()
    contract = InputContract(8, 32, 48, fps=10.0, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    checkpoints.save(checkpoints.Checkpoint("tiny", model, contract, demo.LABELS, "", {"other": ("no", "yes")}), path)
    return path


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as an onnx-fp32 bundle; shared by all tests, so nobody may write in it."""
    from edgetube.export import pipeline

    options = pipeline.Options(lowering="gather")
    return pipeline.export_model("onnx-fp32", tiny_checkpoint, tmp_path_factory.mktemp("bundles"), options).path
