"""The command `mla-cute`, also `python -m mla_cute`: demo, check, bench, tune, dev, info.

Needs the extra `cli` (typer, rich).
"""

import sys


def main() -> None:
    """Run the command line; without its dependencies, say in one line what to install and exit with status 2."""
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("typer", "rich"):
            raise
        print(f"mla-cute: the command line needs {error.name}: pip install mla-cute[cli]", file=sys.stderr)
        sys.exit(2)
    app(prog_name="mla-cute")
