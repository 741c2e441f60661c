"""The accuracies of the FP8 row tiles: Q K^T summed in float32 after every 128 channels, or by the tensor cores; 16-bit
queries as two e4m3 parts, or as one."""

import dataclasses
import math

import pytest
import torch
from gpu_helpers import ENTRIES, bits, capture, other_bits, plan_of, same_bits

import mla_cute
from mla_cute.dims import HEAD_DIMS
from mla_cute.testing.cases import make_case
from mla_cute.testing.fp8 import FAST_ERROR, LAYOUTS, compare_fp8, expected_fp8, judge_fp8, make_fp8, run_fp8
from mla_cute.testing.prefill import make_prefill_case
from mla_cute.testing.sparse import lists_of, run_sparse, sinks_of

HIGH, NATIVE, FAST = (mla_cute.KernelConfig(accuracy=accuracy) for accuracy in ("high", "native", "fast"))
# Of row tiles over the FP8 cache: a prefill that converts the cache rounds no query to e4m3.
FAST_ROWS = dataclasses.replace(FAST, fp8_kernel="tile64")
# Relative Frobenius error against float32, rounding of the output to bf16 (1.66e-3) included.
LIMIT = 2.5e-3
BF16, FP16 = torch.bfloat16, torch.float16
EVERY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)


def make_16_bit(op, lengths=None, **options):
    """128 or 32 heads of decode, or more rows of prefill that fewer heads have."""
    options = {"page_size": 64, "device": "cuda"} | options
    if op.startswith("decode"):
        num_heads = 128 if op == "decode" else 32
        return make_case(lengths or [8192, 5000, 1000, 65, 64, 1, 0], **{"num_heads": num_heads} | options)
    requests = [(70, 8192), (200, 1000), (1, 65), (0, 0)]
    return make_prefill_case(lengths or requests, **{"num_heads": 16} | options)


@pytest.mark.parametrize("q_fp8", [False, True], ids=["q16", "q_e4m3"])
@pytest.mark.parametrize("layout", ["tensor", "token"])
@pytest.mark.parametrize("op", ["decode", "decode of 32 heads", "prefill"])
def test_high_is_closer_than_native(op, layout, q_fp8):
    fp8 = make_fp8(make_16_bit(op), layout, q_fp8)
    expected = expected_fp8(fp8)
    high, native = (run_fp8(fp8, expected=expected, **options) for options in ({}, {"config": NATIVE}))
    assert high.ok, high
    assert native.ok, native
    assert high.relative_error < min(LIMIT, native.relative_error)


@pytest.mark.parametrize("num_heads", [16, 32, 128])
def test_where_high_and_native_are_the_same_no_bit_changes(num_heads):
    layouts = ["tensor", "token", "group"] if num_heads == 16 else ["group"]
    for layout in layouts:
        fp8 = make_fp8(make_case([3000, 70], num_heads=num_heads, page_size=64, device="cuda"), layout, False)
        high, native = fp8.call(config=HIGH), fp8.call(config=NATIVE)
        assert compare_fp8(*native, expected_fp8(fp8)).ok
        assert all(same_bits(a, b) for a, b in zip(high, native, strict=True))


# ------------------------------------------------------------------------------------------------ fast


def check_fast(fp8, expected=None, **options):
    """By the limits of "high", against float32 on the queries as "fast" rounds them."""
    expected = expected or expected_fp8(fp8, accuracy="fast")
    verdict = run_fp8(fp8, expected=expected, **{"config": FAST_ROWS} | options)
    assert verdict.ok, verdict
    return verdict


@pytest.mark.parametrize("drift", [0.0, 60.0, -60.0])
@EVERY_LAYOUT
@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_fast_rounds_queries_and_loses_nothing_else(op, layout, drift):
    """Poisoned inputs, queries in one buffer, uncut and cut requests; without a plan, with one and repeated."""
    case = make_16_bit(op, drift=drift, q_layout="fused", cache_layout="padded")
    fp8 = make_fp8(case, layout)
    expected = expected_fp8(fp8, accuracy="fast")
    for entry in ENTRIES:
        verdict = check_fast(fp8, expected, entry=entry)
        assert drift != 0 or verdict.relative_error < LIMIT
        plan = plan_of(case, entry, kv_format=fp8.kv_format, config=FAST_ROWS)
        check_fast(fp8, expected, entry=entry, plan=plan, config=None)
        out, lse = case.out.clone(), case.lse.clone()
        check_fast(fp8, expected, entry=entry, plan=plan, config=None)
        assert same_bits(case.out, out)
        assert same_bits(case.lse, lse)
    check_fast(fp8, expected, batch_invariant=True)


@pytest.mark.parametrize("layout", ["tensor", "token", "group"])
@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_fast_costs_what_one_part_costs(op, layout):
    lengths = [8192, 5000, 1000, 65, 64] if op == "decode" else [(70, 8192), (200, 1000), (1, 65)]
    fp8 = make_fp8(make_16_bit(op, lengths), layout, spread=1.0)
    fp8.reset()
    fp8.call(out=fp8.case.out, lse=fp8.case.lse, config=FAST_ROWS)
    assert judge_fp8(fp8, expected_fp8(fp8, accuracy="fast")).ok
    against_given = judge_fp8(fp8, expected_fp8(fp8))
    assert FAST_ERROR[0] < against_given.relative_error < FAST_ERROR[1], against_given


@pytest.mark.parametrize(("layout", "dtype"), [("tensor", BF16), ("group", BF16), ("tensor", FP16), ("token", FP16)])
@pytest.mark.parametrize("page_size", [16, 1])
@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_fast_over_other_pages(op, page_size, layout, dtype):
    check_fast(make_fp8(make_16_bit(op, page_size=page_size, dtype=dtype, q_layout="batch_strided"), layout))


@pytest.mark.parametrize("page_size", [64, 1])
@pytest.mark.parametrize("dims", HEAD_DIMS[1:], ids=str)
def test_fast_of_other_head_dims(dims, page_size):
    for op in ("decode", "prefill"):
        check_fast(make_fp8(make_16_bit(op, page_size=page_size, dims=dims), "tensor"))
    case = make_case([3000, 0, 64, 1], num_heads=128, page_size=page_size, dims=dims, device="cuda")
    check_fast_lists(make_fp8(case, "tensor"))


def check_fast_lists(fp8):
    expected, lists = expected_fp8(fp8, accuracy="fast"), lists_of(fp8.case, first_none=(0, 64, 130))
    for sink in (None, sinks_of(fp8)):
        verdict = run_sparse(fp8, lists, expected=expected, config=FAST, sink=sink)
        assert verdict.ok, verdict


@pytest.mark.parametrize("drift", [0.0, -60.0])
@EVERY_LAYOUT
def test_fast_over_lists(layout, drift):
    case = make_case([0, 1, 63, 64, 1000, 2048, 20000, 128], num_heads=128, page_size=64, drift=drift, device="cuda")
    check_fast_lists(make_fp8(case, layout))


def ties(q):
    """Values of at most 3.5, and 3.5 in each row: under 2^-7 a sixteenth of what bf16 holds is halfway between e4m3."""
    q.clamp_(-3.5, 3.5)
    q[..., 5] = 3.5


def zeros(q):
    """Every third row 0."""
    q[:, ::3] = 0


def sizes(q):
    """Rows from 2^-110, which is less than the least amax that a scale is made of, to 4 times as large."""
    q *= torch.exp2(torch.tensor([0.0, -110.0, 2.0, -8.0], dtype=q.dtype, device=q.device).repeat(32))[:, None]


def one_large(q):
    """One channel 300 times as large: in e4m3 most of the others are subnormal or 0."""
    q[..., 7] = q[..., 7] * 30 + 200


@pytest.mark.parametrize("layout", ["tensor", "token", "group"])
@pytest.mark.parametrize("change", [ties, zeros, sizes, one_large], ids=lambda f: f.__name__)
def test_fast_of_special_rows(change, layout):
    case = make_16_bit("decode")
    for q in (case.q_nope, case.q_pe):
        change(q)
    check_fast(make_fp8(case, layout))


def test_fast_keeps_infinity_and_nan_to_their_rows():
    case = make_16_bit("decode")
    clean, _ = make_fp8(case, "tensor").call(config=FAST)
    for value, head in ((math.inf, 3), (math.nan, 70), (-math.inf, 127)):
        case.q_nope[0, head, 9] = value
        case.q_pe[1, head, 2] = value
    out, _ = make_fp8(case, "tensor").call(config=FAST)
    spoilt = torch.zeros(out.shape[:2], dtype=torch.bool, device="cuda")
    spoilt[:2, [3, 70, 127]] = True
    assert out[spoilt].isnan().all()
    # They may move the references of their tile, so the others need not be the same to the last bit.
    torch.testing.assert_close(out[~spoilt], clean[~spoilt], rtol=2e-2, atol=2e-3)


def test_fast_in_a_graph():
    """Captured with its plan, and replayed over other queries."""
    case = make_16_bit("decode")
    fp8 = make_fp8(case, "group")
    plan = plan_of(case, kv_format="group", config=FAST)
    graph, _ = capture(lambda: fp8.call(out=case.out, lse=case.lse, plan=plan))
    case.q_nope.copy_(case.q_nope.flip(1))
    case.q_pe.mul_(0.5)
    fp8.reset()
    graph.replay()
    verdict = judge_fp8(fp8, expected_fp8(fp8, accuracy="fast"))
    assert verdict.ok, verdict
    out, lse = bits(case.out).clone(), bits(case.lse).clone()
    graph.replay()
    assert int(other_bits(case, out, lse)) == 0


@pytest.mark.parametrize("layout", ["tensor", "token", "group"])
def test_where_fast_is_as_high_no_bit_changes(layout):
    """tile16 and row tiles of 32 rows with queries of both kinds, those of 64 with e4m3 queries."""
    for num_heads, q_fp8 in ((16, False), (16, True), (32, False), (32, True), (128, True)):
        case = make_case([3000, 70], num_heads=num_heads, page_size=64, device="cuda")
        fp8 = make_fp8(case, layout, q_fp8)
        high, fast = fp8.call(config=HIGH), fp8.call(config=FAST)
        assert compare_fp8(*fast, expected_fp8(fp8)).ok
        assert all(same_bits(a, b) for a, b in zip(high, fast, strict=True))
    tile16 = dataclasses.replace(FAST, fp8_kernel="tile16", cut_unit=1)
    fp8 = make_fp8(make_case([3000, 70], num_heads=64, page_size=64, device="cuda"), layout)
    assert run_fp8(fp8, config=tile16).ok


@pytest.mark.parametrize("layout", ["group", "group656"])
def test_fast_is_as_high_where_the_cache_is_converted(layout):
    fp8 = make_fp8(make_16_bit("prefill"), layout)
    assert plan_of(fp8.case, kv_format="group", config=None).selection.converts
    high, fast = fp8.call(config=HIGH), fp8.call(config=FAST)
    rows = fp8.case.queries[-1]
    assert all(same_bits(a[:rows], b[:rows]) for a, b in zip(high, fast, strict=True))


def test_fast_over_16_bit_caches_is_as_high():
    for num_heads in (16, 128):
        case = make_case([3000, 70], num_heads=num_heads, page_size=64, device="cuda")
        high, fast = case.call(config=HIGH), case.call(config=FAST)
        assert all(same_bits(a, b) for a, b in zip(high, fast, strict=True))
