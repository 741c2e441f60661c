"""Merge of split partials: out = sum_s 2^(lse_s - m) o_s / sum_s 2^(lse_s - m), lse = m + log2(sum_s 2^(lse_s - m)).

The plan lists the requests with other than one piece. A task is one of them x `rows` heads x 128 columns; at most
4 CTAs per SM walk the tasks, so that a step without splits costs one wave of CTAs that read a zero (a grid over all
requests cost 8 us at batch 128). A CTA has 16 warps of 4 columns per lane. With n pieces, G = min(16, power of two
>= n) warps share a row: warp g of the group folds pieces g, g + G, ... into (m, l, o) as it loads them; the group's
triples are added through shared memory in order of g. The order depends on n alone, so the result is the same bits
whatever the batch and whatever `rows`.

n = 0: empty request, zeros and -inf.  n = 1: not listed, the main kernel has written the output.

The plan is read before griddepcontrol.wait: the main kernel triggers this one only after its own wait, so the planner
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
NUM_COL_TILES = HEAD_DIM_V // COLS


class Merge:
    def __init__(self, key: DecodeKey, config: LaunchConfig):
        self.dtype = DTYPES[key.dtype]
        self.use_pdl = config.use_pdl

    @cute.jit
    def __call__(
        self,
        table: cute.Tensor,  # (rows, 8): the plan, see planner.py
        part: cute.Tensor,  # (rows, PART_ROW) float32
        out: cute.Tensor,  # (batch, H, 512)
        lse: cute.Tensor,  # (batch, H) float32
        num_parts: Int32,
        rows: Int32,  # heads per task
        ctas: Int32,
        lse_scale: Float32,  # 1 for base 2, ln 2 for base e
        stream,
    ):
        self.kernel(table, part, out, lse, num_parts, rows, lse_scale).launch(
            grid=[ctas, 1, 1], block=[32 * NUM_WARPS, 1, 1], stream=stream, use_pdl=self.use_pdl
        )

    @cute.kernel
    def kernel(
        self,
        table: cute.Tensor,
        part: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        num_parts: Int32,
        rows: Int32,
        lse_scale: Float32,
    ):
        t, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        warp = cute.arch.make_warp_uniform(t // 32)
        lane = t % 32
        alloc = utils.SmemAllocator()
        s_o = alloc.allocate_tensor(Float32, cute.make_layout((NUM_WARPS, COLS), stride=(COLS, 1)), 16)
        s_ml = alloc.allocate_tensor(Float32, cute.make_layout((NUM_WARPS, 2), stride=(2, 1)), 16)
        num_heads = Int32(cute.size(out, mode=[1]))
        chunks = cute.ceil_div(num_heads, rows)
        tasks = table[0, 7] * chunks * NUM_COL_TILES
        if const_expr(self.use_pdl):
            cute.arch.griddepcontrol_launch_dependents()
            cute.arch.griddepcontrol_wait()
        for task in cutlass.range(cta, tasks, ctas, unroll=1):
            col = task % NUM_COL_TILES
            rest = task // NUM_COL_TILES
            merge = rest // chunks
            head_begin = (rest - merge * chunks) * rows
            head_end = cutlass.min(head_begin + rows, num_heads)
            batch = table[num_parts + merge, 0]
            first = table[num_parts + merge, 1]
            n = table[num_parts + merge, 2]
            if n == 0:
                self._empty(out, lse, batch, head_begin, head_end, col, warp, lane)
            else:
                self._rows(part, out, lse, s_o, s_ml, batch, first, n, head_begin, head_end, col, warp, lane, lse_scale)

    @cute.jit
    def _empty(self, out, lse, batch, head_begin, head_end, col, warp, lane):
        zero = cute.make_rmem_tensor(4, self.dtype)
        zero.fill(0.0)
        for head in cutlass.range(head_begin + warp, head_end, NUM_WARPS, unroll=1):
            cute.autovec_copy(zero, cute.local_tile(out[batch, head, None], (4,), (col * 32 + lane,)))
            if (lane == 0) & (col == 0):
                lse[batch, head] = -Float32.inf

    @cute.jit
    def _rows(self, part, out, lse, s_o, s_ml, batch, first, n, head_begin, head_end, col, warp, lane, lse_scale):
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
                    at = row + s * num_heads
                    part_lse = part[at, HEAD_DIM_V]
                    cute.autovec_copy(cute.local_tile(part, (1, 4), (at, col * 32 + lane))[0, None], frag)
                    m_new = cute.arch.fmax(m, part_lse)
                    keep = exp2(m - m_new)
                    weight = exp2(part_lse - m_new)
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
