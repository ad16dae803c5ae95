"""The configuration of a DeepStream pipeline: `... ! nvstreammux ! nvdspreprocess ! nvinfer ! ...`.

::

    deepstream/
        config_preprocess.txt   of nvdspreprocess: crops, scales and collects the frames of a clip
        config_infer.txt        of nvinfer: the engine, and labels
        labels.txt              names of classes, in one line
        model.onnx              the bundle's graph for the clips of nvdspreprocess

DeepStream's own library for sequences (`libnvds_custom_sequence_preprocess.so`, of its sample
deepstream-3d-action-recognition) collects frames into a tensor (B, 3, T, H, W) float32. The graph of the bundle takes
uint8 frames (B, T, H, W, 3), so that `adapted` gives it an input of the other form; and a softmax at its end, because
nvinfer compares the best class with a threshold. The same pixels give the same logits.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetube import runtimes
from edgetube.bundle import Bundle, staging
from edgetube.contract import InputContract
from edgetube.errors import InputError
from edgetube.live import window
from edgetube.precision import Precision
from edgetube.targets import need

PREPROCESS, INFER, LABELS, ENGINE = (
    "config_preprocess.txt", "config_infer.txt", "labels.txt", "model.engine",
)  # fmt: skip

CLIP, PROBABILITIES = "clip", "probabilities"
"""Input and output of the adapted graph."""

LIBRARY = "/opt/nvidia/deepstream/deepstream/lib/libnvds_custom_sequence_preprocess.so"

NETWORK_MODE = {Precision.FP32: 0, Precision.W8A8: 1, Precision.FP16: 2}
"""nvinfer's numbers of precisions, which it takes where it builds the engine itself."""

SLOWER = 0.05
"""Share by which the rate of the frames taken may differ from the model's without a note."""


@dataclass(frozen=True)
class Source:
    """The frames that nvstreammux gives.

    Attributes:
        height, width: in pixels.
        fps: frames per second of a stream.
    """

    height: int
    width: int
    fps: float


def folder(bundle: Bundle, out: Path, source: Source, hop: int | None = None) -> list[str]:
    """Write the configuration of a pipeline; an older one at `out` is replaced.

    Args:
        bundle: a complete bundle of a TensorRT target.
        out: the folder.
        source: the frames of the streams.
        hop: frames, of those that the model samples, between two predictions; None takes a quarter of the clip.

    Returns:
        Notes on what differs from edgetube's own preprocessing.

    Raises:
        InputError: another target, a model that samples segments of whole videos, or an option out of range.
        BundleError: the bundle is damaged, or the disk refuses.
    """
    onnx: Any = need("onnx", "export")
    path = runtimes.network(bundle)
    if path is None:
        raise InputError(
            f"{bundle.path} is of {bundle.target}; DeepStream builds engines of trt-* targets, such as trt-fp16"
        )
    contract, served = bundle.contract, runtimes.served(bundle)
    hop = window.step(hop, contract).frames
    if hop > contract.frames:
        raise InputError(f"--hop is {hop}; expected 1 to {contract.frames}, the frames of a clip")
    step, notes = every(contract, source.fps)
    bundle.verify()
    with staging(out, holds=INFER, what="a configuration of DeepStream") as place:
        engines = set(served.files.values()) if served else set()
        for file in (bundle.path / name for name in bundle.runtime_files):
            if file.suffix != path.suffix and file not in engines:  # large weights, and scales of untyped networks
                shutil.copyfile(file, place / file.name)
        onnx.save(adapted(onnx.load(path, load_external_data=False)), place / path.name)
        labels = ";".join(" ".join(label.replace(";", ",").split()) for label in bundle.labels)
        (place / LABELS).write_text(f"{labels}\n", encoding="utf-8")
        (place / PREPROCESS).write_text(_preprocess(bundle, source, hop, step), encoding="utf-8")
        (place / INFER).write_text(_infer(bundle, path), encoding="utf-8")
    return [
        *notes,
        "nvdspreprocess scales without antialiasing: compare a recording of this pipeline with `edgetube run`",
    ]


def adapted(model: Any) -> Any:
    """A graph that takes the clips of nvdspreprocess and gives probabilities; changes and returns `model`.

    Args:
        model: an ONNX model with one input (B, T, H, W, 3) uint8, whose values are gathered, reshaped and cast, and one
            output (B, classes).
    """
    onnx: Any = need("onnx", "export")
    graph = model.graph
    frames, logits = graph.input[0], graph.output[0]
    batch, time, height, width, channels = (axis.dim_value for axis in frames.type.tensor_type.shape.dim)
    shape = [axis.dim_value for axis in logits.type.tensor_type.shape.dim]
    make, floats = onnx.helper, onnx.TensorProto.FLOAT
    first = make.make_node("Transpose", [CLIP], [frames.name], perm=[0, 2, 3, 4, 1], name="from_deepstream")
    last = make.make_node("Softmax", [logits.name], [PROBABILITIES], axis=-1, name="to_deepstream")
    nodes = [first, *graph.node, last]
    del graph.node[:], graph.value_info[:], graph.input[:], graph.output[:]
    graph.node.extend(nodes)
    graph.input.append(make.make_tensor_value_info(CLIP, floats, [batch, channels, time, height, width]))
    graph.output.append(make.make_tensor_value_info(PROBABILITIES, logits.type.tensor_type.elem_type, shape))
    return model


def every(contract: InputContract, fps: float) -> tuple[int, list[str]]:
    """Of which number of frames one is taken, and a note where the model's rate cannot be had so.

    Raises:
        InputError: the model samples segments of whole videos.
    """
    if contract.sampling == "segments":
        raise InputError("the model samples segments of whole videos; DeepStream has streams without an end")
    if contract.stride is not None:
        return contract.stride, []
    if contract.fps is None:
        return 1, []
    step = max(1, round(fps / contract.fps))
    found = fps / step
    if abs(found / contract.fps - 1) <= SLOWER:
        return step, []
    return step, [f"the model wants {contract.fps:g} frames a second, and takes {found:g} of the {fps:g} there are"]


def region(contract: InputContract, height: int, width: int) -> tuple[int, int, int, int]:
    """What the contract's resize and crop leave of a frame: left, top, width, height, in its pixels.

    Raises:
        InputError: the frame is too small to have such a region.
    """
    size = contract.resize_size
    if contract.resize == "stretch":
        rows, columns = size if isinstance(size, tuple) else (contract.height, contract.width)
        scales = rows / height, columns / width
    elif isinstance(size, int):
        scales = (size / min(height, width),) * 2
    else:
        scales = (max(contract.height / height, contract.width / width),) * 2
    high, wide = (
        min(full, round(crop / scale))
        for full, crop, scale in zip((height, width), (contract.height, contract.width), scales, strict=True)
    )
    if not high or not wide:
        raise InputError(f"frames of {width}x{height} are too small for clips of {contract.width}x{contract.height}")
    return (width - wide) // 2, (height - high) // 2, wide, high


def _preprocess(bundle: Bundle, source: Source, hop: int, step: int) -> str:
    contract = bundle.contract
    left, top, wide, high = region(contract, source.height, source.width)
    groups: Mapping[str, Mapping[str, object]] = {
        "property": {
            "enable": 1,
            "unique-id": 5,
            "gpu-id": 0,
            "target-unique-ids": 1,  # `gie-unique-id` of nvinfer
            "process-on-frame": 1,
            "network-input-order": 2,  # custom: as the library makes it
            "network-input-shape": ";".join(map(str, (bundle.batch, 3, *contract.shape[:3]))),
            "processing-width": contract.width,
            "processing-height": contract.height,
            "network-color-format": 0,  # RGB
            "tensor-data-type": 0,  # float32
            "tensor-name": CLIP,
            "maintain-aspect-ratio": 0,  # the region has that of the clip, if the contract keeps it
            "scaling-filter": 2 if contract.filter == "bicubic" else 1,
            "scaling-buf-pool-size": 6,
            "tensor-buf-pool-size": 6,
            "scaling-pool-memory-type": 0,
            "scaling-pool-compute-hw": 0,
            "custom-lib-path": LIBRARY,
            "custom-tensor-preparation-function": "CustomSequenceTensorPreparation",
        },
        "user-configs": {  # pixels stay 0 to 255: the graph has mean and standard deviation inside
            "channel-scale-factors": "1.0;1.0;1.0",
            "channel-mean-offsets": "0.0;0.0;0.0",
            "stride": hop,
            "subsample": step - 1,
        },
        "group-0": {
            "src-ids": 0,
            "process-on-roi": 1,
            "roi-params-src-0": f"{left};{top};{wide};{high}",
        },
    }
    note = f"streams of {source.width}x{source.height}; a further stream N: src-ids=0;N and roi-params-src-N"
    return _file(note, groups)


def _infer(bundle: Bundle, path: Path) -> str:
    groups: Mapping[str, Mapping[str, object]] = {
        "property": {
            "gpu-id": 0,
            "gie-unique-id": 1,
            "process-mode": 1,
            "network-type": 1,  # a classifier
            "input-tensor-from-meta": 1,
            "batch-size": bundle.batch,
            "onnx-file": path.name,
            "model-engine-file": ENGINE,
            "network-mode": NETWORK_MODE[bundle.precision],
            "output-blob-names": PROBABILITIES,
            "labelfile-path": LABELS,
            "classifier-threshold": 0.0,
            "output-tensor-meta": 1,
        }
    }
    command = " ".join(str(bundle.build["command"]).split())
    return _file(f"makes the engine, in the types that were proven: {command}", groups)


def _file(note: str, groups: Mapping[str, Mapping[str, object]]) -> str:
    """A key file of GLib."""
    parts = [
        "\n".join([f"[{name}]", *(f"{key}={value}" for key, value in keys.items())]) for name, keys in groups.items()
    ]
    return "\n\n".join([f"# {note}", *parts]) + "\n"
