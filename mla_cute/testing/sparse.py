"""Lists of tokens for the cases of cases.py and fp8.py, and the verdict on what `mla_sparse` makes of them.

Attention does not depend on the order of keys: the call on a case's own tokens, shuffled, with -1 among them, has the
result of the decode call, whose reference knows nothing of lists (`lists_of`). So have lists of any tokens, some of
them twice (`random_lists`), with that of the decode call over pages of one token (`as_page_lists`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

from ..reference import requests_of
from .cases import ABSURD_PAGE_IDS, DecodeCase, expected_of, judge, not_as_given
from .fp8 import Fp8Case, expected_fp8, judge_fp8
from .verdict import Expected, Verdict


@dataclasses.dataclass
class Lists:
    """`indices [batch, topk]` and `topk_lens [batch]`, on the case's device."""

    indices: torch.Tensor
    topk_lens: torch.Tensor

    def load(self, other: Lists) -> None:
        """Overwrite these in place; both have the same sizes."""
        self.indices.copy_(other.indices)
        self.topk_lens.copy_(other.topk_lens)


def lists_of(
    case: DecodeCase,
    *,
    none_share: float = 0.25,
    first_none: Sequence[int] = (0,),
    topk: int | None = None,
    shuffled: bool = True,
    seed: int = 0,
) -> Lists:
    """The tokens of each request of `case`.

    Args:
        none_share: as many -1 as this share of a list's tokens, at random places.
        first_none: as many -1 in front of them, request by request, over and over.
        topk: columns; None: three more than the longest list. Behind a list stand absurd numbers.
        shuffled: False keeps the order of the tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    pages, lengths = requests_of(case.pages, case.page_size)
    rows = []
    for b, (ids, length) in enumerate(zip(pages, lengths, strict=True)):
        position = torch.arange(length)
        tokens = ids.cpu().long()[position // case.page_size] * case.page_size + position % case.page_size
        if shuffled:
            tokens = tokens[torch.randperm(length, generator=generator)]
        own = torch.full((length + int(none_share * length),), -1)
        places = torch.randperm(len(own), generator=generator)[:length].sort().values
        own[places] = tokens
        rows.append(torch.cat((torch.full((first_none[b % len(first_none)],), -1), own)))
    columns = max(map(len, rows), default=0) + 3 if topk is None else topk
    return _lists(rows, columns, case.q_nope.device)


def random_lists(case: DecodeCase, topk: int, *, ragged: bool = True, seed: int = 0, layer: int = 0) -> Lists:
    """A list of tokens of each request of `case`: all different or with repeats, in random order, at random places
    among -1 or behind all of them; some lists have none, and so have those of requests without tokens.

    Args:
        topk: columns. Behind a list stand absurd numbers.
        ragged: False: all columns count.
        layer: lists of another one are as long and of other tokens.
    """
    of_lens, of_tokens = (torch.Generator().manual_seed(n) for n in (seed, (seed << 8) + layer))
    pages, lengths = requests_of(case.pages, case.page_size)
    # Beyond the ends, so that a quarter of the lists are empty or full.
    lens = torch.randint(-topk // 6 - 1, topk + topk // 6 + 2, (len(lengths),), generator=of_lens).clamp(0, topk)
    rows = []
    for ids, length, num in zip(pages, lengths, lens.tolist() if ragged else [topk] * len(lengths), strict=True):
        kind, repeats, anywhere = torch.randint(6, (3,), generator=of_tokens).tolist()
        count = (0, num // 8, num // 2, num // 2, num, num)[kind] if length else 0
        if repeats:
            position = torch.randint(max(length, 1), (count,), generator=of_tokens)
        else:
            position = torch.randperm(length, generator=of_tokens)[:count]
        places = torch.randperm(num, generator=of_tokens) if anywhere else torch.arange(num).flip(0)
        row = torch.full((num,), -1)
        page = ids.cpu().long()[position // case.page_size]
        row[places[: len(position)]] = page * case.page_size + position % case.page_size
        rows.append(row)
    return _lists(rows, topk, case.q_nope.device)


def _lists(rows: Sequence[torch.Tensor], columns: int, device: torch.device) -> Lists:
    # An odd row stride: rows are only 4-byte aligned.
    table = torch.tensor(ABSURD_PAGE_IDS * ((len(rows) * (columns | 1)) // 2 + 1), dtype=torch.int32)
    table = table[: len(rows) * (columns | 1)].view(len(rows), columns | 1)
    for b, row in enumerate(rows):
        table[b, : len(row)] = row
    lens = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    return Lists(table.to(device)[:, :columns], lens.to(device))


def as_page_lists(case: DecodeCase | Fp8Case, lists: Lists) -> DecodeCase | Fp8Case:
    """The decode case whose requests have, as pages of one token, the tokens that the lists name, as often as they do.
    For references: its cache may be a copy, and its block table is the one of `case`."""
    if not isinstance(case, Fp8Case):
        return _as_page_lists(case, lists)
    array = case.scales.get("ckv_scale_arr")
    scales = case.scales if array is None else case.scales | {"ckv_scale_arr": _pages_of_one(array)}
    return dataclasses.replace(case, case=_as_page_lists(case.case, lists), scales=scales)


def _as_page_lists(case: DecodeCase, lists: Lists) -> DecodeCase:
    counted = [row[:num] for row, num in zip(lists.indices, lists.topk_lens.tolist(), strict=True)]
    named = [row[row >= 0] for row in counted]
    lengths = [len(row) for row in named]
    device = lists.indices.device
    return dataclasses.replace(
        case,
        lengths=lengths,
        page_size=1,
        ckv_cache=_pages_of_one(case.ckv_cache),
        kpe_cache=_pages_of_one(case.kpe_cache),
        kv_indptr=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device),
        kv_indices=torch.cat([lists.indices.new_empty(0), *named]),
        kv_last_page_len=torch.ones(len(lengths), dtype=torch.int32, device=device),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
    )


def _pages_of_one(x: torch.Tensor) -> torch.Tensor:
    num_pages, page_size, width = x.shape
    return x.reshape(num_pages * page_size, 1, width)


def call_sparse(case: DecodeCase | Fp8Case, lists: Lists, **kwargs: Any) -> Any:
    """`mla_sparse` on the lists; allocates the results unless out and lse are among the keywords."""
    import mla_cute

    plain, scales = (case.case, case.scales) if isinstance(case, Fp8Case) else (case, {})
    options = {"topk_lens": lists.topk_lens} | scales | kwargs
    return mla_cute.mla_sparse(*plain.tensors, lists.indices, plain.sm_scale, **options)


def expected_sparse(case: DecodeCase | Fp8Case, *, lse_base: int | str = 2) -> Expected:
    return expected_fp8(case, lse_base=lse_base) if isinstance(case, Fp8Case) else expected_of(case, lse_base=lse_base)


def sinks_of(case: DecodeCase | Fp8Case, seed: int = 0) -> torch.Tensor:
    """A sink for each head, from those that take nothing to one that takes all."""
    plain = case.case if isinstance(case, Fp8Case) else case
    sinks = torch.randn(plain.num_heads, generator=torch.Generator().manual_seed(seed)) * 8
    some = torch.tensor([5.0, -math.inf, 1000.0, -1000.0])[: plain.num_heads]
    sinks[: len(some)] = some
    return sinks.to(plain.q_nope.device)


def with_sink(
    expected: Expected, sink: torch.Tensor, lse_base: int | str = 2, *, of_lse: torch.Tensor | None = None
) -> Expected:
    """Of each output e^lse / (e^lse + e^sink) is left.

    `of_lse`: the lse that the call wrote, which is judged by itself. From e4m3 scores it may be off by more than an
    output: where a list has one token, that is the output whatever its score. None: the expected one."""
    natural = (expected.lse if of_lse is None else of_lse) * (math.log(2) if lse_base == 2 else 1.0)
    left = torch.sigmoid(natural - sink.to(natural)).nan_to_num(0.0)[..., None]  # -inf - -inf: of an output of 0
    in_dtype = (expected.in_dtype * left).to(expected.in_dtype.dtype)
    return dataclasses.replace(expected, output=expected.output * left, in_dtype=in_dtype)


def run_sparse(
    case: DecodeCase | Fp8Case,
    lists: Lists,
    *,
    lse_base: int | str = 2,
    expected: Expected | None = None,
    sink: torch.Tensor | None = None,
    **kwargs: Any,
) -> Verdict:
    """Run the lists of a case through the public call into its guarded outputs and judge what came out; `expected`,
    without sinks, and `kwargs` as `run_case`'s."""
    plain = case.case if isinstance(case, Fp8Case) else case
    plain.guarded_out.reset()
    plain.guarded_lse.reset()
    output, lse = call_sparse(case, lists, out=plain.out, lse=plain.lse, lse_base=lse_base, sink=sink, **kwargs)
    expected = expected or expected_sparse(case, lse_base=lse_base)
    verdict = judge_sparse(case, expected if sink is None else with_sink(expected, sink, lse_base))
    return dataclasses.replace(verdict, failures=(*not_as_given(plain, output, lse), *verdict.failures))


def judge_sparse(case: DecodeCase | Fp8Case, expected: Expected) -> Verdict:
    """Judge what is in the case's guarded outputs now, and that nothing else was written."""
    return judge_fp8(case, expected) if isinstance(case, Fp8Case) else judge(case, expected)  # type: ignore[arg-type]
