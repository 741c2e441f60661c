"""Cases of decode over FP8 caches on the GPU: poisoned inputs and guarded outputs in every test."""

import pytest
import torch

from mla_cute.config import FEW_ROWS
from mla_cute.kernels.registry import KV_FORMATS, box_rows_of
from mla_cute.testing.cases import make_case
from mla_cute.testing.fp8 import LAYOUTS, Fp8Case, make_fp8

# What these tests compile: (kernel, dtype, box rows, format, e4m3 queries). Full boxes in bfloat16 with every format
# and query; every other way of loading, which both kernels share, with every format.
BF16, FP16 = torch.bfloat16, torch.float16
VARIANTS = (
    *(
        (kernel, BF16, 64, kv_format, q_fp8)
        for kernel in ("rows", "few_rows")
        for kv_format in KV_FORMATS
        for q_fp8 in (False, True)
    ),
    ("rows", FP16, 32, "tensor", True),
    ("rows", BF16, 16, "group", False),
    ("rows", FP16, 8, "token", False),
    ("rows", BF16, 0, "tensor", True),
    ("rows", BF16, 0, "token", False),
    ("rows", FP16, 0, "group", False),
    ("few_rows", BF16, 32, "token", False),
    ("few_rows", FP16, 16, "tensor", False),
    ("few_rows", FP16, 8, "group", True),
    ("few_rows", BF16, 0, "tensor", False),
    ("few_rows", BF16, 0, "token", False),
    ("few_rows", FP16, 0, "group", False),
)

BOTH_Q = pytest.mark.parametrize("q_fp8", [False, True], ids=["q16", "q_e4m3"])
EVERY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
# One head count for each kernel.
BOTH_KERNELS = pytest.mark.parametrize("num_heads", [16, 128])


def make(layout, q_fp8, lengths, num_heads=16, page_size=64, dtype=BF16, prepare=None, fp8=None, **kwargs) -> Fp8Case:
    """A case of one of VARIANTS; `prepare` changes the 16-bit case before it is quantised."""
    kernel = "few_rows" if num_heads <= FEW_ROWS else "rows"
    assert (kernel, dtype, box_rows_of(page_size), layout.removesuffix("656"), q_fp8) in VARIANTS
    case = make_case(lengths, num_heads=num_heads, page_size=page_size, dtype=dtype, device="cuda", **kwargs)
    if prepare is not None:
        prepare(case)
    return make_fp8(case, layout, q_fp8, **fp8 or {})
