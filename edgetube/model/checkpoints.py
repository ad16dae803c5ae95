"""Reads and writes checkpoints: safetensors files with the model's geometry, input and labels in the header."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from edgetube import demo, strict
from edgetube.bundle import parse_labels, sha256
from edgetube.contract import InputContract
from edgetube.errors import CheckpointError, FormatError, InputError, SpecError, printable
from edgetube.files import replacing
from edgetube.model import positions
from edgetube.model.transformer import VideoTransformer, shapes, with_weights
from edgetube.reduction import Reduction
from edgetube.spec import ModelSpec, TubeSpec, named

FRAMES, SECONDS = 8, 2
"""Of a clip, where an image model answers for a video and nothing says it."""

HEADER = "edgetube"
"""Key of the JSON document in the safetensors metadata: {"spec", "input", "labels", "other_labels", "licence"}."""

LICENCE = 200
"""Most characters of a licence in a header; a longer one is cut."""


@dataclass(frozen=True)
class Checkpoint:
    """A reference model with its preprocessing and labels.

    Attributes:
        name: short name for file names and tables.
        model: the model in eval mode, float32, on the CPU.
        contract: the preprocessing that it was trained with.
        labels: class names of the first classifier.
        digest: sha256 of the weights' file, or of the seed of random weights.
        other_labels: class names of further classifiers, by classifier.
        source: where it was loaded from (an absolute path, `demo` or `random:NAME`); goes into the manifest.
        format: name of the format that it was in; empty for the built-in ones.
        options: of reading it, as text; they go into the manifest.
        notes: what its reader has to know, one sentence each.
        keys: where each tensor of a foreign format went, see `edgetube.formats.reading.tensors.KeyUse`.
        licence: as its model card states it; empty where it states none.
        table: learned positions and the spec that they are for, once they were resized: another clip shape starts from
            them again, because resizing twice loses what resizing once keeps.
        base: the spec of the trained model, where this one has another clip or other tubes.
    """

    name: str
    model: VideoTransformer
    contract: InputContract
    labels: tuple[str, ...]
    digest: str
    other_labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    source: str = ""
    format: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    keys: tuple[Any, ...] = field(default=(), repr=False)
    licence: str = ""
    table: tuple[ModelSpec, torch.Tensor] | None = field(default=None, repr=False)
    base: ModelSpec | None = field(default=None, repr=False)

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec

    def with_clip(
        self,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        tubes: Mapping[int, TubeSpec] | None = None,
    ) -> Checkpoint:
        """The same weights for another clip shape (`frames=1`: the image model), or with some of the tubes.

        Raises:
            InputError: several frames for a model that was never shown time.
            SpecError: a tube does not fit, or the positions are stored for one shape.
        """
        spec = self.spec
        if frames not in (None, 1) and spec.is_image and not spec.per_frame and all(t.is_2d for t in spec.tubes):
            raise InputError(
                f"{self.name} is a model of images; --pool-frames mean answers for {frames} frames with the mean of "
                "its answers"
            )
        return self.at_spec(self.spec.with_clip(frames, size, tubes))

    def reduced(self, reduction: Reduction | None) -> Checkpoint:
        """The same weights with fewer tokens, or with all of them.

        Raises:
            SpecError: the model cannot be reduced so.
        """
        return self.at_spec(replace(self.spec, reduction=reduction))

    @property
    def trained(self) -> Checkpoint:
        """The model with all tokens of its clip and its tubes."""
        return self.reduced(None)

    @property
    def label(self) -> str:
        """For names of bundles: its name, its tubes where they are others, and the tokens that are left of more."""
        reduced = self.spec.reduction
        parts = (self.name, self.spec.tubes_label(self.base), "" if reduced is None else reduced.label)
        return "-".join(filter(None, parts))

    def record(self) -> dict[str, str]:
        """What the manifest of a bundle says about it."""
        stated = {"format": self.format, "licence": self.licence}
        base = {"name": self.name, "source": self.source, "sha256": self.digest}
        return base | {key: value for key, value in stated.items() if value} | dict(self.options)

    def over_frames(self) -> Checkpoint:
        """An image model as one of videos: each of `FRAMES` frames is a sequence, the logits are their mean.

        Another number of frames is `with_clip(frames)`.

        Raises:
            InputError: it is a video model.
        """
        if not self.spec.is_image:
            raise InputError(f"{self.name} is a model of videos of {self.spec.frames} frames; leave out --pool-frames")
        fps = (
            FRAMES / SECONDS if self.contract.sampling == "uniform" and self.contract.fps is None else self.contract.fps
        )
        contract = replace(self.contract.with_clip(FRAMES), fps=fps)
        model = _moved(self.model, replace(self.spec, per_frame=True, frames=FRAMES), self.table)
        return replace(self, model=model, contract=contract)

    def at_spec(self, spec: ModelSpec) -> Checkpoint:
        """The same weights in the form of `spec`: of another clip, or with other uses of frames, tubes and tokens."""
        contract = self.contract.with_clip(spec.frames, spec.size)
        if (spec, contract) == (self.spec, self.contract):
            return self
        if spec == self.spec:
            return replace(self, contract=contract)
        learned = [value for name, value in self.model.state_dict().items() if name in TABLES]
        table = self.table or ((self.spec, learned[0]) if learned else None)
        base = self.base or self.spec
        return replace(self, model=_moved(self.model, spec, table), contract=contract, table=table, base=base)

    def select(self, head: str) -> Checkpoint:
        """The same model with one of its classifiers alone.

        Raises:
            InputError: it has no classifier of that name.
        """
        heads = dict(self.spec.classifiers)
        if head not in heads:
            raise InputError(f"{self.name} has no classifier {head!r}; it has {', '.join(heads)}")
        labels = self.labels if head == self.spec.classifiers[0][0] else self.other_labels[head]
        model = _moved(self.model, replace(self.spec, classifiers=((head, heads[head]),)), self.table)
        return replace(self, model=model, labels=labels, other_labels={})


def load(source: str | Path = "demo") -> Checkpoint:
    """Read a checkpoint: `demo`, `random:NAME` (see `edgetube.spec.SIZES`), or a `.safetensors` file.

    Raises:
        InputError: there is no such file.
        CheckpointError: the file has no such header, or tensors are missing, superfluous or of a wrong shape.
        SpecError: the architecture's name is unknown.
    """
    if source == "demo":
        checkpoint = replace(_read(demo.WEIGHTS), name="demo")
    elif str(source).startswith("random:"):
        checkpoint = random(str(source).removeprefix("random:"))
    else:
        source = Path(source).absolute()
        checkpoint = _read(source)
    return replace(checkpoint, source=str(source))


def random(name: str, seed: int = 0) -> Checkpoint:
    """A named architecture with seeded random weights: for latency work, not for accuracy."""
    spec = named(name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VideoTransformer(spec).eval()
    contract = InputContract(spec.frames, *spec.size, fps=15.0)
    labels = tuple(f"class-{i}" for i in range(spec.classifiers[0][1]))
    return Checkpoint(name, model, contract, labels, hashlib.sha256(f"{name}:{seed}".encode()).hexdigest())


def save(checkpoint: Checkpoint, path: str | Path) -> Path:
    """Write `checkpoint` to a safetensors file, beside the target first and then renamed; returns the path.

    Raises:
        CheckpointError: the model is not a VideoTransformer but a wrapper of one.
    """
    path = Path(path)
    if not isinstance(checkpoint.model, VideoTransformer):
        raise CheckpointError(
            f"the model is a {type(checkpoint.model).__name__}; save the VideoTransformer inside of it: model.module "
            "of DataParallel, model._orig_mod of torch.compile"
        )
    header = {
        "spec": checkpoint.spec.to_json(),
        "input": checkpoint.contract.to_json(),
        "labels": list(checkpoint.labels),
        "other_labels": {name: list(labels) for name, labels in checkpoint.other_labels.items()},
    } | ({"licence": strict.shown(checkpoint.licence, LICENCE - 3)} if checkpoint.licence else {})
    state = {key: value.contiguous() for key, value in checkpoint.model.state_dict().items()}
    with replacing(path) as part:
        save_file(state, part, metadata={HEADER: json.dumps(header)})
    return path


def _read(path: Path) -> Checkpoint:
    """Read a checkpoint; its headers are checked before anything is allocated."""
    if not path.is_file():
        what = "a folder is" if path.is_dir() else "no checkpoint"
        raise InputError(f"{what} at {path}; give a .safetensors file, demo, or random:NAME")
    if what := TORCH if is_pickle(path) else foreign(path):
        raise CheckpointError(f"{path} is not a safetensors file: {what}")
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            header = _header(path, file.metadata() or {}, names)
            slices = {name: file.get_slice(name) for name in names}
            _compare(path, header.spec, {name: tuple(part.get_shape()) for name, part in slices.items()})
            _check_types(path, {name: part.get_dtype() for name, part in slices.items()})
            state = {name: file.get_tensor(name).float() for name in names}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {strict.shown(str(error), 300)}") from error
    for name, value in state.items():
        if not value.isfinite().all():
            raise CheckpointError(
                f"{path}: {name} has weights that are NaN or infinite; save the model before it diverged"
            )
    model = with_weights(header.spec, state)
    name = re.sub(r"[^\w.-]+", "-", path.stem).lstrip("-.") or "model"  # it becomes the name of files and folders
    found = header.contract, header.labels, sha256(path), header.other_labels
    return Checkpoint(name, model, *found, licence=header.licence)


TORCH = (
    "it was written by torch.save, which stores Python objects; load it with your own training code, and write the "
    "model with edgetube.model.checkpoints.save"
)
PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""First bytes of files of `torch.save`: of a zip archive, and of pickles."""

MAGIC = {
    b"\x89HDF": "it is an HDF5 file, as Keras writes them; edgetube takes models of PyTorch",
    b"GGUF": "it is a GGUF file, which holds a language model",
    b"version https://git-lfs": "it is a pointer of Git LFS; fetch the file itself with: git lfs pull",
    b"/annex/objects": "it is a pointer of git-annex; fetch the file itself with: git annex get",
    b"\x1f\x8b": "it is packed with gzip; unpack it first",
    b"\x93NUMPY": "it is an array of numpy",
    b"<": "it is a web page; the download did not work",
    b"{": "it is a JSON text",
}
"""First bytes of files that are given for weights -> what they are, and what to do."""


def foreign(path: Path) -> str:
    """What a file is that holds no weights of PyTorch, by its first bytes; empty for any other."""
    with path.open("rb") as file:
        first = file.read(32)
    if not first:
        return "it is empty; the download or copy did not work"
    if first[8:9] == b"{":  # safetensors: eight bytes, then a JSON object
        return ""
    return next((what for magic, what in MAGIC.items() if first.startswith(magic)), "")


def is_pickle(path: Path) -> bool:
    """Whether a file is one of `torch.save`; the length in the first bytes of safetensors may look like a pickle's."""
    with path.open("rb") as file:
        first = file.read(9)
    return first.startswith(PICKLES) and first[8:] != b"{"


@dataclass(frozen=True)
class _Header:
    spec: ModelSpec
    contract: InputContract
    labels: tuple[str, ...]
    other_labels: Mapping[str, tuple[str, ...]]
    licence: str


def _header(path: Path, metadata: Mapping[str, str], names: Sequence[str]) -> _Header:
    """Parse edgetube's header and check its consistency.

    Raises:
        CheckpointError: it is missing, damaged, or contradicts itself.
    """
    if HEADER not in metadata:
        hint = _wrapped(names)
        raise CheckpointError(
            f"{path} has no {HEADER!r} header; write it with edgetube.model.checkpoints.save"
            + (f" ({hint})" if hint else "")
        )
    try:
        data = strict.parse_json(metadata[HEADER], "it")
        data = strict.record(data, "it", ("spec", "input", "labels"), ("other_labels", "licence"))
        spec, contract = ModelSpec.from_json(data["spec"]), InputContract.from_json(data["input"])
        first, *others = spec.classifiers
        given = strict.record(data.get("other_labels", {}), "other_labels", (), [name for name, _ in others])
        labels = parse_labels(data["labels"], f"the labels of {first[0]}")
        other_labels = {name: parse_labels(found, f"the labels of {name}") for name, found in given.items()}
        licence = strict.text(data.get("licence", ""), "the licence", most=LICENCE)
    except (FormatError, SpecError) as error:
        raise CheckpointError(f"{path}: its {HEADER!r} header is damaged ({error})") from error
    if contract.shape != (*spec.clip, spec.channels):
        raise CheckpointError(
            f"{path}: the input is {contract.shape} but the model takes clips {(*spec.clip, spec.channels)}"
        )
    for name, classes in spec.classifiers:
        count = len(labels if name == first[0] else other_labels.get(name, ()))
        if count != classes:
            raise CheckpointError(f"{path}: {count} labels for the {classes} classes of {name}")
    return _Header(spec, contract, labels, other_labels, licence)


WRAPPERS = {
    "_orig_mod.": "torch.compile wraps the model; save the model that was compiled (model._orig_mod)",
    "module.": "DataParallel or DistributedDataParallel wraps the model; save model.module",
    "model.": "a training module (of Lightning, for example) wraps the model; save its model",
}
"""Prefixes of tensor names when a wrapper of the model was saved."""


def _wrapped(names: Iterable[str]) -> str:
    """Advice where all names have a prefix of a wrapper; empty where they have none."""
    names = list(names)
    return next(
        (f"all tensors are {prefix}*: {why}" for prefix, why in WRAPPERS.items() if _all_begin(names, prefix)), ""
    )


def _all_begin(names: Sequence[str], prefix: str) -> bool:
    return bool(names) and all(name.startswith(prefix) for name in names)


def _compare(path: Path, spec: ModelSpec, given: Mapping[str, tuple[int, ...]]) -> None:
    """Check that the tensors are exactly those of the spec, so that no layer silently keeps random weights.

    Raises:
        CheckpointError: a tensor is missing, unknown or of a wrong shape.
    """
    wanted = shapes(spec)
    if hint := _wrapped(given):
        raise CheckpointError(f"{path} does not fit its own spec: {hint}")
    problems = [f"missing {key}" for key in sorted(wanted.keys() - given.keys())]
    problems += [f"unknown {printable(key)}" for key in sorted(given.keys() - wanted.keys())]
    problems += [
        f"{key} is {given[key]}, expected {wanted[key]}"
        for key in sorted(wanted.keys() & given.keys())
        if wanted[key] != given[key]
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{path} does not fit its own spec: {'; '.join(problems[:3])}{more}")


def _check_types(path: Path, types: Mapping[str, str]) -> None:
    for name, kind in types.items():
        if kind not in FLOATS:
            raise CheckpointError(f"{path}: {name} is {kind}; expected one of {', '.join(FLOATS)}")


TABLES: Mapping[str, Callable[[torch.Tensor, ModelSpec, ModelSpec], torch.Tensor]] = {
    "positions": positions.resized,
    "anchor.grid": positions.resized_grid,
}
"""Learned positions, of which a model has one, and how they are taken to another clip: (table, old, new) -> table."""

FLOATS = ("F32", "F16", "BF16", "F64")
"""Types of weights, as safetensors names them."""


def _moved(
    model: VideoTransformer, spec: ModelSpec, table: tuple[ModelSpec, torch.Tensor] | None = None
) -> VideoTransformer:
    """The same weights, not a copy of them, in a model of another clip shape or with fewer classifiers.

    Args:
        table: see `Checkpoint`.
    """
    state = model.state_dict()
    for name in TABLES.keys() & state.keys():
        old, stored = table or (model.spec, state[name])
        state[name] = TABLES[name](stored, old, spec)
    return with_weights(spec, {name: state[name] for name in shapes(spec)})
