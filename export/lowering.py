"""The choice of a lowering: each is checked against the reference tokenizer, and the sound ones are timed."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from edgetube import runtimes
from edgetube.bench.latency import interleave
from edgetube.errors import ParityError
from edgetube.export import int8, tokenizer
from edgetube.export.build import Builder
from edgetube.targets import Target
from edgetube.video import Frames

Lowerings = dict[str, dict[str, Any]]
"""Choices by the name of the target that they were made for, see `lowered_as`."""


def lowered_as(target: Target) -> Target:
    """The target whose lowering a target takes: an INT8 one that of its float baseline.

    Tubes are a small part of the work and move the same bytes.
    """
    return int8.float_baseline(target) if target.precision.quantises_activations else target


class LoweringChoice:
    """Chooses how the tubes of one checkpoint are lowered for each target.

    Args:
        clips: (N, T, H, W, 3) uint8: noise and a rendered clip.
        forced: the lowering that the user asks for; None takes the fastest.
        known: what was chosen for the same tubes and clip before; new choices are added.
    """

    def __init__(self, builder: Builder, clips: Frames, forced: str | None, known: Lowerings | None = None) -> None:
        self.builder, self.clips, self.forced = builder, clips, forced
        self.progress = builder.progress
        self._chosen: Lowerings = {} if known is None else known

    def choose(self, target: Target) -> dict[str, Any]:
        """The lowering for a target, as the manifest records it: "chosen", "why", errors and times.

        The fastest in the target's runtime, or the target's default where that runtime cannot run here.

        Raises:
            ParityError: none is accurate enough; the tubes cannot be exported.
        """
        target = lowered_as(target)
        if target.name not in self._chosen:
            self._chosen[target.name] = self._time(target)
        return self._chosen[target.name]

    @cached_property
    def errors(self) -> dict[str, tokenizer.LoweringError]:
        """Of each lowering against the reference tokenizer."""
        self.progress("prove lowerings", 0, 1)
        checkpoint = self.builder.checkpoint
        names = (self.forced,) if self.forced else tokenizer.LOWERINGS
        errors = tokenizer.tokenizer_errors(checkpoint.model, checkpoint.contract, self.clips, names)
        self.progress("prove lowerings", 1, 1)
        for name in (wrong := [name for name, error in errors.items() if not error.sound]):
            self.progress(f"drop lowering {name}: off by {errors[name]}", 1, 1)
        if len(wrong) == len(errors):
            found = "; ".join(f"{name}: {error}" for name, error in errors.items())
            raise ParityError(
                f"{checkpoint.name}: no lowering gives the tokens of the reference tokenizer (largest error "
                f"of a token: {found}); nothing was written"
            )
        return errors

    def _time(self, target: Target) -> dict[str, Any]:
        sound = [name for name, error in self.errors.items() if error.sound]
        record: dict[str, Any] = {
            "max_abs_error": {name: error.max_abs for name, error in self.errors.items()},
            "dropped": {name: str(error) for name, error in self.errors.items() if not error.sound},
        }
        if self.forced:
            return record | {"chosen": self.forced, "why": "asked for"}
        default = target.lowering if target.lowering in sound else sound[0]
        if missing := target.missing(target.run_needs):
            return record | {"chosen": default, "why": f"not timed: that needs {', '.join(missing)}"}
        if runtimes.simulated(target.backend):
            return record | {"chosen": default, "why": "not timed: the processor is simulated here"}
        if len(sound) == 1:
            return record | {"chosen": sound[0], "why": "the only one that is sound"}
        self.progress(f"{target.name}: time lowerings", 0, 1)
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            calls = {}
            for name in sound:
                part = Path(folder) / name
                part.mkdir()
                bundle = self.builder.build_tokenizer(part, target, name)
                calls[name] = partial(stack.enter_context(runtimes.open_bundle(bundle)), self.clips[:1])
            timings = interleave(calls, seconds=0.5)
        self.progress(f"{target.name}: time lowerings", 1, 1)
        chosen = min(timings, key=lambda name: timings[name].p50_ms)
        times = {name: timing.to_json() for name, timing in timings.items()}
        return record | {"chosen": chosen, "why": "fastest here, tokenizer alone", "timings": times}
