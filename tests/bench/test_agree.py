"""One clip through several runtimes: the numbers are those of the logits, a planted fault is where it was planted."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgetube import bundle as bundles
from edgetube import datasets, runtimes
from edgetube.bench import agree, layers
from edgetube.bundle import Bundle
from edgetube.errors import BackendError, CheckpointError, InputError, MissingPackageError
from edgetube.precision import Precision
from edgetube.runtimes.base import Backend, LayerOutputs, Logits, Tap
from edgetube.video import Clip, Frames

DOCUMENT = Path(__file__).parents[2] / "docs" / "agree.md"


@pytest.fixture(scope="module")
def sound(tiny_bundle: Path) -> Bundle:
    return bundles.load(tiny_bundle)


@pytest.fixture(scope="module")
def clip(sound: Bundle) -> Clip:
    return datasets.single("demo", sound.labels).read(sound.contract)


class Known(Backend):
    """Answers what it is told, and shows the tensors that it is given."""

    def __init__(self, bundle: Bundle, logits: Sequence[float], shown: Mapping[str, Any] | None = None) -> None:
        super().__init__(bundle.contract, bundle.batch)
        self.logits, self.shown = np.array(logits, np.float32), shown or {}

    def infer(self, clips: Frames) -> Logits:
        return self.logits[None]

    def layers(self, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(name for name in names if name in self.shown)

    def tap(self, names: Sequence[str]) -> Tap:
        def show(clips: Frames) -> LayerOutputs:
            return {name: np.array(self.shown[name], np.float32)[None] for name in names}

        return show


Opens = Callable[[str], Backend]


def opened(monkeypatch: pytest.MonkeyPatch, by_name: Opens) -> None:
    """Bundles are opened by a function of their name."""
    monkeypatch.setattr(runtimes, "open_bundle", lambda bundle, **_: by_name(bundle.name))


def named(bundle: Bundle, *names: str) -> list[Bundle]:
    return [replace(bundle, name=name, path=Path("/nowhere") / name) for name in names]


def hot(**logits: float) -> list[float]:
    """Nine logits, those of `c3` and so on as given, the others 0."""
    return [logits.get(f"c{index}", 0.0) for index in range(9)]


class TestDifference:
    @pytest.mark.parametrize(
        ("one", "other", "expected"),
        [
            ([1, 2, -4], [1, 2, -4], 0.0),
            ([1, 2, -4], [1, 1, -4], 0.25),
            ([1, 2, -4], [1, 2, 4], 2.0),
            ([0, 0], [0, 0], 0.0),
            ([0, 0], [0, 5], 1.0),
            ([1, math.nan], [1, 0], math.inf),
            ([1, 0], [1, math.inf], math.inf),
        ],
    )
    def test_by_hand_in_both_orders(self, one: list[float], other: list[float], expected: float) -> None:
        a, b = np.array(one, np.float32), np.array(other, np.float32)
        assert agree.difference(a, b) == agree.difference(b, a) == expected

    def test_errors_of_two_artifacts_add_up(self) -> None:
        """38 dB each: twice the energy, 3.01 dB less; beside 80 dB nothing is lost."""
        assert layers.expected_between(Precision.W8A8, Precision.W8A8)[1] == pytest.approx(38 - 10 * math.log10(2))
        assert layers.expected_between(Precision.FP32, Precision.W8A8)[1] == pytest.approx(38, abs=0.01)
        assert layers.expected_between(Precision.FP16, Precision.W4) == layers.expected_between(
            Precision.W4, Precision.FP16
        )


class TestAnswers:
    def test_hand_made_logits(self, sound: Bundle, clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
        """a and b differ by 1 of 4; c has another answer, and differs by 4 of 4 from both."""
        logits = {"a": hot(c2=4.0, c5=3.0), "b": hot(c2=4.0, c5=2.0), "c": hot(c5=2.0, c7=4.0)}
        opened(monkeypatch, lambda name: Known(sound, logits[name]))
        found = agree.measure(named(sound, "a", "b", "c"), clip, reference=False)
        document = found.to_json()
        assert document["difference"] == {
            "names": ["a", "b", "c"],
            "matrix": [[0, 0.25, 1], [0.25, 0, 1], [1, 1, 0]],
        }
        assert [pair.same_class for pair in found.pairs] == [True, False, False]
        assert found.pairs[0].cosine == pytest.approx((16 + 6) / (5 * math.sqrt(20)))
        assert found.pairs[0].sqnr_db == pytest.approx(10 * math.log10(25 / 1))
        first = document["rows"][0]["top"]
        total = math.exp(4) + math.exp(3) + 7
        assert [one["label"] for one in first[:2]] == [sound.labels[2], sound.labels[5]]
        assert [one["score"] for one in first[:2]] == pytest.approx([math.exp(4) / total, math.exp(3) / total])
        assert {pair.note for pair in found.pairs} == {
            "a shows no inner tensors; b shows no inner tensors",
            "a shows no inner tensors; c shows no inner tensors",
            "b shows no inner tensors; c shows no inner tensors",
        }

    def test_the_gate_names_pairs_and_layers(self, sound: Bundle, clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
        ones = np.ones((4, 4))
        shown = {"a": ones, "b": ones * 1.00001, "c": ones * 3}
        logits = {"a": hot(c2=4.0), "b": hot(c2=4.0), "c": hot(c2=3.0)}
        opened(monkeypatch, lambda name: Known(sound, logits[name], {"blocks.0": shown[name], "tubes": ones}))
        found = agree.measure(named(sound, "a", "b", "c"), clip, reference=False)
        assert found.verdicts(None) == ()
        failed = [str(verdict) for verdict in found.verdicts(0.2) if not verdict.passed]
        asked = "difference at blocks.0 is 0.25, --max-difference asks for at most 0.2"
        assert failed == [f"a and c: {asked}", f"b and c: {asked}"]
        assert all(verdict.passed for verdict in found.verdicts(0.25))
        assert list(found.outliers()) == [("c", ("blocks.0",))]
        assert [one.layer for one in found.pairs[0].curve] == ["tubes", "blocks.0"]
        assert found.pairs[0].curve[1].sqnr_db == pytest.approx(100, abs=0.1)  # an error of 1e-5
        assert found.pairs[1].curve[1].sqnr_db == pytest.approx(10 * math.log10(1 / 4))

    def test_what_is_not_finite_is_told_and_fails_the_gate(
        self, sound: Bundle, clip: Clip, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ones = np.ones((4, 4))
        inner = {"a": ones, "b": ones, "c": np.full((4, 4), np.nan)}
        logits = {"a": hot(c2=4.0), "b": hot(c2=4.0), "c": hot(c2=math.nan)}
        opened(monkeypatch, lambda name: Known(sound, logits[name], {"tubes": ones, "blocks.1": inner[name]}))
        found = agree.measure(named(sound, "a", "b", "c"), clip, reference=False)
        assert [verdict.passed for verdict in found.verdicts(2.0)] == [True, False, False]
        assert list(found.outliers()) == [("c", ("blocks.1",))]
        document = json.loads(json.dumps(found.to_json(found.verdicts(2.0)), allow_nan=False))
        assert document["difference"]["matrix"] == [[0, 0, None], [0, 0, None], [None, None, 0]]
        assert document["rows"][2]["top"] == []
        assert document["rows"][2]["logits"][2] is None

    def test_two_bundles_of_one_name_have_their_paths(
        self, sound: Bundle, clip: Clip, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened(monkeypatch, lambda name: Known(sound, hot(c1=1.0)))
        same = [replace(sound, path=Path(folder)) for folder in ("/one/x", "/two/x", "/two/x")]
        found = agree.measure(same, clip, reference=False)
        assert [row.name for row in found.rows] == [str(Path("/one/x")), str(Path("/two/x"))]


class TestMissing:
    @pytest.mark.parametrize("error", [MissingPackageError("no vendor here"), BackendError("the driver says no")])
    def test_a_runtime_that_is_not_here_is_a_row_with_the_reason(
        self, sound: Bundle, clip: Clip, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        def by_name(name: str) -> Backend:
            if name == "b":
                raise error
            return Known(sound, hot(c2=1.0))

        opened(monkeypatch, by_name)
        document = agree.measure(named(sound, "a", "b", "c"), clip, reference=False).to_json()
        row = document["rows"][1]
        assert (row["name"], row["status"], row["logits"], row["reason"]) == ("b", None, None, str(error))
        assert document["difference"]["matrix"] == [[0, None, 0], [None, None, None], [0, None, 0]]
        assert [pair["names"] for pair in document["pairs"]] == [["a", "c"]]

    def test_inner_tensors_that_cannot_be_read_cost_no_answer(
        self, sound: Bundle, clip: Clip, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Blocked(Known):
            def tap(self, names: Sequence[str]) -> Tap:
                raise BackendError("out of memory")

        shown = {"tubes": np.ones((2, 2))}
        makers = {"a": Known, "b": Blocked, "c": Known}
        opened(monkeypatch, lambda name: makers[name](sound, hot(c2=1.0), shown))
        found = agree.measure(named(sound, "a", "b", "c"), clip, reference=False)
        notes = {pair.names: pair.note for pair in found.pairs}
        assert notes["a", "c"] == ""
        assert notes["a", "b"] == notes["b", "c"] == "b shows no inner tensors: out of memory"
        assert [len(pair.curve) for pair in found.pairs] == [0, 1, 0]

    def test_two_without_a_common_tensor_say_so(
        self, sound: Bundle, clip: Clip, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shown = {"a": {"tubes": np.ones(2)}, "b": {"blocks.0": np.ones(2)}}
        opened(monkeypatch, lambda name: Known(sound, hot(c2=1.0), shown[name]))
        (pair,) = agree.measure(named(sound, "a", "b"), clip, reference=False).pairs
        assert (pair.note, pair.departs) == ("the two show no tensor of the same name", None)

    def test_the_reference_is_a_row_where_it_is_found(self, sound: Bundle, clip: Clip) -> None:
        gone = replace(sound, checkpoint={**sound.checkpoint, "source": "/gone/tiny.safetensors"})
        with pytest.raises(BackendError, match=r"1 of 2 models answered here, .* reference: .*is not there"):
            agree.measure([gone], clip)
        with pytest.raises(CheckpointError, match="which is not there"):
            agree.measure([gone], clip, reference=True)
        found = agree.measure([sound], clip, by_layer=False)
        assert [row.name for row in found.rows] == ["reference", sound.name]
        assert found.pairs[0].difference < 1e-5
        assert found.pairs[0].note == "layers were not compared"

    def test_one_model_alone_is_refused(self, sound: Bundle, clip: Clip) -> None:
        with pytest.raises(BackendError, match=r"1 of 1 models answered here, .* give two bundles, or --checkpoint"):
            agree.measure([sound], clip, reference=False)
        with pytest.raises(InputError, match="no bundles"):
            agree.measure([], clip)

    def test_bundles_need_no_torch(self, tiny_bundle: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(tiny_bundle, tmp_path / "copy")
        code = (
            "import sys; sys.modules['torch'] = None; from edgetube import cli; "
            f"cli.main(['agree', {str(tiny_bundle)!r}, {str(copy)!r}, 'demo', '--json'])"
        )
        ran = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd="/")
        assert ran.returncode == 0, ran.stderr
        document = json.loads(ran.stdout)
        assert "torch is not installed" in document["rows"][0]["reason"]
        assert len(document["pairs"]) == 1
        assert document["pairs"][0]["curve"]


class TestOneModel:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda b: replace(b, labels=(*b.labels[:-1], "else")), "differ in labels: labels is"),
            (lambda b: replace(b, contract=replace(b.contract, fps=30.0)), "differ in input: fps is 10.0 and 30.0"),
            (lambda b: replace(b, spec=replace(b.spec, norm_eps=1e-3)), "differ in model: norm_eps is .* and 0.001"),
            (
                lambda b: replace(b, checkpoint={**b.checkpoint, "sha256": "f" * 64}),
                "differ in checkpoint: sha256 is .* and fff",
            ),
        ],
    )
    def test_bundles_of_two_models_are_refused(
        self, sound: Bundle, clip: Clip, change: Callable[[Bundle], Bundle], said: str
    ) -> None:
        with pytest.raises(InputError, match=said):
            agree.measure([sound, replace(change(sound), path=Path("/other"))], clip)


@pytest.fixture(scope="module")
def broken(sound: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("broken") / "broken.onnx-fp32"
    shutil.copytree(sound.path, folder)
    model = onnx.load(folder / sound.artifact)
    weight = next(one for one in model.graph.initializer if one.name == "blocks.1.attn.proj.weight")
    weight.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(weight), weight.name))
    onnx.save(model, folder / sound.artifact)
    return bundles.seal(replace(sound, path=folder, name="broken"))


@pytest.fixture(scope="module")
def found(sound: Bundle, broken: Bundle, clip: Clip) -> agree.Agreement:
    return agree.measure([sound, broken], clip)


class TestFault:
    """A weight in the middle of one of three artifacts is doubled."""

    def test_it_departs_from_both_others_at_its_layer(self, found: agree.Agreement, sound: Bundle) -> None:
        departs = {pair.names: pair.departs and pair.departs[0] for pair in found.pairs}
        assert departs == {
            ("reference", sound.name): None,
            ("reference", "broken"): "blocks.1.attn.proj",
            (sound.name, "broken"): "blocks.1.attn.proj",
        }
        assert list(found.outliers()) == [("broken", ("blocks.1.attn.proj",))]

    def test_two_artifacts_also_compare_what_lies_between_modules(self, found: agree.Agreement) -> None:
        names = [[one.layer for one in pair.curve] for pair in found.pairs]
        assert "blocks.0.attn.softmax" in names[2]
        assert "blocks.0.attn.softmax" not in names[0]

    def test_every_key_is_documented(self, found: agree.Agreement) -> None:
        text = DOCUMENT.read_text("utf-8").split("## `--json`")[1]
        named = set(re.findall(r"`(\w+)`", text))

        def keys(value: Any) -> set[str]:
            if isinstance(value, dict):
                return set(value) | set().union(
                    *(keys(v) for k, v in value.items() if k not in ("runtime", "versions"))
                )
            return set().union(*map(keys, value)) if isinstance(value, list) else set()

        assert keys(found.to_json(found.verdicts(0.1))) - named == set()

    def test_the_table_says_it(self, found: agree.Agreement, capsys: pytest.CaptureFixture[str]) -> None:
        from edgetube import terminal

        terminal.agree(found.to_json())
        said = capsys.readouterr().out
        assert "broken departs from all others that show layers, at blocks.1.attn.proj" in said
        assert "1 of 3 pairs depart at no layer" in said
