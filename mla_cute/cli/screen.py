"""What the commands share on the terminal: consoles, tables, progress, a watchdog for a GPU that hangs."""

import contextlib
import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
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


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on standard error while the block runs; yields the function to call with (done, total, label)."""
    bar = Progress(
        SpinnerColumn(),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console(stderr=True),
        transient=True,
    )
    bar.disable = not bar.console.is_terminal
    with bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total, label: bar.update(task, completed=done, total=total, description=label)


class Watchdog:
    """Ends the process when `feed` is not called for `seconds`: a hung kernel cannot be interrupted from Python."""

    # A launch that hangs may hold the GIL, and then only faulthandler's own thread still runs.
    _grace = 10

    def __init__(self, seconds: float, enabled: bool):
        self._seconds, self._enabled = seconds, enabled
        self._timer: threading.Timer | None = None

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def feed(self, what: str) -> None:
        """`what` runs now, and has `seconds` to finish."""
        if not self._enabled:
            return
        self._stop()
        faulthandler.dump_traceback_later(self._seconds + self._grace, exit=True, file=2)
        self._timer = threading.Timer(self._seconds, self._end, (what,))
        self._timer.daemon = True
        self._timer.start()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            faulthandler.cancel_dump_traceback_later()

    def _end(self, what: str) -> None:
        message = f"mla-cute: {what} did not finish within {self._seconds:g} s; the GPU hangs"
        print(message, file=sys.__stderr__, flush=True)
        os._exit(3)
