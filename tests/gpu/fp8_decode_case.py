"""Cases of decode over FP8 caches on the GPU: poisoned inputs and guarded outputs in every test."""

import pytest
import torch

from mla_cute.dims import KV_FORMATS, TILE16_M
from mla_cute.kernels.registry import box_rows_of
from mla_cute.testing.cases import make_case
from mla_cute.testing.fp8 import LAYOUTS, Fp8Case, make_fp8

# What these tests compile: (kernel, dtype, box rows, format, e4m3 queries); "tile64" has 32 or 64 rows. Full boxes
# in bfloat16 with every format and query; every other way of loading, which both kernels share, with every format.
BF16, FP16 = torch.bfloat16, torch.float16
VARIANTS = (
    *(
        (kernel, BF16, 64, kv_format, q_fp8)
        for kernel in ("tile64", "tile16")
        for kv_format in KV_FORMATS
        for q_fp8 in (False, True)
    ),
    ("tile64", FP16, 32, "tensor", True),
    ("tile64", BF16, 16, "group", False),
    ("tile64", FP16, 8, "token", False),
    ("tile64", BF16, 0, "tensor", True),
    ("tile64", BF16, 0, "token", False),
    ("tile64", FP16, 0, "group", False),
    ("tile16", BF16, 32, "token", False),
    ("tile16", FP16, 16, "tensor", False),
    ("tile16", FP16, 8, "group", True),
    ("tile16", BF16, 0, "tensor", False),
    ("tile16", BF16, 0, "token", False),
    ("tile16", FP16, 0, "group", False),
)

BOTH_Q = pytest.mark.parametrize("q_fp8", [False, True], ids=["q16", "q_e4m3"])
EVERY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
# One head count for each kernel: tile16, and row tiles of 32 and of 64 rows.
EVERY_KERNEL = pytest.mark.parametrize("num_heads", [16, 32, 128])


def make(layout, q_fp8, lengths, num_heads=16, page_size=64, dtype=BF16, prepare=None, fp8=None, **kwargs) -> Fp8Case:
    """A case of one of VARIANTS; `prepare` changes the 16-bit case before it is quantised."""
    kernel = "tile16" if num_heads <= TILE16_M else "tile64"
    assert (kernel, dtype, box_rows_of(page_size), layout.removesuffix("656"), q_fp8) in VARIANTS
    case = make_case(lengths, num_heads=num_heads, page_size=page_size, dtype=dtype, device="cuda", **kwargs)
    if prepare is not None:
        prepare(case)
    return make_fp8(case, layout, q_fp8, **fp8 or {})
