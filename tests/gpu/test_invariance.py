"""batch_invariant=True: a request's row has the same bits whatever else is in the batch."""

import copy

import pytest
import torch
from gpu_helpers import ENTRIES, decode, plan_of, same_bits

from mla_cute.testing.cases import DecodeCase, make_case, run_case


def select(case: DecodeCase, rows: list[int]) -> DecodeCase:
    """The case with these requests only, over the same cache."""
    sub = copy.copy(case)
    index = torch.tensor(rows, device="cuda")
    starts, ends = case.kv_indptr[:-1].tolist(), case.kv_indptr[1:].tolist()
    sub.lengths = [case.lengths[b] for b in rows]
    sub.q_nope, sub.q_pe = case.q_nope[index], case.q_pe[index]
    sub.kv_indices = torch.cat([case.kv_indices[starts[b] : ends[b]] for b in rows])
    counts = torch.tensor([0] + [ends[b] - starts[b] for b in rows])
    sub.kv_indptr = counts.cumsum(0).to(device="cuda", dtype=torch.int32)
    sub.kv_last_page_len, sub.seq_lens = case.kv_last_page_len[index], case.seq_lens[index]
    sub.block_table = case.block_table[index]
    return sub


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(("num_heads", "page_size"), [(16, 64), (128, 64), (16, 1), (65, 16)])
def test_a_row_does_not_see_its_neighbours(num_heads, page_size, entry):
    generator = torch.Generator().manual_seed(num_heads + page_size)
    lengths = torch.randint(0, 2500, (200,), generator=generator).tolist()
    targets = {0: 20000, 17: 1, 60: 65, 100: 1024, 101: 1025, 150: 5000, 199: 2047}
    for b, n in targets.items():
        lengths[b] = n
    case = make_case(lengths, num_heads=num_heads, page_size=page_size, device="cuda")
    verdict = run_case(case, entry=entry, batch_invariant=True)
    assert verdict.ok, verdict
    out, lse = case.out.clone(), case.lse.clone()
    for b in targets:
        for size in (1, 3, 37):
            others = [r for r in torch.randperm(200, generator=generator).tolist() if r != b][: size - 1]
            at = int(torch.randint(0, size, (1,), generator=generator))
            rows = [*others[:at], b, *others[at:]]
            sub = select(case, rows)
            plan = plan_of(sub, entry, batch_invariant=True) if size == 3 else None
            got, got_lse = decode(sub, entry, batch_invariant=True, plan=plan)
            where = f"request of {lengths[b]} tokens at {at} of {size}"
            assert same_bits(got[at], out[b]), where
            assert same_bits(got_lse[at], lse[b]), where
