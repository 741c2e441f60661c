"""Hundreds of bitwise repeats while another stream takes the memory bandwidth: a race shows as another bit."""

import pytest
import torch
from gpu_helpers import bits, plan_of

import mla_cute
from mla_cute._testing import compare, expected_of, make_case

REPEATS = 200
HOG_BYTES = 3 * 2**30
# Copies of the hog per repeat, 0.7 ms each alone: a repeat is a dozen launches, which a busy host takes 0.5 ms for.
HOG_COPIES = 4


@pytest.mark.parametrize("shape", ["ragged", "one_long"])
@pytest.mark.parametrize("page_size", [64, 1])
@pytest.mark.parametrize("num_heads", [16, 128])
def test_repeats_beside_a_bandwidth_hog(num_heads, page_size, shape):
    lengths = [8192, 1000, 129, 0, 20000, 64, 1, 65, 3000, 127] * 3 if shape == "ragged" else [40000]
    case = make_case(lengths, num_heads=num_heads, page_size=page_size, device="cuda")
    plan = plan_of(case)
    arguments = {"kv_last_page_len": case.kv_last_page_len, "out": case.out, "lse": case.lse}
    mla_cute.mla_paged_decode(*case.csr_args, plan=plan, **arguments)
    verdict = compare(case.out, case.lse, expected_of(case))
    assert verdict.ok, verdict
    want_out, want_lse = bits(case.out).clone(), bits(case.lse).clone()

    source = torch.empty(HOG_BYTES // 2, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    hog = torch.cuda.Stream()
    wrong = torch.zeros(REPEATS, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    for i in range(REPEATS):
        with torch.cuda.stream(hog):
            for _ in range(HOG_COPIES):
                target.copy_(source)
        case.out.fill_(float("nan"))
        case.lse.fill_(float("nan"))
        # plans with the call in every other round
        mla_cute.mla_paged_decode(*case.csr_args, plan=plan if i % 2 else None, **arguments)
        wrong[i] = (bits(case.out) != want_out).sum() + (bits(case.lse) != want_lse).sum()
    torch.cuda.current_stream().synchronize()
    hog_lasted = not hog.query()
    assert wrong.count_nonzero() == 0, f"elements that differ, by repeat: {wrong.tolist()}"
    assert hog_lasted, "the hog was done before the last repeat: make it larger"
    assert case.guarded_out.intact()
    assert case.guarded_lse.intact()
