"""Facts of one call, checked once on the host: what decode is, and what prefill shares (problem_prefill.py).

`check_decode` and `check_decode_block_table` read shapes, dtypes, devices, strides and pointers only: no device memory,
no synchronisation. Each first asks one early-exit question, "is everything as it usually is?", made of the cheapest
attribute reads torch has (a call costs 2 to 3.5 us). Only when the answer is no does `_explain_*` look again, argument
by argument, and raise for the first one that is wrong. The explanation is the authority: what it lets pass is legal (an
odd stride of a dimension of size 1, for example), and what the early exit accepts is a subset of that.

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
LSE_BASES = (2, "e")

# The kernels take sm_scale * log2(e) as a float32 and find a row's largest score before they scale it: the product has
# to be positive, finite, and normal (0 * -inf of a masked score is NaN).
_MIN_SCALE = 2.0**-126
_MAX_SCALE = 2.0**126
# TMA and 16-byte vector accesses: 16 bytes are 8 elements of bf16 or fp16.
_ALIGN_BYTES = 16
_ALIGN_ELEMENTS = 8


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
) -> DecodeProblem:
    """Check a decode call with CSR page lists; raise TypeError or ValueError for the first wrong argument."""
    try:
        problem = _usual(q_nope, q_pe, ckv_cache, kpe_cache, sm_scale, out, lse, lse_base)
        if problem is not None and _usual_csr(problem.batch, problem.device, kv_indptr, kv_indices, kv_last_page_len):
            return problem
    except (AttributeError, TypeError, ValueError):
        pass  # an argument is no tensor or has another rank; which one is the explanation's job
    problem = _explain(q_nope, q_pe, ckv_cache, kpe_cache)
    _explain_csr(problem.batch, problem.device, kv_indptr, kv_indices, kv_last_page_len)
    _explain_rest(problem, q_nope, sm_scale, out, lse, lse_base)
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
) -> DecodeProblem:
    """Check a decode call with a padded block table; raise TypeError or ValueError for the first wrong argument."""
    try:
        problem = _usual(q_nope, q_pe, ckv_cache, kpe_cache, sm_scale, out, lse, lse_base)
        if problem is not None and _usual_block_table(problem.batch, problem.device, block_table, seq_lens):
            return problem
    except (AttributeError, TypeError, ValueError):
        pass  # an argument is no tensor or has another rank; which one is the explanation's job
    problem = _explain(q_nope, q_pe, ckv_cache, kpe_cache)
    _explain_block_table(problem.batch, problem.device, block_table, seq_lens)
    _explain_rest(problem, q_nope, sm_scale, out, lse, lse_base)
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
) -> DecodeProblem | None:
    """The problem, or None when anything is unusual (which need not be wrong)."""
    batch, num_heads, ckv_dim = q_nope.shape
    num_pages, page_size, cache_dim = ckv_cache.shape
    dtype = q_nope.dtype
    device = q_nope.device
    if not (
        ckv_dim == CKV_DIM
        and cache_dim == CKV_DIM
        and 1 <= num_heads <= MAX_HEADS
        and page_size >= 1
        and num_pages >= 1
        and q_pe.shape == (batch, num_heads, KPE_DIM)
        and kpe_cache.shape == (num_pages, page_size, KPE_DIM)
        and dtype in DTYPES
        and q_pe.dtype is dtype
        and ckv_cache.dtype is dtype
        and kpe_cache.dtype is dtype
        and q_pe.device == device
        and ckv_cache.device == device
        and kpe_cache.device == device
        and type(sm_scale) is float
        and _MIN_SCALE <= sm_scale <= _MAX_SCALE
        and ((type(lse_base) is int and lse_base == 2) or (type(lse_base) is str and lse_base == "e"))
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
    return _problem(batch, num_heads, page_size, num_pages, dtype, device)


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
    stride0, stride1, stride2 = x.stride()
    return stride2 == 1 and (stride0 | stride1) % _ALIGN_ELEMENTS == 0 and x.data_ptr() % _ALIGN_BYTES == 0


# ------------------------------------------------------------------------------------------------ the explanation


def _explain(
    q_nope: torch.Tensor, q_pe: torch.Tensor, ckv_cache: torch.Tensor, kpe_cache: torch.Tensor, rows: str = "batch"
) -> DecodeProblem:
    """`rows` is the name of the queries' first dimension."""
    _expect_tensor("q_nope", q_nope)
    if q_nope.dtype not in DTYPES:
        raise TypeError(f"q_nope: expected dtype torch.bfloat16 or torch.float16, got {q_nope.dtype}")
    _expect_shape("q_nope", q_nope, (None, None, CKV_DIM), f"[{rows}, H, {CKV_DIM}]")
    batch, num_heads, _ = q_nope.shape
    if not 1 <= num_heads <= MAX_HEADS:
        raise ValueError(f"q_nope: expected 1 to {MAX_HEADS} heads (dimension 1), got {num_heads}")
    dtype, device = q_nope.dtype, q_nope.device
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"q_nope: expected a tensor on a cuda device or the cpu, got device {device}")
    _expect_aligned("q_nope", q_nope)

    _expect_operand("q_pe", q_pe, (batch, num_heads, KPE_DIM), f"[{rows}, H, {KPE_DIM}]", dtype, device)
    shape = f"[num_pages, page_size, {CKV_DIM}]"
    _expect_operand("ckv_cache", ckv_cache, (None, None, CKV_DIM), shape, dtype, device)
    num_pages, page_size, _ = ckv_cache.shape
    if num_pages < 1:
        raise ValueError(f"ckv_cache: expected num_pages >= 1 (dimension 0), got {num_pages}")
    if page_size < 1:
        raise ValueError(f"ckv_cache: expected page_size >= 1 (dimension 1), got {page_size}")
    shape = f"[num_pages, page_size, {KPE_DIM}]"
    _expect_operand("kpe_cache", kpe_cache, (num_pages, page_size, KPE_DIM), shape, dtype, device)
    return _problem(batch, num_heads, page_size, num_pages, dtype, device, True)


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
    sm_scale: float,
    out: torch.Tensor | None,
    lse: torch.Tensor | None,
    lse_base: int | str,
    rows: str = "batch",
) -> None:
    batch, num_heads, device = problem.batch, problem.num_heads, problem.device
    if isinstance(sm_scale, bool) or not isinstance(sm_scale, numbers.Real):
        raise TypeError(f"sm_scale: expected a Python number, got {_describe(sm_scale)}")
    if not _MIN_SCALE <= sm_scale <= _MAX_SCALE:
        raise ValueError(f"sm_scale: expected a positive number from 2^-126 to 2^126, got {sm_scale}")
    if isinstance(lse_base, bool) or not isinstance(lse_base, (int, str)):
        raise TypeError(f"lse_base: expected 2 or 'e', got {_describe(lse_base)}")
    if lse_base not in LSE_BASES:
        raise ValueError(f"lse_base: expected 2 or 'e', got {lse_base!r}")
    if out is not None:
        _expect_operand("out", out, (batch, num_heads, CKV_DIM), f"[{rows}, H, {CKV_DIM}]", problem.dtype, device)
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


def _expect_operand(
    name: str,
    x: torch.Tensor,
    expected: tuple[int | None, ...],
    form: str,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    _expect_tensor(name, x)
    if x.dtype is not dtype:
        raise TypeError(f"{name}: expected dtype {dtype} (that of q_nope), got {x.dtype}")
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


def _expect_aligned(name: str, x: torch.Tensor) -> None:
    """Strides and base address the kernels can load from; a CPU tensor may have any."""
    if not x.is_cuda or x.numel() == 0:
        return
    strides = list(x.stride())
    if strides[-1] != 1:
        raise ValueError(f"{name}: expected stride 1 in the last dimension, got strides {strides}")
    if any(size > 1 and stride % _ALIGN_ELEMENTS for size, stride in zip(x.shape[:-1], strides[:-1], strict=True)):
        raise ValueError(
            f"{name}: expected strides that are multiples of {_ALIGN_ELEMENTS} elements ({_ALIGN_BYTES} bytes), "
            f"got strides {strides}"
        )
    if x.data_ptr() % _ALIGN_BYTES:
        raise ValueError(
            f"{name}: expected a base address that is a multiple of {_ALIGN_BYTES} bytes, got {x.data_ptr():#x}"
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
