"""Calls like one before, which go past the checks: right values, the same refusals, and whatever differs goes back."""

import pytest
import torch
from gpu_helpers import ENTRIES, MIXED, check, check_fp8, decode, make_prefill, plan_of, same_bits

import mla_cute
from mla_cute import api, attend
from mla_cute.testing.cases import make_case
from mla_cute.testing.fp8 import E4M3, make_fp8

CALLS = pytest.mark.parametrize("with_plan", [False, True], ids=["no_plan", "plan"])
BOTH_ENTRIES = pytest.mark.parametrize("entry", ENTRIES)


def small_case(**kwargs):
    return make_case(**{"lengths": [300, 0, 1, 2000], "num_heads": 16, "page_size": 64, "device": "cuda"} | kwargs)


@pytest.fixture
def ways(monkeypatch):
    """How many calls took the short way, and how many another."""
    taken = {"short": 0, "long": 0}
    whole, long = attend.attend, attend._long_way

    def counted(*arguments):
        before = taken["long"]
        result = whole(*arguments)
        taken["short"] += taken["long"] == before
        return result

    def counted_long(*arguments):
        taken["long"] += 1
        return long(*arguments)

    monkeypatch.setattr(api, "attend", counted)
    monkeypatch.setattr(attend, "_long_way", counted_long)
    return taken


def fresh_inputs(case):
    for x in (case.q_nope, case.q_pe):
        x.copy_(torch.randn_like(x, dtype=torch.float32))


@CALLS
@BOTH_ENTRIES
@pytest.mark.parametrize(("num_heads", "page_size"), [(16, 64), (128, 64), (5, 1), (1, 16)])
def test_decode(ways, entry, num_heads, page_size, with_plan):
    case = small_case(num_heads=num_heads, page_size=page_size)
    plan = plan_of(case, entry) if with_plan else None
    for _ in range(3):
        fresh_inputs(case)
        check(case, entry=entry, plan=plan)
        check(case, entry=entry, plan=plan, lse_base="e")
    assert ways["short"] == 5


@CALLS
@BOTH_ENTRIES
def test_results_are_allocated_as_on_the_long_way(ways, entry, with_plan):
    case = small_case()
    plan = plan_of(case, entry) if with_plan else None
    first = decode(case, entry, plan=plan)
    again = decode(case, entry, plan=plan)
    assert ways == {"short": 1, "long": 1}
    for x, y in zip(first, again, strict=True):
        assert (x.shape, x.dtype, x.stride(), x.device) == (y.shape, y.dtype, y.stride(), y.device)
        assert same_bits(x, y)
    assert same_bits(decode(case, entry, plan=plan, return_lse=False), first[0])


@CALLS
@BOTH_ENTRIES
@pytest.mark.parametrize("num_heads", [16, 128])
def test_prefill(ways, entry, num_heads, with_plan):
    case = make_prefill(MIXED, num_heads=num_heads)
    plan = plan_of(case, entry) if with_plan else None
    for _ in range(2):
        fresh_inputs(case)
        check(case, entry=entry, plan=plan)
    assert ways["short"] == 1


@CALLS
@pytest.mark.parametrize("num_heads", [16, 128])
@pytest.mark.parametrize("q_fp8", [False, True], ids=["q16", "q8"])
@pytest.mark.parametrize("layout", ["tensor", "token", "group656"])
def test_fp8(ways, layout, q_fp8, num_heads, with_plan):
    fp8 = make_fp8(small_case(num_heads=num_heads), layout, q_fp8)
    plan = plan_of(fp8.case, kv_format=fp8.kv_format, q_fp8=q_fp8) if with_plan else None
    for _ in range(3):
        check_fp8(fp8, plan=plan)
    assert ways["short"] == 2
    on_device = {
        name: torch.tensor([x], dtype=torch.float32, device="cuda")
        for name, x in fp8.scales.items()
        if isinstance(x, float)
    }
    check_fp8(fp8, plan=plan, **on_device)
    assert ways["short"] == 3
    check_fp8(fp8, plan=plan, **{name: x.squeeze() for name, x in on_device.items()})


@pytest.mark.parametrize("num_heads", [16, 128])
@pytest.mark.parametrize("prefill", [False, True])
def test_scales_on_the_device_are_read_when_the_graph_runs(num_heads, prefill):
    case = make_prefill(MIXED, num_heads=num_heads) if prefill else small_case(num_heads=num_heads)
    fp8 = make_fp8(case, "tensor", True)
    scales = {name: torch.tensor([x], dtype=torch.float32, device="cuda") for name, x in fp8.scales.items()}
    plan = plan_of(case, kv_format="tensor", q_fp8=True)
    stream = torch.cuda.Stream()

    def run():
        return fp8.call(plan=plan, out=case.out, lse=case.lse, **scales)

    torch.cuda.synchronize()  # inputs and plan are made on another stream
    with torch.cuda.stream(stream):
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
    for name, scale in scales.items():
        fp8.scales[name] *= 1.5
        scale.fill_(fp8.scales[name])
    fp8.reset()
    graph.replay()
    torch.cuda.synchronize()
    got = case.out.clone(), case.lse.clone()
    check_fp8(fp8, plan=plan)
    rows = case.queries[-1]
    assert torch.allclose(got[1][:rows], case.lse[:rows], atol=1e-3, equal_nan=True)
    assert torch.allclose(got[0][:rows].float(), case.out[:rows].float(), rtol=2**-6, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_on_the_device_are_verified_in_check_mode(monkeypatch, value):
    fp8 = make_fp8(small_case(), "tensor")
    monkeypatch.setenv("MLA_CUTE_CHECK", "1")
    for name in fp8.scales:
        bad = torch.tensor([value], dtype=torch.float32, device="cuda")
        with pytest.raises(ValueError, match=f"^{name}: expected a positive number"):
            fp8.call(**{name: bad})


@CALLS
def test_an_output_of_another_dtype_does_not_stay_the_default(ways, with_plan):
    fp8 = make_fp8(small_case(), "tensor", True)
    plan = plan_of(fp8.case, kv_format="tensor", q_fp8=True) if with_plan else None
    half = torch.empty(fp8.case.q_nope.shape, dtype=torch.float16, device="cuda")
    for _ in range(2):
        assert fp8.call(plan=plan, out=half)[0] is half
        assert fp8.call(plan=plan)[0].dtype is torch.bfloat16


@CALLS
@pytest.mark.parametrize("page_size", [1, 64])
def test_strides_of_dimensions_of_size_1(page_size, with_plan):
    """TMA would refuse them; neither the launcher nor any load reads them."""
    case = make_case([page_size], num_heads=1, page_size=page_size, num_pages=1, device="cuda")
    plan = plan_of(case) if with_plan else None
    check(case, plan=plan)
    check(case, plan=plan)
    for name in ("q_nope", "q_pe", "ckv_cache", "kpe_cache"):
        x = getattr(case, name)
        strides = [7 if n == 1 else step for n, step in zip(x.shape[:2], x.stride()[:2], strict=True)]
        setattr(case, name, x.as_strided(x.shape, (*strides, 1)))
        check(case, plan=plan)


@BOTH_ENTRIES
def test_plans_follow_their_metadata(ways, entry):
    case, other = (
        small_case(num_pages=60, num_indices=80, max_pages=40),
        small_case(lengths=[17, 2100, 64, 0], num_pages=60, num_indices=80, max_pages=40, seed=3),
    )
    plan = plan_of(case, entry)
    check(case, entry=entry, plan=plan)
    case.load(other)
    plan.update()
    check(case, entry=entry, plan=plan)
    assert ways["short"] == 1


# what is changed, how, what the message says
CHANGES = [
    ("q_nope", lambda x: x.float(), TypeError, "q_nope: expected dtype"),
    ("q_nope", lambda x: x[:, :, :-8], ValueError, "q_nope: expected shape"),
    ("q_nope", lambda x: x.cpu(), ValueError, "expected device"),
    ("q_pe", lambda x: x.half(), TypeError, "q_pe: expected dtype"),
    ("q_pe", lambda x: x[:-1], ValueError, "q_pe: expected shape"),
    ("q_pe", lambda x: x[:, :-1], ValueError, "q_pe: expected shape"),
    ("ckv_cache", lambda x: x[..., ::2].repeat_interleave(2, -1)[..., ::2], ValueError, "ckv_cache: expected shape"),
    ("ckv_cache", lambda x: x.half(), TypeError, "ckv_cache: expected dtype"),
    ("ckv_cache", lambda x: x[:-1], ValueError, "kpe_cache: expected shape"),
    ("kpe_cache", lambda x: x[:, :-1], ValueError, "kpe_cache: expected shape"),
    ("kpe_cache", lambda x: x.cpu(), ValueError, "kpe_cache: expected device"),
    ("kv_indices", lambda x: x.long(), TypeError, "kv_indices: expected dtype"),
    ("kv_indices", lambda x: x.cpu(), ValueError, "kv_indices: expected device"),
    ("kv_indices", lambda x: x[None], ValueError, "kv_indices: expected shape"),
    ("kv_indices", lambda x: x.repeat_interleave(2)[::2], ValueError, "kv_indices: expected stride 1"),
    ("sm_scale", lambda x: 0.0, ValueError, "sm_scale: expected a positive number"),
    ("sm_scale", lambda x: "1", TypeError, "sm_scale: expected a Python number"),
]
OPTIONS = [
    ({"lse_base": 3}, ValueError, "lse_base: expected 2 or 'e'"),
    ({"lse_base": True}, TypeError, "lse_base: expected 2 or 'e'"),
    ({"ckv_scale": 2.0}, ValueError, "ckv_scale: expected 1.0"),
    ({"return_lse": 1}, TypeError, "return_lse: expected True or False"),
]


def refused(case, exception, message, **options):
    case.guarded_out.reset()
    case.guarded_lse.reset()
    with pytest.raises(exception, match=message):
        decode(case, **{"out": case.out, "lse": case.lse} | options)
    torch.cuda.synchronize()
    assert case.guarded_out.untouched()
    assert case.guarded_lse.untouched()


@CALLS
@pytest.mark.parametrize(("name", "change", "exception", "message"), CHANGES)
def test_what_is_wrong_behind_a_good_call_is_refused(name, change, exception, message, with_plan):
    case = small_case(lengths=[9, 0, 1, 24], page_size=8)
    plan = plan_of(case) if with_plan else None
    check(case, plan=plan)
    check(case, plan=plan)
    setattr(case, name, change(getattr(case, name)))
    refused(case, exception, message, plan=plan)


@CALLS
@pytest.mark.parametrize(("options", "exception", "message"), OPTIONS)
def test_wrong_options_behind_a_good_call_are_refused(options, exception, message, with_plan):
    case = small_case(lengths=[9, 0, 1, 24], page_size=8)
    plan = plan_of(case) if with_plan else None
    check(case, plan=plan)
    refused(case, exception, message, plan=plan, **options)


@CALLS
def test_wrong_outputs_behind_a_good_call_are_refused(with_plan):
    case = small_case(lengths=[9, 0, 1, 24], page_size=8)
    plan = plan_of(case) if with_plan else None
    check(case, plan=plan)
    for out, message in (
        (case.q_nope, "out: expected memory of its own"),
        (case.out.float(), "out: expected dtype"),
        (case.out[:-1], "out: expected shape"),
        (case.out[:1].expand(4, -1, -1), "out: expected memory for every element"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            decode(case, plan=plan, out=out)
    for lse, message in (
        (case.lse.double(), "lse: expected dtype"),
        (case.lse[:, :-1], "lse: expected shape"),
        (case.lse.t().contiguous().t(), "lse: expected a contiguous"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            decode(case, plan=plan, lse=lse)


def test_gradients_are_warned_of_behind_a_good_call():
    from mla_cute import attend

    case = small_case()
    plan = plan_of(case)
    check(case, plan=plan)
    attend._warn_once.cache_clear()
    case.q_nope.requires_grad_()
    with pytest.warns(UserWarning, match="computes no gradients"):
        out, _ = decode(case, plan=plan)
    assert not out.requires_grad


def test_tuned_entries_that_are_forgotten_are_not_used(ways):
    case = small_case()
    check(case)
    mla_cute.tuned.select.clear()
    check(case)
    check(case)
    assert ways == {"short": 1, "long": 2}


@CALLS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("through_op", [False, True])
def test_autocast_changes_nothing(dtype, through_op, with_plan):
    case = small_case()
    plan = plan_of(case) if with_plan else None
    call = (mla_cute.ops if through_op else mla_cute).mla_paged_decode
    want = call(*case.csr_args, kv_last_page_len=case.kv_last_page_len, plan=plan)
    for _ in range(2):
        with torch.autocast("cuda", dtype):
            got = call(*case.csr_args, kv_last_page_len=case.kv_last_page_len, plan=plan)
        assert same_bits(got[0], want[0])
        assert same_bits(got[1], want[1])


def test_e4m3_tensors_go_in_as_they_are():
    """What the short way relies on; torch from 2.10 on exports them."""
    from mla_cute import dlpack

    assert dlpack.exports_e4m3() or tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10)
    assert E4M3 is torch.float8_e4m3fn
