"""Ways to call the library on a case, bitwise comparison, and caches that end beyond 2^31 elements."""

import pytest
import torch

from mla_cute.testing.cases import DecodeCase, expected_of, judge, run_case
from mla_cute.testing.fp8 import Fp8Case, run_fp8
from mla_cute.testing.prefill import PrefillCase, make_prefill_case
from mla_cute.testing.runs import capture, plan_of
from mla_cute.testing.verdict import Verdict

__all__ = [
    "ENTRIES", "MIXED", "bits", "capture", "check", "check_fp8", "decode", "judge_outputs", "make_prefill",
    "other_bits", "owned", "plan_of", "same_bits", "spread_cache",
]  # fmt: skip

ENTRIES = ("csr", "block_table")
# A prefill step of every kind of request at once: (q_len, kv_len).
MIXED = [(1, 1000), (300, 300), (0, 50), (200, 3000), (4, 129), (1, 64), (20, 0), (0, 0), (8, 5000), (70, 33), (1, 1)]


def decode(case: DecodeCase, entry: str = "csr", **kwargs):
    """The public call on a case; allocates the results unless out and lse are among the keywords."""
    return case.call(entry, **kwargs)


def make_prefill(requests, num_heads=16, page_size=64, **kwargs) -> PrefillCase:
    return make_prefill_case(requests, num_heads=num_heads, page_size=page_size, device="cuda", **kwargs)


def check(case: DecodeCase, **kwargs) -> None:
    verdict = run_case(case, **kwargs)
    assert verdict.ok, verdict


def check_fp8(fp8: Fp8Case, **kwargs) -> None:
    verdict = run_fp8(fp8, **kwargs)
    assert verdict.ok, verdict


def owned(case: DecodeCase) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse of the rows that requests own, cloned."""
    rows = case.queries[-1]
    return case.out[:rows].clone(), case.lse[:rows].clone()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((bits(a) == bits(b)).all())


def other_bits(case: DecodeCase, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """How many elements of the case's outputs are not the `bits` given; stays on the device."""
    return (bits(case.out) != out).sum() + (bits(case.lse) != lse).sum()


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32)


def judge_outputs(case: DecodeCase, lse_base: int | str = 2) -> Verdict:
    """Verdict on what is in the case's guarded outputs now."""
    return judge(case, expected_of(case, lse_base=lse_base))


def spread_cache(case: DecodeCase, log2_elements: int) -> None:
    """Move the upper half of a fused cache's pages behind element 2^log2_elements of a larger one; skips if too large.

    What lies between the halves is allocated and not written.
    """
    small, page_size, _ = case.ckv_cache.shape
    width = case.ckv_cache.shape[2] + case.kpe_cache.shape[2]
    num_pages = 2**log2_elements // (page_size * width) + small + 1
    needed = num_pages * page_size * width * case.ckv_cache.element_size()
    free = torch.cuda.mem_get_info()[0]
    if free < needed + 2**30:
        pytest.skip(f"needs {(needed + 2**30) / 1e9:.1f} GB of free GPU memory, there are {free / 1e9:.1f}")

    big = torch.empty(num_pages, page_size, width, dtype=case.ckv_cache.dtype, device="cuda")
    half = small // 2
    shift = num_pages - small
    ckv, kpe = big.split((case.ckv_cache.shape[2], case.kpe_cache.shape[2]), dim=-1)
    for cache, part in ((case.ckv_cache, ckv), (case.kpe_cache, kpe)):
        part[:half] = cache[:half]
        part[half + shift :] = cache[half:]
    for ids in (case.kv_indices, case.block_table):
        ids[(ids >= half) & (ids < small)] += shift
    assert (half + shift) * page_size * width > 2**log2_elements
    case.ckv_cache, case.kpe_cache = ckv, kpe
