"""Tiles of format "group" in the tile16 kernel where keys are gathered: rows as they lie in memory.

lib/whole_rows.py copies a token's row to shared memory in one stretch of GROUP_ROW_BYTES. That is an odd number of
16-byte chunks, so the eight rows of a ldmatrix lie in different banks without a swizzle, and all of a row is at
constant offsets from its first byte. Rows of no token are zeros where PV or scales are read from.
"""

from cutlass import Float32

from ...dims import GROUP_DIM, GROUP_ROPE_AT, GROUP_ROW_BYTES, GROUP_SCALES_AT, HeadDims
from ..lib import ptx
from ..lib.whole_rows import SLOT_BYTES
from .params import Fragments, Smem
from .tiles_fp8 import Fp8Tiles


class WholeRowTiles(Fp8Tiles):
    whole_rows = True

    def __init__(self, dtype: type, dims: HeadDims, sparse: bool, kv_format: str, q_fp8: bool):
        super().__init__(dtype, dims, sparse, kv_format, q_fp8, by_tma=False)
        self.tile_bytes = SLOT_BYTES

    def _row(self, smem: Smem, slot, row):
        return smem.k_address + slot * SLOT_BYTES + row * GROUP_ROW_BYTES

    def column_scales(self, smem: Smem, regs: Fragments, slot) -> list[list]:
        at = self._row(smem, slot, regs.w * 8 + regs.l4 * 2)
        of_tokens = [ptx.load_shared_16(at, i * GROUP_ROW_BYTES + GROUP_SCALES_AT) for i in range(2)]
        return [[words[g].bitcast(Float32) for words in of_tokens] for g in range(self.num_scales)]

    def _k_words(self, smem: Smem, slot, row, r8, chunk):
        at = self._row(smem, slot, row) + chunk * 16
        return lambda sub, half: ptx.ldmatrix_x4(at, sub * GROUP_DIM + half * 64, False)

    def _rope_words(self, smem: Smem, slot, row, r8, chunk):
        at = self._row(smem, slot, row) + chunk * 16
        return lambda half: ptx.ldmatrix_x4(at, GROUP_ROPE_AT + half * 64, False)

    def _v_words(self, smem: Smem, regs: Fragments, slot, row, r8, chunk):
        at = self._row(smem, slot, row) + regs.w * self.own_channels + chunk * 16
        return lambda kk, c: ptx.ldmatrix_x4(at, kk * 16 * GROUP_ROW_BYTES + c * 32, True)

    def clear_tail(self, smem: Smem, regs: Fragments, slot, left):
        """Nothing to do: rows of no token are zeros already."""
