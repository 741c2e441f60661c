"""The one path of the public calls: check, plan, step, launch. (short_way.py leads past all of it.)

Nothing on it reads the device from the host, unless MLA_CUTE_CHECK=1 asks for the metadata's values to be looked at.
CPU tensors always have theirs looked at, and go to the float32 reference.
"""

from __future__ import annotations

import functools
import warnings

import torch

from . import reference
from .call import Call, CallFields, Pages, as_call, without_rope
from .check import Problem, check
from .check_device import raise_first, scale_findings, verify
from .config import KernelConfig
from .expect import expect_bool
from .launch import flat_table, launch, table_stride
from .plan import Plan, Wanted, check_enabled, expect_options, expect_plan
from .plan_decode import DecodePlan
from .plan_prefill import PrefillPlan
from .short_way import keep_without_plan, with_plan, without_plan


def attend(
    call: CallFields, plan: Plan | None, config: KernelConfig | None, batch_invariant: bool, return_lse: bool = True
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """(output, lse), or output."""
    if call[1] is None or call[2][1] is None:
        call = without_rope(call)
    way = key = None
    if plan is None:
        way, key = without_plan(call, config, batch_invariant)
    elif config is None and type(batch_invariant) is bool:  # they are nothing to a plan, but checked
        way = getattr(plan, "_again", None)
    if way is None or type(return_lse) is not bool or (result := way(call)) is None:
        result = _long_way(as_call(call), plan, config, batch_invariant, return_lse, key)
    return result if return_lse else result[0]


def _long_way(
    call: Call, plan: Plan | None, config: KernelConfig | None, batch_invariant: bool, return_lse: bool, key: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """`key`: of a call without a plan (short_way.py)."""
    if plan is not None:
        expect_plan(plan)
    problem = check(call)
    expect_bool("return_lse", return_lse)
    expect_options(config, batch_invariant)
    _warn_of_gradients(call)
    pages, on_gpu = call.pages, call.q_nope.is_cuda
    if plan is not None:
        step = plan.launcher(problem, pages.form)
        plan.expect_pages(pages)
        if pages.form.by_table:
            flat_table(pages.ids, plan)
    if not on_gpu or (check_enabled() if plan is None else plan.verifies):
        call = _verified(call, problem, plan)
    if not on_gpu:
        return reference.attention(call)
    if plan is not None:
        result = launch(step, problem, plan, call)
        plan._again = with_plan(step, problem, plan)
    else:
        plan = _plan_for(problem, pages, config, batch_invariant)
        step = plan.launcher(problem, pages.form)
        result = launch(step, problem, plan, call)
        keep_without_plan(key, step, problem, plan)
    return result


def _plan_for(problem: Problem, pages: Pages, config: KernelConfig | None, batch_invariant: bool) -> Plan:
    """Of a call that was given none."""
    by_table = pages.form.by_table
    room = pages.ids.shape[by_table] * (1 if problem.op == "sparse" else problem.page_size)
    wanted = Wanted(
        pages._replace(ids=None), problem.batch, problem.total_q, problem.num_heads, problem.page_size, room,
        table_stride(pages.ids) if by_table else 0, room if by_table else None, problem.kv_format, problem.q_fp8,
        config, batch_invariant, other_metadata=False, verifies=False,
    )  # fmt: skip
    return (PrefillPlan if problem.op == "prefill" else DecodePlan)(wanted).update()


def _verified(call: Call, problem: Problem, plan: Plan | None) -> Call:
    """The call with the metadata that it computes with, after a look at their values: the plan's, where there is
    one."""
    if plan is not None and plan.other_metadata:
        call = call._replace(pages=plan.planned(call.pages))
    if plan is None:
        verify(problem, call.pages)
    else:
        verify(problem, call.pages, plan._spare_pages, plan.max_q_len)
    cache = call.cache
    scales = {"ckv_scale": cache.ckv_scale, "kpe_scale": cache.kpe_scale, "q_scale": call.q_scale}
    on_device = {name: x for name, x in scales.items() if isinstance(x, torch.Tensor)}
    if on_device:
        raise_first(scale_findings(on_device))
    if plan is not None and not plan.other_metadata:
        raise_first(plan.stale_findings())
    return call


def _warn_of_gradients(call: Call) -> None:
    cache = call.cache
    if call.q_nope.requires_grad or call.q_pe.requires_grad or cache.ckv.requires_grad or cache.kpe.requires_grad:
        if torch.is_grad_enabled():
            _warn_once()


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        "mla_cute computes no gradients: outputs are detached from inputs that require them. Call it under "
        "torch.no_grad() or torch.inference_mode(). (This is said once.)",
        UserWarning,
        stacklevel=6,
    )
