"""The public decode calls. The path is: check, plan, look up the compiled step, launch; nothing reads the device."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from . import reference
from .config import KernelConfig
from .plan import DecodePlan, Plan, check_enabled, expect_options, expect_plan, plan_decode, plan_decode_block_table
from .problem import CKV_DIM, UNSCALED, DecodeProblem, check_decode, check_decode_block_table
from .problem_prefill import PrefillProblem
from .verify import verify_block_table_on_device, verify_on_device

_LOG2_E = math.log2(math.e)
_LN_2 = math.log(2.0)


def mla_paged_decode(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    sm_scale: float,
    *,
    kv_last_page_len: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    lse_base: int | str = 2,
    return_lse: bool = True,
    ckv_scale: float = UNSCALED,
    kpe_scale: float = UNSCALED,
    ckv_scale_arr: torch.Tensor | None = None,
    q_scale: float = UNSCALED,
    plan: DecodePlan | None = None,
    config: KernelConfig | None = None,
    deterministic: bool = True,
    batch_invariant: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """One MLA decode step over a paged latent cache, one query token per request.

    S = q_nope ckv^T + q_pe kpe^T;  P = softmax(sm_scale * S);  output = P ckv   (absorbed MLA, DeepSeek-V2)

    Args:
        q_nope: [batch, H, 512] bfloat16 or float16, with an FP8 cache also float8_e4m3fn; H in 1..128; last dimension
            contiguous, other strides and the address multiples of 16 bytes.
        q_pe: [batch, H, 64], dtype of q_nope; beside an e4m3 q_nope, e4m3 with format "tensor" and 16-bit with the
            others.
        ckv_cache: [num_pages, page_size, 512], dtype of q_nope or float8_e4m3fn, page_size >= 1; may be a strided view
            of one [num_pages, page_size, 576] buffer.
        kpe_cache: [num_pages, page_size, 64], likewise; "FP8 caches" below has its dtype.
        kv_indptr: [batch + 1] int32, non-decreasing; request b owns kv_indices[kv_indptr[b]:kv_indptr[b + 1]].
            (One published text says num_pages + 1; batch + 1 is what every implementation means.)
        kv_indices: [num_kv_indices] int32 page ids.
        sm_scale: factor of the scores, > 0; 1 / sqrt(192) for DeepSeek-V2/V3 before YaRN's correction.
        kv_last_page_len: [batch] int32, tokens in each request's last page; None: last pages are full.
        out: [batch, H, 512] to write to, in the 16-bit dtype of q_nope, or of q_pe when q_nope is e4m3; when both are,
            in either 16-bit dtype. None allocates (bfloat16 when both are e4m3).
        lse: [batch, H] float32 to write to; None allocates.
        lse_base: 2 (default) or "e", base of the log-sum-exp.
        return_lse: False returns the output alone.
        ckv_scale, kpe_scale: Python numbers > 0 that multiply the e4m3 caches of format "tensor"; else 1.
        ckv_scale_arr: float32 scales of an e4m3 ckv_cache, [num_pages, page_size, 1] (format "token") or
            [num_pages, page_size, 4] (format "group": one per 128 channels); None otherwise. Last dimension
            contiguous, with 4 scales other strides and the address multiples of 16 bytes.
        q_scale: Python number > 0 that multiplies e4m3 queries; else 1. A 16-bit q_pe is never multiplied.
        plan: from :func:`plan_decode` on the same metadata, shared by the layers of a step; None plans in the call.
        config: a KernelConfig when no plan is given; None as :func:`plan_decode`.
        deterministic: accepted for compatibility; results never vary from run to run.
        batch_invariant: as :func:`plan_decode`; ignored when a plan is given.

    Returns:
        (output [batch, H, 512] in the dtype that `out` has or would have, lse [batch, H] float32), or output. A request
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

    A 16-bit kpe_cache has the dtype of q_pe. One plan serves 16-bit and FP8 calls; only its configuration is chosen by
    the format that :func:`plan_decode` was told.

    Runs on the tensors' device and torch's current stream and can be captured in a CUDA graph. CPU tensors are
    computed in float32 by torch. Page ids and lengths are not read on the host: ids outside the cache or lengths
    beyond kv_indices are undefined behaviour, except with MLA_CUTE_CHECK=1 (read when a plan is made, or by a call
    without one), which verifies them on the device, synchronising, and raises ValueError.
    """
    del deterministic
    problem = check_decode(
        q_nope, q_pe, ckv_cache, kpe_cache, kv_indptr, kv_indices, sm_scale, kv_last_page_len, out, lse, lse_base,
        ckv_scale, kpe_scale, ckv_scale_arr, q_scale,
    )  # fmt: skip
    if plan is not None:
        expect_plan(plan)
        launch = plan.launcher(problem, False)
        verify = plan.verifies
    else:
        verify = check_enabled()
    if verify:
        verify_on_device(problem, kv_indptr, kv_indices, kv_last_page_len)
    if not q_nope.is_cuda:
        expect_options(config, batch_invariant)
        result = reference.decode_reference(
            q_nope, q_pe, ckv_cache, kpe_cache, kv_indptr, kv_indices, sm_scale,
            kv_last_page_len=kv_last_page_len, lse_base=lse_base, out=out, lse=lse,
            ckv_scale=ckv_scale, kpe_scale=kpe_scale, ckv_scale_arr=ckv_scale_arr, q_scale=q_scale,
        )  # fmt: skip
        return result if return_lse else result[0]
    if plan is None:
        plan = plan_decode(
            kv_indptr,
            num_heads=problem.num_heads,
            page_size=problem.page_size,
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


def mla_paged_decode_block_table(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    sm_scale: float,
    *,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    lse_base: int | str = 2,
    return_lse: bool = True,
    ckv_scale: float = UNSCALED,
    kpe_scale: float = UNSCALED,
    ckv_scale_arr: torch.Tensor | None = None,
    q_scale: float = UNSCALED,
    plan: DecodePlan | None = None,
    config: KernelConfig | None = None,
    deterministic: bool = True,
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
    del deterministic
    problem = check_decode_block_table(
        q_nope, q_pe, ckv_cache, kpe_cache, block_table, seq_lens, sm_scale, out, lse, lse_base,
        ckv_scale, kpe_scale, ckv_scale_arr, q_scale,
    )  # fmt: skip
    if plan is not None:
        expect_plan(plan)
        launch = plan.launcher(problem, True)
        verify = plan.verifies
    else:
        verify = check_enabled()
    if verify:
        verify_block_table_on_device(problem, block_table, seq_lens)
    if not q_nope.is_cuda:
        expect_options(config, batch_invariant)
        result = reference.decode_reference_block_table(
            q_nope, q_pe, ckv_cache, kpe_cache, block_table, seq_lens, sm_scale, lse_base=lse_base, out=out, lse=lse,
            ckv_scale=ckv_scale, kpe_scale=kpe_scale, ckv_scale_arr=ckv_scale_arr, q_scale=q_scale,
        )  # fmt: skip
        return result if return_lse else result[0]
    if plan is None:
        plan = plan_decode_block_table(
            seq_lens,
            num_heads=problem.num_heads,
            page_size=problem.page_size,
            max_pages=block_table.shape[1],
            table_stride=table_stride(block_table),
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


def table_stride(block_table: torch.Tensor) -> int:
    """Elements between its rows, as plans want them."""
    rows, columns = block_table.shape
    return block_table.stride(0) if rows > 1 else columns


def flat_table(block_table: torch.Tensor, plan: Plan) -> torch.Tensor:
    """The memory of a block table as one list of page ids; ValueError when the plan is for other strides."""
    rows, columns = block_table.shape
    stride = plan._table_stride
    if rows > 1 and block_table.stride(0) != stride:
        raise ValueError(
            f"plan: expected a plan for block_table rows {block_table.stride(0)} elements apart, got one for {stride}"
        )
    return block_table.as_strided(((rows - 1) * stride + columns if rows else 0,), (1,))


def _tma_strides(x: torch.Tensor) -> torch.Tensor:
    """The same elements with packed strides where a dimension has size 1: TMA checks strides it never takes."""
    size, stride = list(x.shape), list(x.stride())
    if size[-1] == 1:
        stride[-1] = 1
    for d in range(x.dim() - 2, -1, -1):
        if size[d] == 1:
            stride[d] = size[d + 1] * stride[d + 1]
    return x.as_strided(size, stride)


def _even_rows(q: torch.Tensor) -> torch.Tensor:
    """The same elements with all (token, head) rows equally far apart: a copy where they are not."""
    if q.stride(0) == q.shape[1] * q.stride(1):
        return q
    return _tma_strides(q.contiguous())


def launch_step(
    launch: Callable[..., None],
    problem: DecodeProblem | PrefillProblem,
    plan: Plan,
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    kv_indices: torch.Tensor,
    sm_scale: float,
    out: torch.Tensor | None,
    lse: torch.Tensor | None,
    lse_base: int | str,
    return_lse: bool,
    ckv_scale: float,
    kpe_scale: float,
    ckv_scale_arr: torch.Tensor | None,
    q_scale: float,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    if problem.kv_format:
        return _launch_fp8(
            launch, problem, plan, q_nope, q_pe, ckv_cache, kpe_cache, kv_indices, sm_scale, out, lse, lse_base,
            return_lse, ckv_scale, kpe_scale, ckv_scale_arr, q_scale,
        )  # fmt: skip
    if out is None:
        out = torch.empty_like(q_nope, memory_format=torch.contiguous_format)
    if lse is None:
        lse = torch.empty((problem.total_q, problem.num_heads), dtype=torch.float32, device=problem.device)
    if plan.has_work:
        if problem.odd_strides:
            q_nope, q_pe, ckv_cache, kpe_cache = map(_tma_strides, (q_nope, q_pe, ckv_cache, kpe_cache))
        if plan.packs_rows:
            q_nope, q_pe = _even_rows(q_nope), _even_rows(q_pe)
        launch(
            q_nope,
            q_pe,
            ckv_cache,
            kpe_cache,
            kv_indices,
            plan.table,
            plan.part,
            out,
            lse,
            *plan.grid,
            sm_scale * _LOG2_E,
            1.0 if lse_base == 2 else _LN_2,
        )
    return (out, lse) if return_lse else out


def _launch_fp8(
    launch: Callable[..., None],
    problem: DecodeProblem | PrefillProblem,
    plan: Plan,
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    kv_indices: torch.Tensor,
    sm_scale: float,
    out: torch.Tensor | None,
    lse: torch.Tensor | None,
    lse_base: int | str,
    return_lse: bool,
    ckv_scale: float,
    kpe_scale: float,
    ckv_scale_arr: torch.Tensor | None,
    q_scale: float,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`launch_step` for an FP8 cache: e4m3 tensors go in as bytes, scales of tensors as factors of score and output."""
    if out is None:
        out = torch.empty((problem.total_q, problem.num_heads, CKV_DIM), dtype=problem.dtype, device=problem.device)
    if lse is None:
        lse = torch.empty((problem.total_q, problem.num_heads), dtype=torch.float32, device=problem.device)
    if plan.has_work:
        per_tensor = problem.kv_format == "tensor"
        ckv_cache = ckv_cache.view(torch.uint8)
        if per_tensor:
            kpe_cache = kpe_cache.view(torch.uint8)
        rope_scale = sm_scale * _LOG2_E * kpe_scale
        if problem.q_fp8:
            q_nope = q_nope.view(torch.uint8)
            if per_tensor:
                q_pe = q_pe.view(torch.uint8)
                rope_scale *= q_scale
        # the step wants a tensor of three dimensions here, and with scales of tensors does not read it
        scales = lse.unsqueeze(-1) if ckv_scale_arr is None else ckv_scale_arr
        if problem.odd_strides:
            q_nope, q_pe, ckv_cache, kpe_cache, scales = map(_tma_strides, (q_nope, q_pe, ckv_cache, kpe_cache, scales))
        if plan.packs_rows:
            q_nope, q_pe = _even_rows(q_nope), _even_rows(q_pe)
        launch(
            q_nope,
            q_pe,
            ckv_cache,
            kpe_cache,
            scales,
            kv_indices,
            plan.table,
            plan.part,
            out,
            lse,
            *plan.grid,
            float(sm_scale * _LOG2_E * ckv_scale * q_scale),
            float(rope_scale),
            float(ckv_scale),
            1.0 if lse_base == 2 else _LN_2,
        )
    return (out, lse) if return_lse else out
