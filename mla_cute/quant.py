"""FP8 formats of the latent cache: quantise and dequantise in torch. All are e4m3 with real = stored * scale.

    format        per token                   scales
    tensor        512 + 64 e4m3 = 576 B       ckv_scale, kpe_scale: floats of the whole cache
    token         512 e4m3 + 64 bf16 = 640 B  ckv_scale_arr [..., 1] float32
    group         512 e4m3 + 64 bf16          ckv_scale_arr [..., 4] float32, one per 128 channels

DeepSeek-V3.2 keeps the group format in rows of 656 bytes (512 e4m3, 4 float32, 64 bf16): `group_rows` has the three
parts as views of such a uint8 pool. Leading dimensions are free: [tokens], or [num_pages, page_size] as in a cache.

`append_to_cache` writes new tokens in these formats. What is computed here does not depend on the device, the sign of a
NaN excepted.
"""

from __future__ import annotations

import torch

from .expect import MAX_SCALE, MIN_SCALE
from .problem import CKV_DIM, KPE_DIM

GROUP = 128
GROUP_ROW_BYTES = CKV_DIM + 4 * (CKV_DIM // GROUP) + 2 * KPE_DIM
E4M3_MAX = 448.0


def _expect_width(name: str, x: torch.Tensor, width: int) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {x.dtype}")
    if x.dim() < 1 or x.shape[-1] != width:
        raise ValueError(f"{name}: expected a last dimension of {width}, got shape {list(x.shape)}")


def _float_scale(name: str, scale: float) -> float:
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"{name}: expected a float, got {scale!r}")
    if not MIN_SCALE <= scale <= MAX_SCALE:
        raise ValueError(f"{name}: expected a positive number from 2^-126 to 2^126, got {scale}")
    return float(scale)


def _divide(x: torch.Tensor, by: torch.Tensor | float) -> torch.Tensor:
    """x / by in float32. A number becomes a tensor of x's device: torch multiplies a CUDA tensor by the reciprocal of a
    number, which is another last bit than its division on the CPU."""
    return x / (by if isinstance(by, torch.Tensor) else torch.full((), by, dtype=torch.float32, device=x.device))


def to_e4m3(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """x / scale in float8_e4m3fn, round to nearest even; what exceeds 448 * scale saturates, NaN stays NaN."""
    return _divide(x.float(), scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _scale_of(x: torch.Tensor) -> torch.Tensor:
    """amax / 448 along the last dimension (kept), float32; 1 where all is zero, so that nothing divides by zero, and
    where there is a NaN."""
    largest = x.float().abs().amax(dim=-1, keepdim=True)
    return torch.where(largest > 0, _divide(largest, E4M3_MAX), torch.ones_like(largest))


def tensor_scale(x: torch.Tensor) -> float:
    """amax / 448 of a tensor, 1 if it is zero or empty: a scale for `quantize_tensor`. Synchronises with the device."""
    if x.numel() == 0:
        return 1.0
    return float(_scale_of(x.reshape(1, -1)).item())


def quantize_tensor(
    ckv: torch.Tensor, kpe: torch.Tensor, ckv_scale: float, kpe_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Format "tensor".

    Args:
        ckv: [..., 512], kpe: [..., 64], floating point.
        ckv_scale, kpe_scale: > 0; see `tensor_scale`.

    Returns:
        (ckv, kpe) in float8_e4m3fn.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _expect_width("ckv", ckv, CKV_DIM)
    _expect_width("kpe", kpe, KPE_DIM)
    ckv_scale, kpe_scale = _float_scale("ckv_scale", ckv_scale), _float_scale("kpe_scale", kpe_scale)
    return to_e4m3(ckv, ckv_scale), to_e4m3(kpe, kpe_scale)


def dequantize_tensor(
    ckv: torch.Tensor, kpe: torch.Tensor, ckv_scale: float, kpe_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Format "tensor" back to float32: (ckv [..., 512], kpe [..., 64]). Raises as `quantize_tensor`."""
    _expect_width("ckv", ckv, CKV_DIM)
    _expect_width("kpe", kpe, KPE_DIM)
    ckv_scale, kpe_scale = _float_scale("ckv_scale", ckv_scale), _float_scale("kpe_scale", kpe_scale)
    return ckv.float() * ckv_scale, kpe.float() * kpe_scale


def quantize_token(ckv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Format "token": ckv [..., 512] to (float8_e4m3fn [..., 512], ckv_scale_arr [..., 1] float32). Rope stays bf16."""
    _expect_width("ckv", ckv, CKV_DIM)
    scale = _scale_of(ckv)
    return to_e4m3(ckv, scale), scale


def quantize_group(ckv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Format "group": ckv [..., 512] to (float8_e4m3fn [..., 512], ckv_scale_arr [..., 4] float32). Rope stays bf16."""
    _expect_width("ckv", ckv, CKV_DIM)
    groups = ckv.unflatten(-1, (CKV_DIM // GROUP, GROUP))
    scale = _scale_of(groups)
    return to_e4m3(groups, scale).flatten(-2), scale.squeeze(-1)


def dequantize(ckv: torch.Tensor, ckv_scale_arr: torch.Tensor) -> torch.Tensor:
    """Formats "token" and "group" back to float32 [..., 512].

    Args:
        ckv: [..., 512] float8_e4m3fn.
        ckv_scale_arr: [..., 1] or [..., 4] float32, leading dimensions of ckv.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _expect_width("ckv", ckv, CKV_DIM)
    if not isinstance(ckv_scale_arr, torch.Tensor) or ckv_scale_arr.dtype is not torch.float32:
        got = ckv_scale_arr.dtype if isinstance(ckv_scale_arr, torch.Tensor) else type(ckv_scale_arr).__name__
        raise TypeError(f"ckv_scale_arr: expected a float32 tensor, got {got}")
    scales = ckv_scale_arr.shape[-1] if ckv_scale_arr.dim() else 0
    if ckv_scale_arr.shape[:-1] != ckv.shape[:-1] or scales not in (1, CKV_DIM // GROUP):
        lead = ", ".join(map(str, ckv.shape[:-1]))
        expected = f"[{lead}{', ' if lead else ''}1 or {CKV_DIM // GROUP}]"
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
    if pool.dim() < 1 or pool.shape[-1] != GROUP_ROW_BYTES:
        raise ValueError(f"pool: expected a last dimension of {GROUP_ROW_BYTES}, got shape {list(pool.shape)}")
    if pool.stride(-1) != 1 or any(stride % 4 for stride in pool.stride()[:-1]) or pool.storage_offset() % 4:
        raise ValueError(
            "pool: expected a contiguous last dimension and other strides and offset in multiples of 4 bytes, got "
            f"strides {list(pool.stride())} and offset {pool.storage_offset()}"
        )
    scales_end = CKV_DIM + 4 * (CKV_DIM // GROUP)
    return (
        pool[..., :CKV_DIM].view(torch.float8_e4m3fn),
        pool[..., CKV_DIM:scales_end].view(torch.float32),
        pool[..., scales_end:].view(torch.bfloat16),
    )
