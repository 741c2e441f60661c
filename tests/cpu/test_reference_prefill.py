"""Prefill on CPU tensors: against a loop over query tokens, heads and keys in float64, and against decode."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prefill_case import SmallPrefill, make_prefill

import mla_cute
from mla_cute import reference
from mla_cute.reference import decode_reference, prefill_reference, prefill_reference_block_table
from mla_cute.testing import cases


def naive_prefill(case: SmallPrefill, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [used queries, H, 512] and natural-log lse in float64, from the definition."""
    caches = case.caches
    used, num_heads = case.queries[-1][1] if case.queries else 0, caches.num_heads
    output = torch.zeros(used, num_heads, 512, dtype=torch.float64)
    lse = torch.full((used, num_heads), -math.inf, dtype=torch.float64)
    for b, (begin, end) in enumerate(case.queries):
        kv_len = caches.lengths[b]
        keys, values = [], []
        for position in range(kv_len):
            page = int(caches.kv_indices[int(caches.kv_indptr[b]) + position // caches.page_size])
            slot = position % caches.page_size
            values.append(caches.ckv_cache[page, slot].double())
            keys.append(torch.cat((values[-1], caches.kpe_cache[page, slot].double())))
        for i in range(end - begin):
            # keys 0 .. kv_len - n + i
            seen = [k for k in range(kv_len) if not causal or k <= kv_len - (end - begin) + i]
            for h in range(num_heads if seen else 0):
                q = torch.cat((case.q_nope[begin + i, h], case.q_pe[begin + i, h])).double()
                scores = torch.stack([caches.sm_scale * q.dot(keys[k]) for k in seen])
                lse[begin + i, h] = scores.logsumexp(0)
                output[begin + i, h] = scores.softmax(0) @ torch.stack([values[k] for k in seen])
    return output, lse


def float32_prefill(case: SmallPrefill, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    return prefill_reference(**case.csr, out=torch.empty(case.q_nope.shape), lse_base="e", **kwargs)


def assert_matches_naive(case: SmallPrefill, causal: bool) -> None:
    want, want_lse = naive_prefill(case, causal)
    used = len(want)
    got, got_lse = (x[:used] for x in float32_prefill(case, causal=causal))
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got_lse.double(), want_lse, rtol=1e-6, atol=1e-5)

    rounded, lse2 = prefill_reference(**case.csr, causal=causal)
    assert rounded.dtype is case.q_nope.dtype
    assert lse2.dtype is torch.float32
    assert torch.equal(rounded[:used], got.to(rounded.dtype))
    torch.testing.assert_close(lse2[:used].double(), want_lse / math.log(2), rtol=1e-6, atol=1e-5)

    from_table, from_table_lse = prefill_reference_block_table(**case.table, causal=causal)
    assert torch.equal(from_table[:used], rounded[:used])
    assert torch.equal(from_table_lse[:used], lse2[:used])


CAUSAL = pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
# (q_len, kv_len): equal, a chunk, q_len > kv_len, one query, no queries, no keys, neither
PAIRS = [(9, 9), (5, 40), (7, 3), (1, 17), (0, 6), (4, 0), (0, 0), (2, 1), (3, 33)]


@CAUSAL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_matches_naive_loop(page_size, dtype, causal):
    q_lens, kv_lens = zip(*PAIRS, strict=True)
    layout = cases.CACHE_LAYOUTS[page_size % 4]
    case = make_prefill(
        q_lens, kv_lens, num_heads=2, page_size=page_size, dtype=dtype, cache_layout=layout, fused_q=True, spare_q=3
    )
    assert_matches_naive(case, causal)


@pytest.mark.parametrize("layout", cases.CACHE_LAYOUTS)
def test_strided_caches(layout):
    assert_matches_naive(make_prefill([6, 3], [21, 2], num_heads=3, page_size=8, cache_layout=layout), True)


@settings(max_examples=40, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 40)), max_size=4),
    causal=st.booleans(),
    page_size=st.integers(1, 20),
    num_heads=st.integers(1, 3),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    cache_layout=st.sampled_from(cases.CACHE_LAYOUTS),
    fused_q=st.booleans(),
    spare_q=st.integers(0, 2),
    shared_pages=st.integers(0, 2),
    index_offset=st.integers(0, 3),
    chunk_rows=st.integers(1, 16),
    chunk_tokens=st.integers(1, 64),
    seed=st.integers(0, 1000),
)
def test_random_ragged_batches(pairs, causal, chunk_rows, chunk_tokens, **parameters):
    q_lens, kv_lens = [q for q, _ in pairs], [kv for _, kv in pairs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_CHUNK_ROWS", chunk_rows)
        patch.setattr(reference, "_CHUNK_TOKENS", chunk_tokens)
        assert_matches_naive(make_prefill(q_lens, kv_lens, **parameters), causal)


@settings(max_examples=25, deadline=None)
@given(
    context=st.integers(0, 30),
    chunks=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    page_size=st.integers(1, 16),
    drift=st.sampled_from([0.0, 60.0, -60.0]),
    seed=st.integers(0, 100),
)
def test_a_prompt_in_one_piece_equals_its_chunks(context, chunks, page_size, drift, seed):
    """Each chunk is a request of its own, with the keys that are in the cache after it."""
    total = sum(chunks)
    case = make_prefill([total], [context + total], num_heads=2, page_size=page_size, drift=drift, seed=seed)
    whole, whole_lse = float32_prefill(case)
    done = 0
    for length in chunks:
        part = slice(done, done + length)
        done += length
        arguments = case.table | {
            "q_nope": case.q_nope[part],
            "q_pe": case.q_pe[part],
            "qo_indptr": torch.tensor([0, length], dtype=torch.int32),
            "seq_lens": torch.tensor([context + done], dtype=torch.int32),
        }
        out, lse = prefill_reference_block_table(**arguments, out=torch.empty(length, 2, 512), lse_base="e")
        torch.testing.assert_close(out, whole[part], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(lse, whole_lse[part], rtol=1e-6, atol=1e-5)


@CAUSAL
def test_one_query_per_request_is_decode(causal):
    case = make_prefill([1] * 5, [9, 0, 1, 24, 130], num_heads=16, page_size=8)
    got, got_lse = prefill_reference(**case.csr, causal=causal)
    arguments = {name: value for name, value in case.csr.items() if name != "qo_indptr"}
    want, want_lse = decode_reference(**arguments)
    assert torch.equal(got, want)
    assert torch.equal(got_lse, want_lse)


def test_more_queries_than_keys():
    case = make_prefill([7], [3], num_heads=2, page_size=4)
    out, lse = prefill_reference(**case.csr)
    assert (out[:4] == 0).all()
    assert lse[:4].isneginf().all()
    assert lse[4:].isfinite().all()
    first_key = case.caches.ckv_cache[int(case.caches.kv_indices[0]), 0]
    assert torch.equal(out[4], first_key.expand(2, -1)), "the fifth of seven queries sees one key of three"


@CAUSAL
def test_requests_without_keys_or_queries(causal):
    case = make_prefill([3, 0, 2, 0], [0, 5, 6, 0], num_heads=3, page_size=4)
    out, lse = prefill_reference(**case.csr, causal=causal, **case.results)
    assert (out[:3] == 0).all()
    assert lse[:3].isneginf().all()
    assert out[3:].isfinite().all()
    assert lse[3:].isfinite().all()
    assert case.guarded_out.intact()
    assert case.guarded_lse.intact()


@pytest.mark.parametrize("lengths", [([], []), ([0], [5]), ([0, 0], [0, 3])])
def test_no_queries_at_all(lengths):
    case = make_prefill(*lengths, num_heads=3, page_size=4)
    for out, lse in (prefill_reference(**case.csr), mla_cute.mla_paged_prefill(**case.csr)):
        assert out.shape == (0, 3, 512)
        assert lse.shape == (0, 3)


def test_chunks_of_rows_and_tokens_change_rounding_at_most(monkeypatch):
    case = make_prefill([150, 40], [300, 40], num_heads=3, page_size=3, drift=60.0)
    whole, whole_lse = float32_prefill(case)
    monkeypatch.setattr(reference, "_CHUNK_TOKENS", 64)
    monkeypatch.setattr(reference, "_CHUNK_ROWS", 96)
    chunked, chunked_lse = float32_prefill(case)
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(chunked_lse, whole_lse, rtol=1e-6, atol=1e-5)


# ------------------------------------------------------------------------------------------------ the public calls

FORMS = pytest.mark.parametrize("form", ["csr", "table"])
CALLS = {"csr": mla_cute.mla_paged_prefill, "table": mla_cute.mla_paged_prefill_block_table}
REFERENCES = {"csr": prefill_reference, "table": prefill_reference_block_table}


def small(**kwargs) -> SmallPrefill:
    return make_prefill([4, 2, 0, 9], [9, 0, 1, 24], num_heads=16, page_size=8, **kwargs)


def plan_of(case: SmallPrefill, form: str, **kwargs) -> mla_cute.PrefillPlan:
    caches = case.caches
    arguments = {
        "num_heads": caches.num_heads,
        "page_size": caches.page_size,
        "total_q": case.q_nope.shape[0],
    } | kwargs
    if form == "csr":
        return mla_cute.plan_prefill(
            case.qo_indptr, caches.kv_indptr, kv_last_page_len=caches.kv_last_page_len, **arguments
        )
    return mla_cute.plan_prefill_block_table(
        case.qo_indptr,
        caches.seq_lens,
        max_pages=caches.block_table.shape[1],
        table_stride=caches.block_table.stride(0),
        **arguments,
    )


@FORMS
@CAUSAL
def test_calls_are_the_reference(form, causal):
    case = small(spare_q=2)
    arguments = getattr(case, form)
    want, want_lse = REFERENCES[form](**arguments, causal=causal)
    got, got_lse = CALLS[form](**arguments, causal=causal, **case.results)
    assert got is case.results["out"]
    assert got_lse is case.results["lse"]
    assert torch.equal(got[:15], want[:15])
    assert torch.equal(got_lse[:15], want_lse[:15])
    sentinel = case.guarded_out.sentinel
    assert (got[15:].view(torch.int16) == sentinel).all(), "rows past qo_indptr[-1] are never written"
    assert (got_lse[15:].view(torch.int32) == case.guarded_lse.sentinel).all()
    assert case.guarded_out.intact()
    assert case.guarded_lse.intact()


@FORMS
def test_results_on_request(form):
    case = small()
    arguments = getattr(case, form)
    out, lse = CALLS[form](**arguments)
    alone = CALLS[form](**arguments, return_lse=False)
    assert torch.equal(alone, out)
    _, in_e = CALLS[form](**arguments, lse_base="e")
    torch.testing.assert_close(in_e, lse * math.log(2))
    for option in ({"batch_invariant": True}, {"config": mla_cute.KernelConfig()}):
        again, again_lse = CALLS[form](**arguments, **option)
        assert torch.equal(again, out)
        assert torch.equal(again_lse, lse)


def test_default_last_pages_are_full():
    case = make_prefill([5, 0], [16, 8], num_heads=2, page_size=8)
    arguments = case.csr
    want, _ = mla_cute.mla_paged_prefill(**arguments)
    arguments.pop("kv_last_page_len")
    got, _ = mla_cute.mla_paged_prefill(**arguments)
    assert torch.equal(got, want)


@FORMS
@CAUSAL
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_plan_on_the_cpu(form, causal, batch_invariant):
    case = small()
    arguments = getattr(case, form) | {"causal": causal}
    plan = plan_of(case, form, causal=causal, batch_invariant=batch_invariant)
    assert isinstance(plan, mla_cute.PrefillPlan)
    assert plan.workspace_bytes == 0
    want, want_lse = CALLS[form](**arguments)
    for _ in range(2):
        out, lse = CALLS[form](**arguments, plan=plan)
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)
        assert plan.update() is plan
