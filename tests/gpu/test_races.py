"""Hundreds of bitwise repeats while another stream takes the memory bandwidth: a race shows as another bit."""

import pytest
import torch
from gpu_helpers import bits, other_bits, plan_of
from hog import beside, compile_hog

import mla_cute
from mla_cute.testing.cases import expected_of, make_case
from mla_cute.testing.verdict import compare

REPEATS = 200


@pytest.fixture(scope="module")
def hog():
    return compile_hog()


@pytest.mark.parametrize("shape", ["ragged", "one_long"])
@pytest.mark.parametrize("page_size", [64, 1])
@pytest.mark.parametrize("num_heads", [16, 128])
def test_repeats_beside_a_bandwidth_hog(hog, num_heads, page_size, shape):
    lengths = [8192, 1000, 129, 0, 20000, 64, 1, 65, 3000, 127] * 3 if shape == "ragged" else [40000]
    case = make_case(lengths, num_heads=num_heads, page_size=page_size, device="cuda")
    plan = plan_of(case)
    arguments = {"kv_last_page_len": case.kv_last_page_len, "out": case.out, "lse": case.lse}
    mla_cute.mla_paged_decode(*case.csr_args, plan=plan, **arguments)
    verdict = compare(case.out, case.lse, expected_of(case))
    assert verdict.ok, verdict
    want_out, want_lse = bits(case.out).clone(), bits(case.lse).clone()

    wrong = torch.zeros(REPEATS + 1, dtype=torch.int64, device="cuda")

    def repeat(i):
        case.out.fill_(float("nan"))
        case.lse.fill_(float("nan"))
        # plans with the call in every other round
        mla_cute.mla_paged_decode(*case.csr_args, plan=plan if i % 2 else None, **arguments)
        wrong[i] = other_bits(case, want_out, want_lse)

    for i in (0, 1):  # loads every module: not possible beside a kernel that does not end
        repeat(i)
    with beside(hog):
        for i in range(1, REPEATS + 1):
            repeat(i)
    assert wrong.count_nonzero() == 0, f"elements that differ, by repeat: {wrong.tolist()}"
    assert case.guarded_out.intact()
    assert case.guarded_lse.intact()
