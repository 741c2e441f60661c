"""One decode step as one host call: the main kernel and the merge kernel behind it."""

import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.runtime import make_fake_stream

from ..config import LaunchConfig
from .fake import fake_step_tensors
from .few_rows_sm90 import FewRowsSm90
from .merge import Merge
from .registry import DECODE, DECODE_FEW, DecodeKey
from .row_map import HeadRows
from .rows_sm90 import RowsSm90


class Decode:
    """Launches RowsSm90, then Merge under programmatic dependent launch. A second host call would cost 6 us."""

    name = DECODE.name

    def __init__(self, key: DecodeKey, config: LaunchConfig):
        self.rows = RowsSm90(key.dtype, key.box_rows, HeadRows(), config)
        self.merge = Merge(key.dtype, False, config)

    def compile_args(self) -> tuple:
        return (
            *fake_step_tensors(self.rows.dtype),
            Int32(1),
            Int32(1),
            Int32(1),
            Float32(1.0),
            Float32(1.0),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(
        self,
        q_nope: cute.Tensor,
        q_pe: cute.Tensor,
        ckv_cache: cute.Tensor,
        kpe_cache: cute.Tensor,
        kv_indices: cute.Tensor,
        table: cute.Tensor,
        part: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        num_parts: Int32,
        merge_x: Int32,
        merge_y: Int32,
        scale_log2: Float32,
        lse_scale: Float32,
        stream,
    ):
        self._main(
            q_nope, q_pe, ckv_cache, kpe_cache, kv_indices, table, out, lse, part, num_parts, scale_log2, lse_scale,
            stream,
        )  # fmt: skip
        self.merge(table, part, out, lse, num_parts, merge_x, merge_y, lse_scale, stream)

    def _main(
        self, q_nope, q_pe, ckv, kpe, kv_indices, table, out, lse, part, num_parts, scale_log2, lse_scale, stream
    ) -> None:
        first_item = Int32(0)  # prefill's
        self.rows(
            q_nope, q_pe, ckv, kpe, kv_indices, table, out, lse, part, num_parts, first_item, scale_log2, lse_scale,
            stream,
        )  # fmt: skip


class DecodeFew(Decode):
    """As Decode, with FewRowsSm90."""

    name = DECODE_FEW.name

    def __init__(self, key: DecodeKey, config: LaunchConfig):
        self.rows = FewRowsSm90(key.dtype, key.box_rows, config)
        self.merge = Merge(key.dtype, False, config)

    def _main(
        self, q_nope, q_pe, ckv, kpe, kv_indices, table, out, lse, part, num_parts, scale_log2, lse_scale, stream
    ) -> None:
        cache_scales, first_item, out_scale, at = None, Int32(0), Float32(1.0), None  # FP8's, prefill's
        self.rows(
            q_nope, q_pe, ckv, kpe, cache_scales, kv_indices, table, out, lse, part, num_parts, first_item, scale_log2,
            scale_log2, out_scale, at, at, at, lse_scale, stream,
        )  # fmt: skip
