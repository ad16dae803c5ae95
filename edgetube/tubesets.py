"""Which of a model's tubes make tokens, and where: what a user states, as tubes of the model by their indices.

A trained model's tubes have weights, so a point can leave tubes out, or move the tokens of those that it keeps; it
cannot have another kernel. `edgetube.spec.ModelSpec.with_clip` has the rules. Only the standard library is needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from edgetube import strict
from edgetube.errors import FormatError, InputError, SpecError
from edgetube.spec import MOST_TUBES, PAPER_TUBES, ModelSpec, TubeSpec

Chosen = Mapping[int, TubeSpec]
"""The tubes that make tokens, by their index in the model."""

DEFAULT = "default"
"""How a user calls the tubes that a model was trained with."""

PRESETS: Mapping[str, tuple[TubeSpec, ...]] = {"392": tuple(t for t in PAPER_TUBES if t.kernel != (16, 4, 4))}
"""Some of the paper's tubes: without the one of 16x4x4 there are 392 tokens of 539 at 32x224x224, and the others read
half of the frames."""


def parse(text: str, spec: ModelSpec) -> Chosen | None:
    """The tubes that a user states; None for all as they are.

    Args:
        text: `default`, a name of `PRESETS`, indices of the model's tubes separated by commas, or a .json file with a
            list of tubes as in a model's spec. A preset and a file name tubes by their kernels; those of a preset stay
            where the model has them.

    Raises:
        InputError: it is no such text, or the model has no such tubes.
    """
    text = text.strip()
    if text == DEFAULT:
        return None
    try:
        if text in PRESETS:
            found = _preset(text, spec)
        elif re.fullmatch(r"\d{1,3}(\s*,\s*\d{1,3})*", text):
            found = _indices([int(part) for part in text.split(",")], spec)
        else:
            found = _matched(_file(text, spec), spec)
        spec.check_tubes(found)
    except SpecError as error:
        raise InputError(f"--tubes {text}: {error}") from error
    return None if found == spec.chosen else found


def described(spec: ModelSpec) -> str:
    """The model's tubes and their indices, for messages."""
    return ", ".join(f"{index}: {tube}" for index, tube in enumerate(spec.tubes))


def _indices(given: Sequence[int], spec: ModelSpec) -> Chosen:
    if bad := [index for index in given if index >= len(spec.tubes)]:
        raise SpecError(f"there is no tube {bad[0]}; the model has {described(spec)}")
    if len(set(given)) < len(given):
        raise SpecError("a tube is named twice")
    return {index: spec.tubes[index] for index in sorted(given)}


def _preset(name: str, spec: ModelSpec) -> Chosen:
    kernels = [tube.kernel for tube in spec.tubes]
    if sorted(kernels) != sorted(tube.kernel for tube in PAPER_TUBES):
        paper = ", ".join(map(str, PAPER_TUBES))
        raise SpecError(
            f"the preset is of the tubes {paper}; the model has {described(spec)}: name those to keep by their indices"
        )
    wanted = [tube.kernel for tube in PRESETS[name]]
    return {index: tube for index, tube in enumerate(spec.tubes) if tube.kernel in wanted}


def read(path: Path) -> list[TubeSpec]:
    """The tubes in a JSON file, a list of `TubeSpec`.

    Raises:
        SpecError: the file is not such a list.
    """
    try:
        return [TubeSpec.from_json(tube) for tube in strict.items(strict.read_json(path), path.name, 1, MOST_TUBES)]
    except (FormatError, SpecError) as error:
        raise SpecError(f"{path}: expected a list of tubes as in a model's spec; {error}") from error


def _file(text: str, spec: ModelSpec) -> list[TubeSpec]:
    path = Path(text)
    if path.suffix != ".json" or not path.is_file():
        known = ", ".join((DEFAULT, *PRESETS))
        raise InputError(
            f"--tubes is {text!r:.80}; expected {known}, indices of the model's tubes ({described(spec)}) separated by "
            "commas, or a .json file that exists"
        )
    return read(path)


def _matched(tubes: Sequence[TubeSpec], spec: ModelSpec) -> Chosen:
    """Each tube by the index of one of the model's that has its kernel: the same one, or the first that is left."""
    found: dict[int, TubeSpec] = {}
    for tube in sorted(tubes, key=lambda tube: tube not in spec.tubes):  # exact ones first
        fits = tube.__eq__ if tube in spec.tubes else partial(_same_weights, tube)
        own = next((i for i, one in enumerate(spec.tubes) if i not in found and fits(one)), None)
        if own is None:
            raise SpecError(
                f"there are no weights for a tube {tube} with space_to_depth {tube.space_to_depth}; the model has "
                f"{described(spec)}, each once"
            )
        found[own] = tube
    return dict(sorted(found.items()))


def _same_weights(one: TubeSpec, other: TubeSpec) -> bool:
    return (one.kernel, one.space_to_depth) == (other.kernel, other.space_to_depth)
