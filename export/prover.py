"""Runs the proof of staged artifacts: the reference answers once, every artifact of the export is compared with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from itertools import islice

from edgetube import runtimes
from edgetube.bench import parity
from edgetube.bench.probe import Probe
from edgetube.bench.remembering import Answering, Remembering
from edgetube.bundle import Bundle
from edgetube.calibration.clips import Clips
from edgetube.export import arithmetic, memory, proof, static
from edgetube.model.checkpoints import Checkpoint
from edgetube.progress import Progress
from edgetube.runtimes.torch import Reference
from edgetube.targets import Arithmetic, Target
from edgetube.video import Frames


class Prover:
    """The proof of one checkpoint's artifacts.

    Args:
        judging: reads the judging clips of int8 targets.

    Attributes:
        clips: of the proof.
        model: the reference.
        answers: the reference, which answers each clip once.
        golden: clips and the reference's answers, for every bundle.
    """

    def __init__(self, checkpoint: Checkpoint, judging: Callable[[], Clips], progress: Progress) -> None:
        self.checkpoint, self.judging, self.progress = checkpoint, judging, progress
        self.effort = proof.Effort.of(checkpoint.spec)
        self.clips = proof.clips(checkpoint, self.effort.clips)
        self.model = Reference(checkpoint.model, checkpoint.contract)
        self.answers = Remembering(self.model)
        self.reference = self._answers(self.answers, "reference answers")
        golden = proof.golden_clips(self.clips, self.effort.ordered)
        self.golden = proof.Golden(golden, self.answers(golden))
        self._logit_noises: dict[Arithmetic, float] = {}
        self._probes: dict[bool, tuple[list[Frames], proof.FrameOrderProbe]] = {}

    def prove(self, bundle: Bundle, target: Target) -> Bundle:
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
            agreement = ordered.agreement(answers)
            answers(self.golden.frames)
            backend.only_tap()
            memory.release()
            jump = proof.largest_layer_jump(self.checkpoint, self.model, backend, bundle, some[: self.effort.layers])
            found = Probe(agreement, jump)
            proof.check(bundle, target, measured, found)
            golden = self.golden.measure(answers, max(map(self.logit_noise, target.arithmetic)))
        return replace(bundle, status=measured.status, parity=proof.record(measured, found, golden))

    def prove_image(self, bundle: Bundle, target: Target) -> Bundle:
        """The proof of an artifact that also takes images, on the first frames of the same clips."""
        checkpoint = self.checkpoint.with_clip(1, None)
        images = [replace(clip, frames=clip.frames[:1]) for clip in self.clips]
        part = replace(bundle, spec=checkpoint.spec, contract=checkpoint.contract)
        reference = parity.answer(Reference(checkpoint.model, checkpoint.contract), images, checkpoint.labels)
        with runtimes.open_bundle(part, device=runtimes.proof_device(bundle.target, bundle.backend)) as backend:
            measured = parity.compare(reference, parity.answer(backend, images, checkpoint.labels))
        proof.check(part, target, measured, Probe(), " for images")
        return replace(bundle, parity={**bundle.parity, "image": measured.to_json()})

    def probe_clips(self, judged: bool) -> tuple[list[Frames], proof.FrameOrderProbe]:
        """Clips for frame order and layer errors: of the proof, or with `judged` some of the judging clips."""
        if judged not in self._probes:
            if judged:
                some = list(islice(self.judging().frames, self.effort.ordered))
            else:
                some = [clip.frames for clip in self.clips if clip.name != "noise"][: self.effort.ordered]
            self._probes[judged] = some, proof.FrameOrderProbe.of(self.answers, some)
        return self._probes[judged]

    def logit_noise(self, kind: Arithmetic) -> float:
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
        module = static.StaticTransformer(self.checkpoint.model, self.checkpoint.contract)
        return arithmetic.NoiseSimulation(module, self.golden.frames)

    def _answers(self, backend: Answering, stage: str) -> parity.Answers:
        labels = self.checkpoint.labels
        return parity.answer(backend, self.clips, labels, stage=stage, total=len(self.clips), progress=self.progress)
