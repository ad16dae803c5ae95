"""Input moments of linears, measured block by block: only one block's Gram matrices are in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from threadpoolctl import threadpool_limits

from edgetube.calibration import graphs
from edgetube.calibration.graphs import OpenGraph, Stage
from edgetube.calibration.numeric import Gram, GramAccumulator, Moments
from edgetube.calibration.side_by_side import in_order
from edgetube.errors import InputError
from edgetube.roles import GraphRoles
from edgetube.video import Frames

Values = list[npt.NDArray[Any]]
"""A tensor, clip by clip."""


class StoredMoments(Mapping[str, Moments]):
    """Moments by the name of the weight, in files of a folder; mapped when they are asked for.

    Linears that read the same tensor have the same moments, which are stored once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._means: dict[str, np.ndarray] = {}
        self._files: dict[str, Path] = {}

    def add(self, weights: Sequence[str], moments: Moments) -> None:
        """Store the moments of what several linears read.

        Raises:
            OSError: the disk is full or fails.
        """
        path = self.folder / f"moments-{len(self._files)}.npy"
        np.save(path, moments.second)
        for name in weights:
            self._means[name], self._files[name] = moments.mean, path

    def __getitem__(self, name: str) -> Moments:
        return Moments(self._means[name], np.load(self._files[name], mmap_mode="r"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def measure(
    model: onnx.ModelProto, roles: GraphRoles, clips: Sequence[Frames], open_graph: OpenGraph, folder: Path
) -> StoredMoments:
    """Moments of the input of each linear with a bias, over clips (T, H, W, 3) and tokens, by its weight.

    The graph runs stage by stage on all clips. In memory are the Gram matrices of one stage, which for a block of width
    D and hidden width H take 8 (3 D^2 + H^2) bytes, and what later stages read of every clip.

    Args:
        folder: for the moments, 4 K^2 bytes for each linear of K inputs.

    Raises:
        InputError: an input is NaN or infinite.
        SpecError: the graph has not what its roles name.
        OSError: the disk is full or fails.
    """
    found = StoredMoments(folder)
    (frames,) = model.graph.input
    batch = frames.type.tensor_type.shape.dim[0].dim_value
    streams: dict[str, Values] = {frames.name: [np.stack([clip] * batch) for clip in clips]}
    stages = graphs.stages(model, roles)
    for index, stage in enumerate(stages):
        later = {name for after in stages[index + 1 :] for name in after.inputs}
        made = _measure_stage(model, stage, streams, later, open_graph, found)
        streams = {name: values for name, values in (streams | made).items() if name in later}
    return found


def _measure_stage(
    model: onnx.ModelProto,
    stage: Stage,
    streams: Mapping[str, Values],
    later: set[str],
    open_graph: OpenGraph,
    found: StoredMoments,
) -> dict[str, Values]:
    """Add the moments of a stage; its outputs that later stages read."""
    inside = {node.name for node in stage.nodes}
    linears = [linear for linear in graphs.linears(model) if linear.node in inside and linear.bias is not None]
    read = list(dict.fromkeys(linear.activation for linear in linears))
    kept = [name for name in stage.outputs if name in later]
    fetched = [name for name in dict.fromkeys([*kept, *read]) if name not in streams]
    if not fetched and not read:
        return {}
    part = graphs.extract_subgraph(graphs.extract_stage(model, stage), fetched)
    call, needed = open_graph(part), [value.name for value in part.graph.input]
    grams: dict[str, GramAccumulator] = {}
    made: dict[str, Values] = {name: [] for name in kept}

    def run(index: int) -> tuple[list[npt.NDArray[Any]], dict[str, Gram]]:
        results = dict(zip(fetched, call({name: streams[name][index] for name in needed}), strict=True))
        parts = {}
        for name in read:
            values = results[name] if name in results else streams[name][index]
            rows = np.asarray(values, np.float32).reshape(-1, values.shape[-1])
            if not np.isfinite(rows).all():
                raise InputError(f"the model gives NaN or infinite values in {name}; check its weights")
            parts[name] = Gram.of(rows)
        return [results[name] for name in kept], parts

    with threadpool_limits(1, "blas"):
        for outputs, parts in in_order(run, range(len(next(iter(streams.values()))))):
            for name, value in zip(kept, outputs, strict=True):
                made[name].append(value)
            for name, gram in parts.items():
                grams.setdefault(name, GramAccumulator(len(gram.product))).take(gram)
    for name in read:
        found.add([linear.weight for linear in linears if linear.activation == name], grams.pop(name).moments)
    return made
