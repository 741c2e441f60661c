"""Queries in e4m3, for engines whose models hand over 16-bit ones beside an FP8 cache."""

from __future__ import annotations

from typing import Any

import torch

from ..check import FP8
from ..dims import CKV_DIM, KPE_DIM

_MAX = torch.finfo(FP8).max
_ROWS = 8  # of a program of the kernel: 9 KB of 16-bit numbers


def to_e4m3(q_nope: torch.Tensor, q_pe: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both parts rounded to float8_e4m3fn, values beyond 448 to 448 of their sign. NaN stays NaN.

    Args:
        q_nope, q_pe: [tokens, H, 512] and [tokens, H, 64], bfloat16 or float16, of stride 1 in the last dimension.

    Returns:
        The parts of one tensor [tokens, H, 576].
    """
    tokens, heads = q_nope.shape[:2]
    out = torch.empty((tokens, heads, CKV_DIM + KPE_DIM), dtype=FP8, device=q_nope.device)
    parts = out[..., :CKV_DIM], out[..., CKV_DIM:]
    if not q_nope.is_cuda:
        for part, values in zip(parts, (q_nope, q_pe), strict=True):
            part.copy_(values.float().clamp(-_MAX, _MAX))
    elif tokens:
        rows = tokens * heads
        _kernel()[(-(-rows // _ROWS),)](
            q_nope, q_pe, out, rows, heads, *q_nope.stride()[:2], *q_pe.stride()[:2], CKV=CKV_DIM, KPE=KPE_DIM,
            ROWS=_ROWS,
        )  # fmt: skip
    return parts


_compiled: list[Any] = []


def _kernel() -> Any:
    """The kernel, in Triton, which every engine with CUDA has; imported by the first call that needs it."""
    if not _compiled:
        from ._queries_triton import round_queries

        _compiled.append(round_queries)
    return _compiled[0]
