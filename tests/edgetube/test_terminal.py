"""What a person sees: any name, on any encoding, and nothing that a terminal would act on."""

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.text import Text

from edgetube import terminal
from edgetube.contract import InputContract
from edgetube.errors import DeviceWarning, InputWarning
from edgetube.spec import Prediction

NAMES = (
    "Ünï cödé 影 😀.mp4",
    "\x1b]0;owned\x07\x1b[2J.mp4",
    "new\nline\r.mp4",
    os.fsdecode(b"caf\xe9.mp4"),
    "[red]50%[bold] :dog: off [a].mp4",
)


ENCODINGS = ("utf-8", "ascii", "cp1252", "latin-1")


def streams(encoding: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Put stdout and stderr of an encoding in place, prepared; gives what was written to both."""
    files = [(raw := io.BytesIO(), io.TextIOWrapper(raw, encoding=encoding)) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", files[0][1])
    monkeypatch.setattr(sys, "stderr", files[1][1])
    monkeypatch.setattr(logging.root, "handlers", [])
    terminal.prepare()

    def written() -> str:
        for _, file in files:
            file.flush()
        return "".join(raw.getvalue().decode(encoding) for raw, _ in files)

    return written


@pytest.mark.parametrize(
    ("contract", "sampling", "geometry"),
    [
        (
            InputContract(16, 224, 224, fps=15.0),
            "16 at 15.0 fps",
            "resized until the crop is covered (bilinear), crop center 224 x 224; mean 0.5, std 0.5",
        ),
        (
            InputContract(
                16,
                224,
                224,
                resize_size=256,
                crop="center-floor",
                sampling="stride",
                stride=4,
                mean=(0.4, 0.5, 0.6),
            ),
            "16 with stride 4, in frames of the source",
            "short side 256 (bilinear), crop center-floor 224 x 224; mean 0.4 0.5 0.6, std 0.5",
        ),
        (
            InputContract(8, 224, 224, resize="stretch", resize_size=(256, 248), filter="bicubic", sampling="segments"),
            "the middle ones of 8 equal segments of the whole video",
            "stretched to 256 x 248 (bicubic), crop center 224 x 224; mean 0.5, std 0.5",
        ),
        (
            InputContract(1, 224, 200, resize="stretch"),
            "1 at any fps",
            "stretched to 224 x 200 (bilinear), crop center 224 x 200; mean 0.5, std 0.5",
        ),
    ],
)
def test_the_input_in_words(contract: InputContract, sampling: str, geometry: str) -> None:
    assert (terminal._sampling(contract), terminal._geometry(contract)) == (sampling, geometry)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", NAMES)
def test_any_name_on_any_encoding(encoding: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = streams(encoding, monkeypatch)
    prediction = Prediction(label=name, score=0.5, scores={name: 0.5, name + "2": 0.1}, logits=(), latency_ms=1.0)
    terminal.prediction(name, prediction)
    terminal.say(name)
    terminal.error(name)
    terminal.warn("note", name)
    terminal.wrote(Path(name))
    terminal.print_json({name: name})
    logging.getLogger("edgetube").info("engine %s", name)
    with terminal.progress() as show:
        show(name, 3, 3)
    found = terminal.table("a", name)
    terminal.add(found, name, Text("ok", "green"))
    terminal.out.print(found)
    text = written()
    assert not any(character in text for character in "\x1b\x07\r")
    assert text.count("owned") == name.count("owned") * 13
    assert text.count("50%") == text.count(":dog: off [a].mp4") == name.count("50%") * 13
    assert len([line for line in text.splitlines() if line.startswith("error: ")]) == 1


@pytest.mark.parametrize(("encoding", "shown"), [("utf-8", "影\n"), ("ascii", "\\u5f71\n"), ("cp1252", "\\u5f71\n")])
def test_what_an_encoding_lacks_is_escaped(encoding: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = streams(encoding, monkeypatch)
    terminal.say("影")
    assert written() == shown


def test_progress_in_a_pipe_goes_on_while_a_stage_lasts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with terminal.progress() as show:
        for done in range(7):
            show("read clips", done, 6)
            now += 4
        show("scan", 0, 0)
        now += 11
        show("scan", 5, 0)
    lines = ["read clips: 3 of 6", "read clips: done (6)", "scan: 5"]
    assert capsys.readouterr().err.splitlines() == lines


def test_own_warnings_are_lines_and_others_are_pythons(monkeypatch: pytest.MonkeyPatch) -> None:
    written = streams("utf-8", monkeypatch)

    def read() -> None:
        with terminal.own_warnings():
            for _ in range(2):
                warnings.warn("a.ts is damaged\nat 1 s", InputWarning, stacklevel=1)
            warnings.warn("ssh://pi: openvino is left out", DeviceWarning, stacklevel=1)
            warnings.warn("something else", UserWarning, stacklevel=1)

    with pytest.warns(UserWarning, match="something else") as others:
        read()
    own = [r"warning: a.ts is damaged\nat 1 s"] * 2 + ["warning: ssh://pi: openvino is left out"]
    assert written().splitlines() == own
    assert len(others) == 1


@pytest.mark.parametrize(
    ("name", "tubes", "encoder"),
    [
        ("paper", "-> 2x2x2 tokens;", "44 tokens, width 24, 2 blocks, 2 heads"),
        ("dense", "2x8x8 every 2x8x8 -> 2x2x3 tokens", "12 tokens, width 24, 2 blocks, 2 heads"),
        ("class-token", "1x8x8 every 1x8x8 -> 1x3x2 tokens", "6 + 3 prefix tokens, width 24, 2 blocks, 2 heads"),
        ("rotary", "2x8x8 every 2x8x8 -> 2x2x3 tokens", "12 + 1 prefix tokens, width 48, 2 blocks, 3 heads"),
        ("divided", "-> 3x2x3 tokens", "18 + 2 prefix tokens, width 24, 2 blocks, 2 heads"),
        ("gated-mlp", "-> 1x2x3 tokens a frame", "6 + 1 prefix tokens a frame, width 24, 2 blocks, 2 heads"),
    ],
)
def test_the_facts_of_any_transformer(name: str, tubes: str, encoder: str) -> None:
    from tests.export.models import SPECS

    spec = SPECS[name]
    facts = dict(terminal._model_facts(spec, InputContract(spec.frames, *spec.size)))
    assert tubes in facts["tubes"]
    assert facts["encoder"] == encoder
    if spec.rotary:
        assert f"rotary positions over {', '.join(spec.rotary.axes)}, " in terminal._answer(spec)
    assert terminal._answer(spec).startswith("divided attention, ") == (spec.attention == "divided")
