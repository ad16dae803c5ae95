"""Would the two products of attention be faster in 8-bit integers? One layer's attention, in every form there is.

    python bench/studies/integer_attention.py --json bench/results/integer_attention.json [--tokens 539] [--heads 12]

From queries, keys and values (1, N, D) to what they give (1, N, D), float32 outside. In ONNX Runtime: its fused
operator, which edgetube's INT8 graphs have; the same in pieces; the scores of 8-bit queries and keys; and the second
product in integers, too. In OpenVINO: in float, whose pieces it fuses, in float32 and in what its defaults compute; and
with the same pairs of quantisation that make linears integers. Ranges are those of the values, as after a calibration.
The error is that of the layer, against float32.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import NodeProto, TensorProto, helper, numpy_helper

from edgetube import metrics
from edgetube.bench import machine
from edgetube.bench.studies.tokenizer import Call, in_onnxruntime, measure
from edgetube.files import atomic_write
from edgetube.runtimes import openvino

DOMAIN = "com.microsoft"
CHANNELS = 64
"""Of a head."""

RANGE = 4.5
"""Largest magnitude of queries, keys and values; they are normal with variance 1."""

FORMS = ("fused", "in pieces", "scores in integers", "both in integers")
PAIRS = {"in pieces": "", "scores in pairs": "qk", "both in pairs": "qkvp"}


class Attention:
    """Writes the graph of one form.

    Args:
        integers: which of q, k, v and p (the probabilities) are rounded to 8 bits.
        largest: of the probabilities.
        pairs: with dequantised copies, which OpenVINO finds; else with ONNX Runtime's integer products.
    """

    def __init__(self, tokens: int, heads: int, integers: str, largest: float, pairs: bool = False) -> None:
        self.shape, self.heads, self.largest = (1, tokens, heads * CHANNELS), heads, largest
        self.integers, self.pairs = integers, pairs
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}

    def fused(self) -> onnx.ModelProto:
        names = ["q", "k", "v"]
        self.nodes = [helper.make_node("MultiHeadAttention", names, ["y"], domain=DOMAIN, num_heads=self.heads)]
        return self._model()

    def in_pieces(self) -> onnx.ModelProto:
        split = self._constant("split", np.array([0, 0, self.heads, CHANNELS]))
        for name, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
            self._node("Reshape", [name, split], f"{name}.split")
            self._node("Transpose", [f"{name}.split"], f"{name}.heads", perm=order)
        self._product("q", "q.heads", "k", "k.heads", "scores")
        self._node("Mul", ["scores", self._constant("gain", np.float32(CHANNELS**-0.5))], "scaled")
        self._node("Softmax", ["scaled"], "p.heads", axis=-1)
        self._product("p", "p.heads", "v", "v.heads", "context")
        self._node("Transpose", ["context"], "rows", perm=[0, 2, 1, 3])
        self._node("Reshape", ["rows", self._constant("merge", np.array([0, 0, self.shape[2]]))], "y")
        return self._model()

    def _product(self, left: str, a: str, right: str, b: str, output: str) -> None:
        if left not in self.integers:
            self._node("MatMul", [a, b], output)
            return
        inputs = [self._quantised(left, a), self._quantised(right, b)]
        if self.pairs:
            for name, (_, scale, zero) in zip((a, b), inputs, strict=True):
                self._node("DequantizeLinear", [f"{name}.integers", scale, zero], f"{name}.rounded")
            self._node("MatMul", [f"{a}.rounded", f"{b}.rounded"], output)
        else:
            (one, one_scale, one_zero), (two, two_scale, two_zero) = inputs
            order = [one, two, one_scale, two_scale, one_zero, two_zero]
            self._node("MatMulIntegerToFloat", order, output, domain=DOMAIN)

    def _quantised(self, of: str, name: str) -> tuple[str, str, str]:
        """Integers, scale and zero point of a tensor."""
        if of == "p":
            scale, zero = self.largest / 255, np.array(0, np.uint8)
        elif of == "q":
            scale, zero = 2 * RANGE / 255, np.array(128, np.uint8)
        else:
            scale, zero = RANGE / 127, np.array(0, np.int8)
        kept = self._constant(f"{of}.scale", np.float32(scale)), self._constant(f"{of}.zero", zero)
        self._node("QuantizeLinear", [name, *kept], f"{name}.integers")
        return f"{name}.integers", *kept

    def _node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))

    def _constant(self, name: str, value: Any) -> str:
        self.constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def _model(self) -> onnx.ModelProto:
        inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, self.shape) for name in "qkv"]
        outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, self.shape)]
        graph = helper.make_graph(self.nodes, "attention", inputs, outputs, list(self.constants.values()))
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def largest_probability(q: np.ndarray, k: np.ndarray, heads: int) -> float:
    """Of the softmax over the scores of queries and keys (1, N, D)."""
    one, two = (x.reshape(-1, heads, CHANNELS).transpose(1, 0, 2) for x in (q, k))
    scores = one @ two.transpose(0, 2, 1) * CHANNELS**-0.5
    return float((np.exp(scores.max(axis=2)) / np.exp(scores).sum(axis=2)).max())


def candidates(tokens: int, heads: int, threads: int, folder: Path) -> Iterator[tuple[tuple[str, str], Call]]:
    """((runtime, form), a call of it), all on the same values."""
    rng = np.random.default_rng(0)
    shape = (1, tokens, heads * CHANNELS)
    feed = {name: rng.standard_normal(shape, np.float32).clip(-RANGE, RANGE) for name in "qkv"}
    largest = largest_probability(feed["q"], feed["k"], heads)
    for form, integers in zip(FORMS, ("", "", "qk", "qkvp"), strict=True):
        graph = Attention(tokens, heads, integers, largest)
        path = folder / f"{form}.onnx"
        onnx.save(graph.fused() if form == "fused" else graph.in_pieces(), path)
        yield ("ONNX Runtime", form), in_onnxruntime(path, feed, threads)
    core = openvino.core()
    for form, integers in PAIRS.items():
        path = folder / f"{form}.pairs.onnx"
        onnx.save(Attention(tokens, heads, integers, largest, pairs=True).in_pieces(), path)
        for title, settings in (("float32", {"INFERENCE_PRECISION_HINT": "f32"}), ("defaults", {})):
            options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads} | settings
            request = core.compile_model(path, "CPU", options).create_infer_request()
            yield (f"OpenVINO, {title}", form), partial(infer, request, list(feed.values()))


def infer(request: Any, values: Sequence[np.ndarray]) -> np.ndarray:
    return np.asarray(request.infer(values)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=539)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing, all candidates together")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    ort.set_default_logger_severity(3)
    with tempfile.TemporaryDirectory() as folder:
        calls = dict(candidates(args.tokens, args.heads, args.threads, Path(folder)))
        taken = measure(calls, args.seconds, 10)
        exact = calls["ONNX Runtime", "fused"]()
        rows = []
        for (runtime, form), times in taken.items():
            p10, p50, p90 = map(float, np.percentile(times, [10, 50, 90]))
            base = np.median(taken[runtime, FORMS[0] if (runtime, FORMS[0]) in taken else FORMS[1]])
            row = {"runtime": runtime, "form": form, "p50_ms": p50, "p10_ms": p10, "p90_ms": p90}
            answer = calls[runtime, form]()
            error = None if np.array_equal(exact, answer) else float(metrics.sqnr(exact, answer))
            rows.append(row | {"times_as_fast": float(base / p50), "sqnr_db": error})
            print(rows[-1], flush=True)
    document = {"tokens": args.tokens, "heads": args.heads, "machine": machine.describe(), "rows": rows}
    if args.json:
        atomic_write(args.json, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
