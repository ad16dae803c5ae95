"""The export pipeline: from a checkpoint to a verified bundle.

checkpoint -> static rewrite -> canonical ONNX -> the target's own artifact -> proof against the reference -> bundle.
A bundle is built in a hidden folder beside its destination and published only when the proof holds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import Self

from edgetube import bundle as bundles
from edgetube import calibration, demo, export, formats, runtimes
from edgetube import targets as targeting
from edgetube.bench import machine, parity, probe
from edgetube.bench.latency import interleave
from edgetube.bench.probe import Probe
from edgetube.bundle import Bundle
from edgetube.calibration import Calibrated, search
from edgetube.calibration.clips import Clips, collect
from edgetube.calibration.numeric import Moments
from edgetube.calibration.table import ActivationScheme, CalibrationTable, IntegerFormat, Range, ScaleType
from edgetube.errors import InputError, MissingPackageError, ParityError
from edgetube.export import arithmetic, canonical, int8, proof, quantize, static
from edgetube.export.base import BuildContext, Built
from edgetube.export.canonical import Graph
from edgetube.formats.reading.files import ReadOptions
from edgetube.model.checkpoints import Checkpoint
from edgetube.progress import Progress, silent
from edgetube.runtimes.base import Backend
from edgetube.runtimes.torch import Reference
from edgetube.targets import Arithmetic, Target
from edgetube.video import Frames

MOMENT_CLIPS = 8
"""Rendered clips for the input moments of linears, for targets without calibration."""


@dataclass(frozen=True)
class Options:
    """User options of an export, besides checkpoint and target.

    Attributes:
        frames, size: of the clip, (height, width); the checkpoint's own by default.
        image: export the image model (the 2-D tube alone) instead of the video model.
        batch: clips per call, static in the artifact.
        head: name of the classifier; the first one by default.
        lowering: force one of `static.LOWERINGS` instead of timing them.
        calib: calibration clips of INT8 targets, see `edgetube.datasets.load`; the built-in ones by default.
        max_drop: points of top-1 accuracy that INT8 may lose (of agreement, where clips have no labels).
        settings: of the target, by name; `edgetube targets --json` lists them.
    """

    frames: int | None = None
    size: tuple[int, int] | None = None
    image: bool = False
    batch: int = 1
    head: str | None = None
    lowering: str | None = None
    calib: Path | None = None
    max_drop: float | None = None
    settings: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.image and self.frames not in (None, 1):
            raise InputError(f"an image model takes 1 frame; given {self.frames}: leave out one of the two options")
        if self.batch < 1:
            raise InputError(f"batch is {self.batch}; expected >= 1")
        if self.lowering not in (None, *static.LOWERINGS):
            raise InputError(f"no lowering is called {self.lowering!r}; there are {', '.join(static.LOWERINGS)}")
        if self.max_drop is not None and not 0 <= self.max_drop <= 100:
            raise InputError(f"max-drop is {self.max_drop}; expected percentage points, 0 to 100")


def export_model(
    target: str = "onnx-fp32",
    checkpoint: str | Path | Checkpoint = "demo",
    out: str | Path = "out",
    options: Options | None = None,
    progress: Progress = silent,
    read: ReadOptions | None = None,
) -> Bundle:
    """Export one checkpoint to one target; the bundle is `out/<checkpoint>.<target>`.

    Args:
        target: a name that `edgetube targets` lists.
        checkpoint: `demo`, `random:NAME`, a file or folder of any format of `edgetube.formats`, or a `Checkpoint`.
        out: folder of the bundles.
        read: what the files of the checkpoint do not say.

    Returns:
        The published bundle.

    Raises:
        InputError: unknown target or impossible options.
        SpecError: the model is not defined for this clip shape.
        CheckpointError: the weights do not match the model.
        MissingPackageError: the target cannot be built here.
        ParityError: the artifact differs from the reference; nothing is published.
    """
    return next(export_models([target], checkpoint, out, options, progress, read))


def export_models(
    targets: Sequence[str],
    checkpoint: str | Path | Checkpoint = "demo",
    out: str | Path = "out",
    options: Options | None = None,
    progress: Progress = silent,
    read: ReadOptions | None = None,
) -> Iterator[Bundle]:
    """Export one checkpoint to several targets, with common graphs and calibrations; see `export_model`."""
    options = options or Options()
    chosen = targeting.choose([export.target(name) for name in targets], options.settings)
    for target in chosen:
        if missing := target.missing(target.build_needs):
            hint = f"; install with: {target.remedy}" if target.remedy else ", which is not here"
            raise MissingPackageError(f"{target.name} needs {', '.join(missing)}{hint}")
    progress("load checkpoint", 0, 1)
    loaded = checkpoint if isinstance(checkpoint, Checkpoint) else formats.load(checkpoint, read)
    if options.head:
        loaded = loaded.select(options.head)
    loaded = loaded.with_clip(1 if options.image else options.frames, options.size)
    progress("load checkpoint", 1, 1)
    if any(target.precision.quantises_activations for target in chosen):
        int8.sources(loaded, options.calib)
    with ExportSession(loaded, options, progress) as session:
        for target in chosen:
            yield session.export(target, Path(out))


class ExportSession:
    """Exports one checkpoint to any number of targets; graphs, calibrations and reference answers are computed once."""

    def __init__(self, checkpoint: Checkpoint, options: Options, progress: Progress) -> None:
        self.checkpoint = checkpoint
        self.options = options
        self.progress = progress
        self.clips = proof.clips(checkpoint, proof.PROOF_CLIPS)
        self.model = Reference(checkpoint.model, checkpoint.contract)
        self.reference = self._answers(self.model, "reference answers")
        golden = proof.golden_clips(self.clips)
        self.golden = proof.Golden(golden, np.concatenate([self.model(clip[None]) for clip in golden]))
        self._logit_noises: dict[Arithmetic, float] = {}
        self._probes: dict[bool, tuple[list[Frames], proof.FrameOrderProbe]] = {}
        self.lowerings = self._prove_lowerings()
        self._graphs: dict[tuple[str, bool, int], Graph] = {}
        self._lowerings: dict[str, dict[str, Any]] = {}
        self._moments: dict[int, dict[str, Moments]] = {}
        self._calibrations: dict[tuple[ActivationScheme, IntegerFormat], Calibrated] = {}
        self._workspace = int8.workspace()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._calibrations.clear()
        self._workspace.cleanup()

    def export(self, target: Target, out: Path) -> Bundle:
        """Build, verify and publish one bundle."""
        destination = out / f"{self.checkpoint.name}.{target.name}"
        with bundles.staging(destination) as folder:
            lowering = self._choose_lowering(target)
            graph = self._graph(lowering["chosen"])
            build = self._build_int8 if target.precision.quantises_activations else self._build
            bundle, built = build(folder, target, graph)
            bundle = replace(bundle, name=destination.name, build={"lowering": lowering, **bundle.build})
            bundle = self._prove(bundle, target)
            bundle = self._prove_image(bundle, target) if built.image else bundle
            if built.deferred and bundle.status != "executed":
                bundle = replace(bundle, status="deferred")
            bundles.save_golden(bundle, self.golden.frames, self.golden.logits)
            bundles.seal(bundle)
        return bundles.load(destination)

    def _build(
        self, folder: Path, target: Target, graph: Graph, table: CalibrationTable | None = None
    ) -> tuple[Bundle, Built]:
        """Build the target's artifact in `folder`."""
        self.progress(f"{target.name}: build", 0, 1)
        image = self._image_graph(graph.lowering)
        context = BuildContext(graph, target, folder, table, image, self._input_moments)
        built = export.exporter(target.backend).build(context)
        self.progress(f"{target.name}: build", 1, 1)
        return self._describe(folder, target, built), built

    def _build_int8(self, folder: Path, target: Target, graph: Graph) -> tuple[Bundle, Built]:
        """Calibrate, build, and compare with the float artifact of the same runtime."""
        request = int8.calibration_request(graph, target)  # raises on impossible settings before the long calibration
        calibrated = self._calibrate(target, folder.parent)
        some, _ = self._probe_clips(judged=True)
        answers = np.concatenate([self.model(frames[None]) for frames in some])
        proof.check_float_graph(target.name, answers, calibrated.budget.logits[: len(some)])
        equalised, table = quantize.apply(calibrated, graph)
        scales = int8.integer_format(target).dtype
        table = replace(table, ranges={**table.ranges, **self._observe(request.tensors, calibrated, scales)})
        if request.clips:
            np.save(folder / bundles.CALIBRATION_CLIPS, self._calibration_clips[0].first(request.clips))
        bundle, built = self._build(folder, target, equalised, table)
        unread = {name: why for clips in self._calibration_clips for name, why in clips.unread.items()}
        report = {**calibrated.report, "notes": [*calibrated.report["notes"], *built.notes], "unread": unread}
        report["macs_share"] = int8.macs_share(built, calibrated, self.options.batch)
        if runtimes.proof_device(target.name, target.backend) == runtimes.EMULATED:
            with runtimes.open_bundle(bundle, device=runtimes.EMULATED) as backend:
                candidate = int8.Candidate(bundle, backend)
                alternative = int8.float_baseline(target).name
                simulated = self._simulated(calibrated, table, request.tensors)
                report |= int8.check_accuracy(calibrated, simulated, candidate, alternative, self.progress)
        elif not target.missing(target.run_needs):
            simulated = self._simulated(calibrated, table, request.tensors)
            report |= self._measure_int8(calibrated, simulated, bundle, target, graph)
        table.save(folder / bundles.CALIBRATION)
        return replace(bundle, build={**bundle.build, "int8": {"summary": int8.summary(report), **report}}), built

    def _simulated(self, calibrated: Calibrated, table: CalibrationTable, further: Sequence[str]) -> float:
        """Simulated SQNR in dB of a target's Q/DQ graph on the judging clips.

        Calibration simulated the linears; the graph is simulated again where a target quantises further tensors.
        """
        if not further:
            return float(calibrated.report["judged"]["sqnr"])
        plain, own = quantize.apply(calibrated, self._graph("gather", batch=1))
        model = quantize.qdq(plain.model, replace(own, ranges={**own.ranges, **{n: table.ranges[n] for n in further}}))
        clips = calibrated.budget.clips
        logits = search.compute_logits(model, clips, export.evaluator(), "simulate", self.progress)
        return float(calibrated.budget.verdict(logits).sqnr)

    def _measure_int8(
        self, calibrated: Calibrated, simulated: float, bundle: Bundle, target: Target, graph: Graph
    ) -> dict[str, Any]:
        baseline = int8.float_baseline(target)
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            plain, _ = self._build(Path(folder), baseline, graph)
            first, second = (
                int8.Candidate(
                    each,
                    stack.enter_context(runtimes.open_bundle(each)),
                    sum(
                        f.stat().st_size
                        for f in each.path.rglob("*")
                        if f.is_file() and f.name != bundles.CALIBRATION_CLIPS
                    ),
                )
                for each in (bundle, plain)
            )
            return int8.measure(calibrated, simulated, first, second, self.progress)

    def _calibrate(self, target: Target, out: Path) -> Calibrated:
        """The calibration under a target's scheme: of the `gather` graph at batch 1, for every lowering and batch.

        It is cached in a hidden folder of `out` for later exports.
        """
        activations, form = key = int8.activation_scheme(target), int8.integer_format(target)
        if key not in self._calibrations:
            folder, graph = Path(self._workspace.name), self._graph("gather", batch=1)
            statistics, judged = self._calibration_clips
            self._calibrations[key] = calibration.calibrate(
                graph.model,
                graph.roles,
                statistics,
                judged,
                export.evaluator(),
                activations=activations,
                form=form,
                workspace=folder,
                max_drop=self.options.max_drop,
                cache=out / ".calibration" / f"{self.checkpoint.name}.{activations}.{form.dtype}",
                versions=machine.versions(),
                progress=self.progress,
            )
        return self._calibrations[key]

    def _observe(self, tensors: Sequence[str], calibrated: Calibrated, scales: ScaleType) -> dict[str, Range]:
        """The ranges of further tensors in the calibrated float graph."""
        if not tensors:
            return {}
        plain, table = quantize.apply(calibrated, self._graph("gather", batch=1))
        clips, _ = self._calibration_clips
        scheme = table.activations
        return calibration.observe(plain.model, tensors, clips, export.evaluator(), scheme, self.progress, scales)

    @cached_property
    def _calibration_clips(self) -> tuple[Clips, Clips]:
        """The calibration clips and the judging clips; read once."""
        folder, checkpoint = Path(self._workspace.name), self.checkpoint
        statistics, judged = (
            collect(source, checkpoint.contract, checkpoint.labels, folder, progress=self.progress)
            for source in int8.sources(checkpoint, self.options.calib)
        )
        return statistics, judged

    def _prove_lowerings(self) -> dict[str, static.LoweringError]:
        """Errors of the lowerings against the reference tokenizer, on noise and on a rendered clip.

        Raises:
            ParityError: none is accurate enough; the tubes cannot be exported.
        """
        self.progress("prove lowerings", 0, 1)
        clips = np.stack([clip.frames for clip in self.clips[:2]])
        names = (self.options.lowering,) if self.options.lowering else static.LOWERINGS
        errors = static.tokenizer_errors(self.checkpoint.model, self.checkpoint.contract, clips, names)
        self.progress("prove lowerings", 1, 1)
        for name in (wrong := [name for name, error in errors.items() if not error.sound]):
            self.progress(f"drop lowering {name}: off by {errors[name]}", 1, 1)
        if len(wrong) == len(errors):
            found = "; ".join(f"{name}: {error}" for name, error in errors.items())
            raise ParityError(
                f"{self.checkpoint.name}: no lowering gives the tokens of the reference tokenizer (largest error "
                f"of a token: {found}); nothing was written"
            )
        return errors

    def _choose_lowering(self, target: Target) -> dict[str, Any]:
        """The fastest lowering in the target's runtime, or the target's default where that runtime cannot run here.

        An INT8 target takes that of its float baseline: tubes are a small part of the work and move the same bytes.
        """
        if target.precision.quantises_activations:
            target = int8.float_baseline(target)
        if target.name not in self._lowerings:
            self._lowerings[target.name] = self._time_lowerings(target)
        return self._lowerings[target.name]

    def _time_lowerings(self, target: Target) -> dict[str, Any]:
        sound = [name for name, error in self.lowerings.items() if error.sound]
        record: dict[str, Any] = {
            "max_abs_error": {name: error.max_abs for name, error in self.lowerings.items()},
            "dropped": {name: str(error) for name, error in self.lowerings.items() if not error.sound},
        }
        if self.options.lowering:
            return record | {"chosen": self.options.lowering, "why": "asked for"}
        if missing := target.missing(target.run_needs):
            chosen = target.lowering if target.lowering in sound else sound[0]
            return record | {"chosen": chosen, "why": f"not timed: that needs {', '.join(missing)}"}
        if len(sound) == 1:
            return record | {"chosen": sound[0], "why": "the only one that is sound"}
        self.progress(f"{target.name}: time lowerings", 0, 1)
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            calls = {}
            for name in sound:
                part = Path(folder) / name
                part.mkdir()
                graph = self._graph(name, tokenizer_only=True)
                built = export.exporter(target.backend).build(BuildContext(graph, target, part))
                backend = stack.enter_context(runtimes.open_bundle(self._describe(part, target, built)))
                calls[name] = partial(backend, self.clips[0].frames[None])
            timings = interleave(calls, seconds=0.5)
        self.progress(f"{target.name}: time lowerings", 1, 1)
        chosen = min(timings, key=lambda name: timings[name].p50_ms)
        times = {name: timing.to_json() for name, timing in timings.items()}
        return record | {"chosen": chosen, "why": "fastest here, tokenizer alone", "timings": times}

    def _graph(self, lowering: str, tokenizer_only: bool = False, batch: int | None = None) -> Graph:
        batch = batch or self.options.batch
        if (key := (lowering, tokenizer_only, batch)) not in self._graphs:
            self.progress(f"trace {lowering}", 0, 1)
            checkpoint = self.checkpoint
            if tokenizer_only:
                tokenizer = static.StaticTokenizer(checkpoint.model, checkpoint.contract, lowering, batch=batch)
                graph = canonical.trace(tokenizer, checkpoint.spec, checkpoint.contract, batch)
            else:
                graph = self._trace(checkpoint, lowering, batch)
            self._graphs[key] = graph
            self.progress(f"trace {lowering}", 1, 1)
        return self._graphs[key]

    def _trace(self, checkpoint: Checkpoint, lowering: str, batch: int) -> Graph:
        """The graph of the whole model, for clips or images according to the checkpoint."""
        module = static.StaticTubeViT(checkpoint.model, checkpoint.contract, lowering, batch=batch)
        graph = canonical.trace(module, checkpoint.spec, checkpoint.contract, batch)
        return replace(graph, labels=checkpoint.labels)

    def _image_graph(self, lowering: str) -> Callable[[], Graph] | None:
        """A function that traces the graph for one image with the same weights; None if the model takes no images."""
        if self.checkpoint.spec.is_image or not self.checkpoint.spec.accepts_images:
            return None
        return partial(self._trace, self.checkpoint.with_clip(1, None), lowering, self.options.batch)

    def _input_moments(self, graph: Graph) -> dict[str, Moments]:
        """Input moments of the linears on rendered clips, so that no calibration clips are needed. Computed once."""
        if (frames := graph.spec.frames) not in self._moments:
            clips = [clip.frames for clip in demo.scenes(graph.contract, MOMENT_CLIPS)]
            self._moments[frames] = calibration.input_moments(graph.model, clips, export.evaluator())
        return self._moments[frames]

    def _describe(self, folder: Path, target: Target, built: Built) -> Bundle:
        checkpoint = self.checkpoint
        return Bundle(
            path=folder,
            name=folder.name,
            target=target.name,
            precision=target.precision,
            backend=target.backend,
            spec=checkpoint.spec,
            contract=checkpoint.contract,
            labels=checkpoint.labels,
            batch=self.options.batch,
            artifact=built.artifact,
            build=built.details,
            checkpoint=checkpoint.record(),
            versions=machine.versions(),
        )

    def _prove(self, bundle: Bundle, target: Target) -> Bundle:
        """Run the staged artifact on the proof clips; the bundle with the measured parity."""
        device = runtimes.proof_device(target.name, target.backend)
        if device is None and (missing := target.missing(target.run_needs)):
            note = f"not run here: that needs {', '.join(missing)}"
            return replace(bundle, status="built", parity={"note": note, "golden": self.golden.unmeasured(target)})
        with runtimes.open_bundle(bundle, device=device) as backend:
            measured = parity.compare(self.reference, self._answers(backend, f"{target.name}: proof"))
            some, ordered = self._probe_clips(target.precision.quantises_activations)
            found = Probe(
                ordered.agreement(backend), proof.largest_layer_jump(self.checkpoint, self.model, backend, bundle, some)
            )
            proof.check(bundle, target, measured, found)
            golden = self.golden.measure(backend, max(map(self._logit_noise, target.arithmetic)))
        return replace(bundle, status=measured.status, parity=proof.record(measured, found, golden))

    def _probe_clips(self, judged: bool) -> tuple[list[Frames], proof.FrameOrderProbe]:
        """Clips for frame order and layer errors: of the proof, or with `judged` some of the judging clips."""
        if judged not in self._probes:
            if judged:
                some = list(islice(self._calibration_clips[1].frames, probe.ORDER_CLIPS))
            else:
                some = [clip.frames for clip in self.clips if clip.name != "noise"][: probe.ORDER_CLIPS]
            self._probes[judged] = some, proof.FrameOrderProbe.of(self.model, some)
        return self._probes[judged]

    def _logit_noise(self, kind: Arithmetic) -> float:
        """See `edgetube.export.arithmetic.NoiseSimulation`; the noise of float32 is negligible."""
        if kind == "float32":
            return 0.0
        if kind not in self._logit_noises:
            self.progress(f"simulate {kind}", 0, 1)
            self._logit_noises[kind] = self._noise_simulation.logit_noise(kind)
            self.progress(f"simulate {kind}", 1, 1)
        return self._logit_noises[kind]

    @cached_property
    def _noise_simulation(self) -> arithmetic.NoiseSimulation:
        module = static.StaticTubeViT(self.checkpoint.model, self.checkpoint.contract)
        return arithmetic.NoiseSimulation(module, self.golden.frames)

    def _prove_image(self, bundle: Bundle, target: Target) -> Bundle:
        """The proof of an artifact that also takes images, on the first frames of the same clips."""
        checkpoint = self.checkpoint.with_clip(1, None)
        images = [replace(clip, frames=clip.frames[:1]) for clip in self.clips]
        part = replace(bundle, spec=checkpoint.spec, contract=checkpoint.contract)
        reference = parity.answer(Reference(checkpoint.model, checkpoint.contract), images, checkpoint.labels)
        with runtimes.open_bundle(part, device=runtimes.proof_device(bundle.target, bundle.backend)) as backend:
            measured = parity.compare(reference, parity.answer(backend, images, checkpoint.labels))
        proof.check(part, target, measured, Probe(), " for images")
        return replace(bundle, parity={**bundle.parity, "image": measured.to_json()})

    def _answers(self, backend: Backend, stage: str) -> parity.Answers:
        labels = self.checkpoint.labels
        return parity.answer(backend, self.clips, labels, stage=stage, total=len(self.clips), progress=self.progress)
