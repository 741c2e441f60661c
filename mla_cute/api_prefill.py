"""The public prefill calls. The path is decode's (api.py)."""

from __future__ import annotations

import torch

from . import reference
from .api import flat_table, launch_step, table_stride
from .config import KernelConfig
from .plan import check_enabled, expect_options, expect_plan
from .plan_prefill import PrefillPlan, plan_prefill, plan_prefill_block_table
from .problem import UNSCALED
from .problem_prefill import (
    check_prefill,
    check_prefill_block_table,
    verify_prefill_block_table_on_device,
    verify_prefill_on_device,
)


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
    ckv_scale: float = UNSCALED,
    kpe_scale: float = UNSCALED,
    ckv_scale_arr: torch.Tensor | None = None,
    q_scale: float = UNSCALED,
    plan: PrefillPlan | None = None,
    config: KernelConfig | None = None,
    deterministic: bool = True,
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
        deterministic: accepted for compatibility; results never vary from run to run.
        batch_invariant: as :func:`~mla_cute.plan_prefill`; ignored when a plan is given.

    Returns:
        (output [total_q, H, 512] in the dtype that `out` has or would have, lse [total_q, H] float32), or output. A
        query that sees no key gives output 0 and lse -inf. Rows from qo_indptr[-1] on are never written.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what it was. Nothing
            has been launched and out, lse and the caches are untouched.
        RuntimeError: a CUDA device that is not Hopper (compute capability 9.0).

    Device, stream, CUDA graphs, CPU tensors and values of metadata are treated as in
    :func:`~mla_cute.mla_paged_decode`; MLA_CUTE_CHECK=1 verifies qo_indptr too.
    """
    del deterministic
    problem = check_prefill(
        q_nope, q_pe, ckv_cache, kpe_cache, qo_indptr, kv_indptr, kv_indices, sm_scale,
        causal, kv_last_page_len, out, lse, lse_base, ckv_scale, kpe_scale, ckv_scale_arr, q_scale,
    )  # fmt: skip
    if plan is not None:
        expect_plan(plan)
        launch = plan.launcher(problem, False)
        verify = plan.verifies
    else:
        verify = check_enabled()
    if verify:
        verify_prefill_on_device(problem, qo_indptr, kv_indptr, kv_indices, kv_last_page_len)
    if not q_nope.is_cuda:
        expect_options(config, batch_invariant)
        result = reference.prefill_reference(
            q_nope, q_pe, ckv_cache, kpe_cache, qo_indptr, kv_indptr, kv_indices, sm_scale,
            causal=causal, kv_last_page_len=kv_last_page_len, lse_base=lse_base, out=out, lse=lse,
            ckv_scale=ckv_scale, kpe_scale=kpe_scale, ckv_scale_arr=ckv_scale_arr, q_scale=q_scale,
        )  # fmt: skip
        return result if return_lse else result[0]
    if plan is None:
        plan = plan_prefill(
            qo_indptr,
            kv_indptr,
            num_heads=problem.num_heads,
            page_size=problem.page_size,
            total_q=problem.total_q,
            causal=causal,
            kv_last_page_len=kv_last_page_len,
            num_kv_indices=kv_indices.shape[0],
            config=config,
            batch_invariant=batch_invariant,
            kv_format=problem.kv_format,
            q_fp8=problem.q_fp8,
        )
        launch = plan.launcher(problem, False)
    return launch_step(
        launch, problem, plan, q_nope, q_pe, ckv_cache, kpe_cache, kv_indices, sm_scale, out, lse, lse_base, return_lse,
        ckv_scale, kpe_scale, ckv_scale_arr, q_scale,
    )  # fmt: skip


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
    ckv_scale: float = UNSCALED,
    kpe_scale: float = UNSCALED,
    ckv_scale_arr: torch.Tensor | None = None,
    q_scale: float = UNSCALED,
    plan: PrefillPlan | None = None,
    config: KernelConfig | None = None,
    deterministic: bool = True,
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
    del deterministic
    problem = check_prefill_block_table(
        q_nope, q_pe, ckv_cache, kpe_cache, qo_indptr, block_table, seq_lens, sm_scale, causal, out, lse, lse_base,
        ckv_scale, kpe_scale, ckv_scale_arr, q_scale,
    )  # fmt: skip
    if plan is not None:
        expect_plan(plan)
        launch = plan.launcher(problem, True)
        verify = plan.verifies
    else:
        verify = check_enabled()
    if verify:
        verify_prefill_block_table_on_device(problem, qo_indptr, block_table, seq_lens)
    if not q_nope.is_cuda:
        expect_options(config, batch_invariant)
        result = reference.prefill_reference_block_table(
            q_nope, q_pe, ckv_cache, kpe_cache, qo_indptr, block_table, seq_lens, sm_scale,
            causal=causal, lse_base=lse_base, out=out, lse=lse,
            ckv_scale=ckv_scale, kpe_scale=kpe_scale, ckv_scale_arr=ckv_scale_arr, q_scale=q_scale,
        )  # fmt: skip
        return result if return_lse else result[0]
    if plan is None:
        plan = plan_prefill_block_table(
            qo_indptr,
            seq_lens,
            num_heads=problem.num_heads,
            page_size=problem.page_size,
            total_q=problem.total_q,
            max_pages=block_table.shape[1],
            table_stride=table_stride(block_table),
            causal=causal,
            config=config,
            batch_invariant=batch_invariant,
            kv_format=problem.kv_format,
            q_fp8=problem.q_fp8,
        )
        launch = plan.launcher(problem, True)
    flat = flat_table(block_table, plan)
    return launch_step(
        launch, problem, plan, q_nope, q_pe, ckv_cache, kpe_cache, flat, sm_scale, out, lse, lse_base, return_lse,
        ckv_scale, kpe_scale, ckv_scale_arr, q_scale,
    )  # fmt: skip
