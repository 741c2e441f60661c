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
from mla_cute.cli import sanitize, soak, soak_draw
from mla_cute.compile import jit
from mla_cute.compile.jit import KernelRef
from mla_cute.config import KERNELS, KernelConfig, why_infeasible
from mla_cute.dims import HEAD_DIMS, HeadDims
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
    base = dataclasses.replace(soak_draw.draw(0, False), op="decode", num_heads=3, page_size=4, causal=False)
    base = dataclasses.replace(base, entry="csr", dims=HeadDims(), layout="", q_fp8=False, as_none=False, sinks=False)
    return dataclasses.replace(base, kind=kind, steps=(step,) * count, topk=0, **change)


def small_sparse(kind, **change):
    """The same of lists; each of them twice as long as the longest request."""
    lists = {"op": "sparse", "entry": "topk_lens", "sinks": True, "drift": 0.0, "dtype": torch.bfloat16}
    return dataclasses.replace(small(kind, **lists | change), topk=19)


# ------------------------------------------------------------------------------------------------ what is drawn


def test_a_seed_is_a_scenario():
    for on_gpu in (False, True):
        assert [soak_draw.draw(seed, on_gpu) for seed in range(50)] == [
            soak_draw.draw(seed, on_gpu) for seed in range(50)
        ]
    assert len({str(soak_draw.draw(seed, True)) for seed in range(200)}) > 190


def test_scenarios_meet_everything():
    drawn = [soak_draw.draw(seed, True) for seed in range(6000)]
    for name, values in {
        "kind": soak_draw.KINDS,
        "op": soak_draw.OPS,
        "num_heads": soak_draw.HEADS,
        "page_size": [page for pages in soak_draw.PAGE_SIZES.values() for page in pages],
        "dtype": (torch.bfloat16, torch.float16),
        "layout": ("", *soak_draw.FP8_LAYOUTS),
        "q_fp8": (False, True),
        "causal": (False, True),
        "cache_layout": soak_draw.CACHE_LAYOUTS,
        "q_layout": soak_draw.Q_LAYOUTS,
        "out_layout": soak_draw.OUT_LAYOUTS,
        "entry": {entry for entries in soak_draw.ENTRIES.values() for entry in entries},
        "with_plan": (False, True),
        "batch_invariant": (False, True),
        "lse_base": (2, "e"),
        "dims": HEAD_DIMS,
        "as_none": (False, True),
        "sinks": (False, True),
    }.items():
        assert {getattr(scenario, name) for scenario in drawn} == set(values), name
    for name, values in {"dims": HEAD_DIMS, "layout": ("", *soak_draw.FP8_LAYOUTS), "kind": soak_draw.KINDS}.items():
        for op in soak_draw.OPS:
            assert {getattr(scenario, name) for scenario in drawn if scenario.op == op} == set(values), (op, name)
    for op, entries in soak_draw.ENTRIES.items():
        assert {scenario.entry for scenario in drawn if scenario.op == op} == set(entries)
    assert {s.layout for s in drawn if s.dims != HeadDims()} == {"", "tensor"}
    assert not any(s.as_none and s.dims.kpe for s in drawn)
    configs = [(scenario, scenario.config) for scenario in drawn if scenario.config is not None]
    assert len(configs) < len(drawn)
    assert all(why_infeasible(config) is None for _, config in configs)
    decode = [(bool(s.layout), s.num_heads > 16, c) for s, c in configs if s.op == "decode"]
    assert {(fp8, many, c.fp8_kernel if fp8 else c.kernel, c.cut_unit) for fp8, many, c in decode} == set(
        itertools.product((False, True), (False, True), KERNELS, (1, 2))
    )
    assert {config.min_blocks % 2 for _, config in configs if config.cut_unit == 1} == {0, 1}
    assert {config.launch() for _, config in configs} == {KernelConfig().launch()}, "compiled once"
    for box, pages in soak_draw.PAGE_SIZES.items():
        assert {registry.box_rows_of(page) for page in pages} == {box}
    assert {len(scenario.steps[0]) for scenario in drawn} >= {1, 40}
    assert max(kv for s in drawn for step in s.steps for _, kv in step) > 15000
    assert any(q > kv > 0 for s in drawn for step in s.steps for q, kv in step)


def test_lists_are_drawn_in_every_length():
    drawn = [scenario for scenario in (soak_draw.draw(seed, True) for seed in range(6000)) if scenario.op == "sparse"]
    assert {scenario.topk for scenario in drawn} >= {1, 63, 64, 65, 127, 128, 129, 512, 2048}
    assert {scenario.topk % 2 for scenario in drawn} == {0, 1}
    assert max(scenario.topk for scenario in drawn) > 10000
    assert all(q == 1 for scenario in drawn for step in scenario.steps for q, _ in step)
    with_sinks = [scenario for scenario in drawn if scenario.sinks]
    assert 0.15 < len(with_sinks) / len(drawn) < 0.5
    assert all(s.drift >= 0 and not (s.layout and s.dtype is torch.float16) for s in with_sinks)
    assert {scenario.layout for scenario in with_sinks} == {"", *soak_draw.FP8_LAYOUTS}
    assert not any(s.topk or s.sinks for s in (soak_draw.draw(n, True) for n in range(500)) if s.op != "sparse")


def test_the_line_of_a_scenario_names_kernel_and_cuts():
    config = KernelConfig(kernel="tile16", fp8_kernel="tile64", cut_unit=1, min_blocks=3)
    for layout, kernel in (("", "tile16"), ("token", "tile64")):
        scenario = dataclasses.replace(soak_draw.draw(0, True), layout=layout, config=config)
        assert str(scenario).endswith(f"kernel {kernel}, cut_unit 1, min_blocks 3")
    assert "cut_unit" not in str(dataclasses.replace(scenario, config=None))


def test_the_line_of_a_scenario_names_lists_and_channels():
    scenario = dataclasses.replace(soak_draw.draw(0, True), op="sparse", topk=77, sinks=True, dims=HeadDims())
    assert ", lists of 77, sinks, " in str(scenario)
    assert "channels" not in str(scenario)
    assert "256 + 0 channels, None for the rope part" in str(
        dataclasses.replace(scenario, dims=HeadDims(256, 0), as_none=True)
    )


def test_steps_fit_the_same_buffers_and_are_bounded():
    for on_gpu in (False, True):
        for scenario in (soak_draw.draw(seed, on_gpu) for seed in range(3000)):
            assert len({len(step) for step in scenario.steps}) == 1
            totals = {sum(q for q, _ in step) for step in scenario.steps}
            assert len(totals) == 1
            longest = max(kv for step in scenario.steps for _, kv in step)
            # an empty batch and decode's rows are not cut, so the bound may be passed by a little
            total_q = totals.pop()
            assert scenario.num_heads * total_q * longest <= 2 * soak_draw.MOST_SCORES[on_gpu]
            assert scenario.num_heads * total_q * scenario.topk <= soak_draw.MOST_SCORES[on_gpu]
            assert all(kv >= 0 and q >= 0 for step in scenario.steps for q, kv in step)


def test_seeds_in_a_row_share_a_variant():
    first = [soak_draw.draw(seed, True) for seed in range(soak_draw.VARIANT_SEEDS)]
    facts = {(registry.box_rows_of(s.page_size), s.dtype, s.layout, s.q_fp8, s.dims) for s in first}
    assert len(facts) == 1
    assert soak.random_seed() % soak_draw.VARIANT_SEEDS == 0


# ------------------------------------------------------------------------------------------------ verdicts


def test_the_independent_computation_is_that_of_the_sweep():
    assert soak.independent is checking.independent


@pytest.mark.parametrize("kind", soak_draw.KINDS)
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
    scenario = dataclasses.replace(small("replay"), steps=steps)
    assert soak.run_scenario(scenario, CPU) == []
    right, first = reference.requests_of, []

    def stale(*metadata):
        pages, lengths = right(*metadata)
        first.append(([ids.clone() for ids in pages], lengths))
        return first[0]

    monkeypatch.setattr(reference, "requests_of", stale)
    failures = soak.run_scenario(scenario, CPU)
    assert {failure.split(":")[0] for failure in failures} == {"replay 2", "replay 3"}, failures


@pytest.mark.parametrize("layout", ["", *soak_draw.FP8_LAYOUTS])
def test_prefill_of_every_layout(layout):
    steps = (((3, 5), (0, 4), (9, 6), (2, 0), (1, 70)),)
    scenario = small("repeat", op="prefill", causal=True, layout=layout, q_fp8=bool(layout), drift=60.0)
    assert soak.run_scenario(dataclasses.replace(scenario, steps=steps), CPU) == []


@pytest.mark.parametrize("entry", soak_draw.ENTRIES["sparse"])
@pytest.mark.parametrize("with_plan", [False, True])
@pytest.mark.parametrize("kind", soak_draw.KINDS)
def test_lists_pass_and_fail_in_every_kind(kind, with_plan, entry, monkeypatch):
    scenario = small_sparse(kind, with_plan=with_plan, entry=entry)
    assert soak.run_scenario(scenario, CPU) == []
    right = reference._attend

    def wrong(*args, **kwargs):
        rows, lse = right(*args, **kwargs)
        return rows * 1.1, lse

    monkeypatch.setattr(reference, "_attend", wrong)
    assert any("error norm" in failure for failure in soak.run_scenario(scenario, CPU))


@pytest.mark.parametrize("layout", ["", *soak_draw.FP8_LAYOUTS])
def test_lists_over_every_layout(layout):
    steps = (((1, 70), (1, 0), (1, 300), (1, 1)),)
    scenario = small_sparse("repeat", layout=layout, q_fp8=bool(layout), drift=60.0)
    for topk in (1, 65, 200):
        assert soak.run_scenario(dataclasses.replace(scenario, steps=steps, topk=topk), CPU) == []


@pytest.mark.parametrize("sinks", ["ignored", "of another head"])
def test_wrong_sinks_fail(sinks, monkeypatch):
    scenario = dataclasses.replace(small_sparse("repeat"), steps=(((1, 30),) * 4,), topk=30)
    assert soak.run_scenario(scenario, CPU) == []
    right = soak.call_sparse

    def wrong(given, lists, *, sink, **options):
        return right(given, lists, sink=None if sinks == "ignored" else sink.roll(1), **options)

    monkeypatch.setattr(soak, "call_sparse", wrong)
    assert any("error norm" in failure for failure in soak.run_scenario(scenario, CPU))


def test_a_replay_that_reads_old_lists_fails(monkeypatch):
    scenario = small_sparse("replay", entry="all_columns")
    assert soak.run_scenario(scenario, CPU) == []
    right, first = soak.call_sparse, []

    def stale(given, lists, **options):
        first.append(soak.Lists(lists.indices.clone(), lists.topk_lens.clone()))
        return right(given, first[0], **options)

    monkeypatch.setattr(soak, "call_sparse", stale)
    failures = soak.run_scenario(scenario, CPU)
    assert {failure.split(":")[0] for failure in failures} == {"replay 2", "replay 3"}, failures


def test_layers_have_lists_of_their_own_in_one_plan():
    scenario = small_sparse("layers")
    layers = [soak.subject(scenario, 0, CPU, layer) for layer in range(2)]
    assert torch.equal(layers[0].lists.topk_lens, layers[1].lists.topk_lens)
    assert not torch.equal(layers[0].lists.indices, layers[1].lists.indices)


@pytest.mark.parametrize("op", soak_draw.OPS)
@pytest.mark.parametrize("dims", HEAD_DIMS[1:], ids=str)
def test_other_head_dimensions(dims, op):
    for layout, as_none in (("", False), ("tensor", dims.kpe == 0)):
        change = {"op": op, "dims": dims, "layout": layout, "q_fp8": bool(layout), "as_none": as_none, "drift": 60.0}
        scenario = small_sparse("repeat", **change) if op == "sparse" else small("repeat", **change)
        if op == "prefill":
            steps = (((3, 5), (0, 4), (2, 0), (1, 70)),)
            scenario = dataclasses.replace(scenario, steps=steps, causal=True)
        it = soak.subject(scenario, 0, CPU)
        assert (it.case.ckv_cache.shape[-1], it.case.kpe_cache.shape[-1]) == dims
        assert soak.run_scenario(scenario, CPU) == []


def test_no_rope_part_is_given_as_none(monkeypatch):
    scenario = small("repeat", dims=HeadDims(512, 0), as_none=True)
    seen = []
    right = soak.DecodeCase.call
    monkeypatch.setattr(
        soak.DecodeCase, "call", lambda case, *args, **kw: seen.append(case.q_pe) or right(case, *args, **kw)
    )
    assert soak.run_scenario(scenario, CPU) == []
    assert seen == [None, None]


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
    assert seen == {(kernel, "cut") for kernel in (*few, registry.DECODE, registry.DECODE_FP8)} | {
        (kernel, "several items") for kernel in few
    }


def test_cases_of_lists_take_both_kernels_and_are_cut():
    found = {case.name: case.kernel for case, _ in scenarios_of("sparse")}
    assert found == {
        "sparse-bf16-h16": registry.DECODE_TILE16,
        "sparse-bf16-h128": registry.DECODE,
        "sparse-group-h16": registry.DECODE_TILE16_FP8,
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
