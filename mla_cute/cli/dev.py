"""`mla-cute dev`: machine code of kernel variants, for whoever changes them. Runs on any machine."""

import pathlib
from typing import Annotated

import typer

from .. import dev
from .screen import Wide, say, show_table, usage_error

app = typer.Typer(help="Machine code of kernel variants, on any machine.", no_args_is_help=True)

_VARIANTS = "Names of variants, their beginnings, or shell patterns: 'decode_tile64*-bfloat16-64'."


@app.command("list")
def list_variants(patterns: Annotated[list[str] | None, typer.Argument(help=_VARIANTS)] = None) -> None:
    """Names of the variants."""
    for name in _names(patterns or []):
        print(name)


@app.command()
def code(
    patterns: Annotated[list[str], typer.Argument(help=_VARIANTS)],
    sass: Annotated[pathlib.Path | None, typer.Option(help="Folder for the SASS, a file for each variant.")] = None,
    wide: Wide = False,
) -> None:
    """Compile variants for sm_90a: registers, spills, shared memory, counts of what matters."""
    rows = []
    for name in _names(patterns):
        try:
            found = dev.code(name)
        except (FileNotFoundError, RuntimeError) as error:
            usage_error(str(error))
        counts = found.facts["instructions"]
        rows.append(
            (
                name, str(found.facts["registers"]), str(found.facts["spill_bytes"]), str(found.facts["smem_bytes"]),
                str(counts["total"]), *(str(counts[mnemonic]) for mnemonic in _COUNTED),
            )
        )  # fmt: skip
        if sass is not None:
            sass.mkdir(parents=True, exist_ok=True)
            (sass / f"{name}.sass").write_text(found.sass)
            most = ", ".join(f"{opcode} {n}" for opcode, n in found.opcodes.most_common(12))
            say(f"{name}: {most}")
    show_table("code for sm_90a", _COLUMNS, rows, drop=tuple(reversed(_COUNTED)), wide=wide)


_COUNTED = ("HGMMA", "QGMMA", "HMMA", "UTMALDG", "LDGSTS", "LDSM", "DEPBAR")
_COLUMNS = ("variant", "registers", "spill bytes", "shared memory", "instructions", *_COUNTED)


@app.command()
def same(
    revision: Annotated[str, typer.Argument(help="What to compare this checkout with: HEAD, a tag, a commit.")],
    patterns: Annotated[list[str] | None, typer.Argument(help=_VARIANTS + " All without any: 240, 20 minutes.")] = None,
) -> None:
    """Which variants' machine code or resources differ from another revision's. Exits with 1 where one does.

    A move or a rename changes symbols and not the code: this is the check behind "machine code is unchanged".
    """
    try:
        compared, found = dev.same(revision, patterns or [])
    except (ValueError, RuntimeError) as error:
        usage_error(str(error))
    for difference in found:
        print(difference)
    print(f"{compared} variants compared with {revision}: {len(found)} differ")
    if found:
        raise typer.Exit(1)


def _names(patterns: list[str]) -> list[str]:
    try:
        return dev.names(patterns)
    except ValueError as error:
        usage_error(str(error))
