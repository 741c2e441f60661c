"""Block tables of any width on the GPU: without columns, and as slices of a wider one."""

import pytest
import torch
from gpu_helpers import check, make_prefill

import mla_cute
from mla_cute.testing.cases import make_case
from mla_cute.testing.runs import plan_of

WITH_PLAN = pytest.mark.parametrize("with_plan", [False, True], ids=["no_plan", "plan"])
SIZES = {"num_heads": 16, "page_size": 64}


@WITH_PLAN
@pytest.mark.parametrize("check_mode", ["0", "1"])
@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 200])
@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_requests_without_keys_need_no_columns(monkeypatch, op, batch, sliced, check_mode, with_plan):
    monkeypatch.setenv("MLA_CUTE_CHECK", check_mode)
    case = make_case([0] * batch, device="cuda", **SIZES)
    table = case.block_table[:, :0] if sliced else torch.zeros(batch, 0, dtype=torch.int32, device="cuda")
    tensors, plan = (case.q_nope, case.q_pe, case.ckv_cache, case.kpe_cache), None
    if op == "decode":
        if with_plan:
            plan = mla_cute.plan_decode_block_table(case.seq_lens, max_pages=0, **SIZES)
        call, args = mla_cute.mla_paged_decode_block_table, (*tensors, table, case.seq_lens, 0.1)
    else:
        queries = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
        if with_plan:
            plan = mla_cute.plan_prefill_block_table(queries, case.seq_lens, max_pages=0, total_q=batch, **SIZES)
        call, args = mla_cute.mla_paged_prefill_block_table, (*tensors, queries, table, case.seq_lens, 0.1)
    for _ in range(2):
        case.guarded_out.reset()
        case.guarded_lse.reset()
        call(*args, out=case.out, lse=case.lse, plan=plan)
        assert (case.out == 0).all()
        assert (case.lse == -torch.inf).all()


@WITH_PLAN
def test_rows_of_a_wider_table(with_plan):
    """Tables of the cases are slices with absurd page ids between their rows."""
    for case in (make_case([70, 0, 1000], device="cuda", **SIZES), make_prefill([(3, 70), (0, 5), (9, 300)])):
        case.block_table = torch.nn.functional.pad(case.block_table, (0, 5), value=-1)[:, :-5]
        check(case, entry="block_table", plan=plan_of(case, "block_table") if with_plan else None)
