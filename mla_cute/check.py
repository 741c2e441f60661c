"""Facts of one call, checked once on the host: what a call is, or which of its arguments is the first wrong one.

`check` reads shapes, dtypes, devices, strides and pointers only: no device memory, no synchronisation. It first asks
one early-exit question, "is everything as it usually is?", made of the cheapest attribute reads torch has (a call costs
2 to 3.5 us). Only when the answer is no does `_first_wrong` look again, argument by argument, and raise for the first
one that is wrong. It is the authority: what it lets pass is legal (an odd stride of a dimension of size 1, for
example), and what the early exit accepts is a subset of that. FP8 caches have an early exit of their own kind
(`_usual_fp8`), which 16-bit calls pay one comparison for.

Single arguments are checked by expect.py, what only the device can see by check_device.py.

Errors are `TypeError` (not a tensor, wrong dtype, wrong Python type) and `ValueError` (shape, device, stride,
alignment, value). The message starts with the argument's name, then what was expected, then what it was.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, fields, replace

import torch

from . import dims
from .call import UNSCALED, Cache, Call, Pages
from .dims import HEAD_DIMS, MAX_HEADS, NUM_SCALES, HeadDims
from .expect import (
    ALIGN_BYTES,
    CKV_DIMS,
    KPE_DIMS,
    MAX_SCALE,
    MIN_SCALE,
    Scale,
    describe,
    expect_aligned,
    expect_bool,
    expect_channels,
    expect_device,
    expect_dtype,
    expect_float32,
    expect_indptr,
    expect_lse_base,
    expect_metadata,
    expect_not_alone,
    expect_one,
    expect_operand,
    expect_own_memory,
    expect_placed,
    expect_rows_fit_32_bits,
    expect_scale,
    expect_tensor,
    expect_tensor_scale,
    rows_fit_32_bits,
)

# Lengths are 32-bit; a page holds no more tokens than a request may have.
MAX_PAGE_SIZE = 2**31 - 1
# The 16-bit dtypes of torch, and their names in static keys.
DTYPE_NAMES = {getattr(torch, name): name for name in dims.DTYPES}
DTYPES = tuple(DTYPE_NAMES)
FP8 = torch.float8_e4m3fn
_DTYPES_16BIT = " or ".join(map(str, DTYPES))
# The format of an FP8 cache with so many scales a token.
FORMAT_OF_SCALES = {scales: kv_format for kv_format, scales in NUM_SCALES.items() if scales}
# Head dimensions by their widths, and those that formats "token" and "group" have.
DIMS_OF = {dims: dims for dims in HEAD_DIMS}
_DIMS_OF_ARRAYS = HeadDims()

# Elements of bf16 or fp16 in 16 bytes, of which TMA and vector accesses want multiples.
_ALIGN_ELEMENTS = 8


@dataclass(frozen=True, slots=True)
class Problem:
    """Sizes, dtype and device of a call whose arguments passed the checks."""

    op: str  # "decode", "prefill" or "sparse"
    batch: int
    total_q: int  # query tokens; decode: one per request
    num_heads: int
    page_size: int
    num_pages: int
    causal: bool
    dtype: torch.dtype  # of the output
    device: torch.device
    # The FP8 format of the caches (quant.py), "" for 16-bit ones, and whether q_nope is e4m3 (q_pe is too with format
    # "tensor").
    kv_format: str = ""
    q_fp8: bool = False
    dims: HeadDims = HeadDims()
    # Dimensions of size 1 may have strides that TMA would refuse (the early exit accepts none of those).
    odd_strides: bool = field(default=False, compare=False)


# A frozen dataclass takes 0.65 us to make, a look-up 0.12 us, and a server's calls repeat.
_problem = functools.lru_cache(maxsize=1024)(Problem)


def check(call: Call) -> Problem:
    """What a call is; TypeError or ValueError for the first wrong argument."""
    try:
        if (problem := _usual(call)) is not None:
            return problem
    except (AttributeError, TypeError, ValueError):
        pass  # an argument is no tensor or has another rank; which one is for `_first_wrong` to say
    return _first_wrong(call)


# ------------------------------------------------------------------------------------------------ the early exit


def _usual(call: Call) -> Problem | None:
    """The problem, or None when anything is unusual (which need not be wrong)."""
    q_nope, q_pe, cache, pages, sm_scale, out, lse, lse_base, q_scale, sink = call
    ckv_cache, kpe_cache, ckv_scale, kpe_scale, ckv_scale_arr = cache
    total_q, num_heads, ckv_dim = q_nope.shape
    num_pages, page_size, cache_dim = ckv_cache.shape
    kpe_pages, kpe_page_size, kpe_dim = kpe_cache.shape
    dims = DIMS_OF.get((cache_dim, kpe_dim))  # type: ignore[call-overload]
    dtype = q_nope.dtype
    device = q_nope.device
    cache_dtype = ckv_cache.dtype
    kv_format, q_fp8 = "", False
    if not (
        dims is not None
        and ckv_dim == cache_dim
        and 1 <= num_heads <= MAX_HEADS
        and page_size >= 1
        and num_pages >= 1
        and q_pe.shape == (total_q, num_heads, kpe_dim)
        and kpe_pages == num_pages
        and kpe_page_size == page_size
        and q_pe.device == device
        and ckv_cache.device == device
        and kpe_cache.device == device
        and type(sm_scale) is float
        and MIN_SCALE <= sm_scale <= MAX_SCALE
        and ((type(lse_base) is int and lse_base == 2) or (type(lse_base) is str and lse_base == "e"))
    ):
        return None
    if cache_dtype is FP8:
        if (found := _usual_fp8(call, dims)) is None:
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
        if not kpe_dim:  # where nothing lies, no stride is looked at
            q_pe, kpe_cache = q_nope, ckv_cache
        if not (_is_aligned(q_nope) and _is_aligned(q_pe) and _is_aligned(ckv_cache) and _is_aligned(kpe_cache)):
            return None
        sparse = pages.form.op == "sparse"
        if sparse or page_size % 8:
            if not (rows_fit_32_bits(ckv_cache, sparse) and rows_fit_32_bits(kpe_cache, sparse)):
                return None
    elif not q_nope.is_cpu:
        return None
    if out is not None and not (
        out.shape == (total_q, num_heads, ckv_dim)
        and out.dtype is dtype
        and out.device == device
        and out.is_contiguous()
        and out.data_ptr() % ALIGN_BYTES == 0
        and out.data_ptr() != q_nope.data_ptr()
    ):
        return None
    if lse is not None and not (
        lse.shape == (total_q, num_heads)
        and lse.dtype is torch.float32
        and lse.device == device
        and lse.is_contiguous()
    ):
        return None
    if sink is not None and not is_usual_sink(sink, num_heads, device):
        return None
    batch = total_q
    if pages.form.op == "prefill":
        (bounds,) = pages.queries.shape  # type: ignore[union-attr]
        batch = bounds - 1
    if not _usual_pages(pages, batch, device):
        return None
    return _problem(
        pages.form.op, batch, total_q, num_heads, page_size, num_pages, pages.causal, dtype, device, kv_format, q_fp8,
        dims,
    )  # fmt: skip


def is_usual_sink(sink: torch.Tensor, num_heads: int, device: torch.device) -> bool:
    return sink.shape == (num_heads,) and sink.dtype is torch.float32 and sink.device == device and sink.is_contiguous()


def _are_one(*scales: Scale) -> bool:
    """Of any objects: to compare a tensor would be to read it."""
    return all(type(scale) is float and scale == 1.0 for scale in scales)


def _usual_fp8(call: Call, dims: HeadDims) -> tuple[torch.dtype, str, bool] | None:
    """(output dtype, format, whether q_nope is e4m3) of a call with an e4m3 ckv_cache; None when unusual.

    `_usual` looks at what both kinds of cache have in common.
    """
    q_nope, q_pe, cache, _, sm_scale, out, _, _, q_scale, _ = call
    ckv_cache, kpe_cache, ckv_scale, kpe_scale, ckv_scale_arr = cache
    if not type(ckv_scale) is type(kpe_scale) is type(q_scale) is float:
        return None
    dtype, rope_dtype, kpe_dtype = q_nope.dtype, q_pe.dtype, kpe_cache.dtype
    q_fp8 = dtype is FP8
    if ckv_scale_arr is None:
        if not (
            kpe_dtype is FP8
            and rope_dtype is dtype
            and MIN_SCALE <= ckv_scale <= MAX_SCALE
            and (MIN_SCALE <= kpe_scale <= MAX_SCALE if dims.kpe else kpe_scale == 1.0)
        ):
            return None
        kv_format = "tensor"
        if q_fp8:
            dtype = DTYPES[0] if out is None else out.dtype
    else:
        num_pages, page_size, num_scales = ckv_scale_arr.shape
        if not (
            dims == _DIMS_OF_ARRAYS
            and kpe_dtype is rope_dtype
            and (q_fp8 or rope_dtype is dtype)
            and ckv_scale == kpe_scale == 1.0
            and (num_pages, page_size) == ckv_cache.shape[:2]
            and num_scales in FORMAT_OF_SCALES
            and ckv_scale_arr.dtype is torch.float32
            and ckv_scale_arr.device == q_nope.device
            and (not ckv_scale_arr.is_cuda or _is_aligned_to(4 * num_scales, ckv_scale_arr))
        ):
            return None
        kv_format = FORMAT_OF_SCALES[num_scales]
        dtype = rope_dtype
    if q_nope.is_cuda and not (
        _is_aligned_to(ALIGN_BYTES, q_nope, ckv_cache)
        and (not dims.kpe or _is_aligned_to(ALIGN_BYTES, q_pe, kpe_cache))
    ):
        return None
    if not (
        dtype in DTYPES
        and (MIN_SCALE <= q_scale <= MAX_SCALE if q_fp8 else q_scale == 1.0)
        and MIN_SCALE <= sm_scale * ckv_scale * q_scale <= MAX_SCALE
        and MIN_SCALE <= sm_scale * kpe_scale * (q_scale if rope_dtype is FP8 else 1.0) <= MAX_SCALE
    ):
        return None
    return dtype, kv_format, q_fp8


def _usual_pages(pages: Pages, batch: int, device: torch.device) -> bool:
    form, lengths, ids, last_len, queries, causal = pages
    if queries is not None and not (batch >= 0 and _are_ints(queries, device) and type(causal) is bool):
        return False
    if form.by_table:
        rows, _ = ids.shape
        return (
            rows == batch
            and ids.dtype is torch.int32
            and ids.device == device
            and ids.stride()[1] == 1
            and lengths.shape == (batch,)
            and _are_ints(lengths, device)
        )
    return (
        lengths.shape == (batch + 1,)
        and _are_ints(lengths, device)
        and ids.dim() == 1
        and _are_ints(ids, device)
        and (last_len is None or (last_len.shape == (batch,) and _are_ints(last_len, device)))
    )


def _are_ints(x: torch.Tensor, device: torch.device) -> bool:
    return x.dtype is torch.int32 and x.device == device and x.is_contiguous()


def _is_aligned(x: torch.Tensor) -> bool:
    """16-bit operands."""
    stride0, stride1, stride2 = x.stride()
    return stride2 == 1 and (stride0 | stride1) % _ALIGN_ELEMENTS == 0 and x.data_ptr() % ALIGN_BYTES == 0


def _is_aligned_to(num_bytes: int, *operands: torch.Tensor) -> bool:
    """Outer strides and addresses are multiples of `num_bytes`, a power of two."""
    for x in operands:
        stride0, stride1, stride2 = x.stride()
        if stride2 != 1 or ((stride0 | stride1) * x.itemsize | x.data_ptr()) % num_bytes:
            return False
    return True


# ------------------------------------------------------------------------------------------ the first wrong argument


def _first_wrong(call: Call) -> Problem:
    """Raise for it; returns the problem where everything is legal."""
    pages = call.pages
    rows = "batch" if pages.form.op == "decode" else "total_q"  # the name of the queries' first dimension
    problem = _expect_operands(call, rows)
    if pages.form.op == "prefill":
        batch = expect_indptr("qo_indptr", pages.queries, problem.device)
        problem = replace(problem, batch=batch)
    expect_pages(pages, problem.batch, problem.device)
    _expect_rest(call, problem, rows)
    if pages.form.op == "prefill":
        expect_bool("causal", pages.causal)
    # The early exit's object for the same facts: plans compare identities.
    return _problem(*(getattr(problem, f.name) for f in fields(Problem)))


def _expect_operands(call: Call, rows: str) -> Problem:
    q_nope, q_pe, cache, pages, _, out, _, _, _, _ = call
    ckv_cache, kpe_cache = cache[:2]  # of a call that went through `call.without_rope`
    expect_tensor("q_nope", q_nope)
    # what is no 16-bit cache is an FP8 one or refused below
    cache_is_16bit = isinstance(ckv_cache, torch.Tensor) and ckv_cache.dtype in DTYPES
    q_fp8 = q_nope.dtype is FP8
    if q_fp8 and cache_is_16bit:
        raise TypeError(f"q_nope: expected dtype {_DTYPES_16BIT} with a 16-bit ckv_cache, got {q_nope.dtype}")
    if not q_fp8 and q_nope.dtype not in DTYPES:
        raise TypeError(f"q_nope: expected dtype {_DTYPES_16BIT}, got {q_nope.dtype}")
    ckv_dim = expect_channels("q_nope", q_nope, (None, None), f"{rows}, H", CKV_DIMS)
    total_q, num_heads, _ = q_nope.shape
    if not 1 <= num_heads <= MAX_HEADS:
        raise ValueError(f"q_nope: expected 1 to {MAX_HEADS} heads (dimension 1), got {num_heads}")
    device = q_nope.device
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"q_nope: expected a tensor on a cuda device or the cpu, got device {device}")
    expect_aligned("q_nope", q_nope)

    expect_not_alone("q_pe", q_pe, "kpe_cache")
    expect_tensor("q_pe", q_pe)
    if not q_fp8:
        expect_dtype("q_pe", q_pe, "q_nope", q_nope.dtype)
    else:
        kpe_dtype = kpe_cache.dtype if isinstance(kpe_cache, torch.Tensor) else None
        if kpe_dtype is FP8:
            expect_dtype("q_pe", q_pe, "kpe_cache", FP8)
        elif kpe_dtype in DTYPES and q_pe.dtype not in DTYPES:
            raise TypeError(f"q_pe: expected dtype {_DTYPES_16BIT} with a 16-bit kpe_cache, got {q_pe.dtype}")
        elif q_pe.dtype not in (FP8, *DTYPES):
            raise TypeError(f"q_pe: expected dtype {_DTYPES_16BIT} or {FP8}, got {q_pe.dtype}")
    kpe_dim = expect_channels("q_pe", q_pe, (total_q, num_heads), f"{rows}, H", KPE_DIMS)
    expect_placed("q_pe", q_pe, device)

    expect_tensor("ckv_cache", ckv_cache)
    if ckv_cache.dtype is not FP8:
        expect_dtype("ckv_cache", ckv_cache, "q_nope", q_nope.dtype, "" if q_fp8 else f" or {FP8}")
    expect_channels("ckv_cache", ckv_cache, (None, None), "num_pages, page_size", (ckv_dim,), "q_nope")
    expect_placed("ckv_cache", ckv_cache, device)
    num_pages, page_size, _ = ckv_cache.shape
    if num_pages < 1:
        raise ValueError(f"ckv_cache: expected num_pages >= 1 (dimension 0), got {num_pages}")
    if page_size < 1:
        raise ValueError(f"ckv_cache: expected page_size >= 1 (dimension 1), got {page_size}")

    expect_not_alone("kpe_cache", kpe_cache, "q_pe")
    expect_tensor("kpe_cache", kpe_cache)
    if cache_is_16bit:
        expect_dtype("kpe_cache", kpe_cache, "q_nope", q_nope.dtype)
    elif kpe_cache.dtype is not FP8:
        expect_dtype("kpe_cache", kpe_cache, "q_pe", q_pe.dtype, "" if q_pe.dtype is FP8 else f" or {FP8}")
    expect_channels("kpe_cache", kpe_cache, (num_pages, page_size), "num_pages, page_size", (kpe_dim,), "q_pe")
    expect_placed("kpe_cache", kpe_cache, device)
    sparse = pages.form.op == "sparse"
    expect_rows_fit_32_bits("ckv_cache", ckv_cache, sparse)
    if kpe_dim:
        expect_rows_fit_32_bits("kpe_cache", kpe_cache, sparse)

    kv_format = expect_format(cache_is_16bit, cache, device)
    dtype = q_pe.dtype
    if dtype is FP8:
        dtype = out.dtype if isinstance(out, torch.Tensor) and out.dtype in DTYPES else DTYPES[0]
    return Problem(
        pages.form.op, total_q, total_q, num_heads, page_size, num_pages, pages.causal, dtype, device, kv_format, q_fp8,
        HeadDims(ckv_dim, kpe_dim), odd_strides=True,
    )  # fmt: skip


def expect_format(cache_is_16bit: bool, cache: Cache, device: torch.device) -> str:
    """The format of a cache whose tensors are right, after a check of `ckv_scale_arr`."""
    _, kpe_cache, _, _, ckv_scale_arr = cache
    num_pages, page_size, ckv_dim = cache.ckv.shape
    dims = HeadDims(ckv_dim, kpe_cache.shape[2])
    if not cache_is_16bit and dims != _DIMS_OF_ARRAYS:
        expect_no_array(dims, ckv_scale_arr)
        if kpe_cache.dtype is not FP8:
            raise TypeError(
                f"kpe_cache: expected dtype {FP8} (that of ckv_cache) with head dimensions {dims}, got "
                f"{kpe_cache.dtype}"
            )
    if cache_is_16bit or kpe_cache.dtype is FP8:
        if ckv_scale_arr is not None:
            other = "a 16-bit ckv_cache" if cache_is_16bit else f"a kpe_cache of {FP8}"
            raise ValueError(f"ckv_scale_arr: expected None with {other}, got {describe(ckv_scale_arr)}")
        return "" if cache_is_16bit else "tensor"
    if ckv_scale_arr is None:
        raise ValueError(
            f"ckv_scale_arr: expected a tensor of scales with a ckv_cache of {FP8} and a kpe_cache of "
            f"{kpe_cache.dtype}, got None"
        )
    name = "ckv_scale_arr"
    expect_tensor(name, ckv_scale_arr)
    if ckv_scale_arr.dtype is not torch.float32:
        raise TypeError(f"{name}: expected dtype torch.float32, got {ckv_scale_arr.dtype}")
    shape = tuple(ckv_scale_arr.shape)
    if shape[:-1] != (num_pages, page_size) or shape[-1] not in FORMAT_OF_SCALES:
        sizes = " or ".join(map(str, FORMAT_OF_SCALES))
        raise ValueError(f"{name}: expected shape [{num_pages}, {page_size}, {sizes}], got {list(shape)}")
    expect_device(name, ckv_scale_arr, device)
    expect_aligned(name, ckv_scale_arr, 4 * shape[-1])
    return FORMAT_OF_SCALES[shape[-1]]


def expect_no_array(dims: HeadDims, ckv_scale_arr: object) -> None:
    """Where the head dimensions have no format with an array of scales."""
    if ckv_scale_arr is not None and dims != _DIMS_OF_ARRAYS:
        raise ValueError(
            f"ckv_scale_arr: expected None with head dimensions {dims} (those with arrays of scales are "
            f"{_DIMS_OF_ARRAYS}), got {describe(ckv_scale_arr)}"
        )


def expect_pages(pages: Pages, batch: int, device: torch.device) -> None:
    if pages.form.op == "sparse":
        expect_metadata("indices", pages.ids, (batch, None), "[total_q, topk]", device)
        expect_metadata("topk_lens", pages.lengths, (batch,), "[total_q]", device)
        return
    if pages.form.by_table:
        expect_metadata("block_table", pages.ids, (batch, None), "[batch, max_pages]", device)
        expect_metadata("seq_lens", pages.lengths, (batch,), "[batch]", device)
        return
    expect_metadata("kv_indptr", pages.lengths, (batch + 1,), "[batch + 1]", device)
    expect_metadata("kv_indices", pages.ids, (None,), "[num_kv_indices]", device)
    if pages.last_len is not None:
        expect_metadata("kv_last_page_len", pages.last_len, (batch,), "[batch]", device)


def _expect_rest(call: Call, problem: Problem, rows: str) -> None:
    q_nope, q_pe, _, _, sm_scale, out, lse, lse_base, _, sink = call
    total_q, num_heads, device = problem.total_q, problem.num_heads, problem.device
    expect_scale("sm_scale", sm_scale)
    expect_lse_base(lse_base)
    _expect_scales(call, problem)
    if out is not None:
        expect_tensor("out", out)
        if q_pe.dtype is FP8:
            if out.dtype not in DTYPES:
                raise TypeError(f"out: expected dtype {_DTYPES_16BIT}, got {out.dtype}")
        else:
            expect_dtype("out", out, "q_pe" if problem.q_fp8 else "q_nope", problem.dtype)
        ckv_dim = problem.dims.ckv
        expect_operand("out", out, (total_q, num_heads, ckv_dim), f"[{rows}, H, {ckv_dim}]", device)
        expect_own_memory("out", out)
        if out.numel() and out.data_ptr() == q_nope.data_ptr():
            raise ValueError("out: expected memory of its own, got the memory of q_nope")
    if lse is not None:
        expect_float32("lse", lse, (total_q, num_heads), f"[{rows}, H]", device)
    if sink is not None:
        expect_float32("sink", sink, (num_heads,), "[H]", device)


def _expect_scales(call: Call, problem: Problem) -> None:
    """The kernels multiply sm_scale by them, and the output by ckv_scale. What a tensor holds is not known here."""
    q_pe, sm_scale, q_scale = call.q_pe, call.sm_scale, call.q_scale
    ckv_scale, kpe_scale = call.cache.ckv_scale, call.cache.kpe_scale
    if problem.kv_format == "tensor":
        expect_tensor_scale("ckv_scale", ckv_scale, problem.device)
        if problem.dims.kpe:
            expect_tensor_scale("kpe_scale", kpe_scale, problem.device)
        else:
            expect_one("kpe_scale", kpe_scale, "a kpe_cache of width 0")
    else:
        with_what = "ckv_scale_arr" if problem.kv_format else "a 16-bit ckv_cache"
        expect_one("ckv_scale", ckv_scale, with_what)
        expect_one("kpe_scale", kpe_scale, with_what)
    if problem.q_fp8:
        expect_tensor_scale("q_scale", q_scale, problem.device)
    else:
        expect_one("q_scale", q_scale, "16-bit queries")
    if not problem.kv_format:
        return
    rope_q_scale = q_scale if q_pe.dtype is FP8 else 1.0
    factors = [("ckv_scale", ckv_scale, q_scale), ("kpe_scale", kpe_scale, rope_q_scale)]
    for name, scale, of_q in factors if problem.dims.kpe else factors[:1]:
        product = float(sm_scale)
        for factor in (scale, of_q):
            if not isinstance(factor, torch.Tensor):
                product *= float(factor)
        if not MIN_SCALE <= product <= MAX_SCALE:
            raise ValueError(
                f"{name}: expected a product with sm_scale and q_scale from 2^-126 to 2^126, got {product}"
            )
