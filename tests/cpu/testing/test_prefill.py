"""Prefill cases poison what they say, and the verdict on them rejects wrong masks and rows written too many."""

import math

import pytest
import torch
from call_case import (
    check_prefill,
    check_prefill_block_table,
    verify_prefill_block_table_on_device,
    verify_prefill_on_device,
)

from mla_cute import reference
from mla_cute.call import Cache, Call
from mla_cute.testing import prefill
from mla_cute.testing.cases import expected_of, judge, run_case
from mla_cute.testing.prefill import PrefillCase, make_prefill_case, prefill_sweep, row_tiles
from mla_cute.testing.verdict import compare

REQUESTS = [(3, 200), (0, 9), (40, 40), (1, 65), (5, 3), (2, 0), (0, 0), (8, 300)]


def in_dtype(case: PrefillCase, lengths=None, causal=None, queries=None) -> tuple[torch.Tensor, torch.Tensor]:
    """What a correct kernel might give, on the rows that requests own: blocks of 64 keys, P in the input dtype."""
    pages, true_lengths = reference.requests_of(case.pages, case.page_size)
    rows = case.queries[-1]
    own = case.pages._replace(
        queries=torch.tensor(queries or case.queries), causal=case.causal if causal is None else causal
    )
    cache = Cache(case.ckv_cache, case.kpe_cache)
    call = Call(case.q_nope[:rows], case.q_pe[:rows], cache, own, case.sm_scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_CHUNK_TOKENS", 64)
        return reference.attention(call, case.q_nope.dtype, (pages, lengths or true_lengths))


def test_queries_that_no_request_owns_are_nan_and_their_outputs_guards():
    case = make_prefill_case(REQUESTS, num_heads=4, page_size=16)
    rows = case.queries[-1]
    assert (rows, case.total_q) == (59, 62)
    assert case.qo_indptr.tolist() == case.queries == [0, 3, 3, 43, 44, 49, 51, 51, 59]
    for q in (case.q_nope, case.q_pe):
        assert q[:rows].isfinite().all()
        assert q[rows:].isnan().all()
    expected = expected_of(case)
    case.guarded_out.reset()
    case.guarded_lse.reset()
    case.out[:rows], case.lse[:rows] = in_dtype(case)
    assert judge(case, expected).ok
    case.lse[rows, 2] = 0.0
    verdict = judge(case, expected)
    assert verdict.failures == ("lse: memory around lse, or a row that no request owns, was written",)
    case.out[-1, 3, 511] = 0.0
    assert len(judge(case, expected).failures) == 2


@pytest.mark.parametrize("layout", ["contiguous", "batch_strided", "fused"])
def test_strided_queries(layout):
    case = make_prefill_case(REQUESTS, num_heads=4, page_size=16, q_layout=layout)
    spaced_evenly = case.q_nope.stride(0) == 4 * case.q_nope.stride(1)
    assert spaced_evenly is (layout != "batch_strided")
    assert (case.q_nope.stride(1) == 576) is (layout == "fused")
    if layout == "batch_strided":
        gap = case.q_nope.as_strided((10, 4, 512), case.q_nope.stride(), case.q_nope.storage_offset() + 4 * 512)
        assert gap.isnan().all()


@pytest.mark.parametrize("causal", [True, False])
def test_expected_is_the_public_reference(causal):
    case = make_prefill_case(REQUESTS, num_heads=4, page_size=16, causal=causal, shared_pages=1, index_offset=3)
    expected = expected_of(case, lse_base="e")
    rows = case.queries[-1]
    output, lse = reference.prefill_reference(
        *case.csr_args, causal=causal, kv_last_page_len=case.kv_last_page_len, lse_base="e"
    )
    assert torch.equal(output[:rows], expected.output.to(torch.bfloat16))
    assert torch.equal(lse[:rows], expected.lse)
    assert (expected.score_rounding[expected.lse.isfinite()] > 0).all()
    assert case.causal is causal


@pytest.mark.parametrize("entry", ["csr", "block_table"])
@pytest.mark.parametrize("index", [0, 13, 31, 50])
def test_sweep_cases_pass_the_checks_and_run(index, entry):
    spec = prefill_sweep()[index]
    requests = tuple((min(q, 20), min(n, 300)) for q, n in spec.requests)
    case = make_prefill_case(
        requests, num_heads=min(spec.num_heads, 8), page_size=spec.page_size, dtype=spec.dtype, causal=spec.causal,
        cache_layout=spec.cache_layout, q_layout=spec.q_layout, out_layout=spec.out_layout, drift=spec.drift,
        shared_pages=spec.shared_pages, seed=spec.seed,
    )  # fmt: skip
    tensors = (case.qo_indptr, case.kv_indptr, case.kv_indices)
    problem = check_prefill(*case.csr_args, case.causal, case.kv_last_page_len, case.out, case.lse)
    verify_prefill_on_device(problem, *tensors, case.kv_last_page_len)
    problem = check_prefill_block_table(*case.block_table_args, case.causal, case.out, case.lse)
    verify_prefill_block_table_on_device(problem, case.qo_indptr, case.block_table, case.seq_lens)
    verdict = run_case(case, entry=entry)
    assert verdict.ok, verdict


def test_sweep_meets_every_head_count_with_every_page_size():
    specs = prefill_sweep()
    pairs = {(spec.num_heads, spec.page_size) for spec in specs}
    assert len(pairs) == len(specs) == len(prefill.SWEEP_HEADS) * len(prefill.SWEEP_PAGE_SIZES)
    assert len({str(spec) for spec in specs}) == len(specs)
    for name, least in (("dtype", 2), ("causal", 2), ("cache_layout", 4), ("q_layout", 3), ("drift", 2)):
        for by in ("num_heads", "page_size"):
            met = {(getattr(spec, by), getattr(spec, name)) for spec in specs}
            assert len(met) >= least * len({getattr(spec, by) for spec in specs}), (name, by)
    for spec in specs:
        q_lens = {q for q, _ in spec.requests}
        assert {0, 1, 5, 8, 9, 33, 65, 90} <= q_lens
        assert any(q > n > 0 for q, n in spec.requests)


def test_load_makes_the_other_case():
    shape = {"num_heads": 4, "page_size": 8, "num_pages": 60, "num_indices": 60, "max_pages": 50, "total_q": 70}
    case = make_prefill_case([(3, 200), (40, 40), (0, 0)], seed=1, **shape)
    other = make_prefill_case([(1, 10), (0, 9), (69, 90)], seed=2, **shape)
    case.load(other)
    assert case.queries == other.queries
    verdict = run_case(case, expected=expected_of(other))
    assert verdict.ok, verdict


def faulty(case: PrefillCase, fault: str) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = list(case.lengths)
    if fault == "mask one key short":
        return in_dtype(case, lengths=[max(n - 1, 0) for n in lengths])
    if fault == "mask one key long in one row":
        output, lse = in_dtype(case)
        longer = in_dtype(case, lengths=[*lengths[:2], 41, *lengths[3:]])
        output[20], lse[20] = longer[0][20], longer[1][20]
        return output, lse
    if fault == "mask aligned at the top left":
        shorter = [min(q, n) for q, n in zip(case.q_lens, lengths, strict=True)]
        return in_dtype(case, lengths=shorter)
    if fault == "no mask":
        return in_dtype(case, causal=False)
    if fault == "queries one request late":
        queries = list(case.queries)
        queries[4] += 1
        return in_dtype(case, queries=queries)
    output, lse = in_dtype(case)
    if fault == "a query that sees no key not zeroed":
        output[44, 1, 7] = 1e-3
    elif fault == "lse of a query that sees no key":
        lse[50, 0] = 0.0
    elif fault == "two tokens swapped":
        output[[10, 11]] = output[[11, 10]]
    elif fault == "a row tile not written":
        output[19:35] = case.out[19:35]
    else:
        raise AssertionError(fault)
    return output, lse


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("mask one key short", "query 0 of 40"),
        ("mask one key long in one row", "request 2 (kv_len 40), query 17 of 40"),
        ("mask aligned at the top left", "lse: error"),
        ("no mask", "request 2 (kv_len 40), query 0 of 40"),
        ("queries one request late", "request 4 (kv_len 3), query 0 of 5"),
        ("a query that sees no key not zeroed", "request 4 (kv_len 3), query 0 of 5, head 1"),
        ("lse of a query that sees no key", "request 5 (kv_len 0), query 1 of 2, head 0"),
        ("two tokens swapped", "output: 1 - cosine"),
        ("a row tile not written", "output: error norm"),
    ],
)
def test_rejects_a_planted_fault(fault, named, dtype):
    case = make_prefill_case(REQUESTS, num_heads=4, page_size=64, dtype=dtype, seed=3)
    expected = expected_of(case)
    assert compare(*in_dtype(case), expected).ok
    # one more key: the page has room for it, and what lies there is NaN unless it is made a key
    if "long" in fault:
        page = case.kv_indices[int(case.kv_indptr[2])]
        case.ckv_cache[page, 40], case.kpe_cache[page, 40] = case.ckv_cache[page, 0], case.kpe_cache[page, 0]
    verdict = compare(*faulty(case, fault), expected)
    assert not verdict.ok
    assert named in str(verdict), verdict


def test_row_tiles():
    # 12 heads: tile 0 ends in token 5, tile 1 in token 10, tile 2 in token 15 (row 191 of 204), tile 3 in token 16
    assert row_tiles(17, 100, 12) == [(0, 5, 89), (5, 10, 94), (10, 15, 99), (16, 16, 100)]
    assert row_tiles(2, 7, 128) == [(0, 0, 6), (0, 0, 6), (1, 1, 7), (1, 1, 7)]
    assert row_tiles(5, 3, 16) == [(0, 3, 2), (4, 4, 3)]
    assert row_tiles(9, 2, 16) == [(0, 3, 0), (4, 7, 1), (8, 8, 2)]
    assert row_tiles(5, 3, 16, causal=False) == [(0, 3, 3), (4, 4, 3)]
    assert row_tiles(0, 3, 16) == []
    assert math.prod(map(len, (row_tiles(64, 64, 1), row_tiles(65, 65, 1)))) == 2
