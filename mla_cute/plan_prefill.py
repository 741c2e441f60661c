"""Plans of prefill steps: row tiles of 64 (query token, head) pairs, cut along the keys where that balances."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from .call import PREFILL, PREFILL_TABLE, Pages
from .check import DTYPE_NAMES, Problem
from .compile import jit
from .config import KernelConfig
from .convert import ConvertedStep
from .dims import BLOCK, PART_ROW, TILE_M
from .expect import expect_bool, expect_indptr, expect_int, expect_metadata
from .kernels.keys import (
    FACTS,
    FIXED_MAX_ITEMS,
    FIXED_MAX_PIECES,
    FIXED_MIN_BLOCKS,
    MAX_PARTS,
    PREFILL_PLANNER,
    TAIL_ITEMS_PER_PART,
    PrefillPlannerKey,
)
from .kernels.registry import converted_variants, converts, prefill_min_blocks
from .plan import (
    MOST_PARTIAL_BYTES,
    Layout,
    Plan,
    RoundLayout,
    Wanted,
    bounded,
    expect_hints,
    expect_options,
    expect_partials,
    expect_rows,
    expect_sizes,
    expect_table,
    merge_grid,
    planner_key,
    rounds_of,
)


class PrefillPlan(Plan):
    """Work items of one prefill step. Made by :func:`plan_prefill` or :func:`plan_prefill_block_table`.

    Holds references to the metadata tensors, is updated, captured in a CUDA graph and shared by the layers of a step as
    a :class:`~mla_cute.plan.DecodePlan` is.

    Attributes:
        batch, total_q, num_heads, page_size, causal: what the plan is for.
        max_q_len: query tokens that no request has more of; None: not known.
        config: the :class:`~mla_cute.config.KernelConfig` the calls will run with.
        selection: the :class:`~mla_cute.tuned.select.Selection` that config is from; None when it was given, and on the
            CPU.
        batch_invariant: whether a request is cut by its own lengths alone.
        max_tiles: row tiles the plan has room for.
        workspace_bytes: device memory the plan holds.
        verifies: calls with this plan check page ids, lengths and qo_indptr on the device (MLA_CUTE_CHECK=1 when it was
            made); calls on CPU tensors do so always.
    """

    __slots__ = ("total_q", "causal", "max_tiles", "_q_len")

    _facts = (*Plan._facts, "total_q", "causal")
    packs_rows = True

    def __init__(self, wanted: Wanted):
        super().__init__(wanted)
        batch, total_q, num_heads = wanted.batch, wanted.total_q, wanted.num_heads
        self.total_q, self.causal = total_q, wanted.pages.causal
        self.has_work = self.has_work and total_q > 0
        self.max_tiles = -(-total_q * num_heads // TILE_M) + batch
        self._q_len = -(-total_q // max(batch, 1))
        if self.device.type == "cpu":
            self.config = wanted.config or KernelConfig()
            return
        sms = self._choose_config(wanted, self._q_len)
        self._planner = jit.get(PREFILL_PLANNER, planner_key(PrefillPlannerKey, wanted), self.config.planner_launch())
        numbers = (
            min(MAX_PARTS, sms), wanted.page_size, wanted.table_stride, num_heads, *self._cut_costs(), int(self.causal),
        )  # fmt: skip
        if wanted.batch_invariant:
            layout = _invariant_layout(batch, total_q, sms, numbers, wanted.room)
        else:
            layout = _layout(self.max_tiles, batch, sms, numbers)
        self._allocate(layout, wanted.partials)

    def _cut_costs(self) -> tuple[int, int, int]:
        _, overhead, penalty = super()._cut_costs()
        return prefill_min_blocks(self.config), overhead, penalty

    def _compiled(self, problem: Problem) -> Callable[..., None]:
        if not self._converts(problem):
            return super()._compiled(problem)
        converted = converted_variants(problem.kv_format, problem.q_fp8, problem.page_size, self.config, problem.dims)
        return ConvertedStep(
            problem, self.rounds[0].scratch, self.batch, self._table_stride, self.num_parts,
            self.config.fp8_kernel == "convert", self._variant(problem), converted,
        )  # fmt: skip

    def _converts(self, problem: Problem) -> bool:
        """The two kernels differ in bits, and which one runs goes by what else is in the batch, which bits of a
        batch-invariant plan may not."""
        facts = problem.op, problem.kv_format, problem.q_fp8, self.num_heads, self._q_len, self.config
        return not self.batch_invariant and converts(*facts, DTYPE_NAMES[problem.dtype])


@functools.lru_cache(maxsize=4096)
def _layout(max_tiles: int, batch: int, num_sms: int, numbers: tuple[int, ...]) -> Layout:
    """`numbers`: the planner's but for the last, the number of parts first."""
    parts = numbers[0]
    items = max_tiles + TAIL_ITEMS_PER_PART * parts
    # The planner cuts only the row tiles that are left after whole rounds of one per part, so there are never more
    # merge entries at once than parts.
    grid = (parts, max_tiles, *merge_grid(num_sms, max_tiles, parts, TILE_M))
    rows = parts + max_tiles + _whole_rounds(items, parts)
    of_round = RoundLayout(0, batch, rows, grid, (*numbers, max_tiles))
    return Layout((of_round,), TAIL_ITEMS_PER_PART * parts * TILE_M, FACTS)


@functools.lru_cache(maxsize=4096)
def _invariant_layout(batch: int, total_q: int, num_sms: int, numbers: tuple[int, ...], room: int | None) -> Layout:
    parts, num_heads = numbers[0], numbers[3]
    part_rows, per_round = _invariant_rows(batch, num_heads, total_q, room)
    rounds = []
    for begin, end in rounds_of(batch, per_round):
        n = end - begin
        tiles = -(-total_q * num_heads // TILE_M) + n
        rows = parts + tiles + _whole_rounds(_invariant_items(n, tiles, room), parts)
        grid = (parts, tiles, *merge_grid(num_sms, tiles, tiles, TILE_M))
        rounds.append(RoundLayout(begin, end, rows, grid, (*numbers, tiles)))
    return Layout(tuple(rounds), part_rows, FACTS)


def _whole_rounds(items: int, parts: int) -> int:
    """Items lie in rounds of one per part."""
    return -(-items // parts) * parts


# A batch-invariant plan cuts each of a request's t tiles into at most FIXED_MAX_ITEMS // t pieces (one, if that is
# none), of FIXED_MIN_BLOCKS blocks or more: the request has t items, or at most FIXED_MAX_ITEMS of them, and only these
# may be pieces.


def _most_pieces(room: int | None) -> int:
    """Of a tile. `room`: keys that page lists have room for."""
    if room is None:
        return FIXED_MAX_PIECES
    return max(1, min(FIXED_MAX_PIECES, -(-room // (FIXED_MIN_BLOCKS * BLOCK))))


def _invariant_items(batch: int, max_tiles: int, room: int | None) -> int:
    return min(_most_pieces(room) * max_tiles, max_tiles + FIXED_MAX_ITEMS * batch)


def _invariant_rows(batch: int, num_heads: int, total_q: int, room: int | None) -> tuple[int, int]:
    """(partial rows of a round, requests of a round)."""
    pieces = _most_pieces(room)
    if pieces == 1:
        return 1, max(batch, 1)
    of_request = FIXED_MAX_ITEMS * TILE_M
    rows = min(of_request * batch, pieces * total_q * num_heads)
    most = max(MOST_PARTIAL_BYTES // (4 * PART_ROW), of_request)
    if rows <= most:
        return max(1, rows), max(batch, 1)
    return most, most // of_request


def plan_prefill(
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    *,
    num_heads: int,
    page_size: int,
    total_q: int,
    causal: bool = True,
    kv_last_page_len: torch.Tensor | None = None,
    num_kv_indices: int | None = None,
    config: KernelConfig | None = None,
    batch_invariant: bool = False,
    kv_format: str = "",
    q_fp8: bool = False,
    max_kv_len: int | None = None,
    max_q_len: int | None = None,
    other_metadata: bool = False,
) -> PrefillPlan:
    """Plan a prefill step from CSR page lists; one plan serves every layer of the step.

    Args:
        qo_indptr: [batch + 1] int32, on the device of the calls; request b owns query tokens
            qo_indptr[b]:qo_indptr[b + 1].
        kv_indptr: [batch + 1] int32, likewise.
        num_heads: query heads per token, 1..128.
        page_size: tokens per page, >= 1.
        total_q: first dimension of q_nope and q_pe, >= qo_indptr[-1] now and at every update; bounds the workspace.
        causal: what the calls will say.
        kv_last_page_len: [batch] int32, tokens in each request's last page; None: last pages are full.
        num_kv_indices: upper bound of kv_indptr[-1]; only bounds the workspace of batch-invariant plans.
        max_q_len: query tokens that no request has more of, now and at every update: a few, as those of drafts are.
            With at most 32 (token, head) rows a request, FP8 caches are read by the kernel for so many rows, unless
            batch_invariant. Rows beyond those of a request that has more are not written then; MLA_CUTE_CHECK=1 raises
            ValueError. None: not known.
        config: a KernelConfig; None takes the tuned one of the nearest shape (:mod:`mla_cute.tuned.select`), else a
            default.
        batch_invariant: cut each request by its own lengths alone, so that its result has the same bits whatever else
            is in the batch. Without `config` takes the default, not a tuned one.
        kv_format, q_fp8, max_kv_len: what the choice of a configuration goes by, as :func:`~mla_cute.plan_decode`.
        other_metadata: as :func:`~mla_cute.plan_decode`; of qo_indptr too.

    Raises:
        TypeError, ValueError: naming the argument. RuntimeError: the device is not Hopper.
    """
    batch = _expect_common(qo_indptr, num_heads, page_size, total_q, causal, max_q_len)
    expect_hints(kv_format, q_fp8, max_kv_len)
    expect_options(config, batch_invariant)
    expect_bool("other_metadata", other_metadata)
    if num_kv_indices is not None:
        expect_int("num_kv_indices", num_kv_indices, 0)
    expect_metadata("kv_indptr", kv_indptr, (batch + 1,), "[batch + 1]", qo_indptr.device)
    if kv_last_page_len is not None:
        expect_metadata("kv_last_page_len", kv_last_page_len, (batch,), "[batch]", qo_indptr.device)
    room = None if num_kv_indices is None else num_kv_indices * page_size
    wanted = Wanted(
        Pages(PREFILL, kv_indptr, None, kv_last_page_len, qo_indptr, causal), batch, total_q, num_heads, page_size,
        room, 0, max_kv_len, kv_format, q_fp8, config, batch_invariant, other_metadata, max_q_len=max_q_len,
    )  # fmt: skip
    return PrefillPlan(wanted)._register().update()


def plan_prefill_block_table(
    qo_indptr: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    num_heads: int,
    page_size: int,
    total_q: int,
    max_pages: int,
    table_stride: int | None = None,
    causal: bool = True,
    config: KernelConfig | None = None,
    batch_invariant: bool = False,
    kv_format: str = "",
    q_fp8: bool = False,
    max_kv_len: int | None = None,
    max_q_len: int | None = None,
    other_metadata: bool = False,
    partials: torch.Tensor | None = None,
) -> PrefillPlan:
    """Plan a prefill step of an engine that carries `block_table [batch, max_pages]` and `seq_lens [batch]`.

    Args:
        qo_indptr, num_heads, page_size, total_q, causal, config, batch_invariant, kv_format, q_fp8, max_q_len,
            other_metadata: as :func:`plan_prefill`.
        seq_lens: [batch] int32, keys per request (those of its query tokens included), on the device of qo_indptr.
        max_pages: columns of the block table.
        table_stride: elements between its rows, >= max_pages; None: max_pages.
        max_kv_len: as :func:`~mla_cute.plan_decode`; None: max_pages * page_size.
        partials: `part` of another plan, to write partial rows to if it has enough of them; else the plan has its own.
            Steps of plans that share it run one after another.

    Raises:
        TypeError, ValueError: naming the argument. RuntimeError: the device is not Hopper.
    """
    batch = _expect_common(qo_indptr, num_heads, page_size, total_q, causal, max_q_len)
    expect_hints(kv_format, q_fp8, max_kv_len)
    expect_options(config, batch_invariant)
    expect_bool("other_metadata", other_metadata)
    expect_partials(partials)
    expect_metadata("seq_lens", seq_lens, (batch,), "[batch]", qo_indptr.device)
    table_stride = expect_table(batch, max_pages, table_stride)
    room = max_pages * page_size
    wanted = Wanted(
        Pages(PREFILL_TABLE, seq_lens, None, None, qo_indptr, causal), batch, total_q, num_heads, page_size, room,
        table_stride, bounded(max_kv_len, room), kv_format, q_fp8, config, batch_invariant, other_metadata,
        partials=partials, max_q_len=max_q_len,
    )  # fmt: skip
    return PrefillPlan(wanted)._register().update()


def _expect_common(
    qo_indptr: torch.Tensor, num_heads: int, page_size: int, total_q: int, causal: bool, max_q_len: int | None
) -> int:
    """Returns batch."""
    expect_sizes(num_heads, page_size)
    expect_int("total_q", total_q, 0)
    expect_rows("total_q", total_q, num_heads)
    expect_bool("causal", causal)
    if max_q_len is not None:
        expect_int("max_q_len", max_q_len, 0)
    return expect_indptr("qo_indptr", qo_indptr, None)
