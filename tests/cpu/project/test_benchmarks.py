"""What docs/benchmarks.md says was measured is what the records that it names hold."""

import json
import pathlib
import re
import statistics

from mla_cute.bench import report
from mla_cute.bench.cases import PRESETS, Case
from mla_cute.dims import HEAD_DIMS

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
    cases = [(row["case"], row) for row in load("prefill")["rows"] if "groups" in row["case"]]
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
    assert peers["flash_mla"]["version"] == peers["flash_attn_3"]["version"] == "of vllm 0.33.0"
    assert "FlashMLA as in vLLM 0.33.0," in TEXT
    assert "FlashAttention-3 with q_v as in vLLM 0.33.0 (FA3)" in TEXT
    assert f"sgl-flash-mla {peers['sgl_flash_mla']['version']}," in TEXT
    assert f"FlashInfer {peers['flashinfer']['version']} (fa3)" in TEXT


def test_cells_behind_and_means_are_the_records():
    rows = decode_rows("table")
    gains = {case[:3]: best_peer(row) / row["us_amortised"] for case, row in rows.items()}
    assert [case for case, gain in gains.items() if gain < 1] == [(128, 64, 1024)]
    assert report.best_peer(rows[128, 64, 1024, 64])[0] == "sgl_flash_mla"
    assert "The one behind is so against sgl-flash-mla," in TEXT

    def mean(ratios):
        return f"{statistics.geometric_mean(ratios):.2f}x"

    by_heads = [mean(gain for case, gain in gains.items() if case[0] == heads) for heads in (16, 64, 128)]
    assert "the means are {} (16), {} (64) and {} (128);".format(*by_heads) in TEXT
    by_peer = [
        mean(row["peers"][peer]["us"] / row["us_amortised"] for row in rows.values())
        for peer in ("flash_mla", "sgl_flash_mla", "flash_attn_3", "flashinfer")
    ]
    assert "alone {} (FlashMLA), {} (sgl-flash-mla), {} (FA3) and {} (FlashInfer).".format(*by_peer) in TEXT


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
                gain = best_peer(row) / row["us_amortised"]
                share = f"{100 * row['cublas_share']:.0f} %"
                assert text == f"{row['tflops']:.0f} ({share}, {gain:.2f}x)", (heads, count, q_len)
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
    assert measured["gpu"]["uuid"] != load("table")["gpu"]["uuid"], "one card"
    assert "Of that time, on two cards, 16 heads take" in TEXT


def test_sentences_are_the_records():
    table, more, rows = load("table"), load("prefill"), decode_rows("table")
    shares = [round(100 * rows[heads, 128, 8192, 64]["read_share"]) for heads in (16, 64)]
    assert (
        f"16 and 64 heads read at {shares[0]} % and {shares[1]} % of the read bandwidth measured in the same run "
        f"({table['ceilings']['used']['read_gbps']:.0f} GB/s)" in TEXT
    )
    wide = rows[128, 64, 8192, 64]
    at_start = wide["tflops"] / table["ceilings"]["start"]["cublas_bf16_tflops"]
    assert (
        f"run at {wide['tflops']:.0f} TFLOP/s, {100 * wide['cublas_share']:.0f} % of the best that cuBLAS reached in "
        f"the run and {100 * at_start:.0f} % of what it reached at its start" in TEXT
    )
    start, end = (more["ceilings"][when]["cublas_bf16_tflops"] for when in ("start", "end"))
    assert f"({start:.0f} TFLOP/s at its start, {end:.0f} at its end)" in TEXT
    drafts = [prefill_rows()[16, 128, tokens, 8192] for tokens in (2, 4)]
    shares = [round(100 * row["read_share"]) for row in drafts]
    assert (
        f"take {drafts[0]['us_amortised']:.1f} and {drafts[1]['us_amortised']:.1f} us, {shares[0]} % and {shares[1]} % "
        f"of the read bandwidth; FlashInfer takes {best_peer(drafts[0]):.1f} for 2 and {best_peer(drafts[1]):.1f} for "
        "4." in TEXT
    )
    assert {report.best_peer(row)[0] for row in drafts} == {"flashinfer"}
    mixed = [row for row in more["rows"] if len(row["case"].get("groups", ())) == 2]
    gains = [f"{best_peer(row) / row['us_amortised']:.2f}x" for row in mixed]
    assert "in one call is {} (16 heads) and {} (128 heads) as fast".format(*gains) in TEXT
    pages = decode_rows("pages")
    ratios = {
        (heads, page): f"{row['us_amortised'] / pages[heads, batch, length, 64]['us_amortised']:.2f}x"
        for (heads, batch, length, page), row in pages.items()
    }
    assert (
        f"take {ratios[16, 1]} (16 heads, 128 x 8192) to {ratios[128, 1]} (128 heads, 64 x 8192) the time of page size "
        "64" in TEXT
    )
    assert f"page size 16 at {ratios[16, 16]} to {ratios[128, 16]} " in TEXT
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
    hosts = [load(name)["host"] for name in ("table", "fp8_2026", "prefill", "pages", "ragged", "dims")]
    spans = [
        f"{min(times):.1f} to {max(times):.1f}"
        for key in ("call_us", "call_without_plan_us")
        for times in [[host[key] for host in hosts]]
    ]
    assert f"decode takes {spans[0]} us with a plan and {spans[1]} without" in TEXT


def test_other_head_dimensions_are_the_record():
    rows, fp8 = {}, {}
    for row in load("dims")["rows"]:
        case = row["case"]
        assert row["check"]["ok"]
        if case["kv_format"]:
            fp8[case["num_heads"], case["batch"]] = f"{row['us_amortised']:.1f}"
        elif "batch" in case:
            share = max(row["read_share"], row["cublas_share"])
            text = f"{row['us_amortised']:.1f} ({100 * share:.0f} %)"
            rows[case["num_heads"], case["batch"], case["ckv_dim"], case["kpe_dim"]] = text
        else:
            text = f"{row['tflops']:.0f} TFLOP/s ({100 * row['cublas_share']:.0f} %)"
            assert f" {case['ckv_dim']} + {case['kpe_dim']} runs at {text}" in TEXT
    assert len(load("dims")["rows"]) == len(dict.fromkeys(PRESETS["dims"]))
    wide = [fp8[heads, 128] for heads in (16, 32, 128)]
    assert "128 requests take {}, {} and {} us with 16, 32 and 128 heads.".format(*wide) in TEXT
    found = re.findall(r"^\| (\d+) \| (\d+) \|" + r" ([\d.]+ \(\d+ %\)) \|" * 5 + "$", PAGE, re.MULTILINE)
    assert len(found) == 6
    pairs = [pair for pair in HEAD_DIMS if pair != (512, 64)]
    assert "| heads | batch | " + " | ".join(map(str, pairs)) + " |\n" in PAGE
    for heads, batch, *texts in found:
        for text, pair in zip(texts, pairs, strict=True):
            assert text == rows[(int(heads), int(batch), *pair)], (heads, batch, pair)


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
    uniform = decode_rows("ragged")
    ratios, gains = {}, []
    for row in load("ragged")["rows"]:
        if row["case"].get("longest"):
            mean = Case(**row["case"]).uniform
            beside = uniform[mean.num_heads, mean.batch, mean.kv_len, mean.page_size]
            ratios[mean.num_heads, mean.batch] = row["us_amortised"] / beside["us_amortised"]
            gains.append(best_peer(row) / row["us_amortised"])
    assert len(ratios) == 9
    assert f"are {min(gains):.3f}x (128 heads, 128 requests) to {max(gains):.2f}x as fast as the fastest" in TEXT
    assert f"take {min(ratios.values()):.2f}x to {max(ratios.values()):.2f}x of the uniform batch" in TEXT
    notes = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8").partition("Ragged batches (")[2]
    for heads in (16, 64, 128):
        cells = " | ".join(f"{ratios[heads, batch]:.2f}" for batch in (16, 64, 128))
        assert f"\n| {heads} | {cells} |\n" in notes


def test_drafts_and_their_energy_are_the_record():
    notes = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    [path] = set(re.findall(rf"{RECORDS}drafts_[\w-]+\.json", notes))
    bursts, energies = [], []
    for row in json.loads((ROOT / path).read_text(encoding="utf-8"))["rows"]:
        case, own = row["case"], row["sustained"]
        peers = {name: peer["sustained"]["mj"] for name, peer in row["peers"].items()}
        least = min(peers, key=peers.__getitem__)
        bursts.append(best_peer(row) / row["us_amortised"])
        energies.append(peers[least] / own["mj"])
        requests, tokens, _ = case["groups"][0]
        assert (
            f"\n| {case['num_heads']}, {requests} x {tokens} | {report.beside(row)} | "
            f"{own['mj']:.0f} ({peers[least]:.0f} {report.SHORT_NAMES[least]}) | "
            f"{own['us']:.0f} us, {own['watts']:.0f} W, {own['sm_mhz']:.0f} MHz |\n"
        ) in notes
    assert len(bursts) == 6
    (slow, fast), (dear, cheap) = ((min(ratios), max(ratios)) for ratios in (bursts, energies))
    means = [statistics.geometric_mean(ratios) for ratios in (bursts, energies)]
    said = re.sub(r"\s+", " ", notes)
    assert f"that is {slow:.3f}x to {fast:.3f}x, by a geometric mean of {means[0]:.3f}x" in said
    assert f"by energy {dear:.3f}x to {cheap:.3f}x, {means[1]:.3f}x." in said
    assert f"are {slow:.2f}x to {fast:.2f}x as fast as the fastest" in TEXT


def span(ratios):
    return f"{min(ratios):.2f}x to {max(ratios):.2f}x"


def test_fp8_shares_of_the_bf16_time_are_the_records():
    bf16 = decode_rows("table")
    found = {}
    for row in load("fp8_2026")["rows"]:
        case = row["case"]
        other = bf16[case["num_heads"], case["batch"], case["kv_len"], case["page_size"]]
        ratio = row["us_amortised"] / other["us_amortised"]
        found.setdefault((case["num_heads"], case["q_fp8"]), []).append(ratio)
    assert f"16 heads take {span(found[16, False] + found[16, True])};" in TEXT
    of_64, of_128 = ([span(found[heads, q_fp8]) for q_fp8 in (False, True)] for heads in (64, 128))
    assert f"64 heads {of_64[0]} with 16-bit queries and {of_64[1]} with e4m3 ones;" in TEXT
    assert f"128 heads {of_128[0]} and {of_128[1]};" in TEXT


def test_fp8_prefill_beside_a_bf16_cache_is_the_record():
    columns = [("", False), *((f, q) for f in ("tensor", "token", "group") for q in (False, True))]
    times = {}
    for row in load("fp8_prefill")["rows"]:
        assert row["check"]["ok"]
        case = row["case"]
        [(requests, q_len, kv_len)] = case["groups"]
        shape = f"{case['num_heads']}, {requests} x {q_len} of {kv_len}"
        times.setdefault(shape, {})[case["kv_format"], case["q_fp8"]] = row["us_amortised"]
    shares = {}
    for shape, us in times.items():
        assert f"| {shape} | {' | '.join(f'{us[column]:.1f}' for column in columns)} |\n" in PAGE
        for kv_format, q_fp8 in columns[1:]:
            kind = ("token", q_fp8) if kv_format == "token" else "others"
            shares.setdefault(kind, []).append(us[kv_format, q_fp8] / us["", False])
    assert f"tensor and group take {span(shares['others'])} of the bf16 cache's time" in TEXT
    assert f"token {span(shares['token', False])} with 16-bit queries and {span(shares['token', True])} with" in TEXT


def test_fp8_tiles_of_32_rows_are_the_record():
    """In docs/performance.md: what runs in them beside peers, and both heights in turns."""
    notes = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    rows, gains = {}, []
    for row in json.loads((ROOT / RECORDS / "fp8_32_rows_2026-12-01.json").read_text(encoding="utf-8"))["rows"]:
        assert row["check"]["ok"], row["case"]
        case = row["case"]
        what = f"32 heads, {case.get('batch')}"
        if "groups" in case:
            requests, tokens, _ = case["groups"][0]
            what = f"drafts of {case['num_heads']} heads, {requests} x {tokens}"
        elif case["sparse"]:
            what = f"lists of 2048, {case['batch']}"
        if case.get("kv_len", 8192) != 1024:
            rows[what, case["kv_format"], case["q_fp8"]] = report.beside(row)
        if case["q_fp8"] and report.best_peer(row) is not None:
            gains.append(best_peer(row) / row["us_amortised"])
    kinds = [(kv_format, q_fp8) for kv_format in ("tensor", "token", "group") for q_fp8 in (False, True)]
    for what in dict.fromkeys(what for what, _, _ in rows):
        cells = " | ".join(rows.get((what, *kind), "") for kind in kinds)
        assert re.sub(r" +", " ", f"\n| {what} | {cells} |\n") in re.sub(r" +", " ", notes), what
    mean = statistics.geometric_mean(gains)
    assert f"that is {mean:.2f}x ({min(gains):.2f}x to {max(gains):.2f}x; {len(gains)} cells)" in notes
    turns = json.loads((ROOT / RECORDS / "tile32_2026-11-30.json").read_text(encoding="utf-8"))["turns"]["rows"]
    table, ratios = {}, {}
    for row in turns:
        case, means = row["case"], [statistics.mean(row["us"][rows]) for rows in ("64 rows", "32 rows")]
        what = f"{case.get('batch')} x {case.get('kv_len')}"
        if "groups" in case:
            what = "drafts of 2 of 16 heads, 128 x 8192"
        elif case["sparse"]:
            what = f"lists, {what}"
        table[what, case["kv_format"], case["q_fp8"]] = "{:.1f} / {:.1f}".format(*means)
        ratios.setdefault(case["q_fp8"], []).append(means[0] / means[1])
    for what in dict.fromkeys(what for what, _, _ in table):
        cells = " | ".join(table.get((what, *kind), "") for kind in kinds)
        assert re.sub(r" +", " ", f"\n| {what} | {cells} |\n") in re.sub(r" +", " ", notes), what
    spans = [
        f"{min(ratios[q]):.2f}x to {max(ratios[q]):.2f}x with {kind}" for q, kind in ((False, "16-bit"), (True, "e4m3"))
    ]
    assert f"That is {spans[0]} queries and {spans[1]} ones." in notes
