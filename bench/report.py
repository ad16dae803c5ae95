"""One self-contained HTML page about all bundles of a folder: accuracy, latency and cost.

The page is made from the documents of `edgetube parity --json`, `edgetube bench --json` and `edgetube agree --json`.
They are cached beside the bundles until anything that they depend on changes.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetube import bundle as bundles
from edgetube.bench import figures, latency, machine
from edgetube.bench.answer_cache import clip_key
from edgetube.bundle import MANIFEST, Bundle
from edgetube.datasets import ClipSet
from edgetube.errors import InputError
from edgetube.files import atomic_write
from edgetube.progress import Progress, silent
from edgetube.targets import need
from edgetube.video import Frames

if TYPE_CHECKING:
    from edgetube.bench.parity import Gates

SCHEMA = 1
TEMPLATE = "report.html.j2"
KEPT = "report"
"""The folder of the cached documents, beside the bundles."""

WORST_CLIPS, FRAMES = 6, 8
"""Worst clips to show, and frames of each."""

VISIBLE = 0.01
"""Smallest difference of probabilities that is visible on the page, which shows whole per cents."""

LAYER_CLIPS = 4

COLUMNS = ("target", "verdict", "agreement", "top-1", "p50 ms", "clips/s", "cold start ms", "memory MB", "size MB")

Document = dict[str, Any]


def find(folder: Path) -> list[Bundle]:
    """The bundles in a folder, by name.

    Raises:
        InputError: there are none, or they are not of one checkpoint and input.
        BundleError: one is damaged.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give the one that edgetube export --out wrote bundles to")
    found = [bundles.load(path.parent) for path in sorted(folder.glob(f"*/{MANIFEST}")) if path.parent.name[0] != "."]
    if not found:
        raise InputError(f"{folder} holds no bundles; make some with: edgetube export --target all --out {folder}")
    first = found[0]
    for other in found[1:]:
        if (other.checkpoint["sha256"], other.contract) != (first.checkpoint["sha256"], first.contract):
            raise InputError(
                f"{folder} holds bundles of different checkpoints or inputs, {first.name} and {other.name}; "
                "a report compares those of one: move the others away"
            )
    return found


def kept(folder: Path, name: str, found: Sequence[Bundle], how: Mapping[str, Any], make: Callable[[], Document]) -> Any:
    """The document `name` of these bundles: the cached one if it is valid, else a new one.

    It is valid while the bundles' files, the options `how`, the machine and the installed packages are the same.
    """
    path = folder / KEPT / f"{name}.json"
    files = [(b.name, sorted((name, record.sha256) for name, record in b.files.items())) for b in found]
    about = [files, dict(how), machine.processor(), machine.versions()]
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    if path.is_file():
        stored = json.loads(path.read_text("utf-8"))
        if stored.get("key") == key:
            return stored["document"]
    document = machine.dated(make())
    path.parent.mkdir(exist_ok=True)
    atomic_write(path, json.dumps({"key": key, "document": document}, indent=1) + "\n")
    return document


@dataclass(frozen=True)
class Report:
    """The contents of the page.

    Attributes:
        parity, bench: the documents, with one entry for each bundle.
        agree: the document about one clip; None without it.
        rows: one for each bundle and for the PyTorch model if it was timed; see `docs/report.md`.
        strips: frames (n, H, W, 3) uint8 of the worst clips by their names.
        commands: the command lines that made the report.
    """

    parity: Document
    bench: Document
    rows: tuple[Document, ...]
    strips: Mapping[str, Frames]
    commands: tuple[str, ...] = ()
    agree: Document | None = None

    def to_json(self) -> Document:
        """The document of `edgetube report --json`."""
        documents = {"parity": self.parity, "bench": self.bench, "agree": self.agree}
        return {"schema": SCHEMA, "bundles": list(self.rows), **documents}


def make(
    folder: Path,
    found: Sequence[Bundle],
    source: ClipSet,
    gates: Gates,
    options: latency.Options,
    command: str,
    progress: Progress = silent,
) -> Report:
    """Measure bundles, or take cached measurements, and join them.

    Args:
        folder: of the bundles and the cached documents.
        command: the command line, shown on the page.

    Raises:
        InputError: no clips, or clips that do not fit the bundles.
    """
    parity, layers, agree = (need(f"edgetube.bench.{name}", "export") for name in ("parity", "layers", "agree"))
    contract, threads = found[0].contract, options.threads[0]

    def prove() -> Document:
        comparison = parity.measure(found, source, threads=threads, progress=progress)
        curves = layers.curves(found, source.sample(LAYER_CLIPS), progress=progress)
        document: Document = comparison.to_json(gates.judge(comparison), [curve.to_json() for curve in curves])
        return document

    def compare() -> Document:
        clip = source.item(shown).read(contract)
        document: Document = agree.measure(found, clip, threads=threads, progress=progress).to_json()
        return document

    asked = {"clips": [clip_key(item, contract) for item in source.items], "gates": asdict(gates), "threads": threads}
    proven = kept(folder, "parity", found, asked, prove)
    shown = worst_clip(proven) or source.items[0].name
    return assemble(
        proven,
        kept(folder, "bench", found, asdict(options), lambda: latency.measure(found, options, progress)),
        lambda name, count: parity.strip(source, name, contract, count),
        [command],
        kept(folder, "agree", found, asked | {"clip": shown}, compare),
    )


TIMED = (
    "p50_ms", "p10_ms", "p90_ms", "p99_ms", "noise", "runs", "throughput", "cold_start_ms", "cold_start", "peak_mb",
    "preprocess_ms", "preprocess_share", "energy_mj", "peak_share", "gmacs_per_s", "camera", "reason", "size_mb",
)  # fmt: skip
PROVEN = (
    "clips", "agreement", "agreement_low", "agreement_high", "top1", "top1_reference", "drop", "kl", "cosine",
    "relative_error",
)  # fmt: skip


def assemble(
    parity: Document,
    bench: Document,
    strip: Callable[[str, int], Frames],
    commands: Sequence[str] = (),
    agree: Document | None = None,
) -> Report:
    """Join the documents.

    Args:
        strip: (name, count) -> frames of a clip.
        commands: the command lines that made the report.
    """
    times = {row["name"]: row for row in bench["bundles"]}
    names = [row["name"] for row in (*bench["bundles"], *parity["bundles"]) if row["target"]]
    common = _common(names)
    rows = [_row(row, times.get(row["name"], {}), parity["gates"], common) for row in parity["bundles"]]
    proven = {row["name"] for row in rows}
    rows += [_row(row, row, (), common) for row in bench["bundles"] if row["name"] not in proven]
    eager = next((row for row in rows if row["target"] is None and row["p50_ms"]), None)
    for row in rows:
        row["speedup"] = _ratio(eager, row)
        if _is_reference(row, parity):
            row["top1"] = parity["bundles"][0]["top1_reference"]
    rows.sort(key=lambda row: (row["target"] is not None, row["p50_ms"] is None, row["p50_ms"] or 0.0, row["name"]))
    worst = list(dict.fromkeys(clip["name"] for clip in _worst(parity)))[:WORST_CLIPS]
    return Report(parity, bench, tuple(rows), {name: strip(name, FRAMES) for name in worst}, tuple(commands), agree)


def _common(names: Sequence[str]) -> str:
    """The checkpoint's name and a dot, if all bundles' names begin with it; else empty."""
    start = names[0].rpartition(".")[0] + "." if names else ""
    return start if all(name.startswith(start) for name in names) else ""


def _row(proof: Document, timed: Document, gates: Sequence[Document], common: str) -> Document:
    own = [gate for gate in gates if gate["bundle"] == proof["name"]]
    row = {key: proof.get(key) for key in ("name", "target", "precision", "backend", "status", *PROVEN)}
    if proof["target"] is None:  # the reference itself
        row |= {"verdict": "reference"}
    else:
        row |= {"verdict": "agrees" if all(gate["passed"] for gate in own) else "differs"}
    row |= {"failed": [gate for gate in own if not gate["passed"]], "short": proof["name"].removeprefix(common)}
    row |= {key: timed.get(key) for key in TIMED}
    row["size_mb"] = row["size_mb"] if proof.get("bytes") is None else proof["bytes"] / 1e6
    return row


def _ratio(eager: Document | None, row: Document) -> float | None:
    """Speed-up of a row over the PyTorch model; None where the noise is too large for a ratio."""
    if eager is None or not row["p50_ms"] or max(eager["noise"], row["noise"]) > latency.NOISY:
        return None
    ratio = float(eager["p50_ms"] / row["p50_ms"])
    return ratio if row is eager or abs(ratio - 1) > eager["noise"] + row["noise"] else None


def _worst(parity: Document) -> list[Document]:
    """The clips where a bundle differs: with another answer first, then by KL."""
    return [clip for clip in _by_difference(parity) if _differs(clip)]


def _by_difference(parity: Document) -> list[Document]:
    """The worst clips of all bundles: those with another answer first, then by KL."""
    return sorted(
        ({**clip, "of": row["name"]} for row in parity["bundles"] for clip in row["worst"]),
        key=lambda clip: (not clip["flipped"], -(clip["kl"] or 0.0)),
    )


def worst_clip(parity: Document) -> str | None:
    """The name of the clip where a bundle differs most, if the document names clips."""
    return next((clip["name"] for clip in _by_difference(parity)), None)


def _differs(clip: Document) -> bool:
    """Whether the page shows a difference: another class, or another percentage of the same class."""
    apart = abs(clip["bundle"]["score"] - clip["reference"]["score"])
    return bool(clip["flipped"]) or apart >= VISIBLE


def headline(report: Report) -> str:
    """The report in one sentence."""
    tested = [row for row in report.rows if row["target"]]
    right = [row for row in tested if row["verdict"] == "agrees"]
    text = f"{len(right)} of {len(tested)} targets answer like PyTorch"
    timed = [row for row in right if row["p50_ms"]]
    if timed:
        best = min(timed, key=lambda row: float(row["p50_ms"]))
        rivals = [row for row in timed if _lowest(row) < best["p50_ms"] * (1 + best["noise"])]
        fastest = " and ".join(row["short"] for row in rivals[:3]) if len(rivals) <= 3 else str(len(rivals))
        if len(rivals) > 1:
            text += f"; of the {len(timed)} that run here {fastest} are the fastest, too close to tell apart"
        else:
            text += f"; {fastest} is the fastest of the {len(timed)} that run here, {best['p50_ms']:.3g} ms a call"
        if best["speedup"]:
            text += f", {best['speedup']:.1f} times as fast as PyTorch"
    return text + "."


def _lowest(row: Document) -> float:
    """The lower bound of a row's median latency, ms."""
    return float(row["p50_ms"] * (1 - row["noise"]))


def html(report: Report) -> str:
    """The page: one file without scripts or external resources."""
    safe = need("markupsafe", "report").Markup
    data, rows, parity = report.parity["data"], report.rows, report.parity
    quality, title = ("top1", "top-1, %") if data["labelled"] else ("agreement", "agreement with PyTorch, %")
    plotted = [row | ({"agreement": 1.0} if _is_reference(row, parity) else {}) for row in rows]
    both_known = [row for row in plotted if row["p50_ms"] and row[quality] is not None]
    short = {row["name"]: row["short"] for row in rows}
    agreement, one_clip = parity["agreement"], report.agree and _one_clip(report.agree, short)
    curves = [curve for curve in parity["layers"] if curve["curve"]]
    precisions = dict.fromkeys(row["precision"] for row in both_known)
    drawings = {
        "pareto": safe(figures.pareto(plotted, quality, title)) if both_known else "",
        "sizes": safe(figures.sizes(rows)),
        "heat": safe(figures.heat([short.get(n, n) for n in agreement["names"]], agreement["matrix"])),
        "layers": safe(figures.layers(rows, curves)) if curves else "",
        "distances": safe(figures.distances(*one_clip.pop("matrix"))) if one_clip else "",
    }
    text: str = (
        pages()
        .get_template(TEMPLATE)
        .render(
            headline=headline(report),
            report=report,
            rows=rows,
            data=data,
            drawings=drawings,
            look=figures.styles(rows),
            colours={colour: f"var(--{name})" for colour, name in figures.VARIABLES.items()},
            front=len(figures.front(plotted, quality)) > 1,
            signs=[(figures.SIGNS[name], name) for name in figures.SIGNS if name in precisions],
            jumps=[curve for curve in curves if curve["first_jump"]],
            mute=[curve for curve in parity["layers"] if not curve["curve"]],
            short=short,
            one_clip=one_clip,
            worst=[
                (name, jpeg(frames), [clip for clip in _worst(parity) if clip["name"] == name])
                for name, frames in report.strips.items()
            ],
            cameras=[row for row in rows if row["camera"]],
            notes=latency.notes(report.bench),
        )
    )
    return text


def pages() -> Any:
    """The templates of pages, with `percent` and `number` as filters; a page is one file without outside resources."""
    jinja2 = need("jinja2", "report")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"percent": percent, "number": number}
    return environment


def _one_clip(agree: Document, short: Mapping[str, str]) -> Document:
    """What the page shows of the document of `edgetube agree`; rows without an answer are not in the matrix.

    Pairs of a model that departs from all others are not listed one by one.
    """
    outliers = {one["name"] for one in agree["outliers"]}
    index = [i for i, row in enumerate(agree["rows"]) if row["logits"] is not None]
    names = [short.get(agree["rows"][i]["name"], agree["rows"][i]["name"]) for i in index]
    matrix = [[agree["difference"]["matrix"][i][j] for j in index] for i in index]
    departing = [
        {"names": [short.get(name, name) for name in pair["names"]], **pair["departs"]}
        for pair in agree["pairs"] if pair["departs"] and not outliers & set(pair["names"])
    ]  # fmt: skip
    same = sum(bool(pair["curve"]) and not pair["departs"] for pair in agree["pairs"])
    return {
        "clip": agree["clip"], "matrix": (names, matrix), "departing": departing,
        "outliers": [{**one, "name": short.get(one["name"], one["name"])} for one in agree["outliers"]],
        "same": same, "pairs": len(agree["pairs"]),
        "mute": [row for row in agree["rows"] if row["reason"]],
    }  # fmt: skip


def _is_reference(row: Document, parity: Document) -> bool:
    """Whether a row is that of the reference."""
    return row["target"] is None and row["backend"] == parity["reference"]["runtime"] and bool(parity["bundles"])


def jpeg(frames: Frames, height: int = 120) -> str:
    """Frames side by side as a `data:` URL of one JPEG."""
    images = need("PIL.Image", "report")
    width = round(frames.shape[2] * height / frames.shape[1])
    sheet = images.new("RGB", (width * len(frames), height))
    for index, frame in enumerate(frames):
        sheet.paste(images.fromarray(frame).resize((width, height), images.Resampling.LANCZOS), (width * index, 0))
    data = io.BytesIO()
    sheet.save(data, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def cells(row: Document) -> list[str]:
    """A row as text, in the order of `COLUMNS`."""
    status = row["verdict"] if row["status"] in ("executed", None) else f"{row['verdict']} ({row['status']})"
    return [
        row["short"], status, percent(row["agreement"]), percent(row["top1"]), number(row["p50_ms"]),
        number(row["throughput"]), number(row["cold_start_ms"]), number(row["peak_mb"]), number(row["size_mb"]),
    ]  # fmt: skip


def markdown(report: Report) -> str:
    """The verdict table for a README or a pull request."""
    lines = [f"| {' | '.join(row)} |" for row in (COLUMNS, *map(cells, report.rows))]
    lines.insert(1, "|---" * len(COLUMNS) + "|")
    machine_line = f"{report.parity['data']['clips']} clips; {report.bench['machine']}"
    return "\n".join([headline(report), "", *lines, "", machine_line, ""])


def percent(share: float | None, digits: int = 1) -> str:
    """A share as per cent; a dash for None."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def number(value: float | None) -> str:
    """Three significant digits, without an exponent in the usual range; a dash for None."""
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def save(text: str, path: Path) -> Path:
    """Write the page.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, text)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    return path
