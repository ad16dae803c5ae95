"""What an artifact's weights and activations are quantised to."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum


class Precision(str, Enum):
    """A precision; it is the string that manifests, target names and JSON have.

    Attributes:
        weight_bits: bits of a stored weight.
        activation_bits: bits of the activations that meet these weights.
    """

    weight_bits: int
    activation_bits: int

    FP32 = "fp32", 32, 32
    FP16 = "fp16", 16, 16
    W8A8 = "int8", 8, 8
    W8 = "w8", 8, 16
    W4 = "w4", 4, 16

    def __new__(cls, name: str, weight_bits: int, activation_bits: int) -> Precision:
        self = str.__new__(cls, name)
        self._value_, self.weight_bits, self.activation_bits = name, weight_bits, activation_bits
        return self

    def __str__(self) -> str:
        return str.__str__(self)

    @property
    def quantises_activations(self) -> bool:
        """Whether activations are integers, so that their ranges have to be calibrated."""
        return self.activation_bits == 8

    @property
    def quantises_weights(self) -> bool:
        """Whether weights are integers or palettes."""
        return self.weight_bits <= 8


PRECISIONS: Mapping[str, Precision] = {str(precision): precision for precision in Precision}
"""Precisions by name."""
