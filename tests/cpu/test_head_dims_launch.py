"""Head dimensions other than 512 + 64: which step a plan asks for, what it is launched with, the short way to it."""

import dataclasses
import math
import types

import pytest
import torch
from head_dims_case import EVERY_PAIR, OTHER_PAIR, WITHOUT_ROPE, as_none, decode_case, prefill_case

import mla_cute
from mla_cute import launch, plan, short_way
from mla_cute.call import DECODE, Call, call_of, without_rope
from mla_cute.check import check
from mla_cute.compile import jit
from mla_cute.dims import HeadDims
from mla_cute.kernels import registry
from mla_cute.testing.fp8 import make_fp8


def stored(case, fp8):
    """The case and the scales of its call: as it is, or over format tensor with e4m3 queries."""
    if not fp8:
        return case, {}
    quantised = make_fp8(case, "tensor", True)
    return quantised.case, quantised.scales


def problem_of(case, **options):
    """What the checks make of a case."""
    options = {"kv_last_page_len": case.kv_last_page_len} | options
    return check(call_of(case.pages.form, *case.csr_args, **options))


@EVERY_PAIR
@pytest.mark.parametrize("make", [decode_case, prefill_case])
def test_the_step_of_a_plan_has_the_head_dims(monkeypatch, make, dims):
    asked = []
    monkeypatch.setattr(plan, "num_sms", lambda device: 132)
    monkeypatch.setattr(jit, "get", lambda kernel, key, config: asked.append(key) or (lambda *a: None))
    case = make(dims)
    meta = torch.device("meta")
    indptr = torch.zeros(7, dtype=torch.int32, device=meta)
    if make is decode_case:
        made = mla_cute.plan_decode(indptr, num_heads=3, page_size=16)
        key = registry.DecodeKey("bfloat16", 16, dims=dims)
    else:
        made = mla_cute.plan_prefill(indptr, indptr, num_heads=3, page_size=16, total_q=case.total_q)
        key = registry.PrefillKey("bfloat16", 16, dims=dims)
    fp8 = make_fp8(case, "tensor", True)
    for each, options, want in (
        (case, {}, key),
        (fp8.case, fp8.scales, registry.Fp8Key("bfloat16", 16, "tensor", True, dims=dims)),
    ):
        problem = problem_of(each, **options)
        assert problem.dims == dims
        asked.clear()
        made.launcher(dataclasses.replace(problem, device=meta), made.form)
        assert asked == [want]


def launched(case, packs_rows=False, **options):
    """The arguments that the step of this call gets."""
    of_round = plan.Round(0, 6, "table", "scratch", (5, 6, 7), ())
    stand_in = types.SimpleNamespace(
        has_work=True, packs_rows=packs_rows, part="part", rounds=(of_round,), verifies=False, form=DECODE
    )
    recorded = []
    call = call_of(case.pages.form, *case.csr_args, kv_last_page_len=case.kv_last_page_len, **options)
    launch.launch(lambda *got: recorded.append(got), check(call), stand_in, call)
    (got,) = recorded
    return got


def is_same(got, x):
    return (got.dtype, got.data_ptr(), got.shape, got.stride()) == (x.dtype, x.data_ptr(), x.shape, x.stride())


@EVERY_PAIR
@pytest.mark.parametrize("make", [decode_case, prefill_case])
@pytest.mark.parametrize("fp8", [False, True])
def test_what_the_step_is_launched_with(make, fp8, dims):
    case, options = stored(make(dims), fp8)
    for each in (case, as_none(case))[: 1 if dims.kpe else 2]:
        q_nope, q_pe, ckv, kpe, *rest = launched(each, **options)
        assert is_same(q_nope, case.q_nope)
        assert is_same(ckv, case.ckv_cache)
        if dims.kpe:
            assert is_same(q_pe, case.q_pe)
            assert is_same(kpe, case.kpe_cache)
        else:
            assert q_pe is q_nope
            assert kpe is ckv
        out = rest[4 if fp8 else 3]
        assert out.shape == (*case.q_nope.shape[:2], dims.ckv)
        if fp8:
            per_score = case.sm_scale * math.log2(math.e)
            assert rest[9] == pytest.approx(options["ckv_scale"] * options["q_scale"] * per_score)


@WITHOUT_ROPE
def test_uneven_rows_without_rope_are_copied_once(dims):
    case = prefill_case(dims, q_layout="batch_strided")
    q_nope, q_pe, *_ = launched(case, packs_rows=True)
    assert q_pe is q_nope
    assert launch.rows_are_even(q_nope)
    rows = case.queries[-1]
    assert torch.equal(q_nope[:rows], case.q_nope[:rows])


# ------------------------------------------------------------------------------------------------ None, the short way


def test_what_stands_for_no_rope_part():
    case = decode_case(HeadDims(256, 0))
    call = call_of(DECODE, *case.csr_args)
    assert without_rope(call) is call
    none = tuple(call._replace(q_pe=None, cache=call.cache._replace(kpe=None)))
    made = Call(*without_rope(none))
    assert made.q_pe.shape == (*case.q_nope.shape[:2], 0)
    assert made.q_pe.dtype is made.q_nope.dtype
    assert made.cache[1].shape == (*case.ckv_cache.shape[:2], 0)
    for alone in (call._replace(q_pe=None), call._replace(cache=call.cache._replace(kpe=None))):
        assert without_rope(alone) is alone
    wrong = (None, None, ("no tensor", None, 1.0, 1.0, None), *none[3:])
    assert without_rope(wrong)[:2] == (None, None)


def usual_of(monkeypatch, case, **options):
    """The short way's look at calls like that on this case."""
    problem = problem_of(case, **options)
    monkeypatch.setattr(short_way, "current_device", lambda: None)  # the index of the CPU
    stand_in = types.SimpleNamespace(packs_rows=False, grid=(5, 6, 7))
    return short_way._usual(problem, stand_in, "no scales")


def fields_of(case, **options):
    call = call_of(DECODE, *case.csr_args, kv_last_page_len=case.kv_last_page_len, **options)
    return tuple(call)


@OTHER_PAIR
@pytest.mark.parametrize("fp8", [False, True])
def test_the_short_way(monkeypatch, fp8, dims):
    case, options = stored(decode_case(dims), fp8)
    usual = usual_of(monkeypatch, case, **options)
    operands, out, _, numbers = usual(fields_of(case, **options))
    assert out.shape == (*case.q_nope.shape[:2], dims.ckv)
    assert numbers[:3] == (5, 6, 7)
    want = (case.q_nope, case.q_pe, case.ckv_cache, case.kpe_cache)
    if not dims.kpe:
        want = (case.q_nope, case.q_nope, case.ckv_cache, case.ckv_cache)
        none = as_none(case)
        for x, y in zip(usual(fields_of(none, **options))[0], operands, strict=True):
            assert x is y
    for got, x in zip(operands, want, strict=False):
        assert is_same(got, x)
    other = HeadDims(768 - dims.ckv, dims.kpe)
    assert usual(fields_of(decode_case(other), **options)) is None, "another ckv"


@WITHOUT_ROPE
@pytest.mark.parametrize("fp8", [False, True])
def test_the_short_way_lets_no_other_rope_part_through(monkeypatch, fp8, dims):
    """What stands for the rope part hides its width from the launcher."""
    case, options = stored(decode_case(dims), fp8)
    usual = usual_of(monkeypatch, case, **options)
    assert usual(fields_of(case, **options)) is not None
    with_rope = decode_case(HeadDims(dims.ckv, 64))
    q_dtype, dtype = case.q_nope.dtype, case.ckv_cache.dtype
    for changes in (
        {"q_pe": with_rope.q_pe.to(q_dtype), "kpe_cache": with_rope.kpe_cache.to(dtype)},
        {"q_pe": with_rope.q_pe.to(q_dtype)},
        {"kpe_cache": with_rope.kpe_cache.to(dtype)},
        {"q_pe": case.q_pe[:1]},
        {"kpe_cache": case.kpe_cache[:1]},
        {"q_pe": case.q_pe.float()},
        {"kpe_cache": case.kpe_cache.float()},
        {"q_pe": case.q_pe.to("meta")},
    ):
        assert usual(fields_of(dataclasses.replace(case, **changes), **options)) is None
    if fp8:
        assert usual(fields_of(case, **options | {"kpe_scale": 2.0})) is None
        assert usual(fields_of(case, **options | {"kpe_scale": torch.ones(1)})) is None
