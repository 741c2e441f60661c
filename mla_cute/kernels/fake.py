"""Symbolic arguments for ahead-of-time compiles: no GPU and no real tensors needed."""

import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.runtime import make_fake_tensor

from .registry import PART_ROW
from .rows_params import HEAD_DIM_ROPE, HEAD_DIM_V


def sym64(divisibility: int = 1):
    """A 64-bit runtime stride. Callers guarantee the divisibility (problem.py checks it)."""
    return cute.sym_int64(divisibility=divisibility)


def fake_tensor(dtype, shape, stride, align: int):
    """`shape` and `stride` in elements, `align` in bytes."""
    return make_fake_tensor(dtype, shape, stride, assumed_align=align)


def fake_step_tensors(dtype) -> tuple:
    """q_nope, q_pe, ckv_cache, kpe_cache, kv_indices, table, part, out and lse of a decode or prefill step."""
    tokens, heads, pages, page = (cute.sym_int() for _ in range(4))

    def rows3(a, b, c):
        return fake_tensor(dtype, (a, b, c), (sym64(8), sym64(8), 1), 16)

    return (
        rows3(tokens, heads, HEAD_DIM_V),
        rows3(tokens, heads, HEAD_DIM_ROPE),
        rows3(pages, page, HEAD_DIM_V),
        rows3(pages, page, HEAD_DIM_ROPE),
        fake_tensor(Int32, (cute.sym_int(),), (1,), 4),
        fake_tensor(Int32, (cute.sym_int(), 8), (8, 1), 16),
        fake_tensor(Float32, (cute.sym_int(), PART_ROW), (PART_ROW, 1), 16),
        rows3(tokens, heads, HEAD_DIM_V),
        fake_tensor(Float32, (tokens, heads), (sym64(), 1), 4),
    )
