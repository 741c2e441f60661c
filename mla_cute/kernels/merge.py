"""Merge of split partials: out = sum_s 2^(lse_s - m) o_s / sum_s 2^(lse_s - m), lse = m + log2(sum_s 2^(lse_s - m)).

The plan lists the requests with other than one piece. Grid (x, y), at most 2 CTAs of 8 warps per SM: row y of the
grid walks the listed requests y, y + grid_y, ...; its CTAs share the request's H x 2 units of (head, 256 columns). A
step without splits costs one wave of CTAs that read a zero. A unit belongs to G warps, 8 columns per lane,
G = min(8, power of two >= n / 8) for n pieces: warp g takes pieces g, g + G, ..., eight in flight, and the G triples
(m, l, o) are added through shared memory in order of g. The order depends on n alone, so the result is the same bits
whatever the batch and the grid.

n = 0: empty request, zeros and -inf.  n = 1: not listed, the main kernel has written the output.

The plan is read before griddepcontrol.wait: the main kernel triggers this one only after its own wait, so the planner
in front of it has completed. Everything after the wait is one round trip to the partials: lse and o together.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr, memory

from ..config import LaunchConfig
from .registry import INT16_BIAS, MERGE_COL_TILES, PART_LSE, DecodeKey
from .rows_sm90 import DTYPES, HEAD_DIM_V
from .softmax import NEG_BIG, exp2

NUM_WARPS = 8
COLS = HEAD_DIM_V // MERGE_COL_TILES
# Pieces a warp loads before it uses the first.
IN_FLIGHT = 8


class Merge:
    def __init__(self, key: DecodeKey, config: LaunchConfig):
        self.dtype = DTYPES[key.dtype]
        self.use_pdl = config.use_pdl
        self.scaled = config.partials == "int16"

    @cute.jit
    def __call__(
        self,
        table: cute.Tensor,  # (rows, 8): the plan, see planner.py
        part: cute.Tensor,  # (rows, PART_ROW) words: outputs in dtype, lse as float32
        out: cute.Tensor,  # (batch, H, 512)
        lse: cute.Tensor,  # (batch, H) float32
        num_parts: Int32,
        grid_x: Int32,
        grid_y: Int32,
        lse_scale: Float32,  # 1 for base 2, ln 2 for base e
        stream,
    ):
        self.kernel(table, part, out, lse, num_parts, lse_scale).launch(
            grid=[grid_x, grid_y, 1], block=[32 * NUM_WARPS, 1, 1], stream=stream, use_pdl=self.use_pdl
        )

    @cute.kernel
    def kernel(
        self,
        table: cute.Tensor,
        part: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        num_parts: Int32,
        lse_scale: Float32,
    ):
        t, _, _ = cute.arch.thread_idx()
        x, y, _ = cute.arch.block_idx()
        grid_x, grid_y, _ = cute.arch.grid_dim()
        warp = cute.arch.make_warp_uniform(t // 32)
        lane = t % 32
        alloc = memory.SmemAllocator()
        s_o = alloc.allocate_tensor(Float32, cute.make_layout((NUM_WARPS, COLS), stride=(COLS, 1)), 16)
        s_ml = alloc.allocate_tensor(Float32, cute.make_layout((NUM_WARPS, 2), stride=(2, 1)), 16)
        num_units = Int32(cute.size(out, mode=[1])) * MERGE_COL_TILES
        # Both at once, the row in hope that there is one: a dependent load costs 0.5 us.
        num_merges = table[0, 7]
        batch = table[num_parts + y, 0]
        first = table[num_parts + y, 1]
        n = table[num_parts + y, 2]
        if const_expr(self.use_pdl):
            cute.arch.griddepcontrol_launch_dependents()
            cute.arch.griddepcontrol_wait()
        for merge in cutlass.range(y, num_merges, grid_y, unroll=1):
            if merge > y:
                batch = table[num_parts + merge, 0]
                first = table[num_parts + merge, 1]
                n = table[num_parts + merge, 2]
            group = Int32(1)
            while (group * IN_FLIGHT < n) & (group < NUM_WARPS):
                group = group * 2
            units_at_once = NUM_WARPS // group
            for unit0 in cutlass.range(x * units_at_once, num_units, grid_x * units_at_once, unroll=1):
                unit = unit0 + warp // group
                if n == 0:
                    self._empty(out, lse, batch, unit, num_units, lane)
                else:
                    self._unit(
                        part, out, lse, s_o, s_ml, batch, first, n, group, unit, num_units, warp, lane, lse_scale
                    )

    def _from_int16(self, pair, half: int):
        """Integer `half` of a pair as float32: its bits under the exponent of 2^23, less the bias (rows_sm90)."""
        bits = Int32(cute.arch.prmt(pair, Int32(0x4B000000), 0x7632 if half else 0x7610))
        return bits.bitcast(Float32) - Float32(INT16_BIAS)

    @cute.jit
    def _empty(self, out, lse, batch, unit, num_units, lane):
        if unit < num_units:
            head = unit // MERGE_COL_TILES
            col = unit % MERGE_COL_TILES
            zero = cute.make_rmem_tensor(8, self.dtype)
            zero.fill(0.0)
            cute.autovec_copy(zero, cute.local_tile(out[batch, head, None], (8,), (col * 32 + lane,)))
            if (lane == 0) & (col == 0):
                lse[batch, head] = -Float32.inf

    @cute.jit
    def _unit(self, part, out, lse, s_o, s_ml, batch, first, n, group, unit, num_units, warp, lane, lse_scale):
        num_heads = Int32(cute.size(out, mode=[1]))
        head = unit // MERGE_COL_TILES
        col = unit % MERGE_COL_TILES
        g = warp % group
        words = cute.make_rmem_tensor((4, IN_FLIGHT), Float32)
        frag = cute.recast_tensor(words, self.dtype)  # (8, IN_FLIGHT)
        bits = cute.recast_tensor(words, Int32)
        scale_of = cute.make_rmem_tensor(IN_FLIGHT, Float32)
        part_lse = cute.make_rmem_tensor(IN_FLIGHT, Float32)
        acc = cute.make_rmem_tensor(8, Float32)
        other = cute.make_rmem_tensor(8, Float32)
        acc.fill(0.0)
        m = Float32(NEG_BIG)
        total = Float32(0.0)
        if unit < num_units:
            for s0 in cutlass.range(g, n, group * IN_FLIGHT, unroll=1):
                for i in cutlass.range_constexpr(IN_FLIGHT):
                    s = s0 + i * group
                    part_lse[i] = -Float32.inf
                    scale_of[i] = Float32(0.0)
                    for k in cutlass.range_constexpr(4):
                        words[k, i] = Float32(0.0)
                    if s < n:
                        at = first + head + s * num_heads
                        part_lse[i] = part[at, PART_LSE]
                        if const_expr(self.scaled):
                            scale_of[i] = part[at, PART_LSE + 1 + col]
                        cute.autovec_copy(cute.local_tile(part, (1, 4), (at, col * 32 + lane))[0, None], words[None, i])
                m_new = m
                for i in cutlass.range_constexpr(IN_FLIGHT):
                    m_new = cute.arch.fmax(m_new, part_lse[i])
                keep = exp2(m - m_new)
                m = m_new
                total = total * keep
                for k in cutlass.range_constexpr(8):
                    acc[k] = acc[k] * keep
                for i in cutlass.range_constexpr(IN_FLIGHT):
                    weight = exp2(part_lse[i] - m)
                    total = total + weight
                    if const_expr(self.scaled):
                        weight = weight * scale_of[i]
                        for k in cutlass.range_constexpr(4):
                            for h in cutlass.range_constexpr(2):
                                value = self._from_int16(bits[k, i], h)
                                acc[2 * k + h] = acc[2 * k + h] + weight * value
                    else:
                        for k in cutlass.range_constexpr(8):
                            acc[k] = acc[k] + weight * frag[k, i].to(Float32)
        if group > 1:
            cute.autovec_copy(acc, cute.local_tile(s_o, (1, 8), (warp, lane))[0, None])
            if lane == 0:
                s_ml[warp, 0] = m
                s_ml[warp, 1] = total
            cute.arch.sync_threads()
            if g == 0:
                m_all = m
                for k in cutlass.range(1, group, unroll=1):
                    m_all = cute.arch.fmax(m_all, s_ml[warp + k, 0])
                scale = exp2(m - m_all)
                m = m_all
                total = total * scale
                for i in cutlass.range_constexpr(8):
                    acc[i] = acc[i] * scale
                for k in cutlass.range(1, group, unroll=1):
                    scale = exp2(s_ml[warp + k, 0] - m)
                    total = total + s_ml[warp + k, 1] * scale
                    cute.autovec_copy(cute.local_tile(s_o, (1, 8), (warp + k, lane))[0, None], other)
                    for i in cutlass.range_constexpr(8):
                        acc[i] = acc[i] + other[i] * scale
            cute.arch.sync_threads()
        if (g == 0) & (unit < num_units):
            # Every score of the row may be -inf: 0 and -inf then, not NaN.
            inv = Float32(0.0)
            if total > 0.0:
                inv = 1.0 / total
            half = cute.make_rmem_tensor(8, self.dtype)
            for i in cutlass.range_constexpr(8):
                half[i] = (acc[i] * inv).to(self.dtype)
            cute.autovec_copy(half, cute.local_tile(out[batch, head, None], (8,), (col * 32 + lane,)))
            if (lane == 0) & (col == 0):
                lse[batch, head] = (m + cute.math.log2(total)) * lse_scale
