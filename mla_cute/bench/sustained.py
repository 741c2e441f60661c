"""What a call costs when it is replayed for seconds: time, energy and clock at the card's power limit.

A burst of replays, which `us` is of, is over before the card has used the energy that its limit is about. After a
second of load every large shape runs at the limit, whatever limits it in a burst, and its time is its energy over that
power (docs/performance.md). So energy a call is a figure of its own, and the clock says which of the two a gain is.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from ..extras import install_command
from .timing import Replay, Timer

# Of load in front of what counts: clock and power settle in 0.2 to 0.3 s.
SETTLE_S = 0.4
# Of work that is enqueued at a time. The counter of energy moves every 20 to 100 ms; when it has moved is known to
# one slice.
SLICE_S = 0.005
SLICES_AHEAD = 3


# NVML's bits of what keeps the clock down under load, by nvidia-smi's names. An application's clock is none of them.
THROTTLES = {
    0x04: "SW Power Cap",
    0x08: "HW Slowdown",
    0x20: "SW Thermal Slowdown",
    0x40: "HW Thermal Slowdown",
    0x80: "HW Power Brake Slowdown",
}


class Meter(Protocol):
    def read(self) -> tuple[int, int]:
        """Energy in mJ, counted from any moment, and the SM clock in MHz, of now."""


class NvmlMeter:
    """Of one GPU, by NVML. ImportError without nvidia-ml-py; RuntimeError where the GPU does not count its energy."""

    def __init__(self, uuid: str):
        try:
            import pynvml
        except ImportError:
            raise ImportError(f"needs nvidia-ml-py: {install_command('nvidia-ml-py')}") from None
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            self._gpu = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
            self.read()
        except pynvml.NVMLError as error:
            raise RuntimeError(f"NVML reads no energy of this GPU: {error}") from None

    def read(self) -> tuple[int, int]:
        return (
            self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu),
            self._nvml.nvmlDeviceGetClockInfo(self._gpu, self._nvml.NVML_CLOCK_SM),
        )

    def moment(self) -> tuple[int, float, int]:
        """The SM clock in MHz, power in W and the bits of THROTTLES and others, of now. RuntimeError where NVML does
        not say."""
        try:
            return (
                self._nvml.nvmlDeviceGetClockInfo(self._gpu, self._nvml.NVML_CLOCK_SM),
                self._nvml.nvmlDeviceGetPowerUsage(self._gpu) * 1e-3,
                self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._gpu),
            )
        except self._nvml.NVMLError as error:
            raise RuntimeError(f"NVML reads no clocks of this GPU: {error}") from None


@dataclass(frozen=True)
class Sustain:
    """How long each implementation is replayed, in seconds behind SETTLE_S, and what reads the energy."""

    seconds: float
    meter: Meter


@dataclass(frozen=True)
class Sustained:
    """Of one call, as means over the load: us, mJ, SM cycles (us times MHz); and W and the SM clock in MHz."""

    us: float
    mj: float
    watts: float
    sm_mhz: float
    cycles: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class _Sample:
    seconds: float
    calls: int  # that have ended
    mj: int
    sm_mhz: int


def measure(
    timer: Timer, replays: Sequence[Replay], us: float, sustain: Sustain, clock: Callable[[], float] = time.perf_counter
) -> Sustained:
    """Replay for SETTLE_S and `sustain.seconds`, round and round. `us`: about what a replay takes.

    RuntimeError when the counter of energy did not move twice.
    """
    per_slice = max(1, round(SLICE_S * 1e6 / us))
    waits: deque[Callable[[], None]] = deque()
    samples: list[_Sample] = []
    started = 0
    begin = clock()
    while clock() - begin < SETTLE_S + sustain.seconds:
        waits.append(timer.enqueue(replays, started, per_slice))
        started += per_slice
        if len(waits) < SLICES_AHEAD:
            continue
        waits.popleft()()
        if clock() - begin >= SETTLE_S:
            samples.append(_Sample(clock(), started - len(waits) * per_slice, *sustain.meter.read()))
    timer.synchronize()
    return _of(samples)


def _of(samples: Sequence[_Sample]) -> Sustained:
    # Power is taken between two moves of the counter, which may be 100 ms apart, and not between two reads.
    moved = [samples[i] for i in range(1, len(samples)) if samples[i].mj != samples[i - 1].mj]
    if len(moved) < 2:
        raise RuntimeError(f"the GPU's counter of energy moved {len(moved)} times under load")
    first, last = samples[0], samples[-1]
    us = (last.seconds - first.seconds) * 1e6 / (last.calls - first.calls)
    watts = (moved[-1].mj - moved[0].mj) * 1e-3 / (moved[-1].seconds - moved[0].seconds)
    sm_mhz = statistics.fmean(sample.sm_mhz for sample in samples)
    return Sustained(us, watts * us * 1e-3, watts, sm_mhz, us * sm_mhz)


def mean(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    """Of two measurements of the same call."""
    return {name: (first[name] + second[name]) / 2 for name in first}


def lines(record: dict[str, Any], label: Callable[[dict[str, Any]], str]) -> list[str]:
    """What a record says of energy: a line for each row, and the mean over the peer that takes the least."""
    found, ratios = [], []
    for row in record["rows"]:
        if (own := row.get("sustained")) is None:
            continue
        peers = {name: peer["sustained"] for name, peer in row["peers"].items() if "sustained" in peer}
        beside = ""
        if peers:
            least = min(peers, key=lambda name: peers[name]["mj"])
            ratios.append(peers[least]["mj"] / own["mj"])
            beside = f"; {least} {_figures(peers[least])}"
        found.append(f"sustained, {label(row)}: {_figures(own)}{beside}")
    if ratios:
        less = sum(ratio > 1 for ratio in ratios)
        found.append(
            f"energy of a call over that of the peer that takes the least, {len(ratios)} cells: geometric mean "
            f"{statistics.geometric_mean(ratios):.3f}x, lowest {min(ratios):.3f}x, less in {less}"
        )
    return found


def _figures(one: dict[str, float]) -> str:
    return f"{one['mj']:.1f} mJ, {one['us']:.1f} us, {one['watts']:.0f} W, {one['sm_mhz']:.0f} MHz"
