"""Ways to call the library on a case, and bitwise comparison."""

import torch

import mla_cute
from mla_cute._testing import DecodeCase, Verdict, compare, expected_of

ENTRIES = ("csr", "block_table")


def decode(case: DecodeCase, entry: str = "csr", **kwargs):
    """The public call on a case; allocates the results unless out and lse are among the keywords."""
    if entry == "csr":
        return mla_cute.mla_paged_decode(*case.csr_args, kv_last_page_len=case.kv_last_page_len, **kwargs)
    return mla_cute.mla_paged_decode_block_table(*case.block_table_args, **kwargs)


def plan_of(case: DecodeCase, entry: str = "csr", **kwargs) -> mla_cute.DecodePlan:
    sizes = {"num_heads": case.num_heads, "page_size": case.page_size}
    if entry == "csr":
        return mla_cute.plan_decode(case.kv_indptr, kv_last_page_len=case.kv_last_page_len, **sizes, **kwargs)
    rows, columns = case.block_table.shape
    stride = case.block_table.stride(0) if rows > 1 else columns
    return mla_cute.plan_decode_block_table(case.seq_lens, max_pages=columns, table_stride=stride, **sizes, **kwargs)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((bits(a) == bits(b)).all())


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32)


def judge_outputs(case: DecodeCase, lse_base: int | str = 2) -> Verdict:
    """Verdict on what is in the case's guarded outputs now, after checking the guards."""
    assert case.guarded_out.intact(), "memory around out was written"
    assert case.guarded_lse.intact(), "memory around lse was written"
    return compare(case.out, case.lse, expected_of(case, lse_base=lse_base))
