"""Plans as objects: metadata that go with them, rounds of batch-invariant ones, limits, what they say of themselves."""

import copy
import pickle

import pytest
import torch
from prefill_case import make_prefill

import mla_cute
from mla_cute import plan
from mla_cute.compile import jit
from mla_cute.dims import PART_ROW
from mla_cute.kernels.keys import FIXED_MAX_PIECES
from mla_cute.plan_decode import _invariant_layout as decode_layout
from mla_cute.plan_prefill import _invariant_layout as prefill_layout
from mla_cute.testing.cases import make_case

META = torch.device("meta")
SIZES = {"num_heads": 16, "page_size": 64}


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture
def case():
    return make_case([70, 0, 129, 64], num_heads=4, page_size=64)


def operands(case):
    return case.q_nope, case.q_pe, case.ckv_cache, case.kpe_cache


def decode(case, indptr, last, **options):
    return mla_cute.mla_paged_decode(
        *operands(case), indptr, case.kv_indices, case.sm_scale, kv_last_page_len=last, **options
    )


# ------------------------------------------------------------------------------------------------ metadata


@pytest.mark.parametrize("planned_with", [False, True])
def test_last_page_lengths_on_one_side_only(case, planned_with):
    last = case.kv_last_page_len
    made = mla_cute.plan_decode(
        case.kv_indptr, num_heads=4, page_size=64, kv_last_page_len=last if planned_with else None
    )
    with pytest.raises(ValueError, match=r"^kv_last_page_len: expected (a tensor|None), the plan was made with"):
        decode(case, case.kv_indptr, None if planned_with else last, plan=made)


def test_a_plan_of_other_requests(case):
    lens, table = case.seq_lens, case.block_table
    first = mla_cute.plan_decode_block_table(lens[:2], num_heads=4, page_size=64, max_pages=table.shape[1])
    q = [x[2:] for x in (case.q_nope, case.q_pe)]
    out = torch.full((2, 4, 512), 7.0, dtype=case.q_nope.dtype)
    with pytest.raises(
        ValueError, match=r"^seq_lens: expected the tensor that the plan was made from .*other_metadata"
    ):
        mla_cute.mla_paged_decode_block_table(
            *q, case.ckv_cache, case.kpe_cache, table[2:], lens[2:], case.sm_scale, plan=first, out=out
        )
    assert bool((out == 7).all())


def test_another_tensor_over_the_same_memory_is_the_same(case):
    made = mla_cute.plan_decode(case.kv_indptr, num_heads=4, page_size=64, kv_last_page_len=case.kv_last_page_len)
    got = decode(case, case.kv_indptr.view(-1), case.kv_last_page_len[:], plan=made)
    want = decode(case, case.kv_indptr, case.kv_last_page_len)
    assert torch.equal(got[0], want[0])


def test_lengths_are_the_plans_where_other_metadata_are_allowed(case):
    """As on a GPU, where the step reads what the planner wrote."""
    last = case.kv_last_page_len
    made = mla_cute.plan_decode(
        case.kv_indptr.clone(), num_heads=4, page_size=64, kv_last_page_len=last.clone(), other_metadata=True
    )
    want = decode(case, case.kv_indptr, last)
    absurd = torch.full_like(case.kv_indptr, 2**31 - 1)
    got = decode(case, absurd, torch.full_like(last, -5), plan=made)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_a_plan_that_was_not_updated(case):
    indptr, last = case.kv_indptr.clone(), case.kv_last_page_len.clone()
    made = mla_cute.plan_decode(indptr, num_heads=4, page_size=64, kv_last_page_len=last)
    last[0] = 1
    with pytest.raises(
        ValueError, match=r"^plan: expected kv_last_page_len as at its last update .* got 1 at position 0"
    ):
        decode(case, indptr, last, plan=made)
    got = decode(case, indptr, last, plan=made.update())
    want = decode(case, indptr, last)
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("name", ["qo_indptr", "kv_indptr"])
def test_prefill_plans_know_their_queries_and_pages(name):
    case = make_prefill([3, 1, 2], [70, 129, 2], num_heads=4, page_size=64)
    csr = dict(case.csr)
    made = mla_cute.plan_prefill(
        csr["qo_indptr"], csr["kv_indptr"], num_heads=4, page_size=64, total_q=6,
        kv_last_page_len=csr.get("kv_last_page_len"),
    )  # fmt: skip
    mla_cute.mla_paged_prefill(**csr, plan=made)
    csr[name] = csr[name].clone()
    with pytest.raises(ValueError, match=rf"^{name}: expected the tensor that the plan was made from"):
        mla_cute.mla_paged_prefill(**csr, plan=made)


def test_other_metadata_is_a_flag():
    with pytest.raises(TypeError, match=r"^other_metadata: expected True or False, got int 1"):
        mla_cute.plan_decode(ints(0, 1), **SIZES, other_metadata=1)


# ------------------------------------------------------------------------------------------------ rounds


@pytest.fixture
def gpu(monkeypatch):
    """Plans on the meta device allocate as on a GPU of 132 SMs."""
    monkeypatch.setattr(plan, "num_sms", lambda device: 132)
    monkeypatch.setattr(jit, "get", lambda kernel, key, config: lambda *arguments: None)
    cached = (decode_layout, prefill_layout)
    for function in cached:
        function.cache_clear()
    yield monkeypatch
    for function in cached:
        function.cache_clear()


def zeros(n: int) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.int32, device=META)


@pytest.mark.parametrize(("batch", "num_heads"), [(256, 128), (1024, 128), (3700, 128), (3700, 16), (100000, 1)])
def test_partial_rows_of_batch_invariant_decode_are_bounded(gpu, batch, num_heads):
    made = mla_cute.plan_decode(zeros(batch + 1), num_heads=num_heads, page_size=64, batch_invariant=True)
    assert made.part.nbytes <= plan.MOST_PARTIAL_BYTES
    assert made.part.shape[0] * PART_ROW < 2**31
    ends = [of_round.end for of_round in made.rounds]
    assert [of_round.begin for of_round in made.rounds] == [0, *ends[:-1]]
    assert ends[-1] == batch
    for of_round in made.rounds:
        n = of_round.end - of_round.begin
        assert n * FIXED_MAX_PIECES * num_heads <= made.part.shape[0]
        assert of_round.scratch.shape == (4, n + 1)
        assert of_round.planner_args[0].shape == (n + 1,)


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize(("batch", "drafts", "num_heads"), [(256, 1, 128), (1024, 4, 128), (300, 1000, 128), (2, 9, 1)])
def test_partial_rows_of_batch_invariant_prefill_are_bounded(gpu, batch, drafts, num_heads, table):
    sizes = {"num_heads": num_heads, "page_size": 64, "total_q": batch * drafts, "batch_invariant": True}
    if table:
        made = mla_cute.plan_prefill_block_table(zeros(batch + 1), zeros(batch), max_pages=300, **sizes)
    else:
        made = mla_cute.plan_prefill(zeros(batch + 1), zeros(batch + 1), **sizes)
    assert made.part.nbytes <= plan.MOST_PARTIAL_BYTES
    assert made.rounds[0].begin == 0
    assert made.rounds[-1].end == batch
    for of_round, following in zip(made.rounds, made.rounds[1:], strict=False):
        assert of_round.end == following.begin
    for of_round in made.rounds:
        n = of_round.end - of_round.begin
        assert min(128 * 64 * n, 16 * batch * drafts * num_heads) <= made.part.shape[0]
        assert of_round.planner_args[0].shape == (n + 1,)


def test_short_pages_need_no_partial_rows(gpu):
    """A request of one piece writes its output."""
    made = mla_cute.plan_prefill_block_table(
        zeros(1025), zeros(1024), num_heads=128, page_size=64, total_q=4096, max_pages=16, batch_invariant=True
    )
    assert (made.part.shape[0], len(made.rounds)) == (1, 1)


# ------------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: mla_cute.plan_decode(ints(0, 1), num_heads=16, page_size=2**31),
            "page_size: expected 1 to 2147483647",
        ),
        (
            lambda: mla_cute.plan_prefill(ints(0, 1), ints(0, 1), total_q=2**40, **SIZES),
            "total_q: expected at most 134217727 query tokens of 16 heads, got 1099511627776",
        ),
        (
            lambda: mla_cute.plan_decode_block_table(ints(1, 1), max_pages=4, table_stride=3, **SIZES),
            "table_stride: expected >= 4, got 3",
        ),
        (
            lambda: mla_cute.plan_prefill_block_table(
                ints(0, 1, 2), ints(1, 1), total_q=2, max_pages=4, table_stride=3, **SIZES
            ),
            "table_stride: expected >= 4, got 3",
        ),
        (
            lambda: mla_cute.plan_decode_block_table(ints(1, 1, 1), max_pages=2**30, **SIZES),
            "table_stride: expected at most 2147483647 elements in all, got 3 rows 1073741824 apart",
        ),
    ],
)
def test_sizes_that_32_bits_do_not_count(make, message):
    with pytest.raises(ValueError, match="^" + message):
        make()


def test_one_row_of_a_table_has_no_stride():
    mla_cute.plan_decode_block_table(ints(1), max_pages=4, table_stride=1, **SIZES)


@pytest.mark.parametrize("value", ["no", 0, None])
def test_return_lse_is_a_flag(case, value):
    with pytest.raises(TypeError, match=r"^return_lse: expected True or False, got"):
        decode(case, case.kv_indptr, case.kv_last_page_len, return_lse=value)


# ------------------------------------------------------------------------------------------------ as objects


def test_plans_say_what_they_are_for():
    made = mla_cute.plan_decode(ints(0, 1, 2), **SIZES)
    assert repr(made) == (
        "DecodePlan(batch=2, num_heads=16, page_size=64, device=cpu, block_table=False, batch_invariant=False, "
        "workspace_bytes=0)"
    )
    made = mla_cute.plan_prefill_block_table(ints(0, 4), ints(9), total_q=4, max_pages=2, causal=False, **SIZES)
    assert repr(made) == (
        "PrefillPlan(batch=1, num_heads=16, page_size=64, total_q=4, causal=False, device=cpu, block_table=True, "
        "batch_invariant=False, workspace_bytes=0)"
    )


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_plans_are_not_copied(copied):
    with pytest.raises(TypeError, match=r"^DecodePlan: a plan cannot be copied or pickled"):
        copied(mla_cute.plan_decode(ints(0, 1), **SIZES))


# ------------------------------------------------------------------------------------------------ autograd, autocast


def test_gradients_are_warned_of_once(case):
    from mla_cute import attend

    attend._warn_once.cache_clear()
    case.q_nope.requires_grad_()
    with torch.no_grad():
        decode(case, case.kv_indptr, case.kv_last_page_len)
    with pytest.warns(UserWarning, match="mla_cute computes no gradients") as caught:
        for _ in range(3):
            out, lse = decode(case, case.kv_indptr, case.kv_last_page_len)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert not out.requires_grad
    assert not lse.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("through_op", [False, True])
def test_autocast_changes_nothing(case, dtype, through_op):
    module = mla_cute.ops if through_op else mla_cute
    arguments = (*operands(case), case.kv_indptr, case.kv_indices, case.sm_scale)
    want = module.mla_paged_decode(*arguments, kv_last_page_len=case.kv_last_page_len)
    with torch.autocast("cpu", dtype):
        got = module.mla_paged_decode(*arguments, kv_last_page_len=case.kv_last_page_len)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
