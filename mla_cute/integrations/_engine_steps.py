"""What the backends for serving engines share: plans that outlive a step, and the call of one layer."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch

from ..api import mla_paged_decode_block_table
from ..api_prefill import mla_paged_prefill_block_table
from ..dims import CKV_DIM
from ..launch import table_stride
from ..plan import Plan
from ..plan_decode import plan_decode_block_table
from ..plan_prefill import plan_prefill_block_table
from ..problem import FP8
from ..quant import GROUP_ROW_BYTES, group_rows


@dataclass(frozen=True)
class PagedCache:
    """Views of an engine's cache, and the scale keywords of the calls."""

    ckv: torch.Tensor
    kpe: torch.Tensor
    scales: dict[str, Any]


def paged_cache(rows: torch.Tensor, scale: float = 1.0) -> PagedCache:
    """The parts of a cache in which a token is one row.

    Args:
        rows: [num_pages, page_size, 576] bfloat16 or float16; float8_e4m3fn of the format "tensor"; or
            [num_pages, page_size, 656] uint8 of the format "group" (:func:`mla_cute.quant.group_rows`).
        scale: multiplies what a cache of the format "tensor" holds.
    """
    if rows.shape[-1] == GROUP_ROW_BYTES:
        ckv, array, kpe = group_rows(rows)
        return PagedCache(ckv, kpe, {"ckv_scale_arr": array})
    scales = {"ckv_scale": scale, "kpe_scale": scale} if rows.dtype is FP8 else {}
    return PagedCache(rows[..., :CKV_DIM], rows[..., CKV_DIM:], scales)


@dataclass(frozen=True)
class Step:
    """One step of an engine: which pages and keys its requests have, and the plan over them.

    qo_indptr: None where every request has one query token, whatever the values of the tensors.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    qo_indptr: torch.Tensor | None
    plan: Plan

    def attend(
        self, q_nope: torch.Tensor, q_pe: torch.Tensor, cache: PagedCache, sm_scale: float, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(output [tokens, H, 512], natural log-sum-exp [tokens, H]); rows past qo_indptr[-1] are not written."""
        tensors = (q_nope, q_pe, cache.ckv, cache.kpe)
        pages = (self.block_table, self.seq_lens, sm_scale)
        options |= cache.scales | {"lse_base": "e", "plan": self.plan}
        result: Any
        if self.qo_indptr is None:
            result = mla_paged_decode_block_table(*tensors, *pages, **options)
        else:
            result = mla_paged_prefill_block_table(*tensors, self.qo_indptr, *pages, **options)
        return result


class StepPlans:
    """Plans by shape and metadata memory. An engine refills its metadata tensors, so plans are made once and updated.

    Plans made with `keep` stay, because a CUDA graph holds the addresses of their buffers; of the others the last
    `RECENT` do. A plan keeps its metadata tensors alive, so that no other tensor gets an address that finds it. All
    calls run on one stream (or are ordered), because the plans share one buffer for partial outputs: of its own each
    would hold up to 40 MB, and an engine captures some fifty batch sizes.
    """

    RECENT = 32

    def __init__(
        self,
        *,
        num_heads: int,
        page_size: int,
        kv_format: str = "",
        q_fp8: bool = False,
        batch_invariant: bool = False,
    ):
        self._facts: dict[str, Any] = {
            "num_heads": num_heads, "page_size": page_size, "kv_format": kv_format, "q_fp8": q_fp8,
            "batch_invariant": batch_invariant,
        }  # fmt: skip
        self._kept: dict[tuple[Any, ...], Plan] = {}
        self._recent: OrderedDict[tuple[Any, ...], Plan] = OrderedDict()
        self._partials: torch.Tensor | None = None

    def step(
        self,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        qo_indptr: torch.Tensor | None = None,
        total_q: int = 0,
        *,
        keep: bool = False,
    ) -> Step:
        """The step over these tensors; its plan may be of earlier values of them until it is updated.

        Args:
            block_table: [batch, max_pages] int32. seq_lens: [batch] int32, keys of each request.
            qo_indptr: [batch + 1] int32 with `total_q` query tokens at most; None: one token per request.
            keep: the step is about to be captured in a CUDA graph.
        """
        stride = table_stride(block_table)
        queries = None if qo_indptr is None else (qo_indptr.data_ptr(), total_q)
        key = (*block_table.shape, stride, seq_lens.data_ptr(), queries)
        plan = self._kept.get(key) or self._recent.get(key)
        if plan is None:
            plan = self._make(block_table.shape[1], stride, seq_lens, qo_indptr, total_q)
        if keep:
            self._kept[key] = plan
        elif key not in self._kept:
            self._recent[key] = plan
            self._recent.move_to_end(key)
            if len(self._recent) > self.RECENT:
                self._recent.popitem(last=False)
        return Step(block_table, seq_lens, qo_indptr, plan)

    def _make(
        self, max_pages: int, stride: int, seq_lens: torch.Tensor, qo_indptr: torch.Tensor | None, total_q: int
    ) -> Plan:
        facts = self._facts | {"max_pages": max_pages, "table_stride": stride}
        plan: Plan
        if qo_indptr is None:
            plan = plan_decode_block_table(seq_lens, **facts)
        else:
            plan = plan_prefill_block_table(qo_indptr, seq_lens, total_q=total_q, **facts)
        if plan.device.type == "cuda":
            if self._partials is None or self._partials.shape[0] < plan.part.shape[0]:
                self._partials = plan.part
            plan.share_partials(self._partials)
        return plan
