"""Shapes to tune: products of lists from TOML recipes, from flags and from a server's log, and their order.

A recipe is a TOML file with tables `[[shapes]]`. Each table's keys hold a value or a list of values, and the table
stands for their product:

    op         "decode", "prefill", "sparse"              page_size  tokens per page; sparse has none
    heads      query heads, 1..128                        kv_format  "" (16-bit cache), "tensor", "token", "group"
    batch      requests; of sparse query tokens           q_fp8      e4m3 queries, with an FP8 cache only
    kv_len     tokens of each request, those of its queries included; of sparse, tokens of each list
    q_len      query tokens of each request; decode and sparse have 1
    lengths    "uniform" (every request has kv_len tokens) or, of decode, "ragged": between kv_len / 32 and kv_len,
               log-uniform, the same in every run, as the bench's preset `ragged`

Members that cannot be are left out: e4m3 queries over a 16-bit cache, more query tokens than keys, ragged lengths of
one request.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..bench.cases import RAGGED_SPAN, TOKEN_BYTES, Case, PrefillCase
from ..dims import MAX_HEADS
from ..extras import install_command
from ..tuned.file import LENGTHS, TUNED_OPS
from ..tuned.select import When, read_shapes

FOLDER = pathlib.Path(__file__).parent / "recipes"

_TYPES: dict[str, type] = {
    "op": str,
    "heads": int,
    "batch": int,
    "kv_len": int,
    "q_len": int,
    "page_size": int,
    "kv_format": str,
    "q_fp8": bool,
    "lengths": str,
}
_DEFAULTS: dict[str, list[Any]] = {
    "q_len": [1],
    "page_size": [64],
    "kv_format": [""],
    "q_fp8": [False],
    "lengths": ["uniform"],
}
_CHOICES: dict[str, Sequence[str]] = {"op": TUNED_OPS, "kv_format": tuple(TOKEN_BYTES), "lengths": LENGTHS}


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str) -> list[When]:
    """Shapes of a recipe: a name from `names()`, or a path.

    Raises ValueError that names the file, the table and the key; OSError when the file cannot be read.
    """
    path = FOLDER / f"{name}.toml"
    if name not in names():
        path = pathlib.Path(name).expanduser()
        if path.suffix != ".toml":
            raise ValueError(f"recipe: expected a .toml file or one of {', '.join(names())}, got {name!r}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not TOML: {error}") from None
    return parse(text, str(path))


def parse(text: str, source: str) -> list[When]:
    """Shapes of a recipe's text, each once. Raises ValueError as `load` does, with `source` for the file's name."""
    try:
        values = _toml().loads(text)
    except ValueError as error:
        raise ValueError(f"{source}: not TOML: {error}") from None
    if unknown := sorted(set(values) - {"about", "shapes"}):
        raise ValueError(f"{source}: unknown keys {unknown}; known are about, shapes")
    tables = values.get("shapes")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise ValueError(f"{source}: expected at least one table [[shapes]]")
    found = [when for i, table in enumerate(tables) for when in product(table, f"{source}: shapes[{i}]")]
    return list(dict.fromkeys(found))


def product(table: Mapping[str, Any], where: str) -> list[When]:
    """Shapes of one table. Raises ValueError that begins with `where` and names the key."""
    if unknown := sorted(set(table) - set(_TYPES)):
        raise ValueError(f"{where}: unknown keys {unknown}; known are {', '.join(_TYPES)}")
    lists: dict[str, list[Any]] = {}
    for key in _TYPES:
        value = table.get(key, _DEFAULTS.get(key))
        if value is None:
            raise ValueError(f"{where}.{key}: missing")
        lists[key] = value if isinstance(value, list) else [value]
        if not lists[key]:
            raise ValueError(f"{where}.{key}: expected at least one value, got an empty list")
        for x in lists[key]:
            _check(f"{where}.{key}", key, x)
    for op in ("decode", "sparse"):
        if op in lists["op"] and lists["q_len"] != [1]:
            raise ValueError(f"{where}.q_len: {op} has one query token per request, got {lists['q_len']}")
    if "page_size" in table and "sparse" in lists["op"]:
        raise ValueError(f"{where}.page_size: sparse gathers from pages of every size alike, got {lists['page_size']}")
    if "ragged" in lists["lengths"] and (other := [op for op in lists["op"] if op != "decode"]):
        raise ValueError(f"{where}.lengths: ragged are those of decode, got {other[0]} beside it")
    whens = [
        When(op, kv_format, q_fp8, heads, 1 if op == "sparse" else page_size, q_len, batch, kv_len, lengths)
        for op, heads, batch, kv_len, q_len, page_size, kv_format, q_fp8, lengths in itertools.product(*lists.values())
        if q_len <= kv_len and (kv_format or not q_fp8) and (batch > 1 or lengths == "uniform")
    ]
    if not whens:
        raise ValueError(
            f"{where}: no shape is left: q_fp8 needs a kv_format, q_len at most kv_len, ragged lengths a batch above 1"
        )
    return whens


def _check(where: str, key: str, value: Any) -> None:
    expected: Any = _TYPES[key]
    if type(value) is not expected:
        raise ValueError(f"{where}: expected {expected.__name__}, got {value!r}")
    if key in _CHOICES and value not in _CHOICES[key]:
        known = ", ".join(repr(choice) for choice in _CHOICES[key])
        raise ValueError(f"{where}: expected one of {known}, got {value!r}")
    if expected is int and value < 1:
        raise ValueError(f"{where}: expected at least 1, got {value}")
    if key == "heads" and value > MAX_HEADS:
        raise ValueError(f"{where}: expected at most {MAX_HEADS}, got {value}")


def _toml() -> Any:
    for name in ("tomllib", "tomli"):  # Python 3.10 has the second only, if it is installed
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    raise ImportError(f"recipes need a TOML parser before Python 3.11: {install_command('tomli')}")


def from_log(path: pathlib.Path, kv_lens: Iterable[int]) -> list[When]:
    """Shapes that MLA_CUTE_LOG_SHAPES recorded, most frequent first; where a call did not know its kv length, one
    shape per value of `kv_lens`. Shapes without work (no request, no query token, no key) are left out.

    Raises ValueError as `tuned.read_shapes` does.
    """
    seen = read_shapes(path)
    known = [
        dataclasses.replace(when, kv_len=max(kv_len, when.q_len))
        for when in sorted(seen, key=lambda when: -seen[when])
        for kv_len in ([*kv_lens] if when.kv_len is None else [when.kv_len])
        if min(when.batch, when.q_len, kv_len) > 0
    ]
    return list(dict.fromkeys(known))


def case_of(when: When, dtype: str) -> Case | PrefillCase:
    """The bench case that stands for a shape: every request has its q_len and, where they are not ragged, kv_len. Lists
    are of tokens that no other list has, in pages of 64, over format group in the rows of 656 bytes that engines keep
    for them."""
    assert when.kv_len is not None
    if when.op == "sparse":
        layout = "fused" if when.kv_format == "group" else "separate"
        of_cache: dict[str, Any] = {"layout": layout, "kv_format": when.kv_format, "q_fp8": when.q_fp8}
        return Case(when.num_heads, when.batch, when.kv_len, dtype=dtype, sparse=True, **of_cache)
    common: dict[str, Any] = {
        "page_size": when.page_size,
        "dtype": dtype,
        "kv_format": when.kv_format,
        "q_fp8": when.q_fp8,
    }
    if when.lengths == "ragged":
        return Case(when.num_heads, when.batch, -(-when.kv_len // RAGGED_SPAN), longest=when.kv_len, **common)
    if when.op == "decode":
        return Case(when.num_heads, when.batch, when.kv_len, **common)
    return PrefillCase(when.num_heads, ((when.batch, when.q_len, when.kv_len),), **common)


def coarse_first(whens: Sequence[When]) -> list[When]:
    """The shapes in an order whose beginnings cover the grid: the ends of batch, kv_len and q_len, then the middles,
    and so on, over all formats, heads and page sizes alike. Inside a level, one kind of cache after the other."""
    axes = ("batch", "kv_len", "q_len")
    levels = {
        (op, name): _levels({getattr(when, name) for when in whens if when.op == op})
        for op in TUNED_OPS
        for name in axes
    }

    def key(when: When) -> tuple[Any, ...]:
        level = max(levels[when.op, name][getattr(when, name)] for name in axes)
        return (level, when.kv_format, when.op, *dataclasses.astuple(when))

    return sorted(dict.fromkeys(whens), key=key)


def _levels(values: set[int]) -> dict[int, int]:
    """0 for the ends of the sorted values, 1 for the middle between them, 2 for the middles of the halves, ..."""
    ordered = sorted(values)
    level = {ordered[0]: 0, ordered[-1]: 0} if ordered else {}
    spans, depth = [(0, len(ordered) - 1)], 1
    while spans := [(lo, hi) for lo, hi in spans if hi - lo > 1]:
        middles = [(lo, (lo + hi) // 2, hi) for lo, hi in spans]
        level |= {ordered[mid]: depth for _, mid, _ in middles}
        spans = [half for lo, mid, hi in middles for half in ((lo, mid), (mid, hi))]
        depth += 1
    return level
