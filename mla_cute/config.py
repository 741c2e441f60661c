"""Tunable configuration of the kernels: values that change speed, and results by rounding at most."""

import dataclasses
import functools
from typing import Any

KERNELS = ("rows",)
FP8_KERNELS = ("auto", "rows", "few_rows")
ACCURACIES = ("high", "native")


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """The part of a configuration that compiled code depends on."""

    kernel: str
    evict_first: bool
    use_pdl: bool
    accuracy: str


@dataclasses.dataclass(frozen=True, slots=True)
class KernelConfig:
    """One point of the tuning space of the decode path.

    kernel            which main kernel runs: "rows" (64 packed rows per tile, two KV tiles in flight)
    fp8_kernel        the same for FP8 caches: "rows"; "few_rows" (decode: tiles of 16 heads on mma.sync, for few heads
                      or few keys); or "auto": few_rows up to 16 heads
    accuracy          of "rows" on FP8 caches in formats tensor and token. e4m3 wgmma adds products up with about 14
                      bits: "native" lets it add all 512 channels, "high" each 128, and those in float32, as format
                      group always does: half the error for 0 to 2 % of the time. For few_rows and 16-bit caches both
                      are the same
    evict_first       KV loads carry the L2 evict-first hint
    use_pdl           launch planner, main and merge kernels with programmatic dependent launch
    min_blocks        64-token blocks below which a piece of a request is not split further (even)
    item_overhead     cost of starting a work item, in 64-token blocks, as the planner's balance counts it
    split_penalty     cost of splitting requests at all, in 64-token blocks per CTA; whole requests are preferred
                      while their makespan is within it
    """

    kernel: str = "rows"
    fp8_kernel: str = "auto"
    accuracy: str = "high"
    evict_first: bool = True
    use_pdl: bool = True
    min_blocks: int = 2
    item_overhead: int = 4
    split_penalty: int = 6

    @functools.lru_cache(maxsize=256)  # noqa: B019 -- values, few and small; a call without a plan asks every time
    def launch(self) -> LaunchConfig:
        return LaunchConfig(self.kernel, self.evict_first, self.use_pdl, self.accuracy)

    @functools.lru_cache(maxsize=256)  # noqa: B019
    def planner_launch(self) -> LaunchConfig:
        """As `launch`, with only what the planner's code depends on: configurations share its kernels."""
        return KernelConfig(use_pdl=self.use_pdl).launch()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "KernelConfig":
        """Raises ValueError on an unknown field, TypeError on a field of the wrong type."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - set(fields)):
            raise ValueError(f"config: unknown fields {unknown}; known are {sorted(fields)}")
        for name, value in values.items():
            expected = type(fields[name].default)
            if type(value) is not expected:
                raise TypeError(f"config.{name}: expected {expected.__name__}, got {value!r}")
        return cls(**values)


def why_infeasible(config: KernelConfig) -> str | None:
    """The one feasibility rule: None, or the reason why `config` cannot run."""
    if config.kernel not in KERNELS:
        return f"kernel: expected one of {KERNELS}, got {config.kernel!r}"
    if config.fp8_kernel not in FP8_KERNELS:
        return f"fp8_kernel: expected one of {FP8_KERNELS}, got {config.fp8_kernel!r}"
    if config.accuracy not in ACCURACIES:
        return f"accuracy: expected one of {ACCURACIES}, got {config.accuracy!r}"
    if config.min_blocks < 2 or config.min_blocks % 2:
        return f"min_blocks: expected an even number >= 2, got {config.min_blocks}"
    if config.item_overhead < 0:
        return f"item_overhead: expected >= 0, got {config.item_overhead}"
    if config.split_penalty < 0:
        return f"split_penalty: expected >= 0, got {config.split_penalty}"
    return None


@functools.lru_cache(maxsize=4096)
def default_config(num_heads: int, page_size: int, batch: int, num_sms: int) -> KernelConfig:
    """The configuration used when no tuned entry applies."""
    del page_size, batch, num_sms
    return KernelConfig(split_penalty=2 + (4 * min(num_heads, 128) + 63) // 64)


def small_fp8_step(num_heads: int, batch: int, kv_len: int, q_fp8: bool, num_sms: int) -> bool:
    """Whether an FP8 decode step of more than 16 heads is so small that few_rows is the faster kernel.

    By tiles of 16 heads x 64 tokens per SM, as measured on an H200 (docs/performance.md): a tile costs few_rows 1.2 us
    where row tiles take 0.3 to 0.9, and a step costs it 3 us (with 16-bit queries 6 us) less.
    """
    tiles = batch * -(-kv_len // 64) * -(-num_heads // 16) / num_sms
    most = (24, 12) if num_heads <= 32 else (18, 6)
    return tiles <= most[q_fp8]
