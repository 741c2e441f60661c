"""Lists of tokens for the cases of cases.py and fp8.py, and the verdict on what `mla_sparse` makes of them.

Attention does not depend on the order of keys: the call on a case's own tokens, shuffled, with -1 among them, has the
result of the decode call, whose reference knows nothing of lists.
"""

from __future__ import annotations

import dataclasses
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
    # An odd row stride: rows are only 4-byte aligned.
    table = torch.tensor(ABSURD_PAGE_IDS * ((len(rows) * (columns | 1)) // 2 + 1), dtype=torch.int32)
    table = table[: len(rows) * (columns | 1)].view(len(rows), columns | 1)
    for b, row in enumerate(rows):
        table[b, : len(row)] = row
    lens = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    device = case.q_nope.device
    return Lists(table.to(device)[:, :columns], lens.to(device))


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


def with_sink(expected: Expected, sink: torch.Tensor, lse_base: int | str = 2) -> Expected:
    """Of each output e^lse / (e^lse + e^sink) is left."""
    natural = expected.lse * (math.log(2) if lse_base == 2 else 1.0)
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
