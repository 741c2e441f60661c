"""`mla-cute export-solution`: solutions for flashinfer-bench as JSON files."""

import pathlib
from typing import Annotated

import typer

from ..integrations import flashinfer_bench
from .screen import usage_error


def export_solution(
    out: Annotated[pathlib.Path, typer.Option(help="folder to write to, as the folder solutions of a dataset")],
    definitions: Annotated[
        list[str] | None, typer.Argument(metavar="DEFINITION", help="names of the above; all when none is given")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="write over files that are there")] = False,
) -> None:
    """Write solutions for flashinfer-bench: JSON whose source calls this library. Prints the paths.

    Definitions: mla_paged_decode_h16_ckv512_kpe64_ps1, mla_paged_decode_h16_ckv512_kpe64_ps64,
    mla_paged_prefill_causal_h16_ckv512_kpe64_ps1, mla_paged_prefill_causal_h16_ckv512_kpe64_ps64,
    dsa_sparse_attention_h16_ckv512_kpe64_topk2048_ps1, dsa_sparse_attention_h16_ckv512_kpe64_topk2048_ps64.
    """
    try:
        paths = flashinfer_bench.export(out, definitions or flashinfer_bench.DEFINITIONS, force=force)
    except (OSError, ValueError) as error:
        usage_error(error)
    for path in paths:
        print(path)
