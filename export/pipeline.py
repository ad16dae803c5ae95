"""The export pipeline: from a checkpoint to a verified bundle.

checkpoint -> static rewrite -> canonical ONNX -> the target's own artifact -> proof against the reference -> bundle.
A bundle is built in a hidden folder beside its destination and published only when the proof holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from typing_extensions import Self

from edgetube import bundle as bundles
from edgetube import export, formats, reduction, tubesets
from edgetube import targets as targeting
from edgetube.bundle import Bundle
from edgetube.errors import EdgetubeError, InputError, MissingPackageError
from edgetube.export import int8, tokenizer
from edgetube.export.build import Builder
from edgetube.export.int8_build import Int8Builder
from edgetube.export.lowering import LoweringChoice, Lowerings
from edgetube.export.prover import Prover
from edgetube.formats.reading.files import ReadOptions
from edgetube.model.checkpoints import Checkpoint
from edgetube.progress import Progress, silent
from edgetube.reduction import Kind
from edgetube.targets import Target


@dataclass(frozen=True)
class Options:
    """User options of an export, besides checkpoint and target.

    Attributes:
        frames, size: of the clip, (height, width); the checkpoint's own by default.
        tubes: which of the model's tubes make tokens, see `edgetube.tubesets.parse`; as it was trained by default.
        keep_tokens: the tokens that are left in the end, see `edgetube.reduction.parse`; all by default.
        reduce: how the others leave.
        image: export the image model (the 2-D tube alone) instead of the video model.
        batch: clips per call, static in the artifact.
        head: name of the classifier; the first one by default.
        lowering: force one of `tokenizer.LOWERINGS` instead of timing them.
        calib: calibration clips of INT8 targets, see `edgetube.datasets.load`; the built-in ones by default.
        max_drop: points of top-1 accuracy that INT8 may lose (of agreement, where clips have no labels).
        settings: of the target, by name; `edgetube targets --json` lists them.
    """

    frames: int | None = None
    size: tuple[int, int] | None = None
    tubes: str | None = None
    keep_tokens: str | None = None
    reduce: Kind = "merge"
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
        if self.lowering not in (None, *tokenizer.LOWERINGS):
            raise InputError(f"no lowering is called {self.lowering!r}; there are {', '.join(tokenizer.LOWERINGS)}")
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
    refused: Callable[[str, EdgetubeError], object] | None = None,
) -> Iterator[Bundle]:
    """Export one checkpoint to several targets, with common graphs and calibrations; see `export_model`.

    Args:
        refused: is told the name of a target whose export ends with an error, and the error; the others go on. Without
            it the first such error is raised. What concerns all targets is always raised.
    """
    options = options or Options()
    chosen = targeting.choose([export.target(name) for name in targets], options.settings)
    for target in chosen:
        check_needs(target)
    progress("load checkpoint", 0, 1)
    loaded = checkpoint if isinstance(checkpoint, Checkpoint) else formats.load(checkpoint, read)
    if options.head:
        loaded = loaded.select(options.head)
    tubes = None if options.tubes is None else tubesets.parse(options.tubes, loaded.spec)
    loaded = loaded.with_clip(1 if options.image else options.frames, options.size, tubes)
    if options.keep_tokens is not None:
        spec = loaded.spec
        loaded = loaded.reduced(reduction.parse(options.keep_tokens, options.reduce, spec.tokens, spec.depth))
    check_reduction(loaded, chosen)
    progress("load checkpoint", 1, 1)
    if any(target.precision.quantises_activations for target in chosen):
        int8.sources(loaded.trained, options.calib)
    with ExportSession(loaded, options, progress) as session:
        for target in chosen:
            try:
                bundle = session.export(target, Path(out))
            except EdgetubeError as error:
                if refused is None:
                    raise
                refused(target.name, error)
            else:
                yield bundle


def check_needs(target: Target) -> None:
    """Check that a target can be built here.

    Raises:
        MissingPackageError: it cannot; says what is missing.
    """
    if missing := target.missing(target.build_needs):
        hint = f"; install with: {target.remedy}" if target.remedy else ", which is not here"
        raise MissingPackageError(f"{target.name} needs {', '.join(missing)}{hint}")


def check_reduction(checkpoint: Checkpoint, chosen: Sequence[Target]) -> None:
    """Check that all of the targets can have as few tokens as the model.

    Raises:
        InputError: one cannot; says why, and which targets can.
    """
    found = checkpoint.spec.reduction
    if found is None:
        return
    for target in chosen:
        if target.all_tokens:
            able = ", ".join(each.name for each in export.targets().values() if not each.all_tokens)
            raise InputError(f"{target.name} cannot {found.kind} tokens: {target.all_tokens}; use {able}")


class ExportSession:
    """Exports one checkpoint to any number of targets; graphs, calibrations and reference answers are computed once.

    Args:
        lowerings: what was chosen for the same tubes and clip before; new choices are added.
    """

    def __init__(
        self, checkpoint: Checkpoint, options: Options, progress: Progress, lowerings: Lowerings | None = None
    ) -> None:
        self.checkpoint = checkpoint
        with ExitStack() as undo:
            self.builder = Builder(checkpoint, options.batch, progress)
            undo.callback(self.builder.close)
            self.prover = Prover(checkpoint, lambda: self.int8.clips[1], progress)
            shown = np.stack([clip.frames for clip in self.prover.clips[:2]])
            self.lowerings = LoweringChoice(self.builder, shown, options.lowering, lowerings)
            self.int8 = Int8Builder(self.builder, options.calib, options.max_drop)
            undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free graphs and calibrations."""
        self.int8.close()
        self.builder.close()

    def export(self, target: Target, out: Path) -> Bundle:
        """Build, verify and publish one bundle."""
        destination = out / f"{self.checkpoint.label}.{target.name}"
        with bundles.staging(destination) as folder:
            lowering = self.lowerings.choose(target)
            graph = self.builder.graph(lowering["chosen"])
            if target.precision.quantises_activations:
                bundle, built = self.int8.build(folder, target, graph, self.prover)
            else:
                bundle, built = self.builder.build(folder, target, graph)
            told = {"lowering": lowering, **({"notes": list(notes)} if (notes := self.checkpoint.notes) else {})}
            bundle = replace(bundle, name=destination.name, build={**told, **bundle.build})
            bundle = self.prover.prove(bundle, target, built)
            bundle = self.prover.prove_image(bundle, target) if built.image else bundle
            if built.deferred and bundle.status != "executed":
                bundle = replace(bundle, status="deferred")
            bundles.save_golden(bundle, self.prover.golden.frames, self.prover.golden.logits)
            bundles.seal(bundle)
        return bundles.load(destination)
