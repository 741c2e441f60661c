"""Which configuration a call runs with: that of the nearest entry of the GPU's tuned file, else the default.

The file is the first that exists, as a whole, of

    $MLA_CUTE_TUNED_DIR/NVIDIA_H200.json            where the variable is set
    <mla_cute.cache_dir()>/tuned/NVIDIA_H200.json   what `mla-cute tune` writes
    mla_cute/tuned/data/NVIDIA_H200.json            shipped

so files are not mixed: one of $MLA_CUTE_TUNED_DIR with a single entry hides the shipped ones. A broken file, or one
that says it was made on a GPU of another name, is a ValueError at first use; one of the same name with another number
of SMs is not used. MLA_CUTE_TUNED=0 turns files off.

An entry can serve a call when

* op, kv_format, q_fp8 and page class are the call's (page class: rows of a TMA box, or gathered,
  `registry.box_rows_of`), and for decode and sparse the number of 64-row tiles of the heads and whether there are at
  most 16;
* num_heads, q_len, batch and kv_len are each within a factor of 4 of the call's. A coordinate of the call beyond what
  the entries of this class span counts as the span's end, if they span a factor of 4: a batch larger than the largest
  one timed runs as that one does. From a single point nothing is extrapolated;
* its kernel fits the size of the step (batch * kv_len * tiles of 16 heads), where decode or sparse has more than 16
  heads:
  tile16 reads the keys again for every tile, so an entry with it serves no larger step than its own, nor one of
  unknown length. One with row tiles serves a step whose default is tile16 if its own default is that, too, and the
  step is no smaller than its own.

A sparse call that no entry of its own op serves takes that of the decode call over pages of one token: as many
requests as it has query tokens, as long as its lists.

Head dimensions are none of it: entries were measured with 512 + 64 and serve calls of others as they are.

Of these the one at the smallest distance, the sum of |log2| of the four ratios; of several the one with the nearest
page_size, then the largest kv_len, then the first of a sorted file. A call that knows no kv_len leaves its ratio out.
Batch-invariant plans take the default: an entry's kernel would depend on the batch, and results with it. The default
of a GPU follows from its SMs, memory and clock (config.default_config); of a decode step with more than 16 heads and a
known, small kv_len it is the tile16 kernel (config.is_small_step).

MLA_CUTE_LOG=1 logs each new selection. Logger "mla_cute": without the variable selections are DEBUG and that there is
no file is INFO, with it both are WARNING, which logging shows unless told otherwise. All three variables are read when
a shape is seen for the first time; then a selection is a look-up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import os
import pathlib
from collections.abc import Sequence

import torch

from .. import gpu as gpu_facts
from ..compile import jit
from ..config import KernelConfig, default_config, is_small_step, with_kernel
from ..dims import TILE16_M, TILE_M
from ..gpu_speed import H200, GpuSpeed
from ..kernels.registry import box_rows_of, converts, step_of, takes_tile16
from .file import SCHEMA, Entry, TunedFile, When, dump, file_name, load, merge, parse, sort_key
from .shape_log import read_shapes

__all__ = [
    "SCHEMA", "Entry", "Grid", "Selection", "TunedFile", "When", "choose", "clear", "default_for", "directories",
    "distance", "dump", "file_name", "is_off", "load", "located", "merge", "parse", "read_shapes",
    "search_path", "select",
]  # fmt: skip

log = logging.getLogger("mla_cute")

_SHIPPED = pathlib.Path(__file__).resolve().parent / "data"

# Distances are taken between logarithms to base 2, so 2 is a factor of 4. An entry serves calls whose coordinates are
# each within _REACH of its own. Where the entries of a class span at least _SPAN along a coordinate, a call beyond the
# last of them counts as that one. The 1e-9 lets exact powers of two in, whichever way their logarithms were rounded.
_REACH = 2.0 + 1e-9
_SPAN = 2.0 - 1e-9


@dataclasses.dataclass(frozen=True)
class Selection:
    """The configuration of a call and where it is from: "shipped NVIDIA_H200.json entry 17", or "default: " and why.

    `entry` is None for a default; `when` is the call's. `among`: entries of the file that are of the call's class, with
    `entry` the nearest of them that can serve it. `few_rows`: the plan was told a `max_q_len` with at most 32 rows.
    `converts`: an FP8 cache is converted to 16 bits first, for bfloat16 outputs, where there is memory for it and the
    rope part needs no rounding (convert.py).
    """

    config: KernelConfig
    source: str
    entry: Entry | None
    when: When
    among: int = 0
    few_rows: bool = False
    converts: bool = False

    @property
    def kernel(self) -> str:
        """Name of the main kernel that runs."""
        kv_format = "" if self.converts else self.when.kv_format
        return step_of(self.when.op, kv_format, self.when.num_heads, self.config, self.few_rows).name

    def __str__(self) -> str:
        """One line."""
        taken = self.source
        if self.entry is not None:
            taken += (
                f" at distance {distance(self.when, self.entry.when):.2f}, "
                f"{self.entry.us:g} us there, the default {self.entry.default_us:g} us"
            )
        behind = " behind convert" if self.converts else ""
        return f"{self.when}: {taken}; {self.config}; kernel {self.kernel}{behind}"


# ------------------------------------------------------------------------------------------------------- selection


@functools.lru_cache(maxsize=4096)
def choose(
    op: str,
    kv_format: str,
    q_fp8: bool,
    num_heads: int,
    page_size: int,
    q_len: int,
    batch: int,
    kv_len: int | None,
    device: torch.device,
    batch_invariant: bool = False,
) -> Selection:
    """:func:`select` of the fields of a `When`, for the call path."""
    when = When(op, kv_format, q_fp8, num_heads, page_size, q_len, batch, kv_len)
    selection = _select(when, device, batch_invariant)
    if not batch_invariant and converts(op, kv_format, q_fp8, num_heads, q_len, selection.config):
        selection = dataclasses.replace(selection, converts=True)
    log.log(logging.WARNING if _is_set("MLA_CUTE_LOG") else logging.DEBUG, "%s", selection)
    return selection


def select(when: When, device: torch.device, batch_invariant: bool = False) -> Selection:
    """The configuration of a call on `device`. Touches no device memory and may run under CUDA-graph capture.

    Raises ValueError, naming file and entry, when the GPU's tuned file is broken.
    """
    return choose(
        when.op, when.kv_format, when.q_fp8, when.num_heads, when.page_size, when.q_len, when.batch, when.kv_len,
        device, batch_invariant,
    )  # fmt: skip


def default_for(when: When, gpu: GpuSpeed | None, batch_invariant: bool = False) -> KernelConfig:
    """The configuration of a call that no entry serves; `gpu` is None where there is none."""
    config = default_config(when.num_heads, gpu or H200, when.decodes)
    if gpu is None or batch_invariant:
        # Another kernel is other bits: not by what else is in the batch, where a request's bits are its own.
        return config
    if not when.decodes:
        return dataclasses.replace(config, evict_first=not _shares_keys(when, config))
    if when.kv_len is not None:
        gathers = box_rows_of(when.page_size) == 0
        small = is_small_step(when.kv_format, when.q_fp8, when.num_heads, when.batch, when.kv_len, gpu, gathers)
        if small != takes_tile16(when.kv_format, when.num_heads, config):
            config = with_kernel(config, when.kv_format, "tile16" if small else "tile64")
    return config


def _shares_keys(when: When, config: KernelConfig) -> bool:
    """Whether the 16-bit row tiles of a prefill find keys in L2 that others of their request have read: they should
    not be the first to be evicted. It takes 0 to 4 % less time (docs/performance.md)."""
    facts = when.op, when.kv_format, when.q_fp8, when.num_heads, when.q_len, config
    over_16_bits = not when.kv_format or converts(*facts)
    return over_16_bits and box_rows_of(when.page_size) > 0 and when.q_len * when.num_heads > TILE_M


_generation = 0


def generation() -> int:
    """Another number after each `clear`: what was chosen before it is not to be used."""
    return _generation


def clear() -> None:
    """Forget what was read and selected: the next call reads the environment and the files again."""
    global _generation
    _generation += 1
    choose.cache_clear()
    _grid.cache_clear()
    _said.clear()


@functools.lru_cache
def gpu_of(device: torch.device) -> tuple[str, GpuSpeed] | None:
    """Name and speed of a GPU, None for other devices."""
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).name, gpu_facts.speed(device)


def _select(when: When, device: torch.device, batch_invariant: bool) -> Selection:
    gpu = gpu_of(device)
    if gpu is None:
        return Selection(default_for(when, None), f"default: {device} is no GPU", None, when)
    name, speed = gpu
    untuned = default_for(when, speed, batch_invariant)
    default = functools.partial(Selection, untuned, entry=None, when=when)
    if is_off():
        return default("default: MLA_CUTE_TUNED=0")
    if batch_invariant:
        return default("default: batch-invariant plans are not tuned")
    found = located(name)
    if found is None:
        _say_once(
            f"no tuned configurations for {name}, using the default; looked for "
            f"{', '.join(str(path) for _, path in search_path(name))}; `mla-cute tune` makes them"
        )
        return default(f"default: no tuned file {file_name(name)}")
    label, path = found
    source = f"{label} {path.name}"
    grid = _grid(path, speed)
    made_on = grid.file.gpu
    if made_on["name"] != name:
        raise ValueError(f"{path}: made on another GPU: expected gpu.name {name!r}, got {made_on['name']!r}")
    if (sms := made_on["sm_count"]) != speed.sm_count:
        _say_once(f"{path} is not used: made with {sms} SMs, this {name} has {speed.sm_count}")
        return default(f"default: {source} was made with {sms} SMs, this GPU has {speed.sm_count}")
    small = when.decodes and takes_tile16(when.kv_format, when.num_heads, untuned)
    index = grid.nearest(when, small)
    if index is None and when.op == "sparse":
        index = grid.nearest(dataclasses.replace(when, op="decode"), small)
    if index is None:
        return default(f"default: no entry of {source} is near")
    entry = grid.file.entries[index]
    return Selection(entry.config, f"{source} entry {index}", entry, when, grid.among(entry.when))


# ----------------------------------------------------------------------------------------------------------- files


def directories() -> list[tuple[str, pathlib.Path]]:
    """(label, directory) of tuned files in the order they are searched; they need not exist."""
    found = []
    if named := os.environ.get("MLA_CUTE_TUNED_DIR"):
        found.append(("MLA_CUTE_TUNED_DIR", pathlib.Path(named).expanduser()))
    with contextlib.suppress(RuntimeError):  # there is no home directory
        found.append(("user", jit.cache_dir() / "tuned"))
    found.append(("shipped", _SHIPPED))
    return found


def search_path(gpu_name: str) -> list[tuple[str, pathlib.Path]]:
    """(label, path) of the files that may hold a GPU's configurations; the first that exists is used."""
    name = file_name(gpu_name)
    return [(label, directory / name) for label, directory in directories()]


def located(gpu_name: str) -> tuple[str, pathlib.Path] | None:
    """(label, path) of the file that is used on a GPU of that name; None where there is none."""
    return next(((label, path) for label, path in search_path(gpu_name) if path.is_file()), None)


def is_off() -> bool:
    return os.environ.get("MLA_CUTE_TUNED") == "0"


_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        log.log(logging.WARNING if _is_set("MLA_CUTE_LOG") else logging.INFO, message)


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


# ------------------------------------------------------------------------------------------------- the nearest entry


def distance(call: When, entry: When) -> float:
    """Sum of |log2| of the ratios of num_heads, q_len, batch and, where the call knows it, kv_len."""
    return sum(abs(x - y) for x, y in zip(_coordinates(call), _coordinates(entry), strict=False))


class Grid:
    """The entries of a file, arranged for the search on the GPU that it is of."""

    def __init__(self, file: TunedFile, gpu: GpuSpeed | None = None):
        self.file = file
        classes: dict[tuple[object, ...], list[int]] = {}
        for index, entry in enumerate(file.entries):
            classes.setdefault(_class_of(entry.when), []).append(index)
        gpu = gpu or GpuSpeed(file.gpu["sm_count"])
        self._classes = {key: _Class(file.entries, indices, gpu) for key, indices in classes.items()}

    def nearest(self, when: When, small: bool = False) -> int | None:
        """Index of the entry that serves `when`; None if none does. `small`: the default is tile16."""
        found = self._classes.get(_class_of(when))
        return found.nearest(when, small) if found is not None else None

    def among(self, when: When) -> int:
        """How many entries are of the class of `when`."""
        found = self._classes.get(_class_of(when))
        return 0 if found is None else len(found)


class _Class:
    """Entries that differ in nothing but coordinates and configuration."""

    def __init__(self, entries: Sequence[Entry], indices: Sequence[int], gpu: GpuSpeed):
        # The better of two at one distance comes first.
        in_order = sorted(
            indices, key=lambda index: (-(entries[index].when.kv_len or 0), sort_key(entries[index].when))
        )
        self._points = [
            (
                index,
                math.log2(entries[index].when.page_size),
                _coordinates(entries[index].when),
                *_work_span(entries[index], gpu),
            )
            for index in in_order
        ]
        columns = zip(*(coordinates for _, _, coordinates, *_ in self._points), strict=True)
        self._spans = [(min(column), max(column)) for column in columns]

    def __len__(self) -> int:
        return len(self._points)

    def nearest(self, when: When, small: bool) -> int | None:
        at = tuple(
            x if high - low < _SPAN else min(max(x, low), high)
            for x, (low, high) in zip(_coordinates(when), self._spans, strict=False)
        )
        page = math.log2(when.page_size)
        work = _work(when)
        best, best_key = None, (math.inf, math.inf)
        for index, entry_page, point, least, most in self._points:
            if work > most or (small and work < least):
                continue
            total = 0.0
            for x, y in zip(at, point, strict=False):
                step = x - y if x > y else y - x
                if step > _REACH:
                    break
                total += step
            else:
                # Rounded: 6 is as far from 4 as from 9 on every host.
                key = (round(total, 9), abs(page - entry_page))
                if key < best_key:
                    best, best_key = index, key
        return best


def _work(when: When) -> float:
    """Of tile16: tokens that its tiles of 16 heads read; infinite where the length is not known."""
    return math.inf if when.kv_len is None else when.batch * when.kv_len * -(-when.num_heads // TILE16_M)


def _work_span(entry: Entry, gpu: GpuSpeed) -> tuple[float, float]:
    """(least, most) of `_work` of the calls that an entry serves. The least holds only for calls whose default is
    tile16: smaller ones than the entry's own may be faster with that. The most keeps tile16, which reads the keys again
    for every 16 heads, from calls larger than the one it was timed on."""
    when = entry.when
    if not when.decodes or when.num_heads <= TILE16_M:
        return 0.0, math.inf
    if takes_tile16(when.kv_format, when.num_heads, entry.config):
        return 0.0, _work(when)
    won = takes_tile16(when.kv_format, when.num_heads, default_for(when, gpu))
    return _work(when) if won else math.inf, math.inf


def _class_of(when: When) -> tuple[object, ...]:
    rows: tuple[object, ...] = ()
    if when.decodes:
        rows = (-(-when.num_heads // TILE_M), when.num_heads <= TILE16_M)
    return (when.op, when.kv_format, when.q_fp8, box_rows_of(when.page_size), *rows)


def _coordinates(when: When) -> tuple[float, ...]:
    """Three where kv_len is not known."""
    known = (when.num_heads, when.q_len, when.batch, *(() if when.kv_len is None else (when.kv_len,)))
    return tuple(map(math.log2, known))


@functools.lru_cache(maxsize=16)
def _grid(path: pathlib.Path, gpu: GpuSpeed) -> Grid:
    return Grid(load(path), gpu)
