"""What an artifact's weights and activations are quantised to."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Literal

Activations = Literal["float32", "float16", "int8", "int16"]
"""Types of activations: floating-point, or integers of 8 or 16 bits, signed or not."""


class Precision(str, Enum):
    """A precision; it is the string that manifests, target names and JSON have.

    Attributes:
        weight_bits: bits of a stored weight.
        activations: of what type the activations are that meet these weights.
    """

    weight_bits: int
    activations: Activations

    FP32 = "fp32", 32, "float32"
    FP16 = "fp16", 16, "float16"
    W8A8 = "int8", 8, "int8"
    W8A16 = "w8a16", 8, "int16"
    W8 = "w8", 8, "float16"
    W4 = "w4", 4, "float16"

    def __new__(cls, name: str, weight_bits: int, activations: Activations) -> Precision:
        self = str.__new__(cls, name)
        self._value_, self.weight_bits, self.activations = name, weight_bits, activations
        return self

    def __str__(self) -> str:
        return str.__str__(self)

    @property
    def quantises_activations(self) -> bool:
        """Whether activations are integers, so that their ranges have to be calibrated."""
        return self.activations.startswith("int")

    def names(self, suffix: str) -> bool:
        """Whether a target's name may end with `suffix`: with the precision, or with its bits, `w8a8` for int8."""
        return suffix in (str(self), self.name.lower())

    @property
    def quantises_weights(self) -> bool:
        """Whether weights are integers or palettes."""
        return self.weight_bits <= 8


PRECISIONS: Mapping[str, Precision] = {str(precision): precision for precision in Precision}
"""Precisions by name."""
