"""The float32 reference against a loop over requests, heads and tokens in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_cute import reference
from mla_cute.reference import decode_reference, decode_reference_block_table
from mla_cute.testing import cases
from mla_cute.testing.cases import DecodeCase, make_case

PAGE_SIZES = (1, 3, 16, 64, 100, 128)


def naive_decode(case: DecodeCase) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [batch, H, 512] and natural-log lse [batch, H] in float64, from the definition, one token at a time."""
    batch, num_heads, _ = case.q_nope.shape
    output = torch.zeros(batch, num_heads, 512, dtype=torch.float64)
    lse = torch.full((batch, num_heads), -math.inf, dtype=torch.float64)
    for b in range(batch):
        keys, values = [], []
        for token in range(case.lengths[b]):
            page = int(case.kv_indices[int(case.kv_indptr[b]) + token // case.page_size])
            slot = token % case.page_size
            values.append(case.ckv_cache[page, slot].double())
            keys.append((values[-1], case.kpe_cache[page, slot].double()))
        for h in range(num_heads):
            q_nope, q_pe = case.q_nope[b, h].double(), case.q_pe[b, h].double()
            scores = [case.sm_scale * float(q_nope.dot(nope) + q_pe.dot(pe)) for nope, pe in keys]
            if scores:
                biggest = max(scores)
                weights = [math.exp(s - biggest) for s in scores]
                lse[b, h] = biggest + math.log(math.fsum(weights))
                for weight, value in zip(weights, values, strict=True):
                    output[b, h] += weight / math.fsum(weights) * value
    return output, lse


def assert_matches_naive(case: DecodeCase) -> None:
    want, want_lse = naive_decode(case)
    float32_out = torch.empty(want.shape, dtype=torch.float32)
    got, got_lse = decode_reference(
        *case.csr_args, kv_last_page_len=case.kv_last_page_len, out=float32_out, lse_base="e"
    )
    assert got is float32_out
    # a score near 100 is rounded to 4e-6 in float32, and so is the logarithm of its weight
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got_lse.double(), want_lse, rtol=1e-6, atol=1e-5)

    rounded, lse2 = decode_reference(*case.csr_args, kv_last_page_len=case.kv_last_page_len)
    assert rounded.dtype is case.q_nope.dtype
    assert lse2.dtype is torch.float32
    assert torch.equal(rounded, got.to(rounded.dtype))
    torch.testing.assert_close(lse2.double(), want_lse / math.log(2), rtol=1e-6, atol=1e-5)

    from_table, from_table_lse = decode_reference_block_table(*case.block_table_args)
    assert torch.equal(from_table, rounded)
    assert torch.equal(from_table_lse, lse2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_matches_naive_loop(page_size, dtype):
    lengths = [0, 1, 2, page_size - 1, page_size, page_size + 1, 2 * page_size, 2 * page_size + 1, 0, 37]
    layout = cases.CACHE_LAYOUTS[PAGE_SIZES.index(page_size) % 4]
    q_layout = cases.Q_LAYOUTS[PAGE_SIZES.index(page_size) % 3]
    case = make_case(
        lengths, num_heads=2, page_size=page_size, dtype=dtype, cache_layout=layout, q_layout=q_layout, seed=page_size
    )
    assert_matches_naive(case)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=0, max_size=5),
    page_size=st.integers(1, 40),
    num_heads=st.integers(1, 3),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    cache_layout=st.sampled_from(cases.CACHE_LAYOUTS),
    q_layout=st.sampled_from(cases.Q_LAYOUTS),
    shared_pages=st.integers(0, 3),
    drift=st.sampled_from([0.0, 60.0, -60.0]),
    index_offset=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_random_ragged_batches(lengths, page_size, **parameters):
    assert_matches_naive(make_case(lengths, page_size=page_size, **parameters))


def test_empty_requests_give_zero_and_minus_infinity():
    case = make_case([0, 5, 0], num_heads=3, page_size=4)
    output, lse = decode_reference(*case.csr_args, kv_last_page_len=case.kv_last_page_len, out=case.out, lse=case.lse)
    assert (output[[0, 2]] == 0).all()
    assert (lse[[0, 2]] == -math.inf).all()
    assert output[1].isfinite().all()
    assert lse[1].isfinite().all()
    assert case.guarded_out.intact()
    assert case.guarded_lse.intact()


def test_batch_of_zero():
    case = make_case([], num_heads=3, page_size=4)
    output, lse = decode_reference(*case.csr_args)
    assert output.shape == (0, 3, 512)
    assert lse.shape == (0, 3)


def test_default_last_pages_are_full():
    case = make_case([12, 0, 4], num_heads=2, page_size=4)
    output, lse = decode_reference(*case.csr_args)
    with_lengths = decode_reference(*case.csr_args, kv_last_page_len=case.kv_last_page_len)
    assert torch.equal(output, with_lengths[0])
    assert torch.equal(lse, with_lengths[1])


def test_one_token_returns_its_value():
    case = make_case([1], num_heads=4, page_size=8)
    output, lse = decode_reference(*case.csr_args, kv_last_page_len=case.kv_last_page_len, lse_base="e")
    page = int(case.kv_indices[0])
    assert torch.equal(output[0], case.ckv_cache[page, 0].expand(4, -1))
    q, k = (
        torch.cat(x, -1).double()
        for x in ((case.q_nope[0], case.q_pe[0]), (case.ckv_cache[page, 0], case.kpe_cache[page, 0]))
    )
    torch.testing.assert_close(lse[0].double(), case.sm_scale * (q @ k), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("page_size", [1, 3, 64])
def test_long_contexts_in_chunks(monkeypatch, page_size):
    case = make_case([300, 64, 1, 129], num_heads=3, page_size=page_size, drift=60.0)
    arguments = {"kv_last_page_len": case.kv_last_page_len}
    whole, whole_lse = decode_reference(*case.csr_args, **arguments, out=torch.empty(case.out.shape))
    monkeypatch.setattr(reference, "_CHUNK_TOKENS", 64)
    chunked, chunked_lse = decode_reference(*case.csr_args, **arguments, out=torch.empty(case.out.shape))
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(chunked_lse, whole_lse, rtol=1e-6, atol=1e-5)


def test_scores_far_beyond_the_range_of_exp():
    case = make_case([200], num_heads=2, page_size=16, sm_scale=4.0, drift=2000.0)
    assert_matches_naive(case)


@pytest.mark.parametrize("sm_scale", [0.0, -0.07])
def test_scale_that_is_not_positive(sm_scale):
    case = make_case([33, 1], num_heads=2, page_size=16)
    case.sm_scale = sm_scale
    assert_matches_naive(case)


def test_page_id_in_use_out_of_range_raises():
    case = make_case([9], num_heads=2, page_size=4)
    for bad in (-1, case.ckv_cache.shape[0]):
        case.kv_indices[1] = bad
        with pytest.raises((IndexError, RuntimeError)):
            decode_reference(*case.csr_args)


def test_is_exact_where_the_process_allows_shortcuts():
    case = make_case([50], num_heads=2, page_size=16)
    want, want_lse = decode_reference(*case.csr_args, kv_last_page_len=case.kv_last_page_len)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        got, got_lse = decode_reference(*case.csr_args, kv_last_page_len=case.kv_last_page_len)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got_lse, want_lse, rtol=1e-6, atol=1e-5)
