"""FlashMLA's `get_mla_metadata` and `flash_mla_with_kvcache` over the kernels of this library.

    from mla_cute.integrations.flash_mla import flash_mla_with_kvcache, get_mla_metadata

Signatures are those of FlashMLA at commit 9241ae3ef9bac614dd25e45e507e089f888280e0 (2026-04-29,
flash_mla/flash_mla_interface.py); FlashMLA need not be installed. What vLLM's copy (0.33.0, vllm.third_party.flashmla)
and sgl-flash-mla 1.0.0 add to them is taken by keyword: in the two it stands in different places. What differs:

* Dense attention only: `indices`, `topk_length`, `attn_sink` and the `extra_*` arguments raise NotImplementedError.
* Any page size and 1 to 128 heads; FP8 caches in dense attention (`flash_mla_with_kvcache` has the layouts).
* A query that sees no key gives output 0 and log-sum-exp -inf, where FlashMLA gives +inf.
* The log-sum-exp of several query tokens is a transposed view: [batch, heads, tokens] in the memory order of
  [batch, tokens, heads].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..attend import attend
from ..call import DECODE_TABLE, PREFILL_TABLE, UNSCALED, Cache, Call, Pages
from ..check import FP8, check
from ..dims import CKV_DIM, KPE_DIM, MAX_HEADS
from ..expect import Scale, describe, expect_bool, expect_metadata, expect_shape, expect_tensor, expect_tensor_scale
from ..launch import table_stride
from ..plan_decode import plan_decode_block_table
from ..plan_prefill import plan_prefill_block_table
from ..quant import GROUP_ROW_BYTES, group_rows

__all__ = ["FlashMLASchedMeta", "flash_mla_with_kvcache", "get_mla_metadata"]

_HEAD_DIM = CKV_DIM + KPE_DIM


@dataclass
class FlashMLASchedMeta:
    """Shapes and plan of a step, filled by the first `flash_mla_with_kvcache` it is given to and reused by the others.

    Attributes:
        have_initialized, config: FlashMLA's.
        tile_scheduler_metadata, num_splits: FlashMLA's, always None here.
        plan: a DecodePlan or PrefillPlan of this library; `plan.update()` plans again from the present values of the
            cache_seqlens that the first call was given.
        qo_indptr: [batch + 1] int32 of calls with several query tokens.
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
    is_fp8_kvcache: bool = False,
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
    kv_format: None = None,
    descale_q: Scale | None = None,
    descale_k: Scale | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """MLA attention of `s_q` query tokens per request over a paged latent cache.

    Args:
        q: [batch, s_q, heads, 576] bfloat16 or float16, with a k_cache of the format "tensor" also float8_e4m3fn; 512
            channels without and 64 with position. Read as two views; copied if batch and s_q cannot be joined in one.
        k_cache: [num_blocks, page_block_size, 1, 576] in the dtype of q, or an FP8 cache:
            format "tensor", [.., 1, 576] float8_e4m3fn with descale_k, whatever is_fp8_kvcache is;
            format "group", [.., 1, 656] of one-byte elements with is_fp8_kvcache=True and a bfloat16 q: 512 e4m3, 4
            float32 scales, 64 bfloat16, the row of DeepSeek-V3.2.
        block_table: [batch, max_num_blocks] int32; entries past a request's last page are not read.
        cache_seqlens: [batch] int32, keys of each request, those of its query tokens included.
        head_dim_v: 512.
        tile_scheduler_metadata: from `get_mla_metadata`, one per step: calls that share it have the same shapes and
            the same values in cache_seqlens, and run on one stream.
        num_splits: None.
        softmax_scale: factor of the scores, > 0; None: 1 / sqrt(576).
        causal: query i of s_q sees keys 0 .. cache_seqlens - s_q + i.
        is_fp8_kvcache: True for the format "group".
        out: [batch, s_q, heads, 512], contiguous, in the dtype of the result, which is written to it. (Of vLLM.)
        enable_batch_invariant: a request's result has the same bits whatever else is in the batch. (Of vLLM and
            sgl-flash-mla.)
        use_legacy: True or False, changes nothing: sgl-flash-mla has two sets of kernels.
        descale_q, descale_k: what multiplies an e4m3 q and a k_cache of the format "tensor": a number, or a float32
            tensor of one element on the device of q, which the kernels read; None: 1. (Of sgl-flash-mla.)
        (the rest): None.

    Returns:
        (out [batch, s_q, heads, 512] in the dtype of q, bfloat16 if that is e4m3;
        lse [batch, heads, s_q] float32, natural log)

    Raises:
        TypeError, ValueError: an argument is wrong, or not what earlier calls with the same tile_scheduler_metadata
            had; the message names it. NotImplementedError: sparse attention, attention sinks.
        RuntimeError: a CUDA device that is not Hopper.
    """
    _refuse_sparse(
        indices=indices,
        attn_sink=attn_sink,
        extra_k_cache=extra_k_cache,
        extra_indices_in_kvcache=extra_indices_in_kvcache,
        topk_length=topk_length,
        extra_topk_length=extra_topk_length,
        kv_format=kv_format,
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
    expect_bool("is_fp8_kvcache", is_fp8_kvcache)
    expect_bool("enable_batch_invariant", enable_batch_invariant)
    expect_bool("use_legacy", use_legacy)
    expect_tensor("q", q)
    expect_shape("q", q, (None, None, None, _HEAD_DIM), f"[batch, s_q, heads, {_HEAD_DIM}]")
    batch, tokens, heads, _ = q.shape
    if not 1 <= heads <= MAX_HEADS:
        raise ValueError(f"q: expected 1 to {MAX_HEADS} heads (dimension 2), got {heads}")
    cache = _cache(k_cache, is_fp8_kvcache, descale_k, q.device)
    q_scale: Scale = UNSCALED
    if q.dtype is FP8:
        q_scale = _scale("descale_q", descale_q, q.device)
    elif descale_q is not None:
        raise ValueError(f"descale_q: expected None with q of {q.dtype}, got {describe(descale_q)}")
    page_size = k_cache.shape[1]
    table: Any = block_table
    expect_metadata("block_table", table, (batch, None), "[batch, max_num_blocks]", q.device)
    lengths: Any = cache_seqlens
    expect_metadata("cache_seqlens", lengths, (batch,), "[batch]", q.device)

    step = tile_scheduler_metadata
    config = FlashMLASchedMeta.Config(
        batch, tokens, heads, page_size, 1, causal, is_fp8_kvcache, None, None, None, enable_batch_invariant
    )  # fmt: skip
    if step.config is not None and step.config != config:
        raise ValueError(f"tile_scheduler_metadata: expected one for {config}, got one that was used for {step.config}")
    rows = q[:, 0] if tokens == 1 else q.flatten(0, 1)
    pages = Pages(DECODE_TABLE, lengths, table)
    if tokens != 1:
        pages = Pages(PREFILL_TABLE, lengths, table, None, step.qo_indptr, causal)
        if not step.have_initialized:
            pages = pages._replace(queries=torch.arange(batch + 1, dtype=torch.int32, device=lengths.device) * tokens)
    sm_scale = _HEAD_DIM**-0.5 if softmax_scale is None else softmax_scale
    out_rows = None if out is None else _rows_of_out(out, (batch, tokens, heads, CKV_DIM))
    call = Call(rows[..., :CKV_DIM], rows[..., CKV_DIM:], cache, pages, sm_scale, out_rows, None, "e", q_scale)
    if not step.have_initialized:
        _initialize(step, config, call)
    result: Any = attend(call, step.plan, None, False)
    output, lse = result
    return output.view(batch, tokens, heads, CKV_DIM) if out is None else out, lse.view(batch, tokens, heads).transpose(
        1, 2
    )


def _initialize(step: FlashMLASchedMeta, config: FlashMLASchedMeta.Config, call: Call) -> None:
    """Checks the call first: one that is refused leaves `step` as it was."""
    pages = call.pages
    problem = check(call)
    sizes: dict[str, Any] = {
        "num_heads": config.h_q, "page_size": config.page_block_size,
        "max_pages": pages.ids.shape[1], "table_stride": table_stride(pages.ids),
        "kv_format": problem.kv_format, "q_fp8": problem.q_fp8, "batch_invariant": config.enable_batch_invariant,
    }  # fmt: skip
    if pages.queries is None:
        step.plan = plan_decode_block_table(pages.lengths, **sizes)
    else:
        sizes |= {"total_q": problem.total_q, "causal": config.causal}
        step.plan = plan_prefill_block_table(pages.queries, pages.lengths, **sizes)
        step.qo_indptr = pages.queries
    step.config, step.have_initialized = config, True


def _refuse_sparse(**arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None:
            what = "attention sinks are" if name == "attn_sink" else "sparse attention is"
            raise NotImplementedError(f"{name}: expected None, {what} not supported, got {describe(value)}")


def _rows_of_out(out: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """out as [tokens, heads, 512]."""
    expect_tensor("out", out)
    expect_shape("out", out, shape, f"[batch, s_q, heads, {CKV_DIM}]")
    if not out.is_contiguous():
        raise ValueError(f"out: expected a contiguous tensor, got strides {list(out.stride())}")
    return out.flatten(0, 1)


def _cache(k_cache: torch.Tensor, is_fp8_kvcache: bool, descale_k: Scale | None, device: torch.device) -> Cache:
    """Views of k_cache."""
    expect_tensor("k_cache", k_cache)
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
