"""The typer application. Each command prints a table or two and exits with 0, 1 (something is wrong) or 2 (usage)."""

import argparse
import json
import pathlib
import sys
from typing import Annotated, Any

import torch
import typer

from .. import gpu as gpu_facts
from ..bench import outputs, runner
from ..tuning.options import parse_budget
from . import bench as benching
from . import check as checking
from . import check_fp8 as checking_fp8
from . import demo as showing
from . import dev as developing
from . import export_solution as exporting
from . import info as facts
from . import sanitize as sanitizing
from . import soak as soaking
from . import tune as tuning
from .screen import print_line, print_lines, print_prose, progress, say, show_table, usage_error
from .watchdog import Watchdog, check_seconds

app = typer.Typer(
    help="Multi-head Latent Attention kernels for Hopper GPUs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(tuning.app, name="tune")
app.add_typer(developing.app, name="dev")
app.command("export-solution")(exporting.export_solution)

# Cases multiply a seed, and torch's seeds have 64 bits.
_LARGEST_SEED = 2**40


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="print JSON, for a bug report")] = False) -> None:
    """Show GPU, versions, kernel cache, tuned files and the environment variables that matter."""
    found = facts.collect()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    gpu, cache = found["gpu"], found["cache"]
    rows = []
    if gpu is not None:
        rows += [
            ("GPU", f"{gpu['name']}, compute capability {gpu['capability'][0]}.{gpu['capability'][1]}"),
            ("SMs, memory", f"{gpu['sm_count']}, {gpu['memory_bytes'] / 2**30:.1f} GiB"),
            ("driver", str(gpu["driver"])),
            ("clocks, at most", f"SM {gpu['max_sm_mhz']} MHz, memory {gpu['max_memory_mhz']} MHz"),
        ]
    rows.append(("kernels run here", "yes" if found["kernels_run_here"] else f"no: {found['why_not']}"))
    rows += [(name, version or "not installed") for name, version in found["versions"].items() if name != "cuda"]
    rows.append(("CUDA of torch", found["versions"]["cuda"] or "none"))
    if found["git"] is not None:
        rows.append(("commit", found["git"]["commit"] + (" with changes" if found["git"]["dirty"] else "")))
    where = cache["directory"] or "none"
    rows.append(("kernel cache", f"{where}: {cache['why']}" if "why" in cache else where))
    rows.append(("cached kernels", f"{cache['entries']}, {cache['bytes'] / 2**20:.1f} MiB"))
    rows.append(("tuned files", "\n".join(found["tuned"]) or "none, the default configuration is used"))
    show_table("mla-cute", ("", ""), rows, text_columns=2, fold=("",))
    variables = [(name, value if value is not None else "(not set)") for name, value in found["environment"].items()]
    show_table("environment", ("variable", "value"), variables, text_columns=2, fold=("value",))


@app.command()
def check(
    quick: Annotated[bool, typer.Option("--quick", help="a seventh of the cases, without long requests")] = False,
    seed: Annotated[int, typer.Option(help="other random numbers, same shapes")] = 0,
    timeout: Annotated[float, typer.Option(help="seconds one case may take on the GPU before it counts as hung")] = 180,
    fp8: Annotated[bool, typer.Option("--fp8", help="accuracy with FP8 caches instead, of kernel and format")] = False,
    as_json: Annotated[pathlib.Path | None, typer.Option("--json", help="with --fp8: write the record as JSON")] = None,
    soak: Annotated[str | None, typer.Option(help="random calls instead, for as long as this says: 5m")] = None,
    soak_seed: Annotated[int | None, typer.Option(help="one case of --soak again, by the seed it printed")] = None,
    sanitize: Annotated[
        bool, typer.Option("--sanitize", help="each kernel under compute-sanitizer instead, small inputs")
    ] = False,
    tool: Annotated[str, typer.Option(help=f"with --sanitize: {', '.join(sanitizing.TOOLS)}")] = "memcheck",
) -> None:
    """Run the correctness sweep: on the GPU if it is a Hopper one, else the CPU path. Exit status 1 on a failure."""
    kinds = {"--fp8": fp8, "--soak": soak is not None, "--soak-seed": soak_seed is not None, "--sanitize": sanitize}
    if not -_LARGEST_SEED <= seed <= _LARGEST_SEED:
        usage_error(f"--seed: expected at most {_LARGEST_SEED} either way, got {seed}")
    if soak_seed is not None and not -_LARGEST_SEED <= soak_seed <= _LARGEST_SEED:
        usage_error(f"--soak-seed: expected at most {_LARGEST_SEED} either way, got {soak_seed}")
    if tool not in sanitizing.TOOLS:
        usage_error(f"--tool: expected one of {', '.join(sanitizing.TOOLS)}, got {tool!r}")
    try:
        check_seconds(timeout)
    except ValueError as error:
        usage_error(f"--timeout: {error}")
    if len(asked := [name for name, is_asked in kinds.items() if is_asked]) > 1:
        usage_error(f"{' and '.join(asked)}: each is a check of its own")
    if asked and asked != ["--fp8"] and (quick or as_json is not None):
        usage_error(f"{'--quick' if quick else '--json'}: not an option of {asked[0]}")
    if sanitize:
        _sanitize(tool)
        return
    if soak is not None or soak_seed is not None:
        _soak(soak, soak_seed, seed, timeout)
        return
    if fp8:
        if quick:
            usage_error("--quick: the FP8 check has one size")
        _check_fp8(seed, timeout, as_json)
        return
    if as_json is not None:
        usage_error("--json: only the FP8 check writes a record, add --fp8")
    why = gpu_facts.why_not_hopper()
    device = torch.device("cpu") if why else torch.device("cuda", torch.cuda.current_device())
    if why:
        print_prose(
            f"Checking the CPU path ({why}): what runs is the float32 reference, judged by an independent "
            "float64 computation; the kernels are not checked."
        )
    else:
        print_prose(f"Checking the kernels on {torch.cuda.get_device_name(device)} against the float32 reference.")
    specs = checking.specs(quick, seed, on_gpu=not why)
    groups: dict[tuple[int, torch.dtype], checking.Group] = {}
    failures = []
    with progress("checking") as step, Watchdog(timeout, enabled=device.type == "cuda") as watchdog:
        for done, spec in enumerate(specs):
            step(done, len(specs), str(spec))
            watchdog.feed(str(spec))
            group = groups.setdefault((spec.page_size, spec.dtype), checking.Group(spec.page_size, spec.dtype))
            group.cases += 1
            for what, verdict in checking.run_spec(spec, device):
                group.verdicts.append(verdict)
                failures += [f"FAILED {spec}, {what}: {failure}" for failure in verdict.failures]
    rows = [group.cells() for group in groups.values()]
    title = f"{len(specs)} cases, seed {seed}, on {device.type}"
    show_table(title, checking.COLUMNS, rows, text_columns=2, drop=checking.DROP)
    print_lines(failures[:20])
    if len(failures) > 20:
        say(f"... and {len(failures) - 20} more")
    if failures:
        raise typer.Exit(1)
    say("all correct")


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


def _sanitize(tool: str) -> None:
    if (why := gpu_facts.why_not_hopper()) is not None:
        usage_error(f"nothing to sanitize: {why}")
    try:
        rows, status = sanitizing.run(tool=tool, say=print_line)
    except (sanitizing.MissingTool, ValueError) as error:
        usage_error(error)
    options: dict[str, Any] = {"drop": ("kernel",), "fold": ("result",)}
    show_table(f"kernels under {tool}", sanitizing.COLUMNS, rows, text_columns=3, **options)
    if status:
        raise typer.Exit(status)


def _check_fp8(seed: int, timeout: float, path: pathlib.Path | None) -> None:
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
