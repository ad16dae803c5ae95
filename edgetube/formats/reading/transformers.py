"""What the folders of the transformers library have in common: configuration and labels.

The classes' defaults are those of transformers 5; older folders leave out what equals them, so they are needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from edgetube import strict
from edgetube.errors import CheckpointError, FormatError, printable
from edgetube.formats.reading.blocks import BlockNames
from edgetube.formats.reading.files import Files
from edgetube.spec import Activation

ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": "gelu",
    "gelu_fast": "gelu-tanh",
    "gelu_new": "gelu-tanh",
    "gelu_pytorch_tanh": "gelu-tanh",
    "quick_gelu": "quick-gelu",
    "silu": "silu",
    "swish": "silu",
}
"""`hidden_act` -> the activation of the spec."""


ANSWERS = {
    "multi_label_classification": "it answers yes or no for each class (problem_type multi_label_classification), but "
    "the scores of edgetube are a softmax: take the sigmoid of the logits",
    "regression": "its outputs are values (problem_type regression), but the scores of edgetube are a softmax: take "
    "the logits",
}
"""`problem_type` -> what a user has to know."""


ATTENTION_BIAS = re.compile(r"\.attention\.(?:attention\.)?(qkv|[qkv])(?:uery|ey|alue|_proj)?(?:\.|_)bias$")
"""Biases of the encoder's queries, keys and values, in both dialects, also of all three in one; of VideoMAE they are
`q_bias` and `v_bias`."""

BIAS_FLAGS = {"qkv_bias": "qkv", "qv_bias": "qv", "query_bias": "q", "key_bias": "k", "value_bias": "v"}
"""Fields of a configuration -> which of these biases there are."""


class Config:
    """A configuration with the defaults of its class.

    Args:
        files: of the folder.
        defaults: of the class, for what the file leaves out.
    """

    def __init__(self, files: Files, defaults: Mapping[str, Any], values: Mapping[str, Any] | None = None) -> None:
        self.files, self.values = files, {**defaults, **(files.config if values is None else values)}
        self._check_biases()

    def _check_biases(self) -> None:
        """Check that there are no biases of attention that the configuration says the model has not.

        transformers leaves such tensors out, so one of the two belongs to another model.
        """
        places = {name: found[1] for name in self.files.tensors.names() if (found := ATTENTION_BIAS.search(name))}
        for flag, parts in BIAS_FLAGS.items():
            biases = [name for name, part in places.items() if part in parts]
            if self.values.get(flag) is False and biases:
                raise CheckpointError(
                    f"{self.files.path}: config.json says {flag} false, and there is {printable(min(biases))}: is it "
                    "the configuration of this model?"
                )

    def encoder(self) -> dict[str, Any]:
        """Fields of a `ModelSpec` that all classes say in the same words."""
        return {
            "width": self.integer("hidden_size"),
            "depth": self.integer("num_hidden_layers"),
            "heads": self.integer("num_attention_heads"),
            "norm_eps": self.number("layer_norm_eps"),
        }

    def integer(self, name: str, most: int = 1 << 20, least: int = 1) -> int:
        """An integer, positive unless `least` says otherwise.

        Raises:
            CheckpointError: it is something else, or missing.
        """
        return self._checked(name, lambda value: strict.integer(value, name, least, most))

    def number(self, name: str) -> float:
        """A finite number."""
        return self._checked(name, lambda value: strict.number(value, name))

    def pair(self, name: str, count: int = 2) -> tuple[int, ...]:
        """`count` positive integers, or one that stands for all of them."""
        value = self.values.get(name)
        if not isinstance(value, list | tuple):
            return (self.integer(name),) * count
        return self._checked(
            name, lambda _: tuple(strict.integer(v, name, 1, 1 << 20) for v in strict.items(value, name, count, count))
        )

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self.values.get(name)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.files.path}: config.json says {name} {value!r:.60}; expected true or false")
        return value

    def choice(self, name: str, known: Mapping[str, Any]) -> Any:
        """One of the values that edgetube knows, translated."""
        value = self.values.get(name)
        if not isinstance(value, str) or value not in known:
            raise CheckpointError(
                f"{self.files.path}: config.json says {name} {value!r:.60}; edgetube knows {', '.join(known)}"
            )
        return known[value]

    def _checked(self, name: str, check: Any) -> Any:
        if self.values.get(name) is None:
            raise CheckpointError(f"{self.files.path}: config.json does not say {name}")
        try:
            return check(self.values[name])
        except FormatError as error:
            raise CheckpointError(f"{self.files.path}: config.json: {error}") from error

    @property
    def architecture(self) -> str:
        """The class that was saved; empty where the file does not say."""
        found = self.values.get("architectures")
        return str(found[0]) if isinstance(found, list) and found else ""

    @property
    def id2label(self) -> Mapping[Any, str] | None:
        """Class names by number (text or integer)."""
        found = self.values.get("id2label")
        return found if isinstance(found, dict) and found else None

    def answer_notes(self) -> tuple[str, ...]:
        """A warning where the outputs are not of one class out of several."""
        kind = self.values.get("problem_type")
        return (ANSWERS[kind],) if isinstance(kind, str) and kind in ANSWERS else ()


CLASSIC = BlockNames(
    norm1="layernorm_before",
    qkv=("attention.query", "attention.key", "attention.value"),
    proj="attention.o_proj",
    norm2="layernorm_after",
    fc1=("mlp.fc1",),
    fc2="mlp.fc2",
)
"""The block of ViT, DeiT, ViViT and VideoMAE in `one_dialect`."""

SELF_ATTENTION = BlockNames(
    norm1="layer_norm1",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    proj="self_attn.out_proj",
    norm2="layer_norm2",
    fc1=("mlp.fc1",),
    fc2="mlp.fc2",
)
"""The block of image-text towers, and of V-JEPA 2's pooler."""
