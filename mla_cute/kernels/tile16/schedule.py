"""tile16: 16 query rows (heads of one token) on mma.sync, nothing padded. The schedule, and the code that runs it.

    S = Q K^T, O += P V on m16n8k16: 16-bit inputs, float32 accumulators

wgmma would pad 16 heads to its 64 rows. Over an FP8 cache that takes longer than the loads: here e4m3 is converted to
float16 exactly, in registers; Q (under a power of two per row) and P are float16, so nothing is lost beyond the cache's
own rounding (tiles_fp8.py). Over a 16-bit cache it is a matter of latency: a tile is half of a pair, there is less
code, and no copy of P waits for another warpgroup (tiles_16bit.py).

More heads are row tiles of 16, a CTA each, which find the keys in L2: for steps so small that their time is latency.

Roles. One CTA per SM, persistent over the planner's items:

    warps 0..7    consumers, `Consumer` below. Warp w does of every tile of 64 tokens
                  QK   S[16 rows, tokens 8 w .. 8 w + 7] over all 576 channels; Q is in registers for the whole item,
                       as far as those reach; K comes by ldmatrix
                  PV   O[16 rows, channels 64 w .. 64 w + 63]; V is K's first 512 channels, by transposing ldmatrix
    warps 8..11   producers (lib/ring.py): tiles from the paged cache into a ring of `num_stages` slots

A warp has 8 tokens of P and needs all 64 for PV, so P goes to the other warps through shared memory, in the order of
mma's A fragments. It has two places, for even and odd tiles (`parity`).

An item, in every consumer warp:

    Q to registers, QK(0)
    for tile i:
        softmax(i)   `_softmax`: P(i), relative to the references that hold so far, to shared memory; whether it is out
                     of range; arrive at p[parity]
        QK(i + 1)    `tiles.scores`, if there is a next tile: the exchange of P hides behind it
        agree(i)     `_agree`: wait for p[parity], which says that all warps' P(i) is there. If it was out of range in
                     any warp, all warps together raise references and unit and write P(i) again
        PV(i)        `_pv`; then the slot goes back to the producers
    epilogue         epilogue.py: O / l, or partial rows

Row maxima are not exchanged tile by tile: P is relative to references that every warp has already, and a reference
cancels in O / l and in the log-sum-exp. Warps exchange their maxima in `_raise_references` alone: in the first tile of
an item, and where some P, or a scale that P is multiplied by, has become so large that float16 might not hold it
(MAX_P, MAX_SCALED_P and MAX_UNITS in lib/softmax.py). Exchanging them for every tile took 155.7 us in a proof of
concept where this takes 147.0 (docs/performance.md).

    mbarrier      filled by                                   waited for by
    full[slot]    the producers: a tile has arrived           every consumer warp before QK
    empty[slot]   a consumer warp after its PV                the producers before they refill the slot
    p[parity]     a consumer warp: its P(i) and flag lie      every consumer warp before PV(i)
                  in shared memory

P(i + 2) takes the place of P(i), and no barrier of its own says that P(i) has been read: a warp writes P(i + 2) behind
its wait for p of i + 1, where every warp arrives behind its PV(i). The flags are safe in the same way.

params.py has the arrivals that complete each mbarrier, and the two named barriers (`Bar`) at which consumers meet in
`_raise_references` and at an item's beginning and end. setup.py has registers and shared memory.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from ..lib import barriers, e4m3, ptx, softmax
from ..lib.paged import TILE_N
from ..lib.ring import RingMbarriers
from ..lib.row_map import HeadRows, Word
from ..lib.softmax import MAX_P, MAX_SCALED_P, MAX_UNITS
from .epilogue import Epilogue
from .params import (
    LOOP_HEAD0,
    LOOP_ITEMS,
    LOOP_PART_ROW,
    LOOP_REQUEST,
    LOOP_TABLE_ROW,
    NUM_WARPS,
    P_WORDS,
    Bar,
    Fragments,
    Params,
    Smem,
    make_fragments,
)
from .tiles import Tiles

# The unit of scales (`Fragments.rUnit`) that an item begins with. It is so small that the scales of the first tile are
# out of its range and set the unit.
FIRST_UNIT = 2.0**-100


class Consumer:
    """The consumer warps' work. Arguments that come again and again:

    slot      of the ring, that the tile lies in
    phase     of the ring's mbarriers: it turns when `slot` returns to 0
    parity    of the tile's number, counted over all items of the CTA
    p_phase   of p's mbarriers: it turns when `parity` returns to 0
    left      tokens of the item from the tile at hand on; from token `left` of the tile on there is nothing to see
    """

    tiles: Tiles
    rows: HeadRows  # how many items a part has
    mbars: RingMbarriers
    epilogue: Epilogue

    def __init__(self, tiles: Tiles, rows: HeadRows, mbars: RingMbarriers):
        self.tiles, self.rows, self.mbars, self.epilogue = tiles, rows, mbars, Epilogue(tiles)

    # ------------------------------------------------------------------ a tile

    @cute.jit
    def _softmax(self, smem: Smem, regs: Fragments, slot, parity):
        """P of this warp's tokens to shared memory, and whether other references are needed, for all warps to read."""
        out_of_range = self._write_p(smem, regs, slot, parity)
        any_out_of_range = cute.arch.vote_any_sync(out_of_range | (regs.first[0] != 0))
        flag = Int32(0)
        if any_out_of_range:
            flag = Int32(1)
        if regs.lane == 0:
            smem.sFlags[regs.w, parity] = flag
        cute.arch.sync_warp()
        barriers.arrive_once_per_warp(smem.mbar + self.mbars.p + parity)

    def _write_p(self, smem: Smem, regs: Fragments, slot, parity):
        """P = 2^(rS - rRef) to shared memory, a copy per scale group times scale / unit; its row sums to rSums.

        Returns whether P, or a scale counted in units, is out of the range in which their product fits float16."""
        e = [softmax.exp2(regs.rS[j] - regs.rRef[j // 2]) for j in range(4)]
        for r in range(2):
            regs.rSums[r] = e[2 * r] + e[2 * r + 1]
        most = MAX_SCALED_P if self.tiles.num_scales else MAX_P
        out_of_range = (regs.rSums[0] > most) | (regs.rSums[1] > most)
        at = self._p_address(smem, regs, parity)
        inverse = cute.arch.rcp_approx(regs.rUnit[0])
        of_groups = self.tiles.column_scales(smem, regs, slot) if self.tiles.num_scales else []
        for g in range(self.tiles.p_tiles):
            x = e
            if self.tiles.num_scales:
                scales = of_groups[g]
                out_of_range = out_of_range | (cute.arch.fmax(*scales) > regs.rUnit[0] * MAX_UNITS)
                x = [e[j] * (scales[j % 2] * inverse) for j in range(4)]
            words = [self.tiles.to_p_pair(x[2 * r], x[2 * r + 1]) for r in range(2)]
            ptx.store_shared(at, words, g * P_WORDS * 4)
        return out_of_range

    def _p_address(self, smem: Smem, regs: Fragments, parity):
        """Where this thread's two words of P go: 0 and 1 (even warps) or 2 and 3 of its lane in step w / 2."""
        return (
            smem.p_address
            + (parity * self.tiles.p_tiles * P_WORDS + regs.w // 2 * 128 + regs.lane * 4 + regs.w % 2 * 2) * 4
        )

    @cute.jit
    def _agree(self, smem: Smem, regs: Fragments, slot, parity, p_phase):
        """Behind it all warps' P of the tile is in shared memory, relative to the references in rRef, which are the
        same in all warps, and counted in rL."""
        cute.arch.mbarrier_wait(smem.mbar + self.mbars.p + parity, p_phase)
        flags = smem.sFlags[0, parity]
        for w in cutlass.range_constexpr(NUM_WARPS - 1):
            flags = flags | smem.sFlags[w + 1, parity]
        if flags != 0:
            self._raise_references(smem, regs, slot, parity)
        for r in cutlass.range_constexpr(2):
            regs.rL[r] = regs.rL[r] + regs.rSums[r]

    @cute.jit
    def _raise_references(self, smem: Smem, regs: Fragments, slot, parity):
        """By all consumers: references rise to the tile's row maxima, and the unit to its largest scale if that is out
        of range; O and row sums follow them, and P is written again. In an item's first tile references may also fall.
        """
        for r in cutlass.range_constexpr(2):
            mx = softmax.quad_max(cute.arch.fmax(regs.rS[2 * r], regs.rS[2 * r + 1]))
            if regs.l4 == 0:
                smem.sMax[regs.row + 8 * r, regs.w] = mx
        self._put_largest_scale(smem, regs, slot)
        Bar.REFERENCES.sync()
        keep = Float32(1.0)
        if const_expr(self.tiles.num_scales > 0):
            largest = smem.sMaxScale[0]
            for w in cutlass.range_constexpr(NUM_WARPS - 1):
                largest = cute.arch.fmax(largest, smem.sMaxScale[w + 1])
            if largest > regs.rUnit[0] * MAX_UNITS:
                unit = e4m3.unit_below(largest)
                keep = regs.rUnit[0] / unit
                regs.rUnit[0] = unit
        highest = -Float32.inf
        for r in cutlass.range_constexpr(2):
            mx = smem.sMax[regs.row + 8 * r, 0]
            for w in cutlass.range_constexpr(NUM_WARPS - 1):
                mx = cute.arch.fmax(mx, smem.sMax[regs.row + 8 * r, w + 1])
            if const_expr(self.tiles.sparse):
                highest = cute.arch.fmax(highest, mx)
            ref = cute.arch.fmax(regs.rRef[r], mx)
            if regs.first[0] != 0:
                # The 0 that an item begins with is nobody's maximum. A row that sees no key of the tile keeps it.
                ref = regs.rRef[r]
                if mx > -Float32.inf:
                    ref = mx
            # O and the sums are 0 where a reference falls. An infinite factor would make them NaN, so it is at most 1.
            factor = softmax.exp2(cutlass.min(regs.rRef[r] - ref, Float32(0.0)))
            regs.rRef[r] = ref
            regs.rL[r] = regs.rL[r] * factor
            for t in cutlass.range_constexpr(self.tiles.own_channels // 8):
                for e in cutlass.range_constexpr(2):
                    regs.rO[t * 4 + 2 * r + e] = regs.rO[t * 4 + 2 * r + e] * (factor * keep)
        if const_expr(self.tiles.sparse):
            # A sparse item's first tile may hold no token; all rows see the same ones.
            if highest > -Float32.inf:
                regs.first[0] = Int32(0)
        else:
            regs.first[0] = Int32(0)
        self._write_p(smem, regs, slot, parity)
        Bar.REFERENCES.sync()

    @cute.jit
    def _put_largest_scale(self, smem: Smem, regs: Fragments, slot):
        """The largest scale of this warp's tokens to sMaxScale, where tokens have scales."""
        if const_expr(self.tiles.num_scales > 0):
            largest = Float32(0.0)
            of_groups = self.tiles.column_scales(smem, regs, slot)
            for g in cutlass.range_constexpr(self.tiles.num_scales):
                largest = cute.arch.fmax(largest, cute.arch.fmax(*of_groups[g]))
            largest = softmax.quad_max(largest)
            if regs.lane == 0:
                smem.sMaxScale[regs.w] = largest

    @cute.jit
    def _pv(self, smem: Smem, regs: Fragments, slot, parity, left):
        """O += P V in this warp's channels; then the slot is the producers' again."""
        # Tokens past kv_end have P = 0, but what lies there may be NaN. The sparse gather writes zeros there.
        if const_expr(not self.tiles.sparse):
            self.tiles.clear_tail(smem, regs, slot, left)
        accumulators = self.tiles.own_channels // 8
        acc = [[regs.rO[t * 4 + j] for j in range(4)] for t in range(accumulators)]
        self.tiles.multiply_v(smem, regs, slot, parity, acc)
        for t in cutlass.range_constexpr(accumulators):
            for j in cutlass.range_constexpr(4):
                regs.rO[t * 4 + j] = acc[t][j]
        cute.arch.sync_warp()
        barriers.arrive_once_per_warp(smem.mbar + self.mbars.empty + slot)

    def _take_next_scores(self, regs: Fragments) -> None:
        """The next tile is the one at hand now."""
        for i in range(4):
            regs.rS[i] = regs.rNext[i]

    # ------------------------------------------------------------------ the items

    @cute.jit
    def consume(self, params: Params, smem: Smem, part, head0, w, lane):
        """All items of part `part`, heads head0 .. head0 + 15, in consumer warp w."""
        regs = make_fragments(w, lane, self.tiles.q_steps, self.tiles.own_channels)
        # What only an item's beginning or end needs is kept in shared memory. In registers it would live through the
        # loop over tiles, which has none to spare: the gathers of 16-bit caches and of format "group" then spill 8
        # bytes. Each warp writes and reads words of its own, so no barrier is needed.
        smem.sLoop[LOOP_ITEMS, w] = self.rows.num_items(params, part)
        smem.sLoop[LOOP_TABLE_ROW, w] = part  # The part's own row is its first item, and says where the others are.
        smem.sLoop[LOOP_HEAD0, w] = head0
        slot = Int32(0)
        phase = Int32(0)
        parity = Int32(0)
        p_phase = Int32(0)
        it = Int32(0)
        while it < smem.sLoop[LOOP_ITEMS, w]:
            table_row = smem.sLoop[LOOP_TABLE_ROW, w] + it
            kv_begin = params.mTable[table_row, Word.KV_BEGIN]
            kv_end = params.mTable[table_row, Word.KV_END]
            request = params.mTable[table_row, Word.REQUEST]
            smem.sLoop[LOOP_REQUEST, w] = request
            smem.sLoop[LOOP_PART_ROW, w] = params.mTable[table_row, Word.PARTIAL_ROW]
            if it == 0:
                smem.sLoop[LOOP_TABLE_ROW, w] = params.mTable[table_row, Word.DECODE_FIRST_ROW]
            left = kv_end - kv_begin
            self.tiles.load_q(params, smem, regs, request, smem.sLoop[LOOP_HEAD0, w])
            regs.rO.fill(0.0)
            regs.rL.fill(0.0)
            regs.rRef.fill(0.0)
            regs.rUnit[0] = Float32(FIRST_UNIT)
            regs.first[0] = Int32(1)
            self.tiles.scores(params, smem, regs, slot, phase, left)
            for _ in cutlass.range(cute.ceil_div(left, TILE_N) - 1, unroll=1):
                self._take_next_scores(regs)
                self._softmax(smem, regs, slot, parity)
                next_slot = slot + 1
                if next_slot == self.tiles.num_stages:
                    next_slot = Int32(0)
                    phase ^= 1
                self.tiles.scores(params, smem, regs, next_slot, phase, left - TILE_N)
                self._agree(smem, regs, slot, parity, p_phase)
                self._pv(smem, regs, slot, parity, left)
                slot = next_slot
                left -= TILE_N
                parity ^= 1
                if parity == 0:
                    p_phase ^= 1
            self._take_next_scores(regs)
            self._softmax(smem, regs, slot, parity)
            self._agree(smem, regs, slot, parity, p_phase)
            self._pv(smem, regs, slot, parity, left)
            slot += 1
            if slot == self.tiles.num_stages:
                slot = Int32(0)
                phase ^= 1
            parity ^= 1
            if parity == 0:
                p_phase ^= 1
            self.epilogue.store(
                params,
                smem,
                regs,
                smem.sLoop[LOOP_REQUEST, w],
                smem.sLoop[LOOP_PART_ROW, w],
                smem.sLoop[LOOP_HEAD0, w],
            )
            it += 1
