"""`python -m mla_cute.bench`: the bench without the CLI's dependencies."""

import argparse
import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from .. import gpu as gpu_facts
from ..config import KernelConfig, why_infeasible
from . import outputs, peers, publish, report
from .cases import DTYPES, PRESETS, TOKEN_BYTES, Case, PrefillCase
from .runner import Library, run, write_json
from .timing import CudaTimer

_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16"}


def numbers(text: str) -> list[int]:
    """ "1,16,128" -> [1, 16, 128]."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers separated by commas, got {text!r}") from None


def dtypes(text: str) -> list[str]:
    """ "bf16,float16" -> ["bfloat16", "float16"]."""
    names = [_ALIASES.get(part, part) for part in text.split(",")]
    if unknown := [name for name in names if name not in DTYPES]:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join([*DTYPES, *_ALIASES])}, got {unknown[0]!r}")
    return names


def kernel_config(text: str) -> KernelConfig:
    """A KernelConfig as JSON: '{"kernel": "tile64"}'."""
    try:
        values = json.loads(text)
    except (RecursionError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"expected a KernelConfig as JSON, got {text!r:.80}: {error}") from None
    if not isinstance(values, dict):
        raise argparse.ArgumentTypeError(f"expected a KernelConfig as a JSON object, got {text!r:.80}")
    try:
        config = KernelConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if (reason := why_infeasible(config)) is not None:
        raise argparse.ArgumentTypeError(reason)
    return config


def select_cases(
    presets: Sequence[str],
    heads: list[int] | None = None,
    batches: list[int] | None = None,
    kv_lens: list[int] | None = None,
    page_sizes: list[int] | None = None,
    dtype_names: list[str] | None = None,
    layout: str = "separate",
    kv_format: str | None = None,
    q_fp8: bool = False,
) -> list[Case | PrefillCase]:
    """Cases of the presets and of the grid, each once, in the order given.

    With a preset, `page_sizes`, `dtype_names` and `layout` replace those of its cases, and with `kv_format` it and
    `q_fp8` do. Raises ValueError for an unknown preset and for values a case cannot have.
    """
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
                dataclasses.replace(case, page_size=size, dtype=dtype, layout=layout, **fp8)
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
        cases += [Case(*point, layout, **fp8) for point in itertools.product(*grid)]
    return list(dict.fromkeys(cases))


def parser() -> argparse.ArgumentParser:
    names = ", ".join(f"{name} ({len(cases)} cases)" for name, cases in PRESETS.items())
    p = argparse.ArgumentParser(prog="python -m mla_cute.bench", description="Time paged MLA on this GPU.")
    p.add_argument("presets", nargs="*", metavar="PRESET", help=f"{names}; quick when nothing is chosen")
    p.add_argument("--heads", type=numbers, metavar="H,..", help="decode grid: numbers of heads")
    p.add_argument("--batch", type=numbers, metavar="B,..", help="grid: batch sizes")
    p.add_argument("--kv-len", type=numbers, metavar="L,..", help="grid: tokens per request")
    p.add_argument("--page-size", type=numbers, metavar="P,..", help="grid, or instead of the preset's page sizes")
    p.add_argument("--dtype", type=dtypes, metavar="T,..", help="bf16, fp16; grid, or instead of the preset's")
    p.add_argument(
        "--layout", choices=("separate", "fused"), default="separate", help="caches apart, or one 576-wide buffer"
    )
    formats = [name for name in TOKEN_BYTES if name]
    p.add_argument("--kv-format", choices=formats, help="FP8 cache; grid, or instead of the preset's caches")
    p.add_argument("--q-fp8", action="store_true", help="e4m3 queries, with --kv-format")
    p.add_argument("--config", type=kernel_config, metavar="JSON", help="KernelConfig to time instead of the default")
    p.add_argument("--batch-invariant", action="store_true", help="time the batch-invariant mode")
    p.add_argument("--no-peers", action="store_true", help="leave FlashInfer and FlashMLA out")
    p.add_argument("--out", type=pathlib.Path, metavar="FILE", help="write the record as JSON")
    p.add_argument(
        "--compare", nargs=2, type=pathlib.Path, metavar=("A", "B"), help="print the ratio per cell of two records"
    )
    p.add_argument(
        "--report", type=pathlib.Path, metavar="DIR", help="write report.html, report.md and PNGs (needs matplotlib)"
    )
    p.add_argument(
        "--record",
        type=pathlib.Path,
        action="append",
        default=[],
        metavar="FILE",
        help="report this record instead of a run; may be repeated",
    )
    p.add_argument("--baseline", type=pathlib.Path, metavar="FILE", help="record that the report compares with")
    return p


def given(presets: Sequence[str], **options: Any) -> list[str]:
    """What is set of the presets and the options, as it is written: for messages."""
    return [*presets, *(f"--{name.replace('_', '-')}" for name, value in options.items() if value)]


def _other_options(args: argparse.Namespace) -> list[str]:
    """Those beside the report's that differ from their defaults."""
    options = {name: value for name, value in vars(args).items() if name not in ("report", "record", "baseline")}
    options["layout"] = options["layout"] != "separate"
    return given(**options)


def find_peers(wanted: bool) -> tuple[list[peers.Peer], dict[str, Any]]:
    """Installed peers and their status; when not wanted, the record says that instead of nothing."""
    if wanted:
        return peers.installed()
    return [], {peer.name: {"present": False, "why": "left out (--no-peers)"} for peer in peers.PEERS}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 when a case failed or is wrong, 2 when nothing could be timed."""
    p = parser()
    args = p.parse_args(argv)
    try:
        request = publish.Request.of(args.report, args.record, args.baseline, _other_options(args))
    except (ImportError, OSError, ValueError) as error:
        p.error(str(error))
    if request is not None and request.records:
        try:
            print(request.write())
        except OSError as error:
            p.error(f"--report: {error}")
        return 0
    if args.compare:
        try:
            rows, lines = report.compare(*map(report.load, args.compare))
        except (OSError, ValueError) as error:
            p.error(str(error))
        print(report.text_table([report.COMPARE_COLUMNS, *rows]))
        print("\n".join(lines))
        return 0
    try:
        grid = (args.heads, args.batch, args.kv_len, args.page_size, args.dtype)
        fp8 = {"kv_format": args.kv_format, "q_fp8": args.q_fp8}
        cases = select_cases(args.presets, *grid, layout=args.layout, **fp8)
    except (TypeError, ValueError) as error:
        p.error(str(error))
    if (why := gpu_facts.why_not_hopper()) is not None:
        print(f"mla_cute.bench: nothing to time: {why}", file=sys.stderr)
        return 2
    if args.out is not None:
        try:
            outputs.check_file(args.out)
        except OSError as error:
            p.error(f"--out: {error}")
    found, status = find_peers(not args.no_peers)
    names = [peer.name for peer in found]
    header = report.columns(names)
    column_widths = [max(len(name), 7) for name in header]

    def show(row: dict[str, Any]) -> None:
        print(report.line(report.cells(row, names), column_widths), flush=True)

    print(report.line(header, column_widths), flush=True)
    record = run(
        cases,
        timer=CudaTimer(),
        library=Library.installed(args.config, args.batch_invariant),
        peers=(found, status),
        gpu=gpu_facts.facts(),
        on_row=show,
        preset=" ".join(args.presets) or None,
    )
    print("\n".join(report.summary(record)))
    try:
        if args.out is not None:
            write_json(args.out, record)
            print(f"record: {args.out}")
        if request is not None:
            print(request.write(record))
    except OSError as error:
        p.error(str(error))
    return 1 if record["failed"] or not record["complete"] else 0


if __name__ == "__main__":
    sys.exit(main())
