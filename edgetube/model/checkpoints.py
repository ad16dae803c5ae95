"""Trained weights in, trained weights out: safetensors whose header says what the tensors do not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from edgetube import demo
from edgetube.bundle import Bundle, sha256
from edgetube.errors import CheckpointError, InputError
from edgetube.files import replacing
from edgetube.model.tubevit import TubeViT
from edgetube.spec import InputContract, ModelSpec, named

HEADER = "edgetube"
"""Key of the JSON document in the safetensors metadata: {"spec", "input", "labels", "other_labels"}."""


@dataclass(frozen=True)
class Checkpoint:
    """A reference model with all that is needed to feed it and to read its answers.

    Attributes:
        name: short name for file names and tables.
        model: the model in eval mode, float32, on the CPU.
        contract: the preprocessing that it was trained with.
        labels: class names of the first classifier.
        digest: sha256 of the weights' file, or of the seed for random weights.
        other_labels: class names of further classifiers, by classifier.
        source: what `load` was asked for, so that a bundle can say where its reference is.
    """

    name: str
    model: TubeViT
    contract: InputContract
    labels: tuple[str, ...]
    digest: str
    other_labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    source: str = ""

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec

    def at(self, frames: int | None = None, size: tuple[int, int] | None = None) -> Checkpoint:
        """The same weights on another clip shape (`frames=1`: the image model).

        Raises:
            SpecError: a tube does not fit, or the positions are stored for one shape.
        """
        spec = self.spec.at(frames, size)
        if spec == self.spec:
            return self
        return replace(self, model=_moved(self.model, spec), contract=self.contract.at(frames, size))

    def select(self, head: str) -> Checkpoint:
        """The same model with one of its classifiers alone.

        Raises:
            InputError: it has no classifier of that name.
        """
        heads = dict(self.spec.classifiers)
        if head not in heads:
            raise InputError(f"{self.name} has no classifier {head!r}; it has {', '.join(heads)}")
        labels = self.labels if head == self.spec.classifiers[0][0] else self.other_labels[head]
        model = _moved(self.model, replace(self.spec, classifiers=((head, heads[head]),)))
        return replace(self, model=model, labels=labels, other_labels={})


def load(source: str | Path = "demo") -> Checkpoint:
    """Read a checkpoint: `demo`, `random:NAME` (see `edgetube.spec.SIZES`), or a `.safetensors` file.

    Raises:
        InputError: there is no such file.
        CheckpointError: the file is not one of ours, or tensors are missing, superfluous or misshapen.
        SpecError: the architecture's name is unknown.
    """
    if source == "demo":
        checkpoint = replace(_read(demo.WEIGHTS), name="demo")
    elif str(source).startswith("random:"):
        checkpoint = random(str(source).removeprefix("random:"))
    else:
        checkpoint = _read(Path(source))
    return replace(checkpoint, source=str(source))


def of_bundle(bundle: Bundle) -> Checkpoint:
    """The checkpoint that a bundle was made from, at the bundle's clip shape and with its classifier.

    Raises:
        CheckpointError: the weights at its source are not the ones that the bundle was made from.
    """
    checkpoint = load(bundle.checkpoint["source"])
    if checkpoint.digest != bundle.checkpoint["sha256"]:
        raise CheckpointError(
            f"{bundle.path} was made from other weights than {bundle.checkpoint['source']} holds now; export it again"
        )
    return checkpoint.select(bundle.spec.classifiers[0][0]).at(bundle.spec.frames, bundle.spec.size)


def random(name: str, seed: int = 0) -> Checkpoint:
    """A named architecture with seeded random weights: for latency work, not for accuracy."""
    spec = named(name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = TubeViT(spec).eval()
    contract = InputContract(spec.frames, *spec.size, fps=15.0)
    labels = tuple(f"class-{i}" for i in range(spec.classifiers[0][1]))
    return Checkpoint(name, model, contract, labels, hashlib.sha256(f"{name}:{seed}".encode()).hexdigest())


def save(checkpoint: Checkpoint, path: str | Path) -> Path:
    """Write `checkpoint` to a safetensors file, beside the target first and then renamed; returns the path."""
    path = Path(path)
    header = {
        "spec": checkpoint.spec.to_json(),
        "input": checkpoint.contract.to_json(),
        "labels": list(checkpoint.labels),
        "other_labels": {name: list(labels) for name, labels in checkpoint.other_labels.items()},
    }
    state = {key: value.contiguous() for key, value in checkpoint.model.state_dict().items()}
    with replacing(path) as part:
        save_file(state, part, metadata={HEADER: json.dumps(header)})
    return path


def _read(path: Path) -> Checkpoint:
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}; give a .safetensors file, demo, or random:NAME")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    if HEADER not in metadata:
        raise CheckpointError(f"{path} has no {HEADER!r} header; write it with edgetube.model.checkpoints.save")
    try:
        header = json.loads(metadata[HEADER])
        spec, contract = ModelSpec.from_json(header["spec"]), InputContract.from_json(header["input"])
        labels = tuple(header["labels"])
        others = {name: tuple(names) for name, names in header.get("other_labels", {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: its {HEADER!r} header is damaged ({error})") from error
    if contract.shape != (*spec.clip, spec.channels):
        raise CheckpointError(
            f"{path}: the input is {contract.shape} but the model takes clips {(*spec.clip, spec.channels)}"
        )
    for name, classes in spec.classifiers:
        names = labels if name == spec.classifiers[0][0] else others.get(name, ())
        if len(names) != classes:
            raise CheckpointError(f"{path}: {len(names)} labels for the {classes} classes of {name}")
        if twice := sorted({label for label in names if names.count(label) > 1}):
            raise CheckpointError(f"{path}: the labels of {name} have {', '.join(twice)} more than once")
    model = TubeViT(spec)
    _fill(model, state, path)
    return Checkpoint(path.stem, model.eval(), contract, labels, sha256(path), others)


def _moved(model: TubeViT, spec: ModelSpec) -> TubeViT:
    """The same weights in a model of another clip shape or with fewer classifiers."""
    moved = TubeViT(spec)
    state = model.state_dict()
    moved.load_state_dict({key: state[key] for key in moved.state_dict()})
    return moved.eval()


def _fill(model: TubeViT, state: dict[str, torch.Tensor], path: Path) -> None:
    """Load every tensor or none: a silently random tokenizer is the classic failure."""
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in state.items()}
    problems = [f"missing {key}" for key in sorted(wanted.keys() - given.keys())]
    problems += [f"unknown {key}" for key in sorted(given.keys() - wanted.keys())]
    problems += [
        f"{key} is {given[key]}, expected {wanted[key]}"
        for key in sorted(wanted.keys() & given.keys())
        if wanted[key] != given[key]
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{path} does not fit its own spec: {'; '.join(problems[:3])}{more}")
    model.load_state_dict(state)
