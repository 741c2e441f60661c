"""The FlashInfer wrapper and the FlashMLA functions on the GPU, against attention in plain torch: results, no
synchronisation, and CUDA graphs that follow later plans."""

import math

import pytest
import torch
from gpu_helpers import capture
from integration_case import SM_SCALE, Case, ListCase, rows_of_656, spare_ids

from mla_cute import quant
from mla_cute.integrations.flash_mla import flash_mla_sparse_fwd, flash_mla_with_kvcache, get_mla_metadata
from mla_cute.integrations.flashinfer import BatchMLAPagedAttentionWrapper
from mla_cute.plan_decode import DecodePlan
from mla_cute.testing.fp8 import LSE_LIMIT

RAGGED = [(1, 700), (9, 300), (0, 9), (70, 70), (2, 1), (4, 64), (1, 0), (0, 0)]
DECODE = [(1, 700), (1, 64), (1, 0), (1, 1), (1, 1500), (1, 65), (1, 128), (1, 5)]
SIZES = {"num_heads": 16, "page_size": 64, "num_pages": 64, "num_indices": 64}
E4M3 = torch.float8_e4m3fn


def make(requests, **kwargs):
    return Case(requests, device="cuda", **SIZES | kwargs)


def plan(wrapper, case, on_host=(), form="csr", **kwargs):
    known = {name: x.cpu() if name in on_host else x for name, x in getattr(case, form).items()}
    sizes = {
        "num_heads": 16, "head_dim_ckv": 512, "head_dim_kpe": 64, "page_size": 64, "causal": True,
        "sm_scale": SM_SCALE, "q_data_type": case.q.dtype, "kv_data_type": case.cache.dtype,
    }  # fmt: skip
    wrapper.plan(**known, **sizes | kwargs)


def make_wrapper(batch=None, **kwargs):
    if batch is not None:
        kwargs["use_cuda_graph"] = True
        sizes = {"qo_indptr": batch + 1, "kv_indptr": batch + 1, "kv_indices": 64, "kv_len_arr": batch}
        kwargs |= {name: torch.full((n,), -1, dtype=torch.int32, device="cuda") for name, n in sizes.items()}
    return BatchMLAPagedAttentionWrapper(torch.empty(1, device="cuda"), **kwargs)


def check(out, lse, expected, base_e=False, lse_error=1e-3):
    """Errors of bf16 kernels on standard normal data are 3e-3 (Frobenius); an output of zeros has none."""
    want, want_lse = expected
    error = (out.float().cpu() - want).norm() / want.norm()
    assert error < 6e-3, error
    torch.testing.assert_close(lse.cpu(), want_lse if base_e else want_lse / math.log(2), rtol=1e-4, atol=lse_error)


def owned(case, result):
    return [x[: case.qo_indptr[-1]] for x in result]


@pytest.mark.parametrize("on_host", [(), ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr")], ids=["cuda", "cpu"])
@pytest.mark.parametrize("requests", [RAGGED, DECODE], ids=["ragged", "decode"])
def test_flashinfer_wrapper(requests, on_host):
    case = make(requests, spare_q=2 if requests is RAGGED else 0)
    wrapper = make_wrapper()
    plan(wrapper, case, on_host)
    result = wrapper.run(query=case.q, kv_cache=case.cache, return_lse=True)
    assert isinstance(wrapper._plan_of(len(case.q)), DecodePlan) == (requests is DECODE and bool(on_host))
    check(*owned(case, result), case.expected(True))


@pytest.mark.parametrize("check_mode", ["0", "1"])
@pytest.mark.parametrize("requests", [RAGGED, DECODE], ids=["ragged", "decode"])
def test_flashinfer_wrapper_ignores_spare_pages(monkeypatch, requests, check_mode):
    """Requests own three pages more than their keys fill, those without a key too; none of these is in the cache."""
    monkeypatch.setenv("MLA_CUTE_CHECK", check_mode)
    case = make(requests, spare_pages=3, num_pages=96, num_indices=128)
    spare_ids(case)
    wrapper = make_wrapper()
    plan(wrapper, case, ("qo_indptr",))
    result = wrapper.run(query=case.q, kv_cache=case.cache, return_lse=True)
    assert isinstance(wrapper._plan_of(len(case.q)), DecodePlan) == (requests is DECODE)
    check(*owned(case, result), case.expected(True))
    if check_mode == "0":
        return
    owner = next(b for b, n in enumerate(case.kv_lens) if n > 64)
    at = case.kv_indptr[owner] + 1
    good = case.kv_indices[at].clone()
    case.kv_indices[at] = 96
    with pytest.raises(ValueError, match=r"^kv_indices: expected page ids in \[0, 96\), got 96 at position "):
        wrapper.run(query=case.q, kv_cache=case.cache)
    case.kv_indices[at] = good
    case.kv_len_arr[owner] = 10**5
    plan(wrapper, case, ("qo_indptr",))
    with pytest.raises(ValueError, match=rf"^kv_len_arr: expected lengths .* got 100000 at position {owner}$"):
        wrapper.run(query=case.q, kv_cache=case.cache)


@pytest.mark.parametrize("form", ["csr", "dense"])
def test_flashinfer_wrapper_without_requests(form):
    """No request, and requests without query tokens; the rows there are belong to nobody."""
    case = make([(0, 90)] * 3)
    known = getattr(case, form)
    starts = ("qo_indptr", "cum_seq_lens_q", "kv_indptr")
    for batch, rows in ((0, 0), (0, 2), (3, 0), (3, 2)):
        step = make([(0, 90)] * 3)
        for name, x in known.items():
            attribute = {"cum_seq_lens_q": "qo_indptr", "block_tables": "block_table", "seq_lens": "kv_len_arr"}
            if name != "kv_indices":
                setattr(step, attribute.get(name, name), x[: batch + (name in starts)])
        q = torch.full((rows, 16, 576), torch.nan, dtype=torch.bfloat16, device="cuda")
        out, lse = torch.full_like(q[..., :512], 7.0), torch.full((rows, 16), 7.0, device="cuda")
        wrapper = make_wrapper()
        for on_host in ((), ("qo_indptr",)):
            plan(wrapper, step, on_host if form == "csr" else (), form)
            wrapper.run(query=q, kv_cache=case.cache, out=out, lse=lse)
        assert (out == 7).all()
        assert (lse == 7).all()


def test_flashinfer_wrapper_does_not_synchronise():
    case = make(RAGGED)
    wrapper = make_wrapper()
    plan(wrapper, case)
    wrapper.run(query=case.q, kv_cache=case.cache)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan(wrapper, case)
        result = wrapper.run(query=case.q, kv_cache=case.cache, return_lse=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check(*result, case.expected(True))


def test_flashinfer_wrapper_fp8():
    case = make(RAGGED)
    scales = {"ckv_scale": 0.02, "kpe_scale": 0.013}
    cache = quant.quantize_tensor(case.cache[..., :512], case.cache[..., 512:], **scales)
    real = torch.cat((cache[0].float() * 0.02, cache[1].float() * 0.013), -1)
    wrapper = make_wrapper()
    plan(wrapper, case, kv_data_type=E4M3)
    result = wrapper.run(query=case.q, kv_cache=cache, return_lse=True, **scales)
    check(*result, case.expected(True, cache=real), lse_error=LSE_LIMIT)


@pytest.mark.parametrize("form", ["csr", "dense"])
@pytest.mark.parametrize("decode", [True, False])
def test_flashinfer_graph_follows_later_plans(decode, form):
    """One capture; between replays `plan` is called with other lengths, pages and, in prefill, query lengths."""
    steps = [DECODE, DECODE[::-1], [(1, 40)] * 8] if decode else [RAGGED, RAGGED[::-1], [(3, 33)] * 8]
    total = max(sum(n for n, _ in requests) for requests in steps)
    cases = [
        make(requests, seed=seed, spare_q=total - sum(n for n, _ in requests)) for seed, requests in enumerate(steps)
    ]
    width = max(case.block_table.shape[1] for case in cases)
    for case in cases:
        case.block_table = torch.nn.functional.pad(case.block_table, (0, width - case.block_table.shape[1]), value=-5)
    first = make(steps[0], spare_q=cases[0].q.shape[0] - sum(n for n, _ in steps[0]))
    first.block_table = cases[0].block_table.clone()
    on_host = ("qo_indptr",) if decode and form == "csr" else ()
    wrapper = make_wrapper(batch=8) if form == "csr" else make_wrapper(use_cuda_graph=True)
    plan(wrapper, first, on_host, form)
    graph, result = capture(lambda: wrapper.run(query=first.q, kv_cache=first.cache, return_lse=True))
    for case in [*cases, cases[0]]:
        first.q.copy_(case.q)
        first.cache.copy_(case.cache)
        if form == "dense":
            for name in ("qo_indptr", "block_table", "kv_len_arr"):
                getattr(first, name).copy_(getattr(case, name))
        plan(wrapper, case if form == "csr" else first, on_host, form)
        graph.replay()
        check(*owned(case, result), case.expected(True))


def flash_mla_args(case, tokens):
    return {
        "q": case.q.view(-1, tokens, *case.q.shape[1:]), "k_cache": case.cache[:, :, None],
        "block_table": case.block_table, "cache_seqlens": case.kv_len_arr, "head_dim_v": 512, "causal": True,
        "softmax_scale": SM_SCALE,
    }  # fmt: skip


def flat(result):
    out, lse = result
    return out.flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("tokens", [1, 3])
def test_flash_mla(tokens):
    case = make([(tokens, n) for _, n in DECODE])
    meta, _ = get_mla_metadata()
    for _ in range(2):
        result = flash_mla_with_kvcache(**flash_mla_args(case, tokens), tile_scheduler_metadata=meta)
        check(*flat(result), case.expected(True), base_e=True)


@pytest.mark.parametrize(("batch", "tokens", "columns"), [(0, 1, 2), (0, 3, 0), (3, 0, 2), (3, 1, 0), (3, 2, 0)])
def test_flash_mla_without_requests_queries_or_columns(batch, tokens, columns):
    case, (meta, _) = make(DECODE), get_mla_metadata()
    table = torch.full((batch, columns), -1, dtype=torch.int32, device="cuda")
    given = flash_mla_args(case, 1) | {
        "q": torch.ones(batch, tokens, 16, 576, dtype=torch.bfloat16, device="cuda"), "block_table": table,
        "cache_seqlens": table.new_zeros(batch),
    }  # fmt: skip
    for _ in range(2):
        out, lse = flash_mla_with_kvcache(**given, tile_scheduler_metadata=meta)
        assert out.shape == (batch, tokens, 16, 512)
        assert lse.shape == (batch, 16, tokens)
        assert (out == 0).all()
        assert (lse == -torch.inf).all()


def test_flash_mla_rows_of_656_bytes():
    case = make(DECODE)
    pool, real = rows_of_656(case)
    given = flash_mla_args(case, 1) | {"k_cache": pool[:, :, None], "is_fp8_kvcache": True}
    result = flash_mla_with_kvcache(**given, tile_scheduler_metadata=get_mla_metadata()[0])
    check(*flat(result), case.expected(True, cache=real), base_e=True)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
def test_flash_mla_as_copies_call_it(tokens, batch_invariant):
    """Scales in tensors as sgl-flash-mla has them, read in every call; the output where vLLM's callers want it."""
    case = make([(tokens, n) for _, n in DECODE])
    scale = torch.empty(1, device="cuda")
    given = flash_mla_args(case, tokens)
    given |= {"out": torch.empty(*given["q"].shape[:3], 512, dtype=torch.bfloat16, device="cuda"), "descale_k": scale}
    given |= {"is_fp8_kvcache": True, "enable_batch_invariant": batch_invariant}
    meta, _ = get_mla_metadata()
    for k_scale in (0.02, 0.05):
        stored = quant.to_e4m3(case.cache, k_scale)
        scale.fill_(k_scale)
        given["out"].fill_(torch.nan)
        result = flash_mla_with_kvcache(
            **given | {"k_cache": stored[:, :, None]}, tile_scheduler_metadata=meta, use_legacy=True
        )
        assert result[0] is given["out"]
        check(*flat(result), case.expected(True, cache=stored.float() * k_scale), True, LSE_LIMIT)


@pytest.mark.parametrize("tokens", [1, 3])
def test_flash_mla_graph_plans_in_every_replay(tokens):
    """As FlashMLA's: metadata that are new in the captured step are made again by each replay."""
    cases = [make([(tokens, n) for _, n in step], seed=seed) for seed, step in enumerate((DECODE, DECODE[::-1]))]
    first = make([(tokens, n) for _, n in DECODE])

    def step():
        meta, _ = get_mla_metadata()
        given = flash_mla_args(first, tokens) | {"tile_scheduler_metadata": meta}
        flash_mla_with_kvcache(**given)
        return flash_mla_with_kvcache(**given), meta

    graph, (result, _meta) = capture(step)
    for case in [*cases, cases[0]]:
        for name in ("q", "cache", "block_table", "kv_len_arr"):
            getattr(first, name).copy_(getattr(case, name))
        graph.replay()
        check(*flat(result), case.expected(True), base_e=True)


LISTS = [700, 64, 0, 1, 65, 333]


def make_lists(tokens=1, lens=LISTS, **kwargs):
    sizes = {"topk": 1024, "num_heads": 16, "page_size": 64, "num_pages": 40}
    return ListCase([n for n in lens for _ in range(tokens)], device="cuda", **sizes | kwargs)


def sparse_args(case, tokens):
    return {
        "q": case.q.view(-1, tokens, *case.q.shape[1:]), "k_cache": case.cache[:, :, None], "block_table": None,
        "cache_seqlens": None, "head_dim_v": 512, "softmax_scale": SM_SCALE,
        "indices": case.indices.view(-1, tokens, case.indices.shape[1]),
        "topk_length": case.topk_lens[::tokens].contiguous(),
    }  # fmt: skip


def expected_of_flash_mla(case, cache=None):
    out, lse = case.expected(cache=cache)
    return out, lse.masked_fill(lse == -torch.inf, torch.inf)


@pytest.mark.parametrize("heads", [16, 64, 128])
@pytest.mark.parametrize("tokens", [1, 3])
def test_flash_mla_sparse(tokens, heads):
    case = make_lists(tokens, num_heads=heads)
    meta, _ = get_mla_metadata()
    given = sparse_args(case, tokens)
    for _ in range(2):
        result = flash_mla_with_kvcache(**given, tile_scheduler_metadata=meta)
        check(*flat(result), expected_of_flash_mla(case), base_e=True)


@pytest.mark.parametrize("tokens", [1, 2])
def test_flash_mla_sparse_rows_of_656_bytes(tokens):
    case = make_lists(tokens)
    pool, real = rows_of_656(case)
    given = sparse_args(case, tokens) | {"k_cache": pool[:, :, None], "is_fp8_kvcache": True}
    result = flash_mla_with_kvcache(**given, tile_scheduler_metadata=get_mla_metadata()[0])
    check(*flat(result), expected_of_flash_mla(case, real), base_e=True)


@pytest.mark.parametrize("tokens", [1, 3])
def test_flash_mla_sparse_graph_plans_in_every_replay(tokens):
    """Lists and their lengths, which a copy for several query tokens has to follow."""
    cases = [make_lists(tokens, lens, seed=seed) for seed, lens in enumerate((LISTS, LISTS[::-1]))]
    first = make_lists(tokens)
    given = sparse_args(first, tokens)

    def step():
        meta, _ = get_mla_metadata()
        flash_mla_with_kvcache(**given, tile_scheduler_metadata=meta)
        return flash_mla_with_kvcache(**given, tile_scheduler_metadata=meta), meta

    graph, (result, _meta) = capture(step)
    for case in [*cases, cases[0]]:
        for name in ("q", "cache", "indices"):
            getattr(first, name).copy_(getattr(case, name))
        given["topk_length"].copy_(sparse_args(case, tokens)["topk_length"])
        graph.replay()
        check(*flat(result), expected_of_flash_mla(case), base_e=True)


@pytest.mark.parametrize("heads", [16, 128])
def test_flash_mla_sparse_prompt(heads):
    case = make_lists(30, num_heads=heads)
    rows = case.cache.view(-1, 1, 576)
    lists = case.indices[:, None]
    for indices in (lists, lists.where(lists != -1, len(rows))):
        result = flash_mla_sparse_fwd(case.q, rows, indices, SM_SCALE, topk_length=case.topk_lens)
        check(result[0], result[2], expected_of_flash_mla(case), base_e=True)
