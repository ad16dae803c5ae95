"""Graphs and artifacts of one checkpoint: graphs are traced once, artifacts are built by the targets' exporters."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from edgetube import demo, export
from edgetube.bench import machine
from edgetube.bundle import Bundle
from edgetube.calibration import moments
from edgetube.calibration.moments import StoredMoments
from edgetube.calibration.table import CalibrationTable
from edgetube.export import canonical, memory, static, tokenizer
from edgetube.export.base import BuildContext, Built
from edgetube.export.canonical import Graph
from edgetube.model.checkpoints import Checkpoint
from edgetube.progress import Progress
from edgetube.targets import Target

MOMENT_CLIPS = 8
"""Rendered clips for the input moments of linears, for targets without calibration."""


class Builder:
    """Builds the artifacts of one checkpoint.

    Args:
        batch: clips per call.
    """

    def __init__(self, checkpoint: Checkpoint, batch: int, progress: Progress) -> None:
        self.checkpoint, self.batch, self.progress = checkpoint, batch, progress
        self._folder = tempfile.TemporaryDirectory(prefix="edgetube.")
        self._graphs: dict[tuple[str, bool, int], Graph] = {}
        self._moments: dict[int, StoredMoments] = {}

    @property
    def workspace(self) -> Path:
        """A temporary folder for weights, frames and activations, until `close`."""
        return Path(self._folder.name)

    def close(self) -> None:
        """Forget the graphs, and delete the files of their weights."""
        self._graphs.clear()
        self._folder.cleanup()

    def build(
        self, folder: Path, target: Target, graph: Graph, table: CalibrationTable | None = None
    ) -> tuple[Bundle, Built]:
        """Build the target's artifact in `folder`; the staged bundle, and what the exporter says."""
        self.progress(f"{target.name}: build", 0, 1)
        image = self._image_graph(graph.lowering)
        context = BuildContext(graph, target, folder, table, image, self._input_moments)
        exporter = export.exporter(target.backend)
        built = exporter.build(context)
        if hasattr(exporter, "build_showing"):
            built = replace(built, showing=partial(self._build_showing, context))
        memory.release()
        self.progress(f"{target.name}: build", 1, 1)
        return self._describe(folder, target, built), built

    def _build_showing(self, context: BuildContext, folder: Path, names: Sequence[str]) -> Bundle:
        """The same artifact in another folder, which also returns inner tensors."""
        exporter = export.exporter(context.target.backend)
        bundle = self._describe(folder, context.target, exporter.build_showing(replace(context, folder=folder), names))
        return replace(bundle, build={**bundle.build, "shown": list(names)})

    def build_tokenizer(self, folder: Path, target: Target, lowering: str) -> Bundle:
        """The tubes alone, to time a lowering."""
        graph = self.graph(lowering, tokenizer_only=True)
        built = export.exporter(target.backend).build(BuildContext(graph, target, folder))
        return self._describe(folder, target, built)

    def graph(self, lowering: str, tokenizer_only: bool = False, batch: int | None = None) -> Graph:
        """The canonical graph with a lowering, at the builder's batch or another; or that of its tokenizer alone."""
        batch = batch or self.batch
        if (key := (lowering, tokenizer_only, batch)) not in self._graphs:
            self.progress(f"trace {lowering}", 0, 1)
            checkpoint = self.checkpoint
            if tokenizer_only:
                tubes = tokenizer.StaticTokenizer(checkpoint.model, checkpoint.contract, lowering, batch=batch)
                graph = canonical.trace(tubes, checkpoint.spec, checkpoint.contract, batch)
            else:
                graph = self._trace(checkpoint, lowering, batch)
            self._graphs[key] = graph
            self.progress(f"trace {lowering}", 1, 1)
        return self._graphs[key]

    def _trace(self, checkpoint: Checkpoint, lowering: str, batch: int) -> Graph:
        """The graph of the whole model, for clips or images according to the checkpoint."""
        module = static.StaticTransformer(checkpoint.model, checkpoint.contract, lowering, batch=batch)
        graph = canonical.trace(module, checkpoint.spec, checkpoint.contract, batch, self.workspace)
        return replace(graph, labels=checkpoint.labels)

    def _image_graph(self, lowering: str) -> Callable[[], Graph] | None:
        """A function that traces the graph for one image with the same weights; None if the model takes no images."""
        if self.checkpoint.spec.is_image or not self.checkpoint.spec.accepts_images:
            return None
        return partial(self._trace, self.checkpoint.with_clip(1, None), lowering, self.batch)

    def _input_moments(self, graph: Graph) -> StoredMoments:
        """Input moments of the linears on rendered clips, so that no calibration clips are needed. Computed once."""
        if (frames := graph.spec.frames) not in self._moments:
            clips = [clip.frames for clip in demo.scenes(graph.contract, MOMENT_CLIPS)]
            folder = Path(tempfile.mkdtemp(dir=self.workspace))
            self._moments[frames] = moments.measure(graph.model, graph.roles, clips, export.evaluator(), folder)
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
            batch=self.batch,
            artifact=built.artifact,
            build=built.details,
            checkpoint=checkpoint.record(),
            versions=machine.versions(),
        )
