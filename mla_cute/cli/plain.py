"""`mla-cute` where typer and rich are not installed: info, check and --version, in plain text.

Needs what the library needs. A command that is not here says how to install what it needs.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from .. import __version__
from ..bench.report import text_table
from ..extras import install_command
from . import check as checking
from . import info as facts
from .stages import Stages
from .watchdog import Watchdog, parse_seconds

_NEEDS = install_command("typer", "rich")


def main(argv: Sequence[str]) -> int:
    """Run a command line; returns the exit status."""
    made = argparse.ArgumentParser(
        prog="mla-cute",
        description="Without typer and rich there are info and check in plain text, and `python -m mla_cute.bench`. "
        f"For all commands: {_NEEDS}",
    )
    made.add_argument("--version", action="version", version=f"mla-cute {__version__}")
    commands = made.add_subparsers(dest="command", metavar="COMMAND")
    info = commands.add_parser("info", help="GPU, versions, kernel cache, tuned files, environment variables")
    info.add_argument("--json", action="store_true", help="as JSON, for a bug report")
    check = commands.add_parser("check", help="the correctness sweep, on a Hopper GPU or of the CPU path")
    check.add_argument("--quick", action="store_true", help="a seventh of the cases, without long requests")
    check.add_argument("--seed", type=checking.parse_seed, default=0, help="other random numbers, same shapes")
    check.add_argument("--timeout", type=parse_seconds, default=checking.TIMEOUT_S, help=checking.TIMEOUT_HELP)
    if not argv:
        made.print_help()
        return 2
    if not argv[0].startswith("-") and argv[0] not in commands.choices:
        return _missing(argv[0])
    options, others = made.parse_known_args(argv)
    if others:
        return _missing(f"{options.command or ''} {others[0]}".strip())
    if options.command is None:  # "--" alone
        made.print_help()
        return 2
    if options.command == "info":
        return _info(options.json)
    return _check(options.quick, options.seed, options.timeout)


def _missing(what: str) -> int:
    print(f"mla-cute: without typer and rich there are info and check; for `{what}`: {_NEEDS}", file=sys.stderr)
    return 2


def _info(as_json: bool) -> int:
    found = facts.collect()
    if as_json:
        print(json.dumps(found, indent=1))
        return 0
    for rows in (facts.rows(found), facts.variables(found)):
        width = max(len(name) for name, _ in rows)
        for name, text in rows:
            # a value of several lines stands under its first
            print(f"{name:<{width}}  " + f"\n{' ' * (width + 2)}".join(text.split("\n")))
        print()
    return 0


def _check(quick: bool, seed: int, timeout: float) -> int:
    run = checking.Run.of(quick, seed)
    print(run.introduction(), flush=True)
    with Watchdog(timeout, enabled=run.on_gpu) as watchdog:
        groups, failures = run.check(Stages("checking").step, watchdog.feed)
    print(run.title)
    print(text_table([checking.COLUMNS, *(group.cells() for group in groups)]))
    for line in checking.closing(failures):
        print(line)
    return 1 if failures else 0
