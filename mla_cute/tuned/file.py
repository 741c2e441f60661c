"""Files of tuned configurations: one JSON per GPU, an entry per timed shape.

    {"schema": 1,
    "gpu": {"name": "NVIDIA H200", "sm_count": 132, "clock_mhz": 1980, "memory_gbps": 4350.0},
    "made_with": {"mla_cute": "0.1.0", "cutlass_dsl": "4.8.1", "driver": "580.159.04", "date": "2026-11-24",
    "torch": "2.13.0+cu130", "toolkit": "cu13", "command": "mla-cute tune --recipe small", "seed": 0, "commit": "1a0c"},
    "entries": [
    {"when": {"op": "decode", ...}, "config": {...}, "us": 48.1, "default_us": 49.2, "runner_up_us": 48.3,
    "runner_up": {"min_blocks": 4}}
    ]}

`when` are the fields of :class:`When`, `config` those of :class:`~mla_cute.KernelConfig` (absent ones have their
default), `runner_up` those in which the next best configuration differs from `config`. What is in the second line of
`made_with`, and `runner_up`, may be missing. A file is valid as a whole or refused as a whole, with an error that names
file and entry.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Iterable
from typing import Any

from ..compile.jit import replace_file
from ..config import KernelConfig, differences, why_infeasible
from ..dims import KV_FORMATS, MAX_HEADS
from ..kernels.registry import OPS

SCHEMA = 1
# "sparse": mla_sparse, which decode's kernels run.
TUNED_OPS = (*OPS, "sparse")
LENGTHS = ("uniform", "ragged")
_GPU_FIELDS = ("name", "sm_count", "clock_mhz", "memory_gbps")
_MADE_WITH_FIELDS = ("mla_cute", "cutlass_dsl", "driver", "date")
_MADE_WITH_LATER = ("torch", "toolkit", "command", "seed", "commit")
# A merge reads and writes one small file: a holder that takes longer is stuck.
_LOCK_TIMEOUT_S = 60.0


@dataclasses.dataclass(frozen=True)
class When:
    """What the host knows of a call.

    op          "decode", "prefill" or "sparse"
    kv_format   "" for a 16-bit cache, else "tensor", "token" or "group"
    q_fp8       the queries are e4m3
    num_heads   query heads, 1..128
    page_size   tokens per page; of sparse 1, since it gathers single tokens from pages of every size alike
    q_len       query tokens per request: 1 for decode and sparse; of prefill the mean, ceil(total_q / batch)
    batch       requests; of sparse query tokens
    kv_len      no request has more keys than this; None: not known. Of an entry: the length that was timed. Of sparse
                columns of the lists
    lengths     of an entry, "uniform": every request had kv_len tokens; "ragged", decode only: between kv_len / 32 and
                kv_len, log-uniform. Of calls always "uniform": no host knows it
    """

    op: str
    kv_format: str
    q_fp8: bool
    num_heads: int
    page_size: int
    q_len: int
    batch: int
    kv_len: int | None
    lengths: str = "uniform"

    @property
    def decodes(self) -> bool:
        """Whether decode's kernels and planner run it."""
        return self.op != "prefill"

    def __str__(self) -> str:
        cache = f"{self.kv_format} FP8 cache" if self.kv_format else "16-bit cache"
        cache += ", e4m3 queries" if self.q_fp8 else ""
        if self.op == "sparse":
            lists = "lists of unknown length" if self.kv_len is None else f"lists of {self.kv_len} tokens"
            return f"sparse, {self.num_heads} heads, {self.batch} query tokens, {lists}, {cache}"
        queries = f", {self.q_len} query tokens" if self.op == "prefill" else ""
        keys = "length not known" if self.kv_len is None else f"length {self.kv_len}"
        if self.lengths == "ragged":
            keys = f"ragged lengths up to {self.kv_len}"
        return (
            f"{self.op}, {self.num_heads} heads, page size {self.page_size}, batch {self.batch}{queries}, {keys}, "
            f"{cache}"
        )


_WHEN_FIELDS = tuple(field.name for field in dataclasses.fields(When) if field.name != "lengths")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A shape that was timed: the configuration chosen, and medians in us of it, the default and the next best, which
    is `runner_up` where that is known."""

    when: When
    config: KernelConfig
    us: float
    default_us: float
    runner_up_us: float | None
    runner_up: KernelConfig | None = None


@dataclasses.dataclass(frozen=True)
class TunedFile:
    """`gpu`: name, sm_count, clock_mhz and memory_gbps (the last two may be None). `made_with` is of what wrote the
    file last, in texts or None: versions of mla_cute, cutlass_dsl and driver, a date; and in files of today the version
    of torch, the DSL's toolkit ("cu13"), the command, the seed of its inputs (an int) and the commit."""

    gpu: dict[str, Any]
    made_with: dict[str, Any]
    entries: tuple[Entry, ...]


def file_name(gpu_name: str) -> str:
    """The name of a GPU's file, NVIDIA_H200.json: spaces and slashes become underscores."""
    return re.sub(r"[\s/\\]", "_", gpu_name) + ".json"


# --------------------------------------------------------------------------------------------------------- reading


def parse(values: object, source: str) -> TunedFile:
    """A file from decoded JSON. ValueError, beginning with `source` and naming the entry, for whatever is wrong."""
    try:
        return _parse(values)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def load(path: str | os.PathLike[str]) -> TunedFile:
    """:func:`parse` of the file at `path`. ValueError, naming it, also when it is no JSON or cannot be read."""
    try:
        values = json.loads(pathlib.Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    return parse(values, str(path))


def when_of(values: object) -> When:
    """A `When` from its fields. ValueError that names the first wrong one."""
    found = _fields("when", values, _WHEN_FIELDS, ("lengths",))
    _one_of("when.op", found["op"], TUNED_OPS)
    _one_of("when.kv_format", found["kv_format"], ("", *KV_FORMATS))
    if type(found["q_fp8"]) is not bool:
        raise ValueError(f"when.q_fp8: expected true or false, got {found['q_fp8']!r}")
    if found["q_fp8"] and not found["kv_format"]:
        raise ValueError("when.q_fp8: expected false with a 16-bit cache (kv_format ''), got true")
    _int_from("when.num_heads", found["num_heads"], 1, MAX_HEADS)
    for name in ("page_size", "q_len", "batch"):
        _int_from(f"when.{name}", found[name], 1)
    if found["op"] != "prefill" and found["q_len"] != 1:
        raise ValueError(f"when.q_len: expected 1 for {found['op']}, got {found['q_len']}")
    if found["op"] == "sparse" and found["page_size"] != 1:
        raise ValueError(f"when.page_size: expected 1 for sparse, got {found['page_size']}")
    if found["kv_len"] is not None:
        _int_from("when.kv_len", found["kv_len"], 1)
    _one_of("when.lengths", lengths := found.get("lengths", "uniform"), LENGTHS)
    if lengths == "ragged" and (found["op"] != "decode" or found["kv_len"] is None):
        raise ValueError(f"when.lengths: expected 'uniform' but of decode with a kv_len, got 'ragged' of {found['op']}")
    return When(**found)


def values_of(when: When) -> dict[str, Any]:
    """Its fields in JSON; uniform lengths go without saying."""
    values = dataclasses.asdict(when)
    if when.lengths == "uniform":
        del values["lengths"]
    return values


def _parse(values: object) -> TunedFile:
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, got {_short(values)}")
    if values.get("schema") != SCHEMA or type(values["schema"]) is not int:
        got = _short(values.get("schema"))
        raise ValueError(f"schema: expected {SCHEMA}, got {got}; `mla-cute tune` makes a file of this schema")
    found = _fields("", values, ("schema", "gpu", "made_with", "entries"))
    gpu = _fields("gpu", found["gpu"], _GPU_FIELDS)
    _text("gpu.name", gpu["name"])
    _int_from("gpu.sm_count", gpu["sm_count"], 1)
    for name in ("clock_mhz", "memory_gbps"):
        if gpu[name] is not None:
            _positive(f"gpu.{name}", gpu[name])
    made_with = _fields("made_with", found["made_with"], _MADE_WITH_FIELDS, _MADE_WITH_LATER)
    for name, value in made_with.items():
        if name == "seed":
            _int_from("made_with.seed", value, 0)
        elif value is not None:
            _text(f"made_with.{name}", value)
    if not isinstance(found["entries"], list):
        raise ValueError(f"entries: expected a list, got {_short(found['entries'])}")
    entries: list[Entry] = []
    first: dict[When, int] = {}
    for index, values in enumerate(found["entries"]):
        try:
            entry = _entry(values)
            if entry.when in first:
                raise ValueError(f"when: expected a shape of its own, got that of entry {first[entry.when]}")
        except ValueError as error:
            raise ValueError(f"entry {index}: {error}") from None
        first[entry.when] = index
        entries.append(entry)
    return TunedFile(gpu, made_with, tuple(entries))


def _entry(values: object) -> Entry:
    found = _fields("", values, ("when", "config", "us", "default_us", "runner_up_us"), ("runner_up",))
    when = when_of(found["when"])
    if when.kv_len is None:
        raise ValueError("when.kv_len: expected the length that was timed, got null")
    config = _config("config", found["config"], {})
    runner_up = found["runner_up_us"]
    next_best = found.get("runner_up")
    if next_best is not None and runner_up is None:
        raise ValueError("runner_up: expected none without a runner_up_us")
    return Entry(
        when,
        config,
        _positive("us", found["us"]),
        _positive("default_us", found["default_us"]),
        None if runner_up is None else _positive("runner_up_us", runner_up),
        None if next_best is None else _config("runner_up", next_best, config.to_dict()),
    )


def _config(name: str, values: object, base: dict[str, Any]) -> KernelConfig:
    """Of fields that it has beside those of `base`."""
    if not isinstance(values, dict):
        raise ValueError(f"{name}: expected an object, got {_short(values)}")
    try:
        config = KernelConfig.from_dict(base | values)
    except (TypeError, ValueError) as error:
        # They begin with the config that they are of, "config.min_blocks: ...".
        raise ValueError(f"{name}{str(error).removeprefix('config')}") from None
    if reason := why_infeasible(config):
        raise ValueError(f"{name}: {reason}")
    return config


def _fields(name: str, values: object, expected: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    prefix = f"{name}: " if name else ""
    if not isinstance(values, dict):
        raise ValueError(f"{prefix}expected an object, got {_short(values)}")
    if unknown := sorted(set(values) - {*expected, *optional}):
        raise ValueError(f"{prefix}unknown fields {unknown}; known are {[*expected, *optional]}")
    if missing := [field for field in expected if field not in values]:
        raise ValueError(f"{prefix}missing fields {missing}")
    return values


def _one_of(name: str, value: object, known: Iterable[str]) -> None:
    if value not in (known := tuple(known)):
        raise ValueError(f"{name}: expected one of {known}, got {_short(value)}")


def _int_from(name: str, value: object, least: int, most: int | None = None) -> None:
    if type(value) is not int or value < least or (most is not None and value > most):
        bounds = f">= {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}: expected an int {bounds}, got {_short(value)}")


def _positive(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite number > 0, got {_short(value)}")
    return value


def _text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name}: expected a text, got {_short(value)}")


def _short(value: object) -> str:
    return f"{value!r:.80}"


# --------------------------------------------------------------------------------------------------------- writing


def sort_key(when: When) -> tuple[Any, ...]:
    """Entries in files stand in this order."""
    return (
        when.op, when.kv_format, when.q_fp8, when.num_heads, when.page_size, when.q_len, when.batch, when.kv_len or 0,
        when.lengths != "uniform",
    )  # fmt: skip


def dump(file: TunedFile) -> str:
    """The JSON text: entries sorted, one a line, times to the ns, so that version control shows which changed."""
    lines = []
    for entry in sorted(file.entries, key=lambda entry: sort_key(entry.when)):
        values = dataclasses.asdict(entry) | {"when": values_of(entry.when)}
        del values["runner_up"]
        if entry.runner_up is not None:
            values["runner_up"] = differences(entry.runner_up, entry.config)
        for name in ("us", "default_us", "runner_up_us"):
            if values[name] is not None:
                values[name] = round(float(values[name]), 3)
        lines.append(json.dumps(values))
    entries = "".join(f"\n{line}," for line in lines).removesuffix(",")
    return (
        f'{{"schema": {SCHEMA},\n"gpu": {json.dumps(file.gpu)},\n"made_with": {json.dumps(file.made_with)},\n'
        f'"entries": [{entries}\n]}}\n'
    )


def merge(path: str | os.PathLike[str], new: TunedFile) -> TunedFile:
    """Add `new` to the file at `path` and return what it holds then.

    Entries for a shape that `new` has too are replaced, others kept; gpu and made_with become those of `new`. Any
    number of processes may merge at a time: a lock file beside `path` lets one read and write while the others wait,
    and the file appears by rename. A missing file or folder is made.

    Raises:
        ValueError: the file is broken, is another GPU's (name or number of SMs), or `new` would not load; it is left as
            it was.
        filelock.Timeout: somebody held the lock for 60 s.
    """
    import filelock

    path = pathlib.Path(path)
    new = parse(json.loads(dump(new)), f"new entries for {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(str(path.with_name(path.name + ".lock")), timeout=_LOCK_TIMEOUT_S):
        merged = _merged(path, load(path), new) if path.exists() else new
        replace_file(path, dump(merged).encode())
    return merged


def _merged(path: pathlib.Path, old: TunedFile, new: TunedFile) -> TunedFile:
    for name in ("name", "sm_count"):
        if old.gpu[name] != new.gpu[name]:
            raise ValueError(
                f"{path}: made on another GPU: expected gpu.{name} {new.gpu[name]!r} of the new entries, "
                f"got {old.gpu[name]!r}"
            )
    by_when = {entry.when: entry for entry in (*old.entries, *new.entries)}
    return TunedFile(new.gpu, new.made_with, tuple(sorted(by_when.values(), key=lambda entry: sort_key(entry.when))))
