"""For whoever changes kernels: one variant's machine code, and which variants' code a change changed. Needs no GPU."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from .compile import fingerprint, jit, sass

Fingerprints = dict[str, dict[str, Any]]


class Code(NamedTuple):
    """One variant's code: resources as :func:`jit.compile_info` has them, opcodes with their counts, SASS."""

    name: str
    facts: dict[str, Any]
    opcodes: collections.Counter[str]
    sass: str


def names(patterns: Sequence[str] = ()) -> list[str]:
    """Names of the variants that match one of the shell patterns, or begin with it; all without a pattern.

    Raises ValueError when there is none.
    """
    found = fingerprint.matching(patterns)
    if not found:
        raise ValueError(f"variant: expected the name of a kernel variant or a pattern, got {' '.join(patterns)}")
    return found


def code(name: str) -> Code:
    """Compile a variant for sm_90a, or take it from the disk cache. Needs no GPU, and nvdisasm."""
    variant = fingerprint.variants()[name]
    text = "\n".join(sass.disassemble(cubin) for cubin in jit.cubins(*variant))
    return Code(name, jit.compile_info(*variant), sass.opcode_counts_of(text), text)


class Difference(NamedTuple):
    """A variant whose code or resources differ; `before` or `after` is None where only the other revision has it."""

    name: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None

    def __str__(self) -> str:
        if self.before is None or self.after is None:
            return f"{self.name}: only in {'this tree' if self.before is None else 'the other revision'}"
        facts = [
            f"{fact} {old} -> {self.after['facts'][fact]}"
            for fact, old in self.before["facts"].items()
            if old != self.after["facts"][fact]
        ]
        return f"{self.name}: {', '.join(['other code'] * (self.before['text'] != self.after['text']) + facts)}"


def differences(before: Fingerprints, after: Fingerprints) -> list[Difference]:
    """The variants that are not the same in both, in the order of their names."""
    return [
        Difference(name, before.get(name), after.get(name))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def same(revision: str, patterns: Sequence[str] = ()) -> tuple[int, list[Difference]]:
    """(variants compared, those whose `.text` or resources differ) of this checkout and another revision of it.

    Raises:
        ValueError: no variant matches.
        RuntimeError: git does not know the revision, or a variant does not compile there; with their messages.
    """
    names(patterns)
    root = pathlib.Path(__file__).resolve().parents[1]
    with _checkout(root, revision) as other:
        before, after = (_fingerprints(tree, patterns) for tree in (other, root))
    return len(before.keys() | after.keys()), differences(before, after)


@contextlib.contextmanager
def _checkout(root: pathlib.Path, revision: str) -> Iterator[pathlib.Path]:
    with tempfile.TemporaryDirectory() as folder:
        tree = pathlib.Path(folder) / "tree"
        _run(["git", "-C", str(root), "worktree", "add", "--quiet", "--detach", str(tree), revision])
        try:
            yield tree
        finally:
            _run(["git", "-C", str(root), "worktree", "remove", "--force", str(tree)])


def _fingerprints(tree: pathlib.Path, patterns: Sequence[str]) -> Fingerprints:
    path = os.pathsep.join([str(tree), os.environ.get("PYTHONPATH", "")])
    script = str(pathlib.Path(fingerprint.__file__).resolve())
    found: Fingerprints = json.loads(_run([sys.executable, script, *patterns], env={**os.environ, "PYTHONPATH": path}))
    return found


def _run(command: Sequence[str], env: dict[str, str] | None = None) -> str:
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command[:6])}: {run.stderr.strip()[-3000:]}")
    return run.stdout
