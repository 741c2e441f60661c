"""Properties of plans, on the model that the GPU planner is compared with item by item (tests/gpu/test_planner.py)."""

import itertools

import pytest
import torch
from planner_batches import random_batches

import mla_cute
from mla_cute.config import KernelConfig, default_config, why_infeasible
from mla_cute.dims import BLOCK
from mla_cute.gpu_speed import H200
from mla_cute.kernels.keys import FIXED_MAX_PIECES, FIXED_MIN_BLOCKS
from mla_cute.kernels.planner import model

NUM_SMS = 132
BATCHES = random_batches(400, seed=0)


def plan_of(batch):
    firsts = list(itertools.accumulate((-(-n // BLOCK) for n in batch.lengths[:-1]), initial=0))
    parts = NUM_SMS // batch.num_tiles
    return model.plan(list(batch.lengths), firsts, parts, batch.num_heads, batch.config, batch.batch_invariant), parts


@pytest.mark.parametrize("batch", BATCHES, ids=range(len(BATCHES)))
def test_every_token_is_in_one_item(batch):
    plan, parts = plan_of(batch)
    covered = [0] * len(batch.lengths)
    pieces = [0] * len(batch.lengths)
    for request, begin, end, _, row in plan.items:
        assert begin == covered[request], "pieces of a request follow one another"
        assert begin < end <= batch.lengths[request]
        assert begin % (batch.config.cut_unit * BLOCK) == 0
        first, count = plan.splits[request]
        assert row == (-1 if count == 1 else first + pieces[request] * batch.num_heads)
        covered[request] = end
        pieces[request] += 1
    assert covered == list(batch.lengths)
    assert pieces == [count for _, count in plan.splits]
    assert plan.starts[0] == 0
    assert plan.starts[-1] == len(plan.items)
    assert len(plan.starts) == parts + 1
    assert plan.starts == sorted(plan.starts), "every item belongs to one part"


@pytest.mark.parametrize("batch", BATCHES, ids=range(len(BATCHES)))
def test_partials_fit_the_workspace_and_do_not_overlap(batch):
    plan, parts = plan_of(batch)
    rows = sorted(row for *_, row in plan.items if row >= 0)
    assert all(b - a >= batch.num_heads for a, b in itertools.pairwise(rows))
    if batch.batch_invariant:
        slots = min(
            len(batch.lengths) * FIXED_MAX_PIECES,
            len(batch.lengths) + sum(batch.lengths) // (FIXED_MIN_BLOCKS * BLOCK),
        )
    else:
        slots = 2 * parts
        assert len(plan.items) <= len(batch.lengths) + parts
    assert not rows or rows[-1] + batch.num_heads <= slots * batch.num_heads


@pytest.mark.parametrize("batch", [b for b in BATCHES if not b.batch_invariant], ids=str)
def test_no_part_is_much_longer_than_the_mean(batch):
    """The largest part, overheads included, is within what the planner's cost says it chose."""
    plan, parts = plan_of(batch)
    overhead = batch.config.item_overhead
    blocks = [model.up(-(-n // BLOCK), batch.config.cut_unit) for n in batch.lengths]
    line = sum(n + overhead for n in blocks if n)
    payload = max(-(-line // parts), batch.config.min_blocks)
    # A part has its share, up to cut_unit blocks for where cuts may lie, and one item more than the line charges it
    # for; whole requests are kept while they cost at most the penalty more.
    assert max(plan.loads) <= payload + batch.config.cut_unit + overhead + batch.config.split_penalty
    if plan.how == "whole":
        assert all(count <= 1 for _, count in plan.splits)
    if plan.how == "pieces":
        assert all(hi - lo <= 1 for lo, hi in itertools.pairwise(plan.starts))


@pytest.mark.parametrize("length", [1, 1000, 5000, 8192, 100000])
def test_invariant_cuts_depend_on_the_own_length_alone(length):
    config = default_config(16, H200)

    def cuts(lengths, at):
        plan = model.plan(lengths, [0] * len(lengths), NUM_SMS, 16, config, batch_invariant=True)
        return [(begin, end) for request, begin, end, *_ in plan.items if request == at]

    alone = cuts([length], 0)
    assert cuts([7, 0, length, 30000], 2) == alone
    assert cuts([length] * 300, 299) == alone


@pytest.mark.parametrize(
    ("lengths", "num_heads", "how", "largest"),
    [
        ([8192], 16, "pieces", 1),
        ([8192], 17, "pieces", 2),
        ([1024] * 16, 16, "pieces", 2),
        ([8192] * 16, 16, "pieces", 16),
        ([8192] * 128, 16, "whole", 128),
        ([8192] * 64, 128, "whole", 128),
        ([8192] * 100, 16, "line", 100),
    ],
)
def test_what_is_chosen_for_common_batches(lengths, num_heads, how, largest):
    parts = NUM_SMS // -(-num_heads // 64)
    config = default_config(num_heads, H200)
    plan = model.plan(lengths, [0] * len(lengths), parts, num_heads, config)
    assert plan.how == how
    assert max(plan.loads) == largest


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kernel", "columns"),
        ("cut_unit", 0),
        ("cut_unit", 3),
        ("min_blocks", 0),
        ("min_blocks", 1),
        ("min_blocks", 3),
        ("item_overhead", -1),
        ("split_penalty", -1),
    ],
)
def test_infeasible_configs_are_named(field, value):
    reason = why_infeasible(KernelConfig(**{field: value}))
    assert reason is not None
    assert reason.startswith(f"{field}: expected")


WRONG_TYPES = [
    ("min_blocks", "2", "min_blocks: expected int, got '2'"),
    ("min_blocks", 2.0, "min_blocks: expected int, got 2.0"),
    ("cut_unit", True, "cut_unit: expected int, got True"),
    ("item_overhead", None, "item_overhead: expected int, got None"),
    ("split_penalty", [6], "split_penalty: expected int, got [6]"),
    ("evict_first", 1, "evict_first: expected bool, got 1"),
    ("use_pdl", "yes", "use_pdl: expected bool, got 'yes'"),
    ("kernel", None, "kernel: expected str, got None"),
    ("fp8_kernel", 0, "fp8_kernel: expected str, got 0"),
    ("accuracy", b"high", "accuracy: expected str, got b'high'"),
]


@pytest.mark.parametrize(("field", "value", "message"), WRONG_TYPES)
def test_wrong_types_of_a_config_are_named(field, value, message):
    """A value that only equals a right one, as 1 does True, would be another kernel with the same code."""
    config = KernelConfig(**{field: value})
    assert why_infeasible(config) == message
    with pytest.raises(TypeError) as raised:
        KernelConfig.from_dict({field: value})
    assert str(raised.value) == f"config.{message}"
    indptr = torch.tensor([0, 1], dtype=torch.int32)
    q, cache = torch.full((1, 2, 576), torch.nan, dtype=torch.bfloat16), torch.zeros(2, 1, 576, dtype=torch.bfloat16)
    parts = q[..., :512], q[..., 512:], cache[..., :512], cache[..., 512:]
    for call in (
        lambda: mla_cute.plan_decode(indptr, num_heads=2, page_size=1, config=config),
        lambda: mla_cute.plan_prefill(indptr, indptr, total_q=1, num_heads=2, page_size=1, config=config),
        lambda: mla_cute.mla_paged_decode(*parts, indptr, indptr[:1], 1.0, config=config),
        lambda: mla_cute.mla_paged_prefill(*parts, indptr, indptr, indptr[:1], 1.0, config=config),
    ):
        with pytest.raises(TypeError) as raised:
            call()
        assert str(raised.value) == f"config.{message}"


def test_config_json_round_trip_and_errors():
    config = KernelConfig(evict_first=False, min_blocks=8)
    assert KernelConfig.from_dict(config.to_dict()) == config
    assert why_infeasible(config) is None
    with pytest.raises(ValueError, match=r"unknown fields \['stages'\]"):
        KernelConfig.from_dict({"stages": 2})
    with pytest.raises(TypeError, match=r"config\.min_blocks: expected int, got True"):
        KernelConfig.from_dict({"min_blocks": True})
