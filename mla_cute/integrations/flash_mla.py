"""FlashMLA's `get_mla_metadata`, `flash_mla_with_kvcache` and `flash_mla_sparse_fwd` over the kernels of this library.

    from mla_cute.integrations.flash_mla import flash_mla_sparse_fwd, flash_mla_with_kvcache, get_mla_metadata

Signatures are those of FlashMLA at commit 9241ae3ef9bac614dd25e45e507e089f888280e0 (2026-04-29,
flash_mla/flash_mla_interface.py); FlashMLA need not be installed. What vLLM's copy (0.33.0, vllm.third_party.flashmla)
and sgl-flash-mla 1.0.0 add to them is taken by keyword: in the two it stands in different places. What differs:

* 1 to 128 heads without padding, any page size, any number of tokens in a list; every cache that
  `flash_mla_with_kvcache` names, in dense and in sparse attention.
* DeepSeek-V4's rows, whose head_dim is 512, are not read, and the `extra_*` arguments raise NotImplementedError.
* A query that sees no key gives output 0. Its log-sum-exp is +inf in sparse attention, as FlashMLA's, and -inf, which
  merging states needs, in dense attention.
* `flash_mla_sparse_fwd` returns max_logits where it is asked for (`return_max_logits`), else None: these kernels write
  no exact row maximum, so torch computes it anew, over float32 copies of the rows.
* The log-sum-exp of several query tokens is a transposed view: [batch, heads, tokens] in the memory order of
  [batch, tokens, heads].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..attend import attend
from ..call import DECODE_TABLE, PREFILL_TABLE, SPARSE, UNSCALED, Cache, Call, Pages, topk_lens_of
from ..check import DTYPES, FP8, check
from ..dims import CKV_DIM, KPE_DIM, MAX_HEADS
from ..expect import (
    Scale,
    describe,
    expect_bool,
    expect_dtype,
    expect_float32,
    expect_metadata,
    expect_shape,
    expect_tensor,
    expect_tensor_scale,
)
from ..launch import table_stride
from ..plan_decode import plan_decode_block_table
from ..plan_prefill import plan_prefill_block_table
from ..quant import GROUP_ROW_BYTES, group_rows
from ..sparse import mla_sparse, plan_sparse

__all__ = ["FlashMLASchedMeta", "flash_mla_sparse_fwd", "flash_mla_with_kvcache", "get_mla_metadata"]

_HEAD_DIM = CKV_DIM + KPE_DIM
# Elements of the rows that `_max_logits` has in float32 at a time, 64 MB.
_GATHERED = 1 << 24
# What sgl-flash-mla calls rows of 656 bytes.
_V32 = "V32"


@dataclass
class FlashMLASchedMeta:
    """Shapes and plan of a step, filled by the first `flash_mla_with_kvcache` it is given to and reused by the others.

    Attributes:
        have_initialized, config: FlashMLA's.
        tile_scheduler_metadata, num_splits: FlashMLA's, always None here.
        plan: a DecodePlan, PrefillPlan or SparsePlan of this library; `plan.update()` plans again from the present
            values of the cache_seqlens that the first call was given, or of topk_lens.
        qo_indptr: [batch + 1] int32 of dense calls with several query tokens.
        topk_length: what the first sparse call was given.
        topk_lens: [batch * s_q] int32, what it says of each query token: itself where s_q is 1.
    """

    @dataclass
    class Config:
        b: int
        s_q: int
        h_q: int
        page_block_size: int
        h_k: int

        causal: bool
        is_fp8_kvcache: bool
        topk: int | None

        extra_page_block_size: int | None
        extra_topk: int | None

        enable_batch_invariant: bool = False

    have_initialized: bool = False
    config: Config | None = None
    tile_scheduler_metadata: torch.Tensor | None = None
    num_splits: torch.Tensor | None = None
    plan: Any = None
    qo_indptr: torch.Tensor | None = None
    topk_length: torch.Tensor | None = None
    topk_lens: torch.Tensor | None = None


def get_mla_metadata(*args: Any, **kwargs: Any) -> tuple[FlashMLASchedMeta, None]:
    """(an empty FlashMLASchedMeta, None). Arguments are those of FlashMLA's older interface and are not looked at."""
    return FlashMLASchedMeta(), None


def flash_mla_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta,
    num_splits: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool | None = False,
    indices: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    extra_k_cache: torch.Tensor | None = None,
    extra_indices_in_kvcache: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    enable_batch_invariant: bool = False,
    use_legacy: bool = False,
    kv_format: str | None = None,
    descale_q: Scale | None = None,
    descale_k: Scale | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """MLA attention of `s_q` query tokens per request over a paged latent cache: to all tokens of the request, or with
    `indices` to those in a list of each query token's own.

    Args:
        q: [batch, s_q, heads, 576] bfloat16 or float16, with a k_cache of the format "tensor" also float8_e4m3fn; 512
            channels without and 64 with position. Read as two views; copied if batch and s_q cannot be joined in one.
        k_cache: [num_blocks, page_block_size, 1, 576] in the dtype of q, or an FP8 cache:
            format "tensor", [.., 1, 576] float8_e4m3fn with descale_k, whatever is_fp8_kvcache is;
            format "group", [.., 1, 656] of one-byte elements with is_fp8_kvcache=True and a bfloat16 q: 512 e4m3, 4
            float32 scales, 64 bfloat16, the row of DeepSeek-V3.2.
        block_table: [batch, max_num_blocks] int32; entries past a request's last page are not read. Not looked at with
            indices, which say it all.
        cache_seqlens: [batch] int32, keys of each request, those of its query tokens included. Not looked at with
            indices.
        head_dim_v: 512.
        tile_scheduler_metadata: from `get_mla_metadata`, one per step: calls that share it have the same shapes and
            are given the same cache_seqlens or topk_length, and run on one stream.
        num_splits: None.
        softmax_scale: factor of the scores, > 0; None: 1 / sqrt(576).
        causal: query i of s_q sees keys 0 .. cache_seqlens - s_q + i. False with indices.
        is_fp8_kvcache: True for the format "group"; with indices rows of 656 bytes are known as they are. (None, of
            sgl-flash-mla: False.)
        indices: [batch, s_q, topk] int32, tokens as block * page_block_size + row in any order; -1 at any place: no
            token. One that is named twice counts twice. None: dense attention.
        attn_sink: [heads] float32, with indices: the output is multiplied by exp(lse) / (exp(lse) + exp(attn_sink)).
            lse is without it. None: no sink.
        topk_length: [batch] int32, 0..topk, with indices: only so many columns of the request's lists count; what lies
            behind is never read. None: all.
        out: [batch, s_q, heads, 512], contiguous, in the dtype of the result, which is written to it. (Of vLLM.)
        enable_batch_invariant: a request's result has the same bits whatever else is in the batch. (Of vLLM and
            sgl-flash-mla.)
        use_legacy: True or False, changes nothing: sgl-flash-mla has two sets of kernels.
        kv_format: None, or "V32" with rows of 656 bytes and indices. (Of sgl-flash-mla.)
        descale_q, descale_k: what multiplies an e4m3 q and a k_cache of the format "tensor": a number, or a float32
            tensor of one element on the device of q, which the kernels read; None: 1. (Of sgl-flash-mla.)
        (the rest): None.

    Returns:
        (out [batch, s_q, heads, 512] in the dtype of q, bfloat16 if that is e4m3;
        lse [batch, heads, s_q] float32, natural log; of a query token that sees no key -inf, with indices +inf)

    Raises:
        TypeError, ValueError: an argument is wrong, or not what earlier calls with the same tile_scheduler_metadata
            had; the message names it. NotImplementedError: extra tokens in a second cache.
        RuntimeError: a CUDA device that is not Hopper.
    """
    _refuse_extra(
        extra_k_cache=extra_k_cache,
        extra_indices_in_kvcache=extra_indices_in_kvcache,
        extra_topk_length=extra_topk_length,
    )
    if not isinstance(tile_scheduler_metadata, FlashMLASchedMeta):
        raise TypeError(
            f"tile_scheduler_metadata: expected the FlashMLASchedMeta of get_mla_metadata(), got "
            f"{describe(tile_scheduler_metadata)}"
        )
    if num_splits is not None:
        raise ValueError(f"num_splits: expected None, got {describe(num_splits)}")
    if head_dim_v != CKV_DIM:
        raise ValueError(f"head_dim_v: expected {CKV_DIM}, got {head_dim_v}")
    expect_bool("causal", causal)
    is_fp8_kvcache = False if is_fp8_kvcache is None else is_fp8_kvcache
    expect_bool("is_fp8_kvcache", is_fp8_kvcache)
    expect_bool("enable_batch_invariant", enable_batch_invariant)
    expect_bool("use_legacy", use_legacy)
    expect_tensor("q", q)
    expect_shape("q", q, (None, None, None, _HEAD_DIM), f"[batch, s_q, heads, {_HEAD_DIM}]")
    batch, tokens, heads, _ = q.shape
    if not 1 <= heads <= MAX_HEADS:
        raise ValueError(f"q: expected 1 to {MAX_HEADS} heads (dimension 2), got {heads}")
    expect_tensor("k_cache", k_cache)
    if indices is not None and k_cache.shape[-1:] == (GROUP_ROW_BYTES,):
        is_fp8_kvcache = True
    cache = _cache(k_cache, is_fp8_kvcache, descale_k, q.device)
    q_scale: Scale = UNSCALED
    if q.dtype is FP8:
        q_scale = _scale("descale_q", descale_q, q.device)
    elif descale_q is not None:
        raise ValueError(f"descale_q: expected None with q of {q.dtype}, got {describe(descale_q)}")
    if indices is None:
        _expect_dense(attn_sink=attn_sink, topk_length=topk_length, kv_format=kv_format)
    else:
        expect_metadata("indices", indices, (batch, tokens, None), "[batch, s_q, topk]", q.device)
        _expect_sparse(causal, kv_format, cache)

    step = tile_scheduler_metadata
    topk = None if indices is None else indices.shape[-1]
    config = FlashMLASchedMeta.Config(
        batch, tokens, heads, k_cache.shape[1], 1, causal, is_fp8_kvcache, topk, None, None, enable_batch_invariant
    )  # fmt: skip
    if step.config is not None and step.config != config:
        raise ValueError(f"tile_scheduler_metadata: expected one for {config}, got one that was used for {step.config}")
    rows = q[:, 0] if tokens == 1 else q.flatten(0, 1)
    if indices is None:
        pages = _requests(step, q, block_table, cache_seqlens, causal)
    else:
        pages = _lists(step, q, indices, topk_length)
    _expect_sink(attn_sink, heads, q.device)
    sm_scale = _HEAD_DIM**-0.5 if softmax_scale is None else softmax_scale
    out_rows = None if out is None else _rows_of_out(out, (batch, tokens, heads, CKV_DIM))
    call = Call(
        rows[..., :CKV_DIM], rows[..., CKV_DIM:], cache, pages, sm_scale, out_rows, None, "e", q_scale, attn_sink
    )  # fmt: skip
    if not step.have_initialized:
        _initialize(step, config, call, topk_length)
    result: Any = attend(call, step.plan, None, False)
    output, lse = result
    if indices is not None:
        lse = _with_inf(lse)
    return output.view(batch, tokens, heads, CKV_DIM) if out is None else out, lse.view(batch, tokens, heads).transpose(
        1, 2
    )


def flash_mla_sparse_fwd(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    use_legacy: bool = False,
    return_log2_lse: bool | None = None,
    return_max_logits: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """MLA attention of query tokens that each attend to a list of tokens of a 16-bit latent cache without pages. Plans
    in the call.

    Args:
        q: [s_q, heads, 576] bfloat16 or float16, 1 to 128 heads.
        kv: [s_kv, 1, 576] in the dtype of q, rows at any stride.
        indices: [s_q, 1, topk] int32, rows of kv in any order; -1, or s_kv and more, at any place: no token.
        sm_scale: factor of the scores, > 0.
        d_v: 512.
        attn_sink: [heads] float32: the output is multiplied by exp(lse) / (exp(lse) + exp(attn_sink)). lse is without
            it. None: no sink.
        topk_length: [s_q] int32, 0..topk: only so many columns of a list count; of tokens named behind it none is read.
            None: all.
        out: [s_q, heads, 512] in the dtype of q, which is written to it: as `mla_sparse` takes it. (Of vLLM.)
        use_legacy: True or False, changes nothing. (Of sgl-flash-mla.)
        return_log2_lse: True: lse and max_logits in base 2; False: None for both. (Of sgl-flash-mla.)
        return_max_logits: whether max_logits is computed; see above. (Of this library.)

    Returns:
        (out [s_q, heads, 512] in the dtype of q; max_logits [s_q, heads] float32, the largest score times sm_scale,
        -inf of a query token that sees no key, or None; lse [s_q, heads] float32, natural log, +inf of such a token)

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it. RuntimeError: a CUDA device that is not
            Hopper.
    """
    if d_v != CKV_DIM:
        raise ValueError(f"d_v: expected {CKV_DIM}, got {d_v}")
    expect_bool("use_legacy", use_legacy)
    if return_log2_lse is not None:
        expect_bool("return_log2_lse", return_log2_lse)
    expect_bool("return_max_logits", return_max_logits)
    expect_tensor("q", q)
    expect_shape("q", q, (None, None, _HEAD_DIM), f"[s_q, heads, {_HEAD_DIM}]")
    tokens, heads, _ = q.shape
    if q.dtype not in DTYPES:
        raise TypeError(f"q: expected dtype {' or '.join(map(str, DTYPES))}, got {q.dtype}")
    expect_tensor("kv", kv)
    expect_shape("kv", kv, (None, 1, _HEAD_DIM), f"[s_kv, 1, {_HEAD_DIM}]")
    expect_dtype("kv", kv, "q", q.dtype)
    expect_metadata("indices", indices, (tokens, 1, None), "[s_q, 1, topk]", q.device)
    if topk_length is not None:
        expect_metadata("topk_length", topk_length, (tokens,), "[s_q]", q.device)
    _expect_sink(attn_sink, heads, q.device)
    lists = indices[:, 0]
    lists = lists.where(lists < kv.shape[0], -1)
    result = mla_sparse(
        q[..., :CKV_DIM], q[..., CKV_DIM:],
        # Rows are pages of one token.
        kv[..., :CKV_DIM], kv[..., CKV_DIM:],
        lists, sm_scale, topk_lens=topk_length, out=out, lse_base=2 if return_log2_lse else "e",
        return_lse=return_log2_lse is not False, sink=attn_sink,
    )  # fmt: skip
    if isinstance(result, torch.Tensor):
        return result, None, None
    output, lse = result
    largest = None
    if return_max_logits:
        largest = _max_logits(
            q, kv[:, 0], lists, topk_length, sm_scale * (math.log2(math.e) if return_log2_lse else 1.0)
        )
    return output, largest, _with_inf(lse)


def _requests(step: FlashMLASchedMeta, q: torch.Tensor, block_table: Any, cache_seqlens: Any, causal: bool) -> Pages:
    """Of dense attention."""
    batch, tokens, _, _ = q.shape
    expect_metadata("block_table", block_table, (batch, None), "[batch, max_num_blocks]", q.device)
    expect_metadata("cache_seqlens", cache_seqlens, (batch,), "[batch]", q.device)
    if tokens == 1:
        return Pages(DECODE_TABLE, cache_seqlens, block_table)
    queries = step.qo_indptr
    if queries is None:
        queries = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * tokens
    return Pages(PREFILL_TABLE, cache_seqlens, block_table, None, queries, causal)


def _lists(step: FlashMLASchedMeta, q: torch.Tensor, indices: torch.Tensor, topk_length: torch.Tensor | None) -> Pages:
    """Of sparse attention: a list for each query token."""
    batch, tokens, _, _ = q.shape
    rows = indices[:, 0] if tokens == 1 else indices.flatten(0, 1)
    if topk_length is not None:
        expect_metadata("topk_length", topk_length, (batch,), "[batch]", q.device)
    lengths: Any = step.topk_lens
    if not step.have_initialized:
        if topk_length is not None and tokens != 1:
            lengths = topk_length[:, None].expand(-1, tokens).flatten()
        else:
            lengths = topk_lens_of(rows, topk_length)
    elif not _same_memory(topk_length, step.topk_length):
        raise ValueError(
            "topk_length: expected the tensor, or None, that tile_scheduler_metadata was first used with, got "
            f"{'None' if topk_length is None else 'another'}"
        )
    return Pages(SPARSE, lengths, rows)


def _same_memory(x: torch.Tensor | None, y: torch.Tensor | None) -> bool:
    return x is y or (x is not None and y is not None and x.data_ptr() == y.data_ptr())


def _initialize(
    step: FlashMLASchedMeta, config: FlashMLASchedMeta.Config, call: Call, topk_length: torch.Tensor | None
) -> None:
    """Checks the call first: one that is refused leaves `step` as it was."""
    pages = call.pages
    problem = check(call)
    sizes: dict[str, Any] = {
        "num_heads": config.h_q, "kv_format": problem.kv_format, "q_fp8": problem.q_fp8,
        "batch_invariant": config.enable_batch_invariant,
    }  # fmt: skip
    if pages.form is SPARSE:
        step.plan = plan_sparse(pages.ids, topk_lens=pages.lengths, **sizes)
        step.topk_length, step.topk_lens = topk_length, pages.lengths
    else:
        sizes |= {
            "page_size": config.page_block_size, "max_pages": pages.ids.shape[1],
            "table_stride": table_stride(pages.ids),
        }  # fmt: skip
        if pages.queries is None:
            step.plan = plan_decode_block_table(pages.lengths, **sizes)
        else:
            sizes |= {"total_q": problem.total_q, "causal": config.causal, "max_q_len": config.s_q}
            step.plan = plan_prefill_block_table(pages.queries, pages.lengths, **sizes)
            step.qo_indptr = pages.queries
    step.config, step.have_initialized = config, True


def _max_logits(
    q: torch.Tensor, rows: torch.Tensor, lists: torch.Tensor, topk_length: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """The largest score of each query token and head, [s_q, heads] float32. `rows`: [s_kv, 576]."""
    tokens, topk = lists.shape
    largest = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)
    if topk == 0:
        return largest
    seen = (lists >= 0) & (torch.arange(topk, device=q.device) < topk_lens_of(lists, topk_length)[:, None])
    at_a_time = max(1, _GATHERED // (topk * _HEAD_DIM))
    for i in range(0, tokens, at_a_time):
        some = slice(i, i + at_a_time)
        # A row that is in no list may be anything, NaN too: its score is replaced and not added to.
        keys = rows[lists[some].where(seen[some], 0).long()].float()
        scores = q[some].float() @ keys.transpose(1, 2) * scale
        largest[some] = scores.masked_fill(~seen[some, None], -torch.inf).amax(-1)
    return largest


def _with_inf(lse: torch.Tensor) -> torch.Tensor:
    """-inf becomes +inf, in place and in one kernel; nan stays."""
    return lse.nan_to_num_(nan=torch.nan, posinf=torch.inf, neginf=torch.inf)


def _expect_sink(attn_sink: torch.Tensor | None, heads: int, device: torch.device) -> None:
    if attn_sink is not None:
        expect_float32("attn_sink", attn_sink, (heads,), "[heads]", device, "q")


def _refuse_extra(**arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"{name}: expected None, a second cache is not supported, got {describe(value)}")


def _expect_dense(**arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{name}: expected None without indices, got {describe(value)}")


def _expect_sparse(causal: bool, kv_format: str | None, cache: Cache) -> None:
    if causal:
        raise ValueError("causal: expected False with indices, got True")
    if kv_format is not None and (kv_format != _V32 or cache.scale_arr is None):
        rows = "rows of 656 bytes" if cache.scale_arr is not None else "this k_cache"
        expected = f"None or {_V32!r}" if cache.scale_arr is not None else "None"
        raise ValueError(f"kv_format: expected {expected} with {rows}, got {kv_format!r}")


def _rows_of_out(out: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """out as [tokens, heads, 512]."""
    expect_tensor("out", out)
    expect_shape("out", out, shape, f"[batch, s_q, heads, {CKV_DIM}]")
    if not out.is_contiguous():
        raise ValueError(f"out: expected a contiguous tensor, got strides {list(out.stride())}")
    return out.flatten(0, 1)


def _cache(k_cache: torch.Tensor, is_fp8_kvcache: bool, descale_k: Scale | None, device: torch.device) -> Cache:
    """Views of k_cache."""
    # With is_fp8_kvcache=True sgl-flash-mla's dense attention has e4m3 rows without scales.
    has_groups = is_fp8_kvcache and not (k_cache.dtype is FP8 and k_cache.shape[-1:] == (_HEAD_DIM,))
    width = GROUP_ROW_BYTES if has_groups else _HEAD_DIM
    expect_shape("k_cache", k_cache, (None, None, 1, width), f"[num_blocks, page_block_size, 1, {width}]")
    rows = k_cache[:, :, 0]
    if has_groups:
        if k_cache.itemsize != 1:
            raise TypeError(f"k_cache: expected a dtype of one byte with is_fp8_kvcache=True, got {k_cache.dtype}")
        if descale_k is not None:
            raise ValueError("descale_k: expected None with rows of 656 bytes, which hold their scales")
        ckv_cache, ckv_scale_arr, kpe_cache = group_rows(rows.view(torch.uint8))
        return Cache(ckv_cache, kpe_cache, scale_arr=ckv_scale_arr)
    ckv_cache, kpe_cache = rows[..., :CKV_DIM], rows[..., CKV_DIM:]
    if k_cache.dtype is FP8:
        scale = _scale("descale_k", descale_k, device)
        return Cache(ckv_cache, kpe_cache, scale, scale)
    if descale_k is not None:
        raise ValueError(f"descale_k: expected None with a k_cache of {k_cache.dtype}")
    return Cache(ckv_cache, kpe_cache)


def _scale(name: str, value: Scale | None, device: torch.device) -> Scale:
    if value is None:
        return UNSCALED
    expect_tensor_scale(name, value, device)
    return value
