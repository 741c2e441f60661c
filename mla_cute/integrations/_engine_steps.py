"""What the backends for serving engines share: plans that outlive a step, and the call of one layer."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..attend import attend
from ..call import DECODE_TABLE, PREFILL_TABLE, SPARSE, UNSCALED, Cache, Call, Pages
from ..check import FP8
from ..dims import CKV_DIM, TILE_M
from ..kernels.keys import TAIL_ITEMS_PER_PART
from ..kernels.registry import Variant, converted_variants, converts, has_few_rows, planner_variant, step_variant
from ..launch import table_stride
from ..plan import Plan
from ..plan_decode import plan_decode_block_table
from ..plan_prefill import plan_prefill_block_table
from ..quant import GROUP_ROW_BYTES, group_rows
from ..sparse import SparsePlan, plan_sparse
from ..tuned import select

# The length by which the kernel of a graph is chosen, which is replayed with lengths that nobody knows yet. 128 heads
# of one request run row tiles then, over an FP8 cache 2 us slower than tile16 at 1024 keys, 1 at 8192 and 13 us faster
# at 32768; 16 heads of any batch, few requests of 32 or 64 heads, and one of 128 with 16-bit queries over an FP8 cache
# run tile16.
GRAPH_KV_LEN = 16384

# Over an FP8 cache, 16-bit queries cost what they cost over a 16-bit one as soon as the tensor cores are the limit: a
# request with more rows (heads times query tokens) than a tile has gets e4m3 queries.
MAX_ROWS_OF_16BIT_QUERIES = 64


def paged_cache(rows: torch.Tensor, scale: float = UNSCALED) -> Cache:
    """The parts of a cache in which a token is one row.

    Args:
        rows: [num_pages, page_size, 576] bfloat16 or float16; float8_e4m3fn of the format "tensor"; or
            [num_pages, page_size, 656] uint8 of the format "group" (:func:`mla_cute.quant.group_rows`).
        scale: multiplies what a cache of the format "tensor" holds.
    """
    if rows.shape[-1] == GROUP_ROW_BYTES:
        ckv, array, kpe = group_rows(rows)
        return Cache(ckv, kpe, scale_arr=array)
    ckv, kpe = rows[..., :CKV_DIM], rows[..., CKV_DIM:]
    return Cache(ckv, kpe, scale, scale) if rows.dtype is FP8 else Cache(ckv, kpe)


class Step(NamedTuple):
    """One step of an engine: which pages and keys its requests have, and the plan over them.

    Attributes:
        refill: brings the tensors of `pages` up to date, where they are not the engine's own.
    """

    pages: Pages
    plan: Plan
    refill: Callable[[], None] | None = None

    def update(self) -> None:
        """Plans again from what the engine's tensors hold now, on the current stream: it may be recorded in a graph."""
        if self.refill is not None:
            self.refill()
        self.plan.update()

    def attend(
        self,
        q_nope: torch.Tensor,
        q_pe: torch.Tensor,
        cache: Cache,
        sm_scale: float,
        out: torch.Tensor | None = None,
        q_scale: float = UNSCALED,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(output [tokens, H, 512], natural log-sum-exp [tokens, H]); rows past qo_indptr[-1] are not written."""
        result: Any = attend(
            Call(q_nope, q_pe, cache, self.pages, sm_scale, out, None, "e", q_scale), self.plan, None, False
        )
        return result


class ListStep(NamedTuple):
    """One step of an engine whose query tokens each attend to a list of tokens (`mla_sparse`).

    Attributes:
        topk_lens: [tokens] int32, of this library, from which the plan is made.
    """

    topk_lens: torch.Tensor
    plan: SparsePlan

    def update(self, counts: torch.Tensor) -> None:
        """Plans again for lists of `counts` [tokens] tokens, on the current stream: it may be recorded in a graph."""
        self.topk_lens.copy_(counts)
        self.plan.update()

    def attend(
        self,
        q_nope: torch.Tensor,
        q_pe: torch.Tensor,
        cache: Cache,
        indices: torch.Tensor,
        sm_scale: float,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(output [tokens, H, 512], natural log-sum-exp [tokens, H]) of the lists `indices` [tokens, topk], which may
        differ from layer to layer; what stands in them behind topk_lens is not read."""
        pages = Pages(SPARSE, self.topk_lens, indices)
        result: Any = attend(Call(q_nope, q_pe, cache, pages, sm_scale, out, None, "e"), self.plan, None, False)
        return result


class Share(NamedTuple):
    """Which keys of a request a rank of context parallelism has: `interleave` of them in turn.

    Key p of a request is with rank p // interleave % world, as key p // (interleave * world) * interleave +
    p % interleave of its share.
    """

    rank: int
    world: int
    interleave: int = 1

    def of(self, lengths: torch.Tensor) -> torch.Tensor:
        """How many of the first `lengths` keys are with the rank."""
        whole = torch.div(lengths, self.world * self.interleave, rounding_mode="floor") * self.interleave
        return whole + (lengths - whole * self.world - self.rank * self.interleave).clamp(0, self.interleave)


class TokenRequests:
    """The query tokens of a rank of context parallelism as requests of one token each.

    A query token sees the keys up to its own, of which a rank has every world-th: no causal mask over the rank's keys
    says so. But their number does, which is the length of a request of that token alone. A row of the block table is
    repeated for the tokens of its request, and the keys are read for each of them, mostly from L2.
    """

    def __init__(self, share: Share):
        self._share = share
        # (block tables, lengths, 0 1 2 ...), the last one in use; a CUDA graph may hold those before.
        self._rooms: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def room(self, tokens: int, block_table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(block table [tokens, pages], lengths [tokens], indptr [tokens + 1]) that `filler` fills."""
        pages, device = block_table.shape[1], block_table.device
        if not self._rooms or tokens > self._rooms[-1][0].shape[0] or pages != self._rooms[-1][0].shape[1]:
            table, lengths = (torch.zeros(size, dtype=torch.int32, device=device) for size in ((tokens, pages), tokens))
            self._rooms.append((table, lengths, torch.arange(tokens + 1, dtype=torch.int32, device=device)))
        table, lengths, numbers = self._rooms[-1]
        return table[:tokens], lengths[:tokens], numbers[: tokens + 1]

    def filler(
        self,
        room: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        block_table: torch.Tensor,
        total_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
    ) -> Callable[[], None]:
        """What fills a room from the tensors of the requests: block_table [batch, pages], total_lens [batch] keys on
        all ranks, query_start_loc [batch + 1]. Tokens past query_start_loc[-1] have no keys."""
        table, lengths, indptr = room
        numbers, ends, batch = indptr[:-1], query_start_loc[1:], total_lens.shape[0]

        def fill() -> None:
            owner = torch.searchsorted(ends, numbers, right=True)
            own = owner.clamp(max=batch - 1)
            seen = total_lens[own] - ends[own] + numbers + 1
            lengths.copy_(torch.where(owner < batch, self._share.of(seen), 0))
            torch.index_select(block_table, 0, own, out=table)

        return fill


class StepPlans:
    """Plans by shape and metadata memory. An engine refills its metadata tensors, so plans are made once and updated.

    Plans made with `keep` stay, because a CUDA graph holds the addresses of their buffers; of the others the last
    `RECENT` do. A plan keeps its metadata tensors alive, so that no other tensor gets an address that finds it. All
    calls run on one stream (or are ordered), because the plans share one buffer for partial outputs: of its own each
    would hold up to 40 MB, and an engine captures some fifty batch sizes.

    Args:
        partials: that buffer, float32 [rows, PART_ROW], of `most_partial_rows` rows; None: the first plan's, or that
            of the first that needs a larger one.
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
        partials: torch.Tensor | None = None,
    ):
        self._facts: dict[str, Any] = {
            "num_heads": num_heads, "page_size": page_size, "kv_format": kv_format, "q_fp8": q_fp8,
            "batch_invariant": batch_invariant,
        }  # fmt: skip
        self._kept: dict[tuple[Any, ...], Plan] = {}
        self._recent: OrderedDict[tuple[Any, ...], Plan] = OrderedDict()
        self._partials = partials
        self._outputs: list[torch.Tensor] = []

    def step(
        self,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        qo_indptr: torch.Tensor | None = None,
        total_q: int = 0,
        *,
        max_kv_len: int | None = None,
        max_q_len: int | None = None,
        keep: bool = False,
    ) -> Step:
        """The step over these tensors; its plan may be of earlier values of them until it is updated.

        Args:
            block_table: [batch, max_pages] int32. seq_lens: [batch] int32, keys of each request.
            qo_indptr: [batch + 1] int32 with `total_q` query tokens at most; None: one token per request.
            max_kv_len: keys that no request has more of, as far as the host knows; None: not known. The kernel of a
                small step may be another one. Graphs are replayed with other lengths: `GRAPH_KV_LEN` stands for them.
            max_q_len: query tokens that no request has more of, in no replay either; None: not known.
            keep: the step is about to be captured in a CUDA graph.
        """
        pages = Pages(DECODE_TABLE, seq_lens, block_table)
        queries = None
        if qo_indptr is not None:
            pages = Pages(PREFILL_TABLE, seq_lens, block_table, None, qo_indptr, True)
            queries = (qo_indptr.data_ptr(), total_q, max_q_len)
        # To the next power of two, so that a plan lasts while lengths grow.
        bound = None if max_kv_len is None else 1 << max(0, max_kv_len - 1).bit_length()
        bound = GRAPH_KV_LEN if keep else bound
        key = (*block_table.shape, table_stride(block_table), seq_lens.data_ptr(), queries)
        return Step(pages, self._found(key, (*key, bound), keep, lambda: self._make(pages, total_q, bound, max_q_len)))

    def list_step(self, tokens: int, topk: int, device: torch.device, *, keep: bool = False) -> ListStep:
        """The step of `tokens` query tokens over lists of `topk` columns, rows one behind the other; to be updated with
        their lengths. Its pages are single tokens, whatever `page_size` is. `keep` as in `step`."""

        def make() -> Plan:
            facts = {name: self._facts[name] for name in ("num_heads", "kv_format", "q_fp8", "batch_invariant")}
            lens = torch.zeros(tokens, dtype=torch.int32, device=device)
            lists = torch.empty((tokens, topk), dtype=torch.int32, device=device)  # for its sizes
            plan = plan_sparse(lists, topk_lens=lens, partials=self._partials, **facts)
            return self._shared(plan)

        key = ("lists", tokens, topk, device)
        plan: Any = self._found(key, key, keep, make)
        return ListStep(plan._pages.lengths, plan)

    def _found(self, key: tuple[Any, ...], bounded: tuple[Any, ...], keep: bool, make: Callable[[], Plan]) -> Plan:
        """The plan that stays under `key`, or the recent one under `bounded`, or what `make` makes."""
        plan = self._kept.get(key) or self._recent.get(bounded) or make()
        if keep:
            self._kept[key] = plan
        elif key not in self._kept:
            self._recent[bounded] = plan
            self._recent.move_to_end(bounded)
            if len(self._recent) > self.RECENT:
                self._recent.popitem(last=False)
        return plan

    def _make(self, pages: Pages, total_q: int, max_kv_len: int | None, max_q_len: int | None) -> Plan:
        table = {"max_pages": pages.ids.shape[1], "table_stride": table_stride(pages.ids)}
        facts = self._facts | table | {"max_kv_len": max_kv_len, "partials": self._partials}
        plan: Plan
        if pages.queries is None:
            plan = plan_decode_block_table(pages.lengths, **facts)
        else:
            plan = plan_prefill_block_table(pages.queries, pages.lengths, total_q=total_q, max_q_len=max_q_len, **facts)
        return self._shared(plan)

    def _shared(self, plan: Plan) -> Plan:
        """`plan`, whose partial outputs the next plan has too."""
        if plan.device.type == "cuda":
            self._partials = plan.part
        return plan

    def padded_output(self, tokens: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """[tokens, H, 512] for every layer in turn, in which what no layer writes is finite: zeros, or outputs of
        earlier steps. A CUDA graph may hold it, so it stays."""
        if not self._outputs or self._outputs[-1].shape[0] < tokens or self._outputs[-1].dtype is not dtype:
            shape = (tokens, self._facts["num_heads"], CKV_DIM)
            self._outputs.append(torch.zeros(shape, dtype=dtype, device=device))
        return self._outputs[-1][:tokens]

    def variants(self, dtype: str, device: torch.device) -> list[Variant]:
        """The kernels of steps over queries of `dtype`, whatever their sizes: those of every configuration that is
        chosen for a size in powers of two."""
        kv_format, q_fp8, num_heads, page_size, invariant = (
            self._facts[name] for name in ("kv_format", "q_fp8", "num_heads", "page_size", "batch_invariant")
        )
        found: dict[Variant, None] = {}
        sizes = itertools.product(_BATCHES, (None, *_KV_LENS))
        for (op, q_len), (batch, kv_len) in itertools.product(_QUERIES, sizes):
            facts = (op, kv_format, q_fp8, num_heads, page_size, q_len, batch, kv_len)
            config = select.choose(*facts, device, invariant).config
            may_have_few = not invariant and has_few_rows(op, num_heads, q_len)
            for few_rows in (False, True) if may_have_few else (False,):
                step = step_variant(op, kv_format, q_fp8, num_heads, page_size, dtype, config, few_rows=few_rows)
                found[step] = None
            if not invariant and converts(op, kv_format, q_fp8, num_heads, q_len, config, dtype):
                found |= dict.fromkeys(converted_variants(kv_format, q_fp8, page_size, config))
            found[planner_variant(op, "seq_lens", config, invariant)] = None
        return list(found)

    def list_variants(self, dtype: str, device: torch.device) -> list[Variant]:
        """The kernels of `list_step`s over 16-bit queries of `dtype`, as `variants`."""
        kv_format, num_heads, invariant = (self._facts[name] for name in ("kv_format", "num_heads", "batch_invariant"))
        found: dict[Variant, None] = {}
        for tokens, topk in itertools.product(_BATCHES, _KV_LENS):
            config = select.choose("sparse", kv_format, False, num_heads, 1, 1, tokens, topk, device, invariant).config
            found[step_variant("sparse", kv_format, False, num_heads, 1, dtype, config)] = None
            found[planner_variant("sparse", "seq_lens", config, invariant)] = None
        return list(found)


_BATCHES = tuple(1 << n for n in range(12))
_KV_LENS = tuple(1 << n for n in range(6, 21))
_QUERIES = (("decode", 1), *(("prefill", 1 << n) for n in range(14)))


def most_partial_rows(num_sms: int) -> int:
    """Rows of partial outputs that no plan needs more of, but for batch-invariant ones. Prefill leaves up to
    TAIL_ITEMS_PER_PART pieces of a row tile to each SM, decode two pieces of a tile or of fewer rows."""
    return TAIL_ITEMS_PER_PART * num_sms * TILE_M
