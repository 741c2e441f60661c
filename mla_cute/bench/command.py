"""The bench's command: what it does with its options, and `main`, which reads them with argparse.

Needs torch and the DSL alone; `mla-cute bench` calls `bench` with the same options read by typer. Exit status: 0, 1
when a case failed or is wrong, 2 for usage and where nothing can be timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from .. import gpu as gpu_facts
from .. import option
from ..option import UsageError
from . import outputs, peers, publish, report
from .cases import PRESETS, Case, PrefillCase
from .options import FP8_FORMATS, OPTIONS, RUN_OPTIONS
from .runner import Library, run, write_json
from .sustained import NvmlMeter, Sustain
from .timing import CudaTimer

Record = dict[str, Any]


class NothingToTime(UsageError):
    """The GPU is missing or another one than the kernels need."""


class Screen(Protocol):
    """What the command shows its results on."""

    def say(self, text: str) -> None: ...

    def timed(self, time_them: Callable[..., Record], peers: Sequence[str]) -> Record:
        """Call `time_them`, with those of `runner.run`'s on_row and progress that are wanted, and show the rows: while
        they come or afterwards. Returns the record."""

    def comparison(self, rows: Sequence[tuple[str, ...]]) -> None:
        """A table of report.COMPARE_COLUMNS."""


class PlainScreen:
    """Lines on standard output, each row when it is there."""

    def say(self, text: str) -> None:
        print(text)

    def timed(self, time_them: Callable[..., Record], peers: Sequence[str]) -> Record:
        header = report.columns(peers)
        column_widths = [max(len(name), 7) for name in header]

        def show(row: dict[str, Any]) -> None:
            print(report.line(report.cells(row, peers), column_widths), flush=True)

        print(report.line(header, column_widths), flush=True)
        return time_them(on_row=show)

    def comparison(self, rows: Sequence[tuple[str, ...]]) -> None:
        print(report.text_table([report.COMPARE_COLUMNS, *rows]))


def select_cases(
    presets: Sequence[str],
    heads: list[int] | None = None,
    batches: list[int] | None = None,
    kv_lens: list[int] | None = None,
    page_sizes: list[int] | None = None,
    dtype_names: list[str] | None = None,
    layout: str | None = None,
    kv_format: str | None = None,
    q_fp8: bool = False,
) -> list[Case | PrefillCase]:
    """Cases of the presets and of the grid, each once, in the order given. A grid's caches are apart without `layout`.

    With a preset, `page_sizes`, `dtype_names` and `layout` replace those of its cases, and with `kv_format` it and
    `q_fp8` do. Raises ValueError for an unknown preset and for values a case cannot have.
    """
    if kv_format is not None and kv_format not in FP8_FORMATS:
        raise ValueError(f"kv_format: expected one of {', '.join(FP8_FORMATS)}, got {kv_format!r}")
    if q_fp8 and kv_format is None:
        raise ValueError("q_fp8: expected a kv_format beside e4m3 queries, got none")
    fp8: dict[str, Any] = {} if kv_format is None else {"kv_format": kv_format, "q_fp8": q_fp8}
    cases: list[Case | PrefillCase] = []
    if not presets and heads is None and batches is None and kv_lens is None:
        presets = ["quick"]
    for name in presets:
        if name not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
        for case in PRESETS[name]:
            sizes, names = page_sizes or [case.page_size], dtype_names or [case.dtype]
            cases += [
                dataclasses.replace(case, page_size=size, dtype=dtype, layout=layout or case.layout, **fp8)
                for size, dtype in itertools.product(sizes, names)
            ]
    if not presets or heads or batches or kv_lens:
        grid = (
            heads or [16, 128],
            batches or [1, 128],
            kv_lens or [8192],
            page_sizes or [64],
            dtype_names or ["bfloat16"],
        )
        cases += [Case(*point, layout or "separate", **fp8) for point in itertools.product(*grid)]
    return list(dict.fromkeys(cases))


def find_peers(wanted: bool) -> tuple[list[peers.Peer], dict[str, Any]]:
    """Installed peers and their status; when not wanted, the record says that instead of nothing."""
    if wanted:
        return peers.installed()
    return [], {peer.name: {"present": False, "why": "left out (--no-peers)"} for peer in peers.PEERS}


def bench(values: dict[str, Any], screen: Screen) -> int:
    """Time, compare or report as `values` say, the values of OPTIONS by their names; returns the exit status.

    UsageError for what cannot be or cannot run here; NothingToTime where the GPU is what is missing.
    """
    try:
        others = option.given(RUN_OPTIONS, values)
        request = publish.Request.of(values["report"], values["record"], values["baseline"], others)
    except (ImportError, OSError, ValueError) as error:
        raise UsageError(str(error)) from None
    if request is not None and request.records:
        try:
            screen.say(request.write())
        except OSError as error:
            raise UsageError(f"--report: {error}") from None
        return 0
    if values["compare"]:
        _compare(values["compare"], screen)
        return 0
    return _run(values, request, screen)


def time_cases(
    cases: Sequence[Case | PrefillCase],
    library: Library,
    found: tuple[list[peers.Peer], dict[str, Any]],
    gpu: gpu_facts.GpuFacts | None,
    preset: str | None,
    **shown: Any,
) -> Record:
    """The record of a run on this GPU. `found` is what `find_peers` returns, `shown` are on_row, progress and sustain
    of `runner.run`."""
    return run(cases, timer=CudaTimer(), library=library, peers=found, gpu=gpu, preset=preset, **shown)


def _compare(paths: Sequence[pathlib.Path], screen: Screen) -> None:
    try:
        rows, lines = report.compare(*map(report.load, paths))
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from None
    screen.comparison(rows)
    for text in lines:
        screen.say(text)


def _run(values: dict[str, Any], request: publish.Request | None, screen: Screen) -> int:
    out: pathlib.Path | None = values["out"]
    try:
        grid = (values["heads"], values["batch"], values["kv_len"], values["page_size"], values["dtype"])
        fp8 = {"kv_format": values["kv_format"], "q_fp8": values["q_fp8"]}
        cases = select_cases(values["presets"], *grid, layout=values["layout"], **fp8)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from None
    if (why := gpu_facts.why_not_hopper()) is not None:
        raise NothingToTime(f"nothing to time: {why}")
    if out is not None:
        try:
            outputs.check_file(out)
        except OSError as error:
            raise UsageError(f"--out: {error}") from None
    found = find_peers(not values["no_peers"])
    library = Library.installed(values["config"], values["batch_invariant"])
    gpu, preset = gpu_facts.facts(), " ".join(values["presets"]) or None
    sustain = _sustain(values["sustained"], gpu)

    def time_them(**shown: Any) -> Record:
        return time_cases(cases, library, found, gpu, preset, sustain=sustain, **shown)

    record = screen.timed(time_them, [peer.name for peer in found[0]])
    for text in report.summary(record):
        screen.say(text)
    try:
        if out is not None:
            write_json(out, record)
            screen.say(f"record: {out}")
        if request is not None:
            screen.say(request.write(record))
    except OSError as error:
        raise UsageError(str(error)) from None
    return 1 if record["failed"] or not record["complete"] else 0


def _sustain(seconds: float | None, gpu: gpu_facts.GpuFacts | None) -> Sustain | None:
    """None where --sustained was not given; UsageError where the energy cannot be read."""
    if seconds is None:
        return None
    if gpu is None or gpu.uuid is None:
        raise UsageError("--sustained: torch does not tell which GPU this is; newer ones do")
    try:
        return Sustain(seconds, NvmlMeter(gpu.uuid))
    except (ImportError, RuntimeError) as error:
        raise UsageError(f"--sustained: {error}") from None


def parser() -> argparse.ArgumentParser:
    return option.parser(OPTIONS, "python -m mla_cute.bench", "Time paged MLA on this GPU.")


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m mla_cute.bench`."""
    p = parser()
    values = vars(p.parse_args(argv))
    try:
        return bench(values, PlainScreen())
    except NothingToTime as error:
        print(f"mla_cute.bench: {error}", file=sys.stderr)
        return 2
    except UsageError as error:
        p.error(str(error))
