"""A witness of TensorRT bundles: runs their Q/DQ graph on a GPU in PyTorch's kernels, without TensorRT.

The graph is the very `model.onnx` that TensorRT parses. Float tensors have the types that the graph gives them, and a
product whose two operands come out of DequantizeLinear multiplies int8 by int8 into int32 (`torch._int_mm`, tensor
cores on a GPU), as TensorRT's kernels do; the scales are multiplied in float32 behind it. A whole call is replayed as
one CUDA graph. What it says: executed on a GPU, not TensorRT.

It is no backend: nobody deploys it, and `gpu.py` alone opens it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from edgetube import bundle as bundles
from edgetube.bench.studies import gpu_graph
from edgetube.bench.studies.gpu_graph import Graph, Node
from edgetube.bench.worker import Benchmarkable, StageTimer
from edgetube.bundle import Bundle
from edgetube.errors import BackendError
from edgetube.runtimes.base import Backend, Logits
from edgetube.video import Frames

STATUS = {"cuda": "executed on a GPU, not TensorRT", "cpu": "evaluated on the CPU, not TensorRT"}
"""What the answers of a device are, as tables and documents say it."""

Values = dict[str, torch.Tensor]
Step = Callable[[Values], None]


class Witness(Backend):
    """A bundle's `model.onnx` (float types as written, int8 by Q/DQ) on a PyTorch device.

    Args:
        bundle: made for a `trt-*` or `rtx-*` target.
        device: "cuda" or "cpu"; the latter is for tests and rehearsals.
        compiled: have `torch.compile` fuse what lies between the products.

    Raises:
        BackendError: PyTorch has no such device, or the graph has an operator that is not known here.
    """

    def __init__(self, bundle: Bundle, device: str = "cuda", compiled: bool = False) -> None:
        super().__init__(bundle.contract, bundle.batch)
        if device == "cuda" and not torch.cuda.is_available():
            raise BackendError(f"PyTorch {torch.__version__} sees no GPU; install a build of it for CUDA")
        self.device = torch.device(device)
        self.program = Program(gpu_graph.read(bundle.artifact_path), self.device)
        self.run: Callable[[torch.Tensor], torch.Tensor] = (
            torch.compile(self.program, dynamic=False) if compiled else self.program
        )
        shape = (bundle.batch, *bundle.contract.shape)
        self.frames = torch.zeros(shape, dtype=torch.uint8, device=self.device)
        self.host = torch.zeros(shape, dtype=torch.uint8, pin_memory=device == "cuda")
        self.graph: torch.cuda.CUDAGraph | None = None
        if device == "cuda":
            self._capture()

    def _capture(self) -> None:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode(), torch.cuda.stream(side):
            for _ in range(3):
                self.run(self.frames)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(self.graph):
            self.logits = self.run(self.frames)

    def infer(self, clips: Frames) -> Logits:
        self.host.copy_(torch.from_numpy(clips))
        self.frames.copy_(self.host, non_blocking=True)
        if self.graph is None:
            with torch.inference_mode():
                return np.asarray(self.run(self.frames).float().numpy())
        self.graph.replay()
        return np.asarray(self.logits.float().cpu().numpy())

    def describe(self) -> dict[str, Any]:
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        return {"torch": torch.__version__, "device": name, "integer_products": self.program.integer_products}

    def release(self) -> None:
        del self.program, self.run, self.graph


class Program:
    """An ONNX graph as a list of PyTorch calls, one a node.

    Attributes:
        integer_products: how many MatMul multiply int8 by int8.
    """

    def __init__(self, graph: Graph, device: torch.device) -> None:
        self.integer_products = 0
        self.constants: Values = {
            name: torch.from_numpy(values.copy()).to(device) for name, values in graph.constants.items()
        }
        (self.input,), (self.output,) = graph.inputs, graph.outputs
        self.made_by = {name: node for node in graph.nodes for name in node.outputs}
        self.steps: list[Step] = [self._step(node) for node in graph.nodes]

    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        values = {**self.constants, self.input: frames}
        for step in self.steps:
            step(values)
        return values[self.output]

    def _step(self, node: Node) -> Step:
        if node.operator == "MatMul" and (pair := self._integers(node)) is not None:
            self.integer_products += 1
            return self._integer_product(node, *pair)
        if node.operator not in OPERATORS:
            raise BackendError(f"{node.name}: this evaluator knows no {node.operator}")
        attributes = dict(node.attributes)
        call, names, outputs = OPERATORS[node.operator], list(node.inputs), node.outputs
        if node.operator in ("Reshape", "Split") and len(names) > 1:  # read now: a CUDA graph could not
            attributes["given"] = self.constants[names.pop()].tolist()

        def step(values: Values) -> None:
            found = call([values[name] for name in names], attributes)
            values.update(zip(outputs, found if isinstance(found, tuple | list) else (found,), strict=True))

        return step

    def _integers(self, node: Node) -> tuple[Node, Node] | None:
        """The DequantizeLinear nodes in front of both operands; None when one is float, or the right one no weight."""
        makers = [self.made_by.get(name) for name in node.inputs]
        left, right = makers
        if left is None or right is None or {left.operator, right.operator} != {"DequantizeLinear"}:
            return None
        return (left, right) if right.inputs[0] in self.constants else None

    def _integer_product(self, node: Node, left: Node, right: Node) -> Step:
        weight = self.constants[right.inputs[0]]  # (K, N) int8
        k, n = weight.shape
        wide = F.pad(weight, (0, -n % 8, 0, -k % 8)).t().contiguous().t()  # column-major, as the kernels want it
        scale = self.constants[left.inputs[1]].float() * self.constants[right.inputs[1]].float()
        dtype = self.constants[right.inputs[1]].dtype
        source, out = left.inputs[0], node.outputs[0]

        def step(values: Values) -> None:
            x = values[source]
            rows = x.reshape(-1, k)
            short = max(0, 32 - len(rows))
            rows = F.pad(rows, (0, -k % 8, 0, short)) if short or k % 8 else rows
            product = torch._int_mm(rows, wide)[: len(rows) - short, :n]
            values[out] = (product.float() * scale).to(dtype).reshape(*x.shape[:-1], n)

        return step


def _quantize(inputs: list[torch.Tensor], attributes: Mapping[str, Any]) -> torch.Tensor:
    x, scale, zero = inputs
    limits = torch.iinfo(zero.dtype)
    return (torch.round(x.float() / scale.float()) + zero).clamp(limits.min, limits.max).to(zero.dtype)


def _dequantize(inputs: list[torch.Tensor], attributes: Mapping[str, Any]) -> torch.Tensor:
    q, scale, *zero = inputs
    shape = [1] * q.ndim
    if scale.ndim:
        shape[attributes.get("axis", 1)] = -1
    shift = zero[0].float().reshape(shape) if zero else 0
    return ((q.float() - shift) * scale.float().reshape(shape)).to(scale.dtype)


def _layer_norm(inputs: list[torch.Tensor], attributes: Mapping[str, Any]) -> torch.Tensor:
    x, weight, *bias = inputs
    return F.layer_norm(x, weight.shape, weight, bias[0] if bias else None, attributes["epsilon"])


def _split(inputs: list[torch.Tensor], attributes: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    axis, sizes = attributes.get("axis", 0), attributes.get("given")
    return torch.split(inputs[0], sizes, axis) if sizes else torch.chunk(inputs[0], attributes["num_outputs"], axis)


def _gelu(inputs: list[torch.Tensor], attributes: Mapping[str, Any]) -> torch.Tensor:
    return F.gelu(inputs[0], approximate=attributes.get("approximate", b"none").decode())


OPERATORS: dict[str, Callable[[list[torch.Tensor], Mapping[str, Any]], Any]] = {
    "Add": lambda i, a: i[0] + i[1],
    "Cast": lambda i, a: i[0].to(getattr(torch, gpu_graph.TYPES[a["to"]])),
    "Concat": lambda i, a: torch.cat(i, a["axis"]),
    "DequantizeLinear": _dequantize,
    "Gather": lambda i, a: i[0].index_select(a.get("axis", 0), i[1].reshape(-1)),
    "Gelu": _gelu,
    "LayerNormalization": _layer_norm,
    "MatMul": lambda i, a: i[0] @ i[1],
    "Mul": lambda i, a: i[0] * i[1],
    "QuantizeLinear": _quantize,
    "Reshape": lambda i, a: i[0].reshape(a["given"]),
    "Softmax": lambda i, a: torch.softmax(i[0], a.get("axis", -1)),
    "Split": _split,
    "Transpose": lambda i, a: i[0].permute(a["perm"]),
}


def open_graph(stage_timer: StageTimer, path: str, device: str = "cuda", compiled: bool = False) -> Benchmarkable:
    """A bundle's graph for a process of `edgetube.bench.latency`."""
    stage_timer("import")
    bundle = bundles.load(path)
    witness = Witness(bundle, device, compiled)
    clips = np.repeat(bundle.golden()[0][:1], bundle.batch, axis=0)
    stage_timer("load")
    return Benchmarkable(lambda: witness(clips), about=witness.describe())
