"""Targets of Core ML: the canonical graph as an ML program in a `.mlpackage`, built on any machine.

The program is typed here, operation by operation (`edgetube.export.mlprogram`), and none of the converter's own passes
runs: what is written is what was said. `docs/coreml.md` says how an app uses the package.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import numpy.typing as npt

from edgetube import __version__
from edgetube.errors import InputError, SpecError
from edgetube.export.base import Built
from edgetube.runtimes.coreml import NEEDS as RUN_NEEDS
from edgetube.targets import Setting, Target

if TYPE_CHECKING:
    from edgetube.export.graph import Graph

Array = npt.NDArray[Any]

SETTINGS = (
    Setting(
        "deployment", "iOS17", "oldest system that opens the package (iOS17: macOS 14)", ("iOS16", "iOS17", "iOS18")
    ),
    Setting(
        "layout", "rows", "rows: (B, N, D); columns: (B, D, 1, N), as the neural engine likes it", ("rows", "columns")
    ),
    Setting("input", "float16", "type of the frames, 0..255 either way", ("float16", "int32")),
    Setting(
        "functions", "video", "video+image: one package, one set of weights; from iOS18 on", ("video", "video+image")
    ),
    Setting("fp32", "", "globs of tensors that are computed in float32: blocks.3.norm1,blocks.*.norm2"),
)


def _target(precision: Any, summary: str, tolerance: float) -> Target:
    return Target(
        name=f"coreml-{precision}",
        precision=precision,
        backend="coreml",
        summary=summary,
        build_needs=("torch", "onnx", "onnxscript", "safetensors", "coremltools"),
        run_needs=RUN_NEEDS,
        extra="export,coreml",
        lowering="conv2d",
        tolerance=tolerance,
        settings=SETTINGS,
    )


TARGETS = (
    _target("fp16", "float16, for the neural engine and the GPU", 2e-2),
    _target("w8", "weights in int8, computed in float16: half the size", 1e-1),
    _target("w4", "weights in 16-entry palettes, computed in float16: a quarter of the size", 1.0),
)

SMALL = 2048
"""Weights of fewer elements stay float16: compressing them saves nothing and costs accuracy."""

PALETTE = 16
GROUP = 16
"""Output channels that share a palette, from iOS 18 on, or a divisor; before, a weight has one palette."""

NOTES = {
    "frames": "RGB frames (clip, time, height, width, colour), whole numbers 0 to 255, not normalised",
    "logits": "One number a class, before the softmax",
    "tokens": "Embedded tokens",
    "label": "The most probable class",
    "label_probs": "Probability of each class",
}


def build(graph: Graph, target: Target, folder: Path) -> Built:
    """Write `model.mlpackage`.

    Raises:
        InputError: settings that exclude each other, or a pin that matches nothing.
        SpecError: an operator that has no translation, or a number beyond float16.
    """
    both = target.setting("functions") == "video+image"
    if both and target.setting("deployment") != "iOS18":
        raise InputError("functions=video+image needs deployment=iOS18: older systems know one function a package")
    if both and graph.image is None:
        raise InputError(
            "functions=video+image needs a video model that accepts images: with a 2-D tube, fixed positions"
        )
    path = folder / "model.mlpackage"
    with _quiet():
        if both and graph.image is not None:
            _save_both(graph, graph.image(), target, path)
        else:
            _save(_convert(graph, target), graph, path)
    return Built(path.name, {"settings": {s.name: target.setting(s.name) for s in target.settings}}, image=both)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the converter's progress bars, its remarks about packages that it does not use and its litter."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from coremltools.converters.mil.mil.passes import pass_pipeline

        with mock.patch.object(pass_pipeline, "tqdm", lambda passes, **_: passes), warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # temporary folders that it leaves to the collector
            yield
    finally:
        logger.setLevel(level)


def _convert(graph: Graph, target: Target) -> Any:
    """The package in memory, one function `main`."""
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Program, types

    from edgetube.export.mlprogram import EngineLowering, Lowering

    deployment = getattr(ct.target, target.setting("deployment"))
    lowering = EngineLowering if target.setting("layout") == "columns" else Lowering
    pins = [pin for pin in target.setting("fp32").split(",") if pin]
    output = graph.model.graph.output[0].name
    classify = bool(graph.labels) and graph.batch == 1
    kind = types.int32 if target.setting("input") == "int32" else types.fp16
    frames = mb.placeholder(shape=(graph.batch, *graph.contract.shape), dtype=kind)
    program = Program()
    with Function({"frames": frames}, opset_version=deployment) as function:
        translation = lowering(mb, graph.model, _weights(mb, target), pins)
        narrow = translation.run(function.inputs["frames"])
        answer = mb.cast(x=narrow, dtype="fp32", name=output) if narrow.dtype != types.fp32 else narrow
        if classify:
            mb.softmax(x=answer, axis=-1, name="probabilities")
        function.set_outputs([answer])
    program.add_function("main", function)
    return ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=deployment,
        compute_precision=ct.precision.FLOAT32,  # the types are stated; nothing is to be narrowed again
        pass_pipeline=ct.PassPipeline.EMPTY,
        classifier_config=_classifier(graph.labels) if classify else None,
        skip_model_load=True,
    )


def _classifier(labels: tuple[str, ...]) -> Any:
    import coremltools as ct

    return ct.ClassifierConfig(
        list(labels), predicted_feature_name="label", predicted_probabilities_output="probabilities"
    )


def _save(model: Any, graph: Graph, path: Path) -> None:
    """Write a package with what a person sees of it in Xcode."""
    spec = graph.spec
    model.short_description = (
        f"Sparse-tube video transformer: {spec.tokens} tokens of {len(spec.active)} tubes, {spec.depth} blocks of "
        f"width {spec.width}"
    )
    model.author, model.version = "edgetube", __version__
    model.user_defined_metadata["edgetube.input"] = json.dumps(graph.contract.to_json(), sort_keys=True)
    model.user_defined_metadata["edgetube.model"] = json.dumps(spec.to_json(), sort_keys=True)
    for descriptions in (model.input_description, model.output_description):
        for name in descriptions:
            descriptions[name] = NOTES[name]
    model.save(str(path))


def _save_both(video: Graph, image: Graph, target: Target, path: Path) -> None:
    """One package with the functions `video`, the default, and `image`; equal weights are stored once."""
    import coremltools as ct
    from coremltools.models.utils import MultiFunctionDescriptor, save_multifunction

    with tempfile.TemporaryDirectory() as folder:
        descriptor = MultiFunctionDescriptor()
        for name, graph in (("video", video), ("image", image)):
            part = Path(folder) / f"{name}.mlpackage"
            _save(_convert(graph, target), graph, part)
            descriptor.add_function(str(part), src_function_name="main", target_function_name=name)
        descriptor.default_function_name = "video"
        joined = Path(folder) / "joined.mlpackage"
        save_multifunction(descriptor, str(joined))
        source = ct.models.MLModel(str(Path(folder) / "video.mlpackage"), skip_model_load=True)
        model = ct.models.MLModel(str(joined), skip_model_load=True)
        for name in ("short_description", "author", "version"):
            setattr(model, name, getattr(source, name))
        model.user_defined_metadata.update(source.user_defined_metadata)
        model.save(str(path))


def _weights(mb: Any, target: Target) -> Callable[[str, Array, str], Any]:
    """How the target stores the weight (output channels first) of a matrix product."""
    from edgetube.export.mlprogram import label, narrow

    blocks = target.setting("deployment") == "iOS18"

    def plain(name: str, array: Array, _: str) -> Any:
        return mb.const(val=narrow(name, array, "fp16"), name=label(name))

    def integers(name: str, array: Array, activation: str) -> Any:
        if array.size < SMALL:
            return plain(name, array, activation)
        scales = channel_scales(array)
        data = quantise(array, scales)
        if blocks:
            scale = scales.reshape(-1, *[1] * (array.ndim - 1)).astype(np.float16)
            return mb.constexpr_blockwise_shift_scale(data=data, scale=scale, name=label(name))
        return mb.constexpr_affine_dequantize(
            quantized_data=data,
            scale=scales.astype(np.float16),
            zero_point=np.int8(0),
            axis=np.int32(0),
            name=label(name),
        )

    def palettes(name: str, array: Array, activation: str) -> Any:
        if not name.startswith("blocks."):  # the ends of the model: few weights, and errors that nothing evens out
            return integers(name, array, activation)
        if not blocks:
            lut, indices = palette(array)
            packed = indices.reshape(-1, 2) @ np.array([1, PALETTE], np.uint8)
            shape = np.array(array.shape, np.uint32)
            return mb.constexpr_lut_to_dense(lut=lut, indices=packed, shape=shape, name=label(name))
        from coremltools.converters.mil.mil.types import np_uint4_dtype

        groups = [palette(rows) for rows in np.split(array, len(array) // math.gcd(len(array), GROUP))]
        lut = np.stack([lut for lut, _ in groups]).reshape(len(groups), *[1] * (array.ndim - 1), PALETTE, 1)
        indices = np.concatenate([indices for _, indices in groups]).astype(np_uint4_dtype)
        return mb.constexpr_lut_to_dense(indices=indices, lut=lut, name=label(name))

    return {"fp16": plain, "w8": integers, "w4": palettes}[target.precision]


def channel_scales(array: Array) -> Array:
    """The scale (O,) float32 with which each output channel of (O, ...) fills int8 symmetrically.

    Raises:
        SpecError: a scale exceeds what float16 holds.
    """
    largest = np.abs(array).reshape(len(array), -1).max(axis=1)
    scales = np.where(largest > 0, largest / 127, 1).astype(np.float16)
    if not (np.isfinite(scales).all() and (scales > 0).all()):
        raise SpecError(f"weights from {largest.min():.3g} to {largest.max():.3g} a channel: float16 has no such scale")
    return scales.astype(np.float32)


def quantise(array: Array, scales: Array) -> Array:
    """The nearest int8 of each weight (O, ...), with one scale (O,) a channel."""
    steps = array / scales.reshape(-1, *[1] * (array.ndim - 1))
    return np.clip(np.rint(steps), -127, 127).astype(np.int8)


def palette(array: Array, steps: int = 50) -> tuple[Array, Array]:
    """The 16 float16 numbers that stand for an array with the least squared error, and each element's index.

    Lloyd's iteration on the sorted numbers: a cluster is a range, its mean a difference of cumulative sums.
    """
    flat = np.sort(array.astype(np.float64), axis=None)
    sums = np.concatenate([[0.0], np.cumsum(flat)])
    # Where a normal distribution has its 16 best levels: at the quantiles of one that is wider by sqrt(3).
    tails = np.sinh(np.linspace(-1.6, 1.6, PALETTE)) / np.sinh(1.6)
    centres = flat.mean() + tails * 2.7 * flat.std()
    for _ in range(steps):
        edges = np.searchsorted(flat, (centres[1:] + centres[:-1]) / 2)
        edges = np.concatenate([[0], edges, [len(flat)]])
        counts = np.diff(edges)
        moved = np.where(counts > 0, np.diff(sums[edges]) / np.maximum(counts, 1), centres)
        if np.array_equal(moved, centres):
            break
        centres = moved
    lut = centres.astype(np.float16)
    bounds = (lut[1:].astype(np.float32) + lut[:-1].astype(np.float32)) / 2
    return lut, np.searchsorted(bounds, array).astype(np.uint8)
