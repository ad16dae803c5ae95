"""What an export is proven on, and what its artifact has to keep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetube import demo, metrics
from edgetube.bench import layers, parity, probe
from edgetube.bench.compare import Parity
from edgetube.bench.parity import Gates, Measured
from edgetube.bench.probe import Probe
from edgetube.bundle import Bundle
from edgetube.errors import ParityError
from edgetube.model.checkpoints import Checkpoint
from edgetube.runtimes.base import Backend
from edgetube.runtimes.torch import Reference
from edgetube.targets import Precision, Target
from edgetube.video import Clip, Frames

Logits = npt.NDArray[np.float32]

CLIPS = 16
"""Clips of the proof that every export runs: one of noise, the others rendered from photographs."""

GOLDEN, GOLDEN_BYTES = (4, 2), 24 << 20
"""Golden clips of a bundle: so many as they are and so many backwards, of at most so many bytes, but two at least."""

WORSE = 2.0
"""How much more energy the error of the golden clips may have on another machine. Integer sums are exact, but a value
that is rounded the other way sends the rounding of all later layers another way: an error of the same size, not the
same error."""

ROUGHER = 32.0
"""Factor on the energy of the simulated arithmetic. On aarch64 (ONNX Runtime under QEMU) the built-in model in float16
reached 32.5 dB where 44.4 are simulated, a sixteenth: sums of raw pixels cancel more than a random walk does."""

HIGHEST = 80.0
"""SQNR of the golden clips, dB, that is enough in any precision: sums of float32 in other orders stay above it."""


def clips(checkpoint: Checkpoint, count: int) -> list[Clip]:
    """The clips that an export is proven on: rendered from photographs, and one of noise, for any contract.

    The first one moves. The rendered ones show camera motion; their labels are dropped unless the checkpoint knows all
    of them.
    """
    rendered = list(demo.evaluation(checkpoint.contract, count - 1))
    if not set(demo.LABELS) <= set(checkpoint.labels):
        rendered = [replace(clip, label=None) for clip in rendered]
    noise = np.random.default_rng(0).integers(0, 256, checkpoint.contract.shape, np.uint8)
    return [rendered[1], Clip("noise", noise), rendered[0], *rendered[2:]]


def golden_clips(proven: Sequence[Clip]) -> Frames:
    """The golden clips (K, T, H, W, 3) of a bundle, from those of its proof; the second of these is noise."""
    rendered = [clip.frames for clip in proven if clip.name != "noise"]
    plain, backwards = GOLDEN
    chosen = rendered[:plain] + [form for frames in rendered[:backwards] for form in probe.reordered(frames)[:1]]
    most = max(2, GOLDEN_BYTES // rendered[0].nbytes)
    if len(chosen) > most:
        chosen = [*chosen[: most - 1], chosen[-1]]
    return np.stack(chosen)


@dataclass(frozen=True)
class Golden:
    """The golden clips' answers, and how near a device has to come to them.

    Attributes:
        frames: (K, T, H, W, 3) uint8.
        logits: (K, classes) float32 of the reference.
    """

    frames: Frames
    logits: Logits

    def judge(self, backend: Backend, rough: float) -> dict[str, Any]:
        """What `Runtime.check` holds a device against, for the manifest.

        Args:
            backend: the staged artifact.
            rough: share of the logits' energy that the target's arithmetic may leave as noise.
        """
        proven = metrics.sqnr(self.logits, np.concatenate([backend(clip[None]) for clip in self.frames]))
        allowed = WORSE * 10 ** (-proven / 10) + ROUGHER * rough
        limit = min(HIGHEST, -10 * math.log10(allowed)) if allowed else HIGHEST
        return {"clips": len(self.frames), "sqnr": proven if math.isfinite(proven) else None, "min_sqnr": limit}

    def unproven(self, target: Target) -> dict[str, Any]:
        """The same for an artifact that nothing could run here: what its precision has to reach."""
        return {"clips": len(self.frames), "sqnr": None, "min_sqnr": parity.SQNR[target.precision]}


@dataclass(frozen=True)
class Ordered:
    """Clips whose frames are also shown in other orders, and the reference's answers to all of them."""

    shown: tuple[Frames, ...]
    reference: tuple[Logits, ...]

    @classmethod
    def of(cls, reference: Reference, some: Sequence[Frames]) -> Ordered:
        """`some` are clips (T, H, W, 3) uint8."""
        shown = tuple(form for frames in some for form in (frames, *probe.reordered(frames)))
        if len(shown) == len(some):
            return cls((), ())
        return cls(shown, tuple(reference(frames[None])[0] for frames in shown))

    def agreement(self, backend: Backend) -> float | None:
        """See `edgetube.bench.probe.order_agreement`."""
        if not self.shown:
            return None
        return probe.order_agreement(self.reference, [backend(frames[None])[0] for frames in self.shown])


def jump(
    checkpoint: Checkpoint, reference: Reference, backend: Backend, bundle: Bundle, some: Sequence[Frames]
) -> tuple[str, float] | None:
    """The layer where the artifact's error rises most above that of all before it, and by how many dB."""
    wanted = layers.landmarks(checkpoint.spec)
    stated = layers.as_exported(checkpoint.model, checkpoint.spec)
    curve = layers.curve(reference, backend, bundle, some[: probe.LAYER_CLIPS], wanted, stated)
    return layers.largest_drop(curve, bundle.precision)


def gates(precision: Precision) -> Gates:
    """What an artifact of a precision has to keep on the proof clips, beside its target's tolerance.

    The proof clips are noise and rendered films, which a model of something else may never have seen: they leave the
    ranges that its integers were calibrated for. So int8 is held against the clips that judge, in
    `edgetube.export.int8.judge`, and 4-bit weights against their target's tolerance.
    """
    exact = precision not in ("int8", "w4")
    return Gates(
        min_sqnr=parity.SQNR[precision] if exact else None,
        min_order_agreement=parity.ORDER_AGREEMENT,
        max_layer_jump=layers.JUMP,
    )


def check_float_graph(name: str, reference: Logits, logits: Logits) -> None:
    """That the float graph which calibration starts from is the trained model, on clips (N, classes) that judge.

    Raises:
        ParityError: it is not: everything that is measured against it later would be wrong.
    """
    found = metrics.sqnr(reference, logits)
    if not found >= parity.SQNR["fp32"]:
        raise ParityError(
            f"{name}: the float graph that calibration starts from does not answer like the reference: its SQNR on "
            f"{len(logits)} clips is {found:.1f} dB, at least {parity.SQNR['fp32']:g} is expected; nothing was written"
        )


def check(bundle: Bundle, target: Target, measured: Parity, found: Probe, what: str = "") -> None:
    """That an artifact answers like the reference.

    Args:
        what: which answers of the artifact, when it has several kinds.

    Raises:
        ParityError: it does not; says by how much.
    """
    name = f"{bundle.name}{what}"
    if target.tolerance is not None and not measured.relative_error <= target.tolerance:
        raise ParityError(
            f"{name} differs from the reference by {measured.relative_error:.2e} of the largest logit; "
            f"{target.name} allows {target.tolerance:.0e}; nothing was written"
        )
    failed = [
        v for v in gates(bundle.precision).verdicts(Measured(bundle, measured, (), (), (), found)) if not v.passed
    ]
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
        "golden": dict(golden),
    }
