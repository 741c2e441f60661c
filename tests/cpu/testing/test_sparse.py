"""Random lists of tokens, and the decode case that stands for them."""

import math

import pytest
import torch

from mla_cute.testing.cases import CACHE_LAYOUTS, expected_of, make_case
from mla_cute.testing.fp8 import LAYOUTS, make_fp8
from mla_cute.testing.sparse import as_page_lists, call_sparse, expected_sparse, judge_sparse, random_lists, with_sink

LENGTHS = [7, 0, 100, 1, 64, 30]


def case_of(**options):
    return make_case(LENGTHS, num_heads=3, page_size=16, **options)


def rows_of(lists):
    return [row[:num] for row, num in zip(lists.indices, lists.topk_lens.tolist(), strict=True)]


def test_lists_meet_everything():
    case = case_of()
    own = [set(row.tolist()) for row in rows_of(random_lists(case, 0, ragged=False))]
    assert own == [set()] * len(LENGTHS)
    seen = set()
    for seed in range(60):
        lists = random_lists(case, 41, seed=seed)
        assert lists.indices.stride() == (41, 1)
        for length, row in zip(LENGTHS, rows_of(lists), strict=True):
            tokens = row[row >= 0]
            counts = tokens.unique(return_counts=True)[1]
            seen |= {("empty", len(row) == 0), ("full", len(row) == 41), ("odd", len(row) % 2 == 1)}
            if len(row):
                seen |= {("all -1", len(tokens) == 0), ("no -1", len(tokens) == len(row))}
            if len(tokens) > 1:
                seen |= {("sorted", bool((tokens.sort().values == tokens).all())), ("twice", bool((counts > 1).any()))}
                seen |= {("-1 behind a token", bool((row[1:] < 0).logical_and(row[:-1] >= 0).any()))}
            assert length > 0 or len(tokens) == 0
            assert not case.ckv_cache.flatten(0, 1)[tokens.long()].isnan().any(), "a token that nobody has"
    names = {name for name, _ in seen}
    assert names == {"empty", "full", "odd", "all -1", "no -1", "sorted", "twice", "-1 behind a token"}
    assert seen == {(name, value) for name in names for value in (False, True)}


def test_layers_share_lengths_and_whole_lists_are_whole():
    case = case_of()
    a, b = (random_lists(case, 40, seed=3, layer=layer) for layer in (0, 1))
    assert torch.equal(a.topk_lens, b.topk_lens)
    assert not torch.equal(a.indices, b.indices)
    assert random_lists(case, 40, ragged=False).topk_lens.tolist() == [40] * len(LENGTHS)


@pytest.mark.parametrize("cache_layout", CACHE_LAYOUTS)
def test_the_decode_case_has_the_tokens_of_the_lists(cache_layout):
    case = case_of(cache_layout=cache_layout)
    lists = random_lists(case, 50, seed=1)
    twin = as_page_lists(case, lists)
    for b, row in enumerate(rows_of(lists)):
        begin, end = twin.kv_indptr[b : b + 2].tolist()
        named = row[row >= 0].long()
        assert torch.equal(twin.kv_indices[begin:end].long(), named)
        want = case.ckv_cache[named // 16, named % 16]
        assert torch.equal(twin.ckv_cache[named, 0], want)
    call_sparse(case, lists, out=case.out, lse=case.lse)
    verdict = judge_sparse(case, expected_of(twin))
    assert verdict.ok, verdict


@pytest.mark.parametrize("q_fp8", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_decode_case_over_fp8(layout, q_fp8):
    fp8 = make_fp8(case_of(drift=60.0), layout, q_fp8)
    lists = random_lists(fp8.case, 50, seed=1)
    call_sparse(fp8, lists, out=fp8.case.out, lse=fp8.case.lse)
    verdict = judge_sparse(fp8, expected_sparse(as_page_lists(fp8, lists)))
    assert verdict.ok, verdict


def test_a_sink_takes_by_the_lse_that_the_call_wrote():
    """An lse that is off by as much as e4m3 scores let it be moves what a sink leaves as far."""
    fp8 = make_fp8(case_of(), "tensor")
    expected = expected_sparse(fp8)
    sink = torch.zeros(3)
    off = expected.lse + 0.5
    left = (off * math.log(2)).sigmoid().nan_to_num(0.0)
    assert torch.equal(with_sink(expected, sink, of_lse=off).output, expected.output * left[..., None])
    assert not torch.equal(with_sink(expected, sink).output, with_sink(expected, sink, of_lse=off).output)
