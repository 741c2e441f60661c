"""Figures of a record as PNG, with matplotlib (extra "bench"). Colours are told apart by colour-blind readers too."""

from __future__ import annotations

import importlib
import io
import math
from typing import TYPE_CHECKING, Any

from ..extras import install_command
from .figures import Bars, Cell, Figure, HeatMaps, Roofline, Scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

DPI = 160
FONT = {"title": 11, "panel": 10, "label": 9, "tick": 8.5, "cell": 9, "note": 6.8}
INK, MUTED, EMPTY = "#1a1a1a", "#5f6368", "#ececec"
DARK_BELOW = 0.21  # luminance of a cell under which white letters have more contrast than INK
SHARE_MAP, RATIO_MAP = "cividis", "PuOr"  # PuOr: orange slower, purple faster
RATIO_SPREAD = (1.25, 4.0)  # least and greatest end of the ratio scale: from 1/x to x
RATIO_TICKS = (  # by the end of the scale
    (1.7, (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.4, 1.6)),
    (2.5, (0.4, 0.5, 0.65, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5)),
    (math.inf, (0.25, 0.35, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0)),
)
# Okabe and Ito's palette, a colour per number of heads; a marker per cache, hollow where the queries are 16-bit.
HEAD_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8a8a8a", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h", "p")
BAR_COLOURS = {"read": "#0072B2", "cuBLAS": "#E69F00", "faster": "#7B5AA6", "slower": "#D98032"}
BAR_NAMES = {"read": "of the read bandwidth", "cuBLAS": "of cuBLAS bf16", "faster": "faster", "slower": "slower"}
PANELS_PER_ROW = 3
CELL_SIZE = (0.92, 0.52)  # inches
PANEL_LEAST = (1.7, 1.1)
ROOFLINE_SIZE = (9.6, 5.2)
BAR_WIDTH, BAR_HEIGHT = 9.6, 0.27
POINT_AREA = (14.0, 95.0)  # at POINT_BYTES and less, and at so many and more
POINT_BYTES = (1e6, 5e9)
LEGEND_BYTES = {"1 MB or less": 10**6, "70 MB": 7 * 10**7, "5 GB or more": 5 * 10**9}


def require() -> None:
    """Raise ImportError, with what to install, where matplotlib is missing."""
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError(f"the report needs matplotlib: {install_command('matplotlib')} ({error})") from None


def png(figure: Figure, about: str = "") -> bytes:
    """Draw one figure; `about` is kept in the file as its description. Raises ImportError without matplotlib."""
    require()
    if isinstance(figure, Roofline):
        canvas = _roofline(figure)
    elif isinstance(figure, HeatMaps):
        canvas = _heat_maps(figure)
    else:
        canvas = _bars(figure)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Description": about} if about else None)
    return buffer.getvalue()


def _canvas(width: float, height: float, title: str) -> Canvas:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Made

    canvas = Made(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(canvas)
    canvas.suptitle(title, fontsize=FONT["title"], fontweight="bold", color=INK, x=0.01, ha="left")
    return canvas


def _quiet(axes: Axes) -> None:
    axes.tick_params(labelsize=FONT["tick"], colors=INK, length=0)
    axes.spines[:].set_visible(False)


# --- heat maps


def _heat_maps(figure: HeatMaps) -> Canvas:
    columns = min(PANELS_PER_ROW, len(figure.panels))
    lines = -(-len(figure.panels) // columns)
    width = max(PANEL_LEAST[0], CELL_SIZE[0] * len(figure.lengths) + 0.3)
    height = max(PANEL_LEAST[1], CELL_SIZE[1] * len(figure.batches)) + 0.35
    canvas = _canvas(max(5.0, columns * width + 1.7), lines * height + 1.0, figure.title)
    grid = canvas.subplots(lines, columns, squeeze=False)
    norm, colours = _colours(figure)
    for i, axes in enumerate(grid.flat):
        if i >= len(figure.panels):
            axes.set_axis_off()
            continue
        _panel(axes, figure, i, norm, colours)
        axes.set_title(figure.panels[i].title, fontsize=FONT["panel"], color=INK)
        if i % columns == 0:
            axes.set_ylabel("batch", fontsize=FONT["label"], color=INK)
        if i + columns >= len(figure.panels):
            axes.set_xlabel("tokens per request", fontsize=FONT["label"], color=INK)
    _colour_bar(canvas, grid, figure, norm, colours)
    return canvas


def _panel(axes: Axes, figure: HeatMaps, i: int, norm: Any, colours: Any) -> None:
    cells = figure.panels[i].cells
    batches, lengths = figure.batches, figure.lengths
    for y, batch in enumerate(batches):
        for x, length in enumerate(lengths):
            cell = cells.get((batch, length))
            if cell is None or cell.value is None:
                _blank(axes, x, y, cell, figure.scale)
            else:
                _filled(axes, x, y, cell, figure.scale, colours(norm(cell.value)))
    axes.set_xlim(-0.5, len(lengths) - 0.5)
    axes.set_ylim(-0.5, len(batches) - 0.5)
    axes.set_xticks(range(len(lengths)), [str(n) for n in lengths])
    axes.set_yticks(range(len(batches)), [str(b) for b in batches])
    _quiet(axes)


def _filled(axes: Axes, x: int, y: int, cell: Cell, scale: Scale, colour: tuple[float, ...]) -> None:
    from matplotlib.patches import Rectangle

    assert cell.value is not None
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white", linewidth=1.5))
    ink = INK if _luminance(colour) > DARK_BELOW else "white"
    axes.text(
        x,
        y + 0.13,
        _value(cell.value, scale),
        ha="center",
        va="center",
        fontsize=FONT["cell"],
        color=ink,
        weight="bold",
    )
    note = f"{cell.kind} {cell.note}".lstrip()
    axes.text(x, y - 0.24, note, ha="center", va="center", fontsize=FONT["note"], color=ink)


def _blank(axes: Axes, x: int, y: int, cell: Cell | None, scale: Scale) -> None:
    """Not measured, or nothing to show: failed cells are hatched and named."""
    from matplotlib.patches import Rectangle

    hatch = None if cell is None else "////"
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=EMPTY, edgecolor="white", linewidth=1.5, hatch=hatch))
    nothing = "not measured" if scale is Scale.SHARE else "–"
    text = nothing if cell is None else cell.note
    size, colour = (FONT["note"], MUTED) if cell is None else (FONT["tick"], INK)
    axes.text(x, y, text, ha="center", va="center", fontsize=size, color=colour)


def _colours(figure: HeatMaps) -> tuple[Any, Any]:
    """Norm and colour map."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize

    if figure.scale is Scale.SHARE:
        return Normalize(0, 1, clip=True), colormaps[SHARE_MAP]
    found = [cell.value for panel in figure.panels for cell in panel.cells.values() if cell.value is not None]
    spread = _spread(found)
    return LogNorm(1 / spread, spread, clip=True), colormaps[RATIO_MAP]


def _colour_bar(canvas: Canvas, grid: Any, figure: HeatMaps, norm: Any, colours: Any) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.ticker import NullLocator

    ticks = (0, 0.25, 0.5, 0.75, 1.0) if figure.scale is Scale.SHARE else _ratio_ticks(norm.vmin, norm.vmax)
    bar = canvas.colorbar(ScalarMappable(norm, colours), ax=grid, ticks=ticks, aspect=16, pad=0.015, fraction=0.05)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.set_yticklabels([f"{tick:.0%}" if figure.scale is Scale.SHARE else f"{tick:g}x" for tick in ticks])
    bar.ax.tick_params(labelsize=FONT["tick"], colors=INK, length=0)
    bar.outline.set_visible(False)
    what = figure.scale.value if figure.scale is Scale.SHARE else "speed-up (log scale)"
    bar.set_label(what, fontsize=FONT["label"], color=INK)


def _spread(found: list[float]) -> float:
    farthest = max([abs(math.log(value)) for value in found], default=0.0)
    return min(max(math.exp(farthest), RATIO_SPREAD[0]), RATIO_SPREAD[1])


def _ratio_ticks(least: float, most: float) -> tuple[float, ...]:
    """The ticks of a scale of ratios; a wider scale has fewer of them near 1."""
    spread = max(1 / least, most)
    ticks = next(ticks for end, ticks in RATIO_TICKS if spread <= end)
    return tuple(tick for tick in ticks if least * 0.999 <= tick <= most * 1.001)


def _luminance(colour: tuple[float, ...]) -> float:
    """Relative luminance, of sRGB (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _value(value: float, scale: Scale) -> str:
    return f"{value:.0%}" if scale is Scale.SHARE else f"{value:.2f}x"


# --- bars


def _bars(figure: Bars) -> Canvas:
    canvas = _canvas(BAR_WIDTH, BAR_HEIGHT * len(figure.entries) + 1.25, figure.title)
    axes = canvas.subplots()
    start = 1.0 if figure.scale is Scale.RATIO else 0.0
    for y, (_, cell) in enumerate(figure.entries):
        value = start if cell.value is None else cell.value
        if cell.value is not None:
            colour = BAR_COLOURS[_kind(cell, figure.scale)]
            axes.barh(y, value - start, left=start, height=0.72, color=colour)
        text = cell.note if cell.value is None else f"{_value(cell.value, figure.scale)}  {cell.note}"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
        axes.annotate(
            text,
            (max(value, start), y),
            xytext=(5, 0),
            textcoords="offset points",
            va="center_baseline",
            fontsize=FONT["tick"],
            color=INK,
            bbox=box,
        )
    axes.set_yticks(range(len(figure.entries)), [label for label, _ in figure.entries])
    axes.set_ylim(len(figure.entries) - 0.4, -0.6)
    _quiet(axes)
    _bar_axis(axes, figure)
    _bar_legend(canvas, figure)
    return canvas


def _kind(cell: Cell, scale: Scale) -> str:
    """A name of BAR_COLOURS."""
    assert cell.value is not None
    if scale is Scale.SHARE:
        return cell.kind
    return "faster" if cell.value >= 1 else "slower"


def _bar_axis(axes: Axes, figure: Bars) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    found = [cell.value for _, cell in figure.entries if cell.value is not None]
    if figure.scale is Scale.RATIO:
        spread = max(_spread(found), *found, 1.0)
        axes.set_xscale("log")
        axes.set_xlim(1 / _spread(found), spread**1.9)  # the texts stand right of the bars
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(_ratio_ticks(1 / _spread(found), spread))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axes.axvline(1, color=INK, linewidth=0.9)
    else:
        axes.set_xlim(0, max([1.0, *found]) * 1.25)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.set_xlabel(figure.scale.value, fontsize=FONT["label"], color=INK)
    axes.grid(axis="x", color="#d0d0d0", linewidth=0.6)
    axes.set_axisbelow(True)


def _bar_legend(canvas: Canvas, figure: Bars) -> None:
    from matplotlib.patches import Patch

    found = [cell for _, cell in figure.entries if cell.value is not None]
    kinds = {_kind(cell, figure.scale) for cell in found}
    handles = [Patch(color=BAR_COLOURS[kind], label=name) for kind, name in BAR_NAMES.items() if kind in kinds]
    canvas.legend(handles=handles, loc="outside lower right", ncols=2, frameon=False, fontsize=FONT["label"])


# --- roofline


def _roofline(figure: Roofline) -> Canvas:
    canvas = _canvas(*ROOFLINE_SIZE, figure.title)
    axes = canvas.subplots()
    heads = sorted({point.num_heads for point in figure.points})
    colours = {h: HEAD_COLOURS[i % len(HEAD_COLOURS)] for i, h in enumerate(heads)}
    markers = _markers(figure)
    # Large points first, that small ones stay visible.
    for point in sorted(figure.points, key=lambda point: -point.bytes_moved):
        marker, filled = markers[point.format]
        colour = colours[point.num_heads]
        axes.scatter(
            point.intensity,
            point.tflops,
            s=_area(point.bytes_moved),
            marker=marker,
            facecolors=colour if filled else "none",
            edgecolors="white" if filled else colour,
            linewidths=0.5 if filled else 1.4,
            alpha=0.85,
            zorder=3 if filled else 4,
        )
    _roof(axes, figure)
    _roofline_legends(canvas, colours, markers)
    return canvas


def _markers(figure: Roofline) -> dict[str, tuple[str, bool]]:
    """Marker of each format, and whether it is filled; formats that differ in the queries alone share the marker."""
    caches = list(dict.fromkeys(_cache(point.format) for point in figure.points))
    return {
        point.format: (
            MARKERS[caches.index(_cache(point.format)) % len(MARKERS)],
            point.q_fp8 or "FP8" not in point.format,
        )
        for point in figure.points
    }


def _cache(format_name: str) -> str:
    return format_name.partition(", ")[0]


def _area(bytes_moved: int) -> float:
    least, most = map(math.log, POINT_BYTES)
    share = min(max((math.log(bytes_moved) - least) / (most - least), 0.0), 1.0)
    return POINT_AREA[0] + share * (POINT_AREA[1] - POINT_AREA[0])


def _roof(axes: Axes, figure: Roofline) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    ridge = figure.cublas_tflops * 1e3 / figure.read_gbps
    intensities = [point.intensity for point in figure.points] or [ridge]
    left, right = min(*intensities, ridge / 4) / 1.6, max(*intensities, ridge * 4) * 1.6
    least = min([point.tflops for point in figure.points] or [figure.cublas_tflops])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(least / 1.8, figure.cublas_tflops * 2.6)
    roof = [figure.read_gbps * left * 1e-3, figure.cublas_tflops, figure.cublas_tflops]
    axes.plot([left, ridge, right], roof, color=INK, linewidth=1.6, zorder=2)
    axes.plot([ridge, ridge], [least / 1.8, figure.cublas_tflops], color=MUTED, linewidth=0.8, linestyle=":", zorder=1)
    note: dict[str, Any] = {"fontsize": FONT["tick"], "color": INK}
    axes.text(
        right / 1.05, figure.cublas_tflops * 1.1, f"cuBLAS bf16, {figure.cublas_tflops:.0f} TFLOP/s", ha="right", **note
    )
    middle = math.sqrt(left * ridge)
    axes.annotate(
        f"read, {figure.read_gbps:.0f} GB/s",
        (middle, figure.read_gbps * middle * 1e-3),
        xytext=(-4, 5),
        textcoords="offset points",
        ha="right",
        va="bottom",
        **note,
    )
    axes.text(ridge * 1.03, least / 1.6, f"ridge {ridge:.0f} FLOP/B", va="bottom", fontsize=FONT["tick"], color=MUTED)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()
    axes.set_xlabel("arithmetic intensity, FLOP per byte moved (log scale)", fontsize=FONT["label"], color=INK)
    axes.set_ylabel("TFLOP/s (log scale)", fontsize=FONT["label"], color=INK)
    axes.grid(color="#e0e0e0", linewidth=0.6)
    axes.set_axisbelow(True)
    _quiet(axes)


def _roofline_legends(canvas: Canvas, colours: dict[int, str], markers: dict[str, tuple[str, bool]]) -> None:
    from matplotlib.lines import Line2D

    def dot(label: str, colour: str, marker: str = "o", filled: bool = True, area: float = 45.0) -> Line2D:
        inside = colour if filled else "none"
        size, edge = math.sqrt(area), 0.0 if filled else 1.4
        return Line2D(
            [], [], ls="", color=colour, marker=marker, mfc=inside, markersize=size, markeredgewidth=edge, label=label
        )

    groups = {
        "heads": [dot(str(h), colour) for h, colour in colours.items()],
        "cache and queries": [dot(name, MUTED, *marker) for name, marker in sorted(markers.items())],
        "bytes moved": [dot(label, MUTED, area=_area(size)) for label, size in LEGEND_BYTES.items()],
    }
    handles = [handle for name, dots in groups.items() for handle in (Line2D([], [], ls="", label=name), *dots)]
    legend = canvas.legend(
        handles=handles, loc="outside right upper", frameon=False, fontsize=FONT["tick"], labelspacing=0.55
    )
    for text in legend.get_texts():
        text.set_fontweight("bold" if text.get_text() in groups else "normal")
