"""What the schedule asks of a kind of tile: how Q, K and V of one kind of cache become operands of mma.sync.

A third kind of tile is a subclass of `Tiles`, and a factory at the end of setup.py that gives it to the kernel.

Who owns what is the same for every kind. Consumer warp w (0 to 7), lane l, l4 = l % 4, of heads of 512 + 64:

    Q   rows are the CTA's 16 heads of one request; every warp needs all 576 channels, 36 steps of 16 (32 nope, 4 rope)
    S   warp w: tokens 8 w .. 8 w + 7 of the tile; a thread: rows l / 4 and l / 4 + 8, its warp's tokens 2 l4, 2 l4 + 1
    P   one word of two tokens per thread and row, in shared memory in the order of mma's A fragments:
        [parity][p_tiles][step of 16 tokens][lane][4 words]
    O   warp w: channels 64 w .. 64 w + 63, in eight accumulators of 16 rows x 8 channels; which of the 64 channels
        accumulator t and element e of a thread are is up to the kind of tile, which undoes it in `quad`

Of 256 channels Q has half as many steps in front of the rope's, and a warp 32 channels of O in four accumulators. Of a
rope of 32 channels there are two steps, which read the first half of its rows, without one there are none.
"""

import abc
from collections.abc import Callable

from cutlass import Int32, Uint32

from ...dims import NUM_SCALES, HeadDims
from ..lib import ptx
from .params import NUM_WARPS, Fragments, Params, Smem


class Tiles(abc.ABC):
    """Constants of a kind of tile, and what the consumers call. Methods that issue ldmatrix, mma or shuffles are called
    by all lanes of a warp."""

    dtype: type  # cutlass.BFloat16 or cutlass.Float16: of outputs, of queries and rope where they are not e4m3
    dims: HeadDims
    nope_steps: int  # steps of Q of 16 channels: the latent ones, and then the rope's
    rope_steps: int
    own_channels: int  # of O, that a warp has
    sparse: bool  # each query has a list of tokens, in which there may be none at any place
    kv_format: str  # "" or a name of dims.KV_FORMATS
    q_fp8: bool
    num_scales: int  # float32 scales that a token has
    p_tiles: int  # copies of P: one for each scale, at least one
    whole_rows: bool = False  # the ring holds rows as lib/whole_rows.py copies them
    tile_bytes: int  # of ckv in a slot of the ring, of whole rows all of them
    num_stages: int  # slots of the ring, as many as shared memory has room for
    q_steps: int  # the first steps of Q, which a warp keeps in registers for the whole item
    q_kept_bytes: int  # of shared memory for the other steps of Q, for the whole item
    q_transient_bytes: int  # of shared memory that the first steps pass through; P takes it afterwards

    def __init__(self, dtype: type, dims: HeadDims, sparse: bool, kv_format: str, q_fp8: bool):
        self.dtype, self.dims, self.sparse, self.kv_format, self.q_fp8 = dtype, dims, sparse, kv_format, q_fp8
        self.nope_steps, self.rope_steps, self.own_channels = dims.ckv // 16, dims.kpe // 16, dims.ckv // NUM_WARPS
        self.num_scales = NUM_SCALES[kv_format]
        self.p_tiles = max(1, self.num_scales)

    # -------------------------------------------------------------------- an item's beginning

    @abc.abstractmethod
    def load_q(self, params: Params, smem: Smem, regs: Fragments, request, head0) -> None:
        """Q of the item: steps 0 .. q_steps - 1 to regs.rQ, the others to smem.q_address; rows past H repeat the last.

        Called by all consumers when each of them has ended the last item, so that Q may take P's place at once. They
        pass Bar.ITEM behind their last read there, so that P may be written after the call. smem.sRow is filled here,
        if `scores` reads it.
        """

    # -------------------------------------------------------------------- a tile

    @abc.abstractmethod
    def scores(self, params: Params, smem: Smem, regs: Fragments, slot, phase, left) -> None:
        """QK: waits for the tile in ring slot `slot` (mbarrier phase `phase`), and puts this thread's scores into
        regs.rNext, in log2 units; -inf where `sees` says so."""

    def sees(self, smem: Smem, regs: Fragments, slot, left) -> Callable:
        """From 0 or 1, which of this thread's two tokens, to whether there is one to see in its place."""
        if self.sparse:
            # The 16 rows of a producer warp are the tokens of two consumer warps. Warp and lane are made from the
            # thread index: what follows from `regs` would be kept over all tiles, for which there are no registers.
            t = Uint32(ptx.thread_index())
            word = ptx.load_shared_word(Int32(smem.sChosen.iterator.toint()) + slot * 16 + Int32(t >> 6) * 4)
            bits = word >> ((t >> 2 & 8) + (t & 3) * 2)
            return lambda i: (bits & Uint32(1 << i)) != Uint32(0)
        token = regs.w * 8 + regs.l4 * 2
        return lambda i: token + i < left

    def column_scales(self, smem: Smem, regs: Fragments, slot) -> list[list]:
        """Of each group of channels the scales of this thread's two tokens. Only with num_scales > 0. They are
        0 where there is no token."""
        raise NotImplementedError

    @abc.abstractmethod
    def to_p_pair(self, low, high):
        """P of two tokens, float32, as a word of the type that PV multiplies in."""

    @abc.abstractmethod
    def clear_tail(self, smem: Smem, regs: Fragments, slot, left) -> None:
        """Zeros in this warp's channels of the tokens from `left` on, where NaN may lie: 0 NaN would be NaN."""

    @abc.abstractmethod
    def multiply_v(self, smem: Smem, regs: Fragments, slot, parity, acc: list) -> None:
        """PV: adds P of parity `parity` times this warp's channels of the tile to `acc`, a list of four values for each
        8 of its channels, in the order of regs.rO, which it replaces."""

    # -------------------------------------------------------------------- an item's end

    @abc.abstractmethod
    def output_factor(self, params: Params, regs: Fragments):
        """What regs.rO, divided by the row sums of P, is multiplied by to be the output."""

    @abc.abstractmethod
    def gather_quads(self, regs: Fragments) -> None:
        """Trades elements of regs.rO between lanes, so that a thread has four consecutive channels of every 16."""

    @abc.abstractmethod
    def quad(self, regs: Fragments, c: int, r: int) -> list:
        """After `gather_quads`: the four consecutive channels that this thread has of its warp's channels 16 c ..
        16 c + 15, row r (0: regs.row, 1: regs.row + 8)."""

    @abc.abstractmethod
    def quad_bytes(self, regs: Fragments):
        """How far behind the first of its 16 channels a quad begins in an output row, in bytes (a channel has two)."""
