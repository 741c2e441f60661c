"""An attention backend of SGLang: decode and target verify of its MLA models over the kernels of this library.

    python -m sglang.launch_server --model deepseek-ai/DeepSeek-V3 --attention-backend mla_cute

Written for SGLang 0.5.23. With both packages installed SGLang finds it by itself (entry point `sglang.srt.plugins`).
That release pins nvidia-cutlass-dsl 4.8.0 and this library 4.8.1: pip cannot install both in one command. Install
SGLang first and this library after it; pip replaces 4.8.0 and reports the conflict. Its own DSL kernels on 4.8.1 are
untried.

What has run: the backend with stand-ins for the classes of SGLang, on CPU tensors. It has never run with SGLang itself,
inside an engine or on a GPU.

* Decode and target verify of draft chains (topk 1) are this library's. Prompts stay with SGLang's FlashInfer backend,
  the parent class, and so do drafts: speculative decoding needs `--speculative-draft-attention-backend`.
* Every page size that is a power of two, 1 included.
* Caches: the dtype of the model, and fp8_e4m3 as SGLang's pool writes it, unscaled. Queries stay 16-bit.
* CUDA graphs: block tables, lengths and the plan are made in the graph, from the runner's buffers.
* Neither decode context parallelism, ragged verification, nor the unified memory pool.
"""

from __future__ import annotations

from typing import Any

import torch

from ..call import Cache
from ..check import DTYPES, FP8
from ..dims import CKV_DIM, KPE_DIM
from ..plan import num_sms
from ._engine_steps import Step, StepPlans, paged_cache

try:
    from sglang.kernels.ops.attention.kv_indices import (
        create_flashmla_kv_indices_triton,
        get_num_kv_index_blocks_flashmla,
    )
    from sglang.srt.layers.attention.flashinfer_mla_backend import FlashInferMLAAttnBackend
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc
    from sglang.srt.runtime_context import get_parallel, get_spec
    from sglang.srt.utils import get_cuda_graph_max_batch_size
except ImportError as error:
    raise ImportError(
        f'mla_cute.integrations.sglang needs SGLang, written for 0.5.23: pip install "sglang==0.5.23" ({error})'
    ) from error

__all__ = ["MlaCuteAttnBackend"]


class MlaCuteAttnBackend(FlashInferMLAAttnBackend):
    """Attention of an MLA model; the parent does what is neither decode nor target verify.

    Raises:
        ValueError: latent dimensions other than 512 and 64; a page size that is no power of two; a cache of another
            dtype than the model's or float8_e4m3fn.
        NotImplementedError: decode context parallelism, draft trees (topk above 1), the unified memory pool.
        RuntimeError: a CUDA device that is not Hopper.
    """

    # Block tables and lengths are made on the device; prompts, the parent's, always have theirs on the host.
    needs_cpu_seq_lens: bool = False
    supports_ragged_verify_graph: bool = False

    def __init__(self, model_runner: Any, skip_prefill: bool = False, **buffers: torch.Tensor | None):
        _check(model_runner)
        super().__init__(model_runner, skip_prefill, **buffers)
        self._device = self.req_to_token_pool.req_to_token.device
        if self._device.type == "cuda":
            num_sms(self._device)
        heads = model_runner.model_config.num_attention_heads // get_parallel().attn_tp_size
        self.data_type = model_runner.kv_cache_dtype
        self._num_draft_tokens = get_spec().speculative_num_draft_tokens or 1
        self._plans = StepPlans(
            num_heads=heads, page_size=self.page_size, kv_format="tensor" if self.data_type is FP8 else ""
        )
        most = get_cuda_graph_max_batch_size(model_runner.req_to_token_pool.size)
        self._seq_lens = torch.zeros(most, dtype=torch.int32, device=self._device)
        self._verify_indptr = torch.arange(most + 1, dtype=torch.int32, device=self._device) * self._num_draft_tokens
        self._block_tables = self._new_block_tables(0, 0)
        self._graph_block_tables = self._block_tables

    # -------------------------------------------------------------------------------------------- metadata

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Metadata of a step that no graph runs."""
        if not _is_ours(forward_batch):
            super().init_forward_metadata(forward_batch)
        else:
            self.forward_metadata = self._step(forward_batch, self._room_for(forward_batch), keep=False)
            self._fill(self.forward_metadata, forward_batch)

    def init_cuda_graph_state(
        self, max_bs: int, max_num_tokens: int, kv_indices_buf: torch.Tensor | None = None
    ) -> None:
        """Buffers of the graphs; `kv_indices_buf` is the parent's and not used."""
        self._graph_block_tables = self._new_block_tables(max_bs, self._most_pages())

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Takes the plan of the graph's batch size; the graph itself refills it."""
        if not _is_ours(forward_batch):
            super().init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)
        else:
            self.forward_metadata = self._step(forward_batch, self._graph_block_tables, keep=in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        if not _is_ours(forward_batch):
            super().init_forward_metadata_in_graph(forward_batch)
        else:
            self._fill(self.forward_metadata, forward_batch)

    def _step(self, forward_batch: Any, block_tables: torch.Tensor, keep: bool) -> Step:
        batch = forward_batch.batch_size
        tables = (block_tables[:batch], self._seq_lens[:batch])
        if not forward_batch.forward_mode.is_target_verify():
            return self._plans.step(*tables, keep=keep)
        indptr = self._verify_indptr[: batch + 1]
        return self._plans.step(*tables, indptr, batch * self._num_draft_tokens, keep=keep)

    def _fill(self, step: Step, forward_batch: Any) -> None:
        """Lengths, page ids and work items of the step, on the current stream: it may be recorded in a graph."""
        batch = forward_batch.batch_size
        if not batch:
            return  # the plan of no request holds nothing
        step.pages.lengths.copy_(forward_batch.seq_lens[:batch])
        if step.pages.queries is not None:
            step.pages.lengths.add_(self._num_draft_tokens)  # their keys are in the pool, but not yet counted
        requests, table = forward_batch.req_pool_indices[:batch], step.pages.ids
        req_to_token = self.req_to_token_pool.req_to_token
        if self._device.type == "cuda":
            blocks = get_num_kv_index_blocks_flashmla(table.shape[1], self.page_size)
            create_flashmla_kv_indices_triton[(batch, blocks)](
                req_to_token, requests, step.pages.lengths, None, table, req_to_token.stride(0), table.stride(0),
                self.page_size,
            )  # fmt: skip
        else:
            first_tokens = req_to_token[requests, : table.shape[1] * self.page_size : self.page_size]
            table[:, : first_tokens.shape[1]] = first_tokens // self.page_size
        step.plan.update()

    def _room_for(self, forward_batch: Any) -> torch.Tensor:
        """The block tables of steps without a graph, which grow: [max_bs, most pages] can be gigabytes at page size 1.

        Their width is what plans are found by, hence powers of two.
        """
        batch, pages = forward_batch.batch_size, self._most_pages()
        if not batch:
            return self._block_tables
        if forward_batch.seq_lens_cpu is not None:
            longest = int(forward_batch.seq_lens_cpu.max()) + self._num_draft_tokens
            pages = min(pages, 1 << (-(-longest // self.page_size) - 1).bit_length())
        rows, columns = self._block_tables.shape
        if batch > rows or pages > columns:
            self._block_tables = self._new_block_tables(max(batch, rows), max(pages, columns))
        return self._block_tables

    def _most_pages(self) -> int:
        return -(-(self.max_context_len + self._num_draft_tokens) // self.page_size)

    def _new_block_tables(self, rows: int, pages: int) -> torch.Tensor:
        return torch.zeros((rows, pages), dtype=torch.int32, device=self._device)

    # -------------------------------------------------------------------------------------------- attention

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        q_rope: torch.Tensor | None = None,
        k_rope: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of one layer, one query token per request.

        Args:
            q: [tokens, H, 512] with q_rope [tokens, H, 64], or [tokens, H, 576] without; the last two dimensions may be
                one.
            k: [tokens, 1, 512] with k_rope [tokens, 1, 64], or [tokens, 1, 576] with v [tokens, 1, 512]: new rows of
                the pool, written first if `save_kv_cache`. None: they are there.

        Returns:
            [tokens, H * 512] of q's dtype.
        """
        if layer.logit_cap or layer.sliding_window_size > 0:
            raise NotImplementedError("logit_cap, sliding_window_size: expected none, they are not supported")
        if k is not None and save_kv_cache:
            location = KVWriteLoc.for_batch(forward_batch)
            if k_rope is not None:
                self.token_to_kv_pool.set_mla_kv_buffer(layer, location, k, k_rope)
            else:
                self.token_to_kv_pool.set_kv_buffer(layer, location, k, v)
        heads = layer.tp_q_head_num
        if q_rope is None:
            packed = q.view(-1, heads, CKV_DIM + KPE_DIM)
            q_nope, q_pe = packed[..., :CKV_DIM], packed[..., CKV_DIM:]
        else:
            q_nope, q_pe = q.view(-1, heads, CKV_DIM), q_rope.view(-1, heads, KPE_DIM)
        out, _ = self.forward_metadata.attend(q_nope, q_pe, self._cache(layer), layer.scaling)
        return out.view(-1, heads * CKV_DIM)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        q_rope: torch.Tensor | None = None,
        k_rope: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `forward_decode` for the draft tokens of a target verify, a causal chain per request; others are the
        parent's."""
        step = self.forward_decode if _is_ours(forward_batch) else super().forward_extend
        return step(q, k, v, layer, forward_batch, save_kv_cache, q_rope=q_rope, k_rope=k_rope)

    def _cache(self, layer: Any) -> Cache:
        slots = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        return paged_cache(slots.squeeze(1).unflatten(0, (-1, self.page_size)))


def _is_ours(forward_batch: Any) -> bool:
    mode = forward_batch.forward_mode
    return bool(mode.is_decode_or_idle() or mode.is_target_verify())


def _check(model_runner: Any) -> None:
    model = model_runner.model_config
    dims = (model.kv_lora_rank, model.qk_rope_head_dim)
    if dims != (CKV_DIM, KPE_DIM):
        raise ValueError(f"kv_lora_rank, qk_rope_head_dim: expected {CKV_DIM}, {KPE_DIM}, got {dims[0]}, {dims[1]}")
    page_size = model_runner.page_size
    if page_size & (page_size - 1):
        raise ValueError(f"page_size: expected a power of two, got {page_size}")
    dtype = model_runner.dtype
    if dtype not in DTYPES or model_runner.kv_cache_dtype not in (dtype, FP8):
        raise ValueError(
            f"kv_cache_dtype: expected {FP8} or that of a {DTYPES[0]} or {DTYPES[1]} model, got "
            f"{model_runner.kv_cache_dtype} with a model of {dtype}"
        )
    if get_parallel().dcp_enabled:
        raise NotImplementedError("dcp_size: expected 1, decode context parallelism is not supported")
    topk = get_spec().speculative_eagle_topk
    if topk is not None and topk > 1:
        raise NotImplementedError(f"speculative_eagle_topk: expected 1, draft trees are not supported, got {topk}")
    if model_runner.kv_index_translator.is_translating:
        raise NotImplementedError("unified memory pool: not supported, its page ids need a translation of their own")
