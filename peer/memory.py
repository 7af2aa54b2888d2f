"""Giving memory back to the system when a peer pauses: what Python and the C library only keep for later."""

from __future__ import annotations

import ctypes
import gc


def give_back() -> None:
    """Collect garbage and return free heap pages to the system; where the C library can't, it keeps them."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
