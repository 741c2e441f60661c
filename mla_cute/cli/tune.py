"""`mla-cute tune` and `mla-cute tune report`: tuning's command with typer's options and rich's progress."""

import argparse
import contextlib
import math
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import TextColumn

from ..bench.__main__ import numbers
from ..tuning import command, recipes
from .screen import progress_bar, say, show_table, usage_error

T = TypeVar("T")

# Of the tables of a dry run and of a report: what goes first in a narrow terminal.
_DROP = ("not the default", "shapes", "most")

app = typer.Typer(invoke_without_command=True, no_args_is_help=False)


class RichScreen:
    """Lines, a bar with the time left on standard error, tables."""

    def __init__(self) -> None:
        self._bar = progress_bar(TextColumn("{task.fields[left]}", markup=False))
        self._task = self._bar.add_task("", total=None, left="")

    @contextlib.contextmanager
    def running(self) -> Iterator["RichScreen"]:
        with self._bar:
            yield self

    def say(self, text: str) -> None:
        say(text, style="red" if text.startswith("FAILED") else None, on=self._above_the_bar())

    def step(self, done: int, total: int, label: str, seconds_left: float | None) -> None:
        left = "" if seconds_left is None else f"{command.duration(seconds_left)} left"
        self._bar.update(self._task, completed=done, total=total, description=label, left=left)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        show_table(title, columns, rows, drop=_DROP, fold=columns[:1], on=self._above_the_bar())

    def _above_the_bar(self) -> Console | None:
        """The console of the bar where both are seen in one terminal: lines of another would begin in the bar's."""
        return self._bar.console if not self._bar.disable and sys.stdout.isatty() else None


def _run(act: Callable[[RichScreen], int]) -> None:
    try:
        with RichScreen().running() as screen:
            status = act(screen)
    except command.UsageError as error:
        usage_error(error)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if status:
        raise typer.Exit(status)


def _parsed(parse: Callable[[str], T], option: str, text: str | None) -> T | None:
    try:
        return parse(text) if text is not None else None
    except argparse.ArgumentTypeError as error:
        raise command.UsageError(f"{option}: {error}") from None


@app.callback()
def tune(
    context: typer.Context,
    recipe: Annotated[list[str] | None, typer.Option(help=f"{', '.join(recipes.names())}, or a TOML file")] = None,
    from_log: Annotated[pathlib.Path | None, typer.Option(help="shapes recorded by MLA_CUTE_LOG_SHAPES")] = None,
    op: Annotated[str | None, typer.Option(help="grid: decode, prefill")] = None,
    heads: Annotated[str | None, typer.Option(help="grid: query heads, as 16,128")] = None,
    batch: Annotated[str | None, typer.Option(help="grid: requests")] = None,
    kv_len: Annotated[
        str | None, typer.Option(help="grid: tokens per request; with --from-log also of calls that did not know it")
    ] = None,
    q_len: Annotated[str | None, typer.Option(help="grid: query tokens per request, prefill only")] = None,
    page_size: Annotated[str | None, typer.Option(help="grid: tokens per page")] = None,
    kv_format: Annotated[str | None, typer.Option(help="grid: none, tensor, token, group")] = None,
    q_fp8: Annotated[bool, typer.Option("--q-fp8", help="grid: e4m3 queries, with FP8 caches")] = False,
    dtype: Annotated[str, typer.Option(help="bf16 or fp16")] = "bf16",
    budget: Annotated[str | None, typer.Option(help="as 10m: ends the run then")] = None,
    out: Annotated[pathlib.Path | None, typer.Option(help="tuned file; default: this user's for this GPU")] = None,
    measurements: Annotated[pathlib.Path | None, typer.Option(help="raw data; default: beside the tuned file")] = None,
    report: Annotated[pathlib.Path | None, typer.Option(help="folder for what was won, Markdown and PNG")] = None,
    workers: Annotated[int | None, typer.Option(help="compiling processes; default: one per core, at most 16")] = None,
    timeout: Annotated[float, typer.Option(help="seconds of silence after which a candidate is hung")] = 20.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print shapes and candidates, run nothing")] = False,
) -> None:
    """Measure which configurations are fastest for given shapes on this GPU, and keep them for later calls."""
    if context.invoked_subcommand is not None:
        return

    def act(screen: RichScreen) -> int:
        values: dict[str, Any] = {
            "recipe": recipe or [],
            "from_log": from_log,
            "op": op.split(",") if op is not None else None,
            "heads": _parsed(numbers, "--heads", heads),
            "batch": _parsed(numbers, "--batch", batch),
            "kv_len": _parsed(numbers, "--kv-len", kv_len),
            "q_len": _parsed(numbers, "--q-len", q_len),
            "page_size": _parsed(numbers, "--page-size", page_size),
            "kv_format": _parsed(command.parse_formats, "--kv-format", kv_format),
            "q_fp8": q_fp8,
            "dtype": _parsed(command.parse_dtype, "--dtype", dtype),
            "budget": _parsed(command.parse_budget, "--budget", budget) or math.inf,
            "out": out,
            "measurements": measurements,
            "report": report,
            "workers": workers,
            "timeout": timeout,
            "dry_run": dry_run,
        }
        return command.run(command.options_of(values), screen)

    _run(act)


@app.command("report")
def report_command(
    file: Annotated[pathlib.Path, typer.Argument(help="measurements file of an earlier run")],
    out: Annotated[pathlib.Path | None, typer.Option(help="folder for Markdown and PNG")] = None,
) -> None:
    """Show what an earlier run won over the default, and write it as Markdown and PNG."""
    _run(lambda screen: command.show_report(file, out, screen))
