"""Merges of every number of pieces, and of pieces that are late (kernels/merge.py)."""

import pytest
import torch
from gpu_helpers import bits, check, other_bits, plan_of
from hog import beside, compile_hog

import mla_cute
from mla_cute.config import KernelConfig
from mla_cute.testing.cases import make_case

# Every number of pieces of a request, and so every way to share its rows, from 2 to a part of each SM.
PIECES = (2, 3, 4, 5, 8, 9, 16, 17, 31, 33, 64, 65, 100, 132)


def call(case, plan):
    case.out.fill_(float("nan"))
    case.lse.fill_(float("nan"))
    mla_cute.mla_paged_decode(
        *case.csr_args, plan=plan, kv_last_page_len=case.kv_last_page_len, out=case.out, lse=case.lse
    )


@pytest.mark.parametrize("kernel", ["tile16", "tile64"])
@pytest.mark.parametrize("num_heads", [1, 8, 16, 33, 64, 100, 128])
def test_every_number_of_pieces(num_heads, kernel):
    unit = 1 if kernel == "tile16" else 2
    config = KernelConfig(kernel=kernel, cut_unit=unit, min_blocks=unit, split_penalty=0)
    seen = set()
    for pieces in PIECES:
        case = make_case([pieces * unit * 64 - 5], num_heads=num_heads, page_size=64, device="cuda", seed=pieces)
        plan = plan_of(case, config=config)
        check(case, plan=plan)
        assert plan.table[0, 7] == 1
        seen.add(int(plan.table[plan.num_parts, 2]))
    assert {p for p in PIECES if p <= plan.num_parts} <= seen


@pytest.mark.parametrize("num_heads", [16, 128])
def test_plans_on_streams_side_by_side(num_heads):
    """Each step has a CTA for every SM: those of one start while the others' hold SMs."""
    cases = [
        make_case([30000, 0, 700], num_heads=num_heads, page_size=64, device="cuda", seed=seed) for seed in range(3)
    ]
    plans = [plan_of(case) for case in cases]
    wanted = []
    for case, plan in zip(cases, plans, strict=True):
        check(case, plan=plan)
        wanted.append((bits(case.out).clone(), bits(case.lse).clone()))
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    wrong = torch.zeros(len(cases), dtype=torch.int64, device="cuda")
    for _ in range(200):
        for i, (case, plan) in enumerate(zip(cases, plans, strict=True)):
            with torch.cuda.stream(streams[i]):
                call(case, plan)
                wrong[i] += other_bits(case, *wanted[i])
    torch.cuda.synchronize()
    assert wrong.tolist() == [0] * len(cases)


@pytest.mark.parametrize("num_heads", [16, 128])
def test_pieces_that_start_late(num_heads):
    """Most SMs are taken by another kernel, so that a request's pieces run one after the other."""
    case = make_case([40000, 3000], num_heads=num_heads, page_size=64, device="cuda")
    plan = plan_of(case)
    check(case, plan=plan)
    want = bits(case.out).clone(), bits(case.lse).clone()
    different = torch.zeros(21, dtype=torch.int64, device="cuda")

    def repeat(i):
        call(case, plan)
        different[i] = other_bits(case, *want)

    repeat(0)  # loads every module: not possible beside a kernel that does not end
    with beside(compile_hog(), ctas=100):
        for i in range(1, len(different)):
            repeat(i)
    assert different.tolist() == [0] * len(different)
