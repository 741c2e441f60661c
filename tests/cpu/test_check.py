"""Bad arguments: the right exception, a message of argument, expectation and value, and outputs left alone."""

import fractions
import re

import pytest
import torch
from call_case import (
    check_decode,
    check_decode_block_table,
    decode_problem,
    verify_block_table_on_device,
    verify_on_device,
)
from limits import functions_run

from mla_cute import check as check_module
from mla_cute.call import DECODE, call_of
from mla_cute.expect import expect_rows_fit_32_bits, rows_fit_32_bits
from mla_cute.testing.cases import CACHE_LAYOUTS, OUT_LAYOUTS, Q_LAYOUTS, DecodeCase, make_case

BATCH, HEADS, PAGE_SIZE = 4, 16, 8


def small_case(**kwargs) -> DecodeCase:
    return make_case([9, 0, 1, 24], num_heads=HEADS, page_size=PAGE_SIZE, **kwargs)


def csr_call(case: DecodeCase) -> dict:
    names = ("q_nope", "q_pe", "ckv_cache", "kpe_cache", "kv_indptr", "kv_indices", "sm_scale")
    call = dict(zip(names, case.csr_args, strict=True))
    return call | {"kv_last_page_len": case.kv_last_page_len, "out": case.out, "lse": case.lse, "lse_base": 2}


def block_table_call(case: DecodeCase) -> dict:
    names = ("q_nope", "q_pe", "ckv_cache", "kpe_cache", "block_table", "seq_lens", "sm_scale")
    call = dict(zip(names, case.block_table_args, strict=True))
    return call | {"out": case.out, "lse": case.lse, "lse_base": 2}


def zeros(*shape, dtype=torch.bfloat16, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def ints(*shape, dtype=torch.int32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


# argument, value to put there, exception, what the message has to say besides the argument's name at its start
BAD_BOTH = [
    ("q_nope", None, TypeError, "expected a torch.Tensor, got NoneType"),
    ("q_nope", [[1.0]], TypeError, "expected a torch.Tensor, got list"),
    ("q_nope", zeros(4, 16, 512, dtype=torch.float32), TypeError, "torch.bfloat16 or torch.float16, got torch.float32"),
    ("q_nope", zeros(4, 16, 512, dtype=torch.int32), TypeError, "got torch.int32"),
    ("q_nope", zeros(4, 512), ValueError, "expected shape [batch, H, 512 or 256], got [4, 512]"),
    ("q_nope", zeros(4, 1, 16, 512), ValueError, "got [4, 1, 16, 512]"),
    ("q_nope", zeros(4, 16, 576), ValueError, "expected shape [batch, H, 512 or 256], got [4, 16, 576]"),
    ("q_nope", zeros(4, 0, 512), ValueError, "expected 1 to 128 heads (dimension 1), got 0"),
    ("q_nope", zeros(4, 129, 512), ValueError, "expected 1 to 128 heads (dimension 1), got 129"),
    ("q_nope", zeros(4, 16, 512, device="meta"), ValueError, "got device meta"),
    ("q_pe", 3.0, TypeError, "expected a torch.Tensor, got float"),
    ("q_pe", zeros(4, 16, 64, dtype=torch.float16), TypeError, "expected dtype torch.bfloat16 (that of q_nope)"),
    ("q_pe", zeros(4, 16, 48), ValueError, "expected shape [4, 16, 64 or 32 or 0], got [4, 16, 48]"),
    ("q_pe", zeros(4, 8, 64), ValueError, "expected shape [4, 16, 64], got [4, 8, 64]"),
    ("q_pe", zeros(3, 16, 64), ValueError, "expected shape [4, 16, 64], got [3, 16, 64]"),
    ("q_pe", zeros(4, 16, 64, device="meta"), ValueError, "expected device cpu (that of q_nope), got meta"),
    ("ckv_cache", "cache", TypeError, "expected a torch.Tensor, got str"),
    ("ckv_cache", zeros(20, 8, 512, dtype=torch.float16), TypeError, "expected dtype torch.bfloat16"),
    (
        "q_nope",
        zeros(4, 16, 512).to(torch.float8_e4m3fn),
        TypeError,
        "with a 16-bit ckv_cache, got torch.float8_e4m3fn",
    ),
    (
        "q_pe",
        zeros(4, 16, 64).to(torch.float8_e4m3fn),
        TypeError,
        "expected dtype torch.bfloat16 (that of q_nope), got",
    ),
    (
        "ckv_cache",
        zeros(20, 8, 512).to(torch.float8_e5m2),
        TypeError,
        "torch.bfloat16 (that of q_nope) or torch.float8_e4",
    ),
    (
        "kpe_cache",
        zeros(9, 8, 64).to(torch.float8_e4m3fn),
        TypeError,
        "torch.bfloat16 (that of q_nope), got torch.float8",
    ),
    ("ckv_cache", zeros(160, 512), ValueError, "expected shape [num_pages, page_size, 512], got [160, 512]"),
    ("ckv_cache", zeros(20, 8, 1, 512), ValueError, "got [20, 8, 1, 512]"),
    ("ckv_cache", zeros(20, 8, 576), ValueError, "expected shape [num_pages, page_size, 512], got [20, 8, 576]"),
    ("ckv_cache", zeros(20, 0, 512), ValueError, "expected page_size >= 1 (dimension 1), got 0"),
    ("ckv_cache", zeros(0, 8, 512), ValueError, "expected num_pages >= 1 (dimension 0), got 0"),
    ("ckv_cache", zeros(20, 8, 512, device="meta"), ValueError, "expected device cpu (that of q_nope), got meta"),
    ("kpe_cache", None, TypeError, "expected a torch.Tensor, got NoneType"),
    ("kpe_cache", lambda case: case.kpe_cache.to(torch.float16), TypeError, "got torch.float16"),
    ("kpe_cache", lambda case: case.kpe_cache[..., :32], ValueError, "expected shape [9, 8, 64], got [9, 8, 32]"),
    ("kpe_cache", lambda case: case.kpe_cache[:, :4], ValueError, "expected shape [9, 8, 64], got [9, 4, 64]"),
    ("kpe_cache", lambda case: case.kpe_cache[1:], ValueError, "expected shape [9, 8, 64], got [8, 8, 64]"),
    ("kpe_cache", zeros(9, 8, 64, device="meta"), ValueError, "expected device cpu (that of q_nope), got meta"),
    ("sm_scale", "0.1", TypeError, "expected a Python number, got str '0.1'"),
    ("sm_scale", True, TypeError, "expected a Python number, got bool True"),
    ("sm_scale", None, TypeError, "expected a Python number, got NoneType"),
    ("sm_scale", torch.tensor(0.1), TypeError, "expected a Python number, got a torch.Tensor of torch.float32"),
    ("sm_scale", 1j, TypeError, "expected a Python number, got complex"),
    ("sm_scale", float("nan"), ValueError, "expected a positive number from 2^-126 to 2^126, got nan"),
    ("sm_scale", float("inf"), ValueError, "got inf"),
    ("sm_scale", -float("inf"), ValueError, "got -inf"),
    ("sm_scale", 1e39, ValueError, "got 1e+39"),
    ("sm_scale", 0.0, ValueError, "expected a positive number from 2^-126 to 2^126, got 0.0"),
    ("sm_scale", 0, ValueError, "got 0"),
    ("sm_scale", -0.07, ValueError, "got -0.07"),
    ("sm_scale", 1e-39, ValueError, "got 1e-39"),
    ("sm_scale", 10**400, ValueError, "expected a positive number"),
    ("lse_base", 10, ValueError, "expected 2 or 'e', got 10"),
    ("lse_base", "2", ValueError, "expected 2 or 'e', got '2'"),
    ("lse_base", None, TypeError, "expected 2 or 'e', got NoneType"),
    ("lse_base", 2.718281828, TypeError, "expected 2 or 'e', got float"),
    ("lse_base", True, TypeError, "expected 2 or 'e', got bool"),
    ("out", [1], TypeError, "expected a torch.Tensor, got list"),
    ("out", zeros(4, 16, 512, dtype=torch.float32), TypeError, "expected dtype torch.bfloat16 (that of q_nope)"),
    ("out", zeros(4, 16, 576), ValueError, "expected shape [4, 16, 512], got [4, 16, 576]"),
    ("out", zeros(5, 16, 512), ValueError, "expected shape [4, 16, 512], got [5, 16, 512]"),
    ("out", zeros(4, 16, 512, device="meta"), ValueError, "expected device cpu (that of q_nope), got meta"),
    ("out", zeros(4, 1, 512).expand(4, 16, 512), ValueError, "expected memory for every element"),
    ("out", lambda case: case.q_nope, ValueError, "expected memory of its own, got the memory of q_nope"),
    ("lse", "lse", TypeError, "expected a torch.Tensor, got str"),
    ("lse", zeros(4, 16), TypeError, "expected dtype torch.float32, got torch.bfloat16"),
    ("lse", zeros(4, 16, dtype=torch.float64), TypeError, "expected dtype torch.float32, got torch.float64"),
    ("lse", zeros(4, 16, 1, dtype=torch.float32), ValueError, "expected shape [4, 16], got [4, 16, 1]"),
    ("lse", zeros(16, 4, dtype=torch.float32), ValueError, "expected shape [4, 16], got [16, 4]"),
    ("lse", zeros(16, 4, dtype=torch.float32).T, ValueError, "expected a contiguous tensor, got strides [1, 4]"),
    ("lse", zeros(4, 16, dtype=torch.float32, device="meta"), ValueError, "expected device cpu (that of q_nope)"),
]
# A 16-bit cache and 16-bit queries have no scales.
BAD_SCALES = [
    ("ckv_scale", 2.0, ValueError, "expected 1.0 with a 16-bit ckv_cache, got 2.0"),
    ("ckv_scale", float("nan"), ValueError, "expected 1.0 with a 16-bit ckv_cache, got nan"),
    ("ckv_scale", torch.tensor(1.0), TypeError, "expected a Python number, got a torch.Tensor of torch.float32"),
    ("ckv_scale", None, TypeError, "expected a Python number, got NoneType"),
    ("ckv_scale", True, TypeError, "expected a Python number, got bool True"),
    ("kpe_scale", 0.5, ValueError, "expected 1.0 with a 16-bit ckv_cache, got 0.5"),
    ("kpe_scale", torch.ones(()), TypeError, "expected a Python number, got a torch.Tensor of torch.float32"),
    ("q_scale", 3, ValueError, "expected 1.0 with 16-bit queries, got 3"),
    ("q_scale", "1", TypeError, "expected a Python number, got str '1'"),
    ("q_scale", torch.ones(1), TypeError, "expected a Python number, got a torch.Tensor of torch.float32"),
    ("ckv_scale_arr", zeros(9, 8, 1, dtype=torch.float32), ValueError, "expected None with a 16-bit ckv_cache, got a"),
    ("ckv_scale_arr", 1.0, ValueError, "expected None with a 16-bit ckv_cache, got float 1.0"),
]
BAD_BOTH += BAD_SCALES
BAD_CSR = [
    ("kv_indptr", [0, 1, 2, 3, 4], TypeError, "expected a torch.Tensor, got list"),
    ("kv_indptr", ints(5, dtype=torch.int64), TypeError, "expected dtype torch.int32, got torch.int64"),
    ("kv_indptr", zeros(5, dtype=torch.float32), TypeError, "expected dtype torch.int32, got torch.float32"),
    ("kv_indptr", ints(4), ValueError, "expected shape [5], got [4]"),
    ("kv_indptr", ints(11), ValueError, "expected shape [5], got [11]"),
    ("kv_indptr", ints(5, 1), ValueError, "expected shape [5], got [5, 1]"),
    ("kv_indptr", ints(5, device="meta"), ValueError, "expected device cpu (that of q_nope), got meta"),
    ("kv_indices", None, TypeError, "expected a torch.Tensor, got NoneType"),
    ("kv_indices", ints(9, dtype=torch.int64), TypeError, "expected dtype torch.int32, got torch.int64"),
    ("kv_indices", ints(4, 9), ValueError, "expected shape [num_kv_indices], got [4, 9]"),
    ("kv_indices", ints(9, device="meta"), ValueError, "expected device cpu (that of q_nope), got meta"),
    ("kv_last_page_len", 8, TypeError, "expected a torch.Tensor, got int 8"),
    ("kv_last_page_len", ints(4, dtype=torch.int64), TypeError, "expected dtype torch.int32, got torch.int64"),
    ("kv_last_page_len", ints(5), ValueError, "expected shape [4], got [5]"),
    ("kv_last_page_len", ints(4, device="meta"), ValueError, "expected device cpu (that of q_nope), got meta"),
]
BAD_BLOCK_TABLE = [
    ("block_table", None, TypeError, "expected a torch.Tensor, got NoneType"),
    ("block_table", ints(4, 6, dtype=torch.int64), TypeError, "expected dtype torch.int32, got torch.int64"),
    ("block_table", ints(3, 6), ValueError, "expected shape [4, max_pages], got [3, 6]"),
    ("block_table", ints(24), ValueError, "expected shape [4, max_pages], got [24]"),
    ("block_table", ints(4, 6, device="meta"), ValueError, "expected device cpu (that of q_nope), got meta"),
    ("seq_lens", [9, 0, 1, 24], TypeError, "expected a torch.Tensor, got list"),
    ("seq_lens", ints(4, dtype=torch.int64), TypeError, "expected dtype torch.int32, got torch.int64"),
    ("seq_lens", ints(5), ValueError, "expected shape [4], got [5]"),
    ("seq_lens", ints(4, 1), ValueError, "expected shape [4], got [4, 1]"),
    ("seq_lens", ints(4, device="meta"), ValueError, "expected device cpu (that of q_nope), got meta"),
]


def names(table):
    return [f"{name}-{i}" for i, (name, *_) in enumerate(table)]


def assert_rejected(check, call, case, name, value, exception, says):
    call[name] = value(case) if callable(value) else value
    with pytest.raises(exception) as caught:
        check(**call)
    assert type(caught.value) is exception
    message = str(caught.value)
    assert message.startswith(f"{name}: ")
    assert says in message
    assert case.guarded_out.untouched()
    assert case.guarded_lse.untouched()


@pytest.mark.parametrize(("name", "value", "exception", "says"), BAD_BOTH + BAD_CSR, ids=names(BAD_BOTH + BAD_CSR))
def test_bad_argument_csr(name, value, exception, says):
    case = small_case()
    assert_rejected(check_decode, csr_call(case), case, name, value, exception, says)


BAD_TABLE_CALLS = BAD_BOTH + BAD_BLOCK_TABLE


@pytest.mark.parametrize(("name", "value", "exception", "says"), BAD_TABLE_CALLS, ids=names(BAD_TABLE_CALLS))
def test_bad_argument_block_table(name, value, exception, says):
    case = small_case()
    assert_rejected(check_decode_block_table, block_table_call(case), case, name, value, exception, says)


# ------------------------------------------------------------------------------------------------ legal calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("layout", CACHE_LAYOUTS)
def test_legal_calls_pass(layout, dtype):
    for q_layout in Q_LAYOUTS:
        for out_layout in OUT_LAYOUTS:
            case = small_case(cache_layout=layout, q_layout=q_layout, out_layout=out_layout, dtype=dtype)
            num_pages = case.ckv_cache.shape[0]
            want = decode_problem(BATCH, HEADS, PAGE_SIZE, num_pages, dtype, torch.device("cpu"))
            assert check_decode(**csr_call(case)) == want
            assert check_decode_block_table(**block_table_call(case)) == want
            assert case.guarded_out.untouched()
            assert case.guarded_lse.untouched()


def test_optional_arguments_may_be_none():
    case = small_case()
    absent = {"out": None, "lse": None}
    assert check_decode(**csr_call(case) | absent | {"kv_last_page_len": None}).batch == BATCH
    assert check_decode_block_table(**block_table_call(case) | absent).batch == BATCH


@pytest.mark.parametrize("sm_scale", [1, 2**-126, 2.0**126, torch.tensor(0.25).item(), fractions.Fraction(1, 14)])
@pytest.mark.parametrize("lse_base", [2, "e"])
def test_numbers(sm_scale, lse_base):
    case = small_case()
    numbers = {"sm_scale": sm_scale, "lse_base": lse_base}
    assert check_decode(**csr_call(case) | numbers) == check_decode_block_table(**block_table_call(case) | numbers)


def test_numpy_scalar_is_a_number():
    numpy = pytest.importorskip("numpy", reason="numpy is not installed")
    case = small_case()
    for scale in (numpy.float32(0.1), numpy.float64(0.1)):
        assert check_decode(**csr_call(case) | {"sm_scale": scale}).batch == BATCH


@pytest.mark.parametrize("early_exit", [True, False])
def test_scales_of_one_are_legal_for_a_16_bit_cache(monkeypatch, early_exit):
    if not early_exit:
        monkeypatch.setattr(check_module, "_usual", lambda *arguments: None)
    case = small_case()
    for one in (float("1"), 1, fractions.Fraction(1)):
        for names in (("ckv_scale",), ("kpe_scale", "q_scale"), ("ckv_scale", "kpe_scale", "q_scale")):
            ones = dict.fromkeys(names, one) | {"ckv_scale_arr": None}
            assert check_decode(**csr_call(case) | ones) == check_decode(**csr_call(case))
            assert check_decode_block_table(**block_table_call(case) | ones) == check_decode(**csr_call(case))


def test_a_scale_of_one_is_usual_whichever_object_it_is():
    call = csr_call(small_case())
    usual = check_decode(**call)
    assert not usual.odd_strides
    assert check_decode(**call, ckv_scale=float("1"), kpe_scale=float("1"), q_scale=float("1")) is usual
    assert check_decode(**call, kpe_scale=float("1")) is usual


@pytest.mark.parametrize("num_heads", [1, 2, 127, 128])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1]])
def test_batches_and_heads_at_the_edges(lengths, num_heads):
    case = make_case(lengths, num_heads=num_heads, page_size=1)
    assert check_decode(**csr_call(case)) == check_decode_block_table(**block_table_call(case))


def test_tensors_without_elements():
    case = make_case([0, 0], num_heads=2, page_size=4)
    assert check_decode(**csr_call(case) | {"kv_indices": ints(0)}).batch == 2
    assert check_decode_block_table(**block_table_call(case) | {"block_table": ints(2, 0)}).batch == 2


def test_cpu_tensors_may_have_any_stride():
    case = small_case()
    call = csr_call(case)
    call["q_nope"] = zeros(4, 16, 513)[..., 1:]
    call["q_pe"] = zeros(64, 16, 4).permute(2, 1, 0)
    call["out"] = zeros(512, 16, 4).permute(2, 1, 0)
    call["kv_indptr"] = ints(10)[::2]
    assert check_decode(**call).batch == BATCH


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is on a GPU, where strides and addresses matter."""

    is_cuda = True


def wide(x, width):
    """The shape of x with rows `width` elements apart."""
    return torch.zeros(*x.shape[:-1], width, dtype=x.dtype)[..., : x.shape[-1]]


def misaligned(x, elements):
    """The shape of x at an address `elements` elements past an aligned one."""
    return torch.zeros(x.numel() + elements, dtype=x.dtype)[elements:].view(x.shape)


def every_other(x):
    return torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)[..., ::2]


ALIGNMENT = "expected a base address that is a multiple of 16 bytes, got 0x"
STRIDES = "expected strides that are multiples of 8 elements (16 bytes), got strides ["
LAST_STRIDE = "expected stride 1 in the last dimension, got strides ["


@pytest.mark.parametrize("name", ["q_nope", "q_pe", "ckv_cache", "kpe_cache", "out"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: misaligned(x, 4), ALIGNMENT),
        (lambda x: misaligned(x, 1), ALIGNMENT),
        (lambda x: wide(x, x.shape[-1] + 4), STRIDES),
        (lambda x: wide(x, x.shape[-1] + 1), STRIDES),
        (every_other, LAST_STRIDE),
        (lambda x: x.transpose(0, 2).contiguous().transpose(0, 2), LAST_STRIDE),
    ],
    ids=["8_bytes", "2_bytes", "stride_4", "stride_1", "every_other", "transposed"],
)
def test_gpu_tensors_have_to_be_aligned(name, change, says):
    for check, build in ((check_decode, csr_call), (check_decode_block_table, block_table_call)):
        case = small_case()
        call = build(case)
        for other in ("q_nope", "q_pe", "ckv_cache", "kpe_cache", "out"):
            call[other] = (change(call[other]) if other == name else call[other]).as_subclass(OnGpu)
        with pytest.raises(ValueError, match=f"^{name}: {re.escape(says)}"):
            check(**call)
        call[name] = call[name].as_subclass(torch.Tensor)
        if name != "q_nope":
            assert check(**call).batch == BATCH, "on the CPU any stride is legal"


@pytest.mark.parametrize(
    ("check", "build", "name"),
    [
        (check_decode, csr_call, "kv_indptr"),
        (check_decode, csr_call, "kv_indices"),
        (check_decode, csr_call, "kv_last_page_len"),
        (check_decode_block_table, block_table_call, "block_table"),
        (check_decode_block_table, block_table_call, "seq_lens"),
    ],
)
def test_gpu_metadata_has_to_be_contiguous(check, build, name):
    call = build(small_case())
    call[name] = every_other(call[name]).as_subclass(OnGpu)
    with pytest.raises(ValueError, match=f"^{name}: {re.escape(LAST_STRIDE)}"):
        check(**call)


@pytest.mark.parametrize("layout", CACHE_LAYOUTS)
def test_aligned_views_are_legal_on_a_gpu(layout):
    for q_layout in Q_LAYOUTS:
        for out_layout in OUT_LAYOUTS:
            case = small_case(cache_layout=layout, q_layout=q_layout, out_layout=out_layout)
            for check, build in ((check_decode, csr_call), (check_decode_block_table, block_table_call)):
                call = {
                    name: x.as_subclass(OnGpu) if isinstance(x, torch.Tensor) else x for name, x in build(case).items()
                }
                assert check(**call).batch == BATCH


def test_strides_of_size_one_dimensions_may_be_anything():
    case = make_case([4], num_heads=1, page_size=1, num_pages=4)
    call = csr_call(case)
    for name, strides in (("q_nope", (7, 3, 1)), ("q_pe", (5, 1, 1)), ("ckv_cache", (576, 3, 1)), ("out", (9, 9, 1))):
        call[name] = call[name].as_strided(call[name].shape, strides).as_subclass(OnGpu)
    assert check_decode(**call).batch == 1


def test_what_the_early_exit_accepts_the_explanation_accepts(monkeypatch):
    """With the early exit taken out, every legal call above has to pass as well: the two must not drift apart."""
    monkeypatch.setattr(check_module, "_usual", lambda *arguments: None)
    for dtype in (torch.bfloat16, torch.float16):
        for layout in CACHE_LAYOUTS:
            case = small_case(cache_layout=layout, dtype=dtype)
            want = decode_problem(BATCH, HEADS, PAGE_SIZE, case.ckv_cache.shape[0], dtype, torch.device("cpu"))
            assert check_decode(**csr_call(case)) == want
            assert check_decode_block_table(**block_table_call(case)) == want


def test_a_usual_call_is_checked_by_few_functions():
    case = small_case()
    names = ("q_nope", "q_pe", "ckv_cache", "kpe_cache", "kv_indptr", "kv_indices")
    call = call_of(DECODE, *(csr_call(case)[name] for name in names), 0.1)
    assert functions_run(lambda: check_module.check(call)) < 20, "11 with Python 3.11; 183 where sm_scale is an int"


# ------------------------------------------------------------------------------------------------ values on the device


def verify_csr(case: DecodeCase, last_page_len=True):
    problem = check_decode(**csr_call(case))
    verify_on_device(problem, case.kv_indptr, case.kv_indices, case.kv_last_page_len if last_page_len else None)


def verify_table(case: DecodeCase):
    verify_block_table_on_device(check_decode(**csr_call(case)), case.block_table, case.seq_lens)


def test_good_values_verify():
    for case in (small_case(), small_case(index_offset=3), make_case([], num_heads=1, page_size=4)):
        verify_csr(case)
        verify_csr(case, last_page_len=False)
        verify_table(case)
    empty = make_case([0, 0], num_heads=2, page_size=4)
    problem = check_decode(**csr_call(empty))
    verify_on_device(problem, empty.kv_indptr, ints(0))
    verify_block_table_on_device(problem, ints(2, 0), empty.seq_lens)


# small_case has kv_indptr [0, 2, 2, 3, 6], 13 page ids and 9 pages
@pytest.mark.parametrize(
    ("name", "position", "value", "says"),
    [
        ("kv_indptr", 0, -1, "expected values >= 0, got -1 at position 0"),
        ("kv_indptr", 2, 1, "expected values that never decrease, got 1 at position 2"),
        ("kv_indptr", 1, 4, "expected values that never decrease, got 2 at position 2"),
        ("kv_indptr", 4, 14, "expected values <= 13 (the length of kv_indices), got 14 at position 4"),
        ("kv_indices", 0, -1, "expected page ids in [0, 9), got -1 at position 0"),
        ("kv_indices", 5, 10, "expected page ids in [0, 9), got 10 at position 5"),
        ("kv_indices", 3, 2**31 - 1, "got 2147483647 at position 3"),
        ("kv_last_page_len", 0, 9, "expected values in [1, 8] for requests with pages, got 9 at position 0"),
        ("kv_last_page_len", 3, 0, "got 0 at position 3"),
        ("kv_last_page_len", 2, -3, "got -3 at position 2"),
    ],
)
def test_bad_csr_values(name, position, value, says):
    case = small_case()
    getattr(case, name)[position] = value
    with pytest.raises(ValueError, match=f"^{name}: .*{re.escape(says)}"):
        verify_csr(case)


def test_first_offending_position_is_named():
    case = small_case()
    case.kv_indices[[1, 2, 5]] = torch.tensor([-7, 99, -8], dtype=torch.int32)
    with pytest.raises(ValueError, match="got -7 at position 1"):
        verify_csr(case)


def test_values_of_requests_without_pages_are_not_looked_at():
    case = small_case()
    case.kv_last_page_len[1] = -99
    verify_csr(case)


@pytest.mark.parametrize(
    ("name", "position", "value", "named", "says"),
    [
        ("seq_lens", 1, -1, "seq_lens", "expected values in [0, 48] (max_pages * page_size), got -1 at position 1"),
        ("seq_lens", 3, 49, "seq_lens", "got 49 at position 3"),
        ("block_table", (0, 1), -1, "block_table", "expected page ids in [0, 9), got -1 at position [0, 1]"),
        ("block_table", (3, 2), 10, "block_table", "got 10 at position [3, 2]"),
        ("seq_lens", 2, 9, "block_table", "expected page ids in [0, 9)"),
    ],
)
def test_bad_block_table_values(name, position, value, named, says):
    case = small_case()
    getattr(case, name)[position] = value
    with pytest.raises(ValueError, match=f"^{named}: .*{re.escape(says)}"):
        verify_table(case)


# ------------------------------------------------------------------------------------------------ rows of the gather


@pytest.mark.parametrize(
    ("pages", "page_size", "strides", "fits"),
    [
        (1 << 26, 1, (576, 576), True),  # 77 GB, one unit a page
        (1 << 26, 2, (1152, 576), True),
        (1 << 26, 2, (1160, 576), False),  # units of 16 bytes: 145 a page, 9.7e9 > 2^32 of them
        (1 << 26, 8, (4616, 576), True),  # TMA
        (1 << 20, 2, (1160, 576), True),
    ],
)
def test_caches_beyond_what_the_gather_counts(pages, page_size, strides, fits):
    cache = torch.empty_strided((pages, page_size, 512), (*strides, 1), dtype=torch.bfloat16, device="meta")
    assert rows_fit_32_bits(cache) is fits


def test_a_cache_beyond_what_the_gather_counts_is_named():
    class OnGpu(torch.Tensor):
        is_cuda = True

    cache = torch.empty_strided((1 << 26, 2, 512), (1160, 576, 1), dtype=torch.bfloat16, device="meta")
    with pytest.raises(
        ValueError, match=r"^ckv_cache: expected at most 2\^32 steps of .* got strides \[1160, 576, 1\]"
    ):
        expect_rows_fit_32_bits("ckv_cache", cache.as_subclass(OnGpu))
