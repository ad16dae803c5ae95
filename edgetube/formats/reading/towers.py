"""Image towers of image-text models as transformers saves them: of a whole model, alone, or under a classifier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from edgetube.errors import CheckpointError
from edgetube.formats.reading import blocks, result, zeroshot
from edgetube.formats.reading.blocks import Weights
from edgetube.formats.reading.files import Files, ReadOptions
from edgetube.formats.reading.processors import contract
from edgetube.formats.reading.said import Said, labels
from edgetube.formats.reading.tensors import State
from edgetube.formats.reading.transformers import ACTIVATIONS, SELF_ATTENTION, Config
from edgetube.model.checkpoints import Checkpoint
from edgetube.spec import ModelSpec, TubeSpec


@dataclass(frozen=True)
class Tower:
    """A tower and what its classifier is made of.

    Attributes:
        files, options: of the checkpoint.
        config: of the tower.
        state: its tensors, without the prefix `vision_model.` that some classes have.
        text: unit vectors (classes, E) of `--text-features`; None where the checkpoint has a classifier.
    """

    files: Files
    options: ReadOptions
    config: Config
    state: State
    text: Tensor | None

    @classmethod
    def of(cls, files: Files, options: ReadOptions, defaults: Mapping[str, Any]) -> Tower:
        """Open a folder.

        Raises:
            InputError: an option does not apply, or the text features cannot be read.
            CheckpointError: it has no classifier and no text features were given.
        """
        state = State(files.path, files.tensors, lambda name: name.removeprefix("vision_model."))
        classified = "classifier.weight" in state
        options.allow("spec", "labels", "adapter", *([] if classified else ["text_features"]))
        text = zeroshot.text_features(options)
        if text is None and not classified:
            raise CheckpointError(
                f"{files.path} is an image-text model without a classifier; give --text-features FILE with what its "
                "text tower makes of the class names, .npy (classes, E), and --labels FILE with the names"
            )
        state.leave(["text_model.", "text_projection."], "it is of the text tower")
        state.leave(["embeddings.position_ids"], "it is the numbers of the positions")
        return cls(files, options, Config(files, {}, _vision(files.config, defaults)), state, text)

    @property
    def classes(self) -> int:
        return self.state.shape("classifier.weight")[0] if self.text is None else len(self.text)

    def spec(self, **others: Any) -> ModelSpec:
        """The model, with `others` where towers differ."""
        config, patch = self.config, self.config.integer("patch_size")
        height, across = config.pair("image_size")
        return ModelSpec(
            tubes=(TubeSpec((1, patch, patch), (1, patch, patch)),),
            frames=1,
            size=(height, across),
            **config.encoder(),
            classifiers=(("classes", self.classes),),
            hidden=config.integer("intermediate_size"),
            activation=config.choice("hidden_act", ACTIVATIONS),
            positions="stored",
            position_resize="bicubic",
            **others,
        )

    def encoder(self, spec: ModelSpec) -> Weights:
        """The tube, the positions, and the blocks; a class token has the first row of the positions."""
        state, width = self.state, spec.width
        weights = blocks.tube(state, "embeddings.patch_embedding", width, spec.tubes[0].kernel)
        table = state.take("embeddings.position_embedding.weight", "positions", (spec.sequence, width))
        weights["positions"] = table[spec.prefix :].clone()
        if spec.prefix:
            token = state.take("embeddings.class_embedding", "prefix", (width,))
            weights["prefix"] = token[None] + table[:1]  # (1, D)
        for i in range(spec.depth):
            weights |= blocks.read_block(
                state, f"encoder.layers.{i}.", f"blocks.{i}", SELF_ATTENTION, width, spec.hidden
            )
        return weights

    def zero_shot(self, spec: ModelSpec, projection: Tensor | None) -> Weights:
        """The cosine classifier of text features behind a projection (E, D), with scale and offset of the logits."""
        assert self.text is not None
        state, to = self.state, "classifiers.classes"
        scale = self._number("logit_scale").exp().item() if "logit_scale" in state else zeroshot.SCALE
        weights = zeroshot.linear(self.files.path, self.text, projection, None, spec.width, scale)
        if "logit_bias" in state:
            weights[f"{to}.bias"] = weights[f"{to}.bias"] + self._number("logit_bias")
        return weights

    def _number(self, name: str) -> Tensor:
        """A number (): some classes store it as a vector of one."""
        shape = self.state.shape(name)
        return self.state.take(name, "classifiers.classes", (1,) if shape else ()).reshape(())

    def checkpoint(self, spec: ModelSpec, weights: Weights, processor: str) -> Checkpoint:
        """The checkpoint, once everything was taken or left out; `processor` is its usual class."""
        files, options, whole = self.files, self.options, Config(self.files, {})
        made = contract(files, Said.of(options), processor, 1, {})
        notes, names = whole.answer_notes(), whole.id2label
        if self.text is not None:
            notes, names = zeroshot.notes("logit_scale" in self.state), None
        found = labels(files.path, options, names, self.classes)
        return result.checkpoint(files, self.state, spec, weights, made, found, notes)


def _vision(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The tower's configuration: that of a whole model holds it, in old files a second time, which then counts."""
    nested = [found for name in ("vision_config", "vision_config_dict") if isinstance(found := config.get(name), dict)]
    return {**defaults, **(nested[-1] if nested else config)}
