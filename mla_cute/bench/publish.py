"""`mla-cute bench --report DIR`: records as a page: report.html, which holds its pictures, report.md and the PNGs."""

import pathlib
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .. import gpu as gpu_facts
from . import figures, outputs, plots, report, targets
from .cases import PUBLIC_BEST_GPU
from .document import Block, Heading, Items, Picture, Table, Text, pictures, to_html, to_markdown
from .figures import Measure, Scale
from .runner import row_ok

PAGE = "report"

SHARE_CAPTION = (
    "Share of the ceiling: the larger of the share of the read bandwidth and the share of cuBLAS bf16 that this run "
    "measured; under it which of the two it is, and the time of a call. e4m3 products count against cuBLAS bf16 too."
)
RATIO_CAPTION = "Above 1 this record is faster; under it {other} time / this record's. –: nothing to compare."
SHAPES_CAPTION = (
    " 4 x 8192: decode, 4 requests of 8192 tokens; 4 x 2048 of 8192: prefill, 4 requests of 8192 tokens, the last "
    "2048 of which are queries."
)
ROOFLINE_CAPTION = (
    "Each point is a shape; its place across follows from the shape alone (FLOP and bytes as under Method), its height "
    "is measured. The roof is what this GPU reached in this run: reading, and cuBLAS bf16. Points low under it are "
    "calls too short to fill the GPU: the fewer bytes, the smaller the point. Hollow points have 16-bit queries on an "
    "FP8 cache."
)
CEILINGS = (("read_gbps", "read bandwidth, GB/s"), ("cublas_bf16_tflops", "cuBLAS bf16 8192^3, TFLOP/s"))
HOST_CALLS = (("", "decode"), ("prefill_", "prefill"), ("fp8_", "decode, FP8 cache"))


@dataclass(frozen=True)
class Comparison:
    """What a record is compared with: a peer, published times or a baseline."""

    name: str  # the beginning of the file names of its pictures
    what: str
    other: str  # "flash_mla's": whose times those of the record are compared with
    measure: Measure


@dataclass(frozen=True)
class Request:
    """What the options of a command ask for."""

    folder: pathlib.Path
    records: dict[str, dict[str, Any]]  # by the name shown; empty where the report is of the run to come
    baseline: dict[str, Any] | None

    @classmethod
    def of(
        cls,
        folder: pathlib.Path | None,
        records: Sequence[pathlib.Path],
        baseline: pathlib.Path | None,
        others: Sequence[str],
    ) -> "Request | None":
        """Of --report, --record and --baseline; None without --report. `others` are the other options given.

        Fails before a run and not after it: ValueError for options that do not go together and files that are no
        records, OSError where a file or the folder cannot be had, ImportError without matplotlib.
        """
        if folder is None:
            for option, is_given in (("--record", records), ("--baseline", baseline)):
                if is_given:
                    raise ValueError(f"{option}: expected --report DIR beside it, got none")
            return None
        if "--compare" in others:
            raise ValueError("--compare: prints, and makes no report; for one give --record and --baseline")
        if records and others:
            raise ValueError(f"--record: reports files and times nothing, got {', '.join(others)} beside it")
        plots.require()
        short = len({path.name for path in records}) == len(records)
        loaded = {path.name if short else str(path): report.load(path) for path in records}
        base = None if baseline is None else report.load(baseline)
        try:
            outputs.check_folder(folder)
        except OSError as error:
            raise OSError(f"--report: {error}") from None
        return cls(folder, loaded, base)

    def write(self, record: dict[str, Any] | None = None) -> str:
        """Write the report of `record`, or of the existing ones; returns the line to print. Raises OSError."""
        page, *others = write(self.folder, self.records if record is None else {"": record}, self.baseline)
        return f"report: {page} ({len(others)} more files beside it)"


def write(
    folder: pathlib.Path, records: dict[str, dict[str, Any]], baseline: dict[str, Any] | None = None
) -> list[pathlib.Path]:
    """Write report.html, report.md and the PNGs; returns the paths, report.html first.

    `records` by the name shown where they are several; `baseline` is what each is compared with. Raises ImportError
    without matplotlib.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[Block] = []
    for i, (name, record) in enumerate(records.items()):
        blocks = list(_sections(record, baseline))
        if len(records) > 1:
            parts.append(Heading(name))
            blocks = [_of_part(block, i + 1) for block in blocks]
        parts += blocks
    gpus = dict.fromkeys(map(figures.gpu_name, records.values()))
    title = f"mla_cute on {', '.join(gpus)}"
    written = [folder / f"{PAGE}.html", folder / f"{PAGE}.md"]
    written[0].write_text(to_html(title, parts), encoding="utf-8")
    written[1].write_text(to_markdown(title, parts), encoding="utf-8")
    for picture in pictures(parts):
        written.append(folder / picture.file)
        written[-1].write_bytes(picture.png)
    return written


def _of_part(block: Block, number: int) -> Block:
    if isinstance(block, Heading):
        return replace(block, level=block.level + 1)
    return replace(block, file=f"{number}_{block.file}") if isinstance(block, Picture) else block


def _sections(record: dict[str, Any], baseline: dict[str, Any] | None) -> Iterator[Block]:
    comparisons = _comparisons(record, baseline)
    rows = record["rows"]
    yield Items(_results(record, comparisons))
    yield Heading("GPU, versions, ceilings")
    yield Table(("", ""), _facts(record), text_columns=2)
    yield Table(("measured in this run", "at the start", "at the end", "used"), _ceilings(record))
    yield from _host(record)
    yield Table(("figure", "how it is made"), list(record["method"].items()), text_columns=2, title="Method")
    yield from _failures(record)
    if judged := targets.judge(record):
        yield Heading("Speeds to reach")
        yield Text(targets.sentence(judged))
        yield Table(("", "what", "target of", "measured", "reach", "beyond"), _targets(judged), text_columns=3)
    yield Heading("Roofline")
    yield _picture(figures.roofline(record), ROOFLINE_CAPTION)
    yield from _charts(rows, figures.share_of_ceiling, "share", "Share of the ceiling", Scale.SHARE, SHARE_CAPTION)
    for comparison in comparisons:
        caption = RATIO_CAPTION.format(other=comparison.other)
        title = f"Speed over {comparison.what}"
        yield from _charts(rows, comparison.measure, comparison.name, title, Scale.RATIO, caption)
    if baseline is not None:
        yield from _against(record, baseline)
    yield from _beside_peers(record)
    yield Heading("All shapes")
    peers = _peers(record)
    yield Table(report.columns(peers), [report.cells(row, peers) for row in rows], text_columns=0)


def _charts(
    rows: list[dict[str, Any]], measure: Measure, name: str, title: str, scale: Scale, caption: str
) -> Iterator[Block]:
    found = figures.charts(rows, measure, name, title, scale)
    if found:
        yield Heading(title)
        yield Text(caption)
    for figure in found:
        yield _picture(figure, SHAPES_CAPTION.strip() if isinstance(figure, figures.Bars) else "")


def _picture(figure: figures.Figure, caption: str) -> Picture:
    return Picture(f"{figure.name}.png", plots.png(figure), figure.title, caption)


def _peers(record: dict[str, Any]) -> list[str]:
    """Those that were timed."""
    return [name for name, peer in record["peers"].items() if peer["present"]]


def _comparisons(record: dict[str, Any], baseline: dict[str, Any] | None) -> list[Comparison]:
    """Those that the record has figures for."""
    found = [
        Comparison(name, f"{name} {record['peers'][name]['version']}", f"{name}'s", figures.over_peer(name))
        for name in _peers(record)
    ]
    if len(found) > 1:
        found.append(
            Comparison("best_peer", "the fastest peer of each shape", "the fastest peer's", figures.over_best_peer)
        )
    public = f"the published best of FlashMLA and FlashInfer on {PUBLIC_BEST_GPU}"
    found.append(Comparison("public", public, "the published", figures.over_public_best))
    if baseline is not None:
        found.append(Comparison("baseline", "the baseline", "the baseline's", figures.over_record(baseline)))
    return [one for one in found if any(one.measure(row) is not None for row in record["rows"])]


def _results(record: dict[str, Any], comparisons: Sequence[Comparison]) -> list[str]:
    """The result in a few sentences."""
    rows = record["rows"]
    failed = sum(not row_ok(row) for row in rows)
    lines = [f"{len(rows)} shapes timed and checked against float32, {failed} failed or wrong."]
    if not record["complete"]:
        lines.append("INCOMPLETE: the run was interrupted.")
    if judged := targets.judge(record):
        lines.append(targets.sentence(judged))
    if shares := figures.values(rows, figures.share_of_ceiling):
        median = statistics.median(shares)
        lines.append(
            f"Share of the ceiling: {min(shares):.1%} to {max(shares):.1%}, median {median:.1%} of {len(shares)}."
        )
    for one in comparisons:
        if ratios := figures.values(rows, one.measure):
            lines.append(
                f"Over {one.what}: geometric mean {statistics.geometric_mean(ratios):.3f}x of {len(ratios)} shapes, "
                f"{min(ratios):.3f}x to {max(ratios):.3f}x, {sum(ratio < 1 for ratio in ratios)} slower."
            )
    return lines


def _facts(record: dict[str, Any]) -> list[tuple[str, str]]:
    gpu, git = record["gpu"], record["git"]
    rows = []
    if gpu is not None:
        clocks = gpu.get("clocks_under_load") or {}
        rows = [
            ("GPU", f"{gpu['name']}, {gpu['sm_count']} SMs, {gpu['memory_bytes'] / 2**30:.0f} GiB"),
            ("driver", str(gpu["driver"])),
            (
                "clocks under load",
                f"SM {clocks.get('sm_mhz', '?')} of {gpu['max_sm_mhz']} MHz, memory {clocks.get('memory_mhz', '?')} "
                f"MHz, {clocks.get('power_w', '?')} W",
            ),
        ]
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in record["versions"].items())))
    commit = "" if git is None else f"commit {gpu_facts.commit_of(git, 12)}, "
    rows.append(("code", f"{commit}sources sha256 {record['source_sha256'][:12]}"))
    config = record["config"]
    settings = "the library's choice" if config is None else ", ".join(f"{k}={v}" for k, v in config.items())
    rows.append(("configuration", settings + (", batch-invariant" if record["batch_invariant"] else "")))
    for name, peer in record["peers"].items():
        rows.append((name, str(peer["version"]) if peer["present"] else f"absent: {peer['why']}"))
    rows.append(("run", f"{record['date']}, preset {record['preset'] or '-'}, {record['seconds']} s"))
    return rows


def _ceilings(record: dict[str, Any]) -> list[tuple[str, ...]]:
    ceilings = record["ceilings"]
    rows: list[tuple[str, ...]] = []
    for key, what in CEILINGS:
        moments = (ceilings["start"], ceilings["end"], ceilings["used"])
        rows.append((what, *("-" if moment is None else f"{moment[key]:.0f}" for moment in moments)))
    if "empty_graph_us" in ceilings:
        empty = f"{ceilings['empty_graph_us']:.1f}"
        rows.append(("graph with an empty kernel, us, part of every time", empty, "-", "-"))
    return rows


def _host(record: dict[str, Any]) -> Iterator[Block]:
    host = record.get("host", {})
    rows = [
        (what, f"{host[f'{prefix}call_us']:.1f}", f"{host[f'{prefix}call_without_plan_us']:.1f}")
        for prefix, what in HOST_CALLS
        if f"{prefix}call_us" in host
    ]
    if rows:
        yield Table(("host time of one call", "with a plan, us", "without, us"), rows)


def _failures(record: dict[str, Any]) -> Iterator[Block]:
    """Rows that failed or are wrong, and what peers said, each reason once."""
    lines = report.failures(record)
    if "error" in record.get("host", {}):
        lines.append(f"FAILED host time of one call: {record['host']['error']}")
    reasons: dict[str, int] = {}
    for row in record["rows"]:
        for name, peer in row.get("peers", {}).items():
            said = peer.get("error") or peer.get("unsupported")
            if said is None and not peer["check"]["ok"]:
                said = "WRONG result"
            if said:
                reasons[f"{name}: {said}"] = reasons.get(f"{name}: {said}", 0) + 1
    lines += [f"{reason} ({count} shapes)" for reason, count in reasons.items()]
    if lines:
        yield Heading("Failed, wrong, left out")
        yield Items(lines)


def _targets(judged: Sequence[targets.Verdict]) -> list[tuple[str, ...]]:
    """Missed ones first."""
    return [
        (
            "met" if one.met else "MISSED",
            one.what,
            one.gpu or "every GPU",
            f"{one.measured:#.3g}" if one.measured < 99.5 else f"{one.measured:.0f}",
            f"{one.reach:g}",
            "-" if one.beyond is None else f"{one.beyond:g}",
        )
        for one in sorted(judged, key=lambda one: one.met)
    ]


def _beside_peers(record: dict[str, Any]) -> Iterator[Block]:
    tables = report.beside_tables(record)
    if tables:
        yield Heading("Beside the fastest peer")
        yield Text(
            "Microseconds of a call; in parentheses those of the fastest peer whose output is right, and its name."
        )
    for title, columns, rows in tables:
        yield Table(columns, rows, text_columns=0, title=title)


def _against(record: dict[str, Any], baseline: dict[str, Any]) -> Iterator[Block]:
    rows, lines = report.compare(baseline, record)
    yield Heading("The baseline, shape by shape")
    yield Text("a is the baseline, b this record; a / b above 1: this record is faster.")
    yield Items(lines)
    if rows:
        yield Table(report.COMPARE_COLUMNS, rows, text_columns=0)
