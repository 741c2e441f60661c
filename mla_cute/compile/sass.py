"""What a cubin says about its kernels: registers, stack, shared memory, threads, and instruction counts.

The resources are read from the ELF sections `.nv.info*` and `.nv.shared.*` and need no tool. Instruction counts need
`nvdisasm`, from a CUDA toolkit on PATH or from the package nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import collections
import functools
import importlib.metadata
import pathlib
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from . import elf

# Attributes of .nv.info, as cuobjdump -elf names them.
_EIATTR_MAX_THREADS, _EIATTR_REQNTID, _EIATTR_FRAME_SIZE, _EIATTR_CBANK_PARAM_SIZE, _EIATTR_REGCOUNT = (
    0x05,
    0x10,
    0x11,
    0x19,
    0x2F,
)
# sm_90 keeps the first KiB of a CTA's shared memory for itself: a kernel's own begins at address 0x400, and the size of
# its .nv.shared section counts from 0.
_RESERVED_SMEM_BYTES = 1024
_FORMAT_SIZED = 4  # the other formats keep their value in the two bytes after the attribute

#: Mnemonics :func:`instruction_counts` always reports, present or not.
COUNTED = ("HGMMA", "QGMMA", "HMMA", "UTMALDG", "LDGSTS", "LDSM", "STSM", "LDL", "STL", "DEPBAR", "USETMAXREG")


class KernelFacts(NamedTuple):
    """Resources of one kernel entry.

    Attributes:
        name: mangled kernel name.
        registers: registers per thread the compiler assigned (before setmaxnreg redistributes them).
        stack_bytes: local-memory frame per thread; spills live there, so 0 means no spill.
        static_smem_bytes: shared memory declared statically, in bytes per CTA; what the system reserves is left out.
        threads: threads per CTA the kernel was compiled for, None when it does not say.
        parameter_bytes: size of the kernel's parameters in bytes.
    """

    name: str
    registers: int
    stack_bytes: int
    static_smem_bytes: int
    threads: int | None
    parameter_bytes: int


def _attributes(image: bytes, section: elf.Section) -> Iterator[tuple[int, bytes]]:
    at, end = section.offset, section.offset + section.size
    while at + 4 <= end:
        kind, attribute, size = struct.unpack_from("<BBH", image, at)
        at += 4
        if kind == _FORMAT_SIZED:
            yield attribute, image[at : at + size]
            at += size
        else:
            yield attribute, struct.pack("<I", size)


def kernels(cubin: bytes) -> list[KernelFacts]:
    """Facts of every kernel entry in `cubin`, in the order of their sections.

    Raises:
        ValueError: `cubin` is not a CUDA ELF image.
    """
    if elf.header(cubin)[1] != elf.EM_CUDA:
        raise ValueError("not a CUDA ELF image")
    parts = elf.sections(cubin)
    by_name = {s.name: s for s in parts}
    table = next(s for s in parts if s.type == elf.SHT_SYMTAB)
    names = [s.name for s in elf.symbols(cubin, table, parts)]

    registers: dict[str, int] = {}
    stack: dict[str, int] = {}
    for attribute, value in _attributes(cubin, by_name[".nv.info"]):
        if attribute in (_EIATTR_REGCOUNT, _EIATTR_FRAME_SIZE):
            index, amount = struct.unpack("<II", value)
            (registers if attribute == _EIATTR_REGCOUNT else stack)[names[index]] = amount

    found = []
    for section in parts:
        if not section.name.startswith(".nv.info."):
            continue
        name = section.name.removeprefix(".nv.info.")
        threads, parameter_bytes = None, 0
        for attribute, value in _attributes(cubin, section):
            if attribute == _EIATTR_REQNTID or (attribute == _EIATTR_MAX_THREADS and threads is None):
                x, y, z = struct.unpack("<III", value)
                threads = x * y * z
            elif attribute == _EIATTR_CBANK_PARAM_SIZE:
                parameter_bytes = struct.unpack("<I", value)[0]
        shared = by_name.get(f".nv.shared.{name}")
        static = max(0, shared.size - _RESERVED_SMEM_BYTES) if shared else 0
        found.append(KernelFacts(name, registers[name], stack.get(name, 0), static, threads, parameter_bytes))
    return found


@functools.cache
def find_nvdisasm() -> str | None:
    """Path of `nvdisasm`: from PATH, else from the package nvidia-cuda-nvdisasm, else None."""
    if found := shutil.which("nvdisasm"):
        return found
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = (pathlib.Path(str(f.locate())) for f in files if f.name == "nvdisasm")
    return next((str(p) for p in paths if p.is_file()), None)


def disassemble(cubin: bytes) -> str:
    """SASS text of `cubin`.

    Raises:
        FileNotFoundError: there is no nvdisasm.
        RuntimeError: nvdisasm rejected the cubin (older than the compiler, usually); carries its message.
    """
    nvdisasm = find_nvdisasm()
    if nvdisasm is None:
        raise FileNotFoundError("nvdisasm not found: put a CUDA toolkit on PATH or install nvidia-cuda-nvdisasm")
    return _disassemble(nvdisasm, cubin)


# nvdisasm takes 0.5 s however small the cubin is, and whoever wants a variant's opcodes asks for its facts as well.
@functools.lru_cache(maxsize=4)
def _disassemble(nvdisasm: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([nvdisasm, "-c", file.name], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise RuntimeError(f"nvdisasm exited with {run.returncode}: {run.stderr.strip()}")
    return run.stdout


_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)", re.MULTILINE)


def opcode_counts(cubin: bytes) -> collections.Counter[str]:
    """How often each opcode with its modifiers (`HGMMA.64x64x16.F32.BF16`) occurs; raises as :func:`disassemble`."""
    return opcode_counts_of(disassemble(cubin))


def opcode_counts_of(sass: str) -> collections.Counter[str]:
    """:func:`opcode_counts` of what :func:`disassemble` returned."""
    return collections.Counter(_INSTRUCTION.findall(sass))


def instruction_counts_of(opcodes: Mapping[str, int]) -> dict[str, int]:
    """:func:`opcode_counts` summed up by mnemonic: one count per name in :data:`COUNTED`, and `total`.

    A mnemonic counts with all its modifiers. DEPBAR counts `WARPGROUP.DEPBAR` (wgmma waits) and `DEPBAR` (cp.async
    and scoreboard waits).
    """
    counts = dict.fromkeys(COUNTED, 0)
    for opcode, times in opcodes.items():
        mnemonic = "DEPBAR" if opcode.startswith("WARPGROUP.DEPBAR") else opcode.partition(".")[0]
        if mnemonic in counts:
            counts[mnemonic] += times
    counts["total"] = sum(opcodes.values())
    return counts


def instruction_counts(cubin: bytes) -> dict[str, int]:
    """:func:`instruction_counts_of` one cubin; raises as :func:`disassemble`."""
    return instruction_counts_of(opcode_counts(cubin))
