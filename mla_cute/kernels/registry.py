"""Which kernels a call runs, under which keys, what of the planner's sizes follows from that; and the shipped variants.
Imports nothing of the DSL: a warm start does not need it."""

import functools
import itertools
import math
from collections.abc import Iterable

from ..config import KernelConfig
from ..dims import BLOCK, DTYPES, HEAD_DIMS, KV_FORMATS, TILE16_M, TILE32_M, TILE_M, HeadDims
from .keys import (
    APPEND,
    BOX_ROWS,
    CONVERT,
    DECODE,
    DECODE_FP8,
    DECODE_TILE16,
    DECODE_TILE16_FP8,
    DECODE_TILE32_FP8,
    LENGTHS,
    MAX_PARTS,
    MERGE_STATES,
    PLANNER,
    PREFILL,
    PREFILL_FP8,
    PREFILL_PLANNER,
    PREFILL_TILE32_FP8,
    AppendKey,
    ConvertKey,
    DecodeKey,
    Fp8Key,
    KernelRef,
    LaunchConfig,
    MergeStatesKey,
    PlannerKey,
    PrefillKey,
    PrefillPlannerKey,
)

OPS = ("decode", "prefill")
# Of 16-bit row tiles whose requests read keys again.
KEEPS_KEYS = KernelConfig(evict_first=False)
# What `jit.get` takes: kernel, static key, launch configuration.
Variant = tuple[KernelRef, object, LaunchConfig | None]


# ------------------------------------------------------------------------------------------ which kernels a call runs


def step_of(op: str, kv_format: str, num_heads: int, config: KernelConfig, few_rows: bool = False) -> KernelRef:
    """The main kernel of a call; `kv_format` is "" for a 16-bit cache, and where the cache is converted to one
    (`converts`). `few_rows`: no request of a prefill has more than 32."""
    if op == "prefill":
        if not kv_format:
            return PREFILL
        return PREFILL_TILE32_FP8 if few_rows else PREFILL_FP8
    if takes_tile16(kv_format, num_heads, config):
        return DECODE_TILE16_FP8 if kv_format else DECODE_TILE16
    if not kv_format:
        return DECODE
    return DECODE_TILE32_FP8 if num_heads <= TILE32_M else DECODE_FP8


def has_few_rows(op: str, num_heads: int, q_len: int) -> bool:
    """Whether a call is a prefill whose requests, of up to `q_len` query tokens, have no more rows than its tiles of 32
    over FP8 caches."""
    return op == "prefill" and q_len * num_heads <= TILE32_M


# Rows of a request, on an average, from which on a prefill converts an FP8 cache first, by format and whether queries
# are e4m3: where that took less time on an H200, 512 and 1024 rows over 8192 tokens being what was tried
# (docs/performance.md). e4m3 queries over format "tensor" are multiplied fastest as they are. Format "token" gains as
# "tensor" does, but loses digits: its scales are no powers of two.
CONVERT_ROWS = {("group", False): 512, ("group", True): 1024, ("tensor", False): 1024}


def converts(
    op: str,
    kv_format: str,
    q_fp8: bool,
    num_heads: int,
    q_len: int,
    config: KernelConfig,
    dtype: str = "bfloat16",
) -> bool:
    """Whether a call, whose requests have `q_len` query tokens on an average, converts the keys of an FP8 cache to 16
    bits and runs the 16-bit kernel. `dtype` is that of its output: float16 cannot hold what any scale makes of e4m3."""
    if op != "prefill" or not kv_format or (q_fp8 and kv_format == "tensor") or dtype != "bfloat16":
        return False
    if config.fp8_kernel != "auto":
        return config.fp8_kernel == "convert"
    return q_len * num_heads >= CONVERT_ROWS.get((kv_format, q_fp8), math.inf)


def takes_tile16(kv_format: str, num_heads: int, config: KernelConfig) -> bool:
    """Whether a decode step's main kernel is the tile16 kernel of its kind of cache."""
    kernel = config.fp8_kernel if kv_format else config.kernel
    return kernel == "tile16" or (kernel == "auto" and num_heads <= TILE16_M)


@functools.lru_cache(maxsize=4096)  # a call without a plan asks every time
def step_variant(
    op: str,
    kv_format: str,
    q_fp8: bool,
    num_heads: int,
    page_size: int,
    dtype: str,
    config: KernelConfig,
    dims: HeadDims = HeadDims(),
    few_rows: bool = False,
) -> Variant:
    """The step of a call: main kernel and merge. `dtype` is that of its output, "bfloat16" or "float16"; `few_rows` as
    `step_of`."""
    sparse = op == "sparse"
    box_rows = 0 if sparse else box_rows_of(page_size)
    key: object
    if kv_format:
        key = Fp8Key(dtype, box_rows, kv_format, q_fp8, sparse, dims)
    else:
        key = PrefillKey(dtype, box_rows, dims) if op == "prefill" else DecodeKey(dtype, box_rows, sparse, dims)
    return step_of(op, kv_format, num_heads, config, few_rows), key, config.launch()


def convert_variant(kv_format: str, q_fp8: bool = False, dims: HeadDims = HeadDims()) -> Variant:
    """What converts the keys of an FP8 cache, and e4m3 queries, to bfloat16. There is nothing to tune."""
    return CONVERT, ConvertKey("bfloat16", kv_format, q_fp8, dims), None


def converted_variants(
    kv_format: str, q_fp8: bool, page_size: int, config: KernelConfig, dims: HeadDims = HeadDims()
) -> list[Variant]:
    """What a prefill that `converts` takes in the place of the step over its FP8 cache."""
    step = PREFILL, PrefillKey("bfloat16", box_rows_of(page_size), dims, converted=True), config.launch()
    return [convert_variant(kv_format, q_fp8, dims), step]


def planner_variant(op: str, lengths: str, config: KernelConfig, batch_invariant: bool = False) -> Variant:
    """The planner for one of `registry.LENGTHS`."""
    if op != "prefill":
        return PLANNER, PlannerKey(lengths, batch_invariant), config.planner_launch()
    return PREFILL_PLANNER, PrefillPlannerKey(lengths, batch_invariant), config.planner_launch()


def decode_parts(kv_format: str, num_heads: int, config: KernelConfig, num_sms: int) -> int:
    """Work lists of a decode plan: a CTA for each list and row tile, no more CTAs than SMs."""
    rows = TILE16_M if takes_tile16(kv_format, num_heads, config) else TILE_M
    return max(1, min(MAX_PARTS, num_sms // -(-num_heads // rows)))


def prefill_min_blocks(config: KernelConfig) -> int:
    """`min_blocks` in whole pairs: its planner counts in pairs and would round an odd number down."""
    return config.min_blocks + config.min_blocks % 2


# ---------------------------------------------------------------------------------------------------- shipped variants


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
    head_dims: Iterable[tuple[int, int]] = (HeadDims(),),
) -> list[Variant]:
    """(kernel, key, launch config) of what `ops` ("decode", "prefill") need for `dtypes` ("bfloat16", "float16") and
    `page_sizes`; None means all, of `config` what calls without one take on an H200. `kv_formats`: "" is a 16-bit
    cache, a name from KV_FORMATS an FP8 one, with 16-bit queries and with e4m3 ones. `head_dims`: pairs from HEAD_DIMS;
    those that a format does not have it goes without.

    Raises ValueError on an unknown op, dtype, format or pair, or a page size below 1; TypeError where an argument is no
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
    head_dims = known_head_dims(head_dims)
    prefills = _prefill_configs(config)
    config = config or KernelConfig()
    found: list[Variant] = []
    for op, main, key, main_fp8, planner, planner_key in (
        (
            "decode",
            (DECODE, DECODE_TILE16),
            DecodeKey,
            (DECODE_FP8, DECODE_TILE32_FP8, DECODE_TILE16_FP8),
            PLANNER,
            PlannerKey,
        ),
        ("prefill", (PREFILL,), PrefillKey, (PREFILL_FP8, PREFILL_TILE32_FP8), PREFILL_PLANNER, PrefillPlannerKey),
    ):
        if op in ops:
            if "" in kv_formats:
                found += [
                    (kernel, key(dtype, box, dims=dims), of_call.launch())
                    for dims in head_dims
                    for kernel in main
                    for dtype in dtypes
                    for box in boxes
                    for of_call in (prefills if kernel is PREFILL and box else [config])
                ]
            found += [
                (fp8_kernel, Fp8Key(dtype, box, kv_format, q_fp8, dims=dims), config.launch())
                for dims in head_dims
                for fp8_kernel in main_fp8
                for kv_format in KV_FORMATS
                if kv_format in kv_formats and has_format(dims, kv_format)
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


def _prefill_configs(config: KernelConfig | None) -> list[KernelConfig]:
    """Of the 16-bit row tiles that TMA loads: with the hint that evicts keys from L2 first, and without it for requests
    of more than one row tile (tuned/select.py)."""
    return [KernelConfig(), KEEPS_KEYS] if config is None else [config]


def has_format(dims: HeadDims, kv_format: str) -> bool:
    """Whether caches of these head dimensions may have that format; "" is a 16-bit one."""
    return kv_format in ("", "tensor") or dims == HeadDims()


def sparse_variants(
    dtypes: Iterable[str] | None = None,
    kv_formats: Iterable[str] | None = None,
    config: KernelConfig | None = None,
    head_dims: Iterable[tuple[int, int]] = (HeadDims(),),
) -> list[Variant]:
    """(kernel, key, launch config) of what `mla_sparse` needs for `dtypes` and `kv_formats`; None means all;
    `head_dims` as `variants`. It runs decode's kernels, each query token as a request of its own, and gathers from
    pages of every size alike.

    Raises ValueError on an unknown dtype, format or pair.
    """
    formats = ("", *KV_FORMATS)
    dtypes = DTYPES if dtypes is None else known_names("dtypes", dtypes, DTYPES)
    kv_formats = formats if kv_formats is None else known_names("kv_formats", kv_formats, formats)
    head_dims = known_head_dims(head_dims)
    config = config or KernelConfig()
    found: list[Variant] = []
    for dims, dtype in itertools.product(head_dims, dtypes):
        if "" in kv_formats:
            key = DecodeKey(dtype, 0, sparse=True, dims=dims)
            found += [(kernel, key, config.launch()) for kernel in (DECODE, DECODE_TILE16)]
        found += [
            (kernel, Fp8Key(dtype, 0, kv_format, q_fp8, sparse=True, dims=dims), config.launch())
            for kernel in (DECODE_FP8, DECODE_TILE32_FP8, DECODE_TILE16_FP8)
            for kv_format in KV_FORMATS
            if kv_format in kv_formats and has_format(dims, kv_format)
            for q_fp8 in (False, True)
        ]
    planners = (PlannerKey("seq_lens", invariant) for invariant in (False, True))
    return found + [(PLANNER, key, config.planner_launch()) for key in planners]


def conversion_variants(
    dtypes: Iterable[str] | None = None,
    page_sizes: Iterable[int] | None = None,
    kv_formats: Iterable[str] | None = None,
    config: KernelConfig | None = None,
    head_dims: Iterable[tuple[int, int]] = (HeadDims(),),
) -> list[Variant]:
    """(kernel, key, launch config) of what prefills that convert an FP8 cache take; arguments as of `variants`, None
    means all, and of `config` what calls without one take. There are none for float16 or 16-bit caches.

    Raises as `variants`.
    """
    dtypes = DTYPES if dtypes is None else known_names("dtypes", dtypes, DTYPES)
    kv_formats = KV_FORMATS if kv_formats is None else known_names("kv_formats", kv_formats, ("", *KV_FORMATS))
    sizes = BOX_ROWS if page_sizes is None else known_page_sizes(page_sizes)
    head_dims = known_head_dims(head_dims)
    found = [
        variant
        for dims in head_dims
        for kv_format in KV_FORMATS
        if kv_format in kv_formats and has_format(dims, kv_format) and "bfloat16" in dtypes
        for q_fp8 in ((False,) if kv_format == "tensor" else (False, True))
        for page_size in sizes
        for of_call in [config or (KEEPS_KEYS if box_rows_of(page_size or 1) else KernelConfig())]
        for variant in converted_variants(kv_format, q_fp8, page_size or 1, of_call, dims)
    ]
    return list(dict.fromkeys(found))


def append_variants(
    dtypes: Iterable[str] | None = None,
    kv_formats: Iterable[str] | None = None,
    head_dims: Iterable[tuple[int, int]] = (HeadDims(),),
) -> list[tuple[KernelRef, AppendKey, None]]:
    """(kernel, key, None) of what `append_to_cache` needs for `dtypes` and `kv_formats` ("": 16-bit caches); None means
    all; `head_dims` as `variants`. Appending has nothing to tune.

    Raises ValueError on an unknown dtype, format or pair.
    """
    formats = ("", *KV_FORMATS)
    dtypes = DTYPES if dtypes is None else known_names("dtypes", dtypes, DTYPES)
    kv_formats = formats if kv_formats is None else known_names("kv_formats", kv_formats, formats)
    return [
        (APPEND, AppendKey(dtype, kv_format, slots, dims), None)
        for dims in known_head_dims(head_dims)
        for dtype in dtypes
        for kv_format in kv_formats
        if has_format(dims, kv_format)
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


def known_head_dims(head_dims: Iterable[tuple[int, int]]) -> tuple[HeadDims, ...]:
    """TypeError if they are no sequence of pairs of ints, ValueError on a pair that HEAD_DIMS has not."""
    if isinstance(head_dims, (str, bytes)) or not isinstance(head_dims, Iterable):
        raise TypeError(f"head_dims: expected a sequence of (ckv, kpe), got {head_dims!r:.80}")
    pairs = list(head_dims)
    if bad := [p for p in pairs if not (isinstance(p, (tuple, list)) and len(p) == 2 and _are_ints(p))]:
        raise TypeError(f"head_dims: expected pairs of ints (ckv, kpe), got {bad}")
    if bad := [p for p in pairs if tuple(p) not in HEAD_DIMS]:
        raise ValueError(f"head_dims: expected pairs from {[tuple(dims) for dims in HEAD_DIMS]}, got {bad}")
    return tuple(HeadDims(*p) for p in pairs)


def _are_ints(values: Iterable[object]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values)
