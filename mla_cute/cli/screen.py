"""What the commands share on the terminal: consoles, lines, tables that fit, usage errors, progress."""

import contextlib
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, NoReturn

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TimeElapsedColumn,
)
from rich.table import Column, Table
from rich.text import Text

from .stages import Stages

Wide = Annotated[bool, typer.Option("--wide", help="all columns of the tables, wider than the terminal or not")]

# A pipe or a file has no width of its own, and rich's 80 columns would fold the text.
_WIDE = 200
# A cell that may be folded keeps at least so many columns.
_FOLDED = 12


def console(stderr: bool = False) -> Console:
    """Made per use, so that it writes to what sys.stdout is at that time."""
    plain = Console(stderr=stderr)
    return plain if _has_width(plain) else Console(stderr=stderr, width=_WIDE)


def _has_width(made: Console) -> bool:
    """FORCE_COLOR makes a pipe a terminal to rich; its width is then COLUMNS, or nobody's."""
    return made.file.isatty() or (made.is_terminal and "COLUMNS" in os.environ)


def say(text: str, style: str | None = None, on: Console | None = None) -> None:
    """A line as it is: neither folded nor read as markup, so that paths in it can be copied."""
    (on or console()).print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def print_line(text: str) -> None:
    """A line of results: red where it says that something is wrong."""
    wrong = text.lstrip().startswith(("FAILED", "WRONG", "MISSED", "INCOMPLETE"))
    say(text, style="red" if wrong else None)


def print_lines(lines: Sequence[str]) -> None:
    for text in lines:
        print_line(text)


def print_prose(text: str) -> None:
    """Folded at words."""
    console().print(text, markup=False, highlight=False)


def usage_error(message: object) -> NoReturn:
    """Say in one line on standard error what cannot be, and end with status 2."""
    say(f"mla-cute: {' '.join(str(message).split())}", style="red", on=console(stderr=True))
    raise typer.Exit(2)


def show_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    text_columns: int = 1,
    drop: Sequence[str] = (),
    fold: Sequence[str] = (),
    elsewhere: str = "",
    wide: bool = False,
    on: Console | None = None,
) -> None:
    """Print a table and leave nothing out silently.

    Where it is wider than the terminal, headers are broken at spaces and the padding goes; then whole columns are left
    out, and a line under the table names them; then cells of `fold` take several lines. What is too wide even so is
    printed at its own width, which the terminal wraps. With `wide`, and into a pipe, all of it is.

    Args:
        text_columns: so many columns at the left are text; the others are numbers and align right.
        drop: names of columns that may be left out, the first one first; one name may be several columns' name.
        fold: names of columns of text that may be folded.
        elsewhere: what else has the columns left out: "the record (--out FILE)".
        wide: of the option --wide.
        on: the console to print on; None: standard output.
    """
    on = on or console()
    shown = list(range(len(columns)))
    made = _Fitted(columns, rows, text_columns, frozenset(fold))
    left_out: list[str] = []
    if wide or not _has_width(on):
        _print_at(on, max(_WIDE, made.width(shown, columns, 1)), made.table(title, shown, columns, 1, False))
        return
    headers: Sequence[str] = columns
    padding, folded = 1, False
    if made.width(shown, headers, padding) > on.width:
        headers = made.broken
        remaining = [name for name in drop if name in columns]
        while made.width(shown, headers, padding) > on.width:
            if padding and made.width(shown, headers, 0) <= on.width:
                padding = 0
            elif remaining:
                left_out.append(remaining.pop(0))
                shown = [i for i in shown if columns[i] != left_out[-1]]
            else:
                padding, folded = 0, made.width(shown, headers, 0, folded=True) <= on.width
                break
    if folded or made.width(shown, headers, padding) <= on.width:
        on.print(made.table(title, shown, headers, padding, folded))
    else:
        _print_at(on, made.width(shown, headers, padding), made.table(title, shown, headers, padding, folded))
    if left_out:
        others = f"a wider terminal, --wide{f', a pipe or {elsewhere}' if elsewhere else ' or a pipe'}"
        say(f"left out in {on.width} columns: {', '.join(left_out)}; {others} has them", on=on)


def _print_at(on: Console, width: int, table: Table) -> None:
    """On that console, above its bar if it has one, as if it had `width` columns; the terminal wraps the lines."""
    before, on.width = on.width, width
    try:
        on.print(table, soft_wrap=True)
    finally:
        on.width = before


class _Fitted:
    """The widths of a table's columns, and the table of some of them."""

    def __init__(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int, fold: frozenset[str]
    ) -> None:
        self._rows, self._text_columns = rows, text_columns
        self._folds = [name in fold for name in columns]
        self._cells = [max((_widest(row[i]) for row in rows), default=0) for i in range(len(columns))]
        self.broken = [
            "\n".join(textwrap.wrap(name, max(cells, *map(len, name.split())), break_on_hyphens=False)) if name else ""
            for name, cells in zip(columns, self._cells, strict=True)
        ]

    def width(self, shown: Sequence[int], headers: Sequence[str], padding: int, folded: bool = False) -> int:
        """Of the whole table, borders included; with `folded` the least it can be."""
        return sum(self._column(i, headers, folded) + 2 * padding + 1 for i in shown) + 1

    def _column(self, i: int, headers: Sequence[str], folded: bool) -> int:
        widest = max(self._cells[i], _widest(headers[i]))
        return min(widest, _FOLDED) if folded and self._folds[i] else widest

    def table(self, title: str, shown: Sequence[int], headers: Sequence[str], padding: int, folded: bool) -> Table:
        made = Table(title=Text(title), title_justify="left", header_style="bold", padding=(0, padding))
        for i in shown:
            may_fold = folded and self._folds[i]
            made.add_column(
                Text(headers[i]),
                justify="left" if i < self._text_columns else "right",
                no_wrap=not may_fold,
                overflow="fold",
                min_width=None if may_fold else self._column(i, headers, False),
            )
        for row in self._rows:
            made.add_row(*(Text(row[i]) for i in shown))
        return made


def _widest(text: str) -> int:
    return max(map(cell_len, text.split("\n")))


class _Label(ProgressColumn):
    """What is being done, on one line."""

    def render(self, task: Task) -> Text:
        return Text(task.description, no_wrap=True, overflow="ellipsis")


def progress_bar(*columns: ProgressColumn) -> Progress:
    """On standard error, if that is a terminal; `columns` stand before the description."""
    whole = Column(no_wrap=True)  # a label that is too long is cut, and not the numbers before it
    bar = Progress(
        SpinnerColumn(table_column=whole),
        BarColumn(bar_width=30, table_column=Column(max_width=30)),
        MofNCompleteColumn(table_column=whole),
        TimeElapsedColumn(table_column=whole),
        *columns,
        _Label(),
        console=console(stderr=True),
        transient=True,
    )
    bar.disable = not sys.stderr.isatty()
    return bar


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on standard error while the block runs, or lines where that is no terminal; yields the function to call
    with (done, total, label)."""
    if not sys.stderr.isatty():
        yield Stages(what).step
        return
    with progress_bar() as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total, label: bar.update(task, completed=done, total=total, description=label)
