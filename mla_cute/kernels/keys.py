"""Static keys and names of the kernels, and sizes that planners and host count in. Imports nothing of the DSL, so that
a start from disk does not need it, and no configuration, so that another default compiles no kernel again."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

from ..dims import HeadDims

# Rows of a TMA box; 0 is the cp.async gather (lib/paged.py).
BOX_ROWS = (64, 32, 16, 8, 0)
LENGTHS = ("csr", "csr_last", "seq_lens")

# Planner geometry (planner/decode.py explains it).
MAX_PARTS = 256
FIXED_MIN_BLOCKS = 16
FIXED_MAX_PIECES = 16

# Prefill plans (planner/prefill.py): costs are sorted in that many classes; tiles left after whole rounds may
# become that many items per part; batch-invariant pieces of a request, all its row tiles together.
COST_CLASSES = 1024
TAIL_ITEMS_PER_PART = 4
FIXED_MAX_ITEMS = 128
# Rows of its scratch, which has a column for each request, and those that a conversion of the cache goes by: keys of
# the request, index of its first page.
FACTS = 8
KV_LEN, FIRST = 2, 3


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """The part of a configuration that compiled code depends on."""

    evict_first: bool
    use_pdl: bool
    accuracy: str


@dataclasses.dataclass(frozen=True)
class KernelRef:
    """A kernel named without importing its module, so that a start from disk does not import cutlass.

    Attributes:
        name: of the kernel, in cache entries and messages.
        module: importable module that defines it.
        qualname: there, what makes it of a static key and a launch configuration: a class or a function.
    """

    name: str
    module: str
    qualname: str

    def resolve(self) -> Callable[[Any, Any], Any]:
        return getattr(importlib.import_module(self.module), self.qualname)


@dataclasses.dataclass(frozen=True)
class DecodeKey:
    """Static facts of the decode step: element type of q, caches and output; rows of a TMA box (0: gather); whether
    each query token has a list of tokens in the place of its request's pages, which are gathered; head dimensions."""

    dtype: str
    box_rows: int
    sparse: bool = False
    dims: HeadDims = HeadDims()


@dataclasses.dataclass(frozen=True)
class PlannerKey:
    """`lengths`: "csr" (kv_indptr, last pages full), "csr_last" (with kv_last_page_len) or "seq_lens"."""

    lengths: str
    batch_invariant: bool


@dataclasses.dataclass(frozen=True)
class PrefillKey:
    """Static facts of a prefill step, as of a decode step; causal or not is the plan's. `converted`: the cache was made
    of an FP8 one, and there are scales."""

    dtype: str
    box_rows: int
    dims: HeadDims = HeadDims()
    converted: bool = False


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
    sparse     as `DecodeKey`'s, likewise dims; other ones than 512 + 64 have format "tensor" only
    """

    dtype: str
    box_rows: int
    kv_format: str
    q_fp8: bool
    sparse: bool = False
    dims: HeadDims = HeadDims()


@dataclasses.dataclass(frozen=True)
class AppendKey:
    """Static facts of an append: element type of the tokens and of 16-bit caches, "" or a name from KV_FORMATS, the
    element type of slot_mapping ("int32" or "int64"), and head dimensions as of `Fp8Key`."""

    dtype: str
    kv_format: str
    slots: str
    dims: HeadDims = HeadDims()


@dataclasses.dataclass(frozen=True)
class ConvertKey:
    """Static facts of a conversion of an FP8 cache to 16 bits: that element type, a name from KV_FORMATS, whether e4m3
    queries are converted, too, and head dimensions as of `Fp8Key`."""

    dtype: str
    kv_format: str
    q_fp8: bool
    dims: HeadDims = HeadDims()


@dataclasses.dataclass(frozen=True)
class MergeStatesKey:
    """Static facts of a merge of two states: element type of the outputs, "bfloat16", "float16" or "float32"."""

    dtype: str


DECODE = KernelRef("decode_tile64", "mla_cute.kernels.tile64.setup", "decode")
PREFILL = KernelRef("prefill_tile64", "mla_cute.kernels.tile64.setup", "prefill")
DECODE_FP8 = KernelRef("decode_tile64_fp8", "mla_cute.kernels.tile64_fp8.setup", "decode")
PREFILL_FP8 = KernelRef("prefill_tile64_fp8", "mla_cute.kernels.tile64_fp8.setup", "prefill")
DECODE_TILE32_FP8 = KernelRef("decode_tile32_fp8", "mla_cute.kernels.tile64_fp8.setup", "decode_32_rows")
PREFILL_TILE32_FP8 = KernelRef("prefill_tile32_fp8", "mla_cute.kernels.tile64_fp8.setup", "prefill_32_rows")
DECODE_TILE16 = KernelRef("decode_tile16", "mla_cute.kernels.tile16.setup", "decode")
DECODE_TILE16_FP8 = KernelRef("decode_tile16_fp8", "mla_cute.kernels.tile16.setup", "decode_fp8")
PLANNER = KernelRef("planner", "mla_cute.kernels.planner.decode", "Planner")
PREFILL_PLANNER = KernelRef("prefill_planner", "mla_cute.kernels.planner.prefill", "PrefillPlanner")
APPEND = KernelRef("append", "mla_cute.kernels.append", "Append")
CONVERT = KernelRef("convert", "mla_cute.kernels.convert", "Convert")
MERGE_STATES = KernelRef("merge_states", "mla_cute.kernels.merge_states", "MergeStates")
