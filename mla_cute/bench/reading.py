"""A record out of a file, checked against what `runner.run` writes before anything reads it.

A file that is no such record is refused as a whole: one line with the file, the place and what is wrong there, as
"a.json: row 3: us: expected a number, got null". Rows count from 0. Fields that nothing reads are not looked at.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from .cases import Case, PrefillCase, case_of
from .runner import SCHEMA

Check = Callable[[str, Any], None]


def load(path: pathlib.Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        ValueError: it is none, of another schema, or damaged; names the file and the place.
        OSError: it cannot be read.
    """
    data = pathlib.Path(path).read_bytes()
    if not data.strip():
        raise ValueError(f"{path}: expected a record of mla_cute.bench, got an empty file")
    try:
        found = json.loads(data)
    except RecursionError:
        raise ValueError(f"{path}: not JSON that can be read: nested too deeply") from None
    except ValueError as error:  # also of text in no encoding of JSON
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict) or not str(found.get("kind", "")).startswith("mla_cute.bench"):
        raise ValueError(f"{path}: not a record of mla_cute.bench")
    if found.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema {_short(found.get('schema'))}, this version reads {SCHEMA}")
    try:
        check(found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return found


def check(record: dict[str, Any]) -> None:
    """Raise ValueError, naming the place, where decoded JSON is not what a run's record holds."""
    _fields("", record, _RECORD, _RECORD_OPTIONAL)
    for index, row in enumerate(record["rows"]):
        try:
            _row(row)
        except ValueError as error:
            raise ValueError(f"row {index}: {error}") from None


# ------------------------------------------------------------------------------------------------ kinds of values


def _short(value: Any) -> str:
    """A value as JSON has it, or what it is."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _number(where: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{where}: expected a number, got {_short(value)}")
    try:
        is_finite = math.isfinite(value)
    except OverflowError:  # an int that no float holds
        is_finite = False
    if not is_finite:
        raise ValueError(f"{where}: expected a finite number, got {_short(value)}")


def _positive(where: str, value: Any) -> None:
    _number(where, value)
    if value <= 0:
        raise ValueError(f"{where}: expected a number > 0, got {_short(value)}")


def _int(where: str, value: Any) -> None:
    if type(value) is not int:
        raise ValueError(f"{where}: expected an integer, got {_short(value)}")


def _text(where: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected a text, got {_short(value)}")


def _flag(where: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{where}: expected true or false, got {_short(value)}")


def _list(where: str, value: Any) -> None:
    if not isinstance(value, list):
        raise ValueError(f"{where}: expected a list, got {_short(value)}")


def _dict(where: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, got {_short(value)}")


def _or_null(inner: Check) -> Check:
    def check_it(where: str, value: Any) -> None:
        if value is not None:
            inner(where, value)

    return check_it


def _each(inner: Check) -> Check:
    """The value is a list, and `inner` holds for each item."""

    def check_it(where: str, value: Any) -> None:
        _list(where, value)
        for index, item in enumerate(value):
            inner(f"{where}[{index}]", item)

    return check_it


def _values(inner: Check) -> Check:
    """The value is an object, and `inner` holds for each field, whatever its name."""

    def check_it(where: str, value: Any) -> None:
        _dict(where, value)
        for name, item in value.items():
            inner(f"{where}.{name}", item)

    return check_it


def _object(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    return lambda where, value: _fields(where, value, required, optional or {})


def _fields(where: str, value: Any, required: Mapping[str, Check], optional: Mapping[str, Check]) -> None:
    """Check that `value` is an object with these fields; `where` "" is the whole record."""
    begin = f"{where}." if where else ""
    if not isinstance(value, dict):
        raise ValueError(f"{where + ': ' if where else ''}expected an object, got {_short(value)}")
    if missing := [name for name in required if name not in value]:
        raise ValueError(f"{begin}{missing[0]}: missing")
    for name, inner in {**required, **optional}.items():
        if name in value:
            inner(f"{begin}{name}", value[name])


# ------------------------------------------------------------------------------------------------ what a run writes

_VERDICT = _object({"ok": _flag, "rel_err": _or_null(_number)})
_SUSTAINED = _object(dict.fromkeys(("us", "mj", "watts", "sm_mhz", "cycles"), _positive))
_SPEEDS = _object({"read_gbps": _positive, "cublas_bf16_tflops": _positive})


def _peer_time(where: str, value: Any) -> None:
    """{"unsupported"} or {"error"}, a text, else a time and its check."""
    _dict(where, value)
    reasons: dict[str, Check] = {name: _text for name in ("unsupported", "error") if name in value}
    _fields(
        where, value, reasons or {"us": _positive, "check": _VERDICT}, {"us_cold": _positive, "sustained": _SUSTAINED}
    )


def _peer(where: str, value: Any) -> None:
    _fields(where, value, {"present": _flag}, {})
    present: dict[str, Check] = {"version": _or_null(_text)}
    _fields(where, value, present if value["present"] else {"why": _text}, {})


def _host(where: str, value: Any) -> None:
    """Pairs of times; {"error"} where they could not be measured, {} where the run ended before."""
    _fields(where, value, {}, {"error": _text})
    for begin in ("", "prefill_", "fp8_"):
        if f"{begin}call_us" in value:
            _fields(where, value, {f"{begin}call_us": _positive, f"{begin}call_without_plan_us": _positive}, {})


_RECORD: dict[str, Check] = {
    "date": _text,
    "preset": _or_null(_text),
    "gpu": _or_null(
        _object(
            {
                "name": _text,
                "sm_count": _int,
                "memory_bytes": _int,
                "driver": _or_null(_text),
                "max_sm_mhz": _or_null(_number),
            },
            {"clocks_under_load": _or_null(_values(_or_null(_number)))},
        )
    ),
    "versions": _values(_or_null(_text)),
    "git": _or_null(_object({"commit": _text, "dirty": _flag})),
    "source_sha256": _text,
    "method": _values(_text),
    "config": _or_null(_dict),
    "batch_invariant": _flag,
    "peers": _values(_peer),
    "complete": _flag,
    "ceilings": _object({"start": _SPEEDS, "end": _or_null(_SPEEDS), "used": _SPEEDS}, {"empty_graph_us": _number}),
    "failed": _int,
    "seconds": _number,
    "rows": _list,
}
# An interrupted run may have no host times.
_RECORD_OPTIONAL: dict[str, Check] = {"host": _host}

_MEASURED: dict[str, Check] = {
    **dict.fromkeys(("us", "us_min", "us_p90"), _positive),
    "plan_us": _number,
    **dict.fromkeys(("us_amortised", "us_chained", "gbps", "tflops", "read_share", "cublas_share"), _positive),
    "check": _VERDICT,
    "peers": _values(_peer_time),
}
_ROW_OPTIONAL: dict[str, Check] = {
    **dict.fromkeys(
        ("us_cold", "cublas_beside_tflops", "cublas_share_beside", "public_best_us", "public_best_ratio"), _positive
    ),
    "sustained": _SUSTAINED,
}


def _row(row: Any) -> None:
    """A case, and what was measured of it or, with "error", why nothing was."""
    _fields("", row, {"case": _case}, {})
    if "error" in row:
        _fields("", row, {"error": _text}, {**_MEASURED, **_ROW_OPTIONAL})
        return
    _fields("", row, _MEASURED, _ROW_OPTIONAL)
    # The two go together: a row has either both or, measured on another GPU, the time alone.
    if "public_best_ratio" in row:
        _fields("", row, {"public_best_us": _positive}, {})


_OF_TYPE: dict[Any, Check] = {int: _int, str: _text, bool: _flag}


def _case(where: str, value: Any) -> None:
    _dict(where, value)
    kind: Any = PrefillCase if "groups" in value else Case
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(set(value) - set(fields)):
        raise ValueError(f"{where}.{unknown[0]}: unknown; known are {', '.join(fields)}")
    checks = {name: _OF_TYPE.get(field.type, _each(_each(_int))) for name, field in fields.items()}
    required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    _fields(where, value, {name: checks[name] for name in required}, checks)
    try:
        case_of({"case": value})
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from None
