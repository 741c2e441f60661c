"""FP8 calls: which are legal, and what each wrong argument raises."""

import math
import re

import pytest
import torch
from call_case import check_decode, decode_problem, prefill_problem
from fp8_call_case import (
    ARRAY,
    BF16,
    CHECKS,
    CPU,
    E4M3,
    FORM,
    FP16,
    HEADS,
    LAYOUT,
    NUM_PAGES,
    PAGE_SIZE,
    Q_FP8,
    TOTAL_Q,
    make_call,
)
from fp8_case import FORMAT_OF
from limits import functions_run

import mla_cute
from mla_cute import check as shared
from mla_cute.check import Problem

CALLS = {
    "decode": mla_cute.mla_paged_decode,
    "decode_table": mla_cute.mla_paged_decode_block_table,
    "prefill": mla_cute.mla_paged_prefill,
    "prefill_table": mla_cute.mla_paged_prefill_block_table,
}
DTYPE = pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])


def problem_of(form: str, dtype: torch.dtype, kv_format: str, q_fp8: bool) -> Problem:
    if "prefill" in form:
        return prefill_problem(4, TOTAL_Q, HEADS, PAGE_SIZE, NUM_PAGES, True, dtype, CPU, kv_format, q_fp8)
    return decode_problem(4, HEADS, PAGE_SIZE, NUM_PAGES, dtype, CPU, kv_format, q_fp8)


def zeros(*shape, dtype=BF16, device="cpu"):
    return torch.zeros(shape, device=device).to(dtype)


# ------------------------------------------------------------------------------------------------ legal calls


@FORM
@LAYOUT
@Q_FP8
@DTYPE
@pytest.mark.parametrize("early_exit", [True, False])
def test_legal_calls_pass(monkeypatch, form, layout, q_fp8, dtype, early_exit):
    """With the early exit taken out as well: what it accepts, the explanation has to accept."""
    if layout == "group656":
        dtype = BF16
    if not early_exit:
        monkeypatch.setattr(shared, "_usual_fp8", lambda *arguments: None)
    call = make_call(form, layout, q_fp8, dtype=dtype)
    want = problem_of(form, BF16 if layout == "tensor" and q_fp8 else dtype, FORMAT_OF[layout], q_fp8)
    got = call.check()
    assert got == want
    assert got.odd_strides is not early_exit
    assert call.check() is got, "a plan compares problems by identity"
    assert call.check(out=None, lse=None) == want
    assert call.untouched()


def test_problems_of_other_caches_differ():
    problems = [
        make_call(form, layout, q_fp8).check()
        for form in ("decode", "prefill")
        for layout in ("tensor", "token", "group")
        for q_fp8 in (False, True)
    ]
    problems += [problem_of(form, BF16, "", False) for form in ("decode", "prefill")]
    assert len(set(problems)) == len(problems) == 14


@FORM
@pytest.mark.parametrize("early_exit", [True, False])
def test_output_dtype(monkeypatch, form, early_exit):
    if not early_exit:
        monkeypatch.setattr(shared, "_usual_fp8", lambda *arguments: None)
    tensor = make_call(form, "tensor", True, outputs=False)
    rows = tensor.arguments["q_nope"].shape[0]
    assert tensor.check().dtype is BF16
    for dtype in (BF16, FP16):
        assert tensor.check(out=zeros(rows, HEADS, 512, dtype=dtype)).dtype is dtype
        for layout in ("token", "group"):
            call = make_call(form, layout, True, outputs=False, dtype=dtype)
            assert call.check().dtype is dtype, "q_pe's"
            assert call.check(out=zeros(rows, HEADS, 512, dtype=dtype)).dtype is dtype
        for layout in ("tensor", "token", "group"):
            assert make_call(form, layout, False, outputs=False, dtype=dtype).check().dtype is dtype


@FORM
@Q_FP8
def test_numbers_are_accepted_as_sm_scale_is(form, q_fp8):
    call = make_call(form, "tensor", q_fp8)
    want = call.check()
    for numbers in ({"ckv_scale": 2, "kpe_scale": 1}, {"ckv_scale": torch.tensor(0.5).item(), "sm_scale": 1}):
        assert call.check(**numbers) == want
        if q_fp8:
            assert call.check(**numbers, q_scale=3) == want
    numpy = pytest.importorskip("numpy", reason="numpy is not installed")
    assert call.check(ckv_scale=numpy.float64(0.5), kpe_scale=numpy.float32(0.5)) == want
    for one in (torch.tensor(0.5), torch.tensor([0.5]), torch.full((1, 1, 1), 0.5)):
        assert call.check(ckv_scale=one, kpe_scale=one) == want
    with_array = make_call(form, "token", q_fp8)
    assert with_array.check(ckv_scale=1, kpe_scale=1) == with_array.check()


def test_a_usual_call_is_checked_by_few_functions():
    for layout in ("tensor", "group"):
        call = make_call("decode", layout, False, outputs=False)
        names = ("q_nope", "q_pe", "ckv_cache", "kpe_cache", "kv_indptr", "kv_indices")
        tensors, scales = tuple(call.arguments[name] for name in names), call.fp8.scales
        assert functions_run(lambda: check_decode(*tensors, 0.1, **scales)) < 100, f"{layout}: 51 with Python 3.11"


# ------------------------------------------------------------------------------------------------ wrong arguments

HALF_CACHE = zeros(NUM_PAGES, PAGE_SIZE, 64)
NUMBER = "expected a Python number, got "
TENSOR = "expected a number or a tensor "
RANGE = "expected a positive number from 2^-126 to 2^126, got "


def bad_numbers(name):
    return [
        (
            name,
            torch.tensor(1.0, dtype=BF16),
            TypeError,
            TENSOR + "of dtype torch.float32, got a torch.Tensor of torch.bf",
        ),
        (name, torch.ones(2), ValueError, TENSOR + "of one element, got shape [2]"),
        (name, torch.ones(0), ValueError, TENSOR + "of one element, got shape [0]"),
        (name, torch.ones(1, device="meta"), ValueError, "expected device cpu (that of q_nope), got meta"),
        (name, "1", TypeError, NUMBER + "str '1'"),
        (name, None, TypeError, NUMBER + "NoneType"),
        (name, True, TypeError, NUMBER + "bool True"),
        (name, 1j, TypeError, NUMBER + "complex"),
        (name, 0.0, ValueError, RANGE + "0.0"),
        (name, 0, ValueError, RANGE + "0"),
        (name, -0.5, ValueError, RANGE + "-0.5"),
        (name, math.inf, ValueError, RANGE + "inf"),
        (name, math.nan, ValueError, RANGE + "nan"),
        (name, 1e39, ValueError, RANGE + "1e+39"),
        (name, 10**400, ValueError, "expected a positive number"),
    ]


def not_one(name, value, with_what):
    return [
        (name, value, ValueError, f"expected 1.0 with {with_what}, got {value}"),
        (name, math.nan, ValueError, f"expected 1.0 with {with_what}, got nan"),
        (name, torch.ones(()), TypeError, NUMBER + "a torch.Tensor of torch.float32"),
        (name, False, TypeError, NUMBER + "bool False"),
    ]


def bf16(name):
    return lambda a: a[name].float().to(BF16)


def of(name, change):
    return lambda a: change(a[name])


# layout, q_fp8, argument, value to put there, exception, what the message has to say behind the argument's name
BAD = [
    # the queries' dtype
    (
        "tensor",
        False,
        "q_nope",
        of("q_nope", torch.Tensor.float),
        TypeError,
        "torch.bfloat16 or torch.float16, got tor",
    ),
    ("token", False, "q_nope", of("q_nope", lambda x: x.to(torch.float8_e5m2)), TypeError, "got torch.float8_e5m2"),
    (
        "token",
        False,
        "q_pe",
        of("q_pe", lambda x: x.to(E4M3)),
        TypeError,
        "expected dtype torch.bfloat16 (that of q_no",
    ),
    (
        "tensor",
        False,
        "q_pe",
        of("q_pe", lambda x: x.to(FP16)),
        TypeError,
        "expected dtype torch.bfloat16 (that of q_no",
    ),
    (
        "tensor",
        True,
        "q_pe",
        bf16("q_pe"),
        TypeError,
        "expected dtype torch.float8_e4m3fn (that of kpe_cache), got torch",
    ),
    (
        "token",
        True,
        "q_pe",
        of("q_pe", lambda x: x.to(E4M3)),
        TypeError,
        "torch.bfloat16 or torch.float16 with a 16-bit k",
    ),
    ("group", True, "q_pe", of("q_pe", torch.Tensor.float), TypeError, "got torch.float32"),
    ("group", True, "q_pe", None, TypeError, "expected a torch.Tensor, got NoneType"),
    ("tensor", True, "q_nope", of("q_nope", lambda x: x[..., :500]), ValueError, "H, 512 or 256], got ["),
    ("tensor", True, "q_pe", of("q_pe", lambda x: x[:, :3]), ValueError, "got ["),
    # the caches' dtype
    (
        "tensor",
        True,
        "ckv_cache",
        bf16("ckv_cache"),
        None,
        "q_nope: expected dtype torch.bfloat16 or torch.float16 with a",
    ),
    (
        "tensor",
        False,
        "ckv_cache",
        bf16("ckv_cache"),
        None,
        "kpe_cache: expected dtype torch.bfloat16 (that of q_nope), g",
    ),
    ("tensor", True, "ckv_cache", of("ckv_cache", torch.Tensor.float), TypeError, "expected dtype torch.float8_e4m3fn"),
    (
        "tensor",
        False,
        "ckv_cache",
        of("ckv_cache", torch.Tensor.float),
        TypeError,
        "or torch.float8_e4m3fn, got torch.flo",
    ),
    ("tensor", False, "ckv_cache", of("ckv_cache", lambda x: x.view(torch.uint8)), TypeError, "got torch.uint8"),
    ("tensor", False, "ckv_cache", None, TypeError, "expected a torch.Tensor, got NoneType"),
    ("tensor", True, "ckv_cache", "cache", TypeError, "expected a torch.Tensor, got str"),
    (
        "tensor",
        False,
        "ckv_cache",
        of("ckv_cache", lambda x: x[0]),
        ValueError,
        "[num_pages, page_size, 512], got [8, 512]",
    ),
    (
        "tensor",
        False,
        "kpe_cache",
        HALF_CACHE,
        None,
        "ckv_scale_arr: expected a tensor of scales with a ckv_cache of tor",
    ),
    (
        "tensor",
        True,
        "kpe_cache",
        HALF_CACHE,
        None,
        "q_pe: expected dtype torch.bfloat16 or torch.float16 with a 16-bit",
    ),
    (
        "tensor",
        False,
        "kpe_cache",
        HALF_CACHE.to(FP16),
        TypeError,
        "expected dtype torch.bfloat16 (that of q_pe) or torch.f",
    ),
    (
        "token",
        True,
        "kpe_cache",
        HALF_CACHE.to(FP16),
        TypeError,
        "expected dtype torch.bfloat16 (that of q_pe) or torch.flo",
    ),
    (
        "token",
        False,
        "kpe_cache",
        HALF_CACHE.to(E4M3),
        None,
        "ckv_scale_arr: expected None with a kpe_cache of torch.float",
    ),
    ("group", False, "kpe_cache", HALF_CACHE[1:], ValueError, "expected shape [9, 8, 64], got [8, 8, 64]"),
    ("group", True, "kpe_cache", None, TypeError, "expected a torch.Tensor, got NoneType"),
    ("tensor", True, "kpe_cache", 3.0, TypeError, "expected a torch.Tensor, got float"),
    (
        "tensor",
        True,
        "kpe_cache",
        HALF_CACHE.float(),
        TypeError,
        "expected dtype torch.float8_e4m3fn (that of q_pe), got",
    ),
    (
        "tensor",
        False,
        "kpe_cache",
        HALF_CACHE.float(),
        TypeError,
        "(that of q_pe) or torch.float8_e4m3fn, got torch.float32",
    ),
    # scales per token
    (
        "tensor",
        False,
        "ckv_scale_arr",
        ARRAY,
        ValueError,
        "expected None with a kpe_cache of torch.float8_e4m3fn, got a",
    ),
    (
        "tensor",
        True,
        "ckv_scale_arr",
        1.0,
        ValueError,
        "expected None with a kpe_cache of torch.float8_e4m3fn, got float",
    ),
    (
        "token",
        False,
        "ckv_scale_arr",
        None,
        ValueError,
        "expected a tensor of scales with a ckv_cache of torch.float8_e4m",
    ),
    ("group", True, "ckv_scale_arr", 0.5, TypeError, "expected a torch.Tensor, got float 0.5"),
    ("group", True, "ckv_scale_arr", ARRAY.to(BF16), TypeError, "expected dtype torch.float32, got torch.bfloat16"),
    ("token", False, "ckv_scale_arr", ARRAY.double(), TypeError, "expected dtype torch.float32, got torch.float64"),
    ("token", False, "ckv_scale_arr", ARRAY[..., 0], ValueError, "expected shape [9, 8, 1 or 4], got [9, 8]"),
    ("token", False, "ckv_scale_arr", ARRAY[..., :2], ValueError, "expected shape [9, 8, 1 or 4], got [9, 8, 2]"),
    ("group", False, "ckv_scale_arr", ARRAY[1:], ValueError, "expected shape [9, 8, 1 or 4], got [8, 8, 4]"),
    ("group", False, "ckv_scale_arr", ARRAY[:, 1:], ValueError, "expected shape [9, 8, 1 or 4], got [9, 7, 4]"),
    ("group", False, "ckv_scale_arr", torch.tensor(1.0), ValueError, "expected shape [9, 8, 1 or 4], got []"),
    ("group", False, "ckv_scale_arr", ARRAY.to("meta"), ValueError, "expected device cpu (that of q_nope), got meta"),
    # numbers
    *(("tensor", False, *row) for name in ("ckv_scale", "kpe_scale") for row in bad_numbers(name)),
    *(("tensor", True, *row) for row in bad_numbers("q_scale")),
    *(("group", True, *row) for row in bad_numbers("q_scale")),
    *(("token", False, *row) for row in not_one("ckv_scale", 2.0, "ckv_scale_arr")),
    *(("group", True, *row) for row in not_one("kpe_scale", 0.5, "ckv_scale_arr")),
    *(("tensor", False, *row) for row in not_one("q_scale", 2.0, "16-bit queries")),
    *(("token", False, *row) for row in not_one("q_scale", 0.5, "16-bit queries")),
    ("tensor", False, "sm_scale", -1.0, ValueError, RANGE + "-1.0"),
    # outputs
    (
        "tensor",
        True,
        "out",
        zeros(4, 16, 512, dtype=torch.float32),
        TypeError,
        "expected dtype torch.bfloat16 or torch.f",
    ),
    ("tensor", True, "out", zeros(4, 16, 512, dtype=E4M3), TypeError, "got torch.float8_e4m3fn"),
    ("tensor", True, "out", [1], TypeError, "expected a torch.Tensor, got list"),
    (
        "tensor",
        False,
        "out",
        zeros(4, 16, 512, dtype=FP16),
        TypeError,
        "expected dtype torch.bfloat16 (that of q_nope)",
    ),
    (
        "token",
        True,
        "out",
        zeros(4, 16, 512, dtype=FP16),
        TypeError,
        "expected dtype torch.bfloat16 (that of q_pe), got",
    ),
    ("group", True, "out", zeros(3, 16, 512), ValueError, "16, 512], got [3, 16, 512]"),
    ("tensor", True, "lse", zeros(4, 16), TypeError, "expected dtype torch.float32, got torch.bfloat16"),
]


@FORM
@pytest.mark.parametrize(
    ("layout", "q_fp8", "name", "value", "exception", "says"),
    BAD,
    ids=[f"{row[0]}-{row[2]}-{i}" for i, row in enumerate(BAD)],
)
def test_bad_argument(form, layout, q_fp8, name, value, exception, says):
    call = make_call(form, layout, q_fp8)
    if exception is None:  # another argument is the wrong one, and `says` starts with its name
        expected = re.escape(says)
        exception = ValueError if says.startswith("ckv_scale_arr") else TypeError
    else:
        expected = f"{name}: .*{re.escape(says)}"
    call.arguments[name] = value(call.arguments) if callable(value) else value
    for function in (CHECKS[form], CALLS[form]):
        with pytest.raises(exception, match=f"^{expected}") as caught:
            function(**call.arguments)
        assert type(caught.value) is exception
        assert call.untouched()


@FORM
@pytest.mark.parametrize(
    ("layout", "change", "named"),
    [
        ("tensor", {"ckv_scale": 2.0**-100, "sm_scale": 2.0**-100}, "ckv_scale"),
        ("tensor", {"ckv_scale": 2.0**100, "q_scale": 2.0**100}, "ckv_scale"),
        ("tensor", {"ckv_scale": 2.0**100, "q_scale": 2.0**-100, "kpe_scale": 2.0**-100}, "kpe_scale"),
        ("group", {"sm_scale": 2.0**-100, "q_scale": 2.0**-100}, "ckv_scale"),
    ],
)
def test_products_that_float32_cannot_hold(form, layout, change, named):
    """The kernels see them only: each number alone is legal."""
    call = make_call(form, layout, True)
    for name, value in change.items():
        assert call.check(**{name: value}) == call.check()
    with pytest.raises(ValueError, match=f"^{named}: expected a product with sm_scale and q_scale from 2"):
        call.check(**change)
