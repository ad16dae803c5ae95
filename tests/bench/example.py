"""Documents as `edgetube parity --json` and `edgetube bench --json` print them, for a model of nine classes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

TARGETS = {  # name: (precision, milliseconds or None, agreement, megabytes, decibels at the end)
    "onnx-fp32": ("fp32", 8.1, 1.0, 8.9, 118.0),
    "onnx-fp16": ("fp16", 9.4, 1.0, 4.5, 62.0),
    "onnx-int8": ("int8", 5.2, 0.992, 2.6, 31.0),
    "openvino-fp32": ("fp32", 5.9, 1.0, 8.9, 117.0),
    "openvino-fp16": ("fp16", 3.3, 1.0, 4.5, 45.0),
    "openvino-int8": ("int8", 2.4, 0.996, 2.5, 30.0),
    "coreml-fp16": ("fp16", None, 1.0, 4.6, 60.0),
    "coreml-w4": ("w4", None, 0.93, 1.4, 17.0),
    "coreml-w8": ("w8", None, 0.988, 2.4, 38.0),
    "rtx-int8": ("int8", None, 0.992, 5.0, 31.0),
    "trt-fp16": ("fp16", None, 1.0, 4.7, 61.0),
}
LAYERS = ["tubes", *(f"blocks.{i}.{n}" for i in range(6) for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
          "norm", "pool", "classifiers.motion"]  # fmt: skip


def parity() -> dict[str, Any]:
    """All targets; `coreml-w4` misses the gate."""
    names = ["reference", *(f"demo.{name}" for name in TARGETS)]
    shares = [1.0, *(target[2] for target in TARGETS.values())]
    matrix = [[1.0 if i == j else 1 - 0.5 * (2 - a - b) - (0.004 if a != b else 0) for j, b in enumerate(shares)]
              for i, a in enumerate(shares)]  # fmt: skip
    return {
        "schema": 1,
        "reference": {"runtime": "torch", "name": "demo", "target": None, "source": "demo", "sha256": "0" * 64},
        "data": {"name": "built-in", "source": None, "clips": 252, "labelled": 252, "classes": 9,
                 "views": {"temporal": 1, "spatial": 1}},
        "machine": "a machine",
        "versions": {"edgetube": "0.1.0"},
        "bundles": [_bundle(name, *target) for name, target in TARGETS.items()],
        "agreement": {"names": names, "matrix": matrix},
        "gates": [
            {"gate": "min-agreement", "bundle": f"demo.{name}", "value": target[2], "limit": 0.98,
             "passed": target[2] >= 0.98} for name, target in TARGETS.items()
        ],
        "layers": [
            {"name": f"demo.{name}", "clips": 4, "note": "" if not name.startswith("rtx") else "it shows no layers",
             "first_jump": "blocks.2.mlp.fc2" if name == "coreml-w4" else None,
             "curve": [] if name.startswith("rtx") else _curve(name, target[4])}
            for name, target in TARGETS.items()
        ],
        "video": None,
    }  # fmt: skip


def _bundle(name: str, precision: str, ms: float | None, agreement: float, size: float, db: float) -> dict[str, Any]:
    clip = {"name": "evaluation/coffee/0003", "label": "zoom-in", "reference": {"label": "zoom-in", "score": 0.61},
            "bundle": {"label": "tilt-up" if agreement < 1 else "zoom-in", "score": 0.55}, "flipped": agreement < 1,
            "margin": 0.4, "kl": 10 ** (-db / 20), "max_abs_error": 0.2}  # fmt: skip
    other = clip | {"name": f"evaluation/chelsea/00{len(name)}", "flipped": False, "kl": 10 ** (-db / 18),
                    "bundle": clip["reference"]}  # fmt: skip
    return {
        "name": f"demo.{name}", "target": name, "precision": precision, "backend": "one", "path": f"out/demo.{name}",
        "bytes": int(size * 1e6), "status": "executed" if ms else "emulated", "clips": 252, "labelled": 252,
        "agreement": agreement, "agreement_low": agreement - 0.015, "agreement_high": min(1.0, agreement + 0.004),
        "top1": 0.996 - 0.8 * (1 - agreement), "top1_reference": 0.996, "top5": 1.0, "top5_reference": 1.0,
        "drop": 80 * (1 - agreement), "cosine": 1 - 10 ** (-db / 10), "kl": 10 ** (-db / 10),
        "max_abs_error": 10 ** (-db / 20) * 10, "max_abs_logit": 10.0, "relative_error": 10 ** (-db / 20),
        "sure_flips": 0.0, "flips": [], "classes": [], "worst": [clip, other],
    }  # fmt: skip


def _curve(name: str, end: float) -> list[dict[str, Any]]:
    rng = np.random.default_rng(sum(map(ord, name)))
    fall = np.linspace(0, 1, len(LAYERS)) ** 0.5
    values = end + 22 * (1 - fall) + rng.normal(0, 0.8, len(LAYERS))
    return [{"layer": layer, "sqnr_db": float(value)} for layer, value in zip(LAYERS, values, strict=True)]


def agree() -> dict[str, Any]:
    """One clip: `trt-fp16` gave no answer, `rtx-int8` shows no layers, `coreml-w4` departs from all others."""
    names = ["reference", *(f"demo.{name}" for name in TARGETS)]
    errors = [0.0, *(10 ** (-target[4] / 20) for target in TARGETS.values())]
    mute, blind, odd = "demo.trt-fp16", "demo.rtx-int8", "demo.coreml-w4"
    matrix = [
        [
            None if mute in (one, other) else 0.0 if one == other else a + b
            for other, b in zip(names, errors, strict=True)
        ]
        for one, a in zip(names, errors, strict=True)
    ]
    pairs = [
        {
            "names": [one, other],
            "difference": matrix[i][j],
            "cosine": 1.0,
            "sqnr_db": 40.0,
            "same_class": True,
            "departs": {"layer": "blocks.2.mlp.fc2", "db": 11.0}
            if odd in (one, other) and blind not in (one, other)
            else None,
            "note": f"{blind} shows no inner tensors" if blind in (one, other) else "",
            "curve": [] if blind in (one, other) else [{"layer": "tubes", "sqnr_db": 60.0}],
        }
        for i, one in enumerate(names)
        for j, other in enumerate(names)
        if i < j and mute not in (one, other)
    ]
    return {
        "schema": 1, "clip": {"name": "evaluation/coffee/0003", "label": "zoom-in", "start": None, "end": None},
        "rows": [{"name": name, "logits": None, "reason": "no GPU"} if name == mute else
                 {"name": name, "logits": [0.0] * 9, "reason": ""} for name in names],
        "difference": {"names": names, "matrix": matrix}, "pairs": pairs,
        "outliers": [{"name": odd, "layers": ["blocks.2.mlp.fc2"]}],
    }  # fmt: skip


def bench() -> dict[str, Any]:
    """PyTorch, then all targets; those that have a time in `TARGETS` were timed."""
    return {
        "schema": 1,
        "machine": "a machine",
        "versions": {"edgetube": "0.1.0"},
        "options": {"starts": 3, "warm": 10.0},
        "energy": {"source": None, "reason": "this machine shows no counter"},
        "peak": [{"precision": "fp32", "threads": None, "gmacs_per_s": 97.1, "by": "one"}],
        "bundles": [_times("PyTorch", None, "fp32", 17.5, None)]
        + [_times(f"demo.{name}", name, precision, ms, size) for name, (precision, ms, _, size, _) in TARGETS.items()],
    }


def _times(name: str, target: str | None, precision: str, ms: float | None, size: float | None) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(
        ("p50_ms", "p50_low_ms", "p50_high_ms", "noise", "p10_ms", "p90_ms", "p99_ms", "runs", "turns", "throughput",
         "cold_start_ms", "cold_start", "warmup", "peak_mb", "preprocess_ms", "preprocess_share", "energy_mj",
         "gmacs_per_s", "peak_share", "camera", "runtime", "reason")
    )  # fmt: skip
    row |= {"name": name, "target": target, "precision": precision, "backend": "one" if target else "torch"}
    row |= {"path": "", "size_mb": size, "threads": None, "batch": 1, "macs": 10**8, "status": "built"}
    if ms is None:
        return row | {"status": "emulated", "reason": f"{name} runs on another machine"}
    camera = {"fps": 30.0, "cameras": 1, "hop": 4, "due_ms": 266.7, "predictions": 38, "p50_ms": ms + 4,
              "p90_ms": ms + 6, "p99_ms": ms + 11, "late": 0, "frames": 332, "late_frames": 0, "dropped_frames": 0,
              "idle_share": 1 - ms / 100}  # fmt: skip
    return row | {
        "status": "executed", "p50_ms": ms, "p50_low_ms": 0.98 * ms, "p50_high_ms": 1.02 * ms, "noise": 0.02,
        "p10_ms": 0.93 * ms, "p90_ms": 1.2 * ms, "p99_ms": 1.5 * ms, "runs": 600, "turns": 20, "throughput": 960 / ms,
        "cold_start_ms": 300 + 30 * ms, "cold_start": {}, "warmup": {"calls": 20, "steady": True},
        "peak_mb": 100 + 8 * math.sqrt(size or 500), "preprocess_ms": 9.0, "preprocess_share": 9 / (9 + ms),
        "gmacs_per_s": 60.0, "peak_share": 0.4, "camera": camera if target else None, "runtime": {},
    }  # fmt: skip
