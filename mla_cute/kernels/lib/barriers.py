"""Barriers of the kernels: named (hardware) barriers and mbarriers in shared memory.

A kernel's params.py declares both, with the arrivals that complete them: `NamedBarrier` as an enum, `Mbarriers` as a
table from which their initialisation is made.
"""

import enum

import cutlass.cute as cute
from cutlass import Int32

from .ptx import asm


class NamedBarrier(enum.Enum):
    """Base of a kernel's named barriers: `NAME = id, threads`, ids from 1 on (0 is cute.arch.sync_threads).

    `threads` counts those that arrive and those that wait, and is a multiple of 32.
    """

    def __init__(self, number: int, threads: int):
        self.number = number
        self.threads = threads

    def sync(self) -> None:
        """Arrive and wait."""
        sync(self.number, self.threads)

    def arrive(self) -> None:
        """Arrive without waiting."""
        arrive(self.number, self.threads)


class Mbarriers:
    """A kernel's mbarriers, one behind the other in shared memory: `name=(how many, arrivals that complete one)`.

    The attribute of a name is the index of its first one: `mbar + table.full + i`. `total` is how many there are. Bytes
    that TMA brings count beside the arrivals.
    """

    def __init__(self, **counts: tuple[int, int]):
        self._counts = counts
        self.total = 0
        for name, (length, _) in counts.items():
            setattr(self, name, self.total)
            self.total += length

    def init(self, mbar) -> None:
        """Initialise all of them, which one thread does. `mbar`: pointer to the first."""
        for name, (length, arrivals) in self._counts.items():
            for i in range(length):
                cute.arch.mbarrier_init(mbar + getattr(self, name) + i, arrivals)


def sync(barrier: int, num_threads: int) -> None:
    """Arrive at named barrier `barrier` and wait for `num_threads` arrivals (a multiple of 32).

    Not `.aligned`, which cute.arch.barrier is: where two warpgroups meet from different places of the code,
    compute-sanitizer's synccheck calls the aligned form divergent. It costs nothing.
    """
    asm(None, 0, [], f"barrier.cta.sync {barrier}, {num_threads};", "~{memory}", True)


def sync_of(first: NamedBarrier, i) -> None:
    """`sync` at the barrier `i` behind `first`, which a warp knows at run time."""
    number = Int32(first.number) + i
    asm(None, 0, [number], f"barrier.cta.sync $0, {first.threads};", "r,~{memory}", True)


def arrive_of(first: NamedBarrier, i) -> None:
    """`arrive`, likewise."""
    number = Int32(first.number) + i
    asm(None, 0, [number], f"barrier.cta.arrive $0, {first.threads};", "r,~{memory}", True)


def arrive(barrier: int, num_threads: int) -> None:
    """Arrive without waiting; the arrivals of `num_threads` threads complete the barrier."""
    cute.arch.barrier_arrive(barrier_id=barrier, number_of_threads=num_threads)


def arrive_once_per_warp(mbar) -> None:
    """One mbarrier arrival per warp. wgmma `wait_group` is per warp, so a warp releases what it has drained
    itself and the mbarrier counts warps, not threads."""
    with cute.arch.elect_one():
        cute.arch.mbarrier_arrive(mbar)


def expect_tx(mbar, num_bytes) -> None:
    """Arrive once and expect `num_bytes` of TMA traffic. Unlike `cute.copy` with a TMA atom this does not elect
    its thread by itself."""
    with cute.arch.elect_one():
        cute.arch.mbarrier_arrive_and_expect_tx(mbar, num_bytes)


def fence_smem_writes() -> None:
    """Order this thread's generic shared-memory accesses before later wgmma / TMA accesses (async proxy)."""
    cute.arch.fence_proxy("async.shared", space="cta")
