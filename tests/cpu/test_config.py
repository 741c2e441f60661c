"""The default configuration of GPUs: an H200's is what was measured, others' are as many us."""

import itertools
import json
import math
import pathlib
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_cute.bench.cases import Case, case_of
from mla_cute.config import KernelConfig, block_us, default_config, is_small_step, why_infeasible
from mla_cute.gpu_speed import H200, GpuSpeed
from mla_cute.kernels.planner import model
from mla_cute.kernels.registry import decode_parts
from mla_cute.tuned.select import When, default_for

# By the data sheets, and of the first the records' clocks with a bus of 5120 bits.
H100 = GpuSpeed(132, 3352.3, 1980.0)
H100_PCIE = GpuSpeed(114, 2039.0, 1755.0)
H20 = GpuSpeed(78, 4022.8, 1980.0, tensor_share=0.25)
GPUS = (H200, H100, H100_PCIE, H20, GpuSpeed(132, 3938.0, 1785.0), GpuSpeed(132, 4814.3, 1785.0), GpuSpeed(78))


# ---------------------------------------------------------------------------------------------------------------------
# an H200

# Tiles of 16 heads x 64 tokens per SM up to which tile16 was faster with up to 16, 32, 64 and 128 heads:
# docs/performance.md.
ALWAYS = math.inf
MEASURED_TILES = {
    ("", False): (ALWAYS, 20, 12, 6),
    ("gathered 16-bit", False): (ALWAYS, 7, 12, 6),
    ("tensor", False): (ALWAYS, 11, 18, 16),
    ("tensor", True): (ALWAYS, 6, 6, 6),
    ("group", False): (ALWAYS, 11, 12, 8),
    ("group", True): (ALWAYS, 8, 6, 6),
    ("gathered", False): (ALWAYS, 3, 6, 6),
    ("gathered group", False): (ALWAYS, 8, 8, 8),
    ("gathered group", True): (ALWAYS, 6, 8, 6),
}


def as_measured(when: When, batch_invariant: bool) -> KernelConfig:
    """The default on an H200, in the numbers that were measured there."""
    rows = when.num_heads if when.decodes else 64
    few = when.decodes and when.num_heads <= 16
    kernels = {}
    if when.decodes and when.kv_len is not None and not batch_invariant:
        cache = when.kv_format
        if when.page_size % 8:
            cache = {"": "gathered 16-bit", "group": "gathered group"}.get(when.kv_format, "gathered")
        elif when.kv_format == "token":
            cache = "tensor"
        tiles = when.batch * -(-when.kv_len // 64) * -(-when.num_heads // 16) / 132
        most = MEASURED_TILES[cache, when.q_fp8 and cache != "gathered"]
        was_few, few = few, tiles <= most[sum(when.num_heads > heads for heads in (16, 32, 64))]
        if few != was_few:
            kernels = {"fp8_kernel" if when.kv_format else "kernel": "tile16" if few else "tile64"}
    shares = when.op == "prefill" and when.q_len * when.num_heads > 64 and when.page_size % 8 == 0
    shares = shares and when.kv_format == "" and not batch_invariant
    unit = 1 if few else 2
    split_penalty = 2 + 2 * -(-rows // 64)
    return KernelConfig(
        **kernels, evict_first=not shares, cut_unit=unit, min_blocks=unit, item_overhead=4, split_penalty=split_penalty
    )


@pytest.mark.parametrize("num_heads", [1, 8, 16, 17, 32, 33, 64, 65, 96, 128])
def test_an_h200_takes_what_was_measured_there(num_heads):
    batches, lengths = (1, 2, 3, 4, 8, 16, 17, 64, 128, 500), (None, 1, 64, 1000, 1024, 2048, 4096, 8192, 16384, 131072)
    caches = (("", False), ("tensor", False), ("tensor", True), ("group", False), ("group", True), ("token", True))
    for op, (kv_format, q_fp8), page_size, batch, kv_len, invariant in itertools.product(
        ("decode", "prefill", "sparse"), caches, (1, 64), batches, lengths, (False, True)
    ):
        if op == "sparse" and page_size > 1:
            continue
        when = When(op, kv_format, q_fp8, num_heads, page_size, 1, batch, kv_len)
        assert default_for(when, H200, invariant) == as_measured(when, invariant), (when, invariant)


@pytest.mark.parametrize("cache", MEASURED_TILES)
def test_the_last_small_step_of_an_h200(cache):
    """To the tile, where 132 SMs have as many as was measured."""
    kind, q_fp8 = cache
    kv_format = "group" if "group" in kind else "" if kind in ("", "gathered 16-bit") else "tensor"
    for num_heads, most in zip((16, 32, 64, 128), MEASURED_TILES[cache], strict=True):
        facts = {"kv_format": kv_format, "q_fp8": q_fp8, "num_heads": num_heads, "gathers": "gathered" in kind}
        if most == ALWAYS:
            assert is_small_step(**facts, batch=10_000, kv_len=131_072, gpu=H200)
            continue
        blocks = most * 132 // (num_heads // 16)
        small = [is_small_step(**facts, batch=1, kv_len=64 * n, gpu=H200) for n in (blocks, blocks + 1)]
        assert small == [True, False], num_heads


@pytest.mark.parametrize(
    ("facts", "shares"),
    [
        ({}, True),
        ({"q_len": 5}, True),
        ({"q_len": 4}, False),
        ({"num_heads": 128, "q_len": 1}, True),
        ({"page_size": 1}, False),
        ({"page_size": 8}, True),
        ({"op": "decode", "num_heads": 128, "q_len": 1}, False),
        ({"op": "sparse", "num_heads": 128, "q_len": 1, "page_size": 1}, False),
        # In tensor and group where the cache is converted, for the 16-bit kernel.
        ({"kv_format": "group"}, True),
        ({"kv_format": "group", "q_len": 16}, False),
        ({"kv_format": "tensor"}, True),
        ({"kv_format": "tensor", "q_fp8": True}, False),
        ({"kv_format": "token"}, False),
    ],
)
def test_row_tiles_that_share_keys_do_not_evict_them_first(facts, shares):
    shape = {"op": "prefill", "kv_format": "", "q_fp8": False, "num_heads": 16, "page_size": 64, "q_len": 2048}
    when = When(**shape | facts, batch=4, kv_len=8192)
    assert default_for(when, H200).evict_first is not shares
    assert default_for(when, H200, batch_invariant=True).evict_first


# ---------------------------------------------------------------------------------------------------------------------
# others


@pytest.mark.parametrize("num_heads", [16, 32, 64, 128])
@pytest.mark.parametrize("sm_count", [1, 78, 114, 132, 144])
def test_what_is_not_known_of_a_gpu_is_an_h200s(sm_count, num_heads):
    for decodes in (False, True):
        assert default_config(num_heads, GpuSpeed(sm_count), decodes) == default_config(num_heads, H200, decodes)
    step = ("", False, num_heads, 8)
    for length in (64, 512, 1024, 2048, 4096, 8192):
        # As many tiles for each SM.
        assert is_small_step(*step, length * sm_count, GpuSpeed(sm_count), False) == is_small_step(
            *step, length * 132, H200, False
        )


@pytest.mark.parametrize("decodes", [True, False])
@pytest.mark.parametrize("num_heads", [1, 16, 17, 64, 65, 128])
@pytest.mark.parametrize("gpu", GPUS)
def test_costs_are_as_many_us_on_every_gpu(gpu, num_heads, decodes):
    """Of an item and of a merge, to half a block; the rows of partials are memory traffic, and as many blocks."""
    config = default_config(num_heads, gpu, decodes)
    assert why_infeasible(config) is None
    own, measured = (block_us(num_heads, of, decodes) for of in (gpu, H200))
    partials = 2 * -(-(num_heads if decodes else 64) // 64)
    assert abs(config.item_overhead * own - 4 * measured) <= 0.51 * own
    assert abs((config.split_penalty - partials) * own - 2 * measured) <= 0.51 * own


def test_what_limits_a_block():
    """Memory up to 64 heads, tensor cores from there on and in prefill; an H20's tensor cores from 17 heads on."""
    half = {gpu: GpuSpeed(gpu.sm_count, gpu.memory_gbps / 2, gpu.sm_mhz, gpu.tensor_share) for gpu in (H200, H20)}
    for num_heads, decodes, slower in ((16, True, 2.0), (64, True, 2.0), (128, True, 1.52), (64, False, 1.0)):
        ratio = block_us(num_heads, half[H200], decodes) / block_us(num_heads, H200, decodes)
        assert ratio == pytest.approx(slower, abs=0.01), num_heads
    assert block_us(16, half[H20]) == pytest.approx(2 * block_us(16, H20))
    assert block_us(17, half[H20]) == block_us(17, H20) == pytest.approx(4.4, abs=0.01)
    # A block of an SM with more bandwidth is cheaper, and a cost is more of them.
    assert [default_config(16, gpu).item_overhead for gpu in (H100_PCIE, H100, H200, H20)] == [2, 3, 4, 6]
    assert [default_config(64, gpu).item_overhead for gpu in (H100_PCIE, H100, H200, H20)] == [2, 3, 4, 2]


SPEEDS = st.builds(
    GpuSpeed,
    st.integers(1, 200),
    st.none() | st.floats(100, 20000),
    st.none() | st.floats(200, 4000),
    st.sampled_from([1.0, 0.25]),
)


@settings(max_examples=200, deadline=None)
@given(SPEEDS, st.integers(1, 128), st.booleans(), st.floats(1.01, 8))
def test_more_bandwidth_is_never_fewer_blocks(gpu, num_heads, decodes, factor):
    if gpu.memory_gbps is None:
        return
    faster = GpuSpeed(gpu.sm_count, gpu.memory_gbps * factor, gpu.sm_mhz, gpu.tensor_share)
    few, many = (default_config(num_heads, of, decodes) for of in (gpu, faster))
    assert few.item_overhead <= many.item_overhead
    assert few.split_penalty <= many.split_penalty
    assert why_infeasible(few) is why_infeasible(many) is None


def test_the_last_small_step_goes_by_sms_and_clock_alone():
    def longest(gpu):
        return max(n for n in range(1, 400) if is_small_step("", False, 64, 1, 64 * n, gpu, False))

    assert longest(H200) == 12 * 132 // 4
    for gpu in GPUS:
        assert longest(gpu) == int(12 * gpu.sm_count * gpu.clock_mhz / 1980 / 4)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("num_heads", [16, 64, 128])
def test_batch_invariant_defaults_go_by_no_batch(gpu, num_heads):
    for op in ("decode", "prefill"):
        found = {
            default_for(When(op, "tensor", False, num_heads, 64, 1, batch, kv_len), gpu, batch_invariant=True)
            for batch in (1, 16, 500)
            for kv_len in (None, 1, 1024, 131072)
        }
        assert len(found) == 1


# ---------------------------------------------------------------------------------------------------------------------
# the H100's record, and that of an H200 at the same commit, without tuned files

RECORDS = pathlib.Path(__file__).parents[2] / "tune" / "measurements"


def record(gpu: str, name: str) -> dict:
    return json.loads((RECORDS / gpu / name).read_text())


OF_H100 = record("NVIDIA_H100_80GB_HBM3", "table_2026-11-28.json")
OF_H200 = record("NVIDIA_H200", "table_untuned_2026-11-28.json")


def times(found: dict) -> dict[Case, float]:
    return {case_of(row): row["us"] for row in found["rows"]}


def test_what_reads_get_of_the_peak():
    for found, gpu, bus_bits in ((OF_H100, H100, 5120), (OF_H200, H200, 6016)):
        assert found["gpu"]["sm_count"] == gpu.sm_count
        assert found["gpu"]["max_sm_mhz"] == gpu.sm_mhz
        assert 2 * found["gpu"]["max_memory_mhz"] * bus_bits / 8e3 == pytest.approx(gpu.memory_gbps, abs=0.1)
        assert found["ceilings"]["used"]["read_gbps"] / gpu.memory_gbps == pytest.approx(0.92, abs=0.01)


@pytest.mark.parametrize("num_heads", [16, 64])
def test_a_block_takes_the_us_that_the_records_say(num_heads):
    """Up to 64 heads, of what 24576 more tokens take 128 requests. Of 128 heads it does not hold: they run at the power
    limit, and a block takes 1.9 us on either GPU."""
    for found, gpu in ((OF_H100, H100), (OF_H200, H200)):
        us = times(found)
        more = us[Case(num_heads, 128, 32768)] - us[Case(num_heads, 128, 8192)]
        assert more / (128 * 384 / 132) == pytest.approx(block_us(num_heads, gpu), rel=0.05)


def test_what_a_step_costs_beside_its_blocks_is_us_and_not_blocks():
    """The time of 128 requests of no token, by a line through 1024 and 8192: on both GPUs about as many us, while in
    blocks it is less on the H100."""
    in_us, in_blocks = [], []
    for num_heads in (16, 64):
        beside = []
        for found in (OF_H200, OF_H100):
            us = times(found)
            short, long = us[Case(num_heads, 128, 1024)], us[Case(num_heads, 128, 8192)]
            beside.append((short - (long - short) / 7, (long - short) / 7 / (128 * 16 / 132)))
        in_us.append(beside[1][0] / beside[0][0])
        in_blocks.append(in_us[-1] * beside[0][1] / beside[1][1])
    assert statistics.geometric_mean(in_us) == pytest.approx(1, abs=0.12)
    assert statistics.geometric_mean(in_blocks) < 0.8


def test_the_records_times_are_those_of_the_default():
    """The H100's record was made with the H200's blocks. Of its 30 shapes the H100's own cut each in the same way, and
    no part has more than one block more or less: so it has no time that speaks against them, and none that shows that
    they are better. Which kernel ran is not in it, so of small steps it decides nothing."""
    for case in times(OF_H100):
        lengths, plans = [n for _, n in case.requests], []
        for gpu in (H200, H100):
            config = default_config(case.num_heads, gpu)
            parts = decode_parts("", case.num_heads, config, gpu.sm_count)
            plans.append(model.plan(lengths, [0] * case.batch, parts, case.num_heads, config))
        assert plans[0].how == plans[1].how
        assert abs(max(plans[0].loads) - max(plans[1].loads)) <= 1
