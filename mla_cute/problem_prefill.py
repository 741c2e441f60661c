"""Facts of one prefill call, checked as decode's are (problem.py): an early exit, and an explanation behind it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from . import problem as shared
from .expect import Scale, expect_bool, expect_indptr
from .problem import UNSCALED, DecodeProblem
from .verify import Finding, block_table_findings, csr_findings, first_of, indptr_findings, raise_first


@dataclass(frozen=True, slots=True)
class PrefillProblem:
    """Sizes, dtype and device of a prefill call whose arguments passed the checks."""

    planned_by: ClassVar[tuple[str, str]] = ("plan_prefill", "plan_prefill_block_table")

    batch: int
    total_q: int
    num_heads: int
    page_size: int
    num_pages: int
    causal: bool
    dtype: torch.dtype
    device: torch.device
    # As DecodeProblem's.
    kv_format: str = ""
    q_fp8: bool = False
    odd_strides: bool = field(default=False, compare=False)


_problem = functools.lru_cache(maxsize=1024)(PrefillProblem)


def check_prefill(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    sm_scale: float,
    causal: bool = True,
    kv_last_page_len: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    lse_base: int | str = 2,
    ckv_scale: Scale = UNSCALED,
    kpe_scale: Scale = UNSCALED,
    ckv_scale_arr: torch.Tensor | None = None,
    q_scale: Scale = UNSCALED,
) -> PrefillProblem:
    """Check a prefill call with CSR page lists; raise TypeError or ValueError for the first wrong argument."""
    return _check(
        (
            q_nope, q_pe, ckv_cache, kpe_cache, sm_scale, out, lse, lse_base,
            ckv_scale, kpe_scale, ckv_scale_arr, q_scale,
        ),
        qo_indptr, causal, shared._usual_csr, shared._explain_csr, (kv_indptr, kv_indices, kv_last_page_len),
    )  # fmt: skip


def check_prefill_block_table(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    qo_indptr: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    sm_scale: float,
    causal: bool = True,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    lse_base: int | str = 2,
    ckv_scale: Scale = UNSCALED,
    kpe_scale: Scale = UNSCALED,
    ckv_scale_arr: torch.Tensor | None = None,
    q_scale: Scale = UNSCALED,
) -> PrefillProblem:
    """Check a prefill call with a padded block table; raise TypeError or ValueError for the first wrong argument."""
    return _check(
        (
            q_nope, q_pe, ckv_cache, kpe_cache, sm_scale, out, lse, lse_base,
            ckv_scale, kpe_scale, ckv_scale_arr, q_scale,
        ),
        qo_indptr, causal, shared._usual_block_table, shared._explain_block_table, (block_table, seq_lens),
    )  # fmt: skip


def _check(
    common: tuple[Any, ...],
    qo_indptr: torch.Tensor,
    causal: bool,
    usual_pages: Callable[..., bool],
    explain_pages: Callable[..., None],
    pages: tuple[torch.Tensor | None, ...],
) -> PrefillProblem:
    """`common` is what `problem._usual` takes; `usual_pages` and `explain_pages` are problem.py's for the form in which
    `pages` names pages and lengths."""
    try:
        queries = shared._usual(*common)
        if queries is not None:
            (bounds,) = qo_indptr.shape
            batch = bounds - 1
            if _usual_queries(queries, batch, qo_indptr, causal) and usual_pages(batch, queries.device, *pages):
                return _of(queries, batch, causal)
    except (AttributeError, TypeError, ValueError):
        pass  # an argument is no tensor or has another rank; which one is the explanation's job
    q_nope, q_pe, ckv_cache, kpe_cache, sm_scale = common[:5]
    options: shared.Options = common[5:]
    queries = shared._explain(q_nope, q_pe, ckv_cache, kpe_cache, options, "total_q")
    batch = expect_indptr("qo_indptr", qo_indptr, queries.device)
    explain_pages(batch, queries.device, *pages)
    shared._explain_rest(queries, q_nope, q_pe, sm_scale, options, "total_q")
    expect_bool("causal", causal)
    return _of(queries, batch, causal)


def _usual_queries(queries: DecodeProblem, batch: int, qo_indptr: torch.Tensor, causal: bool) -> bool:
    return (
        batch >= 0
        and qo_indptr.dtype is torch.int32
        and qo_indptr.device == queries.device
        and qo_indptr.is_contiguous()
        and type(causal) is bool
    )


def _of(queries: DecodeProblem, batch: int, causal: bool) -> PrefillProblem:
    """`queries` is what decode's checks say of the same tensors: their first dimension is its batch."""
    return _problem(
        batch,
        queries.batch,
        queries.num_heads,
        queries.page_size,
        queries.num_pages,
        causal,
        queries.dtype,
        queries.device,
        queries.kv_format,
        queries.q_fp8,
        queries.odd_strides,
    )


# ------------------------------------------------------------------------------------------------ what the device sees


def verify_prefill_on_device(
    problem: PrefillProblem,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_last_page_len: torch.Tensor | None = None,
    spare_pages: bool = False,
) -> None:
    """Check the values of CSR metadata with one synchronisation.

    Raises ValueError as `verify_on_device`, and when qo_indptr does not start at 0, decreases, or ends beyond
    the query tokens.
    """
    raise_first(
        [
            *_query_findings(problem, qo_indptr),
            *csr_findings(problem.page_size, problem.num_pages, kv_indptr, kv_indices, kv_last_page_len, spare_pages),
        ]
    )


def verify_prefill_block_table_on_device(
    problem: PrefillProblem, qo_indptr: torch.Tensor, block_table: torch.Tensor, seq_lens: torch.Tensor
) -> None:
    """Check the values of block-table metadata with one synchronisation.

    Raises ValueError as `verify_block_table_on_device`, and for qo_indptr as `verify_prefill_on_device`.
    """
    raise_first(
        [
            *_query_findings(problem, qo_indptr),
            *block_table_findings(problem.page_size, problem.num_pages, block_table, seq_lens),
        ]
    )


def _query_findings(problem: PrefillProblem, qo_indptr: torch.Tensor) -> list[Finding]:
    return [
        (
            first_of(qo_indptr[:1] != 0, qo_indptr),
            lambda at, value: f"qo_indptr: expected 0 at position 0, got {value}",
        ),
        *indptr_findings("qo_indptr", qo_indptr, problem.total_q, "the query tokens of q_nope"),
    ]
