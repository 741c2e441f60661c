"""What docs/benchmarks.md says was measured is what the records that it names hold."""

import json
import pathlib
import re
import statistics

from mla_cute.bench import report
from mla_cute.bench.cases import Case

ROOT = pathlib.Path(__file__).resolve().parents[3]
RECORDS = "tune/measurements/NVIDIA_H200/"
PAGE = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
TEXT = re.sub(r"\s+", " ", PAGE)


def load(name, records=RECORDS):
    """A record, by the beginning of its name, that the page names."""
    paths = set(re.findall(r"(?:\]\(|\]: )\.\./(tune/measurements/[^)\s]+\.json)", PAGE))
    [path] = [path for path in paths if path.startswith(records + name)]
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def best_peer(row):
    """Microseconds of the fastest peer; it and the kernel are right."""
    assert row["check"]["ok"], row["case"]
    _, us = report.best_peer(row)
    return us


def beside_peers(record):
    """What the page says of all cells of a table."""
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
    found = re.findall(r"^\| (\d+) \| (\d+) \|" + 3 * cell + "$", PAGE, re.MULTILINE)
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
    assert f"FlashInfer {peers['flashinfer']['version']} (fa3)" in PAGE


def test_the_other_gpu_is_its_records():
    record = load("table", "tune/measurements/NVIDIA_H100_80GB_HBM3/")
    assert f"(80 GB HBM3, {record['ceilings']['used']['read_gbps']:.0f} GB/s)" in TEXT
    assert f"is {beside_peers(record)};" in TEXT


def test_prefill_table_is_the_records():
    found = re.findall(r"^\| (\d+) x (\d+) of (\d+) \| (.*?) ?\| (.*?) ?\|$", PAGE, re.MULTILINE)
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
    found = re.findall(r"^\| (\d+) \| (\d+) \|" + r" ([\d.]+(?: \([\d.]+ [\w-]+\))?) \|" * 6 + "$", PAGE, re.MULTILINE)
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
    assert f"; {start:.0f} TFLOP/s at its start, {end:.0f} at its end)" in TEXT
    drafts = [prefill_rows()[16, 128, tokens, 8192] for tokens in (2, 4)]
    assert f"take {drafts[0]['us_amortised']:.1f} and {drafts[1]['us_amortised']:.1f} us" in TEXT
    assert {round(100 * row["read_share"]) for row in drafts} == {95}
    assert "us, 95 % of the read bandwidth" in TEXT
    pages = decode_rows("pages_prefill_ragged")
    for page, ratios in ((1, ("1.09x", "1.11x")), (16, ("1.01x", "1.11x"))):
        for (heads, batch), ratio in zip(((16, 128), (128, 64)), ratios, strict=True):
            found = pages[heads, batch, 8192, page]["us_amortised"] / pages[heads, batch, 8192, 64]["us_amortised"]
            assert ratio == f"{found:.2f}x", (heads, page)
            assert ratio in TEXT
    assert len(load("grid")["rows"]) == 250


def test_host_times_are_the_records():
    measured = load("host_time_nouns")["us"]
    kinds = {
        "decode, bf16": "bf16",
        "decode, block table": "bf16 block table",
        "decode, FP8 format tensor, e4m3 q": "fp8 tensor, e4m3 q",
        "prefill, bf16": "bf16 prefill",
    }
    for what, kind in kinds.items():
        with_plan, without = (measured[f"{kind}, {how}"]["now"] for how in ("plan", "no plan"))
        assert f"\n| {what} | {with_plan:.1f} | {without:.1f} |\n" in PAGE
    assert f"\n| `plan_decode` | {measured['plan_decode']['now']:.1f} | |\n" in PAGE
    assert f"\n| `plan.update` | {measured['plan.update']['now']:.1f} | |\n" in PAGE
    other = load("bf16_table")["host"]
    assert f"took {other['call_us']:.1f} and {other['call_without_plan_us']:.1f} us for decode" in TEXT
    hosts = [load(name)["host"] for name in ("table", "grid", "pages_prefill_ragged", "fp8_2026")]
    spans = [
        f"{min(times):.0f} to {max(times):.0f}"
        for key in ("call_us", "call_without_plan_us")
        for times in [[host[key] for host in hosts]]
    ]
    prefill = load("pages_prefill_ragged")["host"]
    assert (
        f"took {spans[0]} us with a plan and {spans[1]} without, {prefill['prefill_call_us']:.1f} and "
        f"{prefill['prefill_call_without_plan_us']:.1f} for prefill" in TEXT
    )


def test_newer_releases_are_the_record():
    measured = load("newest_peers")
    cells = {(c["num_heads"], c["batch"], c["kv_len"]): (c["us"], c["best_over_us"]) for c in measured["cells"]}
    found = re.findall(r"^\| (\d+) \| (\d+) \|" + r" ([\d.]+) \(([\d.]+)x\) \|" * 3 + "$", PAGE, re.MULTILINE)
    assert 3 * len(found) == len(cells) == 30
    for heads, batch, *texts in found:
        for kv_len, us, ratio in zip((1024, 8192, 32768), texts[::2], texts[1::2], strict=True):
            assert (float(us), float(ratio)) == cells[int(heads), int(batch), kv_len]
    behind = {case: ratio for case, (_, ratio) in cells.items() if ratio < 1}
    assert len(behind) == 6
    assert sum(heads == 128 for heads, _, _ in behind) == 5
    assert round(100 * (1 - min(behind.values()))) == 5
    mean = statistics.geometric_mean(ratio for _, ratio in cells.values())
    assert (
        "was behind in 6 of 30 cells, five of them at 128 heads, by up to 5 %; the geometric mean over all is "
        f"{mean:.2f}x" in TEXT
    )
    others = {row["case"]: row["best_us"] / row["us"] for row in measured["behind_elsewhere"]}
    drafts = [ratio for case, ratio in others.items() if case.startswith("drafts")]
    assert f"drafts of 2 and 4 tokens too ({min(drafts):.3f}x to {max(drafts):.3f}x)" in TEXT
    ragged = [others[f"ragged, 64 requests, {heads} heads"] for heads in (64, 128)]
    assert f"({ragged[0]:.3f}x and {ragged[1]:.3f}x) and with 96 heads ({others['96 heads, 64 x 8192']:.3f}x)" in TEXT


def test_compile_times_are_the_record():
    path = ROOT / "tune" / "measurements" / "compile" / "compile_2026-11-30.json"
    assert f"](../{path.relative_to(ROOT)})" in TEXT
    seconds = {}
    for kernel in json.loads(path.read_text(encoding="utf-8"))["kernels"]:
        seconds.setdefault(kernel["kernel"], []).append(kernel["cpu"])
    groups = {
        "tile16: decode of few heads, bf16 and FP8": ("decode_tile16", "decode_tile16_fp8"),
        "tile64: decode and prefill, bf16": ("decode_tile64", "prefill_tile64"),
        "tile64 over FP8 caches": ("decode_tile64_fp8", "prefill_tile64_fp8"),
        "planners": ("planner", "prefill_planner"),
        "append, merge_states": ("append", "merge_states"),
    }
    assert {name for names in groups.values() for name in names} == seconds.keys()
    for what, names in groups.items():
        found = [second for name in names for second in seconds[name]]
        assert f"\n| {what} | {min(found):.1f} to {max(found):.1f} |\n" in PAGE


def test_ragged_batches_cost_what_the_page_says():
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
