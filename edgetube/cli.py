"""The command line. Each command parses its options, calls one function and prints a table or, with --json, JSON."""

from __future__ import annotations

import math
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial, wraps
from inspect import Signature, signature
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args

import typer

from edgetube import (
    __version__,
    address,
    datasets,
    demo,
    errors,
    export,
    health,
    interrupts,
    preprocess,
    runtimes,
    signing,
    terminal,
    video,
)
from edgetube import bundle as bundles
from edgetube.bench import latency, machine
from edgetube.bundle import Bundle
from edgetube.deploy import deepstream, triton
from edgetube.errors import CheckpointError, EdgetubeError, InputError, ParityError
from edgetube.live import window
from edgetube.live.decisions import Decider, DecisionRule, Event
from edgetube.progress import Progress
from edgetube.reduction import Kind
from edgetube.remote import commands, transport
from edgetube.remote.commands import RemoteRuntime
from edgetube.runtime import Runtime
from edgetube.spec import Prediction
from edgetube.targets import need
from edgetube.terminal import out, print_json, progress
from edgetube.views import SINGLE, Views

app = typer.Typer(
    name="edgetube",
    help="Export a trained video or image transformer to a device, with measured proof that it still answers the "
    "same. Start with: edgetube export --target onnx-fp32",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
deploy = typer.Typer(help="Folders that inference servers load a bundle from.", no_args_is_help=True)
app.add_typer(deploy, name="deploy")
MANY = 1_000_000
"""Largest number of clips, frames or predictions; more are taken for a typing error."""

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")]
Device = Annotated[str | None, typer.Option(help="Device, as the backend names it: cpu, cuda, ...")]
Weights = Annotated[
    Path | None,
    typer.Option("--checkpoint", help="File or folder of the bundles' checkpoint, if it was moved."),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; the runtime chooses when left out.")]
On = Annotated[
    str | None,
    typer.Option("--on", help="Another machine that runs the bundles: ssh://user@host[:port], adb://SERIAL."),
]


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command line; user errors are one line and an exit code, bugs keep their traceback.

    Exit codes: 0 done, 1 a gate failed, 2 bad input or environment, 128 + a signal's number when one ended it.
    """
    argv = sys.argv[1:] if argv is None else argv
    terminal.prepare()
    signals = interrupts.Handled()
    caught: BaseException
    try:
        with signals:
            sys.exit(_run([a for a in argv if a != "--debug"]))
    except KeyboardInterrupt as error:
        caught, code, text = error, signals.exit_code, "interrupted"
    except EdgetubeError as error:
        caught, code, text = error, error.exit_code, str(error)
    except UsageError as error:
        caught, code, text = error, 2, _usage(error)
    except BrokenPipeError:  # the reader of our output closed it
        terminal.abandon()
        sys.exit(128 + 13)
    except (OSError, MemoryError, RecursionError, EOFError) as error:
        caught, code, text = error, 2, errors.of_system(error)
    if "--debug" in argv:
        traceback.print_exception(caught)
    terminal.error(text)
    sys.exit(code)


def _run(argv: list[str]) -> int:
    """Run one command; returns the exit code that it asks for."""
    if "" in argv:
        raise InputError("an argument is empty; is a variable of the shell not set?")
    command = typer.main.get_command(app)
    try:
        with terminal.own_warnings(), command.make_context("edgetube", argv or ["--help"]) as context:
            command.invoke(context)
    except typer.Exit as asked:
        return asked.exit_code
    return 0


UsageError: Any = typer.BadParameter.__bases__[0]
"""What typer raises for options and arguments that it cannot read; the module differs between versions."""


def _usage(error: Any) -> str:
    where = error.ctx.command_path if error.ctx else "edgetube"
    return f"{' '.join(error.format_message().split()).rstrip('.')}; see: {where} --help"


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
        print_json(rows)
    else:
        terminal.targets(known)


def _reading(
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of a peft adapter (LoRA), merged into the weights.")
    ] = None,
    classifier: Annotated[
        Path | None, typer.Option(help="Weight and bias of a linear: a classifier for a tower without one.")
    ] = None,
    spec: Annotated[Path | None, typer.Option(help="JSON file with what the checkpoint does not say.")] = None,
    arch: Annotated[
        str | None, typer.Option(help="Architecture of a bare state dict, as its library names it.")
    ] = None,
    ema: Annotated[
        bool | None, typer.Option("--ema/--no-ema", help="The moving average of the weights, or they themselves.")
    ] = None,
    text_features: Annotated[
        Path | None, typer.Option(help=".npy (classes, E): zero-shot classes of an image-text tower.")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="Text file with one class name a line.")] = None,
    pool_frames: Annotated[str | None, typer.Option(help="mean: an image model over every frame of a clip.")] = None,
) -> Mapping[str, Any]:
    """What the user says about a checkpoint: the options that were given."""
    paths = {
        "adapter": adapter, "classifier": classifier, "spec": spec, "text_features": text_features, "labels": labels
    }  # fmt: skip
    texts = {key: None if path is None else str(path) for key, path in paths.items()}
    given = {**texts, "arch": arch, "ema": ema, "pool_frames": pool_frames}
    return {key: value for key, value in given.items() if value is not None}


def _reads_checkpoints(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of `_reading`, whose result is its argument `reading`."""
    own, added = (dict(signature(one, eval_str=True).parameters) for one in (command, _reading))
    del own["reading"]
    last = own.popitem()[1]  # --json

    @wraps(command)
    def whole(**given: Any) -> None:
        reading = _reading(**{name: given.pop(name) for name in added})
        command(reading, **given)

    parameters = [*own.values(), *added.values(), last]
    whole.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    whole.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return whole


@app.command(name="export")
@_reads_checkpoints
def export_command(
    reading: Mapping[str, Any],
    target: Annotated[list[str], typer.Option(help="A name of `edgetube targets`, or all; may be repeated.")],
    checkpoint: Annotated[
        str,
        typer.Option(help="A folder or file of weights (docs/checkpoints.md), demo, or random:tubevit-b (-ti ... -h)."),
    ] = "demo",
    out_dir: Annotated[Path, typer.Option("--out", help="Folder of the bundles.")] = Path("out"),
    frames: Annotated[int | None, typer.Option(help="Frames of the clip; the checkpoint's own if left out.")] = None,
    size: Annotated[str | None, typer.Option(help="Height and width: 224, or 224x320.")] = None,
    input_kind: Annotated[str, typer.Option("--input", help="video, or image: the 2-D tube alone.")] = "video",
    batch: Annotated[int, typer.Option(help="Clips per call, static in the artifact.")] = 1,
    head: Annotated[str | None, typer.Option(help="Name of the classifier, when there are several.")] = None,
    tubes: Annotated[
        str | None,
        typer.Option(help="Which tubes make tokens: indices of the model's (0,2,3), 392, or a .json file of tubes."),
    ] = None,
    keep_tokens: Annotated[
        str | None,
        typer.Option(
            help="Tokens that are left behind the last block: 155, or 0.5; the others are merged, as many in each "
            "block. Or a number for each block: 500,450,..."
        ),
    ] = None,
    reduce: Annotated[
        str, typer.Option(help="How the others leave: merge (into similar ones), or drop (least attended first).")
    ] = "merge",
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
    prove_on: Annotated[
        str | None,
        typer.Option(help="Then compare on that device, and say so in the manifest: ssh://user@host, adb://."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compile a checkpoint for a target, prove it against PyTorch, and write the bundle.

    Example: edgetube export --target onnx-fp32 --target onnx-fp16 --checkpoint model.safetensors --out out
    """
    if input_kind not in ("video", "image"):
        raise InputError(f"--input is {input_kind!r}; expected video or image")
    _check_kinds([reduce])
    _within(1, 1024, batch=batch)
    if out_dir.exists() and not out_dir.is_dir():
        raise InputError(f"--out is {out_dir}, which is a file; expected a folder")
    if prove_on is not None:
        transport.parse(prove_on)
    names = _chosen(target, fewer_tokens=keep_tokens is not None)
    if not any(export.target(name).precision.quantises_activations for name in names):
        for option, value in (("calib", calib), ("max-drop", max_drop)):
            if value is not None:
                raise InputError(
                    f"--{option} is for int8 targets; {', '.join(names)} is none: leave it out, or add one"
                )
    pipeline = need("edgetube.export.pipeline", "export")
    options = pipeline.Options(
        frames=frames,
        size=_size(size),
        tubes=tubes,
        keep_tokens=keep_tokens,
        reduce=reduce,
        image=input_kind == "image",
        batch=batch,
        head=head,
        lowering=lowering,
        calib=calib,
        max_drop=max_drop,
        settings=_settings(settings or []),
    )
    refused: dict[str, EdgetubeError] = {}
    several = refused.__setitem__ if len(names) > 1 else None
    try:
        with progress() as show:
            made = list(
                pipeline.export_models(names, checkpoint, out_dir, options, show, _read_options(reading), several)
            )
            if prove_on is not None and made:
                made = need("edgetube.remote.proof", "export").prove(prove_on, made, show)
        rows = [_bundle_row(b) for b in made]
        if as_json:
            print_json(rows + [_refused_row(name, error) for name, error in refused.items()])
        elif made:
            terminal.exported(made, rows)
    finally:  # also where what comes after fails
        for name, error in refused.items():
            terminal.error(f"{name}: {error}")
    reports = [b.build["int8"] for b in made if "int8" in b.build]
    unread = {name: why for report in reports for name, why in report["unread"].items()}
    _end_with(unread, "calibration clips were left out", *(error.exit_code for error in refused.values()))


@app.command()
@_reads_checkpoints
def init(
    reading: Mapping[str, Any],
    source: Annotated[
        str | None, typer.Option("--from", help="An image model: what `export --checkpoint` takes.")
    ] = None,
    from_video: Annotated[
        str | None, typer.Option(help="A small video model of edgetube, or demo, whose trained tubes --into gets.")
    ] = None,
    into: Annotated[str | None, typer.Option(help="The image model for --from-video.")] = None,
    tubes: Annotated[
        str, typer.Option(help="Tubes beside the patches: default (the paper's), 392 (two of them), or a JSON file.")
    ] = "default",
    frames: Annotated[int | None, typer.Option(help="Frames of the clip; 32, or the small model's.")] = None,
    size: Annotated[str | None, typer.Option(help="Height and width: 224, or 224x320; the image model's.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second; 15, or the small model's.")] = None,
    gates: Annotated[
        str | None,
        typer.Option(help="Blocks that also add the tubes, from 0: 2,6,10, or none; the third of each four."),
    ] = None,
    inflate: Annotated[
        bool, typer.Option("--inflate", help="Repeat kernels over time; else they stand in the middle frame.")
    ] = False,
    out_file: Annotated[Path, typer.Option("--out", help="The video model, .safetensors.")] = Path("model.safetensors"),
    as_json: Json = False,
) -> None:
    """Make a video model of an image model: it gets tubes, and answers images as before, which is checked.

    Example: edgetube init --from dinov2-folder --tubes default --out model.safetensors
    """
    if (source is None) == (into is None) or (into is None) != (from_video is None):
        raise InputError("give --from IMAGE_MODEL, or --from-video VIDEO_MODEL and --into IMAGE_MODEL")
    if into is not None and (tubes != "default" or inflate):
        raise InputError("--tubes and --inflate make new tubes; with --from-video they are those of the small model")
    start, kernels = need("edgetube.train.start", "export"), need("edgetube.train.kernels", "export")
    formats, checkpoints = need("edgetube.formats", "export"), need("edgetube.model.checkpoints", "export")
    _within(2, MANY, frames=frames)
    image = formats.load(source or into, _read_options(reading))
    image = image.with_clip(size=_size(size)) if size else image
    plan = start.Plan(kernels.read_tubes(tubes), frames, fps, _blocks(gates), inflate)
    made = start.from_image(image, plan) if source else start.from_video(formats.load(from_video), image, plan)
    document = start.document(made, start.image_error(image, made))
    checkpoints.save(made, out_file)
    if as_json:
        print_json({"out": str(out_file), **document})
    else:
        terminal.started(document)
        terminal.wrote(out_file)


@app.command()
@_reads_checkpoints
def finetune(
    reading: Mapping[str, Any],
    model: Annotated[str, typer.Argument(help="A model of `edgetube init`, or what `export --checkpoint` takes.")],
    data: Annotated[
        str, typer.Option(help="Folder of clips, one sub-folder a class, a list (.csv, .txt, .json), .npz, or demo.")
    ],
    val: Annotated[str | None, typer.Option(help="Clips to judge by, like --data; else a share of --data.")] = None,
    val_share: Annotated[float, typer.Option(help="Share of --data that is held out where --val is left out.")] = 0.1,
    images: Annotated[str | None, typer.Option(help="Images with labels, as many of which go into each batch.")] = None,
    head: Annotated[str | None, typer.Option(help="Name of the classifier of the clips.")] = None,
    image_head: Annotated[str | None, typer.Option(help="Name of the classifier of the images.")] = None,
    train: Annotated[str, typer.Option(help="tubes (with times, gates, heads), last4 (and blocks), or all.")] = "tubes",
    epochs: Annotated[int | None, typer.Option(help="Passes over the clips; 10.")] = None,
    batch: Annotated[int | None, typer.Option(help="Clips of a step, over all processes; 32.")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Parts in which a batch is computed; 1.")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate; 0.001.")] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of the steps before it; 0.05.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of AdamW; 0.05.")] = None,
    layer_decay: Annotated[
        float | None, typer.Option(help="Of the rate, from a block to the one before; 0.75.")
    ] = None,
    smoothing: Annotated[float | None, typer.Option(help="Of the labels; 0.1.")] = None,
    average: Annotated[float | None, typer.Option(help="Of the weights, from step to step; 0 for none; 0.998.")] = None,
    mirror: Annotated[
        bool, typer.Option("--mirror/--no-mirror", help="Mirror half of the clips; left and right in labels change.")
    ] = True,
    jitter: Annotated[float | None, typer.Option(help="Of brightness, contrast and crop; 0.1.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of order, augmentation and new classifiers; 0.")] = None,
    bf16: Annotated[bool | None, typer.Option("--bf16/--no-bf16", help="Multiply in bfloat16; on CUDA.")] = None,
    clips: Annotated[int, typer.Option(help="How many of the built-in clips.")] = 1008,
    max_unreadable: Annotated[float, typer.Option(help="Share of the clips that may be unreadable.")] = 0.1,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder of the models and the state.")] = Path("run"),
    device: Annotated[str | None, typer.Option(help="cpu, cuda or mps; the best that is here.")] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train a model on labelled clips. The same command goes on where it was stopped.

    Example: edgetube finetune model.safetensors --data clips --epochs 20 --out run
    """
    _within(1, MANY, clips=clips)
    training = need("edgetube.train.run", "export")
    given = {
        "train": train, "epochs": epochs, "batch": batch, "accumulate": accumulate, "lr": lr, "warmup": warmup,
        "weight_decay": weight_decay, "layer_decay": layer_decay, "smoothing": smoothing, "average": average,
        "mirror": mirror, "jitter": jitter, "seed": seed, "bf16": bf16,
    }  # fmt: skip
    options = training.recipe_of(given)
    sources = training.Sources(data, val, images, head, image_head, val_share, clips, max_unreadable)
    checkpoint = need("edgetube.formats", "export").load(model, _read_options(reading))
    told = training.Told(None if as_json else terminal.epoch, partial(terminal.warn, "note"))
    with progress() as show:
        document = training.run(checkpoint, sources, options, out_dir, device, threads, told, show)
    if document is None:  # of another process than the first
        return
    if as_json:
        print_json(document)
    else:
        terminal.wrote(Path(document["best"]["file"]))
    _end_with(document["unread"], "clips could not be read, and others took their place")


def _blocks(text: str | None) -> tuple[int, ...] | None:
    """Numbers of blocks: "3,7" -> (3, 7); "none" -> none; left out -> None."""
    if text in (None, "none"):
        return None if text is None else ()
    if not (found := _numbers(str(text))):
        raise InputError(f"--gates is {text!r}; expected numbers like 2,6,10, or none")
    return found


@app.command()
def run(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.")],
    source: Annotated[str, typer.Argument(help="Video or image file, glob, folder, camera index, or rtsp:// URL.")],
    stream: Annotated[
        bool, typer.Option("--stream", help="Slide a window over the source instead of one clip.")
    ] = False,
    hop: Annotated[
        str | None, typer.Option(help='Frames, or seconds ("0.5s"), between two predictions of --stream.')
    ] = None,
    top_k: Annotated[int, typer.Option(help="Classes to show.")] = 3,
    limit: Annotated[int | None, typer.Option(help="Stop after this many predictions of each source.")] = None,
    decide: Annotated[
        str | None,
        typer.Option(
            help="Print when labels begin and end by this rule, not every prediction: default, a .json file, or "
            "tau=1,enter=0.6,leave=0.4,min=0.5s."
        ),
    ] = None,
    skip_still: Annotated[
        bool, typer.Option("--skip-still", help="Repeat the last answer of --stream while nothing changes.")
    ] = False,
    save: Annotated[Path | None, typer.Option(help="Write an annotated mp4 (of one file).")] = None,
    on: On = None,
    threads: Threads = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Classify a video file, a folder of them, a camera or a network stream.

    Cameras and network streams always slide a window; --json prints one object a line.

    Example: edgetube run out/demo.onnx-fp32 clip.mp4 --save annotated.mp4
    """
    _within(1, MANY, top_k=top_k, limit=limit)
    window.parse(hop)
    rule = None if decide is None else DecisionRule.parse(decide)
    with _runtime(bundle, on, threads, device) as rt:
        found, note = video.search(source, rt.contract)
        if (decide is not None or skip_still) and not stream and any(isinstance(item, Path) for item in found):
            option = "--skip-still" if decide is None else "--decide"
            raise InputError(f"{option} is about answers over time; add --stream to slide a window over a file")
        if save and (len(found) != 1 or not isinstance(found[0], Path)):
            given = address.shown(address.parse(source))
            raise InputError(f"--save takes one video file; {given} is {len(found)} sources or a live one")
        if save:
            video.check_output(save, found[0])
        if note:
            terminal.warn("note", note)
        unread = {}
        for item in found:
            kept = []
            decider = None if rule is None else Decider(rule, rt.labels)
            name = str(item)
            try:
                live = stream or not isinstance(item, Path)
                try:
                    for prediction in _predictions(rt, item, live, hop, top_k, limit, skip_still):
                        if save:
                            kept.append(prediction)
                        name = prediction.source or name
                        if decider is not None:
                            _print_events(name, decider.update(prediction), as_json)
                        elif as_json:
                            print_json({"source": prediction.source, **prediction.to_json()}, indent=None)
                        else:
                            terminal.prediction(name, prediction)
                finally:  # after Ctrl-C and an error, too: a program that reads the events waits for the end of each
                    if decider is not None:
                        _print_events(name, decider.flush(), as_json)
            except InputError as error:
                if len(found) == 1:
                    raise
                unread[str(item)] = str(error)
                if as_json:
                    print_json({"source": str(item), "error": str(error)}, indent=None)
            if save:
                need("edgetube.annotate", "plot").save(save, video.frames(item), kept, video.rate(item))
                terminal.wrote(save)
    _end_with(unread, f"of {len(found)} sources could not be read")


@app.command()
def serve(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.")],
    source: Annotated[
        list[str] | None,
        typer.Argument(
            help="Cameras' indices, rtsp:// URLs, video files, folders of pictures; none: what clients send."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Name or address to listen at; all but loopback ask clients for the token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8765,
    token: Annotated[
        str | None,
        typer.Option(envvar="EDGETUBE_TOKEN", help="What clients have to know; made and printed where it is needed."),
    ] = None,
    hop: Annotated[str | None, typer.Option(help='Frames, or seconds ("0.5s"), between two predictions.')] = None,
    decide: Annotated[
        str, typer.Option(help="Rule of decisions: default, a .json file, or tau=1,enter=0.6,leave=0.4,min=0.5s.")
    ] = "default",
    skip_still: Annotated[
        bool, typer.Option("--skip-still", help="Repeat a source's last answer while nothing changes.")
    ] = False,
    top_k: Annotated[int, typer.Option(help="Classes to show.")] = 5,
    max_upload: Annotated[int, typer.Option(help="Largest file that a client may send, in MB.")] = 100,
    threads: Threads = None,
    device: Device = None,
) -> None:
    """A live page about cameras and streams, and a server for files (POST /predict) and frames (/ws/frames).

    It listens on this machine only, unless --host says otherwise. Ctrl-C ends it.

    Example: edgetube serve out/demo.onnx-fp32 0 rtsp://camera/stream
    """
    _within(1, MANY, top_k=top_k, max_upload=max_upload)
    _within(0, 65535, port=port)
    window.parse(hop)
    rule = DecisionRule.parse(decide)
    need("websockets", "serve")
    limits = need("edgetube.serve.limits", "serve").Limits(upload_bytes=max_upload * 1_000_000)
    server, service = need("edgetube.serve.server", "serve"), need("edgetube.serve.service", "serve")
    with (
        Runtime(bundle, threads=threads, device=device) as rt,
        service.Service(
            rt, source or [], rule=rule, hop=hop, top_k=top_k, skip_still=skip_still, limits=limits,
            on_event=terminal.event, on_state=terminal.state,
        ) as made,
    ):  # fmt: skip
        listening = server.Server(made, host, port, token)
        terminal.serving(listening.url, listening.is_loopback)
        listening.listen()


def _print_events(source: str, events: Sequence[Event], as_json: bool) -> None:
    for event in events:
        if as_json:
            print_json({"source": source, **event.to_json()}, indent=None)
        else:
            terminal.event(source, event)


def _end_with(unread: Mapping[str, str], what: str, *codes: int) -> None:
    """List what could not be read, and exit with 1, or the highest of `codes`; nothing if there is neither."""
    for why in unread.values():
        terminal.error(why)
    if unread:
        terminal.error(f"{len(unread)} {what}")
    if code := max((*codes, int(bool(unread)))):
        raise typer.Exit(code)


@app.command()
@_reads_checkpoints
def inspect(
    reading: Mapping[str, Any],
    source: Annotated[
        str, typer.Argument(metavar="BUNDLE_OR_CHECKPOINT", help="A bundle, or what `export --checkpoint` takes.")
    ],
    plot: Annotated[Path | None, typer.Option(help="Draw the tubes on a clip, and the learned kernels.")] = None,
    before: Annotated[
        str | None, typer.Option(help="The checkpoint before its training: --plot draws the kernels of both.")
    ] = None,
    checkpoint: Weights = None,
    as_json: Json = False,
) -> None:
    """What is in a bundle: manifest, graph statistics, how it was chosen and proven. What is in a checkpoint: format,
    geometry, input, labels, and where every tensor went.

    Example: edgetube inspect out/demo.onnx-fp32 --plot tubes.png
    """
    path = Path(source)
    if demo.is_built_in(source) or (path.exists() and not bundles.is_bundle(path)):
        if checkpoint:
            raise InputError(f"--checkpoint is for bundles; {source} is a checkpoint: leave it out")
        if before and not plot:
            raise InputError("--before is drawn beside the checkpoint; add --plot FILE.png")
        _check_plot(plot)
        _inspect_checkpoint(source, reading, as_json)
        if plot:
            _plot_checkpoint(source, reading, plot, before)
    else:
        if before:
            raise InputError(f"--before compares checkpoints; {source} is a bundle: leave it out")
        if reading:
            option = next(iter(reading)).replace("_", "-")
            raise InputError(f"--{option} says something about a checkpoint; {source} is a bundle: leave it out")
        _check_plot(plot)
        _inspect_bundle(path, plot, checkpoint, as_json)


def _check_plot(plot: Path | None) -> None:
    """Refuse, before any work, a path that no picture can be written to."""
    if plot:
        need("edgetube.plot", "plot").check_file(plot)


def _inspect_bundle(path: Path, plot: Path | None, checkpoint: Path | None, as_json: bool) -> None:
    found = bundles.load(path)
    if plot:
        kernels = _kernels(found, checkpoint)
        need("edgetube.plot", "plot").tubes(plot, found.spec, found.golden()[0][0], kernels, found.name)
        terminal.wrote(plot)
    if as_json:
        print_json(found.to_json())
    else:
        terminal.bundle(found)


def _plot_checkpoint(source: str, reading: Mapping[str, Any], plot: Path, before: str | None) -> None:
    formats, drawing = need("edgetube.formats", "export"), need("edgetube.plot", "plot")
    found = formats.load(source, _read_options(reading))
    if before is None:
        clip = demo.golden(found.contract).frames
        drawing.tubes(plot, found.spec, clip, _kernels_of(found.model), found.name)
    else:
        start = formats.load(before, _read_options(reading))
        if start.spec.tubes != found.spec.tubes or start.spec.width != found.spec.width:
            raise InputError(
                f"{before} has other tubes than {source}; give the checkpoint that its training began with"
            )
        kernels = _kernels_of(start.model), _kernels_of(found.model)
        drawing.training(plot, found.spec, *kernels, f"{found.name}: before and after training")
    terminal.wrote(plot)


def _kernels_of(model: Any) -> dict[int, Any]:
    return {i: model.tubes.weight(i).detach().numpy() for i in model.spec.active}


def _inspect_checkpoint(source: str, reading: Mapping[str, Any], as_json: bool) -> None:
    formats, report = (need(f"edgetube.formats{part}", "export") for part in ("", ".reading.report"))
    document = formats.examine(source, _read_options(reading))
    if as_json:
        print_json(document)
    else:
        terminal.checkpoint(document, report.folded(document["keys"]))
    if document["error"] is not None:
        raise CheckpointError(document["error"])


@app.command()
def doctor(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.")],
    device: Device = None,
    key: Annotated[
        Path | None, typer.Option(help="Public key of minisign: also check that its owner signed the bundle.")
    ] = None,
    on: On = None,
    as_json: Json = False,
) -> None:
    """Verify a bundle on this machine: files, versions, and the golden clip's answer. Exit 1 when a check fails.

    Example: edgetube doctor out/demo.onnx-fp32
    """
    if on is None:
        checks = health.examine(bundle, device, key)
    else:
        with progress() as show:
            checks = commands.doctor(on, bundle, device, key, show)
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        terminal.checks(checks)
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


@deploy.command(name="triton")
def deploy_triton(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.")],
    out_dir: Annotated[Path, typer.Option("--out", help="The model repository; other models in it stay.")],
    name: Annotated[str | None, typer.Option(help="The model's name; the bundle's by default.")] = None,
    run_by: Annotated[
        str | None,
        typer.Option(help="triton: its own backend for the artifact; edgetube: in its Python backend. Else what can."),
    ] = None,
    as_json: Json = False,
) -> None:
    """A model repository of NVIDIA's Triton Inference Server.

    Example: edgetube deploy triton out/demo.onnx-int8 --out models
    """
    found = bundles.load(bundle)
    written = triton.repository(found, out_dir, name=name, run_by=run_by)
    if as_json:
        print_json({"model": str(out_dir / written.name), "backend": written.backend, "run_by": written.run_by})
        return
    terminal.wrote(out_dir / written.name)
    terminal.say(f"Triton runs it in its backend {written.backend}")
    terminal.then(f"tritonserver --model-repository={shlex.quote(str(out_dir))}")


@deploy.command(name="deepstream")
def deploy_deepstream(
    bundle: Annotated[Path, typer.Argument(help="The folder of a bundle of a trt-* target.")],
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the configuration.")],
    size: Annotated[str, typer.Option(help="Height and width of the frames of nvstreammux.")] = "1080x1920",
    fps: Annotated[float, typer.Option(help="Frames per second of a stream.")] = 30.0,
    hop: Annotated[
        int | None, typer.Option(help="Frames, of those that the model samples, between predictions; a quarter clip.")
    ] = None,
    as_json: Json = False,
) -> None:
    """The configuration of a DeepStream pipeline, and a graph that takes its clips.

    Example: edgetube deploy deepstream out/demo.trt-fp16 --size 1080x1920 --fps 30 --out deepstream
    """
    height, width = _size(size) or (0, 0)
    source = deepstream.Source(height, width, preprocess.frame_rate(fps, "--fps"))
    notes = deepstream.folder(bundles.load(bundle), out_dir, source, hop)
    if as_json:
        print_json({"folder": str(out_dir), "notes": notes})
        return
    for note in notes:
        terminal.warn("note", note)
    terminal.wrote(out_dir)


@app.command()
def sign(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.")],
    key: Annotated[Path, typer.Option(help="Secret key of minisign; its password is asked for.")],
) -> None:
    """Sign a bundle, so that `edgetube doctor --key` can tell who made it. Needs the extra `sign`.

    Example: edgetube sign out/demo.onnx-fp32 --key minisign.key
    """
    asked = partial(typer.prompt, f"Password of {key}", hide_input=True, err=True)
    terminal.wrote(signing.sign(bundle, key, asked))


@app.command()
def parity(
    bundle: Annotated[list[Path], typer.Argument(help="Bundles of one checkpoint.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of clips, one sub-folder a class, .csv manifest, .npy or .npz; else built-in clips."),
    ] = None,
    clips: Annotated[int, typer.Option(help="How many of the built-in clips.")] = 504,
    views: Annotated[
        str | None, typer.Option(help="Temporal x spatial views of each clip, like 5x3; their softmax is averaged.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="A bundle to compare with; the PyTorch model if left out.")
    ] = None,
    checkpoint: Weights = None,
    min_agreement: Annotated[float, typer.Option(help="Gate: share of clips with the same answer.")] = 0.99,
    min_cosine: Annotated[
        float | None,
        typer.Option(help="Gate: cosine of the logits on the worst clip; if left out 0.98, or with fewer tokens none."),
    ] = None,
    max_drop: Annotated[float | None, typer.Option(help="Gate: points of top-1 lost.")] = None,
    max_class_drop: Annotated[float | None, typer.Option(help="Gate: points of top-1 lost by a class.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="Gate: mean KL divergence, nats.")] = None,
    max_error: Annotated[float | None, typer.Option(help="Gate: largest logit error / largest logit.")] = None,
    max_sure_flips: Annotated[
        float | None, typer.Option(help="Gate: share of other answers where the reference was sure.")
    ] = None,
    min_sqnr: Annotated[
        float | None, typer.Option(help="Gate: SQNR of the logits, dB; what the bundle's precision allows if left out.")
    ] = None,
    min_order_agreement: Annotated[
        float, typer.Option(help="Gate: similarity of the logits' changes on reversed and shuffled clips, up to 1.")
    ] = 0.99,
    max_layer_jump: Annotated[
        float, typer.Option(help="Gate: dB by which the error of a block may exceed that of all before it.")
    ] = 8.0,
    max_regret: Annotated[
        float | None,
        typer.Option(help="Gate: how much worse the tokens are that leave than the reference's choice; by precision."),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Also compare layer by layer.")] = False,
    layer_clips: Annotated[int, typer.Option(help="Clips for --layers.")] = 4,
    watch: Annotated[
        Path | None, typer.Option("--video", help="Slide a window over this video instead of reading clips.")
    ] = None,
    hop: Annotated[int | None, typer.Option(help="Frames between two windows of --video.")] = None,
    decide: Annotated[
        str | None,
        typer.Option(
            help="Also compare spans made with this rule from --video: default, a .json file, or "
            "tau=1,enter=0.6,leave=0.4,min=0.5s."
        ),
    ] = None,
    skip_still: Annotated[
        bool, typer.Option("--skip-still", help="Also measure what skipping still clips of --video saves and costs.")
    ] = False,
    still_threshold: Annotated[
        float | None, typer.Option(help="Grey levels that count as a change for --skip-still.")
    ] = None,
    decoder: Annotated[
        str | None, typer.Option(help="Also compare decoders of --video with the first of them: cpu,nvdec,vaapi.")
    ] = None,
    worst: Annotated[int, typer.Option(help="How many of the worst clips are named in --json.")] = 8,
    resume: Annotated[Path | None, typer.Option(help="Cache logits in this file, and resume from it.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that share the clips.")] = 1,
    ray: Annotated[str | None, typer.Option(help="Use the Ray cluster at this address (auto: this machine's).")] = None,
    on: On = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Compare bundles with the PyTorch reference, clip by clip. Exit 1 when a gate fails.

    Example: edgetube parity out/demo.onnx-fp32 out/demo.onnx-int8 --layers
    """
    _within(1, MANY, clips=clips, layer_clips=layer_clips, hop=hop)
    _within(0, MANY, worst=worst)
    _within(1, 1024, workers=workers)
    _finite(
        min_agreement=min_agreement, min_cosine=min_cosine, max_drop=max_drop, max_class_drop=max_class_drop,
        max_kl=max_kl, max_error=max_error, max_sure_flips=max_sure_flips, min_sqnr=min_sqnr,
        min_order_agreement=min_order_agreement, max_regret=max_regret,
    )  # fmt: skip
    asked_views = SINGLE if views is None else Views.parse(views)
    rule = None if decide is None else DecisionRule.parse(decide)
    if watch is None and (decide is not None or skip_still):
        raise InputError("--decide and --skip-still are about answers over time; add --video FILE")
    if still_threshold is not None and not skip_still:
        raise InputError("--still-threshold is the threshold of --skip-still; add it")
    if watch is None and decoder is not None:
        raise InputError("--decoder compares decoders of one video; add --video FILE")
    decoders = need("edgetube.bench.decoders", "export")
    asked_decoders = None if decoder is None else decoders.parse(decoder)
    harness = need("edgetube.bench.parity", "export")
    found = _located([bundles.load(path) for path in bundle], checkpoint)
    held_against = bundles.load(reference) if reference else None
    gates = harness.Gates(
        min_agreement, harness.COSINE if min_cosine is None else min_cosine, max_drop, max_class_drop, max_kl,
        max_error, max_sure_flips, harness.SQNR if min_sqnr is None else min_sqnr, min_order_agreement, max_layer_jump,
        harness.REGRET if max_regret is None else max_regret,
    )  # fmt: skip
    if on is not None and (workers > 1 or ray or decoder is not None):
        raise InputError("--on has one process on the device; leave out --workers, --ray and --decoder")
    with progress() as show, _artifacts(on, found, show) as (artifact, device):
        if watch:
            if data or views is not None or resume or ray or workers > 1:
                raise InputError(
                    "--video is watched in order by one process; leave out --data, --views, --resume, --workers and "
                    "--ray"
                )
            gates.check_data(datasets.ClipSet(str(watch), ()))
            temporal = need("edgetube.bench.temporal", "export")
            seen = temporal.watch(
                found, watch, hop, reference=held_against, threads=threads, worst=worst, rule=rule,
                skip_still=skip_still if still_threshold is None else still_threshold, artifact=artifact, progress=show,
            )  # fmt: skip
            source, comparison, video_report = seen.windows, seen.comparison, {**seen.to_json(), "decoders": None}
            if asked_decoders is not None:
                costs = decoders.compare(found, watch, asked_decoders, hop, threads)
                video_report["decoders"] = decoders.to_json(asked_decoders, costs)
        else:
            source, video_report = _clips(data, clips, found[0]), None
            gates.check_data(source)
            with ExitStack() as stack:
                comparison = harness.measure(
                    found, source, reference=held_against, threads=threads, run=_runner(workers, ray),
                    answer_cache=stack.enter_context(harness.AnswerCache(resume)) if resume else None,
                    views=asked_views, worst=worst, artifact=artifact, progress=show,
                )  # fmt: skip
        curves = []
        if layers:
            looking = need("edgetube.bench.layers", "export")
            clips_shown = source.sample(layer_clips)
            curves = looking.curves(found, clips_shown, reference=held_against, artifact=artifact, progress=show)
        verdicts = gates.judge(comparison)
        document = comparison.to_json(verdicts, [curve.to_json() for curve in curves], video_report)
        document["device"] = device
    _note_threads(found, threads)
    if as_json:
        print_json(machine.dated(document))
    else:
        terminal.parity(document)
    if failed := [str(verdict) for verdict in verdicts if not verdict.passed]:
        raise ParityError("; ".join(failed))


@app.command()
def agree(
    bundle: Annotated[list[Path], typer.Argument(help="Bundles of one model, for different runtimes.")],
    clip: Annotated[
        str, typer.Argument(help="A video, image, .npy or .npz file, demo, or a built-in clip that parity names.")
    ],
    start: Annotated[float | None, typer.Option(help="Second of a video at which the clip begins.")] = None,
    checkpoint: Weights = None,
    max_difference: Annotated[
        float | None, typer.Option(help="Gate: largest difference of the logits of two runtimes / largest logit.")
    ] = None,
    layers: Annotated[bool, typer.Option("--layers/--no-layers", help="Find the layer where two depart.")] = True,
    on: On = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """One clip through every runtime: how far each two answers are apart, and the layer where they depart.

    PyTorch takes part where it is installed and finds the checkpoint. Exit 1 when the gate fails.

    Example: edgetube agree out/demo.onnx-fp32 out/demo.openvino-int8 out/demo.trt-fp16 clip.mp4
    """
    _finite(start=start, max_difference=max_difference)
    comparing = need("edgetube.bench.agree", "export")
    found = [bundles.load(path) for path in bundle]
    shown = datasets.single(clip, found[0].labels, start).read(found[0].contract)
    with progress() as show, _artifacts(on, found, show) as (artifact, device):
        agreement = comparing.measure(
            _located(found, checkpoint), shown, reference=None if checkpoint is None else True, by_layer=layers,
            threads=threads, artifact=artifact, progress=show,
        )  # fmt: skip
        verdicts = agreement.verdicts(max_difference)
        document = agreement.to_json(verdicts)
        document["device"] = device
    _note_threads(found, threads)
    if as_json:
        print_json(document)
    else:
        terminal.agree(document)
    if failed := [str(verdict) for verdict in verdicts if not verdict.passed]:
        raise ParityError("; ".join(failed))


@app.command()
def bench(
    bundle: Annotated[list[Path], typer.Argument(help="Bundles; timed in turns, each in its own process.")],
    threads: Annotated[
        str | None, typer.Option(help="CPU threads, a row for each: 1,2,4; the runtime chooses when left out.")
    ] = None,
    device: Device = None,
    seconds: Annotated[float, typer.Option(help="Seconds of timed calls per row.")] = 5.0,
    starts: Annotated[int, typer.Option(help="Cold starts of each row.")] = 3,
    camera_fps: Annotated[
        float | None, typer.Option(help="Also run each bundle behind a camera at this frame rate.")
    ] = None,
    camera_size: Annotated[str, typer.Option(help="Height and width of the camera's frames.")] = "480x640",
    camera_seconds: Annotated[float, typer.Option(help="How long the camera runs.")] = 10.0,
    cameras: Annotated[int, typer.Option(help="How many such cameras share each bundle.")] = 1,
    hop: Annotated[int | None, typer.Option(help="Frames between two predictions behind the camera.")] = None,
    reference: Annotated[
        bool, typer.Option("--reference", help="Also time the PyTorch model that the bundles were made from.")
    ] = False,
    start_below: Annotated[
        float | None, typer.Option(help="Degrees Celsius that the machine has to cool to before it starts.")
    ] = None,
    on: Annotated[
        list[str] | None,
        typer.Option(
            "--on",
            help="Another machine that times them: ssh://user@host[:port], adb://SERIAL or a devices.toml; repeatable.",
        ),
    ] = None,
    checkpoint: Weights = None,
    as_json: Json = False,
) -> None:
    """Time bundles: latency, throughput, cold start, memory, and how far from the machine's limit they are.

    Example: edgetube bench out/demo.onnx-fp32 out/demo.onnx-int8 --threads 1,2 --camera-fps 30
    """
    options = latency.Options(
        _counts_of(threads), device, seconds, starts=starts, camera_fps=camera_fps,
        camera_size=_size(camera_size) or (480, 640), hop=hop, camera_seconds=camera_seconds, cameras=cameras,
        reference=reference, start_below=start_below,
    )  # fmt: skip
    found = _located([bundles.load(path) for path in bundle], checkpoint)
    with progress() as show:
        document = commands.bench(on, found, options, show) if on else latency.measure(found, options, show)
    if as_json:
        print_json(machine.dated(document))
    elif "devices" in document:
        terminal.fleet(document, commands.notes(document))
    else:
        terminal.bench(document, latency.notes(document))
    _end_with(commands.failed(document), "devices failed")


@app.command()
@_reads_checkpoints
def sweep(
    reading: Mapping[str, Any],
    target: Annotated[list[str], typer.Option(help="A name of `edgetube targets`, or all; may be repeated.")],
    checkpoint: Annotated[
        str, typer.Option(help="A folder or file of weights (docs/checkpoints.md), demo, or random:tubevit-b.")
    ] = "demo",
    keep_tokens: Annotated[
        list[str] | None,
        typer.Option(help="Numbers of tokens besides all, as export takes them: '82;50;0.25'; may be repeated."),
    ] = None,
    reduce: Annotated[list[str] | None, typer.Option(help="merge (default), drop; may be repeated.")] = None,
    tubes: Annotated[
        list[str] | None,
        typer.Option(help="Tubes besides all, as export takes them: '0,2,3;1,3'; may be repeated."),
    ] = None,
    frames: Annotated[list[int] | None, typer.Option(help="Frames of the clip; may be repeated.")] = None,
    size: Annotated[list[str] | None, typer.Option(help="224, or 224x320; may be repeated.")] = None,
    views: Annotated[
        list[str] | None,
        typer.Option(help="Temporal x spatial views of each clip, like 2x3, which multiply its cost; may be repeated."),
    ] = None,
    budget_ms: Annotated[
        float | None, typer.Option(help="Rule: the most accurate point whose median call takes at most so long.")
    ] = None,
    min_top1: Annotated[
        float | None, typer.Option(help="Rule: the fastest point with at least this share of clips right.")
    ] = None,
    min_agreement: Annotated[
        float | None, typer.Option(help="The same for clips without labels: agreement with the trained model.")
    ] = None,
    pareto: Annotated[bool, typer.Option("--pareto", help="Rule: all points that no other beats.")] = False,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of clips, one sub-folder a class, .csv manifest, .npy or .npz; else built-in clips."),
    ] = None,
    clips: Annotated[
        int | None, typer.Option(help="How many of the built-in clips (504 if left out), or of --data (all).")
    ] = None,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder of the result and its bundle.")] = Path("out"),
    resume: Annotated[
        Path | None, typer.Option(help="Cache logits in this file, and resume from it; one in --out if left out.")
    ] = None,
    head: Annotated[str | None, typer.Option(help="Name of the classifier, when there are several.")] = None,
    lowering: Annotated[
        str | None, typer.Option(help="gather, slice or conv2d; the fastest on this machine if left out.")
    ] = None,
    calib: Annotated[Path | None, typer.Option(help="Clips for INT8, see export.")] = None,
    max_drop: Annotated[float | None, typer.Option(help="Points of accuracy that INT8 may lose, see export.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE, a setting of the target; may be repeated.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Seconds of timed calls per point.")] = 2.0,
    workers: Annotated[int, typer.Option(help="Processes that share the clips.")] = 1,
    ray: Annotated[str | None, typer.Option(help="Use the Ray cluster at this address (auto: this machine's).")] = None,
    on: Annotated[
        list[str] | None,
        typer.Option(
            "--on", help="Another machine that times the points and answers: ssh://user@host[:port], adb://SERIAL."
        ),
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Find the operating point: target, clip and number of tokens, by accuracy and latency on a machine.

    Points that are certainly worse leave early. Exit 1 when no point keeps the rule.

    Example: edgetube sweep --target onnx-fp32 --target onnx-int8 --keep-tokens "82;50" --min-top1 0.97
    """
    _within(1, MANY, clips=clips)
    _within(1, 1024, workers=workers)
    _finite(min_top1=min_top1, min_agreement=min_agreement, budget_ms=budget_ms)
    if sum((budget_ms is not None, min_top1 is not None, min_agreement is not None, pareto)) != 1:
        raise InputError("a sweep has one rule; give one of --budget-ms, --min-top1, --min-agreement and --pareto")
    device = _swept_device(on or [], workers, ray)
    kinds = reduce or ["merge"]
    _check_kinds(kinds)
    if out_dir.exists() and not out_dir.is_dir():
        raise InputError(f"--out is {out_dir}, which is a file; expected a folder")
    names = _chosen(target)
    backends = [export.target(name).backend for name in names]
    searching, points = need("edgetube.bench.sweep", "export"), need("edgetube.export.points", "export")
    rule = searching.Rule(budget_ms, min_top1 if min_agreement is None else min_agreement)
    options = points.Options(
        head=head, lowering=lowering, calib=calib, max_drop=max_drop, settings=_settings(settings or [])
    )
    measuring, runner = searching.Options(threads, seconds), _runner(workers, ray)
    kept, chosen = ([part for text in given or [] for part in text.split(";")] for given in (keep_tokens, tubes))
    sizes = [found for text in size or [] if (found := _size(text))]
    shown = [Views.parse(text) for text in views or []] or [SINGLE]
    with progress() as show:
        loaded = need("edgetube.formats", "export").load(checkpoint, _read_options(reading))
        loaded = loaded.select(head) if head else loaded
        grid = searching.grid(loaded.spec, names, frames or (), sizes, kept, kinds, shown, chosen)
        source = _swept_clips(data, clips, loaded)
        if (rule.min_accuracy is not None) and searching.is_labelled(source) != (min_top1 is not None):
            has, take = ("no labels", "min-agreement") if min_top1 is not None else ("labels", "min-top1")
            raise InputError(f"the clips of {source.name} have {has}; give --{take} instead")
        reach = searching.here if device is None else commands.reach(device, backends, show)
        found = points.sweep(loaded, grid, source, rule, out_dir, options, measuring, resume, show, runner, reach)
        notes = [*found.notes]
        if device is not None:
            notes += need("edgetube.remote.proof", "export").prove_chosen(reach, found.kept, show)
    if as_json:
        print_json(found.document)
    else:
        terminal.sweep(found.document)
    for note in notes:
        terminal.warn("note", note)
    for path in (*(b.path for b in found.kept), *found.files):
        terminal.wrote(path)
    if not found.kept:
        raise ParityError(found.document["result"])


@app.command(name="report")
def report_command(
    folder: Annotated[
        Path | None, typer.Argument(help="The folder of the bundles, as export --out wrote it.", show_default=False)
    ] = None,
    page: Annotated[Path | None, typer.Option("--out", help="The page; report.html in the folder if left out.")] = None,
    collect: Annotated[
        list[Path] | None,
        typer.Option(
            help="Instead of measuring: a folder, at any depth, or a file of what bench, parity and report printed "
            "with --json on any machines; may be repeated. The page is leaderboard.html."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of clips, one sub-folder a class, .csv manifest, .npy or .npz; else built-in clips."),
    ] = None,
    clips: Annotated[int, typer.Option(help="How many of the built-in clips.")] = 126,
    checkpoint: Weights = None,
    min_agreement: Annotated[float, typer.Option(help="Gate: share of clips with the same answer.")] = 0.98,
    seconds: Annotated[float, typer.Option(help="Seconds of timed calls per bundle.")] = 3.0,
    camera_fps: Annotated[
        float | None, typer.Option(help="Also run each bundle behind a camera at this frame rate.")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the table for a README or a review.")] = False,
) -> None:
    """One page about all bundles of a folder: right, fast, and at what cost. Exit 1 when a gate fails.

    What is measured is kept beside the bundles, and measured again when anything that it depends on has changed.

    Example: edgetube report out --out report.html
    """
    if (folder is None) == (collect is None):
        raise InputError("give the folder of the bundles, or --collect FOLDER with what was measured before")
    _within(1, MANY, clips=clips)
    _finite(min_agreement=min_agreement)
    if page is not None and (page.is_dir() or not page.absolute().parent.is_dir()):
        raise InputError(f"cannot write {page}: expected a file in a folder that exists")
    if folder is None:
        _leaderboard(collect or [], page or Path("leaderboard.html"), as_json, as_markdown)
        return
    reports, harness = need("edgetube.bench.report", "report"), need("edgetube.bench.parity", "export")
    found = _located(reports.find(folder), checkpoint)
    source = _clips(data, clips, found[0])
    options = latency.Options((threads,), seconds=seconds, camera_fps=camera_fps, reference=True)
    command = shlex.join(["edgetube", *sys.argv[1:]])
    with progress() as show:
        made = reports.make(folder, found, source, harness.Gates(min_agreement=min_agreement), options, command, show)
    where = reports.save(reports.html(made), page or folder / "report.html")
    if as_json:
        print_json(made.to_json())
    elif as_markdown:
        print(reports.markdown(made), end="")  # noqa: T201
    else:
        terminal.report(reports.COLUMNS, [reports.cells(row) for row in made.rows], reports.headline(made))
    terminal.wrote(where)
    if failed := [str(harness.Verdict(**gate)) for row in made.rows for gate in row["failed"]]:
        raise ParityError("; ".join(failed))


def _leaderboard(places: Sequence[Path], page: Path, as_json: bool, as_markdown: bool) -> None:
    boards, reports = need("edgetube.bench.leaderboard", "report"), need("edgetube.bench.report", "report")
    board = boards.collect(places)
    where = reports.save(boards.html(board), page)
    if as_json:
        print_json(board.to_json())
    elif as_markdown:
        print(boards.markdown(board), end="")  # noqa: T201
    else:
        terminal.report(boards.COLUMNS, [boards.cells(row) for row in board.rows], boards.headline(board))
    for file, why in board.skipped:
        terminal.warn("note", f"{file} is left out: {why}")
    terminal.wrote(where)


def _runtime(bundle: Path, on: str | None, threads: int | None, device: str | None) -> Runtime | RemoteRuntime:
    """The bundle, opened here or on another machine."""
    if on is None:
        return Runtime(bundle, threads=threads, device=device)
    with progress() as show:
        return RemoteRuntime(bundle, on, threads, device, show)


def _predictions(
    rt: Runtime | RemoteRuntime,
    source: video.Source,
    live: bool,
    hop: str | None,
    top_k: int,
    limit: int | None,
    skip_still: bool,
) -> Iterator[Prediction]:
    if live:
        with rt.stream(source, hop=hop, top_k=top_k, skip_still=skip_still) as found:
            yield from islice(found, limit)
    else:
        assert isinstance(source, Path)
        yield rt.predict(source, top_k=top_k)


@contextmanager
def _artifacts(on: str | None, found: Sequence[Bundle], show: Progress) -> Iterator[tuple[Any, dict[str, Any] | None]]:
    """What makes the models of a comparison, of bundles that run here or on another machine, and `device` of it."""
    if on is None:
        yield need("edgetube.bench.model_set", "export").Artifact, None
        return
    with commands.device_of(on, found, show) as device:
        place = commands.Place(device)
        yield place.artifact, place.about()


def _note_threads(found: Sequence[Bundle], threads: int | None) -> None:
    """Name the bundles that --threads does not reach."""
    for note in need("edgetube.bench.model_set", "export").own_threads(found, threads):
        terminal.warn("note", note)


def _swept_device(given: Sequence[str], workers: int, ray: str | None) -> str | None:
    """The address of the device of a sweep; None for this machine."""
    found = commands.addresses(given)
    if len(found) > 1:
        raise InputError(
            f"--on names {len(found)} devices; a sweep finds the point of one: run it for each, with its own --out"
        )
    if found and (workers > 1 or ray):
        raise InputError("--on has one process on the device; leave out --workers and --ray")
    for one in found:
        transport.parse(one)
    return next(iter(found), None)


def _swept_clips(data: Path | None, count: int | None, asked: Any) -> datasets.ClipSet:
    """The clips of a sweep: at most `count` of them."""
    found = _clips(data, count or 504, asked)
    return found if count is None else found.sample(count)


def _clips(data: Path | None, count: int, asked: Any) -> datasets.ClipSet:
    """The clips of --data, or the first of the built-in ones, for a bundle or checkpoint."""
    if data is None:
        return datasets.built_in(count, asked.labels)
    found = datasets.load(data, asked.contract)
    for note in found.notes:
        terminal.warn("note", note)
    return found


def _within(least: int, most: int, **options: int | None) -> None:
    """Refuse an option whose number is smaller or larger."""
    for name, value in options.items():
        if value is not None and not least <= value <= most:
            raise InputError(f"--{name.replace('_', '-')} is {value}; expected {least} to {most}")


def _finite(**options: float | None) -> None:
    """Refuse an option that is NaN or infinite."""
    for name, value in options.items():
        if value is not None and not math.isfinite(value):
            raise InputError(f"--{name.replace('_', '-')} is {value}; expected a number")


def _runner(workers: int, ray: str | None) -> Any:
    """Where the jobs of a comparison run."""
    places = need("edgetube.bench.workers", "export")
    if ray:
        if workers > 1:
            raise InputError("--workers counts processes of this machine, --ray asks a cluster; give one of the two")
        return partial(places.on_cluster, address=ray)
    return places.here if workers == 1 else partial(places.in_processes, workers=workers)


def _read_options(reading: Mapping[str, Any]) -> Any:
    """What the user says about a checkpoint, as `edgetube.formats` takes it."""
    return need("edgetube.formats.reading.files", "export").ReadOptions(**reading)


def _located(found: list[Bundle], checkpoint: Path | None) -> list[Bundle]:
    """Bundles whose checkpoint is looked for in a file or folder, if one is given."""
    if checkpoint is None:
        return found
    locate = need("edgetube.formats", "export").locate
    return [locate(one, checkpoint) for one in found]


def _kernels(b: Bundle, checkpoint: Path | None) -> dict[int, Any] | None:
    """The learned kernels of a bundle's tubes, when its checkpoint can be read here."""
    try:
        (b,) = _located([b], checkpoint)
        model = need("edgetube.formats", "export").of_bundle(b).model
    except EdgetubeError as error:
        terminal.warn("note", f"without kernels: {error}")
        return None
    return _kernels_of(model)


def _chosen(names: list[str], fewer_tokens: bool = False) -> list[str]:
    """The targets that were asked for; `all` is every one that can be built here and does not need a simulator.

    With fewer tokens, `all` is without those that cannot have them.
    """
    if "all" not in names:
        return list(dict.fromkeys(names))
    found = [t for t in export.targets().values() if not t.missing(t.build_needs)]
    slow = [t.name for t in found if t.name not in names and runtimes.simulated(t.backend)]
    if slow:
        terminal.warn("note", f"without {', '.join(slow)}: the device is simulated here, slowly; name them for that")
    whole = [t.name for t in found if fewer_tokens and t.name not in (*names, *slow) and t.all_tokens]
    if whole:
        terminal.warn("note", f"without {', '.join(whole)}: these cannot have fewer tokens")
    return [t.name for t in found if t.name not in (*slow, *whole)]


def _check_kinds(kinds: Iterable[str]) -> None:
    for kind in kinds:
        if kind not in get_args(Kind):
            raise InputError(f"--reduce is {kind!r}; expected {' or '.join(get_args(Kind))}")


def _settings(texts: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    if bad := [name for name, equals, _ in pairs if not (name and equals)]:
        raise InputError(f"--set is {bad[0]!r}; expected NAME=VALUE")
    found = {name: value for name, _, value in pairs}
    if len(found) < len(pairs):
        raise InputError(f"--set names a setting twice: {', '.join(texts)}")
    return found


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = [int(part) for part in text.lower().split("x")] if re.fullmatch(r"\d{1,6}([xX]\d{1,6})?", text) else []
    if not found:
        raise InputError(f"--size is {text!r}; expected 224 or 224x320 (height x width)")
    return found[0], found[-1]


def _counts_of(text: str | None) -> tuple[int | None, ...]:
    """Thread counts: "1,2" -> (1, 2); left out -> the runtime's own choice."""
    if text is None:
        return (None,)
    if not (found := _numbers(text)):
        raise InputError(f"--threads is {text!r}; expected numbers like 1,2,4")
    return found


def _numbers(text: str) -> tuple[int, ...]:
    """Numbers with commas between, each once: "1, 2,1" -> (1, 2); none where the text is something else."""
    if not re.fullmatch(r"\s*\d{1,6}\s*(,\s*\d{1,6}\s*)*", text):
        return ()
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
        "licence": b.checkpoint.get("licence", ""),
        "notes": b.build.get("notes", []),
        "error": None,
    }


def _refused_row(target: str, error: EdgetubeError) -> dict[str, Any]:
    """The same for a target of several whose export ended with an error."""
    nothing = ("bytes", "lowering", "clips", "agreement", "max_abs_error")
    row = {"bundle": None, "target": target, "status": "refused", **dict.fromkeys(nothing)}
    return {**row, "licence": "", "notes": [], "error": str(error)}
