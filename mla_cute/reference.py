"""Paged MLA in float32 torch: what CPU tensors run, and what the kernels are judged against.

    S = q_nope ckv^T + q_pe kpe^T      P = softmax(sm_scale * S)      output = P ckv

One request at a time, and of a prompt `_CHUNK_ROWS` rows (query token, head) at a time: the request's pages are
gathered (never a page id past its end, and rows past kv_len are cut off before any arithmetic, so NaN there cannot
leak), and contexts longer than `_CHUNK_TOKENS` are walked in chunks whose partial softmaxes are merged, which bounds
the float32 copy of K at 38 MB and the scores at 67 MB. FP8 rows are dequantised to float32 after the cut,
scales included. It reads lengths on the host: on CUDA tensors it synchronises.

Nothing here checks its arguments. The public calls do, values of metadata included, before they come here with CPU
tensors; whoever calls these functions with lengths that pages do not hold, or bounds that are no running sum, gets
fewer keys than asked for, or rows that nobody wrote, without a word.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .expect import Scale
from .problem import FP8
from .quant import dequantize

_CHUNK_TOKENS = 16384
_CHUNK_ROWS = 1024
_LOG2_E = math.log2(math.e)


class Scales(NamedTuple):
    """What e4m3 caches and queries are multiplied by (`decode_reference` has the shapes)."""

    ckv_scale: float = 1.0
    kpe_scale: float = 1.0
    ckv_scale_arr: torch.Tensor | None = None
    q_scale: float = 1.0


_UNSCALED = Scales()


def decode_reference(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    sm_scale: float,
    *,
    kv_last_page_len: torch.Tensor | None = None,
    lse_base: int | str = 2,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    ckv_scale: Scale = 1.0,
    kpe_scale: Scale = 1.0,
    ckv_scale_arr: torch.Tensor | None = None,
    q_scale: Scale = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode attention over page lists in CSR form, computed in float32.

    Args:
        q_nope: [batch, H, 512], any floating dtype.
        q_pe: [batch, H, 64], likewise.
        ckv_cache: [num_pages, page_size, 512], any floating dtype, any strides.
        kpe_cache: [num_pages, page_size, 64], any strides.
        kv_indptr: [batch + 1] int32; request b owns `kv_indices[kv_indptr[b]:kv_indptr[b + 1]]`.
        kv_indices: [num_kv_indices] int32 page ids.
        sm_scale: factor of the scores before the softmax.
        kv_last_page_len: [batch] int32, tokens in each request's last page; None means that last pages are full. The
            value of a request without pages is ignored.
        lse_base: 2 or "e", the base of the log-sum-exp returned.
        out: [batch, H, 512] to write to; None allocates it with the dtype of q_nope, with that of q_pe if q_nope is
            float8_e4m3fn, and as bfloat16 if both are.
        lse: [batch, H] to write to; None allocates it as float32.
        ckv_scale, kpe_scale: factors of a float8_e4m3fn cache, numbers or tensors of one element.
        ckv_scale_arr: [num_pages, page_size, 1 or 4] float32, factors of each token's ckv or of its groups of 128
            channels, instead of ckv_scale.
        q_scale: factor of those queries that are float8_e4m3fn.

    Returns:
        (output, lse). A request of length 0 gives output 0 and lse -inf.

    Raises:
        IndexError, RuntimeError: from torch, when a page id in use is out of range. Neither arguments nor values of
        metadata are checked otherwise: `mla_cute.mla_paged_decode` on CPU tensors does both, and computes this.
    """
    pages, lengths = _csr_requests(kv_indptr, kv_indices, kv_last_page_len, ckv_cache.shape[1])
    scales = Scales(float(ckv_scale), float(kpe_scale), ckv_scale_arr, float(q_scale))
    return _decode(q_nope, q_pe, ckv_cache, kpe_cache, pages, lengths, sm_scale, lse_base, out, lse, scales=scales)


def decode_reference_block_table(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    sm_scale: float,
    *,
    lse_base: int | str = 2,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    ckv_scale: Scale = 1.0,
    kpe_scale: Scale = 1.0,
    ckv_scale_arr: torch.Tensor | None = None,
    q_scale: Scale = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode attention over a padded block table, computed in float32.

    Args:
        block_table: [batch, max_pages] int32 page ids; the columns past ceil(seq_lens[b] / page_size) are not read.
        seq_lens: [batch] int32, tokens of each request.

    The other arguments, the result and the errors are those of `decode_reference`; nothing is checked here either.
    """
    pages, lengths = _block_table_requests(block_table, seq_lens, ckv_cache.shape[1])
    scales = Scales(float(ckv_scale), float(kpe_scale), ckv_scale_arr, float(q_scale))
    return _decode(q_nope, q_pe, ckv_cache, kpe_cache, pages, lengths, sm_scale, lse_base, out, lse, scales=scales)


def prefill_reference(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    sm_scale: float,
    *,
    causal: bool = True,
    kv_last_page_len: torch.Tensor | None = None,
    lse_base: int | str = 2,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    ckv_scale: Scale = 1.0,
    kpe_scale: Scale = 1.0,
    ckv_scale_arr: torch.Tensor | None = None,
    q_scale: Scale = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prefill attention over page lists in CSR form, computed in float32.

    Args:
        q_nope: [total_q, H, 512], any floating dtype.
        q_pe: [total_q, H, 64], likewise.
        qo_indptr: [batch + 1] int32; request b owns the query tokens `qo_indptr[b]:qo_indptr[b + 1]`.
        causal: query i of a request's n sees keys 0 .. kv_len - n + i; False: every query sees all keys.
        out: [total_q, H, 512] to write to; None allocates it as `decode_reference` does.
        lse: [total_q, H] to write to; None allocates it as float32.

    The other arguments and the errors are those of `decode_reference`; nothing is checked here either.

    Returns:
        (output, lse). A query that sees no key gives output 0 and lse -inf; rows from qo_indptr[-1] on are not written.
    """
    pages, lengths = _csr_requests(kv_indptr, kv_indices, kv_last_page_len, ckv_cache.shape[1])
    queries = qo_indptr.tolist()
    scales = Scales(float(ckv_scale), float(kpe_scale), ckv_scale_arr, float(q_scale))
    return _prefill(
        q_nope, q_pe, ckv_cache, kpe_cache, queries, pages, lengths, sm_scale, causal, lse_base, out, lse,
        scales=scales,
    )  # fmt: skip


def prefill_reference_block_table(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    qo_indptr: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    sm_scale: float,
    *,
    causal: bool = True,
    lse_base: int | str = 2,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    ckv_scale: Scale = 1.0,
    kpe_scale: Scale = 1.0,
    ckv_scale_arr: torch.Tensor | None = None,
    q_scale: Scale = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prefill attention over a padded block table, computed in float32.

    Args:
        block_table: [batch, max_pages] int32 page ids; the columns past ceil(seq_lens[b] / page_size) are not read.
        seq_lens: [batch] int32, keys of each request.

    The other arguments, the result and the errors are those of `prefill_reference`; nothing is checked here either.
    """
    pages, lengths = _block_table_requests(block_table, seq_lens, ckv_cache.shape[1])
    queries = qo_indptr.tolist()
    scales = Scales(float(ckv_scale), float(kpe_scale), ckv_scale_arr, float(q_scale))
    return _prefill(
        q_nope, q_pe, ckv_cache, kpe_cache, queries, pages, lengths, sm_scale, causal, lse_base, out, lse,
        scales=scales,
    )  # fmt: skip


def _csr_requests(
    kv_indptr: torch.Tensor, kv_indices: torch.Tensor, kv_last_page_len: torch.Tensor | None, page_size: int
) -> tuple[list[torch.Tensor], list[int]]:
    """Page ids and kv_len of each request."""
    indptr = kv_indptr.tolist()
    last = [page_size] * (len(indptr) - 1) if kv_last_page_len is None else kv_last_page_len.tolist()
    pages = [kv_indices[start:end] for start, end in itertools.pairwise(indptr)]
    lengths = [(len(ids) - 1) * page_size + n if len(ids) else 0 for ids, n in zip(pages, last, strict=True)]
    return pages, lengths


def _block_table_requests(
    block_table: torch.Tensor, seq_lens: torch.Tensor, page_size: int
) -> tuple[list[torch.Tensor], list[int]]:
    """Page ids and kv_len of each request."""
    lengths = seq_lens.tolist()
    return [block_table[b, : -(-n // page_size)] for b, n in enumerate(lengths)], lengths


def _decode(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    pages: list[torch.Tensor],
    lengths: list[int],
    sm_scale: float,
    lse_base: int | str,
    out: torch.Tensor | None,
    lse: torch.Tensor | None,
    p_dtype: torch.dtype | None = None,
    scales: Scales = _UNSCALED,
) -> tuple[torch.Tensor, torch.Tensor]:
    queries = range(q_nope.shape[0] + 1)
    return _prefill(
        q_nope, q_pe, ckv_cache, kpe_cache, queries, pages, lengths, sm_scale, False, lse_base, out, lse, p_dtype,
        scales,
    )  # fmt: skip


def _prefill(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    queries: Sequence[int],
    pages: list[torch.Tensor],
    lengths: list[int],
    sm_scale: float,
    causal: bool,
    lse_base: int | str,
    out: torch.Tensor | None,
    lse: torch.Tensor | None,
    p_dtype: torch.dtype | None = None,
    scales: Scales = _UNSCALED,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`queries` is qo_indptr; `p_dtype` rounds P before P ckv, as a kernel that multiplies in that dtype does; tests
    judge errors by it."""
    total_q, num_heads, _ = q_nope.shape
    page_size, ckv_dim = ckv_cache.shape[1:]
    if out is None:
        out = torch.empty((total_q, num_heads, ckv_dim), dtype=_output_dtype(q_nope, q_pe), device=q_nope.device)
    if lse is None:
        lse = torch.empty((total_q, num_heads), dtype=torch.float32, device=q_nope.device)
    per_base = _LOG2_E if lse_base == 2 else 1.0
    sm_scale = float(sm_scale)  # any numbers.Real is legal, and torch multiplies by no Fraction
    dtype = _compute_dtype()
    tokens_per_chunk = max(1, _CHUNK_ROWS // num_heads)
    # Autocast would multiply in 16 bits.
    with torch.no_grad(), torch.autocast(q_nope.device.type, enabled=False):
        for (begin, end), page_ids, kv_len in zip(itertools.pairwise(queries), pages, lengths, strict=True):
            # query token t sees the first t + shift keys
            shift = kv_len - end + 1
            first = end if kv_len <= 0 else max(begin, 1 - shift) if causal else begin
            out[begin:first] = 0
            lse[begin:first] = -math.inf
            for start in range(first, end, tokens_per_chunk):
                stop = min(start + tokens_per_chunk, end)
                num_keys = stop - 1 + shift if causal else kv_len
                visible = None
                if causal and stop - start > 1:
                    visible = torch.arange(start + shift, stop + shift, device=q_nope.device)
                    visible = visible.repeat_interleave(num_heads)[:, None]
                q = _queries(q_nope[start:stop], q_pe[start:stop], dtype, scales.q_scale).flatten(0, 1) * sm_scale
                ids = page_ids[: -(-num_keys // page_size)]
                rows_out, rows_lse = _attend(q, ckv_cache, kpe_cache, ids, num_keys, p_dtype, visible, scales)
                out[start:stop] = rows_out.view(-1, num_heads, ckv_dim)
                lse[start:stop] = rows_lse.view(-1, num_heads) * per_base
    return out, lse


def _attend(
    q: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    page_ids: torch.Tensor,
    kv_len: int,
    p_dtype: torch.dtype | None,
    visible: torch.Tensor | None,
    scales: Scales,
) -> tuple[torch.Tensor, torch.Tensor]:
    """kv_len > 0 keys of one request: scaled q [R, 576] in the dtype of the math -> [R, 512], lse [R] in base e.

    `visible` [R, 1], from 1 to kv_len, is how many keys a row sees; None: all.
    """
    page_size, ckv_dim = ckv_cache.shape[1:]
    pages_per_chunk = max(1, _CHUNK_TOKENS // page_size)
    acc = q.new_zeros(q.shape[0], ckv_dim)
    row_sum = q.new_zeros(q.shape[0], 1)
    row_max = q.new_full((q.shape[0], 1), -math.inf)
    for start in range(0, len(page_ids), pages_per_chunk):
        ids = page_ids[start : start + pages_per_chunk]
        num_tokens = min(len(ids) * page_size, kv_len - start * page_size)
        ckv, kpe = _rows(ckv_cache, ids, num_tokens), _rows(kpe_cache, ids, num_tokens)
        if scales.ckv_scale_arr is not None:
            ckv = dequantize(ckv, _rows(scales.ckv_scale_arr, ids, num_tokens))
        elif ckv.dtype is FP8:
            ckv = ckv.float() * scales.ckv_scale
        if kpe.dtype is FP8:
            kpe = kpe.float() * scales.kpe_scale
        ckv, kpe = ckv.to(q.dtype), kpe.to(q.dtype)
        scores = q[:, :ckv_dim] @ ckv.T + q[:, ckv_dim:] @ kpe.T
        if visible is not None:
            position = torch.arange(start * page_size, start * page_size + num_tokens, device=q.device)
            scores.masked_fill_(position >= visible, -math.inf)
        new_max = torch.maximum(row_max, scores.amax(dim=-1, keepdim=True))
        p = torch.exp(scores - new_max)
        rescale = torch.exp(row_max - new_max)
        row_sum = row_sum * rescale + p.sum(dim=-1, keepdim=True)
        if p_dtype is not None:
            p = p.to(p_dtype).to(p.dtype)
        acc = acc * rescale + p @ ckv
        row_max = new_max
    return acc / row_sum, (row_max + row_sum.log()).squeeze(-1)


def _rows(cache: torch.Tensor, page_ids: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """[num_tokens, width] of the pages in `page_ids`."""
    # as bytes, which every torch gathers on every device
    elements = cache.view(torch.uint8) if cache.dtype is FP8 else cache
    return elements.index_select(0, page_ids).flatten(0, 1)[:num_tokens].view(cache.dtype)


def _queries(q_nope: torch.Tensor, q_pe: torch.Tensor, dtype: torch.dtype, q_scale: float) -> torch.Tensor:
    """[tokens, H, 576] in `dtype`, with what is e4m3 multiplied by `q_scale`."""
    if q_nope.dtype is not FP8:
        return torch.cat((q_nope, q_pe), dim=-1).to(dtype)
    nope = q_nope.float() * q_scale
    pe = q_pe.float() * q_scale if q_pe.dtype is FP8 else q_pe
    return torch.cat((nope.to(dtype), pe.to(dtype)), dim=-1)


def _output_dtype(q_nope: torch.Tensor, q_pe: torch.Tensor) -> torch.dtype:
    """Of an output nobody gave: the first dtype of the queries that is not e4m3, else bfloat16."""
    return next((q.dtype for q in (q_nope, q_pe) if q.dtype is not FP8), torch.bfloat16)


def _compute_dtype() -> torch.dtype:
    """float32 where a float32 product is one, float64 where the process allows TF32 or bf16 shortcuts for it."""
    try:
        exact = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set through a per-backend switch, and then torch refuses to name one value
        exact = False
    return torch.float32 if exact else torch.float64
