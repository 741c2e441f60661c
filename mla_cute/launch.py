"""From a checked call and its plan to the compiled step. (short_way.py is for calls like one that came this way.)"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from . import dlpack
from .allocate import current_device, empty
from .dims import CKV_DIM
from .expect import Scale
from .plan import Plan, Round
from .problem import FP8, DecodeProblem
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
    ckv, ckv_at = number_and_address(options.ckv_scale)
    kpe, kpe_at = number_and_address(options.kpe_scale)
    q, q_at = number_and_address(options.q_scale)
    nope, rope = score_scales(problem.kv_format, options.sm_scale, ckv, kpe, q)
    return float(nope * LOG2_E), float(rope * LOG2_E), ckv, ckv_at, kpe_at, q_at, lse_scale


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
