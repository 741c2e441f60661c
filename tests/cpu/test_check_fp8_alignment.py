"""FP8 calls on a GPU: which addresses and strides are legal, and what the others raise."""

import re

import pytest
import torch
from call_case import check_decode
from fp8_call_case import ARRAY, CHECKS, FORM, LAYOUT, NUM_PAGES, PAGE_SIZE, Q_FP8, OnGpu, make_call, on_gpu
from fp8_case import make_fp8

from mla_cute import check as shared
from mla_cute import quant
from mla_cute.testing.cases import make_case

OPERANDS = ("q_nope", "q_pe", "ckv_cache", "kpe_cache", "out")
ADDRESS = "expected a base address that is a multiple of 16 bytes, got 0x"
STRIDES = r"expected strides that are multiples of (4|8|16) elements (16 bytes), got strides ["


def wide(x, width):
    return torch.zeros(*x.shape[:-1], width).to(x.dtype)[..., : x.shape[-1]]


def misaligned(x, num_bytes):
    """The shape of x at an address `num_bytes` bytes past an aligned one."""
    elements = num_bytes // x.itemsize
    return torch.zeros(x.numel() + elements).to(x.dtype)[elements:].view(x.shape)


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
