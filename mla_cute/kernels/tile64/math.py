"""What a consumer of the row-tile kernel computes on its registers; schedule.py has the order."""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, const_expr
from cutlass.cute.nvgpu import warp, warpgroup

from ...dims import TILE_M
from ..lib import barriers, ptx, softmax, wgmma
from ..lib.paged import SUB_ELEMS, TILE_N
from ..lib.scalars import load_scale
from .params import Bar, Fragments, Params, Smem

# Columns of S that one thread has in each of its two rows.
S_COLS = TILE_N // 4
# P of a tile is made in so many parts, each of as many tokens; while one is made, the one before is multiplied.
PARTS = 2


def o_cols(regs: Fragments) -> int:
    """Likewise of a consumer's half of O: 64 of heads of 512."""
    return cute.size(regs.O, mode=[1])


def make_fragments(params: Params, smem: Smem, t: Int32, dtype, ckv_dim: int, converted: bool) -> Fragments:
    """Descriptors and registers of consumer thread `t`."""
    scale_log2 = params.scale_log2
    if converted:
        scale_log2 = scale_log2 * (load_scale(params.ckv_scale_at) * load_scale(params.q_scale_at))
    thr_qk, thr_pv = params.mma_qk.get_slice(0), params.mma_pv.get_slice(0)
    rO = cute.make_rmem_tensor(thr_pv.partition_shape_C((TILE_M, ckv_dim // 2)), Float32)
    rS = cute.make_rmem_tensor(thr_qk.partition_shape_C((TILE_M, TILE_N)), Float32)
    rP = cute.make_rmem_tensor(params.mma_pv_rs.get_slice(0).partition_shape_A((TILE_M, TILE_N)), dtype)
    rQr = cute.make_rmem_tensor(params.mma_qk_rs.get_slice(0).partition_shape_A((TILE_M, 64)), dtype)
    load = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), dtype)
    ldm = cute.make_tiled_copy_A(load, params.mma_qk_rs).get_slice(t)
    rPc = cute.make_tensor(rP.iterator, rS.layout)
    lane = t % 32
    return Fragments(
        t=t,
        lane=lane,
        row=(t // 32) * 16 + lane // 4,
        tSrQ=thr_qk.make_fragment_A(thr_qk.partition_A(smem.sQ)),
        tSrK=thr_qk.make_fragment_B(thr_qk.partition_B(smem.sK)),
        tSrR=None if smem.sR is None else thr_qk.make_fragment_B(thr_qk.partition_B(smem.sR)),
        tOrV=thr_pv.make_fragment_B(thr_pv.partition_B(smem.sVt)),
        tOrP0=thr_pv.make_fragment_A(thr_pv.partition_A(smem.sP0)),
        tOrP1=thr_pv.make_fragment_A(thr_pv.partition_A(smem.sP1)),
        rO=rO,
        rS=rS,
        rP=rP,
        rPc=rPc,
        rQr=rQr,
        rL=cute.make_rmem_tensor((2,), Float32),
        rW=cute.make_rmem_tensor((2,), Float32),
        scale_log2=scale_log2,
        rRef=cute.make_rmem_tensor((2,), Float32),
        S=wgmma.row_col_view(rS, TILE_N // 8),
        O=wgmma.row_col_view(rO, ckv_dim // 2 // 8),
        ldm=ldm,
        tQs=ldm.partition_S(smem.sQr),
        tQr=ldm.retile(rQr),
        p_row=_p_row(Uint32(t)),
    )


def _p_row(t):
    """Where in a tile of P the row lies whose address consumer thread `t` tells stmatrix, in bytes: a row is 128, its
    16-byte units permuted as TMA and wgmma do."""
    row = t // 32 * 16 + t % 16
    return row * 128 + ((t // 16 % 2) ^ (row % 8)) * 16


def add_pv(tiled_mma, regs: Fragments, p, wg: int, stage, part: int | None = None) -> None:
    """Start O += P V: V is this consumer's half of stage `stage`, `p` the fragment of P. One commit group. `part`: of
    P, None for all of it."""
    steps = TILE_N // 16  # of 16 tokens
    if part is None:
        first, last = 0, steps
    else:
        first, last = part * steps // PARTS, (part + 1) * steps // PARTS
    warpgroup.fence()
    v = wgmma.v_slice(regs.tOrV, wg, stage)
    wgmma.issue(tiled_mma, regs.rO, p, v, [(k, k) for k in range(first, last)], False)
    warpgroup.commit_group()


def put_p(regs: Fragments, sP, place) -> None:
    """P to its place in shared memory, sP0 or sP1, before wgmmas that read it. By stmatrix: of 16 columns the 8 x 8
    matrices of rows 0 to 7 and 8 to 15, then those of the next 8 columns."""
    words = cute.recast_tensor(cute.make_tensor(regs.rPc.iterator, cute.make_layout(2 * S_COLS)), Uint32)
    at = Uint32(sP.iterator.toint()) + Uint32(place * (SUB_ELEMS * 2)) + regs.p_row
    for step in range(TILE_N // 16):
        ptx.store_matrices(Int32(at ^ (32 * step)), [words[4 * step + i] for i in range(4)])
    barriers.fence_smem_writes()


def row_maxima(regs: Fragments) -> list:
    """Of this thread's two rows of S, in log2 units."""
    return [softmax.row_max(regs.S, r, S_COLS) * regs.scale_log2 for r in range(2)]


def make_p(regs: Fragments, part: int) -> list:
    """A part of P under the references, in 16 bits. Returns this thread's shares of its row sums, in float32 and not of
    what was rounded. S stays as it is."""
    n = S_COLS // PARTS
    rE = cute.make_rmem_tensor(2 * n, Float32)
    E = wgmma.row_col_view(rE, TILE_N // 8 // PARTS)
    S = cute.make_tensor(regs.rS.iterator + part * 2 * n, E.layout)
    sums = [softmax.exp_row(S, E, r, n, regs.scale_log2, regs.rRef[r]) for r in range(2)]
    # Words made one by one: where values are read again (`rounded_sums`), the compiler would round each by itself, by
    # an instruction of the unit that EX2 needs.
    words = _words_of(regs.rPc, part)
    for i in range(n):
        words[i] = ptx.to_16bit_pair(rE[2 * i], rE[2 * i + 1], regs.rPc.element_type)
    return sums


def rounded_sums(regs: Fragments, part: int) -> list:
    """The same sums of P as it was rounded."""
    n = S_COLS // PARTS
    words = _words_of(regs.rPc, part)
    rE = cute.make_rmem_tensor(2 * n, Float32)
    for i in range(n):
        rE[2 * i], rE[2 * i + 1] = ptx.unpack_16bit(words[i], regs.rPc.element_type)
    E = wgmma.row_col_view(rE, TILE_N // 8 // PARTS)
    return [softmax.sum_row(E, r, n) for r in range(2)]


def _words_of(rPc, part: int):
    """A part of P as words of two values, in the order of S."""
    n = 2 * S_COLS // PARTS
    return cute.recast_tensor(cute.make_tensor(rPc.iterator + part * n, cute.make_layout(n)), Uint32)


def clear_p(regs: Fragments, part: int, rows) -> None:
    """A part of P becomes 0 in the rows of this thread's two whose bit is set in `rows`."""
    words = _words_of(regs.rPc, part)
    kept = [cutlass.select_((rows >> r) % 2 != 0, Uint32(0), Uint32(0xFFFFFFFF)) for r in range(2)]
    for i in range(S_COLS // PARTS):
        words[i] = words[i] & kept[i % 2]


@cute.jit
def zero_v_tail(smem: Smem, regs: Fragments, stage, wg: Constexpr, valid):
    """Zero the rows of V from `valid` on, in this consumer's half of a stage. P is 0 there, but rows past kv_end may
    hold NaN, and 0 times NaN is NaN.

    A row of a sub-tile is 16 words of 8 bytes, which the swizzle permutes within the row. Each warp takes every fourth
    row, eight of its lanes a sub-tile; of two sub-tiles in a half two rows at a time.
    """
    if valid < TILE_N:
        of_half = o_cols(regs) // 16
        rows = 4 // of_half
        first = cutlass.max(valid, Int32(0)) + regs.t // 32
        sub = regs.lane // 8
        if const_expr(rows == 2):
            first = cutlass.max(valid, Int32(0)) + regs.t // 16
            sub = sub % 2
        base = (stage * (2 * of_half) + wg * of_half + sub) * (SUB_ELEMS // 4) + (regs.lane % 8) * 2
        for row in cutlass.range(first, TILE_N, 4 * rows, unroll=1):
            smem.k_words[base + row * 16] = Int64(0)
            smem.k_words[base + row * 16 + 1] = Int64(0)
        barriers.fence_smem_writes()
        (Bar.FILL0, Bar.FILL1)[wg].sync()
