"""The soak, on a machine without a GPU."""

import dataclasses
import itertools
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from check_case import invoke
from limits import PROCESS_S

import mla_cute
from mla_cute import gpu as gpu_facts
from mla_cute import reference
from mla_cute.cli import check as checking
from mla_cute.cli import soak, soak_draw
from mla_cute.config import KERNELS, KernelConfig, why_infeasible
from mla_cute.dims import HEAD_DIMS, HeadDims
from mla_cute.kernels import registry

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


def expect_a_wrong_output_to_fail(monkeypatch, scenario):
    right = reference._attend

    def wrong(*args, **kwargs):
        rows, lse = right(*args, **kwargs)
        return rows * 1.1, lse

    monkeypatch.setattr(reference, "_attend", wrong)
    assert any("error norm" in failure for failure in soak.run_scenario(scenario, CPU))


@pytest.mark.parametrize("kind", soak_draw.KINDS)
@pytest.mark.parametrize("with_plan", [False, True])
def test_every_kind_passes_and_fails(kind, with_plan, monkeypatch):
    scenario = small(kind, with_plan=with_plan)
    assert soak.run_scenario(scenario, CPU) == []
    expect_a_wrong_output_to_fail(monkeypatch, scenario)


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
    expect_a_wrong_output_to_fail(monkeypatch, scenario)


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


# ------------------------------------------------------------------------------------------------ mla-cute check


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
