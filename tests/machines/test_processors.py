"""The product on processors that this machine has not: x86 without VNNI, x86 without AVX, and aarch64, under QEMU.

A process there is hundreds of times slower than here. So all questions to one processor are asked at the same time,
and targets of floats answer the evaluation clips of a model of a few thousand weights; of the built-in model they
answer the golden clip, the video and one clip.
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

from edgetube import export
from edgetube.export import pipeline

pytestmark = pytest.mark.slow

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
    """Targets that this environment can build and run."""
    return [t.name for t in export.targets().values() if not t.missing(t.build_needs + t.run_needs)]


def forms() -> list[str]:
    """Targets of the base install, and each once more for every other form that it can be built in."""
    named = []
    for target in export.targets().values():
        if target.run_needs == ("onnxruntime",):
            others = [form for s in target.settings if s.name == CPU for form in s.allowed if form != s.default]
            named += [target.name, *(f"{target.name} {CPU}={form}" for form in others)]
    return named


CASES = {"Haswell": here(), "Nehalem": here(), "aarch64": forms()}
"""AVX2 without VNNI; no AVX; ARM."""


@pytest.fixture(scope="session")
def question(
    films: SimpleNamespace, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Question]]:
    """What is asked of a target: of the built-in model and, if it computes in floats, of the tiny one."""
    folder = tmp_path_factory.mktemp("processors")
    clips, few = films.clips(folder / "clips.npz"), films.clips(folder / "few.npz", tiny_checkpoint)

    @cache
    def asked(name: str) -> dict[str, Question]:
        target, _, setting = name.partition(" ")
        options = pipeline.Options(settings=dict([setting.split("=")]) if setting else {})
        out = folder / name.replace(" ", "-")
        integer = export.target(target).precision == "int8"
        bundle = pipeline.export_model(target, "demo", out, options).path
        own = bundle.rename(bundle.with_name(out.name))
        whole: dict[str, Question] = {name: ("probe", own, clips, "20" if integer else "1")}
        if integer:
            return whole
        tiny = pipeline.export_model(target, tiny_checkpoint, out, options).path
        return whole | {f"{name} tiny": ("probe", tiny, few, "20")}

    return asked


@pytest.fixture(scope="session")
def answers(
    question: Callable[[str], dict[str, Question]], emulation: SimpleNamespace, request: pytest.FixtureRequest
) -> Callable[[str], Answers]:
    """What a processor answers to all questions, or what it failed with."""

    @cache
    def ask(processor: str) -> Answers:
        try:
            arm = processor == "aarch64"
            machine = emulation.aarch64(request.getfixturevalue("wheel")) if arm else emulation.x86(processor)
        except emulation.Absent as error:
            pytest.skip(str(error))

        def one(asked: Question) -> Mapping[str, Any]:
            done = machine.run(HERE / "windows.py", *asked)
            if done.returncode:
                return {"failed": [line for line in done.stderr.splitlines() if "TCG" not in line][-3:]}
            answer: Mapping[str, Any] = json.loads(done.stdout)
            return answer

        questions = {which: asked for name in CASES[processor] for which, asked in question(name).items()}
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            return dict(zip(questions, pool.map(one, questions.values()), strict=True))

    return ask


@pytest.mark.parametrize(("processor", "name"), [(cpu, name) for cpu, names in CASES.items() for name in names])
def test_another_processor_answers_like_pytorch(processor: str, name: str, answers: Callable[[str], Answers]) -> None:
    tolerance = export.target(name.partition(" ")[0]).tolerance or 0.05
    for which in (name, f"{name} tiny"):
        if which in answers(processor):
            found = answers(processor)[which]
            assert set(found.get("doctor", {}).values()) == {True}, found
            assert found["pixels"] <= PIXELS, found
            assert found["agreement"] == 1.0, found
            assert found["worst_cosine"] >= 0.99, found
            largest = max(1.0, found["max_abs_logit"])
            assert found["max_abs_error"] <= tolerance * largest, found
            assert found["video_error"] <= max(tolerance, VIDEO_TOLERANCE) * largest, found
