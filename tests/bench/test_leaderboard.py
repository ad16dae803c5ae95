"""Documents of several people and devices as one table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgetube.bench import leaderboard
from edgetube.bench.latency import SCHEMA
from edgetube.errors import InputError

Cli = Callable[..., tuple[int, str, str]]


def timed(name: str, p50: float | None, **more: Any) -> dict[str, Any]:
    target = name.rpartition(".")[2]
    return {
        "name": name, "target": target, "precision": target[-4:], "backend": target[:4], "p50_ms": p50, "threads": 1,
        "p50_low_ms": p50, "p50_high_ms": p50, "sha256": f"of {name}", "checkpoint": "weights",
    } | more  # fmt: skip


def bench(machine: str, *rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"schema": SCHEMA, "machine": f"{machine}, 4 cores; edgetube 1", "date": "2026-01-02T00:00:00Z"} | {
        "bundles": list(rows), "conditions": {"before": {"board": None}, "throttled": None},
    } | more  # fmt: skip


def parity(machine: str, name: str, agreement: float, clips: int = 9, **more: Any) -> dict[str, Any]:
    row = {"name": name, "target": name.rpartition(".")[2], "sha256": f"of {name}", "clips": clips}
    row |= {"agreement": agreement, "top1": None, "drop": None, "cosine": 1.0}
    found = {
        "schema": SCHEMA,
        "machine": f"{machine}, 4 cores; edgetube 1",
        "date": "2026-01-01T00:00:00Z",
        "gates": [],
    }
    return found | {"bundles": [row], "data": {"name": "clips"}} | more


def write(folder: Path, **documents: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document))
    return folder


def test_what_is_collected(tmp_path: Path) -> None:
    pi = bench("Pi", timed("m.onnx-fp32", 40.0), timed("m.onnx-int8", None))
    pi["device"] = {"name": "ssh://pi", "machine": "Cortex-A76, 4 cores; edgetube 1"}
    pi["conditions"]["before"]["board"] = "Raspberry Pi 5"
    several = {"schema": SCHEMA, "devices": [pi, {"device": {"name": "ssh://x"}, "error": "cut"}]}
    nuc = bench(
        "NUC", timed("m-keep50.onnx-fp32", 10.0), timed("m.onnx-fp32", 20.0), timed("n.onnx-fp32", 1.0, checkpoint="n")
    )
    write(tmp_path / "a" / "deep", several=several)
    write(
        tmp_path / "b",
        kept={"key": "k", "document": nuc},
        report={"bench": nuc, "parity": parity("NUC", "m.onnx-fp32", 0.5)},
    )
    board = leaderboard.collect([tmp_path / "a", tmp_path / "b"])
    shown = [(row["group"], row["device"], row["model"], row["p50_ms"], row["agreement"]) for row in board.rows]
    assert shown == [
        ("m", "NUC", "m-keep50", 10.0, None),
        ("m", "NUC", "m", 20.0, 0.5),
        ("m", "Raspberry Pi 5", "m", 40.0, 0.5),
        ("n", "NUC", "n", 1.0, None),
    ]
    assert [name for name, _ in leaderboard.groups(board)] == ["m", "n"]
    assert not board.skipped


def test_the_newest_counts(tmp_path: Path) -> None:
    older, newer = ({"date": f"2026-0{month}-01T00:00:00Z"} for month in (1, 2))
    write(tmp_path, a=bench("A", timed("m.onnx-fp32", 1.0), **newer), b=bench("A", timed("m.onnx-fp32", 2.0), **older))
    write(tmp_path, c=bench("A", timed("m.onnx-fp32", 3.0, threads=2), **older))
    found = {(row["threads"], row["p50_ms"], row["older"]) for row in leaderboard.collect([tmp_path]).rows}
    assert found == {(1, 1.0, 1), (2, 3.0, 0)}


def test_the_comparison_that_counts(tmp_path: Path) -> None:
    """Of the same machine before one of more clips; of other files never."""
    write(tmp_path, bench=bench("A", timed("m.onnx-fp32", 1.0), timed("k.onnx-fp32", 1.0, sha256="other")))
    write(tmp_path, b=parity("B", "m.onnx-fp32", 0.2, clips=99), c=parity("C", "m.onnx-fp32", 0.3, clips=9))
    write(tmp_path, k=parity("A", "k.onnx-fp32", 0.9))
    rows = {row["model"]: row["agreement"] for row in leaderboard.collect([tmp_path]).rows}
    assert rows == {"m": 0.2, "k": None}
    write(tmp_path, a=parity("A", "m.onnx-fp32", 0.1, clips=1))
    assert {row["model"]: row["agreement"] for row in leaderboard.collect([tmp_path]).rows}["m"] == 0.1


def test_a_comparison_over_the_line_is_of_the_machine_that_answered(tmp_path: Path) -> None:
    there: dict[str, Any] = {"device": {"name": "ssh://pi", "machine": "Cortex-A76, 4 cores; edgetube 1"}}
    write(tmp_path, a=bench("PC", timed("m.onnx-fp32", 1.0), **there))
    write(tmp_path, b=parity("PC", "m.onnx-fp32", 0.2, clips=99), c=parity("PC", "m.onnx-fp32", 0.3, **there))
    assert [row["agreement"] for row in leaderboard.collect([tmp_path]).rows] == [0.3]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "Expecting property name"),
        ("[1]", "no document of bench, parity or report"),
        ('{"bundles": []}', "no document of bench, parity or report"),
        ('{"schema": 9, "machine": "x", "bundles": []}', "schema 9; this edgetube reads 1"),
        ('{"schema": 1, "machine": "x", "bundles": [1]}', "a row without a name"),
        ("[" * 200_000, "nested too deeply"),
        ('{"devices": [3]}', "no document of bench, parity or report"),
    ],
)
def test_what_is_left_out_is_said(text: str, why: str, tmp_path: Path) -> None:
    write(tmp_path, good=bench("A", timed("m.onnx-fp32", 1.0)))
    (tmp_path / "bad.json").write_text(text)
    ((file, said),) = leaderboard.collect([tmp_path]).skipped
    assert (Path(file).name, said[: len(why)]) == ("bad.json", why)


def test_nothing_to_collect(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not there"):
        leaderboard.collect([tmp_path / "none"])
    write(tmp_path, only=parity("A", "m.onnx-fp32", 1.0))
    with pytest.raises(InputError, match="no timings in"):
        leaderboard.collect([tmp_path])


def test_the_page_and_the_table(tmp_path: Path, edgetube_cli: Cli) -> None:
    hostile = timed("<b>m.onnx-fp32", 1.0)
    write(tmp_path / "in", a=bench("A <i>", hostile, conditions={"before": {"board": "B"}, "throttled": True}))
    page = tmp_path / "page.html"
    code, out, _ = edgetube_cli("report", "--collect", tmp_path / "in", "--out", page, "--markdown")
    assert (code, "| B (throttled) | <b>m | onnx-fp32 | 1 | 1 |" in out) == (0, True)
    text = page.read_text()
    assert "&lt;b&gt;m" in text
    assert "<b>m" not in text
    assert "--page: #f5f7f9" in text  # the style sheet of the report
    code, out, _ = edgetube_cli("report", "--collect", tmp_path / "in", "--out", page, "--json")
    assert json.loads(out)["rows"][0]["throttled"] is True
    code, _, err = edgetube_cli("report", tmp_path, "--collect", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert edgetube_cli("report")[0] == 2


@pytest.mark.slow
def test_documents_of_this_version_are_collected(tiny_bundle: Path, tmp_path: Path, edgetube_cli: Cli) -> None:
    for name in ("bench", "parity"):
        options = ("--seconds", "0.1") if name == "bench" else ("--clips", "9", "--min-agreement", "0")
        code, out, err = edgetube_cli(name, tiny_bundle, *options, "--json")
        assert code == 0, err
        (tmp_path / f"{name}.json").write_text(out)
    (row,) = leaderboard.collect([tmp_path]).rows
    assert (row["model"], row["target"], row["clips"]) == ("tiny", "onnx-fp32", 9)
    assert row["agreement"] == 1.0
    assert row["date"].startswith("20")
