"""Runs the proof of staged artifacts: the reference answers once, every artifact of the export is compared with it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgetube import export, metrics, runtimes
from edgetube.bench import following, parity, probe
from edgetube.bench.compare import Parity
from edgetube.bench.following import Following, Paired
from edgetube.bench.remembering import Answering, Remembering
from edgetube.bundle import Bundle
from edgetube.calibration import graphs
from edgetube.calibration.clips import Clips
from edgetube.errors import ParityError
from edgetube.export import arithmetic, int8, memory, proof, static
from edgetube.export.base import Built
from edgetube.model.checkpoints import Checkpoint
from edgetube.precision import Precision
from edgetube.progress import Progress
from edgetube.roles import roles_of
from edgetube.runtimes.base import Backend, Logits, Tap
from edgetube.runtimes.torch import Reference
from edgetube.targets import Arithmetic, Target
from edgetube.video import Frames


class Prover:
    """The proof of one checkpoint's artifacts.

    Args:
        judging: reads the judging clips of int8 targets.

    Attributes:
        clips: of the proof.
        model: the reference, with as many tokens as the artifacts.
        own: it, which answers each clip once.
        answers: the same with all tokens, as it was trained.
        golden: clips and the reference's answers, for every bundle.
    """

    def __init__(self, checkpoint: Checkpoint, judging: Callable[[], Clips], progress: Progress) -> None:
        self.checkpoint, self.judging, self.progress = checkpoint, judging, progress
        self.effort = proof.Effort.of(checkpoint.spec)
        self.clips = proof.clips(checkpoint, self.effort.clips)
        self.model = Reference(checkpoint.model, checkpoint.contract)
        self.own = self.answers = Remembering(self.model)
        if checkpoint.spec.reduction is not None:
            self.answers = Remembering(Reference(checkpoint.trained.model, checkpoint.contract))
        self.reference = self._answers(self.answers, "reference answers")
        golden = proof.golden_clips(self.clips, self.effort.ordered)
        self.golden = proof.Golden(golden, self.own(golden))
        self._logit_noises: dict[tuple[Arithmetic, bool], float] = {}
        self._probes: dict[bool, tuple[list[Frames], list[Frames]]] = {}

    def prove(self, bundle: Bundle, target: Target, built: Built) -> Bundle:
        """Run the staged artifact on the proof clips; the bundle with the measured parity."""
        device = runtimes.proof_device(target.name, target.backend)
        if device is None and (missing := target.missing(target.run_needs)):
            note = f"not run here: that needs {', '.join(missing)}"
            return replace(bundle, status="built", parity={"note": note, "golden": self.golden.unmeasured(target)})
        with runtimes.open_bundle(bundle, device=device) as backend:
            memory.release()
            answers = Remembering(backend)
            measured = parity.compare(self.reference, self._answers(answers, f"{target.name}: proof"))
            some, ordered = self.probe_clips(target.precision.quantises_activations)
            with self._witness(backend, bundle, built, device) as witness:
                paired = following.pair(self.model, backend, bundle, (self.own, answers), witness)
                alike = measured if self.own is self.answers else self._paired(paired, answers)
                record = {} if alike is measured else {"reduced": alike.to_json()}
                pairs = [*map(paired, ordered)] if paired.alike else []
                if built.simulation is not None and paired.alike:
                    shown = ordered or some
                    record["simulation"] = self._check_simulation(
                        bundle, built.simulation, shown, pairs or [*map(paired, shown)], backend.arithmetic
                    )
            agreement = probe.order_agreement(*zip(*pairs, strict=True)) if pairs else None
            answers(self.golden.frames)
            backend.only_tap()
            memory.release()
            jump = proof.largest_layer_jump(self.checkpoint, self.model, backend, bundle, some[: self.effort.layers])
            found = probe.Probe(agreement, jump, paired.regret)
            noise = max(map(self.logit_noise, target.arithmetic))
            least = math.inf if paired.alike else metrics.decibels(1.0, proof.GOLDEN_MARGIN * noise)
            proof.check(bundle, target, alike, found, least_sqnr=least)
            golden = self.golden.measure(answers, noise)
        record |= proof.record(measured, found, golden)
        return replace(bundle, status=measured.status, parity=record)

    def check_graph(self, name: str, model: onnx.ModelProto) -> None:
        """Check the float graph with fewer tokens that an INT8 artifact is made of, and simulated by.

        Raises:
            ParityError: it does not answer like the reference that follows it, or decides worse.
        """
        some, _ = self.probe_clips(judged=True)
        paired = Following(self.model, ShownGraph(model), roles_of(self.checkpoint.spec))
        expected, found = (np.stack(logits) for logits in zip(*map(paired, some), strict=True))
        proof.check_float_graph(name, expected, found)
        worst, most = paired.regret, following.REGRET[Precision.FP32]
        if worst is None or not worst <= most:
            raise ParityError(
                f"{name}: the regret of the float graph that it is made of is {worst}, at most {most:g} is "
                "expected; nothing was written"
            )

    @contextmanager
    def _witness(self, backend: Backend, bundle: Bundle, built: Built, device: str | None) -> Iterator[Backend | None]:
        """Context manager: the artifact built again to show which tokens leave, where its runtime does not show it."""
        if built.showing is None or self.own is self.answers or following.shows_decisions(backend, bundle):
            yield None
            return
        with tempfile.TemporaryDirectory() as folder:
            again = built.showing(Path(folder), roles_of(bundle.spec).decisions)
            with runtimes.open_bundle(again, device=device) as witness:
                yield witness

    def _check_simulation(
        self,
        bundle: Bundle,
        simulation: onnx.ModelProto,
        clips: Sequence[Frames],
        pairs: Sequence[tuple[Logits, Logits]],
        kind: Arithmetic,
    ) -> dict[str, Any]:
        """Check an INT8 artifact with fewer tokens against its simulation, each with the reference that follows it.

        On the judging clips the two are compared with the trained model, which fewer tokens are far from.

        Args:
            pairs: of the reference and the artifact, for `clips`.
            kind: the arithmetic of the artifact's float part.

        Returns:
            for the manifest: number of clips, and the SQNR of both.

        Raises:
            ParityError: the artifact's error is larger, by more than `int8.SQNR_LOSS`.
        """
        simulated = Following(self.model, ShownGraph(simulation), roles_of(bundle.spec))
        best, found = (metrics.sqnr(*map(np.stack, zip(*both, strict=True))) for both in (map(simulated, clips), pairs))
        expected = int8.Simulation(best).with_noise(self.logit_noise(kind, decided=True)).sqnr
        if not found >= expected - int8.SQNR_LOSS:
            raise ParityError(
                f"{bundle.name} computes something else than what was calibrated: where the same tokens leave, its "
                f"SQNR on {len(clips)} clips is {found:.1f} dB, simulated were {expected:.1f}; nothing was written"
            )
        return {"clips": len(clips), "sqnr": found, "simulated": expected}

    def _paired(self, paired: Paired, answers: Answering) -> Parity:
        """An artifact with fewer tokens, compared with the reference that has as many."""
        pairs = [paired(clip.frames) for clip in self.clips]
        expected, found = (np.stack(logits) for logits in zip(*pairs, strict=True))
        own = replace(self.reference, logits=found, status=answers.status)
        return parity.compare(replace(self.reference, logits=expected), own)

    def prove_image(self, bundle: Bundle, target: Target) -> Bundle:
        """The proof of an artifact that also takes images, on the first frames of the same clips."""
        checkpoint = self.checkpoint.with_clip(1, None)
        images = [replace(clip, frames=clip.frames[:1]) for clip in self.clips]
        part = replace(bundle, spec=checkpoint.spec, contract=checkpoint.contract)
        reference = parity.answer(Reference(checkpoint.model, checkpoint.contract), images, checkpoint.labels)
        with runtimes.open_bundle(part, device=runtimes.proof_device(bundle.target, bundle.backend)) as backend:
            measured = parity.compare(reference, parity.answer(backend, images, checkpoint.labels))
        proof.check(part, target, measured, probe.Probe(), " for images")
        return replace(bundle, parity={**bundle.parity, "image": measured.to_json()})

    def probe_clips(self, judged: bool) -> tuple[list[Frames], list[Frames]]:
        """Clips of the proof, or with `judged` of the judging clips, and these in several orders; see `in_orders`."""
        if judged not in self._probes:
            if judged:
                some = list(islice(self.judging().frames, self.effort.ordered))
            else:
                some = [clip.frames for clip in self.clips if clip.name != "noise"][: self.effort.ordered]
            self._probes[judged] = some, probe.in_orders(some)
        return self._probes[judged]

    def logit_noise(self, kind: Arithmetic, decided: bool = False) -> float:
        """See `edgetube.export.arithmetic.NoiseSimulation`; the noise of float32 is negligible.

        Where tokens leave, it is not, unless it is `decided` which: other tokens may leave, which costs as much as in
        float16, where more of them do.
        """
        if kind == "float32":
            free = self.checkpoint.spec.reduction is not None and not decided
            return self.logit_noise("float16") if free else 0.0
        if (key := (kind, decided)) not in self._logit_noises:
            self.progress(f"simulate {kind}", 0, 1)
            self._logit_noises[key] = self._noise_simulation.logit_noise(kind, decided)
            self.progress(f"simulate {kind}", 1, 1)
        return self._logit_noises[key]

    @cached_property
    def _noise_simulation(self) -> arithmetic.NoiseSimulation:
        module = static.StaticTransformer(self.checkpoint.model, self.checkpoint.contract)
        return arithmetic.NoiseSimulation(module, self.golden.frames)

    def _answers(self, backend: Answering, stage: str) -> parity.Answers:
        labels = self.checkpoint.labels
        return parity.answer(backend, self.clips, labels, stage=stage, total=len(self.clips), progress=self.progress)


class ShownGraph:
    """Shows the tensors of an ONNX graph with batch 1."""

    batch = 1

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model

    def tap(self, names: Sequence[str]) -> Tap:
        """See `edgetube.runtimes.base.Backend.tap`."""
        call, frames = export.evaluator()(graphs.extract_subgraph(self.model, names)), self.model.graph.input[0].name
        return lambda clips: dict(zip(names, call({frames: clips}), strict=True))
