"""Requests over a paged latent cache for the tests of mla_cute.integrations, with a dense answer in plain torch.

What no request owns is poisoned: pages and rows of pages are NaN, page ids past a request's or the list's end absurd.
"""

import itertools
from collections.abc import Sequence

import torch

from mla_cute import quant

SM_SCALE = 192**-0.5
ABSURD = 2**30


class Case:
    """`requests` are (q_len, kv_len).

    Attributes:
        q: [total_q, H, 576]; rows past qo_indptr[-1] are NaN. cache: [num_pages, page_size, 576].
        qo_indptr, kv_indptr, kv_indices, kv_len_arr: CSR metadata, kv_indices longer than kv_indptr[-1].
        block_table: [batch, max_pages].
    """

    def __init__(
        self,
        requests: Sequence[tuple[int, int]],
        *,
        num_heads: int = 3,
        page_size: int = 8,
        spare_q: int = 0,
        spare_pages: int = 0,
        num_pages: int = 64,
        num_indices: int = 72,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cpu",
        seed: int = 0,
    ):
        """`spare_pages`: pages a request owns beyond those its keys fill."""
        generator = torch.Generator().manual_seed(seed)
        self.requests, self.page_size = list(requests), page_size
        q_lens, self.kv_lens = zip(*requests, strict=True)
        total = sum(q_lens)
        self.q = torch.randn(total + spare_q, num_heads, 576, generator=generator).to(dtype)
        self.q[total:] = torch.nan
        pages = [-(-n // page_size) for n in self.kv_lens]
        order = torch.randperm(num_pages, generator=generator)
        own = [order[end - n : end] for n, end in zip(pages, itertools.accumulate(pages), strict=True)]
        self.cache = torch.full((num_pages, page_size, 576), torch.nan, dtype=dtype)
        for ids, n in zip(own, self.kv_lens, strict=True):
            rows = torch.full((len(ids) * page_size, 576), torch.nan)
            rows[:n] = torch.randn(n, 576, generator=generator)
            self.cache[ids] = rows.view(-1, page_size, 576).to(dtype)
        self._own = own
        self.qo_indptr = _int32([0, *itertools.accumulate(q_lens)])
        self.kv_indptr = _int32([0, *itertools.accumulate(n + spare_pages for n in pages)])
        spare = torch.full((spare_pages,), ABSURD)
        ids = torch.cat([part for owned in own for part in (owned, spare)])
        self.kv_indices = torch.full((num_indices,), ABSURD, dtype=torch.int32)
        self.kv_indices[: len(ids)] = ids
        self.kv_len_arr = _int32(self.kv_lens)
        self.block_table = torch.full((len(requests), max(pages) + 2), ABSURD, dtype=torch.int32)
        for row, owned in zip(self.block_table, own, strict=True):
            row[: len(owned)] = owned
        for name, x in list(vars(self).items()):
            if isinstance(x, torch.Tensor):
                setattr(self, name, x.to(device))

    @property
    def csr(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr")}

    @property
    def dense(self) -> dict[str, torch.Tensor]:
        return {
            "cum_seq_lens_q": self.qo_indptr, "block_tables": self.block_table, "seq_lens": self.kv_len_arr,
        }  # fmt: skip

    def expected(
        self, causal: bool, sm_scale: float = SM_SCALE, cache: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(output [rows, H, 512], natural log-sum-exp [rows, H]) in float32 of the rows that requests own.

        `cache` is what the cache stands for in float32, if it is not the case's own.
        """
        cache = (self.cache if cache is None else cache).float().cpu()
        results = []
        for begin, ids, (q_len, kv_len) in zip(self.qo_indptr.tolist(), self._own, self.requests, strict=False):
            keys = cache[ids].flatten(0, 1)[:kv_len]
            q = self.q[begin : begin + q_len].float().cpu()
            results.append(_attention(q, keys, causal, sm_scale))
        out, lse = zip(*results, strict=True)
        return torch.cat(out), torch.cat(lse)


def _attention(q: torch.Tensor, keys: torch.Tensor, causal: bool, sm_scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One request: q [q_len, H, 576], keys [kv_len, 576]; the causal mask is aligned at the bottom right."""
    scores = torch.einsum("qhd,kd->qhk", q, keys) * sm_scale
    if causal:
        visible = torch.ones(len(q), len(keys), dtype=torch.bool).tril(len(keys) - len(q))
        scores = scores.masked_fill(~visible[:, None], -torch.inf)
    lse = scores.logsumexp(-1)
    return torch.einsum("qhk,kd->qhd", scores.softmax(-1).nan_to_num(0.0), keys[:, :512]), lse


class ListCase:
    """Query tokens that each attend to a list of tokens of a cache. Rows in no list are NaN; in each list there are -1,
    behind its length absurd numbers; tokens are named in any order, some twice.

    Attributes:
        q: [total_q, H, 576]. cache: [num_pages, page_size, 576].
        indices: [total_q, topk] int32. topk_lens: [total_q] int32.
    """

    def __init__(
        self,
        topk_lens: Sequence[int],
        *,
        topk: int = 40,
        num_heads: int = 3,
        page_size: int = 8,
        num_pages: int = 16,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cpu",
        seed: int = 0,
    ):
        generator = torch.Generator().manual_seed(seed)
        self.page_size = page_size
        self.q = torch.randn(len(topk_lens), num_heads, 576, generator=generator).to(dtype)
        absurd = torch.tensor([ABSURD, -ABSURD], dtype=torch.int32)
        self.indices = absurd.repeat(len(topk_lens), topk // 2 + 1)[:, :topk].contiguous()
        rows = torch.full((num_pages * page_size, 576), torch.nan)
        for row, n in zip(self.indices, topk_lens, strict=True):
            chosen = torch.randint(len(rows) // 2, (n,), generator=generator) * 2  # every other row is in no list
            rows[chosen] = torch.randn(n, 576, generator=generator)
            row[:n] = chosen.masked_fill(torch.rand(n, generator=generator) < 0.2, -1)
        self.cache = rows.view(num_pages, page_size, 576).to(dtype)
        self.topk_lens = _int32(topk_lens)
        for name, x in list(vars(self).items()):
            if isinstance(x, torch.Tensor):
                setattr(self, name, x.to(device))

    def expected(
        self, sm_scale: float = SM_SCALE, cache: torch.Tensor | None = None, sink: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(output [total_q, H, 512], natural log-sum-exp [total_q, H]) in float32; 0 and -inf of an empty list. `cache`
        as `Case.expected`'s; `sink` [H] is one more key of that score whose value is 0, and is not in the
        log-sum-exp."""
        rows = (self.cache if cache is None else cache).float().cpu().flatten(0, 1)
        results = []
        for q, ids, n in zip(self.q.float().cpu(), self.indices.tolist(), self.topk_lens.tolist(), strict=True):
            keys = rows[[i for i in ids[:n] if i >= 0]]
            scores = q @ keys.T * sm_scale
            lse = scores.logsumexp(-1)
            total = lse if sink is None else torch.logaddexp(lse, sink.float().cpu())
            p = (scores - total[:, None]).exp() if len(keys) else scores
            results.append((p @ keys[:, :512], lse))
        out, lse = zip(*results, strict=True)
        return torch.stack(out), torch.stack(lse)


def spare_ids(case: Case) -> None:
    """Page ids that no kernel may read: the largest int32, and -1."""
    (spare,) = (case.kv_indices == ABSURD).nonzero(as_tuple=True)
    case.kv_indices[spare[::2]] = 2**31 - 1
    case.kv_indices[spare[1::2]] = -1


def rows_of_656(case: Case | ListCase) -> tuple[torch.Tensor, torch.Tensor]:
    """The cache in the format "group": a pool of 656-byte rows, and what it holds in float32."""
    pool = torch.zeros(*case.cache.shape[:2], quant.GROUP_ROW_BYTES, dtype=torch.uint8, device=case.cache.device)
    ckv, array = quant.quantize_group(case.cache[..., :512])
    kpe = case.cache[..., 512:]
    for part, values in zip(quant.group_rows(pool), (ckv, array, kpe), strict=True):
        part.copy_(values)
    return pool, torch.cat((quant.dequantize(ckv, array), kpe.float()), -1)


def _int32(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)
