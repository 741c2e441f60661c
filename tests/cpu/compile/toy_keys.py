"""Static key, config and reference of the toy kernel, importable without the DSL."""

from dataclasses import dataclass

from mla_cute.compile.jit import KernelRef


@dataclass(frozen=True)
class ToyKey:
    dtype: str = "float32"


@dataclass(frozen=True)
class ToyConfig:
    num_threads: int = 128
    fail: str = ""  # "raise" or "exit": what constructing the kernel does


TOY = KernelRef("toy", "toy_kernel", "ToyKernel")
