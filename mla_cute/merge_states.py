"""Merge two attention states over disjoint keys: one kernel, a warp per (token, head) row."""

from __future__ import annotations

import math

import torch

from .check import DTYPE_NAMES
from .compile import jit
from .expect import (
    expect_aligned,
    expect_device,
    expect_dtype,
    expect_lse_base,
    expect_own_memory,
    expect_shape,
    expect_tensor,
)
from .kernels.keys import MERGE_STATES, MergeStatesKey
from .plan import num_sms

_DTYPE_NAMES = DTYPE_NAMES | {torch.float32: "float32"}
# The kernel counts rows, heads and values of a row in 32 bits, four rows to a block.
_MAX_SIZE = 2**31 - 4
_LOG2_E = math.log2(math.e)
_LN_2 = math.log(2.0)


def merge_states(
    o_a: torch.Tensor,
    lse_a: torch.Tensor,
    o_b: torch.Tensor,
    lse_b: torch.Tensor,
    *,
    lse_base: int | str = 2,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention of queries over keys A and B from their attention over each.

    m = max(lse_a, lse_b);  w_x = 2^(lse_x - m);  o = (w_a o_a + w_b o_b) / (w_a + w_b);  lse = m + log2(w_a + w_b)

    (with e and ln in base e; computed in float32.) This is the online softmax of FlashAttention applied to whole parts
    of the keys, as its split-k and FlashInfer's cascade attention do. A part is a rank's shard of the context, a shared
    prefix, or a chunk; more than two are merged one after another, in any order up to rounding.

    Args:
        o_a: [..., H, D] bfloat16, float16 or float32, at least two dimensions, softmax-normalised as the calls of this
            library return it; at most 2^31 - 4 rows of D. On CUDA: D * itemsize a multiple of 16, last dimension
            contiguous, other strides and the address multiples of 16 bytes, leading dimensions that can be viewed as
            one.
        lse_a: [..., H] float32. -inf: the state saw no key; its row of o_a is not used and may be anything.
        o_b: shape and dtype of o_a.
        lse_b: shape and dtype of lse_a.
        lse_base: 2 (default) or "e", the base of all three log-sum-exps.
        out: tensor like o_a to write to, which may be o_a or o_b itself but not overlap them otherwise; None allocates.
        lse: tensor like lse_a to write to, likewise; None allocates.

    Returns:
        (o, lse) as o_a and lse_a. Where both states saw no key, o is 0 and lse -inf.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what it was. Nothing
            has been written.
        RuntimeError: a CUDA device that is not Hopper (compute capability 9.0).

    Runs on torch's current stream and can be captured in a CUDA graph. CPU tensors are merged by torch.
    """
    _check(o_a, lse_a, o_b, lse_b, lse_base, out, lse)
    if out is None:
        out = torch.empty_like(o_a, memory_format=torch.contiguous_format)
    if lse is None:
        lse = torch.empty_like(lse_a, memory_format=torch.contiguous_format)
    if not o_a.is_cuda:
        _merge_reference(o_a, lse_a, o_b, lse_b, lse_base == "e", out, lse)
        return out, lse
    rows_out, rows_lse = _as_rows("out", out, 2), _as_rows("lse", lse, 1)
    rows = (_as_rows("o_a", o_a, 2), _as_rows("lse_a", lse_a, 1), _as_rows("o_b", o_b, 2), _as_rows("lse_b", lse_b, 1))
    num_sms(o_a.device)
    if out.numel():
        merge = jit.get(MERGE_STATES, MergeStatesKey(_DTYPE_NAMES[o_a.dtype]), None)
        scales = (1.0, 1.0) if lse_base == 2 else (_LOG2_E, _LN_2)
        merge(*rows, rows_out, rows_lse, *scales)
    return out, lse


@torch.no_grad()
def _merge_reference(
    o_a: torch.Tensor,
    lse_a: torch.Tensor,
    o_b: torch.Tensor,
    lse_b: torch.Tensor,
    natural: bool,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    exp, log = (torch.exp, torch.log) if natural else (torch.exp2, torch.log2)
    largest = torch.maximum(lse_a, lse_b)
    reference = largest.masked_fill(largest.isneginf(), 0.0)
    weight_a, weight_b = exp(lse_a - reference), exp(lse_b - reference)
    total = weight_a + weight_b
    merged = reference + log(total)
    inverse = total.masked_fill(total == 0, 1.0).reciprocal()
    out.copy_(_weighted(o_a, weight_a * inverse) + _weighted(o_b, weight_b * inverse))
    lse.copy_(merged)


def _weighted(o: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    weight = weight.unsqueeze(-1)
    return (o.float() * weight).masked_fill(weight == 0, 0.0)


def _as_rows(name: str, x: torch.Tensor, last: int) -> torch.Tensor:
    """A view with one dimension in front of the `last` ones."""
    if x.dim() == last:
        return x.unsqueeze(0)
    if x.dim() == last + 1:
        return x
    try:
        return x.view(math.prod(x.shape[:-last]), *x.shape[-last:])
    except RuntimeError:
        raise ValueError(
            f"{name}: expected leading dimensions that can be viewed as one, got shape {list(x.shape)} and strides "
            f"{list(x.stride())}"
        ) from None


def _check(
    o_a: torch.Tensor,
    lse_a: torch.Tensor,
    o_b: torch.Tensor,
    lse_b: torch.Tensor,
    lse_base: int | str,
    out: torch.Tensor | None,
    lse: torch.Tensor | None,
) -> None:
    expect_tensor("o_a", o_a)
    if o_a.dtype not in _DTYPE_NAMES:
        raise TypeError(f"o_a: expected dtype {', '.join(map(str, _DTYPE_NAMES))}, got {o_a.dtype}")
    if o_a.dim() < 2:
        raise ValueError(f"o_a: expected shape [..., H, D], got {list(o_a.shape)}")
    if o_a.device.type not in ("cpu", "cuda"):
        raise ValueError(f"o_a: expected a tensor on a cuda device or the cpu, got device {o_a.device}")
    width = o_a.shape[-1]
    if o_a.is_cuda and width * o_a.itemsize % 16:
        elements = 16 // o_a.itemsize
        raise ValueError(f"o_a: expected a last dimension that is a multiple of {elements}, got {width}")
    expect_aligned("o_a", o_a)
    _expect_lse("lse_a", lse_a, o_a)
    if lse_a.numel() > _MAX_SIZE:
        raise ValueError(f"o_a: expected at most {_MAX_SIZE} rows ([..., H] together), got {lse_a.numel()}")
    if width > _MAX_SIZE:
        raise ValueError(f"o_a: expected a last dimension of at most {_MAX_SIZE}, got {width}")
    _expect_output("o_b", o_b, o_a)
    _expect_lse("lse_b", lse_b, o_a)
    expect_lse_base(lse_base)
    if out is not None:
        _expect_output("out", out, o_a)
        expect_own_memory("out", out)
    if lse is not None:
        _expect_lse("lse", lse, o_a)
        expect_own_memory("lse", lse)


def _expect_output(name: str, x: torch.Tensor, o_a: torch.Tensor) -> None:
    expect_tensor(name, x)
    expect_dtype(name, x, "o_a", o_a.dtype)
    expect_shape(name, x, tuple(o_a.shape), "")
    expect_device(name, x, o_a.device, "o_a")
    expect_aligned(name, x)


def _expect_lse(name: str, x: torch.Tensor, o_a: torch.Tensor) -> None:
    expect_tensor(name, x)
    if x.dtype is not torch.float32:
        raise TypeError(f"{name}: expected dtype torch.float32, got {x.dtype}")
    expect_shape(name, x, tuple(o_a.shape[:-1]), "")
    expect_device(name, x, o_a.device, "o_a")
