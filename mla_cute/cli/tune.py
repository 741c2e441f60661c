"""`mla-cute tune` and `mla-cute tune report`: tuning's command with its options read by typer, and rich's progress."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.progress import TextColumn

from ..tuning import command
from ..tuning.options import OPTIONS, REPORT_OPTIONS
from .parameters import takes
from .screen import Wide, progress_bar, say, show_table

# Of the tables of a dry run and of a report: what goes first in a narrow terminal.
_DROP = ("not the default", "shapes", "most")

app = typer.Typer(invoke_without_command=True, no_args_is_help=False)


class RichScreen:
    """Lines, a bar with the time left on standard error or lines where that is no terminal, tables."""

    def __init__(self, wide: bool) -> None:
        self._wide, self._plain = wide, command.PlainScreen()
        self._bar = progress_bar(TextColumn("{task.fields[left]}", markup=False))
        self._task = self._bar.add_task("", total=None, left="")

    @contextlib.contextmanager
    def running(self) -> Iterator["RichScreen"]:
        with self._bar:
            yield self

    def say(self, text: str) -> None:
        say(text, style="red" if text.startswith("FAILED") else None, on=self._above_the_bar())

    def step(self, done: int, total: int, label: str, seconds_left: float | None) -> None:
        if self._bar.disable:
            self._plain.step(done, total, label, seconds_left)
        left = "" if seconds_left is None else f"{command.duration(seconds_left)} left"
        self._bar.update(self._task, completed=done, total=total, description=label, left=left)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> None:
        options: dict[str, Any] = {"drop": _DROP, "fold": columns[:texts], "wide": self._wide}
        show_table(title, columns, rows, text_columns=texts, on=self._above_the_bar(), **options)

    def _above_the_bar(self) -> Console | None:
        """The console of the bar where both are seen in one terminal: lines of another would begin in the bar's."""
        return self._bar.console if not self._bar.disable and sys.stdout.isatty() else None


def _interruptible(wide: bool, act: Callable[[RichScreen], int]) -> int:
    try:
        with RichScreen(wide).running() as screen:
            return act(screen)
    except KeyboardInterrupt:
        return 130


@app.callback()
@takes(OPTIONS)
def tune(context: typer.Context, *, wide: Wide = False, **values: Any) -> int:
    """Measure which configurations are fastest for given shapes on this GPU, and keep them for later calls."""
    if context.invoked_subcommand is not None:
        return 0
    return _interruptible(wide, lambda screen: command.run(command.options_of(values), screen))


@app.command("report")
@takes(REPORT_OPTIONS)
def report_command(*, wide: Wide = False, **values: Any) -> int:
    """Show what an earlier run won over the default, and write it as Markdown and PNG."""
    return _interruptible(wide, lambda screen: command.show_report(values["file"], values["out"], screen))
