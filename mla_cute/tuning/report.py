"""What tuning won, from a measurements file: lines, tables, Markdown and PNG."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from ..config import KernelConfig, differences
from .cost import PRUNED_FROM
from .search import GAIN, ORDINARY, PRUNED
from .session import group_of
from .store import Measured

GROUP_COLUMNS = ("op, cache", "shapes", "not the default", "geometric mean", "least", "most", "failed")
SHAPE_COLUMNS = (
    "op, cache", "heads", "page", "batch", "q_len", "kv_len",
    "default us", "tuned us", "gain", "runner-up us", "changed",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Report:
    """Of the tuned shapes of one file; gains are times of the default over times of the chosen configuration."""

    gpu: dict[str, Any]
    shapes: tuple[Measured, ...]

    @property
    def tuned(self) -> list[Measured]:
        return [shape for shape in self.shapes if shape.chosen is not None]

    def lines(self) -> list[str]:
        """The result in a few sentences."""
        if not self.tuned:
            return [f"No shape is tuned on {self.gpu['name']}."]
        gains = [shape.gain for shape in self.tuned]
        worst, best = (pick(self.tuned, key=lambda shape: shape.gain) for pick in (min, max))
        kept = sum(shape.chosen == default_of(shape) for shape in self.tuned)
        bad = sum(not trial["verdict"].startswith(ORDINARY) for shape in self.shapes for trial in shape.candidates)
        tried = sum(trial["verdict"] != PRUNED for shape in self.shapes for trial in shape.candidates)
        return [
            f"{len(self.tuned)} shapes on {self.gpu['name']}: tuned is {statistics.geometric_mean(gains):.3f}x the "
            f"speed of the default (geometric mean), {kept} keep the default.",
            f"Worst case {worst.gain:.3f}x: {worst.when}.",
            f"Best case {best.gain:.3f}x: {best.when}.",
            f"{tried} candidates, {bad} of them failed, hung, crashed or were wrong; "
            f"{len(self.shapes) - len(self.tuned)} shapes could not be tuned.",
            *self._model_line(),
        ]

    def _model_line(self) -> list[str]:
        """How what the model of cost.py leaves out would have done, by the sample of it that was timed."""
        pruned = sum(trial["verdict"] == PRUNED for shape in self.shapes for trial in shape.candidates)
        if not pruned:
            return []
        ratios = [ratio for shape in self.tuned for ratio in _sampled(shape)]
        text = f"{pruned} further candidates were not tried: the model has {PRUNED_FROM:g}x of the best's time for them"
        if not ratios:
            return [f"{text}, and none of their kind was."]
        missed = sum(ratio < 1 + GAIN for ratio in ratios)
        return [
            f"{text}. {len(ratios)} of their kind were: {missed} of these within {GAIN:.0%} of their shape's best, the "
            f"nearest at {min(ratios):.2f}x of its time."
        ]

    def group_rows(self) -> list[tuple[str, ...]]:
        """Rows of GROUP_COLUMNS."""
        rows: list[tuple[str, ...]] = []
        for name, shapes in self._groups().items():
            done = [shape for shape in shapes if shape.chosen is not None]
            gains = [shape.gain for shape in done]
            figures = ("-", "-", "-")
            if gains:
                figures = (f"{statistics.geometric_mean(gains):.3f}", f"{min(gains):.3f}", f"{max(gains):.3f}")
            changed = sum(shape.chosen != default_of(shape) for shape in done)
            rows.append((name, str(len(done)), str(changed), *figures, str(len(shapes) - len(done))))
        return rows

    def shape_rows(self) -> list[tuple[str, ...]]:
        """Rows of SHAPE_COLUMNS, tuned shapes only."""
        rows = []
        for name, shapes in self._groups().items():
            for shape in (shape for shape in shapes if shape.chosen is not None):
                when = shape.when
                numbers = (when.num_heads, when.page_size, when.batch, when.q_len, when.kv_len)
                runner_up = "-" if shape.runner_up_us is None else f"{shape.runner_up_us:.1f}"
                times = (f"{shape.default_us:.1f}", f"{shape.us:.1f}", f"{shape.gain:.3f}", runner_up)
                rows.append((name, *map(str, numbers), *times, changed_fields(shape)))
        return rows

    def markdown(self, picture: str | None) -> str:
        """The report as one Markdown page; `picture` is the name of the PNG beside it."""
        made = self.shapes[0].made_with if self.shapes else {}
        origin = ", ".join(f"{name} {value}" for name, value in made.items() if value is not None)
        parts = [f"# Tuning on {self.gpu['name']}", f"Made with {origin}.", "\n".join(f"* {x}" for x in self.lines())]
        if picture is not None:
            parts.append(f"![gain over the default, by its time]({picture})")
        parts += ["## By op and cache", _table(GROUP_COLUMNS, self.group_rows())]
        parts += ["## By shape", _table(SHAPE_COLUMNS, self.shape_rows())]
        if failed := [shape for shape in self.shapes if shape.chosen is None]:
            parts += ["## Not tuned", "\n".join(f"* {shape.when}: {shape.why}" for shape in failed)]
        return "\n\n".join(parts) + "\n"

    def _groups(self) -> dict[str, list[Measured]]:
        groups: dict[str, list[Measured]] = {}
        for shape in sorted(self.shapes, key=lambda shape: dataclasses.astuple(shape.when)):
            groups.setdefault(group_of(shape.when), []).append(shape)
        return groups


def _sampled(shape: Measured) -> list[float]:
    """Times of candidates that the model would leave out, over the least of the shape. Those that dropped out early
    have few samples."""
    model = [trial["model_us"] for trial in shape.candidates if trial.get("model_us")]
    times = [trial["us"] for trial in shape.candidates if trial["us"]]
    limit = PRUNED_FROM * min(model, default=0.0)
    return [
        trial["us"] / min(times)
        for trial in shape.candidates[1:]
        if trial["us"] and trial.get("model_us") and trial["model_us"] >= limit
    ]


def default_of(shape: Measured) -> KernelConfig:
    """The default it was compared with: the first candidate."""
    return KernelConfig.from_dict(shape.candidates[0]["config"])


def changed_fields(shape: Measured) -> str:
    """ "evict_first=False split_penalty=12", or "-" for the default."""
    assert shape.chosen is not None
    changed = differences(shape.chosen, default_of(shape))
    return " ".join(f"{name}={value}" for name, value in changed.items()) or "-"


def write(report: Report, folder: pathlib.Path) -> list[pathlib.Path]:
    """Write tuning.md, and tuning.png where matplotlib is installed and a shape is tuned; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    picture: str | None = None
    if report.tuned:
        try:
            _draw(report, folder / "tuning.png")
        except ImportError:
            pass  # the page says everything in its tables
        else:
            picture = "tuning.png"
            written.append(folder / picture)
    page = folder / "tuning.md"
    page.write_text(report.markdown(picture), encoding="utf-8")
    return [page, *written]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    return "\n".join("| " + " | ".join(row) + " |" for row in [*head, *rows])


def _draw(report: Report, path: pathlib.Path) -> None:
    """Gain over the default by the default's time, a colour per cache and a marker per op."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(9, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    groups: dict[str, list[Measured]] = {}
    for shape in sorted(report.tuned, key=lambda shape: dataclasses.astuple(shape.when)):
        groups.setdefault(group_of(shape.when), []).append(shape)
    caches = list(dict.fromkeys(name.split(", ", 1)[1] for name in groups))
    for name, shapes in groups.items():
        op, cache = name.split(", ", 1)
        axes.scatter(
            [shape.default_us or math.nan for shape in shapes],
            [100 * (shape.gain - 1) for shape in shapes],
            label=f"{name} ({len(shapes)})",
            marker={"decode": "o", "prefill": "^", "sparse": "s"}[op],
            color=f"C{caches.index(cache)}",
            s=22,
            alpha=0.75,
            linewidths=0,
        )
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda us, _: f"{us:g}"))
    axes.set_xlabel("time of the default, us")
    axes.set_ylabel("faster than the default, %")
    axes.set_title(f"{report.gpu['name']}: what tuning won, {len(report.tuned)} shapes", loc="left")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=150)
