"""The calibration table: ranges of the quantised tensors, the linears that are quantised, their scales, and reasons.

A table belongs to one float graph, the *equalised* one, with folded scales and corrected biases; `model` is the hash of
that graph. `docs/int8.md` documents the JSON.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt

from edgetube import strict
from edgetube.errors import EdgetubeError, FormatError, InputError, SpecError
from edgetube.files import atomic_write

SCHEMA = 1

INT8_MAX = 127
"""Largest magnitude of symmetric int8; -128 is not used, so that the grid is symmetric."""

ActivationScheme = Literal["int8", "uint8", "uint16"]
"""Activation scheme, by the name of its integers: symmetric int8, or uint8 or uint16 with a zero point."""

INTEGERS: Mapping[ActivationScheme, tuple[int, int]] = {"int8": (-128, 127), "uint8": (0, 255), "uint16": (0, 65535)}
"""The smallest and largest integer of an activation."""

ScaleType = Literal["float16", "float32"]
"""The type that a runtime stores scales in."""

CACHE_HEADER = re.compile(r"TRT-\S+-\S*Calibration\S*")


@dataclass(frozen=True)
class IntegerFormat:
    """How a target stores and multiplies integers.

    Attributes:
        dtype: of a scale.
        pixels: the target divides pixels by this number: their scale is divided by it, and the scales of weights that
            multiply pixels are multiplied.
        safe_pairs: limit neighbouring weights, because some of the target's processors add two 8-bit products in 16
            bits: see `edgetube.calibration.numeric.MAX_PAIR_SUM`.
    """

    dtype: ScaleType = "float32"
    pixels: float = 1.0
    safe_pairs: bool = False


FLOAT32_SCALES = IntegerFormat()


def stored_scales(scales: npt.ArrayLike, dtype: ScaleType, name: str = "a tensor") -> npt.NDArray[np.float32]:
    """Quantisation scales rounded to the nearest normal numbers of `dtype`, as float32.

    Smaller scales become the smallest normal number: accelerators flush subnormal numbers to zero, and a scale of zero
    divides by zero. A scale of zero, where all values are zero, becomes 1.

    Args:
        name: of the tensor, for the error message.

    Raises:
        SpecError: a scale is above the largest number of `dtype`, or NaN.
    """
    given, limits = np.asarray(scales, np.float64), np.finfo(dtype)
    if not (given <= float(limits.max)).all():
        raise SpecError(
            f"{name} needs a scale of {given.max():.3g}; {dtype} ends at {float(limits.max):.6g}: export this model "
            "to a target in float32, or keep what uses it in float"
        )
    kept = np.where(given == 0, 1.0, np.maximum(given, float(limits.smallest_normal)))
    return kept.astype(dtype).astype(np.float32)


@dataclass(frozen=True)
class Range:
    """The part [low, high] of a tensor's values that its integers cover; values outside saturate.

    Attributes:
        low, high: float32 values, low <= 0 <= high, so that zero is exact.
        method: the observer that found it.
        scheme: of its integers; None where it is that of its table.
    """

    low: float
    high: float
    method: str
    scheme: ActivationScheme | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= 0 <= self.high):
            raise InputError(f"a range is [{self.low}, {self.high}]; expected finite numbers around zero")

    @property
    def symmetric(self) -> float:
        """Scale of int8 with zero point 0."""
        return _scale(max(-self.low, self.high) / INT8_MAX)

    @property
    def asymmetric(self) -> tuple[float, int]:
        """Scale and zero point of uint8."""
        return self._unsigned(INTEGERS["uint8"][1])

    def _unsigned(self, largest: int) -> tuple[float, int]:
        scale = _scale((self.high - self.low) / largest)
        return scale, min(largest, max(0, round(-self.low / scale)))

    def parameters(self, activations: ActivationScheme) -> tuple[float, int]:
        """Scale and zero point in a scheme."""
        return (self.symmetric, 0) if activations == "int8" else self._unsigned(INTEGERS[activations][1])

    def stored(self, activations: ActivationScheme, dtype: ScaleType, unit: float = 1.0) -> Range:
        """The nearest range whose scale, divided by `unit`, is a number of `dtype`: see `stored_scales`."""
        scale, _ = self.parameters(activations)
        wanted = float(stored_scales(scale / unit, dtype, "an activation")) * unit
        if wanted == scale or self.low == self.high:
            return self
        if activations == "int8":
            exact = max(-self.low, self.high) / INT8_MAX
        else:
            exact = (self.high - self.low) / INTEGERS[activations][1]
        scale = exact if exact < SMALLEST_NORMAL else scale
        low, high = self.low * wanted / scale, self.high * wanted / scale
        return replace(self, low=shortest_float32(low), high=shortest_float32(high))


def _scale(value: float) -> float:
    return float(stored_scales(value, "float32", "an activation"))


@dataclass(frozen=True)
class LinearPlan:
    """How one linear layer is quantised.

    Attributes:
        name: its scope in the graph, `blocks.3.attn.qkv`.
        activation: the tensor that it reads.
        weight: its initializer (K, N).
        weight_scales: one float32 per output channel (N,), symmetric int8; empty when the layer stays float.
        precision: "int8", or "float" where it fell back.
        reason: why, for the user.
    """

    name: str
    activation: str
    weight: str
    weight_scales: tuple[float, ...]
    precision: Literal["int8", "float"]
    reason: str = ""


@dataclass(frozen=True)
class CalibrationTable:
    """The result of a calibration.

    Attributes:
        model: sha256 of the float graph that the table is for, see `edgetube.calibration.graphs.digest`.
        clips: {"sha256", "count", "name"} of the calibration clips.
        activations: the activation scheme of the ranges, but of those that state another one.
        ranges: tensor -> range.
        linears: every linear of the graph in order, also those that stay float.
        versions: of the tools.
    """

    model: str
    clips: Mapping[str, Any]
    activations: ActivationScheme
    ranges: Mapping[str, Range]
    linears: tuple[LinearPlan, ...]
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def quantised(self) -> tuple[LinearPlan, ...]:
        """The linears that compute in int8."""
        return tuple(plan for plan in self.linears if plan.precision == "int8")

    def check(self, model: str) -> None:
        """Check that the table is for the graph with the hash `model`.

        Raises:
            InputError: it is for another one.
        """
        if model != self.model:
            raise InputError(
                f"the calibration table is for the graph {self.model[:12]}, this graph is {model[:12]}: "
                "calibrate this model, a table does not carry over"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; every float is a float32 in its shortest decimal form."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "clips": dict(self.clips),
            "activations": self.activations,
            "versions": dict(self.versions),
            "ranges": {
                name: {
                    "low": shortest_float32(r.low),
                    "high": shortest_float32(r.high),
                    "method": r.method,
                    **({"scheme": r.scheme} if r.scheme else {}),
                }
                for name, r in self.ranges.items()
            },
            "linears": [
                asdict(p) | {"weight_scales": [shortest_float32(s) for s in p.weight_scales]} for p in self.linears
            ],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CalibrationTable:
        """Raises InputError when `data` is not a table of this schema."""
        try:
            schema = strict.integer(strict.record(data, "it", ["schema"])["schema"], "schema", 1, 1 << 31)
            if schema != SCHEMA:
                raise InputError(f"calibration table schema {schema}; this edgetube reads {SCHEMA}")
            strict.record(data, "it", ("schema", *(f.name for f in fields(cls))), ())
            versions = strict.record(data["versions"], "versions")
            return cls(
                model=strict.text(data["model"], "model"),
                clips=strict.record(data["clips"], "clips"),
                activations=cast(
                    ActivationScheme, strict.choice(data["activations"], "activations", get_args(ActivationScheme))
                ),
                ranges={
                    name: _range(r, f"ranges.{name}") for name, r in strict.record(data["ranges"], "ranges").items()
                },
                linears=tuple(
                    _plan(p, f"linears[{i}]") for i, p in enumerate(strict.items(data["linears"], "linears"))
                ),
                versions={name: strict.text(version, f"versions.{name}") for name, version in versions.items()},
            )
        except FormatError as error:
            raise InputError(f"not a calibration table ({error}); calibrate again") from error

    def save(self, path: str | Path) -> Path:
        """Write JSON atomically, one line per tensor and a few per linear."""
        return atomic_write(path, _lines(self.to_json()))

    @classmethod
    def load(cls, path: str | Path) -> CalibrationTable:
        """Read what `save` wrote.

        Raises:
            InputError: no such file, or it is not a calibration table.
        """
        try:
            data = strict.read_json(Path(path))
        except (OSError, FormatError) as error:
            raise InputError(f"{path} is not a calibration table: {error}") from error
        return cls.from_json(data)

    def to_cache(self, version: str = "100300") -> str:
        """TensorRT's calibration cache: a header line, then `tensor: scale` with the float32 in big-endian hex."""
        lines = [f"{name}: {struct.pack('>f', r.symmetric).hex()}" for name, r in self.ranges.items()]
        return "\n".join([f"TRT-{version}-EntropyCalibration2", *lines, ""])

    @staticmethod
    def from_cache(text: str) -> dict[str, Range]:
        """The symmetric ranges of a TensorRT calibration cache.

        Raises:
            InputError: the text is not a cache; says which line.
        """
        header, *lines = text.strip().splitlines() or [""]
        if not CACHE_HEADER.fullmatch(header):
            raise InputError(f"not a calibration cache: it begins with {header[:40]!r}; expected TRT-...")
        ranges = {}
        for number, line in enumerate(lines, start=2):
            name, _, digits = line.rpartition(": ")
            if not name or not re.fullmatch(r"[0-9a-fA-F]{8}", digits.strip()):
                raise InputError(f"line {number} of the calibration cache is {line[:60]!r}; expected tensor: 3c010a14")
            (scale,) = struct.unpack(">f", bytes.fromhex(digits.strip()))
            try:
                ranges[strict.text(name, "the tensor")] = Range(-scale * INT8_MAX, scale * INT8_MAX, "cache")
            except EdgetubeError as error:
                raise InputError(f"line {number} of the calibration cache: {error}") from error
        return ranges


def _range(data: Any, where: str) -> Range:
    found = strict.record(data, where, ("low", "high", "method"), ("scheme",))
    low, high = (strict.number(found[key], f"{where}.{key}", -LARGEST, LARGEST) for key in ("low", "high"))
    return Range(low, high, strict.text(found["method"], f"{where}.method"), _scheme(found.get("scheme"), where))


def _scheme(data: Any, where: str) -> ActivationScheme | None:
    """A scheme; None, and absent in files of older versions, for that of the table."""
    if data is None:
        return None
    return cast(ActivationScheme, strict.choice(data, f"{where}.scheme", get_args(ActivationScheme)))


def _plan(data: Any, where: str) -> LinearPlan:
    needed = ("name", "activation", "weight", "weight_scales", "precision")
    found = strict.record(data, where, needed, ("reason",))
    scales = strict.items(found["weight_scales"], f"{where}.weight_scales")
    name, activation, weight = (strict.text(found[key], f"{where}.{key}") for key in ("name", "activation", "weight"))
    return LinearPlan(
        name,
        activation,
        weight,
        tuple(strict.number(scale, f"{where}.weight_scales", 0, LARGEST) for scale in scales),
        cast(Literal["int8", "float"], strict.choice(found["precision"], f"{where}.precision", ("int8", "float"))),
        strict.text(found.get("reason", ""), f"{where}.reason"),
    )


LARGEST, SMALLEST_NORMAL = float(np.finfo(np.float32).max), float(np.finfo(np.float32).smallest_normal)


def shortest_float32(value: float) -> float:
    """The float whose repr is the shortest decimal that rounds to the same float32; tables store these."""
    return float(str(np.float32(value)))


def _lines(data: Mapping[str, Any]) -> str:
    """JSON whose innermost objects and lists take one line each."""
    text = json.dumps(data, indent=1)
    text = re.sub(r"\[([^\[\]{}]*)\]", lambda m: "[" + " ".join(m[1].split()) + "]", text)
    return re.sub(r"\{([^\[\]{}]*)\}", lambda m: "{" + " ".join(m[1].split()) + "}", text) + "\n"
