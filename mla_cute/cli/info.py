"""Facts behind `mla-cute info`; needs what the library needs."""

import contextlib
import os
import pathlib
from typing import Any

from .. import gpu as gpu_facts
from ..compile import disk, jit
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


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What `collect` found, but for the variables: names and texts."""
    gpu, cache = found["gpu"], found["cache"]
    told = []
    if gpu is not None:
        told += [
            ("GPU", f"{gpu['name']}, compute capability {gpu['capability'][0]}.{gpu['capability'][1]}"),
            ("SMs, memory", f"{gpu['sm_count']}, {gpu['memory_bytes'] / 2**30:.1f} GiB"),
            ("driver", str(gpu["driver"])),
            ("clocks, at most", f"SM {gpu['max_sm_mhz']} MHz, memory {gpu['max_memory_mhz']} MHz"),
        ]
    told.append(("kernels run here", "yes" if found["kernels_run_here"] else f"no: {found['why_not']}"))
    told += [(name, version or "not installed") for name, version in found["versions"].items() if name != "cuda"]
    told.append(("CUDA of torch", found["versions"]["cuda"] or "none"))
    if found["git"] is not None:
        told.append(("commit", gpu_facts.commit_of(found["git"])))
    told.append(("kernel cache", cache["directory"] or "none"))
    if "why" in cache:
        told.append(("", f"CANNOT BE WRITTEN: {cache['why']}. New kernels are not kept. {disk.ADVICE}"))
    told.append(("cached kernels", f"{cache['entries']}, {cache['bytes'] / 2**20:.1f} MiB"))
    told.append(("tuned files", "\n".join(found["tuned"]) or "none, the default configuration is used"))
    return told


def variables(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Of the environment."""
    return [(name, value if value is not None else "(not set)") for name, value in found["environment"].items()]


def cache() -> dict[str, Any]:
    """Where compiled kernels lie, how many, and the bytes of all files there; "why" where none can be added."""
    try:
        directory = jit.cache_dir()
    except RuntimeError as error:
        return {"directory": None, "why": str(error), "entries": 0, "bytes": 0}
    found: dict[str, Any] = {"directory": str(directory)}
    if (why := disk.why_not_writable(directory)) is not None:
        found["why"] = why
    paths: list[pathlib.Path] = []
    with contextlib.suppress(OSError):  # there is none, it is a file, or a folder of somebody else
        paths = list(directory.iterdir())
    return {**found, "entries": sum(1 for _ in jit.entries()), "bytes": sum(map(_size, paths))}


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
