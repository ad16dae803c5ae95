"""The interface of an exporter module: it declares its `TARGETS` and has one function `build`.

::

    TARGETS: tuple[Target, ...]
    def build(context: BuildContext) -> Built: ...

For its INT8 targets, the module may define::

    def activation_scheme(target: Target) -> ActivationScheme          # default: int8 without a zero point
    def integer_format(target: Target) -> IntegerFormat                # default: scales in float32, sums are exact
    def calibration_request(graph: Graph, target: Target) -> CalibrationRequest  # default: linears only
    def quantized_graph(model, table, target) -> ModelProto            # what is simulated; default: quantize.qdq

Where the runtime shows no inner tensors, it may define::

    def build_showing(context: BuildContext, names: Sequence[str]) -> Built  # the artifact also returns inner tensors

for the proof of a model with fewer tokens: the backend (`edgetube.runtimes.base.FixedOutputs`) then shows which leave.

The module is imported to list the targets, so it imports torch, onnx and the vendor's package inside `build`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetube.targets import Target

if TYPE_CHECKING:  # they import onnx
    import onnx

    from edgetube.bundle import Bundle
    from edgetube.calibration.numeric import Moments
    from edgetube.calibration.table import CalibrationTable
    from edgetube.export.canonical import Graph


def no_moments(graph: Graph) -> Mapping[str, Moments]:
    """For a `BuildContext` that measures nothing."""
    return {}


@dataclass(frozen=True)
class BuildContext:
    """What an exporter builds an artifact of, and what it may ask for.

    Attributes:
        graph: the canonical graph; of an int8 target, equalised as its table was made.
        target: with its settings.
        folder: of the staged bundle; the artifact's files go there.
        table: of an int8 target: which linears compute in integers, and their scales.
        image: traces the graph that answers one image with the same weights; None where the model takes none.
        moments: measures the input moments of each linear of a graph with a bias, by its weight.
    """

    graph: Graph
    target: Target
    folder: Path
    table: CalibrationTable | None = None
    image: Callable[[], Graph] | None = None
    moments: Callable[[Graph], Mapping[str, Moments]] = no_moments


@dataclass(frozen=True)
class Built:
    """The result of `build`.

    Attributes:
        artifact: name of the file or folder in the bundle that the backend opens.
        details: for the manifest's "build", plain JSON.
        image: the artifact also takes single images, with the same weights.
        deferred: the device finishes building the artifact on first load.
        table: of an int8 artifact that does not do all of its context's table: what it does.
        notes: on an int8 artifact, for the user; shown after the export.
        integer_macs: multiply-accumulates by constants in 8-bit integers, in one call of an int8 artifact; counted in
            the artifact or in the runtime's optimised graph.
        showing: builds the artifact again in a folder, see `build_showing`; None where the exporter has no such
            function. Set by `edgetube.export.build`.
        simulation: of an int8 artifact with fewer tokens, the Q/DQ graph that simulates it. Set by
            `edgetube.export.int8_build`.
    """

    artifact: str
    details: Mapping[str, Any] = field(default_factory=dict)
    image: bool = False
    deferred: bool = False
    table: CalibrationTable | None = None
    notes: tuple[str, ...] = ()
    integer_macs: int = 0
    showing: Callable[[Path, Sequence[str]], Bundle] | None = None
    simulation: onnx.ModelProto | None = None


@dataclass(frozen=True)
class CalibrationRequest:
    """What an exporter needs from calibration, in addition to the linears in the table.

    Attributes:
        tensors: names of further tensors whose ranges go into the table, for the scheme of the target.
        clips: number of calibration clips in the bundle, in `edgetube.bundle.CALIBRATION_CLIPS`: (N, T, H, W, 3) uint8.
        wide: names of further tensors that are uint16 whatever the scheme.
    """

    tensors: tuple[str, ...] = ()
    clips: int = 0
    wide: tuple[str, ...] = ()
