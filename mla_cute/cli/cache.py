"""`mla-cute cache`: the compiled kernels on disk."""

import pathlib
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ..compile import disk, jit
from .screen import Wide, say, show_table, usage_error

app = typer.Typer(help="The compiled kernels on disk.", no_args_is_help=True)

COLUMNS = ("kernel", "mla_cute", "cutlass_dsl", "tvm_ffi", "variants", "MiB", "newest")
_DROP = ("tvm_ffi", "newest", "mla_cute")
_MADE_WITH = ("mla_cute", "nvidia-cutlass-dsl", "apache-tvm-ffi")  # names of the sidecar, in the order of COLUMNS


@app.command("list")
def list_kernels(wide: Wide = False) -> None:
    """Show how many compiled kernels lie there, of which versions, and what they take."""
    directory, kept = _kept()
    if kept:
        show_table(str(directory), COLUMNS, rows(kept), text_columns=4, drop=_DROP, wide=wide)
    say(_told(len(kept), sum(one.size_bytes for one in kept), directory))


@app.command()
def clear(yes: Annotated[bool, typer.Option("--yes", "-y", help="delete without asking")] = False) -> None:
    """Delete the compiled kernels; what another process compiles at this moment, and all other files, stay."""
    directory, kept = _kept()
    if not kept:
        say(_told(0, 0, directory))
        return
    if not yes:
        question = f"Delete {_told(len(kept), sum(one.size_bytes for one in kept), directory)}?"
        try:
            yes = typer.confirm(question)
        except typer.Abort:  # Ctrl-C, or nobody there to answer
            usage_error("cache clear: nothing was deleted; --yes deletes without asking")
        if not yes:
            return
    try:
        removed = disk.remove(directory)
    except OSError as error:
        usage_error(f"cache clear: {error}")
    say(f"deleted {_told(removed.entries, removed.size_bytes, directory)}")
    if removed.busy:
        say(f"left, as another process holds their locks: {', '.join(removed.busy)}")


def rows(kept: Sequence[disk.Kept]) -> list[tuple[str, ...]]:
    """Of COLUMNS: variants of one kernel that were made with the same versions."""
    groups: dict[tuple[str, ...], list[disk.Kept]] = {}
    for one in kept:
        made_with: dict[str, Any] = (one.sidecar or {}).get("made_with", {})
        groups.setdefault((one.kernel, *(str(made_with.get(name, "-")) for name in _MADE_WITH)), []).append(one)
    return [
        (
            *group,
            str(len(found)),
            _mib(sum(one.size_bytes for one in found)),
            max(str((one.sidecar or {}).get("created", "-")) for one in found),
        )
        for group, found in sorted(groups.items())
    ]


def _kept() -> tuple[pathlib.Path, list[disk.Kept]]:
    try:
        directory = jit.cache_dir()
        return directory, disk.kept(directory)
    except (OSError, RuntimeError) as error:
        usage_error(f"cache: {error}")


def _told(entries: int, size_bytes: int, directory: pathlib.Path) -> str:
    return f"{entries or 'no'} compiled kernels{f', {_mib(size_bytes)} MiB,' if entries else ''} in {directory}"


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f}"
