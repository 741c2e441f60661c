"""The tensors of a case: one pool of cache rows for all, pages of it for each rotation slot, queries and outputs."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from .. import quant
from ..dims import CKV_DIM, KPE_DIM, NUM_SCALES
from .cases import DTYPES, TOKEN_BYTES, Case, PrefillCase

SM_SCALE = 192**-0.5  # DeepSeek-V3: 128 + 64 dimensions per head before absorption
# The scale of e4m3 numbers in the pool and of e4m3 queries. Both are made from standard normal data; the largest e4m3
# number, 448, stands for 7.
FP8_SCALE = 1 / 64


def filling(case: Case | PrefillCase) -> tuple[str, ...]:
    """What the bytes of the pool depend on: the dtype, and with an FP8 cache where its parts lie, which are of several
    types."""
    return (case.dtype,) if not case.kv_format else (case.dtype, case.kv_format, case.layout, case.dims_label)


class KvPool:
    """One allocation that every case carves its pages from: standard normal data in rows of 16-bit elements, or in an
    FP8 format."""

    def __init__(self, num_tokens: int, device: torch.device, seed: int = 0):
        """Room for `num_tokens` tokens of a 16-bit cache of 512 + 64 channels, and so for 1.76 to 2 times as many of an
        FP8 one, or for more of fewer channels."""
        self.num_tokens = num_tokens
        self._words = torch.empty(num_tokens * (CKV_DIM + KPE_DIM), dtype=torch.bfloat16, device=device)
        self._filled_as: tuple[str, ...] | None = None
        self._generator = torch.Generator(device=device).manual_seed(seed)

    @classmethod
    def of(cls, cases: Iterable[Case | PrefillCase], device: torch.device, seed: int = 0) -> "KvPool":
        """Large enough for each of the cases."""
        return cls(max([64, *(-(-case.pool_bytes // TOKEN_BYTES[""]) for case in cases)]), device, seed)

    def caches(self, case: Case | PrefillCase) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
        """ckv [num_pages, page_size, ckv_dim], kpe [.., kpe_dim], the pool as one fused buffer, and the scale
        keywords of a call. Of an FP8 cache the fused buffer is the bytes of its rows, if they are fused; one that is
        e4m3 throughout can be read as rows in either layout, as a 16-bit one can."""
        if case.kv_format:
            return self._fp8_caches(case)
        flat = self._words.view(DTYPES[case.dtype])
        if self._filled_as != filling(case):
            for part in flat.split(1 << 28):
                part.normal_(generator=self._generator)
            self._filled_as = filling(case)
        room, size, (ckv_dim, kpe_dim) = self._room(case), case.page_size, case.dims
        pages = room // size
        tokens = pages * size
        fused = flat[: tokens * (ckv_dim + kpe_dim)].view(pages, size, ckv_dim + kpe_dim)
        if case.layout == "fused":
            return fused[..., :ckv_dim], fused[..., ckv_dim:], fused, {}
        ckv = flat[: tokens * ckv_dim].view(pages, size, ckv_dim)
        kpe = flat[room * ckv_dim :][: tokens * kpe_dim].view(pages, size, kpe_dim)
        return ckv, kpe, fused, {}

    def _room(self, case: Case | PrefillCase) -> int:
        """Tokens of the case's cache that the pool holds."""
        return self.num_tokens * TOKEN_BYTES[""] // case.token_bytes

    def _fp8_caches(self, case: Case | PrefillCase) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
        tokens, ckv_dim = self._room(case), case.ckv_dim
        rope_dtype = torch.float8_e4m3fn if case.rope_is_fp8 else DTYPES[case.dtype]
        rope_bytes = case.kpe_dim * rope_dtype.itemsize
        num_scales = NUM_SCALES[case.kv_format]
        data = self._words.view(torch.uint8)
        fused = case.layout == "fused"
        # Where the parts of a row begin. Fused rows of the group format (656 bytes) have their scales between ckv and
        # rope; those of the token format (640 bytes) have none, their scales lie behind all rows.
        with_scales = fused and case.kv_format == "group"
        scale_bytes = 4 * num_scales
        at_rope = ckv_dim + (scale_bytes if with_scales else 0)
        row = at_rope + rope_bytes
        at_scales = tokens * row
        rows = data[: tokens * row].view(tokens, row) if fused or case.rope_is_fp8 else data[:0]
        if fused:
            ckv, kpe = rows[:, :ckv_dim], rows[:, at_rope:]
        else:
            ckv = data[: tokens * ckv_dim].view(tokens, ckv_dim)
            kpe = data[tokens * ckv_dim : at_scales].view(tokens, rope_bytes)
        if with_scales:
            scales = rows[:, ckv_dim:at_rope].view(torch.float32)
        else:
            scales = data[at_scales : at_scales + tokens * scale_bytes].view(torch.float32).view(tokens, num_scales)
        ckv, kpe = ckv.view(torch.float8_e4m3fn), kpe.view(rope_dtype)
        if self._filled_as != filling(case):
            for x, unit in ((ckv, FP8_SCALE), (kpe, FP8_SCALE if case.rope_is_fp8 else 1.0)):
                for part in x.split(1 << 19):
                    values = torch.empty(part.shape, device=part.device).normal_(generator=self._generator)
                    part.copy_(quant.to_e4m3(values, unit) if part.dtype is torch.float8_e4m3fn else values)
            scales.uniform_(0.5 * FP8_SCALE, 1.5 * FP8_SCALE, generator=self._generator)
            if case.kv_format == "group":  # whose scales are powers of two (docs/formats.md)
                scales.log2_().round_().exp2_()
            self._filled_as = filling(case)
        size = case.page_size
        pages = tokens // size

        def paged(x: torch.Tensor) -> torch.Tensor:
            return x[: pages * size].unflatten(0, (pages, size))

        keywords: dict[str, Any] = {"ckv_scale_arr": paged(scales)}
        if case.rope_is_fp8:
            keywords = {"ckv_scale": FP8_SCALE, "kpe_scale": FP8_SCALE if case.kpe_dim else 1.0}
        return paged(ckv), paged(kpe), paged(rows) if rows.numel() else rows, keywords


@dataclass
class Inputs:
    """Tensors of one case; the first dimension of q_*, kv_indices, out and lse is the rotation slot. Of a sparse case
    kv_indices [slots, batch, topk] are tokens."""

    case: Case | PrefillCase
    q_nope: torch.Tensor
    q_pe: torch.Tensor
    ckv_cache: torch.Tensor
    kpe_cache: torch.Tensor
    fused_cache: torch.Tensor
    qo_indptr: torch.Tensor
    kv_lens: torch.Tensor
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    kv_last_page_len: torch.Tensor | None
    out: torch.Tensor
    lse: torch.Tensor
    scales: dict[str, Any]
    sm_scale: float = SM_SCALE

    @property
    def num_slots(self) -> int:
        return self.kv_indices.shape[0]


def _lists(case: Case, pool_tokens: int, generator: torch.Generator) -> torch.Tensor:
    """[slots, batch, topk] tokens in random order; of a slot each in one list, or with `longest` drawn anew for each
    list from the slot's own, which lie anywhere in the pool."""
    device, slots = generator.device, case.num_slots
    tokens = torch.randperm(pool_tokens, generator=generator, device=device, dtype=torch.int32)
    if not case.longest:
        return tokens[: slots * case.visible_pairs].view(slots, case.batch, case.kv_len)
    contexts = tokens[: slots * case.longest].view(slots, case.longest)
    drawn = torch.empty(slots, case.batch, case.kv_len, dtype=torch.int32, device=device)
    for slot, context in enumerate(contexts):
        for row in drawn[slot]:
            row.copy_(context[torch.randperm(case.longest, generator=generator, device=device)[: case.kv_len]])
    return drawn


def make_inputs(case: Case | PrefillCase, pool: KvPool, device: torch.device, seed: int = 0) -> Inputs:
    generator = torch.Generator(device=device).manual_seed(seed)
    dtype = DTYPES[case.dtype]
    slots, rows = case.num_slots, (case.num_slots, case.total_q, case.num_heads)
    ckv, kpe, fused, scales = pool.caches(case)
    if case.q_fp8:
        scales = scales | {"q_scale": FP8_SCALE}
    pages, size = case.pages, case.page_size
    if isinstance(case, Case) and case.sparse:
        indices = _lists(case, ckv.shape[0] * size, generator)
    else:
        order = torch.randperm(ckv.shape[0], generator=generator, device=device)[: slots * sum(pages)]
        indices = order.to(torch.int32).view(slots, sum(pages))
    last = [kv - (n - 1) * size for (_, kv), n in zip(case.requests, pages, strict=True)]

    def int32(values: Iterable[int]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=device)

    def normal(width: int, fp8: bool) -> torch.Tensor:
        if not fp8:
            return torch.empty(*rows, width, dtype=dtype, device=device).normal_(generator=generator)
        stored = torch.empty(*rows, width, dtype=torch.float8_e4m3fn, device=device)
        for part in stored:
            part.copy_(quant.to_e4m3(torch.empty(part.shape, device=device).normal_(generator=generator), FP8_SCALE))
        return stored

    return Inputs(
        case=case,
        q_nope=normal(case.ckv_dim, case.q_fp8),
        q_pe=normal(case.kpe_dim, case.q_fp8 and case.rope_is_fp8),
        ckv_cache=ckv,
        kpe_cache=kpe,
        fused_cache=fused,
        qo_indptr=int32(itertools.accumulate((q for q, _ in case.requests), initial=0)),
        kv_lens=int32(kv for _, kv in case.requests),
        kv_indptr=int32(itertools.accumulate(pages, initial=0)),
        kv_indices=indices,
        kv_last_page_len=None if all(n == size for n in last) else int32(last),
        out=torch.full((*rows, case.ckv_dim), float("nan"), dtype=dtype, device=device),
        lse=torch.full(rows, float("nan"), dtype=torch.float32, device=device),
        scales=scales,
    )
