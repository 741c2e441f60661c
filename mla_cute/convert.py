"""A prefill over an FP8 cache that converts the cache to 16 bits first and runs the 16-bit kernel.

Each row tile of a request multiplies all its keys, so where a request has many row tiles, what converting costs, once
a token, is little beside what the 16-bit kernel saves in each: with 16-bit queries, which FP8 kernels multiply as two
e4m3 parts, and with e4m3 ones in the formats that have scales of their own for tokens. (docs/performance.md has the
times, kernels/registry.py the rule.)

The converted cache has the pages of the call's lists in their order, so that what was planned from the lists holds; of
a block table those of its columns, without what lies between its rows. It is bfloat16, which holds every e4m3 value.
The 16-bit kernel has one factor for a score, so what its rope part is worth beside the latent part is multiplied into
kpe, or beside e4m3 queries into q_pe (kernels/convert.py): exact where that is a power of two, as where the latent part
and the rope part of a cache have one scale.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from .allocate import empty
from .check import FP8, Problem
from .compile import jit
from .kernels.registry import Variant

# A call that would need more memory for the converted cache, by the pages that its lists have room for (of a block
# table batch * max_pages, whatever its stride), runs the FP8 kernel. That many bytes are 233,000 tokens.
MOST_CONVERTED_BYTES = 256 << 20
_CTAS_PER_SM = 4


class ConvertedStep:
    """Takes what the step over the FP8 cache takes, and gives the same results but for rounding.

    Args:
        problem: of the calls.
        facts: the plan's scratch, which has the requests' lengths and first indices (kernels/keys.py).
        batch: requests.
        table_stride: elements between the rows of a block table; 0 with page lists.
        num_parts: work lists of the plan, one for each SM.
        may_round: whether to convert where the rope part would be rounded, and not run the FP8 step there.
        over_fp8: the variant of the step over the FP8 cache.
        converted: those in its place, as `registry.converted_variants`.
    """

    def __init__(
        self,
        problem: Problem,
        facts: torch.Tensor,
        batch: int,
        table_stride: int,
        num_parts: int,
        may_round: bool,
        over_fp8: Variant,
        converted: list[Variant],
    ):
        self._dims, self._dtype, self._kv_format = problem.dims, problem.dtype, problem.kv_format
        self._q_fp8 = problem.q_fp8
        self._facts, self._may_round = facts, may_round
        self._batch, self._table_stride = batch, table_stride
        self._num_ctas = _CTAS_PER_SM * num_parts
        self._convert, self._step = (jit.get(*variant) for variant in converted)
        self._over_fp8: Callable[[], Callable[..., None]] = functools.cache(functools.partial(jit.get, *over_fp8))

    def __call__(
        self,
        q_nope: torch.Tensor,
        q_pe: torch.Tensor,
        ckv: torch.Tensor,
        kpe: torch.Tensor,
        scales: torch.Tensor,
        page_ids: torch.Tensor,
        table: Any,
        part: Any,
        out: torch.Tensor,
        lse: torch.Tensor,
        *numbers: float | int,
    ) -> None:
        *grid, of_nope, of_rope, out_scale, ckv_at, kpe_at, q_at, lse_scale = numbers
        device, page_size = q_nope.device, ckv.shape[1]
        entries = page_ids.shape[0]
        gap = self._gap(entries)
        pages = entries - (self._batch - 1) * gap
        channels = sum(self._dims)
        fits = 0 < pages * page_size * channels * self._dtype.itemsize <= MOST_CONVERTED_BYTES
        rope_worth = of_rope / of_nope
        exact = not self._dims.kpe or (_is_power_of_two(rope_worth) and ckv_at == kpe_at and not q_at)
        if not fits or not (exact or self._may_round):
            self._over_fp8()(q_nope, q_pe, ckv, kpe, scales, page_ids, table, part, out, lse, *numbers)
            return
        cache = empty((pages, page_size, channels), self._dtype, device)
        ids = empty((entries,), torch.int32, device)
        to_nope, to_pe = q_nope, q_pe
        if self._q_fp8:
            to_nope, to_pe = (empty(tuple(q.shape), self._dtype, device) for q in (q_nope, q_pe))
        if self._kv_format == "tensor":
            scales = page_ids  # which is not read as those
        self._convert(
            self._num_ctas, _as_bytes(ckv), _as_bytes(kpe), scales, page_ids, self._facts, _as_bytes(q_nope), q_pe,
            cache, ids, to_nope, to_pe, rope_worth, ckv_at, kpe_at, q_at, gap,
        )  # fmt: skip
        ckv, kpe = cache[..., : self._dims.ckv], cache[..., self._dims.ckv :]
        if not self._dims.kpe:
            to_pe, kpe = to_nope, ckv
        numbers = (of_nope, out_scale, ckv_at, q_at, lse_scale)
        self._step(to_nope, to_pe, ckv, kpe, ids, table, part, out, lse, *grid, *numbers)

    def _gap(self, entries: int) -> int:
        """Between the rows of a block table whose memory are so many entries: from the last of one to the first of the
        next. There is none between page lists."""
        if self._batch < 2 or not self._table_stride:
            return 0
        return self._batch * self._table_stride - entries


def _is_power_of_two(x: float) -> bool:
    return math.frexp(x)[0] == 0.5


def _as_bytes(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8) if x.dtype is FP8 else x
