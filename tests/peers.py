"""Libraries whose models are oracles: transformers, timm and torchvision beside any build of PyTorch."""

from __future__ import annotations

import os

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

_OPERATORS: list[torch.library.Library] = []
"""Kept alive: a library's operators vanish with it."""


def declare_torchvision() -> None:
    """Declare two operators of torchvision: its CUDA build cannot be imported beside PyTorch without CUDA otherwise."""
    if _OPERATORS:
        return
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _OPERATORS.append(library)


declare_torchvision()
