"""The command line: parse, call one function, print. A person gets a table, a program gets --json and exit codes."""

from __future__ import annotations

import json
import logging
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from edgetube import __version__, datasets, export, health, video
from edgetube import bundle as bundles
from edgetube.bench import latency
from edgetube.bundle import Bundle
from edgetube.errors import EdgetubeError, InputError, ParityError
from edgetube.progress import Progress
from edgetube.runtime import Runtime
from edgetube.spec import Prediction
from edgetube.targets import need

app = typer.Typer(
    name="edgetube",
    help="Take a trained sparse-tube video transformer to the camera, with the measured proof that it still answers "
    "the same. Start with: edgetube export --target onnx-fp32",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
out = Console(width=None if sys.stdout.isatty() else 140)
err = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")]
Device = Annotated[str | None, typer.Option(help="Device, as the backend names it: cpu, cuda, ...")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; the runtime chooses when left out.")]


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command line; errors of ours become one line and an exit code, others keep their traceback.

    Exit codes: 0 done, 1 a gate failed, 2 bad input or environment.
    """
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    logging.basicConfig(format="%(message)s")  # to stderr: an engine that is built on the first load takes minutes
    logging.getLogger("edgetube").setLevel(logging.INFO)
    try:
        app(args=[a for a in argv if a != "--debug"], prog_name="edgetube")
    except EdgetubeError as error:
        if debug:
            traceback.print_exc()
        err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(130)
    sys.exit(0)


def _version(value: bool) -> None:
    if value:
        out.print(f"edgetube {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every command; --debug is read by `main`, wherever it stands."""


@app.command()
def targets(as_json: Json = False) -> None:
    """Which targets can be built and run here; if not, why, and the pip line.

    Example: edgetube targets
    """
    known = export.targets().values()
    if as_json:
        rows = [
            {
                "name": t.name,
                "summary": t.summary,
                "missing_to_build": t.missing(t.build_needs),
                "missing_to_run": t.missing(t.run_needs),
                "remedy": t.remedy,
                "settings": [asdict(setting) for setting in t.settings],
            }
            for t in known
        ]
        _print_json(rows)
        return
    table = _table("target", "build here", "run here", "what it is")
    for t in known:
        table.add_row(t.name, _yes(t.missing(t.build_needs)), _yes(t.missing(t.run_needs)), t.summary)
    out.print(table)
    for remedy in sorted({t.remedy for t in known} - {""}):
        out.print(f"to install what is missing: [bold]{escape(remedy)}[/]", highlight=False)


@app.command(name="export")
def export_command(
    target: Annotated[list[str], typer.Option(help="A name of `edgetube targets`, or all; may be repeated.")],
    checkpoint: Annotated[
        str, typer.Option(help="demo, random:tubevit-b (-ti -s -b -l -h; -s2d), or a .safetensors file.")
    ] = "demo",
    out_dir: Annotated[Path, typer.Option("--out", help="Folder of the bundles.")] = Path("out"),
    frames: Annotated[int | None, typer.Option(help="Frames of the clip; the checkpoint's own if left out.")] = None,
    size: Annotated[str | None, typer.Option(help="Height and width: 224, or 224x320.")] = None,
    input_kind: Annotated[str, typer.Option("--input", help="video, or image: the 2-D tube alone.")] = "video",
    batch: Annotated[int, typer.Option(help="Clips per call, static in the artifact.")] = 1,
    head: Annotated[str | None, typer.Option(help="Name of the classifier, when there are several.")] = None,
    lowering: Annotated[
        str | None, typer.Option(help="gather, slice or conv2d; the fastest on this machine if left out.")
    ] = None,
    calib: Annotated[
        Path | None,
        typer.Option(help="Clips for INT8: a folder of videos or arrays, a .csv manifest, .npy or .npz frames."),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(help="Points of accuracy that INT8 may lose: 0.5 of top-1, without labels 1 of agreement."),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE, a setting of the target; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compile a checkpoint for a target, prove it against PyTorch, and write the bundle.

    Example: edgetube export --target onnx-fp32 --target onnx-fp16 --checkpoint model.safetensors --out out
    """
    if input_kind not in ("video", "image"):
        raise InputError(f"--input is {input_kind!r}; expected video or image")
    names = _chosen(target)
    pipeline = need("edgetube.export.pipeline", "export")
    options = pipeline.Options(
        frames, _size(size), input_kind == "image", batch, head, lowering, calib, max_drop, _settings(settings or [])
    )
    made = []
    with _progress() as progress:
        for bundle in pipeline.export_models(names, checkpoint, out_dir, options, progress):
            made.append(bundle)
    if as_json:
        _print_json([_bundle_row(b) for b in made])
        return
    table = _table("bundle", "status", "size", "lowering", "agreement", "largest logit error")
    for b in made:
        row = _bundle_row(b)
        table.add_row(
            str(b.path), b.status, _megabytes(b.artifact_bytes), str(row["lowering"]),
            _percent(row["agreement"]), _number(row["max_abs_error"]),
        )  # fmt: skip
    out.print(table)
    for b in made:
        if int8 := b.build.get("int8"):
            out.print(f"{escape(b.name)}: {escape(int8['summary'])}", highlight=False, soft_wrap=True)
            for note in int8["notes"]:
                err.print(f"[yellow]warning:[/] {escape(note)}", highlight=False, soft_wrap=True)
    if made:
        out.print(f"next: [bold]edgetube run {made[0].path} VIDEO[/]", highlight=False)


@app.command()
def run(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.")],
    source: Annotated[str, typer.Argument(help="Video or image file, glob, folder, camera index, or rtsp:// URL.")],
    stream: Annotated[
        bool, typer.Option("--stream", help="Slide a window over the source instead of one clip.")
    ] = False,
    hop: Annotated[int | None, typer.Option(help="Frames between two predictions of --stream.")] = None,
    top_k: Annotated[int, typer.Option(help="Classes to show.")] = 3,
    limit: Annotated[int | None, typer.Option(help="Stop after this many predictions of each source.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write an annotated mp4 (of one file).")] = None,
    threads: Threads = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Classify a video file, a folder of them, a camera or a network stream.

    Cameras and network streams always slide a window; --json prints one object a line.

    Example: edgetube run out/demo.onnx-fp32 clip.mp4 --save annotated.mp4
    """
    with Runtime(bundle, threads=threads, device=device) as rt:
        found = video.sources(source)
        if save and (len(found) != 1 or not isinstance(found[0], Path)):
            raise InputError(f"--save takes one video file; {source} is {len(found)} sources or a live one")
        for item in found:
            predictions = []
            for prediction in _predictions(rt, item, stream or not isinstance(item, Path), hop, top_k, limit):
                _print_prediction(str(item), prediction, as_json)
                predictions.append(prediction)
            if save:
                need("edgetube.annotate", "plot").save(save, video.frames(item), predictions, video.rate(item))
                err.print(f"wrote {save}", highlight=False)


@app.command()
def inspect(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.")],
    plot: Annotated[Path | None, typer.Option(help="Draw the tubes on a clip, and the learned kernels.")] = None,
    as_json: Json = False,
) -> None:
    """What is in a bundle: manifest, graph statistics, how it was chosen and proven.

    Example: edgetube inspect out/demo.onnx-fp32 --plot tubes.png
    """
    found = bundles.load(bundle)
    if plot:
        kernels = _kernels(found)
        need("edgetube.plot", "plot").tubes(plot, found.spec, found.golden()[0], kernels, found.name)
        err.print(f"wrote {plot}", highlight=False)
    if as_json:
        _print_json(found.to_json())
        return
    table = _table("", found.name)
    for key, value in _facts(found):
        table.add_row(key, escape(value))
    out.print(table)


@app.command()
def doctor(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.")],
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Verify a bundle on this machine: files, versions, and the golden clip's answer. Exit 1 when a check fails.

    Example: edgetube doctor out/demo.onnx-fp32
    """
    checks = health.examine(bundle, device)
    if as_json:
        _print_json([asdict(check) for check in checks])
    else:
        table = _table("check", "", "what was found")
        for check in checks:
            table.add_row(check.name, "[green]ok[/]" if check.ok else "[bold red]failed[/]", escape(check.detail))
        out.print(table)
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


@app.command()
def parity(
    bundle: Annotated[list[Path], typer.Argument(help="Bundles of one checkpoint.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of clips, one sub-folder a class, .csv manifest, .npy or .npz; else built-in clips."),
    ] = None,
    clips: Annotated[int, typer.Option(help="How many of the built-in clips.")] = 504,
    reference: Annotated[
        Path | None, typer.Option(help="A bundle to compare with; the PyTorch model if left out.")
    ] = None,
    min_agreement: Annotated[float, typer.Option(help="Gate: share of clips with the same answer.")] = 0.99,
    min_cosine: Annotated[float, typer.Option(help="Gate: cosine of the logits on the worst clip.")] = 0.98,
    max_drop: Annotated[float | None, typer.Option(help="Gate: points of top-1 lost.")] = None,
    max_class_drop: Annotated[float | None, typer.Option(help="Gate: points of top-1 lost by a class.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="Gate: mean KL divergence, nats.")] = None,
    max_error: Annotated[float | None, typer.Option(help="Gate: largest logit error / largest logit.")] = None,
    max_sure_flips: Annotated[
        float | None, typer.Option(help="Gate: share of other answers where the reference was sure.")
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Also compare layer by layer.")] = False,
    layer_clips: Annotated[int, typer.Option(help="Clips that --layers looks at.")] = 4,
    watch: Annotated[
        Path | None, typer.Option("--video", help="Slide a window over this video instead of reading clips.")
    ] = None,
    hop: Annotated[int | None, typer.Option(help="Frames between two windows of --video.")] = None,
    worst: Annotated[int, typer.Option(help="How many of the worst clips are named in --json.")] = 8,
    resume: Annotated[
        Path | None, typer.Option(help="Keep answers in this file, and go on from those that are in it.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes that share the clips.")] = 1,
    ray: Annotated[str | None, typer.Option(help="Use the Ray cluster at this address (auto: this machine's).")] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Compare bundles with the PyTorch reference, clip by clip. Exit 1 when a gate fails.

    Example: edgetube parity out/demo.onnx-fp32 out/demo.onnx-int8 --layers
    """
    harness = need("edgetube.bench.parity", "export")
    found = [bundles.load(path) for path in bundle]
    held_against = bundles.load(reference) if reference else None
    gates = harness.Gates(min_agreement, min_cosine, max_drop, max_class_drop, max_kl, max_error, max_sure_flips)
    with _progress() as progress:
        if watch:
            if data or resume or ray or workers > 1:
                raise InputError(
                    "--video is watched in order by one process; leave out --data, --resume, --workers and --ray"
                )
            gates.check_data(datasets.ClipSet(str(watch), ()))
            temporal = need("edgetube.bench.temporal", "export")
            seen = temporal.watch(
                found, watch, hop, reference=held_against, threads=threads, worst=worst, progress=progress
            )
            source, comparison, video_report = seen.windows, seen.comparison, seen.to_json()
        else:
            source, video_report = datasets.load(data) if data else datasets.built_in(clips, found[0].labels), None
            gates.check_data(source)
            with ExitStack() as stack:
                comparison = harness.measure(
                    found, source, reference=held_against, threads=threads, run=_runner(workers, ray),
                    journal=stack.enter_context(harness.Journal(resume)) if resume else None,
                    worst=worst, progress=progress,
                )  # fmt: skip
        curves = []
        if layers:
            looking = need("edgetube.bench.layers", "export")
            curves = looking.curves(found, source.sample(layer_clips), reference=held_against, progress=progress)
    verdicts = gates.judge(comparison)
    if as_json:
        _print_json(comparison.to_json(verdicts, [curve.to_json() for curve in curves], video_report))
    else:
        _print_parity(comparison)
        _print_video(video_report)
        _print_layers(curves)
    if failed := [str(verdict) for verdict in verdicts if not verdict.passed]:
        raise ParityError("; ".join(failed))


@app.command()
def bench(
    bundle: Annotated[list[Path], typer.Argument(help="Bundles; they take turns, each in a process of its own.")],
    threads: Annotated[
        str | None, typer.Option(help="CPU threads, a row for each: 1,2,4; the runtime chooses when left out.")
    ] = None,
    device: Device = None,
    seconds: Annotated[float, typer.Option(help="Counted calls of each row.")] = 5.0,
    starts: Annotated[int, typer.Option(help="Cold starts of each row.")] = 3,
    camera_fps: Annotated[
        float | None, typer.Option(help="Also pace each bundle by a camera of so many frames per second.")
    ] = None,
    camera_size: Annotated[str, typer.Option(help="Height and width of the camera's frames.")] = "480x640",
    camera_seconds: Annotated[float, typer.Option(help="How long the camera runs.")] = 10.0,
    hop: Annotated[int | None, typer.Option(help="Frames between two predictions behind the camera.")] = None,
    reference: Annotated[
        bool, typer.Option("--reference", help="Also time the PyTorch model that the bundles were made from.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Time bundles: latency, throughput, cold start, memory, and how far from the machine's limit they are.

    Example: edgetube bench out/demo.onnx-fp32 out/demo.onnx-int8 --threads 1,2 --camera-fps 30
    """
    options = latency.Options(
        _counts_of(threads), device, seconds, starts, camera_fps, _size(camera_size) or (480, 640), hop,
        camera_seconds, reference,
    )  # fmt: skip
    found = [bundles.load(path) for path in bundle]
    with _progress() as progress:
        document = latency.measure(found, options, progress)
    if as_json:
        _print_json(document)
        return
    table = _table("bundle", "threads", "p50 ms", "p90", "p99", "clips/s", "prepare", "cold start", "memory", "of peak")
    for row in document["bundles"]:
        if row["p50_ms"] is None:
            table.add_row(row["name"], row["status"])
            continue
        table.add_row(
            row["name"], str(row["threads"] or "default"),
            f"{row['p50_ms']:.2f} ±{row['noise']:.1%}", f"{row['p90_ms']:.2f}", f"{row['p99_ms']:.2f}",
            f"{row['throughput']:.1f}", f"{row['preprocess_ms']:.1f} ms", f"{row['cold_start_ms']:.0f} ms",
            f"{row['peak_mb']:.0f} MB" if row["peak_mb"] else "-", _percent(row["peak_share"]),
        )  # fmt: skip
    out.print(table)
    if camera_fps is not None:
        table = _table(f"camera, {camera_fps:g} fps", "p50 ms", "p99", "due", "late", "late frames", "dropped", "idle")
        for row in document["bundles"]:
            if paced := row["camera"]:
                table.add_row(
                    row["name"], f"{paced['p50_ms']:.1f}", f"{paced['p99_ms']:.1f}", f"{paced['due_ms']:.0f}",
                    f"{paced['late']} of {paced['predictions']}", str(paced["late_frames"]),
                    f"{paced['dropped_frames']} of {paced['frames']}", _percent(paced["idle_share"]),
                )  # fmt: skip
        out.print(table)
    for note in latency.notes(document):
        err.print(f"[yellow]note:[/] {escape(note)}", highlight=False, soft_wrap=True)


@app.command(name="report")
def report_command(
    folder: Annotated[Path, typer.Argument(help="The folder of the bundles, as export --out wrote it.")],
    page: Annotated[Path | None, typer.Option("--out", help="The page; report.html in the folder if left out.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of clips, one sub-folder a class, .csv manifest, .npy or .npz; else built-in clips."),
    ] = None,
    clips: Annotated[int, typer.Option(help="How many of the built-in clips.")] = 126,
    min_agreement: Annotated[float, typer.Option(help="Gate: share of clips with the same answer.")] = 0.98,
    seconds: Annotated[float, typer.Option(help="Counted calls of each bundle.")] = 3.0,
    camera_fps: Annotated[
        float | None, typer.Option(help="Also pace each bundle by a camera of so many frames per second.")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the table for a README or a review.")] = False,
) -> None:
    """One page about all bundles of a folder: right, fast, and at what cost. Exit 1 when a gate fails.

    What is measured is kept beside the bundles, and measured again when anything that it depends on has changed.

    Example: edgetube report out --out report.html
    """
    reports = need("edgetube.bench.report", "report")
    harness, looking = need("edgetube.bench.parity", "export"), need("edgetube.bench.layers", "export")
    found = reports.find(folder)
    source = datasets.load(data) if data else datasets.built_in(clips, found[0].labels)
    gates = harness.Gates(min_agreement=min_agreement)
    options = latency.Options((threads,), seconds=seconds, camera_fps=camera_fps, reference=True)
    with _progress() as progress:

        def prove() -> dict[str, Any]:
            comparison = harness.measure(found, source, threads=threads, progress=progress)
            curves = looking.curves(found, source.sample(4), progress=progress)
            proven: dict[str, Any] = comparison.to_json(gates.judge(comparison), [c.to_json() for c in curves], None)
            return proven

        asked = {"data": str(data), "clips": [item.name for item in source.items], "gate": min_agreement}
        proven = reports.kept(folder, "parity", found, asked | {"threads": threads}, prove)
        timed = reports.kept(folder, "bench", found, asdict(options), lambda: latency.measure(found, options, progress))
    contract = found[0].contract
    made = reports.assemble(
        proven, timed, lambda name, count: harness.strip(source, name, contract, count),
        [shlex.join(["edgetube", *sys.argv[1:]])],
    )  # fmt: skip
    where = reports.save(reports.html(made), page or folder / "report.html")
    if as_json:
        _print_json(made.to_json())
    elif as_markdown:
        print(reports.markdown(made), end="")  # noqa: T201
    else:
        out.print(escape(reports.headline(made)), highlight=False, soft_wrap=True)
    err.print(f"wrote {where}", highlight=False, soft_wrap=True)
    if failed := [row["name"] for row in made.rows if row["verdict"] == "differs"]:
        raise ParityError(f"{', '.join(failed)} agree with the reference on less than {min_agreement:.1%} of the clips")


def _predictions(
    rt: Runtime, source: video.Source, live: bool, hop: int | None, top_k: int, limit: int | None
) -> Iterator[Prediction]:
    found = rt.stream(source, hop=hop, top_k=top_k) if live else iter([rt.predict(source, top_k=top_k)])
    return islice(found, limit)


def _runner(workers: int, ray: str | None) -> Any:
    """Where the clips of a comparison are worked on."""
    places = need("edgetube.bench.workers", "export")
    if ray:
        if workers > 1:
            raise InputError("--workers counts processes of this machine, --ray asks a cluster; give one of the two")
        return partial(places.on_cluster, address=ray)
    return places.here if workers == 1 else partial(places.in_processes, workers=workers)


def _print_parity(comparison: Any) -> None:
    table = _table("bundle", "status", "clips", "top-1", "reference", "agreement", "KL", "largest logit error")
    for one in comparison.measured:
        p = one.parity
        interval = f"{_percent(p.agreement)} ({_percent(p.agreement_low)}-{_percent(p.agreement_high)})"
        table.add_row(
            one.bundle.name, p.status, str(p.clips), _percent(p.top1), _percent(p.top1_reference),
            interval, _number(p.kl), _number(p.max_abs_error),
        )  # fmt: skip
    out.print(table)
    for one in comparison.measured:
        flipped = [clip for clip in one.worst if clip.flipped]
        if flipped:
            first = flipped[0]
            sure = f"{one.parity.sure_flips:.1%} where the reference was sure"
            line = (
                f"{one.bundle.name}: flips {sure}; worst clip {first.name}: {first.reference[0]} -> {first.bundle[0]}"
            )
            out.print(escape(line), highlight=False, soft_wrap=True)


def _print_video(watched: dict[str, Any] | None) -> None:
    if watched is None:
        return
    health = watched["stream"]
    out.print(
        f"{escape(watched['source'])}: {health['frames']} frames, {health['fps']:.2f} fps, drift "
        f"{health['fps_drift_percent']:.2f} %, {health['dropped']} dropped, {health['duplicated']} repeated; "
        f"{watched['windows']} windows, {watched['reference']['onsets']} changes of the reference's answer",
        highlight=False,
        soft_wrap=True,
    )
    table = _table("bundle", "agreement", "flip rate", "changes", "missed", "mean delay", "largest delay")
    for one in [{"name": "reference", **watched["reference"]}, *watched["bundles"]]:
        delays = [one.get("onset_delay_mean_s"), one.get("onset_delay_max_s")]
        table.add_row(
            one["name"], _percent(one.get("agreement")), _percent(one["flip_rate"]), str(one["onsets"]),
            str(one.get("missed", "-")), *("-" if delay is None else f"{delay:.2f} s" for delay in delays),
        )  # fmt: skip
    out.print(table)


def _print_layers(curves: Sequence[Any]) -> None:
    if not curves:
        return
    table = _table("layer", *(f"{curve.name}, dB" for curve in curves))
    ratios = [{found.layer: found.sqnr_db for found in curve.curve} for curve in curves]
    for layer in dict.fromkeys(found.layer for curve in curves for found in curve.curve):
        table.add_row(layer, *(f"{known[layer]:.1f}" if layer in known else "-" for known in ratios))
    out.print(table)
    for curve in curves:
        jump = f"the error jumps at {curve.first_jump}" if curve.first_jump else "no layer where the error jumps"
        said = curve.note or jump
        out.print(f"{escape(curve.name)}: {said}", highlight=False)


def _print_prediction(source: str, prediction: Prediction, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"source": source, **prediction.to_json()}), flush=True)  # noqa: T201
        return
    scores = "  ".join(f"{label} {score:.2f}" for label, score in list(prediction.scores.items())[1:])
    span = "" if prediction.start is None else f"{prediction.start:6.2f}-{prediction.end:.2f} s  "
    out.print(
        f"{escape(Path(source).name)}  {span}[bold]{escape(prediction.label)}[/] {prediction.score:.2f}  "
        f"[dim]{escape(scores)}  {prediction.latency_ms:.0f} ms[/]",
        highlight=False,
        soft_wrap=True,
    )


def _kernels(b: Bundle) -> dict[int, Any] | None:
    """The learned kernels of a bundle's tubes, when its checkpoint can be read here."""
    try:
        model = need("edgetube.model.checkpoints", "export").of_bundle(b).model
    except EdgetubeError as error:
        err.print(f"without kernels: {error}", highlight=False, soft_wrap=True)
        return None
    return {i: model.tubes.weight(i).detach().numpy() for i in b.spec.active}


def _chosen(names: list[str]) -> list[str]:
    """The targets that were asked for; `all` is every one that can be built here."""
    if "all" in names:
        return [t.name for t in export.targets().values() if not t.missing(t.build_needs)]
    return list(dict.fromkeys(names))


def _settings(texts: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    if bad := [name for name, equals, _ in pairs if not (name and equals)]:
        raise InputError(f"--set is {bad[0]!r}; expected NAME=VALUE")
    return {name: value for name, _, value in pairs}


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() for part in parts):
        raise InputError(f"--size is {text!r}; expected 224 or 224x320 (height x width)")
    return int(parts[0]), int(parts[-1])


def _counts_of(text: str | None) -> tuple[int | None, ...]:
    """Thread counts: "1,2" -> (1, 2); left out -> the runtime's own choice."""
    if text is None:
        return (None,)
    if not all(part.strip().isdigit() for part in text.split(",")):
        raise InputError(f"--threads is {text!r}; expected numbers like 1,2,4")
    return tuple(dict.fromkeys(int(part) for part in text.split(",")))


def _bundle_row(b: Bundle) -> dict[str, Any]:
    """The object that `export --json` prints for one bundle."""
    return {
        "bundle": str(b.path),
        "target": b.target,
        "status": b.status,
        "bytes": b.artifact_bytes,
        "lowering": b.build["lowering"]["chosen"],
        "clips": b.parity.get("clips"),
        "agreement": b.parity.get("agreement"),
        "max_abs_error": b.parity.get("max_abs_error"),
    }


def _facts(b: Bundle) -> Iterator[tuple[str, str]]:
    spec, graph = b.spec, b.build.get("graph", {})
    yield "target", f"{b.target} ({b.backend}, {b.precision}), {b.status}"
    yield "input", f"{b.batch} x {b.contract.shape} uint8 RGB at {b.contract.fps or 'any'} fps"
    yield (
        "tubes",
        "; ".join(
            f"{tube} every {'x'.join(map(str, tube.stride))} -> {'x'.join(map(str, grid))} tokens"
            for tube, grid in zip((spec.tubes[i] for i in spec.active), spec.grids, strict=True)
        ),
    )
    yield "encoder", f"{spec.tokens} tokens, width {spec.width}, {spec.depth} blocks, {spec.heads} heads"
    yield "work", f"{spec.macs() / 1e9:.2f} GMAC, {b.artifact_bytes / 1e6:.1f} MB"
    yield "labels", ", ".join(b.labels[:12]) + (" ..." if len(b.labels) > 12 else "")
    if ops := graph.get("ops"):
        yield "graph", ", ".join(f"{n} {op}" for op, n in sorted(ops.items(), key=lambda item: -item[1]))
    if layers := b.build.get("layers"):
        yield "engine", ", ".join(f"{key.replace('_', ' ')} {_counts(value)}" for key, value in layers.items())
    if command := b.build.get("command"):
        yield "by hand", command
    lowering = b.build["lowering"]
    times = ", ".join(f"{name} {t['p50_ms']:.2f} ms" for name, t in lowering.get("timings", {}).items())
    yield "lowering", f"{lowering['chosen']}: {lowering['why']}" + (f" ({times})" if times else "")
    yield "proof", ", ".join(f"{k} {_number(v) if isinstance(v, float) else v}" for k, v in b.parity.items())
    yield "checkpoint", f"{b.checkpoint['source']} sha256 {b.checkpoint['sha256'][:12]}"
    yield "made by", ", ".join(f"{k} {v}" for k, v in b.versions.items())


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on a terminal, plain lines on stderr in a pipe."""
    if not err.is_terminal:
        yield _plain
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=err, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total or None)
            bar.update(tasks[stage], completed=done)

        yield show


def _plain(stage: str, done: int, total: int) -> None:
    if done == total:
        print(f"{stage}: done ({total})" if total > 1 else f"{stage}: done", file=sys.stderr, flush=True)  # noqa: T201


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=i == 0)
    return table


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2), flush=True)  # noqa: T201


def _yes(missing: tuple[str, ...]) -> str:
    return f"[red]no:[/] needs {', '.join(missing)}" if missing else "[green]yes[/]"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _counts(value: Any) -> str:
    """A count, a table of counts, or how many things a list names."""
    if isinstance(value, dict):
        return " + ".join(f"{count} {name}" for name, count in value.items()) or "0"
    return str(len(value) if isinstance(value, list) else value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
