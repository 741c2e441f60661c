"""From a checked call and its plan to the compiled step; and the short way there for a call like the last one.

A plan's first call of a kind is checked argument by argument (problem.py), gets its compiled step, and leaves behind
the short way (`Plan._again`) for those that follow. That looks at what neither the plan nor the compiled launcher can
know, in a few attribute reads, and launches: the launcher itself refuses tensors of other dtypes, sizes, devices,
strides or alignment than it was compiled for, before it launches anything. Whatever is refused goes the long way, which
names the argument. Of 40 us that a call took on one host, checks were 8, and two allocations 11 (allocate.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from . import dlpack
from .allocate import current_device, empty
from .expect import MAX_SCALE, MIN_SCALE, Scale
from .plan import Plan, Round
from .problem import CKV_DIM, DTYPES, FP8, UNSCALED, DecodeProblem
from .problem_prefill import PrefillProblem

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)


class Operands(NamedTuple):
    """The tensors of a call that do not say which pages there are."""

    q_nope: torch.Tensor
    q_pe: torch.Tensor
    ckv_cache: torch.Tensor
    kpe_cache: torch.Tensor
    scale_arr: torch.Tensor | None


class Options(NamedTuple):
    """The numbers of a call, and where its results go."""

    sm_scale: float
    out: torch.Tensor | None
    lse: torch.Tensor | None
    lse_base: int | str
    ckv_scale: Scale
    kpe_scale: Scale
    q_scale: Scale


# ------------------------------------------------------------------------------------------------------ the short way


def short_way(
    kind: object, step: Callable[..., None], problem: DecodeProblem | PrefillProblem, plan: Plan
) -> Callable[..., tuple[torch.Tensor, torch.Tensor] | None] | None:
    """The function that launches calls like this one, which went the long way; None where there is none.

    It takes what the public calls are given, and returns None for a call that has to go the long way too. What it goes
    by are local variables: of the 2 us it takes, a look-up of each would be half.
    """
    if plan.verifies or not plan.has_work or len(plan.rounds) != 1 or not dlpack.exports_e4m3():
        return None
    import tvm_ffi

    device, out_dtype, kv_format = problem.device, problem.dtype, problem.kv_format
    q_shape, lse_shape = (problem.total_q, problem.num_heads, CKV_DIM), (problem.total_q, problem.num_heads)
    page_size, batch, block_table = problem.page_size, plan.batch, plan._block_table
    planned_0, planned_1, planned_2 = (*plan._metadata.values(), None, None)[:3]
    planned_causal = isinstance(problem, PrefillProblem) and problem.causal
    # TMA looks at strides of dimensions of size 1, which the launcher lets pass; rows of prefill are packed.
    odd_queries = problem.total_q == 1 or problem.num_heads == 1
    odd_cache = page_size == 1 or problem.num_pages == 1
    packs_rows = plan.packs_rows
    # out=None means bfloat16 where all queries are e4m3.
    allocates = not (problem.q_fp8 and kv_format == "tensor") or out_dtype is DTYPES[0]
    # As the launcher takes them, which is cheaper than a torch.Tensor.
    table, part = tvm_ffi.from_dlpack(plan.table), tvm_ffi.from_dlpack(plan.part)
    no_scales = tvm_ffi.from_dlpack(plan.part[:1].unsqueeze(0)) if kv_format == "tensor" else None
    grid, device_index = plan.grid, device.index

    def again(
        called_kind: object,
        q_nope: torch.Tensor,
        q_pe: torch.Tensor,
        ckv_cache: torch.Tensor,
        kpe_cache: torch.Tensor,
        metadata_0: torch.Tensor,
        metadata_1: torch.Tensor | None,
        metadata_2: torch.Tensor | None,
        page_ids: torch.Tensor,
        sm_scale: float,
        out: torch.Tensor | None,
        lse: torch.Tensor | None,
        lse_base: int | str,
        ckv_scale: Scale,
        kpe_scale: Scale,
        scale_arr: torch.Tensor | None,
        q_scale: Scale,
        causal: bool,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        try:
            if (
                called_kind is not kind
                or q_nope.shape != q_shape
                or ckv_cache.shape[1] != page_size
                or causal is not planned_causal
                or q_nope.requires_grad
                or type(sm_scale) is not float
                or not MIN_SCALE <= sm_scale <= MAX_SCALE
                or current_device() != device_index
                or not (metadata_0 is planned_0 or plan.has(metadata_0, planned_0))
                or not (metadata_1 is planned_1 or plan.has(metadata_1, planned_1))
                or not (metadata_2 is planned_2 or plan.has(metadata_2, planned_2))
            ):
                return None
            if type(lse_base) is int and lse_base == 2:
                lse_scale = 1.0
            elif type(lse_base) is str and lse_base == "e":
                lse_scale = LN_2
            else:
                return None
            if packs_rows and not (_rows_are_even(q_nope) and _rows_are_even(q_pe)):
                return None
            if odd_queries and not (_has_tma_strides(q_nope) and _has_tma_strides(q_pe)):
                return None
            if odd_cache and not (_has_tma_strides(ckv_cache) and _has_tma_strides(kpe_cache)):
                return None
            if out is None:
                if not allocates:
                    return None
                out = empty(q_shape, out_dtype, device)
            elif not out.is_contiguous() or out.data_ptr() == q_nope.data_ptr():
                return None
            if lse is None:
                lse = empty(lse_shape, torch.float32, device)
            elif not lse.is_contiguous():
                return None
            if block_table:
                if page_ids is not plan._table[0]:
                    if page_ids.shape[0] != batch:
                        return None
                    plan._table = page_ids, flat_table(page_ids, plan)
                page_ids = plan._table[1]
            if not kv_format:
                if scale_arr is not None or not ckv_scale is kpe_scale is q_scale is UNSCALED:
                    return None
                step(
                    q_nope, q_pe, ckv_cache, kpe_cache, page_ids, table, part, out, lse, *grid,
                    sm_scale * LOG2_E, lse_scale,
                )  # fmt: skip
                return out, lse
            factors = _usual_factors(problem, sm_scale, ckv_scale, kpe_scale, q_scale)
            if factors is None or (scale_arr is None) is not (kv_format == "tensor"):
                return None
            scales = no_scales if scale_arr is None else scale_arr
            step(
                q_nope, q_pe, ckv_cache, kpe_cache, scales, page_ids, table, part, out, lse, *grid, *factors, lse_scale
            )
            return out, lse
        except Exception:  # an argument is no tensor or not what was compiled for; which one is problem.py's job to say
            return None

    return again


def _rows_are_even(q: torch.Tensor) -> bool:
    of_token, of_head, _ = q.stride()
    return of_token == q.shape[1] * of_head


def _has_tma_strides(x: torch.Tensor) -> bool:
    outer, inner, _ = x.stride()
    return (outer | inner) * x.itemsize % 16 == 0


def _usual_factors(
    problem: DecodeProblem | PrefillProblem, sm_scale: float, ckv_scale: Scale, kpe_scale: Scale, q_scale: Scale
) -> tuple[float | int, ...] | None:
    """What `_numbers` makes of scales, but for lse_scale; None where one is unusual."""
    ckv_at = kpe_at = q_at = 0
    if not type(ckv_scale) is type(kpe_scale) is type(q_scale) is float:
        at = problem.device.index
        if not (_is_scale(ckv_scale, at) and _is_scale(kpe_scale, at) and _is_scale(q_scale, at)):
            return None
        ckv_scale, ckv_at = _number_and_address(ckv_scale)
        kpe_scale, kpe_at = _number_and_address(kpe_scale)
        q_scale, q_at = _number_and_address(q_scale)
        if (problem.kv_format != "tensor" and ckv_at | kpe_at) or (not problem.q_fp8 and q_at):
            return None
    if problem.kv_format != "tensor" and not ckv_scale == kpe_scale == 1.0:
        return None
    if not problem.q_fp8 and q_scale != 1.0:
        return None
    nope, rope = sm_scale * ckv_scale * q_scale, sm_scale * kpe_scale
    if problem.kv_format == "tensor":
        rope *= q_scale
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


# ------------------------------------------------------------------------------------------------------- the long way


def launch(
    step: Callable[..., None],
    problem: DecodeProblem | PrefillProblem,
    plan: Plan,
    tensors: Operands,
    page_ids: torch.Tensor,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a checked call; `page_ids` is kv_indices, or a block table."""
    device = problem.device
    if device.type == "cuda" and device.index != current_device():
        with torch.cuda.device(device):
            return launch(step, problem, plan, tensors, page_ids, options)
    out, lse = options.out, options.lse
    if out is None:
        out = empty((problem.total_q, problem.num_heads, CKV_DIM), problem.dtype, device)
    if lse is None:
        lse = empty((problem.total_q, problem.num_heads), torch.float32, device)
    if plan.has_work:
        if plan._block_table:
            page_ids = flat_table(page_ids, plan)
        operands = _for_launch(problem, plan, tensors, lse)
        numbers = _numbers(problem, options)
        for of_round in plan.rounds:
            step(*_of_round(plan, problem, of_round, operands, page_ids, out, lse), *of_round.grid, *numbers)
    return out, lse


def _for_launch(
    problem: DecodeProblem | PrefillProblem, plan: Plan, tensors: Operands, lse: torch.Tensor
) -> list[torch.Tensor]:
    """Queries, caches and, of an FP8 cache, scales, in the form the step takes."""
    q_nope, q_pe, ckv_cache, kpe_cache, scale_arr = tensors
    operands = [q_nope, q_pe, ckv_cache, kpe_cache]
    if problem.kv_format:
        if not dlpack.exports_e4m3():
            operands = [x.view(torch.uint8) if x.dtype is FP8 else x for x in operands]
        # The step wants a tensor of three dimensions here, and with scales of tensors does not read it.
        operands.append(lse.unsqueeze(-1) if scale_arr is None else scale_arr)
    if problem.odd_strides:
        operands = [_tma_strides(x) for x in operands]
    if plan.packs_rows:
        operands[:2] = map(_even_rows, operands[:2])
    return operands


def _of_round(
    plan: Plan,
    problem: DecodeProblem | PrefillProblem,
    of_round: Round,
    operands: list[torch.Tensor],
    page_ids: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> list[torch.Tensor]:
    """The step's tensors. Tokens of decode are those of the round's requests; prefill's are numbered over all."""
    if len(plan.rounds) > 1:
        begin, end = of_round.begin, of_round.end
        if not plan.packs_rows:
            operands = [operands[0][begin:end], operands[1][begin:end], *operands[2:]]
            out, lse = out[begin:end], lse[begin:end]
            if problem.kv_format == "tensor":
                operands[4] = lse.unsqueeze(-1)
        if plan._block_table:
            page_ids = page_ids[begin * plan._table_stride :]
    return [*operands, page_ids, of_round.table, plan.part, out, lse]


def _numbers(problem: DecodeProblem | PrefillProblem, options: Options) -> tuple[float | int, ...]:
    lse_scale = 1.0 if options.lse_base == 2 else LN_2
    if not problem.kv_format:
        return options.sm_scale * LOG2_E, lse_scale
    ckv, ckv_at = _number_and_address(options.ckv_scale)
    kpe, kpe_at = _number_and_address(options.kpe_scale)
    q, q_at = _number_and_address(options.q_scale)
    nope, rope = options.sm_scale * LOG2_E * ckv * q, options.sm_scale * LOG2_E * kpe
    if problem.kv_format == "tensor":
        rope *= q
    return float(nope), float(rope), float(ckv), ckv_at, kpe_at, q_at, lse_scale


def _number_and_address(scale: Scale) -> tuple[float, int]:
    """A scale in two factors: one that the host knows, and the address of one on the device (0: none)."""
    if isinstance(scale, torch.Tensor):
        return 1.0, scale.data_ptr()
    return float(scale), 0


# ------------------------------------------------------------------------------------------------------------ tensors


def table_stride(block_table: torch.Tensor) -> int:
    """Elements between its rows, as plans want them."""
    rows, columns = block_table.shape
    return block_table.stride(0) if rows > 1 and columns else columns


def flat_table(block_table: torch.Tensor, plan: Plan) -> torch.Tensor:
    """The memory of a block table as one list of page ids; ValueError when the plan is for other strides."""
    rows, columns = block_table.shape
    if not rows or not columns:
        return block_table.reshape(0)
    stride = plan._table_stride
    if rows > 1 and block_table.stride(0) != stride:
        raise ValueError(
            f"plan: expected a plan for block_table rows {block_table.stride(0)} elements apart, got one for {stride}"
        )
    return block_table.as_strided(((rows - 1) * stride + columns,), (1,))


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
    return q if _rows_are_even(q) else _tma_strides(q.contiguous())
