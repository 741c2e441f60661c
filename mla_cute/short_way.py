"""The short way of a call like one that came the long way: with the same plan, or without a plan and of the same sizes.

The first call of a kind is checked argument by argument (check.py) and leaves behind a function for those that
follow. That looks at what the compiled launcher cannot know, in a few attribute reads, and launches: the launcher
itself refuses tensors of other dtypes, sizes, devices, strides or alignment than it was compiled for, before it
launches anything. Whatever is refused returns None and goes the long way, which names the argument. What these
functions go by are local variables: of the 2 us that they take, look-ups of attributes would be half.

On one host a call with a plan took 29 us and takes 16 (of which the launcher and two kernels are 9), one over an FP8
cache 52 and 20; without a plan 89 and 131.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import dlpack
from .allocate import current_device, empty_maker
from .call import UNSCALED, CallFields
from .check import DTYPES, Problem, is_usual_sink
from .config import KernelConfig
from .convert import ConvertedStep
from .expect import MAX_SCALE, MIN_SCALE, Scale, rows_fit_32_bits
from .launch import (
    LN_2,
    LOG2_E,
    flat_table,
    memory_of_table,
    number_and_address,
    rows_are_even,
    score_scales,
    sink_address,
)
from .plan import Plan, check_enabled, planner_reads
from .tuned import select, shape_log

# To the results, or None.
ShortWay = Callable[[CallFields], "tuple[torch.Tensor, torch.Tensor] | None"]

# Of calls without a plan, by their sizes (`_key`). A server has some hundred; a fuzzer begins anew.
_known: dict[Any, ShortWay] = {}
_MOST_KNOWN = 1024


def _has_short_way(plan: Plan) -> bool:
    return not plan.verifies and plan.has_work and len(plan.rounds) == 1 and dlpack.exports_e4m3()


def with_plan(step: Callable[..., None], problem: Problem, plan: Plan) -> ShortWay | None:
    """Of calls with this plan; None where there is none."""
    if not _has_short_way(plan):
        return None
    import tvm_ffi

    # As the launcher takes them, which is cheaper than a torch.Tensor.
    table, part = tvm_ffi.from_dlpack(plan.table), tvm_ffi.from_dlpack(plan.part)
    usual = _usual(problem, plan, tvm_ffi.from_dlpack(plan.part[:1].unsqueeze(0)))
    form, planned_lengths, _, planned_last, planned_queries, _ = plan._pages
    batch, by_table = plan.batch, plan.form.by_table

    def launch(call: CallFields) -> tuple[torch.Tensor, torch.Tensor] | None:
        try:
            called, lengths, page_ids, last_len, queries, _ = call[3]
            if (
                called is not form
                or not (lengths is planned_lengths or plan.has(lengths, planned_lengths))
                or not (last_len is planned_last or plan.has(last_len, planned_last))
                or not (queries is planned_queries or plan.has(queries, planned_queries))
            ):
                return None
            if by_table:
                if page_ids is not plan._table[0]:
                    if page_ids.shape[0] != batch:
                        return None
                    plan._table = page_ids, flat_table(page_ids, plan)
                page_ids = plan._table[1]
            found = usual(call)
            if found is None:
                return None
            operands, out, lse, numbers = found
            step(*operands, page_ids, table, part, out, lse, *numbers)
            return out, lse
        except Exception:  # an argument is no tensor or not what was compiled for; which one is check.py's job to say
            return None

    return launch


def keep_without_plan(key: object, step: Callable[..., None], problem: Problem, plan: Plan) -> None:
    """Keep the short way of calls of `key`, one of which made `plan` for itself."""
    # A converted step reads the workspace of its plan.
    if key is None or not _has_short_way(plan) or isinstance(step, ConvertedStep):
        return
    usual = _usual(problem, plan, None)
    of_plan, planner, stride = plan.rounds[0], plan._planner, plan._table_stride
    new_table, new_scratch, new_part = (
        empty_maker(tuple(x.shape), x.dtype, problem.device) for x in (of_plan.table, of_plan.scratch, plan.part)
    )
    plan_numbers = tuple(x for x in of_plan.planner_args if isinstance(x, int))
    by_table = plan.form.by_table

    def launch(call: CallFields) -> tuple[torch.Tensor, torch.Tensor] | None:
        try:
            found = usual(call)
            if found is None:
                return None
            operands, out, lse, numbers = found
            pages = call[3]
            page_ids = pages[2]
            if by_table:
                page_ids = memory_of_table(page_ids, stride)
            table, scratch, part = new_table(), new_scratch(), new_part()
            planner(*planner_reads(pages), table, scratch, *plan_numbers)
            if len(operands) == 5 and operands[4] is None:
                operands = (*operands[:4], lse.unsqueeze(-1))
            step(*operands, page_ids, table, part, out, lse, *numbers)
            return out, lse
        except Exception:  # as above
            return None

    if len(_known) >= _MOST_KNOWN:
        _known.clear()
    _known[key] = launch


def without_plan(
    call: CallFields, config: KernelConfig | None, batch_invariant: bool
) -> tuple[ShortWay | None, object]:
    """(the short way of a call that was given no plan, None where there is none; its key)."""
    key = _key(call, config, batch_invariant)
    try:
        return _known.get(key), key
    except TypeError:  # an argument cannot be hashed, so it is not what it should be
        return None, None


def _key(call: CallFields, config: KernelConfig | None, batch_invariant: bool) -> object:
    """What the short way of a call without a plan depends on, beside what `_usual` and the launchers look at; None
    where every call goes the long way."""
    if shape_log.recorder is not None or check_enabled():
        return None
    q_nope, q_pe, (ckv_cache, kpe_cache, _, _, scale_arr), pages, _, out, _, _, _, _ = call
    form, lengths, page_ids, last_len, queries, causal = pages
    try:
        room = None
        if batch_invariant or page_ids.dim() == 2:  # the sizes of a plan, and the choice of a kernel
            room = page_ids.shape, page_ids.stride()
        return (
            form, q_nope.shape, q_nope.dtype, q_pe.dtype, q_nope.get_device(), ckv_cache.shape[1], ckv_cache.dtype,
            kpe_cache.dtype, lengths.shape, None if last_len is None else last_len.shape,
            None if queries is None else queries.shape, room, None if out is None else out.dtype,
            None if scale_arr is None else scale_arr.shape[2], config, batch_invariant, causal, select.generation(),
        )  # fmt: skip
    except Exception:  # an argument is no tensor
        return None


# The step's operands, out, lse, the numbers behind them.
_ForLaunch = tuple[tuple[Any, ...], torch.Tensor, torch.Tensor, "tuple[float | int, ...]"]
_NEVER = (object(),) * 5  # no argument is one of these


def _usual(problem: Problem, plan: Plan, no_scales: Any) -> Callable[[CallFields], _ForLaunch | None]:
    """The function from a call like `problem`, metadata aside, to what is launched; None where something is unusual.
    `no_scales` stands for an array of scales where there is none."""
    device, kv_format, planned_causal = problem.device, problem.kv_format, problem.causal
    q_shape = (problem.total_q, problem.num_heads, problem.dims.ckv)
    # What stands for a rope part (launch.py) would hide from the launcher that a call has one.
    no_rope = not problem.dims.kpe
    new_out, new_lse = empty_maker(q_shape, problem.dtype, device), empty_maker(q_shape[:2], torch.float32, device)
    page_size, device_index = problem.page_size, device.index
    takes_array, packs_rows, grid = kv_format in ("token", "group"), plan.packs_rows, plan.grid
    # TMA looks at strides of dimensions of size 1, which the launcher lets pass.
    sparse = problem.op == "sparse"
    gathers = sparse or page_size % 8 != 0
    odd_queries = problem.total_q == 1 or problem.num_heads == 1
    # out=None means bfloat16 where all queries are e4m3.
    allocates = not (problem.q_fp8 and kv_format == "tensor") or problem.dtype is DTYPES[0]
    # Numbers of an earlier call, behind what they were made of: layers hand over the same objects.
    kept: tuple[tuple[Any, ...], tuple[float | int, ...]] = _NEVER, ()

    def usual(call: CallFields) -> _ForLaunch | None:
        nonlocal kept
        q_nope, q_pe, cache, pages, sm_scale, out, lse, lse_base, q_scale, sink = call
        ckv_cache, kpe_cache, ckv_scale, kpe_scale, scale_arr = cache
        num_pages, tokens, _ = ckv_cache.shape
        if (
            q_nope.shape != q_shape
            or tokens != page_size
            or pages[5] is not planned_causal
            or q_nope.requires_grad
            or (scale_arr is not None) is not takes_array
            or current_device() != device_index
        ):
            return None
        if no_rope:
            if not _have_no_rope(q_nope, q_pe, ckv_cache, kpe_cache):
                return None
            q_pe, kpe_cache = q_nope, ckv_cache
        (of_scores, base, of_ckv, of_kpe, of_q), numbers = kept
        if not (
            sm_scale is of_scores
            and lse_base is base
            and ckv_scale is of_ckv
            and kpe_scale is of_kpe
            and q_scale is of_q
        ):
            found = _usual_numbers(problem, sm_scale, lse_base, ckv_scale, kpe_scale, q_scale)
            if found is None:
                return None
            numbers = (*grid, *found)
            if type(ckv_scale) is type(kpe_scale) is type(q_scale) is float:  # the address of a tensor may change
                kept = (sm_scale, lse_base, ckv_scale, kpe_scale, q_scale), numbers
        if sparse:
            if sink is not None and not is_usual_sink(sink, q_shape[1], device):
                return None
            numbers = (*numbers, sink_address(sink))
        if packs_rows and not (rows_are_even(q_nope) and rows_are_even(q_pe)):
            return None
        if odd_queries and not (_has_tma_strides(q_nope) and _has_tma_strides(q_pe)):
            return None
        if gathers and not (rows_fit_32_bits(ckv_cache, sparse) and rows_fit_32_bits(kpe_cache, sparse)):
            return None
        if (num_pages == 1 or tokens == 1) and not (_has_tma_strides(ckv_cache) and _has_tma_strides(kpe_cache)):
            return None
        operands: tuple[Any, ...] = (q_nope, q_pe, ckv_cache, kpe_cache)
        if kv_format:
            operands = (*operands, scale_arr if takes_array else no_scales)
        if out is None:
            if not allocates:
                return None
            out = new_out()
        elif not out.is_contiguous() or out.data_ptr() == q_nope.data_ptr():
            return None
        if lse is None:
            lse = new_lse()
        elif not lse.is_contiguous():
            return None
        return operands, out, lse, numbers

    return usual


def _have_no_rope(q_nope: torch.Tensor, q_pe: torch.Tensor, ckv_cache: torch.Tensor, kpe_cache: torch.Tensor) -> bool:
    return (
        q_pe.shape == (*q_nope.shape[:2], 0)
        and kpe_cache.shape == (*ckv_cache.shape[:2], 0)
        and q_pe.dtype is q_nope.dtype
        and kpe_cache.dtype is ckv_cache.dtype
        and q_pe.device == q_nope.device == kpe_cache.device
    )


def _has_tma_strides(x: torch.Tensor) -> bool:
    outer, inner, _ = x.stride()
    return (outer | inner) * x.itemsize % 16 == 0


def _usual_numbers(
    problem: Problem, sm_scale: float, lse_base: int | str, ckv_scale: Scale, kpe_scale: Scale, q_scale: Scale
) -> tuple[float | int, ...] | None:
    """As the long way's `_numbers` (launch.py); None where a number or a scale is unusual."""
    if type(sm_scale) is not float or not MIN_SCALE <= sm_scale <= MAX_SCALE:
        return None
    if type(lse_base) is int and lse_base == 2:
        lse_scale = 1.0
    elif type(lse_base) is str and lse_base == "e":
        lse_scale = LN_2
    else:
        return None
    if problem.kv_format:
        factors = _usual_factors(problem, sm_scale, ckv_scale, kpe_scale, q_scale)
        return None if factors is None else (*factors, lse_scale)
    return (sm_scale * LOG2_E, lse_scale) if ckv_scale is kpe_scale is q_scale is UNSCALED else None


def _usual_factors(
    problem: Problem, sm_scale: float, ckv_scale: Scale, kpe_scale: Scale, q_scale: Scale
) -> tuple[float | int, ...] | None:
    """Of an FP8 cache, all but lse_scale."""
    ckv_at = kpe_at = q_at = 0
    if not type(ckv_scale) is type(kpe_scale) is type(q_scale) is float:
        at = problem.device.index
        if not (_is_scale(ckv_scale, at) and _is_scale(kpe_scale, at) and _is_scale(q_scale, at)):
            return None
        ckv_scale, ckv_at = number_and_address(ckv_scale)
        kpe_scale, kpe_at = number_and_address(kpe_scale)
        q_scale, q_at = number_and_address(q_scale)
        if (problem.kv_format != "tensor" and ckv_at | kpe_at) or (not problem.q_fp8 and q_at):
            return None
    if problem.kv_format != "tensor" and not ckv_scale == kpe_scale == 1.0:
        return None
    if not problem.dims.kpe and (kpe_at or kpe_scale != 1.0):
        return None
    if not problem.q_fp8 and q_scale != 1.0:
        return None
    nope, rope = score_scales(problem.kv_format, sm_scale, ckv_scale, kpe_scale, q_scale)
    if not (
        MIN_SCALE <= nope <= MAX_SCALE
        and MIN_SCALE <= rope <= MAX_SCALE
        and MIN_SCALE <= ckv_scale <= MAX_SCALE
        and MIN_SCALE <= kpe_scale <= MAX_SCALE
        and MIN_SCALE <= q_scale <= MAX_SCALE
    ):
        return None
    return nope * LOG2_E, rope * LOG2_E, ckv_scale, ckv_at, kpe_at, q_at


def _is_scale(x: Scale, device_index: int) -> bool:
    if isinstance(x, torch.Tensor):
        return x.dtype is torch.float32 and x.numel() == 1 and x.get_device() == device_index
    return type(x) is float
