"""What tests of vLLM's engines with sparse attention rely on, on CPU tensors: DeepGEMM's functions in torch, and the
check of a call."""

from functools import cache
from types import SimpleNamespace

import deep_gemm_in_torch
import pytest
import torch
from integration_case import SM_SCALE, rows_of_656
from vllm_sparse_engine import Call, SparseCalls

BLOCK, TOPK = 64, 128
E4M3 = torch.float8_e4m3fn
# (query tokens, keys) of requests: decoding, a chunk after a prefix, a prompt; then rows that are padding.
REQUESTS, PADDING = [(1, 300), (7, 261), (140, 140)], 3
TOKENS = sum(n for n, _ in REQUESTS)


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scores_by_hand(query, key, scale, weights):
    return float(((query.double() @ key.double() * float(scale)).clamp(min=0) * weights.double()).sum())


def test_scores_of_prompts():
    """Two requests in one chunk: keys 0..4 and 5..11."""
    q, k = draw(4, 32, 128, seed=0).to(E4M3), draw(12, 128, seed=1).to(E4M3)
    scales, weights = draw(12, seed=2).exp(), draw(4, 32, seed=3)
    starts, ends = torch.tensor([[0, 0, 5, 5], [4, 5, 11, 12]], dtype=torch.int32)
    scores = deep_gemm_in_torch.fp8_fp4_mqa_logits((q, None), (k, scales), weights, starts, ends, 7)
    assert (scores.shape, scores.dtype) == ((4, 7), torch.float32)
    for row, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        want = [scores_by_hand(q[row], k[i], scales[i], weights[row]) for i in range(start, end)]
        torch.testing.assert_close(scores[row, : end - start], torch.tensor(want), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("next_n", "max_len"), [(1, 256), (2, 256), (1, 100)])
def test_scores_of_pages(next_n, max_len):
    """Blocks further apart than long, as beside another layer's; tables hold anything past a request's pages."""
    lengths = [70, 3]
    storage = torch.zeros(6, BLOCK * 132 + 100, dtype=torch.uint8)
    cache = storage[:, : BLOCK * 132].unflatten(1, (BLOCK, 1, 132))
    table = torch.tensor([[4, 1, -1, 1 << 30], [2, -7, 1 << 30, -1]], dtype=torch.int32)
    keys, scales = draw(2, 128, 128, seed=1).to(E4M3), draw(2, 128, seed=2).exp()
    for request, length in enumerate(lengths):
        for i in range(length):
            block, row = storage[table[request, i // BLOCK]], i % BLOCK
            block[row * 128 : (row + 1) * 128] = keys[request, i].view(torch.uint8)
            block[BLOCK * 128 + row * 4 : BLOCK * 128 + row * 4 + 4] = scales[request, i].reshape(1).view(torch.uint8)
    q, weights = draw(2, next_n, 32, 128, seed=3).to(E4M3), draw(2 * next_n, 32, seed=4)
    lens = torch.tensor(lengths, dtype=torch.int32)[:, None] - torch.arange(next_n, dtype=torch.int32).flip(0)
    schedule = deep_gemm_in_torch.get_paged_mqa_logits_metadata(lens, BLOCK, 132)
    assert (schedule.shape, schedule.dtype) == ((133, 2), torch.int32)
    scores = deep_gemm_in_torch.fp8_fp4_paged_mqa_logits((q, None), cache, weights, lens, table, schedule, max_len)
    assert (scores.shape, scores.dtype) == ((2 * next_n, max_len), torch.float32)
    assert scores.is_contiguous()
    for row, length in enumerate(lens.flatten().tolist()):
        request, token = divmod(row, next_n)
        given = zip(keys[request, :length], scales[request, :length], strict=True)
        want = torch.tensor([scores_by_hand(q[request, token], *key, weights[row]) for key in given])
        torch.testing.assert_close(scores[row, :length], want, rtol=1e-4, atol=1e-3)


def make_call(group):
    return compute_call(group).copied()


@cache
def compute_call(group):
    """A step of REQUESTS, its outputs made of the rows that the cache was filled from."""
    blocks = [-(-keys // BLOCK) for _, keys in REQUESTS]
    ids = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(0)).int()
    table = torch.full((len(REQUESTS), max(blocks)), 1 << 20, dtype=torch.int32)
    for row, of in zip(table, ids.split(blocks), strict=True):
        row[: len(of)] = of
    rows = draw(len(ids), BLOCK, 576, seed=1).bfloat16()
    pool, rows = rows_of_656(SimpleNamespace(cache=rows)) if group else (rows, rows)
    queries = torch.cat((draw(TOKENS, 16, 576, seed=2), torch.full((PADDING, 16, 576), torch.nan))).bfloat16()
    lists = torch.full((TOKENS + PADDING, TOPK), -1, dtype=torch.int32)
    out = torch.full((TOKENS + PADDING, 16, 512), torch.nan, dtype=torch.bfloat16)
    counts = torch.tensor([n for n, _ in REQUESTS])
    owner = torch.cat((torch.arange(len(REQUESTS)).repeat_interleave(counts), torch.zeros(PADDING, dtype=torch.long)))
    token = 0
    for request, (n, keys) in enumerate(REQUESTS):
        step = slice(token, token + n)
        for seen in range(keys - n + 1, keys + 1):
            chosen = torch.randperm(seen, generator=torch.Generator().manual_seed(token))[:TOPK]
            lists[token, : len(chosen)] = chosen.int()
            token += 1
        flat = rows[table[request, : blocks[request]].long()].flatten(0, 1).float()
        scores = torch.einsum("thd,kd->thk", queries[step].float(), flat) * SM_SCALE
        is_listed = (lists[step, :, None] == torch.arange(len(flat))).any(1)[:, None]
        weights = scores.masked_fill(~is_listed, -torch.inf).softmax(-1)
        out[step] = torch.einsum("thk,kd->thd", weights, flat[:, :512]).bfloat16()
    lengths = torch.tensor([keys for _, keys in REQUESTS], dtype=torch.int32)
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    return Call("layer", SM_SCALE, 1.0, pool, queries, lists, out, owner.int(), table, lengths, starts)


def checked(call):
    calls = SparseCalls()
    calls.check(call)
    return calls


@pytest.mark.parametrize("group", [False, True])
def test_a_right_call(group):
    calls = checked(make_call(group))
    error, what = calls.errors["output"]
    assert 0 <= error < 4e-3, what
    assert calls.wrong_lists == 0
    assert calls.chosen == 1 + 7 + (140 - TOPK)
    assert calls.from_all_keys > 0.1
    assert calls.kinds == {"decode": 0, "several": 1, "prefix": 1, "replayed": 0}


@pytest.mark.parametrize("token", [0, 5, 130])
def test_a_wrong_output(token):
    call = make_call(False)
    call.out[token, 3] = call.out[token, 4]
    assert checked(call).errors["output"][0] > 0.1


@pytest.mark.parametrize(
    ("token", "column", "position"),
    [(0, 5, 300), (3, 0, 258), (20, 2, 21), (0, 1, -1), (20, 13, 0), (0, 1, None)],
    ids=["past the end", "the token behind", "in a prompt", "one is missing", "one too many", "twice"],
)
def test_a_wrong_list(token, column, position):
    """Of token 20 of all, the 13th of a prompt, which sees 13 keys."""
    call = make_call(False)
    call.lists[token, column] = call.lists[token, 0] if position is None else position
    assert checked(call).wrong_lists == 1


def test_a_wrong_choice_is_a_wrong_output():
    """Of a key that the token sees and that is not in its list."""
    call = make_call(False)
    others = sorted(set(range(300)) - set(call.lists[0].tolist()))
    call.lists[0, ::2] = torch.tensor(others[: TOPK // 2], dtype=torch.int32)
    calls = checked(call)
    assert calls.wrong_lists == 0
    assert calls.errors["output"][0] > 0.1


def test_a_call_of_padding_alone_is_not_counted():
    call = make_call(False)
    call.starts.zero_()
    assert not any(checked(call).kinds.values())
