"""From (kernel, static key, config) to a callable: memory, then disk, then the compiler.

The disk cache holds what the compiler exports: one object file per variant (host launcher with the cubin inside) and a
JSON sidecar with readable facts. It lives in `$MLA_CUTE_CACHE_DIR`, else `$XDG_CACHE_HOME/mla_cute`, else
`~/.cache/mla_cute`; deleting it is always safe. An entry's name is a hash of everything the machine code depends on:
the source of the kernel's module and of what it imports of this package, DSL and TVM-FFI versions, GPU architecture,
host instruction set, kernel name, key and config.

Any number of processes may share the directory: entries appear by rename, a lock file per entry lets one process
compile while the others wait, and a damaged entry is compiled again. A directory that cannot be written (read-only,
full) costs one warning and leaves the memory cache.

Measured in a fresh process that has imported torch 2.13, on two cores of an EPYC, DSL 4.8.1:

    import mla_cute                          21 ms
    first kernel from disk                   24 ms   (imports tvm_ffi, hashes the sources in 0.5 to 2 ms, opens the
                                                     runtime library)
    every further kernel from disk            1 ms
    first kernel through the DSL's loader   450 ms   (420 ms of it `import cutlass`; 900 ms when its files are cold)
    compiling the decode kernel           7..10 s

The difference is why :func:`get` accepts a :class:`KernelRef` and loads objects with :mod:`.elf`; objects and hosts
that `elf` does not know go through the DSL's loader.

Finding and reading entries leaves the CUDA driver alone. Loading one does not, nor does compiling: importing tvm_ffi
asks torch whether there is a GPU, which initialises the driver, and processes forked after that cannot use it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..kernels.keys import KernelRef
from . import disk, elf, sass, toolchain

log = logging.getLogger("mla_cute.jit")

_SCHEMA = 1
# A compile takes 10 s on 2 cores. A holder that is alive after this long is stuck, so waiters compile for themselves.
_LOCK_TIMEOUT_S = 600.0
# A waiter says so after this long: three compiles.
_SAY_AFTER_S = 30.0


@dataclass(frozen=True)
class _Entry:
    """One variant's place in the cache."""

    kernel: Any  # kernel class or KernelRef
    key: Any
    config: Any
    digest: str
    directory: pathlib.Path | None  # None: no cache directory can be named

    @property
    def stem(self) -> str:
        return f"{self.kernel.name}-{self.digest[:24]}"

    @property
    def symbol(self) -> str:
        return "mla_cute_" + re.sub(r"\W", "_", self.stem)

    def path(self, suffix: str) -> pathlib.Path:
        assert self.directory is not None
        return self.directory / (self.stem + suffix)

    def __str__(self) -> str:
        return f"{self.kernel.name} {self.key!r} {self.config!r}"


_memory: dict[tuple[Any, Any, Any], Callable[..., Any]] = {}
_by_digest: dict[str, Callable[..., Any]] = {}
_lock = threading.RLock()  # The DSL traces and compiles with process-wide state.
_counters = {"compiled": 0, "loaded": 0}
_warned = False


def get(kernel_cls: Any, key: Any, config: Any) -> Callable[..., Any]:
    """The compiled launcher of `kernel_cls(key, config)`; positional arguments only, torch tensors go in directly.

    Args:
        kernel_cls: a kernel class, or a :class:`KernelRef` to one (then a disk hit imports neither it nor cutlass).
        key: frozen dataclass of what the code depends on; equal keys must have equal `repr`.
        config: frozen dataclass of tunables, same rule; may be None.

    Safe to call from several threads and processes. Takes under 1 us once the variant is in memory.

    Raises:
        Whatever the DSL raises when the kernel does not compile.
    """
    try:
        return _memory[kernel_cls, key, config]
    except KeyError:
        pass
    with _lock:
        entry = _entry(kernel_cls, key, config)
        function = _by_digest.get(entry.digest)
        if function is None:
            blob, meta, compiled = _obtain(entry)
            function = _load(blob, meta["symbol"])
            _counters["compiled" if compiled else "loaded"] += 1
            _by_digest[entry.digest] = function
        _memory[kernel_cls, key, config] = function
        return function


def counters() -> dict[str, int]:
    """How many kernels this process compiled, and how many it loaded from disk instead."""
    return dict(_counters)


def cache_dir() -> pathlib.Path:
    """The directory of compiled kernels (it may not exist yet).

    Raises:
        RuntimeError: no environment variable names one and the user has no home directory.
    """
    if named := os.environ.get("MLA_CUTE_CACHE_DIR"):
        return pathlib.Path(named).expanduser()
    if named := os.environ.get("XDG_CACHE_HOME"):
        return pathlib.Path(named) / "mla_cute"
    return pathlib.Path.home() / ".cache" / "mla_cute"


def clear() -> int:
    """Forget every compiled kernel, in memory and on disk; returns the number of files removed.

    On disk, entries that another process holds locked stay (`disk.remove`). Functions that callers hold stay valid.
    """
    with _lock:
        _memory.clear()
        _by_digest.clear()
    with contextlib.suppress(NotADirectoryError):
        return disk.remove(cache_dir()).files
    return 0


def entries() -> Iterator[dict[str, Any]]:
    """The sidecars of all entries on disk, unordered; unreadable ones are left out."""
    with contextlib.suppress(OSError, RuntimeError):
        for path in cache_dir().glob("*.json"):
            with contextlib.suppress(OSError, ValueError):
                yield json.loads(path.read_bytes())


def compile_info(kernel_cls: Any, key: Any, config: Any) -> dict[str, Any]:
    """Facts about one variant's machine code; compiles it when it is not cached, and needs no GPU.

    Returns a dict with, as maxima over the kernels of the variant: `registers` per thread, `spill_bytes` (local-memory
    frame per thread), `static_smem_bytes`, `dynamic_smem_bytes` (None when it is not a compile-time constant) and
    their sum `smem_bytes` per CTA, `threads` per CTA; then `kernels` (the same per kernel), `cubin_bytes`,
    `compile_seconds`, `cached`, and with nvdisasm installed `instructions` (see `sass.instruction_counts`), else None.
    """
    with _lock:
        blob, meta, compiled = _obtain(_entry(kernel_cls, key, config))
        _counters["compiled"] += compiled
    cubins = list(elf.embedded_cubins(blob))
    instructions: dict[str, int] | None = None
    if sass.find_nvdisasm() is not None:
        instructions = {}
        for cubin in cubins:
            for mnemonic, times in sass.instruction_counts(cubin).items():
                instructions[mnemonic] = instructions.get(mnemonic, 0) + times
    return {
        **meta["facts"],
        "compile_seconds": meta["compile_seconds"],
        "cached": not compiled,
        "instructions": instructions,
    }


def prepare(kernel_cls: Any, key: Any, config: Any) -> tuple[float, bool]:
    """Make sure that the variant is on disk without loading it; returns (seconds, whether it was there already)."""
    start = time.perf_counter()
    with _lock:
        compiled = _obtain(_entry(kernel_cls, key, config))[2]
        _counters["compiled"] += compiled
    return time.perf_counter() - start, not compiled


def is_cached(kernel_cls: Any, key: Any, config: Any) -> bool:
    """Whether a `get` would find the variant in memory or intact on disk."""
    return (kernel_cls, key, config) in _memory or _read(_entry(kernel_cls, key, config)) is not None


def is_writable() -> bool:
    """Whether entries can be added to the cache directory; creates it."""
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        return disk.why_not_writable(cache_dir()) is None
    except (OSError, RuntimeError):
        return False


def exported(kernel_cls: Any, key: Any, config: Any) -> tuple[bytes, str]:
    """The variant's object file and the name of its function; compiles it when it is not cached."""
    with _lock:
        blob, meta, compiled = _obtain(_entry(kernel_cls, key, config))
        _counters["compiled"] += compiled
    return blob, meta["symbol"]


def cubins(kernel_cls: Any, key: Any, config: Any) -> list[bytes]:
    """The variant's cubins, for `sass.opcode_counts`, nvdisasm or cuobjdump; compiles it when it is not cached."""
    return list(elf.embedded_cubins(exported(kernel_cls, key, config)[0]))


# ---------------------------------------------------------------------------------------------------------------------
# identity

_files_at_first_use: dict[str, toolchain.Source | None] = {}
_sources_at_first_use = functools.cache(functools.partial(toolchain.read_sources, known=_files_at_first_use))


def _module_of(kernel: Any) -> str:
    return kernel.module if isinstance(kernel, KernelRef) else kernel.__module__


def _source_digest(kernel: Any) -> str:
    """`toolchain.read_sources`, once per process: code that is already imported does not change with its file."""
    return _sources_at_first_use(_module_of(kernel))


def _entry(kernel: Any, key: Any, config: Any) -> _Entry:
    sources = _source_digest(kernel)
    parts = [f"schema {_SCHEMA}", toolchain.environment(), f"sources {sources}", kernel.name, repr(key), repr(config)]
    text = "\n".join(parts)
    directory: pathlib.Path | None = None
    with contextlib.suppress(RuntimeError):
        directory = cache_dir()
    return _Entry(kernel, key, config, hashlib.sha256(text.encode()).hexdigest(), directory)


# ---------------------------------------------------------------------------------------------------------------------
# disk


def _degrade(entry: _Entry, error: Exception | str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"mla_cute cannot keep compiled kernels in {entry.directory}: {error}. {disk.ADVICE}",
            RuntimeWarning,
            stacklevel=4,
        )


def _read(entry: _Entry) -> tuple[bytes, dict[str, Any]] | None:
    """The entry's object and sidecar, or None when it is absent, half-written or damaged."""
    if entry.directory is None:
        return None
    try:
        meta = json.loads(entry.path(".json").read_bytes())
        blob = entry.path(".o").read_bytes()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("ignoring cache entry %s: %s", entry.path(".json"), error)
        return None
    intact = (
        isinstance(meta, dict)
        and meta.get("schema") == _SCHEMA
        and meta.get("symbol") == entry.symbol
        and {"facts", "compile_seconds"} <= meta.keys()
        and meta.get("sha256") == hashlib.sha256(blob).hexdigest()
    )
    if not intact:
        log.warning("cache entry %s is damaged, compiling it again", entry.path(".o"))
        return None
    return blob, meta


def replace_file(path: pathlib.Path, content: bytes) -> None:
    """Write by rename: a reader sees the old file or the whole new one."""
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(entry: _Entry, blob: bytes, meta: dict[str, Any]) -> None:
    # The sidecar vouches for the object by its checksum, so it goes last.
    replace_file(entry.path(".o"), blob)
    replace_file(entry.path(".json"), (json.dumps(meta, indent=1) + "\n").encode())


@contextlib.contextmanager
def _entry_lock(entry: _Entry) -> Iterator[bool]:
    """Holds the entry's lock file; yields False, unlocked, when the directory does not allow one."""
    if entry.directory is None:
        _degrade(entry, "there is no home directory")
        yield False
        return
    import filelock

    lock = filelock.FileLock(str(entry.path(".lock")), timeout=_LOCK_TIMEOUT_S)
    try:
        entry.directory.mkdir(parents=True, exist_ok=True)
        _wait_for(lock, entry)
    except filelock.Timeout:
        log.warning("%s has been locked for %.0f s, compiling without it", entry.path(".lock"), _LOCK_TIMEOUT_S)
        yield True
        return
    except (OSError, NotImplementedError) as error:
        _degrade(entry, error)
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _wait_for(lock: Any, entry: _Entry) -> None:
    """Acquire a filelock that another process may hold. Raises filelock.Timeout after `_LOCK_TIMEOUT_S`."""
    import filelock

    soon = min(_SAY_AFTER_S, _LOCK_TIMEOUT_S)
    try:
        lock.acquire(timeout=soon)
    except filelock.Timeout:
        log.warning("waiting since %.0f s for another process that compiles %s", soon, entry)
        lock.acquire(timeout=_LOCK_TIMEOUT_S - soon)


def _obtain(entry: _Entry) -> tuple[bytes, dict[str, Any], bool]:
    """(object, sidecar, whether it was compiled just now)."""
    if found := _read(entry):
        return *found, False
    with _entry_lock(entry) as writable:
        if found := _read(entry):  # another process compiled it while this one waited
            return *found, False
        blob, meta = _compile(entry)
        if toolchain.read_sources(_module_of(entry.kernel)) != _source_digest(entry.kernel):
            # Somebody is editing: which version was imported and compiled is unknown, so no other process may get it.
            log.warning("kernel sources changed since this process first read them, not keeping %s", entry.stem)
        elif writable:
            try:
                _write(entry, blob, meta)
            except OSError as error:
                _degrade(entry, error)
        return blob, meta, True


# ---------------------------------------------------------------------------------------------------------------------
# compiler and loader


def _compile(entry: _Entry) -> tuple[bytes, dict[str, Any]]:
    import cutlass.cute as cute

    kernel_cls = entry.kernel.resolve() if isinstance(entry.kernel, KernelRef) else entry.kernel
    log.info("compiling %s", entry)
    start = time.perf_counter()
    kernel = kernel_cls(entry.key, entry.config)
    # Where a GPU can run the code, the DSL would make the host code a second time, into this process: 0.15 s a variant,
    # for a function that nothing calls, since what runs is loaded from the object.
    compiled = cute.compile(kernel, *kernel.compile_args(), options=toolchain.COMPILE_OPTIONS, no_jit_engine=True)
    blob = _export(compiled, entry.symbol)
    seconds = time.perf_counter() - start
    log.info("compiled %s in %.1f s", entry.stem, seconds)
    meta = {
        "schema": _SCHEMA,
        "kernel": entry.kernel.name,
        "key": repr(entry.key),
        "config": repr(entry.config),
        "facts": _facts(blob, str(compiled.ir_module)),
        "compile_seconds": round(seconds, 3),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "made_with": {
            "mla_cute": toolchain.version("mla-cute"),
            "nvidia-cutlass-dsl": toolchain.version("nvidia-cutlass-dsl"),
            "toolkit": toolchain.toolkit(),
            "apache-tvm-ffi": toolchain.version("apache-tvm-ffi"),
        },
        "arch": toolchain.ARCH,
        "source_digest": _source_digest(entry.kernel),
        "symbol": entry.symbol,
        "sha256": hashlib.sha256(blob).hexdigest(),
    }
    return blob, meta


def _export(compiled: Any, symbol: str) -> bytes:
    """The object file of a compiled function. In memory where the system can, so that a full disk does not matter."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("mla_cute")
        try:
            compiled.export_to_c(object_file_path=f"/proc/self/fd/{descriptor}", function_name=symbol)
            with open(descriptor, "rb", closefd=False) as file:
                file.seek(0)
                return file.read()
        finally:
            os.close(descriptor)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "kernel.o"
        compiled.export_to_c(object_file_path=str(path), function_name=symbol)
        return path.read_bytes()


_LAUNCH_CONFIG = r"!llvm.struct<(array<3 x i32>, array<3 x i32>, i64, ptr, ptr, i32)>"
_IR_LINE = re.compile(
    r"(?P<constant>%\w+) = llvm\.mlir\.constant\((?P<value>-?\d+) : i64\)"
    rf"|(?P<slot>%\w+) = llvm\.getelementptr %\w+\[0, 2\] .*{re.escape(_LAUNCH_CONFIG)}"
    r"|llvm\.store (?P<stored>%\w+), (?P<into>%\w+) : i64"
    r"|(?P<function>llvm\.func )"
)


def _dynamic_smem(ir: str) -> int | None:
    """Largest dynamic shared memory among the launches in the host code, in bytes; None when one is not constant."""
    constants: dict[str, int] = {}
    slots: set[str] = set()
    sizes = []
    for found in _IR_LINE.finditer(ir):
        if found["function"]:
            constants, slots = {}, set()
        elif found["constant"]:
            constants[found["constant"]] = int(found["value"])
        elif found["slot"]:
            slots.add(found["slot"])
        elif found["into"] in slots:
            if found["stored"] not in constants:
                return None
            sizes.append(constants[found["stored"]])
    return max(sizes, default=None)


def _facts(blob: bytes, ir: str) -> dict[str, Any]:
    images = list(elf.embedded_cubins(blob))
    kernels = [facts for image in images for facts in sass.kernels(image)]
    dynamic = _dynamic_smem(ir)
    static = max((k.static_smem_bytes for k in kernels), default=0)
    return {
        "registers": max((k.registers for k in kernels), default=0),
        "spill_bytes": max((k.stack_bytes for k in kernels), default=0),
        "static_smem_bytes": static,
        "dynamic_smem_bytes": dynamic,
        "smem_bytes": static + (dynamic or 0),
        "threads": max((k.threads or 0 for k in kernels), default=0),
        "cubin_bytes": sum(len(image) for image in images),
        "kernels": [k._asdict() for k in kernels],
    }


def _load(blob: bytes, symbol: str) -> Callable[..., Any]:
    import tvm_ffi

    library = toolchain.runtime_library()
    if library is not None:
        try:
            address = elf.load(blob, f"__tvm_ffi_{symbol}", [ctypes.CDLL(library), tvm_ffi.LIB])
            return tvm_ffi.Function.__from_extern_c__(address)
        except (elf.UnsupportedObject, OSError) as error:
            log.info("loading %s through the DSL: %s", symbol, error)
    import cutlass.cute as cute

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "kernel.o"
        path.write_bytes(blob)
        return cute.runtime.load_module(str(path), enable_tvm_ffi=True)[symbol]
