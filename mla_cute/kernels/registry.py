"""The shipped kernel variants and their static keys. Imports nothing of the DSL: a warm start does not need it."""

import dataclasses
import importlib
import math
from collections.abc import Iterable

from ..config import KernelConfig, LaunchConfig

OPS = ("decode", "prefill")
DTYPES = ("bfloat16", "float16")
# Rows of a TMA box; 0 is the cp.async gather (paged_kv.py).
BOX_ROWS = (64, 32, 16, 8, 0)
LENGTHS = ("csr", "csr_last", "seq_lens")
# FP8 caches (quant.py): which scales they have, and whether the queries are e4m3 too.
KV_FORMATS = ("tensor", "token", "group")

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
# What a row's largest element becomes: a little under the largest integer, which the product must not exceed, since the
# approximate reciprocal may be off by an ulp. And what the integers are added to in float32 to fill its low bits.
INT16_MOST = 32767.0 * (1 - 2.0**-20)
INT16_BIAS = float(2**23 + 2**15)
MAX_PARTS = 256
FIXED_MIN_BLOCKS = 16
FIXED_MAX_PIECES = 16

# Prefill plans (kernels/prefill_planner.py): costs are sorted in that many classes; tiles left after whole rounds may
# become that many items per part; batch-invariant pieces of a request, all its row tiles together.
COST_CLASSES = 1024
TAIL_ITEMS_PER_PART = 4
FIXED_MAX_ITEMS = 128


@dataclasses.dataclass(frozen=True)
class KernelRef:
    """A kernel class named without importing its module, so that a start from disk does not import cutlass.

    Attributes:
        name: the class's `name`.
        module: importable module that defines it.
        qualname: the class's name in that module.
    """

    name: str
    module: str
    qualname: str

    def resolve(self) -> type:
        return getattr(importlib.import_module(self.module), self.qualname)


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


@dataclasses.dataclass(frozen=True)
class PrefillKey:
    """Static facts of a prefill step, as of a decode step; causal or not is the plan's."""

    dtype: str
    box_rows: int


@dataclasses.dataclass(frozen=True)
class PrefillPlannerKey:
    """As `PlannerKey`."""

    lengths: str
    batch_invariant: bool


@dataclasses.dataclass(frozen=True)
class Fp8Key:
    """Static facts of a step over an FP8 cache.

    dtype      16-bit type of the output, and of the queries and the rope cache where those are not e4m3
    q_fp8      the queries are e4m3: q_nope always, q_pe where kpe_cache is (format "tensor")
    """

    dtype: str
    box_rows: int
    kv_format: str
    q_fp8: bool


@dataclasses.dataclass(frozen=True)
class AppendKey:
    """Static facts of an append: element type of the tokens and of 16-bit caches, "" or a name from KV_FORMATS, and the
    element type of slot_mapping ("int32" or "int64")."""

    dtype: str
    kv_format: str
    slots: str


@dataclasses.dataclass(frozen=True)
class MergeStatesKey:
    """Static facts of a merge of two states: element type of the outputs, "bfloat16", "float16" or "float32"."""

    dtype: str


DECODE = KernelRef("decode_rows_sm90", "mla_cute.kernels.decode", "Decode")
DECODE_FEW = KernelRef("decode_few_sm90", "mla_cute.kernels.decode", "DecodeFew")
PLANNER = KernelRef("planner", "mla_cute.kernels.planner", "Planner")
PREFILL = KernelRef("prefill_rows_sm90", "mla_cute.kernels.prefill", "Prefill")
DECODE_FP8 = KernelRef("decode_fp8_sm90", "mla_cute.kernels.step_fp8", "DecodeFp8")
DECODE_FEW_FP8 = KernelRef("decode_few_fp8_sm90", "mla_cute.kernels.step_fp8", "DecodeFewFp8")
PREFILL_FP8 = KernelRef("prefill_fp8_sm90", "mla_cute.kernels.step_fp8", "PrefillFp8")
PREFILL_PLANNER = KernelRef("prefill_planner", "mla_cute.kernels.prefill_planner", "PrefillPlanner")
APPEND = KernelRef("append", "mla_cute.kernels.append", "Append")
MERGE_STATES = KernelRef("merge_states", "mla_cute.kernels.merge_states", "MergeStates")


def box_rows_of(page_size: int) -> int:
    """Rows of the TMA boxes for a page size: the largest power of two that divides page and tile; 0 below 8."""
    rows = math.gcd(page_size, BLOCK)
    return rows if rows >= 8 else 0


def variants(
    dtypes: Iterable[str] | None = None,
    page_sizes: Iterable[int] | None = None,
    config: KernelConfig | None = None,
    ops: Iterable[str] | None = None,
    kv_formats: Iterable[str] = ("",),
) -> list[tuple[KernelRef, object, LaunchConfig]]:
    """(kernel, key, launch config) of what `ops` ("decode", "prefill") need for `dtypes` ("bfloat16", "float16") and
    `page_sizes`; None means all. `kv_formats`: "" is a 16-bit cache, a name from KV_FORMATS an FP8 one, with 16-bit
    queries and with e4m3 ones.

    Raises ValueError on an unknown op, dtype or format, or a page size below 1; TypeError where an argument is no
    sequence, or a page size no int.
    """
    dtypes = DTYPES if dtypes is None else known_names("dtypes", dtypes, DTYPES)
    ops = OPS if ops is None else known_names("ops", ops, OPS)
    kv_formats = known_names("kv_formats", kv_formats, ("", *KV_FORMATS))
    if page_sizes is None:
        boxes = BOX_ROWS
    else:
        asked = {box_rows_of(p) for p in known_page_sizes(page_sizes)}
        boxes = tuple(b for b in BOX_ROWS if b in asked)
    config = config or KernelConfig()
    found: list[tuple[KernelRef, object, LaunchConfig]] = []
    for op, main, key, main_fp8, planner, planner_key in (
        ("decode", (DECODE, DECODE_FEW), DecodeKey, (DECODE_FP8, DECODE_FEW_FP8), PLANNER, PlannerKey),
        ("prefill", (PREFILL,), PrefillKey, (PREFILL_FP8,), PREFILL_PLANNER, PrefillPlannerKey),
    ):
        if op in ops:
            if "" in kv_formats:
                found += [
                    (kernel, key(dtype, box), config.launch()) for kernel in main for dtype in dtypes for box in boxes
                ]
            found += [
                (fp8_kernel, Fp8Key(dtype, box, kv_format, q_fp8), config.launch())
                for fp8_kernel in main_fp8
                for kv_format in KV_FORMATS
                if kv_format in kv_formats
                for q_fp8 in (False, True)
                for dtype in dtypes
                for box in boxes
            ]
            found += [
                (planner, planner_key(lengths, invariant), config.planner_launch())
                for lengths in LENGTHS
                for invariant in (False, True)
            ]
    return found


def append_variants(
    dtypes: Iterable[str] | None = None, kv_formats: Iterable[str] | None = None
) -> list[tuple[KernelRef, AppendKey, None]]:
    """(kernel, key, None) of what `append_to_cache` needs for `dtypes` and `kv_formats` ("": 16-bit caches); None means
    all. Appending has nothing to tune.

    Raises ValueError on an unknown dtype or format.
    """
    formats = ("", *KV_FORMATS)
    dtypes = DTYPES if dtypes is None else known_names("dtypes", dtypes, DTYPES)
    kv_formats = formats if kv_formats is None else known_names("kv_formats", kv_formats, formats)
    return [
        (APPEND, AppendKey(dtype, kv_format, slots), None)
        for dtype in dtypes
        for kv_format in kv_formats
        for slots in ("int32", "int64")
    ]


def merge_states_variants(dtypes: Iterable[str] | None = None) -> list[tuple[KernelRef, MergeStatesKey, None]]:
    """(kernel, key, None) of what `merge_states` needs for `dtypes`; None means all, float32 among them. Merging has
    nothing to tune.

    Raises ValueError on an unknown dtype.
    """
    known = (*DTYPES, "float32")
    dtypes = known if dtypes is None else known_names("dtypes", dtypes, known)
    return [(MERGE_STATES, MergeStatesKey(dtype), None) for dtype in dtypes]


def known_names(name: str, values: Iterable[str], known: tuple[str, ...]) -> tuple[str, ...]:
    """`values` of the argument `name`. TypeError if they are no sequence (a text is none), ValueError on an unknown."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected a sequence of names from {known}, got {values!r:.80}")
    values = tuple(values)
    if unknown := [value for value in values if value not in known]:
        raise ValueError(f"{name}: expected names from {known}, got {unknown}")
    return values


def known_page_sizes(page_sizes: Iterable[int]) -> tuple[int, ...]:
    """TypeError if they are no sequence of ints, ValueError on one below 1."""
    if isinstance(page_sizes, (str, bytes)) or not isinstance(page_sizes, Iterable):
        raise TypeError(f"page_sizes: expected a sequence of ints, got {page_sizes!r:.80}")
    page_sizes = tuple(page_sizes)
    if bad := [p for p in page_sizes if isinstance(p, bool) or not isinstance(p, int)]:
        raise TypeError(f"page_sizes: expected ints, got {bad}")
    if bad := [p for p in page_sizes if p < 1]:
        raise ValueError(f"page_sizes: expected values >= 1, got {bad}")
    return page_sizes
