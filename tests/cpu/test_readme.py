"""What the README says was measured is what the record it names holds, and its example runs."""

import json
import pathlib
import re

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
GRID = "tune/measurements/NVIDIA_H200/grid_2026-11-28.txt"
FP8_SPEED = "tune/measurements/NVIDIA_H200/fp8_2026-11-28.json"
FP8_ERROR = "tune/measurements/NVIDIA_H200/fp8_check_2026-11-28.json"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def record():
    """The record of the prefill table; the README names another one for the host's time, and two of FP8 caches."""
    fp8, errors, path, other = re.findall(r"\]\((tune/measurements/[^)]+\.json)\)", README)
    assert (fp8, errors) == (FP8_SPEED, FP8_ERROR)
    assert other.endswith("prefill_bf16_2026-11-24.json")
    return load(path)


def load(path):
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def decode_rows():
    """By heads, batch, tokens and page size: what the bench printed of a case, by column."""
    lines = (ROOT / GRID).read_text(encoding="utf-8").splitlines()
    at = next(i for i, line in enumerate(lines) if line.split()[:1] == ["H"])
    found = {}
    for words in map(str.split, lines[at + 1 :]):
        assert len(words) == 17, "a case that failed or is wrong prints otherwise"
        if words[2].isdigit():
            names = ("us", "us_min", "us_p90", "plan_us", "us_amortised", "us_chained", "gbps", "read_share", "tflops")
            values = (float(word.rstrip("%")) for word in words[5:])
            found[tuple(map(int, words[:4]))] = dict(zip((*names, "cublas_share"), values, strict=False))
    assert len(found) > 200
    return found


def prefill_rows():
    """By heads, requests, query tokens, keys: uniform batches of page size 64."""
    cases = [(row["case"], row) for row in record()["rows"] if "groups" in row["case"]]
    return {
        (case["num_heads"], *case["groups"][0]): row
        for case, row in cases
        if len(case["groups"]) == 1 and case["page_size"] == 64
    }


def test_decode_table_is_the_records():
    found = re.findall(r"^\| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", README, re.MULTILINE)
    assert len(found) == 10
    rows = decode_rows()
    for heads, batch, *times in found:
        for kv_len, us in zip((1024, 8192, 32768), times, strict=True):
            assert us == str(rows[int(heads), int(batch), kv_len, 64]["us_amortised"]), (heads, batch, kv_len)


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
    measured = load(FP8_SPEED)
    found = re.findall(r"^\| (\d+) \| (\d+) \|" + r" ([\d.]+) \|" * 6 + "$", README, re.MULTILINE)
    assert len(found) == 9
    rows = {}
    for row in measured["rows"]:
        case = row["case"]
        assert row["check"]["ok"], case
        if case.get("kv_len") == 8192:
            rows[case["num_heads"], case["batch"], case["kv_format"], case["q_fp8"]] = f"{row['us_amortised']:.1f}"
    kinds = [(kv_format, q_fp8) for kv_format in ("tensor", "token", "group") for q_fp8 in (False, True)]
    for heads, batch, *times in found:
        assert times == [rows[(int(heads), int(batch), *kind)] for kind in kinds], (heads, batch)
    assert f"card: it reads at {measured['ceilings']['used']['read_gbps']:.0f} GB/s" in README


def test_fp8_errors_are_the_records():
    measured = load(FP8_ERROR)
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
    measured, rows = record(), decode_rows()
    text = README.replace("\n", " ").replace("  ", " ")
    shares = [round(rows[heads, 128, 8192, 64]["read_share"]) for heads in (16, 64)]
    assert f"{shares[0]} % and {shares[1]} % of the read bandwidth" in text
    wide = rows[128, 64, 8192, 64]
    ceiling = re.search(r"read bandwidth measured in the same run \((\d+) GB/s\)", text)
    assert abs(wide["gbps"] / wide["read_share"] * 100 - int(ceiling[1])) < 10
    assert (
        f"{wide['tflops']:.0f} TFLOP/s, {wide['cublas_share']:.0f} % of what cuBLAS reached at the run's start" in text
    )
    start, end = (measured["ceilings"][when]["cublas_bf16_tflops"] for when in ("start", "end"))
    assert f"({start:.0f} TFLOP/s at its start; {end:.0f} at its end" in text
    drafts = [prefill_rows()[16, 128, tokens, 8192] for tokens in (2, 4)]
    assert f"take {drafts[0]['us_amortised']:.1f} and {drafts[1]['us_amortised']:.1f} us" in text
    assert {round(100 * row["read_share"]) for row in drafts} == {94}
    assert f"The host takes {measured['host']['call_us']:.0f} us for a call with a plan" in text
    other = load("tune/measurements/NVIDIA_H200/prefill_bf16_2026-11-24.json")
    assert f"{other['host']['call_us']:.0f} us on that of [another]" in text
    for heads, batch, page, ratio_text in (
        (16, 128, 1, "1.08x"),
        (128, 64, 1, "1.12x"),
        (16, 128, 16, "1.00x"),
        (128, 64, 16, "1.10x"),
    ):
        ratio = rows[heads, batch, 8192, page]["us_amortised"] / rows[heads, batch, 8192, 64]["us_amortised"]
        assert abs(ratio - float(ratio_text[:-1])) <= 0.01, (heads, page, ratio)
        assert ratio_text in text


def test_the_examples_run_on_cpu_tensors():
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for code, tokens in zip(blocks, (4, 517, 517), strict=True):
        exec(compile(code.replace('"cuda"', '"cpu"'), "README.md", "exec"), names)
        assert names["out"].shape == (tokens, 16, 512)
        assert names["out"].isfinite().all()
        assert names["lse"].dtype is torch.float32
