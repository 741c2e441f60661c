"""One process at a time compiles many kernels: on a machine, of a user, whatever their cache directories.

A server's ranks warm up at the same moment, each with a compiler per core. Ten of them on 16 cores had not one kernel
after 100 s; in turns, the first compiles on all cores and the others find its kernels on disk.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator

log = logging.getLogger("mla_cute.jit")

# A compile takes 10 s, and with every core busy some times that. A holder that has finished none for so long is stuck.
_STUCK_S = 600.0
_POLL_S = 0.1


def lock_path() -> pathlib.Path:
    """Raises OSError where no temporary directory can be written."""
    return pathlib.Path(tempfile.gettempdir()) / f"mla_cute-compiling-{os.getuid()}.lock"


@contextlib.contextmanager
def turn(on_wait: Callable[[], None], is_needed: Callable[[], bool]) -> Iterator[Callable[[], None]]:
    """Holds the machine's lock; yields what is to be called after every compile, so that waiters know it goes on.

    The operating system frees the lock of a process that dies. A holder that finishes no kernel in `_STUCK_S` is passed
    by, without the lock, as is a lock that cannot be opened; both are logged.

    Args:
        on_wait: called once before waiting for another process.
        is_needed: called whenever the holder has finished a kernel; when it returns False, there is nothing left to
            wait for and the context begins without the lock.
    """
    import filelock

    try:
        lock = filelock.FileLock(str(lock_path()))
        beat = lock_path().with_suffix(".beat")
        seen = _stamp(beat)
        held = _acquire(lock)
        if not held:
            on_wait()
            held = _wait(lock, beat, seen, is_needed)
    except (OSError, NotImplementedError) as error:
        log.warning("compiling without waiting for other processes: %s", error)
        yield lambda: None
        return
    if not held:
        yield lambda: None
        return

    def alive() -> None:
        with contextlib.suppress(OSError):
            beat.touch()

    try:
        alive()
        yield alive
    finally:
        lock.release()


def _wait(lock: object, beat: pathlib.Path, seen: int, is_needed: Callable[[], bool]) -> bool:
    """Whether the lock is held now. `seen` is the stamp of the last kernel that the caller knows of."""
    since = time.monotonic()
    while not _acquire(lock):
        time.sleep(_POLL_S)
        if (stamp := _stamp(beat)) != seen:
            seen, since = stamp, time.monotonic()
            if not is_needed():
                return False
        elif time.monotonic() - since > _STUCK_S:
            log.warning(
                "the process that holds %s has finished no kernel for %.0f s, compiling beside it",
                lock_path(),
                _STUCK_S,
            )
            return False
    return True


def _acquire(lock: object) -> bool:
    import filelock

    assert isinstance(lock, filelock.BaseFileLock)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return False
    return True


def _stamp(path: pathlib.Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
