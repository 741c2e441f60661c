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
from typing import Any

import torch

from .call import DECODE, DECODE_TABLE, PREFILL, PREFILL_TABLE, SPARSE, Cache, Call, Pages, call_of
from .check import FP8
from .quant import dequantize

_CHUNK_TOKENS = 16384
_CHUNK_ROWS = 1024
_LOG2_E = math.log2(math.e)


def decode_reference(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode attention over page lists, computed in float32: the arguments of :func:`mla_cute.mla_paged_decode`, less
    return_lse, plan, config and batch_invariant.

    Queries and caches may have any floating dtype and any strides. Nothing is checked: `mla_cute.mla_paged_decode` on
    CPU tensors checks arguments and values, and computes this.

    Returns:
        (output [batch, H, channels of ckv], lse [batch, H] float32). Without `out` the output has the dtype of q_nope,
        that of q_pe if q_nope is float8_e4m3fn, and is bfloat16 if both are. A request of length 0 gives output 0 and
        lse -inf.

    Raises:
        TypeError: an argument is missing or not known. IndexError, RuntimeError: from torch, when a page id in use is
        out of range.
    """
    return attention(call_of(DECODE, *args, **options))


def decode_reference_block_table(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """As `decode_reference`, with the arguments of :func:`mla_cute.mla_paged_decode_block_table`."""
    return attention(call_of(DECODE_TABLE, *args, **options))


def prefill_reference(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """As `decode_reference`, with the arguments of :func:`mla_cute.mla_paged_prefill`.

    A query that sees no key gives output 0 and lse -inf; rows from qo_indptr[-1] on are not written.
    """
    return attention(call_of(PREFILL, *args, **options))


def prefill_reference_block_table(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """As `prefill_reference`, with the arguments of :func:`mla_cute.mla_paged_prefill_block_table`."""
    return attention(call_of(PREFILL_TABLE, *args, **options))


def sparse_reference(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """As `decode_reference`, with the arguments of :func:`mla_cute.mla_sparse`."""
    return attention(call_of(SPARSE, *args, **options))


def requests_of(pages: Pages, page_size: int) -> tuple[list[torch.Tensor], list[int]]:
    """Page ids and kv_len of each request; of SPARSE the tokens of each query token, and how many they are."""
    _, lengths, ids, last_len, _, _ = pages
    if pages.form is SPARSE:
        rows = [ids[b, :n] for b, n in enumerate(lengths.tolist())]
        chosen = [row[row >= 0] for row in rows]
        return chosen, [len(row) for row in chosen]
    if pages.form.by_table:
        kv_lens = lengths.tolist()
        return [ids[b, : -(-n // page_size)] for b, n in enumerate(kv_lens)], kv_lens
    indptr = lengths.tolist()
    last = [page_size] * (len(indptr) - 1) if last_len is None else last_len.tolist()
    found = [ids[start:end] for start, end in itertools.pairwise(indptr)]
    return found, [(len(own) - 1) * page_size + n if len(own) else 0 for own, n in zip(found, last, strict=True)]


def attention(
    call: Call, p_dtype: torch.dtype | None = None, requests: tuple[list[torch.Tensor], list[int]] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, lse) of a call. For tests: `p_dtype` rounds P before P ckv, as a kernel that multiplies in that dtype
    does; `requests` are page ids and lengths in the place of `requests_of`'s."""
    q_nope, q_pe, cache, pages, sm_scale, out, lse, lse_base, q_scale, sink = call
    # scales may be tensors of one element
    cache = cache._replace(ckv_scale=float(cache.ckv_scale), kpe_scale=float(cache.kpe_scale))
    q_scale, causal = float(q_scale), pages.causal
    page_ids, lengths = requests_of(pages, cache.ckv.shape[1]) if requests is None else requests
    queries = range(q_nope.shape[0] + 1) if pages.queries is None else pages.queries.tolist()
    total_q, num_heads, _ = q_nope.shape
    page_size, ckv_dim = cache.ckv.shape[1:]
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
        for (begin, end), own_ids, kv_len in zip(itertools.pairwise(queries), page_ids, lengths, strict=True):
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
                q = _queries(q_nope[start:stop], q_pe[start:stop], dtype, q_scale).flatten(0, 1) * sm_scale
                if pages.form is SPARSE:
                    rows_out, rows_lse = _attend(q, *_gathered(cache, own_ids), num_keys, p_dtype, visible)
                else:
                    ids = own_ids[: -(-num_keys // page_size)]
                    rows_out, rows_lse = _attend(q, cache, ids, num_keys, p_dtype, visible)
                rows_out = rows_out.view(-1, num_heads, ckv_dim)
                if sink is not None:
                    # e^lse / (e^lse + e^sink) of it is left; both may be -inf
                    left = torch.sigmoid(rows_lse.view(-1, num_heads) - sink).nan_to_num(0.0)
                    rows_out = rows_out * left[..., None]
                out[start:stop] = rows_out
                lse[start:stop] = rows_lse.view(-1, num_heads) * per_base
    return out, lse


def _attend(
    q: torch.Tensor,
    cache: Cache,
    page_ids: torch.Tensor,
    kv_len: int,
    p_dtype: torch.dtype | None,
    visible: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """kv_len > 0 keys of one request: scaled q [R, ckv + kpe] in the dtype of the math -> [R, ckv], lse [R] in base e.

    `visible` [R, 1], from 1 to kv_len, is how many keys a row sees; None: all.
    """
    page_size, ckv_dim = cache.ckv.shape[1:]
    pages_per_chunk = max(1, _CHUNK_TOKENS // page_size)
    acc = q.new_zeros(q.shape[0], ckv_dim)
    row_sum = q.new_zeros(q.shape[0], 1)
    row_max = q.new_full((q.shape[0], 1), -math.inf)
    for start in range(0, len(page_ids), pages_per_chunk):
        ids = page_ids[start : start + pages_per_chunk]
        num_tokens = min(len(ids) * page_size, kv_len - start * page_size)
        ckv, kpe = _rows(cache.ckv, ids, num_tokens), _rows(cache.kpe, ids, num_tokens)
        if cache.scale_arr is not None:
            ckv = dequantize(ckv, _rows(cache.scale_arr, ids, num_tokens))
        elif ckv.dtype is FP8:
            ckv = ckv.float() * cache.ckv_scale
        if kpe.dtype is FP8:
            kpe = kpe.float() * cache.kpe_scale
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


def _gathered(cache: Cache, tokens: torch.Tensor) -> tuple[Cache, torch.Tensor]:
    """A cache whose pages are the tokens of a list, one each, and their page ids."""
    page, row = tokens // cache.ckv.shape[1], tokens % cache.ckv.shape[1]

    def gathered(x: torch.Tensor) -> torch.Tensor:
        elements = x.view(torch.uint8) if x.dtype is FP8 else x
        return elements[page, row].unsqueeze(1).view(x.dtype)

    arr = None if cache.scale_arr is None else gathered(cache.scale_arr)
    pages = torch.arange(len(tokens), device=tokens.device)
    return cache._replace(ckv=gathered(cache.ckv), kpe=gathered(cache.kpe), scale_arr=arr), pages


def _rows(cache: torch.Tensor, page_ids: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """[num_tokens, width] of the pages in `page_ids`."""
    # as bytes, which every torch gathers on every device
    elements = cache.view(torch.uint8) if cache.dtype is FP8 else cache
    return elements.index_select(0, page_ids).flatten(0, 1)[:num_tokens].view(cache.dtype)


def _queries(q_nope: torch.Tensor, q_pe: torch.Tensor, dtype: torch.dtype, q_scale: float) -> torch.Tensor:
    """[tokens, H, ckv + kpe] in `dtype`, with what is e4m3 multiplied by `q_scale`."""
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
