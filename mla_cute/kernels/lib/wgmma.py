"""wgmma helpers: issue one accumulation over chosen k slices, and the accumulator's register layout."""

import cutlass.cute as cute
from cutlass.cute.nvgpu import warpgroup


def issue(tiled_mma, acc, a, b, k_pairs, zero_first: bool) -> None:
    """acc (+)= sum over (ka, kb) of A[:, ka] B[:, kb], asynchronously.

    `a`, `b` are fragments of shape (MMA, rest, k). The atom is made afresh because ACCUMULATE is a field of the
    atom and would leak into the next gemm. The caller fences before and commits after.
    """
    atom = cute.make_mma_atom(tiled_mma.op)
    for n, (ka, kb) in enumerate(k_pairs):
        atom.set(warpgroup.Field.ACCUMULATE, not (zero_first and n == 0))
        cute.gemm(atom, acc, a[None, None, ka], b[None, None, kb], acc)


def row_col_view(acc, num_n_tiles: int):
    """This thread's part of a 64 x (8 * num_n_tiles) accumulator as (row 0..1, column 0..2*num_n_tiles-1).

    Per 8-column tile a thread holds c0 c1 of row r and c2 c3 of row r + 8, r = 16 * warp + lane / 4; its column
    pair in the tile is 2 * (lane % 4).
    """
    return cute.make_tensor(acc.iterator, cute.make_layout((2, (2, num_n_tiles)), stride=(2, (1, 4))))


def v_slice(frag, half: int, stage: int):
    """Half `half` of V in a stage: of the fragment (MMA, 2, k, stage) the slice as (MMA, 1, k).

    Slicing alone would drop the mode of size 1, which gemm wants.
    """
    v = frag[None, half, None, stage]
    return cute.make_tensor(
        v.iterator, cute.make_layout((v.shape[0], 1, v.shape[1]), stride=(v.stride[0], 0, v.stride[1]))
    )
