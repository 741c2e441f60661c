"""The typer application. Each command prints a table or two and exits with 0, 1 (something is wrong) or 2 (usage)."""

import argparse
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer

from .. import __version__
from .. import gpu as gpu_facts
from ..bench import outputs, runner
from ..tuning.options import parse_budget
from . import bench as benching
from . import cache as caching
from . import check as checking
from . import check_fp8 as checking_fp8
from . import demo as showing
from . import dev as developing
from . import export_solution as exporting
from . import info as facts
from . import sanitize as sanitizing
from . import soak as soaking
from . import tune as tuning
from .screen import Wide, print_line, print_lines, print_prose, progress, say, show_table, usage_error
from .watchdog import Watchdog, check_seconds

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(tuning.app, name="tune")
app.add_typer(developing.app, name="dev")
app.add_typer(caching.app, name="cache")
app.command("export-solution")(exporting.export_solution)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mla-cute {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Multi-head Latent Attention kernels for Hopper GPUs."""


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="print JSON, for a bug report")] = False) -> None:
    """Show GPU, versions, kernel cache, tuned files and the environment variables that matter."""
    found = facts.collect()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    show_table("mla-cute", ("", ""), facts.rows(found), text_columns=2, fold=("",))
    show_table("environment", ("variable", "value"), facts.variables(found), text_columns=2, fold=("value",))


@app.command()
def check(
    quick: Annotated[bool, typer.Option("--quick", help="a seventh of the cases, without long requests")] = False,
    seed: Annotated[int, typer.Option(help="other random numbers, same shapes")] = 0,
    timeout: Annotated[float, typer.Option(help=checking.TIMEOUT_HELP)] = checking.TIMEOUT_S,
    fp8: Annotated[bool, typer.Option("--fp8", help="accuracy with FP8 caches instead, of kernel and format")] = False,
    as_json: Annotated[pathlib.Path | None, typer.Option("--json", help="with --fp8: write the record as JSON")] = None,
    soak: Annotated[str | None, typer.Option(help="random calls instead, for as long as this says: 5m")] = None,
    soak_seed: Annotated[int | None, typer.Option(help="one case of --soak again, by the seed it printed")] = None,
    sanitize: Annotated[
        bool, typer.Option("--sanitize", help="each kernel under compute-sanitizer instead, small inputs")
    ] = False,
    tool: Annotated[
        str | None,
        typer.Option(help=f"with --sanitize: {', '.join(sanitizing.TOOLS)} (default: the first)"),
    ] = None,
    wide: Wide = False,
) -> None:
    """Run the correctness sweep: on the GPU if it is a Hopper one, else the CPU path. Exit status 1 on a failure."""
    kinds = {"--fp8": fp8, "--soak": soak is not None, "--soak-seed": soak_seed is not None, "--sanitize": sanitize}
    checks: tuple[tuple[str, Callable[[Any], Any], Any], ...] = (
        ("--seed", checking.check_seed, seed),
        ("--soak-seed", checking.check_seed, soak_seed),
        ("--timeout", check_seconds, timeout),
    )
    for name, check_value, value in checks:
        try:
            if value is not None:
                check_value(value)
        except ValueError as error:
            usage_error(f"{name}: {error}")
    if tool is not None and tool not in sanitizing.TOOLS:
        usage_error(f"--tool: expected one of {', '.join(sanitizing.TOOLS)}, got {tool!r}")
    if tool is not None and not sanitize:
        usage_error(f"--tool: expected --sanitize beside it, got {tool!r} alone")
    if len(asked := [name for name, is_asked in kinds.items() if is_asked]) > 1:
        usage_error(f"{' and '.join(asked)}: each is a check of its own")
    if asked and asked != ["--fp8"] and (quick or as_json is not None):
        usage_error(f"{'--quick' if quick else '--json'}: not an option of {asked[0]}")
    if sanitize:
        _sanitize(tool or sanitizing.TOOLS[0], wide)
        return
    if soak is not None or soak_seed is not None:
        _soak(soak, soak_seed, seed, timeout)
        return
    if fp8:
        if quick:
            usage_error("--quick: the FP8 check has one size")
        _check_fp8(seed, timeout, as_json, wide)
        return
    if as_json is not None:
        usage_error("--json: only the FP8 check writes a record, add --fp8")
    run = checking.Run.of(quick, seed)
    print_prose(run.introduction())
    with progress("checking") as step, Watchdog(timeout, enabled=run.on_gpu) as watchdog:
        groups, failures = run.check(step, watchdog.feed)
    rows = [group.cells() for group in groups]
    show_table(run.title, checking.COLUMNS, rows, text_columns=2, drop=checking.DROP, wide=wide)
    print_lines(checking.closing(failures))
    if failures:
        raise typer.Exit(1)


def _soak(duration: str | None, soak_seed: int | None, seed: int, timeout: float) -> None:
    if duration is None:
        status = soaking.run(soak_seed or 0, cases=1, timeout=timeout, say=print_line)
    else:
        try:
            seconds = parse_budget(duration)
        except argparse.ArgumentTypeError as error:
            usage_error(f"--soak: {error}")
        status = soaking.run(seed or soaking.random_seed(), seconds=seconds, timeout=timeout, say=print_line)
    if status:
        raise typer.Exit(status)


def _sanitize(tool: str, wide: bool) -> None:
    if (why := gpu_facts.why_not_hopper()) is not None:
        usage_error(f"nothing to sanitize: {why}")
    try:
        rows, status = sanitizing.run(tool=tool, say=print_line)
    except (sanitizing.MissingTool, ValueError) as error:
        usage_error(error)
    options: dict[str, Any] = {"drop": ("kernel",), "fold": ("result",), "wide": wide}
    show_table(f"kernels under {tool}", sanitizing.COLUMNS, rows, text_columns=3, **options)
    if status:
        raise typer.Exit(status)


def _check_fp8(seed: int, timeout: float, path: pathlib.Path | None, wide: bool) -> None:
    if path is not None:
        try:
            outputs.check_file(path)
        except OSError as error:
            usage_error(f"--json: {error}")
    why = gpu_facts.why_not_hopper()
    device = torch.device("cpu") if why else torch.device("cuda", torch.cuda.current_device())
    if why:
        print_prose(
            f"FP8 caches on the CPU ({why}): what runs is the float32 reference. Its own error is the rounding of the "
            "output; that of the formats is what it would be on a GPU, the kernels' aside."
        )
    else:
        print_prose(f"FP8 caches on {torch.cuda.get_device_name(device)} against the float32 reference.")
    found, total = [], len(checking_fp8.specs())
    with progress("checking") as step, Watchdog(timeout, enabled=device.type == "cuda") as watchdog:
        watchdog.feed("the first case")
        for spec, row in checking_fp8.rows(device, seed):
            found.append(row)
            step(len(found), total, str(spec))
            watchdog.feed(f"the case after {spec}")
    title = "error of the kernel (on the dequantised cache) and of kernel and format (on the data before)"
    cells, drop = [checking_fp8.cells(row) for row in found], checking_fp8.DROP
    show_table(
        title,
        checking_fp8.COLUMNS,
        cells,
        text_columns=3,
        drop=drop,
        fold=("data",),
        elsewhere="the record (--json FILE)",
        wide=wide,
    )
    record = checking_fp8.record(found, device, seed, why)
    if path is not None:
        runner.write_json(path, record)
        say(f"record: {path}")
    print_lines(
        [
            f"FAILED {spec}: {failure}"
            for spec, row in zip(checking_fp8.specs(), found, strict=True)
            for failure in row["failures"]
        ]
    )
    if record["failed"]:
        raise typer.Exit(1)
    say("all correct")


app.command()(showing.demo)
app.command()(benching.bench)

if __name__ == "__main__":
    sys.exit(app())
