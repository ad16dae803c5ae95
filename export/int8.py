"""INT8 targets in the pipeline: clips, the float baseline, accuracy checks, and the summary."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from edgetube import datasets, demo, export, metrics
from edgetube.bench.latency import interleave
from edgetube.bundle import Bundle
from edgetube.calibration import Calibrated, search
from edgetube.calibration.table import FLOAT32_SCALES, ActivationScheme, CalibrationTable, IntegerFormat
from edgetube.datasets import ClipSet
from edgetube.errors import InputError, ParityError
from edgetube.export.arithmetic import ARITHMETIC_MARGIN
from edgetube.export.base import CalibrationRequest
from edgetube.export.canonical import Graph
from edgetube.model.checkpoints import Checkpoint
from edgetube.progress import Progress
from edgetube.roles import LOGITS, roles_of
from edgetube.runtimes.base import Backend, may_saturate
from edgetube.targets import Target
from edgetube.video import Frames

CALIBRATION_CLIPS, JUDGING_CLIPS = 128, 252
"""Most clips for calibration, and for judging accuracy; the latter are disjoint when there are enough."""

LEAST_CLIPS, CALIBRATION_MACS, JUDGING_MACS = 32, 30e12, 60e12
"""Fewer clips for a model of much work: as many as it answers with these multiply-accumulates, and at least 32. Clips
of the user's own are all judged."""

CALIBRATION_ROWS = 65536
"""Tokens of all calibration clips together that there are at least, however much work they are."""

MIN_UNSEEN_CLIPS = 32
"""With fewer clips left after calibration, all clips are judging clips."""

MIN_COSINE = 0.98
"""Smallest cosine between the logits of artifact and float graph on a judging clip."""

COSINE_LOSS = 0.02
"""How far below the simulated one that cosine may be, of a model with fewer tokens: the float graph has them all."""

SQNR_LOSS = 3.0
"""dB by which the artifact's SQNR on the judging clips may be below the simulated one."""


@dataclass(frozen=True)
class Candidate:
    """An opened artifact and its size in bytes."""

    bundle: Bundle
    backend: Backend
    size: int = 0

    @property
    def name(self) -> str:
        return self.bundle.target


def sources(checkpoint: Checkpoint, given: Path | None) -> tuple[ClipSet, ClipSet]:
    """The calibration clips and the judging clips.

    Args:
        given: the user's clips; None takes the built-in ones, for models with their labels and for random weights.

    Raises:
        InputError: no clips were given and the built-in ones do not fit the model.
    """
    spec = checkpoint.spec
    work, judging, notes = spec.macs(), JUDGING_CLIPS, list[str]()
    count = max(LEAST_CLIPS, -(-CALIBRATION_ROWS // spec.sequence), int(CALIBRATION_MACS // work))
    count = min(CALIBRATION_CLIPS, count)
    if given is not None:
        source = datasets.load(given, checkpoint.contract).check_labels(checkpoint.labels)
    elif set(demo.LABELS) <= set(checkpoint.labels) or checkpoint.source.startswith("random:"):
        judging = min(JUDGING_CLIPS, max(LEAST_CLIPS, int(JUDGING_MACS // work)))
        source = datasets.built_in_calibration(count + judging, checkpoint.labels)
    else:
        raise InputError(
            f"INT8 needs clips of what {checkpoint.name} is for, 128 or more; give --calib a folder, a .csv manifest, "
            "or .npy/.npz frames"
        )
    if count < CALIBRATION_CLIPS:
        notes.append(
            f"at most {count} clips calibrate, not {CALIBRATION_CLIPS}: one takes {work / 1e9:.0f} GMAC and has "
            f"{spec.sequence} tokens"
        )
    if judging < JUDGING_CLIPS:
        notes.append(
            f"{judging} built-in clips judge the accuracy, not {JUDGING_CLIPS}: each is {100 / judging:.1f} points, "
            f"and none lost of {judging} may be up to {100 * (1 - 0.05 ** (1 / judging)):.1f} of all (95 % "
            "confidence); --calib takes more"
        )
    drawn = source.sample(count + judging)
    seen, unseen = drawn.items[:count], drawn.items[count:]
    judged = unseen if len(unseen) >= MIN_UNSEEN_CLIPS else drawn.items
    return replace(source, items=seen, notes=(*source.notes, *notes)), replace(source, items=judged)


def activation_scheme(target: Target) -> ActivationScheme:
    """The `activation_scheme` of a target's exporter; int8 without a zero point by default."""
    ask: Callable[[Target], ActivationScheme] = getattr(
        export.exporter(target.backend), "activation_scheme", lambda _: "int8"
    )
    return ask(target)


def integer_format(target: Target) -> IntegerFormat:
    """The `integer_format` of a target's exporter; `FLOAT32_SCALES` by default."""
    ask: Callable[[Target], IntegerFormat] | None = getattr(export.exporter(target.backend), "integer_format", None)
    return ask(target) if ask else FLOAT32_SCALES


def calibration_request(graph: Graph, target: Target) -> CalibrationRequest:
    """The `calibration_request` of a target's exporter; an empty one by default."""
    state = getattr(export.exporter(target.backend), "calibration_request", None)
    found: CalibrationRequest = state(graph, target) if state else CalibrationRequest()
    return found


def quantized_graph(
    target: Target,
) -> Callable[[onnx.ModelProto, CalibrationTable, Target], onnx.ModelProto] | None:
    """The `quantized_graph` of a target's exporter, where Q/DQ around linears is not what its artifact computes."""
    return getattr(export.exporter(target.backend), "quantized_graph", None)


SIMULATED_CLIPS = 32
"""Judging clips for an artifact whose processor is simulated here, which takes seconds a clip."""


def float_baseline(target: Target) -> Target:
    """The float target that an INT8 target is measured against: the first that the same runtime declares."""
    declared: tuple[Target, ...] = export.exporter(target.backend).TARGETS
    family = [t for t in declared if t.name.partition("-")[0] == target.name.partition("-")[0]]
    return next(t for t in family if not t.precision.quantises_weights)


@dataclass(frozen=True)
class Simulation:
    """The Q/DQ graph in float32 against the float graph of calibration, on the judging clips.

    Attributes:
        sqnr: of the logits, dB.
        min_cosine: what the artifact's logits have to reach on each of the first `clips`, or on every judged clip.
    """

    sqnr: float
    min_cosine: float = MIN_COSINE
    clips: int | None = None

    def with_noise(self, noise: float) -> Simulation:
        """What an artifact should reach: with the noise of its integers, and of its float part's arithmetic.

        Args:
            noise: see `edgetube.export.arithmetic.NoiseSimulation.logit_noise`, of the arithmetic that it runs in here.
        """
        if not noise:
            return self
        return replace(self, sqnr=-10 * math.log10(10 ** (-self.sqnr / 10) + ARITHMETIC_MARGIN * noise))


def measure(
    calibrated: Calibrated, expected: Simulation, int8: Candidate, plain: Candidate, progress: Progress
) -> dict[str, Any]:
    """Accuracy, speed and size of an INT8 artifact against the float one of its runtime; see `check_accuracy`."""
    accuracy = check_accuracy(calibrated, expected, int8, plain.name, progress)
    clip = np.repeat(calibrated.budget.clips.frames[0][None], int8.backend.batch, axis=0)
    times = interleave({c.name: partial(c.backend, clip) for c in (int8, plain)}, seconds=1.0)
    speedup, share = times[plain.name].p50_ms / times[int8.name].p50_ms, int8.size / plain.size
    return {
        "against": plain.name,
        "p50_ms": times[int8.name].p50_ms,
        "float_p50_ms": times[plain.name].p50_ms,
        "speedup": speedup,
        "size_ratio": share,
        **accuracy,
    }


def check_accuracy(
    calibrated: Calibrated, expected: Simulation, int8: Candidate, alternative: str, progress: Progress
) -> dict[str, Any]:
    """Check the accuracy of an INT8 artifact on the judging clips; its record for the manifest.

    Args:
        expected: on the same clips.
        alternative: target that an error proposes.

    Raises:
        ParityError: the artifact loses more than the budget on the judging clips, or its error is larger than
            that of the simulation by more than `SQNR_LOSS` (names the cause where it can be told), or the cosine of a
            clip is too small.
    """
    budget, count = calibrated.budget, simulated_clips(calibrated)
    found = search.judge(int8.backend, budget, f"{int8.name}: accuracy", progress, least=count)
    if not found.verdict.within_budget:
        raise ParityError(
            f"{int8.name} loses {found.verdict}; nothing was written: allow more with --max-drop, or use {alternative}"
        )
    judged = budget.order[: len(found.logits)]
    exact = budget.logits[judged]
    sqnr = metrics.sqnr(exact[:count], found.logits[:count])
    if not sqnr >= expected.sqnr - SQNR_LOSS:
        why = diagnose(int8, budget.clips.frames[int(judged[0])], exact[0])
        raise ParityError(
            f"{int8.name} computes something else than what was calibrated: its SQNR on {count} clips is "
            f"{sqnr:.1f} dB, simulated were {expected.sqnr:.1f}; {why}; nothing was written: use {alternative}"
        )
    cosine = metrics.cosine(exact[: expected.clips], found.logits[: expected.clips])
    if not cosine >= expected.min_cosine:
        raise ParityError(
            f"{int8.name}: the cosine of the logits on the worst of {expected.clips or len(judged)} clips is "
            f"{cosine:.4f}, at least {expected.min_cosine:.4g} is expected; nothing was written: use {alternative}, "
            "or calibrate on more clips"
        )
    return {"accuracy": {**found.verdict.to_json(), "cosine": cosine}}


def simulated_clips(calibrated: Calibrated) -> int:
    """The first clips of the budget's order on which calibration simulated the quantised linears."""
    return min(int(calibrated.report["judged"]["clips"]), len(calibrated.budget.clips))


def diagnose(int8: Candidate, clip: Frames, expected: npt.NDArray[np.float32]) -> str:
    """The likely cause of an artifact's error being larger than that of its simulation, in words.

    Args:
        clip: (T, H, W, 3) uint8.
        expected: the float graph's logits for it (classes,).
    """
    integers = int8.bundle.build.get("integers", {})
    asked, executed = int(integers.get("asked", 0)), int(integers.get("executed", 0))
    if executed < asked:
        return f"the runtime computes {asked - executed} of {asked} linears in float"
    shown = int8.backend.layers(roles_of(int8.bundle.spec).landmarks)
    if LOGITS in shown:
        batch = np.repeat(clip[None], int8.backend.batch, axis=0)
        whole, apart = int8.backend(clip[None])[0], int8.backend.tap(shown)(batch)[LOGITS][0]
        gained = metrics.sqnr(expected, apart) - metrics.sqnr(expected, whole)
        if gained > SQNR_LOSS:
            return f"the runtime fuses operators wrongly: with every block's output shown it is {gained:.1f} dB better"
    if int8.backend.status == "executed" and may_saturate(int8.bundle):
        return "sums of its 8-bit products may overflow on this processor (x86 without VNNI)"
    return "the cause cannot be told; edgetube parity --layers names the layer of an artifact that was written"


def summary(report: Mapping[str, Any]) -> str:
    """One line for the user: speed, size and accuracy against float; `SLOWER` where it is."""
    accuracy = report.get("accuracy", report["judged"])
    kept = f"{accuracy['agreement']:.1%} of {accuracy['clips'] + accuracy['certain']} answers unchanged"
    kept += f" ({accuracy['certain']} certain by their margins)" if accuracy["certain"] else ""
    if accuracy["top1"] is not None:
        kept = f"top-1 {accuracy['top1_float']:.1%} -> {accuracy['top1']:.1%}, {kept}"
    fallen = sum(1 for reason in report["fallbacks"].values() if reason.startswith("fell back"))
    work = f"{report['macs_share']:.0%} of the linear work in int8" + (
        f", {fallen} linears fell back" if fallen else ""
    )
    if "speedup" not in report:
        how = "run by a simulator" if report.get("simulator") else "not run here"
        return f"{how}, speed unknown; {kept}; {work}"
    speed = report["speedup"]
    pace = f"{speed:.2f}x faster than" if speed >= 1 else f"SLOWER, {speed:.2f}x the speed of"
    return f"{pace} {report['against']}, {report['size_ratio']:.2f}x its size; {kept}; {work}"
