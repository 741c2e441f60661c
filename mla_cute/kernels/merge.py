"""Merge of split partials: out = sum_s 2^(lse_s - m) o_s / sum_s 2^(lse_s - m), lse = m + log2(sum_s 2^(lse_s - m)).

The plan lists what was not written by one item: requests (decode, their H rows) or row tiles (prefill, up to 64 rows).
Grid (x, y), at most 2 CTAs of 8 warps per SM: row y of the grid walks the list's entries y, y + grid_y, ...; its CTAs
share the entry's units of (row, 256 columns). A step without splits costs one wave of CTAs that read a zero. A unit
belongs to G warps, 8 columns per lane, G = min(8, power of two >= n / 8) for n pieces: warp g takes pieces g, g + G,
..., eight in flight, and the G triples (m, l, o) are added through shared memory in order of g. The order depends on n
alone, so the result is the same bits whatever the batch and the grid.

n = 0: rows that see no key, zeros and -inf.  n = 1: not listed, the main kernel has written the output.

The plan is read before griddepcontrol.wait: the main kernel triggers this one only after its own wait, so the planner
in front of it has completed. Everything after the wait is one round trip to the partials: lse and o together.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr, memory
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T

from ..config import LaunchConfig
from .registry import INT16_BIAS, MERGE_COL_TILES, PART_LSE, PART_ROW
from .rows_params import DTYPES, HEAD_DIM_V
from .softmax import NEG_BIG, exp2

NUM_WARPS = 8
COLS = HEAD_DIM_V // MERGE_COL_TILES
# Pieces a warp loads before it uses the first.
IN_FLIGHT = 8


def _load_in_order(part, row, word, num_words: int) -> list:
    """`num_words` words of a partial row from word `word` on. Volatile, so that ptxas neither moves a load down to
    its first use nor what the last loads are needed for up between the first: 1 us for 8 pieces."""
    address = part.iterator.toint() + (Int64(row) * PART_ROW + Int64(word)) * 4
    i32 = T.i32()
    targets = ", ".join(f"${k}" for k in range(num_words))
    loaded = llvm.inline_asm(
        llvm.StructType.get_literal([i32] * num_words) if num_words > 1 else i32,
        [address.ir_value()],
        f"ld.volatile.global.v4.b32 {{{targets}}}, [$4];" if num_words > 1 else "ld.volatile.global.b32 $0, [$1];",
        ",".join(["=r"] * num_words + ["l"]),
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )
    return [Int32(llvm.extractvalue(i32, loaded, [k])) for k in range(num_words)] if num_words > 1 else [Int32(loaded)]


class Merge:
    def __init__(self, dtype: str, packed: bool, config: LaunchConfig):
        """packed: entries name rows (token * H + head) as in prefill; else a token, and mean its H heads."""
        self.dtype = DTYPES[dtype]
        self.packed = packed
        self.use_pdl = config.use_pdl

    @cute.jit
    def __call__(
        self,
        table: cute.Tensor,  # (rows, 8): the plan, see planner.py and prefill_planner.py
        part: cute.Tensor,  # (rows, PART_ROW) words: see registry.py
        out: cute.Tensor,  # (tokens, H, 512)
        lse: cute.Tensor,  # (tokens, H) float32
        num_parts: Int32,
        grid_x: Int32,
        grid_y: Int32,
        lse_scale: Float32,  # 1 for base 2, ln 2 for base e
        stream,
    ):
        self.kernel(table, part, out, lse, num_parts, lse_scale).launch(
            grid=[grid_x, grid_y, 1],
            block=[32 * NUM_WARPS, 1, 1],
            min_blocks_per_mp=1,
            stream=stream,
            use_pdl=self.use_pdl,
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
        # Both at once, the row in hope that there is one: a dependent load costs 0.5 us.
        num_merges = table[0, 7]
        row0, first, n, rows = self._entry(table, num_parts + y, out)
        if const_expr(self.use_pdl):
            cute.arch.griddepcontrol_launch_dependents()
            cute.arch.griddepcontrol_wait()
        for merge in cutlass.range(y, num_merges, grid_y, unroll=1):
            if merge > y:
                row0, first, n, rows = self._entry(table, num_parts + merge, out)
            group = Int32(1)
            while (group * IN_FLIGHT < n) & (group < NUM_WARPS):
                group = group * 2
            units_at_once = NUM_WARPS // group
            num_units = rows * MERGE_COL_TILES
            for unit0 in cutlass.range(x * units_at_once, num_units, grid_x * units_at_once, unroll=1):
                unit = unit0 + warp // group
                if n == 0:
                    self._empty(out, lse, row0, unit, num_units, lane)
                else:
                    self._unit(part, out, lse, s_o, s_ml, row0, first, n, rows, group, unit, warp, lane, lse_scale)

    def _entry(self, table, at, out):
        """(first row or token, first partial row, pieces, rows) of a list entry."""
        rows = table[at, 3] if self.packed else Int32(cute.size(out, mode=[1]))
        return table[at, 0], table[at, 1], table[at, 2], rows

    def _token_and_head(self, out, row0, row):
        if not self.packed:
            return row0, row
        num_heads = Int32(cute.size(out, mode=[1]))
        token = (row0 + row) // num_heads
        return token, row0 + row - token * num_heads

    def _from_int16(self, pair, half: int):
        """Integer `half` of a pair as float32: its bits under the exponent of 2^23, less the bias (epilogue.py)."""
        bits = Int32(cute.arch.prmt(pair, Int32(0x4B000000), 0x7632 if half else 0x7610))
        return bits.bitcast(Float32) - Float32(INT16_BIAS)

    @cute.jit
    def _empty(self, out, lse, row0, unit, num_units, lane):
        if unit < num_units:
            token, head = self._token_and_head(out, row0, unit // MERGE_COL_TILES)
            col = unit % MERGE_COL_TILES
            zero = cute.make_rmem_tensor(8, self.dtype)
            zero.fill(0.0)
            cute.autovec_copy(zero, cute.local_tile(out[token, head, None], (8,), (col * 32 + lane,)))
            if (lane == 0) & (col == 0):
                lse[token, head] = -Float32.inf

    @cute.jit
    def _unit(self, part, out, lse, s_o, s_ml, row0, first, n, rows, group, unit, warp, lane, lse_scale):
        num_units = rows * MERGE_COL_TILES
        row = unit // MERGE_COL_TILES
        col = unit % MERGE_COL_TILES
        g = warp % group
        words = cute.make_rmem_tensor((4, IN_FLIGHT), Int32)
        acc = cute.make_rmem_tensor(8, Float32)
        other = cute.make_rmem_tensor(8, Float32)
        acc.fill(0.0)
        m = Float32(NEG_BIG)
        total = Float32(0.0)
        if unit < num_units:
            for s0 in cutlass.range(g, n, group * IN_FLIGHT, unroll=1):
                # Past the last piece the last one is read again, for a weight of 0: ptxas issues predicated loads one
                # by one, with a wait for each.
                for i in cutlass.range_constexpr(IN_FLIGHT):
                    at = first + row + cutlass.min(s0 + i * group, n - 1) * rows
                    for k, word in enumerate(_load_in_order(part, at, (col * 32 + lane) * 4, 4)):
                        words[k, i] = word
                # Lane i has the lse and scale of piece i % 8.
                mine = s0 + lane % IN_FLIGHT * group
                at = first + row + cutlass.min(mine, n - 1) * rows
                piece_lse = _load_in_order(part, at, Int32(PART_LSE), 1)[0].bitcast(Float32)
                scale = _load_in_order(part, at, PART_LSE + 1 + col, 1)[0].bitcast(Float32)
                if mine >= n:
                    piece_lse = -Float32.inf
                m_new = piece_lse
                for offset in cutlass.range_constexpr(3):
                    m_new = cute.arch.fmax(m_new, cute.arch.shuffle_sync_bfly(m_new, offset=1 << offset))
                m_new = cute.arch.fmax(m_new, m)
                keep = exp2(m - m_new)
                m = m_new
                weight = exp2(piece_lse - m)
                weights = weight
                for offset in cutlass.range_constexpr(3):
                    weights = weights + cute.arch.shuffle_sync_bfly(weights, offset=1 << offset)
                total = total * keep + weights
                weight = weight * scale
                for k in cutlass.range_constexpr(8):
                    acc[k] = acc[k] * keep
                for i in cutlass.range_constexpr(IN_FLIGHT):
                    w = cute.arch.shuffle_sync(weight, i)
                    for k in cutlass.range_constexpr(8):
                        acc[k] = acc[k] + w * self._from_int16(words[k // 2, i], k % 2)
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
            token, head = self._token_and_head(out, row0, row)
            half = cute.make_rmem_tensor(8, self.dtype)
            for i in cutlass.range_constexpr(8):
                half[i] = (acc[i] * inv).to(self.dtype)
            cute.autovec_copy(half, cute.local_tile(out[token, head, None], (8,), (col * 32 + lane,)))
            if (lane == 0) & (col == 0):
                lse[token, head] = (m + cute.math.log2(total)) * lse_scale
