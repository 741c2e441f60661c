"""Compiling many variants at once, in worker processes that hand their results over through the disk cache.

The workers are plain subprocesses and not multiprocessing's: those run the caller's main module again, so a server
script without an `if __name__ == "__main__"` guard could not call `warmup`.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from . import jit

if TYPE_CHECKING:
    from .tuned import Entry

Variant = tuple[Any, Any, Any]


class Warmed(NamedTuple):
    """One variant after `warmup`.

    Attributes:
        kernel: the kernel's name.
        key, config: as in the registry.
        seconds: what it took, waiting for another process's compile included.
        cached: it was on disk already.
    """

    kernel: str
    key: Any
    config: Any
    seconds: float
    cached: bool


Progress = Callable[[int, int, Warmed], None]


def _send(stream: IO[bytes], message: Any) -> None:
    content = pickle.dumps(message)
    stream.write(struct.pack("<Q", len(content)) + content)
    stream.flush()


def _receive(stream: IO[bytes]) -> bytes:
    """The next message, still pickled: unpickling a job imports the kernel, whose failure is the job's failure."""
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError
    content = stream.read(struct.unpack("<Q", head)[0])
    return content


def serve() -> None:
    """Main loop of a worker: jobs on standard input, results on standard output."""
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever the compiler prints must not mix with the results
    with contextlib.suppress(EOFError):
        while True:
            content = _receive(sys.stdin.buffer)
            try:
                _send(results, (True, jit.prepare(*pickle.loads(content))))
            except Exception:
                _send(results, (False, traceback.format_exc()))


class _Worker:
    def __init__(self) -> None:
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(p or os.getcwd() for p in sys.path)
        environment["CUDA_VISIBLE_DEVICES"] = ""  # compiling needs no GPU, so leave its memory alone
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from mla_cute import _warmup; _warmup.serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
        )

    def run(self, variant: Variant) -> tuple[float, bool]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            _send(self.process.stdin, variant)
            done, result = pickle.loads(_receive(self.process.stdout))
        except (EOFError, BrokenPipeError):
            code = self.process.wait()
            self.errors.seek(0)
            tail = self.errors.read()[-4000:].decode(errors="replace").strip()
            raise RuntimeError(f"the compiling process ended with exit status {code}\n{tail}") from None
        if not done:
            raise RuntimeError(result)
        return result

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()


def _describe(variant: Variant) -> str:
    kernel, key, config = variant
    return f"{kernel.name} {key!r} {config!r}"


def _compile_parallel(variants: Sequence[Variant], num_workers: int) -> Iterator[tuple[Variant, float | Exception]]:
    """Each variant with its seconds, or with the exception that it met, in the order they finish."""
    local = threading.local()
    workers: list[_Worker] = []

    def compile_one(variant: Variant) -> float:
        worker = getattr(local, "worker", None)
        if worker is None or worker.process.poll() is not None:
            worker = local.worker = _Worker()
            workers.append(worker)
        return worker.run(variant)[0]

    def close_all() -> None:
        for worker in workers:
            worker.close()

    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(num_workers))
        stack.callback(close_all)
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        futures = {pool.submit(compile_one, variant): variant for variant in variants}
        for future in as_completed(futures):
            error = future.exception()
            if error is not None and not isinstance(error, Exception):
                raise error
            yield futures[future], error if error is not None else future.result()


@contextlib.contextmanager
def _reporter(progress: bool | Progress | None, total: int) -> Iterator[Progress]:
    if callable(progress):
        yield progress
        return
    if progress is False or total == 0:
        yield lambda done, total, warmed: None
        return
    on_terminal = sys.stderr.isatty()
    if on_terminal:
        with contextlib.suppress(ImportError):
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("compiling kernels"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.description}"),
            )
            with Bar(*columns, console=Console(stderr=True)) as bar:
                task = bar.add_task("", total=total)
                yield lambda done, total, warmed: bar.update(task, completed=done, description=warmed.kernel)
            return

    def line(done: int, total: int, warmed: Warmed) -> None:
        how = "on disk" if warmed.cached else f"{warmed.seconds:.1f} s"
        print(f"[{done}/{total}] {warmed.kernel} {warmed.key!r} {warmed.config!r}: {how}", file=sys.stderr, flush=True)

    yield line


def selected(
    dtypes: Sequence[str], page_sizes: Sequence[int], ops: Sequence[str], kv_formats: Sequence[str]
) -> list[Variant]:
    """What the arguments of `jit.warmup` select: every kernel in the default configuration, and in those that the tuned
    file of torch's current GPU has for such calls.

    Raises ValueError on an unknown name, or a broken tuned file (naming it and the entry).
    """
    from .kernels import registry

    variants: list[Variant] = [*registry.variants(dtypes, page_sizes, ops=ops, kv_formats=kv_formats)]
    boxes = {registry.box_rows_of(page_size) for page_size in page_sizes}
    for entry in _tuned_entries():
        when = entry.when
        if when.op in ops and when.kv_format in kv_formats and registry.box_rows_of(when.page_size) in boxes:
            variants += _variants_of(entry, dtypes)
    return list(dict.fromkeys(variants))


def _tuned_entries() -> Sequence[Entry]:
    """Of the file that calls on torch's current GPU go by; none without one."""
    import torch

    from . import tuned

    if not torch.cuda.is_available() or tuned.is_off():
        return ()
    gpu = tuned.gpu_of(torch.device("cuda", torch.cuda.current_device()))
    found = None if gpu is None else tuned.located(gpu[0])
    if found is None:
        return ()
    file = tuned.load(found[1])
    return file.entries if (file.gpu["name"], file.gpu["sm_count"]) == gpu else ()


def _variants_of(entry: Entry, dtypes: Sequence[str]) -> Iterator[Variant]:
    """The main kernel in each dtype, and the planners. Batch-invariant plans take the default configuration."""
    from .kernels.registry import LENGTHS
    from .steps import planner_variant, step_variant

    when, config = entry.when, entry.config
    for dtype in dtypes:
        yield step_variant(when.op, when.kv_format, when.q_fp8, when.num_heads, when.page_size, dtype, config)
    for lengths in LENGTHS:
        yield planner_variant(when.op, lengths, config)


def warmup(
    variants: Sequence[Variant], *, num_workers: int | None = None, progress: bool | Progress | None = None
) -> list[Warmed]:
    """See `jit.warmup`."""
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"num_workers: expected at least 1, got {num_workers}")
    variants = list(dict.fromkeys(variants))
    finished: dict[Variant, Warmed] = {}
    failures: list[str] = []
    with _reporter(progress, len(variants)) as report:

        def finish(variant: Variant, seconds: float, cached: bool) -> None:
            kernel, key, config = variant
            finished[variant] = Warmed(kernel.name, key, config, seconds, cached)
            report(len(finished) + len(failures), len(variants), finished[variant])

        missing = []
        for variant in variants:
            start = time.perf_counter()
            if jit.is_cached(*variant):
                finish(variant, time.perf_counter() - start, True)
            else:
                missing.append(variant)

        results: Iterator[tuple[Variant, float | Exception]]
        if missing and jit.is_writable():
            if num_workers is None:
                # A worker needs about 1 GB; more than 16 at once has not been needed by any registry.
                num_workers = min(16, len(os.sched_getaffinity(0)))
            results = _compile_parallel(missing, min(num_workers, len(missing)))
        else:  # nowhere to hand results over: compile here, where they are needed
            results = (_compile_here(variant) for variant in missing)
        for variant, outcome in results:
            if isinstance(outcome, Exception):
                failures.append(f"{_describe(variant)}: {outcome}")
            else:
                finish(variant, outcome, False)

        if failures:
            raise RuntimeError(
                f"{len(failures)} of {len(variants)} kernels did not compile\n\n" + "\n\n".join(failures)
            )
        for variant in variants:
            jit.get(*variant)
    return [finished[variant] for variant in variants]


def _compile_here(variant: Variant) -> tuple[Variant, float | Exception]:
    start = time.perf_counter()
    try:
        jit.get(*variant)
    except Exception as error:
        return variant, error
    return variant, time.perf_counter() - start
