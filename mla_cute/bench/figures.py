"""What the plots of a record show, as data: a roofline, heat maps over batch and length, bars for all other shapes."""

import enum
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from . import report
from .cases import Case, PrefillCase, case_of
from .runner import row_ok

# A (page size, format) group is a heat map if it has this many cells, and a length is a column of it if this share of
# the column is measured; what is left becomes bars.
LEAST_CELLS = 4
LEAST_COLUMN = 0.5
MOST_BARS = 40  # in one picture


class Scale(enum.Enum):
    SHARE = "share of the ceiling"  # 0 .. 1
    RATIO = "speed-up"  # above 1: this record is faster


@dataclass(frozen=True)
class Cell:
    """One shape's figure. `value` None: it failed, or what it is compared with did, and `note` says which."""

    value: float | None
    note: str
    kind: str = ""  # the ceiling that `value` is a share of, "read" or "cuBLAS"; "" where it is no share


Measure = Callable[[dict[str, Any]], Cell | None]  # None: the row has nothing of the kind


@dataclass(frozen=True)
class Panel:
    title: str
    cells: dict[tuple[int, int], Cell]  # (batch, kv_len)


@dataclass(frozen=True)
class HeatMaps:
    """The cells of one page size and format, a panel per number of heads; all have the same batches and lengths."""

    name: str
    title: str
    scale: Scale
    panels: tuple[Panel, ...]

    @property
    def batches(self) -> list[int]:
        return sorted({batch for panel in self.panels for batch, _ in panel.cells})

    @property
    def lengths(self) -> list[int]:
        return sorted({length for panel in self.panels for _, length in panel.cells})


@dataclass(frozen=True)
class Bars:
    """Shapes that are on no grid: prefill, ragged batches, single cells."""

    name: str
    title: str
    scale: Scale
    entries: tuple[tuple[str, Cell], ...]


@dataclass(frozen=True)
class Point:
    num_heads: int
    format: str
    q_fp8: bool
    intensity: float  # FLOP per byte
    tflops: float
    bytes_moved: int


@dataclass(frozen=True)
class Roofline:
    name: str
    title: str
    read_gbps: float
    cublas_tflops: float
    points: tuple[Point, ...]


Figure = HeatMaps | Bars | Roofline


def format_of(case: Case | PrefillCase) -> str:
    """ "bf16", "tensor FP8, q e4m3, fused": cache, queries and layout."""
    dtype = report.SHORT_DTYPE[case.dtype]
    parts = [dtype]
    if case.kv_format:
        parts = [f"{case.kv_format} FP8", f"q {'e4m3' if case.q_fp8 else dtype}"]
        if case.q_fp8 and case.dtype != "bfloat16":
            parts.append(f"out {dtype}")
    if case.layout != "separate":
        parts.append(case.layout)
    parts += filter(None, (case.dims_label, case.accuracy))
    if isinstance(case, Case) and case.sparse:
        parts.append("sparse")
    return ", ".join(parts)


def share_of_ceiling(row: dict[str, Any]) -> Cell:
    """The larger of the shares of the measured read bandwidth and of cuBLAS bf16."""
    if not row_ok(row):
        return _not_ok(row)
    kind, share = max(("read", row["read_share"]), ("cuBLAS", row["cublas_share"]), key=lambda pair: pair[1])
    return Cell(share, time_text(row["us_amortised"]), kind)


def over_public_best(row: dict[str, Any]) -> Cell | None:
    """Speed over the published best; of a row measured on another GPU model, None."""
    if "public_best_ratio" not in row:
        return None
    return _ratio(row["public_best_us"], row) if row_ok(row) else _not_ok(row)


def over_peer(name: str) -> Measure:
    """Speed over the installed peer of that name."""

    def measure(row: dict[str, Any]) -> Cell | None:
        peer = row.get("peers", {}).get(name)
        if peer is None or "unsupported" in peer:
            return None
        if not row_ok(row):
            return _not_ok(row)
        if "error" in peer:
            return Cell(None, "peer failed")
        return _ratio(peer["us"], row) if peer["check"]["ok"] else Cell(None, "peer wrong")

    return measure


def over_best_peer(row: dict[str, Any]) -> Cell | None:
    """Speed over the fastest peer whose output is right; None where there is none."""
    best = report.best_peer(row)
    if best is None:
        return None
    return _ratio(best[1], row) if row_ok(row) else _not_ok(row)


def over_record(baseline: dict[str, Any]) -> Measure:
    """Speed over the same shape in another record."""
    rows = {case_of(row): row for row in baseline["rows"]}

    def measure(row: dict[str, Any]) -> Cell | None:
        other = rows.get(case_of(row))
        if other is None:
            return None
        if not row_ok(row):
            return _not_ok(row)
        return _ratio(other["us_amortised"], row) if row_ok(other) else Cell(None, "baseline failed")

    return measure


def values(rows: Iterable[dict[str, Any]], measure: Measure) -> list[float]:
    """The figures there are."""
    cells = map(measure, rows)
    return [cell.value for cell in cells if cell is not None and cell.value is not None]


def roofline(record: dict[str, Any], name: str = "roofline") -> Roofline:
    used = record["ceilings"]["used"]
    points = []
    for row in filter(row_ok, record["rows"]):
        case = case_of(row)
        intensity = case.flop / case.bytes_moved
        points.append(Point(case.num_heads, format_of(case), case.q_fp8, intensity, row["tflops"], case.bytes_moved))
    title = f"{gpu_name(record)}: {len(points)} shapes against the roofline"
    return Roofline(name, title, used["read_gbps"], used["cublas_bf16_tflops"], tuple(points))


def charts(rows: Sequence[dict[str, Any]], measure: Measure, name: str, title: str, scale: Scale) -> list[Figure]:
    """Heat maps of the rows that lie on grids of batch and length, then bars of the others. `name` begins the names of
    the figures, `title` their titles."""
    found = [(case_of(row), cell) for row in rows if (cell := measure(row)) is not None]
    groups: dict[tuple[int, str], dict[Case, Cell]] = {}
    for case, cell in found:
        if isinstance(case, Case) and not case.longest:
            groups.setdefault((case.page_size, format_of(case)), {})[case] = cell
    figures: list[Figure] = []
    mapped: set[Case | PrefillCase] = set()
    # Page 64, what most shapes are measured with, comes first.
    for (page_size, kind), group in sorted(groups.items(), key=lambda item: (item[0][0] != 64, item[0])):
        if len(grid := _on_grid(group)) < LEAST_CELLS:
            continue
        mapped.update(grid)
        figure_name = f"{name}_page{page_size}_{_file_part(kind)}"
        figures.append(HeatMaps(figure_name, f"{title}: page {page_size}, {kind}", scale, _panels(grid)))
    rest = [(_bar_label(case), cell) for case, cell in found if case not in mapped]
    pictures = -(-len(rest) // MOST_BARS)
    for i in range(pictures):
        part = tuple(rest[i * MOST_BARS : (i + 1) * MOST_BARS])
        number = str(i + 1) if pictures > 1 else ""
        what = "other shapes" if mapped else "by shape"
        figures.append(Bars(f"{name}_shapes{number}", f"{title}: {what} {number}".rstrip(), scale, part))
    return figures


def gpu_name(record: dict[str, Any]) -> str:
    return str((record["gpu"] or {}).get("name", "unknown GPU"))


def time_text(us: float) -> str:
    """ "8.3 us", "152 us", "3.16 ms"."""
    if us >= 1000:
        return f"{us / 1000:#.3g} ms" if us < 99_950 else f"{us / 1000:.0f} ms"
    return f"{us:.1f} us" if us < 99.95 else f"{us:.0f} us"


def _ratio(other_us: float, row: dict[str, Any]) -> Cell:
    ours, theirs = time_text(row["us_amortised"]), time_text(other_us)
    if ours[-2:] == theirs[-2:]:
        theirs = theirs[:-3]
    return Cell(other_us / row["us_amortised"], f"{theirs} / {ours}")


def _not_ok(row: dict[str, Any]) -> Cell:
    return Cell(None, "failed" if "error" in row else "wrong")


def _on_grid(group: dict[Case, Cell]) -> dict[Case, Cell]:
    """Without the lengths that few heads and batches have, as the uniform twins of ragged batches do."""
    column = len({(case.num_heads, case.batch) for case in group})
    count: dict[int, int] = {}
    for case in group:
        count[case.kv_len] = count.get(case.kv_len, 0) + 1
    return {case: cell for case, cell in group.items() if count[case.kv_len] >= LEAST_COLUMN * column}


def _panels(grid: dict[Case, Cell]) -> tuple[Panel, ...]:
    heads = sorted({case.num_heads for case in grid})
    return tuple(
        Panel(f"{h} heads", {(case.batch, case.kv_len): cell for case, cell in grid.items() if case.num_heads == h})
        for h in heads
    )


def _bar_label(case: Case | PrefillCase) -> str:
    if isinstance(case, PrefillCase):
        shape = " + ".join(f"{count} x {q} of {kv}" for count, q, kv in case.groups)
        shape += "" if case.causal else ", full"
    else:
        shape = f"{case.batch} x {case.kv_len}" + (f"..{case.longest}" if case.longest else "")
    return f"{case.num_heads} heads, {shape}, page {case.page_size}, {format_of(case)}"


def _file_part(text: str) -> str:
    return text.replace(", ", "_").replace(" ", "_")
