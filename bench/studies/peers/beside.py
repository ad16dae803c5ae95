"""Makes transformers, timm and torchvision importable beside any build of PyTorch."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

_OPERATORS: list[torch.library.Library] = []
"""Kept alive: a library's operators vanish with it."""


def declare_torchvision() -> None:
    """Make `import torchvision` work where its compiled part cannot be loaded: beside PyTorch without CUDA, that of the
    CUDA build, which package indices have.

    Two operators, which it describes to PyTorch when it is imported, are declared instead.
    """
    found = find_spec("torchvision")
    if _OPERATORS or found is None or found.origin is None:
        return
    try:
        for compiled in Path(found.origin).parent.glob("_C.*"):
            torch.ops.load_library(str(compiled))
    except OSError:  # it needs libraries of CUDA
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _OPERATORS.append(library)
