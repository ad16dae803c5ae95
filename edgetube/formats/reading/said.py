"""What a user says about a checkpoint in the file of `--spec`, and the labels: what weights cannot tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from edgetube import strict
from edgetube.bundle import parse_labels
from edgetube.contract import LARGEST, InputContract
from edgetube.errors import CheckpointError, FormatError, InputError, SpecError
from edgetube.formats.reading.files import ReadOptions

MODEL = ("frames", "size", "heads", "pool_heads", "activation", "norm_eps")
"""Fields of the model that a user may say."""

INPUT = tuple(f.name for f in fields(InputContract))


@dataclass(frozen=True)
class Said:
    """The contents of the file of `--spec`.

    Attributes:
        model: fields of the model, some of `MODEL`.
        input: fields of the input contract.
        path: of the file; empty without one.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    input: Mapping[str, Any] = field(default_factory=dict)
    path: str = ""

    @classmethod
    def of(cls, options: ReadOptions, *model: str) -> Said:
        """The file of the options; empty without one.

        Args:
            model: fields of the model that the format takes from the user; the others are in its own files.

        Raises:
            InputError: it cannot be read, or has unknown fields or fields that the format does not take.
        """
        if options.spec is None:
            return cls()
        path = Path(options.spec)
        try:
            data = strict.record(strict.read_json(path), "it", (), ("model", "input"))
            stated = strict.record(data.get("model", {}), "model", (), MODEL)
            given = strict.record(data.get("input", {}), "input", (), INPUT)
        except OSError as error:
            raise InputError(f"--spec {path} cannot be read: {error.strerror}") from error
        except FormatError as error:
            raise InputError(f"--spec {path}: {error}") from error
        if refused := [name for name in stated if name not in model]:
            takes = f"it takes {', '.join(model)}" if model else "its own files say what the model is"
            raise InputError(f"--spec {path} says model.{refused[0]}, which does not apply to this checkpoint: {takes}")
        return cls(stated, given, str(path))

    def model_field(self, what: Path, name: str, found: Any, hint: str = "") -> Any:
        """A field of the model: what the user says, else what the files say.

        Raises:
            CheckpointError: neither says it.
        """
        if name in self.model:
            return self.model[name]
        if found is None:
            raise CheckpointError(
                f"{what} does not say {name}{hint}; say it with --spec FILE, a JSON file like "
                f'{{"model": {{"{name}": ...}}}}'
            )
        return found


def input_contract(what: Path, said: Said, found: Mapping[str, Any], resized: bool = False) -> InputContract:
    """The input contract of fields that the files say and those that the user says, which count.

    Args:
        resized: `resize` or `resize_size` must be said, as models of this kind are resized to different sizes before
            the crop.

    Raises:
        CheckpointError: nothing says mean, std or how to resize, or the fields contradict one another.
    """
    fields_ = {**found, **said.input}
    missing = [name for name in ("mean", "std") if name not in fields_]
    if resized and not fields_.keys() & {"resize", "resize_size"}:
        missing.append("resize_size")
    if missing:
        raise CheckpointError(
            f"{what} does not say {', '.join(missing)} of its input; say how it was made with --spec FILE, a JSON file "
            'like {"input": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "resize_size": 256}}'
        )
    try:
        return InputContract(**fields_)
    except (SpecError, TypeError) as error:
        raise CheckpointError(f"{what}: the settings of its input cannot be met: {error}") from error


def size_of(what: Path, value: Any) -> tuple[int, int]:
    """A size that was said: (height, width) in pixels.

    Raises:
        CheckpointError: it is not two positive integers.
    """
    try:
        height, width = (strict.integer(side, "size", 1, LARGEST) for side in strict.items(value, "size", 2, 2))
    except FormatError as error:
        raise CheckpointError(f"{what}: {error} (height, width)") from error
    return height, width


def unnamed(classes: int, prefix: str = "class-") -> tuple[str, ...]:
    """Labels of classes that nobody named; those of transformers begin with `LABEL_`."""
    return tuple(f"{prefix}{i}" for i in range(classes))


def _distinct(names: Sequence[Any]) -> list[Any]:
    """Names that several classes have, as the cranes of ImageNet (134, 517), with the number of their class."""
    counts = Counter(str(name) for name in names)
    return [f"{name} ({i})" if name and counts[str(name)] > 1 else name for i, name in enumerate(names)]


def labels(what: Path, options: ReadOptions, found: Mapping[Any, str] | None, classes: int) -> tuple[str, ...]:
    """Class names: of the file of `--labels`, else those found by number, else `class-0` and so on.

    Raises:
        InputError: the file cannot be read.
        CheckpointError: their number is not that of the classes, or they leave out numbers of classes.
    """
    if options.labels is not None:
        try:
            lines = Path(options.labels).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"--labels {options.labels} cannot be read: {getattr(error, 'strerror', None) or error}"
            ) from error
        names = [line.strip() for line in lines if line.strip()]
    elif found:
        try:
            numbers = {int(key): name for key, name in found.items()}
        except ValueError as error:
            raise CheckpointError(f"{what}: the numbers of its labels are not integers: {error}") from error
        names = [numbers[key] for key in sorted(numbers)]
        if len(names) == classes and (wrong := next((i for i in range(classes) if i not in numbers), None)) is not None:
            raise CheckpointError(f"{what}: its labels have no name for class {wrong}; name all of them with --labels")
    else:
        names = list(unnamed(classes))
    if len(names) != classes:
        raise CheckpointError(
            f"{what} has {classes} classes and {len(names)} labels; expected as many: name them with --labels"
        )
    try:
        return parse_labels(_distinct(names), "a label")
    except FormatError as error:
        raise CheckpointError(f"{what}: {error}") from error
