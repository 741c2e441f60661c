"""Merge of split partials: out = sum_s 2^(lse_s - m) o_s / sum_s 2^(lse_s - m), lse = m + log2(sum_s 2^(lse_s - m)).

The plan lists what was not written by one item: requests (decode, their H rows) or row tiles (prefill, up to 64 rows).
Grid (x, y), at most 2 CTAs of 8 warps per SM: row y of the grid walks the list's entries y, y + grid_y, ...; its CTAs
share the entry's tasks. A step without splits costs one wave of CTAs that read a zero.

    task       (row, 256, 128 or 64 of its columns), 8 columns per lane, of a warp; from 33 pieces on of all 8 warps.
               Of outputs of 256 columns 128 or 64, so that no task has columns of both halves, whose integers are
               worth different things.
               A warp's pieces are dealt to 1, 2 or 4 groups of lanes: at most IN_FLIGHT each, all in one trip to memory
    order      of the additions: a function of n alone, so the bits are the same whatever the batch and the grid

A sink (sparse) adds to the sum that divides, not to lse.
n = 0: rows that see no key, zeros and -inf.  n = 1: not listed, the main kernel has written the output.

The plan is read before griddepcontrol.wait: the main kernel triggers this one only after its own wait, so the planner
in front of it has completed. Everything after the wait is one round trip to the partials: lse and o together.
"""

import dataclasses

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr, memory
from cutlass.cutlass_dsl import T

from ..dims import INT16_BIAS, PART_LSE, PART_ROW
from .keys import MAX_PARTS, LaunchConfig
from .lib import scalars
from .lib.dtypes import CUTLASS_DTYPES
from .lib.ptx import asm
from .lib.softmax import LOWEST, exp2

NUM_WARPS_LOG = 3
NUM_WARPS = 1 << NUM_WARPS_LOG
# Pieces of a group of lanes; of a warp there are up to four times as many.
IN_FLIGHT = 8
SUM_WORDS = 256 + 4
SUM_MAX, SUM_WEIGHTS = 256, 257

assert MAX_PARTS <= 4 * NUM_WARPS * IN_FLIGHT


@dataclasses.dataclass(frozen=True)
class MergeParams:
    table: cute.Tensor  # (rows, 8): the plan, see planner/decode.py and planner/prefill.py
    part: cute.Tensor  # (rows, PART_ROW) words: see dims.py
    out: cute.Tensor  # (tokens, H, 512)
    lse: cute.Tensor  # (tokens, H) float32
    num_parts: Int32
    lse_scale: Float32  # 1 for base 2, ln 2 for base e
    sink_at: Int64 | None  # sparse: see step.py

    @property
    def num_heads(self) -> Int32:
        return Int32(cute.size(self.out, mode=[1]))


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a list entry says, and how its pieces are dealt."""

    row0: Int32  # first row (prefill) or token (decode)
    first: Int32  # first partial row
    n: Int32  # pieces
    rows: Int32
    half_log: Int32  # logarithm of the tasks that share half a row
    lane_log: Int32  # of the groups of lanes of a warp
    warp_log: Int32  # and of the warps of a task: 0 or 3

    @property
    def tasks(self):
        return self.rows << (self.half_log + 1)


def _load_in_order(part, row, word) -> list:
    """Four words of a partial row from word `word` on. Volatile, so that ptxas neither moves a load down to its first
    use nor what the last loads are needed for up between the first: 1 us for 8 pieces."""
    address = part.iterator.toint() + (Int64(row) * PART_ROW + Int64(word)) * 4
    text = "ld.volatile.global.v4.b32 {$0, $1, $2, $3}, [$4];"
    return [Int32(x) for x in asm(T.i32(), 4, [address], text, "=r,=r,=r,=r,l", True)]


def _warp_max(x):
    """As integers, whose order is that of floats once the magnitudes of negative ones are turned."""
    text = (
        "{ .reg .b32 s, t; shr.s32 s, $1, 31; and.b32 s, s, 0x7fffffff; xor.b32 t, $1, s; redux.sync.max.s32 t, t, -1;"
        " shr.s32 s, t, 31; and.b32 s, s, 0x7fffffff; xor.b32 $0, t, s; }"
    )
    return Int32(asm(T.i32(), 1, [x.bitcast(Int32)], text, "=r,r", True)[0]).bitcast(Float32)


class Merge:
    def __init__(self, dtype: str, packed: bool, config: LaunchConfig, sparse: bool, columns: int):
        """packed: entries name rows (token * H + head) as in prefill; else a token, and mean its H heads.
        columns: of the output, 512 or 256."""
        self.dtype = CUTLASS_DTYPES[dtype]
        self.columns = columns
        self.packed = packed
        self.sparse = sparse
        self.use_pdl = config.use_pdl

    def launch(self, args) -> None:
        """`args`: the step's (step.py)."""
        params = MergeParams(args.table, args.part, args.out, args.lse, args.num_parts, args.lse_scale, args.sink_at)
        self.kernel(params).launch(
            grid=[args.merge_x, args.merge_y, 1],
            block=[32 * NUM_WARPS, 1, 1],
            min_blocks_per_mp=1,
            stream=args.stream,
            use_pdl=self.use_pdl,
        )

    @cute.kernel
    def kernel(self, p: MergeParams):
        t, _, _ = cute.arch.thread_idx()
        x, y, _ = cute.arch.block_idx()
        grid_x, grid_y, _ = cute.arch.grid_dim()
        warp = cute.arch.make_warp_uniform(t // 32)
        lane = t % 32
        # What each warp has of a task of all: sums of up to 256 columns, m, l; whole words of 16 bytes.
        s_sums = memory.SmemAllocator().allocate_tensor(Float32, cute.make_layout((SUM_WORDS, NUM_WARPS)), 16)
        # Both at once, the row in hope that there is one: a dependent load costs 0.5 us.
        num_merges = p.table[0, 7]
        row0, first, n, rows = self._read(p, p.num_parts + y)
        if const_expr(self.use_pdl):
            cute.arch.griddepcontrol_launch_dependents()
            cute.arch.griddepcontrol_wait()
        for merge in cutlass.range(y, num_merges, grid_y, unroll=1):
            if merge > y:
                row0, first, n, rows = self._read(p, p.num_parts + merge)
            warp_log = Int32(0)
            if n > 4 * IN_FLIGHT:
                warp_log = Int32(NUM_WARPS_LOG)
            of_warp = (n + (1 << warp_log) - 1) >> warp_log
            lane_log = Int32(0 if self.columns == 512 else 1)
            if of_warp > IN_FLIGHT:
                lane_log = Int32(1)
            if of_warp > 2 * IN_FLIGHT:
                lane_log = Int32(2)
            half_log = lane_log if const_expr(self.columns == 512) else lane_log - 1
            entry = Entry(row0, first, n, rows, half_log, lane_log, warp_log)
            at_once = NUM_WARPS >> warp_log
            for task0 in cutlass.range(x * at_once, entry.tasks, grid_x * at_once, unroll=1):
                task = task0 + (warp >> warp_log)
                if n == 0:
                    self._empty(p, entry, task, lane)
                else:
                    self._task(p, s_sums, entry, task, warp, lane)

    def _read(self, p, at):
        """(row0, first, n, rows) of the list entry in table row `at`."""
        rows = p.table[at, 3] if self.packed else p.num_heads
        return p.table[at, 0], p.table[at, 1], p.table[at, 2], rows

    def _token_and_head(self, p, entry, row):
        if not self.packed:
            return entry.row0, row
        token = (entry.row0 + row) // p.num_heads
        return token, entry.row0 + row - token * p.num_heads

    def _from_int16(self, pair, half: int):
        """Integer `half` of a pair as float32: its bits under the exponent of 2^23, less the bias."""
        bits = Int32(cute.arch.prmt(pair, Int32(0x4B000000), 0x7632 if half else 0x7610))
        return bits.bitcast(Float32) - Float32(INT16_BIAS)

    @cute.jit
    def _empty(self, p, entry, task, lane):
        if task < entry.tasks:
            token, head = self._token_and_head(p, entry, task // 2)
            half = task % 2
            zero = cute.make_rmem_tensor(8, self.dtype)
            zero.fill(0.0)
            if const_expr(self.columns == 512):
                cute.autovec_copy(zero, cute.local_tile(p.out[token, head, None], (8,), (half * 32 + lane,)))
            else:
                if lane < 16:
                    cute.autovec_copy(zero, cute.local_tile(p.out[token, head, None], (8,), (half * 16 + lane,)))
            if (lane == 0) & (half == 0):
                p.lse[token, head] = -Float32.inf

    @cute.jit
    def _task(self, p, s_sums, entry, task, warp, lane):
        n, lane_log, warp_log = entry.n, entry.lane_log, entry.warp_log
        width_log = 5 - lane_log
        groups = Int32(1) << (lane_log + warp_log)
        group = ((warp & ((1 << warp_log) - 1)) << lane_log) + (lane >> width_log)
        # Warps without a task read the last one's, and store nothing.
        own = cutlass.min(task, entry.tasks - 1)
        row = own >> (entry.half_log + 1)
        segment = own & ((2 << entry.half_log) - 1)
        unit = (segment << width_log) + (lane & ((1 << width_log) - 1))  # of 8 columns
        words = cute.make_rmem_tensor((4, IN_FLIGHT), Int32)
        # Before the words: weights take longer. Lanes i, i + 8, ... of a group have lse and scales of its piece i.
        mine = group + lane % IN_FLIGHT * groups
        stats = _load_in_order(p.part, self._partial_row(entry, row, mine), PART_LSE)
        self._load(p, words, entry, row, group, groups, unit, 0)
        if n > IN_FLIGHT // 2:
            self._load(p, words, entry, row, group, groups, unit, IN_FLIGHT // 2)
        piece_lse, *scales = (x.bitcast(Float32) for x in stats)
        scale = cutlass.select_(segment >> entry.half_log == 0, scales[0], scales[1])
        if mine >= n:
            piece_lse = -Float32.inf
        m = _warp_max(cute.arch.fmax(piece_lse, Float32(LOWEST)))
        weight = exp2(piece_lse - m)
        total = weight
        for offset in cutlass.range_constexpr(3):
            total = total + cute.arch.shuffle_sync_bfly(total, offset=1 << offset)
        weight = weight * scale
        acc = cute.make_rmem_tensor(8, Float32)
        acc.fill(0.0)
        self._add(acc, words, weight, lane >> width_log << width_log, 0)
        if n > IN_FLIGHT // 2:
            self._add(acc, words, weight, lane >> width_log << width_log, IN_FLIGHT // 2)
        for i in cutlass.range_constexpr(2):
            if lane_log > i:  # groups are 16, or 16 and 8 lanes apart
                total = total + cute.arch.shuffle_sync_bfly(total, offset=16 >> i)
                for k in cutlass.range_constexpr(8):
                    acc[k] = acc[k] + cute.arch.shuffle_sync_bfly(acc[k], offset=16 >> i)
        token, head = self._token_and_head(p, entry, row)
        if warp_log > 0:
            self._join(p, s_sums, acc, m, total, lane_log, (segment, token, head), warp, lane)
        elif (group == 0) & (task < entry.tasks):
            inverse = self._inverse(p, head, m, total)
            half = cute.make_rmem_tensor(8, self.dtype)
            for k in cutlass.range_constexpr(8):
                half[k] = (acc[k] * inverse).to(self.dtype)
            cute.autovec_copy(half, cute.local_tile(p.out[token, head, None], (8,), (unit,)))
            if unit == 0:
                self._put_lse(p, token, head, m, total)

    @cute.jit
    def _inverse(self, p, head, m, total):
        """Every score of a row may be -inf: 0 and -inf then, not NaN. `total` is relative to m."""
        inverse = Float32(0.0)
        if total > 0.0:
            if const_expr(self.sparse):
                total = total + scalars.sink_weight(p, head, m)
            inverse = 1.0 / total
        return inverse

    def _put_lse(self, p, token, head, m, total) -> None:
        p.lse[token, head] = (m + cute.math.log2(total)) * p.lse_scale

    def _partial_row(self, entry, row, piece):
        """Past the last piece the last one is read again, for a weight of 0: ptxas issues predicated loads one by one,
        with a wait for each."""
        return entry.first + row + cutlass.min(piece, entry.n - 1) * entry.rows

    def _load(self, p, words, entry, row, group, groups, unit, begin: int) -> None:
        """Half of the pieces of the lane's group."""
        for i in range(begin, begin + IN_FLIGHT // 2):
            at = self._partial_row(entry, row, group + i * groups)
            for k, word in enumerate(_load_in_order(p.part, at, unit * 4)):
                words[k, i] = word

    def _add(self, acc, words, weight, lane0, begin: int) -> None:
        """The same pieces, weighted; lane0 + i has the weight of piece i."""
        for i in range(begin, begin + IN_FLIGHT // 2):
            w = cute.arch.shuffle_sync(weight, lane0 + i)
            for k in range(8):
                acc[k] = acc[k] + w * self._from_int16(words[k // 2, i], k % 2)

    @cute.jit
    def _join(self, p, s_sums, acc, m, total, lane_log, task, warp, lane):
        """The sums of all warps of the CTA, which have a task together: a column for each thread."""
        segment, token, head = task
        columns = Int32(256) >> lane_log
        if lane * 8 < columns:
            cute.autovec_copy(acc, cute.local_tile(s_sums[None, warp], (8,), (lane,)))
        if lane == 0:
            s_sums[SUM_MAX, warp] = m
            s_sums[SUM_WEIGHTS, warp] = total
        cute.arch.sync_threads()
        # Lanes w, w + 8, ... have the weight of warp w.
        their_max = s_sums[SUM_MAX, lane % NUM_WARPS]
        m_all = _warp_max(their_max)
        weight = exp2(their_max - m_all)
        total_all = weight * s_sums[SUM_WEIGHTS, lane % NUM_WARPS]
        for offset in cutlass.range_constexpr(NUM_WARPS_LOG):
            total_all = total_all + cute.arch.shuffle_sync_bfly(total_all, offset=1 << offset)
        weight = weight * self._inverse(p, head, m_all, total_all)
        column = warp * 32 + lane
        if column < columns:
            x = Float32(0.0)
            for w in cutlass.range_constexpr(NUM_WARPS):
                x = x + cute.arch.shuffle_sync(weight, w) * s_sums[column, w]
            p.out[token, head, segment * columns + column] = x.to(self.dtype)
            if segment * columns + column == 0:
                self._put_lse(p, token, head, m_all, total_all)
        cute.arch.sync_threads()
