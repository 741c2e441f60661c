"""Compiling many variants at once, in worker processes that hand their results over through the disk cache.

The workers are plain subprocesses and not multiprocessing's: those run the caller's main module again, so a server
script without an `if __name__ == "__main__"` guard could not call `warmup`.

A process that has not initialised CUDA stays so: what it forks later can use the GPU. Therefore kernels are loaded only
where CUDA is initialised (`jit` says why), and a child tells which GPUs there are.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import IO, Any, NamedTuple

import torch

from .. import gpu as gpu_facts
from ..dims import HeadDims
from ..expect import expect_int
from ..kernels import registry
from ..kernels.registry import planner_variant, step_variant
from ..tuned import select
from ..tuned.file import Entry
from . import jit, turn

log = logging.getLogger("mla_cute.jit")

Variant = tuple[Any, Any, Any]
# The seconds, or the exception that it met, and whether another process compiled it.
Result = tuple[Variant, float | Exception, bool]

# What a server calls: mla_paged_decode and mla_paged_prefill, mla_sparse, append_to_cache, merge_states.
OPS = (*registry.OPS, "sparse", "append", "merge_states")
_DEFAULT_OPS = tuple(op for op in OPS if op != "sparse")


class Warmed(NamedTuple):
    """One variant after `warmup`.

    Attributes:
        kernel: the kernel's name.
        key, config: as in the registry.
        seconds: what it took, waiting for another process's compile included.
        cached: it was on disk already, or another process put it there while this one waited.
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
            [sys.executable, "-c", "from mla_cute.compile import warmup; warmup.serve()"],
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


def _compile_parallel(variants: Sequence[Variant], num_workers: int) -> Generator[tuple[Variant, float | Exception]]:
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


def default_workers() -> int:
    """A worker needs about 1 GB; more than 16 at once has not been needed by any registry."""
    return min(16, len(os.sched_getaffinity(0)))


def compile_missing(missing: Sequence[Variant], num_workers: int, say: Callable[[str], None]) -> Generator[Result]:
    """The results of `missing`, as they come.

    Waits until no other process of this user compiles on this machine, before it starts a worker. `say` is told so.
    """
    start = time.perf_counter()
    left = list(missing)

    def is_needed() -> bool:
        left[:] = [variant for variant in left if not jit.is_cached(*variant)]
        return bool(left)

    def on_wait() -> None:
        say(f"another process compiles kernels ({turn.lock_path()} is locked), waiting for it")

    with turn.turn(on_wait, is_needed) as alive:
        is_needed()
        waited = time.perf_counter() - start
        compiling = set(left)
        yield from ((variant, waited, True) for variant in missing if variant not in compiling)
        if left:
            with contextlib.closing(_compile_parallel(left, min(num_workers, len(left)))) as results:
                for variant, outcome in results:
                    alive()
                    yield variant, outcome, False


class _Reporter(NamedTuple):
    """Where progress goes: each finished variant, and remarks in between."""

    report: Progress
    say: Callable[[str], None]


def say_on_stderr(text: str) -> None:
    print(f"mla_cute: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _reporter(progress: bool | Progress | None, total: int) -> Iterator[_Reporter]:
    if callable(progress):
        yield _Reporter(progress, log.info)
        return
    if progress is False or total == 0:
        yield _Reporter(lambda done, total, warmed: None, log.info)
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
                yield _Reporter(
                    lambda done, total, warmed: bar.update(task, completed=done, description=warmed.kernel),
                    lambda text: bar.console.print(f"mla_cute: {text}", markup=False, highlight=False),
                )
            return

    def line(done: int, total: int, warmed: Warmed) -> None:
        how = "on disk" if warmed.cached else f"{warmed.seconds:.1f} s"
        print(f"[{done}/{total}] {warmed.kernel} {warmed.key!r} {warmed.config!r}: {how}", file=sys.stderr, flush=True)

    yield _Reporter(line, say_on_stderr)


def selected(
    dtypes: Iterable[str | torch.dtype],
    page_sizes: Iterable[int],
    ops: Iterable[str],
    kv_formats: Iterable[str],
    head_dims: Iterable[tuple[int, int]] = (HeadDims(),),
) -> list[Variant]:
    """What the arguments of `warmup` select: every kernel in the default configuration, and in those that the tuned
    file of the GPU has for such calls.

    Raises TypeError or ValueError on a wrong argument, ValueError on a broken tuned file (naming it and the entry).
    """
    if not isinstance(dtypes, str) and isinstance(dtypes, Iterable):
        dtypes = [str(x).removeprefix("torch.") if isinstance(x, torch.dtype) else x for x in dtypes]
    dtypes = registry.known_names("dtypes", dtypes, registry.DTYPES)  # type: ignore[arg-type]
    page_sizes = registry.known_page_sizes(page_sizes)
    ops = registry.known_names("ops", ops, OPS)
    kv_formats = registry.known_names("kv_formats", kv_formats, ("", *registry.KV_FORMATS))
    head_dims = registry.known_head_dims(head_dims)
    attention = [op for op in ops if op in registry.OPS]
    variants: list[Variant] = [*registry.variants(dtypes, page_sizes, None, attention, kv_formats, head_dims)]
    if "prefill" in ops:
        variants += registry.conversion_variants(dtypes, page_sizes, kv_formats, head_dims=head_dims)
    if "sparse" in ops:
        variants += registry.sparse_variants(dtypes, kv_formats, head_dims=head_dims)
    if "append" in ops:
        variants += registry.append_variants(dtypes, kv_formats, head_dims)
    if "merge_states" in ops and dtypes:
        variants += registry.merge_states_variants((*dtypes, "float32"))
    boxes = {registry.box_rows_of(page_size) for page_size in page_sizes}
    for entry in _tuned_entries() if attention or "sparse" in ops else ():
        when = entry.when
        if when.kv_format not in kv_formats:
            continue
        box = registry.box_rows_of(when.page_size)
        if when.op in attention and box in boxes:
            variants += _variants_of(entry, when.op, dtypes, head_dims)
        # Where there is no entry of sparse, one of decode that gathers serves it.
        if "sparse" in ops and when.decodes and box == 0:
            variants += _variants_of(entry, "sparse", dtypes, head_dims)
    return list(dict.fromkeys(variants))


def _tuned_entries() -> list[Entry]:
    """Of the files that calls on this process's GPUs go by; none without a GPU."""
    if select.is_off():
        return []
    entries: list[Entry] = []
    for gpu in dict.fromkeys(_gpus()):
        found = select.located(gpu[0])
        if found is not None:
            file = select.load(found[1])
            if (file.gpu["name"], file.gpu["sm_count"]) == gpu:
                entries += file.entries
    return entries


def _gpus() -> list[tuple[str, int]]:
    """Name and SMs of torch's current GPU; where CUDA is not initialised, of all that this process could use."""
    if torch.version.cuda is None:
        return []
    if not torch.cuda.is_initialized():
        return _ask_for_gpus()
    gpu = select.gpu_of(torch.device("cuda", torch.cuda.current_device()))
    return [] if gpu is None else [(gpu[0], gpu[1].sm_count)]


def _ask_for_gpus() -> list[tuple[str, int]]:
    try:
        return gpu_facts.visible()
    except RuntimeError as error:
        log.warning("no kernels of tuned configurations are compiled, the GPU is not known: %s", error)
        return []


def _variants_of(entry: Entry, op: str, dtypes: Sequence[str], head_dims: Sequence[HeadDims]) -> Iterator[Variant]:
    """The main kernel in each dtype, and the planners. Batch-invariant plans take the default configuration."""
    when, config = entry.when, entry.config
    for dims, dtype in itertools.product(head_dims, dtypes):
        if registry.has_format(dims, when.kv_format):
            facts = (op, when.kv_format, when.q_fp8, when.num_heads, when.page_size, dtype, config, dims)
            yield step_variant(*facts)
            if registry.has_few_rows(op, when.num_heads, when.q_len):
                yield step_variant(*facts, few_rows=True)
            if registry.converts(*facts[:4], when.q_len, config, dtype):
                yield from registry.converted_variants(when.kv_format, when.q_fp8, when.page_size, config, dims)
    for lengths in ("seq_lens",) if op == "sparse" else registry.LENGTHS:
        yield planner_variant(op, lengths, config)


def warmup(
    dtypes: Iterable[str | torch.dtype] = ("bfloat16",),
    page_sizes: Iterable[int] = (1, 64),
    *,
    ops: Iterable[str] = _DEFAULT_OPS,
    kv_formats: Iterable[str] = ("",),
    head_dims: Iterable[tuple[int, int]] = (HeadDims(),),
    variants: Iterable[Variant] | None = None,
    num_workers: int | None = None,
    progress: bool | Progress | None = None,
) -> list[Warmed]:
    """Compile the kernels a server will need, in parallel, into the disk cache: in the default configuration, and in
    those that the tuned file of the GPU holds for such calls. A server's own calls then compile nothing.

    In a process where torch has not initialised CUDA, nothing here does, so the process can fork workers that use the
    GPU; then kernels stay on disk, the first call of each loads it (1 ms), and tuned files of all visible GPUs count.
    Where CUDA is initialised, they are loaded too, and the file of torch's current GPU counts. Exception: where the
    cache directory cannot be written, kernels are compiled in this process and kept in its memory, and CUDA may be
    initialised; call it after forking then.

    Processes may warm up at the same time, as the ranks of a server do: those of one user on one machine compile in
    turns, and who comes later takes from disk what is there.

    Args:
        dtypes: 16-bit types of queries, outputs and new tokens: `"bfloat16"`, `"float16"`, or torch's dtypes.
        page_sizes: tokens per page; sizes that share a kernel are compiled once.
        ops: the calls a server makes, `"decode"`, `"prefill"`, `"sparse"` (`mla_sparse`), `"append"`
            (`append_to_cache`), `"merge_states"` (in the given dtypes and float32); by default all but `"sparse"`.
        kv_formats: its caches: `""` for 16 bits, `"tensor"`, `"token"`, `"group"` for FP8 (each for 16-bit and for e4m3
            queries).
        head_dims: channels (ckv, kpe) of its latent caches: `(512, 64)`, `(512, 32)`, `(512, 0)`, `(256, 64)`,
            `(256, 32)`, `(256, 0)`; formats "token" and "group" have the first alone.
        variants: (kernel, key, config) triples to compile instead of what the arguments above select.
        num_workers: compiling processes at a time, default one per CPU core that this process may use, at most 16.
        progress: None or True shows a bar on a terminal (with rich installed) and otherwise one line per kernel on
            standard error, and says there when it waits for another process; False shows nothing; a callable gets
            (done, total, Warmed) per kernel.

    Returns:
        One :class:`Warmed` per variant: kernel, key, config, seconds, and whether it was on disk already.

    Raises:
        TypeError, ValueError: a wrong argument, an unknown name, or a broken tuned file.
        RuntimeError: kernels that did not compile, each with its name, key, config and the compiler's message. The
            others are compiled all the same.
    """
    if num_workers is not None:
        expect_int("num_workers", num_workers, 1)
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise TypeError(f"progress: expected True, False, None or a callable, got {progress!r:.80}")
    found = selected(dtypes, page_sizes, ops, kv_formats, head_dims) if variants is None else _expect_variants(variants)
    return _warm(found, num_workers or default_workers(), progress)


def _expect_variants(variants: object) -> list[Variant]:
    listed = list(variants) if isinstance(variants, Iterable) and not isinstance(variants, str) else None
    if listed is None or not all(isinstance(v, tuple) and len(v) == 3 for v in listed):
        raise TypeError(f"variants: expected a sequence of (kernel, key, config) triples, got {variants!r:.80}")
    return list(dict.fromkeys(listed))


def _warm(variants: Sequence[Variant], num_workers: int, progress: bool | Progress | None) -> list[Warmed]:
    finished: dict[Variant, Warmed] = {}
    failures: list[str] = []
    with _reporter(progress, len(variants)) as reporter:

        def finish(variant: Variant, seconds: float, cached: bool) -> None:
            kernel, key, config = variant
            finished[variant] = Warmed(kernel.name, key, config, seconds, cached)
            reporter.report(len(finished) + len(failures), len(variants), finished[variant])

        missing = []
        for variant in variants:
            start = time.perf_counter()
            if jit.is_cached(*variant):
                finish(variant, time.perf_counter() - start, True)
            else:
                missing.append(variant)

        if missing and jit.is_writable():
            results = compile_missing(missing, num_workers, reporter.say)
        else:  # nowhere to hand results over: compile here, where they are needed
            results = _compile_here(missing)
        with contextlib.closing(results):
            for variant, outcome, cached in results:
                if isinstance(outcome, Exception):
                    failures.append(f"{_describe(variant)}: {outcome}")
                else:
                    finish(variant, outcome, cached)

        if failures:
            raise RuntimeError(
                f"{len(failures)} of {len(variants)} kernels did not compile\n\n" + "\n\n".join(failures)
            )
        if torch.cuda.is_initialized():
            for variant in variants:
                jit.get(*variant)
    return [finished[variant] for variant in variants]


def _compile_here(variants: Sequence[Variant]) -> Generator[Result]:
    for variant in variants:
        start = time.perf_counter()
        try:
            jit.get(*variant)
        except Exception as error:
            yield variant, error, False
        else:
            yield variant, time.perf_counter() - start, False
