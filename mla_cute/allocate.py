"""Memory on the GPU at the least cost for the host: a call allocates outputs, and one without a plan its workspace.

On one host `torch.empty(size, dtype=, device=)` takes 6.6 us, `torch.empty_strided` 4.4 us, and the function below them
3.1 us. It is torch's own for the code that its compiler makes, allocates on the current device and goes by torch's
caching allocator as the others do (graph pools included), but it is no public name: where it is missing, or the device
is another one than the current, the public function serves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

try:
    from torch._C._dynamo.guards import _empty_strided_cuda  # type: ignore[attr-defined]
except ImportError:
    _empty_strided_cuda = None


def _no_device() -> int:
    return -1


# torch.cuda.current_device without its check that CUDA is initialised; builds without CUDA lack it.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", _no_device)


def empty(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A contiguous tensor of undefined contents."""
    stride = _packed(size)
    if device.type == "cuda" and _empty_strided_cuda is not None and device.index == current_device():
        return _empty_strided_cuda(size, stride, dtype)
    return torch.empty_strided(size, stride, dtype=dtype, device=device)


def empty_maker(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Callable[[], torch.Tensor]:
    """A function that makes what `empty` does, while `device` is the current one: 0.4 us less each time."""
    if device.type == "cuda" and _empty_strided_cuda is not None:
        return functools.partial(_empty_strided_cuda, size, _packed(size), dtype)
    return functools.partial(torch.empty_strided, size, _packed(size), dtype=dtype, device=device)


def _packed(size: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    return (1,) if len(size) == 1 else (size[1], 1) if len(size) == 2 else (size[1] * size[2], size[2], 1)
