"""What the README says was measured is what the record it names holds, and its example runs."""

import json
import pathlib
import re

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def record():
    (path,) = set(re.findall(r"\]\((tune/measurements/[^)]+\.json)\)", README))
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def test_table_is_the_records():
    found = re.findall(r"^\| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", README, re.MULTILINE)
    assert len(found) == 10
    rows = {}
    for row in record()["rows"]:
        case = row["case"]
        assert row["check"]["ok"], case
        rows[case["num_heads"], case["batch"], case["kv_len"], case["page_size"]] = row
    for heads, batch, *times in found:
        for kv_len, us in zip((1024, 8192, 32768), times, strict=True):
            assert us == f"{rows[int(heads), int(batch), kv_len, 64]['us_amortised']:.1f}", (heads, batch, kv_len)


def test_sentences_are_the_records():
    measured = record()
    rows = {
        (r["case"]["num_heads"], r["case"]["batch"], r["case"]["kv_len"], r["case"]["page_size"]): r
        for r in measured["rows"]
    }
    ceiling = measured["ceilings"]["used"]["read_gbps"]
    shares = [round(100 * rows[heads, 128, 8192, 64]["gbps"] / ceiling) for heads in (16, 64)]
    assert f"{shares[0]} % and {shares[1]} % of the read bandwidth" in README
    assert f"({ceiling:.0f} GB/s)" in README
    wide = rows[128, 64, 8192, 64]
    beside = wide["cublas_beside_tflops"]
    assert f"{wide['tflops']:.0f} TFLOP/s, {100 * wide['tflops'] / beside:.0f} % of what cuBLAS" in README
    assert f"({beside:.0f} TFLOP/s" in README
    assert f"The host takes {measured['host']['call_us']:.0f} us for a call with a plan" in README.replace("\n", " ")
    for heads, batch, page, text in (
        (16, 128, 1, "1.08x"),
        (128, 64, 1, "1.10x"),
        (16, 128, 16, "1.03x"),
        (128, 64, 16, "1.07x"),
    ):
        ratio = rows[heads, batch, 8192, page]["us_amortised"] / rows[heads, batch, 8192, 64]["us_amortised"]
        assert abs(ratio - float(text[:-1])) <= 0.01, (heads, page, ratio)
        assert text in README


def test_the_examples_run_on_cpu_tensors():
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for code, tokens in zip(blocks, (4, 517), strict=True):
        exec(compile(code.replace('"cuda"', '"cpu"'), "README.md", "exec"), names)
        assert names["out"].shape == (tokens, 16, 512)
        assert names["out"].isfinite().all()
        assert names["lse"].dtype is torch.float32
