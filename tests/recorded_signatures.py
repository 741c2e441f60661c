"""Signatures of other projects' public functions: recorded from their source, and those of live objects.

    python tests/recorded_signatures.py PACKAGE VERSION SOURCE_ROOT FILE:NAME[,NAME...] ... > tests/data/NAME.json

VERSION names a release or a commit, FILE is relative to SOURCE_ROOT, NAME is a function, Class.method or a class (a
dataclass: its fields). Sources are parsed, not imported. A parameter is {"name", "kind", "default"}, without "default"
where it has none; a default that is no literal, as torch.bfloat16, is "default_source", its text.
"""

import ast
import dataclasses
import inspect
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

DATA = pathlib.Path(__file__).parent / "data"
Parameter = dict[str, Any]


def load(name: str) -> dict[str, Any]:
    """A recorded file of tests/data."""
    return json.loads((DATA / name).read_text())


def of(function: Callable[..., Any]) -> list[Parameter]:
    """Parameters of a live function, or fields of a live dataclass."""
    if dataclasses.is_dataclass(function):
        return [_field(field.name, field.default) for field in dataclasses.fields(function)]
    return [
        {"name": p.name, "kind": p.kind.name} | ({} if p.default is p.empty else {"default": p.default})
        for p in inspect.signature(function).parameters.values()
    ]


def from_source(text: str, names: list[str]) -> dict[str, list[Parameter]]:
    """Parameters by name; of overloads the last definition, which is the implementation."""
    found: dict[str, list[Parameter]] = {}
    for prefix, node in _definitions(ast.parse(text).body, ""):
        if prefix in names:
            found[prefix] = _fields(node) if isinstance(node, ast.ClassDef) else _parameters(node.args)
    if missing := set(names) - set(found):
        raise KeyError(f"not defined there: {sorted(missing)}")
    return {name: found[name] for name in names}


def _definitions(body: list[ast.stmt], prefix: str) -> Any:
    for node in body:
        if isinstance(node, ast.FunctionDef):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield prefix + node.name, node
            yield from _definitions(node.body, f"{prefix}{node.name}.")


def _parameters(args: ast.arguments) -> list[Parameter]:
    positional = [(a, "POSITIONAL_ONLY") for a in args.posonlyargs] + [(a, "POSITIONAL_OR_KEYWORD") for a in args.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(args.defaults)) + list(args.defaults)
    found = [_parameter(a, kind, default) for (a, kind), default in zip(positional, defaults, strict=True)]
    if args.vararg:
        found.append(_parameter(args.vararg, "VAR_POSITIONAL", None))
    found += [_parameter(a, "KEYWORD_ONLY", d) for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    if args.kwarg:
        found.append(_parameter(args.kwarg, "VAR_KEYWORD", None))
    return found


def _parameter(arg: ast.arg, kind: str, default: ast.expr | None) -> Parameter:
    found = {"name": arg.arg, "kind": kind}
    if default is None:
        return found
    try:
        return found | {"default": ast.literal_eval(default)}
    except ValueError:
        return found | {"default_source": ast.unparse(default)}


def _fields(node: ast.ClassDef) -> list[Parameter]:
    return [
        _field(n.target.id, dataclasses.MISSING if n.value is None else ast.literal_eval(n.value))
        for n in node.body
        if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
    ]


def _field(name: str, default: Any) -> Parameter:
    return {"name": name, "kind": "FIELD"} | ({} if default is dataclasses.MISSING else {"default": default})


def main(package: str, version: str, root: str, *targets: str) -> None:
    record: dict[str, Any] = {"package": package, "version": version, "files": {}}
    for target in targets:
        file, _, names = target.partition(":")
        record["files"][file] = from_source((pathlib.Path(root) / file).read_text(), names.split(","))
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
