"""Plans: how one step is cut into work items, made on the GPU and shared by all layers of the step."""

from __future__ import annotations

import functools
import itertools
import os
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from . import jit, shape_log, tuned
from .config import KernelConfig, why_infeasible
from .expect import expect_bool, expect_indptr, expect_int, expect_metadata
from .jit import KernelRef
from .kernels.registry import (
    BLOCK,
    FIXED_MAX_PIECES,
    FIXED_MIN_BLOCKS,
    KV_FORMATS,
    PART_ROW,
    PLANNER,
    PlannerKey,
)
from .problem import MAX_HEADS, DecodeProblem
from .problem_prefill import PrefillProblem
from .steps import decode_parts, step_variant

if TYPE_CHECKING:
    from typing_extensions import Self

_DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
# Merge CTAs that fit an SM: 256 threads of up to 128 registers (kernels/merge.py).
_MERGE_CTAS_PER_SM = 2
# Those that have work when a row has 65 to 128 pieces: 4 tasks of all their warps.
_MERGE_CTAS_PER_ROW = 4


def check_enabled() -> bool:
    """MLA_CUTE_CHECK: read when a plan is made, and by calls without one (a look-up costs 0.7 us)."""
    return os.environ.get("MLA_CUTE_CHECK", "0") not in ("", "0")


@functools.lru_cache
def num_sms(device: torch.device) -> int:
    """SMs of a Hopper device; RuntimeError when the device is another architecture."""
    if device.type != "cuda":
        raise ValueError(f"device: expected tensors on a cuda device or the cpu, got device {device}")
    properties = torch.cuda.get_device_properties(device)
    if (properties.major, properties.minor) != (9, 0):
        raise RuntimeError(
            f"mla_cute kernels need a Hopper GPU of compute capability 9.0 (sm_90a); {device} is {properties.name} of "
            f"compute capability {properties.major}.{properties.minor}"
        )
    return properties.multi_processor_count


def _no_kernel(*_: object) -> None:
    raise RuntimeError("plan: made for CPU tensors, which run no kernel")


class Plan:
    """What decode's and prefill's plans share: the workspace, and which calls they are fit for."""

    __slots__ = (
        "_planner", "_planner_args", "_scratch", "_table_stride", "_problem", "_launch", "_block_table",
        "__weakref__", "handle",
        "batch", "num_heads", "page_size", "device", "config", "selection", "batch_invariant",
        "table", "part", "num_parts", "merge_x", "merge_y", "grid", "has_work", "verifies",
    )  # fmt: skip

    # What a plan is for, and which facts of its problems have to be its own. Lengths and sizes are cut alike for every
    # kind of cache.
    _op: ClassVar[str]
    _problem_type: ClassVar[type[DecodeProblem | PrefillProblem]]
    _facts: ClassVar[tuple[str, ...]] = ("batch", "num_heads", "page_size", "device")

    # The step's row tiles run over (token, head) rows, which the queries' strides have to allow.
    packs_rows: ClassVar[bool] = False

    # The planner's arguments, its outputs among them; they keep the metadata tensors alive.
    _planner_args: tuple[torch.Tensor | int, ...]

    grid: tuple[int, ...]  # the step's launch arguments between its tensors and its scales

    def __init__(
        self,
        device: torch.device,
        *,
        block_table: bool,
        batch_invariant: bool,
        batch: int,
        num_heads: int,
        page_size: int,
        table_stride: int,
    ):
        self.batch, self.num_heads, self.page_size, self.device = batch, num_heads, page_size, device
        self.batch_invariant = batch_invariant
        self.selection: tuned.Selection | None = None
        self.handle = next(_handles)
        _alive[self.handle] = self
        self._table_stride, self._block_table = table_stride, block_table
        self.verifies = check_enabled()
        self.has_work = self.device.type == "cuda" and batch > 0
        # the last problem this plan was found fit for, and its launcher
        self._problem: DecodeProblem | PrefillProblem | None = None
        self._launch: Callable[..., None] = _no_kernel

    def _choose_config(
        self, config: KernelConfig | None, q_len: int, kv_format: str, q_fp8: bool, kv_len: int | None
    ) -> int:
        """Sets the configuration; returns the SMs of the device. `kv_len`: no request has more keys (None: unknown)."""
        sms = num_sms(self.device)
        # A batch of none is one of 1 here.
        batch, q_len, kv_len = self.batch or 1, q_len or 1, 1 if kv_len == 0 else kv_len
        facts = (self._op, kv_format, q_fp8, self.num_heads, self.page_size, q_len, batch, kv_len)
        if shape_log.recorder is not None:
            shape_log.recorder.saw(facts)
        if config is None:
            self.selection = tuned.choose(*facts, self.device, self.batch_invariant)
            self.config = self.selection.config
        else:
            self.config = config
        return sms

    def _allocate(
        self,
        planner: KernelRef,
        key: Any,
        *,
        sms: int,
        parts: int,
        max_entries: int,
        max_items: int,
        part_rows: int,
        scratch_rows: int,
        entries_at_once: int,
        rows_per_entry: int,
    ) -> None:
        """Buffers for `parts` work lists, `max_entries` merge entries, `max_items` items and `part_rows` partial rows.

        `entries_at_once`: merge entries beyond which the merge kernel's grid does not grow.
        """
        self.num_parts = parts
        self.table = torch.empty((parts + max_entries + max_items, 8), dtype=torch.int32, device=self.device)
        self.part = torch.empty((part_rows, PART_ROW), dtype=torch.float32, device=self.device)
        self._scratch = torch.empty((scratch_rows, self.batch + 1), dtype=torch.int32, device=self.device)
        ctas = _MERGE_CTAS_PER_SM * sms
        self.merge_y = max(1, min(max_entries, entries_at_once, ctas))
        self.merge_x = max(1, min(rows_per_entry * _MERGE_CTAS_PER_ROW, ctas // self.merge_y))
        self._planner = jit.get(planner, key, self.config.planner_launch())

    def _cut_costs(self) -> tuple[int, int, int]:
        return self.config.min_blocks, self.config.item_overhead, self.config.split_penalty

    def update(self) -> Self:
        """Plan again from the present contents of the metadata tensors, on the current stream. Returns the plan."""
        if self.has_work:
            self._planner(*self._planner_args)
        return self

    @property
    def workspace_bytes(self) -> int:
        if self.device.type == "cpu":
            return 0
        return sum(x.untyped_storage().nbytes() for x in (self.table, self.part, self._scratch))

    def launcher(self, problem: DecodeProblem | PrefillProblem, block_table: bool) -> Callable[..., None]:
        """The compiled step for `problem`; ValueError when the plan is for another one or another metadata form.

        The checks return the same object for the same facts, so a repeated call is two comparisons.
        """
        if problem is not self._problem or block_table is not self._block_table:
            self._launch = self._step_of(problem, block_table)
            self._problem = problem
        return self._launch

    def _step_of(self, problem: DecodeProblem | PrefillProblem, block_table: bool) -> Callable[..., None]:
        wanted, made_by = problem.planned_by[block_table], self._problem_type.planned_by[self._block_table]
        if wanted != made_by:
            raise ValueError(f"plan: expected a plan from {wanted}, got one from {made_by}")
        for name in self._facts:
            planned, called = getattr(self, name), getattr(problem, name)
            if planned != called:
                raise ValueError(f"plan: expected a plan for {name} {called}, got one for {name} {planned}")
        if self.device.type == "cpu":
            return _no_kernel
        variant = step_variant(
            self._op, problem.kv_format, problem.q_fp8, problem.num_heads, problem.page_size,
            _DTYPE_NAMES[problem.dtype], self.config,
        )  # fmt: skip
        return jit.get(*variant)


# What stands for a plan in a torch op (ops.py); never used twice.
_handles = itertools.count(1)
_alive: weakref.WeakValueDictionary[int, Plan] = weakref.WeakValueDictionary()


def plan_of(handle: int) -> Plan:
    """ValueError when it is gone."""
    if (plan := _alive.get(handle)) is None:
        raise ValueError(f"plan: expected the handle of a plan that is alive, got {handle}")
    return plan


class DecodePlan(Plan):
    """Work items of one decode step. Made by :func:`plan_decode` or :func:`plan_decode_block_table`.

    The plan holds references to the metadata tensors it was made from. :meth:`update` plans again from their present
    contents, into the same buffers, without host synchronisation; it can be captured in a CUDA graph in front of the
    decode calls that use the plan. All calls that share a plan must run on one stream (or be ordered), because they
    share its workspace for partial results.

    Attributes:
        batch, num_heads, page_size: what the plan is for.
        config: the :class:`~mla_cute.config.KernelConfig` the calls will run with.
        selection: the :class:`~mla_cute.tuned.Selection` that config is from; None when it was given, and on the CPU.
        batch_invariant: whether a request is cut by its own length alone.
        workspace_bytes: device memory the plan holds.
        verifies: calls with this plan check page ids and lengths on the device (MLA_CUTE_CHECK=1 when it was made).
    """

    __slots__ = ()

    _op = "decode"
    _problem_type = DecodeProblem

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
        if self.device.type == "cpu":
            self.config = config or KernelConfig()
            return
        sms = self._choose_config(config, 1, kv_format, q_fp8, max_kv_len)
        parts = decode_parts(kv_format, num_heads, self.config, sms)
        if key.batch_invariant:
            max_items = batch * FIXED_MAX_PIECES
            if max_tokens is not None:
                max_items = min(max_items, batch + max_tokens // (FIXED_MIN_BLOCKS * BLOCK))
            slots = max_items
        else:
            max_items = batch + parts
            slots = 2 * parts
        self._allocate(
            PLANNER,
            key,
            sms=sms,
            parts=parts,
            max_entries=batch,
            max_items=max_items,
            part_rows=slots * num_heads,
            scratch_rows=4,
            entries_at_once=slots,
            rows_per_entry=num_heads,
        )
        self.grid = (self.num_parts, self.merge_x, self.merge_y)
        self._planner_args = (
            lengths,
            lengths if last_len is None else last_len,
            self.table,
            self._scratch,
            parts,
            page_size,
            table_stride,
            num_heads,
            *self._cut_costs(),
            self.config.cut_unit,
        )


def expect_plan(plan: object) -> None:
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a plan or None, got {type(plan).__name__}")


def expect_options(config: KernelConfig | None, batch_invariant: bool) -> None:
    """What plans, and calls that plan, are told beside shapes."""
    expect_bool("batch_invariant", batch_invariant)
    if config is None:
        return
    if not isinstance(config, KernelConfig):
        raise TypeError(f"config: expected a KernelConfig or None, got {type(config).__name__}")
    if reason := why_infeasible(config):
        raise ValueError(f"config: {reason}")


def expect_hints(kv_format: str, q_fp8: bool, max_kv_len: int | None) -> None:
    if not kv_format == "" and kv_format not in KV_FORMATS:
        raise ValueError(f"kv_format: expected one of {('', *KV_FORMATS)}, got {kv_format!r}")
    expect_bool("q_fp8", q_fp8)
    if q_fp8 and not kv_format:
        raise ValueError("q_fp8: expected False with a 16-bit cache (kv_format ''), got True")
    if max_kv_len is not None:
        expect_int("max_kv_len", max_kv_len, 0)


def bounded(max_kv_len: int | None, room: int) -> int:
    """Tokens that no request has more of, where a block table has room for `room`."""
    return room if max_kv_len is None else min(max_kv_len, room)


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
) -> DecodePlan:
    """Plan a decode step from CSR page lists; one plan serves every layer of the step.

    Args:
        kv_indptr: [batch + 1] int32, on the device of the calls.
        num_heads: query heads per request, 1..128.
        page_size: tokens per page, >= 1.
        kv_last_page_len: [batch] int32, tokens in each request's last page; None: last pages are full.
        num_kv_indices: upper bound of kv_indptr[-1]; only bounds the workspace of batch-invariant plans.
        config: a KernelConfig; None takes the tuned one of the nearest shape (:mod:`mla_cute.tuned`), else a default.
        batch_invariant: cut each request by its own length alone, so that its result has the same bits whatever else
            is in the batch. Without `config` takes the default, not a tuned one.
        kv_format, q_fp8: what the choice of a configuration goes by: "" for a 16-bit cache, else "tensor", "token" or
            "group", and whether queries are e4m3. The plan serves other calls as well.
        max_kv_len: likewise: tokens that no request has more of, as far as the host knows; None: not known. Longer
            requests are computed correctly.

    Raises:
        TypeError, ValueError: naming the argument. RuntimeError: the device is not Hopper.
    """
    expect_int("num_heads", num_heads, 1, MAX_HEADS)
    expect_int("page_size", page_size, 1)
    expect_hints(kv_format, q_fp8, max_kv_len)
    expect_options(config, batch_invariant)
    if num_kv_indices is not None:
        expect_int("num_kv_indices", num_kv_indices, 0)
    batch = expect_indptr("kv_indptr", kv_indptr, None)
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
        kv_format=kv_format,
        q_fp8=q_fp8,
        max_kv_len=max_kv_len,
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
    kv_format: str = "",
    q_fp8: bool = False,
    max_kv_len: int | None = None,
) -> DecodePlan:
    """Plan a decode step of an engine that carries `block_table [batch, max_pages]` and `seq_lens [batch]`.

    Args:
        seq_lens: [batch] int32, tokens per request, on the device of the calls.
        num_heads, page_size, config, batch_invariant, kv_format, q_fp8: as :func:`plan_decode`.
        max_pages: columns of the block table.
        table_stride: elements between its rows; None: max_pages.
        max_kv_len: as :func:`plan_decode`; None: max_pages * page_size.

    Raises:
        TypeError, ValueError: naming the argument. RuntimeError: the device is not Hopper.
    """
    expect_int("num_heads", num_heads, 1, MAX_HEADS)
    expect_int("page_size", page_size, 1)
    expect_metadata("seq_lens", seq_lens, (None,), "[batch]", None)
    expect_int("max_pages", max_pages, 0)
    expect_hints(kv_format, q_fp8, max_kv_len)
    expect_options(config, batch_invariant)
    if table_stride is not None:
        expect_int("table_stride", table_stride, 0)
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
        kv_format=kv_format,
        q_fp8=q_fp8,
        max_kv_len=bounded(max_kv_len, max_pages * page_size),
    ).update()
