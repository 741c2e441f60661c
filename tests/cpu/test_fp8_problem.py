"""FP8 calls: which are legal, what each wrong argument raises, and what the step is launched with."""

import dataclasses
import math
import re
import timeit
import types

import pytest
import torch
from fp8_case import FORMAT_OF, LAYOUTS, Fp8Operands, make_fp8
from prefill_case import make_prefill

import mla_cute
from mla_cute import api, jit, plan, quant
from mla_cute import problem as shared
from mla_cute._testing import make_case
from mla_cute.kernels import registry
from mla_cute.problem import DecodeProblem, check_decode, check_decode_block_table
from mla_cute.problem_prefill import PrefillProblem, check_prefill, check_prefill_block_table

E4M3, BF16, FP16 = torch.float8_e4m3fn, torch.bfloat16, torch.float16
TOTAL_Q, HEADS, PAGE_SIZE, NUM_PAGES = 15, 16, 8, 9
CPU = torch.device("cpu")
FORMS = ("decode", "decode_table", "prefill", "prefill_table")
CHECKS = dict(
    zip(FORMS, (check_decode, check_decode_block_table, check_prefill, check_prefill_block_table), strict=True)
)
CALLS = {
    "decode": mla_cute.mla_paged_decode,
    "decode_table": mla_cute.mla_paged_decode_block_table,
    "prefill": mla_cute.mla_paged_prefill,
    "prefill_table": mla_cute.mla_paged_prefill_block_table,
}
FORM = pytest.mark.parametrize("form", FORMS)
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
Q_FP8 = pytest.mark.parametrize("q_fp8", [False, True], ids=["q16", "q8"])
DTYPE = pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])


@dataclasses.dataclass
class Call:
    """Keywords of one call, the FP8 operands behind them, and the guards of its outputs."""

    form: str
    arguments: dict
    fp8: Fp8Operands
    guards: tuple

    def check(self, **change):
        return CHECKS[self.form](**self.arguments | change)

    def untouched(self) -> bool:
        return all(guard.untouched() for guard in self.guards)


def make_call(form: str, layout: str, q_fp8: bool, outputs: bool = True, dtype: torch.dtype = BF16) -> Call:
    """9 pages of 8 tokens; kv_indptr [0, 2, 2, 3, 6], qo_indptr [0, 4, 6, 6, 15]; 4 or 15 query tokens."""
    names = ("kv_indptr", "kv_indices", "kv_last_page_len")
    if "table" in form:
        names = ("block_table", "seq_lens")
    if "prefill" in form:
        names += ("qo_indptr",)
        case = make_prefill([4, 2, 0, 9], [9, 0, 1, 24], num_heads=HEADS, page_size=PAGE_SIZE, dtype=dtype)
        metadata = case.table if "table" in form else case.csr
        fp8 = make_fp8(case.caches, layout, q_fp8, (case.q_nope, case.q_pe))
    else:
        case = make_case([9, 0, 1, 24], num_heads=HEADS, page_size=PAGE_SIZE, dtype=dtype)
        metadata = {name: getattr(case, name) for name in names}
        fp8 = make_fp8(case, layout, q_fp8)
    guards = (case.guarded_out, case.guarded_lse)
    arguments = {name: metadata[name] for name in names} | {"sm_scale": 0.1} | fp8.tensors | fp8.scales
    if outputs:
        out, lse = (guard.tensor for guard in guards)
        # guards are as wide as the case's dtype: any 16-bit one fits
        arguments |= {"out": out.view(fp8.dtype), "lse": lse}
    return Call(form, arguments, fp8, guards)


def problem_of(form: str, dtype: torch.dtype, kv_format: str, q_fp8: bool) -> DecodeProblem | PrefillProblem:
    if "prefill" in form:
        return PrefillProblem(4, TOTAL_Q, HEADS, PAGE_SIZE, NUM_PAGES, True, dtype, CPU, kv_format, q_fp8)
    return DecodeProblem(4, HEADS, PAGE_SIZE, NUM_PAGES, dtype, CPU, kv_format, q_fp8)


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
    with_array = make_call(form, "token", q_fp8)
    assert with_array.check(ckv_scale=1, kpe_scale=1) == with_array.check()


def test_a_call_is_checked_in_microseconds():
    for layout in ("tensor", "group"):
        call = make_call("decode", layout, False, outputs=False)
        names = ("q_nope", "q_pe", "ckv_cache", "kpe_cache", "kv_indptr", "kv_indices")
        tensors, scales = tuple(call.arguments[name] for name in names), call.fp8.scales
        seconds = min(timeit.repeat(lambda: check_decode(*tensors, 0.1, **scales), number=2000, repeat=10)) / 2000
        assert seconds < 15e-6, f"{layout}: {seconds * 1e6:.1f} us; 3.9 us on an idle core"


# ------------------------------------------------------------------------------------------------ wrong arguments

HALF_CACHE = zeros(NUM_PAGES, PAGE_SIZE, 64)
ARRAY = torch.ones(NUM_PAGES, PAGE_SIZE, 4)
NUMBER = "expected a Python number, got "
RANGE = "expected a positive number from 2^-126 to 2^126, got "


def bad_numbers(name):
    return [
        (name, torch.tensor(1.0), TypeError, NUMBER + "a torch.Tensor of torch.float32"),
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
    ("tensor", True, "q_nope", of("q_nope", lambda x: x[..., :500]), ValueError, "H, 512], got ["),
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


# ------------------------------------------------------------------------------------------------ on a GPU


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is on a GPU, where strides and addresses matter."""

    is_cuda = True


def on_gpu(arguments: dict) -> dict:
    return {name: x.as_subclass(OnGpu) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


def wide(x, width):
    return torch.zeros(*x.shape[:-1], width).to(x.dtype)[..., : x.shape[-1]]


def misaligned(x, num_bytes):
    """The shape of x at an address `num_bytes` bytes past an aligned one."""
    elements = num_bytes // x.itemsize
    return torch.zeros(x.numel() + elements).to(x.dtype)[elements:].view(x.shape)


OPERANDS = ("q_nope", "q_pe", "ckv_cache", "kpe_cache", "out")
ADDRESS = "expected a base address that is a multiple of 16 bytes, got 0x"
STRIDES = r"expected strides that are multiples of (4|8|16) elements (16 bytes), got strides ["


@FORM
@LAYOUT
@Q_FP8
@pytest.mark.parametrize("early_exit", [True, False])
def test_aligned_views_are_legal(monkeypatch, form, layout, q_fp8, early_exit):
    if not early_exit:
        monkeypatch.setattr(shared, "_usual_fp8", lambda *arguments: None)
    call = make_call(form, layout, q_fp8)
    arguments = on_gpu(call.arguments)
    assert CHECKS[form](**arguments).odd_strides is not early_exit
    for name in OPERANDS[:4]:
        x = arguments[name]
        padded = wide(x, x.shape[-1] + 16 // x.itemsize).as_subclass(OnGpu)
        assert CHECKS[form](**arguments | {name: padded}).odd_strides is not early_exit


@FORM
@pytest.mark.parametrize(("layout", "q_fp8"), [("tensor", False), ("tensor", True), ("token", True), ("group", False)])
@pytest.mark.parametrize("name", OPERANDS)
def test_operands_have_to_be_aligned(form, layout, q_fp8, name):
    arguments = on_gpu(make_call(form, layout, q_fp8).arguments)
    x = arguments[name].as_subclass(torch.Tensor)
    bad = [
        (misaligned(x, 8), ADDRESS),
        (misaligned(x, x.itemsize), ADDRESS),
        (wide(x, x.shape[-1] + 8 // x.itemsize), STRIDES),
        (wide(x, x.shape[-1] + 1), STRIDES),
    ]
    for value, says in bad:
        pattern = re.escape(says).replace(r"\(4\|8\|16\)", "(4|8|16)")
        with pytest.raises(ValueError, match=f"^{name}: {pattern}"):
            CHECKS[form](**arguments | {name: value.as_subclass(OnGpu)})
    every_other = torch.zeros(*x.shape[:-1], 2 * x.shape[-1]).to(x.dtype)[..., ::2].as_subclass(OnGpu)
    with pytest.raises(ValueError, match=f"^{name}: expected stride 1 in the last dimension, got strides"):
        CHECKS[form](**arguments | {name: every_other})


@FORM
def test_group_scales_have_to_be_aligned(form):
    arguments = on_gpu(make_call(form, "group", False).arguments)
    for value, says in (
        (misaligned(ARRAY, 4), "expected a base address that is a multiple of 16 bytes, got 0x"),
        (misaligned(ARRAY, 8), "expected a base address that is a multiple of 16 bytes, got 0x"),
        (wide(ARRAY, 5), "expected strides that are multiples of 4 elements (16 bytes), got strides [40, 5, 1]"),
        (wide(ARRAY, 6), "expected strides that are multiples of 4 elements (16 bytes), got strides [48, 6, 1]"),
        (
            torch.ones(NUM_PAGES, PAGE_SIZE, 8)[..., ::2],
            "expected stride 1 in the last dimension, got strides [64, 8, 2]",
        ),
    ):
        with pytest.raises(ValueError, match=f"^ckv_scale_arr: {re.escape(says)}"):
            CHECKS[form](**arguments | {"ckv_scale_arr": value.as_subclass(OnGpu)})
    wider = wide(ARRAY, 8).as_subclass(OnGpu)
    assert not CHECKS[form](**arguments | {"ckv_scale_arr": wider}).odd_strides


@FORM
def test_token_scales_may_lie_anywhere(form):
    arguments = on_gpu(make_call(form, "token", False).arguments)
    array = torch.ones(NUM_PAGES, PAGE_SIZE, 1)
    for value in (misaligned(array, 4), wide(array, 5), wide(array, 164)):
        assert not CHECKS[form](**arguments | {"ckv_scale_arr": value.as_subclass(OnGpu)}).odd_strides
    strange_last = array.as_strided(array.shape, (PAGE_SIZE, 1, 7)).as_subclass(OnGpu)
    assert CHECKS[form](**arguments | {"ckv_scale_arr": strange_last}).odd_strides


@pytest.mark.parametrize("form", ["decode", "prefill_table"])
def test_rows_of_656_bytes_are_usual(form):
    """Strides of 656 bytes, 164 floats and 328 bfloat16, in pages of any size and with gaps between them."""
    arguments = on_gpu(make_call(form, "group656", True).arguments)
    pool = torch.zeros(NUM_PAGES, PAGE_SIZE + 3, quant.GROUP_ROW_BYTES, dtype=torch.uint8)[:, :PAGE_SIZE]
    ckv, array, kpe = (x.as_subclass(OnGpu) for x in quant.group_rows(pool))
    assert (ckv.stride(1), array.stride(1), kpe.stride(1)) == (656, 164, 328)
    problem = CHECKS[form](**arguments | {"ckv_cache": ckv, "ckv_scale_arr": array, "kpe_cache": kpe})
    assert problem.kv_format == "group"
    assert not problem.odd_strides


def test_strides_of_size_one_dimensions_may_be_anything():
    case = make_case([1], num_heads=1, page_size=1, num_pages=1)
    names = ("kv_indptr", "kv_indices", "sm_scale")
    for layout in ("tensor", "token", "group"):
        fp8 = make_fp8(case, layout, True)
        arguments = {name: getattr(case, name) for name in names} | fp8.tensors | fp8.scales
        for name in ("q_nope", "q_pe", "ckv_cache", "kpe_cache", "ckv_scale_arr"):
            if name in arguments:
                x = arguments[name]
                arguments[name] = x.view(torch.uint8).view(x.dtype).as_strided(x.shape, (7, 3, 1))
        assert check_decode(**on_gpu(arguments)).odd_strides


# ------------------------------------------------------------------------------------------------ plans and launches


@pytest.fixture
def steps(monkeypatch):
    """Plans on the meta device allocate as on a GPU of 132 SMs; the kernels they ask for are recorded."""
    recorded = []
    monkeypatch.setattr(plan, "num_sms", lambda device: 132)
    monkeypatch.setattr(jit, "get", lambda kernel, key, config: recorded.append((kernel, key)) or (lambda *a: None))
    return recorded


@pytest.mark.parametrize(
    ("num_heads", "decode_kernels"),
    [(16, (registry.DECODE_FEW, registry.DECODE_FEW_FP8)), (17, (registry.DECODE, registry.DECODE_FP8))],
)
@pytest.mark.parametrize("page_size", [64, 1, 24])
def test_one_plan_asks_for_the_step_of_each_cache(steps, page_size, num_heads, decode_kernels):
    meta = torch.device("meta")
    indptr = torch.zeros(5, dtype=torch.int32, device=meta)
    sizes = {"num_heads": num_heads, "page_size": page_size}
    decode = mla_cute.plan_decode(indptr, **sizes)
    prefill = mla_cute.plan_prefill(indptr, indptr, **sizes, total_q=15)
    box = registry.box_rows_of(page_size)
    for made, kernels, facts in (
        (decode, decode_kernels, (4, num_heads, page_size, 9)),
        (prefill, (registry.PREFILL, registry.PREFILL_FP8), (4, 15, num_heads, page_size, 9, True)),
    ):
        kind = DecodeProblem if made is decode else PrefillProblem
        bf16_key = (registry.DecodeKey if made is decode else registry.PrefillKey)("bfloat16", box)
        for problem, kernel, key in (
            (kind(*facts, BF16, meta), kernels[0], bf16_key),
            (kind(*facts, BF16, meta, "tensor", False), kernels[1], registry.Fp8Key("bfloat16", box, "tensor", False)),
            (kind(*facts, FP16, meta, "tensor", True), kernels[1], registry.Fp8Key("float16", box, "tensor", True)),
            (kind(*facts, FP16, meta, "token", False), kernels[1], registry.Fp8Key("float16", box, "token", False)),
            (kind(*facts, BF16, meta, "group", True), kernels[1], registry.Fp8Key("bfloat16", box, "group", True)),
        ):
            steps.clear()
            made.launcher(problem, False)
            assert steps == [(kernel, key)]
            made.launcher(problem, False)
            assert len(steps) == 1, "the same problem asks once"


@pytest.mark.parametrize(
    ("num_heads", "chosen", "few"),
    [
        (16, "auto", True),
        (16, "few_rows", True),
        (16, "rows", False),
        (17, "auto", False),
        (17, "few_rows", True),
        (128, "few_rows", True),
        (17, "rows", False),
    ],
)
@pytest.mark.parametrize("field", ["kernel", "fp8_kernel"])
def test_the_config_chooses_the_kernel_of_few_rows(steps, field, num_heads, chosen, few):
    """Each field for its kind of cache; over the other kind the kernel stays that of the heads."""
    meta = torch.device("meta")
    indptr = torch.zeros(5, dtype=torch.int32, device=meta)
    config = mla_cute.KernelConfig(**{field: chosen})
    made = mla_cute.plan_decode(indptr, num_heads=num_heads, page_size=64, config=config)
    few_fp8, few_16bit = (few if field == name else num_heads <= 16 for name in ("fp8_kernel", "kernel"))
    steps.clear()
    made.launcher(DecodeProblem(4, num_heads, 64, 9, BF16, meta, "group", True), False)
    kernel = registry.DECODE_FEW_FP8 if few_fp8 else registry.DECODE_FP8
    assert steps == [(kernel, registry.Fp8Key("bfloat16", 64, "group", True))]
    steps.clear()
    made.launcher(DecodeProblem(4, num_heads, 64, 9, BF16, meta), False)
    kernel = registry.DECODE_FEW if few_16bit else registry.DECODE
    assert steps == [(kernel, registry.DecodeKey("bfloat16", 64))]


@pytest.mark.parametrize(
    ("num_heads", "config", "kv_format", "ctas"),
    [(16, {}, "tensor", 132), (64, {}, "tensor", 132), (65, {}, "group", 66),
     (32, {"fp8_kernel": "few_rows"}, "token", 66), (100, {"fp8_kernel": "few_rows"}, "tensor", 18),
     (128, {"fp8_kernel": "few_rows"}, "tensor", 16), (128, {"kernel": "few_rows"}, "tensor", 66),
     (128, {"fp8_kernel": "few_rows"}, "", 66), (128, {"kernel": "few_rows"}, "", 16),
     (100, {"kernel": "few_rows"}, "", 18), (32, {"kernel": "few_rows"}, "", 66), (32, {}, "", 132), (65, {}, "", 66),
     (16, {}, "", 132), (16, {"kernel": "rows"}, "", 132)],
)  # fmt: skip
def test_row_tiles_of_the_kernel_share_the_sms(steps, num_heads, config, kv_format, ctas):
    """A plan has as many work lists as there are SMs for each row tile of the kernel it is made for."""
    indptr = torch.zeros(5, dtype=torch.int32, device=torch.device("meta"))
    config = mla_cute.KernelConfig(**config)
    made = mla_cute.plan_decode(indptr, num_heads=num_heads, page_size=64, config=config, kv_format=kv_format)
    assert made.num_parts == ctas


@pytest.mark.parametrize("field", ["kernel", "fp8_kernel"])
def test_an_unknown_kernel_is_refused(steps, field):
    indptr = torch.zeros(5, dtype=torch.int32, device=torch.device("meta"))
    with pytest.raises(ValueError, match=rf"config: {field}: expected one of .*, got 'few'"):
        mla_cute.plan_decode(indptr, num_heads=16, page_size=64, config=mla_cute.KernelConfig(**{field: "few"}))


def launched(call: Call, packs_rows: bool = False, **change) -> tuple:
    """The arguments that the step of this call gets."""
    arguments = {"lse_base": 2, "out": None, "lse": None} | call.arguments | change
    options = ("ckv_scale", "kpe_scale", "q_scale")
    scales = dict.fromkeys(options, 1.0) | {"ckv_scale_arr": None}
    scales |= {name: arguments[name] for name in scales if name in arguments}
    stand_in = types.SimpleNamespace(has_work=True, packs_rows=packs_rows, table="table", part="part", grid=(5, 6, 7))
    recorded = []
    problem = CHECKS[call.form](**on_gpu(call.arguments | change))
    result = api.launch_step(
        lambda *got: recorded.append(got), problem, stand_in,
        *(arguments[name] for name in ("q_nope", "q_pe", "ckv_cache", "kpe_cache")),
        "indices", arguments["sm_scale"], arguments["out"], arguments["lse"], arguments["lse_base"], True,
        scales["ckv_scale"], scales["kpe_scale"], scales["ckv_scale_arr"], scales["q_scale"],
    )  # fmt: skip
    (got,) = recorded
    assert got[8] is result[0]
    assert got[9] is result[1]
    return got


def same_memory(got: torch.Tensor, x: torch.Tensor) -> bool:
    return (got.data_ptr(), got.shape, got.stride()) == (x.data_ptr(), x.shape, x.stride())


@FORM
@LAYOUT
@Q_FP8
def test_what_the_step_is_launched_with(form, layout, q_fp8):
    call = make_call(form, layout, q_fp8)
    q_nope, q_pe, ckv, kpe, scales, indices, table, part, out, lse, *numbers = launched(call)
    for got, name in ((q_nope, "q_nope"), (q_pe, "q_pe"), (ckv, "ckv_cache"), (kpe, "kpe_cache")):
        x = call.arguments[name]
        assert got.dtype is (torch.uint8 if x.dtype is E4M3 else x.dtype)
        assert same_memory(got, x)
    assert (indices, table, part) == ("indices", "table", "part")
    assert out is call.arguments["out"]
    assert lse is call.arguments["lse"]
    assert scales.dtype is torch.float32
    assert scales.dim() == 3
    tensor = layout == "tensor"
    assert same_memory(scales, lse.unsqueeze(-1) if tensor else call.arguments["ckv_scale_arr"])
    ckv_scale, kpe_scale = (call.arguments.get(name, 1.0) for name in ("ckv_scale", "kpe_scale"))
    q_scale = call.arguments.get("q_scale", 1.0)
    assert (ckv_scale != kpe_scale) is tensor
    assert (q_scale != 1.0) is q_fp8
    per_score = 0.1 * math.log2(math.e)
    assert numbers[:3] == [5, 6, 7]
    assert numbers[3:] == pytest.approx(
        [per_score * ckv_scale * q_scale, per_score * kpe_scale * (q_scale if tensor else 1.0), ckv_scale, 1.0]
    )
    assert all(type(x) is float for x in numbers[3:])


def test_launch_in_base_e_with_ints_for_scales():
    *_, nope, rope, factor, lse_scale = launched(
        make_call("decode", "tensor", True), lse_base="e", ckv_scale=3, kpe_scale=5, q_scale=7, sm_scale=1
    )
    assert [nope, rope, factor, lse_scale] == pytest.approx([21 / math.log(2), 35 / math.log(2), 3.0, math.log(2)])
    assert all(type(x) is float for x in (nope, rope, factor, lse_scale))


@FORM
def test_launch_allocates_the_output(form):
    for layout, q_fp8, dtype, want in (
        ("tensor", True, FP16, BF16),
        ("tensor", False, FP16, FP16),
        ("group", True, FP16, FP16),
        ("token", True, BF16, BF16),
    ):
        call = make_call(form, layout, q_fp8, outputs=False, dtype=dtype)
        got = launched(call)
        assert (got[8].dtype, list(got[8].shape)) == (want, list(call.arguments["q_nope"].shape))
        assert got[8].is_contiguous()
        assert (got[9].dtype, list(got[9].shape)) == (torch.float32, list(got[8].shape[:2]))


@LAYOUT
@Q_FP8
def test_prefill_rows_are_made_even(layout, q_fp8):
    call = make_call("prefill", layout, q_fp8)
    for name in ("q_nope", "q_pe"):
        x = call.arguments[name]
        uneven = torch.zeros(x.shape[0], x.shape[1] + 1, x.shape[2]).to(x.dtype)[:, :-1]
        uneven.view(torch.uint8).copy_(x.view(torch.uint8))
        call.arguments[name] = uneven
    got = launched(call, packs_rows=True)
    for x, name in zip(got[:2], ("q_nope", "q_pe"), strict=True):
        want = call.arguments[name]
        assert x.stride(0) == x.shape[1] * x.stride(1)
        assert torch.equal(x.view(torch.uint8), want.view(torch.uint8))


def test_odd_strides_are_packed_for_the_launch():
    case = make_case([1], num_heads=1, page_size=1, num_pages=1)
    for layout in ("token", "group"):
        fp8 = make_fp8(case, layout, True)
        arguments = (
            {name: getattr(case, name) for name in ("kv_indptr", "kv_indices", "sm_scale")} | fp8.tensors | fp8.scales
        )
        last = 9 if layout == "token" else 1
        for name in ("q_nope", "q_pe", "ckv_cache", "kpe_cache"):
            arguments[name] = arguments[name].as_strided(arguments[name].shape, (7, 3, 1))
        array = arguments["ckv_scale_arr"]
        arguments["ckv_scale_arr"] = array.as_strided(array.shape, (7, 3, last))
        got = launched(Call("decode", arguments, fp8, ()))
        for x in got[:5]:
            assert x.stride() == torch.empty(x.shape).stride()


# ------------------------------------------------------------------------------------------------ the registry


def test_variants_of_fp8_caches():
    assert registry.variants(kv_formats=("",)) == registry.variants()
    everything = registry.variants(kv_formats=("", *registry.KV_FORMATS))
    assert [v for v in everything if not isinstance(v[1], registry.Fp8Key)] == registry.variants()
    for kernel in (registry.DECODE_FP8, registry.DECODE_FEW_FP8, registry.PREFILL_FP8):
        keys = [key for of_kernel, key, _ in everything if of_kernel is kernel]
        assert len(keys) == len(set(keys)) == 3 * 2 * 2 * 5
        assert set(keys) == {
            registry.Fp8Key(dtype, box, kv_format, q_fp8)
            for dtype in registry.DTYPES
            for box in registry.BOX_ROWS
            for kv_format in registry.KV_FORMATS
            for q_fp8 in (False, True)
        }
    only = registry.variants(("bfloat16",), (64,), ops=("decode",), kv_formats=("group",))
    assert [(kernel, key) for kernel, key, _ in only if kernel is not registry.PLANNER] == [
        (kernel, registry.Fp8Key("bfloat16", 64, "group", q_fp8))
        for kernel in (registry.DECODE_FP8, registry.DECODE_FEW_FP8)
        for q_fp8 in (False, True)
    ]
    assert len(only) == 4 + 6, "planners are needed for any cache"
