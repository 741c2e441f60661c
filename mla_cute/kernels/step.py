"""One decode or prefill step as one host call: a main kernel, and the merge kernel behind it.

`StepArgs` is what a step is given, for every kind of cache. The launcher takes it in the order of its fields, less what
the kind of step does not have: `scales`, the scales on the device and two factors are an FP8 cache's, `max_tiles` is
prefill's.
"""

import dataclasses
from typing import Any

import cutlass.cute as cute
from cutlass import Float8E4M3FN, Float32, Int32, Int64, Uint8
from cutlass.cute.runtime import make_fake_stream

from .. import dlpack
from ..dims import NUM_SCALES, PART_ROW
from .keys import LaunchConfig
from .lib.fake import fake_tensor, sym64
from .merge import Merge


@dataclasses.dataclass(frozen=True)
class StepArgs:
    """e4m3 tensors are bytes here: the kernels take them as Uint8. 512 and 64 stand for the key's head dimensions;
    without a rope q_nope and ckv are handed over in the place of q_pe and kpe, and not read as those."""

    q_nope: cute.Tensor  # (tokens, H, 512); decode: one token per request; prefill: stride(0) = H * stride(1)
    q_pe: cute.Tensor  # (tokens, H, 64), likewise
    ckv: cute.Tensor  # (pages, page_size, 512)
    kpe: cute.Tensor  # (pages, page_size, 64)
    scales: cute.Tensor | None  # (pages, page_size, 1 or 4) float32; format "tensor": not read
    kv_indices: cute.Tensor  # (n,) page ids
    table: cute.Tensor  # (rows, 8): the plan, see planner/decode.py and planner/prefill.py
    part: cute.Tensor  # (rows, PART_ROW) 32-bit words, see dims.py
    out: cute.Tensor  # (tokens, H, 512)
    lse: cute.Tensor  # (tokens, H) float32
    num_parts: Int32
    max_tiles: Int32 | None  # prefill: row tiles that the plan has room for
    merge_x: Int32  # grid of the merge kernel
    merge_y: Int32
    nope_scale_log2: Float32  # what q_nope . ckv is worth in log2 units
    rope_scale_log2: Float32  # likewise q_pe . kpe; over a 16-bit cache both are sm_scale * log2(e)
    out_scale: Float32 | None  # what a ckv of the cache is worth in the output
    ckv_scale_at: Int64 | None  # addresses of scales on the device, 0: there is none (lib/scalars.py)
    kpe_scale_at: Int64 | None
    q_scale_at: Int64 | None
    lse_scale: Float32  # 1 for base 2, ln 2 for base e
    sink_at: Int64 | None  # sparse: address of H float32 in units of ln, 0: there are none
    stream: Any

    @property
    def num_heads(self) -> Int32:
        return Int32(cute.size(self.q_nope, mode=[1]))

    @property
    def item_row0(self) -> Int32:
        """Prefill: table row of the first item. A decode part's header says where its items are."""
        return Int32(0) if self.max_tiles is None else self.num_parts + self.max_tiles


class Step:
    """A second host call, for the merge, would cost 6 us; it runs under programmatic dependent launch.

    Args:
        main: the main kernel. It has `dtype`, that of the output; `dims`; `kv_format`, "" over a 16-bit cache, and else
            `q_fp8`; and `launch(args: StepArgs)`.
        packed: rows are (token, head) pairs, as in prefill; else the heads of one token.
        sparse: each query token attends to a list of tokens, and there may be sinks.
        converted: the 16-bit cache was made of an FP8 one, whose scales the main kernel has: of ckv and of the queries.
    """

    def __init__(
        self, main: Any, dtype: str, packed: bool, config: LaunchConfig, sparse: bool = False, converted: bool = False
    ):
        self.main = main
        self.packed = packed
        self.sparse = sparse
        self.converted = converted
        self.merge = Merge(dtype, packed, config, sparse, main.dims.ckv)

    @cute.jit
    def __call__(self, *args):
        call = self._named(args)
        self.main.launch(call)
        self.merge.launch(call)

    def _named(self, args: tuple) -> StepArgs:
        given = dict(zip(self._taken(), args, strict=True))
        if self.main.kv_format:
            for name in ("q_nope", "q_pe", "ckv", "kpe"):
                given[name] = _as_bytes(given[name])
        else:
            absent = {"scales": None, "rope_scale_log2": given["nope_scale_log2"], "out_scale": Float32(1.0)}
            absent |= {"ckv_scale_at": None, "kpe_scale_at": None, "q_scale_at": None}
            given = absent | given
        return StepArgs(**{"max_tiles": None, "sink_at": None} | given)

    def _taken(self) -> list[str]:
        """The fields of StepArgs that the launcher takes."""
        left_out = set() if self.packed else {"max_tiles"}
        if not self.sparse:
            left_out.add("sink_at")
        if not self.main.kv_format:
            left_out |= {"scales", "rope_scale_log2", "kpe_scale_at"}
            if not self.converted:
                left_out |= {"out_scale", "ckv_scale_at", "q_scale_at"}
        return [field.name for field in dataclasses.fields(StepArgs) if field.name not in left_out]

    def compile_args(self) -> tuple:
        """Symbolic arguments, of which a variant is compiled."""
        args = self._fake_tensors()
        args |= dict.fromkeys(("num_parts", "max_tiles", "merge_x", "merge_y"), Int32(1))
        args |= dict.fromkeys(("nope_scale_log2", "rope_scale_log2", "out_scale", "lse_scale"), Float32(1.0))
        args |= dict.fromkeys(("ckv_scale_at", "kpe_scale_at", "q_scale_at", "sink_at"), Int64(0))
        args["stream"] = make_fake_stream(use_tvm_ffi_env_stream=True)
        return tuple(args[name] for name in self._taken())

    def _fake_tensors(self) -> dict[str, Any]:
        main, dtype = self.main, self.main.dtype
        nope, kpe, rope = dtype, dtype, dtype
        if main.kv_format:
            e4m3 = Float8E4M3FN if dlpack.exports_e4m3() else Uint8
            kpe = e4m3 if main.kv_format == "tensor" else dtype
            nope, rope = (e4m3, kpe) if main.q_fp8 else (dtype, dtype)
        ckv = e4m3 if main.kv_format else dtype
        ckv_dim, kpe_dim = main.dims
        if not kpe_dim:
            rope, kpe, kpe_dim = nope, ckv, ckv_dim
        tokens, heads, pages, page = (cute.sym_int() for _ in range(4))

        def rows(dtype, a, b, c):
            step = 128 // dtype.width
            return fake_tensor(dtype, (a, b, c), (sym64(step), sym64(step), 1), 16)

        return {
            "q_nope": rows(nope, tokens, heads, ckv_dim),
            "q_pe": rows(rope, tokens, heads, kpe_dim),
            "ckv": rows(ckv, pages, page, ckv_dim),
            "kpe": rows(kpe, pages, page, kpe_dim),
            "scales": _fake_scales(NUM_SCALES[main.kv_format], pages, page),
            "kv_indices": fake_tensor(Int32, (cute.sym_int(),), (1,), 4),
            "table": fake_tensor(Int32, (cute.sym_int(), 8), (8, 1), 16),
            "part": fake_tensor(Float32, (cute.sym_int(), PART_ROW), (PART_ROW, 1), 16),
            "out": rows(dtype, tokens, heads, ckv_dim),
            "lse": fake_tensor(Float32, (tokens, heads), (sym64(), 1), 4),
        }


def _fake_scales(num_scales: int, pages, page):
    if num_scales == 0:  # any tensor of three dimensions
        return fake_tensor(Float32, tuple(cute.sym_int() for _ in range(3)), tuple(sym64() for _ in range(3)), 4)
    step = 4 if num_scales == 4 else 1
    return fake_tensor(Float32, (pages, page, num_scales), (sym64(step), sym64(step), 1), 4 * step)


def _as_bytes(x: cute.Tensor) -> cute.Tensor:
    """An e4m3 tensor as bytes; others as they are."""
    if x.element_type is not Float8E4M3FN:
        return x
    return cute.make_tensor(cute.recast_ptr(x.iterator, dtype=Uint8), x.layout)
