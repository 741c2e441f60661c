"""Token-sparse attention: each query token attends to a list of tokens of its own.

Decode's kernels run it, each query token as a request whose keys are gathered one by one (kernels/lib/paged.py).
"""

from __future__ import annotations

from typing import ClassVar, Literal, overload

import torch

from .attend import attend
from .call import SPARSE, UNSCALED, Pages, topk_lens_of
from .config import KernelConfig
from .dims import MAX_HEADS
from .expect import Scale, expect_bool, expect_int, expect_metadata
from .launch import table_stride
from .plan import Plan, Wanted, expect_hints, expect_options, expect_partials, expect_rows, expect_table
from .plan_decode import DecodePlan


class SparsePlan(DecodePlan):
    """Work items of one step of :func:`mla_sparse`. Made by :func:`plan_sparse`; otherwise as :class:`DecodePlan`.

    It depends on how many tokens each list has, not on which: one plan serves the layers of a step, whose lists differ.

    Attributes:
        topk: columns of the lists.
        uniform: made without topk_lens, so that every list has topk tokens.
    """

    __slots__ = ("topk", "uniform")

    _facts: ClassVar[tuple[str, ...]] = ("batch", "num_heads", "device")

    def __init__(self, wanted: Wanted, topk: int, uniform: bool):
        super().__init__(wanted)
        self.topk, self.uniform = topk, uniform


def plan_sparse(
    indices: torch.Tensor,
    *,
    num_heads: int,
    topk_lens: torch.Tensor | None = None,
    config: KernelConfig | None = None,
    batch_invariant: bool = False,
    kv_format: str = "",
    q_fp8: bool = False,
    other_metadata: bool = False,
    partials: torch.Tensor | None = None,
) -> SparsePlan:
    """Plan a step of :func:`mla_sparse`; one plan serves every layer of the step.

    Args:
        indices: [total_q, topk] int32, of the device, the sizes and the strides of those that calls will be given; what
            it holds is not read.
        num_heads: query heads, 1..128.
        topk_lens: [total_q] int32, as the calls'; None: every list has topk tokens.
        config, batch_invariant, kv_format, q_fp8, other_metadata: as :func:`plan_decode`.
        partials: as :func:`plan_decode_block_table`.

    Raises:
        TypeError, ValueError: naming the argument. RuntimeError: the device is not Hopper.
    """
    expect_int("num_heads", num_heads, 1, MAX_HEADS)
    expect_metadata("indices", indices, (None, None), "[total_q, topk]", None)
    total_q, topk = indices.shape
    if topk_lens is not None:
        expect_metadata("topk_lens", topk_lens, (total_q,), "[total_q]", indices.device)
    expect_rows("indices", total_q, num_heads)
    stride = expect_table(total_q, topk, table_stride(indices))
    expect_hints(kv_format, q_fp8, None)
    expect_options(config, batch_invariant)
    expect_bool("other_metadata", other_metadata)
    expect_partials(partials)
    wanted = Wanted(
        Pages(SPARSE, topk_lens_of(indices, topk_lens)), total_q, total_q, num_heads, 1, topk, stride, topk,
        kv_format, q_fp8, config, batch_invariant, other_metadata, partials=partials,
    )  # fmt: skip
    return SparsePlan(wanted, topk, topk_lens is None)._register().update()


@overload
def mla_sparse(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor | None,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor | None,
    indices: torch.Tensor,
    sm_scale: float,
    *,
    topk_lens: torch.Tensor | None = ...,
    out: torch.Tensor | None = ...,
    lse: torch.Tensor | None = ...,
    lse_base: int | str = ...,
    return_lse: Literal[True] = ...,
    ckv_scale: Scale = ...,
    kpe_scale: Scale = ...,
    ckv_scale_arr: torch.Tensor | None = ...,
    q_scale: Scale = ...,
    sink: torch.Tensor | None = ...,
    plan: SparsePlan | None = ...,
    config: KernelConfig | None = ...,
    batch_invariant: bool = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


@overload
def mla_sparse(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor | None,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor | None,
    indices: torch.Tensor,
    sm_scale: float,
    *,
    topk_lens: torch.Tensor | None = ...,
    out: torch.Tensor | None = ...,
    lse: torch.Tensor | None = ...,
    lse_base: int | str = ...,
    return_lse: bool,
    ckv_scale: Scale = ...,
    kpe_scale: Scale = ...,
    ckv_scale_arr: torch.Tensor | None = ...,
    q_scale: Scale = ...,
    sink: torch.Tensor | None = ...,
    plan: SparsePlan | None = ...,
    config: KernelConfig | None = ...,
    batch_invariant: bool = ...,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...


def mla_sparse(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor | None,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor | None,
    indices: torch.Tensor,
    sm_scale: float,
    *,
    topk_lens: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    lse_base: int | str = 2,
    return_lse: bool = True,
    ckv_scale: Scale = UNSCALED,
    kpe_scale: Scale = UNSCALED,
    ckv_scale_arr: torch.Tensor | None = None,
    q_scale: Scale = UNSCALED,
    sink: torch.Tensor | None = None,
    plan: SparsePlan | None = None,
    config: KernelConfig | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """MLA of query tokens that each attend to chosen tokens of a paged latent cache (DeepSeek sparse attention).

    K_t = the cache rows that indices[t] names;  S_t = q_nope_t ckv^T + q_pe_t kpe^T over them;
    P_t = softmax(sm_scale * S_t);  output_t = P_t ckv   (DeepSeek-V3.2, absorbed)

    Decode and prefill are one: there is no mask beside the lists.

    Args:
        q_nope: [total_q, H, C], q_pe: [total_q, H, R], ckv_cache: [num_pages, page_size, C], kpe_cache:
            [num_pages, page_size, R], and all else that is not named here: as :func:`mla_paged_decode`, every format
            of the cache.
        indices: [total_q, topk] int32, last dimension contiguous: tokens as page * page_size + row, in any order. -1 at
            any place: no token. One that is named twice counts twice.
        topk_lens: [total_q] int32, 0..topk: only so many columns of a row count; what lies behind is never read. None:
            all.
        sink: [H] float32, contiguous: a score in units of ln that each row of the head divides by, too, and that no
            token has: output_t is e^lse / (e^lse + e^sink) of what it is without. lse knows nothing of it. None, and
            -inf: there is none.
        plan: from :func:`plan_sparse`, shared by the layers of a step; None plans in the call.

    Returns:
        (output [total_q, H, C], lse [total_q, H] float32), or output. A row without tokens gives 0 and -inf.

    Raises as :func:`mla_paged_decode`. Of CUDA tensors, indices and topk_lens are not read on the host: tokens outside
    the cache are undefined behaviour, except with MLA_CUTE_CHECK=1.
    """
    cache = (ckv_cache, kpe_cache, ckv_scale, kpe_scale, ckv_scale_arr)
    lengths = _lengths(indices, plan) if topk_lens is None else topk_lens
    pages = (SPARSE, lengths, indices, None, None, False)
    return attend(
        (q_nope, q_pe, cache, pages, sm_scale, out, lse, lse_base, q_scale, sink), plan, config, batch_invariant,
        return_lse,
    )  # fmt: skip


def _lengths(indices: torch.Tensor, plan: Plan | None) -> torch.Tensor | None:
    """Of lists that count whole: the plan's own where it was made so. None where `indices` is wrong, for check.py to
    say so."""
    if not isinstance(indices, torch.Tensor) or indices.dim() != 2:
        return None
    if isinstance(plan, SparsePlan) and plan.uniform:
        if indices.shape[1] != plan.topk:
            raise ValueError(f"indices: expected {plan.topk} columns, as the plan was made for, got {indices.shape[1]}")
        return plan._pages.lengths
    return topk_lens_of(indices, None)
