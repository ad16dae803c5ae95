"""Targets of Core AI, Apple's runtime of iOS 27 and macOS 27: the canonical graph as a model asset, `model.aimodel`.

The graph becomes a PyTorch program (`edgetube.export.torchgraph`), which Apple's converter translates. `docs/coreai.md`
says what is verified here and what only a device can show.
"""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetube import __version__
from edgetube.errors import BackendError, SpecError
from edgetube.export.base import BuildContext, Built
from edgetube.precision import Precision
from edgetube.targets import Setting, Target

if TYPE_CHECKING:
    import onnx
    import torch
    from torch import Tensor

    from edgetube.calibration.table import IntegerFormat
    from edgetube.export.canonical import Graph

LAYOUT = Setting(
    "layout",
    "rows",
    "rows: linears are matrix products; columns: they are 1x1 convolutions over (B, D, 1, N), for the neural engine",
    ("rows", "columns"),
)


def _target(precision: Precision, summary: str, tolerance: float | None) -> Target:
    return Target(
        name=f"coreai-{precision}",
        precision=precision,
        backend="coreai",
        summary=summary,
        build_needs=("torch", "onnx", "onnxscript", "safetensors", "coreai", "coreai_torch"),
        run_needs=("coreai",),
        extra="export,coreai",
        lowering="conv2d",
        tolerance=tolerance,
        arithmetic=("float32",) if precision is Precision.FP32 else ("float16",),
        settings=(LAYOUT,),
    )


TARGETS = (
    _target(Precision.FP32, "float32, for the CPU and the GPU", 1e-4),
    _target(
        Precision.FP16,
        "float16, for the neural engine and the GPU; LayerNorm, softmax and the classifier in float32",
        2e-2,
    ),
    _target(Precision.W8A8, "linears in int8, weights and activations, the rest as in fp16; calibrated on clips", None),
)


def integer_format(target: Target) -> IntegerFormat:
    """Scales in float16, like the rest; pixels are divided so that their sums stay in its range."""
    from edgetube.calibration.table import IntegerFormat
    from edgetube.export.float16 import PIXEL_SCALE

    return IntegerFormat("float16", PIXEL_SCALE)


def build(context: BuildContext) -> Built:
    """Write `model.aimodel`.

    Raises:
        SpecError: an operator that has no translation, or a number beyond float16.
        BackendError: Apple's converter fails otherwise.
        ParityError: the asset lacks integers of the table.
    """
    return build_showing(context, ())


def build_showing(context: BuildContext, names: Sequence[str]) -> Built:
    """The same, which also returns inner tensors."""
    from edgetube.export import integer, quantize
    from edgetube.export.float16 import convert_to_fp16
    from edgetube.export.statistics import graph_statistics

    graph, target, path = context.graph, context.target, context.folder / "model.aimodel"
    columns = target.setting(LAYOUT.name) == "columns"
    details: dict[str, Any] = {"settings": {LAYOUT.name: target.setting(LAYOUT.name)}}
    if context.table is None:
        half = target.precision is not Precision.FP32
        model = convert_to_fp16(graph.model, answer_operators(graph)) if half else graph.model
        operations = convert(model, path, columns, metadata(graph), names)
        return Built(path.name, {**details, "graph": graph_statistics(model), "operations": operations})
    quantised = quantize.qdq(graph.model, context.table)
    model = convert_to_fp16(quantised)
    operations = convert(model, path, columns, metadata(graph), names)
    asked, kept = len(context.table.quantised), operations.get(WEIGHTS, 0)
    integer.assert_integer_coverage("Core AI", asked, kept)
    details["integers"] = integer.coverage(model, asked, kept, {WEIGHTS: kept})
    details |= {"graph": integer.statistics(graph.model, model), "operations": operations}
    return Built(path.name, details, integer_macs=integer.integer_macs(quantised))


def answer_operators(graph: Graph) -> frozenset[str]:
    """Names of the operators behind the last block that compute: the readout and the classifier.

    Core AI's CPU adds up products in float16. Nothing behind these evens their error out, and they are little work:
    most of the error of the built-in model's logits was theirs.
    """
    from edgetube.calibration import graphs

    last = graphs.stages(graph.model, graph.roles)[-1]
    moves = (*graphs.MOVES, "Concat", "Cast")
    return frozenset(node.name for node in last.nodes if last.name == "classifier" and node.op_type not in moves)


WEIGHTS = "blockwise_shift_scale"
"""The asset's operation that makes a weight of its integers."""


def metadata(graph: Graph) -> dict[str, str]:
    """What Xcode shows of an asset besides its author: `description`, and "input" and "model" of the manifest, JSON."""
    spec = graph.spec
    stated = {"input": graph.contract.to_json(), "model": spec.to_json()}
    return {
        "description": (
            f"Video transformer: {spec.tokens} tokens of {len(spec.active)} tubes, {spec.depth} blocks of width "
            f"{spec.width}"
        ),
        **{f"edgetube.{name}": json.dumps(value, sort_keys=True) for name, value in stated.items()},
    }


def convert(
    model: onnx.ModelProto,
    path: Path,
    columns: bool = False,
    stated: Mapping[str, str] | None = None,
    names: Sequence[str] = (),
) -> dict[str, int]:
    """Write a canonical graph, its float16 form or its Q/DQ form as a model asset.

    Args:
        path: of the asset, a folder `*.aimodel`; replaced if it exists.
        columns: linears are 1x1 convolutions over (B, D, 1, N).
        stated: see `metadata`.
        names: inner tensors that the asset also returns, behind the graph's output.

    Returns:
        How often the asset has each operation.

    Raises:
        SpecError: an operator has no translation; says which, and the layer.
        BackendError: the converter fails otherwise.
    """
    import torch

    from edgetube.export.torchgraph import TorchGraph

    shape = [axis.dim_value for axis in model.graph.input[0].type.tensor_type.shape.dim]
    outputs = (model.graph.output[0].name, *names)
    module = TorchGraph(model, outputs, linear_of_columns) if columns else TorchGraph(model, outputs)
    with _quiet(), torch.no_grad():
        import coreai_torch

        frames = torch.zeros(shape, dtype=torch.uint8)
        program = torch.export.export(module, (frames,)).run_decompositions(coreai_torch.get_decomp_table())
        # The other mode writes stack traces, with paths of this machine, into the asset.
        converter = coreai_torch.TorchConverter(mode=coreai_torch.TorchConverter.Mode.RELEASE)
        _register_integers(converter)
        try:
            converter.add_exported_program(program, input_names=[model.graph.input[0].name], output_names=list(outputs))
            summary = converter.to_coreai().save_asset(path, _record(stated or {})).summary()
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            text = " ".join(str(error).split())
            if refused := _refused(program, text):
                raise SpecError(f"{refused}: Core AI's converter has no translation: {text}") from error
            raise BackendError(f"Core AI's converter {coreai_torch.__version__} fails: {text}") from error
    return dict(summary.operation_distribution)


def _record(stated: Mapping[str, str]) -> Any:
    from coreai.runtime import AIModelAssetMetadata

    record = AIModelAssetMetadata()
    record.author = f"edgetube {__version__}"
    for name, value in stated.items():
        if name == "description":
            record.model_description = value
        else:
            record.set_custom(name, value)
    return record


def linear_of_columns(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`functional.linear` as a 1x1 convolution: rows (..., N, K) are columns (B, K, 1, N) of an image.

    Apple's neural engine computed some 2-D matrix products wrongly and the 4-D form rightly (coreai-torch, issue 51).

    Args:
        weight: (M, K).
        bias: (M,).

    Returns:
        (..., N, M).
    """
    from torch.nn import functional

    rows = x.reshape(-1, *x.shape[-2:])
    image = rows.transpose(1, 2).unsqueeze(2)
    return (
        functional.conv2d(image, weight[:, :, None, None], bias)
        .squeeze(2)
        .transpose(1, 2)
        .reshape(*x.shape[:-1], len(weight))
    )


def _register_integers(converter: Any) -> None:
    """Translations of PT2E's quantisation to Core AI's operations, in the form that Apple's own quantiser writes."""
    import numpy as np
    from coreai._compiler.dialects import coreai
    from coreai._compiler.type_mapping import _MLIR_TO_NUMPY_DTYPE

    def number_type(value: Any) -> Any:
        return _MLIR_TO_NUMPY_DTYPE[str(value.type.element_type)]

    def axis() -> Any:
        return coreai.constant(np.array(0, np.int32))

    def quantise(values: Mapping[str, Any], node: Any, where: Any) -> Any:
        source, scale, zero, *_ = node.args
        x = values[source.name]
        real = number_type(x)
        offsets = coreai.constant(np.array(zero, np.int8)), coreai.constant(np.zeros((), real))
        return coreai.quantize(x, coreai.constant(np.array(scale, real)), *offsets, axis(), loc=where)

    def dequantise(values: Mapping[str, Any], node: Any, where: Any) -> Any:
        source, scale, zero, *_ = node.args
        real = np.float16 if node.meta["val"].dtype.itemsize == 2 else np.float32
        offsets = coreai.constant(np.array(zero, np.int8)), coreai.constant(np.zeros((), real))
        number = coreai.constant(np.array(scale, real))
        return coreai.dequantize(values[source.name], number, *offsets, axis(), loc=where)

    def weight(values: Mapping[str, Any], node: Any, where: Any) -> Any:
        integers, scales = (values[argument.name] for argument in node.args[:2])
        shape = [len(node.meta["val"]), 1]
        offsets = coreai.constant(np.zeros(shape, np.int8)), coreai.constant(np.zeros(shape, number_type(scales)))
        return coreai.blockwise_shift_scale(integers, coreai.reshape(scales, shape), *offsets, loc=where)

    for operator, translation in (
        ("quantize_per_tensor", quantise),
        ("dequantize_per_tensor", dequantise),
        ("dequantize_per_channel", weight),
    ):
        converter.register_torch_lowering(f"quantized_decomposed::{operator}.default")(translation)


def _refused(program: torch.export.ExportedProgram, text: str) -> str:
    """The layer of the first operator that a message of the converter names; empty if it names none."""
    for node in program.graph.nodes:
        name = str(node.target)
        if node.op == "call_function" and (name in text or name.removeprefix("aten.") in text):
            *_, (path, _) = (node.meta.get("nn_module_stack") or {"": (node.name, None)}).values()
            return f"{path} ({name})"
    return ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch and the converter say to their own developers."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
