"""The planner on the GPU against its model, word by word."""

import itertools

import pytest
import torch
from planner_batches import random_batches

import mla_cute
from mla_cute.kernels.planner import model

PAGE_SIZE = 16


@pytest.fixture(autouse=True)
def _one_round(partial_bytes):
    """The model knows no rounds, which a large batch-invariant plan has."""
    partial_bytes(1 << 40)


def read_back(plan, num_items):
    """(items, starts, merges) of a plan's table, checking the parts' copies of their first items."""
    table = plan.table.tolist()
    at = plan.num_parts + plan.batch
    items = [tuple(row[:5]) for row in table[at : at + num_items]]
    starts = [row[5] - at for row in table[: plan.num_parts]]
    for row, start in zip(table[: plan.num_parts], starts, strict=True):
        if row[6]:
            assert tuple(row[:5]) == items[start]
    ends = [start + row[6] for start, row in zip(starts, table, strict=False)]
    merges = [tuple(row[:3]) for row in table[plan.num_parts : plan.num_parts + table[0][7]]]
    return items, starts, ends, merges


@pytest.mark.parametrize("form", ["csr_last", "seq_lens"])
def test_random_batches(form):
    for number, batch in enumerate(random_batches(150, seed=1)):
        pages = [-(-n // PAGE_SIZE) for n in batch.lengths]
        indptr = torch.tensor(list(itertools.accumulate(pages, initial=5)), dtype=torch.int32, device="cuda")
        options = {
            "num_heads": batch.num_heads,
            "page_size": PAGE_SIZE,
            "config": batch.config,
            "batch_invariant": batch.batch_invariant,
        }
        if form == "csr_last":
            last = [(n - 1) % PAGE_SIZE + 1 for n in batch.lengths]
            last_len = torch.tensor(last, dtype=torch.int32, device="cuda")
            plan = mla_cute.plan_decode(indptr, kv_last_page_len=last_len, **options)
            firsts = indptr.tolist()[:-1]
        else:
            columns = max(pages) + 3
            seq_lens = torch.tensor(batch.lengths, dtype=torch.int32, device="cuda")
            plan = mla_cute.plan_decode_block_table(seq_lens, max_pages=columns, **options)
            firsts = [b * columns for b in range(len(pages))]
        want = model.plan(
            list(batch.lengths), firsts, plan.num_parts, batch.num_heads, batch.config, batch.batch_invariant
        )
        items, starts, ends, merges = read_back(plan, len(want.items))
        assert items == want.items, (number, batch, want.how)
        assert starts == want.starts[:-1], (number, batch, want.how)
        assert ends == want.starts[1:], (number, batch, want.how)
        merged = [(b, first, count) for b, (first, count) in enumerate(want.splits) if count != 1]
        assert [(b, count) for b, _, count in merges] == [(b, count) for b, _, count in merged], (number, batch)
        assert all(got == one for got, one in zip(merges, merged, strict=True) if one[2]), (number, batch)
