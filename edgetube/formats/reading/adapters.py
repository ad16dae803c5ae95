"""Adapters of the peft library, LoRA alone, merged into a model's tensors while they are read.

W becomes W + s B A with s = alpha / r, or alpha / sqrt(r) with `use_rslora`; modules that were trained as a whole
(`modules_to_save`, a classifier for example) take the place of the model's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from edgetube import strict
from edgetube.errors import CheckpointError, FormatError, InputError, printable
from edgetube.formats.reading import tensors
from edgetube.formats.reading.dialects import one_dialect
from edgetube.formats.reading.tensors import TensorSource

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

PREFIX = "base_model.model."
"""Of all names in an adapter."""

HARMLESS = frozenset({
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "modules_to_save",
    "base_model_name_or_path", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "revision",
    "lora_dropout", "inference_mode", "task_type", "auto_mapping", "peft_version", "megatron_core", "runtime_config",
    "qalora_group_size", "eva_config", "init_lora_weights", "bias", "ensure_weight_tying",
})  # fmt: skip
"""Settings of an adapter that this module reads, or that say nothing about the merged weights."""

STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""`init_lora_weights` that leave the model's own weights as they were; the others (PiSSA, LoftQ, ...) do not."""


@dataclass(frozen=True)
class Adapter:
    """The folder of an adapter, as `save_pretrained` of peft writes it.

    Raises:
        InputError: there is no such folder, or none of an adapter.
    """

    path: Path

    def __post_init__(self) -> None:
        if not (self.path / CONFIG).is_file():
            raise InputError(f"--adapter {self.path} is no folder of a peft adapter: it has no {CONFIG}")

    @property
    def files(self) -> tuple[Path, Path]:
        """The configuration and the weights.

        Raises:
            CheckpointError: there are no weights.
        """
        found = next((self.path / name for name in WEIGHTS if (self.path / name).is_file()), None)
        if found is None:
            raise CheckpointError(f"{self.path} has no weights of an adapter; expected {' or '.join(WEIGHTS)}")
        return self.path / CONFIG, found

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The configuration, all of whose settings are known.

        Raises:
            CheckpointError: it is damaged, or the adapter is not of plain LoRA.
        """
        try:
            found = strict.record(strict.read_json(self.path / CONFIG), CONFIG)
        except FormatError as error:
            raise CheckpointError(f"{self.path / CONFIG} is damaged: {error}") from error
        kind = found.get("peft_type")
        if kind != "LORA":
            raise CheckpointError(f"{self.path} is an adapter of type {kind!r:.60}; edgetube merges LORA")
        unknown = [name for name in sorted(found) if name not in HARMLESS and found[name]]
        for name, plain in (("bias", ("none", None)), ("init_lora_weights", STARTS)):
            if found.get(name, plain[0]) not in plain:
                unknown.append(name)
        if unknown:
            shown = f"{printable(unknown[0])} {found[unknown[0]]!r:.60}"
            raise CheckpointError(f"{self.path} has {shown}; edgetube merges plain LoRA; merge it with peft instead")
        return found

    @property
    def notes(self) -> tuple[str, ...]:
        """What it was trained on."""
        base = self.config.get("base_model_name_or_path")
        trained = f"was trained on {printable(str(base))}" if base else "does not say on which model it was trained"
        return (f"the adapter {self.path.name}, which is merged in, {trained}",)

    def merged(self, base: TensorSource, what: Path) -> TensorSource:
        """The tensors of a model with the adapter in them.

        Args:
            what: the model, for errors.

        Raises:
            CheckpointError: the adapter is not of this model, or of another kind than LoRA.
        """
        config, source = self.config, tensors.open_source(self.files[1:])
        pairs, wholes = self._parts(source)
        base, places = _placed(base, [f"{stem}.weight" for stem in pairs])
        if missing := [stem for stem in pairs if f"{stem}.weight" not in places]:
            raise CheckpointError(
                f"the adapter {self.path} is of another model than {what}, which has no {printable(missing[0])}.weight"
            )
        deltas = {places[f"{stem}.weight"]: _Delta(*pair, _scale(config, stem)) for stem, pair in pairs.items()}
        for name, delta in deltas.items():
            delta.check(source, base.shapes[name], f"{self.path}: {printable(name)}", config)
        names = {one_dialect(name): name for name in base.shapes}
        taken = {names.get(one_dialect(name), name): whole for name, whole in wholes.items()}

        def load(name: str) -> Tensor:
            if name in taken:
                return source.load(taken[name])
            value = base.load(name)
            return value if name not in deltas else value.float() + deltas[name].value(source, value)

        shapes = {**base.shapes, **{name: source.shapes[whole] for name, whole in taken.items()}}
        return replace(base, shapes=shapes, load=load)

    def _parts(self, source: TensorSource) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
        """Names of A and B by the module that they belong to, and of whole tensors by their names in the model."""
        pairs: dict[str, list[str]] = {}
        wholes: dict[str, str] = {}
        for name in sorted(source.shapes):
            bare = name.removeprefix(PREFIX).replace(".modules_to_save.", ".").replace(".default.", ".")
            stem, lora, rest = bare.partition(".lora_")
            if lora and rest in ("A.weight", "B.weight"):
                pairs.setdefault(stem, []).append(name)
            elif lora or not name.startswith(PREFIX) or not self._saves(bare):
                raise CheckpointError(f"{self.path} has the tensor {printable(name)}, which is not of plain LoRA")
            else:
                wholes[bare] = name
        if halves := [stem for stem, found in pairs.items() if len(found) != 2]:
            raise CheckpointError(f"{self.path} has only one of lora_A and lora_B for {printable(halves[0])}")
        if not pairs and not wholes:
            raise CheckpointError(f"{self.path} has no tensors of an adapter")
        return {stem: (found[0], found[1]) for stem, found in pairs.items()}, wholes

    def _saves(self, name: str) -> bool:
        """Whether a tensor is of a module that was trained as a whole."""
        saved = self.config.get("modules_to_save") or []
        return any(f".{module}." in f".{name}" for module in saved)


@dataclass(frozen=True)
class _Delta:
    """What is added to one weight: names of A (r, in, ...) and B (out, r, ...) in the adapter, and their scale."""

    a: str
    b: str
    scale: tuple[float, int]

    def check(self, source: TensorSource, shape: tuple[int, ...], where: str, config: Mapping[str, Any]) -> None:
        """Check the shapes of A and B.

        Raises:
            CheckpointError: they do not fit the weight or the rank.
        """
        a, b = source.shapes[self.a], source.shapes[self.b]
        rank = self.scale[1]
        fits = len(a) > 1 and len(b) > 1 and a[0] == b[1] and (b[0], *a[1:]) == shape and set(b[2:]) <= {1}
        if not fits or a[0] != rank:
            raise CheckpointError(f"{where} is {shape}, and its lora_A {a} and lora_B {b} do not fit it at rank {rank}")

    def value(self, source: TensorSource, like: Tensor) -> Tensor:
        a, b = (source.load(name).float().flatten(1) for name in (self.a, self.b))  # (r, K), (N, r)
        return self.scale[0] * (b @ a).reshape(like.shape)


def _scale(config: Mapping[str, Any], stem: str) -> tuple[float, int]:
    """Scale and rank of a module; patterns match the end of its name.

    Raises:
        CheckpointError: they are no numbers.
    """
    try:
        rank = strict.integer(_pattern(config, "rank_pattern", stem, config.get("r", 8)), "r", 1, 1 << 20)
        alpha = strict.number(_pattern(config, "alpha_pattern", stem, config.get("lora_alpha", 8)), "lora_alpha")
    except (FormatError, re.error) as error:
        raise CheckpointError(f"{CONFIG}: {error}") from error
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), rank


def _pattern(config: Mapping[str, Any], name: str, stem: str, usual: Any) -> Any:
    found: Iterator[Any] = (
        value for key, value in (config.get(name) or {}).items() if re.match(rf"(.*\.)?({key})$", stem)
    )
    return next(found, usual)


def _placed(base: TensorSource, wanted: list[str]) -> tuple[TensorSource, dict[str, str]]:
    """The base and where in it the wanted tensors are; its names get the prefix of the wanted ones where they lack it.

    An adapter of a classifier can be trained on a model that was saved without one, and without the prefix that a model
    with a classifier gives its body: `vit.`.
    """
    found: dict[str, dict[str, str]] = {}
    for prefix in ("", *sorted({f"{name.partition('.')[0]}." for name in wanted})):
        names = {one_dialect(prefix + name): prefix + name for name in base.shapes}
        found[prefix] = {name: names[one_dialect(name)] for name in wanted if one_dialect(name) in names}
    prefix = max(found, key=lambda one: len(found[one]))
    if not prefix:
        return base, found[prefix]
    shapes = {prefix + name: shape for name, shape in base.shapes.items()}
    return replace(base, shapes=shapes, load=lambda name: base.load(name.removeprefix(prefix))), found[prefix]
