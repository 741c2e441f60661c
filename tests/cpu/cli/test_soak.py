"""The soak and the sanitizer command, on a machine without a GPU and with a fake compute-sanitizer."""

import dataclasses
import itertools
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest
import torch
from call_case import decode_problem
from limits import PROCESS_S

import mla_cute
from mla_cute import gpu as gpu_facts
from mla_cute import plan, reference
from mla_cute.cli import check as checking
from mla_cute.cli import sanitize, soak
from mla_cute.compile import jit
from mla_cute.compile.jit import KernelRef
from mla_cute.config import KERNELS, KernelConfig, why_infeasible
from mla_cute.kernels import registry
from mla_cute.kernels.planner import model

ROOT = pathlib.Path(mla_cute.__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(gpu_facts, "why_not_hopper", lambda: "there is no GPU in this test")


def run_module(module, *arguments, **environment):
    env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | environment
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=PROCESS_S)


def small(kind, **change):
    """A scenario of few rows of the kind."""
    count = {"repeat": 1, "replay": 4, "layers": 1, "streams": 2}[kind]
    step = ((1, 5), (1, 0), (1, 9))
    base = dataclasses.replace(soak.draw(0, False), op="decode", num_heads=3, page_size=4, causal=False)
    return dataclasses.replace(base, kind=kind, steps=(step,) * count, **change)


# ------------------------------------------------------------------------------------------------ what is drawn


def test_a_seed_is_a_scenario():
    for on_gpu in (False, True):
        assert [soak.draw(seed, on_gpu) for seed in range(50)] == [soak.draw(seed, on_gpu) for seed in range(50)]
    assert len({str(soak.draw(seed, True)) for seed in range(200)}) > 190


def test_scenarios_meet_everything():
    drawn = [soak.draw(seed, True) for seed in range(6000)]
    for name, values in {
        "kind": soak.KINDS,
        "op": registry.OPS,
        "num_heads": soak.HEADS,
        "page_size": [page for pages in soak.PAGE_SIZES.values() for page in pages],
        "dtype": (torch.bfloat16, torch.float16),
        "layout": ("", *soak.FP8_LAYOUTS),
        "q_fp8": (False, True),
        "causal": (False, True),
        "cache_layout": soak.CACHE_LAYOUTS,
        "q_layout": soak.Q_LAYOUTS,
        "out_layout": soak.OUT_LAYOUTS,
        "entry": soak.ENTRIES,
        "with_plan": (False, True),
        "batch_invariant": (False, True),
        "lse_base": (2, "e"),
    }.items():
        assert {getattr(scenario, name) for scenario in drawn} == set(values), name
    configs = [(scenario, scenario.config) for scenario in drawn if scenario.config is not None]
    assert len(configs) < len(drawn)
    assert all(why_infeasible(config) is None for _, config in configs)
    decode = [(bool(s.layout), s.num_heads > 16, c) for s, c in configs if s.op == "decode"]
    assert {(fp8, many, c.fp8_kernel if fp8 else c.kernel, c.cut_unit) for fp8, many, c in decode} == set(
        itertools.product((False, True), (False, True), KERNELS, (1, 2))
    )
    assert {config.min_blocks % 2 for _, config in configs if config.cut_unit == 1} == {0, 1}
    assert {config.launch() for _, config in configs} == {KernelConfig().launch()}, "compiled once"
    for box, pages in soak.PAGE_SIZES.items():
        assert {registry.box_rows_of(page) for page in pages} == {box}
    assert {len(scenario.steps[0]) for scenario in drawn} >= {1, 40}
    assert max(kv for s in drawn for step in s.steps for _, kv in step) > 15000
    assert any(q > kv > 0 for s in drawn for step in s.steps for q, kv in step)


def test_the_line_of_a_scenario_names_kernel_and_cuts():
    config = KernelConfig(kernel="tile16", fp8_kernel="tile64", cut_unit=1, min_blocks=3)
    for layout, kernel in (("", "tile16"), ("token", "tile64")):
        scenario = dataclasses.replace(soak.draw(0, True), layout=layout, config=config)
        assert str(scenario).endswith(f"kernel {kernel}, cut_unit 1, min_blocks 3")
    assert "cut_unit" not in str(dataclasses.replace(scenario, config=None))


def test_steps_fit_the_same_buffers_and_are_bounded():
    for on_gpu in (False, True):
        for scenario in (soak.draw(seed, on_gpu) for seed in range(3000)):
            assert len({len(step) for step in scenario.steps}) == 1
            totals = {sum(q for q, _ in step) for step in scenario.steps}
            assert len(totals) == 1
            longest = max(kv for step in scenario.steps for _, kv in step)
            # an empty batch and decode's rows are not cut, so the bound may be passed by a little
            assert scenario.num_heads * totals.pop() * longest <= 2 * soak._MOST_SCORES[on_gpu]
            assert all(kv >= 0 and q >= 0 for step in scenario.steps for q, kv in step)


def test_seeds_in_a_row_share_a_variant():
    first = [soak.draw(seed, True) for seed in range(soak._VARIANT_SEEDS)]
    facts = {(registry.box_rows_of(s.page_size), s.dtype, s.layout, s.q_fp8) for s in first}
    assert len(facts) == 1
    assert soak.random_seed() % soak._VARIANT_SEEDS == 0


# ------------------------------------------------------------------------------------------------ verdicts


def test_the_independent_computation_is_that_of_the_sweep():
    assert soak.independent is checking.independent


@pytest.mark.parametrize("kind", soak.KINDS)
@pytest.mark.parametrize("with_plan", [False, True])
def test_every_kind_passes_and_fails(kind, with_plan, monkeypatch):
    scenario = small(kind, with_plan=with_plan)
    assert soak.run_scenario(scenario, CPU) == []
    right = reference._attend

    def wrong(*args, **kwargs):
        rows, lse = right(*args, **kwargs)
        return rows * 1.1, lse

    monkeypatch.setattr(reference, "_attend", wrong)
    assert any("error norm" in failure for failure in soak.run_scenario(scenario, CPU))


def test_what_is_not_repeatable_fails(monkeypatch):
    right, calls = reference._attend, []

    def drifting(*args, **kwargs):
        rows, lse = right(*args, **kwargs)
        calls.append(1)
        return rows, lse + 1e-5 * len(calls)

    monkeypatch.setattr(reference, "_attend", drifting)
    for kind in ("repeat", "streams"):
        assert any("other bits" in failure for failure in soak.run_scenario(small(kind), CPU))


def test_a_replay_that_reads_old_metadata_fails(monkeypatch):
    steps = (((1, 5), (1, 0)), ((1, 0), (1, 7)), ((1, 4), (1, 4)), ((1, 0), (1, 0)))
    scenario = dataclasses.replace(small("replay", entry="csr"), steps=steps)
    assert soak.run_scenario(scenario, CPU) == []
    right, first = reference.requests_of, []

    def stale(*metadata):
        pages, lengths = right(*metadata)
        first.append(([ids.clone() for ids in pages], lengths))
        return first[0]

    monkeypatch.setattr(reference, "requests_of", stale)
    failures = soak.run_scenario(scenario, CPU)
    assert {failure.split(":")[0] for failure in failures} == {"replay 2", "replay 3"}, failures


@pytest.mark.parametrize("layout", ["", *soak.FP8_LAYOUTS])
def test_prefill_of_every_layout(layout):
    steps = (((3, 5), (0, 4), (9, 6), (2, 0), (1, 70)),)
    scenario = small("repeat", op="prefill", causal=True, layout=layout, q_fp8=bool(layout), drift=60.0)
    assert soak.run_scenario(dataclasses.replace(scenario, steps=steps), CPU) == []


# ------------------------------------------------------------------------------------------------ the run


def test_a_run_ends_in_time_and_names_failing_seeds(monkeypatch):
    said = []
    assert soak.run(0, cases=4, say=said.append) == 0
    assert "float32 reference" in said[0]
    assert "4 cases" in said[-1]
    assert "0 failed" in said[-1]

    def fails(scenario, device):
        if scenario.seed == 42:
            raise ZeroDivisionError("made up")
        return ["made up as well"] if scenario.seed == 43 else []

    monkeypatch.setattr(soak, "run_scenario", fails)
    said.clear()
    assert soak.run(40, cases=5, say=said.append) == 1
    assert [line.split(":")[0] for line in said if line.startswith("FAILED")] == ["FAILED seed 42", "FAILED seed 43"]
    assert "    again: mla-cute check --soak-seed 42" in said
    assert any("ZeroDivisionError: made up" in line for line in said)
    assert "2 failed" in said[-1]
    said.clear()
    assert soak.run(0, seconds=0.0, say=said.append) == 0
    assert "0 cases" in said[-1]


def test_a_run_gives_up_after_ten_failures(monkeypatch):
    monkeypatch.setattr(soak, "run_scenario", lambda scenario, device: ["wrong"])
    said = []
    assert soak.run(0, say=said.append) == 1
    assert "10 cases" in said[-1]


@pytest.mark.slow
def test_the_module_needs_neither_typer_nor_rich(tmp_path):
    for name in ("typer", "rich"):
        (tmp_path / f"{name}.py").write_text("raise ModuleNotFoundError('gone')\n")
    done = run_module("mla_cute.cli.soak", "--seed", "7", PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert done.returncode == 0, done.stderr
    assert "1 cases" in done.stdout
    assert run_module("mla_cute.cli.soak").returncode == 2


# ------------------------------------------------------------------------------------------------ the sanitizer


def test_cases_meet_every_kernel_format_and_way_to_load():
    kernels = {name: ref for name, ref in vars(registry).items() if isinstance(ref, KernelRef)}
    assert {case.kernel for case in sanitize.cases().values()} == set(kernels.values())
    names = set(sanitize.cases())
    for kv_format in ("bf16", *registry.KV_FORMATS):
        for op in registry.OPS:
            assert {f"{op}-{kv_format}-h16-page64", f"{op}-{kv_format}-h16-page1"} <= names
        assert f"append-{kv_format}" in names


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
    assert seen == {(kernel, "cut") for kernel in (*few, registry.DECODE, registry.DECODE_FP8)} | {
        (kernel, "several items") for kernel in few
    }


def test_cases_run_and_tell_a_wrong_result(monkeypatch, capsys):
    names = ["decode-bf16-h16-page1", "prefill-planner-csr-invariant", "append-group", "merge_states-float16"]
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


# ------------------------------------------------------------------------------------------------ mla-cute check


def invoke(*arguments):
    pytest.importorskip("typer", reason="the command line needs the extra cli")
    from typer.testing import CliRunner

    from mla_cute.cli import app

    return CliRunner().invoke(app.app, ["check", *arguments])


def test_check_soak():
    result = invoke("--soak", "1s", "--seed", "4000")
    assert result.exit_code == 0, result.output
    assert "first seed 4000" in result.output
    result = invoke("--soak-seed", "7")
    assert "1 cases" in result.output


def test_check_soak_fails(monkeypatch):
    monkeypatch.setattr(soak, "run_scenario", lambda scenario, device: ["made up"])
    result = invoke("--soak-seed", "7")
    assert result.exit_code == 1
    assert "again: mla-cute check --soak-seed 7" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--soak", "soon"], "--soak: expected a time"),
        (["--soak", "1s", "--sanitize"], "--soak and --sanitize: each is a check of its own"),
        (["--soak", "1s", "--quick"], "--quick: not an option of --soak"),
        (["--sanitize", "--json", "x"], "--json: not an option of --sanitize"),
        (["--sanitize"], "nothing to sanitize: there is no GPU in this test"),
    ],
)
def test_check_usage(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_check_sanitize(monkeypatch, fake_sanitizer):
    monkeypatch.setattr(gpu_facts, "why_not_hopper", lambda: None)
    fake_sanitizer()
    result = invoke("--sanitize", "--tool", "synccheck")
    assert result.exit_code == 1
    assert "kernels under synccheck" in result.output
    assert result.output.count("Invalid __global__ write") >= 1
    assert invoke("--sanitize", "--tool", "lint").exit_code == 2
