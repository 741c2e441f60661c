"""How torch's tensors reach compiled code."""

from __future__ import annotations

import functools

import torch


@functools.cache
def exports_e4m3() -> bool:
    """Whether this torch hands its float8_e4m3fn tensors over as such; older ones have to show them as bytes."""
    try:
        torch.empty(1, dtype=torch.float8_e4m3fn).__dlpack__()
    except (RuntimeError, BufferError, TypeError, ValueError):
        return False
    return True
