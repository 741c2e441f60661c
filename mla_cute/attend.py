"""The one path of the public calls: check, plan, step, launch. (short_way.py leads past all of it.)

Nothing on it reads the device from the host, unless MLA_CUTE_CHECK=1 asks for the metadata's values to be looked at.
CPU tensors always have theirs looked at, and go to the float32 reference.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

from . import reference
from .config import KernelConfig
from .expect import expect_bool
from .launch import Operands, Options, flat_table, launch, table_stride
from .plan import Plan, check_enabled, expect_options, expect_plan
from .plan_decode import DecodePlan
from .plan_prefill import PrefillPlan
from .problem import DecodeProblem, check_decode, check_decode_block_table
from .problem_prefill import (
    PrefillProblem,
    check_prefill,
    check_prefill_block_table,
    verify_prefill_block_table_on_device,
    verify_prefill_on_device,
)
from .short_way import keep_without_plan, with_plan
from .verify import raise_first, scale_findings, verify_block_table_on_device, verify_on_device

Metadata = tuple[Any, ...]  # in the order of a plan's
Problem = DecodeProblem | PrefillProblem


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Kind:
    """What decode and prefill, over page lists and block tables, do each in their own way."""

    op: str
    block_table: bool
    check: Callable[[Operands, Metadata, torch.Tensor, Options, bool], Problem]
    verify: Callable[..., None]
    reference: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    plan: Callable[..., Plan]


def attend(
    kind: Kind,
    tensors: Operands,
    metadata: Metadata,
    page_ids: torch.Tensor,
    options: Options,
    return_lse: bool,
    plan: Plan | None,
    config: KernelConfig | None,
    batch_invariant: bool,
    causal: bool = False,
    key: object = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """(output, lse), or output. `key`: of a call without a plan (short_way.py)."""
    if plan is not None:
        expect_plan(plan)
    problem = kind.check(tensors, metadata, page_ids, options, causal)
    expect_bool("return_lse", return_lse)
    expect_options(config, batch_invariant)
    _warn_of_gradients(tensors)
    if plan is not None:
        step = plan.launcher(problem, kind.block_table)
        plan.expect_metadata(*metadata)
        if kind.block_table:
            flat_table(page_ids, plan)
        verify = plan.verifies
    else:
        verify = check_enabled()
    on_gpu = tensors.q_nope.is_cuda
    if verify or not on_gpu:
        metadata = _verified(kind, problem, plan, metadata, page_ids, options)
    if not on_gpu:
        result = _by_reference(kind, tensors, metadata, page_ids, options, causal)
        return result if return_lse else result[0]
    if plan is not None:
        result = launch(step, problem, plan, tensors, page_ids, options)
        plan._again = with_plan(kind, step, problem, plan)
    else:
        plan = kind.plan(problem, metadata, page_ids, config, batch_invariant)
        step = plan.launcher(problem, kind.block_table)
        result = launch(step, problem, plan, tensors, page_ids, options)
        keep_without_plan(key, step, problem, plan)
    return result if return_lse else result[0]


def _verified(
    kind: Kind,
    problem: Problem,
    plan: Plan | None,
    metadata: Metadata,
    page_ids: torch.Tensor,
    options: Options,
) -> Metadata:
    """The metadata that the call computes with, after a look at their values: the plan's, where there is one."""
    if plan is not None and plan.other_metadata:
        metadata = plan.metadata(*metadata)
    spare_pages = () if kind.block_table else (plan is not None and plan._spare_pages,)
    kind.verify(problem, *_in_order(metadata, page_ids), *spare_pages)
    scales = {name: x for name, x in options._asdict().items() if name.endswith("_scale") and torch.is_tensor(x)}
    if scales:
        raise_first(scale_findings(scales))
    if plan is not None and not plan.other_metadata:
        raise_first(plan.stale_findings())
    return metadata


def _in_order(metadata: Metadata, page_ids: torch.Tensor) -> list[Any]:
    """[qo_indptr,] kv_indptr, kv_indices, kv_last_page_len; or [qo_indptr,] block_table, seq_lens."""
    *first, last = metadata
    return [*first, page_ids, last]


def _by_reference(
    kind: Kind, tensors: Operands, metadata: Metadata, page_ids: torch.Tensor, options: Options, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    q_nope, q_pe, ckv_cache, kpe_cache, scale_arr = tensors
    positional = _in_order(metadata, page_ids)
    keywords: dict[str, Any] = {"causal": causal} if kind.op == "prefill" else {}
    if not kind.block_table:
        keywords["kv_last_page_len"] = positional.pop()
    return kind.reference(
        q_nope, q_pe, ckv_cache, kpe_cache, *positional, options.sm_scale,
        out=options.out, lse=options.lse, lse_base=options.lse_base, ckv_scale=options.ckv_scale,
        kpe_scale=options.kpe_scale, ckv_scale_arr=scale_arr, q_scale=options.q_scale, **keywords,
    )  # fmt: skip


def _warn_of_gradients(tensors: Operands) -> None:
    q_nope, q_pe, ckv_cache, kpe_cache, _ = tensors
    if q_nope.requires_grad or q_pe.requires_grad or ckv_cache.requires_grad or kpe_cache.requires_grad:
        if torch.is_grad_enabled():
            _warn_once()


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        "mla_cute computes no gradients: outputs are detached from inputs that require them. Call it under "
        "torch.no_grad() or torch.inference_mode(). (This is said once.)",
        UserWarning,
        stacklevel=5,
    )


# ------------------------------------------------------------------------------------------------------ the four kinds


def _check_decode(tensors: Operands, metadata: Metadata, ids: torch.Tensor, options: Options, causal: bool) -> Problem:
    indptr, last = metadata
    sm_scale, out, lse, lse_base, ckv_scale, kpe_scale, q_scale = options
    return check_decode(
        *tensors[:4], indptr, ids, sm_scale, last, out, lse, lse_base, ckv_scale, kpe_scale, tensors.scale_arr, q_scale
    )


def _check_decode_table(
    tensors: Operands, metadata: Metadata, ids: torch.Tensor, options: Options, causal: bool
) -> Problem:
    (lengths,) = metadata
    sm_scale, out, lse, lse_base, ckv_scale, kpe_scale, q_scale = options
    return check_decode_block_table(
        *tensors[:4], ids, lengths, sm_scale, out, lse, lse_base, ckv_scale, kpe_scale, tensors.scale_arr, q_scale
    )


def _check_prefill(tensors: Operands, metadata: Metadata, ids: torch.Tensor, options: Options, causal: bool) -> Problem:
    queries, indptr, last = metadata
    sm_scale, out, lse, lse_base, ckv_scale, kpe_scale, q_scale = options
    return check_prefill(
        *tensors[:4], queries, indptr, ids, sm_scale, causal, last, out, lse, lse_base, ckv_scale, kpe_scale,
        tensors.scale_arr, q_scale,
    )  # fmt: skip


def _check_prefill_table(
    tensors: Operands, metadata: Metadata, ids: torch.Tensor, options: Options, causal: bool
) -> Problem:
    queries, lengths = metadata
    sm_scale, out, lse, lse_base, ckv_scale, kpe_scale, q_scale = options
    return check_prefill_block_table(
        *tensors[:4], queries, ids, lengths, sm_scale, causal, out, lse, lse_base, ckv_scale, kpe_scale,
        tensors.scale_arr, q_scale,
    )  # fmt: skip


def _facts(problem: Problem, config: KernelConfig | None, batch_invariant: bool) -> dict[str, Any]:
    return {
        "batch": problem.batch, "num_heads": problem.num_heads, "page_size": problem.page_size, "config": config,
        "batch_invariant": batch_invariant, "kv_format": problem.kv_format, "q_fp8": problem.q_fp8,
        "other_metadata": False, "verifies": False,
    }  # fmt: skip


def _plan_decode(problem: Problem, metadata: Metadata, ids: torch.Tensor, *choice: Any) -> Plan:
    indptr, last = metadata
    return DecodePlan(
        {"kv_indptr": indptr, "kv_last_page_len": last},
        room=ids.shape[0] * problem.page_size, table_stride=0, max_kv_len=None, **_facts(problem, *choice),
    ).update()  # fmt: skip


def _plan_decode_table(problem: Problem, metadata: Metadata, ids: torch.Tensor, *choice: Any) -> Plan:
    room = ids.shape[1] * problem.page_size
    return DecodePlan(
        {"seq_lens": metadata[0]},
        room=room, table_stride=table_stride(ids), max_kv_len=room, **_facts(problem, *choice),
    ).update()  # fmt: skip


def _plan_prefill(problem: Problem, metadata: Metadata, ids: torch.Tensor, *choice: Any) -> Plan:
    assert isinstance(problem, PrefillProblem)
    queries, indptr, last = metadata
    return PrefillPlan(
        {"qo_indptr": queries, "kv_indptr": indptr, "kv_last_page_len": last},
        total_q=problem.total_q, causal=problem.causal, room=ids.shape[0] * problem.page_size, table_stride=0,
        max_kv_len=None, **_facts(problem, *choice),
    ).update()  # fmt: skip


def _plan_prefill_table(problem: Problem, metadata: Metadata, ids: torch.Tensor, *choice: Any) -> Plan:
    assert isinstance(problem, PrefillProblem)
    queries, lengths = metadata
    room = ids.shape[1] * problem.page_size
    return PrefillPlan(
        {"qo_indptr": queries, "seq_lens": lengths},
        total_q=problem.total_q, causal=problem.causal, room=room, table_stride=table_stride(ids), max_kv_len=room,
        **_facts(problem, *choice),
    ).update()  # fmt: skip


DECODE = Kind("decode", False, _check_decode, verify_on_device, reference.decode_reference, _plan_decode)
DECODE_TABLE = Kind(
    "decode", True, _check_decode_table, verify_block_table_on_device, reference.decode_reference_block_table,
    _plan_decode_table,
)  # fmt: skip
PREFILL = Kind("prefill", False, _check_prefill, verify_prefill_on_device, reference.prefill_reference, _plan_prefill)
PREFILL_TABLE = Kind(
    "prefill", True, _check_prefill_table, verify_prefill_block_table_on_device,
    reference.prefill_reference_block_table, _plan_prefill_table,
)  # fmt: skip
