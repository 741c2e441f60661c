"""What the README says was measured is what the record it names holds, and its example runs."""

import json
import pathlib
import re
import statistics

import torch

from mla_cute.bench import report
from mla_cute.bench.cases import Case

ROOT = pathlib.Path(__file__).resolve().parents[3]
RECORDS = "tune/measurements/NVIDIA_H200/"
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXT = re.sub(r"\s+", " ", README)


def load(name, records=RECORDS):
    """A record, by the beginning of its name, that the README names."""
    [path] = {p for p in re.findall(r"\]\((tune/measurements/[^)]+\.json)\)", README) if p.startswith(records + name)}
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def best_peer(row):
    """Microseconds of the fastest peer; it and the kernel are right."""
    assert row["check"]["ok"], row["case"]
    _, us = report.best_peer(row)
    return us


def beside_peers(record):
    """What the README says of all cells of a table."""
    gains = {best_peer(row) / row["us_amortised"]: row["case"] for row in record["rows"]}
    assert len(gains) == 30
    least = gains[min(gains)]
    slowest = f"({least['num_heads']} heads, {least['batch']} x {least['kv_len']})"
    faster, mean = sum(gain > 1 for gain in gains), statistics.geometric_mean(gains)
    return (
        f"faster in {faster} of 30 cells, by a geometric mean of {mean:.2f}x and at least {min(gains):.3f}x {slowest}"
    )


def decode_rows(name):
    """By heads, batch, tokens and page size: the 16-bit decode cases of a record."""
    found = {}
    for row in load(name)["rows"]:
        case = row["case"]
        if "kv_len" in case and not case["longest"]:
            assert row["check"]["ok"], case
            found[case["num_heads"], case["batch"], case["kv_len"], case["page_size"]] = row
    return found


def prefill_rows():
    """By heads, requests, query tokens, keys: uniform batches of page size 64."""
    cases = [(row["case"], row) for row in load("pages_prefill_ragged")["rows"] if "groups" in row["case"]]
    return {
        (case["num_heads"], *case["groups"][0]): row
        for case, row in cases
        if len(case["groups"]) == 1 and case["page_size"] == 64
    }


def test_decode_table_is_the_records():
    cell = r" ([\d.]+) \(([\d.]+(?: [\w-]+)?)\) \|"
    found = re.findall(r"^\| (\d+) \| (\d+) \|" + 3 * cell + "$", README, re.MULTILINE)
    assert len(found) == 10
    rows = decode_rows("table")
    assert len(rows) == 30
    for heads, batch, *times in found:
        for kv_len, us, theirs in zip((1024, 8192, 32768), times[::2], times[1::2], strict=True):
            row = rows[int(heads), int(batch), kv_len, 64]
            assert us == f"{row['us_amortised']:.1f}", (heads, batch, kv_len)
            alone = f"{us} ({best_peer(row):.1f})"
            assert f"{us} ({theirs})" in (alone, report.beside(row)), (heads, batch, kv_len)
    table = load("table")
    assert f"{beside_peers(table)}." in TEXT.lower()
    assert f"{table['ceilings']['empty_graph_us']:.1f} us of each is what a graph with an empty kernel measures" in TEXT
    peers = table["peers"]
    assert "as built in vLLM 0.20.2" in peers["flash_mla"]["version"]
    assert f"FlashInfer {peers['flashinfer']['version']} (fa3)" in README


def test_the_other_gpu_is_its_records():
    record = load("table", "tune/measurements/NVIDIA_H100_80GB_HBM3/")
    assert f"(80 GB HBM3, {record['ceilings']['used']['read_gbps']:.0f} GB/s)" in TEXT
    assert f"is {beside_peers(record)};" in TEXT


def test_prefill_table_is_the_records():
    found = re.findall(r"^\| (\d+) x (\d+) of (\d+) \| (.*?) ?\| (.*?) ?\|$", README, re.MULTILINE)
    assert len(found) == 5
    rows = prefill_rows()
    cells = 0
    for count, q_len, kv_len, *texts in found:
        for heads, text in zip((16, 128), texts, strict=True):
            if text:
                row = rows[heads, int(count), int(q_len), int(kv_len)]
                assert text == f"{row['tflops']:.0f} ({100 * row['cublas_share']:.0f} %)", (heads, count, q_len)
                cells += 1
    assert cells == 8


def test_fp8_speeds_are_the_records():
    measured = load("fp8_2026")
    found = re.findall(
        r"^\| (\d+) \| (\d+) \|" + r" ([\d.]+(?: \([\d.]+ [\w-]+\))?) \|" * 6 + "$", README, re.MULTILINE
    )
    assert len(found) == 9
    rows = {}
    for row in measured["rows"]:
        case = row["case"]
        assert row["check"]["ok"], case
        if case.get("kv_len") == 8192:
            key = (case["num_heads"], case["batch"], case["kv_format"], case["q_fp8"])
            rows[key] = {f"{row['us_amortised']:.1f}", report.beside(row)}
    kinds = [(kv_format, q_fp8) for kv_format in ("tensor", "token", "group") for q_fp8 in (False, True)]
    for heads, batch, *times in found:
        for text, kind in zip(times, kinds, strict=True):
            assert text in rows[(int(heads), int(batch), *kind)], (heads, batch, kind)
    assert measured["gpu"]["uuid"] == load("table")["gpu"]["uuid"], "another card"


def test_fp8_errors_are_the_records():
    measured = load("fp8_check")
    assert measured["failed"] == 0
    found = re.findall(r"^\| ([\w ]+) \| (tensor|token|group) \| (\S+) \| (\S+) \| (\S+) \|$", README, re.MULTILINE)
    assert len(found) == 9
    rows = {
        (row["data"], row["kv_format"], row["num_heads"]): row
        for row in measured["rows"]
        if row["q"] == "bf16" and row["accuracy"] == "high"
    }
    for data, kv_format, few, many, with_format in found:
        few_row, row = rows[data, kv_format, 16], rows[data, kv_format, 128]
        assert (few, many) == tuple(f"{r['kernel_error']['rel_err']:.1e}" for r in (few_row, row)), (data, kv_format)
        assert with_format == f"{row['format_error']['rel_err']:.1e}"


def test_sentences_are_the_records():
    table, more, rows = load("table"), load("pages_prefill_ragged"), decode_rows("table")
    shares = {round(100 * rows[heads, 128, 8192, 64]["read_share"]) for heads in (16, 64)}
    assert shares == {99}
    assert "16 and 64 heads read at 99 % of the read bandwidth measured in the same run (4428 GB/s)" in TEXT
    assert round(table["ceilings"]["used"]["read_gbps"]) == 4428
    wide = rows[128, 64, 8192, 64]
    at_start = wide["tflops"] / table["ceilings"]["start"]["cublas_bf16_tflops"]
    assert (
        f"run at {wide['tflops']:.0f} TFLOP/s, {100 * wide['cublas_share']:.0f} % of the best that cuBLAS reached in "
        f"the run and {100 * at_start:.0f} % of what it reached at its start" in TEXT
    )
    start, end = (more["ceilings"][when]["cublas_bf16_tflops"] for when in ("start", "end"))
    assert f"({start:.0f} TFLOP/s at its start; {end:.0f} at its end)" in TEXT
    drafts = [prefill_rows()[16, 128, tokens, 8192] for tokens in (2, 4)]
    assert f"take {drafts[0]['us_amortised']:.1f} and {drafts[1]['us_amortised']:.1f} us" in TEXT
    assert {round(100 * row["read_share"]) for row in drafts} == {95}
    assert "us, 95 % of the read bandwidth" in TEXT
    hosts = [load(name)["host"]["call_us"] for name in ("table", "pages_prefill_ragged", "fp8_2026")]
    assert f"The host takes {min(hosts):.0f} to {max(hosts):.0f} us for a call with a plan" in TEXT
    assert f"{load('prefill_bf16')['host']['call_us']:.0f} us on that of [another]" in TEXT
    pages = decode_rows("pages_prefill_ragged")
    for page, ratios in ((1, ("1.09x", "1.11x")), (16, ("1.01x", "1.11x"))):
        for (heads, batch), ratio in zip(((16, 128), (128, 64)), ratios, strict=True):
            found = pages[heads, batch, 8192, page]["us_amortised"] / pages[heads, batch, 8192, 64]["us_amortised"]
            assert ratio == f"{found:.2f}x", (heads, page)
            assert ratio in TEXT
    errors = [
        row["check"]["rel_err"] for name in ("table", "grid", "pages_prefill_ragged") for row in load(name)["rows"]
    ]
    assert len(load("grid")["rows"]) == 250
    assert f"relative errors of {min(errors):.1e} to {max(errors):.1e}".replace("e-0", "e-") in TEXT


def test_ragged_batches_cost_what_the_readme_says():
    uniform = decode_rows("pages_prefill_ragged")
    ratios = {}
    for row in load("pages_prefill_ragged")["rows"]:
        if row["case"].get("longest"):
            mean = Case(**row["case"]).uniform
            beside = uniform[mean.num_heads, mean.batch, mean.kv_len, mean.page_size]
            ratios[mean.num_heads, mean.batch] = row["us_amortised"] / beside["us_amortised"]
    assert len(ratios) == 9
    assert f"take {min(ratios.values()):.2f}x to {max(ratios.values()):.2f}x of the uniform batch" in TEXT
    notes = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8").partition("Ragged batches (")[2]
    for heads in (16, 64, 128):
        cells = " | ".join(f"{ratios[heads, batch]:.2f}" for batch in (16, 64, 128))
        assert f"\n| {heads} | {cells} |\n" in notes


def test_fp8_shares_of_the_bf16_time_are_the_records():
    bf16 = decode_rows("grid") | decode_rows("table")
    prefill = prefill_rows()
    found = {}
    for row in load("fp8_2026")["rows"]:
        case = row["case"]
        heads = case["num_heads"]
        if "groups" in case:
            key = "group" if (case["kv_format"], case["q_fp8"]) == ("group", True) else "prefill"
            other = prefill[(heads, *case["groups"][0])]
        else:
            key = heads
            other = bf16[heads, case["batch"], case["kv_len"], case["page_size"]]
        found.setdefault((key, case["q_fp8"]), []).append(row["us_amortised"] / other["us_amortised"])

    def span(*keys):
        ratios = [ratio for key in keys for ratio in found[key]]
        return f"{min(ratios):.2f}x to {max(ratios):.2f}x"

    assert f"16 heads take {span((16, False), (16, True))};" in TEXT
    assert f"64 heads {span((64, False))} with 16-bit queries and {span((64, True))} with e4m3 ones;" in TEXT
    assert f"128 heads {span((128, False))} and {span((128, True))};" in TEXT
    group = f"(group {min(found['group', True]):.2f}x)"
    assert f"prefill {span(('prefill', False))} and {span(('prefill', True))} {group}" in TEXT


def test_the_examples_run_on_cpu_tensors():
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for code, tokens in zip(blocks, (4, 517, 517), strict=True):
        exec(compile(code.replace('"cuda"', '"cpu"'), "README.md", "exec"), names)
        assert names["out"].shape == (tokens, 16, 512)
        assert names["out"].isfinite().all()
        assert names["lse"].dtype is torch.float32
