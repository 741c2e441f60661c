"""The processes of a tuning run: compiling ones, and the measuring one, which may hang or crash and is then replaced.

The measuring process owns the GPU: this one never initialises CUDA. It answers one request at a time; while it works it
sends a sign of life per burst of replays, and silence for `timeout_s` counts as a hang.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pathlib
import signal
import tempfile
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from ..compile import jit, warmup
from ..config import KernelConfig
from ..tuned.select import When
from .search import NO_TIME, CandidateError, Conditions, ShapeError, StartError
from .space import Variant

# The measuring process starts: it imports torch, initialises CUDA, fills the pool (a fifth of a second per 10 GB).
START_TIMEOUT_S = 240.0
# It opens a shape: a permutation of some 10 million pages, queries for every slot, float32 references.
OPEN_TIMEOUT_S = 120.0

# Kinds of reply of the measuring process. _LAST wraps a reply of another kind and adds that nothing more can run there.
_ALIVE, _DONE, _CANDIDATE, _SHAPE, _LAST = "alive", "done", "candidate", "shape", "last"


class Lost(Exception):
    """The measuring process is gone: "hung after 20 s", "exit -11"."""


def serve(make: Callable[[Callable[[], None]], Any], connection: Connection, log: str) -> None:
    """Main loop of the measuring process. `make` gets the sign of life to call and returns the object that answers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        device = make(lambda: connection.send((_ALIVE, None)))
    except StartError as error:
        connection.send((_SHAPE, str(error)))
        return
    except Exception as error:
        connection.send((_SHAPE, f"the measuring process: {type(error).__name__}: {error}"))
        return
    connection.send((_DONE, None))
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            method, arguments = connection.recv()
            try:
                reply = (_DONE, getattr(device, method)(*arguments))
            except CandidateError as error:
                reply = (_CANDIDATE, str(error))
            except ShapeError as error:
                reply = (_SHAPE, str(error))
            except Exception as error:
                reply = (_SHAPE if method == "open" else _CANDIDATE, f"{type(error).__name__}: {error}")
            # A process that has lost its CUDA context cannot even exit in order, so the parent ends it.
            connection.send(reply if device.is_usable() else (_LAST, reply))


class ChildMeasurer:
    """The search's Measurer, in a process of its own that is started again when it is lost.

    Args:
        make: picklable; called in the process, see `serve`. The object it returns has what a Measurer
            has, `facts`, and `is_usable`, which is False once nothing can run in the process any more.
        timeout_s: silence of a candidate after which it counts as hung.
    """

    def __init__(self, make: Callable[[Callable[[], None]], Any], timeout_s: float = 20.0):
        self._make, self._timeout_s = make, timeout_s
        self._process: Any = None
        self._connection: Connection | None = None
        self._opened: tuple[When, KernelConfig] | None = None
        descriptor, log = tempfile.mkstemp(prefix="mla_cute_tune_", suffix=".log")
        os.close(descriptor)
        self._log = pathlib.Path(log)

    def __enter__(self) -> ChildMeasurer:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._log.unlink(missing_ok=True)

    def facts(self) -> Any:
        """What the process says of its GPU. StartError when it cannot run here."""
        self._start()
        try:
            return self._ask("facts", (), START_TIMEOUT_S)
        except (CandidateError, ShapeError, Lost) as error:
            raise StartError(f"the GPU does not answer: {error}") from None

    def open(self, when: When, default: KernelConfig) -> None:
        self._opened = None
        self._open(when, default)
        self._opened = when, default

    def check(self, config: KernelConfig) -> None:
        self._ask_candidate("check", (config,))

    def samples(self, configs: Sequence[KernelConfig], rounds: int) -> list[list[float]]:
        return self._ask_candidate("samples", (list(configs), rounds))

    def conditions(self) -> Conditions | None:
        return self._ask_candidate("conditions", ())

    def chained(self, config: KernelConfig) -> float:
        return self._ask_candidate("chained", (config,))

    def host_us(self, config: KernelConfig) -> float:
        return self._ask_candidate("host_us", (config,))

    def _open(self, when: When, default: KernelConfig) -> None:
        self._start()
        try:
            self._ask("open", (when, default), OPEN_TIMEOUT_S)
        except Lost as error:
            raise ShapeError(f"the default configuration: {error}") from None

    def _ask_candidate(self, method: str, arguments: tuple[Any, ...]) -> Any:
        if self._process is None or not self._process.is_alive():
            assert self._opened is not None
            self._open(*self._opened)
        try:
            return self._ask(method, arguments, self._timeout_s)
        except Lost as error:
            raise CandidateError(str(error)) from None

    def _start(self) -> None:
        if self._process is not None and self._process.is_alive():
            return
        self._end()
        self._log.write_bytes(b"")
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(self._make, theirs, str(self._log)), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._receive(START_TIMEOUT_S)
        except (ShapeError, Lost) as error:
            raise StartError(str(error)) from None

    def _ask(self, method: str, arguments: tuple[Any, ...], timeout_s: float) -> Any:
        assert self._connection is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: said by what is received
            self._connection.send((method, arguments))
        return self._receive(timeout_s)

    def _receive(self, timeout_s: float) -> Any:
        assert self._connection is not None
        kind = _ALIVE
        try:
            while kind == _ALIVE:
                if not self._connection.poll(timeout_s):
                    self._end()
                    raise Lost(f"hung after {timeout_s:g} s")
                kind, value = self._connection.recv()
        except (EOFError, ConnectionResetError):
            raise Lost(self._farewell()) from None
        if kind == _LAST:
            self._end()
            kind, value = value
        if kind == _CANDIDATE:
            raise CandidateError(value)
        if kind == _SHAPE:
            raise ShapeError(value)
        return value

    def _farewell(self) -> str:
        """How the process ended, with the last line it printed."""
        self._process.join(10)
        code = self._process.exitcode
        lines = self._log.read_text(errors="replace").strip().splitlines()
        self._end()
        return f"exit {code}" + (f": {lines[-1][:200]}" if lines else "")

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            # A process whose kernel hangs ends when the driver has torn its context down.
            self._process.join(60)
            self._process = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def compile_variants(
    variants: Iterable[Variant],
    workers: int | None,
    step: Callable[[int, int], bool] = lambda done, total: True,
) -> dict[Variant, str]:
    """Compile what is not on disk, in parallel processes; returns why each missing variant is missing.

    `step` gets (done, total) after each; when it returns False the rest is left out.
    Raises StartError when the directory of compiled kernels cannot be written: processes could not share anything.
    """
    missing = [variant for variant in dict.fromkeys(variants) if not jit.is_cached(*variant)]
    left = dict.fromkeys(missing, NO_TIME)
    if not missing:
        return left
    if not jit.is_writable():
        raise StartError("compiled kernels cannot be kept: set MLA_CUTE_CACHE_DIR to a writable directory")
    compiling = warmup.compile_missing(missing, workers or warmup.default_workers(), warmup.say_on_stderr)
    with contextlib.closing(compiling):
        for done, (variant, outcome, _) in enumerate(compiling, start=1):
            if isinstance(outcome, Exception):
                left[variant] = f"does not compile: {str(outcome).strip().splitlines()[-1].strip()[:300]}"
            else:
                del left[variant]
            if not step(done, len(missing)):
                break
    return left
