"""The shapes that are timed: one case, the presets, the speeds to reach, and the public kernels' times."""

from dataclasses import dataclass

import torch

# Bytes of KV read between two reads of a page: more than the first always, the second as far as so many slots allow.
# KV is loaded evict-first, and L2 (50 MB on an H100, 60 on an H200) may keep a part of an old pass over it: with one
# slot of 4.8 GB a case measured 101.3 % of the read bandwidth.
ROTATION_BYTES = 300_000_000
ROTATION_TARGET = 8_000_000_000
ROTATION_SLOTS = 64

HEAD_DIM_CKV, HEAD_DIM_KPE = 512, 64
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

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


@dataclass(frozen=True)
class Case:
    """One decode shape: every request of the batch has `kv_len` tokens."""

    num_heads: int
    batch: int
    kv_len: int
    page_size: int = 64
    dtype: str = "bfloat16"
    layout: str = "separate"  # "fused": ckv and kpe are views of one [num_pages, page_size, 576] buffer

    def __post_init__(self) -> None:
        if not 1 <= self.num_heads <= 128:
            raise ValueError(f"num_heads: expected 1..128, got {self.num_heads}")
        for name in ("batch", "kv_len", "page_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.layout not in ("separate", "fused"):
            raise ValueError(f"layout: expected separate or fused, got {self.layout!r}")

    @property
    def pages_per_request(self) -> int:
        return -(-self.kv_len // self.page_size)

    @property
    def kv_bytes(self) -> int:
        return self.batch * self.kv_len * (HEAD_DIM_CKV + HEAD_DIM_KPE) * 2

    @property
    def bytes_moved(self) -> int:
        return self.kv_bytes + self.batch * self.num_heads * (2 * HEAD_DIM_CKV + HEAD_DIM_KPE) * 2

    @property
    def flop(self) -> int:
        return 2 * self.num_heads * (2 * HEAD_DIM_CKV + HEAD_DIM_KPE) * self.batch * self.kv_len

    @property
    def num_slots(self) -> int:
        """Disjoint page sets to rotate over."""
        least = ROTATION_BYTES // self.kv_bytes + 1
        return max(least, min(ROTATION_SLOTS, -(-ROTATION_TARGET // self.kv_bytes)))

    @property
    def pool_tokens(self) -> int:
        return self.num_slots * self.batch * self.pages_per_request * self.page_size

    @property
    def label(self) -> str:
        tail = "" if self.layout == "separate" else f" {self.layout}"
        return f"H={self.num_heads} B={self.batch} L={self.kv_len} page {self.page_size} {self.dtype}{tail}"


@dataclass(frozen=True)
class Bar:
    """A speed to reach. `kind`: "read" and "cublas" are shares of the ceiling, "us" a time."""

    case: Case
    kind: str
    reach: float
    beyond: float


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
HOST_BAR = (15.0, 10.0)  # us of one call with a plan

PRESETS: dict[str, tuple[Case, ...]] = {
    "table": tuple(Case(h, b, length) for h, b, length in PUBLIC_BEST_US),
    "bars": (*(bar.case for bar in BARS), Case(16, 128, 8192, page_size=1), Case(128, 64, 8192, page_size=1)),
    "pages": tuple(Case(h, b, 8192, page_size=p) for h, b in ((16, 128), (128, 64)) for p in (1, 16, 64, 128)),
    "quick": (Case(16, 1, 8192), Case(16, 16, 8192), Case(16, 128, 8192), Case(128, 64, 8192), Case(16, 16, 8192, 1)),
}
