"""The proof of an export: its clips, gates, golden clips and checks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgetube import demo, metrics
from edgetube.bench import layers, parity, probe
from edgetube.bench.compare import Parity
from edgetube.bench.following import REGRET
from edgetube.bench.parity import Gates, Measured
from edgetube.bench.probe import Probe
from edgetube.bench.remembering import Answering
from edgetube.bundle import Bundle
from edgetube.errors import ParityError
from edgetube.export.arithmetic import ARITHMETIC_MARGIN
from edgetube.model.checkpoints import Checkpoint
from edgetube.precision import Precision
from edgetube.roles import roles_of
from edgetube.runtimes.base import Backend, Logits
from edgetube.runtimes.torch import Reference
from edgetube.spec import ModelSpec
from edgetube.targets import Target
from edgetube.video import Clip, Frames

PROOF_CLIPS, LEAST_PROOF_CLIPS, PROOF_MACS = 16, 4, 1.2e12
"""Clips of the proof, one of noise, the others rendered from photographs: most, least, and between the two as many as
take these multiply-accumulates."""

ORDER_MACS = 0.4e12
"""The same for the clips whose frames are reordered, and for those whose layers are compared: at least one."""

GOLDEN_CLIPS, MAX_GOLDEN_BYTES = (4, 2), 24 << 20
"""Golden clips of a bundle: forwards and backwards; most bytes of all together, but at least two clips."""

GOLDEN_MARGIN = 2.0
"""Factor on the energy of the golden clips' error on another machine. Integer sums are exact, but one value rounded the
other way changes the rounding in all later layers: an error of the same size, but another error."""

MAX_REQUIRED_SQNR = 80.0
"""Most SQNR of the golden clips, dB, that is ever required; float32 sums in another order stay above it."""


@dataclass(frozen=True)
class Effort:
    """How much is shown in a proof: less to models that are slow to answer, whose errors are seen as well on few clips.

    Attributes:
        clips: of the proof.
        ordered, layers: clips whose frames are also reordered, and whose layers are compared.
    """

    clips: int
    ordered: int
    layers: int

    @classmethod
    def of(cls, spec: ModelSpec) -> Effort:
        """The effort for a model."""
        work = spec.macs()
        clips = max(LEAST_PROOF_CLIPS, min(PROOF_CLIPS, int(PROOF_MACS // work)))
        few = max(1, int(ORDER_MACS // work))
        return cls(clips, min(probe.ORDER_CLIPS, few), min(probe.LAYER_CLIPS, few))


def clips(checkpoint: Checkpoint, count: int) -> list[Clip]:
    """The proof clips for any contract: rendered from photographs with camera motion, the second one noise.

    The first one shows motion. Labels are dropped unless the checkpoint has all of them.
    """
    rendered = list(demo.evaluation(checkpoint.contract, count - 1))
    if not set(demo.LABELS) <= set(checkpoint.labels):
        rendered = [replace(clip, label=None) for clip in rendered]
    noise = np.random.default_rng(0).integers(0, 256, checkpoint.contract.shape, np.uint8)
    return [rendered[1], Clip("noise", noise), rendered[0], *rendered[2:]]


def golden_clips(proven: Sequence[Clip], ordered: int = probe.ORDER_CLIPS) -> Frames:
    """The golden clips (K, T, H, W, 3) of a bundle, from the proof clips without the noise; `ordered`: see `Effort`."""
    rendered = [clip.frames for clip in proven if clip.name != "noise"]
    plain, backwards = GOLDEN_CLIPS
    again = rendered[: min(backwards, ordered)]
    chosen = rendered[:plain] + [form for frames in again for form in probe.reordered(frames)[:1]]
    most = max(2, MAX_GOLDEN_BYTES // rendered[0].nbytes)
    if len(chosen) > most:
        chosen = [*chosen[: most - 1], chosen[-1]]
    return np.stack(chosen)


@dataclass(frozen=True)
class Golden:
    """The golden clips, the reference's logits for them, and the required SQNR.

    Attributes:
        frames: (K, T, H, W, 3) uint8.
        logits: (K, classes) float32 of the reference.
    """

    frames: Frames
    logits: Logits

    def measure(self, backend: Answering, arithmetic_noise: float) -> dict[str, Any]:
        """For the manifest: the artifact's SQNR, and the least SQNR that `Runtime.check` requires of a device.

        Args:
            backend: the staged artifact.
            arithmetic_noise: see `edgetube.export.arithmetic.NoiseSimulation.logit_noise`.
        """
        proven = metrics.sqnr(self.logits, np.concatenate([backend(clip[None]) for clip in self.frames]))
        allowed = GOLDEN_MARGIN * 10 ** (-proven / 10) + ARITHMETIC_MARGIN * arithmetic_noise
        limit = min(MAX_REQUIRED_SQNR, -10 * math.log10(allowed)) if allowed else MAX_REQUIRED_SQNR
        return {"clips": len(self.frames), "sqnr": proven if math.isfinite(proven) else None, "min_sqnr": limit}

    def unmeasured(self, target: Target) -> dict[str, Any]:
        """The same for an artifact that could not run here: the least SQNR is that of its precision."""
        return {"clips": len(self.frames), "sqnr": None, "min_sqnr": parity.SQNR[target.precision]}


def largest_layer_jump(
    checkpoint: Checkpoint, reference: Reference, backend: Backend, bundle: Bundle, clips: Sequence[Frames]
) -> tuple[str, float] | None:
    """The layer whose error rises most above that of all layers before it, and by how many dB."""
    wanted = roles_of(checkpoint.spec).landmarks
    stated = layers.as_exported(checkpoint.model, checkpoint.spec)
    curve = layers.curve(reference, backend, bundle, clips, wanted, stated)
    return layers.largest_drop(curve, bundle.precision)


def gates(precision: Precision, least_sqnr: float = math.inf) -> Gates:
    """The parity gates of a precision on the proof clips, in addition to the target's tolerance.

    The proof clips are noise and rendered films, which may be far from a model's own data and exceed the calibrated
    ranges. So int8 is checked on the judging clips, in `edgetube.export.int8.check_accuracy`, and 4-bit weights by
    their target's tolerance.

    Args:
        least_sqnr: the SQNR in dB is required to be that, where this is less than what the precision reaches.
    """
    exact = precision.weight_bits >= 8 and not precision.quantises_activations
    return Gates(
        min_sqnr=min(parity.SQNR[precision], least_sqnr) if exact else None,
        min_order_agreement=parity.ORDER_AGREEMENT,
        max_layer_jump=layers.JUMP,
        max_regret=REGRET,
    )


def check_float_graph(name: str, reference: Logits, logits: Logits) -> None:
    """Check the float graph of calibration against the reference, by logits (N, classes) of judging clips.

    Raises:
        ParityError: they differ, so that later measurements against that graph would be wrong.
    """
    found = metrics.sqnr(reference, logits)
    if not found >= (least := parity.SQNR[Precision.FP32]):
        raise ParityError(
            f"{name}: the float graph that calibration starts from does not answer like the reference: its SQNR on "
            f"{len(logits)} clips is {found:.1f} dB, at least {least:g} is expected; nothing was written"
        )


def check(
    bundle: Bundle, target: Target, measured: Parity, found: Probe, what: str = "", least_sqnr: float = math.inf
) -> None:
    """Check an artifact against the reference.

    Args:
        least_sqnr: of an artifact in which other tokens may leave than in the reference, dB: that replaces the
            target's tolerance, see `gates`.
        what: suffix for the error where an artifact has several functions: " for images".

    Raises:
        ParityError: a gate or the tolerance fails; says by how much.
    """
    name = f"{bundle.name}{what}"
    alike = math.isinf(least_sqnr)
    if alike and target.tolerance is not None and not measured.relative_error <= target.tolerance:
        raise ParityError(
            f"{name} differs from the reference by {measured.relative_error:.2e} of the largest logit; "
            f"{target.name} allows {target.tolerance:.0e}; nothing was written"
        )
    shown = Measured(bundle, measured, (), (), (), found)
    failed = [verdict for verdict in gates(bundle.precision, least_sqnr).verdicts(shown) if not verdict.passed]
    if failed:
        raise ParityError(f"{name} does not answer like the reference: {_list(failed)}; nothing was written")


def _list(failed: Sequence[parity.Verdict]) -> str:
    def one(verdict: parity.Verdict) -> str:
        kind, _, what = verdict.gate.partition("-")
        place = f" at {verdict.where}" if verdict.where else ""
        bound = "at least" if kind == "min" else "at most"
        return f"{what.replace('-', ' ')}{place} is {verdict.value:.5g}, {bound} {verdict.limit:.5g} is allowed"

    return "; ".join(map(one, failed))


def record(measured: Parity, found: Probe, golden: Mapping[str, Any]) -> dict[str, Any]:
    """The proof, for the manifest's `parity`."""
    jumped = None if found.jump is None else {"layer": found.jump[0], "db": found.jump[1]}
    return {
        **measured.to_json(),
        "order_agreement": found.order_agreement,
        "layer_jump": jumped,
        **({} if found.regret is None else {"regret": found.regret}),
        "golden": dict(golden),
    }
