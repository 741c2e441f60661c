"""Plans of prefill steps: row tiles of 64 (query token, head) pairs, cut along the keys where that balances."""

from __future__ import annotations

import torch

from .config import KernelConfig
from .expect import expect_bool, expect_indptr, expect_int, expect_metadata
from .kernels.registry import (
    BLOCK,
    FIXED_MAX_ITEMS,
    FIXED_MAX_PIECES,
    FIXED_MIN_BLOCKS,
    MAX_PARTS,
    PREFILL_PLANNER,
    TAIL_ITEMS_PER_PART,
    TILE_M,
    PrefillPlannerKey,
)
from .plan import Plan, bounded, expect_hints, expect_options
from .problem import MAX_HEADS
from .problem_prefill import PrefillProblem
from .steps import prefill_min_blocks

_SCRATCH_ROWS = 8


class PrefillPlan(Plan):
    """Work items of one prefill step. Made by :func:`plan_prefill` or :func:`plan_prefill_block_table`.

    Holds references to the metadata tensors, is updated, captured in a CUDA graph and shared by the layers of a step as
    a :class:`~mla_cute.plan.DecodePlan` is.

    Attributes:
        batch, total_q, num_heads, page_size, causal: what the plan is for.
        config: the :class:`~mla_cute.config.KernelConfig` the calls will run with.
        selection: the :class:`~mla_cute.tuned.Selection` that config is from; None when it was given, and on the CPU.
        batch_invariant: whether a request is cut by its own lengths alone.
        max_tiles: row tiles the plan has room for.
        workspace_bytes: device memory the plan holds.
        verifies: calls with this plan check page ids, lengths and qo_indptr on the device (MLA_CUTE_CHECK=1 when it was
            made).
    """

    __slots__ = ("total_q", "causal", "max_tiles")

    _op = "prefill"
    _problem_type = PrefillProblem
    _facts = (*Plan._facts, "total_q", "causal")
    packs_rows = True

    def __init__(
        self,
        key: PrefillPlannerKey,
        qo_indptr: torch.Tensor,
        lengths: torch.Tensor,
        last_len: torch.Tensor | None,
        *,
        batch: int,
        num_heads: int,
        page_size: int,
        total_q: int,
        causal: bool,
        max_room: int | None,
        table_stride: int,
        config: KernelConfig | None,
        kv_format: str,
        q_fp8: bool,
        max_kv_len: int | None,
    ):
        super().__init__(
            lengths.device,
            block_table=key.lengths == "seq_lens",
            batch_invariant=key.batch_invariant,
            batch=batch,
            num_heads=num_heads,
            page_size=page_size,
            table_stride=table_stride,
        )
        self.total_q, self.causal = total_q, causal
        self.has_work = self.has_work and total_q > 0
        self.max_tiles = -(-total_q * num_heads // TILE_M) + batch
        if self.device.type == "cpu":
            self.config = config or KernelConfig()
            return
        sms = self._choose_config(config, -(-total_q // max(batch, 1)), kv_format, q_fp8, max_kv_len)
        parts = min(MAX_PARTS, sms)
        if key.batch_invariant:
            max_items, part_rows = _invariant_bounds(batch, num_heads, total_q, self.max_tiles, max_room)
            entries_at_once = self.max_tiles
        else:
            max_items = self.max_tiles + TAIL_ITEMS_PER_PART * parts
            part_rows = TAIL_ITEMS_PER_PART * parts * TILE_M
            entries_at_once = parts  # cut are fewer tiles than there are parts
        self._allocate(
            PREFILL_PLANNER,
            key,
            sms=sms,
            parts=parts,
            max_entries=self.max_tiles,
            max_items=-(-max_items // parts) * parts,  # items lie in rounds of one per part
            part_rows=part_rows,
            scratch_rows=_SCRATCH_ROWS,
            entries_at_once=entries_at_once,
            rows_per_entry=TILE_M,
        )
        self.grid = (self.num_parts, self.max_tiles, self.merge_x, self.merge_y)
        self._planner_args = (
            qo_indptr,
            lengths,
            lengths if last_len is None else last_len,
            self.table,
            self._scratch,
            parts,
            page_size,
            table_stride,
            num_heads,
            *self._cut_costs(),
            int(causal),
            self.max_tiles,
        )

    def _cut_costs(self) -> tuple[int, int, int]:
        _, overhead, penalty = super()._cut_costs()
        return prefill_min_blocks(self.config), overhead, penalty


def _invariant_bounds(
    batch: int, num_heads: int, total_q: int, max_tiles: int, max_room: int | None
) -> tuple[int, int]:
    """Items and partial rows of a batch-invariant plan, at most. `max_room`: keys that page lists have room for.

    A request of t tiles cuts each into at most FIXED_MAX_ITEMS // t pieces (one, if that is none), of FIXED_MIN_BLOCKS
    blocks or more: it has t items, or at most FIXED_MAX_ITEMS of them, and only these may be pieces.
    """
    pieces = FIXED_MAX_PIECES
    if max_room is not None:
        pieces = max(1, min(pieces, -(-max_room // (FIXED_MIN_BLOCKS * BLOCK))))
    max_items = min(pieces * max_tiles, max_tiles + FIXED_MAX_ITEMS * batch)
    part_rows = min(FIXED_MAX_ITEMS * batch * TILE_M, pieces * total_q * num_heads) if pieces > 1 else 0
    return max_items, max(1, part_rows)


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
        config: a KernelConfig; None takes the tuned one of the nearest shape (:mod:`mla_cute.tuned`), else a default.
        batch_invariant: cut each request by its own lengths alone, so that its result has the same bits whatever else
            is in the batch. Without `config` takes the default, not a tuned one.
        kv_format, q_fp8, max_kv_len: what the choice of a configuration goes by, as :func:`~mla_cute.plan_decode`.

    Raises:
        TypeError, ValueError: naming the argument. RuntimeError: the device is not Hopper.
    """
    batch = _expect_common(qo_indptr, num_heads, page_size, total_q, causal)
    expect_hints(kv_format, q_fp8, max_kv_len)
    expect_options(config, batch_invariant)
    if num_kv_indices is not None:
        expect_int("num_kv_indices", num_kv_indices, 0)
    expect_metadata("kv_indptr", kv_indptr, (batch + 1,), "[batch + 1]", qo_indptr.device)
    if kv_last_page_len is not None:
        expect_metadata("kv_last_page_len", kv_last_page_len, (batch,), "[batch]", qo_indptr.device)
    return PrefillPlan(
        PrefillPlannerKey("csr" if kv_last_page_len is None else "csr_last", bool(batch_invariant)),
        qo_indptr,
        kv_indptr,
        kv_last_page_len,
        batch=batch,
        num_heads=num_heads,
        page_size=page_size,
        total_q=total_q,
        causal=causal,
        max_room=None if num_kv_indices is None else num_kv_indices * page_size,
        table_stride=0,
        config=config,
        kv_format=kv_format,
        q_fp8=q_fp8,
        max_kv_len=max_kv_len,
    ).update()


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
) -> PrefillPlan:
    """Plan a prefill step of an engine that carries `block_table [batch, max_pages]` and `seq_lens [batch]`.

    Args:
        qo_indptr, num_heads, page_size, total_q, causal, config, batch_invariant, kv_format, q_fp8: as
            :func:`plan_prefill`.
        seq_lens: [batch] int32, keys per request (those of its query tokens included), on the device of qo_indptr.
        max_pages: columns of the block table.
        table_stride: elements between its rows; None: max_pages.
        max_kv_len: as :func:`~mla_cute.plan_decode`; None: max_pages * page_size.

    Raises:
        TypeError, ValueError: naming the argument. RuntimeError: the device is not Hopper.
    """
    batch = _expect_common(qo_indptr, num_heads, page_size, total_q, causal)
    expect_hints(kv_format, q_fp8, max_kv_len)
    expect_options(config, batch_invariant)
    if table_stride is not None:
        expect_int("table_stride", table_stride, 0)
    expect_metadata("seq_lens", seq_lens, (batch,), "[batch]", qo_indptr.device)
    expect_int("max_pages", max_pages, 0)
    return PrefillPlan(
        PrefillPlannerKey("seq_lens", bool(batch_invariant)),
        qo_indptr,
        seq_lens,
        None,
        batch=batch,
        num_heads=num_heads,
        page_size=page_size,
        total_q=total_q,
        causal=causal,
        max_room=max_pages * page_size,
        table_stride=max_pages if table_stride is None else table_stride,
        config=config,
        kv_format=kv_format,
        q_fp8=q_fp8,
        max_kv_len=bounded(max_kv_len, max_pages * page_size),
    ).update()


def _expect_common(qo_indptr: torch.Tensor, num_heads: int, page_size: int, total_q: int, causal: bool) -> int:
    """Returns batch."""
    expect_int("num_heads", num_heads, 1, MAX_HEADS)
    expect_int("page_size", page_size, 1)
    expect_int("total_q", total_q, 0)
    expect_bool("causal", causal)
    return expect_indptr("qo_indptr", qo_indptr, None)
