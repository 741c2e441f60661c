"""The bench's prefill cases without a GPU: arithmetic, slots, record, bars, peers; the timer is a fake."""

import dataclasses
import json
import sys
import types

import pytest
import torch
from bench_case import CEILINGS, FakeLibrary, FakeTimer, bench, record_of

from mla_cute.bench import cases as cases_module
from mla_cute.bench import command, report, runner, targets
from mla_cute.bench import peers as peers_module
from mla_cute.bench.cases import PREFILL_BARS, PRESETS, Case, PrefillCase, case_of
from mla_cute.bench.inputs import KvPool, make_inputs
from mla_cute.reference import decode_reference, prefill_reference, prefill_reference_block_table

SMALL = [
    PrefillCase(4, ((2, 5, 100),), 16),
    PrefillCase(2, ((3, 1, 40), (1, 30, 64)), 64, "float16", "fused"),
    PrefillCase(3, ((1, 20, 20),), 1),
    PrefillCase(1, ((2, 3, 128),), 64, causal=False),
]


def brute_pairs(case):
    """Pairs counted one by one."""
    return sum(
        1
        for q_len, kv_len in case.requests
        for i in range(q_len)
        for key in range(kv_len)
        if not case.causal or key <= kv_len - q_len + i
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [((2, 5, 100),), ((1, 20, 20), (3, 1, 7)), ((2, 9, 4),), ((1, 1, 1),)])
def test_flop_is_that_of_the_visible_pairs(groups, causal):
    case = PrefillCase(6, groups, causal=causal)
    assert case.visible_pairs == brute_pairs(case)
    assert case.flop == brute_pairs(case) * 6 * 2 * 1088


def test_figures_of_a_preset_case():
    case = PrefillCase(128, ((4, 2048, 8192),))
    assert case.flop == 4 * sum(8192 - 2048 + i + 1 for i in range(2048)) * 128 * 2 * 1088
    assert case.kv_bytes == 4 * 8192 * 1152
    assert case.bytes_moved == 4 * 8192 * 1152 + 4 * 2048 * 128 * (576 + 512) * 2
    assert case.total_q == 8192
    # one query token per request is decode, whichever way it is called
    one, decode = PrefillCase(16, ((64, 1, 8192),)), Case(16, 64, 8192)
    for name in ("flop", "bytes_moved", "kv_bytes", "requests", "pages"):
        assert getattr(one, name) == getattr(decode, name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((16, ()), "groups: expected"),
        ((16, ((1, 0, 5),)), "groups: expected"),
        ((16, ((1, 5),)), "groups: expected"),
        ((129, ((1, 1, 5),)), "num_heads: expected 1..128, got 129"),
        ((16, ((1, 1, 5),), 0), "page_size: expected at least 1, got 0"),
        ((16, ((1, 1, 5),), 64, "fp8"), "dtype: expected"),
    ],
)
def test_wrong_cases(arguments, message):
    with pytest.raises(ValueError, match=message):
        PrefillCase(*arguments)


def test_bars_and_preset():
    got = {(b.case.num_heads, b.case.groups): (b.kind, b.reach, b.beyond) for b in PREFILL_BARS}
    assert got == {
        (16, ((4, 2048, 8192),)): ("cublas", 0.82, 0.88),
        (128, ((4, 2048, 8192),)): ("cublas", 0.82, 0.88),
        (16, ((16, 512, 4096),)): ("cublas", 0.82, None),
        (128, ((16, 512, 4096),)): ("cublas", 0.82, None),
        (16, ((1, 4096, 4096),)): ("cublas", 0.75, None),
        (128, ((1, 4096, 4096),)): ("cublas", 0.75, None),
        (16, ((128, 2, 8192),)): ("read", 0.94, None),
        (16, ((128, 4, 8192),)): ("read", 0.94, None),
        (128, ((64, 2, 8192),)): ("cublas", 0.84, None),
        (16, ((1, 512, 32768),)): ("cublas", 0.70, None),
    }
    preset = PRESETS["prefill"]
    assert len(set(preset)) == len(preset) == 10 + 2 + 6
    assert all(case.causal and case.dtype == "bfloat16" for case in preset if isinstance(case, PrefillCase))
    for case in preset:
        if case.page_size == 1:
            assert dataclasses.replace(case, page_size=64) in preset
    for heads in (16, 128):
        together = PrefillCase(heads, ((64, 1, 8192), (1, 2048, 8192)))
        assert {together, Case(heads, 64, 8192), PrefillCase(heads, ((1, 2048, 8192),))} <= set(preset)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.label)
def test_slots_of_a_ragged_case(case, small_rotation):
    pool = KvPool(case.pool_tokens + 5, torch.device("cpu"))
    inputs = make_inputs(case, pool, torch.device("cpu"))
    ids = inputs.kv_indices.flatten()
    assert ids.unique().numel() == ids.numel() == case.num_slots * sum(case.pages)
    assert inputs.q_nope.shape == inputs.out.shape == (case.num_slots, case.total_q, case.num_heads, 512)
    assert inputs.lse.shape == inputs.out.shape[:3]
    assert inputs.qo_indptr.diff().tolist() == [q for q, _ in case.requests]
    assert inputs.kv_lens.tolist() == [kv for _, kv in case.requests]
    assert inputs.kv_indptr.diff().tolist() == case.pages
    last = case.page_size if inputs.kv_last_page_len is None else inputs.kv_last_page_len
    assert ((inputs.kv_indptr.diff() - 1) * case.page_size + last).tolist() == inputs.kv_lens.tolist()


def test_record_rows_and_arithmetic(small_rotation):
    library, timer = FakeLibrary.make(), FakeTimer()
    record = bench([*SMALL, Case(4, 2, 100, 16)], library, timer, cublas=lambda timer: 700.0)
    assert record["failed"] == 0, report.summary(record)
    assert record["kind"] == "mla_cute.bench.prefill"
    assert record["host"]["call_us"] == record["host"]["prefill_call_us"] == 12.5
    rows = json.loads(json.dumps(record, allow_nan=False))["rows"]
    assert {case_of(row) for row in rows} == {*SMALL, Case(4, 2, 100, 16)}
    for row in rows:
        case = case_of(row)
        assert row["us_amortised"] == pytest.approx(103.6)
        assert row["gbps"] == pytest.approx(case.bytes_moved / 103.6e-6 / 1e9)
        assert row["tflops"] == pytest.approx(case.flop / 103.6e-6 / 1e12)
        assert row["rotation"] == {"slots": case.num_slots, "bytes": case.num_slots * case.turnover}
        assert row["check"]["ok"]
        assert "public_best_us" not in row
        # cuBLAS beside every prefill, and beside no decode of 4 heads
        assert ("cublas_share_beside" in row) is isinstance(case, PrefillCase)
    planned = [asked for asked in library.asked if len(asked) == 3]
    assert len(planned) == len(SMALL) + 1  # and the case whose host time is taken
    for qo_indptr, kv_indptr, options in planned:
        assert options["total_q"] == qo_indptr[-1]
        assert options["num_kv_indices"] == kv_indptr[-1]
    assert [options["causal"] for *_, options in planned].count(False) == 1
    summary = report.summary(record)
    assert any(text.startswith("host time of one prefill call: 12.5 us") for text in summary)
    assert sum("right after it, 700 TFLOP/s" in text for text in summary) == len(SMALL)


def test_cells_show_query_tokens_and_keys(small_rotation):
    rows = bench([SMALL[0], SMALL[1]])["rows"]
    assert report.cells(rows[0])[:5] == ("4", "2", "5/100", "16", "bf16")
    assert report.cells(rows[1])[:5] == ("2", "3+1", "1/40+30/64", "64", "fp16/fused")
    assert SMALL[1].label == "prefill H=2 3 x 1 of 40 + 1 x 30 of 64 page 64 float16 fused"
    assert SMALL[3].label.endswith(" full")


def one_key_short(*args, kv_last_page_len, **options):
    shorter = None if kv_last_page_len is None else kv_last_page_len - 1
    return prefill_reference(*args, kv_last_page_len=shorter, **options)


def no_mask(*args, causal, **options):
    return prefill_reference(*args, causal=False, **options)


@pytest.mark.parametrize("prefill", [one_key_short, no_mask, lambda *args, **options: None])
def test_speed_of_a_wrong_prefill_is_marked(prefill, small_rotation):
    record = bench([SMALL[0]], FakeLibrary.make(prefill=prefill))
    assert "error" not in record["rows"][0]
    assert not record["rows"][0]["check"]["ok"]
    assert record["failed"] == 1


def row_of(case, us, read=0.5, cublas=0.5):
    return {"case": vars(case), "us_amortised": us, "read_share": read, "cublas_share": cublas}


def test_bars_are_judged():
    long, mtp = PrefillCase(16, ((4, 2048, 8192),)), PrefillCase(16, ((128, 4, 8192),))
    together, single, chunk = (
        PrefillCase(128, ((64, 1, 8192), (1, 2048, 8192))),
        Case(128, 64, 8192),
        PrefillCase(128, ((1, 2048, 8192),)),
    )
    rows = [
        row_of(long, 1000, cublas=0.85),
        row_of(dataclasses.replace(long, page_size=1), 1200),
        row_of(mtp, 300, read=0.93),
        row_of(together, 900),
        row_of(single, 300, cublas=0.85),
        row_of(chunk, 601),
        row_of(PrefillCase(16, ((64, 1, 8192), (1, 2048, 8192))), 1),  # its calls apart are not there
    ]
    judged = {one.what: (one.measured, one.met) for one in targets.judge(record_of(rows, None))}
    assert judged == {
        f"{single.label}, share of cuBLAS": (0.85, True),
        f"{long.label}, share of cuBLAS": (0.85, True),
        f"{mtp.label}, share of read bandwidth": (0.93, False),
        f"{dataclasses.replace(long, page_size=1).label}, speed over that of page 64": (1000 / 1200, False),
        f"{together.label}, time over that of {single.label} and {chunk.label}": (900 / 901, True),
    }


def test_a_bar_without_a_beyond_is_shown(small_rotation, monkeypatch):
    monkeypatch.setattr(cases_module, "PREFILL_BARS", (cases_module.Bar(SMALL[0], "read", 0.94),))
    summary = report.summary(bench([SMALL[0]]))
    assert any(text.startswith("MISSED") and text.endswith("(reach 0.94)") for text in summary)


def test_select_cases_replaces_page_size_and_dtype():
    cases = command.select_cases(["prefill"], page_sizes=[16], dtype_names=["float16"], layout="fused")
    # the two page-1 twins become cases that are there already
    assert len(cases) == len(PRESETS["prefill"]) - 2
    assert {(c.page_size, c.dtype, c.layout) for c in cases} == {(16, "float16", "fused")}
    assert command.select_cases(["prefill"]) == list(PRESETS["prefill"])


def test_compare_reads_prefill_records(tmp_path, small_rotation, capsys):
    for name, us in (("a.json", 200), ("b.json", 100)):
        runner.write_json(tmp_path / name, bench(SMALL[:2], timer=FakeTimer(us=us)))
    assert command.main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    text = capsys.readouterr().out
    assert text.count(f"{203.6 / 103.6:.3f}") == 2 + 3
    assert "1/40+30/64" in text


def test_command_times_the_preset(tmp_path, monkeypatch, small_rotation, capsys):
    monkeypatch.setattr(runner.Library, "installed", classmethod(lambda cls, *options: FakeLibrary.make()))
    monkeypatch.setattr(command.gpu_facts, "why_not_hopper", lambda: None)
    monkeypatch.setattr(command, "CudaTimer", FakeTimer)
    monkeypatch.setitem(PRESETS, "prefill", tuple(SMALL))
    monkeypatch.setattr(
        command,
        "run",
        lambda *args, **options: runner.run(
            *args, **options, ceilings=lambda _: dict(CEILINGS), cublas=lambda _: 700.0
        ),
    )
    out = tmp_path / "record.json"
    assert command.main(["prefill", "--no-peers", "--out", str(out)]) == 0
    assert "3+1" in capsys.readouterr().out
    assert report.load(out)["preset"] == "prefill"


def test_peers_prefill(monkeypatch, small_rotation):
    def flash_mla_with_kvcache(q, cache, block_table, seq_lens, head_dim_v, metadata, num_splits, scale, causal):
        batch, q_len, heads, _ = q.shape
        assert metadata == q_len * heads
        q, cache = q.flatten(0, 1), cache.squeeze(2)
        qo_indptr = torch.arange(batch + 1, dtype=torch.int32) * q_len
        out, lse = prefill_reference_block_table(
            q[..., :512], q[..., 512:], cache[..., :512], cache[..., 512:], qo_indptr, block_table, seq_lens, scale,
            causal=causal,
        )  # fmt: skip
        return out.unflatten(0, (batch, q_len)), lse

    class Wrapper:
        def __init__(self, workspace):
            pass

        def plan(self, **options):
            self.options = options

        def run(self, q_nope, q_pe, ckv_cache, kpe_cache, *, out):
            o = self.options
            last = o["kv_len_arr"] - (o["kv_indptr"].diff() - 1) * o["page_size"]
            prefill_reference(
                q_nope, q_pe, ckv_cache, kpe_cache, o["qo_indptr"], o["kv_indptr"], o["kv_indices"], o["sm_scale"],
                causal=o["causal"], kv_last_page_len=last, out=out,
            )  # fmt: skip

    flash_mla = types.ModuleType("flash_mla")
    flash_mla.flash_mla_with_kvcache = flash_mla_with_kvcache
    flash_mla.get_mla_metadata = lambda seq_lens, rows, kv_heads: (rows, None)
    flashinfer, mla = types.ModuleType("flashinfer"), types.ModuleType("flashinfer.mla")
    flashinfer.mla, mla.BatchMLAPagedAttentionWrapper = mla, Wrapper
    for module in (flash_mla, flashinfer, mla):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    cases = [PrefillCase(4, ((2, 5, 100),)), PrefillCase(4, ((2, 5, 100),), causal=False), SMALL[1]]
    record = bench(cases, peers=peers_module.installed())
    for row in record["rows"]:
        assert row["check"]["ok"]
        assert row["peers"]["flashinfer"]["check"]["ok"]
    *uniform, ragged = record["rows"]
    assert all(row["peers"]["flash_mla"]["check"]["ok"] for row in uniform)
    assert "one number of query tokens" in ragged["peers"]["flash_mla"]["unsupported"]


def test_a_failing_prefill_keeps_the_decode_rows(small_rotation):
    def broken(*args, **options):
        raise RuntimeError("prefill is broken")

    library = FakeLibrary.make(decode_reference, broken)
    record = bench([Case(4, 2, 100, 16), SMALL[0]], library)
    assert ["error" in row for row in record["rows"]] == [False, True]
    assert record["host"] == {"error": "RuntimeError: prefill is broken"}
