"""A calibration on disk: what was kept comes back exactly, whole or not at all, and one process at a time has it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgetube.calibration import cache
from edgetube.calibration.cache import Cache, open_cache
from edgetube.calibration.layerwise import CalibrationState, Choice
from edgetube.calibration.table import CalibrationTable, LinearPlan, Range

KEY = {"the model": "a", "the tools": {"numpy": "2"}, "judged clips": "b", "max_drop": None}


@pytest.fixture
def state(rng: np.random.Generator) -> CalibrationState:
    choice = Choice(
        Range(-1.5, 2.0, "mse"),
        np.array([0.1, 1 / 3], np.float32),
        "smooth 0.5",
        1e-3,
        2e-3,
        {"mse": 1e-3, "min-max": 2e-3},
    )
    other = Choice(Range(0.0, 255.0, "min-max"), np.array([7.0], np.float32), "none", 0.0, 0.0, {"min-max": 0.0})
    return CalibrationState(
        values={"norm.weight": rng.standard_normal(4).astype(np.float32), "act.centre": np.array([0.5], np.float32)},
        choices={"fc1": choice, "tubes.0": other},
        integers={
            "fc1.weight": rng.integers(-127, 128, (4, 2), np.int8),
            "tubes.0.weight": np.array([[1], [-2]], np.int8),
        },
        means={"fc1": rng.standard_normal(4).astype(np.float32), "tubes.0": np.array([3, 4], np.float32)},
    )


@pytest.fixture
def table() -> CalibrationTable:
    plan = LinearPlan("fc1", "norm", "fc1.weight", (0.1, 0.25), "int8", "none; mse")
    return CalibrationTable("m" * 64, {"sha256": "c", "count": 2}, "uint8", {"norm": Range(-1.0, 2.0, "mse")}, (plan,))


def assert_same(found: CalibrationState, expected: CalibrationState) -> None:
    for kind in ("values", "integers", "means"):
        arrays, others = getattr(found, kind), getattr(expected, kind)
        assert arrays.keys() == others.keys()
        for name, value in others.items():
            assert arrays[name].dtype == value.dtype
            np.testing.assert_array_equal(arrays[name], value)
    assert found.choices.keys() == expected.choices.keys()
    for name, choice in expected.choices.items():
        np.testing.assert_array_equal(found.choices[name].scales, choice.scales)
        for field in ("range", "equalisation", "error", "plain_error", "errors"):
            assert getattr(found.choices[name], field) == getattr(choice, field)
    assert found.biases == {}


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_stages_come_back_as_they_were(state: CalibrationState, tmp_path: Path) -> None:
    Cache(tmp_path / "c", KEY).save_state(state)
    assert_same(Cache(tmp_path / "c", KEY).state(), state)
    assert files(tmp_path / "c") == ["key.json", "stages"]
    assert files(tmp_path / "c" / cache.STAGES) == ["0.safetensors"]


class TestStages:
    """One file for each time that stages are kept, with what is new in them."""

    @pytest.fixture
    def later(self, state: CalibrationState) -> CalibrationState:
        """A stage more, which changed a value of the one before."""
        choice = replace(state.choices["fc1"], scales=np.array([0.5, 0.25], np.float32))
        return CalibrationState(
            values={**state.values, "norm.weight": np.array([1, 2, 3, 4], np.float32), "late": np.ones(1, np.float32)},
            choices={**state.choices, "fc2": choice},
            integers={**state.integers, "fc2.weight": np.array([[5, 6]], np.int8)},
            means={**state.means, "fc2": np.array([0.5], np.float32)},
        )

    @pytest.mark.parametrize("again", [False, True])
    def test_a_file_has_what_is_new(
        self, state: CalibrationState, later: CalibrationState, tmp_path: Path, again: bool
    ) -> None:
        kept = Cache(tmp_path / "c", KEY)
        kept.save_state(state)
        if again:  # by a process that goes on with what it has read
            kept = Cache(tmp_path / "c", KEY)
            found = kept.state()
            later = CalibrationState(
                *({**getattr(later, kind), **{n: v for n, v in getattr(found, kind).items() if n != "norm.weight"}}
                for kind in ("values", "choices", "integers", "means"))
            )  # fmt: skip
        kept.save_state(later)
        arrays = load_file(kept.folder / cache.STAGES / "1.safetensors")
        assert {*arrays} == {"values:norm.weight", "values:late", "integers:fc2.weight", "means:fc2", "scales:fc2"}
        assert_same(kept.state(), later)
        assert_same(Cache(tmp_path / "c", KEY).state(), later)

    def test_a_damaged_file_ends_the_stages(
        self, state: CalibrationState, later: CalibrationState, tmp_path: Path
    ) -> None:
        kept = Cache(tmp_path / "c", KEY)
        kept.save_state(state)
        kept.save_state(later)
        kept.save_state(CalibrationState(**{**vars(later), "values": {**later.values, "last": np.ones(1, np.float32)}}))
        (kept.folder / cache.STAGES / "1.safetensors").write_bytes(b"nonsense")
        assert_same(kept.state(), state)
        assert files(kept.folder / cache.STAGES) == ["0.safetensors"]
        kept.save_state(later)
        assert_same(Cache(tmp_path / "c", KEY).state(), later)

    def test_a_state_that_lacks_some_begins_again(
        self, state: CalibrationState, later: CalibrationState, tmp_path: Path
    ) -> None:
        kept = Cache(tmp_path / "c", KEY)
        kept.save_state(later)
        kept.save_state(state)
        assert_same(Cache(tmp_path / "c", KEY).state(), state)


def test_a_result_comes_back_as_it_was(table: CalibrationTable, tmp_path: Path, rng: np.random.Generator) -> None:
    values = {"fc1.weight": rng.standard_normal((4, 2)).astype(np.float32), "fc1.bias": np.array([1, 2], np.float32)}
    report = {"judged": {"loss": 0.1}, "notes": ["é"], "linears": {}}
    Cache(tmp_path / "c", KEY).save_result(values, table, report)
    found = Cache(tmp_path / "c", KEY).result()
    assert found is not None
    assert found[1:] == (table, report)
    assert found[0].keys() == values.keys()
    for name, value in values.items():
        np.testing.assert_array_equal(found[0][name], value)


def test_a_new_folder_has_nothing(tmp_path: Path) -> None:
    kept = Cache(tmp_path / "c", KEY)
    assert kept.state() == CalibrationState()
    assert kept.result() is None
    assert (kept.differences, kept.note) == ((), None)


class TestKey:
    """Nothing is used again that was made from other things."""

    @pytest.fixture
    def folder(self, state: CalibrationState, table: CalibrationTable, tmp_path: Path) -> Path:
        kept = Cache(tmp_path / "c", KEY)
        kept.save_state(state)
        kept.save_result({"x": np.array([1], np.float32)}, table, {})
        return kept.folder

    def test_the_same_key_keeps_everything(self, folder: Path) -> None:
        kept = Cache(folder, dict(reversed(KEY.items())))
        assert kept.note is None
        assert kept.result() is not None
        assert kept.state().choices

    @pytest.mark.parametrize("name", ["judged clips", "max_drop"])
    def test_another_budget_keeps_the_stages(self, folder: Path, name: str) -> None:
        kept = Cache(folder, KEY | {name: 3.0})
        assert kept.differences == (name,)
        assert kept.result() is None
        assert kept.state().choices
        assert Cache(folder, KEY | {name: 3.0}).note is None  # the new key is written down

    def test_another_budget_before_there_is_a_result(self, state: CalibrationState, tmp_path: Path) -> None:
        """As after Ctrl-C: the stages that are done are kept."""
        Cache(tmp_path / "c", KEY).save_state(state)
        kept = Cache(tmp_path / "c", KEY | {"max_drop": 3.0})
        assert kept.differences == ("max_drop",)
        assert_same(kept.state(), state)

    @pytest.mark.parametrize(
        ("key", "named"),
        [
            (KEY | {"the model": "b"}, "the model"),
            (KEY | {"the tools": {"numpy": "3"}, "max_drop": 1.0}, "max_drop, the tools"),
            ({**KEY, "new": 1}, "new"),
            ({k: v for k, v in KEY.items() if k != "the model"}, "the model"),
        ],
    )
    def test_other_things_keep_nothing(self, folder: Path, key: dict[str, Any], named: str) -> None:
        kept = Cache(folder, key)
        assert kept.note == f"calibrated again: {named} changed since the last calibration"
        assert kept.result() is None
        assert kept.state() == CalibrationState()
        assert files(folder) == ["key.json"]

    @pytest.mark.parametrize("text", ["", "{", "[]", "3", '"the model"', "[" * 100_000, "\xff"])
    def test_a_damaged_key_keeps_nothing_and_is_no_difference(self, folder: Path, text: str) -> None:
        (folder / "key.json").write_text(text)
        kept = Cache(folder, KEY)
        assert kept.note is None
        assert kept.result() is None
        assert kept.state() == CalibrationState()
        assert json.loads((folder / "key.json").read_text()) == KEY


class TestDamage:
    """A file that is cut or overwritten is as good as none."""

    @pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
    def test_a_cut_file(self, state: CalibrationState, table: CalibrationTable, tmp_path: Path, share: float) -> None:
        kept = Cache(tmp_path / "c", KEY)
        kept.save_state(state)
        kept.save_result({"x": np.arange(100, dtype=np.float32)}, table, {})
        for path in (kept.folder / cache.STAGES / "0.safetensors", kept.folder / cache.RESULT):
            content = path.read_bytes()
            path.write_bytes(content[: int(share * len(content))])
        assert kept.state() == CalibrationState()
        assert kept.result() is None

    @pytest.mark.parametrize(
        "content", [b"PK nonsense", b"\xff" * 64, bytes(64), (2**40).to_bytes(8, "little") + b"{}"]
    )
    def test_other_files(self, tmp_path: Path, content: bytes) -> None:
        kept = Cache(tmp_path / "c", KEY)
        (kept.folder / cache.STAGES).mkdir()
        for name in (f"{cache.STAGES}/0.safetensors", cache.RESULT):
            (kept.folder / name).write_bytes(content)
        assert kept.state() == CalibrationState()
        assert kept.result() is None

    def test_texts_that_do_not_go_with_the_arrays(
        self, state: CalibrationState, table: CalibrationTable, tmp_path: Path
    ) -> None:
        kept = Cache(tmp_path / "c", KEY)
        for texts in ({}, {"choices": "{"}, {"choices": "[1]"}, {"choices": '{"fc1": 1}'}, {"choices": '{"fc1": {}}'}):
            stages = kept.folder / cache.STAGES
            stages.mkdir(exist_ok=True)
            save_file({"scales:fc1": np.array([1], np.float32)}, stages / "0.safetensors", texts)
            assert kept.state() == CalibrationState()
        whole = json.dumps(table.to_json())
        for texts in ({}, {"table": whole}, {"table": "{}", "report": "{}"}, {"table": "[", "report": "{}"}):
            save_file({"x": np.array([1], np.float32)}, kept.folder / cache.RESULT, texts)
            assert kept.result() is None

    def test_a_write_that_is_interrupted_leaves_what_was_there(
        self, state: CalibrationState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Ctrl-C while a stage is written: the stage before it is still whole, and nothing lies about."""
        kept = Cache(tmp_path / "c", KEY)
        kept.save_state(state)

        def interrupted(arrays: Any, path: Path, texts: Any) -> None:
            path.write_bytes(b"half of it")
            raise KeyboardInterrupt

        monkeypatch.setattr(cache, "save_file", interrupted)
        more = replace(state, values={**state.values, "late": np.array([1], np.float32)})
        with pytest.raises(KeyboardInterrupt):
            kept.save_state(more)
        assert_same(kept.state(), state)
        assert files(kept.folder) == ["key.json", "stages"]
        assert files(kept.folder / cache.STAGES) == ["0.safetensors"]


class TestLock:
    def test_a_second_export_waits_and_finds_the_result(self, table: CalibrationTable, tmp_path: Path) -> None:
        waits, found, entered = threading.Event(), [], threading.Event()

        def second() -> None:
            with open_cache(tmp_path / "o" / "c", KEY, lambda *_: waits.set()) as kept:
                entered.set()
                found.append(kept.result())

        thread = threading.Thread(target=second)
        with open_cache(tmp_path / "o" / "c", KEY) as kept:
            thread.start()
            assert waits.wait(60)
            assert not entered.is_set()
            kept.save_result({"x": np.array([1], np.float32)}, table, {"a": 1})
        thread.join(60)
        assert found[0] is not None
        assert found[0][1:] == (table, {"a": 1})

    def test_an_error_lets_go(self, tmp_path: Path) -> None:
        with pytest.raises(ZeroDivisionError), open_cache(tmp_path / "c", KEY):
            raise ZeroDivisionError
        stages: list[str] = []
        with open_cache(tmp_path / "c", KEY, lambda stage, *_: stages.append(stage)):
            assert not stages

    def test_a_process_that_is_killed_lets_go(self, tmp_path: Path) -> None:
        script = (
            "import os, sys; from pathlib import Path; from edgetube.calibration.cache import open_cache\n"
            "with open_cache(Path(sys.argv[1]), {}): print('held', flush=True); os.kill(os.getpid(), 9)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "c")], capture_output=True, env={**os.environ}
        )
        assert done.stdout.strip() == b"held"
        stages: list[str] = []
        with open_cache(tmp_path / "c", {}, lambda stage, *_: stages.append(stage)):
            assert not stages


def test_waiting_is_a_stage_with_a_beginning_and_an_end(tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    waiting = threading.Event()

    def note(stage: str, done: int, total: int) -> None:
        steps.append((stage, done, total))
        waiting.set()

    def second() -> None:
        with open_cache(tmp_path / "c", KEY, note):
            pass

    with open_cache(tmp_path / "c", KEY):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(60)
    thread.join(60)
    assert steps == [("wait for another calibration", 0, 1), ("wait for another calibration", 1, 1)]


def test_folders_above_are_made(tmp_path: Path) -> None:
    assert Cache(tmp_path / "a" / "b" / "c", KEY).folder.is_dir()
    with open_cache(tmp_path / "d" / "e" / "f", KEY) as kept:
        assert kept.folder.is_dir()
