"""Tunable configuration of the kernels: values that change speed, and results by rounding at most."""

import dataclasses
import functools
import math
from typing import Any

from .dims import BLOCK, TILE16_M, TILE_M
from .gpu_speed import H200, GpuSpeed
from .kernels.keys import LaunchConfig

KERNELS = ("auto", "tile64", "tile16")
FP8_KERNELS = (*KERNELS, "convert")
ACCURACIES = ("high", "native", "fast")


@dataclasses.dataclass(frozen=True, slots=True)
class KernelConfig:
    """One point of the tuning space of the decode path.

    kernel            which main kernel runs over 16-bit caches: "tile64" (64 rows per tile on wgmma, two KV tiles in
                      flight); "tile16" (decode: tiles of 16 heads on mma.sync, for few heads or few keys); or
                      "auto": tile16 up to 16 heads
    fp8_kernel        the same over FP8 caches, where "tile64" has 32 rows per tile for decode of up to 32 heads and for
                      prefill plans of as many rows a request (`max_q_len`); or "convert" (prefill, but for e4m3
                      queries over format "tensor": the cache is converted to 16 bits first, for the 16-bit kernel; for
                      many rows a request). "auto" for prefill: "convert" from 512 or 1024 (query token, head) rows a
                      request on (kernels/registry.py), never for format "token"; else "tile64"
    accuracy          of "tile64" on FP8 caches; for tile16 and 16-bit caches all three are the same.
                      "high"    sums of 128 channels, which the tensor core adds up with about 14 bits, are added in
                                float32; a 16-bit query is multiplied as two e4m3 parts
                      "native"  formats tensor and token: the tensor core adds all channels up: twice the error for 0
                                to 2 % less time. In format group as "high"
                      "fast"    a 16-bit query is multiplied as one e4m3 part under a scale per row, its rope part
                                too where the rope cache is e4m3: half the work of Q K^T, for an error of 3.7e-2 on
                                normal data (docs/numerics.md). The rest is as "high", and all of it with e4m3 queries,
                                in tiles of 32 rows, which multiply both parts at once, and where prefill converts
    evict_first       KV loads carry the L2 evict-first hint
    use_pdl           launch planner, main and merge kernels with programmatic dependent launch
    cut_unit          decode: requests are cut at multiples of that many 64-token blocks: 2, since "tile64" takes
                      them in pairs, or 1, for "tile16"
    min_blocks        blocks below which a piece of a request is not split further (a multiple of cut_unit; prefill
                      cuts at pairs whatever cut_unit is, and rounds it up to even)
    item_overhead     cost of starting a work item, in 64-token blocks, as the planner's balance counts it
    split_penalty     cost of splitting requests at all, in 64-token blocks per CTA; whole requests are preferred
                      while their makespan is within it
    """

    kernel: str = "auto"
    fp8_kernel: str = "auto"
    accuracy: str = "high"
    evict_first: bool = True
    use_pdl: bool = True
    cut_unit: int = 2
    min_blocks: int = 2
    item_overhead: int = 4
    split_penalty: int = 6

    @functools.lru_cache(maxsize=256)  # noqa: B019 -- values, few and small; a call without a plan asks every time
    def launch(self) -> LaunchConfig:
        return LaunchConfig(self.evict_first, self.use_pdl, self.accuracy)

    @functools.lru_cache(maxsize=256)  # noqa: B019
    def planner_launch(self) -> LaunchConfig:
        """As `launch`, with only what the planner's code depends on: configurations share its kernels."""
        return KernelConfig(use_pdl=self.use_pdl).launch()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "KernelConfig":
        """Raises ValueError on an unknown field, TypeError on a field of the wrong type."""
        if unknown := sorted(set(values) - set(_TYPES)):
            raise ValueError(f"config: unknown fields {unknown}; known are {sorted(_TYPES)}")
        config = cls(**values)
        expect_types(config)
        return config


def differences(config: KernelConfig, base: KernelConfig) -> dict[str, Any]:
    """The fields of `config` that differ from `base`, in their order, with their values in `config`."""
    return {name: value for name, value in config.to_dict().items() if value != getattr(base, name)}


_TYPES = {field.name: type(field.default) for field in dataclasses.fields(KernelConfig)}


def _wrong_type(config: KernelConfig) -> tuple[str, str, Any] | None:
    """The first field that has not the type of its default (flags are bools, not 0 and 1): its name, the type that was
    expected, and its value."""
    for name, expected in _TYPES.items():
        if type(value := getattr(config, name)) is not expected:
            return name, expected.__name__, value
    return None


def expect_types(config: KernelConfig) -> None:
    """TypeError when a field has another type than its default."""
    if wrong := _wrong_type(config):
        name, expected, value = wrong
        raise TypeError(f"config.{name}: expected {expected}, got {value!r:.80}")


def why_infeasible(config: KernelConfig) -> str | None:
    """The one feasibility rule: None, or the reason why `config` cannot run. Types are the first part of it."""
    if wrong := _wrong_type(config):
        name, expected, value = wrong
        return f"{name}: expected {expected}, got {value!r:.80}"
    if config.kernel not in KERNELS:
        return f"kernel: expected one of {KERNELS}, got {config.kernel!r}"
    if config.fp8_kernel not in FP8_KERNELS:
        return f"fp8_kernel: expected one of {FP8_KERNELS}, got {config.fp8_kernel!r}"
    if config.accuracy not in ACCURACIES:
        return f"accuracy: expected one of {ACCURACIES}, got {config.accuracy!r}"
    if config.cut_unit not in (1, 2):
        return f"cut_unit: expected 1 or 2, got {config.cut_unit}"
    if config.min_blocks < config.cut_unit or config.min_blocks % config.cut_unit:
        return f"min_blocks: expected a positive multiple of cut_unit {config.cut_unit}, got {config.min_blocks}"
    if config.item_overhead < 0:
        return f"item_overhead: expected >= 0, got {config.item_overhead}"
    if config.split_penalty < 0:
        return f"split_penalty: expected >= 0, got {config.split_penalty}"
    return None


# ------------------------------------------------------------------------------------------------------------ defaults
#
# What was measured is microseconds on an H200. The planner counts in blocks of 64 tokens, which take another time on
# another GPU, so that a cost of so many us is another number of blocks there. Records are in tune/measurements, the
# sections in docs/performance.md.

# Bytes of a token of a 16-bit cache of 512 + 64 channels, and what of the peak reads get: 4431 of 4814 GB/s in
# NVIDIA_H200/table_untuned_2026-11-28.json, 3063 of 3352 in NVIDIA_H100_80GB_HBM3/table_2026-11-28.json.
_TOKEN_BYTES, _READ_SHARE = 2 * (512 + 64), 0.92
# Cycles of a tile of 64 tokens. tile64: half of a pair's 5700, in 4352 of which the tensor cores work (section Open).
# tile16: 1.0 us, the slope between 128 heads, 1 x 8192 and 4 x 8192 with L2 emptied, 18.3 and 41.2 us for 7.8 and 31
# tiles (section "Code that is not in L2"); its tensor cores work a quarter of tile64's, for a quarter of the rows.
_TILE64_CYCLES, _TILE64_TENSOR_CYCLES = 2850, 2176
_TILE16_CYCLES, _TILE16_TENSOR_CYCLES = 1980, 544

# An item that a CTA starts counts as 4 of the H200's blocks, 8.8 us up to 64 heads. Starting takes 1 to 2 us, and
# counting 2, 1 or 0 blocks was 0 to 3 % faster or slower in ragged batches (section "tile16 over 16-bit caches").
_ITEM_BLOCKS = 4
# What cutting costs whatever is cut, in the H200's blocks, 4.4 us up to 64 heads: merging took 3.7 to 5.7 us (section
# "Merging what was cut").
_MERGE_BLOCKS = 2
# And for each tile of 64 heads. It is memory traffic, and so as many blocks on every GPU: 64 partial rows of 512 in 16
# bits are 131 KB written and read, 1.8 blocks. (With 4, as rows of float32 had, 32 requests of 1024 tokens and 128
# heads were not cut, and took 34.8 us instead of 30.4: docs/performance.md, "Defaults by what the tuner timed".)
_PARTIAL_BLOCKS = 2


def block_us(
    num_heads: int,
    gpu: GpuSpeed,
    decodes: bool = True,
    tile16: bool | None = None,
    token_bytes: int = _TOKEN_BYTES,
) -> float:
    """Time of a 64-token block of a CTA while all SMs of the GPU work: of its loads or, where that is more, of the
    tile. Row tiles share the loads of a block, and those of a prefill are so many that loads do not count. `tile16`:
    whether that kernel decodes; None: the default, up to 16 heads."""
    if tile16 is None:
        tile16 = decodes and num_heads <= TILE16_M
    cycles, tensor = (_TILE16_CYCLES, _TILE16_TENSOR_CYCLES) if tile16 else (_TILE64_CYCLES, _TILE64_TENSOR_CYCLES)
    tile_us = max(cycles, tensor / gpu.tensor_share) / gpu.clock_mhz
    loads_us = BLOCK * token_bytes / (_READ_SHARE * gpu.gbps_per_sm * 1e3)
    loads_us /= -(-num_heads // (TILE16_M if tile16 else TILE_M))
    return max(loads_us, tile_us) if decodes else tile_us


@functools.lru_cache(maxsize=4096)
def default_config(num_heads: int, gpu: GpuSpeed, decodes: bool = True) -> KernelConfig:
    """The configuration used when no tuned entry applies, for decode (and sparse) or prefill.

    On an H200 it is what was measured; on other GPUs a cost in us is as many us, in blocks of theirs. It depends on the
    GPU and the heads alone, so that results of one GPU do not go by what else is in a batch.
    """
    heads = min(num_heads, 128) if decodes else TILE_M
    blocks = block_us(heads, H200, decodes) / block_us(heads, gpu, decodes)
    config = KernelConfig(
        item_overhead=max(1, round(_ITEM_BLOCKS * blocks)),
        split_penalty=round(_MERGE_BLOCKS * blocks) + _PARTIAL_BLOCKS * -(-heads // TILE_M),
    )
    return _with_pieces(config, tile16=decodes and num_heads <= TILE16_M)


def _with_pieces(config: KernelConfig, tile16: bool) -> KernelConfig:
    """`config` with the smallest pieces that tile16, or else row tiles, take."""
    unit = 1 if tile16 else 2
    return dataclasses.replace(config, cut_unit=unit, min_blocks=unit)


def with_kernel(config: KernelConfig, kv_format: str, kernel: str) -> KernelConfig:
    """`config` with that main kernel ("tile64" or "tile16") for a cache, and the pieces it takes."""
    config = _with_pieces(config, tile16=kernel == "tile16")
    return dataclasses.replace(config, fp8_kernel=kernel) if kv_format else dataclasses.replace(config, kernel=kernel)


# For up to 16, 32, 64 and for more heads: us of tile16's work on an SM up to which a step is small; on an H200, where a
# tile takes 1 us, as many tiles. See `is_small_step`.
_SMALL_STEP_US = {
    ("16-bit", "16-bit queries"): (math.inf, 20, 12, 6),
    ("16-bit", "gathered, 16-bit queries"): (math.inf, 7, 12, 6),
    ("FP8", "16-bit queries"): (math.inf, 11, 18, 16),
    ("FP8", "e4m3 queries"): (math.inf, 6, 6, 6),
    ("FP8", "gathered, 16-bit queries"): (math.inf, 3, 6, 6),
    ("FP8", "gathered, e4m3 queries"): (math.inf, 3, 6, 6),
    ("group", "16-bit queries"): (math.inf, 11, 12, 8),
    ("group", "e4m3 queries"): (math.inf, 8, 6, 6),
    ("group", "gathered, 16-bit queries"): (math.inf, 8, 8, 8),
    ("group", "gathered, e4m3 queries"): (math.inf, 6, 8, 6),
}


def is_small_step(
    kv_format: str, q_fp8: bool, num_heads: int, batch: int, kv_len: int, gpu: GpuSpeed, gathers: bool
) -> bool:
    """Whether a decode step is so small that tile16 is the faster kernel; up to 16 heads it nearly always is.

    By tiles of 16 heads x 64 tokens per SM, as measured on an H200 with the keys' L2 emptied before each call, as the
    weights of a layer empty it in an engine, and without (docs/performance.md). A tile costs tile16 more: as many times
    as its heads take tiles, the keys come from L2 again. A row-tile step costs more to begin, most of all where 16-bit
    queries are converted for an FP8 cache. `gathers`: keys come one by one, for each tile of heads anew.

    What row tiles take longer to begin is us, mostly of fetching code. A tile is cycles: L2 and mma.sync run with the
    SMs, and a tile over half the bytes, in FP8, takes as long. So the limit in tiles goes with the clock. It goes by
    neither the memory's bandwidth, from which both kernels read each key once, nor slower tensor cores, which slow both
    (what that does to their ratio was not measured).
    """
    tile_us = _TILE16_CYCLES / gpu.clock_mhz
    us = batch * -(-kv_len // BLOCK) * -(-num_heads // TILE16_M) / gpu.sm_count * tile_us
    cache = "group" if kv_format == "group" else "FP8" if kv_format else "16-bit"
    kind = ("gathered, " if gathers else "") + ("e4m3 queries" if q_fp8 else "16-bit queries")
    return us <= _SMALL_STEP_US[cache, kind][sum(num_heads > heads for heads in (TILE16_M, 32, 64))]
