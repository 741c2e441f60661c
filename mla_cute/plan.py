"""Plans: how one step is cut into work items, made on the GPU and shared by all layers of the step."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn

import torch

from .allocate import empty
from .call import Form, Pages
from .check import DTYPE_NAMES, MAX_PAGE_SIZE, Problem
from .check_device import Finding, first_of
from .compile import jit
from .config import KernelConfig, expect_types, why_infeasible
from .dims import KV_FORMATS, MAX_HEADS, PART_ROW
from .expect import expect_bool, expect_int
from .kernels.registry import Variant, has_few_rows, step_variant
from .tuned import select, shape_log

if TYPE_CHECKING:
    from typing_extensions import Self

# Merge CTAs that fit an SM: 256 threads of up to 128 registers (kernels/merge.py).
_MERGE_CTAS_PER_SM = 2
# Those that have work when a row has 65 to 128 pieces: 4 tasks of all their warps.
_MERGE_CTAS_PER_ROW = 4
# Beyond that many bytes of partial rows a batch-invariant plan runs its requests in rounds. The most that other plans
# have is 39 MB.
MOST_PARTIAL_BYTES = 512 << 20
# The kernels count rows, tiles and entries of a block table in 32 bits.
_MOST_ROWS = 2**31 - 1


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


class RoundLayout(NamedTuple):
    """What requests begin .. end - 1 of a plan take: one run of the planner, and in every layer one of main and merge
    kernel."""

    begin: int
    end: int
    table_rows: int
    grid: tuple[int, ...]  # the step's launch arguments between its tensors and its scales
    numbers: tuple[int, ...]  # the planner's arguments behind its tensors


class Layout(NamedTuple):
    """What a plan of certain sizes takes, whatever its metadata hold."""

    rounds: tuple[RoundLayout, ...]  # one, but for batch-invariant plans of many requests
    part_rows: int
    scratch_rows: int


class Round(NamedTuple):
    """A round with its buffers."""

    begin: int
    end: int
    table: torch.Tensor
    scratch: torch.Tensor
    grid: tuple[int, ...]
    planner_args: tuple[torch.Tensor | int, ...]


def rounds_of(batch: int, per_round: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of the requests of each round; one round where there are none."""
    for begin in range(0, max(batch, 1), per_round):
        yield begin, min(begin + per_round, batch)


def planner_reads(pages: Pages | tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    """[qo_indptr,] lengths, last page lengths. The planner looks at the last only where there are some; where there are
    none, lengths stand for them."""
    _, lengths, _, last_len, queries, _ = pages
    last = lengths if last_len is None else last_len
    return (lengths, last) if queries is None else (queries, lengths, last)


def merge_grid(num_sms: int, max_entries: int, entries_at_once: int, rows_per_entry: int) -> tuple[int, int]:
    """(x, y) of the merge kernel. `entries_at_once`: merge entries beyond which it does not grow."""
    ctas = _MERGE_CTAS_PER_SM * num_sms
    y = max(1, min(max_entries, entries_at_once, ctas))
    return max(1, min(rows_per_entry * _MERGE_CTAS_PER_ROW, ctas // y)), y


class Wanted(NamedTuple):
    """What a plan is made for.

    Attributes:
        pages: the metadata; page ids do not matter.
        room: tokens that page lists have room for, of all requests together or of each row of a block table; None: not
            known.
        table_stride: elements between the rows of a block table; 0 with page lists.
        max_kv_len: tokens that no request has more of; None: not known.
        max_q_len: query tokens that no request has more of; None: not known, or decode.
        verifies: as MLA_CUTE_CHECK says; None reads it.
        partials: where to write partial rows, if there is room for them.
    """

    pages: Pages
    batch: int
    total_q: int
    num_heads: int
    page_size: int
    room: int | None
    table_stride: int
    max_kv_len: int | None
    kv_format: str
    q_fp8: bool
    config: KernelConfig | None
    batch_invariant: bool
    other_metadata: bool
    verifies: bool | None = None
    partials: torch.Tensor | None = None
    max_q_len: int | None = None


class Plan:
    """What decode's and prefill's plans share: the workspace, and which calls they are fit for."""

    __slots__ = (
        "_planner", "_table_stride", "_problem", "_launch", "_pages", "_planned", "_again",
        "_table", "_spare_pages", "__weakref__", "handle",
        "batch", "num_heads", "page_size", "max_q_len", "device", "config", "selection", "batch_invariant",
        "other_metadata",
        "part", "rounds", "has_work", "verifies",
    )  # fmt: skip

    # Which facts of its problems have to be a plan's own. Lengths and sizes are cut alike for every kind of cache.
    _facts: ClassVar[tuple[str, ...]] = ("batch", "num_heads", "page_size", "device")

    # The step's row tiles run over (token, head) rows, which the queries' strides have to allow.
    packs_rows: ClassVar[bool] = False

    _planner: Callable[..., None]
    part: torch.Tensor
    rounds: tuple[Round, ...]  # none on the CPU

    def __init__(self, wanted: Wanted):
        self.batch, self.num_heads, self.page_size = wanted.batch, wanted.num_heads, wanted.page_size
        self.max_q_len = wanted.max_q_len
        self._pages = wanted.pages
        self.device = self._pages.lengths.device
        self.batch_invariant, self.other_metadata = wanted.batch_invariant, wanted.other_metadata
        self.selection: select.Selection | None = None
        self.handle = 0
        self._table_stride = wanted.table_stride
        self._spare_pages = False  # as check_device.verify, which calls with this plan hand it to
        self.verifies = check_enabled() if wanted.verifies is None else wanted.verifies
        self.has_work = self.device.type == "cuda" and self.batch > 0
        self.rounds = ()
        # Copies of what the plan was last made from, where calls look at values.
        self._planned: dict[str, torch.Tensor] | None = None
        if self.verifies or self.device.type == "cpu":
            self._planned = {name: x.clone() for name, x in self._pages.metadata().items() if x is not None}
        # the last problem this plan was found fit for, and its launcher; the short way of the calls behind it
        self._problem: Problem | None = None
        self._launch: Callable[..., None] = _no_kernel
        self._again: Callable[..., tuple[torch.Tensor, torch.Tensor] | None] | None = None
        # the last block table, and its memory as a list
        self._table: tuple[Any, Any] = (None, None)

    @property
    def form(self) -> Form:
        """Of the calls that it is for."""
        return self._pages.form

    @property
    def has_few_rows(self) -> bool:
        """No row tile of prefill has more than 32 rows, and the kernel may go by it. It has other bits, so it may not
        where a request's bits are its own: what a caller promises may be what the batch at hand has."""
        if self.batch_invariant or self.max_q_len is None:
            return False
        return has_few_rows(self.form.op, self.num_heads, self.max_q_len)

    def _register(self) -> Self:
        """Give the plan a handle, by which it passes through a torch op."""
        self.handle = next(_handles)
        _alive[self.handle] = self
        return self

    def __repr__(self) -> str:
        names = (*(name for name in self._facts if name != "device"), "device", "batch_invariant", "workspace_bytes")
        facts = [f"{name}={getattr(self, name)}" for name in names]
        facts.insert(-2, f"block_table={self.form.by_table}")
        return f"{type(self).__name__}({', '.join(facts)})"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__}: a plan cannot be copied or pickled, it is work in the memory of one process; "
            "make one from the same metadata"
        )

    def _choose_config(self, wanted: Wanted, q_len: int) -> int:
        """Sets the configuration; returns the SMs of the device."""
        sms = num_sms(self.device)
        # A batch of none is one of 1 here.
        batch, q_len, kv_len = self.batch or 1, q_len or 1, 1 if wanted.max_kv_len == 0 else wanted.max_kv_len
        op, page_size = self.form.op, self.page_size
        if op == "sparse":
            page_size = 1  # each token is a page
        facts = (op, wanted.kv_format, wanted.q_fp8, self.num_heads, page_size, q_len, batch, kv_len)
        if shape_log.recorder is not None:
            shape_log.recorder.saw(facts)
        if wanted.config is None:
            self.selection = select.choose(*facts, self.device, self.batch_invariant)
            if self.has_few_rows:
                self.selection = dataclasses.replace(self.selection, few_rows=True)
            self.config = self.selection.config
        else:
            self.config = wanted.config
        return sms

    def _allocate(self, layout: Layout, partials: torch.Tensor | None) -> None:
        device = self.device
        rounds = []
        for begin, end, table_rows, grid, numbers in layout.rounds:
            table = empty((table_rows, 8), torch.int32, device)
            scratch = empty((layout.scratch_rows, end - begin + 1), torch.int32, device)
            read = planner_reads(self._pages if end - begin == self.batch else self._pages.cut(begin, end))
            rounds.append(Round(begin, end, table, scratch, grid, (*read, table, scratch, *numbers)))
        self.rounds = tuple(rounds)
        if partials is None or partials.shape[0] < layout.part_rows or partials.device != device:
            partials = empty((layout.part_rows, PART_ROW), torch.float32, device)
        self.part = partials

    @property
    def num_parts(self) -> int:
        """Work lists."""
        return self.grid[0]

    @property
    def grid(self) -> tuple[int, ...]:
        return self.rounds[0].grid

    @property
    def table(self) -> torch.Tensor:
        """Of the first round; kernels/planner/decode.py and kernels/planner/prefill.py say what is in it."""
        return self.rounds[0].table

    @property
    def merge_x(self) -> int:
        return self.grid[-2]

    @property
    def merge_y(self) -> int:
        return self.grid[-1]

    @property
    def _planner_args(self) -> tuple[torch.Tensor | int, ...]:
        return self.rounds[0].planner_args

    # -------------------------------------------------------------------------------------------- metadata

    def expect_pages(self, pages: Pages) -> None:
        """ValueError when a call's metadata are other tensors than the plan was made from. Reads addresses only."""
        called = pages.metadata().values()
        for (name, planned), x in zip(self._pages.metadata().items(), called, strict=True):
            if x is planned:
                continue
            if x is None or planned is None:
                made, got = ("with", "None") if x is None else ("without", "a tensor")
                raise ValueError(
                    f"{name}: expected {'a tensor' if x is None else 'None'}, the plan was made {made} it, got {got}"
                )
            if not self.other_metadata and x.data_ptr() != planned.data_ptr():
                raise ValueError(
                    f"{name}: expected the tensor that the plan was made from (at {planned.data_ptr():#x}), got "
                    f"another (at {x.data_ptr():#x}), not whose lengths it has; other_metadata=True takes any"
                )

    def has(self, x: torch.Tensor | None, planned: torch.Tensor | None) -> bool:
        """Whether `x` may stand for the metadata tensor `planned`: its memory, or with other_metadata its shape."""
        if x is None or planned is None or x.shape != planned.shape or x.dtype is not torch.int32:
            return False
        return self.other_metadata or (x.data_ptr() == planned.data_ptr() and x.stride() == planned.stride())

    def planned(self, pages: Pages) -> Pages:
        """A call's pages with the lengths that the plan keeps, where it does: what the call is computed from, whatever
        its own metadata tensors hold by now."""
        return pages if self._planned is None else pages.with_metadata(self._planned)

    def stale_findings(self) -> list[Finding]:
        """Whether metadata changed since the plan was made or updated."""
        assert self._planned is not None
        now = self._pages.metadata()
        return [_changed(name, now[name], planned) for name, planned in self._planned.items()]

    def _cut_costs(self) -> tuple[int, int, int]:
        return self.config.min_blocks, self.config.item_overhead, self.config.split_penalty

    def update(self) -> Self:
        """Plan again from the present contents of the metadata tensors, on the current stream. Returns the plan."""
        if self._planned is not None:
            now = self._pages.metadata()
            for name, planned in self._planned.items():
                planned.copy_(now[name])
        if self.has_work:
            for of_round in self.rounds:
                self._planner(*of_round.planner_args)
        return self

    @property
    def workspace_bytes(self) -> int:
        buffers = [x for of_round in self.rounds for x in (of_round.table, of_round.scratch)]
        return sum(x.untyped_storage().nbytes() for x in (*buffers, self.part)) if buffers else 0

    def launcher(self, problem: Problem, form: Form) -> Callable[..., None]:
        """The compiled step for `problem`; ValueError when the plan is for another one or another form of metadata.

        The checks return the same object for the same facts, so a repeated call is two comparisons.
        """
        if problem is not self._problem or form is not self.form:
            self._launch = self._step_of(problem, form)
            self._problem = problem
        return self._launch

    def _step_of(self, problem: Problem, form: Form) -> Callable[..., None]:
        if form is not self.form:
            raise ValueError(f"plan: expected a plan from plan_{form.name}, got one from plan_{self.form.name}")
        for name in self._facts:
            planned, called = getattr(self, name), getattr(problem, name)
            if planned != called:
                raise ValueError(f"plan: expected a plan for {name} {called}, got one for {name} {planned}")
        if self.device.type == "cpu":
            return _no_kernel
        return self._compiled(problem)

    def _compiled(self, problem: Problem) -> Callable[..., None]:
        return jit.get(*self._variant(problem))

    def _variant(self, problem: Problem) -> Variant:
        return step_variant(
            problem.op, problem.kv_format, problem.q_fp8, problem.num_heads, problem.page_size,
            DTYPE_NAMES[problem.dtype], self.config, problem.dims, self.has_few_rows,
        )  # fmt: skip


# What stands for a plan in a torch op (ops.py); never used twice.
_handles = itertools.count(1)
_alive: weakref.WeakValueDictionary[int, Plan] = weakref.WeakValueDictionary()


def plan_of(handle: int) -> Plan:
    """ValueError when it is gone."""
    if (plan := _alive.get(handle)) is None:
        raise ValueError(f"plan: expected the handle of a plan that is alive, got {handle}")
    return plan


def _changed(name: str, x: torch.Tensor, planned: torch.Tensor) -> Finding:
    return (
        first_of(x != planned, x),
        lambda at, value: (
            f"plan: expected {name} as at its last update (plan.update() plans again), got {value} at position {at}"
        ),
    )


def planner_key(kind: Callable[[str, bool], Any], wanted: Wanted) -> Any:
    pages = wanted.pages
    lengths = "seq_lens" if pages.form.by_table else "csr" if pages.last_len is None else "csr_last"
    return kind(lengths, wanted.batch_invariant)


def expect_plan(plan: object) -> None:
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a plan or None, got {type(plan).__name__}")


def expect_config(config: object) -> None:
    if config is not None and not isinstance(config, KernelConfig):
        raise TypeError(f"config: expected a KernelConfig or None, got {type(config).__name__}")


def expect_options(config: KernelConfig | None, batch_invariant: bool) -> None:
    """What plans, and calls that plan, are told beside shapes."""
    expect_bool("batch_invariant", batch_invariant)
    expect_config(config)
    if config is not None and (reason := why_infeasible(config)):
        expect_types(config)
        raise ValueError(f"config: {reason}")


def expect_partials(partials: torch.Tensor | None) -> None:
    if partials is None:
        return
    if not isinstance(partials, torch.Tensor):
        raise TypeError(f"partials: expected a tensor or None, got {type(partials).__name__}")
    if partials.dtype is not torch.float32 or partials.dim() != 2 or partials.shape[1] != PART_ROW:
        raise ValueError(f"partials: expected float32 [rows, {PART_ROW}], got {partials.dtype} {list(partials.shape)}")
    if not partials.is_contiguous() or partials.data_ptr() % 16:
        raise ValueError("partials: expected contiguous memory at a multiple of 16 bytes, got other")


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


def expect_sizes(num_heads: int, page_size: int) -> None:
    expect_int("num_heads", num_heads, 1, MAX_HEADS)
    expect_int("page_size", page_size, 1, MAX_PAGE_SIZE)


def expect_rows(name: str, tokens: int, num_heads: int) -> None:
    """`name` is the argument that `tokens` query tokens are of."""
    if tokens * num_heads > _MOST_ROWS:
        raise ValueError(
            f"{name}: expected at most {_MOST_ROWS // num_heads} query tokens of {num_heads} heads, got {tokens}"
        )


def expect_table(batch: int, max_pages: int, table_stride: int | None) -> int:
    """Elements between the rows of a block table."""
    expect_int("max_pages", max_pages, 0)
    if table_stride is None:
        table_stride = max_pages
    elif batch > 1:
        expect_int("table_stride", table_stride, max_pages)
    else:
        expect_int("table_stride", table_stride, 0)
    if (batch - 1) * table_stride + max_pages > _MOST_ROWS:
        raise ValueError(
            f"table_stride: expected at most {_MOST_ROWS} elements in all, got {batch} rows {table_stride} apart"
        )
    return table_stride
