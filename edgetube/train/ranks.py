"""The processes that train one model together, as `torchrun` starts them; one process is the case of a single rank."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from edgetube.errors import InputError


@dataclass(frozen=True)
class Ranks:
    """This process among all: its number, their number, and its device."""

    rank: int
    count: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this one writes and reports."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with gradients averaged over all processes."""
        if self.count == 1:
            return module
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(module, broadcast_buffers=False, find_unused_parameters=True)

    def gathered(self, value: Any) -> list[Any]:
        """The values of all processes, in their order."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found


@contextmanager
def joined(device: str | None) -> Iterator[Ranks]:
    """Join the other processes, and leave them at the end.

    Args:
        device: "cpu", "cuda", "mps"; None takes the best that is here.

    Raises:
        InputError: there is no such device, or there are more processes than GPUs.
    """
    count, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    here = _device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if count == 1:
        yield Ranks(0, 1, here)
        return
    if here.type == "cuda":
        torch.cuda.set_device(here)
    dist.init_process_group("nccl" if here.type == "cuda" else "gloo")
    try:
        yield Ranks(rank, count, here)
    finally:
        dist.destroy_process_group()


def _device(name: str | None, local: int) -> torch.device:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    chosen = name or next(kind for kind, here in there.items() if here)
    if not there.get(chosen, False):
        raise InputError(f"--device is {chosen!r}; here are {', '.join(kind for kind, here in there.items() if here)}")
    if chosen != "cuda":
        return torch.device(chosen)
    if local >= (gpus := torch.cuda.device_count()):
        raise InputError(
            f"process {local + 1} of this machine has no GPU: there are {gpus}; give --nproc-per-node {gpus}, or "
            "--device cpu"
        )
    return torch.device(chosen, local)
