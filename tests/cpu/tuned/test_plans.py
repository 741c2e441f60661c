"""Tuned configurations in plans and calls, and the log of the shapes they saw."""

import dataclasses
import json
import logging
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from tuned_case import FILE, META, SMS, SPEED, Folders, entry, when, write

import mla_cute
from mla_cute import attend, plan
from mla_cute.compile import jit
from mla_cute.config import KernelConfig
from mla_cute.dims import KV_FORMATS
from mla_cute.tuned import select, shape_log
from mla_cute.tuned.shape_log import ShapeLog

OTHER = KernelConfig(evict_first=False, min_blocks=8)


@pytest.fixture
def folders(monkeypatch, tmp_path):
    yield Folders(monkeypatch, tmp_path)
    select.clear()


@pytest.fixture
def no_kernels(monkeypatch):
    """Plans on the meta device, without compiled kernels."""
    monkeypatch.setattr(plan, "num_sms", lambda device: SMS)
    monkeypatch.setattr(jit, "get", lambda kernel, key, config: lambda *arguments: None)


# ---------------------------------------------------------------------------------------------------------------------
# plans and calls


def make_plans(**options) -> dict:
    indptr = torch.zeros(9, dtype=torch.int32, device=META)
    lengths = torch.zeros(8, dtype=torch.int32, device=META)
    sizes = {"num_heads": 16, "page_size": 64} | options
    return {
        "decode": mla_cute.plan_decode(indptr, **sizes),
        "decode table": mla_cute.plan_decode_block_table(lengths, max_pages=100, **sizes),
        "prefill": mla_cute.plan_prefill(indptr, indptr, total_q=33, **sizes),
        "prefill table": mla_cute.plan_prefill_block_table(indptr, lengths, total_q=33, max_pages=100, **sizes),
    }


def test_plans_say_what_they_know(folders, no_kernels):
    for name, made in make_plans().items():
        op, _, table = name.partition(" ")
        shape = when(op=op, q_len=1 if op == "decode" else 5, kv_len=6400 if table else None)
        assert made.selection == select.select(shape, META)
        assert made.config is made.selection.config
    for name, made in make_plans(kv_format="group", q_fp8=True, max_kv_len=7000).items():
        kv_len = 6400 if "table" in name else 7000
        assert made.selection.when == dataclasses.replace(
            made.selection.when, kv_format="group", q_fp8=True, kv_len=kv_len
        )


def test_plans_run_with_the_tuned_configuration(folders, no_kernels):
    configs = {op: KernelConfig(min_blocks=n, item_overhead=7) for op, n in (("decode", 8), ("prefill", 16))}
    write(folders.user, entry(configs["decode"]), entry(configs["prefill"], op="prefill", q_len=4))
    for name, made in make_plans().items():
        config = configs[name.partition(" ")[0]]
        assert made.config == config
        assert made.selection.source.startswith(f"user {FILE} entry ")
        assert made._cut_costs() == (config.min_blocks, 7, config.split_penalty)
    for made in make_plans(config=OTHER).values():
        assert (made.config, made.selection) == (OTHER, None)
    for made in make_plans(batch_invariant=True).values():
        assert made.config == select.default_for(made.selection.when, SPEED, batch_invariant=True)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("num_heads", [16, 128])
def test_decode_planners_are_told_where_to_cut(folders, no_kernels, num_heads, batch_invariant):
    """The default's unit without a file, an entry's with one, the caller's in any case; last of the arguments."""

    def planned(**options):
        made = make_plans(num_heads=num_heads, batch_invariant=batch_invariant, **options)
        return {(p.config.cut_unit, p._planner_args[-1]) for name, p in made.items() if name.startswith("decode")}

    default = 1 if num_heads == 16 else 2
    assert planned() == {(default, default)}
    for unit in (1, 2):
        config = KernelConfig(cut_unit=unit, min_blocks=2 * unit)
        assert planned(config=config) == {(unit, unit)}
        write(folders.user, entry(config, num_heads=num_heads))
        select.clear()
        used = default if batch_invariant else unit
        assert planned() == {(used, used)}


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(("min_blocks", "of_prefill"), [(1, 2), (2, 2), (3, 4), (8, 8)])
def test_prefill_planners_get_whole_pairs(folders, no_kernels, min_blocks, of_prefill, batch_invariant):
    config = KernelConfig(cut_unit=1, min_blocks=min_blocks, item_overhead=7, split_penalty=5)
    for name, made in make_plans(config=config, batch_invariant=batch_invariant).items():
        is_decode = name.startswith("decode")
        costs = (min_blocks if is_decode else of_prefill, 7, 5)
        after = (1,) if is_decode else (1, made.max_tiles)  # cut_unit; causal, tiles
        assert made._planner_args[-len(costs + after) :] == costs + after
        assert made.config == config


def test_plans_of_nothing(folders, no_kernels):
    none = torch.zeros(1, dtype=torch.int32, device=META)
    sizes = {"num_heads": 16, "page_size": 64}
    assert mla_cute.plan_decode(none, **sizes).selection.when.batch == 1
    assert mla_cute.plan_decode(none, max_kv_len=0, **sizes).selection.when.kv_len == 1
    lengths = torch.zeros(4, dtype=torch.int32, device=META)
    assert mla_cute.plan_decode_block_table(lengths, max_pages=0, **sizes).selection.when.kv_len == 1
    assert mla_cute.plan_prefill(none, none, total_q=0, **sizes).selection.when == when(
        op="prefill", batch=1, kv_len=None
    )


def test_plans_of_cpu_tensors_look_nothing_up(folders, monkeypatch):
    monkeypatch.setattr(select, "_select", None)
    made = mla_cute.plan_decode(torch.zeros(9, dtype=torch.int32), num_heads=16, page_size=64, kv_format="token")
    assert (made.selection, made.config) == (None, KernelConfig())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kv_format": "fp8"}, ValueError, "kv_format: expected one of ('', 'tensor', 'token', 'group'), got 'fp8'"),
        ({"kv_format": None}, ValueError, "kv_format: expected one of ('', 'tensor', 'token', 'group'), got None"),
        ({"q_fp8": True}, ValueError, "q_fp8: expected False with a 16-bit cache (kv_format ''), got True"),
        ({"q_fp8": 1, "kv_format": "token"}, TypeError, "q_fp8: expected True or False, got int 1"),
        ({"max_kv_len": 4.0}, TypeError, "max_kv_len: expected an int, got 4.0"),
        ({"max_kv_len": -1}, ValueError, "max_kv_len: expected >= 0, got -1"),
    ],
)
@pytest.mark.parametrize("form", ["decode", "decode table", "prefill", "prefill table"])
def test_wrong_hints_are_refused(options, error, message, form):
    indptr, lengths = torch.zeros(9, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    sizes = {"num_heads": 16, "page_size": 64, **options}
    make = {
        "decode": lambda: mla_cute.plan_decode(indptr, **sizes),
        "decode table": lambda: mla_cute.plan_decode_block_table(lengths, max_pages=4, **sizes),
        "prefill": lambda: mla_cute.plan_prefill(indptr, indptr, total_q=8, **sizes),
        "prefill table": lambda: mla_cute.plan_prefill_block_table(indptr, lengths, total_q=8, max_pages=4, **sizes),
    }
    with pytest.raises(error, match="^" + re.escape(message)):
        make[form]()


def test_the_hint_of_lengths_does_not_bound_the_workspace(folders, no_kernels):
    for name, made in make_plans(batch_invariant=True).items():
        told = make_plans(batch_invariant=True, max_kv_len=1)[name]
        assert (told.table.shape, told.part.shape) == (made.table.shape, made.part.shape)


class OnGpu(torch.Tensor):
    """CPU memory that calls take for a GPU's, as far as the plan."""

    is_cuda = True


class Planned(Exception):
    pass


@pytest.mark.parametrize(("kv_format", "q_fp8"), [("", False), *((f, q) for f in KV_FORMATS for q in (False, True))])
@pytest.mark.parametrize("form", ["decode", "decode_block_table", "prefill", "prefill_block_table"])
def test_calls_without_a_plan_tell_it_their_format(monkeypatch, form, kv_format, q_fp8):
    told = {}

    def make_plan(wanted):
        told.update(wanted._asdict())
        raise Planned

    monkeypatch.setattr(attend, "DecodePlan" if form.startswith("decode") else "PrefillPlan", make_plan)
    fp8, bf16 = torch.float8_e4m3fn, torch.bfloat16
    kpe_dtype = fp8 if kv_format == "tensor" else bf16
    q_nope = torch.zeros(2, 16, 512).to(fp8 if q_fp8 else bf16)
    q_pe = torch.zeros(2, 16, 64).to(kpe_dtype if q_fp8 else bf16)
    ckv, kpe = torch.zeros(4, 64, 512).to(fp8 if kv_format else bf16), torch.zeros(4, 64, 64).to(kpe_dtype)
    scales = {}
    if kv_format in ("token", "group"):
        scales["ckv_scale_arr"] = torch.ones(4, 64, 1 if kv_format == "token" else 4).as_subclass(OnGpu)
    ints = [torch.tensor(values, dtype=torch.int32) for values in ([0, 1, 2], [0, 1])]
    pages = [ints[1][:, None], torch.ones_like(ints[1])] if form.endswith("table") else ints
    metadata = pages if form.startswith("decode") else [ints[0], *pages]
    arguments = [x.as_subclass(OnGpu) for x in (q_nope, q_pe, ckv, kpe, *metadata)]
    with pytest.raises(Planned):
        getattr(mla_cute, f"mla_paged_{form}")(*arguments, 0.1, **scales)
    assert (told["kv_format"], told["q_fp8"]) == (kv_format, q_fp8)
    assert told["max_kv_len"] == (64 if form.endswith("table") else None)


# ---------------------------------------------------------------------------------------------------------------------
# the log of shapes


def facts(**change) -> tuple:
    return dataclasses.astuple(when(**change))


def test_shapes_are_counted(tmp_path):
    path = tmp_path / "shapes.jsonl"
    log = ShapeLog(path)
    for _ in range(5):
        log.saw(facts())
    log.saw(facts(batch=1, kv_len=None))
    assert select.read_shapes(path) == {when(): 1, when(batch=1, kv_len=None): 1}, "a killed process leaves the shapes"
    log.flush()
    log.flush()
    assert select.read_shapes(path) == {when(): 5, when(batch=1, kv_len=None): 1}
    log.saw(facts())
    log.flush()
    assert select.read_shapes(path)[when()] == 6
    other = ShapeLog(path)
    other.saw(facts())
    assert select.read_shapes(path)[when()] == 7
    assert len(path.read_text().splitlines()) == 5


def test_plans_are_recorded_whatever_their_configuration_is_from(folders, no_kernels, monkeypatch, tmp_path):
    log = ShapeLog(tmp_path / "shapes.jsonl")
    monkeypatch.setattr(shape_log, "recorder", log)
    shapes = [made.selection.when for made in make_plans(kv_format="token").values()]
    make_plans(kv_format="token", config=OTHER)
    log.flush()
    assert select.read_shapes(log.path) == dict.fromkeys(shapes, 2)
    assert [shape.op for shape in shapes] == ["decode", "decode", "prefill", "prefill"]


def test_lists_of_tokens_are_recorded_as_such(folders, no_kernels, monkeypatch, tmp_path):
    log = ShapeLog(tmp_path / "shapes.jsonl")
    monkeypatch.setattr(shape_log, "recorder", log)
    lists = torch.zeros(3, 77, dtype=torch.int32, device=META)
    made = mla_cute.plan_sparse(lists, num_heads=16)
    sparse = when(op="sparse", page_size=1, batch=3, kv_len=77)
    assert made.selection.when == sparse
    assert select.read_shapes(log.path) == {sparse: 1}


def test_a_log_that_cannot_be_written_costs_one_warning(tmp_path, caplog):
    log = ShapeLog(tmp_path / "absent" / "shapes.jsonl")
    log.saw(facts())
    log.saw(facts(batch=1))
    log.saw(facts(batch=1))
    log.flush()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "MLA_CUTE_LOG_SHAPES: shapes are not recorded" in record.message
    assert "absent" in record.message


SERVER = """
import torch
from mla_cute import plan
from mla_cute.compile import jit
import mla_cute
plan.num_sms = lambda device: 132
jit.get = lambda kernel, key, config: lambda *arguments: None
indptr = torch.zeros(9, dtype=torch.int32, device="meta")
for _ in range(7):
    mla_cute.plan_decode(indptr, num_heads=16, page_size=64)
"""
FORKED = """
import os
child = os.fork()
mla_cute.plan_decode(indptr, num_heads=16, page_size=1)
if child:
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.slow
def test_servers_write_one_file(tmp_path, monkeypatch):
    path = tmp_path / "shapes.jsonl"
    monkeypatch.setenv("MLA_CUTE_LOG_SHAPES", str(path))
    monkeypatch.setenv("MLA_CUTE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(mla_cute.__file__).resolve().parents[1]))
    subprocess.run([sys.executable, "-c", SERVER], check=True)
    subprocess.run([sys.executable, "-c", SERVER + FORKED], check=True)
    assert select.read_shapes(path) == {when(kv_len=None): 14, when(kv_len=None, page_size=1): 2}


def test_without_the_variable_nothing_is_recorded(monkeypatch):
    monkeypatch.delenv("MLA_CUTE_LOG_SHAPES", raising=False)
    assert shape_log._from_environment() is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting property name"),
        ("", "Expecting value"),
        ("[]", "expected an object of when and count"),
        ('{"when": {}}', "expected an object of when and count"),
        (json.dumps({"when": dataclasses.asdict(when()), "count": 0}), "count: expected an int >= 1, got 0"),
        (json.dumps({"when": dataclasses.asdict(when()), "count": True}), "count: expected an int >= 1, got True"),
        (json.dumps({"when": {"op": "decode"}, "count": 1}), "when: missing fields ['kv_format'"),
        (
            json.dumps({"when": dataclasses.asdict(when(batch=0)), "count": 1}),
            "when.batch: expected an int >= 1, got 0",
        ),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    path = tmp_path / "shapes.jsonl"
    ShapeLog(path).saw(facts())
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match="^" + re.escape(f"{path} line 2: {message}")):
        select.read_shapes(path)


def test_a_log_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        select.read_shapes(tmp_path / "absent")
