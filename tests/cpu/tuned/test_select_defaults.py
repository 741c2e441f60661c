"""Which kernel, and which pieces of requests, calls take that no tuned entry serves."""

import dataclasses
import itertools

import pytest
from tuned_case import when

from mla_cute.config import default_config, why_infeasible, with_kernel
from mla_cute.gpu_speed import H200
from mla_cute.kernels import registry
from mla_cute.tuned import select


@pytest.mark.parametrize("num_heads", [16, 17])
@pytest.mark.parametrize(
    ("kv_format", "field", "other"), [("", "kernel", "fp8_kernel"), ("group", "fp8_kernel", "kernel")]
)
def test_another_kernel_comes_with_its_pieces(kv_format, field, other, num_heads):
    config = dataclasses.replace(default_config(num_heads, H200), evict_first=False, item_overhead=7)
    for kernel, unit in (("tile64", 2), ("tile16", 1)):
        changed = with_kernel(config, kv_format, kernel)
        assert (getattr(changed, field), getattr(changed, other)) == (kernel, "auto")
        assert (changed.cut_unit, changed.min_blocks) == (unit, unit)
        assert why_infeasible(changed) is None
        back = dataclasses.replace(changed, **{field: "auto"}, cut_unit=config.cut_unit, min_blocks=config.min_blocks)
        assert back == config, "nothing else changes"
        assert with_kernel(changed, kv_format, kernel) == changed


@pytest.mark.parametrize(
    ("facts", "few"),
    [
        # Measured faster with tile16 on 132 SMs, with L2 emptied and without, or not: docs/performance.md.
        ({"num_heads": 32, "batch": 8, "kv_len": 2048}, True),
        ({"num_heads": 32, "batch": 4, "kv_len": 8192}, False),
        ({"num_heads": 32, "batch": 4, "kv_len": 8192, "q_fp8": False}, True),
        ({"num_heads": 32, "batch": 16, "kv_len": 4096, "q_fp8": False}, False),
        ({"num_heads": 32, "batch": 4, "kv_len": 2048, "kv_format": "group", "q_fp8": False, "page_size": 1}, True),
        ({"num_heads": 32, "batch": 12, "kv_len": 2048, "kv_format": "group", "q_fp8": False, "page_size": 1}, True),
        ({"num_heads": 32, "batch": 12, "kv_len": 2048, "kv_format": "group", "page_size": 1}, True),
        ({"num_heads": 32, "batch": 64, "kv_len": 2048, "kv_format": "group", "q_fp8": False, "page_size": 1}, False),
        ({"num_heads": 64, "batch": 1, "kv_len": 8192}, True),
        ({"num_heads": 64, "batch": 16, "kv_len": 1024}, False),
        ({"num_heads": 64, "batch": 4, "kv_len": 8192}, False),
        ({"num_heads": 64, "batch": 4, "kv_len": 8192, "q_fp8": False}, True),
        ({"num_heads": 64, "batch": 64, "kv_len": 1024, "q_fp8": False}, False),
        ({"num_heads": 128, "batch": 1, "kv_len": 4096}, True),
        ({"num_heads": 128, "batch": 1, "kv_len": 8192}, False),
        ({"num_heads": 128, "batch": 16, "kv_len": 1024}, False),
        ({"num_heads": 64, "batch": 16, "kv_len": 1024, "kv_format": "group", "q_fp8": False}, True),
        ({"num_heads": 64, "batch": 4, "kv_len": 8192, "kv_format": "group", "q_fp8": False}, False),
        ({"num_heads": 64, "batch": 6, "kv_len": 4096, "kv_format": "group", "q_fp8": False}, True),
        ({"num_heads": 32, "batch": 8, "kv_len": 4096, "kv_format": "group"}, True),
        ({"num_heads": 32, "batch": 12, "kv_len": 4096, "kv_format": "group"}, False),
        ({"num_heads": 128, "batch": 1, "kv_len": 8192, "kv_format": "group", "q_fp8": False}, True),
        ({"num_heads": 128, "batch": 3, "kv_len": 4096, "kv_format": "group", "q_fp8": False}, False),
        ({"num_heads": 128, "batch": 16, "kv_len": 1024, "kv_format": "group", "q_fp8": False}, False),
        ({"num_heads": 128, "batch": 16, "kv_len": 1024, "q_fp8": False}, True),
        ({"num_heads": 128, "batch": 4, "kv_len": 8192, "q_fp8": False}, False),
        ({"num_heads": 128, "batch": 1, "kv_len": 16384}, False),
        ({"num_heads": 128, "batch": 1, "kv_len": 32768, "q_fp8": False}, False),
        ({"num_heads": 128, "batch": 64, "kv_len": 1024}, False),
        ({"num_heads": 32, "batch": 16, "kv_len": 1024, "kv_format": "", "q_fp8": False}, True),
        ({"num_heads": 32, "batch": 16, "kv_len": 8192, "kv_format": "", "q_fp8": False}, False),
        ({"num_heads": 64, "batch": 1, "kv_len": 8192, "kv_format": "", "q_fp8": False}, True),
        ({"num_heads": 64, "batch": 16, "kv_len": 1024, "kv_format": "", "q_fp8": False}, True),
        ({"num_heads": 64, "batch": 4, "kv_len": 8192, "kv_format": "", "q_fp8": False}, False),
        ({"num_heads": 128, "batch": 4, "kv_len": 1024, "kv_format": "", "q_fp8": False}, True),
        ({"num_heads": 128, "batch": 1, "kv_len": 8192, "kv_format": "", "q_fp8": False}, False),
        ({"num_heads": 64, "batch": 4, "kv_len": 2048, "kv_format": "group", "q_fp8": False, "page_size": 1}, True),
        ({"num_heads": 64, "batch": 8, "kv_len": 2048, "kv_format": "group", "q_fp8": False, "page_size": 1}, True),
        ({"num_heads": 64, "batch": 8, "kv_len": 2048, "kv_format": "group", "page_size": 1}, True),
        ({"num_heads": 64, "batch": 16, "kv_len": 2048, "kv_format": "group", "q_fp8": False, "page_size": 1}, False),
        ({"num_heads": 128, "batch": 4, "kv_len": 2048, "kv_format": "group", "q_fp8": False, "page_size": 1}, True),
        ({"num_heads": 128, "batch": 4, "kv_len": 2048, "kv_format": "group", "page_size": 1}, False),
        ({"num_heads": 128, "batch": 1, "kv_len": 1024, "page_size": 1}, True),
        # What is not known or not decode; up to 16 heads "auto" is tile16.
        ({"num_heads": 64, "batch": 1, "kv_len": None}, False),
        ({"num_heads": 64, "batch": 1, "kv_len": 1024, "op": "prefill"}, False),
        ({"num_heads": 16, "batch": 1, "kv_len": 1024}, False),
    ],
)
def test_small_steps_of_many_heads_take_tile16_by_default(facts, few):
    shape = when(**{"kv_format": "tensor", "q_fp8": True} | facts)
    field, other = ("fp8_kernel", "kernel") if shape.kv_format else ("kernel", "fp8_kernel")
    config = select.default_for(shape, H200)
    assert getattr(config, field) == ("tile16" if few else "auto")
    assert getattr(config, other) == "auto"
    runs_few = few or (shape.op == "decode" and shape.num_heads <= 16)
    assert config.cut_unit == config.min_blocks == (1 if runs_few else 2)
    assert getattr(select.default_for(shape, H200, batch_invariant=True), field) == "auto"


@pytest.mark.parametrize("q_fp8", [False, True])
@pytest.mark.parametrize("num_heads", [8, 16])
def test_lists_of_few_heads_take_tile16_however_many_they_are(num_heads, q_fp8):
    for batch, kv_format in itertools.product((1, 16, 64, 1024), ("", "tensor", "token", "group")):
        facts = {"num_heads": num_heads, "batch": batch, "kv_format": kv_format, "q_fp8": q_fp8 and kv_format != ""}
        lists = when(op="sparse", page_size=1, kv_len=2048, **facts)
        for invariant in (False, True):
            config = select.default_for(lists, H200, batch_invariant=invariant)
            assert config.kernel == config.fp8_kernel == "auto"
            assert registry.takes_tile16(kv_format, num_heads, config)
            assert config.cut_unit == config.min_blocks == 1
