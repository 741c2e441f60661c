"""What the commands share on the terminal: consoles, tables, progress."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

# A pipe or a file has no width of its own, and rich's 80 columns would fold the tables.
_WIDE = 200


def console(stderr: bool = False) -> Console:
    """Made per use, so that it writes to what sys.stdout is at that time."""
    plain = Console(stderr=stderr)
    return plain if plain.is_terminal else Console(stderr=stderr, width=_WIDE)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> Table:
    """A table whose first `text_columns` columns are text; the others are numbers and align right."""
    made = Table(title=title, title_justify="left", header_style="bold")
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i < text_columns else "right", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made


def progress_bar(*columns: ProgressColumn) -> Progress:
    """On standard error, if that is a terminal; `columns` stand before the description."""
    bar = Progress(
        SpinnerColumn(),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        *columns,
        TextColumn("{task.description}"),
        console=console(stderr=True),
        transient=True,
    )
    bar.disable = not bar.console.is_terminal
    return bar


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on standard error while the block runs; yields the function to call with (done, total, label)."""
    with progress_bar() as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total, label: bar.update(task, completed=done, total=total, description=label)
