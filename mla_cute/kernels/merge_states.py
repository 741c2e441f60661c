"""Merge of two attention states over disjoint keys (formula: mla_cute/merge_states.py), a warp per (token, head) row.

    o of a row      chunks of 16 bytes; a lane takes chunks l and 32 + l at a time, so that four loads are in flight. A
                    row of 512 16-bit values is one such step, of 512 float32 two.
    lse of a row    every lane reads both values and lane 0 writes the result after the others have read, because it
                    may be written over one of them.

Past a row's last chunk its last one is loaded again and not stored. A state of weight 0 is not multiplied in: its
output may be anything, NaN included. Offsets are 64-bit; rows and chunks are counted in 32 bits (merge_states.py checks
their number).
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32, const_expr
from cutlass.cute.runtime import make_fake_stream

from .keys import MERGE_STATES, MergeStatesKey
from .lib.dtypes import CUTLASS_DTYPES
from .lib.fake import fake_tensor, sym64
from .lib.ptx import load_global_16, row_address, store_global, to_16bit_pair, unpack_16bit
from .lib.softmax import exp2

NUM_WARPS = 4
CHUNKS_AT_ONCE = 2


class MergeStates:
    name = MERGE_STATES.name

    def __init__(self, key: MergeStatesKey, config: None):
        del config
        self.is_float32 = key.dtype == "float32"
        self.dtype = Float32 if self.is_float32 else CUTLASS_DTYPES[key.dtype]

    def compile_args(self) -> tuple:
        # Strides promise nothing: those of dimensions of size 1 are arbitrary. The others are multiples of 16 bytes.
        tokens, heads, head_dim = (cute.sym_int() for _ in range(3))

        def output():
            return fake_tensor(self.dtype, (tokens, heads, head_dim), (sym64(), sym64(), 1), 16)

        def lse():
            return fake_tensor(Float32, (tokens, heads), (sym64(), sym64()), 4)

        return (
            output(),
            lse(),
            output(),
            lse(),
            output(),
            lse(),
            Float32(1.0),
            Float32(1.0),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(
        self,
        o_a: cute.Tensor,  # (tokens, heads, head_dim)
        lse_a: cute.Tensor,  # (tokens, heads)
        o_b: cute.Tensor,
        lse_b: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        to_base_2: Float32,  # log-sum-exps are multiplied by it, and by the next on the way back
        from_base_2: Float32,
        stream,
    ):
        self.kernel(o_a, lse_a, o_b, lse_b, out, lse, to_base_2, from_base_2).launch(
            grid=[cute.ceil_div(cute.size(lse), NUM_WARPS), 1, 1], block=[32 * NUM_WARPS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        o_a: cute.Tensor,
        lse_a: cute.Tensor,
        o_b: cute.Tensor,
        lse_b: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        to_base_2: Float32,
        from_base_2: Float32,
    ):
        t, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        lane = t % 32
        row = block * NUM_WARPS + cute.arch.make_warp_uniform(t // 32)
        if row < cute.size(lse):
            num_heads = Int32(cute.size(lse, mode=[1]))
            token = row // num_heads
            head = row - token * num_heads
            self._row((o_a, lse_a), (o_b, lse_b), (out, lse), (to_base_2, from_base_2), token, head, lane)

    def _load(self, source, first, last) -> list:
        """Chunks first, first + 32, ..., of which none lies past `last`."""
        chunks = [cutlass.min(first + 32 * i, last) for i in range(CHUNKS_AT_ONCE)]
        return [load_global_16(source + Int64(chunk) * 16) for chunk in chunks]

    def _unpack(self, words: list) -> list:
        if self.is_float32:
            return [word.bitcast(Float32) for word in words]
        return [value for word in words for value in unpack_16bit(word, self.dtype)]

    def _pack(self, x: list) -> list:
        if self.is_float32:
            return [value.bitcast(Uint32) for value in x]
        return [to_16bit_pair(x[i], x[i + 1], self.dtype) for i in range(0, len(x), 2)]

    @cute.jit
    def _weighted(self, x, weight):
        """x * weight, 0 where the weight is."""
        product = x * weight
        if weight == 0.0:
            product = Float32(0.0)
        return product

    @cute.jit
    def _row(self, state_a, state_b, merged_state, bases, token, head, lane):
        """A state is an output and its lse; `bases` are the factors to base 2 and from it."""
        (o_a, lse_a), (o_b, lse_b), (out, lse) = state_a, state_b, merged_state
        to_base_2, from_base_2 = bases
        a = lse_a[token, head] * to_base_2
        b = lse_b[token, head] * to_base_2
        largest = cute.arch.fmax(a, b)
        reference = largest
        if largest == -Float32.inf:
            reference = Float32(0.0)
        weight_a, weight_b = exp2(a - reference), exp2(b - reference)
        total = weight_a + weight_b
        merged = (reference + cute.math.log2(total)) * from_base_2
        inverse = Float32(0.0)
        if total != 0.0:  # a NaN stays one
            inverse = 1.0 / total
        weight_a, weight_b = weight_a * inverse, weight_b * inverse
        cute.arch.sync_warp()
        if lane == 0:
            lse[token, head] = merged

        last = Int32(cute.size(out, mode=[2])) // (128 // self.dtype.width) - 1
        source_a, source_b = row_address(o_a, token, head), row_address(o_b, token, head)
        target = row_address(out, token, head)
        for first in cutlass.range(lane, last + 1, 32 * CHUNKS_AT_ONCE, unroll=1):
            words_a, words_b = self._load(source_a, first, last), self._load(source_b, first, last)
            for i in cutlass.range_constexpr(CHUNKS_AT_ONCE):
                x_a, x_b = self._unpack(words_a[i]), self._unpack(words_b[i])
                x = [self._weighted(p, weight_a) + self._weighted(q, weight_b) for p, q in zip(x_a, x_b, strict=True)]
                packed = self._pack(x)
                if const_expr(i == 0):
                    store_global(target + Int64(first) * 16, packed)
                else:
                    if first + 32 * i <= last:
                        store_global(target + Int64(first + 32 * i) * 16, packed)
