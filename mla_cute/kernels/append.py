"""Append of new tokens to a paged latent cache: quantise and scatter in one kernel, a warp per token.

    ckv of a token    1024 bytes; with an FP8 cache lane l has channels 16 l .. 16 l + 15: two loads of 16 bytes, one
                      store of 16 bytes, and 8 lanes hold a group of 128 channels. A copy takes chunks l and 32 + l.
                      Of 512 bytes, 256 channels, lanes 0 to 15 store with an FP8 cache, and a copy takes chunk l.
    kpe of a token    128 bytes, a chunk of 16 for each of 8 lanes; 64 bytes for each of 4. Without rope kpe and
                      kpe_cache are any tensors, of which nothing is read or written.

Lanes that have nothing to store load what others load.

The arithmetic is quant.py's, bit for bit on every input but the sign of a NaN: scale = amax / 448 (1 where amax is 0,
infinite or NaN), x / scale, conversion to nearest even with saturation at +-448. The largest magnitude is found in the
bits of the 16-bit floats, whose order as integers puts NaN above infinity, as torch's amax does.

    tensor, token    IEEE divisions. A reciprocal would move one scale in three and, with it, values that lie on a
                     rounding boundary.
    group            scales are rounded up to powers of two, in the bits of amax. 448 is 1.75 * 2^8, so the exponent is
                     amax's less 8, and one more where amax has a mantissa above 1.75; at least 1 as it is stored,
                     2^-126. The reciprocals are float32 too (2^-120 to 2^126), so a product with one is the quotient
                     to the last bit, subnormal ones included.

Loads do not wait for the slot, so that the chain is two round trips to memory and not three. Offsets are 64-bit; a
token's number and the sizes of the caches are 32-bit, which mla_cute/append.py checks.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, Uint32, Uint64, const_expr
from cutlass.cute.runtime import make_fake_stream
from cutlass.cutlass_dsl import T

from .keys import APPEND, AppendKey
from .lib.dtypes import CUTLASS_DTYPES
from .lib.e4m3 import E4M3_MAX, to_e4m3x4
from .lib.fake import fake_tensor, sym64
from .lib.ptx import asm, divide, load_global_16, row_address, store_global, unpack_16bit

NUM_WARPS = 4
LANES_PER_GROUP = {"token": 32, "group": 8}


def multiply(a, b):
    """IEEE multiplication with subnormals, whatever the compiler's options."""
    return Float32(asm(T.f32(), 1, [a, b], "mul.rn.f32 $0, $1, $2;", "=f,f,f", False)[0])


def power_of_two_scale(amax):
    """The least power of two that is at least amax / 448 and 2^-126, of a positive finite amax."""
    exponent = ((amax.bitcast(Int32) + Int32(0x1FFFFF)) >> 23) - 8
    return Int32(cutlass.max(exponent, Int32(1)) << 23).bitcast(Float32)


def reciprocal_of_power_of_two(x):
    """1 / x, of x from 2^-126 to 2^126."""
    return Int32(Int32(0x7F000000) - x.bitcast(Int32)).bitcast(Float32)


def max_u16x2(a, b):
    return Uint32(asm(T.i32(), 1, [a, b], "max.u16x2 $0, $1, $2;", "=r,r,r", False)[0])


class Append:
    name = APPEND.name

    def __init__(self, key: AppendKey, config: None):
        del config
        self.key = key
        self.dtype = CUTLASS_DTYPES[key.dtype]
        self.ckv_fp8 = key.kv_format != ""
        self.kpe_fp8 = key.kv_format == "tensor"
        self.has_scales = key.kv_format in LANES_PER_GROUP
        # 16-byte chunks that a copy stores, or lanes that store 16 e4m3 channels; and likewise of the rope part.
        self.ckv_chunks = key.dims.ckv // (16 if self.ckv_fp8 else 8)
        self.kpe_chunks = key.dims.kpe // 8

    def compile_args(self) -> tuple:
        # Strides promise nothing: those of dimensions of size 1 are arbitrary. The others are multiples of 16 bytes.
        n, pages, page = (cute.sym_int() for _ in range(3))

        def rows(width):
            return fake_tensor(self.dtype, (n, width), (sym64(), 1), 16)

        def cache(width, fp8):
            return fake_tensor(Uint8 if fp8 else self.dtype, (pages, page, width), (sym64(), sym64(), 1), 16)

        slots = fake_tensor(
            *((Int64, (n,), (sym64(),), 8) if self.key.slots == "int64" else (Int32, (n,), (sym64(),), 4))
        )
        scales = slots
        if self.has_scales:
            width = 32 // LANES_PER_GROUP[self.key.kv_format]
            scales = fake_tensor(Float32, (pages, page, width), (sym64(), sym64(), sym64()), 4)
        ckv, kpe = self.key.dims
        return (
            rows(ckv),
            rows(kpe or ckv),
            cache(ckv, self.ckv_fp8),
            cache(kpe or ckv, self.kpe_fp8),
            scales,
            slots,
            Float32(1.0),
            Float32(1.0),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(
        self,
        ckv: cute.Tensor,  # (n, dims.ckv)
        kpe: cute.Tensor,  # (n, dims.kpe); without rope ckv, and kpe_cache is ckv_cache
        ckv_cache: cute.Tensor,  # (pages, page_size, dims.ckv): e4m3 as bytes
        kpe_cache: cute.Tensor,  # (pages, page_size, dims.kpe)
        scales: cute.Tensor,  # (pages, page_size, 1 or 4) with formats token and group; else anything
        slots: cute.Tensor,  # (n,)
        ckv_scale: Float32,
        kpe_scale: Float32,
        stream,
    ):
        self.kernel(ckv, kpe, ckv_cache, kpe_cache, scales, slots, ckv_scale, kpe_scale).launch(
            grid=[cute.ceil_div(cute.size(slots), NUM_WARPS), 1, 1], block=[32 * NUM_WARPS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        ckv: cute.Tensor,
        kpe: cute.Tensor,
        ckv_cache: cute.Tensor,
        kpe_cache: cute.Tensor,
        scales: cute.Tensor,
        slots: cute.Tensor,
        ckv_scale: Float32,
        kpe_scale: Float32,
    ):
        t, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        lane = t % 32
        token = block * NUM_WARPS + cute.arch.make_warp_uniform(t // 32)
        if token < cute.size(slots):
            self._token(ckv, kpe, ckv_cache, kpe_cache, scales, slots, ckv_scale, kpe_scale, token, lane)

    def _row(self, x, token):
        """Address of a token's row."""
        return x.iterator.toint() + Int64(token) * Int64(x.stride[0]) * (x.element_type.width // 8)

    def _quantise(self, words: list, scale) -> list:
        """Words of two 16-bit floats, to half as many words of e4m3."""
        values = [value for word in words for value in unpack_16bit(word, self.dtype)]
        if const_expr(self.key.kv_format == "group"):
            inverse = reciprocal_of_power_of_two(scale)
            x = [multiply(value, inverse) for value in values]
        else:
            x = [divide(value, scale) for value in values]
        return [to_e4m3x4(x[i : i + 4]) for i in range(0, len(x), 4)]

    @cute.jit
    def _scale_of(self, words, lanes: cutlass.Constexpr):
        """The scale for amax over `lanes` neighbouring lanes, 1 where amax is 0, infinite or NaN."""
        magnitudes = [word & Uint32(0x7FFF7FFF) for word in words]
        while const_expr(len(magnitudes) > 1):
            magnitudes = [max_u16x2(a, b) for a, b in zip(magnitudes[::2], magnitudes[1::2], strict=True)]
        largest = magnitudes[0]
        for i in cutlass.range_constexpr(lanes.bit_length() - 1):
            largest = max_u16x2(largest, Uint32(cute.arch.shuffle_sync_bfly(largest, offset=1 << i)))
        largest = max_u16x2(largest, largest >> 16)
        amax, _ = unpack_16bit(largest, self.dtype)
        scale = Float32(1.0)
        if (amax > 0.0) & (amax < Float32.inf):
            if const_expr(self.key.kv_format == "group"):
                scale = power_of_two_scale(amax)
            else:
                scale = divide(amax, Float32(E4M3_MAX))
        return scale

    @cute.jit
    def _token(self, ckv, kpe, ckv_cache, kpe_cache, scales, slots, ckv_scale, kpe_scale, token, lane):
        slot = Int64(slots[token])
        source = self._row(ckv, token)
        own = lane
        if const_expr(self.ckv_chunks < 32):
            own = lane % self.ckv_chunks
        if const_expr(self.ckv_fp8):
            source = source + Int64(own * 32)
            words = load_global_16(source) + load_global_16(source, 16)
        else:
            source = source + Int64(own * 16)
            words = load_global_16(source)
            if const_expr(self.ckv_chunks > 32):
                words = words + load_global_16(source, 512)
        if const_expr(self.kpe_chunks > 0):
            chunk = lane % self.kpe_chunks
            rope = load_global_16(self._row(kpe, token) + Int64(chunk * 16))
        scale = ckv_scale
        if const_expr(self.has_scales):
            scale = self._scale_of(words, LANES_PER_GROUP[self.key.kv_format])
        if const_expr(self.ckv_fp8):
            words = self._quantise(words, scale)
        if const_expr(self.kpe_fp8 and self.kpe_chunks > 0):
            rope = self._quantise(rope, kpe_scale)
        if slot >= 0:
            page_size = Uint64(cute.size(ckv_cache, mode=[1]))
            page_index = Uint64(slot) // page_size
            row = Int64(Uint64(slot) - page_index * page_size)
            page = Int64(page_index)
            target = row_address(ckv_cache, page, row) + Int64(own * 16)
            if const_expr(self.ckv_chunks < 32):
                if lane < self.ckv_chunks:
                    store_global(target, words)
            else:
                store_global(target, words[:4])
            if const_expr(self.ckv_chunks > 32):
                store_global(target + 512, words[4:])
            if const_expr(self.kpe_chunks > 0):
                if lane < self.kpe_chunks:
                    store_global(row_address(kpe_cache, page, row) + Int64(chunk * 4 * len(rope)), rope)
            if const_expr(self.has_scales):
                lanes = LANES_PER_GROUP[self.key.kv_format]
                if lane % lanes == 0:
                    group = Int64(lane // lanes) * Int64(scales.stride[2]) * 4
                    store_global(row_address(scales, page, row) + group, [scale.bitcast(Int32)])
