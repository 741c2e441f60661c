"""What `warmup` selects where the GPU has a tuned file, and where `info` finds tuned files."""

import pytest
import torch
from tuned_case import FILE, NAME, SMS, SPEED, Folders, entry, write

from mla_cute.cli import info
from mla_cute.compile import warmup as warmup_module
from mla_cute.config import KernelConfig
from mla_cute.kernels import registry
from mla_cute.kernels.keys import DecodeKey, Fp8Key, PlannerKey, PrefillKey, PrefillPlannerKey
from mla_cute.tuned import select

ASKED = {"dtypes": ("bfloat16",), "page_sizes": (1, 64), "ops": ("decode", "prefill"), "kv_formats": ("",)}
NO_PDL = KernelConfig(use_pdl=False)
NO_HINT = KernelConfig(evict_first=False)


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """A process that uses one GPU, of the name and SMs of the tests of selection."""
    found = Folders(monkeypatch, tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(select, "gpu_of", lambda device: (NAME, SPEED) if device.type == "cuda" else None)
    yield found
    select.clear()


def default(**change):
    asked = ASKED | change
    found = registry.variants(**asked)
    if "prefill" in asked.get("ops", registry.OPS):
        found += registry.conversion_variants(asked["dtypes"], asked["page_sizes"], asked["kv_formats"])
    return found


def extra(**change):
    """What is selected beyond the default configuration."""
    selected = warmup_module.selected(**ASKED | change)
    assert len(selected) == len(set(selected))
    assert selected[: len(default(**change))] == default(**change)
    return set(selected) - set(default(**change))


def planners(ref, key, config):
    return {(ref, key(lengths, False), config.planner_launch()) for lengths in registry.LENGTHS}


def test_without_a_gpu_or_a_file_it_is_the_default(folders, monkeypatch):
    assert extra() == set()
    write(folders.shipped, entry(NO_PDL))
    assert extra()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert extra() == set()


def test_without_cuda_the_visible_gpus_count(folders, monkeypatch):
    """Each model once, and the driver is asked in another process; not at all where no file is used."""
    asked = []

    def ask():
        asked.append(1)
        return [("NVIDIA Other", 7), (NAME, SMS), (NAME, SMS)]

    write(folders.shipped, entry(NO_PDL))
    other = folders.shipped.with_name("NVIDIA_Other.json")
    write(other, entry(NO_HINT), name="NVIDIA Other", sm_count=7)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(warmup_module, "_ask_for_gpus", ask)
    few = {(registry.DECODE_TILE16, DecodeKey("bfloat16", 64), config.launch()) for config in (NO_PDL, NO_HINT)}
    assert few < extra()
    write(other, entry(NO_HINT), name="NVIDIA Other", sm_count=8)
    assert few & extra() == {(registry.DECODE_TILE16, DecodeKey("bfloat16", 64), NO_PDL.launch())}
    assert asked == [1, 1]
    assert len(warmup_module.selected(**ASKED | {"ops": ("append",)})) == 2
    assert asked == [1, 1]
    monkeypatch.setenv("MLA_CUTE_TUNED", "0")
    assert extra() == set()
    assert asked == [1, 1]


def test_the_launch_configurations_of_the_entries(folders):
    write(
        folders.shipped,
        entry(NO_PDL),
        entry(NO_HINT, page_size=1),
        entry(KernelConfig(split_penalty=40), batch=64),  # cut by the planner at run time: nothing to compile
        entry(KernelConfig(cut_unit=1, min_blocks=1), batch=128),  # as is this
        entry(NO_HINT, op="prefill", q_len=100),
    )
    no_pdl, no_hint = NO_PDL.launch(), NO_HINT.launch()
    assert extra() == {
        (registry.DECODE_TILE16, DecodeKey("bfloat16", 64), no_pdl),
        *planners(registry.PLANNER, PlannerKey, NO_PDL),
        (registry.DECODE_TILE16, DecodeKey("bfloat16", 0), no_hint),
    }
    assert (registry.PREFILL, PrefillKey("bfloat16", 64), no_hint) in default(), "of requests of many rows"
    both = {(registry.DECODE_TILE16, DecodeKey(dtype, 64), no_pdl) for dtype in registry.DTYPES}
    assert both <= extra(dtypes=registry.DTYPES)


@pytest.mark.parametrize(
    "change", [{"ops": ("prefill",)}, {"page_sizes": (1,)}, {"kv_formats": ("tensor",)}], ids=["op", "page", "format"]
)
def test_entries_that_were_not_asked_for(folders, change):
    write(folders.shipped, entry(NO_PDL))
    assert extra()
    assert extra(**change) == set()


def test_a_page_size_of_the_same_class_counts(folders):
    write(folders.shipped, entry(NO_PDL, page_size=128))
    assert (registry.DECODE_TILE16, DecodeKey("bfloat16", 64), NO_PDL.launch()) in extra(page_sizes=(64,))


def test_entries_name_the_kernel_that_runs(folders):
    few = KernelConfig(kernel="tile16", evict_first=False, cut_unit=1, min_blocks=1)
    rows = KernelConfig(kernel="tile64", evict_first=False)
    write(
        folders.shipped,
        entry(rows),
        entry(few, num_heads=64, page_size=1),
        entry(NO_PDL, num_heads=128),
        entry(KernelConfig(kernel="tile16", cut_unit=1), num_heads=32),  # the default has that kernel too
        entry(few, op="prefill", q_len=9),
    )
    assert extra() == {
        (registry.DECODE, DecodeKey("bfloat16", 64), rows.launch()),
        (registry.DECODE_TILE16, DecodeKey("bfloat16", 0), few.launch()),
        (registry.DECODE, DecodeKey("bfloat16", 64), NO_PDL.launch()),
        *planners(registry.PLANNER, PlannerKey, NO_PDL),
    }
    assert (registry.PREFILL, PrefillKey("bfloat16", 64), few.launch()) in default()


def test_fp8_entries_name_the_kernel_that_runs(folders):
    rows = KernelConfig(fp8_kernel="tile64", evict_first=False)
    native = KernelConfig(accuracy="native")
    few = KernelConfig(use_pdl=False)
    write(
        folders.shipped,
        entry(rows, kv_format="token"),
        entry(few, kv_format="tensor", q_fp8=True),
        entry(native, kv_format="group", num_heads=128),
        entry(native, kv_format="tensor", op="prefill", q_len=7),
    )
    assert extra(kv_formats=("tensor", "token")) == {
        (registry.DECODE_TILE32_FP8, Fp8Key("bfloat16", 64, "token", False), rows.launch()),
        (registry.DECODE_TILE16_FP8, Fp8Key("bfloat16", 64, "tensor", True), few.launch()),
        *planners(registry.PLANNER, PlannerKey, few),
        (registry.PREFILL_FP8, Fp8Key("bfloat16", 64, "tensor", False), native.launch()),
    }


def test_prefill_planners(folders):
    write(folders.shipped, entry(NO_PDL, op="prefill", q_len=9))
    assert planners(registry.PREFILL_PLANNER, PrefillPlannerKey, NO_PDL) < extra()


def test_files_that_calls_do_not_use(folders, monkeypatch):
    write(folders.shipped, entry(NO_PDL), sm_count=SMS - 1)
    assert extra() == set()
    write(folders.shipped, entry(NO_PDL))
    monkeypatch.setenv("MLA_CUTE_TUNED", "0")
    assert extra() == set()
    monkeypatch.delenv("MLA_CUTE_TUNED")
    write(folders.user, entry(NO_HINT))  # hides the shipped one
    assert extra() == {(registry.DECODE_TILE16, DecodeKey("bfloat16", 64), NO_HINT.launch())}


def test_a_broken_file_is_named(folders):
    write(folders.shipped, entry()).write_text("{")
    with pytest.raises(ValueError, match=FILE):
        warmup_module.selected(**ASKED)


def test_what_is_selected_is_what_calls_run_with(folders):
    write(folders.shipped, entry(NO_PDL), entry(NO_HINT, num_heads=128), entry(NO_HINT, op="prefill", q_len=100))
    selected = set(warmup_module.selected(**ASKED))
    decode, prefill = DecodeKey("bfloat16", 64), PrefillKey("bfloat16", 64)
    for op, num_heads, q_len, ref, key in (
        ("decode", 16, 1, registry.DECODE_TILE16, decode),
        ("decode", 128, 1, registry.DECODE, decode),
        ("prefill", 16, 100, registry.PREFILL, prefill),
    ):
        found = select.choose(op, "", False, num_heads, 64, q_len, 8, 8192, torch.device("cuda", 0))
        assert found.entry is not None
        assert (ref, key, found.config.launch()) in selected


def test_sparse_has_the_configurations_of_its_entries_and_of_decodes_that_gather(folders):
    on_lists = KernelConfig(evict_first=False, use_pdl=False)
    write(
        folders.shipped,
        entry(NO_PDL),
        entry(NO_HINT, page_size=1, num_heads=128),
        entry(on_lists, op="sparse", page_size=1),
        entry(NO_PDL, op="prefill", q_len=9, page_size=1),
    )
    asked = {"dtypes": ("bfloat16",), "page_sizes": (64,), "kv_formats": ("",)}
    selected = set(warmup_module.selected(**asked, ops=("sparse",)))
    key = DecodeKey("bfloat16", 0, sparse=True)
    assert selected - set(registry.sparse_variants(["bfloat16"], [""])) == {
        (registry.DECODE, key, NO_HINT.launch()),
        (registry.DECODE_TILE16, key, on_lists.launch()),
        (registry.PLANNER, PlannerKey("seq_lens", False), on_lists.planner_launch()),
    }
    # Without sparse among the calls its entries compile nothing.
    assert not any(getattr(key, "sparse", False) for _, key, _ in warmup_module.selected(**ASKED))
    found = select.choose("sparse", "", False, 16, 1, 1, 8, 8192, torch.device("cuda", 0))
    assert found.config == on_lists


def test_info_lists_the_files_of_every_folder_in_order(folders):
    assert info.tuned_files() == []
    for path in (folders.named, folders.user, folders.shipped):
        write(path, entry())
    other = folders.user.with_name("A_GPU.json")
    other.write_text("{}")
    assert info.tuned_files() == [str(other), str(folders.user), str(folders.shipped)]
    folders.use_named()
    assert info.tuned_files() == [str(folders.named), str(other), str(folders.user), str(folders.shipped)]


def test_info_shows_every_variable_of_the_library():
    assert {"MLA_CUTE_TUNED", "MLA_CUTE_TUNED_DIR", "MLA_CUTE_LOG", "MLA_CUTE_LOG_SHAPES"} <= set(info.VARIABLES)
    assert len(info.VARIABLES) == len(set(info.VARIABLES))


def test_warmup_compiles_what_is_selected(folders, monkeypatch):
    write(folders.shipped, entry(NO_PDL))
    compiled = []
    monkeypatch.setattr(warmup_module, "_warm", lambda variants, *options: compiled.extend(variants) or [])
    warmup_module.warmup(page_sizes=(64,))
    assert compiled == warmup_module.selected(**ASKED | {"page_sizes": (64,), "ops": warmup_module._DEFAULT_OPS})
    assert (registry.DECODE_TILE16, DecodeKey("bfloat16", 64), NO_PDL.launch()) in compiled
