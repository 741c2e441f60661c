"""Append new tokens to a paged latent cache, quantised where the cache is FP8: one kernel, a warp per token."""

from __future__ import annotations

from typing import Any

import torch

from . import quant
from .call import UNSCALED, Cache, no_channels
from .check import DIMS_OF, DTYPE_NAMES, DTYPES, FORMAT_OF_SCALES, FP8, expect_format
from .check_device import first_of, raise_first
from .compile import jit
from .dims import HeadDims
from .expect import (
    CKV_DIMS,
    KPE_DIMS,
    MAX_SCALE,
    MIN_SCALE,
    expect_aligned,
    expect_channels,
    expect_dense,
    expect_device,
    expect_dtype,
    expect_not_alone,
    expect_one,
    expect_own_memory,
    expect_placed,
    expect_scale,
    expect_shape,
)
from .kernels.keys import APPEND, AppendKey
from .plan import check_enabled, num_sms

_SLOT_NAMES = {torch.int32: "int32", torch.int64: "int64"}
# The kernel counts tokens, pages and the rows of a page in 32 bits, four tokens to a block.
_MAX_SIZE = 2**31 - 4


def append_to_cache(
    ckv: torch.Tensor,
    kpe: torch.Tensor | None,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor | None,
    slot_mapping: torch.Tensor,
    *,
    ckv_scale: float = UNSCALED,
    kpe_scale: float = UNSCALED,
    ckv_scale_arr: torch.Tensor | None = None,
) -> None:
    """Write n new tokens into their slots of a paged cache, in the cache's format.

    Args:
        ckv: [n, C] bfloat16 or float16; last dimension contiguous, rows and address multiples of 16 bytes. C and R, the
            channels of the latent and of the rope part, are those of :func:`mla_paged_decode`: 512 + 64, in 16 bits and
            in format "tensor" also 512 + 32, 512 + 0, 256 + 64, 256 + 32 and 256 + 0.
        kpe: [n, R], dtype of ckv, likewise; None: R is 0.
        ckv_cache: [num_pages, page_size, C], dtype of ckv or float8_e4m3fn; as for :func:`mla_paged_decode`.
        kpe_cache: [num_pages, page_size, R], likewise; None where kpe is, too.
        slot_mapping: [n] int32 or int64: page * page_size + row of each token; negative: the token is padding and is
            skipped.
        ckv_scale, kpe_scale: Python numbers > 0, the scales of format "tensor"; else 1, kpe_scale also where R is 0.
        ckv_scale_arr: float32 [num_pages, page_size, 1] (format "token") or [num_pages, page_size, 4] (format "group"),
            written with the scales computed here from the largest magnitude, amax, of the token or of 128 of its
            channels: amax / 448, in format "group" rounded up to a power of two, at least 2^-126; 1 where amax is 0,
            infinite or NaN. None otherwise.

    What is stored, by format:

        format    ckv_cache        kpe_cache        what is stored
        (16 bit)  dtype of ckv     dtype of ckv     a copy
        "tensor"  float8_e4m3fn    float8_e4m3fn    ckv / ckv_scale, kpe / kpe_scale
        "token"   float8_e4m3fn    dtype of ckv     ckv / scale of the token, a copy of kpe
        "group"   float8_e4m3fn    dtype of ckv     ckv / scale of the group, a copy of kpe

    Stored e4m3 values are rounded to nearest even, saturate at +-448 and keep NaN: bit for bit (the sign of a NaN
    excepted) what :mod:`mla_cute.quant` makes of the same tokens. So an infinity is stored as +-448, and beside one in
    formats "token" and "group" values keep their size up to 448.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what it was. Nothing
            has been written.
        RuntimeError: a CUDA device that is not Hopper (compute capability 9.0).

    Runs on torch's current stream and can be captured in a CUDA graph. CPU tensors are written by torch. Of two tokens
    with one slot, which wins is undefined, as is what slots beyond num_pages * page_size do on CUDA, except with
    MLA_CUTE_CHECK=1, which looks at the slots, synchronising, and raises ValueError.
    """
    if kpe is None and kpe_cache is None:
        kpe, kpe_cache = no_channels(ckv), no_channels(ckv_cache)
    kv_format, dims = _check(ckv, kpe, ckv_cache, kpe_cache, slot_mapping, ckv_scale, kpe_scale, ckv_scale_arr)
    assert kpe is not None
    assert kpe_cache is not None
    if slot_mapping.shape[0] == 0:
        return
    on_gpu = ckv.is_cuda
    if not on_gpu or check_enabled():
        _verify_slots(slot_mapping, ckv_cache.shape[0] * ckv_cache.shape[1])
    if not on_gpu:
        append_reference(
            ckv, kpe, ckv_cache, kpe_cache, slot_mapping, kv_format, float(ckv_scale), float(kpe_scale), ckv_scale_arr
        )
        return
    num_sms(ckv.device)
    if kv_format:
        ckv_cache = ckv_cache.view(torch.uint8)
        if kv_format == "tensor":
            kpe_cache = kpe_cache.view(torch.uint8)
    if not dims.kpe:  # the kernel takes tensors there, and reads nothing of them
        kpe, kpe_cache = ckv, ckv_cache
    append = jit.get(APPEND, AppendKey(DTYPE_NAMES[ckv.dtype], kv_format, _SLOT_NAMES[slot_mapping.dtype], dims), None)
    append(
        ckv,
        kpe,
        ckv_cache,
        kpe_cache,
        # without scales the kernel takes any tensor here
        slot_mapping if ckv_scale_arr is None else ckv_scale_arr,
        slot_mapping,
        float(ckv_scale),
        float(kpe_scale),
    )


@torch.no_grad()
def append_reference(
    ckv: torch.Tensor,
    kpe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_format: str,
    ckv_scale: float = UNSCALED,
    kpe_scale: float = UNSCALED,
    ckv_scale_arr: torch.Tensor | None = None,
) -> None:
    """`append_to_cache` in torch, of arguments that passed its checks; `kv_format` as in :mod:`mla_cute.quant`."""
    kept = (slot_mapping >= 0).nonzero().squeeze(1)
    slots = slot_mapping[kept].long()
    page_size = ckv_cache.shape[1]
    where = (slots // page_size, slots % page_size)
    ckv, kpe = ckv[kept], kpe[kept]
    if kv_format == "tensor":
        ckv, kpe = quant.quantize_tensor(ckv, kpe, ckv_scale, kpe_scale)
    elif kv_format:
        assert ckv_scale_arr is not None
        quantize = quant.quantize_token if kv_format == "token" else quant.quantize_group
        ckv, ckv_scale_arr[where] = quantize(ckv)
    for cache, rows in ((ckv_cache, ckv), (kpe_cache, kpe)):
        as_bits: Any = torch.uint8 if cache.dtype is FP8 else torch.int16  # a copy of bits, NaN included
        cache.view(as_bits)[where] = rows.view(as_bits)


def _check(
    ckv: torch.Tensor,
    kpe: Any,
    ckv_cache: torch.Tensor,
    kpe_cache: Any,
    slot_mapping: torch.Tensor,
    ckv_scale: float,
    kpe_scale: float,
    ckv_scale_arr: torch.Tensor | None,
) -> tuple[str, HeadDims]:
    """Format and head dimensions of the caches; TypeError or ValueError for the first wrong argument. As in check.py:
    one cheap question whether everything is as usual, and the explanation, which is the authority, only when it is
    not."""
    try:
        found = _usual(ckv, kpe, ckv_cache, kpe_cache, slot_mapping, ckv_scale, kpe_scale, ckv_scale_arr)
        if found is not None:
            return found
    except (AttributeError, RuntimeError, TypeError, ValueError):
        pass  # an argument is no dense tensor or has another rank; which one is the explanation's job
    return _explain(ckv, kpe, ckv_cache, kpe_cache, slot_mapping, ckv_scale, kpe_scale, ckv_scale_arr)


def _usual(
    ckv: torch.Tensor,
    kpe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    ckv_scale: float,
    kpe_scale: float,
    ckv_scale_arr: torch.Tensor | None,
) -> tuple[str, HeadDims] | None:
    """As `_check`, or None when anything is unusual (which need not be wrong)."""
    n, ckv_dim = ckv.shape
    _, kpe_dim = kpe.shape
    num_pages, page_size, cache_dim = ckv_cache.shape
    dims = DIMS_OF.get((ckv_dim, kpe_dim))  # type: ignore[call-overload]
    dtype, device, kpe_dtype = ckv.dtype, ckv.device, kpe_cache.dtype
    on_gpu = ckv.is_cuda
    if not (
        dims is not None
        and cache_dim == ckv_dim
        and n <= _MAX_SIZE
        and 1 <= num_pages <= _MAX_SIZE
        and 1 <= page_size <= _MAX_SIZE
        and dtype in DTYPES
        and kpe.dtype is dtype
        and slot_mapping.dtype in _SLOT_NAMES
        and kpe.shape == (n, kpe_dim)
        and kpe_cache.shape == (num_pages, page_size, kpe_dim)
        and slot_mapping.shape == (n,)
        and kpe.device == device
        and ckv_cache.device == device
        and kpe_cache.device == device
        and slot_mapping.device == device
        and (on_gpu or (ckv.is_cpu and slot_mapping.layout is torch.strided))
        and type(ckv_scale) is type(kpe_scale) is float
        and _is_aligned_to(16, on_gpu, ckv, ckv_cache)
        and (not kpe_dim or _is_aligned_to(16, on_gpu, kpe, kpe_cache))
    ):
        return None
    kv_format = "tensor"
    if ckv_scale_arr is not None:
        _, _, num_scales = ckv_scale_arr.shape
        if not (
            dims == HeadDims()
            and num_scales in FORMAT_OF_SCALES
            and ckv_scale_arr.shape == (num_pages, page_size, num_scales)
            and ckv_scale_arr.dtype is torch.float32
            and ckv_scale_arr.device == device
            and ckv_cache.dtype is FP8
            and kpe_dtype is dtype
            and _is_aligned_to(4 * num_scales, on_gpu, ckv_scale_arr)
        ):
            return None
        kv_format = FORMAT_OF_SCALES[num_scales]
    elif ckv_cache.dtype is dtype and kpe_dtype is dtype:
        kv_format = ""
    elif not (ckv_cache.dtype is FP8 and kpe_dtype is FP8):
        return None
    if kv_format == "tensor":
        usual = MIN_SCALE <= ckv_scale <= MAX_SCALE
        usual = usual and (MIN_SCALE <= kpe_scale <= MAX_SCALE if kpe_dim else kpe_scale == 1.0)
    else:
        usual = ckv_scale == kpe_scale == 1.0
    return (kv_format, dims) if usual else None


def _is_aligned_to(num_bytes: int, on_gpu: bool, *operands: torch.Tensor) -> bool:
    """No stride is 0, the last is 1; on a GPU, the others and the address are multiples of `num_bytes`."""
    for x in operands:
        *outer, last = x.stride()
        if last != 1 or 0 in outer:
            return False
        if on_gpu:
            bits = x.data_ptr()
            for stride in outer:
                bits |= stride * x.itemsize
            if bits % num_bytes:
                return False
    return True


def _explain(
    ckv: torch.Tensor,
    kpe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    ckv_scale: float,
    kpe_scale: float,
    ckv_scale_arr: torch.Tensor | None,
) -> tuple[str, HeadDims]:
    expect_dense("ckv", ckv)
    dtype, device = ckv.dtype, ckv.device
    if dtype not in DTYPES:
        raise TypeError(f"ckv: expected dtype {' or '.join(map(str, DTYPES))}, got {dtype}")
    ckv_dim = expect_channels("ckv", ckv, (None,), "n", CKV_DIMS)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"ckv: expected a tensor on a cuda device or the cpu, got device {device}")
    expect_aligned("ckv", ckv)
    n = ckv.shape[0]
    if n > _MAX_SIZE:
        raise ValueError(f"ckv: expected at most {_MAX_SIZE} tokens (dimension 0), got {n}")

    expect_not_alone("kpe", kpe, "kpe_cache")
    expect_dense("kpe", kpe)
    expect_dtype("kpe", kpe, "ckv", dtype)
    kpe_dim = expect_channels("kpe", kpe, (n,), "n", KPE_DIMS)
    expect_placed("kpe", kpe, device, "ckv")

    expect_dense("ckv_cache", ckv_cache)
    if ckv_cache.dtype is not FP8:
        expect_dtype("ckv_cache", ckv_cache, "ckv", dtype, f" or {FP8}")
    expect_channels("ckv_cache", ckv_cache, (None, None), "num_pages, page_size", (ckv_dim,), "ckv")
    num_pages, page_size, _ = ckv_cache.shape
    if num_pages < 1:
        raise ValueError(f"ckv_cache: expected num_pages >= 1 (dimension 0), got {num_pages}")
    if page_size < 1:
        raise ValueError(f"ckv_cache: expected page_size >= 1 (dimension 1), got {page_size}")
    if num_pages > _MAX_SIZE:
        raise ValueError(f"ckv_cache: expected num_pages <= {_MAX_SIZE} (dimension 0), got {num_pages}")
    if page_size > _MAX_SIZE:
        raise ValueError(f"ckv_cache: expected page_size <= {_MAX_SIZE} (dimension 1), got {page_size}")
    _expect_target("ckv_cache", ckv_cache, device)

    expect_not_alone("kpe_cache", kpe_cache, "kpe")
    expect_dense("kpe_cache", kpe_cache)
    is_16bit = ckv_cache.dtype is not FP8
    if is_16bit:
        expect_dtype("kpe_cache", kpe_cache, "ckv_cache", dtype)
    elif kpe_cache.dtype is not FP8:
        expect_dtype("kpe_cache", kpe_cache, "kpe", dtype, f" or {FP8}")
    expect_channels("kpe_cache", kpe_cache, (num_pages, page_size), "num_pages, page_size", (kpe_dim,), "kpe")
    _expect_target("kpe_cache", kpe_cache, device)

    expect_dense("slot_mapping", slot_mapping)
    if slot_mapping.dtype not in _SLOT_NAMES:
        raise TypeError(f"slot_mapping: expected dtype torch.int32 or torch.int64, got {slot_mapping.dtype}")
    expect_shape("slot_mapping", slot_mapping, (n,), "")
    expect_device("slot_mapping", slot_mapping, device, "ckv")

    if isinstance(ckv_scale_arr, torch.Tensor):
        expect_dense("ckv_scale_arr", ckv_scale_arr)
        expect_device("ckv_scale_arr", ckv_scale_arr, device, "ckv")
    kv_format = expect_format(is_16bit, Cache(ckv_cache, kpe_cache, scale_arr=ckv_scale_arr), device)
    if ckv_scale_arr is not None:
        expect_own_memory("ckv_scale_arr", ckv_scale_arr)
    if kv_format == "tensor":
        expect_scale("ckv_scale", ckv_scale)
        if kpe_dim:
            expect_scale("kpe_scale", kpe_scale)
        else:
            expect_one("kpe_scale", kpe_scale, "a kpe_cache of width 0")
    else:
        with_what = "ckv_scale_arr" if kv_format else "a 16-bit ckv_cache"
        expect_one("ckv_scale", ckv_scale, with_what)
        expect_one("kpe_scale", kpe_scale, with_what)
    return kv_format, HeadDims(ckv_dim, kpe_dim)


def _expect_target(name: str, x: torch.Tensor, device: torch.device) -> None:
    expect_placed(name, x, device, "ckv")
    expect_own_memory(name, x)


def _verify_slots(slot_mapping: torch.Tensor, num_slots: int) -> None:
    raise_first(
        [
            (
                # As int64: torch would wrap a bound beyond 2^31 to the dtype of the tensor.
                first_of(slot_mapping.long() >= num_slots, slot_mapping),
                lambda at, value: (
                    f"slot_mapping: expected values below {num_slots} (num_pages * page_size), got {value} "
                    f"at position {at}"
                ),
            )
        ]
    )
