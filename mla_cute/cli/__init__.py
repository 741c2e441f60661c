"""The command `mla-cute`, also `python -m mla_cute`: demo, check, bench, tune, dev, cache, info.

Needs the extra `cli` (typer, rich); without it there are info and check, in plain text.
"""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("typer", "rich"):
            raise
        from . import plain

        sys.exit(plain.main(sys.argv[1:]))
    app(prog_name="mla-cute")
