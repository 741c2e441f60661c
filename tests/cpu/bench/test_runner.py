"""The bench without a GPU: records, checks of results, ceilings, judging by the bars; the timer is a fake."""

import dataclasses
import json
import math
import os
import signal

import pytest
import torch
from bench_case import CEILINGS, FP8_CASES, H200, SMALL, FakeLibrary, FakeTimer, bench, record_of, row_of, wrong_page

from mla_cute.bench import cases as cases_module
from mla_cute.bench import report, runner, targets
from mla_cute.bench.cases import PUBLIC_BEST_GPU, Case
from mla_cute.bench.inputs import KvPool, make_inputs
from mla_cute.config import KernelConfig
from mla_cute.reference import decode_reference
from mla_cute.testing.fp8 import one_e4m3_part


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
    assert set(record["method"]) >= {"us", "plan_us", "us_amortised", "us_cold", "us_chained", "rotation", "ceilings"}
    assert record["host"]["call_us"] == 12.5
    json.dumps(record, allow_nan=False)
    for row in record["rows"]:
        case = Case(**row["case"])
        assert row["us"] == 103.5
        assert row["us_min"] == 99
        assert row["us_p90"] == 108
        assert row["us_cold"] == 110
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
    there = name in make_inputs(case, KvPool.of([case], torch.device("cpu")), torch.device("cpu")).scales
    assert row["check"]["ok"] is not there


def test_fp8_prefill_rows(small_rotation):
    cases = [
        cases_module.PrefillCase(4, ((2, 5, 100),), 16, kv_format=kv_format, q_fp8=q_fp8)
        for kv_format in ("tensor", "token", "group")
        for q_fp8 in (False, True)
    ]
    record = bench(cases, cublas=lambda timer: 700.0)
    assert record["failed"] == 0, report.summary(record)
    assert {cases_module.case_of(row) for row in json.loads(json.dumps(record))["rows"]} == set(cases)


FAST_CASES = [Case(33, 2, 100, 16, kv_format=kv_format, accuracy="fast") for kv_format in ("tensor", "token", "group")]


def fast(*args, **options):
    """As row tiles with that accuracy."""
    q_nope, q_pe, ckv_cache, kpe_cache, *others = args
    rope = one_e4m3_part(q_pe) if kpe_cache.dtype is torch.float8_e4m3fn else q_pe
    return decode_reference(one_e4m3_part(q_nope), rope, ckv_cache, kpe_cache, *others, **options)


def test_an_accuracy_of_the_case_is_planned_run_on_row_tiles_and_checked_for_itself(small_rotation):
    high = [dataclasses.replace(case, accuracy="high") for case in FAST_CASES]
    library = FakeLibrary.make(fast)
    record = bench(FAST_CASES, library)
    assert record["failed"] == 0, report.summary(record)
    assert {cases_module.case_of(row) for row in json.loads(json.dumps(record))["rows"]} == set(FAST_CASES)
    configs = [options["config"] for _, options in library.asked]
    # Of each case the library's choice first, whose accuracy and kernel are then replaced. The host's calls have none.
    assert len(configs) == 2 + 2 * len(FAST_CASES)
    assert {config and (config.accuracy, config.fp8_kernel) for config in configs} == {None, ("fast", "auto")}
    few = FakeLibrary.make(decode_reference)  # tiles of 32 rows, which round no query
    assert bench([dataclasses.replace(case, num_heads=4) for case in FAST_CASES], few)["failed"] == 0
    configs = [options["config"] for _, options in few.asked]
    assert {config and (config.accuracy, config.fp8_kernel) for config in configs} == {None, ("fast", "tile64")}
    assert bench(high)["failed"] == 0
    # What rounds queries is wrong where they are to be multiplied as they are, and the other way round.
    for cases, decode in ((high, fast), (FAST_CASES, decode_reference)):
        assert not any(row["check"]["ok"] for row in bench(cases, FakeLibrary.make(decode))["rows"])
    assert {report.cells(row)[4] for row in record["rows"]} == {f"{c.kv_format}/bf16/fast" for c in FAST_CASES}
    assert FAST_CASES[0].label == "H=33 B=2 L=100 page 16 bfloat16 tensor FP8, q 16 bit fast"


def test_queries_are_rounded_by_row_tiles_alone():
    fast, high = (KernelConfig(accuracy=accuracy) for accuracy in ("fast", "high"))
    assert not runner.rounds_queries(Case(32, 1, 64, kv_format="group"), KernelConfig(accuracy="fast"))
    fp8, e4m3 = (Case(64, 1, 64, kv_format="group", q_fp8=q_fp8) for q_fp8 in (False, True))
    assert runner.rounds_queries(fp8, fast)
    assert runner.rounds_queries(cases_module.PrefillCase(1, ((1, 2, 64),), kv_format="tensor"), fast)
    many = cases_module.PrefillCase(16, ((2, 512, 1024),), kv_format="group")
    assert not runner.rounds_queries(many, fast), "the cache is converted"
    assert runner.rounds_queries(dataclasses.replace(many, dtype="float16"), fast)
    for case, config in (
        (fp8, high),
        (e4m3, fast),
        (Case(64, 1, 64), fast),
        (dataclasses.replace(fp8, num_heads=16), fast),
    ):
        assert not runner.rounds_queries(case, config)


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


def test_bars_are_judged_in_their_own_direction():
    rows = [
        row_of(Case(16, 128, 8192), 300, read=0.95),
        row_of(Case(128, 64, 8192), 300, cublas=0.80),
        row_of(Case(16, 1, 8192), 10.9),
        row_of(Case(16, 16, 1024), 9.6),
        row_of(Case(16, 128, 8192, page_size=1), 310),
        {"case": vars(Case(64, 128, 8192)), "error": "broken"},
    ]
    judged = {one.what: one for one in targets.judge(record_of(rows))}
    assert len(judged) == 5
    met = {what.split(",")[0]: one.met for what, one in judged.items()}
    assert met == {
        "H=16 B=128 L=8192 page 64 bfloat16": True,
        "H=128 B=64 L=8192 page 64 bfloat16": False,
        "H=16 B=1 L=8192 page 64 bfloat16": True,
        "H=16 B=16 L=1024 page 64 bfloat16": False,
        "H=16 B=128 L=8192 page 1 bfloat16": True,
    }
    one = judged["H=16 B=128 L=8192 page 1 bfloat16, speed over that of page 64"]
    assert one.measured == pytest.approx(300 / 310)
    assert one.reach == 0.90


@pytest.mark.parametrize("gpu", ["NVIDIA H100 80GB HBM3", "NVIDIA H200 NVL", None])
def test_microseconds_are_targets_of_one_gpu_only(gpu):
    rows = [row_of(Case(16, 128, 8192), 300, read=0.95), row_of(Case(16, 1, 8192), 30.0)]
    share, us = targets.judge(record_of(rows))
    assert (share.gpu, share.met, us.gpu, us.met) == (None, True, "NVIDIA H200", False)
    assert targets.judge(record_of(rows, gpu)) == [share]
    ratios = "mla_cute's own targets that are met: 1 of 1 as shares of this run's ceilings or ratios between its shapes"
    assert targets.sentence([share, us]) == f"{ratios}, 0 of 1 in microseconds of an NVIDIA H200."
    assert targets.sentence([share]) == f"{ratios}."
    assert targets.judge(record_of(rows[1:], gpu)) == []


def test_a_record_does_not_say_which_targets_were_met(small_rotation):
    assert "bars" not in bench(SMALL[:1])


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
