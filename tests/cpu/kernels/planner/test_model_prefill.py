"""Properties of prefill plans, on the model that tests/gpu/test_prefill_planner.py compares the GPU planner with."""

import collections
import itertools

import pytest
from prefill_batches import random_prefill_batches

from mla_cute.config import KernelConfig, default_config
from mla_cute.dims import BLOCK, TILE_M
from mla_cute.gpu_speed import H200
from mla_cute.kernels.keys import FIXED_MAX_ITEMS, FIXED_MAX_PIECES, TAIL_ITEMS_PER_PART
from mla_cute.kernels.planner import model, model_prefill
from mla_cute.kernels.planner.model_prefill import Request

NUM_SMS = 132
BATCHES = random_prefill_batches(400, seed=0)
BALANCED = [b for b in BATCHES if not b.batch_invariant]


def requests_of(q_lens, kv_lens):
    starts = itertools.accumulate(q_lens, initial=0)
    firsts = itertools.accumulate((-(-n // BLOCK) for n in kv_lens), initial=0)
    return [Request(*facts) for facts in zip(starts, q_lens, kv_lens, firsts, strict=False)]


def plan_of(batch):
    requests = requests_of(batch.q_lens, batch.kv_lens)
    plan = model_prefill.plan(requests, NUM_SMS, batch.num_heads, batch.causal, batch.config, batch.batch_invariant)
    return plan, requests


def keys_seen(request, token, causal):
    """Keys that query `token` of the request sees: the definition of a bottom-right aligned mask."""
    seen = request.kv_len - request.q_len + token + 1 if causal else request.kv_len
    return min(max(seen, 0), request.kv_len)


def rows_of(requests, num_heads):
    """(global row of a tile's first row, request, first and last token) of every tile."""
    for request in requests:
        rows = request.q_len * num_heads
        for begin in range(0, rows, TILE_M):
            last = min(begin + TILE_M, rows) - 1
            yield request.q_start * num_heads + begin, request, begin // num_heads, last // num_heads, last - begin + 1


@pytest.mark.parametrize("batch", BATCHES, ids=range(len(BATCHES)))
def test_every_row_meets_every_key_it_sees_once(batch):
    plan, requests = plan_of(batch)
    pieces = collections.defaultdict(list)
    for item in plan.items.values():
        pieces[item[0]].append(item)
    merges = {merge[0]: merge for merge in plan.merges}
    assert len(merges) == len(plan.merges)
    known = 0
    for row, request, token, last_token, rows in rows_of(requests, batch.num_heads):
        items = sorted(pieces[row], key=lambda item: item[1])
        needed = keys_seen(request, last_token, batch.causal)
        covered = 0
        for s, (_, begin, end, first, part_row, item_rows, shift) in enumerate(items):
            assert begin == covered, "pieces of a tile follow one another"
            assert begin < end, "no item is empty"
            assert begin % (2 * BLOCK) == 0, "cuts lie on pairs of blocks"
            assert (first, item_rows) == (request.first, rows)
            if len(items) == 1:
                assert part_row == -1
            else:
                assert part_row == merges[row][1] + s * rows
            for t in (token, last_token):
                limit = min(request.kv_len, request.q_start + t + shift)
                assert max(limit, 0) == keys_seen(request, t, batch.causal)
            assert request.q_start + last_token + shift > begin, "no item is fully masked"
            covered = end
        assert covered == needed
        if len(items) != 1:
            assert merges[row][2:] == (len(items), rows)
        known += len(items) != 1
    assert known == len(merges), "merge entries are of cut and empty tiles alone"
    assert sum(map(len, pieces.values())) == len(plan.items)


@pytest.mark.parametrize("batch", BATCHES, ids=range(len(BATCHES)))
def test_item_rows_are_dense_and_the_workspace_suffices(batch):
    plan, requests = plan_of(batch)
    assert sorted(plan.items) == list(range(len(plan.items)))
    assert sum(plan.counts) == len(plan.items)
    assert max(plan.counts) - min(plan.counts) <= 1
    total_q, size = sum(batch.q_lens), len(requests)
    max_tiles = -(-total_q * batch.num_heads // TILE_M) + size
    assert len(plan.tiles) <= max_tiles
    spans = sorted((item[4], item[4] + item[5]) for item in plan.items.values() if item[4] >= 0)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans)), "partial rows do not overlap"
    used = spans[-1][1] if spans else 0
    if batch.batch_invariant:
        most = min(FIXED_MAX_PIECES * max_tiles, max_tiles + FIXED_MAX_ITEMS * size)
        assert len(plan.items) <= most
        assert used <= min(TILE_M * most, FIXED_MAX_PIECES * total_q * batch.num_heads)
    else:
        assert len(plan.items) <= max_tiles + TAIL_ITEMS_PER_PART * NUM_SMS
        assert used <= TAIL_ITEMS_PER_PART * NUM_SMS * TILE_M
        assert sum(merge[2] > 0 for merge in plan.merges) < NUM_SMS


@pytest.mark.parametrize("batch", BALANCED, ids=range(len(BALANCED)))
def test_longer_tiles_come_first(batch):
    """Whole rounds go from long to short; inside a class of costs the order is free."""
    plan, _ = plan_of(batch)
    longest = max((tile.blocks for tile in plan.tiles), default=0)
    coarse = max(1, longest // model_prefill.COST_CLASSES * 2) * 2
    lengths = [plan.items[row][2] for row in range(plan.rounds * NUM_SMS)]
    for k in range(plan.rounds - 1):
        here, following = (lengths[j * NUM_SMS : (j + 1) * NUM_SMS] for j in (k, k + 1))
        assert min(here) > max(following) - coarse * BLOCK


@pytest.mark.parametrize(
    ("q_lens", "kv_lens", "num_heads", "within"),
    [
        ([2048] * 4, [8192] * 4, 16, 0.02),
        ([2048] * 4, [8192] * 4, 128, 0.005),
        ([8192], [8192], 16, 0.02),
        ([8192] * 4, [8192] * 4, 16, 0.005),
        ([4096], [131072], 128, 0.001),
        ([1024] * 16, [1024] * 16, 16, 0.03),
        ([100] * 16, [8192] * 16, 16, 0.02),
        ([1578, 166, 900, 2900], [3985, 1784, 1000, 12000], 64, 0.01),
        ([1] * 200 + [4000], [5000] * 200 + [9000], 16, 0.03),
    ],
)
@pytest.mark.parametrize("causal", [True, False])
def test_the_longest_part_is_near_the_mean(q_lens, kv_lens, num_heads, within, causal):
    config = default_config(num_heads, H200)
    plan = model_prefill.plan(requests_of(q_lens, kv_lens), NUM_SMS, num_heads, causal, config)
    line = sum(tile.blocks + config.item_overhead for tile in plan.tiles if tile.blocks)
    assert max(plan.loads(config.item_overhead)) <= (1 + within) * line / NUM_SMS


@pytest.mark.parametrize("batch", BALANCED, ids=range(len(BALANCED)))
def test_no_part_is_much_longer_than_the_mean(batch):
    """Two parts differ by one tile in the rounds, and by at most the cost of the tail there."""
    plan, _ = plan_of(batch)
    overhead = batch.config.item_overhead
    uncut = plan.rounds * NUM_SMS
    tail = [2 * -(-(item[2] - item[1]) // (2 * BLOCK)) + overhead for k, item in plan.items.items() if k >= uncut]
    longest = max((tile.blocks for tile in plan.tiles), default=0) + overhead
    of_tail = -(-len(tail) // NUM_SMS) * max(tail, default=0)
    line = sum(tile.blocks + overhead for tile in plan.tiles if tile.blocks)
    assert max(plan.loads(overhead)) <= line / NUM_SMS + longest + of_tail
    # An uncut tail costs its longest tile; a cut one is only chosen when that is cheaper.
    if tail:
        tiles = model_prefill.ranked(plan.tiles)[uncut:]
        whole = max(tile.blocks for tile in tiles) + overhead
        assert of_tail <= max(whole, model_prefill.even_up(batch.config.min_blocks) + overhead)


REQUESTS = [(1, 100000), (4, 5000), (37, 8192), (300, 300), (50, 20), (1000, 131072)]


@pytest.mark.slow
@pytest.mark.parametrize(("q_len", "kv_len"), REQUESTS)
@pytest.mark.parametrize("num_heads", [16, 128])
def test_invariant_cuts_depend_on_the_own_request_alone(q_len, kv_len, num_heads):
    def cuts(requests, at):
        requests = requests_of(*zip(*requests, strict=True))
        plan = model_prefill.plan(requests, NUM_SMS, num_heads, True, KernelConfig(), batch_invariant=True)
        begin = requests[at].q_start * num_heads
        rows = range(begin, begin + q_len * num_heads)
        return sorted((item[0] - begin, item[1], item[2]) for item in plan.items.values() if item[0] in rows)

    alone = cuts([(q_len, kv_len)], 0)
    assert cuts([(7, 7), (0, 100), (q_len, kv_len), (3, 30000)], 2) == alone
    assert cuts([(q_len, kv_len)] * 50, 49) == alone


@pytest.mark.parametrize("kv_len", [1, 128, 1000, 1025, 5000, 8192, 8193, 16512, 100000, 1 << 21])
def test_invariant_requests_of_one_tile_are_cut_as_decode_cuts_them(kv_len):
    config = KernelConfig()
    plan = model_prefill.plan([Request(0, 1, kv_len, 0)], NUM_SMS, 16, True, config, batch_invariant=True)
    decode = model.plan([kv_len], [0], NUM_SMS, 16, config, batch_invariant=True)
    assert [item[1:3] for _, item in sorted(plan.items.items())] == [item[1:3] for item in decode.items]


@pytest.mark.parametrize("invariant", [False, True])
def test_nothing_to_do(invariant):
    config = KernelConfig()
    plan = model_prefill.plan([], NUM_SMS, 16, True, config, invariant)
    assert (plan.items, plan.merges, set(plan.counts)) == ({}, [], {0})
    plan = model_prefill.plan(requests_of([0, 5], [10, 0]), NUM_SMS, 16, True, config, invariant)
    assert plan.items == {}
    assert plan.merges == [(0, 0, 0, 64), (64, 0, 0, 16)]
