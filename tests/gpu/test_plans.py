"""Plans on a GPU: metadata they go with, rounds of batch-invariant ones, and partial rows beyond 2^31 words."""

import pytest
import torch
from gpu_helpers import ENTRIES, MIXED, check, check_fp8, decode, make_prefill, owned, plan_of, same_bits

import mla_cute
from mla_cute import plan as plans
from mla_cute.dims import PART_ROW
from mla_cute.testing.cases import make_case
from mla_cute.testing.fp8 import make_fp8

BOTH_ENTRIES = pytest.mark.parametrize("entry", ENTRIES)
LENGTHS = [20000, 1, 0, 1024, 1025, 5000, 2047, 3, 9000, 64, 0, 16384, 2048]


# ------------------------------------------------------------------------------------------------ metadata


def test_last_page_lengths_on_one_side_only():
    case = make_case([70, 0, 129, 64], num_heads=16, page_size=64, device="cuda")
    without = mla_cute.plan_decode(case.kv_indptr, num_heads=16, page_size=64)
    with pytest.raises(ValueError, match=r"^kv_last_page_len: expected None, the plan was made without it"):
        decode(case, plan=without)


def test_a_plan_of_other_requests():
    case = make_case([70, 65, 129, 64], num_heads=16, page_size=64, device="cuda")
    table, lens = case.block_table, case.seq_lens
    sizes = {"num_heads": 16, "page_size": 64, "max_pages": table.shape[1], "table_stride": table.stride(0)}
    first = mla_cute.plan_decode_block_table(lens[:2], **sizes)
    caches = (case.ckv_cache, case.kpe_cache)

    def call(rows, plan):
        return mla_cute.mla_paged_decode_block_table(
            case.q_nope[rows], case.q_pe[rows], *caches, table[rows], lens[rows], case.sm_scale, plan=plan
        )

    call(slice(2), first)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^seq_lens: expected the tensor that the plan was made from"):
            call(slice(2, 4), first)
    lenient = mla_cute.plan_decode_block_table(lens[:2], other_metadata=True, **sizes)
    for _ in range(2):
        out, lse = call(slice(2, 4), lenient)
    assert torch.isfinite(out).all(), "the plan's lengths, of pages that these requests have"
    assert torch.isfinite(lse).all()


def test_a_plan_that_was_not_updated_is_refused_in_check_mode(monkeypatch):
    monkeypatch.setenv("MLA_CUTE_CHECK", "1")
    case = make_case([70, 0, 129, 64], num_heads=16, page_size=64, device="cuda")
    plan = plan_of(case, "block_table")
    check(case, entry="block_table", plan=plan)
    case.seq_lens[0] = 69
    with pytest.raises(ValueError, match=r"^plan: expected seq_lens as at its last update .* got 69 at position 0"):
        decode(case, "block_table", plan=plan)
    plan.update()
    decode(case, "block_table", plan=plan)


# ------------------------------------------------------------------------------------------------ rounds


def all_bits(case, entry, **options):
    plan = plan_of(case, entry, batch_invariant=True, **options)
    check(case, entry=entry, plan=plan)
    return *owned(case), len(plan.rounds)


@BOTH_ENTRIES
@pytest.mark.parametrize(("num_heads", "page_size"), [(16, 64), (128, 64), (128, 1), (40, 16)])
def test_rounds_of_decode_give_the_same_bits(partial_bytes, entry, num_heads, page_size):
    case = make_case(LENGTHS, num_heads=num_heads, page_size=page_size, device="cuda")
    *want, rounds = all_bits(case, entry)
    assert rounds == 1
    for requests in (1, 4):
        partial_bytes(requests * 16 * num_heads * 4 * PART_ROW)
        *got, rounds = all_bits(case, entry)
        assert rounds == -(-len(LENGTHS) // requests)
        assert all(map(same_bits, got, want))
    check(case, entry=entry, batch_invariant=True)


@BOTH_ENTRIES
@pytest.mark.parametrize("num_heads", [16, 128])
def test_rounds_of_prefill_give_the_same_bits(partial_bytes, entry, num_heads):
    case = make_prefill([*MIXED, (4, 20000), (2, 17000)], num_heads=num_heads)
    *want, rounds = all_bits(case, entry)
    assert rounds == 1
    partial_bytes(3 * 128 * 64 * 4 * PART_ROW)
    *got, rounds = all_bits(case, entry)
    assert rounds > 1
    assert all(map(same_bits, got, want))


@pytest.mark.parametrize("num_heads", [16, 128])
@pytest.mark.parametrize("layout", ["tensor", "group"])
def test_rounds_over_fp8_caches(partial_bytes, layout, num_heads):
    fp8 = make_fp8(make_case(LENGTHS, num_heads=num_heads, page_size=64, device="cuda"), layout, True)
    partial_bytes(2 * 16 * num_heads * 4 * PART_ROW)
    plan = plan_of(fp8.case, batch_invariant=True, kv_format=fp8.kv_format, q_fp8=True)
    assert len(plan.rounds) == 7
    check_fp8(fp8, plan=plan)


def test_rounds_in_a_graph(partial_bytes):
    case = make_case(LENGTHS, num_heads=128, page_size=64, device="cuda")
    partial_bytes(4 * 16 * 128 * 4 * PART_ROW)
    plan = plan_of(case, batch_invariant=True)
    assert len(plan.rounds) > 1
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()  # inputs and plan are made on another stream
    with torch.cuda.stream(stream):
        decode(case, plan=plan.update(), out=case.out, lse=case.lse)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            decode(case, plan=plan.update(), out=case.out, lse=case.lse)
    check(case, plan=plan)
    want = owned(case)
    case.guarded_out.reset()
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(same_bits, owned(case), want))


# ------------------------------------------------------------------------------------------------ beyond 2^31 words


def needs(gigabytes):
    free = torch.cuda.mem_get_info()[0]
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory, there are {free / 1e9:.1f}")


def shared_pages(requests, pages, kv_len, device="cuda"):
    """Page lists of requests that all have pages of one small cache, each in an order of its own."""
    order = torch.stack([torch.randperm(pages, device=device) for _ in range(16)])
    indices = order[torch.arange(requests, device=device) % 16, : kv_len // 64].int().contiguous()
    indptr = torch.arange(requests + 1, dtype=torch.int32, device=device) * (kv_len // 64)
    return indptr, indices.view(-1)


@pytest.mark.parametrize("kernel", ["tile64", "tile16"])
@pytest.mark.parametrize("kv_format", ["", "tensor"])
def test_partial_rows_of_decode_beyond_2_to_the_31_words(partial_bytes, kernel, kv_format):
    requests, kv_len = 3700, 16384
    needs(20)
    partial_bytes(1 << 40)
    torch.manual_seed(0)
    indptr, indices = shared_pages(requests, 256, kv_len)
    q = [torch.randn(requests, 128, n, dtype=torch.bfloat16, device="cuda") for n in (512, 64)]
    pool = torch.randn(256, 64, 576, dtype=torch.bfloat16, device="cuda")
    scales = {}
    if kv_format:
        pool, scales = pool.to(torch.float8_e4m3fn), {"ckv_scale": 1.0, "kpe_scale": 1.0}
    config = mla_cute.KernelConfig(kernel=kernel, fp8_kernel=kernel)
    sizes = {"num_heads": 128, "page_size": 64, "batch_invariant": True, "config": config}
    plan = mla_cute.plan_decode(indptr, **sizes)
    assert plan.part.numel() > 2**31
    caches = pool[..., :512], pool[..., 512:]
    out, lse = mla_cute.mla_paged_decode(*q, *caches, indptr, indices, 192**-0.5, plan=plan, **scales)
    torch.cuda.synchronize()
    pages = kv_len // 64
    for b in (0, 1, 3640, 3641, 3699):
        one, one_lse = mla_cute.mla_paged_decode(
            *(x[b : b + 1] for x in q), *caches, indptr[:2], indices[b * pages : (b + 1) * pages], 192**-0.5,
            plan=mla_cute.plan_decode(indptr[:2], **sizes), **scales,
        )  # fmt: skip
        assert same_bits(out[b : b + 1], one), b
        assert same_bits(lse[b : b + 1], one_lse), b


@pytest.mark.parametrize("kv_format", ["", "tensor"])
def test_partial_rows_of_prefill_beyond_2_to_the_31_words(partial_bytes, kv_format):
    requests, drafts, kv_len = 1024, 4, 16384
    needs(24)
    partial_bytes(1 << 40)
    torch.manual_seed(0)
    indptr, indices = shared_pages(requests, 256, kv_len)
    queries = torch.arange(requests + 1, dtype=torch.int32, device="cuda") * drafts
    total_q = requests * drafts
    q = [torch.randn(total_q, 128, n, dtype=torch.bfloat16, device="cuda") for n in (512, 64)]
    pool = torch.randn(256, 64, 576, dtype=torch.bfloat16, device="cuda")
    scales = {}
    if kv_format:
        pool, scales = pool.to(torch.float8_e4m3fn), {"ckv_scale": 1.0, "kpe_scale": 1.0}
    caches = pool[..., :512], pool[..., 512:]
    sizes = {"num_heads": 128, "page_size": 64, "batch_invariant": True}
    plan = mla_cute.plan_prefill(queries, indptr, total_q=total_q, **sizes)
    assert plan.part.numel() > 2**31
    out, lse = mla_cute.mla_paged_prefill(*q, *caches, queries, indptr, indices, 192**-0.5, plan=plan, **scales)
    torch.cuda.synchronize()
    pages = kv_len // 64
    for b in (0, 500, 910, 911, 1023):
        rows = slice(b * drafts, (b + 1) * drafts)
        one, one_lse = mla_cute.mla_paged_prefill(
            *(x[rows] for x in q), *caches, queries[:2], indptr[:2], indices[b * pages : (b + 1) * pages], 192**-0.5,
            batch_invariant=True, **scales,
        )  # fmt: skip
        assert same_bits(out[rows], one), b
        assert same_bits(lse[rows], one_lse), b


def test_queries_beyond_2_to_the_31_elements():
    """40,000 query tokens of 128 heads: the last ones lie 2.6 * 10^9 elements behind the first."""
    needs(30)
    tokens, heads = 40000, 128
    torch.manual_seed(0)
    q = [torch.empty(tokens, heads, n, dtype=torch.bfloat16, device="cuda") for n in (512, 64)]
    for x in q:
        for part in x.split(4000):
            part.normal_()
    pool = torch.randn(4, 64, 576, dtype=torch.bfloat16, device="cuda")
    caches = pool[..., :512], pool[..., 512:]
    queries = torch.tensor([0, tokens - 3, tokens], dtype=torch.int32, device="cuda")
    indptr = torch.tensor([0, 2, 4], dtype=torch.int32, device="cuda")
    ids = torch.arange(4, dtype=torch.int32, device="cuda")
    out, lse = mla_cute.mla_paged_prefill(*q, *caches, queries, indptr, ids, 192**-0.5, causal=False)
    for rows, pages in ((slice(0, 2), ids[:2]), (slice(tokens - 5, tokens - 3), ids[:2]), (slice(-3, None), ids[2:])):
        part = [x[rows].contiguous() for x in q]
        n = len(part[0])
        one, one_lse = mla_cute.reference.prefill_reference(
            *part, *caches, torch.tensor([0, n]), torch.tensor([0, 2]), pages, 192**-0.5, causal=False
        )
        assert torch.allclose(out[rows].float(), one.float(), rtol=2**-6, atol=2e-3)
        assert torch.allclose(lse[rows], one_lse, atol=2e-3)


def test_the_bound_of_partial_rows_is_the_one_that_is_documented():
    assert plans.MOST_PARTIAL_BYTES == 512 << 20
