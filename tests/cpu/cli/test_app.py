"""The command line on a machine without a GPU: output, exit status, and what it says when something is wrong."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch
from bench_case import CEILINGS, H200, SMALL, FakeLibrary, FakeTimer, bench, shrink_rotation, wrong_page
from limits import PROCESS_S
from typer.testing import CliRunner

import mla_cute.cli
from mla_cute import extras, reference
from mla_cute import gpu as gpu_facts
from mla_cute.bench import command as bench_command
from mla_cute.bench import runner as bench_runner
from mla_cute.cli import app as app_module
from mla_cute.cli import check as checking
from mla_cute.cli import check_fp8 as checking_fp8
from mla_cute.cli import demo as showing
from mla_cute.cli import info as facts
from mla_cute.cli import watchdog
from mla_cute.dims import KV_FORMATS
from mla_cute.kernels import registry
from mla_cute.testing import cases

ROOT = pathlib.Path(mla_cute.__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """These tests are about a machine without a GPU, also where there is one."""
    monkeypatch.setattr(gpu_facts, "why_not_hopper", lambda: "there is no GPU in this test")


def run(*arguments):
    return CliRunner().invoke(app_module.app, list(arguments))


def run_module(*arguments, **environment):
    env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.run(
        [sys.executable, "-m", "mla_cute", *arguments],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=PROCESS_S,
    )


@pytest.mark.slow
def test_help_lists_the_commands():
    done = run_module("--help")
    assert done.returncode == 0, done.stderr
    assert "Usage: mla-cute" in done.stdout
    assert all(name in done.stdout for name in ("demo", "check", "bench", "info", "cache"))


@pytest.mark.parametrize("command", ["demo", "check", "bench", "info"])
def test_every_command_has_help(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Usage: mla-cute {command}" in result.output or f"{command} [OPTIONS]" in result.output


def test_no_command_and_unknown_command_are_usage_errors():
    assert run().exit_code == 2
    assert run("fly").exit_code == 2


def test_the_script_of_the_package_is_this_command():
    assert 'mla-cute = "mla_cute.cli:main"' in (ROOT / "pyproject.toml").read_text().splitlines()
    assert callable(mla_cute.cli.main)


def test_version():
    result = run("--version")
    assert (result.exit_code, result.output) == (0, f"mla-cute {mla_cute.__version__}\n")


@pytest.mark.slow
def test_importing_the_library_needs_neither_typer_nor_rich_nor_cutlass():
    code = (
        "import mla_cute, mla_cute.bench.__main__, mla_cute.cli.plain, sys\n"
        "print(sorted({'typer', 'rich', 'cutlass'} & set(sys.modules)))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False, timeout=PROCESS_S
    )
    assert done.stdout == "[]\n", done.stderr


def test_info_says_where_the_kernels_lie(tmp_path, monkeypatch):
    cache, tuned = tmp_path / "cache", tmp_path / "tuned"
    cache.mkdir()
    tuned.mkdir()
    (cache / "kernel.json").write_text("{}")
    (cache / "kernel.o").write_bytes(bytes(3 << 20))
    (tuned / "NVIDIA_H200.json").write_text("{}")
    monkeypatch.setenv("MLA_CUTE_CACHE_DIR", str(cache))
    monkeypatch.setenv("MLA_CUTE_TUNED_DIR", str(tuned))
    monkeypatch.setenv("CUTE_DSL_LINEINFO", "1")
    result = run("info")
    assert result.exit_code == 0
    for text in (str(cache), "1, 3.0 MiB", str(tuned / "NVIDIA_H200.json"), mla_cute.__version__, torch.__version__):
        assert text in result.output
    assert "no: there is no GPU in this test" in result.output
    assert "CUTE_DSL_LINEINFO" in result.output
    found = json.loads(run("info", "--json").output)
    assert found["cache"] == {"directory": str(cache), "entries": 1, "bytes": (3 << 20) + 2}
    assert found["kernels_run_here"] is False
    assert found["environment"]["MLA_CUTE_TUNED_DIR"] == str(tuned)
    assert found["environment"]["MLA_CUTE_CHECK"] == os.environ.get("MLA_CUTE_CHECK")


def test_info_without_a_home_or_a_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MLA_CUTE_CACHE_DIR", str(tmp_path / "not" / "made"))
    assert facts.cache() == {"directory": str(tmp_path / "not" / "made"), "entries": 0, "bytes": 0}

    def homeless():
        raise RuntimeError("no home")

    monkeypatch.setattr(facts.jit, "cache_dir", homeless)
    result = run("info")
    assert result.exit_code == 0
    assert "CANNOT BE WRITTEN: no home. New kernels are not kept. Every process compiles them anew" in result.output
    assert "set MLA_CUTE_CACHE_DIR to a writable directory" in result.output


def test_info_with_a_gpu(monkeypatch):
    monkeypatch.setattr(gpu_facts, "facts", lambda: H200)
    monkeypatch.setattr(gpu_facts, "why_not_hopper", lambda: None)
    result = run("info")
    assert "NVIDIA H200, compute capability 9.0" in result.output
    assert "132, 141.0 GiB" in result.output
    assert "580.1" in result.output
    assert "kernels run here" in result.output


@pytest.mark.slow
def test_check_quick_in_a_process_of_its_own():
    done = run_module("check", "--quick", "--seed", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Checking the CPU path" in done.stdout
    assert "the kernels are not checked" in done.stdout
    assert "seed 3" in done.stdout
    assert done.stdout.rstrip().endswith("all correct")


def test_check_says_where_it_is_on_standard_error(monkeypatch):
    specs = [dataclasses.replace(checking.sweep()[0], lengths=(3,), seed=seed) for seed in range(3)]
    monkeypatch.setattr(checking, "specs", lambda quick, seed, on_gpu: specs)
    result = run("check")
    assert result.stderr == "".join(f"checking, {done} of 3 done: {spec}\n" for done, spec in enumerate(specs))
    assert "checking, " not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tool", "memcheck"], "--tool: expected --sanitize beside it, got 'memcheck' alone"),
        (["--tool", "x"], "--tool: expected one of memcheck"),
        (["--sanitize", "--quick"], "--quick: not an option of --sanitize"),
    ],
)
def test_check_usage_errors(arguments, message):
    result = run("check", *arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_check_fails_on_a_wrong_result(monkeypatch):
    def one_token_short(q_nope, q_pe, ckv_cache, kpe_cache, block_table, seq_lens, sm_scale, **options):
        short = (seq_lens - 1).clamp(min=0)
        return reference.decode_reference_block_table(
            q_nope, q_pe, ckv_cache, kpe_cache, block_table, short, sm_scale, lse_base=options["lse_base"],
            out=options["out"], lse=options["lse"],
        )  # fmt: skip

    monkeypatch.setattr(mla_cute, "mla_paged_decode_block_table", one_token_short)
    spec = dataclasses.replace(checking.sweep()[0], lengths=(3, 70))
    monkeypatch.setattr(checking, "specs", lambda quick, seed, on_gpu: [spec])
    result = run("check", "--quick")
    assert result.exit_code == 1
    assert "2 FAILED" in result.output
    assert "FAILED h1-page1" in result.output
    assert "block table, lse in e" in result.output
    assert "all correct" not in result.output


def test_check_fails_when_a_second_call_differs(monkeypatch):
    calls = []

    def drifting(*args, **options):
        out, lse = reference.decode_reference(*args, **{k: options[k] for k in ("kv_last_page_len", "lse_base")})
        calls.append(None)
        options["out"].copy_(out)
        options["lse"].copy_(lse + 1e-6 * len(calls))
        return options["out"], options["lse"]

    monkeypatch.setattr(mla_cute, "mla_paged_decode", drifting)
    spec = dataclasses.replace(checking.sweep()[0], lengths=(3, 70))
    verdicts = dict(checking.run_spec(spec, torch.device("cpu")))
    assert verdicts["CSR"].ok
    assert verdicts["CSR again"].failures == ("a second call gave other bits",)


def test_quick_specs_meet_both_dtypes_and_many_pages_and_heads():
    quick, full = checking.specs(True, 0, True), checking.specs(False, 0, True)
    assert len(quick) < len(full) / 6
    assert {spec.dtype for spec in quick} == {torch.bfloat16, torch.float16}
    assert len({spec.page_size for spec in quick}) >= 9
    assert {1, 64} <= {spec.page_size for spec in quick}
    assert len({spec.num_heads for spec in quick}) >= 5
    assert max(n for spec in quick for n in spec.lengths) == 1000
    assert {spec.seed for spec in full}.isdisjoint({spec.seed for spec in checking.specs(False, 1, True)})


@pytest.fixture
def short_fp8_check(monkeypatch):
    """Four of the specs, short requests: a second instead of twenty."""
    chosen = [spec for spec in checking_fp8.specs() if spec.num_heads == 16 and spec.kv_format != "group"][:4]
    monkeypatch.setattr(checking_fp8, "specs", lambda: chosen)
    monkeypatch.setattr(checking_fp8, "CPU_LENGTHS", (300, 64, 1))
    return chosen


def test_check_fp8_meets_every_format_query_data_and_head_count():
    specs = checking_fp8.specs()
    high, native, fast = (
        [spec for spec in specs if spec.accuracy == accuracy] for accuracy in ("high", "native", "fast")
    )
    assert len(set(map(str, specs))) == len(specs) == len(high) + len(native) + len(fast)
    assert len(high) == 3 * 3 * 2 * 2
    assert {(spec.kv_format, spec.num_heads) for spec in native} == {("tensor", 128), ("token", 128)}
    assert len(native) == 3 * 2 * 2
    assert {(spec.kv_format, spec.num_heads) for spec in fast} == {(kv_format, 128) for kv_format in KV_FORMATS}
    assert {spec.q for spec in fast} == {"bf16"}
    assert len(fast) == 3 * 3
    assert {spec.kv_format for spec in specs} == {"tensor", "token", "group"}
    assert {spec.num_heads for spec in specs} == {16, 128}
    assert {spec.q for spec in specs} == {"bf16", "e4m3"}


def test_check_fp8_prints_both_errors_and_writes_the_record(short_fp8_check, tmp_path):
    path = tmp_path / "fp8.json"
    result = run("check", "--fp8", "--json", str(path))
    assert result.exit_code == 0, result.output
    assert "FP8 caches on the CPU (there is no GPU in this test)" in result.output
    assert "what runs is the float32 reference" in result.output
    assert "kernel: rel err" in result.output
    assert result.output.rstrip().endswith("all correct")
    record = json.loads(path.read_text())
    assert record["kind"] == "mla_cute.check.fp8"
    assert record["computed_by"] == "float32 reference on the CPU: there is no GPU in this test"
    assert record["versions"]["torch"] == torch.__version__
    assert len(record["source_sha256"]) == 64
    assert (record["failed"], len(record["rows"])) == (0, 4)
    assert record["lengths"] == [300, 64, 1]
    for row in record["rows"]:
        kernel, format_ = row["kernel_error"], row["format_error"]
        # rounding the output to bf16, and e4m3 with 3 bits of mantissa
        assert 5e-4 < kernel["rel_err"] < 3e-3
        assert kernel["lse_err"] < 1e-5
        assert 1e-2 < format_["rel_err"] < 6e-2
        assert 1e-3 < format_["lse_err"] < 1
        assert format_["cosine"] < kernel["cosine"] <= 1 + 1e-12
        assert format_["max_err"] > kernel["max_err"] > 0
        name = (row["data"], row["kv_format"], row["q"], str(row["num_heads"]), row["accuracy"])
        shown = [tuple(cell.strip() for cell in text.split("│")[1:6]) for text in result.output.splitlines()]
        assert shown.count(name) == 1


def test_check_fp8_on_outliers_large_rope_and_128_heads():
    lengths = (300, 1)
    found = {}
    for data, kv_format in (("normal", "group"), ("6 channels x 50", "tensor"), ("6 channels x 50", "group")):
        spec = checking_fp8.Spec(data, kv_format, False, 128)
        case, fp8 = checking_fp8.make(spec, torch.device("cpu"), lengths, 0)
        assert (case.ckv_cache.nan_to_num()[..., 77].abs().amax() > 50) == (data != "normal")
        ours, theirs = fp8.real().ckv_cache.nan_to_num(), case.ckv_cache.float().nan_to_num()
        small = theirs.abs() < 0.01
        found[data, kv_format] = float((ours - theirs)[small].norm() / theirs[small].norm())
    # an outlier costs the channels that share its scale their subnormals
    assert found["6 channels x 50", "tensor"] > found["6 channels x 50", "group"] > found["normal", "group"]
    case, _ = checking_fp8.make(checking_fp8.Spec("rope to 1000", "token", False, 16), torch.device("cpu"), (2000,), 0)
    largest = float(case.kpe_cache.nan_to_num().abs().amax())
    assert 500 < largest <= 1000


def test_check_fp8_fails_on_a_wrong_result(short_fp8_check, monkeypatch):
    def forgets_the_scale(*args, kpe_scale=1.0, **options):
        return reference.decode_reference(*args, **options, kpe_scale=1.0)

    monkeypatch.setattr(mla_cute, "mla_paged_decode", forgets_the_scale)
    result = run("check", "--fp8")
    assert result.exit_code == 1
    assert "FAILED normal, tensor, bf16, 16 heads: output: error norm" in result.output
    assert "FAILED normal, token" not in result.output
    assert "all correct" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--fp8", "--quick"], "--quick: the FP8 check has one size"), (["--json", "x"], "--json: only the FP8 check")],
)
def test_check_fp8_usage_errors(arguments, message):
    result = run("check", *arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_figures_of_what_is_not_finite_are_none():
    x = torch.ones(1, 2, 512)
    lse = torch.zeros(1, 2)
    found = checking_fp8.figures(x * 1.5, lse + 0.25, x, lse)
    assert found == pytest.approx({"rel_err": 0.5, "max_err": 0.5, "cosine": 1.0, "lse_err": 0.25})
    found = checking_fp8.figures(x * torch.nan, lse, x, lse)
    assert found == {"rel_err": None, "max_err": None, "cosine": None, "lse_err": 0.0}
    row = {"data": "d", "kv_format": "f", "q": "q", "num_heads": 1, "accuracy": "high", "failures": ["NaN"]}
    cells = checking_fp8.cells(row | {"kernel_error": found, "format_error": found})
    assert len(cells) == len(checking_fp8.COLUMNS)
    assert cells[5:9] == ("nan", "nan", "nan", "0.0e+00")
    assert cells[-1] == "FAILED"


def test_the_cpu_sweep_is_the_full_one_without_the_longest_requests():
    gpu, cpu = checking.specs(False, 0, True), checking.specs(False, 0, False)
    assert len(gpu) == len(cpu)
    assert max(n for spec in gpu for n in spec.lengths) == 20000
    assert max(n for spec in cpu for n in spec.lengths) == 4097


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_the_independent_computation_agrees_with_the_reference(page_size):
    case = cases.make_case([0, 1, 130], num_heads=4, page_size=page_size, index_offset=3, seed=5)
    ours, theirs = checking.independent(case), cases.expected_of(case)
    torch.testing.assert_close(ours.output, theirs.output, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.lse, theirs.lse, rtol=1e-5, atol=1e-5)
    # The yardsticks round at the same places, so they err alike.
    errors = [(e.in_dtype.float() - e.output).norm() for e in (ours, theirs)]
    assert errors[0] / errors[1] == pytest.approx(1, abs=0.1)


@pytest.mark.slow
def test_demo_without_a_gpu_in_a_process_of_its_own():
    done = run_module("demo", "--kernels", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No kernel runs here" in done.stdout
    assert "1. mla_paged_decode on CPU tensors" in done.stdout
    assert "513, 64" in done.stdout
    assert "2. no kernel compiled" in done.stdout


def test_demo_compiles_and_shows_the_machine_code(monkeypatch):
    plain = registry.PlannerKey(lengths="csr", batch_invariant=False)
    planner = [variant for variant in registry.variants() if variant[1] == plain]
    monkeypatch.setattr(showing, "showcase_variants", lambda: planner)
    result = run("demo")
    assert result.exit_code == 0, result.output
    row = next(text for text in result.output.splitlines() if text.startswith("│ planner (csr)"))
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[1] == "Planner"
    assert 16 <= int(cells[2]) <= 255  # registers
    assert cells[3] == "0"  # spill bytes
    assert cells[5] == "512"  # threads


INFO = {
    "registers": 168, "spill_bytes": 8, "smem_bytes": 1024, "threads": 384, "kernels": [], "instructions": None,
    "compile_seconds": 1.0, "cached": False,
}  # fmt: skip


def test_demo_shows_both_kinds_of_tensor_core_instructions(monkeypatch):
    counts = {"HGMMA": 88, "HMMA": 136, "UTMALDG": 9, "LDGSTS": 36}
    shown = ["HGMMA", "HMMA", "UTMALDG", "cp.async"]
    for instructions, wanted in ((counts, ["88", "136", "9", "36"]), (None, ["-"] * 4)):
        monkeypatch.setattr(showing.jit, "compile_info", lambda *_, i=instructions: INFO | {"instructions": i})
        (row,), spilling = showing.compile_rows(showing.showcase_variants()[:1], lambda *_: None)
        cells = dict(zip(showing.KERNEL_COLUMNS, row, strict=True))
        assert [cells[name] for name in shown] == wanted
        assert spilling == 1


def test_demo_says_what_counts_instructions_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(showing.jit, "compile_info", lambda *_: INFO | {"spill_bytes": 0})
    for found, said in ((None, True), ("/usr/bin/nvdisasm", False)):
        monkeypatch.setattr(showing.sass, "find_nvdisasm", lambda found=found: found)
        result = run("demo", "--kernels", "1")
        assert result.exit_code == 0
        command = extras.install_command("nvidia-cuda-nvdisasm")
        assert (f"instructions are not counted without nvdisasm: {command}" in result.output) == said


def test_nvdisasm_comes_with_the_demo():
    """`make demo` and README install the extra cli."""
    text = (ROOT / "pyproject.toml").read_text()
    [cli] = re.findall(r"^cli = \[(.*)\]$", text, re.MULTILINE)
    assert '"nvidia-cuda-nvdisasm' in cli
    assert ".[cli,bench]" in (ROOT / "Makefile").read_text()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_demo_does_not_silence_pip(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    done = subprocess.run(["make", "-n", "demo"], cwd=tmp_path, capture_output=True, text=True, check=True)
    installs = [line for line in done.stdout.splitlines() if "-m pip" in line]
    assert len(installs) == 2
    assert not [line for line in installs if re.search(r" (-q+|--quiet|--progress-bar)\b", line)]


def test_demo_fails_when_a_kernel_spills(monkeypatch):
    monkeypatch.setattr(showing.jit, "compile_info", lambda *variant: INFO)
    result = run("demo", "--kernels", "2")
    assert result.exit_code == 1
    assert "FAILED 2 kernels spill registers" in result.output


def test_demo_shows_page_sizes_64_and_1_the_planner_and_prefill():
    labels = [showing.label(variant) for variant in showing.showcase_variants()]
    assert len(labels) == 6
    assert any(text.startswith("prefill") for text in labels)
    for kernel in ("decode_tile64", "decode_tile16"):
        of_kernel = [text for text in labels if text.startswith(kernel)]
        assert any("TMA boxes of 64 rows" in text for text in of_kernel)
        assert any("cp.async gather" in text for text in of_kernel)
    assert any(text.startswith("planner") for text in labels)


def test_kernel_name():
    mangled = "kernel_cutlass_kernel_mla_cutekernelstile64setupTile64_object_at__Paramsmma_qkcutlasscuteatom_0"
    assert showing.kernel_name(mangled) == "Tile64"
    assert showing.kernel_name("something_else_entirely_and_long") == "something_else_entirely_"


def test_bench_without_a_gpu_says_so():
    result = run("bench", "quick")
    assert result.exit_code == 2
    assert "nothing to time: there is no GPU in this test" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["nonsense"],
            "fp8, fp8_prefill, fp8_fast, fp8_32_rows, grid, drafts, sparse, dims, ragged, quick, got",
        ),
        (["--heads", "16,x"], "--heads: expected integers separated by commas, got '16,x'"),
        (["--dtype", "fp8"], "--dtype: expected some of bfloat16"),
        (["--layout", "heap"], "layout: expected separate or fused, got 'heap'"),
        (["--kv-format", "row"], "kv_format: expected one of tensor, token, group, got 'row'"),
        (["--kv-format", ""], "kv_format: expected one of tensor, token, group, got ''"),
        (["--q-fp8"], "q_fp8: expected a kv_format beside e4m3 queries, got none"),
        (["--config", '{"speed": 11}'], "config: unknown fields ['speed']"),
        (["--config", "{"], "--config: expected a KernelConfig as JSON, got '{': Expecting property name"),
        (["--config", "[]"], "--config: expected a KernelConfig as a JSON object, got '[]'"),
        (["--config", '{"kernel": "x"}'], "--config: kernel: expected one of"),
        (["--compare", "none.json", "none.json"], "none.json"),
    ],
)
def test_bench_usage_errors(arguments, message):
    result = run("bench", *arguments)
    assert result.exit_code == 2
    assert message in result.output


@pytest.fixture
def hopper(monkeypatch):
    """A Hopper GPU as far as the commands can see, timed by the fake timer of the bench's tests."""
    shrink_rotation(monkeypatch)
    monkeypatch.setattr(gpu_facts, "why_not_hopper", lambda: None)
    monkeypatch.setattr(gpu_facts, "facts", lambda: H200)
    monkeypatch.setattr(gpu_facts, "clocks", lambda gpu: {"sm_mhz": 1755})
    monkeypatch.setattr(bench_runner, "occupy", lambda device: None)
    monkeypatch.setattr(bench_command, "CudaTimer", FakeTimer)
    monkeypatch.setattr(bench_runner.Library, "installed", classmethod(lambda cls, *options: FakeLibrary.make()))
    real = bench_runner.run
    monkeypatch.setattr(bench_command, "run", lambda *a, **k: real(*a, **k, ceilings=lambda _: dict(CEILINGS)))


GRID = ["--heads", "4", "--batch", "2", "--kv-len", "100", "--page-size", "16"]


def test_bench_prints_a_table_and_writes_the_record(hopper, tmp_path):
    out = tmp_path / "record.json"
    result = run("bench", *GRID, "--dtype", "bf16,fp16", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "103.5" in result.output
    assert "paged MLA on NVIDIA H200" in result.output
    assert "peer flash_mla: absent" in result.output
    record = json.loads(out.read_text())
    assert [row["case"]["dtype"] for row in record["rows"]] == ["bfloat16", "float16"]
    assert record["gpu"]["name"] == "NVIDIA H200"
    assert record["complete"] is True


def test_bench_of_an_fp8_grid(hopper, tmp_path):
    out = tmp_path / "record.json"
    result = run("bench", *GRID, "--kv-format", "token", "--q-fp8", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "token/e4m3" in result.output
    case = json.loads(out.read_text())["rows"][0]["case"]
    assert (case["kv_format"], case["q_fp8"]) == ("token", True)


def test_bench_of_a_wrong_kernel_exits_with_1(hopper, monkeypatch):
    monkeypatch.setattr(
        bench_runner.Library, "installed", classmethod(lambda cls, *options: FakeLibrary.make(wrong_page))
    )
    result = run("bench", *GRID, "--no-peers")
    assert result.exit_code == 1
    assert "WRONG" in result.output
    assert "left out (--no-peers)" in result.output


def test_bench_compare(tmp_path, monkeypatch):
    shrink_rotation(monkeypatch)
    for name, us in (("a.json", 200), ("b.json", 100)):
        bench_runner.write_json(tmp_path / name, bench(SMALL[:1], timer=FakeTimer(us=us)))
    result = run("bench", "--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"))
    assert result.exit_code == 0
    assert f"{203.6 / 103.6:.3f}" in result.output


def test_demo_on_a_gpu(hopper, monkeypatch):
    monkeypatch.setattr(showing, "GPU_CASES", tuple(SMALL[:1]))
    monkeypatch.setattr(showing, "DEPLOYMENTS", {4: "TP32"})
    result = run("demo")
    assert result.exit_code == 0, result.output
    assert "Running on the GPU: NVIDIA H200" in result.output
    assert "TP32" in result.output
    assert "4000 GB/s read, 800 TFLOP/s" in result.output
    monkeypatch.setattr(
        bench_runner.Library, "installed", classmethod(lambda cls, *options: FakeLibrary.make(wrong_page))
    )
    result = run("demo")
    assert result.exit_code == 1
    assert "WRONG" in result.output


def test_demo_shapes_are_deepseek_v3s():
    assert {case.num_heads for case in showing.GPU_CASES} == set(showing.DEPLOYMENTS) == {16, 128}
    assert {case.page_size for case in showing.GPU_CASES} == {1, 64}


@pytest.mark.slow
def test_watchdog_ends_a_process_that_hangs():
    code = (
        "import time\nfrom mla_cute.cli.watchdog import Watchdog\n"
        "with Watchdog(0.2, enabled=True) as dog:\n    dog.feed('case 7')\n    time.sleep(10 * 600)\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False, timeout=PROCESS_S
    )
    assert done.returncode == 3
    assert done.stderr == "mla-cute: case 7 did not finish within 0.2 s; the GPU hangs\n"


def test_watchdog_lets_go():
    with watchdog.Watchdog(0.05, enabled=True) as dog:
        dog.feed("one")
        timer = dog._timer
    timer.join(timeout=5)
    assert timer.finished.is_set()
    assert not timer.is_alive()
