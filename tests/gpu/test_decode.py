"""Decode on the GPU against the float32 reference: poisoned inputs and guarded outputs in every test."""

import dataclasses
import math

import pytest
import torch
from gpu_helpers import ENTRIES, bits, check, decode, plan_of, same_bits

import mla_cute
from mla_cute.testing.cases import expected_of, make_case, run_case, sweep
from mla_cute.testing.verdict import compare

BOTH_ENTRIES = pytest.mark.parametrize("entry", ENTRIES)
# One page size for each way of loading: gather, boxes of 8, 16 and 32 rows, full boxes; and one that is above the tile.
LOADS = (1, 24, 16, 32, 64, 256)


@pytest.mark.parametrize("spec", sweep(), ids=str)
def test_sweep(spec):
    """Right, bitwise the same when repeated, with a plan, and through the block table; lse in both bases."""
    case = spec.make("cuda")
    expected = expected_of(case)
    check(case, expected=expected)
    out, lse = case.out.clone(), case.lse.clone()

    plan = plan_of(case)
    check(case, expected=expected, plan=plan)
    assert same_bits(case.out, out)
    assert same_bits(case.lse, lse)

    # The width of a block table bounds the lengths, by which another kernel may be chosen.
    check(case, expected=expected, entry="block_table")
    check(case, expected=expected, entry="block_table", config=plan.config)
    assert same_bits(case.out, out)
    assert same_bits(case.lse, lse)

    in_e = dataclasses.replace(expected, lse=expected.lse * math.log(2))
    by_table = plan_of(case, "block_table", config=plan.config)
    check(case, expected=in_e, entry="block_table", plan=by_table, lse_base="e")
    assert same_bits(case.out, out)

    check(case, expected=expected, batch_invariant=True)


@pytest.mark.parametrize("page_size", LOADS)
def test_full_last_pages_by_default(page_size):
    lengths = [page_size * n for n in (1, 0, 3, 700, 64)]
    case = make_case(lengths, num_heads=16, page_size=page_size, device="cuda", dtype=torch.float16)
    plan = mla_cute.plan_decode(case.kv_indptr, num_heads=16, page_size=page_size)
    expected = expected_of(case)
    want = decode(case)
    for arguments in ({}, {"plan": plan}):
        output, lse = mla_cute.mla_paged_decode(*case.csr_args, **arguments)
        verdict = compare(output, lse, expected)
        assert verdict.ok, verdict
        assert same_bits(output, want[0])


@BOTH_ENTRIES
def test_allocated_results(entry):
    case = make_case([129, 0, 1000], num_heads=16, page_size=64, device="cuda", q_layout="batch_strided")
    output, lse = decode(case, entry)
    assert output.is_contiguous()
    verdict = compare(output, lse, expected_of(case))
    assert verdict.ok, verdict
    alone = decode(case, entry, return_lse=False)
    assert isinstance(alone, torch.Tensor)
    assert same_bits(alone, output)
    assert decode(case, entry, return_lse=False, out=case.out) is case.out
    assert same_bits(case.out, output)


@BOTH_ENTRIES
@pytest.mark.parametrize("with_plan", [False, True], ids=["", "plan"])
@pytest.mark.parametrize("lengths", [[], [0], [0] * 3, [0] * 200], ids=lambda lengths: f"b{len(lengths)}")
def test_batches_without_tokens(entry, with_plan, lengths):
    case = make_case(lengths, num_heads=16, page_size=64, device="cuda")
    check(case, entry=entry, plan=plan_of(case, entry) if with_plan else None)
    assert (case.out == 0).all()
    assert case.lse.isneginf().all()


@pytest.mark.parametrize("batch_invariant", [False, True], ids=["balanced", "invariant"])
@pytest.mark.parametrize(("num_heads", "page_size"), [(16, 64), (128, 64), (16, 1), (65, 16)])
def test_more_requests_than_sms(num_heads, page_size, batch_invariant):
    lengths = torch.randint(0, 200, (700,), generator=torch.Generator().manual_seed(num_heads)).tolist()
    lengths[::50] = [0] * 14
    lengths[333] = 3000
    case = make_case(lengths, num_heads=num_heads, page_size=page_size, device="cuda")
    check(case, batch_invariant=batch_invariant)


@pytest.mark.parametrize(
    ("num_heads", "page_size", "dtype", "drift"),
    [
        (16, 64, torch.bfloat16, 0.0),
        (128, 64, torch.float16, 60.0),
        (128, 1, torch.bfloat16, -60.0),
        (1, 16, torch.bfloat16, 0.0),
    ],
)
def test_one_long_request(num_heads, page_size, dtype, drift):
    case = make_case([131072], num_heads=num_heads, page_size=page_size, dtype=dtype, drift=drift, device="cuda")
    check(case)
    check(case, entry="block_table", batch_invariant=True)


@pytest.mark.parametrize("page_size", LOADS)
def test_every_length_around_the_tile(page_size):
    """Every tail of the last 64-token block, in both halves of a pair of blocks."""
    case = make_case(list(range(1, 260)), num_heads=6, page_size=page_size, device="cuda")
    check(case)


@pytest.mark.parametrize("num_heads", range(1, 129, 3))
def test_head_counts_between_the_tiles(num_heads):
    case = make_case([70, 0, 4097, 1], num_heads=num_heads, page_size=32, device="cuda", out_layout="batch_strided")
    check(case)


@pytest.mark.parametrize("page_size", [5, 7, 40, 72, 80, 96, 160, 1000, 4096])
def test_uncommon_page_sizes(page_size):
    case = make_case([1, 64, 0, 999, 1000, 1001, 5000], num_heads=8, page_size=page_size, device="cuda")
    check(case)
    check(case, entry="block_table")


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_csr_lists_that_start_later(page_size):
    case = make_case([100, 0, 3, 2000], num_heads=16, page_size=page_size, index_offset=5, device="cuda")
    check(case)
    check(case, plan=plan_of(case))


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_one_page_in_every_request(page_size):
    """A prefix cache: requests that consist of the same pages give the same rows for the same queries."""
    case = make_case([page_size * 70] * 40, num_heads=16, page_size=page_size, shared_pages=70, device="cuda")
    case.q_nope[:] = case.q_nope[0].clone()
    case.q_pe[:] = case.q_pe[0].clone()
    check(case, batch_invariant=True)
    assert (bits(case.out) == bits(case.out[0])).all()


@pytest.mark.parametrize("page_size", [1, 8, 64])
def test_strides_of_size_one_dimensions_do_not_matter(page_size):
    case = make_case([page_size], num_heads=1, page_size=page_size, num_pages=1, device="cuda")
    want = decode(case)
    for name in ("q_nope", "q_pe"):
        x = getattr(case, name)
        setattr(case, name, x.as_strided(x.shape, (7, 3, 1)))
    for name in ("ckv_cache", "kpe_cache"):
        x = getattr(case, name)
        setattr(case, name, x.as_strided(x.shape, (5, 11 if page_size == 1 else x.stride(1), 1), x.storage_offset()))
    for entry in ENTRIES:
        for got, expected in zip(decode(case, entry), want, strict=True):
            assert same_bits(got, expected)


@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize(("sm_scale", "drift"), [(4.0, 2000.0), (4.0, -2000.0), (1e-30, 0.0), (1.0, 0.0)])
def test_scores_of_any_size(sm_scale, drift, page_size):
    case = make_case([3000, 65, 1], num_heads=16, page_size=page_size, sm_scale=sm_scale, drift=drift, device="cuda")
    check(case)


@pytest.mark.parametrize("num_heads", [16, 128])
@pytest.mark.parametrize("page_size", [1, 64])
def test_nan_in_a_query_stays_in_its_row(page_size, num_heads):
    case = make_case([300, 129, 20000, 64], num_heads=num_heads, page_size=page_size, device="cuda")
    case.q_nope[1, 5, 100] = math.nan
    case.q_pe[2, 0, 3] = math.nan
    check(case)
    rows = case.out.isnan().any(-1).nonzero().tolist()
    assert rows == [[1, 5], [2, 0]]
    assert case.lse.isnan().nonzero().tolist() == rows


@pytest.mark.parametrize("page_size", [1, 64])
def test_nan_in_a_token_stays_in_its_request(page_size):
    case = make_case([300, 129, 20000, 64], num_heads=16, page_size=page_size, device="cuda")
    page = case.kv_indices[int(case.kv_indptr[2]) + 7000 // page_size]
    case.kpe_cache[page, 7000 % page_size, 0] = math.nan
    check(case)
    assert case.out.isnan().all(-1).all(-1).tolist() == [False, False, True, False]


# ------------------------------------------------------------------------------------------------ plans and configs


def test_layers_share_a_plan():
    """Layers of a model have other queries, caches and strides, even another dtype, and the same page lists."""
    first = make_case([1000, 0, 129, 20000], num_heads=16, page_size=64, num_pages=400, device="cuda")
    plan = plan_of(first, other_metadata=True)
    for layer, layout in enumerate(("fused", "split", "padded", "slot_major")):
        for dtype in (torch.bfloat16, torch.float16):
            case = make_case(
                first.lengths,
                num_heads=16,
                page_size=64,
                num_pages=400,
                device="cuda",
                cache_layout=layout,
                dtype=dtype,
            )
            case.q_nope.normal_(generator=torch.Generator("cuda").manual_seed(layer))
            check(case, plan=plan)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("batch_invariant", [False, True], ids=["balanced", "invariant"])
def test_updated_plan_follows_the_metadata(entry, batch_invariant):
    shape = {"num_heads": 24, "page_size": 16, "num_pages": 4000, "num_indices": 4000, "max_pages": 2000}
    case = make_case([100, 20000, 0, 7], device="cuda", seed=0, **shape)
    plan = plan_of(case, entry, batch_invariant=batch_invariant)
    check(case, entry=entry, plan=plan)
    for seed, lengths in enumerate(([0, 0, 0, 30000], [1, 1, 1, 1], [0] * 4, [9000, 9001, 9002, 9003]), start=1):
        case.load(make_case(lengths, device="cuda", seed=seed, **shape))
        assert plan.update() is plan
        check(case, entry=entry, plan=plan)


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
    lengths = [5000, 64, 0, 65, 1, 129, 20000, 128, 127, 300]
    for batch in (lengths, [20000], lengths * 14):
        case = make_case(batch, num_heads=num_heads, page_size=64, device="cuda")
        check(case, config=config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("num_heads", [6, 16, 65, 128])
@pytest.mark.parametrize("drift", [0.0, 60.0])
@pytest.mark.parametrize("page_size", [64, 1])
def test_cut_and_whole(num_heads, page_size, dtype, drift):
    """Requests cut and whole; with batch_invariant also those that a batch this large would leave whole are cut."""
    for lengths in ([20000], [8192, 5000, 0, 65, 1, 129, 3000], [1500] * 300):
        case = make_case(lengths, num_heads=num_heads, page_size=page_size, device="cuda", dtype=dtype, drift=drift)
        expected = expected_of(case)
        for invariant in (False, True):
            check(case, expected=expected, batch_invariant=invariant)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, 1e-30])
def test_partials_of_extreme_values(value):
    """A value no 16-bit integer can be a fraction of makes its half of the row NaN or inf, and no other row."""
    case = make_case([5000, 5000], num_heads=16, page_size=64, device="cuda")
    want, want_lse = decode(case)
    first = case.kv_indices[case.kv_indptr[0].long()].long()
    case.ckv_cache[first, 3, 5] = value
    got, got_lse = decode(case)
    assert same_bits(got[1], want[1])
    assert same_bits(got_lse[1], want_lse[1])
    if math.isfinite(value):
        verdict = run_case(case)
        assert verdict.ok, verdict
    else:
        assert not got[0, :, :256].isfinite().any()


def test_launch_configs_change_no_bit():
    case = make_case([5000, 64, 0, 65, 1, 20000], num_heads=16, page_size=64, device="cuda")
    want = decode(case)
    for change in ({"use_pdl": False}, {"evict_first": False}):
        config = dataclasses.replace(plan_of(case).config, **change)
        check(case, config=config)
        assert same_bits(case.out, want[0])
        assert same_bits(case.lse, want[1])


def test_the_tensors_device_is_used():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs: the current device is one and the tensors are on the other")
    case = make_case([1000, 0, 129], num_heads=16, page_size=64, device="cuda:1")
    with torch.cuda.device(0):
        check(case)
        check(case, plan=plan_of(case))
        assert decode(case)[0].device == torch.device("cuda:1")
