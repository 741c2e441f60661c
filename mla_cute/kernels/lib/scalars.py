"""Scales of whole tensors: factors of the scores and of the output. The host knows some, others lie on the device.

Sparse attention has a sink per head beside them, likewise on the device.

The host multiplies the numbers it knows (launch arguments in float32). A scale that lies on the device comes as the
address of one float32, which is read here once per item and multiplied in; an address of 0 stands for 1. An absent
scale costs no branch: the load is predicated.
"""

from typing import Protocol

from cutlass import Float32, Int32, Int64
from cutlass.cutlass_dsl import T

from .ptx import asm
from .softmax import exp2

LOG2_E = 1.4426950408889634


class ScalarParams(Protocol):
    """What this file reads of a kernel's `Params`."""

    nope_scale_log2: Float32  # what q_nope . ckv is worth in log2 units, as far as the host knows
    rope_scale_log2: Float32  # likewise q_pe . kpe
    out_scale: Float32  # what a stored ckv is worth in the output, as far as the host knows
    ckv_scale_at: Int64  # addresses of scales on the device
    kpe_scale_at: Int64
    q_scale_at: Int64


def load_scale(address: Int64) -> Float32:
    """The float32 at `address`, 1 where that is 0."""
    text = "{ .reg .pred p; setp.ne.s64 p, $1, 0; mov.f32 $0, 0f3F800000; @p ld.global.f32 $0, [$1]; }"
    return Float32(asm(T.f32(), 1, [address], text, "=f,l", True)[0])


def score_factors(params: ScalarParams, rope_is_e4m3: bool) -> tuple[Float32, Float32]:
    """What q_nope . ckv and q_pe . kpe are worth in log2 units.

    q_scale belongs to the e4m3 queries. Where the rope cache is 16-bit, q_pe is so too and q_scale leaves it alone.
    """
    q_scale = load_scale(params.q_scale_at)
    nope = params.nope_scale_log2 * (load_scale(params.ckv_scale_at) * q_scale)
    rope = load_scale(params.kpe_scale_at)
    if rope_is_e4m3:
        rope = rope * q_scale
    return nope, params.rope_scale_log2 * rope


def output_factor(params: ScalarParams) -> Float32:
    """What a stored ckv is worth in the output."""
    return params.out_scale * load_scale(params.ckv_scale_at)


class SinkParams(Protocol):
    """What `sink_weight` reads of a sparse kernel's `Params`."""

    sink_at: Int64  # address of H float32, 0: there are none
    num_heads: Int32


def sink_weight(params: SinkParams, head, reference) -> Float32:
    """What the sink of `head` adds to a row's sum, whose terms are relative to `reference`, as a power of 2: 0 without
    sinks and past the last head."""
    text = (
        "{ .reg .pred p; setp.ne.s64 p, $1, 0; setp.lt.and.s32 p, $2, $3, p; mov.f32 $0, 0fFF800000;"
        " @p ld.global.f32 $0, [$4]; }"
    )
    at = params.sink_at + Int64(head) * 4
    sink = Float32(asm(T.f32(), 1, [params.sink_at, head, params.num_heads, at], text, "=f,l,r,r,l", True)[0])
    return exp2(sink * LOG2_E - reference)
