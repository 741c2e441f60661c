"""Prefill that converts an FP8 cache to 16 bits first: against the float32 reference, and the 16-bit call over the
cache as torch converts it. Poisoned inputs and guarded outputs in every test."""

import dataclasses

import pytest
import torch
from gpu_helpers import ENTRIES, MIXED, capture, owned, plan_of, same_bits
from gpu_helpers import check_fp8 as check

import mla_cute
from mla_cute import convert
from mla_cute.kernels.registry import CONVERT_ROWS
from mla_cute.testing.cases import DecodeCase
from mla_cute.testing.fp8 import Fp8Case, expected_fp8, judge_fp8, make_fp8, run_fp8
from mla_cute.testing.prefill import make_prefill_case

CONVERT, AS_IT_IS = (mla_cute.KernelConfig(fp8_kernel=kernel) for kernel in ("convert", "tile64"))
# Format (group656: in one buffer of rows of 656 bytes) and e4m3 queries. Those over "tensor" are not converted.
CONVERTED = (
    ("tensor", False),
    ("token", False),
    ("token", True),
    ("group", False),
    ("group", True),
    ("group656", False),
)
EVERY = pytest.mark.parametrize(("layout", "q_fp8"), CONVERTED)
# Where nothing is rounded under POWERS_OF_TWO, and else nothing but the rope part.
EXACT = pytest.mark.parametrize(("layout", "q_fp8"), [x for x in CONVERTED if x[0] != "token"])
# What rounding ckv times its scale to bfloat16 may cost, of the output's norm and of lse.
ROUNDED_ERROR, ROUNDED_LSE = 6e-3, 3e-2
POWERS_OF_TWO = {"ckv_scale": 2.0**-6, "kpe_scale": 2.0**-5, "q_scale": 2.0**-4}


def make(layout, q_fp8, requests=MIXED, num_heads=16, page_size=64, fp8=None, **kwargs) -> Fp8Case:
    sizes = {"num_heads": num_heads, "page_size": page_size}
    case = make_prefill_case(requests, dtype=torch.bfloat16, device="cuda", **sizes, **kwargs)
    return make_fp8(case, layout, q_fp8, **fp8 or {})


def in_torch(fp8: Fp8Case) -> DecodeCase:
    """The case over the cache and of the queries that torch converts. Scales of whole tensors have to be powers of two:
    then it is no matter where they are multiplied in."""
    real = fp8.real()
    names = ("q_nope", "q_pe", "ckv_cache", "kpe_cache")
    return dataclasses.replace(real, **{name: getattr(real, name).to(torch.bfloat16) for name in names})


@pytest.mark.parametrize("page_size", [64, 24, 1])
@EVERY
def test_what_is_converted(layout, q_fp8, page_size):
    """Bit for bit, and no page but those of requests has an id."""
    fp8 = make(layout, q_fp8, page_size=page_size, fp8=POWERS_OF_TWO)
    case, converted = fp8.case, in_torch(fp8)
    plan = plan_of(case, kv_format=fp8.kv_format, q_fp8=q_fp8, config=CONVERT)
    fp8.call(plan=plan)
    step, plan._again, given = plan._launch, None, []
    step._step = lambda *args: given.append(args)
    fp8.call(plan=plan)
    ((q_nope, q_pe, ckv, kpe, ids, *_),) = given
    # Scales of whole tensors are left to the 16-bit kernel.
    of_ckv = fp8.scales.get("ckv_scale", 1.0)
    rows = case.queries[-1]
    if q_fp8:
        q_scale = fp8.scales["q_scale"]
        assert same_bits(q_nope[:rows], converted.q_nope[:rows] / q_scale)
        assert same_bits(q_pe[:rows], converted.q_pe[:rows] / q_scale)
    for b, length in enumerate(case.lengths):
        first = int(case.kv_indptr[b])
        pages = -(-length // page_size)
        own = slice(first, first + pages)
        source = case.kv_indices[own].long()
        assert ids[own].tolist() == list(range(first, first + pages))
        for have, want in ((ckv, converted.ckv_cache), (kpe, converted.kpe_cache)):
            have, want = (x.reshape(-1, x.shape[-1])[:length] for x in (have[own], want[source] / of_ckv))
            assert same_bits(have, want)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("num_heads", "page_size"), [(16, 64), (128, 64), (5, 16), (16, 1), (64, 24)])
@EVERY
def test_as_the_16_bit_call(layout, q_fp8, num_heads, page_size, causal):
    """Over what torch converts: every kind of request, through both forms of metadata; with a plan the same bits every
    time. The compiler contracts other products than in the 16-bit kernel, so that some P are rounded to the other side:
    a tenth of what rounding P costs."""
    fp8 = make(layout, q_fp8, num_heads=num_heads, page_size=page_size, causal=causal, fp8=POWERS_OF_TWO)
    converted = in_torch(fp8)
    for entry in ENTRIES:
        fp8.reset()
        # The same memory, so that outputs lie in the guarded buffers of the case.
        converted.call(entry, out=fp8.case.out, lse=fp8.case.lse, config=CONVERT)
        want, want_lse = owned(fp8.case)
        seen = want_lse.isfinite()
        plan = plan_of(fp8.case, entry, kv_format=fp8.kv_format, q_fp8=q_fp8, config=CONVERT)
        first = None
        for options in ({"plan": plan}, {"config": CONVERT}, {"plan": plan}, {"plan": plan.update()}):
            fp8.reset()
            fp8.call(entry, out=fp8.case.out, lse=fp8.case.lse, **options)
            out, lse = owned(fp8.case)
            first = first or (out, lse)
            assert all(map(same_bits, (out, lse), first)), "the same call again"
            assert (out.float() - want.float()).norm() < 2e-4 * want.float().norm()
            assert torch.equal(lse.isfinite(), seen)
            assert (lse - want_lse)[seen].abs().max() < 1e-5
            assert fp8.case.guarded_out.intact(fp8.case.queries[-1])
            assert fp8.case.guarded_lse.intact(fp8.case.queries[-1])


@pytest.mark.parametrize(("num_heads", "page_size"), [(16, 64), (128, 16)])
@EXACT
def test_errors_are_those_of_the_fp8_kernels(layout, q_fp8, num_heads, page_size):
    fp8 = make(layout, q_fp8, num_heads=num_heads, page_size=page_size)
    expected = expected_fp8(fp8)
    for entry in ENTRIES:
        check(fp8, expected=expected, entry=entry, config=CONVERT)


@pytest.mark.parametrize("q_fp8", [False, True])
def test_what_rounding_costs(q_fp8):
    """Where scales are no powers of two."""
    fp8 = make("token", q_fp8)
    verdict = run_fp8(fp8, config=CONVERT)
    assert verdict.relative_error < ROUNDED_ERROR, verdict
    assert verdict.lse_error < ROUNDED_LSE, verdict


@pytest.mark.parametrize("on_device", [False, True])
@EXACT
def test_scales_that_float16_could_not_hold(layout, q_fp8, on_device):
    fp8 = make(layout, q_fp8, [(64, 700), (80, 80)], 16)
    for name, value in fp8.scales.items():
        factor = 2.0**-30 if name.startswith("ckv") else 1.0
        if isinstance(value, torch.Tensor):
            value.mul_(factor)
        else:
            value *= factor
            fp8.scales[name] = torch.tensor(value, device="cuda") if on_device else value
    check(fp8, config=CONVERT)


@pytest.mark.parametrize(("layout", "q_fp8"), [("tensor", False), ("token", False), ("group", False), ("group", True)])
def test_from_how_many_rows_on(layout, q_fp8):
    """By default as many rows a request convert, fewer do not, nor does format token."""
    tokens = CONVERT_ROWS.get((layout, q_fp8), 2048) // 16
    for q_len, config in ((tokens, AS_IT_IS if layout == "token" else CONVERT), (tokens - 1, AS_IT_IS)):
        fp8 = make(layout, q_fp8, [(q_len, 900), (q_len, 333)], 16, fp8=POWERS_OF_TWO, total_q=2 * q_len)
        check(fp8)
        got = owned(fp8.case)
        check(fp8, config=config)
        for x, want in zip(owned(fp8.case), got, strict=True):
            assert same_bits(x, want)


@pytest.mark.parametrize(("layout", "q_fp8"), [("tensor", False), ("group", True)])
def test_by_default_no_rope_is_rounded(layout, q_fp8):
    fp8 = make(layout, q_fp8, num_heads=128, fp8={"kpe_scale": 0.09, "q_scale": 0.07})
    check(fp8, config=AS_IT_IS)
    want = owned(fp8.case)
    check(fp8)
    assert all(map(same_bits, owned(fp8.case), want))


@EXACT
def test_without_room_for_a_converted_cache(layout, q_fp8, monkeypatch):
    fp8 = make(layout, q_fp8)
    check(fp8, config=AS_IT_IS)
    want = owned(fp8.case)
    monkeypatch.setattr(convert, "MOST_CONVERTED_BYTES", 1000)
    check(fp8, config=CONVERT)
    assert all(map(same_bits, owned(fp8.case), want))


@pytest.mark.parametrize("page_size", [64, 24, 1])
@EXACT
def test_a_block_table_with_rows_far_apart(layout, q_fp8, page_size, monkeypatch):
    """As an engine has it: a view of a few columns of a table that has room for its longest context. Only pages of
    those columns are copied, without a gap; the bits are those of the same pages in lists."""
    fp8 = make(layout, q_fp8, page_size=page_size, fp8=POWERS_OF_TWO)
    case = fp8.case
    check(fp8, config=CONVERT)
    want = owned(case)
    rows, columns = case.block_table.shape
    wide = torch.full((rows, 40_000), 2**30, dtype=torch.int32, device="cuda")
    wide[:, :columns] = case.block_table
    case.block_table = wide[:, :columns]
    monkeypatch.setattr(convert, "MOST_CONVERTED_BYTES", rows * columns * page_size * 576 * 2)
    plan = plan_of(case, "block_table", kv_format=fp8.kv_format, q_fp8=q_fp8, config=CONVERT)
    for _ in range(2):
        check(fp8, entry="block_table", plan=plan)
        assert all(map(same_bits, owned(case), want))
        plan._launch._over_fp8 = None  # the next call has to convert


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(("layout", "q_fp8"), [("tensor", False), ("group656", False), ("group", True)])
def test_in_a_graph(layout, q_fp8, entry):
    """A captured step converts the cache anew at every replay, with other lengths, pages and values."""
    room = {"total_q": 400, "num_pages": 2000, "num_indices": 2000, "max_pages": 60, "fp8": POWERS_OF_TWO}
    first, second = (
        make(layout, q_fp8, [(90 + 3 * b + i, 700 * ((b + i) % 5) + 2) for b in range(4)], seed=i, **room)
        for i in range(2)
    )
    plan = plan_of(first.case, entry, kv_format=first.kv_format, q_fp8=q_fp8)
    assert plan.selection.converts

    def run():
        plan.update()
        return first.call(entry, plan=plan, out=first.case.out, lse=first.case.lse)

    graph, _ = capture(run)
    for fp8 in (first, second):
        first.load(fp8)
        first.reset()
        graph.replay()
        verdict = judge_fp8(first, expected_fp8(first))
        assert verdict.ok, verdict


def test_more_requests_than_the_planner_keeps_in_shared_memory():
    requests = [(1 + b % 3, 1 + 37 * (b % 50)) for b in range(1500)]
    check(make("group", False, requests), config=CONVERT)


def test_other_outputs_and_invariant_plans_are_not_converted():
    fp8 = make("group", False)
    check(fp8, config=AS_IT_IS, batch_invariant=True)
    want = owned(fp8.case)
    check(fp8, config=CONVERT, batch_invariant=True)
    assert all(map(same_bits, owned(fp8.case), want))
    half = make_fp8(make_prefill_case(MIXED, num_heads=16, page_size=64, dtype=torch.float16, device="cuda"), "group")
    check(half, config=AS_IT_IS)
    want = owned(half.case)
    check(half, config=CONVERT)
    assert all(map(same_bits, owned(half.case), want))
