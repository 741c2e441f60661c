"""The prefill planner on the GPU against its model, word by word."""

import itertools

import pytest
import torch
from prefill_batches import PrefillBatch, random_prefill_batches

import mla_cute
from mla_cute.config import KernelConfig
from mla_cute.kernels.planner import model_prefill
from mla_cute.kernels.planner.model_prefill import Request

PAGE_SIZE = 16
UNWRITTEN = -7777
SPARE_TOKENS = 3  # q tensors may be longer than qo_indptr says, as under a CUDA graph captured with a maximum


@pytest.fixture(autouse=True)
def _one_round(partial_bytes):
    """The model knows no rounds, which a large batch-invariant plan has."""
    partial_bytes(1 << 40)


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def plan_of(batch, form):
    """(plan, requests as the model takes them); "csr" rounds the kv lengths up to whole pages."""
    starts = list(itertools.accumulate(batch.q_lens, initial=0))
    pages = [-(-n // PAGE_SIZE) for n in batch.kv_lens]
    kv_lens = [n * PAGE_SIZE for n in pages] if form == "csr" else batch.kv_lens
    options = {
        "num_heads": batch.num_heads,
        "page_size": PAGE_SIZE,
        "total_q": starts[-1] + SPARE_TOKENS,
        "causal": batch.causal,
        "config": batch.config,
        "batch_invariant": batch.batch_invariant,
    }
    if form == "seq_lens":
        columns = max(pages, default=0) + 3
        firsts = [b * columns for b in range(len(pages))]
        plan = mla_cute.plan_prefill_block_table(ints(starts), ints(kv_lens), max_pages=columns, **options)
    else:
        indptr = list(itertools.accumulate(pages, initial=5))
        firsts = indptr[:-1]
        last = [(n - 1) % PAGE_SIZE + 1 for n in batch.kv_lens]
        last_len = ints(last) if form == "csr_last" else None
        plan = mla_cute.plan_prefill(ints(starts), ints(indptr), kv_last_page_len=last_len, **options)
    requests = [Request(*facts) for facts in zip(starts, batch.q_lens, kv_lens, firsts, strict=False)]
    return plan, requests


def check(batch, form):
    compare(*plan_of(batch, form), batch)


def compare(plan, requests, batch):
    """Plan again into a table of known contents and compare it with the model's."""
    plan.table.fill_(UNWRITTEN)
    plan.update()
    want = model_prefill.plan(
        requests, plan.num_parts, batch.num_heads, batch.causal, batch.config, batch.batch_invariant
    )
    table = [tuple(row) for row in plan.table.tolist()]
    at = plan.num_parts + plan.max_tiles
    parts, merges, items = table[: plan.num_parts], table[plan.num_parts : at], table[at:]
    assert [row[:2] for row in parts] == [(at + p, count) for p, count in enumerate(want.counts)]
    assert parts[0][7] == len(want.merges)
    assert [row[:4] for row in merges[: len(want.merges)]] == want.merges
    assert all(set(row) == {UNWRITTEN} for row in merges[len(want.merges) :])
    assert [row[:7] for row in items[: len(want.items)]] == [want.items[row] for row in range(len(want.items))]
    assert all(set(row) == {UNWRITTEN} for row in items[len(want.items) :])
    last_part_row = max((row[4] + row[5] for row in want.items.values() if row[4] >= 0), default=0)
    assert last_part_row <= plan.part.shape[0]


@pytest.mark.parametrize("form", ["csr", "csr_last", "seq_lens"])
def test_random_batches(form):
    for number, batch in enumerate(random_prefill_batches(100, seed=len(form))):
        try:
            check(batch, form)
        except AssertionError as error:
            raise AssertionError(f"batch {number}: {batch}") from error


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("size", [511, 512, 1023, 1024, 1025, 2000])
def test_many_requests(size, batch_invariant):
    """Past 512 requests a thread has several, past 1024 their facts lie in global memory."""
    q_lens = tuple(b % 5 for b in range(size))
    kv_lens = tuple((b * 977) % 3000 if b % 7 else b % 3 for b in range(size))
    check(PrefillBatch(q_lens, kv_lens, 48, True, KernelConfig(), batch_invariant), "seq_lens")


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(
    ("q_lens", "kv_lens", "num_heads"),
    [
        ((131072,), (131072,), 16),  # 32768 tiles
        ((100000, 60000, 0, 30000), (131072, 140000, 5, 25000), 1),  # 1024 classes of two costs each
        ((2000, 1500), (1 << 21, (1 << 21) - 77777), 128),
    ],
)
def test_many_tiles(q_lens, kv_lens, num_heads, batch_invariant):
    check(PrefillBatch(q_lens, kv_lens, num_heads, True, KernelConfig(), batch_invariant), "csr_last")


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_update_follows_the_metadata(batch_invariant):
    q_starts, seq_lens = ints([0, 5, 705, 706]), ints([900, 700, 40000])
    plan = mla_cute.plan_prefill_block_table(
        q_starts,
        seq_lens,
        num_heads=16,
        page_size=PAGE_SIZE,
        total_q=706,
        max_pages=4000,
        config=KernelConfig(),
        batch_invariant=batch_invariant,
    )
    for starts, lengths in (
        ([0, 5, 705, 706], [900, 700, 100]),
        ([0, 0, 300, 305], [900, 64000, 0]),
        ([0] * 4, [1] * 3),
    ):
        q_starts.copy_(ints(starts))
        seq_lens.copy_(ints(lengths))
        q_lens = [end - begin for begin, end in itertools.pairwise(starts)]
        requests = [Request(starts[b], q_lens[b], lengths[b], 4000 * b) for b in range(3)]
        compare(plan, requests, PrefillBatch(tuple(q_lens), tuple(lengths), 16, True, plan.config, batch_invariant))
