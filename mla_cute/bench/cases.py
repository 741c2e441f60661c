"""The shapes that are timed: decode and prefill cases, the presets, the speeds to reach, the public kernels' times."""

import abc
import dataclasses
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..check import DTYPE_NAMES
from ..config import ACCURACIES
from ..dims import CKV_DIM, HEAD_DIMS, KPE_DIM, KV_FORMATS, NUM_SCALES, HeadDims
from ..kernels.registry import has_format

# A case is timed on several disjoint sets of pages, called slots. Its calls take the slots in turn, so that a call does
# not find in L2 what an earlier one has read. One call moves `turnover` bytes, so the GPU moves `turnover` times the
# number of slots between two reads of a page. That is always more than ROTATION_BYTES, and at least ROTATION_TARGET
# where ROTATION_SLOTS slots are enough for it.
# The target is far above the size of L2 (50 MB on an H100, 60 MB on an H200), since even so L2 may keep a part of an
# earlier pass: the kernels load KV evict-first, that is, KV is what L2 gives up first to make room, new KV included. A
# case that read one slot of 4.8 GB over and over measured 101.3 % of the read bandwidth.
ROTATION_BYTES = 300_000_000
ROTATION_TARGET = 8_000_000_000
ROTATION_SLOTS = 64

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def token_bytes(kv_format: str, dims: HeadDims = HeadDims()) -> int:
    """Bytes of a cached token in a format (quant.py has them), its scales included; "" is a 16-bit cache."""
    ckv, kpe = 1 if kv_format else 2, 1 if kv_format == "tensor" else 2
    return dims.ckv * ckv + dims.kpe * kpe + 4 * NUM_SCALES[kv_format]


TOKEN_BYTES = {kv_format: token_bytes(kv_format) for kv_format in ("", *KV_FORMATS)}
# Latent and rotary cache in buffers of their own, or both in one, a token's channels side by side.
LAYOUTS = ("separate", "fused")

# Best of the public kernels (FlashMLA, FlashInfer) per (H, B, L): bf16, page 64, CUDA-graph replays over cold caches,
# all in one run on the GPU named. Their planning is left out.
PUBLIC_BEST_GPU = "NVIDIA H200"
PUBLIC_BEST_US: dict[tuple[int, int, int], float] = {
    (h, b, length): us
    for h, b, row in (
        (16, 1, (11.0, 23.4, 44.1)),
        (16, 16, (15.6, 47.3, 152.5)),
        (16, 128, (43.6, 288.4, 1177.6)),
        (64, 1, (13.2, 23.4, 47.8)),
        (64, 16, (19.9, 53.4, 159.8)),
        (64, 128, (46.5, 297.1, 1213.0)),
        (128, 1, (13.7, 22.8, 39.2)),
        (128, 16, (21.5, 75.9, 256.5)),
        (128, 64, (37.8, 251.6, 1005.4)),
        (128, 128, (68.0, 475.0, 1743.4)),
    )
    for length, us in zip((1024, 8192, 32768), row, strict=True)
}


class Shape(abc.ABC):
    """What decode and prefill cases share: everything that follows from their requests."""

    num_heads: int
    page_size: int
    dtype: str
    layout: str
    kv_format: str
    q_fp8: bool
    ckv_dim: int
    kpe_dim: int
    accuracy: str

    @property
    @abc.abstractmethod
    def requests(self) -> Sequence[tuple[int, int]]:
        """(q_len, kv_len) of each request, in tokens."""

    @property
    @abc.abstractmethod
    def visible_pairs(self) -> int:
        """(query token, key) pairs that the mask lets through."""

    @property
    @abc.abstractmethod
    def turnover(self) -> int:
        """Bytes that one call puts between two reads of a page, which is what the rotation counts."""

    def _check(self) -> None:
        if not 1 <= self.num_heads <= 128:
            raise ValueError(f"num_heads: expected 1..128, got {self.num_heads}")
        if self.page_size < 1:
            raise ValueError(f"page_size: expected at least 1, got {self.page_size}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout: expected {' or '.join(LAYOUTS)}, got {self.layout!r}")
        if self.kv_format not in TOKEN_BYTES:
            raise ValueError(
                f"kv_format: expected one of {', '.join(filter(None, TOKEN_BYTES))}, got {self.kv_format!r}"
            )
        if self.q_fp8 and not self.kv_format:
            raise ValueError("q_fp8: expected a kv_format beside e4m3 queries, got a 16-bit cache")
        if self.dims not in HEAD_DIMS:
            raise ValueError(f"ckv_dim, kpe_dim: expected one of {', '.join(map(str, HEAD_DIMS))}, got {self.dims}")
        if not has_format(self.dims, self.kv_format):
            raise ValueError(f"kv_format: expected tensor with head dimensions {self.dims}, got {self.kv_format!r}")
        if self.accuracy and self.accuracy not in ACCURACIES:
            raise ValueError(f"accuracy: expected one of {', '.join(ACCURACIES)}, got {self.accuracy!r}")

    @property
    def dims(self) -> HeadDims:
        return HeadDims(self.ckv_dim, self.kpe_dim)

    @property
    def dims_label(self) -> str:
        """256+64; nothing of 512 + 64."""
        return "" if self.dims == HeadDims() else f"{self.ckv_dim}+{self.kpe_dim}"

    @property
    def token_bytes(self) -> int:
        """Of one cached token."""
        return token_bytes(self.kv_format, self.dims)

    @property
    def total_q(self) -> int:
        return sum(q for q, _ in self.requests)

    @property
    def pages(self) -> list[int]:
        """Pages of each request."""
        return [-(-kv // self.page_size) for _, kv in self.requests]

    @property
    def kv_bytes(self) -> int:
        return sum(kv for _, kv in self.requests) * self.token_bytes

    @property
    def rope_is_fp8(self) -> bool:
        return self.kv_format == "tensor"

    @property
    def q_bytes(self) -> int:
        """Bytes of q_nope and q_pe of one query row, a token and a head."""
        pe_fp8 = self.q_fp8 and self.rope_is_fp8
        return self.ckv_dim * (1 if self.q_fp8 else 2) + self.kpe_dim * (1 if pe_fp8 else 2)

    @property
    def bytes_moved(self) -> int:
        return self.kv_bytes + self.total_q * self.num_heads * (self.q_bytes + self.ckv_dim * 2)

    @property
    def flop(self) -> int:
        return 2 * self.num_heads * (2 * self.ckv_dim + self.kpe_dim) * self.visible_pairs

    @property
    def num_slots(self) -> int:
        """Disjoint page sets to rotate over."""
        least = ROTATION_BYTES // self.turnover + 1
        return max(least, min(ROTATION_SLOTS, -(-ROTATION_TARGET // self.turnover)))

    @property
    def pool_tokens(self) -> int:
        return self.num_slots * sum(self.pages) * self.page_size

    @property
    def pool_bytes(self) -> int:
        return self.pool_tokens * self.token_bytes

    @property
    def tail(self) -> str:
        """The end of a label."""
        fused = "" if self.layout == "separate" else f" {self.layout}"
        fp8 = f" {self.kv_format} FP8, q {'e4m3' if self.q_fp8 else '16 bit'}" if self.kv_format else ""
        others = "".join(f" {name}" for name in (self.dims_label, self.accuracy) if name)
        return f"page {self.page_size} {self.dtype}{fused}{fp8}{others}"

    @property
    @abc.abstractmethod
    def label(self) -> str: ...


@dataclass(frozen=True)
class Case(Shape):
    """One decode shape: every request has `kv_len` tokens, or with `longest` between `kv_len` and that many.

    Sparse, `batch` query tokens have a list of `kv_len` tokens each: others than all others have, or with `longest`
    chosen from so many that they share."""

    num_heads: int
    batch: int
    kv_len: int  # in a ragged batch, of the shortest request
    page_size: int = 64
    dtype: str = "bfloat16"
    layout: str = "separate"  # "fused": ckv and kpe are views of one buffer of pages, 16-bit or FP8 rows
    kv_format: str = ""  # "": 16-bit; with an FP8 format, dtype is that of the output and of the parts that are 16-bit
    q_fp8: bool = False
    longest: int = 0  # tokens of the longest request of a ragged batch; 0: every request has kv_len
    sparse: bool = False
    ckv_dim: int = CKV_DIM
    kpe_dim: int = KPE_DIM
    accuracy: str = ""  # KernelConfig's, and tile64 runs; "": accuracy and kernel are those of the configuration chosen

    def __post_init__(self) -> None:
        self._check()
        for name in ("batch", "kv_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.longest and self.longest < self.kv_len:
            raise ValueError(f"longest: expected 0 or at least kv_len ({self.kv_len}), got {self.longest}")

    @property
    def requests(self) -> Sequence[tuple[int, int]]:
        """Lengths of a ragged batch: the middles of `batch` equal parts of the log-uniform distribution, shuffled."""
        if not self.longest or self.sparse:
            return [(1, self.kv_len)] * self.batch
        ratio = self.longest / self.kv_len
        lengths = [round(self.kv_len * ratio ** ((i + 0.5) / self.batch)) for i in range(self.batch)]
        random.Random(0).shuffle(lengths)
        return [(1, n) for n in lengths]

    @property
    def distinct_tokens(self) -> int:
        """Of one slot, that are read at least once."""
        return min(self.longest or self.visible_pairs, self.visible_pairs) if self.sparse else self.visible_pairs

    @property
    def kv_bytes(self) -> int:
        return self.distinct_tokens * self.token_bytes

    @property
    def pool_tokens(self) -> int:
        if not self.sparse:
            return super().pool_tokens
        return self.num_slots * (self.longest or self.visible_pairs) + self.page_size  # the pool is whole pages

    @property
    def uniform(self) -> "Case":
        """The batch with as many requests, all of one length, and the same number of tokens up to rounding."""
        return dataclasses.replace(self, kv_len=round(self.visible_pairs / self.batch), longest=0)

    @property
    def visible_pairs(self) -> int:
        return sum(kv for _, kv in self.requests)

    @property
    def turnover(self) -> int:
        return self.bytes_moved if self.sparse else self.kv_bytes

    @property
    def label(self) -> str:
        if self.sparse:
            of = f" of {self.longest}" if self.longest else ""
            return f"sparse H={self.num_heads} B={self.batch} topk={self.kv_len}{of} {self.tail}"
        to = f"..{self.longest}" if self.longest else ""
        return f"H={self.num_heads} B={self.batch} L={self.kv_len}{to} {self.tail}"


@dataclass(frozen=True)
class PrefillCase(Shape):
    """One prefill shape: for each (count, q_len, kv_len) of `groups`, that many requests."""

    num_heads: int
    groups: tuple[tuple[int, int, int], ...]
    page_size: int = 64
    dtype: str = "bfloat16"
    layout: str = "separate"  # this and others that Case has, as there
    causal: bool = True
    kv_format: str = ""
    q_fp8: bool = False
    ckv_dim: int = CKV_DIM
    kpe_dim: int = KPE_DIM
    accuracy: str = ""

    def __post_init__(self) -> None:
        # A case that comes out of a JSON record has lists here.
        object.__setattr__(self, "groups", tuple(tuple(group) for group in self.groups))
        self._check()
        if not self.groups or any(len(group) != 3 or min(group) < 1 for group in self.groups):
            raise ValueError(f"groups: expected (count, q_len, kv_len) of at least 1, got {self.groups}")

    @property
    def requests(self) -> Sequence[tuple[int, int]]:
        return [(q, kv) for count, q, kv in self.groups for _ in range(count)]

    @property
    def visible_pairs(self) -> int:
        """Query i of n sees keys 0 .. kv_len - n + i under the causal mask: a triangle, less what is above it."""
        if not self.causal:
            return sum(count * q * kv for count, q, kv in self.groups)
        pairs = 0
        for count, q, kv in self.groups:
            seeing = min(q, kv)
            pairs += count * (seeing * (kv - seeing) + seeing * (seeing + 1) // 2)
        return pairs

    @property
    def turnover(self) -> int:
        """All that is moved. Queries and outputs are most of it: of a prompt of 4096 tokens and 128 heads 240 times the
        bytes of its keys."""
        return self.bytes_moved

    @property
    def label(self) -> str:
        groups = " + ".join(f"{count} x {q} of {kv}" for count, q, kv in self.groups)
        return f"prefill H={self.num_heads} {groups} {self.tail}{'' if self.causal else ' full'}"


def case_of(row: dict[str, Any]) -> Case | PrefillCase:
    """The case of a row of a record."""
    return PrefillCase(**row["case"]) if "groups" in row["case"] else Case(**row["case"])


@dataclass(frozen=True)
class Bar:
    """A speed to reach. `kind`: "read" and "cublas" are shares of the ceiling, "us" a time on the GPU BARS_GPU."""

    case: Case | PrefillCase
    kind: str
    reach: float
    beyond: float | None = None


@dataclass(frozen=True)
class Mixed:
    """A step in one call, and the calls it replaces."""

    together: PrefillCase
    apart: tuple[Case | PrefillCase, ...]


BARS_GPU = "NVIDIA H200"
BARS = (
    Bar(Case(16, 128, 8192), "read", 0.94, 0.96),
    Bar(Case(64, 128, 8192), "read", 0.93, 0.95),
    Bar(Case(128, 64, 8192), "cublas", 0.84, 0.90),
    Bar(Case(16, 1, 8192), "us", 11.0, 8.0),
    Bar(Case(16, 1, 32768), "us", 22.0, 15.0),
    Bar(Case(128, 1, 8192), "us", 12.0, 9.0),
    Bar(Case(16, 16, 1024), "us", 9.5, 8.0),
    Bar(Case(16, 16, 8192), "us", 42.0, 39.0),
)
PAGE_ONE_BAR = (0.90, 0.97)  # speed of page size 1 over that of 64, same shape
RAGGED_BAR = 1.05  # time of a ragged batch over that of the uniform one with as many tokens

PREFILL_HEADS = (16, 128)
PREFILL_BARS = (
    *(Bar(PrefillCase(h, ((4, 2048, 8192),)), "cublas", 0.82, 0.88) for h in PREFILL_HEADS),
    *(Bar(PrefillCase(h, ((16, 512, 4096),)), "cublas", 0.82) for h in PREFILL_HEADS),
    *(Bar(PrefillCase(h, ((1, 4096, 4096),)), "cublas", 0.75) for h in PREFILL_HEADS),
    *(Bar(PrefillCase(16, ((128, q, 8192),)), "read", 0.94) for q in (2, 4)),
    Bar(PrefillCase(128, ((64, 2, 8192),)), "cublas", 0.84),
    Bar(PrefillCase(16, ((1, 512, 32768),)), "cublas", 0.70),
)
# Apart, the requests with a single query token are a decode call, the others a prefill call.
MIXED_STEPS = tuple(
    Mixed(PrefillCase(h, ((64, 1, 8192), (1, 2048, 8192))), (Case(h, 64, 8192), PrefillCase(h, ((1, 2048, 8192),))))
    for h in PREFILL_HEADS
)
MIXED_BAR = 1.0  # time together over the sum apart

FP8_HEADS, FP8_BATCHES, FP8_LENGTHS = (16, 64, 128), (1, 16, 128), (1024, 8192, 32768)


def _fp8(num_heads: int, batch: int, kv_len: int, kv_format: str = "tensor") -> tuple[Case, ...]:
    """With 16-bit queries and with e4m3 ones."""
    return tuple(Case(num_heads, batch, kv_len, kv_format=kv_format, q_fp8=q_fp8) for q_fp8 in (False, True))


FP8_BARS = tuple(
    Bar(case, "us", us)
    for batch, times in ((128, (150.0, 185.0, 300.0)), (16, (27.0, 32.0, 48.0)))
    for num_heads, us in zip(FP8_HEADS, times, strict=True)
    for case in _fp8(num_heads, batch, 8192)
)

# What runs in tiles of 32 rows: 32 heads, lists of tokens among them, and drafts of few heads.
FP8_32_ROWS: tuple[Case | PrefillCase, ...] = (
    *(case for b in FP8_BATCHES for n in (1024, 8192) for case in _fp8(32, b, n)),
    *(case for f in ("token", "group") for b in FP8_BATCHES for case in _fp8(32, b, 8192, f)),
    *(
        Case(32, b, 2048, sparse=True, kv_format="group", q_fp8=q_fp8, layout="fused")
        for b in (16, 64, 512)
        for q_fp8 in (False, True)
    ),
    *(
        PrefillCase(h, ((128, q, 8192),), kv_format=kv_format, q_fp8=q_fp8)
        for h, q in ((16, 2), (8, 4))
        for kv_format in KV_FORMATS
        for q_fp8 in (False, True)
    ),
)

GRID_HEADS, GRID_BATCHES = (8, 16, 32, 64, 128), (1, 4, 16, 64, 128)
GRID_LENGTHS = (1024, 4096, 8192, 32768, 131072)
# The longest request of a ragged batch over its shortest, at least.
RAGGED_SPAN = 32
RAGGED = tuple(Case(h, b, 32768 // RAGGED_SPAN, longest=32768) for h in (16, 64, 128) for b in (16, 64, 128))


def _sparse(num_heads: int, tokens: int, context: int = 0, **options: Any) -> Case:
    """DeepSeek-V3.2's lists."""
    return Case(num_heads, tokens, 2048, longest=context, sparse=True, **options)


# Decode at every batch, beside dense decode over as many tokens in pages of one; then prompts over a long context,
# whose query tokens share most of what they choose.
SPARSE_DECODE = tuple((h, b) for h in (16, 64, 128) for b in (1, 16, 64, 128))
SPARSE_PREFILL = tuple((h, n) for h in (16, 64, 128) for n in (512, 4096))
SPARSE = (
    *(case for h, b in SPARSE_DECODE for case in (_sparse(h, b), Case(h, b, 2048, page_size=1))),
    *(
        _sparse(h, b, kv_format="group", q_fp8=q_fp8, layout="fused")
        for h, b in SPARSE_DECODE
        for q_fp8 in (False, True)
    ),
    *(_sparse(h, n, 65536) for h, n in SPARSE_PREFILL),
    *(_sparse(h, n, 65536, kv_format="group", q_fp8=True, layout="fused") for h, n in SPARSE_PREFILL),
)

_DIMS_SHAPES = tuple((h, b, 8192) for h in (16, 32, 128) for b in (16, 128))
DIMS: tuple[Case | PrefillCase, ...] = (
    *(Case(*shape, ckv_dim=ckv, kpe_dim=kpe) for ckv, kpe in HEAD_DIMS[1:] for shape in _DIMS_SHAPES),
    *(Case(*shape, kv_format="tensor", q_fp8=True, ckv_dim=256) for shape in _DIMS_SHAPES),
    *(PrefillCase(16, ((4, 2048, 8192),), ckv_dim=ckv, kpe_dim=kpe) for ckv, kpe in ((256, 64), (512, 0))),
)

PRESETS: dict[str, tuple[Case | PrefillCase, ...]] = {
    "table": tuple(Case(h, b, length) for h, b, length in PUBLIC_BEST_US),
    "bars": (*(bar.case for bar in BARS), Case(16, 128, 8192, page_size=1), Case(128, 64, 8192, page_size=1)),
    "pages": tuple(Case(h, b, 8192, page_size=p) for h, b in ((16, 128), (128, 64)) for p in (1, 16, 64, 128)),
    "prefill": (
        *(bar.case for bar in PREFILL_BARS),
        *(PrefillCase(h, ((4, 2048, 8192),), page_size=1) for h in PREFILL_HEADS),
        *(case for mixed in MIXED_STEPS for case in (mixed.together, *mixed.apart)),
    ),
    "fp8": (
        *(case for h in FP8_HEADS for b in FP8_BATCHES for n in FP8_LENGTHS for case in _fp8(h, b, n)),
        *(case for f in ("token", "group") for h in FP8_HEADS for b in FP8_BATCHES for case in _fp8(h, b, 8192, f)),
    ),
    # Beside a bf16 cache, whose time none should exceed.
    "fp8_prefill": tuple(
        PrefillCase(h, (group,), kv_format=kv_format, q_fp8=q_fp8)
        for h, group in ((16, (4, 2048, 8192)), (16, (16, 128, 8192)), (128, (1, 2048, 8192)))
        for kv_format, q_fp8 in (("", False), *itertools.product(KV_FORMATS, (False, True)))
    ),
    # Both accuracies of 16-bit queries on the same kernel, also where the library takes tile16 for the step.
    "fp8_fast": tuple(
        Case(h, b, n, kv_format=kv_format, accuracy=accuracy)
        for kv_format in KV_FORMATS
        for h in (64, 128)
        for b in (16, 128)
        for n in (1024, 8192)
        for accuracy in ("high", "fast")
    ),
    "fp8_32_rows": FP8_32_ROWS,
    "grid": tuple(
        Case(h, b, n, page_size=p) for p in (64, 1) for h in GRID_HEADS for b in GRID_BATCHES for n in GRID_LENGTHS
    ),
    "drafts": tuple(PrefillCase(h, ((b, q, 8192),)) for h, b in ((16, 128), (64, 64), (128, 64)) for q in (2, 4)),
    "sparse": SPARSE,
    "dims": DIMS,
    "ragged": tuple(case for ragged in RAGGED for case in (ragged, ragged.uniform)),
    "quick": (Case(16, 1, 8192), Case(16, 16, 8192), Case(16, 128, 8192), Case(128, 64, 8192), Case(16, 16, 8192, 1)),
}
