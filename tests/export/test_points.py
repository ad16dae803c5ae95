"""What a sweep remembers of its exports, bundles and failures, as long as nothing that they were made from changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetube import bundle as bundles
from edgetube import formats
from edgetube.bench import sweep
from edgetube.bundle import Bundle
from edgetube.errors import BackendError, BundleError, EdgetubeError, ParityError
from edgetube.export import points
from edgetube.export.pipeline import Options
from edgetube.model.checkpoints import Checkpoint


class Failing:
    """In place of an export session: every export ends with one error; counts them."""

    tries = 0
    error: EdgetubeError = ParityError("2 of 9 answers differ")

    def __init__(self, *_: object) -> None:
        pass

    def export(self, *_: object) -> Bundle:
        Failing.tries += 1
        raise Failing.error

    def close(self) -> None:
        pass


@pytest.fixture
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return formats.load(tiny_checkpoint).select("motion")


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> type[Failing]:
    monkeypatch.setattr("edgetube.export.points.ExportSession", Failing)
    monkeypatch.setattr(Failing, "tries", 0)
    monkeypatch.setattr(Failing, "error", ParityError("2 of 9 answers differ"))
    return Failing


def made(checkpoint: Checkpoint, out: Path, target: str = "onnx-fp32", **options: Any) -> dict[str, Bundle | str]:
    """What the exporter says of the points with all tokens and with six."""
    grid = sweep.grid(checkpoint.spec, [target], keep_tokens=["6"])
    return {point.name: found for point, found in points.PointExporter(checkpoint, out, Options(**options))(grid)}


@pytest.mark.parametrize("error", [ParityError("2 of 9 answers differ"), BackendError("no such operator")])
def test_a_failure_is_remembered_with_its_reason(
    error: EdgetubeError, failing: type[Failing], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    failing.error = error
    first = made(checkpoint, tmp_path)
    assert first == dict.fromkeys(("onnx-fp32", "onnx-fp32 keep6"), str(error))
    assert failing.tries == 2
    again = made(checkpoint, tmp_path)
    assert failing.tries == 2
    for said in again.values():
        assert isinstance(said, str)
        assert said.startswith(f"{error} (an earlier sweep found that; delete ")
        Path(said.rpartition("delete ")[2].removesuffix(" to try again)")).unlink()  # what it says is true
    assert made(checkpoint, tmp_path) == first
    assert failing.tries == 4


def test_a_failure_is_forgotten_when_what_it_was_made_from_changes(
    failing: type[Failing], checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(checkpoint, tmp_path)
    made(checkpoint, tmp_path, lowering="gather")
    assert failing.tries == 4
    made(checkpoint, tmp_path, lowering="gather")
    assert failing.tries == 4
    monkeypatch.setattr("edgetube.bench.machine.versions", lambda: {"edgetube": "another"})
    made(checkpoint, tmp_path, lowering="gather")
    assert failing.tries == 6


def test_where_a_proof_can_run_is_part_of_it(
    failing: type[Failing], checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU may come or go."""
    made(checkpoint, tmp_path)
    monkeypatch.setattr("edgetube.runtimes.proof_device", lambda *_: "emulated")
    made(checkpoint, tmp_path)
    assert failing.tries == 4


def test_labels_are_part_of_what_int8_was_made_from(
    failing: type[Failing], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Of files that stay as they are, in a list that is corrected."""
    np.save(tmp_path / "clip.npy", np.zeros((8, 40, 60, 3), np.uint8))
    for tries, label in ((2, "static"), (2, "static"), (4, "pan-left")):
        (tmp_path / "clips.csv").write_text(f"path,label\nclip.npy,{label}\n")
        made(checkpoint, tmp_path / "out", "onnx-int8", calib=tmp_path / "clips.csv")
        assert failing.tries == tries


def test_a_bundle_of_two_points_is_published_once(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = bundles.load(tiny_bundle)
    (published,) = points.publish([bundle, bundle], tmp_path)
    assert published.path == tmp_path / bundle.name


def test_a_budget_is_part_of_what_int8_was_made_from(
    failing: type[Failing], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    for tries, drop in ((2, 0.5), (2, 0.5), (4, 2.0)):
        made(checkpoint, tmp_path, "onnx-int8", max_drop=drop)
        assert failing.tries == tries


def test_what_is_about_this_folder_is_tried_again(
    failing: type[Failing], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    failing.error = BundleError("no space is left")
    for tries in (2, 4):
        assert set(made(checkpoint, tmp_path).values()) == {"no space is left"}
        assert failing.tries == tries


def test_a_damaged_record_is_no_record(failing: type[Failing], checkpoint: Checkpoint, tmp_path: Path) -> None:
    made(checkpoint, tmp_path)
    for record in (tmp_path / points.KEPT).rglob("*.json"):
        record.write_text("[]", "utf-8")
    made(checkpoint, tmp_path)
    assert failing.tries == 4


@pytest.mark.slow
def test_a_bundle_takes_the_place_of_a_failure_and_lowerings_are_timed_once(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgetube.export.lowering import LoweringChoice

    with monkeypatch.context() as patched:
        patched.setattr("edgetube.export.points.ExportSession", Failing)
        patched.setattr("edgetube.bench.machine.versions", lambda: {"edgetube": "an earlier one"})
        made(checkpoint, tmp_path)
    timed = []
    usual = LoweringChoice._time

    def time(self: LoweringChoice, target: Any) -> dict[str, Any]:
        timed.append(target.name)
        return usual(self, target)

    monkeypatch.setattr(LoweringChoice, "_time", time)
    found = made(checkpoint, tmp_path)
    assert all(isinstance(bundle, Bundle) for bundle in found.values())
    assert timed == ["onnx-fp32"]
    records = [bundle.build["lowering"] for bundle in found.values() if isinstance(bundle, Bundle)]
    assert records[0] == records[1]
    monkeypatch.setattr("edgetube.export.points.ExportSession", Failing)
    kept = made(checkpoint, tmp_path)
    assert [one.path for one in kept.values() if isinstance(one, Bundle)] == [
        one.path for one in found.values() if isinstance(one, Bundle)
    ]
