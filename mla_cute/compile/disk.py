"""The directory of compiled kernels as files: what lies there, whether it can be written, and emptying it.

An entry is the files of one stem, KERNEL-DIGEST: object, sidecar, lock, and temporary files while they are written. All
else in the directory, as tuned files, is somebody else's and is left alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import tempfile
from dataclasses import dataclass, field
from typing import Any

#: What follows from a directory that cannot be written, and what helps.
ADVICE = "Every process compiles them anew (up to 15 s of a core each); set MLA_CUTE_CACHE_DIR to a writable directory."

_FILE = re.compile(r"^\.?(?P<stem>[\w.]+-[0-9a-f]{24})\.(?P<kind>o|json|lock|[0-9a-f]+\.tmp)$")


@dataclass(frozen=True)
class Kept:
    """An entry. `sidecar` is None where there is none that can be read: it is damaged, or being written."""

    stem: str
    sidecar: dict[str, Any] | None
    size_bytes: int

    @property
    def kernel(self) -> str:
        return self.stem.rpartition("-")[0]


@dataclass
class Removed:
    """What `remove` did: entries, all their files, bytes; `busy` are the stems that another process holds locked."""

    entries: int = 0
    files: int = 0
    size_bytes: int = 0
    busy: list[str] = field(default_factory=list)


def kept(directory: pathlib.Path) -> list[Kept]:
    """The entries, by name; none where there is no directory. Raises OSError where it cannot be read."""
    found = []
    for stem, files in sorted(_files(directory).items()):
        if set(files) == {"lock"}:  # its kernel was never written, or is being compiled
            continue
        sidecar = None
        with contextlib.suppress(KeyError, OSError, ValueError):
            sidecar = json.loads(files["json"].read_bytes())
        sizes = sum(map(_size, files.values()))
        found.append(Kept(stem, sidecar if isinstance(sidecar, dict) else None, sizes))
    return found


def remove(directory: pathlib.Path) -> Removed:
    """Delete every entry that no process holds the lock of. Raises OSError where the directory does not allow it.

    A process that reads an entry meanwhile finds all of it or compiles it again. One that waits for its lock gets a
    lock that has no name any more: at worst two processes compile one kernel.
    """
    import filelock

    removed = Removed()
    for stem, files in sorted(_files(directory).items()):
        lock = filelock.FileLock(str(directory / f"{stem}.lock"), timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            removed.busy.append(stem)
            continue
        try:
            removed.entries += set(files) != {"lock"}
            # The sidecar vouches for the object, so it goes first; the lock protects both, so it goes last.
            for kind in sorted(files, key=lambda kind: (kind == "lock", kind != "json")):
                removed.files += 1
                removed.size_bytes += _size(files[kind])
                files[kind].unlink(missing_ok=True)
            pathlib.Path(lock.lock_file).unlink(missing_ok=True)  # it may not have been among the files
        finally:
            lock.release()
    return removed


def why_not_writable(directory: pathlib.Path) -> str | None:
    """Why entries cannot be added to `directory`, which need not exist; None where they can. Leaves nothing there."""
    nearest = directory
    try:
        while not nearest.exists():
            nearest = nearest.parent
        if not nearest.is_dir():
            return f"{nearest} is not a directory"
        if nearest == directory:
            with tempfile.TemporaryFile(dir=directory) as file:
                file.write(b"x")
        elif not os.access(nearest, os.W_OK | os.X_OK):
            return f"{nearest} is not writable, so {directory.relative_to(nearest)} cannot be made in it"
    except OSError as error:
        return error.strerror or str(error)
    return None


def _files(directory: pathlib.Path) -> dict[str, dict[str, pathlib.Path]]:
    """By stem and kind."""
    found: dict[str, dict[str, pathlib.Path]] = {}
    if directory.exists():
        for path in directory.iterdir():
            if (match := _FILE.match(path.name)) and not path.is_dir():
                found.setdefault(match["stem"], {})[match["kind"]] = path
    return found


def _size(path: pathlib.Path) -> int:
    """Bytes of a file; 0 where it was removed meanwhile."""
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0
