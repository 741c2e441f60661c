"""Conversion of a prefill's keys from an FP8 cache to 16 bits, in front of the 16-bit kernel; of e4m3 queries, too.

    row of ckv     chunks of 8 channels, of which lane l has chunk l and, of 512 channels, chunk 32 + l: a load of 8
                   bytes and a store of 16 for each, both without gaps in a warp. A warp has four rows at a time.
    row of kpe     a chunk of 8 for each of 8 lanes (of 32 channels of 4), so that a warp has those of four tokens at
                   once
    rows of q_nope and q_pe    likewise, where q_nope is e4m3

An e4m3 value is exact in 16 bits, and scales of whole tensors are left to the 16-bit kernel. It has one factor for all
of a score, so what the rope part is worth beside the latent part is multiplied into kpe in format "tensor", and into
q_pe beside an e4m3 q_nope. Channel scales are multiplied into ckv: exact where they are powers of two, as those of
format "group" are that this library writes. Every product is rounded once, to nearest even.

Page i of the requests' lists becomes page i of the converted cache, less what lies between the rows of a block table in
front of it. Its page ids are written here, too, in lists like those that they stand for: what was planned from these
holds for them. Of a request's last page only the tokens that it has are written, and of the lists only the pages that
requests have are read. Queries lie one behind the other: all rows that there are.

The steps of all requests go to the warps in turn, so that neither one long request nor many short ones leave warps
without work. Offsets are 64-bit.
"""

import dataclasses

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, Uint32, const_expr
from cutlass.cute.runtime import make_fake_stream

from ..dims import NUM_SCALES
from .keys import CONVERT, FACTS, FIRST, KV_LEN, ConvertKey
from .lib.dtypes import CUTLASS_DTYPES
from .lib.e4m3 import e4m3x4_to_f16
from .lib.fake import fake_tensor, sym64
from .lib.ptx import f16_to_f32, load_global_8, load_global_16, row_address, store_global, to_16bit_pair, unpack_16bit
from .lib.scalars import load_scale

NUM_WARPS = 8
ROWS = 4  # of a step of a warp
CHUNK = 8  # channels
LANES_PER_ROPE = 32 // ROWS


@dataclasses.dataclass(frozen=True)
class Params:
    """What the launcher takes between the number of CTAs and the stream."""

    ckv: cute.Tensor  # (pages, page_size, dims.ckv): e4m3 as bytes
    kpe: cute.Tensor  # (pages, page_size, dims.kpe), as bytes in format "tensor"; without rope ckv, and not read
    scales: cute.Tensor  # (pages, page_size, 1 or 4) in formats token and group; else anything
    ids: cute.Tensor  # (n,): the requests' page ids, in lists that begin at facts[FIRST]
    facts: cute.Tensor  # (FACTS, batch + 1): lengths and first indices of the requests, by the plan
    q_nope: cute.Tensor  # (tokens, H, dims.ckv): e4m3 as bytes; 16-bit queries are not read
    q_pe: cute.Tensor  # (tokens, H, dims.kpe)
    to: cute.Tensor  # (copied pages, page_size, dims.ckv + dims.kpe)
    to_ids: cute.Tensor  # (n,)
    to_q_nope: cute.Tensor  # (tokens, H, dims.ckv)
    to_q_pe: cute.Tensor  # (tokens, H, dims.kpe)
    rope_worth: Float32  # of a q_pe . kpe beside a q_nope . ckv, without what lies on the device
    ckv_scale_at: Int64  # as lib/scalars.py
    kpe_scale_at: Int64
    q_scale_at: Int64
    gap: Int32  # entries of ids between two requests' lists, that are not copied


class Convert:
    name = CONVERT.name

    def __init__(self, key: ConvertKey, config: None):
        del config
        self.dtype = CUTLASS_DTYPES[key.dtype]
        self.dims = key.dims
        self.num_scales = NUM_SCALES[key.kv_format]
        self.kpe_fp8 = key.kv_format == "tensor"
        self.q_fp8 = key.q_fp8
        self.chunks = key.dims.ckv // (32 * CHUNK)  # of a row, that a lane has

    def compile_args(self) -> tuple:
        pages, page, entries, copied, tokens, heads = (cute.sym_int() for _ in range(6))
        ckv_dim, kpe_dim = self.dims
        rope_dim = kpe_dim or ckv_dim
        kpe_dtype = Uint8 if self.kpe_fp8 or not kpe_dim else self.dtype
        q_dtype = Uint8 if self.q_fp8 else self.dtype

        def rows(dtype, a, b, width):
            return fake_tensor(dtype, (a, b, width), (sym64(), sym64(), 1), 16)

        def ids():
            return fake_tensor(Int32, (entries,), (1,), 4)

        scales = ids()
        if self.num_scales:
            scales = fake_tensor(Float32, (pages, page, self.num_scales), (sym64(), sym64(), 1), 4)
        return (
            Int32(1),
            rows(Uint8, pages, page, ckv_dim),
            rows(kpe_dtype, pages, page, rope_dim),
            scales,
            ids(),
            fake_tensor(Int32, (FACTS, cute.sym_int()), (sym64(), 1), 4),
            rows(q_dtype, tokens, heads, ckv_dim),
            rows(self.dtype, tokens, heads, rope_dim),
            rows(self.dtype, copied, page, ckv_dim + kpe_dim),
            ids(),
            rows(self.dtype, tokens, heads, ckv_dim),
            rows(self.dtype, tokens, heads, rope_dim),
            Float32(1.0),
            *(Int64(0) for _ in range(3)),
            Int32(0),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(self, num_ctas, *args):
        *fields, stream = args
        self.kernel(Params(*fields)).launch(grid=[num_ctas, 1, 1], block=[32 * NUM_WARPS, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, p: Params):
        t, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        lane = t % 32
        warps = ctas * NUM_WARPS
        warp = block * NUM_WARPS + cute.arch.make_warp_uniform(t // 32)
        rope_worth = p.rope_worth * load_scale(p.kpe_scale_at)
        rope_worth = rope_worth / (load_scale(p.ckv_scale_at) * load_scale(p.q_scale_at))
        before = Int32(0)  # the warp whose turn it is at the request's first step
        for b in cutlass.range(cute.size(p.facts, mode=[1]) - 1, unroll=1):
            kv_len, first = p.facts[KV_LEN, b], p.facts[FIRST, b]
            steps = (kv_len + ROWS - 1) // ROWS
            turn = warp - before
            turn = turn if turn >= 0 else turn + warps
            for step in cutlass.range(turn, steps, warps, unroll=1):
                self._convert_tokens(p, rope_worth, kv_len, first, first - b * p.gap, step * ROWS, lane)
            before = (before + steps) % warps
        if const_expr(self.q_fp8):
            rows = Int32(cute.size(p.q_nope, mode=[0]) * cute.size(p.q_nope, mode=[1]))
            for row in cutlass.range(warp * ROWS, rows, warps * ROWS, unroll=1):
                self._convert_queries(p, rope_worth, rows, row, lane)

    @cute.jit
    def _convert_tokens(self, p: Params, rope_worth, kv_len, first, to_first, token0, lane):
        """Tokens token0 .. token0 + 3 of a request: 8 lanes for each look its page up, and have its rope. Its list
        begins at `first`, its copied pages at `to_first`."""
        own = token0 + lane // LANES_PER_ROPE
        token = cutlass.min(own, kv_len - 1)
        page_size = Uint32(cute.size(p.ckv, mode=[1]))
        page_index = Int32(Uint32(token) // page_size)
        row = token - page_index * Int32(page_size)
        page = p.ids[first + page_index]
        # A request longer than its row of the table, which no call may have, gets wrong results, not foreign memory.
        to_page = cutlass.min(to_first + page_index, cute.size(p.to, mode=[0]) - 1)
        chunk = lane % LANES_PER_ROPE
        if const_expr(self.dims.kpe > 0):
            # Past a narrow rope's last chunk its first ones are loaded again.
            source = row_address(p.kpe, page, row)
            if const_expr(self.kpe_fp8):
                rope = load_global_8(source + Int64(chunk % (self.dims.kpe // CHUNK) * CHUNK))
            else:
                rope = load_global_16(source + Int64(chunk % (self.dims.kpe // CHUNK) * (CHUNK * 2)))
        words, scales, targets = [], [], []
        for n in cutlass.range_constexpr(ROWS):
            n_page, n_row, n_to = (cute.arch.shuffle_sync(x, offset=n * LANES_PER_ROPE) for x in (page, row, to_page))
            words += self._load_row(row_address(p.ckv, n_page, n_row), lane)
            targets.append(row_address(p.to, n_to, n_row))
            for i in cutlass.range_constexpr(self.chunks):
                scale = None
                if const_expr(self.num_scales > 0):
                    # 128 channels are the chunks of 16 lanes.
                    scale = p.scales[n_page, n_row, (lane // 16 + 2 * i) if const_expr(self.num_scales == 4) else 0]
                scales.append(scale)
        for n in cutlass.range_constexpr(ROWS):
            mine = slice(n * self.chunks, (n + 1) * self.chunks)
            self._store_row(targets[n], words[mine], scales[mine], token0 + n < kv_len, lane)
        if const_expr(self.dims.kpe > 0 and self.kpe_fp8):
            rope = self._converted(rope, rope_worth)
        if own < kv_len:
            if const_expr(self.dims.kpe > 0):
                if chunk < self.dims.kpe // CHUNK:
                    store_global(row_address(p.to, to_page, row) + Int64((self.dims.ckv + chunk * CHUNK) * 2), rope)
            if (chunk == 0) & (row == 0):
                p.to_ids[first + page_index] = to_page

    @cute.jit
    def _convert_queries(self, p: Params, rope_worth, rows, row0, lane):
        """Rows row0 .. row0 + 3 of q_nope and q_pe, a row being a head of a token."""
        heads = Int32(cute.size(p.q_nope, mode=[1]))
        words, targets = [], []
        for n in cutlass.range_constexpr(ROWS):
            row = cutlass.min(row0 + n, rows - 1)
            token = row // heads
            words += self._load_row(row_address(p.q_nope, token, row - token * heads), lane)
            targets.append(row_address(p.to_q_nope, token, row - token * heads))
        row = cutlass.min(row0 + lane // LANES_PER_ROPE, rows - 1)
        token = row // heads
        at = Int64(lane % LANES_PER_ROPE * (CHUNK * 2))
        rope = load_global_16(row_address(p.q_pe, token, row - token * heads) + at)
        for n in cutlass.range_constexpr(ROWS):
            mine = slice(n * self.chunks, (n + 1) * self.chunks)
            self._store_row(targets[n], words[mine], [None] * self.chunks, row0 + n < rows, lane)
        pairs = [unpack_16bit(word, self.dtype) for word in rope]
        rope = [to_16bit_pair(*(x * rope_worth for x in pair), self.dtype) for pair in pairs]
        if row0 + lane // LANES_PER_ROPE < rows:
            store_global(row_address(p.to_q_pe, token, row - token * heads) + at, rope)

    def _load_row(self, source: Int64, lane) -> list:
        """The lane's chunks of a row of ckv or q_nope, two words each."""
        return [load_global_8(source + Int64(lane * CHUNK), i * 32 * CHUNK) for i in range(self.chunks)]

    @cute.jit
    def _store_row(self, target, chunks, scales, is_there, lane):
        for i in cutlass.range_constexpr(self.chunks):
            converted = self._converted(chunks[i], scales[i])
            if is_there:
                store_global(target + Int64((lane + 32 * i) * (CHUNK * 2)), converted)

    def _converted(self, words: list, scale) -> list:
        """Words of four e4m3, times a scale if there is one, as words of two 16-bit floats."""
        pairs = [f16_to_f32(pair) for word in words for pair in e4m3x4_to_f16(word)]
        if scale is not None:
            pairs = [[x * scale for x in pair] for pair in pairs]
        return [to_16bit_pair(*pair, self.dtype) for pair in pairs]
