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
from collections.abc import Callable, Iterator
from typing import NamedTuple

from .. import dlpack

_PACKAGE = __name__.split(".")[0]
# The folder of the package, whose files the digests are of.
_folder = os.path.dirname(os.path.dirname(__file__))

ARCH = "sm_90a"
# --gpu-arch wins over CUTE_DSL_ARCH and over the GPU that is present, for one compile only.
COMPILE_OPTIONS = f"--enable-tvm-ffi --gpu-arch {ARCH}"
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


class Source(NamedTuple):
    """A module's file: its checksum, what it imports that may be the package's, as (module, names), and whether it is
    a package's `__init__`."""

    checksum: str
    imports: tuple[tuple[str, tuple[str, ...]], ...]
    is_package: bool


# Imports for type checkers only, which never run, are cut out; what follows is a block of deeper indentation.
_UNRUN = re.compile(
    rb"^([ \t]*)if[ \t]+(?:typing\.)?TYPE_CHECKING[ \t]*:[^\n]*\n(?:(?:\1[ \t]+[^\n]*|[ \t]*)(?:\n|\Z))*", re.MULTILINE
)
_IMPORT = re.compile(
    rb"[ \t]*(?:from[ \t]+(\.+[\w.]*|%(package)s\b[\w.]*)[ \t]+import[ \t]*(\((?:[^)#]|\#[^\n]*)*|[^\n]*)"
    rb"|import[ \t]+([^\n]*\b%(package)s\b[^\n]*))" % {b"package": _PACKAGE.encode()}
)


def read_sources(module_name: str, known: dict[str, Source | None] | None = None) -> str:
    """A checksum of what the code of a kernel's module can depend on: its file, and every module of this package that
    is imported from there, directly or through others, at the head of a file or in a function.

    Imports are read from the text, nothing is imported. Of packages the `__init__` counts, except this package's own:
    it collects the public functions, so it would bring all host code in. It counts where a name is taken from it.
    What is imported under `if TYPE_CHECKING:` is left out, and importlib.import_module is not seen. A module outside
    the package counts if it is `module_name` itself.

    Args:
        module_name: importable name of the module that defines the kernel.
        known: files that have been read, by path; filled. Shared by several calls, a file is read once.
    """
    known = {} if known is None else known
    found = closure(module_name, known)
    text = "\n".join(f"{name} {checksum}" for name, checksum in sorted(found.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def closure(module_name: str, known: dict[str, Source | None]) -> dict[str, str]:
    """The modules that :func:`read_sources` covers, with the checksums of their files."""
    top = _PACKAGE

    def source_of(module: str) -> Source | None:
        """None if there is no such module."""
        stem = os.path.join(_folder, *module.split(".")[1:])
        found = _source(f"{stem}.py", module.rpartition(".")[0], known) if module != top else None
        return found or _source(os.path.join(stem, "__init__.py"), module, known)

    found: dict[str, str] = {}
    waiting: list[str] = []
    if module_name == top or module_name.startswith(f"{top}."):
        waiting.append(module_name)
    elif (path := _file_of(module_name)) is not None:
        source = _source(path, "", known)
        if source is not None:
            found[module_name] = source.checksum
            waiting += _imported(source, source_of)
    while waiting:
        module = waiting.pop()
        if module in found or (source := source_of(module)) is None:
            continue
        found[module] = source.checksum
        waiting += _imported(source, source_of)
        parent = module.rpartition(".")[0]
        if parent not in ("", top):
            waiting.append(parent)
    return found


def _imported(source: Source, source_of: Callable[[str], Source | None]) -> Iterator[str]:
    """Modules that the imports of a file may run, their parent packages aside."""
    for module, names in source.imports:
        if not names or module != _PACKAGE:
            yield module
        base = source_of(module)
        if base is not None and base.is_package:
            for name in names:
                # A name of a package is a module in it, or something that its __init__ defines or imports.
                yield f"{module}.{name}" if source_of(f"{module}.{name}") is not None else module


def _source(path: str, package: str, known: dict[str, Source | None]) -> Source | None:
    """The file at `path`, of a module in `package`; None if there is none."""
    if path not in known:
        try:
            with open(path, "rb") as file:
                content = file.read()
        except (FileNotFoundError, NotADirectoryError):
            known[path] = None
        else:
            is_package = os.path.basename(path) == "__init__.py"
            known[path] = Source(hashlib.sha256(content).hexdigest(), tuple(_imports(content, package)), is_package)
    return known[path]


def _imports(content: bytes, package: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(module, names taken from it; none for `import module`) of the imports in a text that may be this package's."""
    top = _PACKAGE
    if b"\\\n" in content:
        content = content.replace(b"\\\n", b" ")
    if b"TYPE_CHECKING" in content:
        content = _UNRUN.sub(b"", content)
    # The pattern is tried on the few lines that have the word: four times as fast as a search for it.
    lines = {content.rfind(b"\n", 0, word.start()) + 1 for word in re.finditer(b"import", content)}
    for statement in filter(None, (_IMPORT.match(content, line) for line in sorted(lines))):
        base, names, plain = statement.groups()
        if plain:
            for item in plain.split(b"#")[0].split(b","):
                words = item.decode().split()
                if words and words[0].split(".")[0] == top:
                    yield words[0], ()
                    if len(words) == 1:  # without `as` it binds the package itself
                        yield top, ()
            continue
        module = base.decode()
        level = len(module) - len(module.lstrip("."))
        if level:
            # Of a file outside the package `package` is "": what it imports relatively is not this package's.
            above = package.split(".")[: len(package.split(".")) - level + 1]
            module = ".".join(filter(None, (*above, module[level:])))
        if module == top or module.startswith(f"{top}."):
            listed = re.sub(rb"#[^\n]*", b"", names).lstrip(b"(").split(b",")
            yield module, tuple(item.split()[0].decode() for item in listed if item.strip())


def _file_of(module_name: str) -> str | None:
    module = sys.modules.get(module_name)
    spec = importlib.util.find_spec(module_name) if module is None else None
    return spec.origin if spec else getattr(module, "__file__", None)


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


def toolkit() -> str:
    """Which of the DSL's compilers makes the code, "cu12" or "cu13"; "unknown" if `runtime_library` is in doubt."""
    library = runtime_library()
    return pathlib.Path(library).parent.parent.name if library else "unknown"


@functools.cache
def environment() -> str:
    """What every entry depends on beside its own kernel, key and config."""
    settings = [f"{s}={os.environ[f'CUTE_DSL_{s}']}" for s in _DSL_SETTINGS if f"CUTE_DSL_{s}" in os.environ]
    return "\n".join(
        [
            f"options {COMPILE_OPTIONS}",
            f"dsl {version('nvidia-cutlass-dsl')} {version('nvidia-cutlass-dsl-libs-base')} {toolkit()}",
            f"tvm-ffi {version('apache-tvm-ffi')}",
            f"host {host_isa()}",
            f"e4m3 arguments {dlpack.exports_e4m3()}",
            *settings,
        ]
    )
