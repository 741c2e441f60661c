"""The smallest kernel with the interface of mla_cute's kernels: y = a * x through shared memory; compiles in 0.3 s."""

import os

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream
from cutlass.memory import SmemAllocator


class ToyKernel:
    name = "toy"

    def __init__(self, key, config):
        if config.fail == "raise":
            raise ValueError("toy kernel asked to fail")
        if config.fail == "exit":
            os._exit(7)
        self.dtype = {"float32": cutlass.Float32, "bfloat16": cutlass.BFloat16}[key.dtype]
        self.num_threads = config.num_threads

    def compile_args(self):
        n = cute.sym_int()
        x = make_fake_compact_tensor(self.dtype, (n,), assumed_align=16)
        y = make_fake_compact_tensor(self.dtype, (n,), assumed_align=16)
        return x, y, cutlass.Float32(0.0), make_fake_stream(use_tvm_ffi_env_stream=True)

    @cute.jit
    def __call__(self, x: cute.Tensor, y: cute.Tensor, a: cutlass.Float32, stream: cuda.CUstream):
        grid = (cute.ceil_div(cute.size(x), self.num_threads), 1, 1)
        self.kernel(x, y, a).launch(grid=grid, block=(self.num_threads, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, x: cute.Tensor, y: cute.Tensor, a: cutlass.Float32):
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        smem = SmemAllocator()
        tile = smem.allocate_tensor(cutlass.Float32, cute.make_layout(self.num_threads), 16)
        i = bidx * self.num_threads + tidx
        if i < cute.size(x):
            tile[tidx] = x[i].to(cutlass.Float32)
        cute.arch.sync_threads()
        if i < cute.size(x):
            y[i] = (a * tile[tidx]).to(self.dtype)
