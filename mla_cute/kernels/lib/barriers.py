"""Barriers shared by the kernels: named (hardware) barriers and mbarrier arrays in shared memory."""

import cutlass.cute as cute

from .ptx import asm


def sync(barrier: int, num_threads: int) -> None:
    """Arrive at named barrier `barrier` and wait for `num_threads` arrivals (a multiple of 32).

    Not `.aligned`, which cute.arch.barrier is: where two warpgroups meet from different places of the code,
    compute-sanitizer's synccheck calls the aligned form divergent. It costs nothing.
    """
    asm(None, 0, [], f"barrier.cta.sync {barrier}, {num_threads};", "~{memory}", True)


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
