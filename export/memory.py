"""Gives memory back to the system between the steps of an export."""

from __future__ import annotations

import ctypes
import gc
import sys


def release() -> None:
    """Collect garbage, and return what the C library keeps for later; that of Linux (glibc) can be asked to.

    A traced model is full of reference cycles, and its tensors are too small for the library to return them at once.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
