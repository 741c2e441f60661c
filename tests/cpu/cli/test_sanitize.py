"""The sanitizer command, on a machine without a GPU and with a fake compute-sanitizer."""

import itertools
import os
import sys
import textwrap

import pytest
import torch
from call_case import decode_problem
from check_case import invoke

import mla_cute
from mla_cute import gpu as gpu_facts
from mla_cute import plan
from mla_cute.cli import sanitize, soak
from mla_cute.compile import jit
from mla_cute.compile.jit import KernelRef
from mla_cute.dims import HeadDims
from mla_cute.kernels import registry
from mla_cute.kernels.planner import model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(gpu_facts, "why_not_hopper", lambda: "there is no GPU in this test")


def test_cases_meet_every_kernel_format_and_way_to_load():
    kernels = {name: ref for name, ref in vars(registry).items() if isinstance(ref, KernelRef)}
    assert {case.kernel for case in sanitize.cases().values()} == set(kernels.values())
    names = set(sanitize.cases())
    for kv_format in ("bf16", *registry.KV_FORMATS):
        for op in registry.OPS:
            assert {f"{op}-{kv_format}-h16-page64", f"{op}-{kv_format}-h16-page1"} <= names
        assert f"append-{kv_format}" in names
    for heads in (16, 128):
        assert {f"sparse-bf16-h{heads}", f"sparse-group-h{heads}"} <= names
    assert {"decode-bf16-h16-page64-256+64", "decode-bf16-h128-page64-512+0"} <= names


def scenarios_of(op):
    """(case, its scenario) of the sanitizer's calls of an op that run a main kernel."""
    found = [(case, case.run.args[0]) for name, case in sanitize.cases().items() if f"{op}-planner" not in name]
    return [(case, scenario) for case, scenario in found if getattr(scenario, "op", None) == op]


def test_cases_name_the_kernel_that_runs(monkeypatch):
    """Their plans take it from the configuration, whatever the lengths and the GPU's tuned file say."""
    monkeypatch.setattr(plan, "num_sms", lambda device: 132)
    asked = []
    monkeypatch.setattr(jit, "get", lambda ref, key, config: asked.append(ref) or (lambda *arguments: None))
    meta = torch.device("meta")
    indptr = torch.zeros(9, dtype=torch.int32, device=meta)
    for case, scenario in scenarios_of("decode"):
        sizes = {"num_heads": scenario.num_heads, "page_size": scenario.page_size, "kv_format": scenario.layout}
        made = mla_cute.plan_decode(indptr, **sizes, q_fp8=scenario.q_fp8, max_kv_len=1130, config=scenario.config)
        facts = (scenario.num_heads, scenario.page_size, 9, scenario.dtype, meta, scenario.layout, scenario.q_fp8)
        asked.clear()
        made.launcher(decode_problem(8, *facts), made.form)
        assert asked == [case.kernel]
        assert scenario.config.cut_unit == (1 if "tile16" in case.kernel.name else 2)
        assert (scenario.config.fp8_kernel if scenario.layout else scenario.config.kernel) != "auto"
    names = {case.name: case.kernel for case, _ in scenarios_of("decode")}
    for page_size in (64, 1):
        assert names[f"decode-bf16-h16-page{page_size}"] is registry.DECODE_TILE16
        assert names[f"decode-bf16-h40-page{page_size}"] is registry.DECODE_TILE16
        assert names[f"decode-bf16-h128-page{page_size}"] is registry.DECODE


@pytest.mark.parametrize("num_sms", [114, 132])
def test_decode_cases_cut_and_go_on(num_sms):
    seen = set()
    for case, scenario in scenarios_of("decode"):
        kv_lens = [kv for _, kv in scenario.steps[0]]
        parts = registry.decode_parts(scenario.layout, scenario.num_heads, scenario.config, num_sms)
        made = model.plan(kv_lens, [0] * len(kv_lens), parts, scenario.num_heads, scenario.config)
        longest = kv_lens.index(max(kv_lens))
        if len(kv_lens) > parts:
            assert max(end - begin for begin, end in itertools.pairwise(made.starts)) > 1
            seen.add((case.kernel, "several items"))
        else:
            pieces = [(begin, end) for request, begin, end, *_ in made.items if request == longest]
            assert len(pieces) == made.splits[longest][1] == 2
            assert all(end - begin > 6 * registry.BLOCK for begin, end in pieces), "more than the slots of a ring"
            assert pieces[1][0] % 128 == (64 if "tile16" in case.kernel.name else 0)
            seen.add((case.kernel, "cut"))
    few = (registry.DECODE_TILE16, registry.DECODE_TILE16_FP8)
    many = (registry.DECODE, registry.DECODE_FP8, registry.DECODE_TILE32_FP8)
    assert seen == {(kernel, "cut") for kernel in (*few, *many)} | {(kernel, "several items") for kernel in few}


def test_cases_of_lists_take_every_kernel_and_are_cut():
    found = {case.name: case.kernel for case, _ in scenarios_of("sparse")}
    assert found == {
        "sparse-bf16-h16": registry.DECODE_TILE16,
        "sparse-bf16-h128": registry.DECODE,
        "sparse-group-h16": registry.DECODE_TILE16_FP8,
        "sparse-group656-h16": registry.DECODE_TILE16_FP8,
        "sparse-group-h32": registry.DECODE_TILE32_FP8,
        "sparse-group-h128": registry.DECODE_FP8,
    }
    for _, scenario in scenarios_of("sparse"):
        lens = soak.subject(scenario, 0, CPU).lists.topk_lens.tolist()
        parts = registry.decode_parts(scenario.layout, scenario.num_heads, scenario.config, 132)
        made = model.plan(lens, [0] * len(lens), parts, scenario.num_heads, scenario.config)
        assert max(count for _, count in made.splits) > 1
        assert min(lens) == 0


def test_cases_of_other_head_dimensions_have_them():
    found = {case.name: (case.kernel, s.dims) for case, s in scenarios_of("decode") if s.dims != HeadDims()}
    assert found == {
        "decode-bf16-h16-page64-256+64": (registry.DECODE_TILE16, HeadDims(256, 64)),
        "decode-bf16-h128-page64-512+0": (registry.DECODE, HeadDims(512, 0)),
    }


def test_cases_run_and_tell_a_wrong_result(monkeypatch, capsys):
    names = [
        "decode-bf16-h16-page1",
        "sparse-group-h16",
        "decode-bf16-h16-page64-256+64",
        "prefill-planner-csr-invariant",
        "append-group",
        "merge_states-float16",
    ]
    assert sanitize.run_cases(names, CPU) == 0
    assert capsys.readouterr().out.split("\n") == [f"{what} {n}" for n in names for what in ("case", "ok")] + [""]
    monkeypatch.setattr(soak, "run_scenario", lambda scenario, device: ["made up"])
    assert sanitize.run_cases(names[:2], CPU) == 1
    assert "wrong decode-bf16-h16-page1: made up" in capsys.readouterr().out


FAKE = """
    #!{python}
    import subprocess, sys
    names = sys.argv[sys.argv.index("--cases") + 1:]
    print("========= COMPUTE-SANITIZER")
    for name in names:
        print("case", name)
        if name == "append-token":
            print("========= Invalid __global__ write of size 4 bytes")
        if name == "append-group" and {hangs}:
            import time
            sys.stdout.flush()
            time.sleep(60)
        if name == "append-tensor" and {crashes}:
            sys.exit(11)
        print("ok", name)
    errors = int("append-token" in names)
    print(f"========= ERROR SUMMARY: {{errors}} errors")
    sys.exit(99 if errors else 0)
"""


@pytest.fixture
def fake_sanitizer(tmp_path, monkeypatch):
    """compute-sanitizer as a script that finds an error in append-token; the child itself does nothing."""

    def install(hangs=False, crashes=False):
        script = tmp_path / "bin" / "compute-sanitizer"
        script.parent.mkdir(exist_ok=True)
        script.write_text(textwrap.dedent(FAKE).strip().format(python=sys.executable, hangs=hangs, crashes=crashes))
        script.chmod(0o755)
        monkeypatch.setenv("PATH", os.pathsep.join([str(script.parent), os.environ["PATH"]]))
        monkeypatch.setattr(sanitize, "_CHILD", ("-c", "import sys; [print('ok', n) for n in sys.argv[2:]]"))
        return script

    return install


APPENDS = ["append-bf16", "append-tensor", "append-token", "append-group"]


def test_the_error_is_traced_to_its_case(fake_sanitizer):
    fake_sanitizer()
    said = []
    rows, status = sanitize.run(names=APPENDS, say=said.append)
    assert status == 1
    assert [row[0] for row in rows] == APPENDS
    results = {row[0]: row[2] for row in rows}
    assert results.pop("append-token") == "1 errors of memcheck: Invalid __global__ write of size 4 bytes"
    assert set(results.values()) == {"ok"}
    assert any(line.startswith("FAILED append-token") and "Invalid __global__" in line for line in said)
    assert sanitize.run(names=APPENDS[:2], tool="synccheck", say=said.append)[1] == 0


def test_a_case_that_hangs_or_crashes_is_named(fake_sanitizer):
    fake_sanitizer(hangs=True, crashes=True)
    rows, status = sanitize.run(names=APPENDS, silence=5.0, say=lambda text: None)
    assert status == 1
    results = {row[0]: row[2] for row in rows}
    assert results["append-bf16"] == "ok"
    assert results["append-tensor"].startswith("exit status 11")
    assert results["append-group"] == "hung: nothing printed for 5 s, at append-group"


def test_a_tool_that_sees_nothing_is_no_pass():
    assert "no summary" in sanitize._result(["ok a"], 0, "memcheck", ["a"])
    assert sanitize._result(["ok a"], 0, None, ["a"]) == "ok"
    assert sanitize._result([], 0, None, ["a"]) == "no result of a"
    assert "wrong result of a: x" in sanitize._result(["wrong a: x"], 1, None, ["a"])
    assert "2 errors of racecheck" in sanitize._result(["= RACECHECK SUMMARY: 2 hazards displayed"], 0, "racecheck", [])


def test_where_the_sanitizer_is_looked_for(monkeypatch, fake_sanitizer, tmp_path):
    script = fake_sanitizer()
    assert sanitize.find_sanitizer() == str(script)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert sanitize.find_sanitizer() == str(script)
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(sanitize.shutil, "which", lambda *args, **kwargs: None)
    with pytest.raises(sanitize.MissingTool, match=r"neither on PATH nor in .*CUDA_HOME"):
        sanitize.find_sanitizer()


@pytest.mark.parametrize(("change", "named"), [({"tool": "valgrind"}, "tool"), ({"names": ["append-x"]}, "cases")])
def test_bad_arguments(change, named):
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        sanitize.run(**change)


def test_the_module_lists_its_cases_and_wants_a_gpu(capsys):
    assert sanitize.main(["--list"]) == 0
    assert capsys.readouterr().out.splitlines() == list(sanitize.cases())
    assert sanitize.main([]) == 2
    assert "there is no GPU in this test" in capsys.readouterr().err


def test_check_sanitize(monkeypatch, fake_sanitizer):
    monkeypatch.setattr(gpu_facts, "why_not_hopper", lambda: None)
    fake_sanitizer()
    result = invoke("--sanitize", "--tool", "synccheck")
    assert result.exit_code == 1
    assert "kernels under synccheck" in result.output
    assert result.output.count("Invalid __global__ write") >= 1
    assert invoke("--sanitize", "--tool", "lint").exit_code == 2
