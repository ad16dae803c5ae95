"""The interface of an exporter module: it declares its `TARGETS` and has one function `build`.

::

    TARGETS: tuple[Target, ...]
    def build(graph: Graph, target: Target, folder: Path) -> Built: ...

For an INT8 target, `build` takes the calibration table as a fourth argument, and the module may define::

    def activation_scheme(target: Target) -> ActivationScheme          # default: int8 without a zero point
    def integer_format(target: Target) -> IntegerFormat                # default: scales in float32, sums are exact
    def calibration_request(graph: Graph, target: Target) -> CalibrationRequest  # default: linears only

The module is imported to list the targets, so it imports torch, onnx and the vendor's package inside `build`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Built:
    """The result of `build`.

    Attributes:
        artifact: name of the file or folder in the bundle that the backend opens.
        details: for the manifest's "build", plain JSON.
        image: the artifact also takes single images, with the same weights.
        deferred: the device finishes building the artifact on first load.
        notes: on an int8 artifact, for the user; shown after the export.
        integer_macs: multiply-accumulates by constants in 8-bit integers, in one call of an int8 artifact; counted in
            the artifact or in the runtime's optimised graph.
    """

    artifact: str
    details: Mapping[str, Any] = field(default_factory=dict)
    image: bool = False
    deferred: bool = False
    notes: tuple[str, ...] = ()
    integer_macs: int = 0


@dataclass(frozen=True)
class CalibrationRequest:
    """What an exporter needs from calibration, in addition to the linears in the table.

    Attributes:
        tensors: names of further tensors whose ranges go into the table.
        clips: number of calibration clips in the bundle, in `edgetube.bundle.CALIBRATION_CLIPS`: (N, T, H, W, 3) uint8.
    """

    tensors: tuple[str, ...] = ()
    clips: int = 0
