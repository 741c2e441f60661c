"""The public calls: signatures and their meaning. attend.py is what they do.

Each ends in the tuple that a `Call` is, of a tuple that is a `Cache` and one that is its `Pages` (call.py).
"""

from __future__ import annotations

from typing import Literal, overload

import torch

from .attend import attend
from .call import DECODE, DECODE_TABLE, PREFILL, PREFILL_TABLE, UNSCALED
from .config import KernelConfig
from .expect import Scale
from .plan_decode import DecodePlan
from .plan_prefill import PrefillPlan


@overload
def mla_paged_decode(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor | None,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor | None,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    sm_scale: float,
    *,
    kv_last_page_len: torch.Tensor | None = ...,
    out: torch.Tensor | None = ...,
    lse: torch.Tensor | None = ...,
    lse_base: int | str = ...,
    return_lse: Literal[True] = ...,
    ckv_scale: Scale = ...,
    kpe_scale: Scale = ...,
    ckv_scale_arr: torch.Tensor | None = ...,
    q_scale: Scale = ...,
    plan: DecodePlan | None = ...,
    config: KernelConfig | None = ...,
    batch_invariant: bool = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


@overload
def mla_paged_decode(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor | None,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor | None,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    sm_scale: float,
    *,
    kv_last_page_len: torch.Tensor | None = ...,
    out: torch.Tensor | None = ...,
    lse: torch.Tensor | None = ...,
    lse_base: int | str = ...,
    return_lse: Literal[False],
    ckv_scale: Scale = ...,
    kpe_scale: Scale = ...,
    ckv_scale_arr: torch.Tensor | None = ...,
    q_scale: Scale = ...,
    plan: DecodePlan | None = ...,
    config: KernelConfig | None = ...,
    batch_invariant: bool = ...,
) -> torch.Tensor: ...


@overload
def mla_paged_decode(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor | None,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor | None,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    sm_scale: float,
    *,
    kv_last_page_len: torch.Tensor | None = ...,
    out: torch.Tensor | None = ...,
    lse: torch.Tensor | None = ...,
    lse_base: int | str = ...,
    return_lse: bool,
    ckv_scale: Scale = ...,
    kpe_scale: Scale = ...,
    ckv_scale_arr: torch.Tensor | None = ...,
    q_scale: Scale = ...,
    plan: DecodePlan | None = ...,
    config: KernelConfig | None = ...,
    batch_invariant: bool = ...,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...


def mla_paged_decode(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor | None,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor | None,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    sm_scale: float,
    *,
    kv_last_page_len: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    lse_base: int | str = 2,
    return_lse: bool = True,
    ckv_scale: Scale = UNSCALED,
    kpe_scale: Scale = UNSCALED,
    ckv_scale_arr: torch.Tensor | None = None,
    q_scale: Scale = UNSCALED,
    plan: DecodePlan | None = None,
    config: KernelConfig | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """One MLA decode step over a paged latent cache, one query token per request.

    S = q_nope ckv^T + q_pe kpe^T;  P = softmax(sm_scale * S);  output = P ckv   (absorbed MLA, DeepSeek-V2)

    A head has C channels in the latent part and R in the rope part, which are 512 + 64 (DeepSeek-V2/V3, Kimi-K2),
    512 + 32, 512 + 0, 256 + 64 (Mistral Small 4), 256 + 32 (MiniCPM3) or 256 + 0.

    Args:
        q_nope: [batch, H, C] bfloat16 or float16, with an FP8 cache also float8_e4m3fn; H in 1..128; last dimension
            contiguous, other strides and the address multiples of 16 bytes.
        q_pe: [batch, H, R], dtype of q_nope; beside an e4m3 q_nope, e4m3 with format "tensor" and 16-bit with the
            others. None, with kpe_cache: R is 0.
        ckv_cache: [num_pages, page_size, C], dtype of q_nope or float8_e4m3fn, page_size >= 1; may be a strided view
            of one [num_pages, page_size, C + R] buffer.
        kpe_cache: [num_pages, page_size, R], likewise; "FP8 caches" below has its dtype. None where q_pe is, too.
            Tensors of R = 0 have the dtypes of q_nope and ckv_cache.
        kv_indptr: [batch + 1] int32, non-decreasing; request b owns kv_indices[kv_indptr[b]:kv_indptr[b + 1]].
            (One published text says num_pages + 1; batch + 1 is what every implementation means.)
        kv_indices: [num_kv_indices] int32 page ids.
        sm_scale: factor of the scores, > 0; 1 / sqrt(192) for DeepSeek-V2/V3 before YaRN's correction.
        kv_last_page_len: [batch] int32, tokens in each request's last page; None: last pages are full.
        out: [batch, H, C] to write to, in the 16-bit dtype of q_nope, or of q_pe when q_nope is e4m3; when both are,
            in either 16-bit dtype. None allocates (bfloat16 when both are e4m3).
        lse: [batch, H] float32 to write to; None allocates.
        lse_base: 2 (default) or "e", base of the log-sum-exp.
        return_lse: False returns the output alone.
        ckv_scale, kpe_scale: what the e4m3 caches of format "tensor" are multiplied by; else 1, kpe_scale also where R
            is 0. Python numbers > 0, or float32 tensors of one element on the device, which the kernel reads when it
            runs.
        ckv_scale_arr: float32 scales of an e4m3 ckv_cache, [num_pages, page_size, 1] (format "token") or
            [num_pages, page_size, 4] (format "group": one per 128 channels); None otherwise. Last dimension
            contiguous, with 4 scales other strides and the address multiples of 16 bytes.
        q_scale: likewise, what e4m3 queries are multiplied by; else 1. A 16-bit q_pe is never multiplied.
        plan: from :func:`plan_decode` on the same metadata, shared by the layers of a step; None plans in the call.
        config: a KernelConfig when no plan is given; None as :func:`plan_decode`.
        batch_invariant: as :func:`plan_decode`; ignored when a plan is given.

    Returns:
        (output [batch, H, C] in the dtype that `out` has or would have, lse [batch, H] float32), or output. A request
        of length 0 gives output 0 and lse -inf.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what it was. Nothing
            has been launched and out, lse and the caches are untouched.
        RuntimeError: a CUDA device that is not Hopper (compute capability 9.0).

    FP8 caches (real value = stored value * scale; :mod:`mla_cute.quant` makes them):

        format    ckv_cache        kpe_cache        scales
        "tensor"  float8_e4m3fn    float8_e4m3fn    ckv_scale, kpe_scale
        "token"   float8_e4m3fn    16-bit           ckv_scale_arr [num_pages, page_size, 1]
        "group"   float8_e4m3fn    16-bit           ckv_scale_arr [num_pages, page_size, 4]

    Formats "token" and "group" have 512 + 64 channels only. A 16-bit kpe_cache has the dtype of q_pe. One plan serves
    16-bit and FP8 calls of all channels; only its configuration is chosen by the format that :func:`plan_decode` was
    told.

    Runs on the tensors' device and torch's current stream and can be captured in a CUDA graph. CPU tensors are
    computed in float32 by torch. Of CUDA tensors, page ids and lengths are not read on the host: ids outside the cache
    or lengths beyond kv_indices are undefined behaviour, except with MLA_CUTE_CHECK=1 (read when a plan is made, or by
    a call without one), which verifies them on the device, synchronising, and raises ValueError. Those of CPU tensors
    are always verified.

    Nothing is differentiated: results are detached, and a call in grad mode with an input that requires a gradient
    warns, once in a process. Autocast changes nothing.
    """
    cache = (ckv_cache, kpe_cache, ckv_scale, kpe_scale, ckv_scale_arr)
    pages = (DECODE, kv_indptr, kv_indices, kv_last_page_len, None, False)
    return attend(
        (q_nope, q_pe, cache, pages, sm_scale, out, lse, lse_base, q_scale, None), plan, config, batch_invariant,
        return_lse,
    )  # fmt: skip


@overload
def mla_paged_decode_block_table(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor | None,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor | None,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    sm_scale: float,
    *,
    out: torch.Tensor | None = ...,
    lse: torch.Tensor | None = ...,
    lse_base: int | str = ...,
    return_lse: Literal[True] = ...,
    ckv_scale: Scale = ...,
    kpe_scale: Scale = ...,
    ckv_scale_arr: torch.Tensor | None = ...,
    q_scale: Scale = ...,
    plan: DecodePlan | None = ...,
    config: KernelConfig | None = ...,
    batch_invariant: bool = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


@overload
def mla_paged_decode_block_table(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor | None,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor | None,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    sm_scale: float,
    *,
    out: torch.Tensor | None = ...,
    lse: torch.Tensor | None = ...,
    lse_base: int | str = ...,
    return_lse: Literal[False],
    ckv_scale: Scale = ...,
    kpe_scale: Scale = ...,
    ckv_scale_arr: torch.Tensor | None = ...,
    q_scale: Scale = ...,
    plan: DecodePlan | None = ...,
    config: KernelConfig | None = ...,
    batch_invariant: bool = ...,
) -> torch.Tensor: ...


@overload
def mla_paged_decode_block_table(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor | None,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor | None,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    sm_scale: float,
    *,
    out: torch.Tensor | None = ...,
    lse: torch.Tensor | None = ...,
    lse_base: int | str = ...,
    return_lse: bool,
    ckv_scale: Scale = ...,
    kpe_scale: Scale = ...,
    ckv_scale_arr: torch.Tensor | None = ...,
    q_scale: Scale = ...,
    plan: DecodePlan | None = ...,
    config: KernelConfig | None = ...,
    batch_invariant: bool = ...,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...


def mla_paged_decode_block_table(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor | None,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor | None,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    sm_scale: float,
    *,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    lse_base: int | str = 2,
    return_lse: bool = True,
    ckv_scale: Scale = UNSCALED,
    kpe_scale: Scale = UNSCALED,
    ckv_scale_arr: torch.Tensor | None = None,
    q_scale: Scale = UNSCALED,
    plan: DecodePlan | None = None,
    config: KernelConfig | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """:func:`mla_paged_decode` for engines that carry a padded block table; same kernels, no copy.

    Args:
        block_table: [batch, max_pages] int32 page ids, last dimension contiguous; entries past a request's last page
            are never read.
        seq_lens: [batch] int32, tokens per request.
        plan: from :func:`plan_decode_block_table`.
        (the rest): as :func:`mla_paged_decode`.

    Returns and raises as :func:`mla_paged_decode`.
    """
    cache = (ckv_cache, kpe_cache, ckv_scale, kpe_scale, ckv_scale_arr)
    pages = (DECODE_TABLE, seq_lens, block_table, None, None, False)
    return attend(
        (q_nope, q_pe, cache, pages, sm_scale, out, lse, lse_base, q_scale, None), plan, config, batch_invariant,
        return_lse,
    )  # fmt: skip


@overload
def mla_paged_prefill(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor | None,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor | None,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    sm_scale: float,
    *,
    causal: bool = ...,
    kv_last_page_len: torch.Tensor | None = ...,
    out: torch.Tensor | None = ...,
    lse: torch.Tensor | None = ...,
    lse_base: int | str = ...,
    return_lse: Literal[True] = ...,
    ckv_scale: Scale = ...,
    kpe_scale: Scale = ...,
    ckv_scale_arr: torch.Tensor | None = ...,
    q_scale: Scale = ...,
    plan: PrefillPlan | None = ...,
    config: KernelConfig | None = ...,
    batch_invariant: bool = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


@overload
def mla_paged_prefill(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor | None,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor | None,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    sm_scale: float,
    *,
    causal: bool = ...,
    kv_last_page_len: torch.Tensor | None = ...,
    out: torch.Tensor | None = ...,
    lse: torch.Tensor | None = ...,
    lse_base: int | str = ...,
    return_lse: Literal[False],
    ckv_scale: Scale = ...,
    kpe_scale: Scale = ...,
    ckv_scale_arr: torch.Tensor | None = ...,
    q_scale: Scale = ...,
    plan: PrefillPlan | None = ...,
    config: KernelConfig | None = ...,
    batch_invariant: bool = ...,
) -> torch.Tensor: ...


@overload
def mla_paged_prefill(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor | None,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor | None,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    sm_scale: float,
    *,
    causal: bool = ...,
    kv_last_page_len: torch.Tensor | None = ...,
    out: torch.Tensor | None = ...,
    lse: torch.Tensor | None = ...,
    lse_base: int | str = ...,
    return_lse: bool,
    ckv_scale: Scale = ...,
    kpe_scale: Scale = ...,
    ckv_scale_arr: torch.Tensor | None = ...,
    q_scale: Scale = ...,
    plan: PrefillPlan | None = ...,
    config: KernelConfig | None = ...,
    batch_invariant: bool = ...,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...


def mla_paged_prefill(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor | None,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor | None,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    sm_scale: float,
    *,
    causal: bool = True,
    kv_last_page_len: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    lse_base: int | str = 2,
    return_lse: bool = True,
    ckv_scale: Scale = UNSCALED,
    kpe_scale: Scale = UNSCALED,
    ckv_scale_arr: torch.Tensor | None = None,
    q_scale: Scale = UNSCALED,
    plan: PrefillPlan | None = None,
    config: KernelConfig | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """MLA attention of prompts, or of chunks of them, over a paged latent cache that holds their keys already.

    The math is that of :func:`~mla_cute.mla_paged_decode`; request b has any number of query tokens. The causal mask is
    aligned at the bottom right: query i of a request's n sees keys 0 .. kv_len - n + i.

    Args:
        q_nope: [total_q, H, C], channels C and R, dtypes and alignment as :func:`~mla_cute.mla_paged_decode`, H in
            1..128, the tokens of all requests one after another. Copied in the call unless stride(0) is H * stride(1).
        q_pe: [total_q, H, R], likewise; None, with kpe_cache: R is 0.
        ckv_cache, kpe_cache: as :func:`~mla_cute.mla_paged_decode`.
        qo_indptr: [batch + 1] int32, qo_indptr[0] == 0, non-decreasing, qo_indptr[-1] <= total_q; request b owns the
            query tokens qo_indptr[b]:qo_indptr[b + 1].
        kv_indptr: [batch + 1] int32, non-decreasing; request b owns kv_indices[kv_indptr[b]:kv_indptr[b + 1]].
        kv_indices, sm_scale: as :func:`~mla_cute.mla_paged_decode`.
        causal: False lets every query see all keys of its request.
        kv_last_page_len: [batch] int32, tokens in each request's last page; None: last pages are full.
        out: [total_q, H, C] to write to, dtype as :func:`~mla_cute.mla_paged_decode`; None allocates.
        lse: [total_q, H] float32 to write to; None allocates.
        lse_base: 2 (default) or "e", base of the log-sum-exp.
        return_lse: False returns the output alone.
        ckv_scale, kpe_scale, ckv_scale_arr, q_scale: of FP8 caches and queries, as :func:`~mla_cute.mla_paged_decode`.
        plan: from :func:`~mla_cute.plan_prefill` on the same metadata, shared by the layers of a step; None plans in
            the call.
        config: a KernelConfig when no plan is given; None as :func:`~mla_cute.plan_prefill`.
        batch_invariant: as :func:`~mla_cute.plan_prefill`; ignored when a plan is given.

    Returns:
        (output [total_q, H, C] in the dtype that `out` has or would have, lse [total_q, H] float32), or output. A
        query that sees no key gives output 0 and lse -inf. Rows from qo_indptr[-1] on are never written.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what it was. Nothing
            has been launched and out, lse and the caches are untouched.
        RuntimeError: a CUDA device that is not Hopper (compute capability 9.0).

    Device, stream, CUDA graphs, CPU tensors, gradients and values of metadata are treated as in
    :func:`~mla_cute.mla_paged_decode`; where they are verified, qo_indptr is too.
    """
    cache = (ckv_cache, kpe_cache, ckv_scale, kpe_scale, ckv_scale_arr)
    pages = (PREFILL, kv_indptr, kv_indices, kv_last_page_len, qo_indptr, causal)
    return attend(
        (q_nope, q_pe, cache, pages, sm_scale, out, lse, lse_base, q_scale, None), plan, config, batch_invariant,
        return_lse,
    )  # fmt: skip


@overload
def mla_paged_prefill_block_table(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor | None,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor | None,
    qo_indptr: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    sm_scale: float,
    *,
    causal: bool = ...,
    out: torch.Tensor | None = ...,
    lse: torch.Tensor | None = ...,
    lse_base: int | str = ...,
    return_lse: Literal[True] = ...,
    ckv_scale: Scale = ...,
    kpe_scale: Scale = ...,
    ckv_scale_arr: torch.Tensor | None = ...,
    q_scale: Scale = ...,
    plan: PrefillPlan | None = ...,
    config: KernelConfig | None = ...,
    batch_invariant: bool = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


@overload
def mla_paged_prefill_block_table(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor | None,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor | None,
    qo_indptr: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    sm_scale: float,
    *,
    causal: bool = ...,
    out: torch.Tensor | None = ...,
    lse: torch.Tensor | None = ...,
    lse_base: int | str = ...,
    return_lse: Literal[False],
    ckv_scale: Scale = ...,
    kpe_scale: Scale = ...,
    ckv_scale_arr: torch.Tensor | None = ...,
    q_scale: Scale = ...,
    plan: PrefillPlan | None = ...,
    config: KernelConfig | None = ...,
    batch_invariant: bool = ...,
) -> torch.Tensor: ...


@overload
def mla_paged_prefill_block_table(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor | None,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor | None,
    qo_indptr: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    sm_scale: float,
    *,
    causal: bool = ...,
    out: torch.Tensor | None = ...,
    lse: torch.Tensor | None = ...,
    lse_base: int | str = ...,
    return_lse: bool,
    ckv_scale: Scale = ...,
    kpe_scale: Scale = ...,
    ckv_scale_arr: torch.Tensor | None = ...,
    q_scale: Scale = ...,
    plan: PrefillPlan | None = ...,
    config: KernelConfig | None = ...,
    batch_invariant: bool = ...,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...


def mla_paged_prefill_block_table(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor | None,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor | None,
    qo_indptr: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    sm_scale: float,
    *,
    causal: bool = True,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    lse_base: int | str = 2,
    return_lse: bool = True,
    ckv_scale: Scale = UNSCALED,
    kpe_scale: Scale = UNSCALED,
    ckv_scale_arr: torch.Tensor | None = None,
    q_scale: Scale = UNSCALED,
    plan: PrefillPlan | None = None,
    config: KernelConfig | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """:func:`mla_paged_prefill` for engines that carry a padded block table; same kernels, no copy.

    Args:
        block_table: [batch, max_pages] int32 page ids, last dimension contiguous; entries past a request's last page
            are never read.
        seq_lens: [batch] int32, keys per request (those of its query tokens included).
        plan: from :func:`~mla_cute.plan_prefill_block_table`.
        (the rest): as :func:`mla_paged_prefill`.

    Returns and raises as :func:`mla_paged_prefill`.
    """
    cache = (ckv_cache, kpe_cache, ckv_scale, kpe_scale, ckv_scale_arr)
    pages = (PREFILL_TABLE, seq_lens, block_table, None, qo_indptr, causal)
    return attend(
        (q_nope, q_pe, cache, pages, sm_scale, out, lse, lse_base, q_scale, None), plan, config, batch_invariant,
        return_lse,
    )  # fmt: skip
