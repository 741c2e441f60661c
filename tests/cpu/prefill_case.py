"""Prefill calls on the caches and metadata of `make_case`, for the tests of this folder."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mla_cute.testing.cases import DecodeCase, Guarded, make_case, make_outputs, make_q


@dataclass
class SmallPrefill:
    """Inputs of one prefill call in both metadata forms, and guarded outputs; `caches` are a decode case's."""

    caches: DecodeCase
    q_nope: torch.Tensor
    q_pe: torch.Tensor
    qo_indptr: torch.Tensor
    guarded_out: Guarded
    guarded_lse: Guarded

    @property
    def queries(self) -> list[tuple[int, int]]:
        return list(itertools.pairwise(self.qo_indptr.tolist()))

    @property
    def csr(self) -> dict[str, Any]:
        return self._both() | {
            name: getattr(self.caches, name) for name in ("kv_indptr", "kv_indices", "kv_last_page_len")
        }

    @property
    def table(self) -> dict[str, Any]:
        return self._both() | {name: getattr(self.caches, name) for name in ("block_table", "seq_lens")}

    def _both(self) -> dict[str, Any]:
        c = self.caches
        return {
            "q_nope": self.q_nope, "q_pe": self.q_pe, "ckv_cache": c.ckv_cache, "kpe_cache": c.kpe_cache,
            "qo_indptr": self.qo_indptr, "sm_scale": c.sm_scale,
        }  # fmt: skip

    @property
    def results(self) -> dict[str, torch.Tensor]:
        """The guarded outputs, as keywords."""
        return {"out": self.guarded_out.tensor, "lse": self.guarded_lse.tensor}

    def untouched(self) -> bool:
        return self.guarded_out.untouched() and self.guarded_lse.untouched()


def make_prefill(
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    *,
    num_heads: int,
    page_size: int,
    spare_q: int = 0,
    fused_q: bool = False,
    **kwargs: Any,
) -> SmallPrefill:
    """`spare_q` NaN query tokens lie past qo_indptr[-1]; `fused_q` makes views of [total_q, H, 576]; further keywords
    are those of `make_case`."""
    caches = make_case(kv_lens, num_heads=num_heads, page_size=page_size, **kwargs)
    generator = torch.Generator().manual_seed(kwargs.get("seed", 0) + 1)
    used, dtype, cpu = sum(q_lens), caches.q_nope.dtype, torch.device("cpu")
    total = used + spare_q
    q_nope, q_pe = make_q(total, num_heads, "fused" if fused_q else "contiguous", dtype, cpu, generator)
    if kwargs.get("drift"):
        q_pe[..., 0] = caches.q_pe[0, 0, 0]
    q_nope[used:] = q_pe[used:] = torch.nan
    outputs = make_outputs(total, num_heads, "contiguous", dtype, cpu)
    qo_indptr = torch.tensor([0, *itertools.accumulate(q_lens)], dtype=torch.int32)
    return SmallPrefill(caches, q_nope, q_pe, qo_indptr, *outputs)
