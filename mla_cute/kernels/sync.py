"""Barriers shared by the kernels: named (hardware) barriers and mbarrier arrays in shared memory."""

import cutlass.cute as cute
from cutlass import Int32
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T


def sync(barrier: int, num_threads: int) -> None:
    """Arrive at named barrier `barrier` and wait for `num_threads` arrivals (a multiple of 32)."""
    cute.arch.barrier(barrier_id=barrier, number_of_threads=num_threads)


def sync_any(barrier: int, num_threads: int, flag):
    """`sync`, and whether `flag` is true in any of the threads (an Int32)."""
    text = (
        "{ .reg .pred p, q; setp.ne.s32 p, $1, 0;"
        f" barrier.cta.red.or.pred q, {barrier}, {num_threads}, p; selp.s32 $0, 1, 0, q; }}"
    )
    return Int32(
        llvm.inline_asm(
            T.i32(),
            [Int32(flag).ir_value()],
            text,
            "=r,r,~{memory}",
            has_side_effects=True,
            is_align_stack=False,
            asm_dialect=llvm.AsmDialect.AD_ATT,
        )
    )


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
