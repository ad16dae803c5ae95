"""Checkpoint formats, one module each. The folder is the registry: a format is a module with two functions.

::

    NAME: str                                              # for people: "transformers VideoMAE"
    def detect(files: Files) -> bool: ...                  # from names, configuration and the tensors' names
    def read(files: Files, options: ReadOptions) -> Checkpoint: ...

Exactly one format has to recognise a source: formats are never guessed. Third parties add formats by entry points of
the group `edgetube.formats`, whose values are such modules. `reading` holds what formats share.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import entry_points
from itertools import product
from pathlib import Path
from typing import Any, Protocol, cast

from edgetube import demo
from edgetube.bundle import READ_OPTIONS, Bundle
from edgetube.errors import CheckpointError, InputError, SpecError
from edgetube.formats.reading import licence, onnx_files, report, tensors
from edgetube.formats.reading.files import CONFIG, PATHS, Files, ReadOptions
from edgetube.model import checkpoints
from edgetube.model.checkpoints import Checkpoint

GROUP = "edgetube.formats"
"""Entry points of third parties' formats."""

SHARED = frozenset({"reading"})


class Format(Protocol):
    """A module of this folder."""

    NAME: str

    def detect(self, files: Files) -> bool:
        """Whether the files are of this format, by their names, configuration and keys."""

    def read(self, files: Files, options: ReadOptions) -> Checkpoint:
        """The model.

        Raises:
            CheckpointError: the files are damaged, incomplete or of a model that this format cannot express.
            SpecError: the model's geometry is impossible.
        """


def names() -> tuple[str, ...]:
    """Names of the built-in formats: the modules of this folder."""
    return tuple(sorted({module.name for module in pkgutil.iter_modules(__path__)} - SHARED))


def formats() -> Iterator[Format]:
    """All formats, third parties' last."""
    for name in names():
        yield cast(Format, importlib.import_module(f"{__name__}.{name}"))
    for found in entry_points(group=GROUP):
        yield cast(Format, found.load())


def load(source: str | Path = "demo", options: ReadOptions | None = None) -> Checkpoint:
    """Read a checkpoint: `demo`, `random:NAME` (see `edgetube.spec.SIZES`), or a file or folder of any format.

    Raises:
        InputError: there is nothing at `source`, or an option does not apply to it.
        CheckpointError: no format recognises it, or the one that does finds it damaged or incomplete.
        SpecError: the architecture's name is unknown, or the model's geometry is impossible.
    """
    options = options or ReadOptions()
    if demo.is_built_in(source):
        options.allow()
        return checkpoints.load(source)
    files = Files(Path(source), options)
    found = _recognising(files)
    if len(found) > 1:
        raise CheckpointError(
            f"{files.path} could be {' or '.join(one.NAME for one in found)}; give the folder or file of one model"
        )
    if not found:
        if not files.is_folder and (files.path.parent / CONFIG).is_file():
            raise CheckpointError(f"{files.path} lies beside a {CONFIG} that belongs to it; give the folder of both")
        known = ", ".join(one.NAME for one in formats())
        raise CheckpointError(f"{files.path} is no checkpoint that edgetube knows: {files.summary()}; it reads {known}")
    try:
        checkpoint = found[0].read(files, options)
    except SpecError as error:
        raise SpecError(f"{files.path}: {error}") from error
    if options.pool_frames is not None:
        checkpoint = checkpoint.over_frames()
    return replace(
        checkpoint,
        source=str(files.path),
        digest=files.digest_with(options),
        format=found[0].NAME,
        options=options.to_json(),
        notes=(*checkpoint.notes, *licence.notes(checkpoint.licence)),
    )


def _recognising(files: Files) -> list[Format]:
    """The formats that recognise the files.

    Raises:
        CheckpointError: none does, and the tensors, which some asked for, cannot be read.
    """
    found, error = [], None
    for one in formats():
        try:
            found += [one] if one.detect(files) else []
        except CheckpointError as failed:
            error = error or failed
    if error is not None and not found:
        raise error
    return found


def examine(source: str | Path, options: ReadOptions | None = None) -> dict[str, Any]:
    """The document of `edgetube inspect CHECKPOINT`; its `error` says why a checkpoint could not be read.

    Raises:
        InputError: there is nothing at `source`, or an option does not apply to it.
    """
    options = options or ReadOptions()
    try:
        return report.document(load(source, options))
    except (CheckpointError, SpecError) as error:
        return report.refusal(source, options, error)


def of_bundle(bundle: Bundle) -> Checkpoint:
    """The checkpoint that a bundle was made from, with its clip shape, classifier, tubes and reduction of tokens.

    Raises:
        CheckpointError: it, or a file that it was read with, was moved, deleted or changed.
    """
    checkpoint, beside = trained(bundle), _beside(bundle)
    try:
        found = checkpoint.with_clip(bundle.spec.frames, bundle.spec.size, bundle.spec.chosen)
    except SpecError as error:
        held = _with(bundle, beside)
        raise CheckpointError(f"{bundle.path} was made from another model than {held} holds: {error}") from error
    found = found.reduced(bundle.spec.reduction)
    if beside and (found.spec, found.contract, found.labels) != (bundle.spec, bundle.contract, bundle.labels):
        raise CheckpointError(
            f"{bundle.path} was made from another model than {_with(bundle, beside)} says now; export it again"
        )
    return found


def trained(bundle: Bundle) -> Checkpoint:
    """The checkpoint that a bundle was made from, with its classifier, at its own clip shape and with all tokens.

    Raises:
        CheckpointError: it, or a file that it was read with, was moved, deleted or changed.
    """
    source, digest, beside = bundle.checkpoint["source"], bundle.checkpoint["sha256"], _beside(bundle)
    remedy = f"give --checkpoint FILE_OR_FOLDER with the file whose sha256 is {digest[:16]}..., or export it again"
    if gone := [said for said, path in beside.items() if not Path(path).exists()]:
        raise CheckpointError(
            f"{bundle.path} was made with {gone[0]}, which is not there; give --checkpoint FOLDER with the checkpoint "
            "and it, or export it again"
        )
    try:
        checkpoint = load(source, _options(bundle))
    except InputError as error:
        raise CheckpointError(
            f"{bundle.path} was made from the checkpoint {source or 'of a program'}, which is not there; {remedy}"
        ) from error
    if checkpoint.digest != digest:
        held = _with(bundle, beside)
        raise CheckpointError(f"{bundle.path} was made from other weights than {held} holds now; {remedy}")
    return checkpoint.select(bundle.spec.classifiers[0][0])


def _beside(bundle: Bundle) -> dict[str, str]:
    """The files that the checkpoint was read with, by how they are given."""
    options = _options(bundle)
    return {f"--{name.replace('_', '-')} {path}": path for name in PATHS if (path := getattr(options, name))}


def _with(bundle: Bundle, beside: Mapping[str, str]) -> str:
    return " with ".join([bundle.checkpoint["source"], *beside])


def _options(bundle: Bundle) -> ReadOptions:
    return ReadOptions.from_json({key: value for key, value in bundle.checkpoint.items() if key in READ_OPTIONS})


def locate(bundle: Bundle, where: str | Path) -> Bundle:
    """The bundle with its checkpoint found at `where`: a file, or a folder in which files and folders are hashed.

    A checkpoint is identified by its sha256, not by its name. What it was read with (an adapter, text features, labels)
    may be in the folder, too, under the name that it had.

    Raises:
        CheckpointError: it was not found.
    """
    where, digest = Path(where).absolute(), bundle.checkpoint["sha256"]
    candidates, choices = _candidates(where), list(_moved(_options(bundle), where))
    for files in (Files(place) for place in candidates if place.exists()):
        for options in choices:
            if _digest(files, options) == digest:
                found: Mapping[str, str] = {**bundle.checkpoint, **options.to_json(), "source": str(files.path)}
                return replace(bundle, checkpoint=found)
    raise CheckpointError(
        f"the checkpoint of {bundle.path} (sha256 {digest[:16]}...) is not at {where}: {len(candidates)} checkpoints "
        "were looked at"
    )


def _candidates(where: Path) -> list[Path]:
    """Files of weights at or below `where`, and the folders that hold them."""
    if not where.is_dir():
        return [where]
    files = sorted(path for path in where.rglob("*") if path.suffix in (*tensors.SUFFIXES, onnx_files.SUFFIX))
    return [*files, *dict.fromkeys(path.parent for path in files)]


def _digest(files: Files, options: ReadOptions) -> str:
    """See `Files.digest_with`; empty where no checkpoint is, such as in the folder of an adapter."""
    try:
        return files.digest_with(options)
    except (CheckpointError, InputError):
        return ""


def _moved(options: ReadOptions, where: Path) -> Iterator[ReadOptions]:
    """The options with every choice of what lies below `where` under the name of what is no longer at its place."""
    gone = [name for name in PATHS if (path := getattr(options, name)) and not Path(path).exists()]
    places = [sorted(where.rglob(Path(getattr(options, name)).name)) if where.is_dir() else [] for name in gone]
    for chosen in product(*places):
        found: dict[str, Any] = dict(zip(gone, map(str, chosen), strict=True))
        yield replace(options, **found)
