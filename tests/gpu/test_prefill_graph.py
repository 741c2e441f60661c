"""Prefill: plans and CUDA graphs that follow the metadata, races, and tensors of more than 2^31 elements."""

import math

import pytest
import torch
from gpu_helpers import (
    ENTRIES,
    MIXED,
    bits,
    capture,
    check,
    judge_outputs,
    make_prefill,
    owned,
    plan_of,
    same_bits,
    spread_cache,
)  # fmt: skip
from hog import beside, compile_hog

import mla_cute
from mla_cute.testing.cases import expected_of
from mla_cute.testing.verdict import compare

BOTH_ENTRIES = pytest.mark.parametrize("entry", ENTRIES)
BOTH_MODES = pytest.mark.parametrize("batch_invariant", [False, True], ids=["balanced", "invariant"])

SHAPE = {"num_pages": 45000, "num_indices": 45000, "max_pages": 31000, "total_q": 700}
# Steps of six requests of at most 700 tokens, what a replay has to follow without being captured again.
REPLAYS = (
    [(1, 1000), (300, 300), (0, 64), (5, 129), (128, 5000), (1, 1)],
    [(0, 0)] * 6,
    [(0, 0), (0, 9), (97, 30000), (0, 0), (600, 600), (3, 1)],
    [(1, 7000)] * 6,
    [(300, 8000), (200, 8001), (7, 7), (93, 90), (99, 99), (1, 64)],
)


def make_step(requests, seed, num_heads=16, page_size=64, **kwargs):
    shape = {name: n if name == "total_q" else n // page_size for name, n in SHAPE.items()}
    return make_prefill(requests, num_heads, page_size, seed=seed, drift=20.0, **shape | kwargs)


def test_layers_share_a_plan():
    """Layers of a model have other queries, caches and strides, even another dtype, and the same page lists."""
    first = make_prefill(MIXED, num_pages=400)
    plan = plan_of(first, other_metadata=True)
    for layer, layout in enumerate(("fused", "split", "padded", "slot_major")):
        for dtype in (torch.bfloat16, torch.float16):
            case = make_prefill(MIXED, num_pages=400, cache_layout=layout, dtype=dtype)
            case.q_nope[: case.queries[-1]].normal_(generator=torch.Generator("cuda").manual_seed(layer))
            check(case, plan=plan)


@BOTH_MODES
@BOTH_ENTRIES
def test_updated_plan_follows_the_metadata(entry, batch_invariant):
    case = make_step(REPLAYS[0], 0, 24, 16)
    plan = plan_of(case, entry, batch_invariant=batch_invariant)
    check(case, entry=entry, plan=plan)
    for seed, requests in enumerate(REPLAYS[1:], start=1):
        case.load(make_step(requests, seed, 24, 16))
        assert plan.update() is plan
        check(case, entry=entry, plan=plan)


@pytest.mark.parametrize("mode", ["plan", "no_plan", "plan_invariant"])
@BOTH_ENTRIES
@pytest.mark.parametrize(("num_heads", "page_size"), [(16, 64), (128, 64), (16, 1), (12, 16)])
def test_replay_follows_lengths_pages_and_queries(num_heads, page_size, entry, mode):
    """One capture at the largest step; every replay has other query and key lengths, pages and queries."""
    case = make_step(REPLAYS[0], 0, num_heads, page_size)
    plan = None if mode == "no_plan" else plan_of(case, entry, batch_invariant=mode == "plan_invariant")

    def step():
        if plan is not None:
            plan.update()
        case.call(entry, plan=plan, out=case.out, lse=case.lse)

    graph, _ = capture(step)
    for seed, requests in enumerate((*REPLAYS, REPLAYS[0])):
        case.load(make_step(requests, 100 + seed, num_heads, page_size))
        case.guarded_out.reset()
        case.guarded_lse.reset()
        graph.replay()
        verdict = judge_outputs(case)
        assert verdict.ok, f"replay {seed}, {requests}: {verdict}"


def test_captured_layers_share_one_update():
    layers = [make_step(REPLAYS[0], 7, cache_layout=layout) for layout in ("fused", "split", "padded")]
    plan = plan_of(layers[0], other_metadata=True)

    def step():
        plan.update()
        for layer in layers:
            layer.call(plan=plan, out=layer.out, lse=layer.lse)

    graph, _ = capture(step)
    for seed, requests in enumerate(REPLAYS):
        for i, layer in enumerate(layers):
            layer.load(make_step(requests, 50 + seed))
            layer.q_nope[: layer.queries[-1]].normal_(generator=torch.Generator("cuda").manual_seed(i))
            layer.guarded_out.reset()
            layer.guarded_lse.reset()
        graph.replay()
        for layer in layers:
            verdict = judge_outputs(layer)
            assert verdict.ok, f"{requests}: {verdict}"


def test_inputs_written_right_before_the_call():
    """Queries, metadata and new tokens come from kernels that still run at the launch, and change right after it."""
    case, source = make_step(REPLAYS[0], 3), make_step(REPLAYS[4], 4)
    rows = source.queries[-1]
    want = source.call()
    for plan in (plan_of(case), None):
        tensors = (case.q_nope, case.q_pe, case.ckv_cache, case.kpe_cache)
        torch.cuda.synchronize()
        for x in tensors:
            x.fill_(math.nan)
        torch.cuda._sleep(20_000_000)  # 10 ms: everything below is queued before any of it runs
        case.load(source)
        if plan is not None:
            plan.update()
            case.ckv_cache.copy_(source.ckv_cache)
            case.q_nope.copy_(source.q_nope)
        output, lse = case.call(plan=plan)
        for x in tensors:
            x.fill_(math.nan)
        for x in (case.qo_indptr, case.kv_indptr, case.kv_indices, case.kv_last_page_len):
            x.zero_()
        torch.cuda.synchronize()
        assert same_bits(output[:rows], want[0][:rows])
        assert same_bits(lse[:rows], want[1][:rows])


# ------------------------------------------------------------------------------------------------ races, large tensors

REPEATS = 100


@pytest.fixture(scope="module")
def hog():
    return compile_hog()


@pytest.mark.parametrize("shape", ["mixed", "chunk"])
@pytest.mark.parametrize(("num_heads", "page_size"), [(16, 64), (16, 1), (128, 64), (128, 1)])
def test_repeats_beside_a_bandwidth_hog(hog, num_heads, page_size, shape):
    requests = [*MIXED, (1, 20000), (2, 8192)] if shape == "mixed" else [(40, 20000)]
    case = make_prefill(requests, num_heads, page_size)
    plan = plan_of(case)
    check(case, plan=plan)
    want_out, want_lse = (bits(x) for x in owned(case))
    rows = case.queries[-1]
    wrong = torch.zeros(REPEATS + 1, dtype=torch.int64, device="cuda")

    def repeat(i):
        case.out[:rows].fill_(math.nan)
        case.lse[:rows].fill_(math.nan)
        # plans with the call in every other round
        case.call(plan=plan if i % 2 else None, out=case.out, lse=case.lse)
        wrong[i] = (bits(case.out[:rows]) != want_out).sum() + (bits(case.lse[:rows]) != want_lse).sum()

    for i in (0, 1):
        repeat(i)
    with beside(hog):
        for i in range(1, REPEATS + 1):
            repeat(i)
    assert wrong.count_nonzero() == 0, f"elements that differ, by repeat: {wrong.tolist()}"
    assert case.guarded_out.intact(rows)
    assert case.guarded_lse.intact(rows)


@pytest.mark.parametrize("log2_elements", [31, 32])
@pytest.mark.parametrize(("page_size", "num_heads"), [(64, 16), (1, 16), (16, 128)])
def test_pages_beyond_the_limit(page_size, num_heads, log2_elements):
    case = make_prefill([(100, 3000), (2, 129), (1, 0), (33, 5000), (1, 1)], num_heads, page_size)
    expected = expected_of(case)
    spread_cache(case, log2_elements)
    for entry in ENTRIES:
        check(case, entry=entry, expected=expected)


@BOTH_MODES
def test_queries_beyond_the_limit(batch_invariant):
    """q and out of more than 2^31 elements: only the last request, behind that many, sees keys."""
    num_heads, before = 128, 2**31 // (128 * 512) + 1
    case = make_prefill([(5, 3000)], num_heads, total_q=5)
    expected = expected_of(case)
    rows = before + 5
    needed = rows * num_heads * (512 + 64 + 512 + 2) * 2 + 2**33
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 1e9:.1f} GB of free GPU memory")
    q_nope, q_pe, out = (torch.empty(rows, num_heads, n, dtype=torch.bfloat16, device="cuda") for n in (512, 64, 512))
    lse = torch.full((rows, num_heads), math.nan, device="cuda")
    q_nope[before:], q_pe[before:] = case.q_nope, case.q_pe
    qo_indptr = torch.tensor([0, before, rows], dtype=torch.int32, device="cuda")
    kv_indptr = torch.cat((case.kv_indptr[:1], case.kv_indptr))
    last = torch.cat((case.kv_last_page_len, case.kv_last_page_len))
    out[0], out[before - 1] = math.nan, math.nan
    mla_cute.mla_paged_prefill(
        q_nope, q_pe, case.ckv_cache, case.kpe_cache, qo_indptr, kv_indptr, case.kv_indices, case.sm_scale,
        kv_last_page_len=last, out=out, lse=lse, batch_invariant=batch_invariant,
    )  # fmt: skip
    verdict = compare(out[before:], lse[before:], expected)
    assert verdict.ok, verdict
    assert not out[:before].count_nonzero()
    assert lse[:before].isneginf().all()
