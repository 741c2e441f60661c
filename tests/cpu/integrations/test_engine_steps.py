"""Plans that outlive the steps of an engine, and queries in e4m3."""

from types import SimpleNamespace

import pytest
import torch
from integration_case import SM_SCALE, ListCase

from mla_cute import KernelConfig, plan_decode_block_table, plan_prefill_block_table, plan_sparse
from mla_cute.dims import PART_ROW
from mla_cute.integrations import _engine_steps
from mla_cute.integrations._engine_steps import paged_cache
from mla_cute.integrations._queries import to_e4m3
from mla_cute.kernels import registry
from mla_cute.plan_decode import _layout as decode_layout
from mla_cute.plan_prefill import _layout as prefill_layout


def test_padded_outputs_grow_and_stay():
    """A graph holds the addresses of earlier ones."""
    plans = _engine_steps.StepPlans(num_heads=2, page_size=1)

    def output(tokens, dtype=torch.bfloat16):
        made = plans.padded_output(tokens, dtype, torch.device("cpu"))
        assert (made.shape, made.dtype) == ((tokens, 2, 512), dtype)
        return made

    first = output(4)
    assert (first == 0).all()
    first.fill_(7)
    assert (output(3) == 7).all()
    larger = output(5)
    assert (larger == 0).all()
    assert (first == 7).all()
    assert output(5).data_ptr() == larger.data_ptr()
    assert output(5, torch.float16).data_ptr() not in (larger.data_ptr(), first.data_ptr())
    assert len(plans._outputs) == 3


def test_steps_over_lists(monkeypatch):
    """Found again by their sizes, those of graphs for good; planned from the lengths that they are updated with."""
    monkeypatch.setattr(_engine_steps.StepPlans, "RECENT", 1)
    plans, cpu = _engine_steps.StepPlans(num_heads=2, page_size=64), torch.device("cpu")
    kept = plans.list_step(3, 8, cpu, keep=True)
    recent = plans.list_step(4, 8, cpu)
    assert plans.list_step(4, 8, cpu).plan is recent.plan
    assert plans.list_step(3, 9, cpu).plan is not kept.plan
    assert plans.list_step(4, 8, cpu).plan is not recent.plan
    assert plans.list_step(3, 8, cpu).plan is kept.plan

    case = ListCase([8, 0, 5], topk=8, num_heads=2)
    kept.update(case.topk_lens)
    for indices in (case.indices, case.indices.where(case.indices >= 0, -1)):  # the next layer's
        out, lse = kept.attend(case.q[..., :512], case.q[..., 512:], paged_cache(case.cache), indices, SM_SCALE)
        expected, expected_lse = case.expected()
        torch.testing.assert_close(out.float(), expected, rtol=2**-7, atol=2**-8)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


def test_plans_share_one_buffer_of_partials(monkeypatch):
    """On the GPU; here with plans that are only told they are there."""

    def plan_of(seq_lens, partials, **_):
        rows = len(seq_lens)
        own = torch.empty(rows, 3) if partials is None or len(partials) < rows else partials
        return SimpleNamespace(device=torch.device("cuda"), part=own)

    monkeypatch.setattr(_engine_steps, "plan_decode_block_table", plan_of)
    lens, table = torch.ones(9, dtype=torch.int32), torch.zeros(9, 2, dtype=torch.int32)

    def made(plans):
        return [plans.step(table[:n], lens[:n], keep=True).plan.part for n in (4, 2, 9, 3)]

    first, second, third, fourth = made(_engine_steps.StepPlans(num_heads=1, page_size=1))
    assert [len(part) for part in (first, third)] == [4, 9]
    assert first is second
    assert third is fourth
    given = torch.empty(9, 3)
    assert all(part is given for part in made(_engine_steps.StepPlans(num_heads=1, page_size=1, partials=given)))


@pytest.mark.parametrize("num_heads", [1, 16, 17, 64, 65, 128])
@pytest.mark.parametrize("num_sms", [132, 78])
def test_no_plan_needs_more_partial_rows(num_heads, num_sms):
    most = _engine_steps.most_partial_rows(num_sms)
    for kernel in ("auto", "tile16"):
        config = KernelConfig(kernel=kernel)
        parts = registry.decode_parts("", num_heads, config, num_sms)
        assert decode_layout(128, num_sms, (parts, 64, 0, num_heads)).part_rows <= most
    assert prefill_layout(4096, 128, num_sms, (num_sms, 64, 0, num_heads)).part_rows == most


def test_plans_are_told_how_long_requests_are(monkeypatch):
    """To the next power of two; those of graphs, which are replayed with other lengths, what stands for these."""
    told = []

    def plan_of(seq_lens, max_kv_len, **_):
        told.append(max_kv_len)
        return SimpleNamespace(device=torch.device("cpu"))

    monkeypatch.setattr(_engine_steps, "plan_decode_block_table", plan_of)
    plans = _engine_steps.StepPlans(num_heads=128, page_size=64)
    lens, table = torch.ones(4, dtype=torch.int32), torch.zeros(4, 32, dtype=torch.int32)
    made = [plans.step(table, lens, max_kv_len=n).plan for n in (1025, 2048, 2049, 1024, 1, 0, 2000)]
    assert told == [2048, 4096, 1024, 1]
    assert made[0] is made[1] is made[6] is not made[2]
    assert made[4] is made[5]
    kept = plans.step(table, lens, max_kv_len=2000, keep=True).plan
    assert told[4:] == [_engine_steps.GRAPH_KV_LEN]
    assert all(kept is not plan for plan in made)  # equal, all of them
    assert plans.step(table, lens, max_kv_len=2000).plan is kept


@pytest.mark.parametrize(
    ("partials", "error", "message"),
    [
        (7, TypeError, "partials: expected a tensor or None, got int"),
        (
            torch.zeros(4, PART_ROW, dtype=torch.float16),
            ValueError,
            r"expected float32 \[rows, 288\], got torch.float16",
        ),
        (torch.zeros(4, PART_ROW - 1), ValueError, r"got torch.float32 \[4, 287\]"),
        (torch.zeros(PART_ROW), ValueError, r"got torch.float32 \[288\]"),
        (torch.zeros(PART_ROW, 4).mT[:, :4].repeat(1, 72).mT.contiguous().mT, ValueError, "expected contiguous memory"),
        (torch.zeros(4 * PART_ROW + 1)[1:].view(4, PART_ROW), ValueError, "at a multiple of 16 bytes"),
    ],
)
def test_partials_are_checked(partials, error, message):
    lens = torch.ones(4, dtype=torch.int32)
    with pytest.raises(error, match=message):
        plan_decode_block_table(lens, num_heads=1, page_size=1, max_pages=2, partials=partials)
    indptr = torch.arange(5, dtype=torch.int32)
    with pytest.raises(error, match=message):
        plan_prefill_block_table(indptr, lens, num_heads=1, page_size=1, total_q=4, max_pages=2, partials=partials)
    with pytest.raises(error, match=message):
        plan_sparse(torch.zeros(2, 3, dtype=torch.int32), num_heads=1, partials=partials)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_queries_in_e4m3(dtype):
    """What torch rounds to, of rows in another order; beyond 448 to 448, where torch gives NaN."""
    heads = torch.randn(3, 5, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    q_nope, q_pe = heads.transpose(0, 1), torch.randn(5, 3, 128, dtype=dtype)[..., 64:]
    expected = [x.float().to(torch.float8_e4m3fn) for x in (q_nope, q_pe)]
    for part, wanted in zip(to_e4m3(q_nope, q_pe), expected, strict=True):
        assert torch.equal(part.view(torch.uint8), wanted.view(torch.uint8))
    q_nope[0, 0, :4] = torch.tensor([1000.0, -torch.inf, torch.nan, 449.0])
    nope, pe = to_e4m3(q_nope, q_pe)
    assert nope[0, 0, :4].float().nan_to_num(7.0).tolist() == [448.0, -448.0, 7.0, 448.0]
    assert nope.stride() == pe.stride() == (3 * 576, 576, 1)


@pytest.mark.parametrize("interleave", [1, 2, 16])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_the_share_of_a_rank(world, interleave):
    lengths = torch.arange(100, dtype=torch.int32)
    for rank in range(world):
        held = torch.tensor([p // interleave % world == rank for p in range(100)])
        expected = [int(held[:n].sum()) for n in range(100)]
        assert _engine_steps.Share(rank, world, interleave).of(lengths).tolist() == expected


def test_rooms_of_tokens_grow_and_stay():
    """A graph holds the addresses of earlier ones, which are not filled again."""
    tokens = _engine_steps.TokenRequests(_engine_steps.Share(0, 2))
    table = torch.zeros(3, 5, dtype=torch.int32)
    first = tokens.room(4, table)
    assert [tuple(x.shape) for x in first] == [(4, 5), (4,), (5,)]
    assert tokens.room(2, table)[1].data_ptr() == first[1].data_ptr()
    larger = tokens.room(9, table)
    assert larger[1].data_ptr() != first[1].data_ptr()
    assert tokens.room(9, table)[0].data_ptr() == larger[0].data_ptr()
    assert tokens.room(1, table[:, :2])[0].shape == (1, 2)
    assert len(tokens._rooms) == 3
