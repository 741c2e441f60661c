"""FP8 twins of 16-bit decode and prefill cases, and the same numbers in float32, for the tests of this folder."""

from dataclasses import dataclass
from typing import Any

import torch

from mla_cute import quant
from mla_cute.testing.cases import DecodeCase

E4M3 = torch.float8_e4m3fn
# "group656": the group format in rows of 656 bytes
LAYOUTS = ("tensor", "token", "group", "group656")
FORMAT_OF = {layout: layout.removesuffix("656") for layout in LAYOUTS}


@dataclass
class Fp8Operands:
    """Arguments of a call that replace those of the 16-bit case, and what they stand for.

    `tensors`: q_nope, q_pe, ckv_cache, kpe_cache by name; `scales`: the scale keywords; `real`: the four tensors in
    float32, multiplied by their scales. Rows that the case does not use are NaN, and so are their scales.
    """

    tensors: dict[str, torch.Tensor]
    scales: dict[str, Any]
    real: dict[str, torch.Tensor]
    dtype: torch.dtype


def make_fp8(case: DecodeCase, layout: str, q_fp8: bool, q: tuple[torch.Tensor, torch.Tensor] | None = None):
    """`q` is (q_nope, q_pe) where they are not the case's; 16-bit parts keep the dtype of the case."""
    q_nope, q_pe = q or (case.q_nope, case.q_pe)
    ckv, kpe = case.ckv_cache, case.kpe_cache
    kv_format, dtype = FORMAT_OF[layout], ckv.dtype
    scales: dict[str, Any] = {}
    if kv_format == "tensor":
        scales |= {"ckv_scale": 0.0625 / 3, "kpe_scale": 0.3}
        ckv, kpe = quant.quantize_tensor(ckv, kpe, **scales)
        real_ckv, real_kpe = ckv.float() * scales["ckv_scale"], kpe.float() * scales["kpe_scale"]
    else:
        dead = ckv[..., 0].isnan()
        # scales that differ from token to token by much
        spread = torch.linspace(0.01, 30.0, dead.numel()).view(*dead.shape, 1)
        ckv, array = {"token": quant.quantize_token, "group": quant.quantize_group}[kv_format](ckv * spread)
        array[dead] = torch.nan
        if layout == "group656":
            pool = torch.empty(*dead.shape, quant.GROUP_ROW_BYTES, dtype=torch.uint8)
            parts = quant.group_rows(pool)
            for part, values in zip(parts, (ckv, array, kpe.to(torch.bfloat16)), strict=True):
                part.copy_(values)
            ckv, array, kpe = parts
        scales["ckv_scale_arr"] = array
        width = 512 // array.shape[-1]
        real_ckv, real_kpe = ckv.float() * array.repeat_interleave(width, dim=-1), kpe.float()
    q_pe_scale = 1.0
    if q_fp8:
        scales["q_scale"] = 0.017
        q_nope = quant.to_e4m3(q_nope, scales["q_scale"])
        if kv_format == "tensor":
            q_pe, q_pe_scale, dtype = quant.to_e4m3(q_pe, scales["q_scale"]), scales["q_scale"], torch.bfloat16
    real_q_nope = q_nope.float() * scales["q_scale"] if q_fp8 else q_nope.float()
    names = ("q_nope", "q_pe", "ckv_cache", "kpe_cache")
    return Fp8Operands(
        dict(zip(names, (q_nope, q_pe, ckv, kpe), strict=True)),
        scales,
        dict(zip(names, (real_q_nope, q_pe.float() * q_pe_scale, real_ckv, real_kpe), strict=True)),
        dtype,
    )
