"""Scores far from zero: up to the bound of docs/numerics.md in every kernel, and without one where there is none."""

import math

import pytest
import torch

import mla_cute

LOG2_E = math.log2(math.e)
PAGES, PAGE_SIZE = 4, 64


def call(kind, num_heads, lengths, kpe_of_token, q_of_rope, kv_format="", **options):
    """Scores are q_of_rope * kpe_of_token(token), the same for all heads: q_nope is 0. (out, lse base 2, V rows)"""
    torch.manual_seed(1)
    batch, dtype = len(lengths), torch.bfloat16
    q_nope = torch.zeros(batch, num_heads, 512, dtype=dtype, device="cuda")
    q_pe = torch.zeros(batch, num_heads, 64, dtype=dtype, device="cuda")
    q_pe[..., 0] = q_of_rope
    ckv = torch.randn(PAGES, PAGE_SIZE, 512, device="cuda")
    kpe = torch.zeros(PAGES, PAGE_SIZE, 64, device="cuda")
    tokens = torch.arange(PAGES * PAGE_SIZE, device="cuda").view(PAGES, PAGE_SIZE)
    kpe[..., 0] = kpe_of_token(tokens)
    scales = {}
    if kv_format:
        ckv, kpe = ckv.to(torch.float8_e4m3fn), kpe.to(torch.float8_e4m3fn)
        scales = {"ckv_scale": 1.0, "kpe_scale": 1.0}
    else:
        ckv, kpe = ckv.to(dtype), kpe.to(dtype)
    indptr = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * PAGES
    ids = torch.arange(PAGES, dtype=torch.int32, device="cuda").repeat(batch)
    last = torch.tensor(lengths, dtype=torch.int32, device="cuda") - (PAGES - 1) * PAGE_SIZE
    assert bool(((last >= 1) & (last <= PAGE_SIZE)).all())
    tensors = (q_nope, q_pe, ckv, kpe)
    if kind == "prefill":
        queries = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
        result = mla_cute.mla_paged_prefill(
            *tensors, queries, indptr, ids, 1.0, kv_last_page_len=last, **scales, **options
        )
    else:
        options = {"config": mla_cute.KernelConfig(kernel=kind, fp8_kernel=kind)} | options
        result = mla_cute.mla_paged_decode(*tensors, indptr, ids, 1.0, kv_last_page_len=last, **scales, **options)
    return *result, ckv.float().view(-1, 512), kpe.float()[..., 0].view(-1)


def expect_the_winner(result, lengths, q_of_rope, cut=False):
    """One key has all the weight: the output is its row, the log-sum-exp its score. What is `cut` was rounded to 2^-15
    of a row's largest element, 5 at most, before it was rounded to bfloat16."""
    out, lse, rows, kpe = result
    for b, n in enumerate(lengths):
        winner = int(kpe[:n].argmax())
        rtol, atol = (2**-7, 5 * 2**-15) if cut else (0, 0)
        assert torch.allclose(out[b].float(), rows[winner].to(out.dtype).float(), rtol=rtol, atol=atol)
        score = q_of_rope * float(kpe[winner]) * LOG2_E
        assert torch.allclose(lse[b], torch.full_like(lse[b], score), rtol=1e-6)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("num_heads", [16, 128])
@pytest.mark.parametrize("kind", ["tile64", "tile16", "prefill"])
@pytest.mark.parametrize("kv_format", ["", "tensor"])
def test_scores_up_to_the_bound(kind, num_heads, kv_format, sign):
    """From -0.9 * 2^27, where all are below -0.7 * 2^27, to 0.7 * 2^27; e4m3 holds these numbers too."""
    q_of_rope, lengths = 2.0**18, [193, 200, 256]

    def kpe_of_token(t):
        return torch.where(t == 150, 256.0, 320.0 if sign < 0 else 128.0) * sign

    expect_the_winner(call(kind, num_heads, lengths, kpe_of_token, q_of_rope, kv_format), lengths, q_of_rope)


@pytest.mark.parametrize("kv_format", ["", "tensor"])
@pytest.mark.parametrize("num_heads", [16, 128])
@pytest.mark.parametrize("exponent", [100, 110])
def test_scores_below_minus_1e30_in_the_kernel_for_few_heads(num_heads, exponent, kv_format):
    """-2^117 is -1.7e35; the lowest finite float32 is -3.4e38."""
    q_of_rope = 2.0**exponent
    lengths = [200, 256]

    def kpe_of_token(t):
        return torch.where(t == 77, -128.0, -160.0)

    expect_the_winner(call("tile16", num_heads, lengths, kpe_of_token, q_of_rope, kv_format), lengths, q_of_rope)


@pytest.mark.parametrize("num_heads", [16, 128])
def test_a_request_that_is_cut_keeps_scores_below_minus_1e30(num_heads):
    """The merge starts from the lowest float32 too."""
    q_of_rope, lengths = 2.0**100, [256] * 2

    def kpe_of_token(t):
        return torch.where(t == 200, -128.0, -160.0)

    finest = mla_cute.KernelConfig(kernel="tile16", cut_unit=1, min_blocks=1, item_overhead=0, split_penalty=0)
    indptr = torch.tensor([0, PAGES, 2 * PAGES], dtype=torch.int32, device="cuda")
    plan = mla_cute.plan_decode(indptr, num_heads=num_heads, page_size=PAGE_SIZE, config=finest)
    assert int(plan.table[0, 7]) == 2, "both requests are merged"
    result = call("tile16", num_heads, lengths, kpe_of_token, q_of_rope, config=finest)
    expect_the_winner(result, lengths, q_of_rope, cut=True)
