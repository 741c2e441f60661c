"""Little-endian ELF64: sections and symbols, and loading a relocatable object into this process.

A compiled kernel is exported as one x86-64 ELF object: host code that checks the arguments and launches, with the
cubin in its read-only data. The DSL's own loader needs `import cutlass` (0.4 s warm, 0.9 s cold); :func:`load` needs
only the libraries the object calls into (0.5 ms). It knows the relocations LLVM's large code model emits and raises
:class:`UnsupportedObject` for everything else (another host architecture, thread-local data, a new relocation), so
that the caller can fall back.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import struct
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

ET_REL = 1
EM_X86_64 = 62
EM_CUDA = 190

SHT_SYMTAB, SHT_RELA, SHT_NOBITS, SHT_INIT_ARRAY, SHT_FINI_ARRAY, SHT_PREINIT_ARRAY = 2, 4, 8, 14, 15, 16
SHF_WRITE, SHF_ALLOC, SHF_EXECINSTR, SHF_TLS = 0x1, 0x2, 0x4, 0x400
SHN_UNDEF, SHN_LORESERVE = 0, 0xFF00
SHN_ABS = 0xFFF1

R_X86_64_64, R_X86_64_PC64, R_X86_64_GOTOFF64, R_X86_64_GOT64, R_X86_64_GOTPC64, R_X86_64_PLTOFF64 = (
    1,
    24,
    25,
    27,
    29,
    31,
)


class UnsupportedObject(Exception):
    """The bytes are not an object that :func:`load` can place; the message says what was met."""


class Section(NamedTuple):
    """One section header with its name resolved."""

    name: str
    type: int
    flags: int
    offset: int
    size: int
    link: int
    info: int
    align: int


class Symbol(NamedTuple):
    """One symbol table entry with its name resolved; `section` is an index, or a reserved SHN_* value."""

    name: str
    section: int
    value: int
    size: int


def _string(image: bytes, table: Section, at: int) -> str:
    start = table.offset + at
    return image[start : image.index(b"\0", start)].decode()


def header(image: bytes) -> tuple[int, int]:
    """(e_type, e_machine) of an ELF64 little-endian image; ValueError if it is not one."""
    if image[:6] != b"\x7fELF\x02\x01" or len(image) < 64:
        raise ValueError("not a little-endian ELF64 image")
    return struct.unpack_from("<HH", image, 16)


def sections(image: bytes) -> list[Section]:
    """All section headers, in order. ValueError when the image is not ELF64 or is cut off."""
    header(image)
    table = struct.unpack_from("<Q", image, 0x28)[0]
    entry_size, count, names_index = struct.unpack_from("<HHH", image, 0x3A)
    if table + entry_size * count > len(image):
        raise ValueError("ELF image is cut off before the end of its section table")
    # sh_name, sh_type, sh_flags, sh_addr, sh_offset, sh_size, sh_link, sh_info, sh_addralign
    raw = [struct.unpack_from("<IIQQQQIIQ", image, table + i * entry_size) for i in range(count)]
    names = Section("", raw[names_index][1], 0, raw[names_index][4], raw[names_index][5], 0, 0, 0)
    return [Section(_string(image, names, r[0]), r[1], r[2], r[4], r[5], r[6], r[7], max(r[8], 1)) for r in raw]


def symbols(image: bytes, table: Section, all_sections: Sequence[Section]) -> list[Symbol]:
    """Entries of the symbol table section `table`."""
    names = all_sections[table.link]
    found = []
    for at in range(table.offset, table.offset + table.size, 24):
        name, _info, _other, section, value, size = struct.unpack_from("<IBBHQQ", image, at)
        found.append(Symbol(_string(image, names, name), section, value, size))
    return found


def embedded_cubins(image: bytes) -> Iterator[bytes]:
    """The CUDA ELF images contained in `image`, in order of position (an exported object usually has one)."""
    at = image.find(b"\x7fELF\x02\x01", 1)
    while at != -1:
        if struct.unpack_from("<H", image, at + 18)[0] == EM_CUDA:
            program, table = struct.unpack_from("<QQ", image, at + 0x20)
            program_size, programs, section_size, count = struct.unpack_from("<HHHH", image, at + 0x36)
            end = max(table + section_size * count, program + program_size * programs)
            cubin = image[at : at + end]
            yield cubin
            at += len(cubin) - 1
        at = image.find(b"\x7fELF\x02\x01", at + 1)


def _protect(address: int, size: int, protection: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if libc.mprotect(address, size, protection) != 0:
        raise UnsupportedObject(f"mprotect failed with errno {ctypes.get_errno()}")


def _resolve(name: str, libraries: Sequence[ctypes.CDLL]) -> int:
    for library in libraries:
        try:
            address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
        except AttributeError:
            continue
        if address:
            return address
    raise UnsupportedObject(f"undefined symbol {name}")


def load(image: bytes, symbol: str, libraries: Sequence[ctypes.CDLL]) -> int:
    """Place the relocatable object `image` in memory and return the address of its global `symbol`.

    Undefined symbols are looked up in `libraries`, then in what the process exports globally. Code pages end up
    read-execute, constants read-only. Destructors (.fini_array) are not run, so the CUDA library stays loaded until
    the process ends; unwind tables are not registered, as no exception crosses a TVM-FFI function.

    Raises:
        UnsupportedObject: see the module docstring; nothing stays half-loaded that anyone could call.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise UnsupportedObject(f"host {sys.platform} {platform.machine()}")
    try:
        return _load(image, symbol, [*libraries, ctypes.CDLL(None)])
    except (ValueError, struct.error, IndexError) as error:
        raise UnsupportedObject(f"malformed object: {error}") from error


def _load(image: bytes, symbol: str, libraries: Sequence[ctypes.CDLL]) -> int:
    if header(image) != (ET_REL, EM_X86_64):
        raise UnsupportedObject(f"ELF type and machine {header(image)}")
    parts = sections(image)
    # .eh_frame is dropped, and with it the relocations against it.
    placed = {
        i: s
        for i, s in enumerate(parts)
        if s.flags & SHF_ALLOC and s.size and s.name != ".eh_frame" and s.type != SHT_FINI_ARRAY
    }
    for s in placed.values():
        if s.flags & SHF_TLS or s.type in (SHT_INIT_ARRAY, SHT_PREINIT_ARRAY):
            raise UnsupportedObject(f"section {s.name}")
    tables = [s for s in parts if s.type == SHT_SYMTAB]
    if len(tables) != 1:
        raise UnsupportedObject(f"{len(tables)} symbol tables")
    entries = symbols(image, tables[0], parts)

    page = mmap.PAGESIZE
    start: dict[int, int] = {}
    cursor = 0
    code = [i for i, s in placed.items() if s.flags & SHF_EXECINSTR]
    data = [i for i, s in placed.items() if s.flags & SHF_WRITE and not s.flags & SHF_EXECINSTR]
    constant = [i for i in placed if i not in code and i not in data]
    bounds = []
    for group in (code, constant, data):
        for i in group:
            cursor = -(-cursor // parts[i].align) * parts[i].align
            start[i] = cursor
            cursor += parts[i].size
        if group is constant:
            cursor = -(-cursor // 8) * 8
            got = cursor  # one 8-byte slot per symbol: simpler than counting the used ones, and small
            cursor += 8 * len(entries)
        cursor = -(-cursor // page) * page
        bounds.append(cursor)

    memory = mmap.mmap(-1, max(cursor, page))
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for i, s in placed.items():
        if s.type != SHT_NOBITS:
            if s.offset + s.size > len(image):
                raise UnsupportedObject(f"section {s.name} is cut off")
            memory[start[i] : start[i] + s.size] = image[s.offset : s.offset + s.size]

    addresses: dict[int, int] = {}

    def address_of(index: int) -> int:
        if index not in addresses:
            entry = entries[index]
            if entry.name == "_GLOBAL_OFFSET_TABLE_":
                addresses[index] = base + got
            elif entry.section == SHN_UNDEF:
                addresses[index] = _resolve(entry.name, libraries)
            elif entry.section == SHN_ABS:
                addresses[index] = entry.value
            elif entry.section >= SHN_LORESERVE or entry.section not in start:
                raise UnsupportedObject(f"symbol {entry.name or index} in section {entry.section}")
            else:
                addresses[index] = base + start[entry.section] + entry.value
        return addresses[index]

    for s in parts:
        if s.type != SHT_RELA or s.info not in start:
            continue
        for at in range(s.offset, s.offset + s.size, 24):
            offset, info, addend = struct.unpack_from("<QQq", image, at)
            kind, target = info & 0xFFFFFFFF, info >> 32
            where = start[s.info] + offset
            if kind == R_X86_64_64:
                value = address_of(target) + addend
            elif kind == R_X86_64_PC64:
                value = address_of(target) + addend - (base + where)
            elif kind == R_X86_64_GOTPC64:
                value = base + got + addend - (base + where)
            elif kind in (R_X86_64_GOTOFF64, R_X86_64_PLTOFF64):
                value = address_of(target) + addend - (base + got)
            elif kind == R_X86_64_GOT64:
                struct.pack_into("<Q", memory, got + 8 * target, address_of(target))
                value = 8 * target + addend
            else:
                raise UnsupportedObject(f"relocation type {kind} in {s.name}")
            struct.pack_into("<Q", memory, where, value & 0xFFFFFFFFFFFFFFFF)

    exported = [i for i, e in enumerate(entries) if e.name == symbol and e.section in code]
    if not exported:
        raise UnsupportedObject(f"no function {symbol}")
    entry_point = address_of(exported[0])
    code_end, constant_end, _ = bounds
    if code_end:
        _protect(base, code_end, mmap.PROT_READ | mmap.PROT_EXEC)
    if constant_end > code_end:
        _protect(base + code_end, constant_end - code_end, mmap.PROT_READ)
    # One reference too many, on purpose: without it the interpreter unmaps the code while it shuts down, and function
    # pointers into it have the life of the process.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(memory))
    return entry_point
