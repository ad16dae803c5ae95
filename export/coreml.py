"""Targets of Core ML: the canonical graph as an ML program in a `.mlpackage`, built on any machine.

The program is built operation by operation with explicit types (`edgetube.export.mlprogram`), and no pass of the
converter runs. `docs/coreml.md` says how an app uses the package.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from edgetube import __version__, mlpackage
from edgetube.errors import InputError
from edgetube.export.base import BuildContext, Built
from edgetube.mlpackage import Ref
from edgetube.precision import Precision
from edgetube.runtimes.coreml import NEEDS as RUN_NEEDS
from edgetube.targets import Setting, Target

if TYPE_CHECKING:
    from edgetube.calibration.numeric import Moments
    from edgetube.calibration.table import CalibrationTable, IntegerFormat, LinearPlan, Range
    from edgetube.export.canonical import Graph

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


INT8_SETTINGS = (
    Setting("deployment", "iOS17", "oldest system that opens the package (iOS17: macOS 14)", ("iOS17", "iOS18")),
    *(setting for setting in SETTINGS if setting.name not in ("deployment", "functions")),
)
"""Older systems do not quantise activations, and ranges calibrated on videos do not fit images."""


def _target(precision: Precision, summary: str, tolerance: float | None) -> Target:
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
        arithmetic=("float16",),
        settings=INT8_SETTINGS if precision.quantises_activations else SETTINGS,
    )


TARGETS = (
    _target(Precision.FP16, "float16, for the neural engine and the GPU", 2e-2),
    _target(Precision.W8, "weights in int8, computed in float16: half the size", 5e-2),
    _target(Precision.W4, "weights in 16-entry palettes, computed in float16: a quarter of the size", 0.35),
    _target(
        Precision.W8A8,
        "linears in int8, weights and activations, for A17 Pro, M4 and later; calibrated on clips",
        None,
    ),
)


NOTES = {
    "frames": "RGB frames (clip, time, height, width, colour), whole numbers 0 to 255, not normalised",
    "logits": "One number a class, before the softmax",
    "tokens": "Embedded tokens",
    "label": "The most probable class",
    "label_probs": "Probability of each class",
}


def integer_format(target: Target) -> IntegerFormat:
    """Scales in float16, like all constants; pixels are divided so that their sums stay in its range.

    Apple's processors accumulate integers in more than 16 bits, so weights keep all of their 8 bits.
    """
    from edgetube.calibration.table import IntegerFormat
    from edgetube.export.float16 import PIXEL_SCALE

    return IntegerFormat("float16", PIXEL_SCALE)


def build(context: BuildContext) -> Built:
    """Write `model.mlpackage`.

    Raises:
        InputError: settings that exclude each other, a pin that matches nothing, or a table for another graph.
        SpecError: an operator that has no translation, or a number beyond float16.
    """
    graph, target, path = context.graph, context.target, context.folder / "model.mlpackage"
    both = target.chosen.get("functions") == "video+image"
    if both and target.setting("deployment") != "iOS18":
        raise InputError("functions=video+image needs deployment=iOS18: older systems know one function a package")
    if both and context.image is None:
        raise InputError(
            "functions=video+image needs a video model that accepts images: with a 2-D tube, fixed positions"
        )
    with _quiet():
        if both and context.image is not None:
            _save_both(context, context.image(), path)
        else:
            _save(_convert(context), graph, path)
    details: dict[str, Any] = {"settings": {s.name: target.setting(s.name) for s in target.settings}}
    if context.table is not None:
        products = integer_products(path)
        details["integers"] = dict(Counter(operation for operation, _ in products))
        return Built(path.name, details, integer_macs=sum(macs for _, macs in products))
    return Built(path.name, details, image=both)


def integer_products(path: Path) -> list[tuple[str, int]]:
    """The products of a saved package with two int8 operands: operation, and multiply-accumulates in one call.

    They are read from the file. A device may multiply the integers or the dequantised values.
    """
    operations = mlpackage.load(path).functions["main"].operations
    makers = {name: operation for operation in operations for name, _ in operation.outputs}
    found = []
    for operation in operations:
        x, weight = (
            makers.get(refs[0].name) if isinstance(refs[0], Ref) else None
            for refs in (operation.inputs.get(side, ("",)) for side in ("x", "weight"))
        )
        if x is None or x.kind != "dequantize" or weight is None or not weight.kind.startswith("constexpr_"):
            continue
        ((_, output),), ((_, matrix),) = operation.outputs, weight.outputs  # the weight is (O, I, ...)
        found.append((operation.kind, math.prod(output.shape) * math.prod(matrix.shape[1:])))
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Context manager: silences the converter's progress bars, logs and warnings of temporary folders."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it imports where it is installed, ExecuTorch among them
            from coremltools.converters.mil.mil.passes import pass_pipeline

        with mock.patch.object(pass_pipeline, "tqdm", lambda passes, **_: passes), warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # temporary folders that it leaves to the collector
            yield
    finally:
        logger.setLevel(level)


def _convert(context: BuildContext) -> Any:
    """The package in memory, one function `main`."""
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Program, types

    from edgetube.calibration.graphs import select_linears
    from edgetube.export.mlprogram import Lowering, NeuralEngineLowering
    from edgetube.export.mlweights import WeightStorage

    graph, target = context.graph, context.target
    deployment = getattr(ct.target, target.setting("deployment"))
    lowering = NeuralEngineLowering if target.setting("layout") == "columns" else Lowering
    pins = [pin for pin in target.setting("fp32").split(",") if pin]
    output = graph.model.graph.output[0].name
    classify = bool(graph.labels) and graph.batch == 1
    kind = types.int32 if target.setting("input") == "int32" else types.fp16
    frames = mb.placeholder(shape=(graph.batch, *graph.contract.shape), dtype=kind)
    program = Program()
    with Function({"frames": frames}, opset_version=deployment) as function:
        blocks = target.setting("deployment") == "iOS18"
        uint4 = types.np_uint4_dtype if blocks else None
        moments = partial(context.moments, graph)
        encoder = {linear.weight for linear in select_linears(graph.model, graph.roles.linears)}
        storage = WeightStorage(mb, target.precision, uint4, encoder, _plans(graph, context.table), moments)
        translation = lowering(mb, graph.model, storage.weight, pins, storage.activation, storage.corrected_bias)
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
    """Write a package with the metadata that Xcode shows."""
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


def _save_both(context: BuildContext, image: Graph, path: Path) -> None:
    """One package with the functions `video`, the default, and `image`; equal weights are stored once."""
    import coremltools as ct
    from coremltools.models.utils import MultiFunctionDescriptor, save_multifunction

    with tempfile.TemporaryDirectory() as folder:
        descriptor = MultiFunctionDescriptor()
        for name, part_of in (("video", context), ("image", _with_shared_weights(context, image))):
            part = Path(folder) / f"{name}.mlpackage"
            _save(_convert(part_of), part_of.graph, part)
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


def _with_shared_weights(context: BuildContext, image: Graph) -> BuildContext:
    """The image graph with the second moments of the video graph, so that both round and share the same weights.

    Its biases are corrected for images.
    """

    def moments(graph: Graph) -> dict[str, Moments]:
        read = context.moments(context.graph)
        return {name: replace(found, second=read[name].second) for name, found in context.moments(graph).items()}

    return replace(context, graph=image, moments=moments)


def _plans(graph: Graph, table: CalibrationTable | None) -> dict[str, tuple[LinearPlan, Range]]:
    """Plan and activation range of each weight that the table quantises.

    Raises:
        InputError: the table is for another graph.
    """
    if table is None:
        return {}
    from edgetube.calibration import graphs

    table.check(graphs.digest(graph.model))
    return {plan.weight: (plan, table.ranges[plan.activation]) for plan in table.quantised}
