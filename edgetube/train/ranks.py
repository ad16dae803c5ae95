"""The processes that train one model together, as `torchrun` starts them; one process is the case of a single rank."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from edgetube.errors import BackendError, InputError

WAIT = timedelta(hours=1)
"""How long a process waits for a value of another.

One that fails is noticed earlier: by `torchrun`, which ends those beside it, or by the next step's sum of gradients.
"""


@dataclass(frozen=True)
class Ranks:
    """This process among all: its number, their number, and its device.

    Attributes:
        store: the `torch.distributed.Store` through which they exchange values; None for one process alone.
    """

    rank: int
    count: int
    device: torch.device
    store: Any = None
    _exchanges: Iterator[int] = field(default_factory=itertools.count)

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
        """The values of all processes, in their order; a value is one of JSON, tuples come back as lists.

        By the store, not by `all_gather_object`: gloo's thread needs the interpreter's lock to free the tensors of
        such a call, and a process that is ending holds that lock while it waits for that thread.

        Raises:
            BackendError: one of them does not answer within `WAIT`, or the process that keeps the store is gone.
        """
        if self.store is None:
            return [value]
        exchange = next(self._exchanges)
        self.store.set(f"{exchange}/{self.rank}", json.dumps(value))
        return [self._value(exchange, rank) for rank in range(self.count)]

    def _value(self, exchange: int, rank: int) -> Any:
        try:
            return json.loads(self.store.get(f"{exchange}/{rank}"))
        except dist.DistError as error:
            raise BackendError(
                f"process {rank} of {self.count} does not answer; see what it says, and run all of them again: the "
                f"training goes on ({str(error).splitlines()[0]})"
            ) from error


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
    undeclared: Any = dist
    store, rank, count = next(undeclared.rendezvous("env://"))
    store.set_timeout(WAIT)
    kind = "nccl" if here.type == "cuda" else "gloo"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store outlives processes that are started again
    group, values = (undeclared.PrefixStore(f"{name}/{attempt}", store) for name in ("group", "values"))
    dist.init_process_group(kind, store=group, rank=rank, world_size=count)
    try:
        yield Ranks(rank, count, here, values)
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
