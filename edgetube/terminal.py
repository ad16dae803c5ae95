"""Terminal output: progress, tables and messages. Nothing is computed here."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from edgetube import interrupts
from edgetube.bundle import Bundle
from edgetube.contract import InputContract
from edgetube.errors import WARNINGS, printable
from edgetube.health import Check
from edgetube.live.decisions import Event
from edgetube.live.frame import State
from edgetube.progress import Progress
from edgetube.spec import ModelSpec, Prediction
from edgetube.targets import Target


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the command, which ends as the signal ends others; rich would exit with 1."""
        raise


out = _Console(width=None if sys.stdout and sys.stdout.isatty() else 140, emoji=False, markup=False, highlight=False)
err = _Console(stderr=True, emoji=False, markup=False, highlight=False)

PLAIN_S = 10.0
"""Seconds between two lines of progress about one stage in a pipe."""


def prepare() -> None:
    """Escape characters that the encodings of stdout and stderr lack; send log messages to stderr."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if not logging.root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_Line())
        logging.root.addHandler(handler)
    logging.getLogger("edgetube").setLevel(logging.INFO)  # an engine that is built on the first load takes minutes


class _Line(logging.Formatter):
    """The message of a record in one line, as `printable` has it."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(record.getMessage())


def abandon() -> None:
    """After a broken pipe: discard the rest of stdout, so that Python does not report an error at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def progress() -> Iterator[Progress]:
    """A bar on a terminal, plain lines on stderr in a pipe."""
    if not err.is_terminal:
        yield _Plain()
        return
    columns = (
        SpinnerColumn("dots" if err.encoding.startswith("utf") else "line"),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=err, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            interrupts.check()
            if stage not in tasks:
                tasks[stage] = bar.add_task(printable(stage), total=total or None)
            bar.update(tasks[stage], completed=done)

        yield show


class _Plain:
    """A line when a stage is done, and every `PLAIN_S` seconds before."""

    def __init__(self) -> None:
        self._said: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        interrupts.check()
        now = time.monotonic()
        if 0 < total <= done:
            self._say(f"{stage}: done ({total})" if total > 1 else f"{stage}: done")
        elif now - self._said.setdefault(stage, now) >= PLAIN_S:
            self._said[stage] = now
            self._say(f"{stage}: {done} of {total}" if total else f"{stage}: {done}")

    def _say(self, text: str) -> None:
        print(printable(text), file=sys.stderr, flush=True)  # noqa: T201


def table(*columns: str) -> Table:
    """An empty table in the common style."""
    found = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for i, column in enumerate(columns):
        found.add_column(printable(column), overflow="fold", no_wrap=i == 0)
    return found


def add(found: Table, *cells: str | Text) -> None:
    """Add a row; strings are shown verbatim, `Text` is styled."""
    found.add_row(*(cell if isinstance(cell, Text) else Text(printable(cell)) for cell in cells))


def say(text: str) -> None:
    """Print one line, verbatim."""
    out.print(printable(text), soft_wrap=True)


def warn(kind: str, text: str) -> None:
    """A `note` or `warning` beside the result."""
    _remark(kind, "yellow", text)


@contextmanager
def own_warnings() -> Iterator[None]:
    """Show each of edgetube's own warnings as a line on stderr; others are shown as Python shows them."""
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, WARNINGS):
            warn("warning", str(message))
        else:
            usual(message, category, *place, **more)

    with warnings.catch_warnings():
        for kind in WARNINGS:
            warnings.simplefilter("always", kind)
        warnings.showwarning = show
        yield


def error(text: str) -> None:
    """Print the error that ended the command."""
    _remark("error", "bold red", text)


def wrote(path: Path) -> None:
    """Report a written file."""
    err.print(f"wrote {printable(path)}", soft_wrap=True)


def _remark(kind: str, style: str, text: str) -> None:
    err.print(Text.assemble((f"{kind}:", style), " ", printable(text)), soft_wrap=True)


def print_json(value: Any, indent: int | None = 2) -> None:
    """Print a JSON document."""
    print(json.dumps(value, indent=indent), flush=True)  # noqa: T201


def targets(known: Iterable[Target]) -> None:
    """The targets that can be built and run here, and how to install what is missing."""
    known = list(known)
    found = table("target", "build here", "run here", "what it is")
    for t in known:
        add(found, t.name, _yes(t.missing(t.build_needs)), _yes(t.missing(t.run_needs)), t.summary)
    out.print(found)
    for remedy in sorted({t.remedy for t in known} - {""}):
        out.print(Text.assemble("to install what is missing: ", (remedy, "bold")), soft_wrap=True)


def exported(made: Sequence[Bundle], rows: Sequence[Mapping[str, Any]]) -> None:
    """The bundles that `edgetube export` wrote, at least one, with their rows of `--json`."""
    found = table("bundle", "status", "size", "lowering", "agreement", "largest logit error")
    for row in rows:
        add(
            found, row["bundle"], row["status"], f"{row['bytes'] / 1e6:.1f} MB", str(row["lowering"]),
            percent(row["agreement"]), number(row["max_abs_error"]),
        )  # fmt: skip
    out.print(found)
    for told in dict.fromkeys(note for row in rows for note in row["notes"]):
        warn("note", told)
    for b in made:
        if int8 := b.build.get("int8"):
            say(f"{b.name}: {int8['summary']}")
            for note in int8["notes"]:
                warn("warning", note)
    source = "IMAGE" if made[0].contract.is_image else "VIDEO"
    then(f"edgetube run {shlex.quote(printable(made[0].path))} {source}")


def then(command: str) -> None:
    """Print the command that comes next."""
    out.print(Text.assemble("next: ", (command, "bold")), soft_wrap=True)


def started(document: Mapping[str, Any]) -> None:
    """The result of `edgetube init`."""
    found = table("tube", "stride", "offset", "tokens")
    for tube in document["tubes"]:
        add(found, *("x".join(map(str, tube[name])) for name in ("kernel", "stride", "offset")), str(tube["tokens"]))
    out.print(found)
    clip = "x".join(map(str, (document["frames"], *document["size"])))
    gates = ", ".join(map(str, document["gates"])) or "none"
    say(
        f"{document['name']}: {document['tokens']} tokens of a clip of {clip} at {document['fps']:g} frames a second, "
        f"{document['positions']} positions, gates: {gates}; images are answered as before (error "
        f"{document['image_error']:.1e})"
    )
    for note in document["notes"]:
        warn("note", note)


def epoch(row: Mapping[str, Any]) -> None:
    """One epoch of a training."""
    best = "  best so far" if row["best"] else ""
    say(
        f"epoch {row['epoch']} of {row['epochs']}  loss {row['loss']:.3f}  top-1 of clips trained on "
        f"{percent(row['train_top1'])}, of {row['held_out_clips']} held out {percent(row['held_out_top1'])}{best}"
    )


def checks(found: Iterable[Check]) -> None:
    """The checks of `edgetube doctor`."""
    rows = table("check", "", "what was found")
    for check in found:
        add(rows, check.name, Text("ok", "green") if check.ok else Text("failed", "bold red"), check.detail)
    out.print(rows)


def bundle(found: Bundle) -> None:
    """The contents of a bundle."""
    rows = table("", found.name)
    for key, value in _facts(found):
        add(rows, key, value)
    out.print(rows)


def checkpoint(document: Mapping[str, Any], keys: Iterable[tuple[str, str, str]]) -> None:
    """The document of `edgetube inspect CHECKPOINT --json`, its keys folded into rows (name, shape, use)."""
    if document["error"] is None:
        rows = table("", document["name"])
        for key, value in _checkpoint_facts(document):
            add(rows, key, value)
        out.print(rows)
    listed = table("tensor", "shape", "part of the model")
    for row in keys:
        add(listed, *row)
    if listed.row_count:
        out.print(listed)
    for note in document.get("notes", ()):
        warn("note", note)


def parity(document: Mapping[str, Any]) -> None:
    """The document of `edgetube parity --json`."""
    found = table("bundle", "status", "clips", "top-1", "reference", "agreement", "KL", "largest logit error")
    for row in document["bundles"]:
        interval = f"{percent(row['agreement'])} ({percent(row['agreement_low'])}-{percent(row['agreement_high'])})"
        add(
            found, row["name"], row["status"], str(row["clips"]), percent(row["top1"]), percent(row["top1_reference"]),
            interval, number(row["kl"]), number(row["max_abs_error"]),
        )  # fmt: skip
    out.print(found)
    _on(document)
    views = document["data"]["views"]
    if views["temporal"] * views["spatial"] > 1:
        shown = f"{views['temporal']} x {views['spatial']}"
        say(f"each answer is the mean of the softmax over {shown} views of the clip (temporal x spatial)")
    for row in document["bundles"]:
        if flipped := [clip for clip in row["worst"] if clip["flipped"]]:
            change = " -> ".join(flipped[0][key]["label"] for key in ("reference", "bundle"))
            say(
                f"{row['name']}: flips {percent(row['sure_flips'])} where the reference was sure; worst clip "
                f"{flipped[0]['name']}: {change}"
            )
    if document["video"]:
        _video(document["video"])
    if document["layers"]:
        _layers(document["layers"])


def _decoders(compared: Mapping[str, Any]) -> None:
    found = table("bundle", "decoder", "windows", "grey levels", "largest logit error", "SQNR dB", "agreement")
    for row in compared["bundles"]:
        add(
            found, row["name"], f"{row['decoder']} / {compared['reference']}", str(row["windows"]),
            number(row["pixels"]), number(row["max_abs_error"]),
            "same" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}", percent(row["agreement"]),
        )  # fmt: skip
    out.print(found)


def _video(watched: Mapping[str, Any]) -> None:
    health = watched["stream"]
    say(
        f"{watched['source']}: {health['frames']} frames, {health['fps']:.2f} fps, drift "
        f"{health['fps_drift_percent']:.2f} %, {health['dropped']} dropped, {health['duplicated']} repeated; "
        f"{watched['windows']} windows, {watched['reference']['onsets']} changes of the reference's answer"
    )
    found = table("bundle", "agreement", "flip rate", "changes", "missed", "mean delay", "largest delay")
    for one in [{"name": "reference", **watched["reference"]}, *watched["bundles"]]:
        delays = [one.get("onset_delay_mean_s"), one.get("onset_delay_max_s")]
        add(
            found, one["name"], percent(one.get("agreement")), percent(one["flip_rate"]), str(one["onsets"]),
            str(one.get("missed", "-")), *map(_seconds, delays),
        )  # fmt: skip
    out.print(found)
    if watched["decisions"]:
        _decisions(watched["decisions"])
    if watched["still"]:
        _still(watched["still"])
    if watched["decoders"]:
        _decoders(watched["decoders"])


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


_SPANS = ("shared", "missed", "extra", "IoU", "mean delay", "largest delay")


def _spans(one: Mapping[str, Any] | None) -> list[str]:
    """The cells of `_SPANS` for the agreement of two models' spans."""
    if one is None or "shared" not in one:
        return ["-"] * len(_SPANS)
    counts = [str(one[key]) for key in ("shared", "missed", "extra")]
    iou = "-" if one["iou"] is None else f"{one['iou']:.3f}"
    return [*counts, iou, _seconds(one["onset_delay_mean_s"]), _seconds(one["onset_delay_max_s"])]


def _decisions(decided: Mapping[str, Any]) -> None:
    found = table("decisions", "flip rate, smoothed", "spans", *_SPANS)
    for one in [decided["reference"], *decided["bundles"]]:
        add(found, one["name"], percent(one["flip_rate"]), str(len(one["spans"])), *_spans(one))
    out.print(found)


def _still(gate: Mapping[str, Any]) -> None:
    say(
        f"the gate at {gate['threshold']:g} grey levels, at most {gate['refresh_after']:g} s without inference, skips "
        f"{percent(gate['skipped'])} of the windows"
    )
    decided = any(one["spans"] is not None for one in gate["models"])
    shown = [f"spans {name}" for name in _SPANS[:4]] if decided else []
    found = table("behind the gate", "other class", "changes missed", "mean delay", "largest delay", *shown)
    for one in gate["models"]:
        delays = (one["onset_delay_mean_s"], one["onset_delay_max_s"])
        spans = _spans(one["spans"])[:4] if decided else []
        add(found, one["name"], percent(one["flips"]), str(one["missed"]), *map(_seconds, delays), *spans)
    out.print(found)


def _layers(curves: Sequence[Mapping[str, Any]]) -> None:
    found = table("layer", *(f"{curve['name']}, dB" for curve in curves))
    ratios = [{one["layer"]: one["sqnr_db"] for one in curve["curve"]} for curve in curves]
    for layer in dict.fromkeys(one["layer"] for curve in curves for one in curve["curve"]):
        add(found, layer, *(_decibels(known[layer]) if layer in known else "-" for known in ratios))
    out.print(found)
    for curve in curves:
        jump = f"the error jumps at {curve['first_jump']}" if curve["first_jump"] else "no layer where the error jumps"
        say(f"{curve['name']}: {curve['note'] or jump}")


def _decibels(ratio: float | None) -> str:
    return "exact" if ratio is None else f"{ratio:.1f}"


def agree(document: Mapping[str, Any]) -> None:
    """The document of `edgetube agree --json`."""
    clip, rows, pairs = document["clip"], document["rows"], document["pairs"]
    span = "" if clip["start"] is None else f", {clip['start']:.2f}-{clip['end']:.2f} s"
    say(f"{clip['name']}{span}" + ("" if clip["label"] is None else f", labelled {clip['label']}"))
    _on(document)
    numbers = {row["name"]: str(i) for i, row in enumerate(rows, start=1)}
    found = table("", "runtime", "status", "answer", "next")
    for row in rows:
        first, *rest = [f"{one['label']} {one['score']:.4f}" for one in row["top"]] or ["-"]
        reason = "a logit is NaN or infinite" if row["logits"] is not None and not row["top"] else row["reason"]
        add(found, numbers[row["name"]], row["name"], row["status"] or "-", reason or first, "  ".join(rest))
    out.print(found)
    answered = [row["name"] for row in rows if row["logits"] is not None]
    matrix = dict(zip(document["difference"]["names"], document["difference"]["matrix"], strict=True))
    found = table("largest difference, % of the largest logit", *(numbers[name] for name in answered))
    for name in answered:
        cells = dict(zip(document["difference"]["names"], matrix[name], strict=True))
        shown = ("not finite" if cells[other] is None else f"{100 * cells[other]:.2g}" for other in answered)
        other_cells = ("" if other == name else cell for other, cell in zip(answered, shown, strict=True))
        add(found, f"{numbers[name]} {name}", *other_cells)
    out.print(found)
    if departing := [pair for pair in pairs if pair["departs"]]:
        found = table("two that depart", "at layer", "dB below expected", "SQNR of the logits, dB", "same answer")
        for pair in departing:
            place = pair["departs"]
            below = "all of it" if place["db"] is None else f"{place['db']:.1f}"
            ratio = "-" if pair["difference"] is None else _decibels(pair["sqnr_db"])
            add(
                found, " / ".join(pair["names"]), place["layer"], below,
                ratio, "yes" if pair["same_class"] else "no",
            )  # fmt: skip
        out.print(found)
    for one in document["outliers"]:
        say(f"{one['name']} departs from all others that show layers, at {' and '.join(one['layers'])}")
    if compared := sum(bool(pair["curve"]) for pair in pairs) - len(departing):
        say(f"{compared} of {len(pairs)} pairs depart at no layer")
    for note in dict.fromkeys(pair["note"] for pair in pairs if pair["note"]):
        warn("note", note)


def bench(document: Mapping[str, Any], notes: Sequence[str]) -> None:
    """The document of `edgetube bench --json`, with notes."""
    found = table(
        "bundle", "threads", "p50 ms", "p90", "p99", "clips/s", "prepare", "cold start", "memory", "share of peak"
    )
    for row in document["bundles"]:
        if row["p50_ms"] is None:
            add(found, row["name"], row["status"])
            continue
        add(
            found, row["name"], str(row["threads"] or "default"),
            f"{row['p50_ms']:.2f} ±{row['noise']:.1%}", f"{row['p90_ms']:.2f}", f"{row['p99_ms']:.2f}",
            f"{row['throughput']:.1f}", f"{row['preprocess_ms']:.1f} ms", f"{row['cold_start_ms']:.0f} ms",
            f"{row['peak_mb']:.0f} MB" if row["peak_mb"] else "-", percent(row["peak_share"]),
        )  # fmt: skip
    out.print(found)
    if paced := [row for row in document["bundles"] if row["camera"]]:
        found = table(
            f"{_cameras(paced[0]['camera']['cameras'])}, {paced[0]['camera']['fps']:g} fps",
            "p50 ms",
            "p99",
            "due",
            "late",
            "late frames",
            "dropped",
            "idle",
        )
        for name, row in ((row["name"], row["camera"]) for row in paced):
            add(
                found, name, f"{row['p50_ms']:.1f}", f"{row['p99_ms']:.1f}", f"{row['due_ms']:.0f}",
                f"{row['late']} of {row['predictions']}", str(row["late_frames"]),
                f"{row['dropped_frames']} of {row['frames']}", percent(row["idle_share"]),
            )  # fmt: skip
        out.print(found)
    _on(document)
    for note in notes:
        warn("note", note)


def _on(document: Mapping[str, Any]) -> None:
    """The device that answered, if it was not this machine."""
    if device := document.get("device"):
        say(f"on {device['name']}: {device['machine']}")


def fleet(document: Mapping[str, Any], notes: Sequence[str]) -> None:
    """The document of `edgetube bench --json` on several devices, a row for each device and bundle, with notes."""
    found = table("device", "bundle", "threads", "p50 ms", "p99", "clips/s", "cold start", "memory")
    for one in document["devices"]:
        for row in one.get("bundles", ()):
            if row["p50_ms"] is None:
                add(found, one["device"]["name"], row["name"], row["status"])
                continue
            add(
                found, one["device"]["name"], row["name"], str(row["threads"] or "default"),
                f"{row['p50_ms']:.2f} ±{row['noise']:.1%}", f"{row['p99_ms']:.2f}", f"{row['throughput']:.1f}",
                f"{row['cold_start_ms']:.0f} ms", f"{row['peak_mb']:.0f} MB" if row["peak_mb"] else "-",
            )  # fmt: skip
    out.print(found)
    for note in notes:
        warn("note", note)


def _cameras(count: int) -> str:
    return "camera" if count == 1 else f"{count} cameras"


def sweep(document: Mapping[str, Any]) -> None:
    """The document of `edgetube sweep --json`."""
    quality = "top-1" if document["data"]["quality"] == "top1" else "agreement"
    found = table("point", "MACs", "p50 ms", quality, "clips", "")
    for row in sorted(document["points"], key=lambda row: (row["p50_ms"] is None, row["p50_ms"] or 0.0)):
        accuracy, time = "-", "-"
        if row["accuracy"] is not None:
            accuracy = f"{percent(row['accuracy'])} ({percent(row['accuracy_low'])}-{percent(row['accuracy_high'])})"
        if row["p50_ms"] is not None:
            time = f"{row['p50_ms']:.2f} ±{row['noise']:.1%}"
        place = [Text("winner", "bold green")] if row["winner"] else [Text("on the front", "green")] * row["front"]
        verdict = Text("; ").join([*place, *([Text(printable(row["reason"]))] if row["reason"] else [])])
        add(found, row["name"], percent(row["macs_ratio"]), time, accuracy, str(row["clips"] or "-"), verdict)
    out.print(found)
    _on(document)
    for told in document["notes"]:
        warn("note", told)
    say(document["result"])


def report(columns: Sequence[str], rows: Sequence[Sequence[str]], headline: str) -> None:
    """The verdicts of `edgetube report`, and its summary."""
    found = table(*columns)
    for row in rows:
        add(found, *row)
    out.print(found)
    say(headline)


def prediction(source: str, found: Prediction) -> None:
    """One answer of `edgetube run`."""
    if found.restarted is not None:
        warn("note", f"{source}: the window began again: {found.restarted}")
    scores = "  ".join(f"{printable(label)} {score:.2f}" for label, score in list(found.scores.items())[1:])
    span = "" if found.start is None else f"{found.start:6.2f}-{found.end:.2f} s  "
    line = Text.assemble(
        f"{printable(Path(source).name)}  {span}",
        (printable(found.label), "bold"),
        f" {found.score:.2f}  ",
        (f"{scores}  {found.latency_ms:.0f} ms", "dim"),
    )
    out.print(line, soft_wrap=True)


def event(source: str, found: Event) -> None:
    """One event of `edgetube run --decide`."""
    span = found.span
    when = f"began at {span.start:.2f} s" if found.kind == "opened" else f"{span.start:.2f}-{span.end:.2f} s"
    line = Text.assemble(
        f"{printable(Path(source).name)}  {found.seconds:7.2f} s  ",
        (printable(span.label), "bold"),
        f" {found.kind}  ",
        (f"{when}, peak {span.peak:.2f}", "dim"),
    )
    out.print(line, soft_wrap=True)


def state(source: str, found: State, why: str) -> None:
    """A change of the state of a source of `edgetube serve`."""
    line = Text.assemble(f"{printable(source)}  ", (found, "bold"), (f"  {printable(why)}", "dim"))
    out.print(line, soft_wrap=True)


def serving(url: str, is_loopback: bool) -> None:
    """Where `edgetube serve` listens."""
    say(f"{url}  (Ctrl-C ends it)")
    if not is_loopback:
        warn("note", "other machines can reach it, over plain HTTP: whoever sees the traffic sees the token")


def _facts(b: Bundle) -> Iterator[tuple[str, str]]:
    spec, graph = b.spec, b.build.get("graph", {})
    yield "target", f"{b.target} ({b.backend}, {b.precision}), {b.status}"
    yield "input", f"{b.batch} x {b.contract.shape} uint8 RGB"
    yield from _model_facts(spec, b.contract)
    yield "work", f"{spec.macs() / 1e9:.2f} GMAC, {b.artifact_bytes / 1e6:.1f} MB"
    yield "labels", _first(b.labels)
    if ops := graph.get("operators"):
        yield "graph", ", ".join(f"{n} {op}" for op, n in sorted(ops.items(), key=lambda item: -item[1]))
    if layers := b.build.get("layers"):
        yield "engine", ", ".join(f"{key.replace('_', ' ')} {_counts(value)}" for key, value in layers.items())
    if command := b.build.get("command"):
        yield "by hand", command
    if lowering := b.build.get("lowering"):
        times = ", ".join(f"{name} {t['p50_ms']:.2f} ms" for name, t in lowering.get("timings", {}).items())
        yield "lowering", f"{lowering['chosen']}: {lowering['why']}" + (f" ({times})" if times else "")
    yield "proof", ", ".join(f"{k} {number(v) if isinstance(v, float) else v}" for k, v in b.parity.items())
    yield "checkpoint", f"{b.checkpoint['source']} sha256 {b.checkpoint['sha256'][:12]}"
    if licence := b.checkpoint.get("licence"):
        yield "licence", licence
    if notes := b.build.get("notes"):
        yield "notes", "\n".join(notes)
    yield "made by", ", ".join(f"{k} {v}" for k, v in b.versions.items())


def _checkpoint_facts(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    spec, contract = ModelSpec.from_json(document["spec"]), InputContract.from_json(document["input"])
    yield "source", f"{document['source']} sha256 {document['sha256'][:12]}"
    yield "format", document["format"] or "built in"
    if options := document["options"]:
        yield "read with", ", ".join(f"--{key.replace('_', '-')} {value}" for key, value in options.items())
    yield "licence", document["licence"] or "not stated"
    yield "input", f"{contract.shape} uint8 RGB"
    yield from _model_facts(spec, contract)
    yield "answer", _answer(spec)
    yield "work", f"{document['macs'] / 1e9:.2f} GMAC, {document['parameters'] / 1e6:.1f} M parameters"
    for name, classes in spec.classifiers:
        labels = document["labels"] if name == spec.classifiers[0][0] else document["other_labels"].get(name, [])
        yield f"labels of {name}", f"{classes}: {_first(labels)}"


def _model_facts(spec: ModelSpec, contract: InputContract) -> Iterator[tuple[str, str]]:
    """What bundles and checkpoints say alike."""
    yield "frames", _sampling(contract)
    yield "pixels", _geometry(contract)
    each = " a frame" if spec.per_frame else ""
    yield (
        "tubes",
        "; ".join(
            f"{f'{i}: ' if len(spec.tubes) > 1 else ''}{tube} every {'x'.join(map(str, tube.stride))} -> "
            f"{'x'.join(map(str, grid))} tokens{each}"
            for i, tube, grid in zip(spec.active, (spec.tubes[i] for i in spec.active), spec.grids, strict=True)
        ),
    )
    prefix = f" + {spec.prefix} prefix" if spec.prefix else ""
    yield "encoder", f"{spec.tokens}{prefix} tokens{each}, width {spec.width}, {spec.depth} blocks, {spec.heads} heads"


def _answer(spec: ModelSpec) -> str:
    """How the logits are made, in one line."""
    norm = {"tokens": "LayerNorm, then", "readout": "LayerNorm of", "none": "without LayerNorm"}[spec.final_norm]
    cosine = f", projected to {spec.projection} and divided by its length" if spec.projection else ""
    rotary = f" over {', '.join(spec.rotary.axes)}" if spec.rotary else ""
    divided = "divided attention, " if spec.attention == "divided" else ""
    return (
        f"{divided}{spec.positions} positions{rotary}, {spec.activation}{' gated' if spec.gated_mlp else ''}, eps "
        f"{spec.norm_eps:g}; {norm} {' + '.join(spec.readout)}{cosine}{', mean over frames' if spec.per_frame else ''}"
    )


def _first(labels: Sequence[str]) -> str:
    return ", ".join(labels[:12]) + (" ..." if len(labels) > 12 else "")


def _sampling(contract: InputContract) -> str:
    """How frames are taken from a video."""
    if contract.sampling == "segments":
        return f"the middle ones of {contract.frames} equal segments of the whole video"
    if contract.stride is not None:
        return f"{contract.frames} with stride {contract.stride}, in frames of the source"
    return f"{contract.frames} at {contract.fps or 'any'} fps"


def _geometry(contract: InputContract) -> str:
    """How a frame is resized and cropped."""
    size = contract.resize_size
    if contract.resize == "stretch":
        rows, columns = size if isinstance(size, tuple) else (contract.height, contract.width)
        resized = f"stretched to {rows} x {columns}"
    else:
        resized = f"short side {size}" if size is not None else "resized until the crop is covered"
    crop = f"crop {contract.crop} {contract.height} x {contract.width}"
    return f"{resized} ({contract.filter}), {crop}; mean {_numbers(contract.mean)}, std {_numbers(contract.std)}"


def _numbers(values: Sequence[float]) -> str:
    """Values of the channels; one where they are equal."""
    texts = [f"{value:.6g}" for value in values]
    return texts[0] if len(set(texts)) == 1 else " ".join(texts)


def _yes(missing: tuple[str, ...]) -> Text:
    return Text.assemble(("no:", "red"), f" needs {', '.join(missing)}") if missing else Text("yes", "green")


def percent(share: float | None) -> str:
    """A share as per cent; a dash where there is none."""
    return "-" if share is None else f"{share:.1%}"


def number(value: float | None) -> str:
    """Three digits; a dash where there is none."""
    return "-" if value is None else f"{value:.3g}"


def _counts(value: Any) -> str:
    """A count, a table of counts, or how many things a list names."""
    if isinstance(value, dict):
        return " + ".join(f"{count} {name}" for name, count in value.items()) or "0"
    return str(len(value) if isinstance(value, list) else value)
