"""What every exporter file looks like: it declares its `TARGETS` and has one function `build`.

::

    TARGETS: tuple[Target, ...]
    def build(graph: Graph, target: Target, folder: Path) -> Built: ...

A file with INT8 targets takes their calibration table as a fourth argument, and may say which scheme it wants:
`def activations(target: Target) -> ActivationScheme`; int8 without a zero point otherwise. How it stores and multiplies
integers it says in `def integer_format(target: Target) -> IntegerFormat`; scales in float32 and exact sums otherwise.
What else it wants of the calibration it says in `def wishes(graph: Graph, target: Target) -> Wishes`.

The file is imported to list the targets, so it imports torch, onnx and the vendor's package inside `build`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Built:
    """What `build` wrote.

    Attributes:
        artifact: the file or folder name in the bundle that the backend opens.
        details: what was chosen and counted, plain JSON, for the manifest's "build".
        image: the artifact also answers single images, from the same weights.
        deferred: the device completes the artifact on its first load.
        notes: what a person should know about an int8 artifact, in words; shown after the export.
        integer_macs: multiply-accumulates by constants that one call of an int8 artifact computes in 8-bit integers;
            counted in the artifact, or in what the runtime makes of it.
    """

    artifact: str
    details: Mapping[str, Any] = field(default_factory=dict)
    image: bool = False
    deferred: bool = False
    notes: tuple[str, ...] = ()
    integer_macs: int = 0


@dataclass(frozen=True)
class Wishes:
    """What an exporter wants of a calibration, beside the linears in the table.

    Attributes:
        tensors: names in the graph whose ranges the table should have too.
        clips: how many clips the bundle carries to the device, in `edgetube.bundle.CLIPS`: (N, T, H, W, 3) uint8.
    """

    tensors: tuple[str, ...] = ()
    clips: int = 0
