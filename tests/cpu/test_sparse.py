"""`mla_sparse` on CPU tensors: values, errors, plans, the op; the compiled variants are in kernels/test_compile.py."""

import re

import pytest
import torch

import mla_cute
from mla_cute.call import SPARSE
from mla_cute.kernels import registry
from mla_cute.testing.cases import CACHE_LAYOUTS, SM_SCALE, expected_of, make_case
from mla_cute.testing.fp8 import LAYOUTS, make_fp8
from mla_cute.testing.sparse import call_sparse, lists_of, run_sparse, sinks_of

LENGTHS = [0, 1, 63, 64, 65, 200, 7]


def accepted(case, lists, **kwargs):
    verdict = run_sparse(case, lists, **kwargs)
    assert verdict.ok, verdict


@pytest.mark.parametrize("cache_layout", CACHE_LAYOUTS)
@pytest.mark.parametrize("page_size", [1, 5, 64])
def test_a_list_of_a_requests_tokens_is_that_request(page_size, cache_layout):
    case = make_case(LENGTHS, num_heads=6, page_size=page_size, cache_layout=cache_layout, out_layout="batch_strided")
    accepted(case, lists_of(case))
    accepted(case, lists_of(case, none_share=0.0, topk=200), lse_base="e")
    accepted(case, lists_of(case, first_none=(130, 0, 64, 200)))
    for lse_base in (2, "e"):
        accepted(case, lists_of(case), lse_base=lse_base, sink=sinks_of(case))


@pytest.mark.parametrize("q_fp8", [False, True], ids=["q16", "q_e4m3"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp8_caches(layout, q_fp8):
    fp8 = make_fp8(make_case(LENGTHS, num_heads=4, page_size=16), layout, q_fp8)
    accepted(fp8, lists_of(fp8.case))
    accepted(fp8, lists_of(fp8.case), sink=sinks_of(fp8))


def independent(q, cache, indices, lens):
    """float64, a token at a time; base 2."""
    flat = cache.reshape(-1, 576).double()
    out, lse = torch.zeros(*q.shape[:2], 512).double(), torch.full(q.shape[:2], -torch.inf).double()
    for t, (row, n) in enumerate(zip(indices.tolist(), lens.tolist(), strict=True)):
        keys = [flat[i] for i in row[:n] if i >= 0]
        if keys:
            keys = torch.stack(keys)
            scores = q[t].double() @ keys.T * SM_SCALE
            out[t], lse[t] = scores.softmax(-1) @ keys[:, :512], scores.logsumexp(-1) / torch.tensor(2.0).log()
    return out, lse


def test_values_by_an_oracle_of_its_own():
    """Duplicates count as often as they stand there; a token may be in many lists; others may hold NaN."""
    torch.manual_seed(0)
    cache = torch.randn(9, 8, 576)
    cache[3] = torch.nan
    allowed = torch.tensor([i for i in range(72) if i // 8 != 3], dtype=torch.int32)
    indices = allowed[torch.randint(len(allowed), (6, 33))]
    indices[torch.rand(6, 33) < 0.3] = -1
    indices[0, :10] = indices[0, 10].clamp(min=0)
    indices[4] = -1
    lens = torch.tensor([33, 17, 0, 1, 33, 32], dtype=torch.int32)
    for t, n in enumerate(lens.tolist()):
        indices[t, n:] = 2**30
    q = torch.randn(6, 5, 576)
    args = [x.bfloat16() for x in (q[..., :512], q[..., 512:], cache[..., :512], cache[..., 512:])]
    out, lse = mla_cute.mla_sparse(*args, indices, SM_SCALE, topk_lens=lens)
    want, want_lse = independent(torch.cat(args[:2], -1), torch.cat(args[2:], -1), indices, lens)
    assert (out.double() - want).norm() < 3e-3 * want.norm()
    assert torch.allclose(lse.double(), want_lse, atol=1e-4)
    assert not out[[2, 4]].any()
    assert lse[[2, 4]].isneginf().all()

    # A sink is a key of a score of its own whose value is 0.
    sink = torch.tensor([0.5, -torch.inf, 3.0, -2.0, 40.0])
    with_sink, same_lse = mla_cute.mla_sparse(*args, indices, SM_SCALE, topk_lens=lens, sink=sink)
    assert torch.equal(same_lse, lse)
    sums = torch.exp2(want_lse)
    left = sums / (sums + sink.double().exp())
    want = (want * left[..., None]).nan_to_num(0.0)
    assert (with_sink.double() - want).norm() < 3e-3 * want.norm()


def test_all_columns_count_without_topk_lens():
    case = make_case([40, 40, 40], num_heads=2, page_size=8)
    lists = lists_of(case, none_share=0.0, topk=40)
    want = call_sparse(case, lists)
    for got in (
        call_sparse(case, lists, topk_lens=None),
        mla_cute.ops.mla_sparse(*case.tensors, lists.indices, SM_SCALE),
    ):
        assert all(map(torch.equal, got, want))
    assert torch.equal(call_sparse(case, lists, return_lse=False), want[0])


def test_no_query_tokens_and_no_columns():
    case = make_case([], num_heads=2, page_size=8)
    out, lse = call_sparse(case, lists_of(case))
    assert out.shape == (0, 2, 512)
    assert lse.shape == (0, 2)
    case = make_case([0, 0], num_heads=2, page_size=8)
    out, lse = call_sparse(case, lists_of(case, topk=0), topk_lens=None)
    assert not out.any()
    assert lse.isneginf().all()


# ------------------------------------------------------------------------------------------------ plans


def test_a_plan_serves_lists_of_its_sizes():
    case = make_case(LENGTHS, num_heads=6, page_size=16)
    expected = expected_of(case)
    lists = lists_of(case)
    plan = mla_cute.plan_sparse(lists.indices, num_heads=6, topk_lens=lists.topk_lens)
    assert repr(plan).startswith("SparsePlan(batch=7, num_heads=6")
    accepted(case, lists, plan=plan, expected=expected)
    lists.load(lists_of(case, seed=1))  # others of the same lengths: what the layers of a step have
    accepted(case, lists, plan=plan, expected=expected)
    other = lists_of(case, seed=2)
    with pytest.raises(ValueError, match=r"topk_lens: expected the tensor that the plan was made from"):
        call_sparse(case, other, plan=plan)
    with pytest.raises(ValueError, match=r"plan: expected a plan for num_heads 6, got one for num_heads 5"):
        call_sparse(case, lists, plan=mla_cute.plan_sparse(lists.indices, num_heads=5, topk_lens=lists.topk_lens))
    dense = mla_cute.plan_decode(case.kv_indptr, num_heads=6, page_size=16)
    with pytest.raises(ValueError, match=r"plan: expected a plan from plan_sparse, got one from plan_decode"):
        call_sparse(case, lists, plan=dense)


def test_a_plan_of_whole_lists():
    case = make_case([24, 24], num_heads=2, page_size=8)
    lists = lists_of(case, none_share=0.0, topk=24)
    plan = mla_cute.plan_sparse(lists.indices, num_heads=2)
    want = call_sparse(case, lists)
    assert all(map(torch.equal, call_sparse(case, lists, topk_lens=None, plan=plan), want))
    with pytest.raises(ValueError, match=r"indices: expected 24 columns, as the plan was made for, got 20"):
        mla_cute.mla_sparse(*case.tensors, lists.indices[:, :20], SM_SCALE, plan=plan)
    with pytest.raises(ValueError, match=r"topk_lens: expected the tensor"):
        call_sparse(case, lists, plan=plan)


# ------------------------------------------------------------------------------------------------ errors


def arguments(**changed):
    case = make_case([10, 20], num_heads=2, page_size=8)
    lists = lists_of(case)
    given = {"indices": lists.indices, "topk_lens": lists.topk_lens, "case": case} | changed
    return (*given["case"].tensors, given["indices"], SM_SCALE), {
        "topk_lens": given["topk_lens"], "sink": given.get("sink"),
    }  # fmt: skip


WRONG = [
    ({"indices": None}, TypeError, "indices: expected a torch.Tensor, got NoneType"),
    ({"indices": torch.zeros(2, 3)}, TypeError, "indices: expected dtype torch.int32, got torch.float32"),
    ({"indices": torch.zeros(3, 3, dtype=torch.int32)}, ValueError, "indices: expected shape [2, topk]"),
    ({"indices": torch.zeros(6, dtype=torch.int32)}, ValueError, "indices: expected shape"),
    ({"topk_lens": torch.zeros(3, dtype=torch.int32)}, ValueError, "topk_lens: expected shape [2]"),
    ({"topk_lens": torch.zeros(2)}, TypeError, "topk_lens: expected dtype torch.int32"),
    ({"topk_lens": 3}, TypeError, "topk_lens: expected a torch.Tensor"),
    ({"topk_lens": torch.tensor([4, -1], dtype=torch.int32)}, ValueError, "topk_lens: expected values in [0,"),
    ({"sink": 1.0}, TypeError, "sink: expected a torch.Tensor, got float"),
    ({"sink": torch.zeros(2).half()}, TypeError, "sink: expected dtype torch.float32, got torch.float16"),
    ({"sink": torch.zeros(3)}, ValueError, "sink: expected shape [2], got [3]"),
    ({"sink": torch.zeros(4)[::2]}, ValueError, "sink: expected a contiguous tensor, got strides [2]"),
    ({"topk_lens": torch.tensor([4, 999], dtype=torch.int32)}, ValueError, "topk_lens: expected values in [0,"),
]


@pytest.mark.parametrize(("changed", "error", "message"), WRONG, ids=lambda x: x[:40] if isinstance(x, str) else "")
def test_errors_name_the_argument(changed, error, message):
    args, options = arguments(**changed)
    with pytest.raises(error, match=re.escape(message)):
        mla_cute.mla_sparse(*args, **options)


@pytest.mark.parametrize("value", [-2, 2**30, None], ids=["below", "above", "end"])
def test_tokens_outside_the_cache_are_named(value):
    args, options = arguments()
    outside = args[2].shape[0] * 8 if value is None else value
    args[4][1, 2] = outside
    message = (
        f"indices: expected -1 or tokens in [0, {args[2].shape[0] * 8}) (num_pages * page_size), got {outside} at "
    )
    with pytest.raises(ValueError, match=re.escape(message + "position [1, 2]")):
        mla_cute.mla_sparse(*args, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, "num_heads: expected"),
        ({"num_heads": 2, "topk_lens": torch.zeros(3, dtype=torch.int32)}, "topk_lens: expected shape [2]"),
        ({"num_heads": 2, "kv_format": "block"}, "kv_format: expected one of"),
        ({"num_heads": 2, "config": 3}, "config: expected a KernelConfig"),
    ],
)
def test_errors_of_plans(options, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        mla_cute.plan_sparse(torch.zeros(2, 5, dtype=torch.int32), **options)


# ------------------------------------------------------------------------------------------------ the op, the kernels


def test_compiled_code_goes_through_the_op():
    case = make_case([30, 9], num_heads=2, page_size=8)
    lists = lists_of(case)
    plan = mla_cute.plan_sparse(lists.indices, num_heads=2, topk_lens=lists.topk_lens)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(q):
        args = (q * 1, *case.tensors[1:], lists.indices, SM_SCALE)
        return mla_cute.mla_sparse(*args, topk_lens=lists.topk_lens, plan=plan)

    assert all(map(torch.equal, layer(case.q_nope), call_sparse(case, lists)))
    torch.library.opcheck(
        torch.ops.mla_cute.mla_sparse.default,
        (*case.tensors, lists.indices, SM_SCALE),
        {"topk_lens": lists.topk_lens, "sink": torch.zeros(2)},
        test_utils=("test_schema", "test_faketensor"),
    )


def test_variants_are_gathers_with_lists():
    found = registry.sparse_variants(["bfloat16"], ["", "group"])
    steps = [key for kernel, key, _ in found if kernel is not registry.PLANNER]
    assert len(steps) == 2 + 6
    assert all(key.sparse and key.box_rows == 0 for key in steps)
    config = mla_cute.KernelConfig()
    for kv_format in ("", "group"):
        variant = registry.step_variant(SPARSE.op, kv_format, False, 16, 64, "bfloat16", config)
        assert variant in found
    with pytest.raises(ValueError, match="kv_formats: expected"):
        registry.sparse_variants(kv_formats=["block"])
