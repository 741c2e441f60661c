"""Symbolic arguments for ahead-of-time compiles: no GPU and no real tensors needed."""

import cutlass.cute as cute
from cutlass.cute.runtime import make_fake_tensor


def sym64(divisibility: int = 1):
    """A 64-bit runtime stride. Callers guarantee the divisibility (mla_cute/check.py checks it)."""
    return cute.sym_int64(divisibility=divisibility)


def fake_tensor(dtype, shape, stride, align: int):
    """`shape` and `stride` in elements, `align` in bytes."""
    return make_fake_tensor(dtype, shape, stride, assumed_align=align)
