"""A producer of K tiles over format "group" that copies rows as they lie in memory, for kernels that read them so.

A row in a slot of the ring is GROUP_ROW_BYTES long (dims.py): 512 e4m3, four scales, 64 16-bit channels of rope, one
behind the other as in DeepSeek-V3.2's caches. That is an odd number of 16-byte chunks, so ldmatrix reads 8 rows without
bank conflicts, unswizzled.

Where a token's parts are one stretch of memory (`are_whole`), a row is one bulk copy, by the copy engine, which leaves
the load units to the consumers. A copy costs the engine some 25 cycles however short it is: 128 x 8192 tokens of 16
heads in pages of one take 193 us, and as three bulk copies a row 280 (docs/performance.md, "Lists of tokens"). So where
the parts lie apart, the latent channels alone are a bulk copy, and the rest is cp.async.

Rows of no token, past the request's end or named -1 in a list, get zeros for latent channels and scales; their rope is
anything, and so are their scores.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32, const_expr

from ...dims import CKV_DIM, GROUP_ROPE_AT, GROUP_ROW_BYTES, GROUP_SCALES_AT
from . import barriers, ptx
from .paged import TILE_N
from .ring import GatherRingLoader, RingMbarriers, RingParams, RingSmem

SLOT_BYTES = TILE_N * GROUP_ROW_BYTES


@cute.jit
def are_whole(ckv: cute.Tensor, kpe: cute.Tensor, scales: cute.Tensor) -> Int32:
    """Host side: 1 where every token's latent channels, scales and rope lie as in a row of GROUP_ROW_BYTES, else 0."""
    base = ckv.iterator.toint()
    whole = (scales.iterator.toint() == base + GROUP_SCALES_AT) & (kpe.iterator.toint() == base + GROUP_ROPE_AT)
    for mode in cutlass.range_constexpr(2):
        # The stride of a dimension of size 1, as that of rows in pages of one token, is any number.
        one = cute.size(ckv, mode=[mode]) == 1
        of_row = Int64(ckv.stride[mode])
        equal = (Int64(scales.stride[mode]) * 4 == of_row) & (Int64(kpe.stride[mode]) * 2 == of_row)
        whole = whole & (one | equal)
    found = Int32(0)
    if whole:
        found = Int32(1)
    return found


class WholeRowLoader:
    """Warp w copies rows 16 w .. 16 w + 15 of a tile; lanes i and i + 16 both look up row i.

    Of `params` it reads `whole`, what `are_whole` found, beside what lib/ring.py's loaders do, of `smem` the address of
    slot 0, `k_address`.

    Args:
        gather: finds the rows.
    """

    full_arrivals = 4  # each warp's; where rows are not whole, its lanes' as well (`arrivals`)

    def __init__(self, gather: GatherRingLoader):
        self.gather, self.sparse, self.look_up = gather, gather.sparse, gather.look_up

    def arrivals(self, params: RingParams) -> Int32:
        """Those that complete a slot's full mbarrier, beside the bytes."""
        return Int32(self.full_arrivals) + (Int32(1) - params.whole) * 128

    @cute.jit
    def fill(self, params: RingParams, smem: RingSmem, page, row, block, kv_end, slot, phase, warp, lane):
        """As `TmaRingLoader.fill`."""
        at = warp * 16 + lane % 16
        page, row = self.gather.row(params, page, row)
        held = page >= 0 if const_expr(self.sparse) else block * TILE_N + at < kv_end
        bits = cute.arch.vote_ballot_sync(held) & 0xFFFF
        full = smem.mbar + RingMbarriers.full + slot
        first = smem.k_address + slot * SLOT_BYTES + warp * (16 * GROUP_ROW_BYTES)
        to = first + lane % 16 * GROUP_ROW_BYTES
        units = page * params.ckv_page_units + row * params.ckv_row_units
        ckv = params.mCkv.iterator.toint() + Int64(Uint32(units)) * Int64(Uint32(params.ckv_unit))
        cute.arch.mbarrier_wait(smem.mbar + RingMbarriers.empty + slot, phase)
        if not held:
            self._clear(to, lane // 16)
        if const_expr(self.sparse):
            if lane == 0:
                smem.sChosen[warp, slot] = bits
        cute.arch.sync_warp()
        if params.whole != 0:
            barriers.expect_tx(full, cute.arch.popc(bits) * GROUP_ROW_BYTES)
            if held & (lane < 16):
                ptx.cp_async_bulk(to, ckv, GROUP_ROW_BYTES, Int32(full.toint()))
        else:
            barriers.expect_tx(full, cute.arch.popc(bits) * CKV_DIM)
            if held & (lane < 16):
                ptx.cp_async_bulk(to, ckv, CKV_DIM, Int32(full.toint()))
                ptx.cp_async_small(to + GROUP_SCALES_AT, ptx.row_address(params.mScales, page, row), 16, Int32(1))
            self._copy_rope(params, first + GROUP_ROPE_AT, page, row, bits, lane)
            cute.arch.cp_async_mbarrier_arrive_noinc(full)

    @cute.jit
    def _clear(self, to, half):
        """Zeros to a row's latent channels and scales, every other chunk of 16 bytes."""
        zero = Uint32(0)
        for chunk in cutlass.range(half, GROUP_ROPE_AT // 16, 2, unroll=1):
            ptx.store_shared(to + chunk * 16, [zero, zero, zero, zero])
        barriers.fence_smem_writes()

    @cute.jit
    def _copy_rope(self, params: RingParams, to, page, row, bits, lane):
        """By eight lanes a row. `to`: of the warp's first row."""
        kpe = page * params.kpe_page_units + row * params.kpe_row_units
        chunk, sub_row = lane % 8, lane // 8
        to = to + sub_row * GROUP_ROW_BYTES + chunk * 16
        base = params.mKpe.iterator.toint() + Int64(chunk * 16)
        for i in cutlass.range_constexpr(4):
            units = cute.arch.shuffle_sync(kpe, 4 * i + sub_row)
            at = base + Int64(Uint32(units)) * Int64(Uint32(params.kpe_unit))
            ptx.cp_async_16_of_bits(to, at, bits >> sub_row, 4 * i, 4 * i * GROUP_ROW_BYTES, 0)
