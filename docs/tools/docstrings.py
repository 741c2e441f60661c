"""Griffe extension: what docstrings of this project hold beside Google style, as the API reference needs it.

* `:func:` and other roles become links where docs/api has what they name, else code.
* `a, b: text` under Args or Attributes becomes a row for each name; `(the rest): text` a sentence below the table.
* A second error on a line under Raises becomes a row.
* Fields of a class as an unindented table of names and texts become Attributes.
"""

import inspect
import pathlib
import re
from typing import Any

import griffe

API = pathlib.Path(__file__).resolve().parents[1] / "api"
_ROLE = re.compile(r":(?:func|class|meth|mod):`~?([\w.]+)`")
_ROW = re.compile(r"    ((?:\w+, )*\w+|\(the rest\)): ?(.*)")
_RAISES = re.compile(r"^Raises:\n(?: .*\n?|\n(?= ))+", re.MULTILINE)
_FIELD = re.compile(r"([a-z]\w*) {2,}(\S.*)")


def documented() -> dict[str, str]:
    """What docs/api has: by its last name, the whole one."""
    names = [name for page in API.glob("*.md") for name in re.findall(r"^::: (\S+)", page.read_text("utf-8"), re.M)]
    return {name.rpartition(".")[2]: name for name in names}


def with_links(text: str, known: dict[str, str]) -> str:
    def link(match: re.Match[str]) -> str:
        name = match[1].rpartition(".")[2]
        return f"[`{name}`][{known[name]}]" if name in known else f"`{match[1]}`"

    return _ROLE.sub(link, text)


def with_attributes(text: str) -> str:
    """Rows `name   text`, continued by indented lines, as a section Attributes."""
    out: list[str] = []
    inside = False
    for line in text.splitlines():
        if field := _FIELD.fullmatch(line):
            if not inside:
                out.append("Attributes:")
            out.append(f"    {field[1]}: {field[2]}")
            inside = True
        elif inside and line.startswith("  "):
            out.append(f"        {line.strip()}")
        else:
            inside = False
            out.append(line)
    return "\n".join(out)


def with_rows(text: str) -> str:
    """Each row of Args and Attributes names one argument."""
    out: list[str] = []
    rest: list[str] = []
    row: list[str] = []  # lines of the row that is being read, the first without its names
    names: list[str] = []
    inside = False

    def end_row() -> None:
        if names == ["(the rest)"]:
            rest.append(f"The other arguments: {' '.join(line.strip() for line in row)}")
        else:
            for name in names:
                out.extend([f"    {name}: {row[0]}", *row[1:]])
        names.clear()
        row.clear()

    for line in [*text.splitlines(), "end"]:
        if inside and line and not line.startswith(" "):
            end_row()
            inside = False
            out.extend([*rest, ""] if rest else [])
            rest.clear()
        if inside and (found := _ROW.fullmatch(line)):
            end_row()
            names, row = found[1].split(", "), [found[2]]
        elif row:
            row.append(line)
        else:
            out.append(line)
        inside = inside or line in ("Args:", "Attributes:")
    return "\n".join(out[:-1])


def with_errors(text: str) -> str:
    """Each row of Raises begins with its errors: `... . OtherError: text` is another row."""
    return _RAISES.sub(lambda section: re.sub(r"(?<=\.)\s+(\w*Error): ", r"\n    \1: ", section[0]), text)


class Docstrings(griffe.Extension):
    def __init__(self) -> None:
        self.known = documented()

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        if obj.docstring is None:
            return
        text = with_links(inspect.cleandoc(obj.docstring.value), self.known)
        if obj.is_class:
            text = with_attributes(text)
        obj.docstring.value = with_rows(with_errors(text))
