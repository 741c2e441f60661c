"""How references and unit are raised in the FP8 row-tile kernel: the rare part of a pair, in a branch of its own.

P is made relative to a reference per row and channel scales are counted in a unit, both of which were chosen in an
earlier pair of the item (schedule.py). Now and then a pair holds a P or a scale that float16 cannot hold so. Then the
threads that found it ask (`_ask_to_raise`), and behind the barrier at which both consumers wait for each other's P
anyway, both read the word that was asked with: either both raise or none does.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, const_expr

from ..lib import e4m3, softmax
from ..lib.paged import TILE_N
from ..lib.row_map import Word
from ..lib.softmax import MAX_P, MAX_SCALED_P, MAX_UNITS
from .math import PairMath
from .params import Bar, Fragments, Pair, Smem

# A reference that has not been chosen, -0.0: it changes no score. Sparse alone; else an item's first pair chooses.
UNCHOSEN_BITS = Uint32(0x80000000)


def unchosen() -> Float32:
    """From its bits: the DSL keeps constants by value, and hands out the 0.0 that it has for -0.0."""
    return UNCHOSEN_BITS.bitcast(Float32)


class References(PairMath):
    """Asking for new references, and raising them: methods of Tile64Fp8. `pair` is the pair at hand."""

    def _out_of_range(self, smem: Smem, regs: Fragments, pair: Pair, totals: list, slot: Int32):
        """This thread asks for new references: a P or a scale of its own tile would leave float16's range, or the pair
        is its item's first, whose references are not chosen yet. `totals` are its shares of P's row sums, which
        no P exceeds."""
        most = self._most()
        first = [self._is_first(smem, regs, pair, r) for r in range(self.own_rows)]
        asks = totals[0] > most
        for r in range(1, self.own_rows):
            asks = asks | (totals[r] > most)
        asks = asks | first[0]
        if self.loader.sparse:
            for r in range(1, self.own_rows):
                asks = asks | first[r]
        if self.num_scales > 0:
            asks = asks | self._scale_out_of_range(smem, regs, slot)
        return asks

    def _most(self) -> float:
        """Of a thread's share of a row sum, where P is in range."""
        return MAX_SCALED_P if self.kv_format == "token" else MAX_P

    def _is_first(self, smem: Smem, regs: Fragments, pair: Pair, r: int):
        """No reference of this thread's row `r` has been chosen. That is so in the first pair of an item: all of the
        item's tokens lie from it on. A sparse one may hold no token, so there a reference is UNCHOSEN until it is."""
        if self.loader.sparse:
            return regs.rRef[r].bitcast(Uint32) == UNCHOSEN_BITS
        return pair.valid[0] == smem.sItem[pair.item_slot, Word.KV_END] - smem.sItem[pair.item_slot, Word.KV_BEGIN]

    def _scale_out_of_range(self, smem: Smem, regs: Fragments, slot):
        """One of the scales of the consumer's own tile that this thread looks at is more than MAX_UNITS units."""
        place = regs.t % TILE_N
        largest = smem.sScales[place, regs.t // TILE_N % self.num_scales, slot]
        if self.num_scales > 2:
            largest = cute.arch.fmax(largest, smem.sScales[place, regs.t // TILE_N + 2, slot])
        return largest > regs.rUnit[0] * MAX_UNITS

    @cute.jit
    def _ask_to_raise(self, smem: Smem, pair: Pair, asks):
        """Before Bar.P. Pairs take turns at two words: a warp may still have to read the last pair's."""
        if asks:
            smem.sRaise[pair.tile // 2 % 2] = pair.tile + 1

    @cute.jit
    def _raise_if_asked(self, smem: Smem, regs: Fragments, pair: Pair, sums, slot, wg):
        """Behind Bar.P; `sums` as in `_raise_references`."""
        if smem.sRaise[pair.tile // 2 % 2] == pair.tile + 1:
            first = tuple(self._is_first(smem, regs, pair, r) for r in range(self.own_rows))
            self._raise_references(smem, regs, pair, sums, first, slot, wg)

    @cute.jit
    def _raise_references(self, smem: Smem, regs: Fragments, pair: Pair, sums, first, slot, wg):
        """Both consumers together raise the references of rows whose P is out of range to their largest scores of the
        tiles where it is, and the unit to the pair's largest scale. P of the pair and `sums`, this thread's shares of
        its row sums, are made again; what was added up before, O and rL, is multiplied to the new references. In an
        item's first pair nothing was added up and the references begin at 0, so they may fall there, too.

        Other rows keep their references and with them all their bits: what a row becomes does not depend on the rows
        beside it, which may be another request's."""
        rows = (regs.row, regs.row + 8)
        largest = [softmax.row_max(regs.S, r, 16) for r in range(self.own_rows)]
        for r in cutlass.range_constexpr(self.own_rows):
            asks = (softmax.quad_any(sums[r] > self._most(), regs.lane) != 0) | first[r]
            largest[r] = largest[r] if asks else -Float32.inf
            softmax.put_row(smem.sMax[wg, None], rows[r], regs.lane, largest[r])
        Bar.MAX.sync()
        unit_factor = self._raise_unit(smem, regs, pair)
        for r in cutlass.range_constexpr(self.own_rows):
            # Scores in S are relative to the old reference already, so their maximum is what is added to it.
            both = cute.arch.fmax(largest[r], smem.sMax[1 - wg, rows[r]])
            up = cute.arch.fmax(both, Float32(0.0))
            if first[r]:
                # A row that sees no key of the pair keeps 0, or UNCHOSEN.
                up = unchosen() if const_expr(self.loader.sparse) else Float32(0.0)
                if both > -Float32.inf:
                    up = both
            ref = regs.rRef[r] + up
            if const_expr(self.loader.sparse):
                if (both > -Float32.inf) & (ref == Float32(0.0)):
                    ref = Float32(0.0)  # and not -0.0, which is UNCHOSEN
            regs.rRef[r] = ref
            # At most 1: where the reference falls, O and the sums are 0, which an infinite factor would make NaN.
            factor = softmax.exp2(cutlass.min(-up, Float32(0.0)))
            if wg == 0:
                softmax.put_row(smem.sFactor, rows[r], regs.lane, factor * unit_factor)
            regs.rL[r] = regs.rL[r] * factor
            for n in cutlass.range_constexpr(16):
                regs.S[r, n] = regs.S[r, n] - up
        again = self._exp(smem, regs, slot)
        for r in cutlass.range_constexpr(self.own_rows):
            sums[r] = again[r]
        self._put_p(smem, regs, slot, wg)
        Bar.P.sync()
        for j in cutlass.range_constexpr(self.tile_rows // 8):
            for e in cutlass.range_constexpr(2):
                scale = smem.sFactor[8 * j + regs.lane % 4 * 2 + e]
                for m in cutlass.range_constexpr(self.blocks):
                    regs.rO[m][4 * j + e] = regs.rO[m][4 * j + e] * scale
                    regs.rO[m][4 * j + 2 + e] = regs.rO[m][4 * j + 2 + e] * scale

    @cute.jit
    def _raise_unit(self, smem: Smem, regs: Fragments, pair: Pair):
        """Raise the unit if a scale of the pair is more than MAX_UNITS units; returns what O is multiplied by."""
        factor = Float32(1.0)
        if const_expr(self.num_scales > 0):
            largest = self._largest_scale(smem, regs, pair)
            for offset in cutlass.range_constexpr(5):
                largest = cute.arch.fmax(largest, cute.arch.shuffle_sync_bfly(largest, offset=1 << offset))
            if largest > regs.rUnit[0] * MAX_UNITS:
                unit = e4m3.unit_below(largest)
                factor = regs.rUnit[0] / unit
                regs.rUnit[0] = unit
        return factor

    @cute.jit
    def _largest_scale(self, smem: Smem, regs: Fragments, pair: Pair):
        """The largest scale of the tokens of both tiles that this lane looks at."""
        largest = Float32(0.0)
        for i in cutlass.range_constexpr(2):
            for h in cutlass.range_constexpr(2):
                for g in cutlass.range_constexpr(self.num_scales):
                    largest = cute.arch.fmax(largest, smem.sScales[regs.lane + 32 * h, g, pair.slots[i]])
        return largest
