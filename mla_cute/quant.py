"""FP8 formats of the latent cache: quantise and dequantise in torch. All are e4m3 with real = stored * scale.

    format        per token                   scales
    tensor        512 + 64 e4m3 = 576 B       ckv_scale, kpe_scale: floats of the whole cache; also 256 channels of ckv,
                                              and 32 of kpe or none
    token         512 e4m3 + 64 bf16 = 640 B  ckv_scale_arr [..., 1] float32
    group         512 e4m3 + 64 bf16          ckv_scale_arr [..., 4] float32, one per 128 channels

DeepSeek-V3.2 keeps the group format in rows of 656 bytes (512 e4m3, 4 float32, 64 bf16): `group_rows` has the three
parts as views of such a uint8 pool. Leading dimensions are free: [tokens], or [num_pages, page_size] as in a cache.

A scale that is computed here comes from amax, the largest magnitude of what shares it, as float32:

    tensor, token    amax / 448
    group            amax / 448 rounded up to a power of two, at least 2^-126: kernels of other projects read the scales
                     of such rows as bf16, which a power of two survives
    all              1 where amax is 0, infinite or NaN: an infinity is stored as 448, and values up to 448 keep their
                     size

Reading takes any float32 scale. `append_to_cache` writes new tokens in these formats. What is computed here does not
depend on the device, the sign of a NaN excepted.
"""

from __future__ import annotations

import math

import torch

from .check import FP8
from .dims import CKV_DIM, GROUP_DIM, GROUP_ROPE_AT, GROUP_ROW_BYTES, GROUP_SCALES_AT
from .expect import CKV_DIMS, KPE_DIMS, MIN_SCALE, expect_dense, expect_scale

E4M3_MAX = 448.0


def _expect_floating(name: str, x: torch.Tensor) -> None:
    expect_dense(name, x)
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {x.dtype}")


def _expect_width(name: str, x: torch.Tensor, *widths: int) -> None:
    _expect_floating(name, x)
    if x.dim() < 1 or x.shape[-1] not in widths:
        expected = " or ".join(map(str, widths))
        raise ValueError(f"{name}: expected a last dimension of {expected}, got shape {list(x.shape)}")


def _expect_stored(name: str, x: torch.Tensor, *widths: int) -> None:
    _expect_width(name, x, *widths)
    if x.dtype is not FP8:
        raise TypeError(f"{name}: expected dtype {FP8}, got {x.dtype}")


def _float_scale(name: str, scale: float) -> float:
    expect_scale(name, scale)
    return float(scale)


def _divide(x: torch.Tensor, by: torch.Tensor | float) -> torch.Tensor:
    """x / by in float32. A number becomes a tensor of x's device: torch multiplies a CUDA tensor by the reciprocal of a
    number, which is another last bit than its division on the CPU."""
    return x / (by if isinstance(by, torch.Tensor) else torch.full((), by, dtype=torch.float32, device=x.device))


def to_e4m3(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """x / scale in float8_e4m3fn, round to nearest even; what exceeds 448 * scale saturates, NaN stays NaN.

    Args:
        x: any shape, floating point.
        scale: a Python number from 2^-126 to 2^126, or a floating-point tensor of positive finite values, on the device
            of x and of a shape that broadcasts to that of x. The values of a tensor are checked on the CPU and nowhere
            else, because reading them would synchronise with the device.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _expect_floating("x", x)
    if isinstance(scale, torch.Tensor):
        return _to_e4m3(x, _tensor_of_scales(scale, x))
    return _to_e4m3(x, _float_scale("scale", scale))


def _to_e4m3(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    return _divide(x.float(), scale).clamp(-E4M3_MAX, E4M3_MAX).to(FP8)


def _tensor_of_scales(scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`to_e4m3`'s scale in float32, checked."""
    _expect_floating("scale", scale)
    # from the last dimension backwards, as torch broadcasts
    sizes = zip(reversed(scale.shape), reversed(x.shape), strict=False)
    if scale.dim() > x.dim() or any(size not in (1, wanted) for size, wanted in sizes):
        raise ValueError(f"scale: expected a shape that broadcasts to {list(x.shape)}, got {list(scale.shape)}")
    if scale.device != x.device:
        raise ValueError(f"scale: expected device {x.device} (that of x), got {scale.device}")
    scale = scale.float()
    if scale.is_cpu and not torch.compiler.is_compiling():
        wrong = scale[~((scale > 0) & (scale < math.inf))]
        if wrong.numel():
            raise ValueError(f"scale: expected positive finite numbers, got {wrong[0].item()}")
    return scale


def _scale_of(x: torch.Tensor, power_of_two: bool = False) -> torch.Tensor:
    """The scale for amax along the last dimension (kept), float32."""
    largest = x.float().abs().amax(dim=-1, keepdim=True)
    scale = _divide(largest, E4M3_MAX)
    if power_of_two:
        # Adding all ones below the exponent raises it by one, unless the mantissa is 0.
        bits = (scale.view(torch.int32) + 0x007FFFFF) & 0x7F800000
        scale = bits.clamp(min=0x00800000).view(torch.float32)
    # 448 times less than the smallest float32 is 0, which nothing may be divided by.
    usable = (largest > 0) & (largest < math.inf) & (scale > 0)
    return torch.where(usable, scale, torch.ones_like(scale))


def tensor_scale(x: torch.Tensor) -> float:
    """A scale for `quantize_tensor`: amax / 448 of a tensor, at least 2^-126; 1 if amax is 0, infinite or NaN, or the
    tensor is empty. Synchronises with the device.

    Raises:
        TypeError, ValueError: x is no floating-point tensor, or has no values.
    """
    _expect_floating("x", x)
    if x.is_meta:
        raise ValueError("x: expected a tensor that has values, got one on the meta device")
    if x.numel() == 0:
        return 1.0
    return max(float(_scale_of(x.reshape(1, -1)).item()), MIN_SCALE)


def quantize_tensor(
    ckv: torch.Tensor, kpe: torch.Tensor, ckv_scale: float, kpe_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Format "tensor".

    Args:
        ckv: [..., 512] or [..., 256], floating point.
        kpe: [..., 64], [..., 32] or [..., 0], likewise.
        ckv_scale, kpe_scale: Python numbers from 2^-126 to 2^126; see `tensor_scale`.

    Returns:
        (ckv, kpe) in float8_e4m3fn.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _expect_width("ckv", ckv, *CKV_DIMS)
    _expect_width("kpe", kpe, *KPE_DIMS)
    ckv_scale, kpe_scale = _float_scale("ckv_scale", ckv_scale), _float_scale("kpe_scale", kpe_scale)
    return _to_e4m3(ckv, ckv_scale), _to_e4m3(kpe, kpe_scale)


def dequantize_tensor(
    ckv: torch.Tensor, kpe: torch.Tensor, ckv_scale: float, kpe_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Format "tensor", ckv and kpe in float8_e4m3fn with the shapes of `quantize_tensor`, back to float32.

    Raises as `quantize_tensor`.
    """
    _expect_stored("ckv", ckv, *CKV_DIMS)
    _expect_stored("kpe", kpe, *KPE_DIMS)
    ckv_scale, kpe_scale = _float_scale("ckv_scale", ckv_scale), _float_scale("kpe_scale", kpe_scale)
    return ckv.float() * ckv_scale, kpe.float() * kpe_scale


def quantize_token(ckv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Format "token": ckv [..., 512] to (float8_e4m3fn [..., 512], ckv_scale_arr [..., 1] float32). Rope stays bf16.
    Raises TypeError or ValueError where ckv is no floating-point tensor of that width."""
    _expect_width("ckv", ckv, CKV_DIM)
    scale = _scale_of(ckv)
    return _to_e4m3(ckv, scale), scale


def quantize_group(ckv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Format "group": ckv [..., 512] to (float8_e4m3fn [..., 512], ckv_scale_arr [..., 4] float32, powers of two). Rope
    stays bf16. Raises as `quantize_token`."""
    _expect_width("ckv", ckv, CKV_DIM)
    groups = ckv.unflatten(-1, (CKV_DIM // GROUP_DIM, GROUP_DIM))
    scale = _scale_of(groups, power_of_two=True)
    return _to_e4m3(groups, scale).flatten(-2), scale.squeeze(-1)


def dequantize(ckv: torch.Tensor, ckv_scale_arr: torch.Tensor) -> torch.Tensor:
    """Formats "token" and "group" back to float32 [..., 512].

    Args:
        ckv: [..., 512] float8_e4m3fn.
        ckv_scale_arr: [..., 1] or [..., 4] float32, any values, leading dimensions of ckv.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _expect_stored("ckv", ckv, CKV_DIM)
    if not isinstance(ckv_scale_arr, torch.Tensor) or ckv_scale_arr.dtype is not torch.float32:
        got = ckv_scale_arr.dtype if isinstance(ckv_scale_arr, torch.Tensor) else type(ckv_scale_arr).__name__
        raise TypeError(f"ckv_scale_arr: expected a float32 tensor, got {got}")
    expect_dense("ckv_scale_arr", ckv_scale_arr)
    scales = ckv_scale_arr.shape[-1] if ckv_scale_arr.dim() else 0
    if ckv_scale_arr.shape[:-1] != ckv.shape[:-1] or scales not in (1, CKV_DIM // GROUP_DIM):
        lead = ", ".join(map(str, ckv.shape[:-1]))
        expected = f"[{lead}{', ' if lead else ''}1 or {CKV_DIM // GROUP_DIM}]"
        raise ValueError(f"ckv_scale_arr: expected shape {expected}, got {list(ckv_scale_arr.shape)}")
    if ckv_scale_arr.device != ckv.device:
        raise ValueError(f"ckv_scale_arr: expected device {ckv.device} (that of ckv), got {ckv_scale_arr.device}")
    groups = ckv.float().unflatten(-1, (scales, CKV_DIM // scales))
    return (groups * ckv_scale_arr.unsqueeze(-1)).flatten(-2)


def group_rows(pool: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The parts of a pool of 656-byte rows, as views: writing to them writes the pool.

    Args:
        pool: [..., 656] uint8, last dimension contiguous, other strides multiples of 4 bytes.

    Returns:
        (ckv [..., 512] float8_e4m3fn, ckv_scale_arr [..., 4] float32, kpe [..., 64] bfloat16).

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(pool, torch.Tensor) or pool.dtype is not torch.uint8:
        got = pool.dtype if isinstance(pool, torch.Tensor) else type(pool).__name__
        raise TypeError(f"pool: expected a uint8 tensor, got {got}")
    expect_dense("pool", pool)
    if pool.dim() < 1 or pool.shape[-1] != GROUP_ROW_BYTES:
        raise ValueError(f"pool: expected a last dimension of {GROUP_ROW_BYTES}, got shape {list(pool.shape)}")
    if pool.stride(-1) != 1 or any(stride % 4 for stride in pool.stride()[:-1]) or pool.storage_offset() % 4:
        raise ValueError(
            "pool: expected a contiguous last dimension and other strides and offset in multiples of 4 bytes, got "
            f"strides {list(pool.stride())} and offset {pool.storage_offset()}"
        )
    return (
        pool[..., :GROUP_SCALES_AT].view(torch.float8_e4m3fn),
        pool[..., GROUP_SCALES_AT:GROUP_ROPE_AT].view(torch.float32),
        pool[..., GROUP_ROPE_AT:].view(torch.bfloat16),
    )
