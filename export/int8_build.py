"""Builds INT8 artifacts: calibrated, then compared with their simulation and with the runtime's float artifact."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgetube import bundle as bundles
from edgetube import calibration, export, metrics, processes, runtimes
from edgetube.bench import machine
from edgetube.bundle import Bundle
from edgetube.calibration import Calibrated, graphs, search
from edgetube.calibration.clips import Clips, collect
from edgetube.calibration.table import ActivationScheme, IntegerFormat, Range, ScaleType
from edgetube.export import int8, proof, quantize
from edgetube.export.base import Built
from edgetube.export.build import Builder
from edgetube.export.canonical import Graph
from edgetube.export.int8 import Simulation
from edgetube.export.prover import Prover
from edgetube.runtimes.base import Backend, Logits
from edgetube.targets import Target

WIDE: ActivationScheme = "uint16"
"""The scheme of `CalibrationRequest.wide`."""


class Int8Builder:
    """Builds the INT8 artifacts of one checkpoint; clips are read once, and each scheme is calibrated once.

    Args:
        given: the user's calibration clips, see `edgetube.export.int8.sources`.
        max_drop: points of accuracy that may be lost; None for the default.

    A model with fewer tokens takes the calibration of the one with all: it has the same linears, its tokens are means
    or a part of the same, and the calibration is shared by all numbers of tokens.
    """

    def __init__(self, builder: Builder, given: Path | None, max_drop: float | None) -> None:
        self.builder, self.given, self.max_drop = builder, given, max_drop
        self.checkpoint, self.progress = builder.checkpoint, builder.progress
        reduced = self.checkpoint.spec.reduction is not None
        self.trained = Builder(self.checkpoint.trained, 1, self.progress) if reduced else builder
        self._calibrations: dict[tuple[ActivationScheme, IntegerFormat], Calibrated] = {}

    def close(self) -> None:
        """Forget the calibrations, whose arrays are in the builder's folder."""
        self._calibrations.clear()
        self.trained.close()

    def build(self, folder: Path, target: Target, graph: Graph, prover: Prover) -> tuple[Bundle, Built]:
        """Calibrate, build, and compare with the float artifact of the same runtime."""
        request = int8.calibration_request(graph, target)  # raises on impossible settings before the long calibration
        calibrated = self._calibrate(target, folder.parent)
        some, _ = prover.probe_clips(judged=True)
        answers = prover.answers(np.stack(some))
        proof.check_float_graph(target.name, answers, calibrated.budget.logits[: len(some)])
        if self.trained is not self.builder:
            prover.check_graph(target.name, self.builder.graph("gather", batch=1).model)
        equalised, table = quantize.apply(calibrated, graph)
        scales = int8.integer_format(target).dtype
        observed = {
            **self._observe(request.tensors, calibrated, scales, table.activations),
            **{
                name: replace(found, scheme=WIDE)
                for name, found in self._observe(request.wide, calibrated, scales, WIDE).items()
            },
        }
        table = replace(table, ranges={**table.ranges, **observed})
        if request.clips:
            np.save(folder / bundles.CALIBRATION_CLIPS, self.clips[0].first(request.clips))
        bundle, built = self.builder.build(folder, target, equalised, table)
        if self.trained is not self.builder:
            built = replace(built, simulation=self._simulation(target, calibrated, observed))
        unread = {name: why for clips in self.clips for name, why in clips.unread.items()}
        report = {**calibrated.report, "notes": [*calibrated.report["notes"], *built.notes], "unread": unread}
        if built.table:
            report["fallbacks"] = {plan.name: plan.reason for plan in built.table.linears if plan.precision == "float"}
        work = sum(graphs.macs(self.builder.graph("gather", batch=1).model).values())
        report["macs_share"] = built.integer_macs / (self.builder.batch * work)

        simulator = runtimes.simulated(target.backend)
        if simulator and self.max_drop is None:  # a given budget needs all clips
            calibrated = replace(calibrated, budget=calibrated.budget.first(int8.SIMULATED_CLIPS))

        def expected(backend: Backend) -> Simulation:
            simulated = self._simulated(target, calibrated, observed, built.simulation)
            return simulated.with_noise(prover.logit_noise(backend.arithmetic))

        device = runtimes.proof_device(target.name, target.backend)
        if device == runtimes.EMULATED or simulator:
            with runtimes.open_bundle(bundle, device=device) as backend:
                candidate = int8.Candidate(bundle, backend)
                alternative = int8.float_baseline(target).name
                report |= int8.check_accuracy(calibrated, expected(backend), candidate, alternative, self.progress)
                report |= {"simulator": True} if simulator else {}
        elif not target.missing(target.run_needs):
            report |= self._measure(calibrated, expected, bundle, target, graph)
        (built.table or table).save(folder / bundles.CALIBRATION)
        return replace(bundle, build={**bundle.build, "int8": {"summary": int8.summary(report), **report}}), built

    def _simulated(
        self, target: Target, calibrated: Calibrated, further: Mapping[str, Range], model: onnx.ModelProto | None
    ) -> Simulation:
        """A target's Q/DQ graph, on the clips that calibration judged.

        Calibration simulated the linears on them; the graph is simulated again where a target quantises further
        tensors, has a graph of its own or fewer tokens, or has a budget of fewer clips.

        Args:
            model: that graph, where it was made already.
        """
        quantized, budget = int8.quantized_graph(target), calibrated.budget
        judged, same = calibrated.report["judged"], self.trained is self.builder
        whole = judged["clips"] + judged["certain"] == len(budget.clips)
        if not further and quantized is None and same and whole:
            return Simulation(float(judged["sqnr"]))
        model = self._simulation(target, calibrated, further) if model is None else model
        some = budget.order[: int8.simulated_clips(calibrated)]
        logits = search.compute_logits(model, budget.clips, export.evaluator(), "simulate", self.progress, some)
        exact = budget.logits[some]
        if same:
            return Simulation(metrics.sqnr(exact, logits))
        cosine = min(int8.MIN_COSINE, metrics.cosine(exact, logits) - int8.COSINE_LOSS)
        return Simulation(metrics.sqnr(exact, logits), cosine, len(some))

    def _simulation(self, target: Target, calibrated: Calibrated, further: Mapping[str, Range]) -> onnx.ModelProto:
        """A target's Q/DQ graph at batch 1."""
        quantized = int8.quantized_graph(target)
        plain, table = quantize.apply(calibrated, self.builder.graph("gather", batch=1))
        table = replace(table, ranges={**table.ranges, **further})
        return quantize.qdq(plain.model, table) if quantized is None else quantized(plain.model, table, target)

    def _measure(
        self,
        calibrated: Calibrated,
        expected: Callable[[Backend], Simulation],
        bundle: Bundle,
        target: Target,
        graph: Graph,
    ) -> dict[str, Any]:
        baseline = int8.float_baseline(target)
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            plain, _ = self.builder.build(Path(folder), baseline, graph)
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
            return int8.measure(calibrated, expected(first.backend), first, second, self.progress)

    def _calibrate(self, target: Target, out: Path) -> Calibrated:
        """The calibration under a target's scheme: of the `gather` graph at batch 1, for every lowering and batch.

        It is cached in a hidden folder of `out` for later exports of the same clip shape.
        """
        activations, form = key = int8.activation_scheme(target), int8.integer_format(target)
        if key not in self._calibrations:
            folder, graph = self.builder.workspace, self.trained.graph("gather", batch=1)
            statistics, judged = self.clips
            clip = "x".join(map(str, self.checkpoint.spec.clip))
            self._calibrations[key] = calibration.calibrate(
                graph.model,
                graph.roles,
                statistics,
                judged,
                export.evaluator(),
                activations=activations,
                form=form,
                workspace=folder,
                max_drop=self.max_drop,
                cache=out / ".calibration" / f"{self.trained.checkpoint.label}.{clip}.{activations}.{form.dtype}",
                versions=machine.versions(),
                float_logits=self._float_logits,
                progress=self.progress,
            )
        return self._calibrations[key]

    @cached_property
    def _float_logits(self) -> Logits:
        """The float graph's answers to the judging clips (N, classes), for every scheme."""
        graph, clips = self.trained.graph("gather", batch=1), self.clips[1]
        return search.compute_logits(graph.model, clips, export.evaluator(), "float answers", self.progress)

    def _observe(
        self, tensors: Sequence[str], calibrated: Calibrated, scales: ScaleType, scheme: ActivationScheme
    ) -> dict[str, Range]:
        """The ranges of further tensors in the calibrated float graph; tensors that only other lowerings have are
        left out."""
        if not tensors:
            return {}
        plain, _ = quantize.apply(calibrated, self.builder.graph("gather", batch=1))
        made = {name for node in plain.model.graph.node for name in node.output}
        chosen = [name for name in tensors if name in made]
        clips, _ = self.clips
        return calibration.observe(plain.model, chosen, clips, export.evaluator(), scheme, self.progress, scales)

    @cached_property
    def clips(self) -> tuple[Clips, Clips]:
        """The calibration clips and the judging clips; read once."""
        folder, checkpoint = self.builder.workspace, self.trained.checkpoint
        statistics, judged = (
            collect(
                source,
                checkpoint.contract,
                checkpoint.labels,
                folder,
                workers=processes.workers(),
                keep=True,
                progress=self.progress,
            )
            for source in int8.sources(checkpoint, self.given)
        )
        return statistics, judged
