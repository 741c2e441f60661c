"""Adversarial prefill cases, built and judged with the parts of cases.py: its `run_case`, `expected_of` and `judge`.

Beside what decode cases punish: query rows past qo_indptr[-1] are NaN, and so are the gaps of strided queries; rows of
out and lse past qo_indptr[-1] are guards; the key right behind the last one that a query may see is finite and normal,
so that a mask that is off by one shows in the error.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from ..call import PREFILL, Pages
from ..dims import HeadDims
from .cases import (
    CACHE_LAYOUTS,
    OUT_LAYOUTS,
    Q_LAYOUTS,
    DecodeCase,
    make_case,
    make_outputs,
    make_q,
    unaligned,
)

SPARE_QUERIES = 3


@dataclass
class PrefillCase(DecodeCase):
    """Inputs of one prefill call in both metadata forms, and guarded outputs for it. `lengths` are kv lengths."""

    q_lens: list[int]
    qo_indptr: torch.Tensor

    @property
    def queries(self) -> Sequence[int]:
        return list(itertools.accumulate(self.q_lens, initial=0))

    @property
    def total_q(self) -> int:
        """Rows of q, out and lse, those that no request owns among them."""
        return self.q_nope.shape[0]

    @property
    def pages(self) -> Pages:
        return Pages(PREFILL, self.kv_indptr, self.kv_indices, self.kv_last_page_len, self.qo_indptr, self.causal)

    @property
    def csr_args(self) -> tuple[Any, ...]:
        """Positional arguments of `mla_paged_prefill`; pass `causal` and `kv_last_page_len` as keywords beside them."""
        return (*self.tensors, self.qo_indptr, self.kv_indptr, self.kv_indices, self.sm_scale)

    @property
    def block_table_args(self) -> tuple[Any, ...]:
        """Positional arguments of `mla_paged_prefill_block_table`."""
        return (*self.tensors, self.qo_indptr, self.block_table, self.seq_lens, self.sm_scale)

    def call(self, entry: str = "csr", **kwargs: Any) -> Any:
        """`mla_paged_prefill` ("csr") or `mla_paged_prefill_block_table` ("block_table") on this case."""
        import mla_cute

        options: dict[str, Any] = {"causal": self.causal}
        if entry == "csr":
            options |= {"kv_last_page_len": self.kv_last_page_len} | kwargs
            return mla_cute.mla_paged_prefill(*self.csr_args, **options)
        return mla_cute.mla_paged_prefill_block_table(*self.block_table_args, **options | kwargs)

    def load(self, other: DecodeCase) -> None:
        """As `DecodeCase.load`; both cases also need the same `total_q`."""
        assert isinstance(other, PrefillCase)
        super().load(other)
        self.qo_indptr.copy_(other.qo_indptr)
        self.q_lens = list(other.q_lens)


def make_prefill_case(
    requests: Sequence[tuple[int, int]],
    *,
    num_heads: int,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seed: int = 0,
    causal: bool = True,
    q_layout: str = "contiguous",
    out_layout: str = "contiguous",
    drift: float = 0.0,
    total_q: int | None = None,
    dims: HeadDims = HeadDims(),
    **kv: Any,
) -> PrefillCase:
    """Build a case of one request per (q_len, kv_len) of `requests`, in tokens; deterministic as `make_case` is.

    Args:
        q_layout, out_layout: as for `make_case`; "batch_strided" is a gap between query tokens, so that the rows
            (token, head) are not evenly spaced.
        total_q: rows of q, out and lse; those past the requests' are NaN in q. Default: 3 of them.
        dims: as for `make_case`.
        kv: further keywords of `make_case`, page_size among them.
    """
    q_lens, kv_lens = [q for q, _ in requests], [n for _, n in requests]
    base = make_case(kv_lens, num_heads=1, dtype=dtype, device=device, seed=seed, drift=drift, dims=dims, **kv)
    device = torch.device(device)
    used = sum(q_lens)
    total_q = used + SPARE_QUERIES if total_q is None else total_q
    values = torch.Generator(device=device).manual_seed(seed + 1)
    q_nope, q_pe = make_q(total_q, num_heads, q_layout, dtype, device, values, dims)
    if drift and requests:
        # the factor that `make_case` gave the queries its keys are made for
        q, of_base = (q_pe, base.q_pe) if dims.kpe else (q_nope, base.q_nope)
        q[..., 0] = of_base[0, 0, 0]
    for q in (q_nope, q_pe):
        q[used:] = math.nan
    guarded_out, guarded_lse = make_outputs(total_q, num_heads, out_layout, dtype, device, dims)
    queries = torch.tensor([0, *itertools.accumulate(q_lens)], dtype=torch.int64)
    own: dict[str, Any] = {
        "num_heads": num_heads,
        "q_nope": q_nope,
        "q_pe": q_pe,
        "guarded_out": guarded_out,
        "guarded_lse": guarded_lse,
        "causal": causal,
    }
    shared = {f.name: getattr(base, f.name) for f in fields(base) if f.name not in own}
    return PrefillCase(**shared, **own, q_lens=q_lens, qo_indptr=unaligned(queries, device))


def row_tiles(q_len: int, kv_len: int, num_heads: int, causal: bool = True) -> list[tuple[int, int, int]]:
    """(first query token, last query token, keys the tile needs) of a request's tiles of 64 rows (token, head)."""
    tiles = []
    for first_row in range(0, q_len * num_heads, 64):
        last = min((first_row + 63) // num_heads, q_len - 1)
        seen = min(max(kv_len - q_len + last + 1, 0), kv_len) if causal else kv_len
        tiles.append((first_row // num_heads, last, seen))
    return tiles


# ------------------------------------------------------------------------------------------------ the sweep

SWEEP_HEADS = (1, 6, 8, 12, 16, 24, 48, 64, 96, 128)
SWEEP_PAGE_SIZES = (1, 2, 8, 16, 24, 64, 100, 128)
SWEEP_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PrefillSpec:
    """A prefill case by its parameters; `make` builds it on a device."""

    num_heads: int
    page_size: int
    dtype: torch.dtype
    requests: tuple[tuple[int, int], ...]
    causal: bool = True
    cache_layout: str = "fused"
    q_layout: str = "contiguous"
    out_layout: str = "contiguous"
    shared_pages: int = 0
    drift: float = 0.0
    seed: int = 0

    def __str__(self) -> str:
        dtype = {torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]
        mask = "causal" if self.causal else "full"
        name = f"h{self.num_heads}-page{self.page_size}-{dtype}-{mask}-b{len(self.requests)}"
        return f"{name}-{self.cache_layout}-q_{self.q_layout}-out_{self.out_layout}-drift{self.drift:g}"

    def make(self, device: torch.device | str) -> PrefillCase:
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "requests"}
        return make_prefill_case(self.requests, device=device, **options)


def prefill_sweep() -> list[PrefillSpec]:
    """Every head count with every page size, 80 cases: each a step of whole prompts, chunks, MTP and single tokens."""
    specs: list[PrefillSpec] = []
    for page_size in SWEEP_PAGE_SIZES:
        for num_heads in SWEEP_HEADS:
            i = len(specs)
            prompt, chunk = (300, 129) if num_heads <= 24 else (131, 65)
            edges = [(5, page_size), (9, page_size + 1), (33, 3 * page_size + 32)]
            mtp = [(2 + i % 7, 2000), (2 + (i + 3) % 7, 127 + i), (8, 8)]
            single = [(1, 0), (1, 1), (1, 64), (1, 129), (1, 1000)]
            blind = [(0, 0), (0, 77), (33, 0), (90, 60), (3, 1)]
            requests = [(prompt, prompt), (65, 65), (chunk, 1000 + i), (64, 4097), *edges, *mtp, *single, *blind]
            order = torch.randperm(len(requests), generator=torch.Generator().manual_seed(i)).tolist()
            specs.append(
                PrefillSpec(
                    num_heads=num_heads,
                    page_size=page_size,
                    dtype=SWEEP_DTYPES[(i + i // 10) % 2],
                    requests=tuple(requests[j] for j in order),
                    causal=(i % 10 + i // 10) % 4 != 3,
                    cache_layout=CACHE_LAYOUTS[(i + i // 10) % len(CACHE_LAYOUTS)],
                    q_layout=Q_LAYOUTS[(i + i // 10) % len(Q_LAYOUTS)],
                    out_layout=OUT_LAYOUTS[(i // 3) % len(OUT_LAYOUTS)],
                    shared_pages=(0, 1, 1000)[i // 2 % 3],
                    drift=(0.0, 60.0, -60.0)[i // 4 % 3],
                    seed=i,
                )
            )
    return specs
