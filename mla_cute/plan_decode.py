"""Plans of decode steps: requests of one query token each, cut along the keys where that balances."""

from __future__ import annotations

import functools

import torch

from .call import DECODE, DECODE_TABLE, Pages
from .compile import jit
from .config import KernelConfig
from .dims import BLOCK, PART_ROW
from .expect import expect_bool, expect_indptr, expect_int, expect_metadata
from .kernels.keys import FIXED_MAX_PIECES, FIXED_MIN_BLOCKS, PLANNER, PlannerKey
from .kernels.registry import decode_parts
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

_SCRATCH_ROWS = 4


class DecodePlan(Plan):
    """Work items of one decode step. Made by :func:`plan_decode` or :func:`plan_decode_block_table`.

    The plan holds references to the metadata tensors it was made from. :meth:`update` plans again from their present
    contents, into the same buffers, without host synchronisation; it can be captured in a CUDA graph in front of the
    decode calls that use the plan. All calls that share a plan must run on one stream (or be ordered), because they
    share its workspace for partial results.

    Attributes:
        batch, num_heads, page_size: what the plan is for.
        config: the :class:`~mla_cute.config.KernelConfig` the calls will run with.
        selection: the :class:`~mla_cute.tuned.select.Selection` that config is from; None when it was given, and on the
            CPU.
        batch_invariant: whether a request is cut by its own length alone.
        other_metadata: calls may be given other metadata tensors than the plan was made from.
        workspace_bytes: device memory the plan holds.
        verifies: calls with this plan check page ids and lengths on the device (MLA_CUTE_CHECK=1 when it was made);
            calls on CPU tensors do so always.
    """

    __slots__ = ()

    def __init__(self, wanted: Wanted):
        super().__init__(wanted)
        if self.device.type == "cpu":
            self.config = wanted.config or KernelConfig()
            return
        sms = self._choose_config(wanted, 1)
        config, num_heads = self.config, wanted.num_heads
        parts = decode_parts(wanted.kv_format, num_heads, config, sms)
        self._planner = jit.get(PLANNER, planner_key(PlannerKey, wanted), config.planner_launch())
        numbers = (
            parts, wanted.page_size, wanted.table_stride, num_heads, *self._cut_costs(), config.cut_unit,
        )  # fmt: skip
        if wanted.batch_invariant:
            layout = _invariant_layout(wanted.batch, sms, numbers, wanted.room, self.form.by_table)
        else:
            layout = _layout(wanted.batch, sms, numbers)
        self._allocate(layout, wanted.partials)


@functools.lru_cache(maxsize=4096)
def _layout(batch: int, num_sms: int, numbers: tuple[int, ...]) -> Layout:
    """`numbers`: the planner's, the number of parts first."""
    parts, _, _, num_heads, *_ = numbers
    slots = 2 * parts
    grid = (parts, *merge_grid(num_sms, batch, slots, num_heads))
    rows = parts + batch + batch + parts  # parts, merge entries, items
    return Layout((RoundLayout(0, batch, rows, grid, numbers),), slots * num_heads, _SCRATCH_ROWS)


@functools.lru_cache(maxsize=4096)
def _invariant_layout(batch: int, num_sms: int, numbers: tuple[int, ...], room: int | None, each: bool) -> Layout:
    """As `_layout`; `room` as `_invariant_items`."""
    parts, _, _, num_heads, *_ = numbers
    slots, per_round = _invariant_items(batch, num_heads, room, each)
    rounds = []
    for begin, end in rounds_of(batch, per_round):
        n = end - begin
        items = slots if n == per_round else _invariant_items(n, num_heads, room, each)[0]
        grid = (parts, *merge_grid(num_sms, n, items, num_heads))
        rounds.append(RoundLayout(begin, end, parts + n + items, grid, numbers))
    return Layout(tuple(rounds), slots * num_heads, _SCRATCH_ROWS)


def _invariant_items(batch: int, num_heads: int, room: int | None, each: bool) -> tuple[int, int]:
    """(items of a round, requests of a round) of a batch-invariant decode plan. A request of n tokens is cut into
    FIXED_MAX_PIECES pieces at most, of FIXED_MIN_BLOCKS blocks or more, so a request of one piece has no partial rows.
    `room` is for `each` request, or for all; None: not known."""
    least = FIXED_MIN_BLOCKS * BLOCK
    pieces = FIXED_MAX_PIECES if room is None else max(1, min(FIXED_MAX_PIECES, -(-room // least)))
    most = MOST_PARTIAL_BYTES // (4 * PART_ROW) // num_heads

    def items(n: int) -> int:
        found = n * pieces
        if room is not None and not each:
            found = min(found, n + room // least)
        return found

    if items(batch) <= max(most, pieces):
        return items(batch), max(batch, 1)
    per_round = max(1, most // pieces)
    return items(per_round), per_round


def plan_decode(
    kv_indptr: torch.Tensor,
    *,
    num_heads: int,
    page_size: int,
    kv_last_page_len: torch.Tensor | None = None,
    num_kv_indices: int | None = None,
    config: KernelConfig | None = None,
    batch_invariant: bool = False,
    kv_format: str = "",
    q_fp8: bool = False,
    max_kv_len: int | None = None,
    other_metadata: bool = False,
) -> DecodePlan:
    """Plan a decode step from CSR page lists; one plan serves every layer of the step.

    Args:
        kv_indptr: [batch + 1] int32, on the device of the calls.
        num_heads: query heads per request, 1..128.
        page_size: tokens per page, >= 1.
        kv_last_page_len: [batch] int32, tokens in each request's last page; None: last pages are full.
        num_kv_indices: upper bound of kv_indptr[-1]; only bounds the workspace of batch-invariant plans.
        config: a KernelConfig; None takes the tuned one of the nearest shape (:mod:`mla_cute.tuned.select`), else a
            default.
        batch_invariant: cut each request by its own length alone, so that its result has the same bits whatever else
            is in the batch. Without `config` takes the default, not a tuned one.
        kv_format, q_fp8: what the choice of a configuration goes by: "" for a 16-bit cache, else "tensor", "token" or
            "group", and whether queries are e4m3. The plan serves other calls as well.
        max_kv_len: likewise: tokens that no request has more of, as far as the host knows; None: not known. Longer
            requests are computed correctly.
        other_metadata: a call reads lengths from its plan and page ids from its own arguments. It has to be given the
            tensors that the plan was made from, unless this is True: then it may be given others of their shapes, and
            what these hold is not looked at.

    Raises:
        TypeError, ValueError: naming the argument. RuntimeError: the device is not Hopper.

    A plan holds partial rows of what it cuts, at most 39 MB. Batch-invariant ones cut every request by its own length,
    and would need up to 2.4 MB for each of 128 heads; beyond 512 MiB their requests are run in rounds that share that
    much, each with launches of its own.
    """
    expect_sizes(num_heads, page_size)
    expect_hints(kv_format, q_fp8, max_kv_len)
    expect_options(config, batch_invariant)
    expect_bool("other_metadata", other_metadata)
    if num_kv_indices is not None:
        expect_int("num_kv_indices", num_kv_indices, 0)
    batch = expect_indptr("kv_indptr", kv_indptr, None)
    expect_rows("kv_indptr", batch, num_heads)
    if kv_last_page_len is not None:
        expect_metadata("kv_last_page_len", kv_last_page_len, (batch,), "[batch]", kv_indptr.device)
    room = None if num_kv_indices is None else num_kv_indices * page_size
    wanted = Wanted(
        Pages(DECODE, kv_indptr, None, kv_last_page_len), batch, batch, num_heads, page_size, room, 0, max_kv_len,
        kv_format, q_fp8, config, batch_invariant, other_metadata,
    )  # fmt: skip
    return DecodePlan(wanted)._register().update()


def plan_decode_block_table(
    seq_lens: torch.Tensor,
    *,
    num_heads: int,
    page_size: int,
    max_pages: int,
    table_stride: int | None = None,
    config: KernelConfig | None = None,
    batch_invariant: bool = False,
    kv_format: str = "",
    q_fp8: bool = False,
    max_kv_len: int | None = None,
    other_metadata: bool = False,
    partials: torch.Tensor | None = None,
) -> DecodePlan:
    """Plan a decode step of an engine that carries `block_table [batch, max_pages]` and `seq_lens [batch]`.

    Args:
        seq_lens: [batch] int32, tokens per request, on the device of the calls.
        num_heads, page_size, config, batch_invariant, kv_format, q_fp8, other_metadata: as :func:`plan_decode`.
        max_pages: columns of the block table.
        table_stride: elements between its rows, >= max_pages; None: max_pages.
        max_kv_len: as :func:`plan_decode`; None: max_pages * page_size.
        partials: `part` of another plan, to write partial rows to if it has enough of them; else the plan has its own.
            Steps of plans that share it run one after another.

    Raises:
        TypeError, ValueError: naming the argument. RuntimeError: the device is not Hopper.
    """
    expect_sizes(num_heads, page_size)
    expect_metadata("seq_lens", seq_lens, (None,), "[batch]", None)
    batch = seq_lens.shape[0]
    expect_rows("seq_lens", batch, num_heads)
    table_stride = expect_table(batch, max_pages, table_stride)
    expect_hints(kv_format, q_fp8, max_kv_len)
    expect_options(config, batch_invariant)
    expect_bool("other_metadata", other_metadata)
    expect_partials(partials)
    room = max_pages * page_size
    wanted = Wanted(
        Pages(DECODE_TABLE, seq_lens), batch, batch, num_heads, page_size, room, table_stride,
        bounded(max_kv_len, room), kv_format, q_fp8, config, batch_invariant, other_metadata,
        partials=partials,
    )  # fmt: skip
    return DecodePlan(wanted)._register().update()
