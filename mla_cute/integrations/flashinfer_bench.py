"""Solutions for flashinfer-bench: JSON whose source calls this library.

    from mla_cute.integrations import flashinfer_bench
    flashinfer_bench.export("dataset/solutions")        # also: mla-cute export-solution --out dataset/solutions

The form is the Solution schema of flashinfer-bench 0.1.2 (language "python", destination-passing style: outputs are the
last arguments); the package itself is not needed. It lists dependencies without installing them, so mla-cute has to be
installed where the benchmark runs. What the definitions mean by lengths:

* page size 1: kv_indptr counts tokens.
* page size 64: kv_indptr counts pages; kv_last_page_len [batch_size] int32 says how many tokens a last page holds.
* prefill: query i of a request's n sees keys 0 .. kv_len - n + i, as `mla_paged_prefill` with causal=True.
* dsa_sparse_attention: sparse_indices are those of `mla_sparse`, page * page_size + row and -1 for none.

A request or query without keys gives lse -inf here and in the definitions' references; flashinfer-bench 0.1.2 counts an
infinity in a solution's output as wrong whatever the reference gives.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from .. import __version__

__all__ = ["DEFINITIONS", "export", "path_of", "solution", "to_json"]

AUTHOR = "mla_cute"
HARDWARE = ("NVIDIA_H100", "NVIDIA_H200", "NVIDIA_H800", "NVIDIA_H20")

_DECODE = """\
import mla_cute


def run(q_nope, q_pe, ckv_cache, kpe_cache, kv_indptr, kv_indices, sm_scale, output, lse):
    mla_cute.mla_paged_decode(
        q_nope, q_pe, ckv_cache, kpe_cache, kv_indptr, kv_indices, sm_scale, out=output, lse=lse
    )
"""

_DECODE_PAGES = """\
import mla_cute


def run(q_nope, q_pe, ckv_cache, kpe_cache, kv_indptr, kv_indices, kv_last_page_len, sm_scale, output, lse):
    mla_cute.mla_paged_decode(
        q_nope, q_pe, ckv_cache, kpe_cache, kv_indptr, kv_indices, sm_scale,
        kv_last_page_len=kv_last_page_len, out=output, lse=lse,
    )
"""

_PREFILL = """\
import mla_cute


def run(q_nope, q_pe, ckv_cache, kpe_cache, qo_indptr, kv_indptr, kv_indices, sm_scale, output, lse):
    mla_cute.mla_paged_prefill(
        q_nope, q_pe, ckv_cache, kpe_cache, qo_indptr, kv_indptr, kv_indices, sm_scale, out=output, lse=lse
    )
"""

_PREFILL_PAGES = """\
import mla_cute


def run(q_nope, q_pe, ckv_cache, kpe_cache, qo_indptr, kv_indptr, kv_indices, kv_last_page_len, sm_scale, output, lse):
    mla_cute.mla_paged_prefill(
        q_nope, q_pe, ckv_cache, kpe_cache, qo_indptr, kv_indptr, kv_indices, sm_scale,
        kv_last_page_len=kv_last_page_len, out=output, lse=lse,
    )
"""

_SPARSE = """\
import mla_cute


def run(q_nope, q_pe, ckv_cache, kpe_cache, sparse_indices, sm_scale, output, lse):
    mla_cute.mla_sparse(q_nope, q_pe, ckv_cache, kpe_cache, sparse_indices, sm_scale, out=output, lse=lse)
"""

# op_type of the definition, and the source of its solution
_SOLUTIONS = {
    "mla_paged_decode_h16_ckv512_kpe64_ps1": ("mla_paged", _DECODE),
    "mla_paged_decode_h16_ckv512_kpe64_ps64": ("mla_paged", _DECODE_PAGES),
    "mla_paged_prefill_causal_h16_ckv512_kpe64_ps1": ("mla_paged", _PREFILL),
    "mla_paged_prefill_causal_h16_ckv512_kpe64_ps64": ("mla_paged", _PREFILL_PAGES),
    "dsa_sparse_attention_h16_ckv512_kpe64_topk2048_ps1": ("dsa_paged", _SPARSE),
    "dsa_sparse_attention_h16_ckv512_kpe64_topk2048_ps64": ("dsa_paged", _SPARSE),
}

DEFINITIONS = tuple(_SOLUTIONS)


def solution(definition: str) -> dict[str, Any]:
    """The solution of one of DEFINITIONS in flashinfer-bench's Solution schema. ValueError: another definition."""
    if definition not in _SOLUTIONS:
        raise ValueError(f"definition: expected one of {', '.join(DEFINITIONS)}, got {definition!r}")
    return {
        # A dataset holds a solution's name once, over all definitions, and keeps results under it.
        "name": f"mla_cute_{__version__}_{definition}",
        "definition": definition,
        "author": AUTHOR,
        "description": "mla_cute: MLA kernels for Hopper GPUs in the CuTe Python DSL. Each call plans anew.",
        "spec": {
            "language": "python",
            "target_hardware": list(HARDWARE),
            "entry_point": "main.py::run",
            "dependencies": [f"mla-cute=={__version__}"],
            "destination_passing_style": True,
        },
        "sources": [{"path": "main.py", "content": _SOLUTIONS[definition][1]}],
    }


def to_json(value: dict[str, Any]) -> str:
    """Equal dicts give equal bytes: keys sorted, one newline at the end."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def path_of(definition: str) -> pathlib.PurePosixPath:
    """Where a dataset keeps the solution under its folder `solutions`. ValueError: not one of DEFINITIONS."""
    name = solution(definition)["name"]
    return pathlib.PurePosixPath(AUTHOR, _SOLUTIONS[definition][0], definition, f"{name}.json")


def export(
    out: str | os.PathLike[str], definitions: Sequence[str] = DEFINITIONS, *, force: bool = False
) -> list[pathlib.Path]:
    """Write the solutions of `definitions` to `out/mla_cute/<op_type>/<definition>/<name>.json`.

    Args:
        out: a folder, made if it is not there; a dataset's `solutions`, or any other.
        definitions: names from DEFINITIONS.
        force: write over files that are there.

    Returns:
        The paths, in the order of `definitions`.

    Raises:
        ValueError: a name that is not in DEFINITIONS. FileExistsError: a file is there and `force` is not set. Nothing
            has been written in either case.
        OSError: a folder or file cannot be written.
    """
    texts = {pathlib.Path(out, path_of(name)): to_json(solution(name)) for name in definitions}
    existing = [str(path) for path in texts if path.exists()]
    if existing and not force:
        raise FileExistsError(f"would write over {', '.join(existing)}; --force (force=True) does")
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
    return list(texts)
