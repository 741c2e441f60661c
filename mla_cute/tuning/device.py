"""What runs in the measuring process: one pool of random KV, the inputs of one shape, CUDA graphs, interleaved rounds.

Pool, inputs, slots and graphs are the bench's: random page order, as many disjoint page sets as put more than 300 MB
between two reads of a page, one graph per slot with one call under a plan (main kernel and merge). In a round every
configuration replays once, in random order, each replay on the next slot, so that none finds what another left in L2.
A GPU that was kept down while it was timed rests and is timed once more; clock, power and what kept it down are
read with NVML, where nvidia-ml-py is installed.
The default is judged by the bench's spot check against float32; every other configuration by the default's outputs,
over all requests of the same three slots.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from .. import gpu as gpu_facts
from ..bench import runner, sustained
from ..bench.cases import Case, PrefillCase
from ..bench.inputs import Inputs, KvPool, make_inputs
from ..bench.timing import CudaTimer, Replay, read_gbps
from ..config import KernelConfig
from ..tuned.select import When
from .recipes import case_of
from .search import CandidateError, Conditions, ShapeError, StartError

# The share of free memory that pool and inputs of a shape may take; the rest is for plans, graphs and references.
MEMORY_SHARE = 0.75
# Of inputs, page order and the order of candidates; tuned files name it.
SEED = 0
# Calls in a graph of several, on slots of their own; how often it is replayed, L2 emptied in front of each; and for how
# many seconds at most, the first time aside.
CHAIN, CHAIN_REPLAYS, CHAIN_SECONDS = 8, 8, 0.1
# What a GPU at its limit of power or heat is given before it is timed once more.
REST_S = 0.5

Alive = Callable[[], None]


class Timer(Protocol):
    """What is needed of a device: a real GPU (`RoundTimer`), or a fake in the tests."""

    device: torch.device

    def capture(self, fn: Replay) -> Replay: ...

    def synchronize(self) -> None: ...

    def warm(self, replays: Sequence[Replay]) -> None:
        """Replay each once, untimed, and empty L2 of what that read."""

    def sequence(self, replays: Sequence[Replay], alive: Alive) -> list[float]:
        """Microseconds of each of `replays`, run once and in order; calls `alive` now and then."""

    def host_us(self, fn: Replay, calls: int, chunks: int) -> float:
        """Host microseconds of one call of `fn`: median over chunks of `calls` calls."""


class Meter(Protocol):
    def moment(self) -> tuple[int, float, int]:
        """The SM clock in MHz, power in W, and bits of sustained.THROTTLES. RuntimeError where it cannot say."""


class RoundTimer(CudaTimer):
    """CUDA events around every replay, enqueued behind a spin kernel in bursts, and L2 emptied in front of each: in a
    model the kernels' code comes from memory, too."""

    # A burst waits for its end before the next sign of life: 16 replays of a 100 ms prefill are 1.6 s.
    burst = 16

    def warm(self, replays: Sequence[Replay]) -> None:
        for replay in replays:  # the first replay of a graph uploads it
            replay()
        self._flush_l2()()
        self.synchronize()

    def sequence(self, replays: Sequence[Replay], alive: Alive) -> list[float]:
        taken: list[float] = []
        while len(taken) < len(replays):
            taken += self._burst(replays, len(taken), min(self.burst, len(replays) - len(taken)), self._flush_l2())
            alive()
        return taken


def on_gpu(whens: Sequence[When], dtype: str, alive: Alive) -> Device:
    """`Device` on torch's current GPU. StartError when that is not a Hopper one."""
    if (why := gpu_facts.why_not_hopper()) is not None:
        raise StartError(f"nothing to tune on: {why}")
    timer = RoundTimer()
    free, _ = torch.cuda.mem_get_info(timer.device)
    return Device(whens, dtype, timer, runner.Library.installed(), int(MEMORY_SHARE * free), alive, _meter())


def _meter() -> Meter | None:
    found = gpu_facts.facts()
    if found is None or found.uuid is None:
        return None
    try:
        return sustained.NvmlMeter(found.uuid)
    except (ImportError, RuntimeError):
        return None


@dataclasses.dataclass
class _Running:
    """One configuration on the shape that is open."""

    calls: list[Replay]
    graphs: dict[int, Replay] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Open:
    inputs: Inputs
    running: dict[KernelConfig, _Running] = dataclasses.field(default_factory=dict)
    # Output and lse that the default configuration wrote, by slot.
    wanted: dict[int, tuple[torch.Tensor, torch.Tensor]] = dataclasses.field(default_factory=dict)
    turn: int = 0


class Device:
    """Answers the measuring process's requests."""

    def __init__(
        self,
        whens: Sequence[When],
        dtype: str,
        timer: Timer,
        library: runner.Library,
        memory: int,
        alive: Alive,
        meter: Meter | None = None,
    ):
        """`memory`: bytes that pool and inputs of a shape may take; larger shapes are refused when they are opened.
        `meter`: None where nothing tells clocks."""
        self._meter, self._moments = meter, list[tuple[int, float, int]]()
        self._dtype, self._timer, self._library, self._memory, self._alive = dtype, timer, library, memory, alive
        cases = [case_of(when, dtype) for when in whens]
        self._pool = KvPool.of([case for case in cases if footprint(case) <= memory], timer.device, SEED)
        self._shape: _Open | None = None
        self._random = random.Random(SEED)

    def facts(self) -> dict[str, Any]:
        """{"gpu": for the tuned file, "speed", "driver"}; measures the read bandwidth (4 GB, freed again)."""
        found = gpu_facts.facts()
        assert found is not None
        bandwidth = read_gbps(self._timer)  # type: ignore[arg-type]
        torch.cuda.empty_cache()
        gpu = {
            "name": found.name,
            "sm_count": found.sm_count,
            "clock_mhz": found.max_sm_mhz,
            "memory_gbps": round(bandwidth, 1),
        }
        return {"gpu": gpu, "speed": gpu_facts.speed(self._timer.device), "driver": found.driver}

    def is_usable(self) -> bool:
        """Whether kernels still run: after an illegal access none does in this process."""
        try:
            self._timer.synchronize()
        except RuntimeError:
            return False
        return True

    def open(self, when: When, default: KernelConfig) -> None:
        self._shape = None
        # What the last shape's graphs had, a converted cache for each slot among it, stays in their pools, where not
        # even torch finds it for what CUDA allocates by itself: 18 of 168 shapes ran out of memory so.
        torch.cuda.empty_cache()
        case = case_of(when, self._dtype)
        if footprint(case) > self._memory:
            raise ShapeError(
                f"needs {footprint(case) / 1e9:.1f} GB of GPU memory, {self._memory / 1e9:.1f} GB are there"
            )
        inputs = make_inputs(case, self._pool, self._timer.device, SEED)
        self._shape = _Open(inputs)
        self._alive()
        self._run(self._shape, default)
        caches = inputs.ckv_cache, inputs.kpe_cache
        verdict = runner.spot_check(inputs, inputs.out.__getitem__, inputs.lse.__getitem__, caches)
        if not verdict["ok"]:
            raise ShapeError(f"the default configuration: wrong: {_text(verdict)}")
        for slot in _judged(inputs):
            self._shape.wanted[slot] = inputs.out[slot].clone(), inputs.lse[slot].clone()

    def check(self, config: KernelConfig) -> None:
        shape = self._open_shape()
        self._run(shape, config)
        case = shape.inputs.case
        limit = (runner.FP8_REL_ERR_LIMIT if case.kv_format else runner.REL_ERR_LIMIT)[case.dtype]
        lse_limit = runner.FP8_LSE_ERR_LIMIT if case.kv_format else runner.LSE_ERR_LIMIT
        for slot, (want, want_lse) in shape.wanted.items():
            got, want = shape.inputs.out[slot].float(), want.float()
            # Each query row has its own error: one wrong request of 128 must not drown in the norm of all.
            errors = (got - want).norm(dim=-1) / want.norm(dim=-1)
            error, lse_error = errors.max().item(), (shape.inputs.lse[slot] - want_lse).abs().max().item()
            # The limit is doubled, since the default and this configuration may each be off by it. A NaN fails too.
            if not (error <= 2 * limit and lse_error <= 2 * lse_limit):
                found = {"rel_err": error, "lse_err": lse_error, "limit": 2 * limit}
                raise CandidateError(f"wrong: {_text(found)}, of a row against the default's")

    def samples(self, configs: Sequence[KernelConfig], rounds: int) -> list[list[float]]:
        shape, slots = self._open_shape(), self._open_shape().inputs.num_slots
        order: list[tuple[int, int]] = []
        for _ in range(rounds):
            for index in self._random.sample(range(len(configs)), len(configs)):
                order.append((index, shape.turn % slots))
                shape.turn += 1
        replays, fresh = [], []
        for index, slot in order:
            running = self._running(shape, configs[index])
            if slot not in running.graphs:
                running.graphs[slot] = self._timer.capture(running.calls[slot])
                fresh.append(running.graphs[slot])
                if len(fresh) % 64 == 0:
                    self._alive()
            replays.append(running.graphs[slot])
        self._timer.warm(fresh)
        times = self._timed(replays)
        if (found := self.conditions()) is not None and found.throttled:
            time.sleep(REST_S)
            self._alive()
            times = self._timed(replays)
        taken: list[list[float]] = [[] for _ in configs]
        for (index, _), us in zip(order, times, strict=True):
            taken[index].append(us)
        return taken

    def conditions(self) -> Conditions | None:
        if not self._moments:
            return None
        clocks, watts, bits = zip(*self._moments, strict=True)
        kept_down = [name for bit, name in sustained.THROTTLES.items() if any(bit & one for one in bits)]
        return Conditions(round(statistics.fmean(clocks)), round(statistics.fmean(watts)), tuple(kept_down))

    def chained(self, config: KernelConfig) -> float:
        shape = self._open_shape()
        calls = self._running(shape, config).calls
        chain = self._timer.capture(lambda: [calls[i % len(calls)]() for i in range(CHAIN)])
        self._timer.warm([chain])
        taken = self._timer.sequence([chain], self._alive)
        more = min(CHAIN_REPLAYS - 1, int(CHAIN_SECONDS * 1e6 / taken[0]))
        if more:
            taken += self._timer.sequence([chain] * more, self._alive)
        return statistics.median(taken) / CHAIN

    def host_us(self, config: KernelConfig) -> float:
        calls = self._running(self._open_shape(), config).calls
        return self._timer.host_us(calls[0], calls=20, chunks=5)

    def _timed(self, replays: Sequence[Replay]) -> list[float]:
        """The times of `replays`; sets what the GPU ran at, which is asked after each burst of them."""
        self._moments.clear()

        def alive() -> None:
            self._alive()
            if self._meter is not None:
                try:
                    self._moments.append(self._meter.moment())
                except RuntimeError:
                    self._meter = None

        return self._timer.sequence(replays, alive)

    def _open_shape(self) -> _Open:
        if self._shape is None:
            raise ShapeError("no shape is open")
        return self._shape

    def _running(self, shape: _Open, config: KernelConfig) -> _Running:
        """Plan and calls of a configuration; its kernels are loaded, which no capture allows."""
        if config not in shape.running:
            library = dataclasses.replace(self._library, config=config)
            running = _Running(library.calls(shape.inputs, library.make_plan(shape.inputs)))
            running.calls[0]()
            shape.running[config] = running
        return shape.running[config]

    def _run(self, shape: _Open, config: KernelConfig) -> None:
        """The configuration's outputs in the judged slots, over NaN."""
        running = self._running(shape, config)
        for slot in _judged(shape.inputs):
            shape.inputs.out[slot].fill_(float("nan"))
            shape.inputs.lse[slot].fill_(float("nan"))
            running.calls[slot]()
        self._timer.synchronize()


def footprint(case: Case | PrefillCase) -> int:
    """Bytes of pool, queries and outputs."""
    rows = case.num_slots * case.total_q * case.num_heads
    return case.pool_bytes + rows * (case.q_bytes + 2 * 512 + 4)


def _judged(inputs: Inputs) -> list[int]:
    """The slots that `spot_check` looks at."""
    return sorted({0, inputs.num_slots // 2, inputs.num_slots - 1})


def _text(verdict: dict[str, Any]) -> str:
    def number(x: float | None) -> str:
        return f"{x:.1e}" if x is not None and math.isfinite(x) else "not finite"

    return f"relative error {number(verdict['rel_err'])} (limit {verdict['limit']:g}), lse {number(verdict['lse_err'])}"


def maker(whens: Sequence[When], dtype: str) -> Callable[[Alive], Device]:
    """`on_gpu` as something that can be sent to the measuring process."""
    return functools.partial(on_gpu, list(whens), dtype)
