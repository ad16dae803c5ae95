"""Documents that many people measured on many devices and dates, as one table: device, runtime, precision and point.

Reads what `edgetube bench --json`, `edgetube parity --json` and `edgetube report --json` print, of one device or of
several, and the documents that `edgetube report` keeps. How well a bundle answers is that of the comparison of the same
files, told by their digest; of the same device where there is one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetube.bench import latency, report
from edgetube.bundle import MANIFEST
from edgetube.errors import InputError

SCHEMA = 1
TEMPLATE = "leaderboard.html.j2"

MOST_BYTES = 64_000_000
"""Largest file that is read as a document."""

COLUMNS = ("device", "model", "target", "threads", "p50 ms", "clips/s", "mJ", "agreement", "top-1", "size MB", "date")

Document = Mapping[str, Any]
Row = dict[str, Any]

TIMES = ("p50_ms", "p50_low_ms", "p50_high_ms", "p99_ms", "noise", "throughput", "energy_mj", "peak_mb", "size_mb")
ACCURACY = ("clips", "agreement", "top1", "drop", "cosine")


@dataclass(frozen=True)
class Leaderboard:
    """What was collected.

    Attributes:
        rows: one for each device, bundle and number of threads, of its newest measurement; see `docs/report.md`. Of one
            checkpoint stand together, and the fastest first.
        skipped: files that hold nothing to collect, and why.
    """

    rows: tuple[Row, ...]
    skipped: tuple[tuple[str, str], ...]

    def to_json(self) -> dict[str, Any]:
        """The document of `edgetube report --collect --json`."""
        return {
            "schema": SCHEMA,
            "rows": list(self.rows),
            "skipped": [{"file": file, "why": why} for file, why in self.skipped],
        }


def collect(places: Sequence[Path]) -> Leaderboard:
    """Read documents.

    Args:
        places: files, and folders whose `.json` files are read at any depth; those of bundles are left alone.

    Raises:
        InputError: a place is not there, or nothing that was found has timings.
    """
    found: list[tuple[str, Document]] = []
    skipped: list[tuple[str, str]] = []
    for file in _files(places):
        try:
            found += [(str(file), document) for document in _documents(_load(file))]
        except ValueError as error:
            skipped.append((str(file), str(error)))
    proofs = [(document, row) for _, document in found if _is_parity(document) for row in document["bundles"]]
    rows: dict[tuple[Any, ...], Row] = {}
    for source, document in found:
        for timed in () if _is_parity(document) else document["bundles"]:
            if timed.get("p50_ms") is not None:
                _add(rows, _row(source, document, timed, proofs))
    if not rows:
        raise InputError(
            f"no timings in {', '.join(map(str, places))}; make some: edgetube bench BUNDLE --json > bench.json"
        )
    names: dict[str, str] = {}
    for row in rows.values():  # a checkpoint's shortest name, that of no point
        known = names.setdefault(row["checkpoint"], row["model"])
        names[row["checkpoint"]] = min(known, row["model"], key=lambda name: (len(name), name))
    ordered = sorted(rows.values(), key=lambda row: (names[row["checkpoint"]], row["checkpoint"], row["p50_ms"]))
    return Leaderboard(tuple(row | {"group": names[row["checkpoint"]]} for row in ordered), tuple(skipped))


def _files(places: Sequence[Path]) -> Iterator[Path]:
    for place in places:
        if place.is_dir():
            files = (path for path in place.rglob("*.json") if path.is_file())
            yield from sorted(path for path in files if not (path.parent / MANIFEST).exists())
        elif place.is_file():
            yield place
        else:
            raise InputError(f"{place} is not there; give files or folders of documents")


def _load(file: Path) -> Any:
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES // 1_000_000} MB")
        return json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _documents(data: Any) -> list[Document]:
    """The documents of timings and of comparisons in a file.

    Raises:
        ValueError: there are none, or of a newer edgetube.
    """
    if not isinstance(data, dict):
        raise ValueError("no document of bench, parity or report")
    if isinstance(data.get("document"), dict):  # as `edgetube report` keeps it
        return _documents(data["document"])
    parts = data.get("devices") or [data[key] for key in ("bench", "parity") if isinstance(data.get(key), dict)]
    if isinstance(parts, list) and parts:
        answered = (part for part in parts if not (isinstance(part, dict) and "error" in part))
        found = [document for part in answered for document in _documents(part)]
        return [{"date": data.get("date"), **document} for document in found]
    if not isinstance(data.get("bundles"), list) or not isinstance(data.get("machine"), str):
        raise ValueError("no document of bench, parity or report")
    if data.get("schema") != latency.SCHEMA:
        raise ValueError(f"schema {data.get('schema')!r}; this edgetube reads {latency.SCHEMA}")
    rows = data["bundles"]
    if not all(isinstance(row, dict) and isinstance(row.get("name"), str) and "target" in row for row in rows):
        raise ValueError("a row without a name or a target")
    return [data]


def _is_parity(document: Document) -> bool:
    return "gates" in document


def _add(rows: dict[tuple[Any, ...], Row], row: Row) -> None:
    """Keep the newest measurement of one device, bundle and number of threads."""
    key = tuple(row[name] for name in ("device", "processor", "model", "target", "sha256", "threads"))
    other = rows.get(key)
    if other is None:
        rows[key] = row
        return
    newer, older = (row, other) if (row["date"] or "") >= (other["date"] or "") else (other, row)
    rows[key] = newer | {"older": newer["older"] + older["older"] + 1}


def _machine(document: Document) -> str:
    """That which was timed, or answered: with `--on` another than the one that the command ran on."""
    return str((document.get("device") or document)["machine"])


def _row(file: str, document: Document, timed: Row, proofs: Sequence[tuple[Document, Row]]) -> Row:
    machine, target = _machine(document), timed["target"]
    conditions = document.get("conditions") or {}
    board = (conditions.get("before") or {}).get("board")
    processor = machine.partition(",")[0]
    row = {
        "device": board or processor,
        "processor": processor,
        "machine": machine,
        "date": document.get("date"),
        "model": timed["name"].removesuffix(f".{target}"),
        "target": target,
        "checkpoint": timed.get("checkpoint") or "",
        "sha256": timed.get("sha256"),
        "runtime": timed.get("runtime"),
        "throttled": conditions.get("throttled"),
        "older": 0,
        "file": file,
    }
    row |= {key: timed.get(key) for key in ("precision", "backend", "threads", "batch", *TIMES)}
    return row | _accuracy(row, proofs)


def _accuracy(row: Row, proofs: Sequence[tuple[Document, Row]]) -> Row:
    """Of the comparison of the same files: on the same machine before others, the most clips, the newest."""
    same = [(document, proof) for document, proof in proofs if row["sha256"] and proof.get("sha256") == row["sha256"]]
    if not same:
        return dict.fromkeys(ACCURACY) | {"data": None}
    document, proof = max(
        same, key=lambda pair: (_machine(pair[0]) == row["machine"], pair[1]["clips"], pair[0].get("date") or "")
    )
    return {key: proof.get(key) for key in ACCURACY} | {"data": document["data"].get("name")}


def cells(row: Row) -> list[str]:
    """A row as text, in the order of `COLUMNS`."""
    return [
        row["device"] + (" (throttled)" if row["throttled"] else ""), row["model"], row["target"] or "PyTorch",
        "–" if row["threads"] is None else str(row["threads"]), report.number(row["p50_ms"]),
        report.number(row["throughput"]), report.number(row["energy_mj"]), report.percent(row["agreement"]),
        report.percent(row["top1"]), report.number(row["size_mb"]), (row["date"] or "–")[:10],
    ]  # fmt: skip


def headline(board: Leaderboard) -> str:
    """The table in one sentence."""
    count, machines = len(board.rows), len({row["machine"] for row in board.rows})
    return f"{count} measurement{'s' * (count != 1)} of {machines} machine{'s' * (machines != 1)}"


def markdown(board: Leaderboard) -> str:
    """A table for each checkpoint."""
    parts = []
    for name, rows in groups(board):
        lines = [f"| {' | '.join(row)} |" for row in (COLUMNS, ("---",) * len(COLUMNS), *map(cells, rows))]
        parts.append("\n".join([f"## {name}", "", *lines]))
    return "\n\n".join(parts) + "\n"


def groups(board: Leaderboard) -> list[tuple[str, list[Row]]]:
    """The rows of each checkpoint, by its name."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in board.rows:
        found.setdefault((row["group"], row["checkpoint"]), []).append(row)
    return [(name, rows) for (name, _), rows in found.items()]


def html(board: Leaderboard) -> str:
    """The page: one file without scripts or external resources."""
    machines = dict.fromkeys((row["device"], row["machine"]) for row in board.rows)
    text: str = (
        report.pages()
        .get_template(TEMPLATE)
        .render(groups=groups(board), machines=machines, board=board, headline=headline(board))
    )
    return text
