"""`mla_cute.explain`: the answer is the one that plans get, and its text names every part of it."""

import dataclasses
import re

import pytest
import torch
from call_case import decode_problem, prefill_problem
from tuned_case import FILE, META, NAME, SMS, Folders, entry, when, write

import mla_cute
from mla_cute import plan
from mla_cute.compile import jit
from mla_cute.config import KernelConfig
from mla_cute.tuned import select

CONFIG = KernelConfig(fp8_kernel="tile64", min_blocks=8)


@pytest.fixture
def folders(monkeypatch, tmp_path):
    yield Folders(monkeypatch, tmp_path)
    select.clear()


def test_an_entry_is_explained(folders):
    write(folders.user, entry(batch=4, kv_len=4096), entry(CONFIG, batch=32))
    found = mla_cute.explain(num_heads=16, page_size=64, batch=64, max_kv_len=16384, device=META)
    assert found.selection == select.select(when(batch=64, kv_len=16384), META)
    assert (found.config, found.distance, found.kernel) == (CONFIG, 2.0, "decode_tile16")
    assert str(found).splitlines() == [
        f"decode, 16 heads, page size 64, batch 64, length 16384, 16-bit cache, on {NAME} (meta, {SMS} SMs)",
        f"  from      user {FILE} entry 1",
        "  why       nearest of 2 in its class: batch 64 by 32, length 16384 by 8192",
        "  timed     decode, 16 heads, page size 64, batch 32, length 8192, 16-bit cache; distance 2.00",
        "            40 us, default 44 us, next best 42.5 us: 1.100x",
        f"  config    {CONFIG}",
        "  kernel    decode_tile16",
    ]
    again = mla_cute.explain(num_heads=16, page_size=64, batch=64, max_kv_len=16384, device=META)
    assert again == found
    assert str(again) == str(found)


def test_the_next_best_configuration_is_told(folders):
    """In what it is not the chosen one; entries of old files do not say it."""
    best = dataclasses.replace(CONFIG, evict_first=False, min_blocks=2)
    write(folders.user, dataclasses.replace(entry(CONFIG), runner_up=best), entry(CONFIG, batch=64))
    shape = {"num_heads": 16, "page_size": 64, "max_kv_len": 8192, "device": META}
    lines = str(mla_cute.explain(batch=8, **shape)).splitlines()
    assert lines[2] == "  why       nearest of 2 in its class: the same shape"
    assert lines[4].startswith("            40 us, default 44 us, next best 42.5 us: ")
    assert lines[5] == "  next best evict_first=False, min_blocks=2"
    assert "  next best" not in str(mla_cute.explain(batch=64, **shape))


def test_a_default_is_explained(folders):
    found = mla_cute.explain("prefill", num_heads=128, page_size=1, batch=3, q_len=100, device="meta")
    assert (found.distance, found.selection.entry) == (None, None)
    assert str(found).splitlines() == [
        f"prefill, 128 heads, page size 1, batch 3, 100 query tokens, length not known, 16-bit cache, "
        f"on {NAME} (meta, {SMS} SMs)",
        f"  from      default: no tuned file {FILE}",
        f"  config    {KernelConfig(split_penalty=4)}",
        "  kernel    prefill_tile64",
    ]


def test_the_kernel_of_a_default_is_that_of_its_heads(folders):
    for num_heads, kernel in ((16, "decode_tile16"), (17, "decode_tile64")):
        found = mla_cute.explain(num_heads=num_heads, page_size=64, batch=3, device=META)
        assert (found.selection.entry, found.kernel) == (None, kernel)
        assert f"  kernel    {kernel}" in str(found).splitlines()
    # With lengths known to be few it is the other one: it says so, and why is in the configuration.
    small = mla_cute.explain(num_heads=17, page_size=64, batch=3, max_kv_len=1024, device=META)
    assert (small.config.kernel, small.config.cut_unit, small.kernel) == ("tile16", 1, "decode_tile16")
    assert "kernel='tile16'" in str(small)


def test_the_cpu_runs_the_reference(folders):
    found = mla_cute.explain(num_heads=16, page_size=64, batch=3, device="cpu")
    assert found.kernel == "float32 reference"
    assert "on cpu\n" in str(found)
    if not torch.cuda.is_available():
        assert mla_cute.explain(num_heads=16, page_size=64, batch=3) == found


@pytest.mark.parametrize(
    ("op", "kv_format", "num_heads", "config", "kernel"),
    [
        ("decode", "token", 16, {"kernel": "tile64"}, "decode_tile16_fp8"),
        ("decode", "token", 16, {"fp8_kernel": "tile16"}, "decode_tile16_fp8"),
        ("decode", "token", 16, {"fp8_kernel": "tile64"}, "decode_tile32_fp8"),
        ("decode", "token", 64, {"kernel": "tile16"}, "decode_tile64_fp8"),
        ("decode", "token", 64, {"fp8_kernel": "tile16"}, "decode_tile16_fp8"),
        ("prefill", "token", 16, {"fp8_kernel": "tile16"}, "prefill_tile64_fp8"),
        ("decode", "", 16, {"fp8_kernel": "tile64"}, "decode_tile16"),
        ("decode", "", 16, {"kernel": "tile16"}, "decode_tile16"),
        ("decode", "", 16, {"kernel": "tile64"}, "decode_tile64"),
        ("decode", "", 64, {"fp8_kernel": "tile16"}, "decode_tile64"),
        ("decode", "", 64, {"kernel": "tile16"}, "decode_tile16"),
        ("prefill", "", 16, {"kernel": "tile16"}, "prefill_tile64"),
    ],
)
def test_the_kernel_is_the_one_that_runs(folders, monkeypatch, op, kv_format, num_heads, config, kernel):
    asked = []
    monkeypatch.setattr(plan, "num_sms", lambda device: SMS)
    monkeypatch.setattr(jit, "get", lambda ref, key, config: asked.append(ref.name) or (lambda *arguments: None))
    shape = {"kv_format": kv_format, "num_heads": num_heads}
    write(folders.user, entry(KernelConfig(**config), op=op, **shape))
    # As long as the entry's: with an unknown length more than 16 heads would not take tile16.
    found = mla_cute.explain(op, page_size=64, batch=8, device=META, max_kv_len=8192, **shape)
    assert (found.config, found.kernel) == (KernelConfig(**config), kernel)
    indptr = torch.zeros(9, dtype=torch.int32, device=META)
    if op == "decode":
        made = mla_cute.plan_decode(indptr, page_size=64, max_kv_len=8192, **shape)
        problem = decode_problem(8, num_heads, 64, 9, torch.bfloat16, META, kv_format, False)
    else:
        made = mla_cute.plan_prefill(indptr, indptr, page_size=64, total_q=8, max_kv_len=8192, **shape)
        problem = prefill_problem(8, 8, num_heads, 64, 9, True, torch.bfloat16, META, kv_format, False)
    assert made.selection == found.selection
    asked.clear()
    made.launcher(problem, made.form)
    assert asked == [kernel]


def test_lists_of_tokens_are_explained(folders, monkeypatch):
    """By an entry of their own op, else by that of decode over pages of one token; pages of the cache are no matter."""
    monkeypatch.setattr(plan, "num_sms", lambda device: SMS)
    monkeypatch.setattr(jit, "get", lambda ref, key, config: lambda *arguments: None)
    shape = {"num_heads": 16, "batch": 8, "max_kv_len": 2048, "device": META}
    write(folders.user, entry(page_size=64, kv_len=2048), entry(CONFIG, page_size=1, kv_len=2048))
    by_decode = mla_cute.explain("sparse", **shape)
    assert (by_decode.config, by_decode.distance, by_decode.kernel) == (CONFIG, 0.0, "decode_tile16")
    assert str(by_decode).splitlines()[:4] == [
        f"sparse, 16 heads, 8 query tokens, lists of 2048 tokens, 16-bit cache, on {NAME} (meta, {SMS} SMs)",
        f"  from      user {FILE} entry 0",
        "  why       nearest of 1 in its class: op sparse by decode",
        "  timed     decode, 16 heads, page size 1, batch 8, length 2048, 16-bit cache; distance 0.00",
    ]
    own = KernelConfig(evict_first=False)
    sparse = entry(own, op="sparse", page_size=1, batch=16, kv_len=2048)
    write(folders.user, entry(CONFIG, page_size=1, kv_len=2048), sparse)
    select.clear()
    found = mla_cute.explain("sparse", page_size=64, **shape)
    assert (found.config, found.distance) == (own, 1.0)
    assert "  timed     sparse, 16 heads, 16 query tokens, lists of 2048 tokens, 16-bit cache" in str(found)
    made = mla_cute.plan_sparse(torch.zeros(8, 2048, dtype=torch.int32, device=META), num_heads=16)
    assert made.selection == found.selection
    # Entries of sparse serve no decode call, and far ones no sparse call.
    assert mla_cute.explain("decode", page_size=1, **shape).config == CONFIG
    assert mla_cute.explain("sparse", **shape | {"batch": 65}).selection.entry is None
    assert "lists of unknown length" in str(mla_cute.explain("sparse", **shape | {"max_kv_len": None}))


def test_batch_invariant_plans_are_explained(folders):
    write(folders.user, entry(CONFIG))
    shape = {"num_heads": 16, "page_size": 64, "batch": 8, "max_kv_len": 8192, "device": META}
    assert mla_cute.explain(**shape).config == CONFIG
    assert "default: batch-invariant plans are not tuned" in str(mla_cute.explain(**shape, batch_invariant=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"op": "append"}, ValueError, "op: expected 'decode', 'prefill' or 'sparse', got 'append'"),
        ({"op": "sparse", "q_len": 2}, ValueError, "q_len: expected 1 for decode and sparse, got 2"),
        ({"op": "sparse", "page_size": 0}, ValueError, "page_size: expected >= 1, got 0"),
        ({"page_size": None}, TypeError, "page_size: expected an int, got None"),
        ({"num_heads": 129}, ValueError, "num_heads: expected 1 to 128, got 129"),
        ({"page_size": 0}, ValueError, "page_size: expected >= 1, got 0"),
        ({"batch": 0}, ValueError, "batch: expected >= 1, got 0"),
        ({"batch": None}, TypeError, "batch: expected an int, got None"),
        ({"q_len": 2}, ValueError, "q_len: expected 1 for decode and sparse, got 2"),
        ({"kv_format": "fp8"}, ValueError, "kv_format: expected one of"),
        ({"q_fp8": True}, ValueError, "q_fp8: expected False with a 16-bit cache"),
        ({"max_kv_len": -5}, ValueError, "max_kv_len: expected >= 0, got -5"),
        ({"batch_invariant": 1}, TypeError, "batch_invariant: expected True or False, got int 1"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        mla_cute.explain(**{"num_heads": 16, "page_size": 64, "batch": 8, "device": "cpu"} | change)
