"""What a compiled kernel depends on beside its own key and config, found without importing the DSL."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import re
import sys

ARCH = "sm_90a"
# DSL settings that change the code it makes; a kernel compiled for debugging must not be served to a later run.
_DSL_SETTINGS = (
    "DEBUG",
    "LINEINFO",
    "ENABLE_ASSERTIONS",
    "COMPILER_OPT",
    "COMPILER_BACKEND",
    "ENABLE_PYIR",
    "AUTO_M2S",
)


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # unpacked wheels on a path
        return "unknown"


def read_sources(module_name: str) -> str:
    folder = pathlib.Path(__file__).parent / "kernels"
    paths = sorted(str(p) for p in folder.rglob("*.py"))
    if not module_name.startswith(f"{__package__}.kernels."):
        module = sys.modules.get(module_name)
        spec = importlib.util.find_spec(module_name) if module is None else None
        path = spec.origin if spec else getattr(module, "__file__", None)
        if path is not None:
            paths.append(path)
    digest = hashlib.sha256()
    for path in paths:
        content = pathlib.Path(path).read_bytes()
        digest.update(f"{os.path.basename(path)}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


@functools.cache
def host_isa() -> str:
    """Host instruction set: the exported launcher is compiled for the CPU it is compiled on (AVX-512 included)."""
    machine = platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", file.read(16384), re.MULTILINE)
        if found:
            kept = ("avx", "sse", "ssse", "bmi", "fma", "f16c", "amx", "abm", "movbe", "adx", "gfni", "popcnt", "sve")
            return f"{machine}:{','.join(sorted(f for f in found[1].split() if f.startswith(kept)))}"
    return f"{machine}:{platform.processor()}"


@functools.cache
def runtime_library() -> str | None:
    """Path of libcute_dsl_runtime.so, found as the DSL finds it but without importing it; None when in doubt."""
    name = "libcute_dsl_runtime.so"
    if named := os.environ.get("CUTE_DSL_LIBS"):
        return next((p for p in named.split(os.pathsep) if p.endswith(name) and os.path.exists(p)), None)
    spec = importlib.util.find_spec("nvidia_cutlass_dsl")
    roots = list(spec.submodule_search_locations or ()) if spec else []
    by_toolkit: dict[int, str] = {}
    for root in roots:
        for path in pathlib.Path(root).glob(f"cu*/lib/{name}"):
            with contextlib.suppress(ValueError):
                by_toolkit.setdefault(int(path.parent.parent.name[2:]), str(path))
    if len(by_toolkit) > 1:  # several CUDA toolkits' builds are installed: the newest that the driver runs
        version = ctypes.c_int(0)
        with contextlib.suppress(OSError):
            if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) == 0:
                by_toolkit = {toolkit: p for toolkit, p in by_toolkit.items() if toolkit <= version.value // 1000}
    return by_toolkit[max(by_toolkit)] if by_toolkit else None


@functools.cache
def torch_exports_e4m3() -> bool:
    """Whether this torch hands its float8_e4m3fn tensors to others as such; older ones have to show them as bytes."""
    import torch

    try:
        torch.empty(1, dtype=torch.float8_e4m3fn).__dlpack__()
    except (RuntimeError, BufferError, TypeError, ValueError):
        return False
    return True


@functools.cache
def environment() -> str:
    """What every entry depends on beside its own kernel, key and config."""
    library = runtime_library()
    toolkit = pathlib.Path(library).parent.parent.name if library else "unknown"
    settings = [f"{s}={os.environ[f'CUTE_DSL_{s}']}" for s in _DSL_SETTINGS if f"CUTE_DSL_{s}" in os.environ]
    return "\n".join(
        [
            f"arch {ARCH}",
            f"dsl {version('nvidia-cutlass-dsl')} {version('nvidia-cutlass-dsl-libs-base')} {toolkit}",
            f"tvm-ffi {version('apache-tvm-ffi')}",
            f"host {host_isa()}",
            f"e4m3 arguments {torch_exports_e4m3()}",
            *settings,
        ]
    )
