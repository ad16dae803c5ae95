"""Position tables that models compute: their files hold parts of them, or nothing."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def over_time(places: Tensor, times: Tensor) -> Tensor:
    """The positions (T S, D), time first, that are sums of one for each place (S, D) and one for each time (T, D)."""
    return (times[:, None] + places).flatten(0, 1)


def sine(count: int, width: int) -> Tensor:
    """The fixed positions (N, D): sines on even channels, cosines on odd ones, of n / 10000^(2 floor(j / 2) / D).

    n is the number of the token in (time, height, width): the authors did not make it a function of three coordinates.
    """
    j = np.arange(width)
    angles = np.arange(count)[:, None] / np.power(10000.0, 2 * (j // 2) / width)
    table = np.where(j % 2, np.cos(angles), np.sin(angles))
    return torch.from_numpy(table.astype(np.float32))
