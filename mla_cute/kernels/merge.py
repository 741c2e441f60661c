"""Merge of split partials: out = sum_s 2^(lse_s - m) o_s / sum_s 2^(lse_s - m), lse = m + log2(sum_s 2^(lse_s - m)).

Grid (batch * row chunks, 512 / 128). A CTA of 16 warps takes `rows_per_cta` heads of one request and 128 columns,
4 per lane. With n splits, G = min(16, power of two >= n) warps share a row: warp g of the group folds splits g, g + G,
... into (m, l, o) as it loads them; the group's triples are added through shared memory in order of g. The order
depends on n alone, so the result is the same bits whatever the batch and whatever rows_per_cta.

n = 0: empty request, zeros and -inf.  n = 1: the main kernel has written the output, nothing to do.

`splits` is read before griddepcontrol.wait: the main kernel triggers this one only after its own wait, so the planner
in front of it has completed. Everything after the wait is one round trip to the partials: lse and o together.
"""

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
from cutlass import Float32, Int32, const_expr

from ..config import LaunchConfig
from .registry import DecodeKey
from .rows_sm90 import DTYPES, HEAD_DIM_V
from .softmax import NEG_BIG, exp2

NUM_WARPS = 16
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
        warp = cute.arch.make_warp_uniform(t // 32)
        lane = t % 32
        alloc = utils.SmemAllocator()
        s_o = alloc.allocate_tensor(Float32, cute.make_layout((NUM_WARPS, COLS), stride=(COLS, 1)), 16)
        s_ml = alloc.allocate_tensor(Float32, cute.make_layout((NUM_WARPS, 2), stride=(2, 1)), 16)
        batch = bx // chunks
        head_begin = (bx - batch * chunks) * rows_per_cta
        head_end = cutlass.min(head_begin + rows_per_cta, Int32(cute.size(out, mode=[1])))
        first = splits[batch, 0]
        n = splits[batch, 1]
        if const_expr(self.use_pdl):
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
        if n == 0:
            self._empty(out, lse, batch, head_begin, head_end, col, warp, lane)
        if n > 1:
            self._rows(
                part_o, part_lse, out, lse, s_o, s_ml, batch, first, n, head_begin, head_end, col, warp, lane, lse_scale
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
        self, part_o, part_lse, out, lse, s_o, s_ml, batch, first, n, head_begin, head_end, col, warp, lane, lse_scale
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
            m = Float32(NEG_BIG)
            total = Float32(0.0)
            if head < head_end:
                row = first + head
                for s in cutlass.range(g, n, group, unroll=4):
                    part = part_lse[row + s * num_heads]
                    cute.autovec_copy(
                        cute.local_tile(part_o, (1, 4), (row + s * num_heads, col * 32 + lane))[0, None], frag
                    )
                    m_new = cute.arch.fmax(m, part)
                    keep = exp2(m - m_new)
                    weight = exp2(part - m_new)
                    m = m_new
                    total = total * keep + weight
                    for i in cutlass.range_constexpr(4):
                        acc[i] = acc[i] * keep + weight * frag[i]
            cute.autovec_copy(acc, cute.local_tile(s_o, (1, 4), (warp, lane))[0, None])
            if lane == 0:
                s_ml[warp, 0] = m
                s_ml[warp, 1] = total
            cute.arch.sync_threads()
            if (g == 0) & (head < head_end):
                m_all = m
                for k in cutlass.range(1, group, unroll=1):
                    m_all = cute.arch.fmax(m_all, s_ml[warp + k, 0])
                scale = exp2(m - m_all)
                total = total * scale
                for i in cutlass.range_constexpr(4):
                    acc[i] = acc[i] * scale
                for k in cutlass.range(1, group, unroll=1):
                    scale = exp2(s_ml[warp + k, 0] - m_all)
                    total = total + s_ml[warp + k, 1] * scale
                    cute.autovec_copy(cute.local_tile(s_o, (1, 4), (warp + k, lane))[0, None], frag)
                    for i in cutlass.range_constexpr(4):
                        acc[i] = acc[i] + frag[i] * scale
                # Every score of the row may be -inf: 0 and -inf then, not NaN.
                inv = Float32(0.0)
                if total > 0.0:
                    inv = 1.0 / total
                half = cute.make_rmem_tensor(4, self.dtype)
                for i in cutlass.range_constexpr(4):
                    half[i] = (acc[i] * inv).to(self.dtype)
                cute.autovec_copy(half, cute.local_tile(out[batch, head, None], (4,), (col * 32 + lane,)))
                if (lane == 0) & (col == 0):
                    lse[batch, head] = (m_all + cute.math.log2(total)) * lse_scale
            cute.arch.sync_threads()
