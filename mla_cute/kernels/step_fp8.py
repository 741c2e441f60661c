"""One decode or prefill step over an FP8 cache as one host call: the main kernel and the merge kernel behind it."""

import cutlass.cute as cute
from cutlass import Float8E4M3FN, Float32, Int32, Int64, Uint8
from cutlass.cute.runtime import make_fake_stream

from .. import dlpack
from ..config import LaunchConfig
from .fake import fake_tensor, sym64
from .few_rows_sm90 import FewRowsFp8Sm90
from .merge import Merge
from .registry import DECODE_FEW_FP8, DECODE_FP8, PART_ROW, PREFILL_FP8, Fp8Key
from .row_map import HeadRows, PackedRows
from .rows_fp8_params import NUM_SCALES
from .rows_fp8_sm90 import RowsFp8Sm90
from .rows_params import HEAD_DIM_ROPE, HEAD_DIM_V


def _as_bytes(x: cute.Tensor) -> cute.Tensor:
    """An e4m3 tensor as bytes, which the kernels take; others as they are."""
    if x.element_type is not Float8E4M3FN:
        return x
    return cute.make_tensor(cute.recast_ptr(x.iterator, dtype=Uint8), x.layout)


def _fake_tensors(main: RowsFp8Sm90 | FewRowsFp8Sm90) -> tuple:
    """q_nope, q_pe, ckv_cache, kpe_cache, scales, kv_indices, table, part, out and lse."""
    tokens, heads, pages, page = (cute.sym_int() for _ in range(4))
    e4m3 = Float8E4M3FN if dlpack.exports_e4m3() else Uint8
    rope = e4m3 if main.rope_fp8 else main.dtype

    def rows3(dtype, a, b, c):
        step = 128 // dtype.width
        return fake_tensor(dtype, (a, b, c), (sym64(step), sym64(step), 1), 16)

    num_scales = NUM_SCALES[main.kv_format]
    if num_scales == 0:
        scales = fake_tensor(Float32, tuple(cute.sym_int() for _ in range(3)), tuple(sym64() for _ in range(3)), 4)
    else:
        step = 4 if num_scales == 4 else 1
        scales = fake_tensor(Float32, (pages, page, num_scales), (sym64(step), sym64(step), 1), 4 * step)
    return (
        rows3(e4m3 if main.q_fp8 else main.dtype, tokens, heads, HEAD_DIM_V),
        rows3(rope if main.q_fp8 else main.dtype, tokens, heads, HEAD_DIM_ROPE),
        rows3(e4m3, pages, page, HEAD_DIM_V),
        rows3(rope, pages, page, HEAD_DIM_ROPE),
        scales,
        fake_tensor(Int32, (cute.sym_int(),), (1,), 4),
        fake_tensor(Int32, (cute.sym_int(), 8), (8, 1), 16),
        fake_tensor(Float32, (cute.sym_int(), PART_ROW), (PART_ROW, 1), 16),
        rows3(main.dtype, tokens, heads, HEAD_DIM_V),
        fake_tensor(Float32, (tokens, heads), (sym64(), 1), 4),
    )


class _Step:
    rows: RowsFp8Sm90 | FewRowsFp8Sm90
    num_sizes: int

    def compile_args(self) -> tuple:
        return (
            *_fake_tensors(self.rows),
            *(Int32(1) for _ in range(self.num_sizes)),
            *(Float32(1.0) for _ in range(3)),
            *(Int64(0) for _ in range(3)),
            Float32(1.0),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )


class DecodeFp8(_Step):
    """Launches RowsFp8Sm90, then Merge under programmatic dependent launch."""

    name = DECODE_FP8.name
    num_sizes = 3

    def __init__(self, key: Fp8Key, config: LaunchConfig):
        self.rows = RowsFp8Sm90(key.dtype, key.box_rows, key.kv_format, key.q_fp8, HeadRows(), config)
        self.merge = Merge(key.dtype, False, config)

    @cute.jit
    def __call__(
        self,
        q_nope: cute.Tensor,
        q_pe: cute.Tensor,
        ckv_cache: cute.Tensor,
        kpe_cache: cute.Tensor,
        scales: cute.Tensor,
        kv_indices: cute.Tensor,
        table: cute.Tensor,
        part: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        num_parts: Int32,
        merge_x: Int32,
        merge_y: Int32,
        nope_scale_log2: Float32,
        rope_scale_log2: Float32,
        out_scale: Float32,
        ckv_scale_at: Int64,  # addresses of one float32 each, 0: none
        kpe_scale_at: Int64,
        q_scale_at: Int64,
        lse_scale: Float32,
        stream,
    ):
        q_nope, q_pe, ckv_cache, kpe_cache = (_as_bytes(x) for x in (q_nope, q_pe, ckv_cache, kpe_cache))
        self.rows(
            q_nope, q_pe, ckv_cache, kpe_cache, scales, kv_indices, table, out, lse, part, num_parts, Int32(0),
            nope_scale_log2, rope_scale_log2, out_scale, ckv_scale_at, kpe_scale_at, q_scale_at, lse_scale, stream,
        )  # fmt: skip
        self.merge(table, part, out, lse, num_parts, merge_x, merge_y, lse_scale, stream)


class DecodeFewFp8(DecodeFp8):
    """As DecodeFp8, with FewRowsFp8Sm90."""

    name = DECODE_FEW_FP8.name

    def __init__(self, key: Fp8Key, config: LaunchConfig):
        self.rows = FewRowsFp8Sm90(key.dtype, key.box_rows, key.kv_format, key.q_fp8, config)
        self.merge = Merge(key.dtype, False, config)


class PrefillFp8(_Step):
    """As DecodeFp8, over packed (token, head) rows: stride(0) of the queries is H * stride(1)."""

    name = PREFILL_FP8.name
    num_sizes = 4

    def __init__(self, key: Fp8Key, config: LaunchConfig):
        self.rows = RowsFp8Sm90(key.dtype, key.box_rows, key.kv_format, key.q_fp8, PackedRows(), config)
        self.merge = Merge(key.dtype, True, config)

    @cute.jit
    def __call__(
        self,
        q_nope: cute.Tensor,
        q_pe: cute.Tensor,
        ckv_cache: cute.Tensor,
        kpe_cache: cute.Tensor,
        scales: cute.Tensor,
        kv_indices: cute.Tensor,
        table: cute.Tensor,
        part: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        num_parts: Int32,
        max_tiles: Int32,
        merge_x: Int32,
        merge_y: Int32,
        nope_scale_log2: Float32,
        rope_scale_log2: Float32,
        out_scale: Float32,
        ckv_scale_at: Int64,  # addresses of one float32 each, 0: none
        kpe_scale_at: Int64,
        q_scale_at: Int64,
        lse_scale: Float32,
        stream,
    ):
        q_nope, q_pe, ckv_cache, kpe_cache = (_as_bytes(x) for x in (q_nope, q_pe, ckv_cache, kpe_cache))
        self.rows(
            q_nope, q_pe, ckv_cache, kpe_cache, scales, kv_indices, table, out, lse, part, num_parts,
            num_parts + max_tiles, nope_scale_log2, rope_scale_log2, out_scale, ckv_scale_at, kpe_scale_at, q_scale_at,
            lse_scale, stream,
        )  # fmt: skip
        self.merge(table, part, out, lse, num_parts, merge_x, merge_y, lse_scale, stream)
