"""MLA_CUTE_LOG_SHAPES=file: which shapes a server saw, for the tuner.

One JSON line, {"when": {...}, "count": n}, when a process first sees a shape (n = 1), and one at its exit with how
often it came after that: the counts of a shape's lines add up. A killed process leaves the first lines alone. Counted
are plans, and calls without a plan, on GPUs; a plan's updates are not. Any number of processes may write to one file.
The variable is read when mla_cute is imported.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import pathlib
from collections import Counter

from .file import When, values_of, when_of

log = logging.getLogger("mla_cute")

# The fields of a `When`, in its order.
Facts = tuple[str, str, bool, int, int, int, int, "int | None"]


class ShapeLog:
    """Counts shapes and appends them to a file. What cannot be written costs one warning and stays out."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = path
        self._unwritten: dict[Facts, int] = {}
        self._works = True
        atexit.register(self.flush)
        # A forked process counts for itself.
        os.register_at_fork(after_in_child=self._unwritten.clear)

    def saw(self, facts: Facts) -> None:
        """One plan, or one call without a plan."""
        try:
            self._unwritten[facts] += 1
        except KeyError:
            self._unwritten[facts] = 0
            self._append(facts, 1)

    def flush(self) -> None:
        """Append the counts that are not in the file yet."""
        for facts, count in list(self._unwritten.items()):
            if count:
                self._append(facts, count)
                self._unwritten[facts] -= count

    def _append(self, facts: Facts, count: int) -> None:
        if not self._works:
            return
        line = (json.dumps({"when": values_of(When(*facts)), "count": count}) + "\n").encode()
        try:
            # One write under O_APPEND: lines of several processes do not mix.
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                if os.write(descriptor, line) != len(line):
                    raise OSError(f"{self.path}: a line was cut short")
            finally:
                os.close(descriptor)
        except OSError as error:
            self._works = False
            log.warning("MLA_CUTE_LOG_SHAPES: shapes are not recorded: %s", error)


def read_shapes(path: str | os.PathLike[str]) -> dict[When, int]:
    """How often each shape was seen, over all processes that wrote to the file, in the order of their first lines.

    Raises ValueError that names file and line number for a line that is none of the recorder's, OSError for a file
    that cannot be read.
    """
    counts: Counter[When] = Counter()
    for number, line in enumerate(pathlib.Path(path).read_bytes().splitlines(), start=1):
        try:
            values = json.loads(line)
            if not isinstance(values, dict) or values.keys() != {"when", "count"}:
                raise ValueError("expected an object of when and count")
            count = values["count"]
            if type(count) is not int or count < 1:
                raise ValueError(f"count: expected an int >= 1, got {count!r}")
            counts[when_of(values["when"])] += count
        except ValueError as error:
            raise ValueError(f"{path} line {number}: {error}") from None
    return dict(counts)


def _from_environment() -> ShapeLog | None:
    path = os.environ.get("MLA_CUTE_LOG_SHAPES")
    return ShapeLog(path) if path else None


recorder = _from_environment()
