"""From a checked call and its plan to the compiled step. (short_way.py is for calls like one that came this way.)"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from . import dlpack
from .allocate import current_device, empty
from .call import Call
from .check import FP8, Problem
from .expect import Scale
from .plan import Plan, Round

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)


def launch(step: Callable[..., None], problem: Problem, plan: Plan, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a checked call."""
    device = problem.device
    if device.type == "cuda" and device.index != current_device():
        with torch.cuda.device(device):
            return launch(step, problem, plan, call)
    out, lse = call.out, call.lse
    if out is None:
        out = empty((problem.total_q, problem.num_heads, problem.dims.ckv), problem.dtype, device)
    if lse is None:
        lse = empty((problem.total_q, problem.num_heads), torch.float32, device)
    if plan.has_work:
        page_ids = call.pages.ids
        if plan.form.by_table:
            page_ids = flat_table(page_ids, plan)
        operands = _for_launch(problem, plan, call, lse)
        numbers = _numbers(problem, call)
        for of_round in plan.rounds:
            tensors = _of_round(plan, problem, of_round, (operands, page_ids, out, lse))
            step(*tensors, *of_round.grid, *numbers)
    return out, lse


def _for_launch(problem: Problem, plan: Plan, call: Call, lse: torch.Tensor) -> list[torch.Tensor]:
    """Queries, caches and, of an FP8 cache, scales, in the form the step takes. One without a rope part takes q_nope
    and ckv in its place, too, and does not read them there."""
    cache = call.cache
    operands = [call.q_nope, call.q_pe, cache.ckv, cache.kpe]
    if problem.kv_format:
        if not dlpack.exports_e4m3():
            operands = [x.view(torch.uint8) if x.dtype is FP8 else x for x in operands]
        # The step wants a tensor of three dimensions here, and with scales of tensors does not read it.
        operands.append(lse.unsqueeze(-1) if cache.scale_arr is None else cache.scale_arr)
    if problem.odd_strides:
        operands = [_tma_strides(x) for x in operands]
    if plan.packs_rows:
        operands[:2] = map(_even_rows, operands[:2])
    if not problem.dims.kpe:
        operands[1], operands[3] = operands[0], operands[2]
    return operands


def _of_round(
    plan: Plan,
    problem: Problem,
    of_round: Round,
    tensors: tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor],
) -> list[torch.Tensor]:
    """The step's tensors, of `tensors`: operands, page ids, out, lse. Tokens of decode are those of the round's
    requests; prefill's are numbered over all."""
    operands, page_ids, out, lse = tensors
    if len(plan.rounds) > 1:
        begin, end = of_round.begin, of_round.end
        if not plan.packs_rows:
            operands = [operands[0][begin:end], operands[1][begin:end], *operands[2:]]
            out, lse = out[begin:end], lse[begin:end]
            if problem.kv_format == "tensor":
                operands[4] = lse.unsqueeze(-1)
        if plan.form.by_table:
            page_ids = page_ids[begin * plan._table_stride :]
    return [*operands, page_ids, of_round.table, plan.part, out, lse]


def _numbers(problem: Problem, call: Call) -> tuple[float | int, ...]:
    last: tuple[float | int, ...] = (1.0 if call.lse_base == 2 else LN_2,)
    if problem.op == "sparse":
        last = (*last, sink_address(call.sink))
    if not problem.kv_format:
        return call.sm_scale * LOG2_E, *last
    ckv, ckv_at = number_and_address(call.cache.ckv_scale)
    kpe, kpe_at = number_and_address(call.cache.kpe_scale)
    q, q_at = number_and_address(call.q_scale)
    nope, rope = score_scales(problem.kv_format, call.sm_scale, ckv, kpe, q)
    return float(nope * LOG2_E), float(rope * LOG2_E), ckv, ckv_at, kpe_at, q_at, *last


def sink_address(sink: torch.Tensor | None) -> int:
    """As the step takes it; 0: there are none."""
    return 0 if sink is None else sink.data_ptr()


def score_scales(kv_format: str, sm_scale: float, ckv: float, kpe: float, q: float) -> tuple[float, float]:
    """Factors of q_nope . ckv and q_pe . kpe. `q` is of e4m3 queries, and q_pe is that in format "tensor" alone."""
    rope = sm_scale * kpe
    return sm_scale * ckv * q, rope * q if kv_format == "tensor" else rope


def number_and_address(scale: Scale) -> tuple[float, int]:
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
    return memory_of_table(block_table, stride)


def memory_of_table(block_table: torch.Tensor, stride: int) -> torch.Tensor:
    """As `flat_table`, of one that has rows, `stride` elements apart."""
    rows, columns = block_table.shape
    return block_table.as_strided(((rows - 1) * stride + columns,), (1,))


def rows_are_even(q: torch.Tensor) -> bool:
    of_token, of_head, _ = q.stride()
    return of_token == q.shape[1] * of_head


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
    return q if rows_are_even(q) else _tma_strides(q.contiguous())
