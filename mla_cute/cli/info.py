"""Facts behind `mla-cute info`."""

import os
from typing import Any

from .. import gpu as gpu_facts
from .. import jit, tuned

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
    """Where compiled kernels lie, how many, and the bytes of all files there."""
    try:
        directory = jit.cache_dir()
    except RuntimeError as error:
        return {"directory": None, "why": str(error), "entries": 0, "bytes": 0}
    files = [path for path in directory.iterdir() if path.is_file()] if directory.is_dir() else []
    return {
        "directory": str(directory),
        "entries": sum(1 for _ in jit.entries()),
        "bytes": sum(path.stat().st_size for path in files),
    }


def tuned_files() -> list[str]:
    """Tuned configurations of any GPU, in the order in which :mod:`mla_cute.tuned` looks for them."""
    return [str(path) for _, directory in tuned.directories() for path in sorted(directory.glob("*.json"))]
