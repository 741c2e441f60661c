"""Inline PTX: threads, 16-byte loads and stores, copies, ldmatrix, mma.sync, pairs of 16-bit floats in a word."""

from collections.abc import Sequence
from typing import Any

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Numeric, Uint32
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T


def asm(result: Any, num_results: int, operands: Sequence, text: str, constraints: str, side_effects: bool) -> list:
    """Inline PTX; returns its `num_results` results as IR values, all of the IR type `result`.

    `text` names results and operands $0, $1, ..., results first; `constraints` has a letter for each ("=r": a 32-bit
    result, "l": a 64-bit operand, "f": float32) and what else it changes ("~{memory}"). Without `side_effects` it is
    moved, merged and dropped like arithmetic.
    """
    kwargs = {"has_side_effects": side_effects, "is_align_stack": False, "asm_dialect": llvm.AsmDialect.AD_ATT}
    values = [x.ir_value() for x in operands]
    if num_results == 0:
        llvm.inline_asm(None, values, text, constraints, **kwargs)
        return []
    if num_results == 1:
        return [llvm.inline_asm(result, values, text, constraints, **kwargs)]
    pack = llvm.inline_asm(llvm.StructType.get_literal([result] * num_results), values, text, constraints, **kwargs)
    return [llvm.extractvalue(result, pack, [i]) for i in range(num_results)]


# ---------------------------------------------------------------------------------------- memory


def thread_index() -> Int32:
    """threadIdx.x, read from its register here and now.

    Of cute.arch.thread_idx() the compiler makes one read, and keeps what follows from it in registers over all items.
    """
    return Int32(asm(T.i32(), 1, [], "mov.u32 $0, %tid.x;", "=r", True)[0])


def row_address(x: cute.Tensor, i, j) -> Int64:
    """The address of x[i, j, 0]; its offset is made in 64 bits."""
    offset = Int64(i) * Int64(x.stride[0]) + Int64(j) * Int64(x.stride[1])
    return x.iterator.toint() + offset * (x.element_type.width // 8)


def load_global_16(address: Int64, offset: int = 0) -> list[Uint32]:
    """16 bytes of global memory as four words."""
    text = f"ld.global.v4.b32 {{$0,$1,$2,$3}}, [$4+{offset}];"
    return [Uint32(x) for x in asm(T.i32(), 4, [address], text, "=r,=r,=r,=r,l,~{memory}", True)]


def load_global_8(address: Int64, offset: int = 0) -> list[Uint32]:
    """8 bytes of global memory as two words."""
    text = f"ld.global.v2.b32 {{$0,$1}}, [$2+{offset}];"
    return [Uint32(x) for x in asm(T.i32(), 2, [address], text, "=r,=r,l,~{memory}", True)]


def store_global(address: Int64, words: list) -> None:
    """Store 1, 2 or 4 words; the address is a multiple of their size."""
    _store("global", "l", address, words, 0)


def load_shared_16(address: Int32, offset: int = 0) -> list[Uint32]:
    """16 bytes of shared memory as four words."""
    text = f"ld.shared.v4.b32 {{$0,$1,$2,$3}}, [$4+{offset}];"
    return [Uint32(x) for x in asm(T.i32(), 4, [address], text, "=r,=r,=r,=r,r,~{memory}", True)]


def load_shared_word(address: Int32) -> Uint32:
    return Uint32(asm(T.i32(), 1, [address], "ld.shared.b32 $0, [$1];", "=r,r,~{memory}", True)[0])


def load_shared_f32x2(address: Int32, offset: int = 0) -> list[Float32]:
    """Two float32 from an 8-byte aligned address."""
    text = f"ld.shared.v2.f32 {{$0,$1}}, [$2+{offset}];"
    return [Float32(x) for x in asm(T.f32(), 2, [address], text, "=f,=f,r,~{memory}", True)]


def store_shared(address: Int32, words: list, offset: int = 0) -> None:
    """Store 1, 2 or 4 words; the address is a multiple of their size."""
    _store("shared", "r", address, words, offset)


def store_matrices(address: Int32, words: list, offset: int = 0) -> None:
    """stmatrix: four 8 x 8 matrices of 16 bits, a word of each per lane. `address`: of row lane % 8 of matrix lane / 8,
    16 bytes."""
    text = f"stmatrix.sync.aligned.m8n8.x4.shared.b16 [$0+{offset}], {{$1,$2,$3,$4}};"
    asm(None, 0, [address, *words], text, "r,r,r,r,r,~{memory}", True)


def _store(space: str, pointer: str, address, words: list, offset: int) -> None:
    n = len(words)
    names = ",".join(f"${i + 1}" for i in range(n))
    vector, body = (f".v{n}", f"{{{names}}}") if n > 1 else ("", names)
    text = f"st.{space}{vector}.b32 [$0+{offset}], {body};"
    asm(None, 0, [address, *words], text, ",".join([pointer] + ["r"] * n) + ",~{memory}", True)


def cp_async_16(smem_addr, gmem_addr, num_rows=1, row: int = 0, smem_offset: int = 0, gmem_offset: int = 0) -> None:
    """Copy 16 bytes to shared memory, asynchronously; where row >= num_rows it writes zeros and reads nothing.

    L2 gets 64 bytes, as memory gives them. With 256, as many as can be asked for, it got what lies beside a row, too: 3
    to 5 % of a gather's time.
    """
    text = (
        f"{{ .reg .pred p; setp.le.s32 p, $2, {row};"
        f" cp.async.cg.shared.global.L2::64B [$0+{smem_offset}], [$1+{gmem_offset}], 16, p; }}"
    )
    asm(None, 0, [smem_addr, gmem_addr, Int32(num_rows)], text, "r,l,r,~{memory}", True)


def cp_async_16_of_bits(smem_addr, gmem_addr, bits, row: int, smem_offset: int = 0, gmem_offset: int = 0) -> None:
    """As `cp_async_16`, where bit `row` of `bits` says whether there is anything to copy."""
    text = (
        f"{{ .reg .pred p; .reg .b32 b; and.b32 b, $2, {1 << row}; setp.eq.s32 p, b, 0;"
        f" cp.async.cg.shared.global.L2::64B [$0+{smem_offset}], [$1+{gmem_offset}], 16, p; }}"
    )
    asm(None, 0, [smem_addr, gmem_addr, bits], text, "r,l,r,~{memory}", True)


def cp_async_bulk(smem_addr, gmem_addr, num_bytes: int, mbar_addr) -> None:
    """Copy `num_bytes`, by the async proxy, and count them at the mbarrier `mbar_addr`; all but that are multiples of
    16. Each lane that calls it issues a copy of its own."""
    text = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];"
    asm(None, 0, [smem_addr, gmem_addr, Int32(num_bytes), mbar_addr], text, "r,l,r,r,~{memory}", True)


def cp_async_small(
    smem_address, gmem_address, num_bytes: int, valid, smem_offset: int = 0, gmem_offset: int = 0
) -> None:
    """Copy 4 or 16 bytes to shared memory, asynchronously; where `valid` is 0 it writes zeros and reads nothing."""
    cache = "cg" if num_bytes == 16 else "ca"
    text = (
        "{ .reg .pred p; setp.eq.s32 p, $2, 0;"
        f" cp.async.{cache}.shared.global [$0+{smem_offset}], [$1+{gmem_offset}], {num_bytes}, p; }}"
    )
    asm(None, 0, [smem_address, gmem_address, Int32(valid)], text, "r,l,r,~{memory}", True)


# ---------------------------------------------------------------------------------- tensor cores


def ldmatrix_x4(address: Int32, offset: int, transposed: bool) -> list[Uint32]:
    """Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8."""
    trans = ".trans" if transposed else ""
    text = f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{$0,$1,$2,$3}}, [$4+{offset}];"
    return [Uint32(x) for x in asm(T.i32(), 4, [address], text, "=r,=r,=r,=r,r,~{memory}", True)]


def mma_m16n8k16(acc: list, a: list, b: list, dtype: str) -> list[Float32]:
    """acc + A B, a thread's four float32 of a 16 x 8 tile. A is four words, B two: pairs of `dtype` ("f16", "bf16")."""
    text = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32"
        " {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    )
    constraints = "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f"
    return [Float32(x) for x in asm(T.f32(), 4, [*a, *b, *acc], text, constraints, False)]


# -------------------------------------------------------------------------- 16-bit floats in a word


def ptx_name(dtype: type[Numeric]) -> str:
    """What PTX calls a 16-bit float type: "bf16" or "f16"."""
    return "bf16" if dtype.__name__ == "BFloat16" else "f16"


def f16_to_f32(pair: Uint32) -> list[Float32]:
    """The two float16 of a word, as float32."""
    text = "{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }"
    return [Float32(v) for v in asm(T.f32(), 2, [pair], text, "=f,=f,r", False)]


def unpack_16bit(x: Uint32, dtype: type[Numeric]) -> tuple[Float32, Float32]:
    """The two 16-bit floats of a word, as float32."""
    if ptx_name(dtype) == "f16":
        return tuple(f16_to_f32(x))
    text = "{ .reg .b32 a, b; shl.b32 a, $2, 16; and.b32 b, $2, 0xffff0000; mov.b32 $0, a; mov.b32 $1, b; }"
    low, high = asm(T.f32(), 2, [x], text, "=f,=f,r", False)
    return Float32(low), Float32(high)


def to_f16x2(low, high) -> Uint32:
    """Two float32 as a word of two float16; those too large become infinite."""
    return Uint32(asm(T.i32(), 1, [low, high], "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", False)[0])


def to_16bit_pair(low, high, dtype: type[Numeric]) -> Uint32:
    """Two float32 as a word of two bfloat16 or float16."""
    return Uint32(asm(T.i32(), 1, [low, high], f"cvt.rn.{ptx_name(dtype)}x2.f32 $0, $2, $1;", "=r,f,f", False)[0])


def divide(a, b) -> Float32:
    """IEEE division with subnormals, whatever the compiler's options."""
    return Float32(asm(T.f32(), 1, [a, b], "div.rn.f32 $0, $1, $2;", "=f,f,f", False)[0])


def multiply_f16x2(a: Uint32, b: Uint32) -> Uint32:
    """The products of two float16 by two, each in a word."""
    return Uint32(asm(T.i32(), 1, [a, b], "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", False)[0])


def max_abs_16bit(a: Uint32, b: Uint32, dtype: type[Numeric]) -> Uint32:
    """The larger of a and |b| in each half of a word, which holds two 16-bit floats; NaN is ignored."""
    text = f"{{ .reg .b32 x; and.b32 x, $2, 0x7fff7fff; max.{ptx_name(dtype)}x2 $0, $1, x; }}"
    return Uint32(asm(T.i32(), 1, [a, b], text, "=r,r,r", False)[0])
