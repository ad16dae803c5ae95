"""Summarises the layers of an engine, as the SDK lists them."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

KERNEL = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<kind>[^,]+), Inputs: (?P<tensors>.*)")
DATATYPE = re.compile(r"Datatype: ([^,}\]]+)")
TYPES = {"int8": "int8", "half": "fp16", "fp16": "fp16", "float": "fp32", "fp32": "fp32", "fp8": "fp8", "bf": "bf16"}


def summarize_engine_layers(information: str) -> dict[str, Any]:
    """Count an engine's kernels by type, from the one-line form of the SDK's layer information.

    Returns:
        kernels; gemms and attention, which are fused kernels (type of their first input -> how many), reformats
        (kernels that only move data), and float_gemms, the ONNX nodes of the products that stayed float where others
        are in int8.
    """
    kernels, reformats = 0, 0
    gemms: Counter[str] = Counter()
    attention: Counter[str] = Counter()
    floats: list[str] = []
    for line in information.splitlines():
        found = KERNEL.match(line.strip())
        if not found or found["kind"] in ("signal", "wait"):
            continue
        kernels += 1
        name, kind = found["name"].lower(), found["kind"].lower()
        if "mha" in name or "attention" in name + kind:
            attention[_datatype(found["tensors"], dequantises=False)] += 1
        elif "reformat" in name + kind or re.search(r"(tran|resh)\w*move", name):
            reformats += 1
        elif re.search(r"gemm|matrix|conv", kind) or re.search(r"gemm|matmul", name) or "Fc" in found["name"]:
            datatype = _datatype(found["tensors"], dequantises="Cast" in found["name"].partition("Fc")[0])
            gemms[datatype] += 1
            if datatype != "int8":
                floats.append(_product(line) or found["name"])
    return {
        "kernels": kernels,
        "gemms": dict(gemms),
        "attention": dict(attention),
        "reformats": reformats,
        "float_gemms": floats if "int8" in gemms else [],
    }


def _datatype(tensors: str, dequantises: bool) -> str:
    """The type in which a product is computed: that of the first tensor that its kernel reads.

    A fused kernel that casts before it multiplies reads integers and multiplies floats.
    """
    types = [_short(word) for word in DATATYPE.findall(tensors)] or ["unknown"]
    return next((t for t in types if t != "int8"), "float") if dequantises else types[0]


def _short(word: str) -> str:
    return next((short for key, short in TYPES.items() if key in word.lower()), word.lower())


def _product(line: str) -> str:
    """The ONNX node of the product among the nodes that were fused into a kernel."""
    nodes: list[str] = re.findall(r"\[ONNX Layer: (\S+?)\]", line)
    return next((node for node in nodes if "matmul" in node), nodes[0] if nodes else "")
