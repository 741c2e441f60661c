"""`mla-cute bench`: the bench's command with its options read by typer, rich's progress and tables that fit."""

from collections.abc import Callable, Sequence
from typing import Any

from ..bench import command, figures, report
from ..bench.options import OPTIONS
from .parameters import takes
from .screen import Wide, print_line, progress, show_table

# The columns of the bench that fit a terminal; the record holds all of them.
COLUMNS = (
    "H", "B", "L", "page", "dtype", "us", "plan", "us+plan/61", "chained",
    "GB/s", "% read", "TFLOP/s", "% cuBLAS", "x public", "rel err",
)  # fmt: skip
# What goes first in a narrow terminal. The shape, us and rel err, which holds the verdict, stay.
_DROP = ("chained", "plan", "GB/s", "TFLOP/s", "% cuBLAS", "% read", "x public")
SHAPE_FOLD = ("B", "L", "dtype")


@takes(OPTIONS)
def bench(*, wide: Wide = False, **values: Any) -> int:
    """Time a grid of decode shapes, or presets, with the ceilings of this GPU and installed peers in the same run."""
    return command.bench(values, RichScreen(wide))


class RichScreen:
    """A bar while it times, then a table of all rows; `wide`: with all columns of the record."""

    def __init__(self, wide: bool) -> None:
        self._wide = wide

    def say(self, text: str) -> None:
        print_line(text)

    def timed(self, time_them: Callable[..., command.Record], peers: Sequence[str]) -> command.Record:
        with progress("timing") as step:
            record = time_them(progress=step)
        columns = report.COLUMNS if self._wide else COLUMNS
        show_table(
            f"paged MLA on {figures.gpu_name(record)}",
            (*columns, *peers),
            [cells(row, columns, peers) for row in record["rows"]],
            text_columns=0,
            drop=(*_DROP, *reversed(peers), "us+plan/61"),
            fold=SHAPE_FOLD,
            elsewhere="the record (--out FILE)",
            wide=self._wide,
        )
        return record

    def comparison(self, rows: Sequence[tuple[str, ...]]) -> None:
        drop = ("a chained", "b chained", "a plan", "b plan")
        options: dict[str, Any] = {"drop": drop, "fold": SHAPE_FOLD, "elsewhere": "one of the records"}
        show_table("a / b", report.COMPARE_COLUMNS, rows, text_columns=0, wide=self._wide, **options)


def cells(row: dict[str, Any], columns: tuple[str, ...], peers: Sequence[str]) -> tuple[str, ...]:
    """The cells of a record's row, of `columns` and of the peers."""
    by_name = dict(zip(report.columns(peers), report.cells(row, peers), strict=True))
    if "error" in row and "us" not in columns:
        by_name["us+plan/61"] = by_name["us"]
    return tuple(by_name[name] for name in (*columns, *peers))
