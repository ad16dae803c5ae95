"""Exports the operating points of `edgetube.bench.sweep`, and publishes those that are chosen.

The bundles of all points are kept in a hidden folder of the destination, one folder for each clip shape, with the
calibration that INT8 of all numbers of tokens shares. A sweep that is run again takes those for which nothing changed,
and does not try again what failed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from edgetube import bundle as bundles
from edgetube import export, runtimes
from edgetube.bench import machine
from edgetube.bench import sweep as searching
from edgetube.bench.answer_cache import AnswerCache, clip_key
from edgetube.bench.sweep import Point, Rule
from edgetube.bench.workers import Runner, here
from edgetube.bundle import Bundle
from edgetube.datasets import ClipSet
from edgetube.errors import (
    BackendError,
    BundleError,
    EdgetubeError,
    InputError,
    MissingPackageError,
    ParityError,
    SpecError,
)
from edgetube.export import int8
from edgetube.export.lowering import Lowerings, lowered_as
from edgetube.export.pipeline import ExportSession, Options, check_needs, check_reduction
from edgetube.files import atomic_write
from edgetube.model.checkpoints import Checkpoint
from edgetube.progress import Progress, silent
from edgetube.spec import ModelSpec
from edgetube.targets import Target

KEPT = ".sweep"
"""The folder of the bundles of all points, in the destination."""


@dataclass(frozen=True)
class PointExporter:
    """Exports points of one checkpoint.

    Attributes:
        checkpoint: as it was trained.
        out: the destination.
        options: of every export, besides clip and tokens.
        lowerings: what was chosen for each folder of bundles: the tubes are the same for any number of tokens.
    """

    checkpoint: Checkpoint
    out: Path
    options: Options
    progress: Progress = silent
    lowerings: dict[Path, Lowerings] = field(default_factory=dict)

    def __call__(self, points: Sequence[Point]) -> Iterator[tuple[Point, Bundle | str]]:
        """Each point with its bundle, or with the reason that there is none.

        Points of one model share its graphs and reference answers; of each, float targets come first.
        """
        order = {point.spec: index for index, point in reversed(list(enumerate(points)))}
        groups = groupby(sorted(points, key=lambda point: order[point.spec]), key=lambda point: point.spec)
        for spec, group in groups:
            if spec is not None:
                yield from self._model(spec, list(group))

    def _model(self, spec: ModelSpec, points: list[Point]) -> Iterator[tuple[Point, Bundle | str]]:
        """All points of one model."""
        made: dict[str, Bundle | str] = {}
        try:
            checkpoint = self.checkpoint.with_clip(spec.frames, spec.clip[1:], spec.chosen).reduced(spec.reduction)
        except EdgetubeError as error:
            yield from ((point, str(error)) for point in points)
            return
        shape = ("x".join(map(str, spec.clip)), spec.tubes_label(self.checkpoint.spec))
        folder = self.out / KEPT / "-".join(filter(None, shape))
        targets = {point.target: export.target(point.target) for point in points}
        settings = self.options.settings
        for name, target in targets.items():
            known = {one.name for one in target.settings}
            targets[name] = target.choose({key: value for key, value in settings.items() if key in known})
        chosen = sorted(targets.values(), key=lambda target: target.precision.quantises_activations)
        lowerings = self.lowerings.setdefault(folder, {})
        session: ExportSession | None = None
        try:
            for target in chosen:
                path, key = folder / f"{checkpoint.label}.{target.name}", None
                try:
                    check_needs(target)
                    check_reduction(checkpoint, [target])
                    key = self._key(checkpoint, target)
                    found = _kept(path, key)
                    if found is None:
                        session = session or ExportSession(checkpoint, self.options, self.progress, lowerings)
                        found = session.export(target, folder)
                        _remember(path, key)
                    elif isinstance(found, Bundle):
                        lowerings.setdefault(lowered_as(target).name, found.build["lowering"])
                    made[target.name] = found
                except EdgetubeError as error:
                    made[target.name] = str(error)
                    if key is not None and isinstance(error, LASTING):
                        _remember(path, key, str(error))
        finally:
            if session is not None:
                session.close()
        yield from ((point, made[point.target]) for point in points)

    def _key(self, checkpoint: Checkpoint, target: Target) -> str:
        """A digest of all that the bundle depends on."""
        options = asdict(self.options)
        about: list[Any] = [
            checkpoint.record(), checkpoint.spec.to_json(), checkpoint.contract.to_json(), list(checkpoint.labels),
            target.name, dict(target.chosen), {key: options[key] for key in ("batch", "lowering")},
            machine.versions(), machine.processor(),
            runtimes.proof_device(target.name, target.backend), target.missing(target.run_needs),
        ]  # fmt: skip
        if target.precision.quantises_activations:
            about.append(self.options.max_drop)
            for source in int8.sources(checkpoint.trained, self.options.calib):
                about.append([[clip_key(item, checkpoint.contract), item.label] for item in source.items])
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


LASTING = (BackendError, InputError, ParityError, SpecError)
"""Errors of an export that it ends with again, as long as nothing that its key is made of changes."""


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _remember(path: Path, key: str, failed: str = "") -> None:
    """Note what the export to `path` was made from, or why it failed."""
    record = {"key": key} | ({"failed": failed} if failed else {})
    _record(path).parent.mkdir(parents=True, exist_ok=True)
    atomic_write(_record(path), json.dumps(record) + "\n")


def _kept(path: Path, key: str) -> Bundle | str | None:
    """The bundle of an earlier sweep, or why there was none, if that was made from the same."""
    try:
        record = json.loads(_record(path).read_text("utf-8"))
        if record["key"] != key:
            return None
        if failed := record.get("failed"):
            return f"{failed} (an earlier sweep found that; delete {_record(path)} to try again)"
        return bundles.load(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, BundleError):
        return None


def publish(chosen: Iterable[Bundle], out: Path) -> list[Bundle]:
    """Copy proven bundles to the destination, each once; if several have one name, each gets a folder."""
    found = list({bundle.path: bundle for bundle in chosen}.values())
    names = [bundle.name for bundle in found]
    made = []
    for bundle in found:
        folder = out if names.count(bundle.name) == 1 else out / bundle.path.parent.name
        with bundles.staging(folder / bundle.name) as staged:
            shutil.copytree(bundle.path, staged, dirs_exist_ok=True)
        made.append(bundles.load(folder / bundle.name))
    return made


@dataclass(frozen=True)
class Swept:
    """What a sweep left.

    Attributes:
        document: see `edgetube sweep --json`.
        kept: the bundles of the winner, or of the front where none was asked for.
        files: the document and its picture.
        notes: for the user.
    """

    document: dict[str, Any]
    kept: list[Bundle]
    files: list[Path]
    notes: list[str]


def sweep(
    checkpoint: Checkpoint,
    points: Sequence[Point],
    source: ClipSet,
    rule: Rule,
    out: Path,
    options: Options | None = None,
    measuring: searching.Options | None = None,
    resume: Path | None = None,
    progress: Progress = silent,
    runner: Runner = here,
    reach: searching.Reach = searching.here,
) -> Swept:
    """Find the operating point that a rule asks for, and leave its bundle, `sweep.json` and `sweep.svg` in `out`.

    Args:
        checkpoint: as it was trained.
        points: see `edgetube.bench.sweep.grid`.
        options: of the exports; clip and tokens are the points'.
        resume: where answers are kept; a file in the hidden folder of `out` by default.
        runner: in which processes the clips are answered; the exports are in this one.
        reach: where the points are timed, and answer.

    Raises:
        InputError: clips that cannot be used.
        DeviceError: another machine cannot be reached; run again, the sweep goes on from where it was.
        BundleError: `out` cannot be written.
    """
    source = searching.prepared(source, points, checkpoint)
    (out / KEPT).mkdir(parents=True, exist_ok=True)
    make = PointExporter(checkpoint, out, options or Options(), progress)
    with AnswerCache(resume or out / KEPT / "answers.sqlite") as cache:
        document, made = searching.run(
            points, make, source, checkpoint, rule, cache, measuring, progress, runner, reach
        )
    names = [document["winner"]] if document["winner"] else [] if rule.limited else document["front"]
    kept = publish([made[name] for name in names], out)
    document["kept"] = [str(bundle.path) for bundle in kept]
    files, notes = [atomic_write(out / "sweep.json", json.dumps(document, indent=2) + "\n")], []
    try:
        files.append(atomic_write(out / "sweep.svg", searching.picture(document)))
    except (InputError, MissingPackageError) as error:
        notes.append(f"without sweep.svg: {error}")
    return Swept(document, kept, files, notes)
