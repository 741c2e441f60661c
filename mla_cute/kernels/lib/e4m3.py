"""e4m3 in registers: conversions to and from it, and the unit that scales are counted in."""

from cutlass import Float32, Int32, Uint32
from cutlass.cutlass_dsl import T

from .ptx import asm, f16_to_f32

E4M3_MAX = 448.0


def e4m3x4_to_f16(x) -> tuple:
    """(bytes 0 and 1, bytes 2 and 3) as pairs of float16: exact."""
    text = "{ .reg .b16 lo, hi; mov.b32 {lo, hi}, $2; cvt.rn.f16x2.e4m3x2 $0, lo; cvt.rn.f16x2.e4m3x2 $1, hi; }"
    low, high = asm(T.i32(), 2, [x], text, "=r,=r,r", False)
    return Uint32(low), Uint32(high)


def transpose_pairs(x):
    """Bytes (a0 b0 a1 b1) -> (a0 a1 b0 b1)."""
    return Uint32(asm(T.i32(), 1, [x], "prmt.b32 $0, $1, $1, 0x3120;", "=r,r", False)[0])


def to_e4m3x4(x: list):
    """Four float32 as a word of e4m3: to nearest even, beyond 448 saturated, NaN 0x7f.

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


def split_e4m3(x: list) -> tuple:
    """Four float32 within +-448 as (high, low) words of four e4m3: x = high + low to 8 significant bits.

    low keeps what rounding x to high lost, in steps of at least 2^-9.
    """
    high = to_e4m3x4(x)
    rounded = [v for pair in e4m3x4_to_f16(high) for v in f16_to_f32(pair)]
    return high, to_e4m3x4([a - b for a, b in zip(x, rounded, strict=True)])


def unit_below(largest):
    """What scales of up to `largest` are counted in: a power of two, `largest` is 16 to 32 of it. Far from 1, so that
    float16 still holds small values under scales 1e-4 of the largest."""
    return Int32(largest.bitcast(Int32) & Int32(0x7F800000)).bitcast(Float32) * Float32(1.0 / 16.0)
