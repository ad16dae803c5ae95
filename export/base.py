"""What every exporter file looks like: it declares its `TARGETS` and has one function `build`.

::

    TARGETS: tuple[Target, ...]
    def build(graph: Graph, target: Target, folder: Path) -> Built: ...

A file with INT8 targets takes their calibration table as a fourth argument, and may say which scheme it wants:
`def activations(target: Target) -> Activations`; int8 without a zero point otherwise.

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
    """

    artifact: str
    details: Mapping[str, Any] = field(default_factory=dict)
    image: bool = False
    deferred: bool = False
