"""The bench without a GPU: grid, rotation, arithmetic, record, comparison, command line; the timer is a fake."""

import dataclasses
import itertools
import json
import math
import os
import signal
import sys
import types

import pytest
import torch

from mla_cute.bench import __main__ as command
from mla_cute.bench import cases as cases_module
from mla_cute.bench import peers as peers_module
from mla_cute.bench import report, runner
from mla_cute.bench.cases import BARS, PRESETS, PUBLIC_BEST_GPU, PUBLIC_BEST_US, Case
from mla_cute.gpu import GpuFacts
from mla_cute.problem import check_decode
from mla_cute.reference import decode_reference, decode_reference_block_table, prefill_reference

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
CEILINGS = {"read_gbps": 4000.0, "cublas_bf16_tflops": 800.0}
H200 = GpuFacts(0, PUBLIC_BEST_GPU, (9, 0), 132, 141 << 30, 60 << 20, "580.1", 1980, 3201, None)
SMALL = [Case(4, 2, 100, 16), Case(2, 1, 64, 64, "float16", "fused"), Case(3, 3, 7, 1), Case(1, 1, 128, 64)]


class FakeTimer:
    """Runs what it is given once and answers with given times; a captured graph says what it holds."""

    device = torch.device("cpu")

    def __init__(self, us=100.0, plan_us=6.1):
        self.us, self.plan_us, self.measured = us, plan_us, []

    def capture(self, fn):
        return fn

    def samples(self, replays, seconds, at_least=24):
        for replay in replays:
            replay()
        self.measured.append(len(replays))
        if getattr(replays[0], "__name__", "") == "update":
            return [self.plan_us] * at_least
        return [self.us + i for i in range(-1, 9)]  # median us + 3.5, 90 % at us + 8

    def host_us(self, fn, calls=50, chunks=20):
        fn()
        return 12.5

    def synchronize(self):
        pass


class Plan:
    def __init__(self):
        self.updates = 0

    def update(self):
        self.updates += 1


class FakeLibrary(runner.Library):
    """The references behind the library's functions, with a record of what the bench asked of its planners."""

    @classmethod
    def make(cls, decode=decode_reference, prefill=prefill_reference):
        plans, asked = [], []

        def plan(*indptrs, **options):
            asked.append((*indptrs, options))
            plans.append(Plan())
            return plans[-1]

        def calling(function):
            def call(*args, plan, config, batch_invariant, **options):
                assert config is None
                assert batch_invariant is False
                assert plan is None or plan in plans
                return function(*args, **options)

            return call

        library = cls(calling(decode), plan, calling(prefill), plan)
        object.__setattr__(library, "asked", asked)
        return library


def shrink_rotation(monkeypatch):
    monkeypatch.setattr(cases_module, "ROTATION_BYTES", 500_000)
    monkeypatch.setattr(cases_module, "ROTATION_TARGET", 500_000)


@pytest.fixture
def small_rotation(monkeypatch):
    shrink_rotation(monkeypatch)


def bench(cases, library=None, timer=None, **options):
    library = library or FakeLibrary.make()
    return runner.run(cases, timer=timer or FakeTimer(), library=library, ceilings=lambda _: dict(CEILINGS), **options)


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
    assert cases_module.HOST_BAR == (15, 10)
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
    judged = runner.judge_bars(rows, {})
    assert [(bar["measured"], bar["met"]) for bar in judged] == [(1.04, True), (1.06, False)]
    assert "time over that of H=16 B=16 L=" in judged[0]["what"]


@pytest.mark.parametrize("preset", PRESETS)
def test_rotation_moves_more_than_300_mb_before_a_page_comes_round_again(preset):
    for case in PRESETS[preset]:
        assert case.num_slots * case.turnover > 300_000_000, case
        assert case.num_slots * case.turnover >= 8_000_000_000 or case.num_slots >= 64, case
        # one slot of the grid's largest cases is more
        most = max(12_000_000_000, 1.02 * case.turnover)
        assert case.num_slots * case.bytes_moved < most, case
        bytes_per_token = {"": 1152, "tensor": 576, "token": 644, "group": 656}[case.kv_format]
        assert case.kv_bytes == sum(kv for _, kv in case.requests) * bytes_per_token
        assert case.turnover == (case.kv_bytes if isinstance(case, Case) else case.bytes_moved)
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
    pool = runner.KvPool(case.pool_tokens + 5, torch.device("cpu"))
    inputs = runner.make_inputs(case, pool, torch.device("cpu"))
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
    pool = runner.KvPool(case.pool_tokens, torch.device("cpu"))
    ckv, kpe, _, scales = pool.caches(case)
    assert scales == {}
    assert ckv.data_ptr() + ckv.numel() * 2 <= kpe.data_ptr()


FP8_CASES = [
    Case(4, 2, 100, page_size, dtype, layout, kv_format, q_fp8)
    for kv_format, page_size in (("tensor", 16), ("token", 1), ("group", 64))
    for layout in ("separate", "fused")
    for dtype, q_fp8 in (("bfloat16", False), ("bfloat16", True), ("float16", False))
]


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
        (h, ((4, 2048, 8192),), f, q) for h in (16, 128) for f in ("tensor", "token", "group") for q in (False, True)
    }
    got = {(b.case.num_heads, b.case.batch, b.case.q_fp8): (b.kind, b.reach) for b in cases_module.FP8_BARS}
    times = {(16, 128): 150, (64, 128): 185, (128, 128): 300, (16, 16): 27, (64, 16): 32, (128, 16): 48}
    assert got == {(h, b, q): ("us", us) for (h, b), us in times.items() for q in (False, True)}
    assert all(bar.case in preset and bar.case.kv_len == 8192 for bar in cases_module.FP8_BARS)
    rows = [row_of(Case(16, 16, 8192, kv_format="tensor", q_fp8=q), us) for q, us in ((False, 27.5), (True, 26.5))]
    assert [bar["met"] for bar in runner.judge_bars(rows, {})] == [False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"kv_format": "row"}, "kv_format: expected one of tensor, token, group, got 'row'"), ({"q_fp8": True}, "q_fp8:")],
)
def test_wrong_fp8_cases(options, message):
    with pytest.raises(ValueError, match=message):
        Case(16, 1, 64, **options)


@pytest.mark.parametrize("case", FP8_CASES, ids=lambda case: case.label)
def test_fp8_pools_hold_random_data_of_the_format(case, small_rotation):
    device = torch.device("cpu")
    inputs = runner.make_inputs(case, runner.KvPool.of([case], device), device)
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


def test_fp8_rows_are_checked_and_shown(small_rotation):
    cases = [*FP8_CASES, SMALL[0]]
    record = bench(cases)
    assert record["failed"] == 0, report.summary(record)
    rows = json.loads(json.dumps(record, allow_nan=False))["rows"]
    assert {cases_module.case_of(row) for row in rows} == set(cases)
    for row in rows:
        case = Case(**row["case"])
        assert row["check"]["ok"]
        assert row["gbps"] == pytest.approx(case.bytes_moved / 103.6e-6 / 1e9)
        assert row["rotation"]["bytes"] == case.num_slots * case.kv_bytes
        assert "public_best_us" not in row
    shown = {report.cells(row)[4] for row in rows}
    assert {"tensor/bf16", "tensor/e4m3", "token/fp16", "group/bf16/fused", "group/e4m3/fused", "bf16"} <= shown
    assert report._types(Case(4, 2, 100, dtype="float16", kv_format="token", q_fp8=True)) == "token/e4m3/fp16"
    labels = [case.label for case in cases]
    assert "H=4 B=2 L=100 page 64 bfloat16 fused group FP8, q e4m3" in labels
    assert len(set(labels)) == len(labels)
    assert any(text.startswith("host time of one call with an FP8 cache: 12.5") for text in report.summary(record))


@pytest.mark.parametrize("case", [FP8_CASES[1], FP8_CASES[6], FP8_CASES[13]], ids=lambda case: case.label)
@pytest.mark.parametrize("name", ["ckv_scale", "kpe_scale", "ckv_scale_arr", "q_scale"])
def test_speed_of_a_kernel_that_forgets_a_scale_is_marked(case, name, small_rotation):
    def forgets(*args, **options):
        if options.get(name) is not None:
            options[name] = torch.full_like(options[name], 1 / 64) if name == "ckv_scale_arr" else 1.0
        return decode_reference(*args, **options)

    [row] = bench([case], FakeLibrary.make(forgets))["rows"]
    there = name in runner.make_inputs(case, runner.KvPool.of([case], torch.device("cpu")), torch.device("cpu")).scales
    assert row["check"]["ok"] is not there


def test_peers_leave_fp8_caches_out(small_rotation, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_mla", fake_flash_mla())
    found, status = peers_module.installed()
    [row] = bench([FP8_CASES[0]], peers=(found, status))["rows"]
    assert row["peers"]["flash_mla"] == {"unsupported": "an FP8 cache: peers are timed on 16-bit ones"}


def test_records_without_a_format_are_of_16_bit_caches():
    case = {"num_heads": 16, "batch": 1, "kv_len": 8192, "page_size": 64, "dtype": "bfloat16", "layout": "separate"}
    assert cases_module.case_of({"case": case}) == Case(16, 1, 8192)
    groups = {"num_heads": 16, "groups": [[4, 2048, 8192]], "page_size": 64, "dtype": "bfloat16", "causal": True}
    assert cases_module.case_of({"case": groups}) == cases_module.PrefillCase(16, ((4, 2048, 8192),))


def test_select_fp8_cases():
    options = {"kv_format": "group", "q_fp8": True}
    assert command.select_cases([], heads=[8], batches=[2], kv_lens=[64], **options) == [Case(8, 2, 64, **options)]
    assert all(case.kv_format == "group" and case.q_fp8 for case in command.select_cases(["quick"], **options))
    assert command.select_cases(["fp8"]) == list(PRESETS["fp8"])


def test_fp8_prefill_rows(small_rotation):
    cases = [
        cases_module.PrefillCase(4, ((2, 5, 100),), 16, kv_format=kv_format, q_fp8=q_fp8)
        for kv_format in ("tensor", "token", "group")
        for q_fp8 in (False, True)
    ]
    record = bench(cases, cublas=lambda timer: 700.0)
    assert record["failed"] == 0, report.summary(record)
    assert {cases_module.case_of(row) for row in json.loads(json.dumps(record))["rows"]} == set(cases)


def test_record_rows_and_arithmetic(small_rotation):
    library, timer = FakeLibrary.make(), FakeTimer()
    seen, steps = [], []
    record = bench(
        SMALL,
        library,
        timer,
        on_row=seen.append,
        progress=lambda done, total, what: steps.append((done, total)),
        preset="x",
    )
    assert record["complete"]
    assert record["failed"] == 0
    assert record["preset"] == "x"
    assert record["schema"] == 1
    assert record["kind"] == "mla_cute.bench.decode"
    assert [Case(**row["case"]) for row in record["rows"]] == sorted(SMALL, key=lambda case: case.dtype)
    assert seen == record["rows"]
    assert steps[0][0] == 0
    assert steps[-1] == (len(SMALL) + 2, len(SMALL) + 2)
    assert record["versions"]["torch"] == torch.__version__
    assert len(record["source_sha256"]) == 64
    assert set(record["method"]) >= {"us", "plan_us", "us_amortised", "us_chained", "rotation", "ceilings"}
    assert record["host"]["call_us"] == 12.5
    json.dumps(record, allow_nan=False)
    for row in record["rows"]:
        case = Case(**row["case"])
        assert row["us"] == 103.5
        assert row["us_min"] == 99
        assert row["us_p90"] == 108
        assert row["samples"] == 10
        assert row["plan_us"] == 6.1
        assert row["us_amortised"] == pytest.approx(103.6)
        calls = case.num_slots * -(-4 // case.num_slots)
        assert row["us_chained"] == pytest.approx(103.5 / calls)
        assert row["gbps"] == pytest.approx(case.bytes_moved / 103.6e-6 / 1e9)
        assert row["tflops"] == pytest.approx(case.flop / 103.6e-6 / 1e12)
        assert row["read_share"] == pytest.approx(row["gbps"] / 4000)
        assert row["cublas_share"] == pytest.approx(row["tflops"] / 800)
        assert row["rotation"] == {"slots": case.num_slots, "bytes": case.num_slots * case.kv_bytes}
        assert row["check"]["ok"]
        assert row["check"]["rel_err"] < 1e-3
        assert "public_best_us" not in row
    for kv_indptr, options in library.asked:
        assert options["num_kv_indices"] == kv_indptr[-1]
    # Per case: one graph per slot, the plan's graph, the chain.
    slots = [Case(**row["case"]).num_slots for row in record["rows"]]
    assert timer.measured[1:] == [n for case_slots in slots for n in (case_slots, 1, 1)]


def test_ceilings_of_start_and_end_the_larger_counts(small_rotation):
    answers = iter(
        [{"read_gbps": 4000.0, "cublas_bf16_tflops": 820.0}, {"read_gbps": 4400.0, "cublas_bf16_tflops": 800.0}]
    )
    record = runner.run(SMALL[:1], timer=FakeTimer(), library=FakeLibrary.make(), ceilings=lambda _: next(answers))
    assert record["ceilings"]["used"] == {"read_gbps": 4400.0, "cublas_bf16_tflops": 820.0}
    row = record["rows"][0]
    assert row["read_share"] == row["gbps"] / 4400
    assert row["cublas_share"] == row["tflops"] / 820


def test_public_best_only_on_the_gpu_it_was_measured_on():
    row = {"case": vars(Case(16, 1, 8192)), "gbps": 1.0, "tflops": 1.0, "us_amortised": 11.7}
    runner.apply_ceilings(row, CEILINGS, "NVIDIA H100 80GB HBM3")
    assert row["public_best_us"] == 23.4
    assert "public_best_ratio" not in row
    runner.apply_ceilings(row, CEILINGS, PUBLIC_BEST_GPU)
    assert row["public_best_ratio"] == pytest.approx(2.0)
    for other in (Case(16, 1, 8192, page_size=1), Case(16, 1, 8192, dtype="float16"), Case(16, 1, 4096)):
        row = {"case": vars(other), "gbps": 1.0, "tflops": 1.0, "us_amortised": 11.7}
        runner.apply_ceilings(row, CEILINGS, PUBLIC_BEST_GPU)
        assert "public_best_us" not in row


def test_compute_bound_cases_are_set_beside_cublas_at_their_own_clock(small_rotation):
    record = bench([Case(95, 1, 64), Case(64, 1, 64)], cublas=lambda timer: 700.0)
    many, few = record["rows"]
    assert many["cublas_share_beside"] == pytest.approx(many["tflops"] / 700)
    assert many["cublas_share"] == pytest.approx(many["tflops"] / 800)
    assert "cublas_share_beside" not in few
    assert sum("right after it, 700 TFLOP/s" in text for text in report.summary(record)) == 1


def row_of(case, us, read=0.5, cublas=0.5):
    return {"case": vars(case), "us_amortised": us, "read_share": read, "cublas_share": cublas}


def test_bars_are_judged_in_their_own_direction():
    rows = [
        row_of(Case(16, 128, 8192), 300, read=0.95),
        row_of(Case(128, 64, 8192), 300, cublas=0.80),
        row_of(Case(16, 1, 8192), 10.9),
        row_of(Case(16, 16, 1024), 9.6),
        row_of(Case(16, 128, 8192, page_size=1), 310),
        {"case": vars(Case(64, 128, 8192)), "error": "broken"},
    ]
    judged = {bar["what"]: bar for bar in runner.judge_bars(rows, {"call_us": 15.5})}
    assert len(judged) == 6
    met = {what.split(",")[0]: bar["met"] for what, bar in judged.items()}
    assert met == {
        "H=16 B=128 L=8192 page 64 bfloat16": True,
        "H=128 B=64 L=8192 page 64 bfloat16": False,
        "H=16 B=1 L=8192 page 64 bfloat16": True,
        "H=16 B=16 L=1024 page 64 bfloat16": False,
        "H=16 B=128 L=8192 page 1 bfloat16": True,
        "host time of one call with a plan": False,
    }
    one = judged["H=16 B=128 L=8192 page 1 bfloat16, speed over that of page 64"]
    assert one["measured"] == pytest.approx(300 / 310)
    assert one["reach"] == 0.90


def wrong_page(q_nope, q_pe, ckv_cache, kpe_cache, kv_indptr, kv_indices, sm_scale, **options):
    return decode_reference(q_nope, q_pe, ckv_cache, kpe_cache, kv_indptr, kv_indices.roll(1), sm_scale, **options)


def writes_nothing(q_nope, *args, **options):
    return None


@pytest.mark.parametrize("decode", [wrong_page, writes_nothing])
def test_speed_of_a_wrong_kernel_is_marked(decode, small_rotation):
    record = bench(SMALL[:1], FakeLibrary.make(decode))
    row = record["rows"][0]
    assert not row["check"]["ok"]
    assert record["failed"] == 1
    assert report.cells(row)[-1].endswith("WRONG")
    assert any(text.startswith("WRONG") for text in report.summary(record))
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize("kv_format", ["", "token"])
def test_wrong_lse_alone_is_caught(kv_format, small_rotation):
    def natural_log(*args, **options):
        return decode_reference(*args, **options, lse_base="e")

    case = dataclasses.replace(SMALL[0], kv_format=kv_format)
    check = bench([case], FakeLibrary.make(natural_log))["rows"][0]["check"]
    assert not check["ok"]
    assert check["rel_err"] < 1e-3
    assert check["lse_err"] > 0.1


@pytest.mark.parametrize(
    ("kv_format", "share", "ok"), [("tensor", 0.9, True), ("tensor", 1.1, False), ("", 0.9, False)]
)
def test_e4m3_noise_of_a_large_lse_is_allowed(kv_format, share, ok, small_rotation):
    def off(*args, lse, **options):
        decode_reference(*args, lse=lse, **options)
        lse.mul_(1 + share * 3 * runner.E4M3_NOISE)

    case = dataclasses.replace(SMALL[0], kv_len=1024, kv_format=kv_format)
    check = bench([case], FakeLibrary.make(off))["rows"][0]["check"]
    assert check["ok"] == ok
    assert check["lse_err"] > runner.FP8_LSE_ERR_LIMIT


def test_a_failing_case_keeps_the_others(small_rotation):
    def no_page_one(q_nope, q_pe, ckv_cache, *args, **options):
        if ckv_cache.shape[1] == 1:
            raise RuntimeError("page size 1 is broken")
        return decode_reference(q_nope, q_pe, ckv_cache, *args, **options)

    record = bench(SMALL, FakeLibrary.make(no_page_one))
    errors = [row for row in record["rows"] if "error" in row]
    assert len(record["rows"]) == len(SMALL)
    assert record["failed"] == 1
    assert [row["case"]["page_size"] for row in errors] == [1]
    assert errors[0]["error"] == "RuntimeError: page size 1 is broken"
    assert report.cells(errors[0])[5] == "error"
    assert any("page size 1 is broken" in text for text in report.summary(record))


def _interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [_interrupt, lambda: os.kill(os.getpid(), signal.SIGTERM)], ids=["ctrl_c", "sigterm"])
def test_interrupt_keeps_the_finished_rows(small_rotation, stop):
    handler = signal.getsignal(signal.SIGTERM)
    record = bench(SMALL, on_row=lambda row: stop())
    assert signal.getsignal(signal.SIGTERM) is handler
    assert len(record["rows"]) == 1
    assert not record["complete"]
    assert record["rows"][0]["read_share"] > 0
    assert any("INCOMPLETE" in text for text in report.summary(record))


def test_gpu_facts_are_in_the_record(small_rotation, monkeypatch):
    monkeypatch.setattr(runner, "occupy", lambda device: None)
    monkeypatch.setattr(runner.gpu_facts, "clocks", lambda gpu: {"sm_mhz": 1755, "memory_mhz": 3201, "power_w": 600})
    record = bench(SMALL[:1], gpu=H200)
    assert record["gpu"]["name"] == PUBLIC_BEST_GPU
    assert record["gpu"]["sm_count"] == 132
    assert record["gpu"]["driver"] == "580.1"
    assert record["gpu"]["clocks_under_load"]["sm_mhz"] == 1755
    assert report.summary(record)[0].startswith("NVIDIA H200, 132 SMs, driver 580.1, SM clock under load 1755")


def test_write_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "record.json"
    runner.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        runner.write_json(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


def test_compare(tmp_path, small_rotation, capsys):
    old, new = bench(SMALL[:3], timer=FakeTimer(us=200)), bench(SMALL[1:], timer=FakeTimer(us=100))
    for name, record in (("a.json", old), ("b.json", new)):
        runner.write_json(tmp_path / name, record)
    assert command.main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    text = capsys.readouterr().out
    ratio = 203.6 / 103.6
    assert text.count(f"{ratio:.3f}") == 2 + 3  # two cells; mean, lowest, highest
    assert "only in a: H=4 B=2 L=100 page 16 bfloat16" in text
    assert "only in b: H=1 B=1 L=128 page 64 bfloat16" in text


def test_compare_warns_of_different_gpus(small_rotation):
    a, b = bench(SMALL[:1]), bench(SMALL[:1])
    a["gpu"], b["gpu"] = {"name": "NVIDIA H200"}, {"name": "NVIDIA H100"}
    assert any("different GPUs" in text for text in report.compare(a, b)[1])


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ("[]", "not a record"), ('{"kind": "mla_cute.bench.decode", "schema": 99}', "schema 99")],
)
def test_compare_names_the_file_that_is_no_record(tmp_path, text, message, capsys):
    bad = tmp_path / "bad.json"
    bad.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        command.main(["--compare", str(bad), str(bad)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert str(bad) in error
    assert message in error


def test_select_cases():
    assert command.select_cases([]) == list(PRESETS["quick"])
    assert command.select_cases(["table"]) == list(PRESETS["table"])
    assert command.select_cases(["bars", "bars"]) == list(dict.fromkeys(PRESETS["bars"]))
    assert command.select_cases(
        [], heads=[8], batches=[1, 2], kv_lens=[64], page_sizes=[32], dtype_names=["float16"]
    ) == [
        Case(8, 1, 64, 32, "float16"),
        Case(8, 2, 64, 32, "float16"),
    ]
    sizes = command.select_cases(["table"], page_sizes=[1, 16], layout="fused")
    assert len(sizes) == 60
    assert {c.page_size for c in sizes} == {1, 16}
    assert {c.layout for c in sizes} == {"fused"}
    both = command.select_cases(["quick"], heads=[7])
    assert both[: len(PRESETS["quick"])] == list(PRESETS["quick"])
    assert both[-1].num_heads == 7


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["nonsense"],
            "preset: expected one of table, bars, pages, prefill, fp8, fp8_prefill, grid, ragged, quick, got",
        ),
        (["--heads", "129"], "num_heads: expected 1..128, got 129"),
        (["--heads", "16,x"], "expected integers separated by commas, got '16,x'"),
        (["--page-size", "0", "--heads", "16"], "page_size: expected at least 1, got 0"),
        (["--dtype", "fp8"], "got 'fp8'"),
        (["--config", '{"speed": 11}'], "config: unknown fields ['speed']"),
        (["--kv-format", "row"], "invalid choice: 'row'"),
        (["--q-fp8"], "q_fp8: expected a kv_format beside e4m3 queries, got none"),
    ],
)
def test_bad_arguments_are_usage_errors(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_command_writes_table_and_record(tmp_path, monkeypatch, small_rotation, capsys):
    monkeypatch.setattr(runner.Library, "installed", classmethod(lambda cls, *options: FakeLibrary.make()))
    monkeypatch.setattr(command.gpu_facts, "why_not_hopper", lambda: None)
    monkeypatch.setattr(command, "CudaTimer", FakeTimer)
    monkeypatch.setattr(
        command, "run", lambda *args, **options: runner.run(*args, **options, ceilings=lambda _: CEILINGS)
    )
    out = tmp_path / "record.json"
    argv = ["--heads", "4", "--batch", "2", "--kv-len", "100,64", "--page-size", "16", "--out", str(out)]
    assert command.main(argv) == 0
    text = capsys.readouterr().out
    assert "103.5" in text
    assert "peer flashinfer: absent" in text
    assert "peer flash_mla: absent" in text
    record = report.load(out)
    assert [row["case"]["kv_len"] for row in record["rows"]] == [100, 64]
    assert record["peers"]["flashinfer"]["present"] is False
    assert "ModuleNotFoundError" in record["peers"]["flashinfer"]["why"]
    monkeypatch.setattr(runner.Library, "installed", classmethod(lambda cls, *options: FakeLibrary.make(wrong_page)))
    assert command.main(argv) == 1
    assert "WRONG" in capsys.readouterr().out


def test_command_without_a_hopper_gpu(monkeypatch, capsys):
    monkeypatch.setattr(command.gpu_facts, "why_not_hopper", lambda: "torch sees no CUDA GPU")
    assert command.main(["quick"]) == 2
    assert "nothing to time: torch sees no CUDA GPU" in capsys.readouterr().err


def fake_flash_mla():
    def flash_mla_with_kvcache(q, cache, block_table, seq_lens, head_dim_v, metadata, num_splits, scale, causal):
        assert head_dim_v == 512
        assert metadata == "metadata"
        assert num_splits == "splits"
        assert causal is False
        q, cache = q.squeeze(1), cache.squeeze(2)
        out, lse = decode_reference_block_table(
            q[..., :512], q[..., 512:], cache[..., :512], cache[..., 512:], block_table, seq_lens, scale, lse_base="e"
        )
        return out.unsqueeze(1), lse

    module = types.ModuleType("flash_mla")
    module.__version__ = "1.0.0"
    module.flash_mla_with_kvcache = flash_mla_with_kvcache
    module.get_mla_metadata = lambda seq_lens, heads_per_kv_head, kv_heads: ("metadata", "splits")
    return module


def fake_flashinfer():
    class Wrapper:
        def __init__(self, workspace):
            assert workspace.numel() == 128 << 20

        def plan(self, **options):
            self.options = options

        def run(self, q_nope, q_pe, ckv_cache, kpe_cache, *, out):
            o = self.options
            assert o["page_size"] == ckv_cache.shape[1]
            assert o["num_heads"] == q_nope.shape[1]
            assert o["causal"] is False
            pages = o["kv_indptr"][1:] - o["kv_indptr"][:-1]
            last = (o["kv_len_arr"] - (pages - 1) * o["page_size"]).int()
            decode_reference(
                q_nope,
                q_pe,
                ckv_cache,
                kpe_cache,
                o["kv_indptr"],
                o["kv_indices"],
                o["sm_scale"],
                kv_last_page_len=last,
                out=out,
            )

    module, mla = types.ModuleType("flashinfer"), types.ModuleType("flashinfer.mla")
    module.__version__ = "0.6.0"
    module.mla = mla
    mla.BatchMLAPagedAttentionWrapper = Wrapper
    return module


def test_peers_are_timed_and_checked(monkeypatch, small_rotation):
    monkeypatch.setitem(sys.modules, "flash_mla", fake_flash_mla())
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer())
    monkeypatch.setitem(sys.modules, "flashinfer.mla", sys.modules["flashinfer"].mla)
    found, status = peers_module.installed()
    assert status == {
        "flashinfer": {"present": True, "version": "0.6.0"},
        "flash_mla": {"present": True, "version": "1.0.0"},
    }
    # Separate caches hold other values than the pool read as one fused buffer: a peer is checked on what it reads.
    cases = [Case(4, 2, 100, 16), Case(2, 2, 200, 64, layout="fused"), Case(2, 2, 200, 64)]
    record = bench(cases, peers=(found, status))
    paged, fused, separate = record["rows"]
    assert paged["peers"]["flash_mla"] == {"unsupported": "page size 16: FlashMLA has 64 only"}
    for peer in (
        paged["peers"]["flashinfer"],
        fused["peers"]["flashinfer"],
        fused["peers"]["flash_mla"],
        separate["peers"]["flash_mla"],
    ):
        assert peer["us"] == 103.5
        assert peer["check"]["ok"]
        assert peer["check"]["lse_err"] is None
    names = ["flashinfer", "flash_mla"]
    assert report.cells(fused, names)[-2:] == ("103.5 (1.00x)", "103.5 (1.00x)")
    assert report.cells(paged, names)[-1] == "unsupported"


def test_a_peer_that_raises_is_recorded(monkeypatch, small_rotation):
    module = fake_flash_mla()

    def out_of_date(*args):
        raise TypeError("another interface")

    module.get_mla_metadata = out_of_date
    monkeypatch.setitem(sys.modules, "flash_mla", module)
    found, status = peers_module.installed()
    row = bench([Case(2, 2, 200, 64)], peers=(found, status))["rows"][0]
    assert row["peers"]["flash_mla"] == {"error": "TypeError: another interface"}
    assert row["check"]["ok"]
