"""Which candidates of a decode step are not worth compiling and timing, by a model of the step's time.

A step is as long as its longest part: what the part's blocks take, and starting its items; and the merge, where
anything is cut. A block takes its loads or its tile, whichever is longer (config.block_us). On the tuning records of an
H200 a candidate's time is 0.5 to 2.4 times what this says, for most 0.7 to 1.4 times. So only what the model takes for
PRUNED_FROM times the shortest candidate or longer is left out, which is 33 % of those records' candidates; of 132
shapes none lost one that was within 11 % of its best. A run tries every tenth of what it leaves out, the shortest
first, and reports how these did (report.py): in three runs of 2026-11-30, one of 310 was within 1 % of its shape's
best.

Prefill's candidates, which differ in how its last tiles are cut, are few and not modelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..bench.cases import token_bytes
from ..config import KernelConfig, block_us
from ..gpu_speed import GpuSpeed
from ..kernels.planner import model
from ..kernels.registry import decode_parts, takes_tile16
from ..tuned.select import When
from .space import kv_lens

# docs/performance.md: "One pair of tiles" less the tile's own 2 us; ragged batches; "Merging what was cut".
_CALL_US, _ITEM_US, _MERGE_US = 8.0, 1.5, 4.0

PRUNED_FROM = 1.5
_SAMPLE = 10


class Chosen(NamedTuple):
    """Candidates of a shape, the default first: to be timed, and left out; what the model has for each, in us."""

    timed: list[KernelConfig]
    pruned: list[KernelConfig]
    us: dict[KernelConfig, float]


def step_us(when: When, config: KernelConfig, gpu: GpuSpeed) -> float | None:
    """What the model has for a decode or sparse step; None for prefill."""
    if not when.decodes:
        return None
    lengths = kv_lens(when)
    parts = decode_parts(when.kv_format, when.num_heads, config, gpu.sm_count)
    made = model.plan(lengths, [0] * len(lengths), parts, when.num_heads, config)
    tile16 = takes_tile16(when.kv_format, when.num_heads, config)
    block = block_us(when.num_heads, gpu, tile16=tile16, token_bytes=token_bytes(when.kv_format))
    items = [end - begin for begin, end in zip(made.starts, made.starts[1:], strict=False)]
    longest = max(blocks * block + _ITEM_US * n for blocks, n in zip(made.loads, items, strict=True))
    return _CALL_US + longest + (_MERGE_US if any(pieces > 1 for _, pieces in made.splits) else 0.0)


def choose(when: When, candidates: Sequence[KernelConfig], gpu: GpuSpeed) -> Chosen:
    """What of `candidates` is timed, of which the first, the default, is always."""
    found = {config: us for config in candidates if (us := step_us(when, config, gpu)) is not None}
    if not found:
        return Chosen(list(candidates), [], {})
    limit = PRUNED_FROM * min(found.values())
    slow = [config for config in candidates[1:] if found[config] >= limit]
    sample = sorted(slow, key=found.__getitem__)[::_SAMPLE]
    pruned = [config for config in slow if config not in sample]
    return Chosen([config for config in candidates if config not in pruned], pruned, found)
