"""The shipped kernel variants and their static keys. Imports nothing of the DSL: a warm start does not need it."""

import dataclasses
import math
from collections.abc import Iterable

from ..config import KernelConfig, LaunchConfig
from ..jit import KernelRef

DTYPES = ("bfloat16", "float16")
# Rows of a TMA box; 0 is the cp.async gather (paged_kv.py).
BOX_ROWS = (64, 32, 16, 8, 0)
LENGTHS = ("csr", "csr_last", "seq_lens")

# Planner geometry, shared by its device and host sides (kernels/planner.py explains them).
BLOCK = 64
TILE_M = 64
# A partial row in 32-bit words: 512 outputs as 16-bit integers, the float32 log-sum-exp in base 2, what an integer is
# worth in each half of the row, padding to whole 128-byte lines: rows that straddle sectors made the partial stores of
# 128 heads twice as slow. Integers under a scale keep 2^-15 of the row's largest element. The dtype's own 16 bits
# round once more than an uncut computation does (a few rows in ten thousand then exceed twice its error); float32 is
# twice the bytes, which at 64 heads, batch 16 and 1024 tokens are as many as the cache's.
PART_ROW = 288
PART_LSE = 256
# Column tiles of a row that the merge treats apart: the halves that the main kernel's two consumers wrote.
MERGE_COL_TILES = 2
# The largest integer, and what the integers are added to in float32 so that they fill its low bits.
INT16_MAX = 32767.0
INT16_BIAS = float(2**23 + 2**15)
MAX_PARTS = 256
FIXED_MIN_BLOCKS = 16
FIXED_MAX_PIECES = 16


@dataclasses.dataclass(frozen=True)
class DecodeKey:
    """Static facts of the decode step: element type of q, caches and output; rows of a TMA box (0: gather)."""

    dtype: str
    box_rows: int


@dataclasses.dataclass(frozen=True)
class PlannerKey:
    """`lengths`: "csr" (kv_indptr, last pages full), "csr_last" (with kv_last_page_len) or "seq_lens"."""

    lengths: str
    batch_invariant: bool


DECODE = KernelRef("decode_rows_sm90", "mla_cute.kernels.decode", "Decode")
PLANNER = KernelRef("planner", "mla_cute.kernels.planner", "Planner")


def box_rows_of(page_size: int) -> int:
    """Rows of the TMA boxes for a page size: the largest power of two that divides page and tile; 0 below 8."""
    rows = math.gcd(page_size, BLOCK)
    return rows if rows >= 8 else 0


def variants(
    dtypes: Iterable[str] | None = None, page_sizes: Iterable[int] | None = None, config: KernelConfig | None = None
) -> list[tuple[KernelRef, object, LaunchConfig]]:
    """(kernel, key, launch config) of what `dtypes` ("bfloat16", "float16") and `page_sizes` need; None means all.

    Raises ValueError on an unknown dtype or a page size below 1.
    """
    dtypes = DTYPES if dtypes is None else tuple(dtypes)
    if unknown := sorted(set(dtypes) - set(DTYPES)):
        raise ValueError(f"dtypes: expected names from {DTYPES}, got {unknown}")
    if page_sizes is None:
        boxes = BOX_ROWS
    else:
        page_sizes = tuple(page_sizes)
        if bad := [p for p in page_sizes if p < 1]:
            raise ValueError(f"page_sizes: expected values >= 1, got {bad}")
        boxes = tuple(b for b in BOX_ROWS if b in {box_rows_of(p) for p in page_sizes})
    config = config or KernelConfig()
    decode = [(DECODE, DecodeKey(dtype, box), config.launch()) for dtype in dtypes for box in boxes]
    planner = [
        (PLANNER, PlannerKey(lengths, invariant), config.planner_launch())
        for lengths in LENGTHS
        for invariant in (False, True)
    ]
    return [*decode, *planner]
