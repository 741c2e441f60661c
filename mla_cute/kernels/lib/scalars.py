"""Scales of tensors: factors of the scores and the output, told as numbers, on the device, or partly each.

The host multiplies the numbers it knows (launch arguments in float32). A scale that lies on the device comes as the
address of one float32, which is read here once per item and multiplied in; an address of 0 stands for 1. The address
costs no branch: the load is predicated.
"""

from cutlass import Float32
from cutlass.cutlass_dsl import T

from .ptx import asm


def load_scale(address):
    """The float32 at `address`, 1 where that is 0."""
    text = "{ .reg .pred p; setp.ne.s64 p, $1, 0; mov.f32 $0, 0f3F800000; @p ld.global.f32 $0, [$1]; }"
    return Float32(asm(T.f32(), 1, [address], text, "=f,l", True)[0])


def score_factors(p, rope_is_e4m3: bool) -> tuple:
    """What q_nope . ckv and q_pe . kpe are worth in log2 units. q_scale multiplies queries that are e4m3, and q_pe is
    that where kpe is."""
    q_scale = load_scale(p.q_scale_at)
    nope = p.nope_scale_log2 * (load_scale(p.ckv_scale_at) * q_scale)
    rope = load_scale(p.kpe_scale_at)
    if rope_is_e4m3:
        rope = rope * q_scale
    return nope, p.rope_scale_log2 * rope


def output_factor(p):
    """What a stored ckv is worth in the output."""
    return p.out_scale * load_scale(p.ckv_scale_at)
