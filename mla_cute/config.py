"""Tunable configuration of the kernels: values that change speed, and results by rounding at most."""

import dataclasses
import functools
from typing import Any

from .dims import TILE16_M
from .kernels.keys import LaunchConfig

KERNELS = ("auto", "tile64", "tile16")
ACCURACIES = ("high", "native", "fast")


@dataclasses.dataclass(frozen=True, slots=True)
class KernelConfig:
    """One point of the tuning space of the decode path.

    kernel            which main kernel runs over 16-bit caches: "tile64" (64 rows per tile on wgmma, two KV tiles in
                      flight); "tile16" (decode: tiles of 16 heads on mma.sync, for few heads or few keys); or
                      "auto": tile16 up to 16 heads
    fp8_kernel        the same over FP8 caches
    accuracy          of "tile64" on FP8 caches; for tile16 and 16-bit caches all three are the same.
                      "high"    sums of 128 channels, which the tensor core adds up with about 14 bits, are added in
                                float32; a 16-bit query is multiplied as two e4m3 parts
                      "native"  formats tensor and token: the tensor core adds all channels up: twice the error for 0
                                to 2 % less time. In format group as "high"
                      "fast"    a 16-bit query is multiplied as one e4m3 part under a scale per row, its rope part
                                too where the rope cache is e4m3: half the work of Q K^T, for an error of 3.7e-2 on
                                normal data (docs/numerics.md). The rest is as "high", and all of it with e4m3 queries
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
    if config.fp8_kernel not in KERNELS:
        return f"fp8_kernel: expected one of {KERNELS}, got {config.fp8_kernel!r}"
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


@functools.lru_cache(maxsize=4096)
def default_config(num_heads: int, page_size: int, batch: int, num_sms: int) -> KernelConfig:
    """The configuration used when no tuned entry applies."""
    del page_size, batch, num_sms
    config = KernelConfig(split_penalty=2 + (4 * min(num_heads, 128) + 63) // 64)
    return _with_pieces(config, tile16=num_heads <= TILE16_M)


def _with_pieces(config: KernelConfig, tile16: bool) -> KernelConfig:
    """`config` with the smallest pieces that tile16, or else row tiles, take."""
    unit = 1 if tile16 else 2
    return dataclasses.replace(config, cut_unit=unit, min_blocks=unit)


def with_kernel(config: KernelConfig, kv_format: str, kernel: str) -> KernelConfig:
    """`config` with that main kernel ("tile64" or "tile16") for a cache, and the pieces it takes."""
    config = _with_pieces(config, tile16=kernel == "tile16")
    return dataclasses.replace(config, fp8_kernel=kernel) if kv_format else dataclasses.replace(config, kernel=kernel)


# For up to 32, for up to 64 and for more heads: tiles per SM up to which a step is small. See `is_small_step`.
_SMALL_STEP_TILES = {
    "16-bit cache": (20, 12, 6),
    "FP8 cache, 16-bit queries": (36, 18, 16),
    "FP8 cache, e4m3 queries": (20, 10, 8),
    "FP8 cache, gathered": (20, 6, 6),
}


def is_small_step(
    kv_format: str, q_fp8: bool, num_heads: int, batch: int, kv_len: int, num_sms: int, gathers: bool
) -> bool:
    """Whether a decode step of more than 16 heads is so small that tile16 is the faster kernel.

    By tiles of 16 heads x 64 tokens per SM, as measured on an H200 with the keys' L2 emptied before each call, as the
    weights of a layer empty it in an engine, and without (docs/performance.md). A tile costs tile16 more: as many times
    as its heads take tiles, the keys come from L2 again. A row-tile step costs more to begin, most of all where 16-bit
    queries are converted for an FP8 cache. `gathers`: keys come one by one, for each tile of heads anew.
    """
    tiles = batch * -(-kv_len // 64) * -(-num_heads // TILE16_M) / num_sms
    of_cache = "16-bit cache"
    if kv_format:
        of_cache = f"FP8 cache, {'gathered' if gathers else 'e4m3 queries' if q_fp8 else '16-bit queries'}"
    return tiles <= _SMALL_STEP_TILES[of_cache][0 if num_heads <= 32 else 1 if num_heads <= 64 else 2]
