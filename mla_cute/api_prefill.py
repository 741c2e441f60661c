"""The public prefill calls: signatures and their meaning. attend.py is what they do."""

from __future__ import annotations

from typing import Literal, overload

import torch

from .attend import PREFILL, PREFILL_TABLE, attend
from .config import KernelConfig
from .expect import Scale
from .launch import Operands, Options
from .plan_prefill import PrefillPlan
from .problem import UNSCALED
from .short_way import short_way


@overload
def mla_paged_prefill(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
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
    q_pe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
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
    q_pe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
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
        q_nope: [total_q, H, 512], dtypes and alignment as :func:`~mla_cute.mla_paged_decode`, H in 1..128, the tokens
            of all requests one after another. Copied in the call unless stride(0) is H * stride(1).
        q_pe: [total_q, H, 64], likewise.
        ckv_cache, kpe_cache: as :func:`~mla_cute.mla_paged_decode`.
        qo_indptr: [batch + 1] int32, qo_indptr[0] == 0, non-decreasing, qo_indptr[-1] <= total_q; request b owns the
            query tokens qo_indptr[b]:qo_indptr[b + 1].
        kv_indptr: [batch + 1] int32, non-decreasing; request b owns kv_indices[kv_indptr[b]:kv_indptr[b + 1]].
        kv_indices, sm_scale: as :func:`~mla_cute.mla_paged_decode`.
        causal: False lets every query see all keys of its request.
        kv_last_page_len: [batch] int32, tokens in each request's last page; None: last pages are full.
        out: [total_q, H, 512] to write to, dtype as :func:`~mla_cute.mla_paged_decode`; None allocates.
        lse: [total_q, H] float32 to write to; None allocates.
        lse_base: 2 (default) or "e", base of the log-sum-exp.
        return_lse: False returns the output alone.
        ckv_scale, kpe_scale, ckv_scale_arr, q_scale: of FP8 caches and queries, as :func:`~mla_cute.mla_paged_decode`.
        plan: from :func:`~mla_cute.plan_prefill` on the same metadata, shared by the layers of a step; None plans in
            the call.
        config: a KernelConfig when no plan is given; None as :func:`~mla_cute.plan_prefill`.
        batch_invariant: as :func:`~mla_cute.plan_prefill`; ignored when a plan is given.

    Returns:
        (output [total_q, H, 512] in the dtype that `out` has or would have, lse [total_q, H] float32), or output. A
        query that sees no key gives output 0 and lse -inf. Rows from qo_indptr[-1] on are never written.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what it was. Nothing
            has been launched and out, lse and the caches are untouched.
        RuntimeError: a CUDA device that is not Hopper (compute capability 9.0).

    Device, stream, CUDA graphs, CPU tensors, gradients and values of metadata are treated as in
    :func:`~mla_cute.mla_paged_decode`; where they are verified, qo_indptr is too.
    """
    metadata = (qo_indptr, kv_indptr, kv_last_page_len, kv_indices)
    values = (
        q_nope, q_pe, ckv_cache, kpe_cache, sm_scale, out, lse, lse_base, ckv_scale, kpe_scale, ckv_scale_arr, q_scale,
        causal,
    )  # fmt: skip
    result, key = short_way(PREFILL, plan, return_lse, metadata, values, config, batch_invariant)
    if result is not None:
        return result if return_lse else result[0]
    return attend(
        PREFILL,
        Operands(q_nope, q_pe, ckv_cache, kpe_cache, ckv_scale_arr),
        (qo_indptr, kv_indptr, kv_last_page_len),
        kv_indices,
        Options(sm_scale, out, lse, lse_base, ckv_scale, kpe_scale, q_scale),
        return_lse, plan, config, batch_invariant, causal, key=key,
    )  # fmt: skip


@overload
def mla_paged_prefill_block_table(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
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
    q_pe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
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
    q_pe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
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
    q_pe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
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
    metadata = (qo_indptr, seq_lens, None, block_table)
    values = (
        q_nope, q_pe, ckv_cache, kpe_cache, sm_scale, out, lse, lse_base, ckv_scale, kpe_scale, ckv_scale_arr, q_scale,
        causal,
    )  # fmt: skip
    result, key = short_way(PREFILL_TABLE, plan, return_lse, metadata, values, config, batch_invariant)
    if result is not None:
        return result if return_lse else result[0]
    return attend(
        PREFILL_TABLE,
        Operands(q_nope, q_pe, ckv_cache, kpe_cache, ckv_scale_arr),
        (qo_indptr, seq_lens),
        block_table,
        Options(sm_scale, out, lse, lse_base, ckv_scale, kpe_scale, q_scale),
        return_lse, plan, config, batch_invariant, causal, key=key,
    )  # fmt: skip
