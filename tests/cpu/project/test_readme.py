"""The README: its numbers are the records', its picture is drawn from one, its examples run."""

import importlib.util
import json
import pathlib
import re
import statistics

import torch

from mla_cute.bench import figures, report

ROOT = pathlib.Path(__file__).resolve().parents[3]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXT = re.sub(r"\s+", " ", README)
RECORDS = ROOT / "tune" / "measurements" / "NVIDIA_H200"


def load(name):
    [path] = RECORDS.glob(f"{name}_????-??-??.json")
    return json.loads(path.read_text(encoding="utf-8"))


def rows_of(name, **wanted):
    rows = [row for row in load(name)["rows"] if wanted.items() <= row["case"].items()]
    assert all(row["check"]["ok"] for row in rows)
    return rows


def row_of(name, **wanted):
    [row] = rows_of(name, **wanted)
    return row


def spec_of(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_of_the_record_that_the_readme_names():
    picture = spec_of(ROOT / "docs" / "tools" / "picture.py")
    record = report.load(picture.RECORD)
    image = picture.PICTURE.relative_to(ROOT).as_posix()
    [alt] = re.findall(rf"^!\[(.*)\]\({image}\)$", README, re.MULTILINE)
    assert f"]({picture.RECORD.relative_to(ROOT).as_posix()})" in README
    figure = picture.figure_of(record)
    shown = b"tEXtDescription\0" + picture.digest(figure).encode()
    assert shown in picture.PICTURE.read_bytes(), "draw it again: python docs/tools/picture.py"
    ratios = figures.values(record["rows"], figures.over_best_peer)
    assert alt.endswith(f": {min(ratios):.3f}x to {max(ratios):.2f}x in {len(ratios)} shapes")
    peers = {name: peer["version"] for name, peer in record["peers"].items()}
    assert peers["flash_mla"] == peers["flash_attn_3"] == "of vllm 0.33.0"
    assert (
        f"FlashMLA and FlashAttention-3 (q_v) as in vLLM 0.33.0, sgl-flash-mla {peers['sgl_flash_mla']}, FlashInfer "
        f"{peers['flashinfer']} (fa3)" in TEXT
    )
    [behind] = [ratio for ratio in ratios if ratio < 1]
    mean = f"{statistics.geometric_mean(ratios):.2f}x is the geometric mean"
    assert f"{mean}, and one shape is behind, by {100 * (1 - behind):.0f} %." in TEXT


def test_the_table_is_the_records():
    few, many = ({"num_heads": heads, "kv_len": 8192, "page_size": 64} for heads in (16, 128))
    wide, one = row_of("table", **few, batch=128), row_of("table", **few, batch=1)
    fp8 = row_of("fp8", **few, batch=128, kv_format="tensor", q_fp8=False)
    tensor_bound = row_of("table", **many, batch=64)
    prefill = row_of("prefill", num_heads=16, groups=[[4, 2048, 8192]], page_size=64)
    group, beside = (
        row_of("fp8_prefill", num_heads=16, groups=[[4, 2048, 8192]], kv_format=kv_format, q_fp8=False)
        for kv_format in ("group", "")
    )
    gain = beside["us_amortised"] / group["us_amortised"]
    host = {name: times["now"] for name, times in load("host_time_nouns")["us"].items()}
    lines = (
        f"decode, 16 heads, 128 requests of 8192 tokens | {wide['us_amortised']:.1f} us | "
        f"{wide['read_share']:.0%} of the read bandwidth",
        f"the same over an FP8 cache (format tensor) | {fp8['us_amortised']:.1f} us | {fp8['read_share']:.0%}",
        f"decode, 16 heads, 1 request of 8192 | {one['us_amortised']:.1f} us |",
        f"decode, 128 heads, 64 requests of 8192 | {tensor_bound['us_amortised']:.1f} us, "
        f"{tensor_bound['tflops']:.0f} TFLOP/s | {tensor_bound['cublas_share']:.0%} of cuBLAS",
        f"causal prefill, 4 x 2048 of 8192 tokens, 16 heads | {prefill['tflops']:.0f} TFLOP/s | "
        f"{prefill['cublas_share']:.0%} of cuBLAS",
        f"the same over an FP8 cache (format group), another card | {group['tflops']:.0f} TFLOP/s | "
        f"{gain:.2f}x a bf16 cache's beside it |",
        f"host, a call with a plan / without one | {host['bf16, plan']:.1f} / {host['bf16, no plan']:.1f} us |",
        f"host, a prefill with a plan / without one | {host['bf16 prefill, plan']:.1f} / "
        f"{host['bf16 prefill, no plan']:.1f} us |",
    )
    for line in lines:
        assert "| " + line.replace("%", " %") in README, line


def test_gains_in_an_engine_are_those_of_the_page():
    page = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    lines = [re.findall(r"\*\*([\d.]+)\*\*", line) for line in page.splitlines() if line.startswith("| ")]
    columns = list(zip(*(map(float, line) for line in lines if line), strict=True))
    assert [len(column) for column in columns] == [13] * 4
    ratios = [ratio for column in columns for ratio in column]
    assert [ratio for ratio in ratios if ratio < 1] == [0.95]
    assert "\nFLASHMLA is ahead in one cell, " in page
    ahead = sum(ratio > 1 for ratio in ratios)
    assert ratios.count(1) == len(ratios) - ahead - 1 == 1
    means = [f"{statistics.geometric_mean(column):.2f}x" for column in columns]
    assert (
        f"| {ahead} of 52 cells ahead, one level, one 5 % behind; geometric mean {means[0]} and {means[1]} (16 heads, "
        f"bf16 and FP8), {means[2]} and {means[3]} (128) |" in TEXT
    )


def test_errors_are_the_records():
    rows = [row for row in load("fp8_check")["rows"] if row["data"] == "normal" and row["accuracy"] == "high"]
    rows = [row for row in rows if row["q"] == "bf16" and row["num_heads"] in (16, 128)]
    assert len(rows) == 6
    whole, own = ([row[key]["rel_err"] for row in rows] for key in ("format_error", "kernel_error"))
    text = (
        f"{min(whole):.1e} to {max(whole):.1e} of the output on normal data, of which the kernels' own part is "
        f"{min(own):.1e} to {max(own):.1e}."
    )
    assert text.replace("e-0", "e-") in TEXT
    errors = [row["check"]["rel_err"] for name in ("table", "grid", "prefill", "pages") for row in rows_of(name)]
    assert f"relative errors of {min(errors):.1e} to {max(errors):.1e}".replace("e-0", "e-") in TEXT


def test_times_over_fp8_caches_are_those_of_the_benchmarks():
    page = re.sub(r"\s+", " ", (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8"))
    spans = re.findall(r"64 heads (\S+)x to (\S+)x with 16-bit queries and (\S+)x to (\S+)x with e4m3 ones;", page)
    spans += re.findall(r"128 heads (\S+)x to (\S+)x and (\S+)x to (\S+)x;", page)
    least, most, least_e4m3, most_e4m3 = zip(*spans, strict=True)
    assert len(spans) == 2
    assert (
        f"decode takes {min(least)}x to {max(most)}x of a bf16 cache's time with 16-bit queries and {min(least_e4m3)}x "
        f"to {max(most_e4m3)}x with e4m3 ones" in TEXT
    )


def test_the_readme_stays_short():
    assert README.count("\n") <= 185


def test_the_examples_run_on_cpu_tensors():
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for code, tokens in zip(blocks, (4, 517, 517), strict=True):
        exec(compile(code.replace('"cuda"', '"cpu"'), "README.md", "exec"), names)
        assert names["out"].shape == (tokens, 16, 512)
        assert names["out"].isfinite().all()
        assert names["lse"].dtype is torch.float32
