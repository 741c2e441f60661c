"""Plans of the cases of cases.py and its siblings, and CUDA graphs of what runs on them."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from .. import plan_decode, plan_decode_block_table, plan_prefill, plan_prefill_block_table
from ..launch import table_stride
from ..plan_decode import DecodePlan
from ..plan_prefill import PrefillPlan
from .cases import DecodeCase
from .prefill import PrefillCase

T = TypeVar("T")


def plan_of(case: DecodeCase, entry: str = "csr", **options: Any) -> DecodePlan | PrefillPlan:
    """The plan of a decode or prefill case through "csr" or "block_table"; `options` are further keywords of it, and
    replace what the case says."""
    sizes: dict[str, Any] = {"num_heads": case.num_heads, "page_size": case.page_size}
    if isinstance(case, PrefillCase):
        sizes |= {"total_q": case.total_q, "causal": case.causal}
    if entry == "csr":
        sizes |= {"kv_last_page_len": case.kv_last_page_len}
        if isinstance(case, PrefillCase):
            return plan_prefill(case.qo_indptr, case.kv_indptr, **sizes | options)
        return plan_decode(case.kv_indptr, **sizes | options)
    sizes |= {"max_pages": case.block_table.shape[1], "table_stride": table_stride(case.block_table)}
    if isinstance(case, PrefillCase):
        return plan_prefill_block_table(case.qo_indptr, case.seq_lens, **sizes | options)
    return plan_decode_block_table(case.seq_lens, **sizes | options)


def capture(run: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """A CUDA graph of `run`, and what the captured run returned; it runs once outside before, which compiles and
    loads."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = run()
    return graph, result
