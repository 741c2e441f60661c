"""The command of tuning: what it does with its options, and `main`, which reads them with argparse.

Needs torch and the DSL alone; `mla-cute tune` calls `run` with the same options read by typer. Exit status: 0, 1 when a
shape could not be tuned or two files differ (--diff), 2 for usage and for what cannot run here, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import math
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from .. import gpu as gpu_facts
from .. import option
from ..bench import outputs
from ..bench.report import text_table
from ..bench.runner import source_digest
from ..extras import install_command
from ..gpu_speed import H200
from ..option import UsageError
from ..tuned import diff, select
from ..tuned.select import When
from . import cost, device, recipes, report, session, space, store
from .options import GRID_OPTIONS, OPTIONS, REPORT_OPTIONS
from .search import POLICIES, StartError
from .workers import ChildMeasurer, compile_variants

DEFAULT_KV_LENS = (8192,)


class Screen(session.Screen, Protocol):
    """What the command shows its results on."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> None:
        """`texts`: the first so many columns are texts, the others numbers."""


class PlainScreen:
    """Lines on standard error, results on standard output."""

    def __init__(self) -> None:
        self._shown = ""

    def say(self, text: str) -> None:
        print(text, flush=True)

    def step(self, done: int, total: int, label: str, seconds_left: float | None) -> None:
        left = "" if seconds_left is None else f", {duration(seconds_left)} left"
        # A line per shape or kernel, not per rung.
        if (state := f"[{done}/{total}{left}]") != self._shown:
            self._shown = state
            print(f"{state} {label}", file=sys.stderr, flush=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> None:
        print(f"{title}\n{text_table([columns, *rows])}", flush=True)


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of `tune` as they are given; `grid` are the flags of one table of a recipe, where given."""

    recipes: tuple[str, ...] = ()
    grid: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    from_log: pathlib.Path | None = None
    dtype: str = "bfloat16"
    policy: str = "graph"
    budget_s: float = math.inf
    out: pathlib.Path | None = None
    measurements: pathlib.Path | None = None
    report: pathlib.Path | None = None
    workers: int | None = None
    timeout_s: float = 20.0
    diff: tuple[pathlib.Path, pathlib.Path] | None = None
    dry_run: bool = False


def duration(seconds: float) -> str:
    """ "45 s", "12 min", "1.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def command_of(options: Options) -> str:
    """The command that measures the same shapes in the same way: of `options` what decides that, and not where to."""
    parts = ["mla-cute", "tune"]
    for name in options.recipes:
        parts += ["--recipe", name]
    if options.from_log is not None:
        parts += ["--from-log", str(options.from_log)]
    for one in GRID_OPTIONS:
        if values := options.grid.get(one.dest):
            parts += [one.name] if one.is_switch else [one.name, ",".join(str(value) or "none" for value in values)]
    if options.dtype != Options.dtype:
        parts += ["--dtype", options.dtype]
    if options.policy != Options.policy:
        parts += ["--policy", options.policy]
    if options.budget_s < math.inf:
        parts += ["--budget", f"{options.budget_s:g}s"]
    return shlex.join(parts)


def shapes_of(options: Options) -> list[When]:
    """The shapes of recipes, flags and log together, each once. UsageError when there is none or one cannot be."""
    whens: list[When] = []
    try:
        for name in options.recipes:
            whens += recipes.load(name)
        grid = dict(options.grid)
        kv_lens = grid.get("kv_len", list(DEFAULT_KV_LENS))
        if options.from_log is not None:
            whens += recipes.from_log(options.from_log, kv_lens)
            if set(grid) == {"kv_len"}:  # the lengths of calls that did not know theirs
                grid = {}
        if grid:
            whens += recipes.product({"op": ["decode"], **grid}, "flags")
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(str(error)) from None
    if not whens:
        known = ", ".join(recipes.names())
        raise UsageError(f"nothing to tune: give --recipe ({known}), --from-log, or --heads, --batch and --kv-len")
    return list(dict.fromkeys(whens))


def run(options: Options, screen: Screen) -> int:
    """Tune; returns the exit status. UsageError for what cannot be or cannot run here."""
    if options.diff is not None:
        return show_diff(*options.diff, screen)
    whens = shapes_of(options)
    if options.dry_run:
        _describe(whens, screen)
        return 0
    # The measuring process finds out too, but only once it has loaded torch and the kernels' compiler.
    if (why := gpu_facts.why_no_gpu()) is not None:
        raise UsageError(f"nothing to tune on: {why}")
    screen.step(0, len(whens), "starting the process that measures", None)
    begin = time.monotonic()
    with ChildMeasurer(device.maker(whens, options.dtype), options.timeout_s) as measurer:
        try:
            task = _task(options, whens, measurer.facts())
            # The time that starting the process took counts against the budget.
            task = dataclasses.replace(task, budget_s=task.budget_s - (time.monotonic() - begin))
            kept = session.open_store(task)
            for path in (task.out, task.measurements):
                outputs.check_file(path)
            if options.report is not None:
                outputs.check_folder(options.report)
        except (StartError, OSError, ValueError) as error:
            raise UsageError(str(error)) from None
        screen.say(f"tuning {len(whens)} shapes on {task.gpu['name']}: {task.out}, {task.measurements}")

        def compiling(variants: Any, step: Callable[[int, int], bool]) -> Any:
            return compile_variants(variants, options.workers, step)

        outcome = session.run(task, kept, measurer, compiling, screen)
    for text in session.summary(outcome):
        screen.say(text)
    if task.measurements.exists():
        show_report(task.measurements, options.report, screen)
    if outcome.interrupted:
        return 130
    return 1 if outcome.failed or outcome.error else 0


def show_report(path: pathlib.Path, folder: pathlib.Path | None, screen: Screen) -> int:
    """Print what was won, and write it to `folder`. UsageError when the file cannot be read or the folder
    not written."""
    try:
        gpu, shapes = store.load(path)
        if folder is not None:
            outputs.check_folder(folder)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from None
    made = report.Report(gpu, tuple(shapes))
    screen.table(f"tuned against default on {gpu['name']}", report.GROUP_COLUMNS, made.group_rows())
    for text in made.lines():
        screen.say(text)
    if folder is not None:
        try:
            written = report.write(made, folder)
        except OSError as error:
            raise UsageError(str(error)) from None
        screen.say(f"report: {', '.join(map(str, written))}")
        if made.tuned and len(written) == 1:
            screen.say(f"no picture: it needs matplotlib, {install_command('matplotlib')}")
    return 0


def show_diff(a: pathlib.Path, b: pathlib.Path, screen: Screen) -> int:
    """Print what is different in tuned file `b`; 0 where calls choose the same from both, else 1. UsageError when one
    cannot be read."""
    try:
        found = diff.compare(select.load(a), select.load(b))
    except ValueError as error:
        raise UsageError(str(error)) from None
    if rows := found.rows():
        screen.table(f"A {a}, B {b}", diff.COLUMNS, rows, diff.TEXT_COLUMNS)
    for text in found.lines():
        screen.say(text)
    return 0 if found.is_none else 1


def _task(options: Options, whens: Sequence[When], facts: dict[str, Any]) -> session.Task:
    gpu = facts["gpu"]
    out = options.out
    if out is None:
        out = next((path for label, path in select.search_path(gpu["name"]) if label == "user"), None)
    if out is None:
        raise UsageError("--out: expected a file, as there is no home directory")
    versions, git = gpu_facts.versions(), gpu_facts.git_state()
    made_with = {
        "mla_cute": versions["mla_cute"],
        "cutlass_dsl": versions["cutlass_dsl"],
        "driver": facts["driver"],
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "torch": versions["torch"],
        "toolkit": versions["cutlass_dsl_toolkit"],
        "command": command_of(options),
        "seed": device.SEED,
        "commit": None if git is None else gpu_facts.commit_of(git),
    }
    return session.Task(
        whens=whens,
        dtype=options.dtype,
        out=out,
        measurements=options.measurements or out.with_suffix(".measurements.json"),
        gpu=gpu,
        speed=facts["speed"],
        made_with=made_with,
        digest=source_digest(),
        budget_s=options.budget_s,
        policy=options.policy,
    )


def _describe(whens: Sequence[When], screen: Screen) -> None:
    gpu = gpu_facts.facts()
    speed = H200 if gpu is None else gpu_facts.speed(torch.device("cuda", gpu.index))
    groups: dict[str, list[int]] = {}
    for when in whens:
        timed = cost.choose(when, space.candidates(when, speed), speed).timed
        groups.setdefault(session.group_of(when), []).append(len(timed))
    rows = [(name, str(len(counts)), str(sum(counts)), str(max(counts))) for name, counts in groups.items()]
    on = f"{gpu.name}" if gpu is not None else f"an H200 of {H200.sm_count} SMs (no GPU is seen here)"
    screen.table(f"what would be tuned on {on}", ("op, cache", "shapes", "candidates", "most of a shape"), rows)
    total = sum(sum(counts) for counts in groups.values())
    screen.say(f"{len(whens)} shapes, {total} candidates; nothing was run")


def parser() -> argparse.ArgumentParser:
    return option.parser(
        OPTIONS,
        "autotune.py",
        "Measure which configuration of the kernels is fastest for given shapes on this GPU, and keep it.",
        "`autotune.py report FILE [--out DIR]` shows what an earlier run won.",
    )


def options_of(values: dict[str, Any]) -> Options:
    """Options from parsed values by their names. UsageError for numbers that cannot be."""
    grid = {one.dest: values[one.dest] for one in GRID_OPTIONS if values[one.dest]}
    if values["q_fp8"]:
        grid["q_fp8"] = [True]  # a list, as of every key of a recipe's table
    if values["workers"] is not None and values["workers"] < 1:
        raise UsageError(f"--workers: expected at least 1, got {values['workers']}")
    if values["policy"] not in POLICIES:
        raise UsageError(f"--policy: expected one of {', '.join(POLICIES)}, got {values['policy']!r}")
    if not 0 < values["timeout"] < math.inf:  # NaN compares with nothing
        raise UsageError(f"--timeout: expected more than 0 s, got {values['timeout']}")
    return Options(
        recipes=tuple(values["recipe"]),
        grid=grid,
        from_log=values["from_log"],
        dtype=values["dtype"],
        policy=values["policy"],
        budget_s=math.inf if values["budget"] is None else values["budget"],
        out=values["out"],
        measurements=values["measurements"],
        report=values["report"],
        workers=values["workers"],
        timeout_s=values["timeout"],
        diff=None if values["diff"] is None else tuple(values["diff"]),
        dry_run=values["dry_run"],
    )


def main(argv: Sequence[str] | None = None) -> int:
    """tune/autotune.py."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    screen = PlainScreen()
    try:
        if arguments[:1] == ["report"]:
            p = option.parser(REPORT_OPTIONS, "autotune.py report", "Show what a tuning run won.")
            args = p.parse_args(arguments[1:])
            return show_report(args.file, args.out, screen)
        return run(options_of(vars(parser().parse_args(arguments))), screen)
    except UsageError as error:
        print(f"autotune.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
