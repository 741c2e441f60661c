"""The kernel of :mod:`._queries`. Importing it needs Triton."""

import triton
import triton.language as tl


@triton.jit
def round_queries(  # type: ignore[no-untyped-def]
    q_nope, q_pe, out, rows, heads, nope_token, nope_head, pe_token, pe_head,
    CKV: tl.constexpr, KPE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out [rows, CKV + KPE] of q_nope and q_pe, whose rows lie by token and head. A program has ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    token, head = row // heads, row % heads
    begin = (row * (CKV + KPE))[:, None]
    column = tl.arange(0, CKV)[None, :]
    values = tl.load(q_nope + (token * nope_token + head * nope_head)[:, None] + column, inside)
    values = tl.clamp(values.to(tl.float32), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + begin + column, values.to(tl.float8e4nv), inside)
    column = tl.arange(0, KPE)[None, :]
    values = tl.load(q_pe + (token * pe_token + head * pe_head)[:, None] + column, inside)
    values = tl.clamp(values.to(tl.float32), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + begin + CKV + column, values.to(tl.float8e4nv), inside)
