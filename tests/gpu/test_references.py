"""References of the row-tile kernels: raised in any part of any tile, by any warp, and never needed, row by row.

A peak is a token whose score is so much higher, for the 16 heads of a warp, that P relative to the reference of the
tokens before it leaves its range. One request is one item here, so that its references live for all its tokens.
"""

import pytest
import torch
from gpu_helpers import same_bits

import mla_cute
from mla_cute.testing.cases import make_case
from mla_cute.testing.fp8 import make_fp8
from mla_cute.testing.prefill import make_prefill_case

PAGE_SIZE, KV_LEN = 64, 700
# Of one item, whatever the number of SMs.
CONFIG = mla_cute.KernelConfig(kernel="tile64", fp8_kernel="tile64", min_blocks=64)
Q_OF_PEAK = 8.0
PAIR = 128

# Peaks as (token, warps, height): of 128 tokens a pair, of 64 a tile, of 32 a part.
PEAKS = {
    "none": [],
    "tile 0, part 0": [(PAIR + 2, [0], 40.0)],
    "tile 0, part 1": [(PAIR + 40, [1], 40.0)],
    "tile 1, part 0": [(PAIR + 69, [2], 40.0)],
    "tile 1, part 1": [(PAIR + 127, [3], 40.0)],
    "both parts": [(PAIR + 2, [0], 40.0), (PAIR + 40, [0], 80.0)],
    "both tiles, other rows": [(PAIR + 2, [0], 40.0), (PAIR + 69, [3], 40.0)],
    "both tiles, the same rows": [(PAIR + 40, [1], 80.0), (PAIR + 69, [1], 40.0)],
    "in range beside out of range": [(PAIR + 2, [2], 25.0), (PAIR + 100, [2], 60.0)],
    "pair after pair": [(PAIR * i + 37 * i, [0, 1, 2, 3], 40.0 * i) for i in range(1, 5)],
    "falling": [(3, [0, 1, 2, 3], 160.0), (PAIR + 3, [0, 1], 120.0), (2 * PAIR + 70, [2], 80.0)],
    "the last token": [(KV_LEN - 1, [0, 2], 40.0)],
}


def inputs(num_heads, dtype, peaks):
    torch.manual_seed(5)
    q = 0.02 * torch.randn(1, num_heads, 576, device="cuda")
    pages = -(-KV_LEN // PAGE_SIZE)
    tokens = torch.randn(pages * PAGE_SIZE, 576, device="cuda")
    # A channel of each warp: nothing but peaks has a part in it.
    q[..., :4], tokens[:, :4] = 0.0, 0.0
    warp = torch.arange(num_heads, device="cuda") // 16 % 4
    q[0, torch.arange(num_heads, device="cuda"), warp] = Q_OF_PEAK
    for token, warps, height in peaks:
        for w in warps:
            tokens[token, w] = height / Q_OF_PEAK
    tokens[KV_LEN:] = float("nan")
    # pages backwards, and one of NaN that nobody has
    cache = torch.cat([tokens.view(pages, PAGE_SIZE, 576).flip(0), tokens.new_full((1, PAGE_SIZE, 576), float("nan"))])
    ids = torch.arange(pages - 1, -1, -1, dtype=torch.int32, device="cuda")
    return q.to(dtype), cache.to(dtype), ids, tokens[:KV_LEN].to(dtype)


def call(kind, q, cache, ids, hidden=0):
    """Without the first `hidden` tokens, for which a list holds -1."""
    q_nope, q_pe = q[..., :512].contiguous(), q[..., 512:].contiguous()
    tensors = (q_nope, q_pe, cache[..., :512], cache[..., 512:])
    indptr = torch.tensor([0, len(ids)], dtype=torch.int32, device="cuda")
    last = torch.tensor([KV_LEN - (len(ids) - 1) * PAGE_SIZE], dtype=torch.int32, device="cuda")
    if kind == "sparse":
        at = torch.arange(KV_LEN, device="cuda")
        listed = ids[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE
        listed[:hidden] = -1
        return mla_cute.mla_sparse(*tensors, listed[None].int(), 1.0, config=CONFIG)
    if kind == "prefill":
        queries = torch.tensor([0, 1], dtype=torch.int32, device="cuda")
        return mla_cute.mla_paged_prefill(*tensors, queries, indptr, ids, 1.0, kv_last_page_len=last, config=CONFIG)
    return mla_cute.mla_paged_decode(*tensors, indptr, ids, 1.0, kv_last_page_len=last, config=CONFIG)


def expect_attention(result, q, tokens):
    out, lse = result
    scores = q[0].double() @ tokens.double().T
    expected = torch.softmax(scores, -1) @ tokens[:, :512].double()
    error = (out[0].double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(error.max()) < torch.finfo(q.dtype).eps, f"{float(error.max()):.1e}"
    assert torch.allclose(lse[0].double(), torch.logsumexp(scores, -1) * 1.4426950408889634, atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", PEAKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("num_heads", [64, 128])
@pytest.mark.parametrize("kind", ["decode", "prefill", "sparse"])
def test_references_rise(kind, num_heads, dtype, name):
    q, cache, ids, tokens = inputs(num_heads, dtype, PEAKS[name])
    results = [call(kind, q, cache, ids) for _ in range(20)]
    expect_attention(results[0], q, tokens)
    for again in results[1:]:
        assert torch.equal(again[0], results[0][0])
        assert torch.equal(again[1], results[0][1])


@pytest.mark.parametrize("hidden", [64, 128, 256 + 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_list_that_begins_without_tokens(dtype, hidden):
    """No reference is chosen in a pair of tiles that holds no token."""
    q, cache, ids, tokens = inputs(128, dtype, PEAKS["pair after pair"])
    expect_attention(call("sparse", q, cache, ids, hidden), q, tokens[hidden:])


@pytest.mark.parametrize("layout", ["bf16", "fp16", "tensor", "tensor, e4m3 q", "token", "group"])
@pytest.mark.parametrize("kind", ["decode", "decode of 32 heads", "prefill"])
def test_a_peak_for_one_row_changes_no_bit_of_the_others(kind, layout):
    """The rows of a tile are independent, as batch_invariant has it: a tile of prefill may hold another request's."""
    dtype = torch.float16 if layout == "fp16" else torch.bfloat16
    sizes = {"page_size": PAGE_SIZE, "sm_scale": 0.125, "dtype": dtype, "device": "cuda"}
    if kind.startswith("decode"):
        case = make_case([KV_LEN, 300, 65], num_heads=64 if kind == "decode" else 32, **sizes)
    else:
        case = make_prefill_case([(5, KV_LEN), (1, KV_LEN), (3, 300)], num_heads=12, **sizes)
    case.q_nope.mul_(0.02)
    case.q_pe[..., 0] = 0.0
    peaks = torch.tensor([3, 40, 69, 130, 167, 200, 260], device="cuda")
    for b, length in enumerate(case.lengths):
        at = peaks[peaks < length]
        pages = case.kv_indices[case.kv_indptr[b] + at // PAGE_SIZE].long()
        case.kpe_cache[pages, at % PAGE_SIZE, 0] = torch.linspace(4.0, 20.0, len(at), device="cuda").to(dtype)
    rows = case.queries[-1]
    loud = (torch.arange(rows * case.num_heads, device="cuda") % 7 == 3).view(rows, case.num_heads)
    results = []
    for height in (0.0, 16.0):
        case.q_pe[:rows, :, 0] = torch.where(loud, height, 0.0).to(dtype)
        call = case if "16" in layout else make_fp8(case, layout.split(",")[0], "e4m3 q" in layout)
        out, lse = call.call(batch_invariant=True, config=CONFIG)
        results.append((out[:rows].clone(), lse[:rows].clone()))
    (out, lse), (peaked_out, peaked_lse) = results
    assert bool((peaked_lse[loud] > lse[loud] + 20).all())
    assert same_bits(out[~loud], peaked_out[~loud])
    assert same_bits(lse[~loud], peaked_lse[~loud])
