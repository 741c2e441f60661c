"""Plans: how one decode step is cut into work items, made on the GPU and shared by all layers of the step."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import torch

from . import jit
from .config import KernelConfig, default_config, why_infeasible
from .kernels.registry import (
    BLOCK,
    DECODE,
    FIXED_MAX_PIECES,
    FIXED_MIN_BLOCKS,
    MAX_PARTS,
    MERGE_COL_TILES,
    PART_ROW,
    PLANNER,
    TILE_M,
    DecodeKey,
    PlannerKey,
    box_rows_of,
)
from .problem import MAX_HEADS, DecodeProblem, expect_metadata

_DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
# Merge CTAs that fit an SM: 256 threads of up to 128 registers (kernels/merge.py).
_MERGE_CTAS_PER_SM = 2


def check_enabled() -> bool:
    """MLA_CUTE_CHECK: read when a plan is made, and by calls without one (a look-up costs 0.7 us)."""
    return os.environ.get("MLA_CUTE_CHECK", "0") not in ("", "0")


@functools.lru_cache
def num_sms(device: torch.device) -> int:
    """SMs of a Hopper device; RuntimeError when the device is another architecture."""
    properties = torch.cuda.get_device_properties(device)
    if (properties.major, properties.minor) != (9, 0):
        raise RuntimeError(
            f"mla_cute kernels need a Hopper GPU of compute capability 9.0 (sm_90a); {device} is {properties.name} of "
            f"compute capability {properties.major}.{properties.minor}"
        )
    return properties.multi_processor_count


def _no_kernel(*_: object) -> None:
    raise RuntimeError("plan: made for CPU tensors, which run no kernel")


class DecodePlan:
    """Work items of one decode step. Made by :func:`plan_decode` or :func:`plan_decode_block_table`.

    The plan holds references to the metadata tensors it was made from. :meth:`update` plans again from their present
    contents, into the same buffers, without host synchronisation; it can be captured in a CUDA graph in front of the
    decode calls that use the plan. All calls that share a plan must run on one stream (or be ordered), because they
    share its workspace for partial results.

    Attributes:
        batch, num_heads, page_size: what the plan is for.
        config: the :class:`~mla_cute.config.KernelConfig` the calls will run with.
        batch_invariant: whether a request is cut by its own length alone.
        workspace_bytes: device memory the plan holds.
        verifies: calls with this plan check page ids and lengths on the device (MLA_CUTE_CHECK=1 when it was made).
    """

    __slots__ = (
        "_lengths", "_last_len", "_planner", "_scratch", "_table_stride", "_problem", "_launch", "_block_table",
        "batch", "num_heads", "page_size", "device", "config", "batch_invariant",
        "table", "part", "num_parts", "merge_x", "merge_y", "verifies",
    )  # fmt: skip

    def __init__(
        self,
        key: PlannerKey,
        lengths: torch.Tensor,
        last_len: torch.Tensor | None,
        *,
        batch: int,
        num_heads: int,
        page_size: int,
        max_tokens: int | None,
        table_stride: int,
        config: KernelConfig | None,
    ):
        device = lengths.device
        self.batch, self.num_heads, self.page_size, self.device = batch, num_heads, page_size, device
        self.batch_invariant = key.batch_invariant
        self._lengths, self._last_len, self._table_stride = lengths, last_len, table_stride
        self._block_table = key.lengths == "seq_lens"
        self.verifies = check_enabled()
        self._problem: DecodeProblem | None = None  # the last problem this plan was found fit for, and its launcher
        self._launch: Callable[..., None] = _no_kernel
        if device.type == "cpu":
            self.config = config or KernelConfig()
            return
        sms = num_sms(device)
        self.config = config or default_config(num_heads, page_size, batch, sms)
        if reason := why_infeasible(self.config):
            raise ValueError(f"config: {reason}")
        parts = max(1, min(MAX_PARTS, sms // -(-num_heads // TILE_M)))
        if key.batch_invariant:
            max_items = batch * FIXED_MAX_PIECES
            if max_tokens is not None:
                max_items = min(max_items, batch + max_tokens // (FIXED_MIN_BLOCKS * BLOCK))
            slots = max_items
        else:
            max_items = batch + parts
            slots = 2 * parts
        self.num_parts = parts
        self.table = torch.empty((parts + batch + max_items, 8), dtype=torch.int32, device=device)
        self.part = torch.empty((slots * num_heads, PART_ROW), dtype=torch.float32, device=device)
        self._scratch = torch.empty((4, batch + 1), dtype=torch.int32, device=device)
        ctas = _MERGE_CTAS_PER_SM * sms
        self.merge_y = max(1, min(batch, slots, ctas))
        self.merge_x = max(1, min(num_heads * MERGE_COL_TILES, ctas // self.merge_y))
        self._planner = jit.get(PLANNER, key, self.config.planner_launch())

    @property
    def workspace_bytes(self) -> int:
        if self.device.type == "cpu":
            return 0
        return sum(x.untyped_storage().nbytes() for x in (self.table, self.part, self._scratch))

    def update(self) -> DecodePlan:
        """Plan again from the present contents of the metadata tensors, on the current stream. Returns the plan."""
        if self.device.type == "cuda" and self.batch:
            self._planner(
                self._lengths,
                self._lengths if self._last_len is None else self._last_len,
                self.table,
                self._scratch,
                self.num_parts,
                self.page_size,
                self._table_stride,
                self.num_heads,
                self.config.min_blocks,
                self.config.item_overhead,
                self.config.split_penalty,
            )
        return self

    def launcher(self, problem: DecodeProblem, block_table: bool) -> Callable[..., None]:
        """The compiled decode step for `problem`; ValueError when the plan is for another one or another metadata form.

        `check_decode` returns the same object for the same facts, so a repeated call is one comparison.
        """
        if block_table is not self._block_table:
            made_by = ("plan_decode", "plan_decode_block_table")
            raise ValueError(
                f"plan: expected a plan from {made_by[block_table]}, got one from {made_by[not block_table]}"
            )
        if problem is not self._problem:
            for name in ("batch", "num_heads", "page_size", "device"):
                planned, called = getattr(self, name), getattr(problem, name)
                if planned != called:
                    raise ValueError(f"plan: expected a plan for {name} {called}, got one for {name} {planned}")
            if self.device.type == "cuda":
                key = DecodeKey(_DTYPE_NAMES[problem.dtype], box_rows_of(problem.page_size))
                self._launch = jit.get(DECODE, key, self.config.launch())
            self._problem = problem
        return self._launch


def _expect_int(name: str, value: object, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < least or (most is not None and value > most):
        raise ValueError(f"{name}: expected {f'>= {least}' if most is None else f'{least} to {most}'}, got {value}")


def plan_decode(
    kv_indptr: torch.Tensor,
    *,
    num_heads: int,
    page_size: int,
    kv_last_page_len: torch.Tensor | None = None,
    num_kv_indices: int | None = None,
    config: KernelConfig | None = None,
    batch_invariant: bool = False,
) -> DecodePlan:
    """Plan a decode step from CSR page lists; one plan serves every layer of the step.

    Args:
        kv_indptr: [batch + 1] int32, on the device of the calls.
        num_heads: query heads per request, 1..128.
        page_size: tokens per page, >= 1.
        kv_last_page_len: [batch] int32, tokens in each request's last page; None: last pages are full.
        num_kv_indices: upper bound of kv_indptr[-1]; only bounds the workspace of batch-invariant plans.
        config: a KernelConfig; None chooses the default for the device.
        batch_invariant: cut each request by its own length alone, so that its result has the same bits whatever else
            is in the batch.

    Raises:
        TypeError, ValueError: naming the argument. RuntimeError: the device is not Hopper.
    """
    _expect_int("num_heads", num_heads, 1, MAX_HEADS)
    _expect_int("page_size", page_size, 1)
    expect_metadata("kv_indptr", kv_indptr, (None,), "[batch + 1]", None)
    batch = kv_indptr.shape[0] - 1
    if batch < 0:
        raise ValueError("kv_indptr: expected shape [batch + 1], got [0]")
    if kv_last_page_len is not None:
        expect_metadata("kv_last_page_len", kv_last_page_len, (batch,), "[batch]", kv_indptr.device)
    key = PlannerKey("csr" if kv_last_page_len is None else "csr_last", bool(batch_invariant))
    return DecodePlan(
        key,
        kv_indptr,
        kv_last_page_len,
        batch=batch,
        num_heads=num_heads,
        page_size=page_size,
        max_tokens=None if num_kv_indices is None else num_kv_indices * page_size,
        table_stride=0,
        config=config,
    ).update()


def plan_decode_block_table(
    seq_lens: torch.Tensor,
    *,
    num_heads: int,
    page_size: int,
    max_pages: int,
    table_stride: int | None = None,
    config: KernelConfig | None = None,
    batch_invariant: bool = False,
) -> DecodePlan:
    """Plan a decode step of an engine that carries `block_table [batch, max_pages]` and `seq_lens [batch]`.

    Args:
        seq_lens: [batch] int32, tokens per request, on the device of the calls.
        num_heads, page_size, config, batch_invariant: as :func:`plan_decode`.
        max_pages: columns of the block table.
        table_stride: elements between its rows; None: max_pages.

    Raises:
        TypeError, ValueError: naming the argument. RuntimeError: the device is not Hopper.
    """
    _expect_int("num_heads", num_heads, 1, MAX_HEADS)
    _expect_int("page_size", page_size, 1)
    expect_metadata("seq_lens", seq_lens, (None,), "[batch]", None)
    _expect_int("max_pages", max_pages, 0)
    batch = seq_lens.shape[0]
    return DecodePlan(
        PlannerKey("seq_lens", bool(batch_invariant)),
        seq_lens,
        None,
        batch=batch,
        num_heads=num_heads,
        page_size=page_size,
        max_tokens=batch * max_pages * page_size,
        table_stride=max_pages if table_stride is None else table_stride,
        config=config,
    ).update()
