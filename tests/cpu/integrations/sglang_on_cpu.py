"""What an SGLang engine needs to run without a GPU: torch in the place of kernels (tests/sglang_engine.py).

SGLang's own CPU engine covers the model's layers; what the pools and the scheduler call in Triton has no other form.
"""

from __future__ import annotations

from typing import Any

import torch

# A module in the place of SGLang's kernels, which cannot be imported without a driver: nothing in it may be called.
SGL_KERNEL = """
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} needs a GPU")

    return absent
"""


def scatter_rows(
    pool: Any, rows: torch.Tensor, slots: torch.Tensor, k_nope: torch.Tensor, k_rope: torch.Tensor
) -> None:
    """MLATokenToKVPool._scatter_mla_rows."""
    rows[slots] = torch.cat((k_nope, k_rope), -1).view(len(slots), 1, -1)


def install() -> None:
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

    MLATokenToKVPool._scatter_mla_rows = scatter_rows
