"""e4m3 in registers: conversions to and from it, and the unit that channel scales are counted in."""

from cutlass import Float32, Int32, Uint32
from cutlass.cutlass_dsl import T

from .ptx import asm, f16_to_f32

E4M3_MAX = 448.0  # the largest e4m3: there are no infinities


def e4m3x4_to_f16(x: Uint32) -> tuple[Uint32, Uint32]:
    """The four e4m3 of a word as float16, exactly: bytes 0 and 1 in the first word, bytes 2 and 3 in the second."""
    text = "{ .reg .b16 lo, hi; mov.b32 {lo, hi}, $2; cvt.rn.f16x2.e4m3x2 $0, lo; cvt.rn.f16x2.e4m3x2 $1, hi; }"
    low, high = asm(T.i32(), 2, [x], text, "=r,=r,r", False)
    return Uint32(low), Uint32(high)


def transpose_pairs(x: Uint32) -> Uint32:
    """Bytes (a0 b0 a1 b1) -> (a0 a1 b0 b1)."""
    return Uint32(asm(T.i32(), 1, [x], "prmt.b32 $0, $1, $1, 0x3120;", "=r,r", False)[0])


def to_e4m3x4(x: list[Float32]) -> Uint32:
    """Four float32 as a word of e4m3, rounded to nearest even; beyond 448 they saturate, NaN becomes 0x7f.

    The pairs are joined by prmt: from a `mov.b32 {pair, pair}` ptxas 13.1 makes a packing conversion that merges, and
    where a pair is converted back it reads it before it is made.
    """
    text = (
        "{ .reg .b16 h, z; .reg .b32 a, b; mov.b16 z, 0;"
        " cvt.rn.satfinite.e4m3x2.f32 h, $2, $1; mov.b32 a, {h, z};"
        " cvt.rn.satfinite.e4m3x2.f32 h, $4, $3; mov.b32 b, {h, z};"
        " prmt.b32 $0, a, b, 0x5410; }"
    )
    return Uint32(asm(T.i32(), 1, x, text, "=r,f,f,f,f", False)[0])


def split_e4m3(x: list[Float32]) -> tuple[Uint32, Uint32]:
    """Four float32 within +-448 as (high, low) words of four e4m3: x = high + low to 8 significant bits.

    low keeps what rounding x to high lost, in steps of at least 2^-9.
    """
    high = to_e4m3x4(x)
    rounded = [v for pair in e4m3x4_to_f16(high) for v in f16_to_f32(pair)]
    return high, to_e4m3x4([a - b for a, b in zip(x, rounded, strict=True)])


def unit_below(largest: Float32) -> Float32:
    """The unit that channel scales are counted in: the power of two of which `largest`, the largest scale, is 16 to 32.

    Channel scales are any float32, and P V runs in float16, which holds 65504 at most and loses digits below 6e-5. So
    each scale enters it as scale / unit, multiplied into P or into V, and the output is multiplied by the unit at its
    end. 16 to 32 units are few enough that their products with P or V do not overflow, even when a later scale of up
    to 64 units comes. They are more than the 1 to 2 units that a power of two just below `largest` would give: a token
    whose scale is 1e-4 of the largest still has 1.6e-3 units, so that its small values keep their digits.
    """
    return Int32(largest.bitcast(Int32) & Int32(0x7F800000)).bitcast(Float32) * Float32(1.0 / 16.0)
