"""Both accuracies of the FP8 row tiles: Q K^T summed in float32 after every 128 channels, or by the tensor cores."""

import pytest
import torch

import mla_cute
from mla_cute.testing.cases import make_case
from mla_cute.testing.fp8 import compare_fp8, expected_fp8, make_fp8, run_fp8
from mla_cute.testing.prefill import make_prefill_case

HIGH, NATIVE = (mla_cute.KernelConfig(accuracy=accuracy) for accuracy in ("high", "native"))
# Relative Frobenius error against float32, rounding of the output to bf16 (1.66e-3) included.
LIMIT = 2.5e-3


@pytest.mark.parametrize("q_fp8", [False, True], ids=["q16", "q_e4m3"])
@pytest.mark.parametrize("layout", ["tensor", "token"])
@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_high_is_closer_than_native(op, layout, q_fp8):
    if op == "decode":
        case = make_case([8192, 5000, 1000, 65, 64, 1, 0], num_heads=128, page_size=64, device="cuda")
    else:
        case = make_prefill_case([(70, 8192), (200, 1000), (1, 65), (0, 0)], num_heads=16, page_size=64, device="cuda")
    fp8 = make_fp8(case, layout, q_fp8)
    expected = expected_fp8(fp8)
    high, native = (run_fp8(fp8, expected=expected, **options) for options in ({}, {"config": NATIVE}))
    assert high.ok, high
    assert native.ok, native
    assert high.relative_error < min(LIMIT, native.relative_error)


@pytest.mark.parametrize("num_heads", [16, 128])
def test_where_both_are_the_same_no_bit_changes(num_heads):
    layouts = ["group"] if num_heads == 128 else ["tensor", "token", "group"]
    for layout in layouts:
        fp8 = make_fp8(make_case([3000, 70], num_heads=num_heads, page_size=64, device="cuda"), layout, False)
        high, native = fp8.call(config=HIGH), fp8.call(config=NATIVE)
        assert compare_fp8(*native, expected_fp8(fp8)).ok
        for a, b in zip(high, native, strict=True):
            assert torch.equal(a.view(torch.int16), b.view(torch.int16))
