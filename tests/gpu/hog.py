"""A kernel that takes some SMs and memory bandwidth until it is told to stop."""

import contextlib

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, memory
from cutlass._mlir.dialects import llvm
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream
from cutlass.cutlass_dsl import T

NUM_THREADS = 1024
SMEM_BYTES = 200 * 1024  # no other large CTA fits beside it
HOG_SMS = 24  # the call's CTAs share the others, so they also start in more than one wave
HOG_MOST = 200_000  # passes over HOG_BYTES until it gives up, seconds
HOG_BYTES = 256 * 2**20


def _read_now(address) -> Int32:
    loaded = llvm.inline_asm(
        T.i32(),
        [address.ir_value()],
        "ld.volatile.global.s32 $0, [$1];",
        "=r,l",
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )
    return Int32(loaded)


class Hog:
    """Each CTA copies its share of `source` to `target` again and again until stop[0] != 0, `most` times at most."""

    @cute.jit
    def __call__(self, source: cute.Tensor, target: cute.Tensor, stop: cute.Tensor, ctas: Int32, most: Int32, stream):
        self.kernel(source, target, stop, ctas, most).launch(
            grid=[ctas, 1, 1], block=[NUM_THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, source: cute.Tensor, target: cute.Tensor, stop: cute.Tensor, ctas: Int32, most: Int32):
        t, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        memory.SmemAllocator().allocate_tensor(Float32, cute.make_layout(SMEM_BYTES // 4), 16)
        chunks = Int32(cute.size(source)) // 4
        done = Int32(0)
        words = cute.make_rmem_tensor(4, Float32)
        while done < most:
            for i in cutlass.range(cta * NUM_THREADS + t, chunks, ctas * NUM_THREADS, unroll=4):
                cute.autovec_copy(cute.local_tile(source, (4,), (i,)), words)
                cute.autovec_copy(words, cute.local_tile(target, (4,), (i,)))
            done += 1
            if _read_now(stop.iterator.toint()) != 0:
                done = most


def compile_hog():
    """Compiled: hog(source, target, stop, ctas, most) on the current stream; float32 tensors and an int32 one."""
    n = cute.sym_int()
    floats = [make_fake_compact_tensor(Float32, (n,), assumed_align=16) for _ in range(2)]
    stop = make_fake_compact_tensor(Int32, (1,), assumed_align=4)
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(Hog(), *floats, stop, Int32(1), Int32(1), stream, options="--enable-tvm-ffi --gpu-arch sm_90a")


@contextlib.contextmanager
def beside(hog, ctas=HOG_SMS):
    """A compiled hog runs on another stream while the block does; AssertionError when it gave up before the end.

    What the block launches must have run once before: no module can be loaded beside a kernel that does not end.
    """
    source = torch.zeros(HOG_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    stop = torch.zeros(1, dtype=torch.int32, device="cuda")
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        hog(source, target, stop, ctas, HOG_MOST)
    try:
        yield
        torch.cuda.current_stream().synchronize()
        lasted = not side.query()
    finally:
        stop.fill_(1)
        torch.cuda.synchronize()
    assert lasted, "the hog gave up before the last repeat"
