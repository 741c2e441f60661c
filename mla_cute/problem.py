"""Facts of one call, checked once on the host: what decode is, and what prefill shares (problem_prefill.py).

`check_decode` and `check_decode_block_table` read shapes, dtypes, devices, strides and pointers only: no device memory,
no synchronisation. Each first asks one early-exit question, "is everything as it usually is?", made of the cheapest
attribute reads torch has (a call costs 2 to 3.5 us). Only when the answer is no does `_explain_*` look again, argument
by argument, and raise for the first one that is wrong. The explanation is the authority: what it lets pass is legal (an
odd stride of a dimension of size 1, for example), and what the early exit accepts is a subset of that. FP8 caches have
an early exit of their own kind (`_usual_fp8`), which 16-bit calls pay one comparison for.

`verify_on_device` and `verify_block_table_on_device` check what only the device can see, with one synchronisation; they
run when MLA_CUTE_CHECK=1.

Errors are `TypeError` (not a tensor, wrong dtype, wrong Python type) and `ValueError` (shape, device, stride,
alignment, value). The message starts with the argument's name, then what was expected, then what it was.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

CKV_DIM = 512
KPE_DIM = 64
MAX_HEADS = 128
DTYPES = (torch.bfloat16, torch.float16)
FP8 = torch.float8_e4m3fn
_DTYPES_16BIT = " or ".join(map(str, DTYPES))
# Channels of ckv that share a scale in the format "group" (quant.py), and scales per token of the formats that have an
# array of them.
GROUP_DIM = 128
_FORMAT_OF_SCALES = {1: "token", CKV_DIM // GROUP_DIM: "group"}
LSE_BASES = (2, "e")

# The kernels take sm_scale * log2(e) as a float32 and find a row's largest score before they scale it: the product has
# to be positive, finite, and normal (0 * -inf of a masked score is NaN).
_MIN_SCALE = 2.0**-126
_MAX_SCALE = 2.0**126
# TMA and 16-byte vector accesses: 16 bytes are 8 elements of bf16 or fp16, 16 of e4m3, 4 of float32.
_ALIGN_BYTES = 16
_ALIGN_ELEMENTS = 8

# The default of the scales: the early exit knows this object from others that equal it without looking inside.
UNSCALED = 1.0
# out, lse, lse_base, ckv_scale, kpe_scale, ckv_scale_arr, q_scale
Options = tuple["torch.Tensor | None", "torch.Tensor | None", "int | str", float, float, "torch.Tensor | None", float]


@dataclass(frozen=True, slots=True)
class DecodeProblem:
    """Sizes, dtype and device of a decode call whose arguments passed the checks."""

    # What makes plans for it: from CSR page lists, from a block table.
    planned_by: ClassVar[tuple[str, str]] = ("plan_decode", "plan_decode_block_table")

    batch: int
    num_heads: int
    page_size: int
    num_pages: int
    dtype: torch.dtype
    device: torch.device
    # The FP8 format of the caches (quant.py), "" for 16-bit ones, and whether q_nope is e4m3 (q_pe is too with format
    # "tensor"). `dtype` is the output's.
    kv_format: str = ""
    q_fp8: bool = False
    # Dimensions of size 1 may have strides that TMA would refuse (the early exit accepts none of those).
    odd_strides: bool = field(default=False, compare=False)

    @property
    def total_q(self) -> int:
        """Query tokens: one per request."""
        return self.batch


# A frozen dataclass takes 0.65 us to make, a look-up 0.12 us, and a server's calls repeat.
_problem = functools.lru_cache(maxsize=1024)(DecodeProblem)


def check_decode(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    sm_scale: float,
    kv_last_page_len: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    lse_base: int | str = 2,
    ckv_scale: float = UNSCALED,
    kpe_scale: float = UNSCALED,
    ckv_scale_arr: torch.Tensor | None = None,
    q_scale: float = UNSCALED,
) -> DecodeProblem:
    """Check a decode call with CSR page lists; raise TypeError or ValueError for the first wrong argument."""
    try:
        problem = _usual(
            q_nope, q_pe, ckv_cache, kpe_cache, sm_scale, out, lse, lse_base,
            ckv_scale, kpe_scale, ckv_scale_arr, q_scale,
        )  # fmt: skip
        if problem is not None and _usual_csr(problem.batch, problem.device, kv_indptr, kv_indices, kv_last_page_len):
            return problem
    except (AttributeError, TypeError, ValueError):
        pass  # an argument is no tensor or has another rank; which one is the explanation's job
    options = (out, lse, lse_base, ckv_scale, kpe_scale, ckv_scale_arr, q_scale)
    problem = _explain(q_nope, q_pe, ckv_cache, kpe_cache, options)
    _explain_csr(problem.batch, problem.device, kv_indptr, kv_indices, kv_last_page_len)
    _explain_rest(problem, q_nope, q_pe, sm_scale, options)
    return problem


def check_decode_block_table(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    sm_scale: float,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    lse_base: int | str = 2,
    ckv_scale: float = UNSCALED,
    kpe_scale: float = UNSCALED,
    ckv_scale_arr: torch.Tensor | None = None,
    q_scale: float = UNSCALED,
) -> DecodeProblem:
    """Check a decode call with a padded block table; raise TypeError or ValueError for the first wrong argument."""
    try:
        problem = _usual(
            q_nope, q_pe, ckv_cache, kpe_cache, sm_scale, out, lse, lse_base,
            ckv_scale, kpe_scale, ckv_scale_arr, q_scale,
        )  # fmt: skip
        if problem is not None and _usual_block_table(problem.batch, problem.device, block_table, seq_lens):
            return problem
    except (AttributeError, TypeError, ValueError):
        pass  # an argument is no tensor or has another rank; which one is the explanation's job
    options = (out, lse, lse_base, ckv_scale, kpe_scale, ckv_scale_arr, q_scale)
    problem = _explain(q_nope, q_pe, ckv_cache, kpe_cache, options)
    _explain_block_table(problem.batch, problem.device, block_table, seq_lens)
    _explain_rest(problem, q_nope, q_pe, sm_scale, options)
    return problem


# ------------------------------------------------------------------------------------------------ the early exit


def _usual(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    sm_scale: float,
    out: torch.Tensor | None,
    lse: torch.Tensor | None,
    lse_base: int | str,
    ckv_scale: float,
    kpe_scale: float,
    ckv_scale_arr: torch.Tensor | None,
    q_scale: float,
) -> DecodeProblem | None:
    """The problem, or None when anything is unusual (which need not be wrong)."""
    batch, num_heads, ckv_dim = q_nope.shape
    num_pages, page_size, cache_dim = ckv_cache.shape
    dtype = q_nope.dtype
    device = q_nope.device
    cache_dtype = ckv_cache.dtype
    if not (
        ckv_dim == CKV_DIM
        and cache_dim == CKV_DIM
        and 1 <= num_heads <= MAX_HEADS
        and page_size >= 1
        and num_pages >= 1
        and q_pe.shape == (batch, num_heads, KPE_DIM)
        and kpe_cache.shape == (num_pages, page_size, KPE_DIM)
        and q_pe.device == device
        and ckv_cache.device == device
        and kpe_cache.device == device
        and type(sm_scale) is float
        and _MIN_SCALE <= sm_scale <= _MAX_SCALE
        and ((type(lse_base) is int and lse_base == 2) or (type(lse_base) is str and lse_base == "e"))
    ):
        return None
    if cache_dtype is FP8:
        found = _usual_fp8(
            q_nope, q_pe, ckv_cache, kpe_cache, sm_scale, out, ckv_scale, kpe_scale, ckv_scale_arr, q_scale
        )
        if found is None:
            return None
        dtype, kv_format, q_fp8 = found
    elif not (
        cache_dtype is dtype
        and dtype in DTYPES
        and q_pe.dtype is dtype
        and kpe_cache.dtype is dtype
        and ckv_scale_arr is None
        and (ckv_scale is kpe_scale is q_scale is UNSCALED or _are_one(ckv_scale, kpe_scale, q_scale))
    ):
        return None
    if q_nope.is_cuda:
        if not (_is_aligned(q_nope) and _is_aligned(q_pe) and _is_aligned(ckv_cache) and _is_aligned(kpe_cache)):
            return None
    elif not q_nope.is_cpu:
        return None
    if out is not None and not (
        out.shape == (batch, num_heads, CKV_DIM)
        and out.dtype is dtype
        and out.device == device
        and out.is_contiguous()
        and out.data_ptr() % _ALIGN_BYTES == 0
        and out.data_ptr() != q_nope.data_ptr()
    ):
        return None
    if lse is not None and not (
        lse.shape == (batch, num_heads) and lse.dtype is torch.float32 and lse.device == device and lse.is_contiguous()
    ):
        return None
    if cache_dtype is FP8:
        return _problem(batch, num_heads, page_size, num_pages, dtype, device, kv_format, q_fp8)
    return _problem(batch, num_heads, page_size, num_pages, dtype, device)


def _are_one(*scales: float) -> bool:
    """Of any objects: to compare a tensor would be to read it."""
    return all(type(scale) is float and scale == 1.0 for scale in scales)


def _usual_fp8(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    sm_scale: float,
    out: torch.Tensor | None,
    ckv_scale: float,
    kpe_scale: float,
    ckv_scale_arr: torch.Tensor | None,
    q_scale: float,
) -> tuple[torch.dtype, str, bool] | None:
    """(output dtype, format, whether q_nope is e4m3) of a call with an e4m3 ckv_cache; None when unusual.

    `_usual` looks at what both kinds of cache have in common.
    """
    if not type(ckv_scale) is type(kpe_scale) is type(q_scale) is float:
        return None
    dtype, rope_dtype, kpe_dtype = q_nope.dtype, q_pe.dtype, kpe_cache.dtype
    q_fp8 = dtype is FP8
    if ckv_scale_arr is None:
        if not (
            kpe_dtype is FP8
            and rope_dtype is dtype
            and _MIN_SCALE <= ckv_scale <= _MAX_SCALE
            and _MIN_SCALE <= kpe_scale <= _MAX_SCALE
        ):
            return None
        kv_format = "tensor"
        if q_fp8:
            dtype = DTYPES[0] if out is None else out.dtype
    else:
        num_pages, page_size, num_scales = ckv_scale_arr.shape
        if not (
            kpe_dtype is rope_dtype
            and (q_fp8 or rope_dtype is dtype)
            and ckv_scale == kpe_scale == 1.0
            and (num_pages, page_size) == ckv_cache.shape[:2]
            and num_scales in _FORMAT_OF_SCALES
            and ckv_scale_arr.dtype is torch.float32
            and ckv_scale_arr.device == q_nope.device
            and (not ckv_scale_arr.is_cuda or _is_aligned_to(4 * num_scales, ckv_scale_arr))
        ):
            return None
        kv_format = _FORMAT_OF_SCALES[num_scales]
        dtype = rope_dtype
    if q_nope.is_cuda and not _is_aligned_to(_ALIGN_BYTES, q_nope, q_pe, ckv_cache, kpe_cache):
        return None
    if not (
        dtype in DTYPES
        and (_MIN_SCALE <= q_scale <= _MAX_SCALE if q_fp8 else q_scale == 1.0)
        and _MIN_SCALE <= sm_scale * ckv_scale * q_scale <= _MAX_SCALE
        and _MIN_SCALE <= sm_scale * kpe_scale * (q_scale if rope_dtype is FP8 else 1.0) <= _MAX_SCALE
    ):
        return None
    return dtype, kv_format, q_fp8


def _usual_csr(
    batch: int,
    device: torch.device,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_last_page_len: torch.Tensor | None,
) -> bool:
    return (
        kv_indptr.shape == (batch + 1,)
        and kv_indptr.dtype is torch.int32
        and kv_indptr.device == device
        and kv_indptr.is_contiguous()
        and kv_indices.dim() == 1
        and kv_indices.dtype is torch.int32
        and kv_indices.device == device
        and kv_indices.is_contiguous()
        and (
            kv_last_page_len is None
            or (
                kv_last_page_len.shape == (batch,)
                and kv_last_page_len.dtype is torch.int32
                and kv_last_page_len.device == device
                and kv_last_page_len.is_contiguous()
            )
        )
    )


def _usual_block_table(batch: int, device: torch.device, block_table: torch.Tensor, seq_lens: torch.Tensor) -> bool:
    rows, _ = block_table.shape
    return (
        rows == batch
        and block_table.dtype is torch.int32
        and block_table.device == device
        and block_table.stride()[1] == 1
        and seq_lens.shape == (batch,)
        and seq_lens.dtype is torch.int32
        and seq_lens.device == device
        and seq_lens.is_contiguous()
    )


def _is_aligned(x: torch.Tensor) -> bool:
    """16-bit operands."""
    stride0, stride1, stride2 = x.stride()
    return stride2 == 1 and (stride0 | stride1) % _ALIGN_ELEMENTS == 0 and x.data_ptr() % _ALIGN_BYTES == 0


def _is_aligned_to(num_bytes: int, *operands: torch.Tensor) -> bool:
    """Outer strides and addresses are multiples of `num_bytes`, a power of two."""
    for x in operands:
        stride0, stride1, stride2 = x.stride()
        if stride2 != 1 or ((stride0 | stride1) * x.itemsize | x.data_ptr()) % num_bytes:
            return False
    return True


# ------------------------------------------------------------------------------------------------ the explanation


def _explain(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    options: Options,
    rows: str = "batch",
) -> DecodeProblem:
    """`rows` is the name of the queries' first dimension."""
    out, _, _, _, _, ckv_scale_arr, _ = options
    _expect_tensor("q_nope", q_nope)
    # what is no 16-bit cache is an FP8 one or refused below
    cache_is_16bit = isinstance(ckv_cache, torch.Tensor) and ckv_cache.dtype in DTYPES
    q_fp8 = q_nope.dtype is FP8
    if q_fp8 and cache_is_16bit:
        raise TypeError(f"q_nope: expected dtype {_DTYPES_16BIT} with a 16-bit ckv_cache, got {q_nope.dtype}")
    if not q_fp8 and q_nope.dtype not in DTYPES:
        raise TypeError(f"q_nope: expected dtype {_DTYPES_16BIT}, got {q_nope.dtype}")
    _expect_shape("q_nope", q_nope, (None, None, CKV_DIM), f"[{rows}, H, {CKV_DIM}]")
    batch, num_heads, _ = q_nope.shape
    if not 1 <= num_heads <= MAX_HEADS:
        raise ValueError(f"q_nope: expected 1 to {MAX_HEADS} heads (dimension 1), got {num_heads}")
    device = q_nope.device
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"q_nope: expected a tensor on a cuda device or the cpu, got device {device}")
    _expect_aligned("q_nope", q_nope)

    _expect_tensor("q_pe", q_pe)
    if not q_fp8:
        _expect_dtype("q_pe", q_pe, "q_nope", q_nope.dtype)
    else:
        kpe_dtype = kpe_cache.dtype if isinstance(kpe_cache, torch.Tensor) else None
        if kpe_dtype is FP8:
            _expect_dtype("q_pe", q_pe, "kpe_cache", FP8)
        elif kpe_dtype in DTYPES and q_pe.dtype not in DTYPES:
            raise TypeError(f"q_pe: expected dtype {_DTYPES_16BIT} with a 16-bit kpe_cache, got {q_pe.dtype}")
        elif q_pe.dtype not in (FP8, *DTYPES):
            raise TypeError(f"q_pe: expected dtype {_DTYPES_16BIT} or {FP8}, got {q_pe.dtype}")
    _expect_operand("q_pe", q_pe, (batch, num_heads, KPE_DIM), f"[{rows}, H, {KPE_DIM}]", device)

    _expect_tensor("ckv_cache", ckv_cache)
    if ckv_cache.dtype is not FP8:
        _expect_dtype("ckv_cache", ckv_cache, "q_nope", q_nope.dtype, "" if q_fp8 else f" or {FP8}")
    shape = f"[num_pages, page_size, {CKV_DIM}]"
    _expect_operand("ckv_cache", ckv_cache, (None, None, CKV_DIM), shape, device)
    num_pages, page_size, _ = ckv_cache.shape
    if num_pages < 1:
        raise ValueError(f"ckv_cache: expected num_pages >= 1 (dimension 0), got {num_pages}")
    if page_size < 1:
        raise ValueError(f"ckv_cache: expected page_size >= 1 (dimension 1), got {page_size}")

    _expect_tensor("kpe_cache", kpe_cache)
    if cache_is_16bit:
        _expect_dtype("kpe_cache", kpe_cache, "q_nope", q_nope.dtype)
    elif kpe_cache.dtype is not FP8:
        _expect_dtype("kpe_cache", kpe_cache, "q_pe", q_pe.dtype, "" if q_pe.dtype is FP8 else f" or {FP8}")
    shape = f"[num_pages, page_size, {KPE_DIM}]"
    _expect_operand("kpe_cache", kpe_cache, (num_pages, page_size, KPE_DIM), shape, device)

    kv_format = _explain_format(cache_is_16bit, kpe_cache, ckv_scale_arr, num_pages, page_size, device)
    dtype = q_pe.dtype
    if dtype is FP8:
        dtype = out.dtype if isinstance(out, torch.Tensor) and out.dtype in DTYPES else DTYPES[0]
    return _problem(batch, num_heads, page_size, num_pages, dtype, device, kv_format, q_fp8, True)


def _explain_format(
    cache_is_16bit: bool,
    kpe_cache: torch.Tensor,
    ckv_scale_arr: torch.Tensor | None,
    num_pages: int,
    page_size: int,
    device: torch.device,
) -> str:
    """The format, after a check of `ckv_scale_arr`."""
    if cache_is_16bit or kpe_cache.dtype is FP8:
        if ckv_scale_arr is not None:
            other = "a 16-bit ckv_cache" if cache_is_16bit else f"a kpe_cache of {FP8}"
            raise ValueError(f"ckv_scale_arr: expected None with {other}, got {_describe(ckv_scale_arr)}")
        return "" if cache_is_16bit else "tensor"
    if ckv_scale_arr is None:
        raise ValueError(
            f"ckv_scale_arr: expected a tensor of scales with a ckv_cache of {FP8} and a kpe_cache of "
            f"{kpe_cache.dtype}, got None"
        )
    name = "ckv_scale_arr"
    _expect_tensor(name, ckv_scale_arr)
    if ckv_scale_arr.dtype is not torch.float32:
        raise TypeError(f"{name}: expected dtype torch.float32, got {ckv_scale_arr.dtype}")
    shape = tuple(ckv_scale_arr.shape)
    if shape[:-1] != (num_pages, page_size) or shape[-1] not in _FORMAT_OF_SCALES:
        sizes = " or ".join(map(str, _FORMAT_OF_SCALES))
        raise ValueError(f"{name}: expected shape [{num_pages}, {page_size}, {sizes}], got {list(shape)}")
    _expect_device(name, ckv_scale_arr, device)
    _expect_aligned(name, ckv_scale_arr, 4 * shape[-1])
    return _FORMAT_OF_SCALES[shape[-1]]


def _explain_csr(
    batch: int,
    device: torch.device,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_last_page_len: torch.Tensor | None,
) -> None:
    expect_metadata("kv_indptr", kv_indptr, (batch + 1,), "[batch + 1]", device)
    expect_metadata("kv_indices", kv_indices, (None,), "[num_kv_indices]", device)
    if kv_last_page_len is not None:
        expect_metadata("kv_last_page_len", kv_last_page_len, (batch,), "[batch]", device)


def _explain_block_table(batch: int, device: torch.device, block_table: torch.Tensor, seq_lens: torch.Tensor) -> None:
    expect_metadata("block_table", block_table, (batch, None), "[batch, max_pages]", device)
    expect_metadata("seq_lens", seq_lens, (batch,), "[batch]", device)


def _explain_rest(
    problem: DecodeProblem,
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    sm_scale: float,
    options: Options,
    rows: str = "batch",
) -> None:
    out, lse, lse_base, ckv_scale, kpe_scale, _, q_scale = options
    batch, num_heads, device = problem.batch, problem.num_heads, problem.device
    _expect_scale("sm_scale", sm_scale)
    if isinstance(lse_base, bool) or not isinstance(lse_base, (int, str)):
        raise TypeError(f"lse_base: expected 2 or 'e', got {_describe(lse_base)}")
    if lse_base not in LSE_BASES:
        raise ValueError(f"lse_base: expected 2 or 'e', got {lse_base!r}")
    _explain_scales(problem, q_pe, sm_scale, ckv_scale, kpe_scale, q_scale)
    if out is not None:
        _expect_tensor("out", out)
        if q_pe.dtype is FP8:
            if out.dtype not in DTYPES:
                raise TypeError(f"out: expected dtype {_DTYPES_16BIT}, got {out.dtype}")
        else:
            _expect_dtype("out", out, "q_pe" if problem.q_fp8 else "q_nope", problem.dtype)
        _expect_operand("out", out, (batch, num_heads, CKV_DIM), f"[{rows}, H, {CKV_DIM}]", device)
        if any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride(), strict=True)):
            raise ValueError(
                f"out: expected memory for every element, got an expanded tensor of strides {list(out.stride())}"
            )
        if out.numel() and out.data_ptr() == q_nope.data_ptr():
            raise ValueError("out: expected memory of its own, got the memory of q_nope")
    if lse is not None:
        _expect_tensor("lse", lse)
        if lse.dtype is not torch.float32:
            raise TypeError(f"lse: expected dtype torch.float32, got {lse.dtype}")
        _expect_shape("lse", lse, (batch, num_heads), f"[{rows}, H]")
        _expect_device("lse", lse, device)
        if not lse.is_contiguous():
            raise ValueError(f"lse: expected a contiguous tensor, got strides {list(lse.stride())}")


def _explain_scales(
    problem: DecodeProblem, q_pe: torch.Tensor, sm_scale: float, ckv_scale: float, kpe_scale: float, q_scale: float
) -> None:
    """The kernels multiply sm_scale by them, and the output by ckv_scale."""
    if problem.kv_format == "tensor":
        _expect_scale("ckv_scale", ckv_scale)
        _expect_scale("kpe_scale", kpe_scale)
    else:
        with_what = "ckv_scale_arr" if problem.kv_format else "a 16-bit ckv_cache"
        _expect_one("ckv_scale", ckv_scale, with_what)
        _expect_one("kpe_scale", kpe_scale, with_what)
    if problem.q_fp8:
        _expect_scale("q_scale", q_scale)
    else:
        _expect_one("q_scale", q_scale, "16-bit queries")
    if not problem.kv_format:
        return
    rope_q_scale = q_scale if q_pe.dtype is FP8 else 1.0
    for name, scale, of_q in (("ckv_scale", ckv_scale, q_scale), ("kpe_scale", kpe_scale, rope_q_scale)):
        product = float(sm_scale) * float(scale) * float(of_q)
        if not _MIN_SCALE <= product <= _MAX_SCALE:
            raise ValueError(
                f"{name}: expected a product with sm_scale and q_scale from 2^-126 to 2^126, got {product}"
            )


def _expect_scale(name: str, x: float) -> None:
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        raise TypeError(f"{name}: expected a Python number, got {_describe(x)}")
    if not _MIN_SCALE <= x <= _MAX_SCALE:
        raise ValueError(f"{name}: expected a positive number from 2^-126 to 2^126, got {x}")


def _expect_one(name: str, x: float, with_what: str) -> None:
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        raise TypeError(f"{name}: expected a Python number, got {_describe(x)}")
    if x != 1:
        raise ValueError(f"{name}: expected 1.0 with {with_what}, got {x}")


def _expect_dtype(name: str, x: torch.Tensor, like: str, dtype: torch.dtype, others: str = "") -> None:
    """`like` is the argument that has to have the same dtype; `others` names what else is legal."""
    if x.dtype is not dtype:
        raise TypeError(f"{name}: expected dtype {dtype} (that of {like}){others}, got {x.dtype}")


def _expect_operand(
    name: str, x: torch.Tensor, expected: tuple[int | None, ...], form: str, device: torch.device
) -> None:
    _expect_shape(name, x, expected, form)
    _expect_device(name, x, device)
    _expect_aligned(name, x)


def expect_metadata(
    name: str, x: torch.Tensor, expected: tuple[int | None, ...], form: str, device: torch.device | None
) -> None:
    """An int32 tensor of shape `expected` on `device` (None: wherever it is), last dimension contiguous."""
    _expect_tensor(name, x)
    if x.dtype is not torch.int32:
        raise TypeError(f"{name}: expected dtype torch.int32, got {x.dtype}")
    _expect_shape(name, x, expected, form)
    if device is not None:
        _expect_device(name, x, device)
    if x.is_cuda and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name}: expected stride 1 in the last dimension, got strides {list(x.stride())}")


def expect_indptr(name: str, x: torch.Tensor, device: torch.device | None) -> int:
    """An int32 tensor [batch + 1] on `device` (None: wherever it is); returns batch."""
    expect_metadata(name, x, (None,), "[batch + 1]", device)
    if x.shape[0] < 1:
        raise ValueError(f"{name}: expected shape [batch + 1], got [0]")
    return x.shape[0] - 1


def _expect_tensor(name: str, x: object) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {_describe(x)}")


def _expect_shape(name: str, x: torch.Tensor, expected: tuple[int | None, ...], form: str) -> None:
    """`expected` has None where any size will do, and then the message shows `form`, the shape with its names."""
    actual = tuple(x.shape)
    if len(actual) == len(expected) and all(e is None or e == a for e, a in zip(expected, actual, strict=True)):
        return
    shown = form if None in expected else f"{list(expected)}"
    raise ValueError(f"{name}: expected shape {shown}, got {list(actual)}")


def _expect_device(name: str, x: torch.Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name}: expected device {device} (that of q_nope), got {x.device}")


def _expect_aligned(name: str, x: torch.Tensor, num_bytes: int = _ALIGN_BYTES) -> None:
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


def _describe(x: object) -> str:
    return f"a torch.Tensor of {x.dtype}" if isinstance(x, torch.Tensor) else f"{type(x).__name__} {x!r:.80}"


# ------------------------------------------------------------------------------------------------ what the device sees


def verify_on_device(
    problem: DecodeProblem,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_last_page_len: torch.Tensor | None = None,
) -> None:
    """Check the values of CSR metadata with one synchronisation.

    Raises ValueError naming the argument, the first offending position, its value and the bound, when kv_indptr starts
    below 0, decreases, or ends beyond kv_indices; when kv_last_page_len of a request that has pages is not in
    1..page_size; when a page id in use is not in 0..num_pages - 1. Ids outside `kv_indices[kv_indptr[0]:kv_indptr[-1]]`
    and the last page length of a request without pages are not looked at.
    """
    _raise_first(_csr_findings(problem.page_size, problem.num_pages, kv_indptr, kv_indices, kv_last_page_len))


def verify_block_table_on_device(problem: DecodeProblem, block_table: torch.Tensor, seq_lens: torch.Tensor) -> None:
    """Check the values of block-table metadata with one synchronisation.

    Raises ValueError naming the argument, the first offending position, its value and the bound, when a sequence length
    is not in 0..max_pages * page_size, or a page id in use is not in 0..num_pages - 1. The ids past a request's last
    page are not looked at.
    """
    _raise_first(_block_table_findings(problem.page_size, problem.num_pages, block_table, seq_lens))


# What was found, as `_first` gives it, and the message for the position and the value there.
_Finding = tuple[torch.Tensor, Callable[[int, int], str]]


def _raise_first(findings: Sequence[_Finding]) -> None:
    """ValueError for the first finding that found something; one synchronisation."""
    results = torch.stack([found for found, _ in findings]).tolist()
    for (found, position, value), (_, message) in zip(results, findings, strict=True):
        if found:
            raise ValueError(message(position, value))


def _indptr_findings(name: str, indptr: torch.Tensor, most: int, most_is: str) -> list[_Finding]:
    """Whether it decreases, or passes `most`."""
    return [
        (
            _first(indptr.diff() < 0, indptr[1:]),
            lambda at, value: (
                f"{name}: expected values that never decrease, got {value} at position {at + 1} after a larger one"
            ),
        ),
        (
            _first(indptr > most, indptr),
            lambda at, value: f"{name}: expected values <= {most} ({most_is}), got {value} at position {at}",
        ),
    ]


def _csr_findings(
    page_size: int,
    num_pages: int,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_last_page_len: torch.Tensor | None,
) -> list[_Finding]:
    num_indices = kv_indices.shape[0]
    findings: list[_Finding] = [
        (
            _first(kv_indptr < 0, kv_indptr),
            lambda at, value: f"kv_indptr: expected values >= 0, got {value} at position {at}",
        ),
        *_indptr_findings("kv_indptr", kv_indptr, num_indices, "the length of kv_indices"),
    ]
    if kv_last_page_len is not None:
        wrong = (kv_last_page_len < 1) | (kv_last_page_len > page_size)
        findings.append(
            (
                _first(wrong & (kv_indptr.diff() > 0), kv_last_page_len),
                lambda at, value: (
                    f"kv_last_page_len: expected values in [1, {page_size}] for requests with pages, "
                    f"got {value} at position {at}"
                ),
            )
        )
    position = torch.arange(num_indices, device=kv_indices.device)
    used = (position >= kv_indptr[0]) & (position < kv_indptr[-1])
    findings.append(
        (
            _first(used & _outside(kv_indices, num_pages), kv_indices),
            lambda at, value: f"kv_indices: expected page ids in [0, {num_pages}), got {value} at position {at}",
        )
    )
    return findings


def _block_table_findings(
    page_size: int, num_pages: int, block_table: torch.Tensor, seq_lens: torch.Tensor
) -> list[_Finding]:
    max_pages = block_table.shape[1]
    max_len = max_pages * page_size
    page_start = torch.arange(max_pages, device=block_table.device) * page_size
    used = page_start[None, :] < seq_lens[:, None]
    return [
        (
            _first((seq_lens < 0) | (seq_lens > max_len), seq_lens),
            lambda at, value: (
                f"seq_lens: expected values in [0, {max_len}] (max_pages * page_size), got {value} at position {at}"
            ),
        ),
        (
            _first((used & _outside(block_table, num_pages)).flatten(), block_table.flatten()),
            lambda at, value: (
                f"block_table: expected page ids in [0, {num_pages}), got {value} "
                f"at position [{at // max_pages}, {at % max_pages}]"
            ),
        ),
    ]


def _outside(ids: torch.Tensor, num_pages: int) -> torch.Tensor:
    return (ids < 0) | (ids >= num_pages)


def _first(wrong: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[any wrong, first wrong position, value there] as int64, on the tensors' device. `wrong` and `values` are 1-D."""
    if wrong.numel() == 0:
        return torch.zeros(3, dtype=torch.int64, device=wrong.device)
    at = wrong.to(torch.int32).argmax()
    return torch.stack((wrong.any().long(), at, values[at].long()))
