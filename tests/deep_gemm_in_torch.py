"""The functions of DeepGEMM that vLLM's indexer of sparse attention calls, in torch, under vLLM's names for them.

DeepGEMM compiles its kernels when they are first called, with nvcc or NVRTC and the headers of CUDA and CUTLASS. These
need none of that, wait for nothing on the GPU and have shapes that the host knows, so that CUDA graphs can hold them.

The format is Hopper's: e4m3 queries and keys, a float32 scale per key, a float32 weight per query head, which has the
query's scale in it.
"""

from __future__ import annotations

import torch


def fp8_fp4_mqa_logits(
    q: tuple[torch.Tensor, torch.Tensor | None],
    kv: tuple[torch.Tensor, torch.Tensor],
    weights: torch.Tensor,
    cu_seqlen_ks: torch.Tensor,
    cu_seqlen_ke: torch.Tensor,
    max_seqlen_k: int,
) -> torch.Tensor:
    """[tokens, max_seqlen_k] float32: row i has the scores of keys cu_seqlen_ks[i] and following.

    Args:
        q: ([tokens, H, 128] e4m3, None).
        kv: ([keys, 128] e4m3, [keys] float32).
        weights: [tokens, H].
        cu_seqlen_ke: behind the last key of each row; what a row has from there on means nothing.
    """
    values, scale = q
    assert scale is None
    keys = kv[0].float() * kv[1][:, None]
    scores = _scores(values[None], keys[None], weights[None])[0]
    columns = cu_seqlen_ks[:, None].long() + torch.arange(max_seqlen_k, device=scores.device)
    return scores.gather(1, columns.clamp(max=len(keys) - 1))


def get_paged_mqa_logits_metadata(
    context_lens: torch.Tensor, block_size: int, num_sms: int, indices: torch.Tensor | None = None
) -> torch.Tensor:
    """What the scheduler of DeepGEMM's kernel reads, [num_sms + 1, 2]; `fp8_fp4_paged_mqa_logits` here does not."""
    return torch.zeros(num_sms + 1, 2, dtype=torch.int32, device=context_lens.device)


def fp8_fp4_paged_mqa_logits(
    q: tuple[torch.Tensor, torch.Tensor | None],
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    schedule_metadata: torch.Tensor,
    max_model_len: int,
) -> torch.Tensor:
    """[requests * next_n, max_model_len] float32: the scores of a request's keys, in order.

    Args:
        q: ([requests, next_n, H, 128] e4m3, None).
        kv_cache: [blocks, block_size, 1, 132] uint8, blocks any number of bytes apart; in a block, the values of all
            its keys, then a float32 scale of each.
        weights: [requests * next_n, H].
        context_lens: [requests, next_n]; what a row has from there on means nothing.
        block_tables: [requests, pages].
    """
    values, scale = q
    assert scale is None
    requests, next_n, heads, dim = values.shape
    blocks, block_size = kv_cache.shape[:2]
    raw = kv_cache.as_strided((blocks, block_size * (dim + 4)), (kv_cache.stride(0), 1))
    # What stands in a table behind a request's pages may be no block.
    pages = raw[block_tables[:, : -(-max_model_len // block_size)].long().clamp(0, blocks - 1)]
    bytes_of_keys, bytes_of_scales = pages.split((block_size * dim, block_size * 4), -1)
    keys = bytes_of_keys.contiguous().view(torch.float8_e4m3fn).float().unflatten(-1, (block_size, dim))
    keys = keys * bytes_of_scales.contiguous().view(torch.float32)[..., None]
    scores = _scores(values, keys.flatten(1, 2), weights.reshape(requests, next_n, heads)).flatten(0, 1)
    missing = max_model_len - scores.shape[1]
    return torch.nn.functional.pad(scores, (0, missing)) if missing > 0 else scores[:, :max_model_len].contiguous()


def _scores(queries: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[batch, n, keys]: the weighted sum over heads of the products that are positive."""
    products = torch.einsum("bnhd,bkd->bnhk", queries.float(), keys).relu()
    return torch.einsum("bnhk,bnh->bnk", products, weights.float())
