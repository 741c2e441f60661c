"""GPU time of short work, and the two ceilings it is compared with. Depends on torch only.

A sample is the time between two CUDA events around one replay. The samples of a burst are enqueued while a spin
kernel holds the stream, so the GPU never waits for the host between the two events: without that a 10 us kernel
measures as the 8 us the host takes to launch a graph plus what the kernel takes.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

Replay = Callable[[], Any]


class Timer(Protocol):
    """What `bench` needs of a device: a real GPU (CudaTimer), or a fake in the tests."""

    device: torch.device

    def capture(self, fn: Replay) -> Replay:
        """Record what `fn` enqueues; the result replays it."""

    def samples(self, replays: Sequence[Replay], seconds: float, at_least: int = 24, cold: bool = False) -> list[float]:
        """Microseconds of single replays, cycling through `replays` for about `seconds` of GPU time. `cold`: L2 is
        emptied in front of each, which is not in its time."""

    def host_us(self, fn: Replay, calls: int = 50, chunks: int = 20) -> float:
        """Host microseconds of one call of `fn`: median over chunks of `calls` calls."""

    def enqueue(self, replays: Sequence[Replay], first: int, count: int) -> Callable[[], None]:
        """Enqueue `count` replays from number `first` on, round and round; the result waits until they have run."""

    def synchronize(self) -> None: ...

    def free_graphs(self) -> None:
        """Give back the memory of captures whose replays are gone."""


class CudaTimer:
    """Times on one GPU, at most `max_samples` replays per measurement however short they are."""

    burst = 32
    max_samples = 480

    def __init__(self, device: torch.device | None = None):
        self.device = device or torch.device("cuda", torch.cuda.current_device())
        self._stream = torch.cuda.Stream(self.device)
        self._spin_cycles = 2_000_000  # 1 ms at 2 GHz: 32 replays and 64 events take the host about 0.5 ms
        self._flush: Replay | None = None
        self._flushed: torch.Tensor | None = None  # what it reads, which has to stay
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * self.burst)]
        self._events = list(zip(events[::2], events[1::2], strict=True))

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def capture(self, fn: Replay) -> Replay:
        # Not `with torch.cuda.graph(...)`: that collects garbage and empties the allocator's cache on every entry,
        # and a rotation over 300 MB takes 255 captures at batch 1. Nor one memory pool for all graphs: the handle of a
        # pool whose graphs are gone cannot be captured into again.
        self.synchronize()
        graph = torch.cuda.CUDAGraph()  # its memory goes back in `free_graphs`
        with torch.cuda.stream(self._stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                fn()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # the error that is on its way up invalidated the capture
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph.replay

    def enqueue(self, replays: Sequence[Replay], first: int, count: int) -> Callable[[], None]:
        for i in range(first, first + count):
            replays[i % len(replays)]()
        ended = torch.cuda.Event(blocking=True)
        ended.record()
        return ended.synchronize

    def free_graphs(self) -> None:
        # The allocator keeps the pools of graphs that are gone until it runs out of memory, and under capture, where it
        # must free nothing, that is an error: FlashAttention-3's partials, 57 GB of one case, left none for all others.
        self.synchronize()
        torch.cuda.empty_cache()

    def samples(self, replays: Sequence[Replay], seconds: float, at_least: int = 24, cold: bool = False) -> list[float]:
        flush = self._flush_l2() if cold else None
        for replay in replays:  # the first replay of a graph uploads it
            replay()
        self.synchronize()
        first = self._burst(replays, 0, min(8, at_least), flush)
        count = int(seconds * 1e6 / max(statistics.median(first), 1e-3))
        count = max(at_least, min(self.max_samples, count))
        taken: list[float] = []
        while len(taken) < count:
            taken += self._burst(replays, len(first) + len(taken), min(self.burst, count - len(taken)), flush)
        return taken

    def _flush_l2(self) -> Replay:
        """A graph that reads 384 MB, several times what an L2 holds."""
        if self._flush is None:
            words = torch.zeros(3, 32 << 20, dtype=torch.float32, device=self.device)
            torch.amax(words, dim=1)  # loads its kernels, which is not allowed under capture
            self._flush, self._flushed = self.capture(lambda: torch.amax(words, dim=1)), words
        return self._flush

    def _burst(self, replays: Sequence[Replay], start: int, count: int, flush: Replay | None = None) -> list[float]:
        events = self._events[:count]
        for _ in range(4):
            torch.cuda._sleep(self._spin_cycles)
            for i, (begin, end) in enumerate(events):
                replay = replays[(start + i) % len(replays)]
                if flush is not None:
                    flush()
                begin.record()
                replay()
                end.record()
            # Still spinning when the last replay is in the queue: the host was ahead all the time.
            ahead = not events[0][0].query()
            self.synchronize()
            if ahead:
                break
            self._spin_cycles = min(2 * self._spin_cycles, 40_000_000)
        return [begin.elapsed_time(end) * 1e3 for begin, end in events]

    def host_us(self, fn: Replay, calls: int = 50, chunks: int = 20) -> float:
        per_call = []
        for _ in range(chunks + 2):
            self.synchronize()
            begin = time.perf_counter()
            for _ in range(calls):
                fn()
            per_call.append((time.perf_counter() - begin) / calls * 1e6)
        self.synchronize()
        return statistics.median(per_call[2:])


def read_gbps(timer: Timer, num_bytes: int = 4_000_000_000) -> float:
    """Read bandwidth, GB/s (1e9 bytes): maximum over `num_bytes` of random data, median, fastest of three ways."""
    buffer = torch.empty(num_bytes // 4, dtype=torch.int32, device=timer.device)
    for part in buffer.split(1 << 28):
        part.random_()
    floats = buffer.view(torch.float32)
    ways = (lambda: torch.amax(buffer), lambda: torch.amax(floats), lambda: torch.amax(floats.view(-1, 8000), dim=1))
    us = min(statistics.median(timer.samples([way], 0.05)) for way in ways)
    return buffer.numel() * 4 / us * 1e-3


def cublas_tflops(timer: Timer, n: int = 8192) -> float:
    """bf16 matrix product of two random n x n matrices through torch.mm, TFLOP/s (median)."""
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=timer.device) for _ in range(2))
    out = torch.empty_like(a)
    us = statistics.median(timer.samples([lambda: torch.mm(a, b, out=out)], 0.08))
    return 2 * n**3 / us * 1e-6


def measure_ceilings(timer: Timer) -> dict[str, float]:
    """{"read_gbps", "cublas_bf16_tflops"} of this moment; allocates and frees 4 GB."""
    ceilings = {"read_gbps": read_gbps(timer), "cublas_bf16_tflops": cublas_tflops(timer)}
    torch.cuda.empty_cache()
    return ceilings


def empty_graph_us(timer: Timer) -> float:
    """What a graph with one kernel that does next to nothing measures as: part of every `us`, subtracted from none."""
    word = torch.zeros(1, dtype=torch.int32, device=timer.device)
    return statistics.median(timer.samples([timer.capture(lambda: word.fill_(1))], 0.01))


def occupy(device: torch.device, seconds: float = 0.5) -> None:
    """Enqueue about `seconds` of matrix products (1.4 ms each on an H100) and return: load for reading clocks under."""
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device=device)
    out = torch.empty_like(a)
    for _ in range(int(seconds / 1.4e-3)):
        torch.mm(a, a, out=out)
