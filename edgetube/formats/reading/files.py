"""The files of a checkpoint: a folder as libraries write it, or one file of weights; and the options of reading it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from edgetube import strict
from edgetube.bundle import sha256
from edgetube.errors import CheckpointError, FormatError, InputError
from edgetube.formats.reading import heads, licence, onnx_files, tensors
from edgetube.formats.reading.adapters import Adapter
from edgetube.formats.reading.tensors import TensorSource

CONFIG = "config.json"
PROCESSORS = ("video_preprocessor_config.json", "preprocessor_config.json")
"""Settings of a processor; the first one that is there counts, as it does in transformers 5."""

WHOLE_PROCESSOR, PIXELS = "processor_config.json", ("video_processor", "image_processor")
"""Settings of a processor of texts and images, and those in it that are of images; they count before the others."""

SETTINGS = re.compile(r"(?!tokenizer|generation|adapter).*config\.json")
"""Names of files with settings of a model or its input; they are part of its digest."""

CARD, MOST_CARD = "README.md", 1 << 20
"""The model card, and how many characters of it are read."""


@dataclass(frozen=True)
class ReadOptions:
    """What a user says about a checkpoint where its files do not.

    Attributes:
        adapter: folder of a peft adapter that is merged into the weights.
        classifier: file with the weight and the bias of a linear, for towers that have no classifier.
        spec: JSON file with fields of the model and its input that the files do not say, see `docs/checkpoints.md`.
        arch: architecture of a bare state dict, by the name that its library gives it.
        ema: take the exponential moving average of the weights (True) or the weights themselves (False) where a file
            has both.
        text_features: `.npy` or `.safetensors` file (classes, E): a zero-shot classifier for an image-text tower.
        labels: text file with one class name a line, for checkpoints without names.
        pool_frames: "mean": an image model becomes one of videos, the mean of its answers over the frames.
    """

    adapter: str | None = None
    classifier: str | None = None
    spec: str | None = None
    arch: str | None = None
    ema: bool | None = None
    text_features: str | None = None
    labels: str | None = None
    pool_frames: str | None = None

    def __post_init__(self) -> None:
        if self.pool_frames not in (None, "mean"):
            raise InputError(f"--pool-frames is {self.pool_frames!r}; expected mean")

    def allow(self, *names: str) -> None:
        """Check that no option but `names` was given.

        Raises:
            InputError: another one was.
        """
        always = (*names, "pool_frames")
        given = [f.name for f in fields(self) if getattr(self, f.name) is not None and f.name not in always]
        if given:
            option = given[0].replace("_", "-")
            takes = f"; it takes --{', --'.join(names).replace('_', '-')}" if names else ""
            raise InputError(f"--{option} does not apply to this checkpoint{takes}")

    def to_json(self) -> dict[str, str]:
        """The options that were given, as text, paths absolute."""
        given = {key: value for key, value in asdict(self).items() if value is not None}
        return {
            key: str(Path(value).absolute()) if key in PATHS else str(value).lower() if key == "ema" else str(value)
            for key, value in given.items()
        }

    @classmethod
    def from_json(cls, data: Mapping[str, str]) -> ReadOptions:
        """The options in a manifest."""
        known = {key: value for key, value in data.items() if key in {f.name for f in fields(cls)}}
        ema = {"true": True, "false": False}.get(known.pop("ema", ""))
        return cls(ema=ema, **known)


NO_OPTIONS = ReadOptions()

PATHS = ("adapter", "classifier", "spec", "text_features", "labels")


class Files:
    """A checkpoint's file or folder.

    Args:
        path: a file of weights, or a folder with `config.json`.
        options: those of `ema`, `adapter` and `classifier` say which tensors there are.

    Raises:
        InputError: there is nothing, or an adapter is given for a file.
    """

    def __init__(self, path: Path, options: ReadOptions = NO_OPTIONS) -> None:
        adapter, classifier = options.adapter, options.classifier
        self.path, self.ema = path.absolute(), options.ema
        if not self.path.exists():
            raise InputError(f"no checkpoint at {self.path}; give a folder or a file of weights, demo, or random:NAME")
        if adapter is not None and not self.path.is_dir():
            raise InputError(f"--adapter is merged into the folder of a model of transformers; {self.path} is a file")
        self.adapter = None if adapter is None else Adapter(Path(adapter).absolute())
        self.classifier = None if classifier is None else Path(classifier).absolute()

    @property
    def is_folder(self) -> bool:
        return self.path.is_dir()

    def json(self, name: str) -> dict[str, Any] | None:
        """The object in a JSON file of the folder; None where there is no such file.

        Raises:
            CheckpointError: it is not a JSON object.
        """
        file = self.path / name
        if not self.is_folder or not file.is_file():
            return None
        try:
            return dict(strict.record(strict.read_json(file), name))
        except FormatError as error:
            raise CheckpointError(f"{file} is damaged: {error}") from error

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json`; empty where there is none."""
        return self.json(CONFIG) or {}

    @cached_property
    def processor(self) -> dict[str, Any]:
        """The settings of the processor; empty where there are none."""
        whole = self.json(WHOLE_PROCESSOR) or {}
        if isinstance(nested := next((whole[name] for name in PIXELS if name in whole), None), dict):
            return nested
        return next((found for name in PROCESSORS if (found := self.json(name)) is not None), {})

    @property
    def model_type(self) -> str:
        """`model_type` of the configuration; empty where it has none."""
        found = self.config.get("model_type", "")
        return found if isinstance(found, str) else ""

    @cached_property
    def weights(self) -> tuple[Path, ...]:
        """The files of weights: of a folder its shards.

        Raises:
            CheckpointError: a folder without weights, or with weights of several models.
        """
        return tensors.weight_files(self.path)

    @cached_property
    def tensors(self) -> TensorSource:
        """The tensors, by name, an adapter merged in and a classifier beside them; opened when first asked for.

        Raises:
            CheckpointError: the weights cannot be read.
        """
        if self.path.suffix == onnx_files.SUFFIX and self.path.is_file():
            source = onnx_files.open_source(self.path)
        else:
            source = tensors.open_source(self.weights, self.ema)
        source = source if self.adapter is None else self.adapter.merged(source, self.path)
        return source if self.classifier is None else heads.with_classifier(source, self.classifier)

    @cached_property
    def digest(self) -> str:
        """sha256 of one file of weights; of a folder, that of the names and sha256 of its weights and settings."""
        if not self.is_folder:
            return sha256(self.path)
        told = [path for path in self.path.iterdir() if SETTINGS.fullmatch(path.name) and path.is_file()]
        return _joined([f"{path.name} {sha256(path)}" for path in sorted([*told, *self.weights])])

    def digest_with(self, options: ReadOptions) -> str:
        """`digest`; with an adapter, a classifier or text features, which are weights of their own, that of all theirs.

        Raises:
            InputError: a file cannot be read, or there is no adapter.
        """
        parts = [self.digest]
        if options.adapter is not None:
            parts.append(_joined([f"{path.name} {sha256(path)}" for path in Adapter(Path(options.adapter)).files]))
        for name in ("classifier", "text_features"):
            if (given := getattr(options, name)) is not None:
                try:
                    parts.append(sha256(Path(given)))
                except OSError as error:
                    option = name.replace("_", "-")
                    raise InputError(f"--{option} {given} cannot be read: {error.strerror}") from error
        return _joined(parts) if len(parts) > 1 else self.digest

    @cached_property
    def licence(self) -> str:
        """The licence that the model card states; empty where it states none."""
        card = self.path / CARD
        if not self.is_folder or not card.is_file():
            return ""
        with card.open(encoding="utf-8", errors="replace") as file:
            return licence.stated(file.read(MOST_CARD))

    def summary(self) -> str:
        """What is there, for an error: the configuration's model type, or the first names of tensors."""
        if self.model_type:
            return f"its config.json says model_type {self.model_type!r}"
        try:
            found = sorted(self.tensors.names())
        except CheckpointError as error:
            return str(error)
        return f"{len(found)} tensors, among them {', '.join(map(strict.shown, found[:5]))}"


def _joined(lines: Sequence[str]) -> str:
    """sha256 of lines."""
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
