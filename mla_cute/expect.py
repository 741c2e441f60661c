"""Checks of single arguments: shapes, dtypes, devices, strides and pointers, read on the host.

Each raises TypeError or ValueError that names the argument, what was expected and what was given.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch

from .dims import HEAD_DIMS

# The kernels take sm_scale * log2(e) as a float32 and find a row's largest score before they scale it: the product has
# to be positive, finite, and normal (0 * -inf of a masked score is NaN).
MIN_SCALE = 2.0**-126
MAX_SCALE = 2.0**126
# TMA and 16-byte vector accesses: 16 bytes are 8 elements of bf16 or fp16, 16 of e4m3, 4 of float32.
ALIGN_BYTES = 16
LSE_BASES = (2, "e")
# What multiplies a tensor of e4m3: a number, or a float32 tensor of one element.
Scale = float | torch.Tensor
# Channels of the latent and of the rope part that there are, and the pairs of them, as messages have them.
CKV_DIMS = tuple(dict.fromkeys(dims.ckv for dims in HEAD_DIMS))
KPE_DIMS = tuple(dict.fromkeys(dims.kpe for dims in HEAD_DIMS))
HEAD_DIMS_TEXT = ", ".join(map(str, HEAD_DIMS))


def expect_int(name: str, value: object, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < least or (most is not None and value > most):
        raise ValueError(f"{name}: expected {f'>= {least}' if most is None else f'{least} to {most}'}, got {value}")


def expect_bool(name: str, value: object) -> None:
    if type(value) is not bool:
        raise TypeError(f"{name}: expected True or False, got {describe(value)}")


def expect_lse_base(lse_base: int | str) -> None:
    if isinstance(lse_base, bool) or not isinstance(lse_base, (int, str)):
        raise TypeError(f"lse_base: expected 2 or 'e', got {describe(lse_base)}")
    if lse_base not in LSE_BASES:
        raise ValueError(f"lse_base: expected 2 or 'e', got {lse_base!r}")


def expect_scale(name: str, x: Any) -> None:
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        raise TypeError(f"{name}: expected a Python number, got {describe(x)}")
    if not MIN_SCALE <= x <= MAX_SCALE:  # type: ignore[operator]
        raise ValueError(f"{name}: expected a positive number from 2^-126 to 2^126, got {x}")


def expect_tensor_scale(name: str, x: Scale, device: torch.device) -> None:
    """A scale of a tensor: a number, or a float32 tensor of one element on the device of the call."""
    if not isinstance(x, torch.Tensor):
        expect_scale(name, x)
        return
    if x.dtype is not torch.float32:
        raise TypeError(f"{name}: expected a number or a tensor of dtype torch.float32, got {describe(x)}")
    if x.numel() != 1:
        raise ValueError(f"{name}: expected a number or a tensor of one element, got shape {list(x.shape)}")
    expect_device(name, x, device)


def expect_one(name: str, x: Scale, with_what: str) -> None:
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        raise TypeError(f"{name}: expected a Python number, got {describe(x)}")
    if x != 1:
        raise ValueError(f"{name}: expected 1.0 with {with_what}, got {x}")


def expect_dtype(name: str, x: torch.Tensor, like: str, dtype: torch.dtype, others: str = "") -> None:
    """`like` is the argument that has to have the same dtype; `others` names what else is legal."""
    if x.dtype is not dtype:
        raise TypeError(f"{name}: expected dtype {dtype} (that of {like}){others}, got {x.dtype}")


def expect_operand(
    name: str, x: torch.Tensor, expected: tuple[int | None, ...], form: str, device: torch.device
) -> None:
    expect_shape(name, x, expected, form)
    expect_placed(name, x, device)


def expect_placed(name: str, x: torch.Tensor, device: torch.device, like: str = "q_nope") -> None:
    expect_device(name, x, device, like)
    expect_aligned(name, x)


def expect_metadata(
    name: str, x: torch.Tensor, expected: tuple[int | None, ...], form: str, device: torch.device | None
) -> None:
    """An int32 tensor of shape `expected` on `device` (None: wherever it is), last dimension contiguous."""
    expect_tensor(name, x)
    if x.dtype is not torch.int32:
        raise TypeError(f"{name}: expected dtype torch.int32, got {x.dtype}")
    expect_shape(name, x, expected, form)
    if device is not None:
        expect_device(name, x, device)
    if x.is_cuda and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name}: expected stride 1 in the last dimension, got strides {list(x.stride())}")


def expect_indptr(name: str, x: Any, device: torch.device | None) -> int:
    """An int32 tensor [batch + 1] on `device` (None: wherever it is); returns batch."""
    expect_metadata(name, x, (None,), "[batch + 1]", device)
    if x.shape[0] < 1:
        raise ValueError(f"{name}: expected shape [batch + 1], got [0]")
    return x.shape[0] - 1


def expect_tensor(name: str, x: object) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {describe(x)}")


def expect_not_alone(name: str, x: object, other: str) -> None:
    """Of an argument that is None only where `other` is, too."""
    if x is None:
        raise TypeError(
            f"{name}: expected a torch.Tensor, got NoneType None (it says that there is no rope part, where {other} is "
            "None too)"
        )


def expect_dense(name: str, x: object) -> None:
    """A tensor with strides, neither sparse nor nested."""
    expect_tensor(name, x)
    assert isinstance(x, torch.Tensor)
    if x.is_nested or x.layout is not torch.strided:
        got = "a nested tensor" if x.is_nested else f"a tensor of layout {x.layout}"
        raise TypeError(f"{name}: expected a dense torch.Tensor, got {got}")


def expect_shape(name: str, x: torch.Tensor, expected: tuple[int | None, ...], form: str) -> None:
    """`expected` has None where any size will do; the message has the name of that size in `form`, the shape in
    words: "[3, max_pages]" for (3, None) and "[batch, max_pages]"."""
    actual = tuple(x.shape)
    if len(actual) == len(expected) and all(e is None or e == a for e, a in zip(expected, actual, strict=True)):
        return
    raise ValueError(f"{name}: expected shape {_shown(expected, form)}, got {list(actual)}")


def _shown(expected: tuple[int | None, ...], form: str) -> str:
    names = form.strip("[]").split(", ")
    if None not in expected:
        return f"{list(expected)}"
    if len(names) == len(expected):
        return f"[{', '.join(n if e is None else str(e) for e, n in zip(expected, names, strict=True))}]"
    return form


def expect_channels(
    name: str, x: torch.Tensor, sizes: tuple[int | None, ...], form: str, widths: tuple[int, ...], like: str = ""
) -> int:
    """A shape of `sizes`, as `expect_shape` takes them, and behind them one of `widths`, which is returned: channels of
    a head. `like` is the argument that the only width is of."""
    form = f"[{form}, {' or '.join(map(str, widths))}]"
    for width in widths:  # that of a graph may be a symbol
        if x.dim() == len(sizes) + 1 and x.shape[-1] == width:
            expect_shape(name, x, (*sizes, width), form)
            return width
    shown = _shown((*sizes, widths[0] if len(widths) == 1 else None), form)
    whose = f"{like} has {widths[0]}; " if like else ""
    raise ValueError(
        f"{name}: expected shape {shown}, got {list(x.shape)} ({whose}head dimensions are {HEAD_DIMS_TEXT})"
    )


def expect_device(name: str, x: torch.Tensor, device: torch.device, like: str = "q_nope") -> None:
    """`like` is the argument that `device` is of."""
    if x.device != device:
        raise ValueError(f"{name}: expected device {device} (that of {like}), got {x.device}")


def expect_float32(
    name: str, x: torch.Tensor, expected: tuple[int, ...], form: str, device: torch.device, like: str = "q_nope"
) -> None:
    """A contiguous float32 tensor of shape `expected` on `device`; `form` and `like` as above."""
    expect_tensor(name, x)
    if x.dtype is not torch.float32:
        raise TypeError(f"{name}: expected dtype torch.float32, got {x.dtype}")
    expect_shape(name, x, expected, form)
    expect_device(name, x, device, like)
    if not x.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {list(x.stride())}")


def expect_aligned(name: str, x: torch.Tensor, num_bytes: int = ALIGN_BYTES) -> None:
    """Strides and base address the kernels can load from in units of `num_bytes`; a CPU tensor may have any."""
    if not x.is_cuda or x.numel() == 0:
        return
    strides = list(x.stride())
    if x.shape[-1] > 1 and strides[-1] != 1:
        raise ValueError(f"{name}: expected stride 1 in the last dimension, got strides {strides}")
    elements = num_bytes // x.itemsize
    if any(size > 1 and stride % elements for size, stride in zip(x.shape[:-1], strides[:-1], strict=True)):
        raise ValueError(
            f"{name}: expected strides that are multiples of {elements} elements ({num_bytes} bytes), "
            f"got strides {strides}"
        )
    if x.data_ptr() % num_bytes:
        raise ValueError(
            f"{name}: expected a base address that is a multiple of {num_bytes} bytes, got {x.data_ptr():#x}"
        )


def rows_fit_32_bits(cache: torch.Tensor, sparse: bool = False) -> bool:
    """Whether the gather, which loads single tokens and pages of a size that is no multiple of 8, can name each row: it
    counts offsets in 32 bits, in units of the greatest common divisor of the strides."""
    num_pages, page_size, _ = cache.shape
    of_page, of_row, _ = cache.stride()
    if (page_size % 8 == 0 and not sparse) or num_pages * of_page * cache.itemsize <= ALIGN_BYTES << 32:
        return True
    unit = math.gcd(of_page, of_row)
    return ((num_pages - 1) * of_page + (page_size - 1) * of_row) // unit < 1 << 32


def expect_rows_fit_32_bits(name: str, cache: torch.Tensor, sparse: bool = False) -> None:
    if cache.is_cuda and not rows_fit_32_bits(cache, sparse):
        why = "in a sparse call" if sparse else f"with page_size {cache.shape[1]}, which is no multiple of 8"
        raise ValueError(
            f"{name}: expected at most 2^32 steps of the greatest common divisor of its strides {why}, got strides "
            f"{list(cache.stride())} and {cache.shape[0]} pages"
        )


def expect_own_memory(name: str, x: torch.Tensor) -> None:
    if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise ValueError(
            f"{name}: expected memory for every element, got an expanded tensor of strides {list(x.stride())}"
        )


def describe(x: object) -> str:
    return f"a torch.Tensor of {x.dtype}" if isinstance(x, torch.Tensor) else f"{type(x).__name__} {x!r:.80}"
