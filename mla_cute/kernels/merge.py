"""Merge of split partials: out = sum_s 2^(lse_s - m) o_s / sum_s 2^(lse_s - m), lse = m + log2(sum_s 2^(lse_s - m)).

Grid (batch * row chunks, 512 / 128). A CTA of 8 warps takes `rows_per_cta` heads of one request and 128 columns,
4 per lane. With n splits, G = min(8, power of two >= n) warps share a row: warp g of the group sums splits g, g + G,
...; the group's sums are added through shared memory in order of g. The order depends on n alone, so the result is
the same bits whatever the batch and whatever rows_per_cta.

n = 0: empty request, zeros and -inf.  n = 1: the main kernel has written the output, nothing to do.
"""

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
from cutlass import Float32, Int32, const_expr

from ..config import LaunchConfig
from .registry import DecodeKey
from .rows_sm90 import DTYPES, HEAD_DIM_V
from .softmax import exp2

NUM_WARPS = 8
COLS = 128


class Merge:
    def __init__(self, key: DecodeKey, config: LaunchConfig):
        self.dtype = DTYPES[key.dtype]
        self.use_pdl = config.use_pdl

    @cute.jit
    def __call__(
        self,
        splits: cute.Tensor,  # (batch, 2): first partial row, pieces
        part_o: cute.Tensor,  # (rows, 512) float32
        part_lse: cute.Tensor,  # (rows,) float32, base 2
        out: cute.Tensor,  # (batch, H, 512)
        lse: cute.Tensor,  # (batch, H) float32
        rows_per_cta: Int32,
        lse_scale: Float32,  # 1 for base 2, ln 2 for base e
        stream,
    ):
        chunks = cute.ceil_div(cute.size(out, mode=[1]), rows_per_cta)
        self.kernel(splits, part_o, part_lse, out, lse, rows_per_cta, lse_scale, chunks).launch(
            grid=[cute.size(splits, mode=[0]) * chunks, HEAD_DIM_V // COLS, 1],
            block=[32 * NUM_WARPS, 1, 1],
            stream=stream,
            use_pdl=self.use_pdl,
        )

    @cute.kernel
    def kernel(
        self,
        splits: cute.Tensor,
        part_o: cute.Tensor,
        part_lse: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        rows_per_cta: Int32,
        lse_scale: Float32,
        chunks: Int32,
    ):
        t, _, _ = cute.arch.thread_idx()
        bx, col, _ = cute.arch.block_idx()
        warp = t // 32
        lane = t % 32
        s_sum = utils.SmemAllocator().allocate_tensor(
            Float32, cute.make_layout((NUM_WARPS, 4 * 32), stride=(4 * 32, 1)), 16
        )
        batch = bx // chunks
        head_begin = (bx - batch * chunks) * rows_per_cta
        head_end = cutlass.min(head_begin + rows_per_cta, Int32(cute.size(out, mode=[1])))
        if const_expr(self.use_pdl):
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
        first = splits[batch, 0]
        n = splits[batch, 1]
        if n == 0:
            self._empty(out, lse, batch, head_begin, head_end, col, warp, lane)
        if n > 1:
            self._rows(
                part_o, part_lse, out, lse, s_sum, batch, first, n, head_begin, head_end, col, warp, lane, lse_scale
            )

    @cute.jit
    def _empty(self, out, lse, batch, head_begin, head_end, col, warp, lane):
        zero = cute.make_rmem_tensor(4, self.dtype)
        zero.fill(0.0)
        for head in cutlass.range(head_begin + warp, head_end, NUM_WARPS, unroll=1):
            cute.autovec_copy(zero, cute.local_tile(out[batch, head, None], (4,), (col * 32 + lane,)))
            if (lane == 0) & (col == 0):
                lse[batch, head] = -Float32.inf

    @cute.jit
    def _rows(
        self, part_o, part_lse, out, lse, s_sum, batch, first, n, head_begin, head_end, col, warp, lane, lse_scale
    ):
        num_heads = Int32(cute.size(out, mode=[1]))
        group = Int32(2)
        while (group < n) & (group < NUM_WARPS):
            group = group * 2
        rows_at_once = NUM_WARPS // group
        g = warp % group
        frag = cute.make_rmem_tensor(4, Float32)
        acc = cute.make_rmem_tensor(4, Float32)
        for head0 in cutlass.range(head_begin, head_end, rows_at_once, unroll=1):
            head = head0 + warp // group
            acc.fill(0.0)
            ref = -Float32.inf
            total = Float32(0.0)
            if head < head_end:
                row = first + head
                for s in cutlass.range(lane, n, 32, unroll=1):
                    ref = cute.arch.fmax(ref, part_lse[row + s * num_heads])
                for i in cutlass.range_constexpr(5):
                    ref = cute.arch.fmax(ref, cute.arch.shuffle_sync_bfly(ref, offset=16 >> i))
                # Every score of the row may be -inf: keep 2^(-inf - ref) at 0 instead of NaN.
                if ref == -Float32.inf:
                    ref = Float32(0.0)
                for s in cutlass.range(lane, n, 32, unroll=1):
                    total = total + exp2(part_lse[row + s * num_heads] - ref)
                for i in cutlass.range_constexpr(5):
                    total = total + cute.arch.shuffle_sync_bfly(total, offset=16 >> i)
                for s in cutlass.range(g, n, group, unroll=4):
                    weight = exp2(part_lse[row + s * num_heads] - ref)
                    cute.autovec_copy(
                        cute.local_tile(part_o, (1, 4), (row + s * num_heads, col * 32 + lane))[0, None], frag
                    )
                    for i in cutlass.range_constexpr(4):
                        acc[i] = acc[i] + weight * frag[i]
            s_mine = cute.local_tile(s_sum, (1, 4), (warp, lane))[0, None]
            cute.autovec_copy(acc, s_mine)
            cute.arch.sync_threads()
            if (g == 0) & (head < head_end):
                for k in cutlass.range(1, group, unroll=1):
                    cute.autovec_copy(cute.local_tile(s_sum, (1, 4), (warp + k, lane))[0, None], frag)
                    for i in cutlass.range_constexpr(4):
                        acc[i] = acc[i] + frag[i]
                inv = Float32(0.0)
                if total > 0.0:
                    inv = 1.0 / total
                half = cute.make_rmem_tensor(4, self.dtype)
                for i in cutlass.range_constexpr(4):
                    half[i] = (acc[i] * inv).to(self.dtype)
                cute.autovec_copy(half, cute.local_tile(out[batch, head, None], (4,), (col * 32 + lane,)))
                if (lane == 0) & (col == 0):
                    lse[batch, head] = (ref + cute.math.log2(total)) * lse_scale
            cute.arch.sync_threads()
