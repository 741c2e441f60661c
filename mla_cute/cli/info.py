"""Facts behind `mla-cute info`."""

import contextlib
import os
import pathlib
from typing import Any

from .. import gpu as gpu_facts
from ..compile import jit
from ..tuned import select

# What changes where kernels and their configurations come from, what is recorded or checked, which GPU is seen.
VARIABLES = (
    "MLA_CUTE_CACHE_DIR",
    "MLA_CUTE_CHECK",
    "MLA_CUTE_LOG",
    "MLA_CUTE_LOG_SHAPES",
    "MLA_CUTE_TUNED",
    "MLA_CUTE_TUNED_DIR",
    "XDG_CACHE_HOME",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME",
    "CUTE_DSL_ARCH",
    "CUTE_DSL_LIBS",
)


def collect() -> dict[str, Any]:
    """Everything `info` prints, as plain values."""
    gpu = gpu_facts.facts()
    settings = sorted({name for name in os.environ if name.startswith(("MLA_CUTE_", "CUTE_DSL_"))} - {*VARIABLES})
    return {
        "gpu": gpu.to_dict() if gpu is not None else None,
        "kernels_run_here": gpu_facts.why_not_hopper() is None,
        "why_not": gpu_facts.why_not_hopper(),
        "versions": gpu_facts.versions(),
        "git": gpu_facts.git_state(),
        "cache": cache(),
        "tuned": tuned_files(),
        "environment": {name: os.environ.get(name) for name in (*VARIABLES, *settings)},
    }


def cache() -> dict[str, Any]:
    """Where compiled kernels lie, how many, and the bytes of all files there; "why" where there is no such folder."""
    try:
        directory = jit.cache_dir()
    except RuntimeError as error:
        return {"directory": None, "why": str(error), "entries": 0, "bytes": 0}
    try:
        paths = list(directory.iterdir()) if directory.exists() else []
    except OSError as error:  # a file, or a folder of somebody else
        return {"directory": str(directory), "why": error.strerror or str(error), "entries": 0, "bytes": 0}
    return {
        "directory": str(directory),
        "entries": sum(1 for _ in jit.entries()),
        "bytes": sum(map(_size, paths)),
    }


def _size(path: pathlib.Path) -> int:
    """Bytes of a file; 0 of what is none, or was removed while this ran."""
    with contextlib.suppress(OSError):
        return path.stat().st_size if path.is_file() else 0
    return 0


def tuned_files() -> list[str]:
    """Tuned configurations of any GPU, in the order in which :mod:`mla_cute.tuned.select` looks for them."""
    found: list[str] = []
    for _, directory in select.directories():
        with contextlib.suppress(OSError):  # a folder that cannot be read has none
            found += map(str, sorted(directory.glob("*.json")))
    return found
