"""Prefill on the GPU against the float32 reference: poisoned inputs and guarded outputs in every test."""

import copy
import dataclasses
import math
import random

import pytest
import torch
from gpu_helpers import ENTRIES, MIXED, bits, check, decode, make_prefill, owned, plan_of, same_bits

import mla_cute
from mla_cute.testing.cases import DecodeCase, expected_of, judge
from mla_cute.testing.prefill import PrefillCase, prefill_sweep, row_tiles
from mla_cute.testing.verdict import compare

BOTH_ENTRIES = pytest.mark.parametrize("entry", ENTRIES)
BOTH_MODES = pytest.mark.parametrize("batch_invariant", [False, True], ids=["balanced", "invariant"])
WITH_PLAN = pytest.mark.parametrize("with_plan", [False, True], ids=["", "plan"])
# One page size for each way of loading: gather, boxes of 8, 16 and 32 rows, full boxes; and one that is above the tile.
LOADS = (1, 24, 16, 32, 64, 256)


def check_same(case, want, **kwargs):
    """Run again: same bits, and no row written that nobody owns."""
    case.guarded_out.reset()
    case.guarded_lse.reset()
    case.call(out=case.out, lse=case.lse, **kwargs)
    for got, expected in zip(owned(case), want, strict=True):
        assert same_bits(got, expected)
    rows = case.queries[-1]
    assert case.guarded_out.intact(rows)
    assert case.guarded_lse.intact(rows)


def select(case: PrefillCase, picks: list[int]) -> PrefillCase:
    """The case with these requests only, over the same cache."""
    sub = copy.copy(case)
    index = torch.tensor(picks, device="cuda")
    starts, ends = case.kv_indptr[:-1].tolist(), case.kv_indptr[1:].tolist()
    tokens = torch.cat([torch.arange(case.queries[b], case.queries[b + 1]) for b in picks]).to("cuda")
    sub.lengths, sub.q_lens = [case.lengths[b] for b in picks], [case.q_lens[b] for b in picks]
    sub.q_nope, sub.q_pe = case.q_nope[tokens], case.q_pe[tokens]
    sub.kv_indices = torch.cat([case.kv_indices[starts[b] : ends[b]] for b in picks])
    counts = torch.tensor([0] + [ends[b] - starts[b] for b in picks])
    sub.kv_indptr = counts.cumsum(0).to(device="cuda", dtype=torch.int32)
    sub.qo_indptr = torch.tensor(sub.queries, dtype=torch.int32, device="cuda")
    sub.kv_last_page_len, sub.seq_lens = case.kv_last_page_len[index], case.seq_lens[index]
    sub.block_table = case.block_table[index]
    return sub


def as_decode(case: PrefillCase) -> DecodeCase:
    """The same tensors as a decode call; every request has one query token and no row is spare."""
    assert case.q_lens == [1] * len(case.lengths)
    assert case.total_q == len(case.lengths)
    return DecodeCase(**{f.name: getattr(case, f.name) for f in dataclasses.fields(DecodeCase)})


@pytest.mark.parametrize("spec", prefill_sweep(), ids=str)
def test_sweep(spec):
    """Right, bitwise the same when repeated, with a plan, and through the block table; right when batch-invariant."""
    case = spec.make("cuda")
    expected = expected_of(case)
    check(case, expected=expected)
    want = owned(case)
    check_same(case, want, plan=plan_of(case))
    check_same(case, want, entry="block_table")
    in_e = dataclasses.replace(expected, lse=expected.lse * math.log(2))
    plan = plan_of(case, "block_table", batch_invariant=True)
    check(case, expected=in_e, entry="block_table", plan=plan, lse_base="e")
    want = owned(case)
    check_same(case, want, batch_invariant=True, lse_base="e")


# ------------------------------------------------------------------------------------------------ kinds of requests


@pytest.mark.parametrize(("num_heads", "page_size"), [(1, 64), (6, 16), (16, 64), (16, 1), (48, 64), (128, 64)])
def test_whole_prompts(num_heads, page_size):
    lengths = [1, 2, 3, 63, 64, 65, 127, 128, 129, 257] + ([1000, 2047] if num_heads <= 16 else [400])
    check(make_prefill([(n, n) for n in lengths], num_heads, page_size))


@pytest.mark.parametrize("page_size", LOADS)
@pytest.mark.parametrize("num_heads", [6, 12, 16, 48, 96])
def test_every_mask_edge(num_heads, page_size):
    """The diagonal at every offset inside a pair of blocks; 6, 12, 48 and 96 heads split tokens between row tiles."""
    case = make_prefill([(1 + d % 17, 100 + d % 17 + d) for d in range(140)], num_heads, page_size)
    check(case)


@BOTH_MODES
@pytest.mark.parametrize(("num_heads", "page_size"), [(8, 64), (12, 16), (16, 64), (16, 1), (64, 64), (128, 64)])
def test_mtp(num_heads, page_size, batch_invariant):
    """Speculative decoding: 2 to 8 query tokens at the end of short and long contexts."""
    requests = [(q, n) for q in range(2, 9) for n in (q, 64, 65, 2000, 8192 + q)] + [(3, 30000)]
    check(make_prefill(requests, num_heads, page_size), batch_invariant=batch_invariant)


@BOTH_MODES
@pytest.mark.parametrize(("num_heads", "page_size"), [(16, 64), (16, 1), (64, 16), (128, 64), (128, 1)])
def test_chunks_on_a_prefix(num_heads, page_size, batch_invariant):
    requests = [(64, 4096), (257, 5000), (128, 128 + 128), (33, 20000), (100, 101)]
    check(make_prefill(requests, num_heads, page_size), batch_invariant=batch_invariant)


@BOTH_MODES
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("num_heads", "page_size"), [(16, 64), (128, 64), (16, 1)])
def test_mixed_step(num_heads, page_size, causal, batch_invariant):
    """Single tokens and chunks of prompts in one call, as a serving engine mixes them."""
    generator = random.Random(num_heads)
    requests = [(1, generator.randint(1, 9000)) for _ in range(64)] + [(512, 4096), (130, 130), *MIXED]
    generator.shuffle(requests)
    check(make_prefill(requests, num_heads, page_size, causal=causal), batch_invariant=batch_invariant)


@BOTH_ENTRIES
def test_long_single_chunk(entry):
    case = make_prefill([(512, 32768)])
    expected = expected_of(case)
    for invariant in (False, True):
        check(case, entry=entry, expected=expected, batch_invariant=invariant)


@pytest.mark.parametrize("page_size", [64, 1])
def test_more_row_tiles_than_a_round(page_size):
    """512 row tiles of 8192 keys and less: several whole rounds and a tail."""
    check(make_prefill([(256, 8192)], 128, page_size))


@BOTH_MODES
def test_more_requests_than_sms(batch_invariant):
    generator = random.Random(0)
    requests = [(generator.choice([0, 1, 1, 1, 2, 5, 17]), generator.randint(0, 200)) for _ in range(700)]
    requests[333] = (100, 3000)
    check(make_prefill(requests), batch_invariant=batch_invariant)


@pytest.mark.parametrize("num_heads", [12, 16, 128])
def test_queries_that_see_no_key(num_heads):
    case = make_prefill([(100, 60), (5, 0), (3, 2), (64, 1)], num_heads)
    check(case)
    blind = [*range(40), *range(100, 105), 105, *range(108, 171)]
    assert (case.out[blind] == 0).all()
    assert case.lse[blind].isneginf().all()
    assert int(case.lse[: case.queries[-1]].isneginf().sum()) == len(blind) * num_heads


@BOTH_ENTRIES
@WITH_PLAN
@pytest.mark.parametrize(
    "requests",
    [[], [(0, 0)], [(0, 500)] * 3, [(5, 0)], [(1, 0)] * 200, [(0, 70), (200, 0), (0, 0)]],
    ids=lambda requests: f"b{len(requests)}q{sum(q for q, _ in requests)}",
)
def test_nothing_to_attend(entry, with_plan, requests):
    for total_q in (None, sum(q for q, _ in requests)):
        case = make_prefill(requests, total_q=total_q)
        check(case, entry=entry, plan=plan_of(case, entry) if with_plan else None)
        rows = case.queries[-1]
        assert (case.out[:rows] == 0).all()
        assert case.lse[:rows].isneginf().all()


# ------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize("page_size", LOADS)
def test_full_last_pages_by_default(page_size):
    requests = [(3, page_size), (2, 0), (40, 3 * page_size), (100, 300 * page_size), (1, 64 * page_size)]
    case = make_prefill(requests, page_size=page_size, dtype=torch.float16)
    expected = expected_of(case)
    check(case, expected=expected)
    want = owned(case)
    rows = case.queries[-1]
    plan = plan_of(case, kv_last_page_len=None)
    for arguments in ({}, {"plan": plan}):
        output, lse = mla_cute.mla_paged_prefill(*case.csr_args, **arguments)
        assert same_bits(output[:rows], want[0])
        assert same_bits(lse[:rows], want[1])


@BOTH_ENTRIES
def test_allocated_results(entry):
    case = make_prefill(MIXED, q_layout="batch_strided")
    rows = case.queries[-1]
    output, lse = case.call(entry)
    assert output.is_contiguous()
    assert output.shape == case.q_nope.shape
    verdict = compare(output[:rows], lse[:rows], expected_of(case))
    assert verdict.ok, verdict
    alone = case.call(entry, return_lse=False)
    assert isinstance(alone, torch.Tensor)
    assert same_bits(alone[:rows], output[:rows])
    assert case.call(entry, return_lse=False, out=case.out) is case.out
    assert same_bits(case.out[:rows], output[:rows])
    assert case.guarded_out.intact(rows)
    assert case.guarded_lse.untouched()


def head_major(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def padded_heads(x):
    """Tokens 3 heads further apart than their H heads fill."""
    wide = torch.full((x.shape[0], x.shape[1] + 3, x.shape[2]), math.nan, dtype=x.dtype, device="cuda")
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def wide_rows(x):
    """Rows 640 elements apart: strides are not packed, and the rows (token, head) are evenly spaced."""
    wide = torch.full((*x.shape[:2], 640), math.nan, dtype=x.dtype, device="cuda")
    wide[..., : x.shape[2]] = x
    return wide[..., : x.shape[2]]


def repeated_token(x):
    """One token for all: stride 0."""
    return x[:1].expand_as(x)


@BOTH_ENTRIES
@pytest.mark.parametrize("num_heads", [1, 12, 16, 128])
@pytest.mark.parametrize("change", [head_major, padded_heads, wide_rows, repeated_token], ids=lambda f: f.__name__)
def test_query_strides(change, num_heads, entry):
    for names in (("q_nope",), ("q_pe",), ("q_nope", "q_pe")):
        case = make_prefill([(70, 200), (1, 65), (129, 129)], num_heads)
        for name in names:
            setattr(case, name, change(getattr(case, name)))
        check(case, entry=entry)


@pytest.mark.parametrize("page_size", [1, 8, 64])
def test_strides_of_size_one_dimensions_do_not_matter(page_size):
    for q_len in (1, 5):
        case = make_prefill([(q_len, page_size)], 1, page_size, num_pages=1, total_q=q_len)
        want = case.call()
        for name in ("q_nope", "q_pe"):
            x = getattr(case, name)
            setattr(case, name, x.as_strided(x.shape, (7 if q_len == 1 else x.stride(0), 3, 1)))
        for name in ("ckv_cache", "kpe_cache"):
            x = getattr(case, name)
            stride = (5, 11 if page_size == 1 else x.stride(1), 1)
            setattr(case, name, x.as_strided(x.shape, stride, x.storage_offset()))
        for entry in ENTRIES:
            for got, expected in zip(case.call(entry), want, strict=True):
                assert same_bits(got, expected)


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_csr_lists_that_start_later(page_size):
    case = make_prefill(MIXED, page_size=page_size, index_offset=5)
    check(case)
    check(case, plan=plan_of(case))


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_one_page_in_every_request(page_size):
    """A prefix cache: requests that consist of the same pages give the same rows for the same queries."""
    case = make_prefill([(20, page_size * 70)] * 40, page_size=page_size, shared_pages=70, total_q=800)
    for q in (case.q_nope, case.q_pe):
        q[:] = q[:20].repeat(40, 1, 1)
    check(case, batch_invariant=True)
    rows = bits(case.out).view(40, 20, 16, 512)
    assert (rows == rows[0]).all()


@BOTH_ENTRIES
def test_plans_for_other_calls_are_refused(entry):
    case = make_prefill(MIXED)
    other = {"causal": False, "total_q": case.total_q + 1, "num_heads": 8, "page_size": 32}
    for name, value in other.items():
        with pytest.raises(ValueError, match=name):
            case.call(entry, plan=plan_of(case, entry, **{name: value}), out=case.out, lse=case.lse)
    with pytest.raises(ValueError, match="plan"):
        case.call(entry, plan=plan_of(case, ENTRIES[entry == "csr"]), out=case.out, lse=case.lse)
    torch.cuda.synchronize()
    assert case.guarded_out.untouched()
    assert case.guarded_lse.untouched()


# ------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize(("sm_scale", "drift"), [(4.0, 2000.0), (4.0, -2000.0), (1e-30, 0.0), (1.0, 0.0)])
def test_scores_of_any_size(sm_scale, drift, page_size):
    check(make_prefill([(200, 3000), (65, 65), (1, 1), (90, 40)], page_size=page_size, sm_scale=sm_scale, drift=drift))


@pytest.mark.parametrize("num_heads", [16, 128])
@pytest.mark.parametrize("page_size", [1, 64])
def test_nan_in_a_query_stays_in_its_row(page_size, num_heads):
    case = make_prefill([(50, 300), (129, 129), (9, 20000), (64, 64)], num_heads, page_size)
    case.q_nope[60, 5, 100] = math.nan
    case.q_pe[180, 0, 3] = math.nan
    check(case)
    rows = case.out[: case.queries[-1]].isnan().any(-1).nonzero().tolist()
    assert rows == [[60, 5], [180, 0]]
    assert case.lse[: case.queries[-1]].isnan().nonzero().tolist() == rows


@pytest.mark.parametrize(("num_heads", "page_size"), [(12, 64), (16, 1), (128, 64)])
@pytest.mark.parametrize("position", [200, 330, 499])
@pytest.mark.parametrize("cache", ["ckv_cache", "kpe_cache"])
def test_nan_in_a_token_reaches_no_row_tile_before_it(cache, position, num_heads, page_size):
    """Queries that see it are NaN; row tiles that need no key this late, and other requests, keep their bits.

    Of the other rows of a tile only P is 0 there: what they get is 0 x NaN for a V that is NaN, and right for a K.
    """
    q_len, kv_len = 300, 500
    case = make_prefill([(7, 100), (q_len, kv_len), (1, 600)], num_heads, page_size)
    check(case)
    want = owned(case)[0]
    page = case.kv_indices[int(case.kv_indptr[1]) + position // page_size]
    getattr(case, cache)[page, position % page_size, 0] = math.nan
    if cache == "kpe_cache":
        check(case)
    else:
        case.call(out=case.out, lse=case.lse)
    first = 7 + max(0, position - (kv_len - q_len))
    assert case.out[first : 7 + q_len].isnan().all()
    assert case.lse[first : 7 + q_len].isnan().all()
    safe = 64 * sum(seen <= position for _, _, seen in row_tiles(q_len, kv_len, num_heads))
    for rows in (slice(0, 7 * num_heads), slice(7 * num_heads, 7 * num_heads + safe), slice(-num_heads, None)):
        assert same_bits(case.out[: case.queries[-1]].flatten(0, 1)[rows], want.flatten(0, 1)[rows])


@pytest.mark.parametrize("num_heads", [16, 128])
@pytest.mark.parametrize(
    "config",
    [
        mla_cute.KernelConfig(min_blocks=2, item_overhead=0, split_penalty=0),
        mla_cute.KernelConfig(min_blocks=2, item_overhead=100, split_penalty=0),
        mla_cute.KernelConfig(min_blocks=64, item_overhead=1, split_penalty=1000),
    ],
    ids=["split_all", "large_overhead", "split_none"],
)
def test_planner_configs(config, num_heads):
    for requests in (MIXED, [(40, 20000)], MIXED * 10):
        check(make_prefill(requests, num_heads), config=config)


def test_launch_configs_change_no_bit():
    case = make_prefill(MIXED)
    config = plan_of(case).config
    check(case, config=config)
    want = owned(case)
    for change in ({"use_pdl": False}, {"evict_first": False}):
        check_same(case, want, config=dataclasses.replace(config, **change))


# ------------------------------------------------------------------------------------------------ pieces of one whole


@pytest.mark.parametrize(("num_heads", "page_size"), [(1, 64), (6, 16), (16, 64), (16, 1), (24, 64), (64, 64)])
def test_one_query_token_is_decode(num_heads, page_size):
    """The same result within its error; with batch_invariant on both sides and one row tile in both, the same bits."""
    lengths = [1, 63, 64, 65, 129, 1000, 1024, 1025, 5000, 0, 20000, 2047]
    case = make_prefill([(1, n) for n in lengths], num_heads, page_size, total_q=len(lengths))
    expected = expected_of(case)
    check(case, expected=expected)
    check(as_decode(case), expected=expected)
    for entry in ENTRIES:
        got = case.call(entry, batch_invariant=True)
        want = decode(as_decode(case), entry, batch_invariant=True, config=mla_cute.KernelConfig(kernel="tile64"))
        assert same_bits(got[0], want[0])
        assert same_bits(got[1], want[1])


@pytest.mark.parametrize("num_heads", [96, 128])
def test_one_query_token_of_two_row_tiles_is_decode(num_heads):
    lengths = [1, 65, 1000, 0, 20000]
    case = make_prefill([(1, n) for n in lengths], num_heads, total_q=len(lengths))
    expected = expected_of(case)
    check(case, expected=expected)
    check(as_decode(case), expected=expected)


@BOTH_MODES
@pytest.mark.parametrize(("num_heads", "page_size"), [(12, 16), (16, 64), (16, 1), (128, 64)])
def test_a_prompt_in_chunks_is_the_prompt(num_heads, page_size, batch_invariant):
    prompt = 1500 if num_heads <= 16 else 500
    case = make_prefill([(prompt, prompt)], num_heads, page_size)
    expected = expected_of(case)
    check(case, expected=expected, batch_invariant=batch_invariant)
    case.guarded_out.reset()
    case.guarded_lse.reset()
    generator = random.Random(num_heads + page_size)
    done = 0
    while done < prompt:
        n = min(generator.choice([1, 2, 7, 63, 64, 65, 200, 333]), prompt - done)
        part = slice(done, done + n)
        done += n
        pages = -(-done // page_size)
        metadata = ([0, n], [0, pages], [done - (pages - 1) * page_size])
        qo_indptr, kv_indptr, last = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in metadata)
        queries = (case.q_nope[part], case.q_pe[part])
        mla_cute.mla_paged_prefill(
            *queries, case.ckv_cache, case.kpe_cache, qo_indptr, kv_indptr, case.kv_indices, case.sm_scale,
            kv_last_page_len=last, out=case.out[part], lse=case.lse[part], batch_invariant=batch_invariant,
        )  # fmt: skip
    verdict = judge(case, expected)
    assert verdict.ok, verdict


@BOTH_ENTRIES
@pytest.mark.parametrize(("num_heads", "page_size"), [(16, 64), (128, 64), (16, 1), (12, 16)])
def test_a_row_does_not_see_its_neighbours(num_heads, page_size, entry):
    generator = random.Random(num_heads + page_size)
    requests = [(generator.choice([1, 1, 2, 5, 40]), generator.randint(0, 2500)) for _ in range(60)]
    targets = {0: (1, 20000), 7: (4, 8192), 20: (200, 200), 33: (100, 5000), 41: (1, 1), 50: (30, 20), 59: (3, 1025)}
    for b, request in targets.items():
        requests[b] = request
    case = make_prefill(requests, num_heads, page_size)
    check(case, entry=entry, batch_invariant=True)
    out, lse = owned(case)
    for b in targets:
        own = slice(case.queries[b], case.queries[b + 1])
        for size in (1, 3, 17):
            others = generator.sample([r for r in range(60) if r != b], size - 1)
            at = generator.randrange(size)
            sub = select(case, [*others[:at], b, *others[at:]])
            plan = plan_of(sub, entry, batch_invariant=True) if size == 3 else None
            got, got_lse = sub.call(entry, batch_invariant=True, plan=plan)
            part = slice(sub.queries[at], sub.queries[at + 1])
            where = f"request {requests[b]} at {at} of {size}"
            assert same_bits(got[part], out[own]), where
            assert same_bits(got_lse[part], lse[own]), where
