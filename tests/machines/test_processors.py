"""The product on processors that this machine has not: x86 without VNNI, x86 without AVX, and aarch64, under QEMU.

Each target answers its golden clips, 20 evaluation clips and a decoded video. A process there is hundreds of times
slower than here, so all questions to one processor are asked at the same time. Targets of floats answer for a model of
a few thousand weights: a clip of the built-in one takes them half a minute on Haswell.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgetube import export, runtimes

pytestmark = pytest.mark.machines

HERE = Path(__file__).parent
CPU = "cpu"
"""The setting that chooses the form of an artifact by processor."""

PIXELS, VIDEO_TOLERANCE = 2, 0.02
"""Of 255, how far a decoded pixel may be off (FFmpeg's scaler rounds differently in the vector code of processors);
and how far logits then move, of the largest one. Measured on aarch64: 2, and 0.004."""

Question = tuple[str, Path, Path, str]
"""What `windows.py` is given: command, bundle, clips, how many of them."""

Answers = Mapping[str, Mapping[str, Any]]


def here() -> list[str]:
    """Targets that this environment can build and run, but what is hopeless under QEMU.

    That is what a vendor simulates by itself, and runtimes that need torch, whose import takes minutes there.
    """
    found = (t for t in export.targets().values() if not t.missing(t.build_needs + t.run_needs))
    return [t.name for t in found if not runtimes.simulated(t.backend) and "torch" not in t.run_needs]


EXTRAS = ("litert",)
"""What is installed on aarch64 beside the base install."""


def forms() -> list[str]:
    """Targets of the base install and of `EXTRAS`, each once more for every other form that it can be built in."""
    needs = {"onnxruntime", *(need for t in export.targets().values() if t.backend in EXTRAS for need in t.run_needs)}
    named = []
    for target in export.targets().values():
        if needs >= set(target.run_needs) and not target.missing(target.build_needs):
            others = [form for s in target.settings if s.name == CPU for form in s.allowed if form != s.default]
            named += [target.name, *(f"{target.name} {CPU}={form}" for form in others)]
    return named


CASES = {"Haswell": here(), "Nehalem": here(), "aarch64": forms()}
"""AVX2 without VNNI; no AVX; ARM."""


@pytest.fixture(scope="session")
def question(
    films: SimpleNamespace,
    tiny_checkpoint: Path,
    exported: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Question]:
    """What is asked of a target: of the built-in model or, if it computes in floats, of the tiny one."""
    folder = tmp_path_factory.mktemp("processors")
    clips, few = films.clips(folder / "clips.npz"), films.clips(folder / "few.npz", tiny_checkpoint)

    @cache
    def asked(name: str) -> Question:
        if export.target(name.partition(" ")[0]).precision.quantises_activations:
            return "probe", exported(name), clips, "20"
        return "probe", exported(name, tiny_checkpoint), few, "20"

    return asked


@pytest.fixture(scope="session")
def answers(
    question: Callable[[str], Question], emulation: SimpleNamespace, request: pytest.FixtureRequest
) -> Callable[[str], Answers]:
    """What a processor answers to all questions, or what it failed with."""

    @cache
    def ask(processor: str) -> Answers:
        try:
            arm = processor == "aarch64"
            machine = emulation.aarch64(request.getfixturevalue("wheel"), EXTRAS) if arm else emulation.x86(processor)
        except emulation.Absent as error:
            pytest.skip(str(error))

        def one(asked: Question) -> Mapping[str, Any]:
            done = machine.run(HERE / "windows.py", *asked)
            if done.returncode:
                return {"failed": [line for line in done.stderr.splitlines() if "TCG" not in line][-3:]}
            answer: Mapping[str, Any] = json.loads(done.stdout)
            return answer

        questions = {name: question(name) for name in CASES[processor]}
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            return dict(zip(questions, pool.map(one, questions.values()), strict=True))

    return ask


@pytest.mark.parametrize(("processor", "name"), [(cpu, name) for cpu, names in CASES.items() for name in names])
def test_another_processor_answers_like_pytorch(processor: str, name: str, answers: Callable[[str], Answers]) -> None:
    tolerance = export.target(name.partition(" ")[0]).tolerance or 0.05
    found = answers(processor)[name]
    assert set(found.get("doctor", {}).values()) == {True}, found
    assert found["pixels"] <= PIXELS, found
    assert found["agreement"] == 1.0, found
    assert found["worst_cosine"] >= 0.99, found
    largest = max(1.0, found["max_abs_logit"])
    assert found["max_abs_error"] <= tolerance * largest, found
    assert found["video_error"] <= max(tolerance, VIDEO_TOLERANCE) * largest, found
