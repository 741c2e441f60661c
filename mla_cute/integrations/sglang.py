"""An attention backend of SGLang: its MLA models over the kernels of this library.

    python -m sglang.launch_server --model deepseek-ai/DeepSeek-V3 --attention-backend mla_cute

Written for SGLang 0.5.23. With both packages installed SGLang finds it by itself (entry point `sglang.srt.plugins`).
That release pins nvidia-cutlass-dsl[cu13] 4.8.0 and apache-tvm-ffi 0.1.11, which this library takes too;
docs/engines.md says how far 4.8.0 and the compiler that [cu13] brings are verified.

* Everything absorbed is this library's: decode, verification and drafting of chains (topk 1), draft extension, prompts
  and chunks over a prefix.
* Prompts whose expanded form needs fewer operations (:meth:`MlaCuteAttnBackend.expands`) run SGLang's
  FlashAttention-3. Where that cannot be imported they run absorbed.
* Every page size that is a power of two, 1 included; 64 unless `--page-size` says otherwise, because 1 is 9 to 11 %
  slower and its block tables are 64 times as large.
* Caches: the dtype of the model, and fp8_e4m3 as SGLang's pool writes it, unscaled. Over fp8_e4m3, queries become e4m3
  where a request has more than 64 rows (heads times a token and its drafts), as they do beside SGLang's own FlashMLA:
  16-bit ones would cost what they cost over a bf16 cache.
* CUDA graphs: block tables, lengths and the plan are made in the graph, from the runner's buffers.
* `--enable-deterministic-inference`: requests are cut by their own lengths alone, and prompts run absorbed.
* Neither context parallelism, ragged verification, draft trees nor the unified memory pool.
* Models that attend to lists of tokens (DeepSeek-V3.2) are refused: SGLang's indexer makes no lists for a backend but
  its own "dsa" (docs/engines.md), and attention to all tokens is another model.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from ..check import DTYPES, FP8
from ..dims import CKV_DIM, KPE_DIM
from ..plan import num_sms
from ._engine_steps import MAX_ROWS_OF_16BIT_QUERIES, Step, StepPlans, paged_cache
from ._queries import to_e4m3

try:
    from sglang.kernels.ops.attention.kv_indices import (
        create_flashmla_kv_indices_triton,
        get_num_kv_index_blocks_flashmla,
    )
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.layers.attention.verify_mask import VerifyMask, maybe_create_verify_mask
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc
    from sglang.srt.model_executor.forward_batch_info import ForwardMode, build_inner_fb_view
    from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import is_in_breakable_cuda_graph
    from sglang.srt.model_executor.runner_backend_utils.tc_piecewise_cuda_graph import is_in_tc_piecewise_cuda_graph
    from sglang.srt.runtime_context import get_exec, get_parallel, get_schedule, get_spec
    from sglang.srt.utils import get_cuda_graph_max_batch_size
except ImportError as error:
    raise ImportError(
        f'mla_cute.integrations.sglang needs SGLang, written for 0.5.23: pip install "sglang==0.5.23" ({error})'
    ) from error

__all__ = ["MlaCuteAttnBackend", "MlaCuteMultiStepDraftBackend"]

logger = logging.getLogger(__name__)

# FLOP of a head: per query token and key, and to make keys and values of 128 + 128 from the latent of a token. What
# queries and outputs of the absorbed form cost a new token, its keys and values cost in the expanded form.
_ABSORBED_PAIR = 2 * (CKV_DIM + KPE_DIM + CKV_DIM)
_EXPANDED_PAIR = 2 * (128 + KPE_DIM + 128)
_EXPANDED_TOKEN = 2 * CKV_DIM * (128 + 128)


class MlaCuteAttnBackend(AttentionBackend):
    """Attention of an MLA model.

    Args:
        model_runner: the ModelRunner whose layers this is for.
        draft_step: attend for this step of drafting a chain, in which each request has `draft_step + 1` keys more than
            the batch counts; None: for anything else.
        plans: of the draft steps before this one, whose buffers it shares.

    Raises:
        ValueError: latent dimensions other than 512 and 64; a page size that is no power of two; a cache of another
            dtype than the model's or float8_e4m3fn.
        NotImplementedError: context parallelism, draft trees (topk above 1), the unified memory pool.
        RuntimeError: a CUDA device that is not Hopper.
    """

    # Block tables and lengths are made on the device.
    needs_cpu_seq_lens: bool = False
    # Lengths and qo_indptr have room for the requests of the pool.
    extend_dummy_seqs_capped_by_req_pool: bool = True
    supports_ragged_verify_graph: bool = False

    def __init__(self, model_runner: Any, *, draft_step: int | None = None, plans: StepPlans | None = None):
        _check(model_runner)
        super().__init__()
        self.max_context_len = model_runner.model_config.context_len
        self.page_size = model_runner.page_size
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.kv_index_translator = model_runner.kv_index_translator
        self.data_type = model_runner.kv_cache_dtype
        self.device = self._device = self.req_to_token_pool.req_to_token.device
        if self._device.type == "cuda":
            num_sms(self._device)
        self._is_draft_runner = bool(model_runner.is_draft_worker)
        self._draft_step = draft_step
        self._num_draft_tokens = get_spec().speculative_num_draft_tokens or 1
        self._is_deterministic = bool(get_exec().deterministic.enable_deterministic_inference)
        heads = model_runner.model_config.num_attention_heads // get_parallel().attn_tp_size
        self._q_fp8 = self.data_type is FP8 and heads * self._num_draft_tokens > MAX_ROWS_OF_16BIT_QUERIES
        self.plans = plans or StepPlans(
            num_heads=heads,
            page_size=self.page_size,
            kv_format="tensor" if self.data_type is FP8 else "",
            q_fp8=self._q_fp8,
            batch_invariant=self._is_deterministic,
        )
        most = get_cuda_graph_max_batch_size(model_runner.req_to_token_pool.size)
        self._seq_lens = torch.zeros(most, dtype=torch.int32, device=self._device)
        self._qo_indptr = torch.zeros(most + 1, dtype=torch.int32, device=self._device)
        self._ones_indptr = torch.arange(most + 1, dtype=torch.int32, device=self._device)
        self._window_indptr = self._ones_indptr * self._num_draft_tokens
        self._block_tables = self._graph_block_tables = self._new_block_tables(0, 0)
        self._verify_mask: VerifyMask | None = None
        self.forward_metadata: Any = None
        self._expanded: Any = None
        if not self._is_deterministic and draft_step is None:
            self._expanded = _expanded_prompts(model_runner)
        self._chunks_prefixes = not get_schedule().disable_chunked_prefix_cache

    # -------------------------------------------------------------------------------------------- which form

    def expands(self, forward_batch: Any) -> bool:
        """Whether the prompts of a batch run in the expanded form, over keys and values made from the latents.

        That form costs `pairs * 640 + prefix * 262144` FLOP a head, absorbed attention `pairs * 2176`, where a pair is
        a query token and a key that it sees: after a long prefix a chunk of 171 tokens costs the same in both.
        """
        prefixes, mode = forward_batch.extend_prefix_lens_cpu, forward_batch.forward_mode
        if self._expanded is None or prefixes is None or not mode.is_extend_without_speculative():
            return False
        if is_in_tc_piecewise_cuda_graph() or is_in_breakable_cuda_graph():
            return False  # what is captured has one form
        if not self._chunks_prefixes and any(prefixes):
            return False
        pairs = sum(
            tokens * prefix + tokens * (tokens + 1) // 2
            for prefix, tokens in zip(prefixes, forward_batch.extend_seq_lens_cpu, strict=True)
        )
        return pairs * _EXPANDED_PAIR + sum(prefixes) * _EXPANDED_TOKEN < pairs * _ABSORBED_PAIR

    def _runs_expanded(self, forward_batch: Any) -> bool:
        """What the model decided for the layer that calls."""
        mode = forward_batch.forward_mode
        return mode.is_extend_without_speculative() and forward_batch.attn_attend_prefix_cache is not None

    # -------------------------------------------------------------------------------------------- metadata

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Metadata of a step that no graph runs."""
        self.forward_metadata = None
        if self.expands(forward_batch):
            self._expanded.init_forward_metadata(forward_batch)
        else:
            bound = self._longest(forward_batch)
            step = self._step(forward_batch, self._room_for(forward_batch.batch_size, bound), bound)
            self.forward_metadata = step
            self._fill(step, forward_batch, in_graph=False)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Buffers of the graphs."""
        self._graph_block_tables = self._new_block_tables(max_bs, self._most_pages())
        self._verify_mask = maybe_create_verify_mask(
            is_draft_runner=self._is_draft_runner,
            skip_prefill=self._draft_step is not None,
            max_bs=max_bs,
            max_context_len=self.max_context_len,
            num_draft_tokens=get_spec().speculative_num_draft_tokens,
            device=self._device,
            is_read=False,
        )

    @property
    def verify_mask(self) -> VerifyMask | None:
        """Where SGLang writes the mask of drafts, which for a chain is not read."""
        return self._verify_mask

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Takes the plan of the graph's batch size; the graph itself refills it."""
        self.forward_metadata = self._step(forward_batch, self._graph_block_tables, None, keep=in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        self._fill(self.forward_metadata, forward_batch, in_graph=True)

    def _is_window(self, mode: Any) -> bool:
        """Whether every request has `speculative_num_draft_tokens` query tokens."""
        return self._draft_step is None and bool(mode.is_target_verify() or mode.is_draft_extend_v2())

    def _is_decode(self, mode: Any) -> bool:
        return self._draft_step is not None or bool(mode.is_decode_or_idle())

    def _step(self, forward_batch: Any, block_tables: torch.Tensor, bound: int | None, keep: bool = False) -> Step:
        batch, mode = forward_batch.batch_size, forward_batch.forward_mode
        queries: tuple[torch.Tensor | None, int] = (None, 0)
        most = None
        if self._is_window(mode):
            queries, most = (self._window_indptr[: batch + 1], batch * self._num_draft_tokens), self._num_draft_tokens
        elif not self._is_decode(mode):
            queries = (self._qo_indptr[: batch + 1], sum(forward_batch.extend_seq_lens_cpu))
        elif self._is_deterministic:  # decode kernels have other bits than those of prefill
            queries = (self._ones_indptr[: batch + 1], batch)
        tables = block_tables[:batch], self._seq_lens[:batch]
        return self.plans.step(*tables, *queries, max_kv_len=bound, max_q_len=most, keep=keep)

    def _fill(self, step: Step, forward_batch: Any, in_graph: bool) -> None:
        """Lengths, page ids and work items of the step, on the current stream: it may be recorded in a graph."""
        batch, mode = forward_batch.batch_size, forward_batch.forward_mode
        if not batch:
            return  # the plan of no request holds nothing
        lengths = step.pages.lengths.copy_(forward_batch.seq_lens[:batch])
        if self._draft_step is not None:
            lengths.add_(self._draft_step + 1)
        elif mode.is_target_verify():
            lengths.add_(self._num_draft_tokens)  # their keys are in the pool, but not yet counted
        elif mode.is_draft_extend_v2():
            if not in_graph:  # a graph's batch counts the whole window already
                lengths.sub_(forward_batch.extend_seq_lens[:batch]).add_(self._num_draft_tokens)
        elif not self._is_decode(mode):
            torch.cumsum(forward_batch.extend_seq_lens[:batch], 0, out=self._qo_indptr[1 : batch + 1])
        self._fill_table(step, forward_batch.req_pool_indices[:batch])
        step.plan.update()

    def _fill_table(self, step: Step, requests: torch.Tensor) -> None:
        table, req_to_token = step.pages.ids, self.req_to_token_pool.req_to_token
        if self._device.type == "cuda":
            blocks = get_num_kv_index_blocks_flashmla(table.shape[1], self.page_size)
            create_flashmla_kv_indices_triton[(len(requests), blocks)](
                req_to_token, requests, step.pages.lengths, None, table, req_to_token.stride(0), table.stride(0),
                self.page_size,
            )  # fmt: skip
        else:
            first_tokens = req_to_token[requests, : table.shape[1] * self.page_size : self.page_size]
            table[:, : first_tokens.shape[1]] = first_tokens // self.page_size

    def _longest(self, forward_batch: Any) -> int | None:
        """Keys that no request of the batch has more of, as far as the host knows."""
        lens = forward_batch.seq_lens_cpu
        return None if lens is None or not len(lens) else int(lens.max()) + self._num_draft_tokens

    def _room_for(self, batch: int, longest: int | None) -> torch.Tensor:
        """The block tables of a step without a graph, in a room that grows: [max_bs, most pages] can be gigabytes at
        page size 1.

        They have the columns that the step needs, in powers of two, because plans are found by that; what a prefill
        copies to convert an FP8 cache goes by it, too.
        """
        if not batch:
            return self._block_tables
        pages = self._most_pages()
        if longest is not None:
            pages = min(pages, 1 << (-(-longest // self.page_size) - 1).bit_length())
        rows, columns = self._block_tables.shape
        if batch > rows or pages > columns:
            self._block_tables = self._new_block_tables(max(batch, rows), max(pages, columns))
        return self._block_tables[:, :pages]

    def _most_pages(self) -> int:
        return -(-(self.max_context_len + self._num_draft_tokens) // self.page_size)

    def _new_block_tables(self, rows: int, pages: int) -> torch.Tensor:
        return torch.zeros((rows, pages), dtype=torch.int32, device=self._device)

    def init_mha_chunk_metadata(self, forward_batch: Any, disable_flashinfer_ragged: bool = False) -> None:
        """Nothing to do: FlashAttention-3 reads the batch's own tensors of its chunks."""

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
        """Absorbed attention of one layer.

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
        out = self._attend(q_nope, q_pe, layer)
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
    ) -> Any:
        """As `forward_decode` for the query tokens that each request has, causal.

        In the expanded form (`expands`) q and k are [tokens, H, 192] and v [tokens, H, 128], and log-sum-exps are
        returned too where the batch says so.
        """
        if self._runs_expanded(forward_batch):
            return self._expanded.forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        return self.forward_decode(q, k, v, layer, forward_batch, save_kv_cache, q_rope=q_rope, k_rope=k_rope)

    def _attend(self, q_nope: torch.Tensor, q_pe: torch.Tensor, layer: Any) -> torch.Tensor:
        """[tokens, H, 512] of q_nope's dtype."""
        slots = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        cache = paged_cache(slots.squeeze(1).unflatten(0, (-1, self.page_size)))
        step: Step = self.forward_metadata
        if not self._q_fp8:
            return step.attend(q_nope, q_pe, cache, layer.scaling)[0]
        out = torch.empty(q_nope.shape, dtype=q_nope.dtype, device=q_nope.device)
        return step.attend(*to_e4m3(q_nope, q_pe), cache, layer.scaling, out=out)[0]


class MlaCuteMultiStepDraftBackend:
    """The steps of drafting a chain after the first, which the draft extension gives: a backend for each.

    Args:
        model_runner: of the draft model. topk: 1. speculative_num_steps: tokens of a chain.
    """

    needs_cpu_seq_lens: bool = False

    def __init__(self, model_runner: Any, topk: int, speculative_num_steps: int):
        self.topk, self.speculative_num_steps = topk, speculative_num_steps
        self.kv_index_translator = model_runner.kv_index_translator
        self.attn_backends: list[MlaCuteAttnBackend] = []
        for step in range(speculative_num_steps - 1):
            plans = self.attn_backends[0].plans if step else None
            self.attn_backends.append(MlaCuteAttnBackend(model_runner, draft_step=step, plans=plans))
        self.attn_backend_list = self.attn_backends
        self.forward_metadata = None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        for backend in self.attn_backends:
            backend.init_cuda_graph_state(max_bs, max_num_tokens)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        inner = build_inner_fb_view(forward_batch, bs=forward_batch.batch_size, forward_mode=ForwardMode.DECODE)
        for backend in self.attn_backends:
            backend.init_forward_metadata_out_graph(inner, in_capture=in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata_in_graph(forward_batch)


def _expanded_prompts(model_runner: Any) -> Any:
    """SGLang's FlashAttention-3 backend, whose prompts in the expanded form these are; None where it cannot run."""
    if model_runner.req_to_token_pool.req_to_token.device.type != "cuda":
        return None
    try:
        from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend

        backend = FlashAttentionBackend(model_runner)
    except ImportError as error:
        logger.warning("mla_cute: prompts run absorbed, SGLang's FlashAttention-3 cannot be imported: %s", error)
        return None
    backend.kv_cache_dtype_str = "auto"  # over an FP8 pool it would round queries, keys and values of prompts to e4m3
    return backend


def _check(model_runner: Any) -> None:
    model = model_runner.model_config
    dims = (model.kv_lora_rank, model.qk_rope_head_dim)
    if dims != (CKV_DIM, KPE_DIM):
        raise ValueError(f"kv_lora_rank, qk_rope_head_dim: expected {CKV_DIM}, {KPE_DIM}, got {dims[0]}, {dims[1]}")
    topk = getattr(model.hf_config, "index_topk", None)
    if topk is not None:
        raise NotImplementedError(f"index_topk: expected none, this model attends to lists of {topk} tokens")
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
    if get_parallel().enable_prefill_cp:
        raise NotImplementedError("enable_prefill_cp: expected False, prefill context parallelism is not supported")
    topk = get_spec().speculative_eagle_topk
    if topk is not None and topk > 1:
        raise NotImplementedError(f"speculative_eagle_topk: expected 1, draft trees are not supported, got {topk}")
    if model_runner.kv_index_translator.is_translating:
        raise NotImplementedError("unified memory pool: not supported, its page ids need a translation of their own")
