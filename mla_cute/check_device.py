"""Values of metadata: checked by every call on CPU tensors; on CUDA tensors, where to look at them synchronises, with
MLA_CUTE_CHECK=1 alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from .expect import MAX_SCALE, MIN_SCALE

if TYPE_CHECKING:
    from .call import Pages
    from .check import Problem


def verify(problem: Problem, pages: Pages, spare_pages: bool = False, max_q_len: int | None = None) -> None:
    """Check the values of metadata with one synchronisation.

    Raises ValueError naming the argument, the first offending position, its value and the bound:

    * qo_indptr does not start at 0, decreases, ends beyond the query tokens, or gives a request more than `max_q_len`;
    * page lists: kv_indptr starts below 0, decreases, or ends beyond kv_indices; kv_last_page_len of a request that has
      pages is not in 1..page_size; a page id in use is not in 0..num_pages - 1. Ids outside
      `kv_indices[kv_indptr[0]:kv_indptr[-1]]` and the last page length of a request without pages are not looked at;
    * lists of tokens: a length is not in 0..topk, or an index of a row's first `topk_lens` ones is not in
      -1..num_pages * page_size - 1;
    * block tables: a sequence length is not in 0..max_pages * page_size, or a page id in use is not in
      0..num_pages - 1. The ids past a request's last page are not looked at.

    spare_pages: requests may own more pages than their keys fill, as those of FlashInfer's wrapper do. Then the keys of
    a request, (pages - 1) * page_size + kv_last_page_len, have to be in 0..pages * page_size, and only the ids of its
    first ceil(keys / page_size) pages are looked at. The message calls the keys by the wrapper's name, kv_len_arr.
    """
    form, lengths, ids, last_len, queries, _ = pages
    findings = [] if queries is None else _query_findings(queries, problem.total_q, max_q_len)
    if form.op == "sparse":
        findings += sparse_findings(problem.num_pages * problem.page_size, ids, lengths)
    elif form.by_table:
        findings += block_table_findings(problem.page_size, problem.num_pages, ids, lengths)
    else:
        findings += csr_findings(problem.page_size, problem.num_pages, lengths, ids, last_len, spare_pages)
    raise_first(findings)


# What was found, as `first_of` gives it, and the message for the position and the value there.
Finding = tuple[torch.Tensor, Callable[[int, int], str]]


def raise_first(findings: Sequence[Finding]) -> None:
    """ValueError for the first finding that found something; one synchronisation."""
    results = torch.stack([found for found, _ in findings]).tolist()
    for (found, position, value), (_, message) in zip(results, findings, strict=True):
        if found:
            raise ValueError(message(position, value))


def indptr_findings(name: str, indptr: torch.Tensor, most: int, most_is: str) -> list[Finding]:
    """Whether it decreases, or passes `most`."""
    return [
        (
            # in 64 bits: the difference of two int32 may wrap round to a positive one
            first_of(indptr.long().diff() < 0, indptr[1:]),
            lambda at, value: (
                f"{name}: expected values that never decrease, got {value} at position {at + 1} after a larger one"
            ),
        ),
        (
            first_of(indptr.long() > most, indptr),
            lambda at, value: f"{name}: expected values <= {most} ({most_is}), got {value} at position {at}",
        ),
    ]


def csr_findings(
    page_size: int,
    num_pages: int,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_last_page_len: torch.Tensor | None,
    spare_pages: bool = False,
) -> list[Finding]:
    """As `verify`, which has what `spare_pages` means."""
    num_indices = kv_indices.shape[0]
    bounds = kv_indptr.long().contiguous()
    pages = bounds.diff()
    pages_in_use = pages
    findings: list[Finding] = [
        (
            first_of(kv_indptr < 0, kv_indptr),
            lambda at, value: f"kv_indptr: expected values >= 0, got {value} at position {at}",
        ),
        *indptr_findings("kv_indptr", kv_indptr, num_indices, "the length of kv_indices"),
    ]
    if kv_last_page_len is not None and spare_pages:
        keys = (pages - 1) * page_size + kv_last_page_len
        pages_in_use = (keys + page_size - 1) // page_size
        findings.append(
            (
                first_of((keys < 0) | (keys > pages * page_size), keys),
                lambda at, value: (
                    f"kv_len_arr: expected lengths from 0 to what a request's pages hold (page_size {page_size}), "
                    f"got {value} at position {at}"
                ),
            )
        )
    elif kv_last_page_len is not None:
        wrong = (kv_last_page_len < 1) | (kv_last_page_len > page_size)
        findings.append(
            (
                first_of(wrong & (pages > 0), kv_last_page_len),
                lambda at, value: (
                    f"kv_last_page_len: expected values in [1, {page_size}] for requests with pages, "
                    f"got {value} at position {at}"
                ),
            )
        )
    if pages.shape[0]:
        position = torch.arange(num_indices, device=kv_indices.device)
        # the request that a position belongs to, of any values, which may be no running sum
        owner = (torch.searchsorted(bounds, position, right=True) - 1).clamp(0, pages.shape[0] - 1)
        in_use = (position >= bounds[0]) & (position - bounds[owner] < pages_in_use[owner])
        findings.append(
            (
                first_of(in_use & _outside(kv_indices, num_pages), kv_indices),
                lambda at, value: f"kv_indices: expected page ids in [0, {num_pages}), got {value} at position {at}",
            )
        )
    return findings


def block_table_findings(
    page_size: int, num_pages: int, block_table: torch.Tensor, seq_lens: torch.Tensor
) -> list[Finding]:
    max_pages = block_table.shape[1]
    max_len = max_pages * page_size
    page_start = torch.arange(max_pages, device=block_table.device) * page_size
    used = page_start[None, :] < seq_lens[:, None]
    return [
        (
            first_of((seq_lens < 0) | (seq_lens.long() > max_len), seq_lens),
            lambda at, value: (
                f"seq_lens: expected values in [0, {max_len}] (max_pages * page_size), got {value} at position {at}"
            ),
        ),
        (
            first_of((used & _outside(block_table, num_pages)).flatten(), block_table.flatten()),
            lambda at, value: (
                f"block_table: expected page ids in [0, {num_pages}), got {value} "
                f"at position [{at // max_pages}, {at % max_pages}]"
            ),
        ),
    ]


def sparse_findings(num_tokens: int, indices: torch.Tensor, topk_lens: torch.Tensor) -> list[Finding]:
    topk = indices.shape[1]
    used = torch.arange(topk, device=indices.device)[None, :] < topk_lens[:, None]
    return [
        (
            first_of((topk_lens < 0) | (topk_lens > topk), topk_lens),
            lambda at, value: f"topk_lens: expected values in [0, {topk}] (topk), got {value} at position {at}",
        ),
        (
            first_of((used & ((indices < -1) | (indices >= num_tokens))).flatten(), indices.flatten()),
            lambda at, value: (
                f"indices: expected -1 or tokens in [0, {num_tokens}) (num_pages * page_size), got {value} "
                f"at position [{at // topk}, {at % topk}]"
            ),
        ),
    ]


def _query_findings(qo_indptr: torch.Tensor, total_q: int, max_q_len: int | None) -> list[Finding]:
    findings: list[Finding] = [
        (
            first_of(qo_indptr[:1] != 0, qo_indptr),
            lambda at, value: f"qo_indptr: expected 0 at position 0, got {value}",
        ),
        *indptr_findings("qo_indptr", qo_indptr, total_q, "the query tokens of q_nope"),
    ]
    if max_q_len is not None:
        q_lens = qo_indptr.long().diff()
        findings.append(
            (
                first_of(q_lens > max_q_len, q_lens),
                lambda at, value: (
                    f"qo_indptr: expected at most {max_q_len} query tokens a request (the plan's max_q_len), "
                    f"got {value} of request {at}"
                ),
            )
        )
    return findings


def scale_findings(scales: dict[str, torch.Tensor]) -> list[Finding]:
    """Whether scales that are tensors of one element are what numbers have to be."""
    return [_scale_finding(name, scale) for name, scale in scales.items()]


def _scale_finding(name: str, scale: torch.Tensor) -> Finding:
    wrong = ~((scale >= MIN_SCALE) & (scale <= MAX_SCALE)).reshape(1)
    return (
        first_of(wrong, scale.reshape(1)),
        lambda at, value: f"{name}: expected a positive number from 2^-126 to 2^126, got a tensor that holds another",
    )


def _outside(ids: torch.Tensor, num_pages: int) -> torch.Tensor:
    return (ids < 0) | (ids >= num_pages)


def first_of(wrong: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[any wrong, first wrong position, value there] as int64, on the tensors' device. `wrong` and `values` are 1-D."""
    if wrong.numel() == 0:
        return torch.zeros(3, dtype=torch.int64, device=wrong.device)
    at = wrong.to(torch.int32).argmax()
    return torch.stack((wrong.any().long(), at, values[at].long()))
