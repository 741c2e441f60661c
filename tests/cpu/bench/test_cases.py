"""The bench's cases without a GPU: presets, bars, rotation through the pool, arithmetic, FP8 formats."""

import dataclasses
import itertools

import pytest
import torch
from bench_case import FP8_CASES, SMALL, record_of, row_of
from call_case import check_decode

from mla_cute.bench import cases as cases_module
from mla_cute.bench import report, runner, targets
from mla_cute.bench.cases import BARS, PRESETS, PUBLIC_BEST_US, Case
from mla_cute.bench.inputs import KvPool, make_inputs
from mla_cute.dims import KV_FORMATS

# The cells of the project's table of public kernels, written out here once more: bench.cases must not drift from it.
TABLE = """
16 1 11.0 23.4 44.1
16 16 15.6 47.3 152.5
16 128 43.6 288.4 1177.6
64 1 13.2 23.4 47.8
64 16 19.9 53.4 159.8
64 128 46.5 297.1 1213.0
128 1 13.7 22.8 39.2
128 16 21.5 75.9 256.5
128 64 37.8 251.6 1005.4
128 128 68.0 475.0 1743.4
"""


def table_cells():
    for text in TABLE.split("\n"):
        if text:
            h, b, *times = text.split()
            for length, us in zip((1024, 8192, 32768), times, strict=True):
                yield (int(h), int(b), length), float(us)


def test_table_preset_is_the_published_table():
    cells = dict(table_cells())
    assert len(cells) == 30
    assert cells == PUBLIC_BEST_US
    assert PRESETS["table"] == tuple(Case(*cell, 64, "bfloat16", "separate") for cell in cells)


def test_bars_are_the_decode_rows_to_reach():
    expected = {
        (16, 128, 8192): ("read", 0.94, 0.96),
        (64, 128, 8192): ("read", 0.93, 0.95),
        (128, 64, 8192): ("cublas", 0.84, 0.90),
        (16, 1, 8192): ("us", 11, 8),
        (16, 1, 32768): ("us", 22, 15),
        (128, 1, 8192): ("us", 12, 9),
        (16, 16, 1024): ("us", 9.5, 8),
        (16, 16, 8192): ("us", 42, 39),
    }
    got = {(b.case.num_heads, b.case.batch, b.case.kv_len): (b.kind, b.reach, b.beyond) for b in BARS}
    assert got == expected
    assert cases_module.PAGE_ONE_BAR == (0.90, 0.97)
    assert {bar.case for bar in BARS} < set(PRESETS["bars"])
    ones = [case for case in PRESETS["bars"] if case.page_size == 1]
    assert ones
    assert all(Case(c.num_heads, c.batch, c.kv_len) in PRESETS["bars"] for c in ones)


def test_pages_preset():
    shapes = {(c.num_heads, c.batch, c.kv_len) for c in PRESETS["pages"]}
    assert shapes == {(16, 128, 8192), (128, 64, 8192)}
    assert all({c.page_size for c in PRESETS["pages"] if c.num_heads == h} == {1, 16, 64, 128} for h in (16, 128))


def test_grid_preset():
    grid = {(c.num_heads, c.batch, c.kv_len, c.page_size) for c in PRESETS["grid"]}
    axes = ((8, 16, 32, 64, 128), (1, 4, 16, 64, 128), (1024, 4096, 8192, 32768, 131072), (1, 64))
    assert grid == set(itertools.product(*axes))
    assert len(PRESETS["grid"]) == len(grid)
    assert all(c == Case(c.num_heads, c.batch, c.kv_len, c.page_size) for c in PRESETS["grid"])


def test_ragged_lengths_are_log_uniform_and_have_a_uniform_twin():
    case = Case(16, 128, 1024, longest=32768)
    lengths = [kv for _, kv in case.requests]
    assert lengths == [kv for _, kv in case.requests], "every run the same batch"
    assert 1024 <= min(lengths) < 1060
    assert 31600 < max(lengths) <= 32768
    octaves = [sum(1024 * 2**i <= n < 1024 * 2 ** (i + 1) for n in lengths) for i in range(5)]
    assert all(25 <= n <= 27 for n in octaves)
    assert lengths not in (sorted(lengths), sorted(lengths, reverse=True))
    assert case.visible_pairs == sum(lengths)
    assert case.label.startswith("H=16 B=128 L=1024..32768 page 64")
    assert "1024..32768" in report.cells({"case": vars(case), "error": "x"}, [])
    assert case.uniform == Case(16, 128, round(sum(lengths) / 128))
    assert runner.case_of({"case": dataclasses.asdict(case)}) == case
    assert set(PRESETS["ragged"]) == {c for ragged in cases_module.RAGGED for c in (ragged, ragged.uniform)}
    with pytest.raises(ValueError, match=r"longest: expected 0 or at least kv_len \(1024\), got 1000"):
        Case(16, 1, 1024, longest=1000)


def test_ragged_bar():
    rows = [row_of(case, us) for case, us in ((case, 104 if case.longest else 100) for case in PRESETS["ragged"][:4])]
    rows[2]["us_amortised"] = 106
    judged = targets.judge(record_of(rows, None))
    assert [(one.measured, one.met) for one in judged] == [(1.04, True), (1.06, False)]
    assert "time over that of H=16 B=16 L=" in judged[0].what


@pytest.mark.parametrize("preset", PRESETS)
def test_rotation_moves_more_than_300_mb_before_a_page_comes_round_again(preset):
    for case in PRESETS[preset]:
        assert case.num_slots * case.turnover > 300_000_000, case
        assert case.num_slots * case.turnover >= 8_000_000_000 or case.num_slots >= 64, case
        # one slot of the grid's largest cases is more
        most = max(12_000_000_000, 1.02 * case.turnover)
        assert case.num_slots * case.bytes_moved < most, case
        bytes_per_token = {"": 1152, "tensor": 576, "token": 644, "group": 656}[case.kv_format]
        if preset == "dims":
            bytes_per_token = (case.ckv_dim + case.kpe_dim) * (1 if case.kv_format else 2)
        sparse = isinstance(case, Case) and case.sparse
        tokens = sum(kv for _, kv in case.requests)
        assert case.kv_bytes == (min(tokens, case.longest or tokens) if sparse else tokens) * bytes_per_token
        assert case.turnover == (case.kv_bytes if isinstance(case, Case) and not sparse else case.bytes_moved)
        assert case.pool_bytes == case.pool_tokens * bytes_per_token < most, case
        if case.kv_bytes > 150_000_000:  # where bandwidth is the limit, 60 MB of L2 are under 1 % of a pass
            assert 60e6 / (case.num_slots * case.turnover) < 0.01, case


def test_bytes_and_flop_of_a_case():
    case = Case(16, 128, 8192)
    assert case.kv_bytes == 1_207_959_552
    assert case.bytes_moved == 1_207_959_552 + 128 * 16 * (576 + 512) * 2
    assert case.flop == 16 * 2176 * 128 * 8192


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.label)
def test_slots_are_disjoint_random_pages_of_the_pool(case, small_rotation):
    pool = KvPool(case.pool_tokens + 5, torch.device("cpu"))
    inputs = make_inputs(case, pool, torch.device("cpu"))
    ids = inputs.kv_indices.flatten()
    assert inputs.num_slots == case.num_slots > 1
    assert ids.unique().numel() == ids.numel() == case.num_slots * case.batch * case.pages[0]
    assert ids.min() >= 0
    assert ids.max() < inputs.ckv_cache.shape[0]
    assert not torch.equal(ids, ids.sort().values)
    assert inputs.kv_indptr.tolist() == [i * case.pages[0] for i in range(case.batch + 1)]
    last = case.page_size if inputs.kv_last_page_len is None else inputs.kv_last_page_len[0].item()
    assert (case.pages[0] - 1) * case.page_size + last == case.kv_len
    assert inputs.ckv_cache.shape[1:] == (case.page_size, 512)
    assert inputs.kpe_cache.shape[1:] == (case.page_size, 64)
    assert (inputs.ckv_cache.stride(1) == 576) == (case.layout == "fused")
    for tensor in (inputs.ckv_cache, inputs.kpe_cache, inputs.q_nope, inputs.q_pe):
        assert tensor.dtype == cases_module.DTYPES[case.dtype]
        assert 0.9 < tensor.float().std() < 1.1
    assert inputs.q_nope.shape == inputs.out.shape == (case.num_slots, case.batch, case.num_heads, 512)


def test_separate_caches_do_not_overlap(small_rotation):
    case = Case(4, 2, 100, 16)
    pool = KvPool(case.pool_tokens, torch.device("cpu"))
    ckv, kpe, _, scales = pool.caches(case)
    assert scales == {}
    assert ckv.data_ptr() + ckv.numel() * 2 <= kpe.data_ptr()


def test_bytes_of_fp8_cases():
    for q_fp8, q_bytes in ((False, 1152), (True, 576)):
        case = Case(16, 128, 8192, kv_format="tensor", q_fp8=q_fp8)
        assert case.kv_bytes == 128 * 8192 * 576
        assert case.bytes_moved == case.kv_bytes + 128 * 16 * (q_bytes + 1024)
        assert case.flop == Case(16, 128, 8192).flop
    # the rope of e4m3 queries is 16-bit where that of the cache is
    token = Case(16, 2, 100, kv_format="token", q_fp8=True)
    assert token.bytes_moved == 200 * (512 + 128 + 4) + 2 * 16 * (512 + 128 + 1024)
    assert Case(16, 2, 100, kv_format="group").kv_bytes == 200 * 656


def test_fp8_presets_and_bars():
    preset = PRESETS["fp8"]
    assert len(set(preset)) == len(preset) == 27 * 2 + 2 * 9 * 2
    for kv_format, lengths in (("tensor", (1024, 8192, 32768)), ("token", (8192,)), ("group", (8192,))):
        expected = {
            Case(h, b, n, kv_format=kv_format, q_fp8=q)
            for h in (16, 64, 128)
            for b in (1, 16, 128)
            for n in lengths
            for q in (False, True)
        }
        assert {case for case in preset if case.kv_format == kv_format} == expected
    assert {(c.num_heads, c.groups, c.kv_format, c.q_fp8) for c in PRESETS["fp8_prefill"]} == {
        (h, (group,), f, q)
        for h, group in ((16, (4, 2048, 8192)), (16, (16, 128, 8192)), (128, (1, 2048, 8192)))
        for f, q in (("", False), *((f, q) for f in ("tensor", "token", "group") for q in (False, True)))
    }
    fast = PRESETS["fp8_fast"]
    assert len(set(fast)) == len(fast) == 3 * 2 * 2 * 2 * 2
    assert {case.accuracy for case in fast} == {"high", "fast"}
    assert {dataclasses.replace(c, accuracy="") for c in fast} == {
        Case(h, b, n, kv_format=f) for h in (64, 128) for b in (16, 128) for n in (1024, 8192) for f in KV_FORMATS
    }
    got = {(b.case.num_heads, b.case.batch, b.case.q_fp8): (b.kind, b.reach) for b in cases_module.FP8_BARS}
    times = {(16, 128): 150, (64, 128): 185, (128, 128): 300, (16, 16): 27, (64, 16): 32, (128, 16): 48}
    assert got == {(h, b, q): ("us", us) for (h, b), us in times.items() for q in (False, True)}
    assert all(bar.case in preset and bar.case.kv_len == 8192 for bar in cases_module.FP8_BARS)
    rows = [row_of(Case(16, 16, 8192, kv_format="tensor", q_fp8=q), us) for q, us in ((False, 27.5), (True, 26.5))]
    assert [one.met for one in targets.judge(record_of(rows))] == [False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_format": "row"}, "kv_format: expected one of tensor, token, group, got 'row'"),
        ({"q_fp8": True}, "q_fp8:"),
        ({"accuracy": "best"}, "accuracy: expected one of high, native, fast, got 'best'"),
    ],
)
def test_wrong_fp8_cases(options, message):
    with pytest.raises(ValueError, match=message):
        Case(16, 1, 64, **options)


@pytest.mark.parametrize("case", FP8_CASES, ids=lambda case: case.label)
def test_fp8_pools_hold_random_data_of_the_format(case, small_rotation):
    device = torch.device("cpu")
    inputs = make_inputs(case, KvPool.of([case], device), device)
    ckv, kpe, scales = inputs.ckv_cache, inputs.kpe_cache, inputs.scales
    ids = inputs.kv_indices.flatten()
    assert ids.unique().numel() == ids.numel() == case.num_slots * case.batch * case.pages[0]
    assert ids.max() < ckv.shape[0]
    dtype = cases_module.DTYPES[case.dtype]
    rope_dtype = torch.float8_e4m3fn if case.kv_format == "tensor" else dtype
    assert (ckv.dtype, kpe.dtype) == (torch.float8_e4m3fn, rope_dtype)
    assert (inputs.q_nope.dtype is torch.float8_e4m3fn) is case.q_fp8
    assert (inputs.q_pe.dtype is torch.float8_e4m3fn) is (case.q_fp8 and case.kv_format == "tensor")
    assert inputs.out.dtype is dtype
    strides = {"tensor": 576, "token": 640, "group": 656}
    assert ckv.stride(0) == case.page_size * (strides[case.kv_format] if case.layout == "fused" else 512)
    if case.kv_format == "tensor":
        real = ckv.float() * scales["ckv_scale"]
        assert 0.95 < (kpe.float() * scales["kpe_scale"]).std() < 1.05
        assert 0.95 < real.std() < 1.05
        parts = (ckv, kpe)
    else:
        array = scales["ckv_scale_arr"]
        assert array.shape == (*ckv.shape[:2], {"token": 1, "group": 4}[case.kv_format])
        if case.kv_format == "group":
            assert set((array * 64).unique().tolist()) == {0.5, 1.0, 2.0}, "powers of two"
        else:
            assert 0.5 <= array.amin() * 64 < 0.6 < 1.4 < array.amax() * 64 <= 1.5
        assert 0.9 < kpe.float().std() < 1.1
        parts = (ckv, kpe, array)
    assert (ckv.view(torch.uint8) & 0x7F == 0).float().mean() < 1e-3
    assert 60 < ckv.float().std() < 68
    used = [(x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()) for x in parts]
    if case.layout == "separate":
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(used))
    problem_scales = scales | {"out": inputs.out[0], "lse": inputs.lse[0]}
    problem = check_decode(
        inputs.q_nope[0], inputs.q_pe[0], ckv, kpe, inputs.kv_indptr, inputs.kv_indices[0], 0.07,
        inputs.kv_last_page_len, **problem_scales,
    )  # fmt: skip
    assert (problem.kv_format, problem.q_fp8) == (case.kv_format, case.q_fp8)
    # what the kernels ask of addresses, from the pool's on, which is aligned on a GPU
    assert all((begin - ckv.data_ptr()) % 16 == 0 for begin, _ in used)


def test_records_without_a_format_are_of_16_bit_caches():
    case = {"num_heads": 16, "batch": 1, "kv_len": 8192, "page_size": 64, "dtype": "bfloat16", "layout": "separate"}
    assert cases_module.case_of({"case": case}) == Case(16, 1, 8192)
    groups = {"num_heads": 16, "groups": [[4, 2048, 8192]], "page_size": 64, "dtype": "bfloat16", "causal": True}
    assert cases_module.case_of({"case": groups}) == cases_module.PrefillCase(16, ((4, 2048, 8192),))
