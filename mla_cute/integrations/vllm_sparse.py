"""An attention backend of vLLM for models whose query tokens attend to lists of tokens (DeepSeek sparse attention): its
sparse MLA layers over `mla_sparse`.

    vllm serve deepseek-ai/DeepSeek-V3.2 --attention-backend CUSTOM [--kv-cache-dtype fp8_ds_mla]

Written for vLLM 0.33.0, and found as vllm.py is: CUSTOM means this backend where the model's configuration has
index_topk (_vllm_plugin.py). Engines of that release have run it with small models on an H200
(tests/gpu/test_vllm_sparse_engine.py).

* The indexer, which makes the lists, stays vLLM's, and so do prompts no longer than topk (`forward_mha`, if vLLM has a
  prefill backend for the model). `_forward_mqa_kernel`, which all other tokens come to, is this library's: any number
  of heads up to 128 without padding, prompts and decoding alike.
* Caches: the dtype of the model, or "fp8_ds_mla", rows of 656 bytes, which prompts too attend to as they are. Queries
  are 16-bit.
* CUDA graphs of uniform decode batches: a captured batch keeps its plan, and the first layer of a step plans again on
  the GPU, in the graph, from how many tokens its lists have. The lists of the other layers are as long: a query token
  that sees n tokens has min(n, topk) of them in every layer.
* No context parallelism, HiSparse, attention sinks or batch invariance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..check import DTYPE_NAMES
from ..dims import CKV_DIM, MAX_HEADS
from ..kernels.registry import Variant
from ._engine_steps import ListStep, StepPlans, paged_cache
from .vllm import (
    MAX_DECODE_QUERY_LEN,
    MlaCuteBackend,
    PlannedImpl,
    PlanningBuilder,
    expect_layer,
    is_first_layer,
    workspace_for_partials,
)

try:
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.attention.sparse_mla_attention import (
        SparseMLACommonImpl,
        SparseMLACommonMetadata,
        SparseMLACommonMetadataBuilder,
    )
    from vllm.model_executor.warmup.cutedsl_warmup import register_cutedsl_warmup_provider
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.attention.backends.mla.sparse_utils import align_blocks_to_rows, flat_kv_row_view
    from vllm.v1.attention.ops.metadata import compute_token_to_req_indices
except ImportError as error:
    raise ImportError(
        f'mla_cute.integrations.vllm_sparse needs vLLM, written for 0.33.0: pip install "vllm==0.33.0" ({error})'
    ) from error

__all__ = ["MlaCuteSparseBackend", "MlaCuteSparseImpl", "MlaCuteSparseMetadata", "MlaCuteSparseMetadataBuilder"]

_FORMATS = {"auto": "", "float16": "", "bfloat16": "", "fp8_ds_mla": "group"}


class MlaCuteSparseBackend(MlaCuteBackend):
    """What vLLM asks before it takes the backend."""

    supported_kv_cache_dtypes: ClassVar[list[Any]] = list(_FORMATS)

    @staticmethod
    def get_impl_cls() -> type[MlaCuteSparseImpl]:
        return MlaCuteSparseImpl

    @staticmethod
    def get_builder_cls() -> type[MlaCuteSparseMetadataBuilder]:
        return MlaCuteSparseMetadataBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Blocks a whole number of rows apart: lists name rows of the cache as one flat array."""
        return align_blocks_to_rows(spec)

    @classmethod
    def is_sparse(cls) -> bool:
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        # What else is in a batch decides whether a prompt takes vLLM's path.
        return False

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: Any,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability: Any,
    ) -> str | None:
        if get_current_vllm_config().attention_config.hisparse_config is not None:
            return "mla_cute has no HiSparse: its lists would name rows of a buffer that changes from layer to layer"
        return super().supports_combination(
            head_size, dtype, kv_cache_dtype, block_size, use_mla, has_sink, use_sparse, use_mm_prefix,
            device_capability,
        )  # fmt: skip


@dataclass(kw_only=True)
class MlaCuteSparseMetadata(SparseMLACommonMetadata):
    """Metadata of a step, shared by its layers.

    Attributes:
        plans: of the builder.
        keep: the step is captured in a CUDA graph.
        first_layer: name of the layer that ran first with these metadata. Whenever it runs, it plans.
        step: what it planned.
    """

    plans: StepPlans | None = None
    keep: bool = False
    first_layer: str | None = None
    step: ListStep | None = None


class MlaCuteSparseMetadataBuilder(PlanningBuilder, SparseMLACommonMetadataBuilder[MlaCuteSparseMetadata]):
    """vLLM's, and the plans of steps."""

    metadata_cls = MlaCuteSparseMetadata
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(MAX_DECODE_QUERY_LEN, supports_spec_as_decode=True)
        self.supports_draft_decode_metadata_update = True
        kv_format = _FORMATS.get(kv_cache_spec.cache_dtype_str or vllm_config.cache_config.cache_dtype, "")
        self._plans = StepPlans(
            num_heads=self.model_config.get_num_attention_heads(vllm_config.parallel_config),
            page_size=1,
            kv_format=kv_format,
            partials=workspace_for_partials(vllm_config, device),
        )
        register_cutedsl_warmup_provider(self)

    def variants(self) -> list[Variant]:
        return self._plans.list_variants(DTYPE_NAMES[self.model_config.dtype], self.device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> MlaCuteSparseMetadata:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.plans, metadata.keep = self._plans, self._captures
        if self._captures:  # not in the graph, whose memory a plan would come from
            self._plans.list_step(metadata.num_actual_tokens, self.topk_tokens, self.device, keep=True)
        return metadata

    def update_draft_decode_metadata(self, metadata: MlaCuteSparseMetadata) -> None:
        """Between the steps of a draft, whose tensors vLLM advances: which request each token is of, which is a buffer
        of the builder. The first layer plans again."""
        tokens = metadata.num_decode_tokens
        if tokens:
            compute_token_to_req_indices(metadata.query_start_loc, metadata.req_id_per_token, tokens, tokens)


class MlaCuteSparseImpl(PlannedImpl, SparseMLACommonImpl[MlaCuteSparseMetadata]):
    """Sparse attention of one layer.

    Raises:
        ValueError: more than 128 heads, latent dimensions other than 512 and 64, an unknown kv_cache_dtype.
        NotImplementedError: alibi slopes, a sliding window, a soft cap, or an attention that is not a decoder's.
    """

    # Conversions that layers share run on a second stream.
    group_conversion_decode_only: ClassVar[bool] = True
    supports_dcp: bool = False
    supports_pcp: bool = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None,
        attn_type: str,
        kv_sharing_target_layer_name: str | None,
        **mla_args: Any,
    ) -> None:
        super().__init__(
            num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype, logits_soft_cap,
            attn_type, kv_sharing_target_layer_name, **mla_args,
        )  # fmt: skip
        expect_layer(self, alibi_slopes, sliding_window, logits_soft_cap, attn_type, list(_FORMATS))
        if num_heads > MAX_HEADS:
            raise ValueError(f"num_heads: expected 1 to {MAX_HEADS}, got {num_heads}")
        self.supports_quant_query_input = False
        self._vllm_config = get_current_vllm_config()
        self._metadata: MlaCuteSparseMetadata | None = None

    def forward_mqa(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: MlaCuteSparseMetadata,
        layer: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """vLLM's, which turns the indexer's positions into rows of the cache and calls `_forward_mqa_kernel`, which is
        not handed the metadata."""
        self._metadata = attn_metadata
        return super().forward_mqa(q, kv_c_and_k_pe_cache, attn_metadata, layer)

    def _forward_mqa_kernel(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_cache: torch.Tensor,
        topk_indices: torch.Tensor,
        valid_counts: torch.Tensor,
        *,
        layer: Any,
        block_size: int,
        is_decode: bool,
    ) -> tuple[torch.Tensor, None]:
        """Attention of the tokens of a step, each to its list.

        Args:
            q: ([tokens, H, 512], [tokens, H, 64]) of the model's dtype, or both in one tensor [tokens, H, 576].
            kv_cache: [num_blocks, block_size, 576], or [num_blocks, block_size, 656] uint8; blocks a whole number of
                rows apart.
            topk_indices: [tokens, topk] int32, rows of the cache as one flat array.
            valid_counts: [tokens] int32: so many of a list's first entries are rows.
            layer: has layer_name.
            is_decode: no matter.

        Returns:
            (output [tokens, H, 512] of the model's dtype, None)
        """
        metadata = self._metadata
        assert metadata is not None
        if is_first_layer(metadata, layer):
            assert metadata.plans is not None
            tokens, topk = topk_indices.shape
            metadata.step = metadata.plans.list_step(tokens, topk, topk_indices.device, keep=metadata.keep)
            metadata.step.update(valid_counts)
        assert metadata.step is not None
        q_nope, q_pe = q if isinstance(q, tuple) else (q[..., :CKV_DIM], q[..., CKV_DIM:])
        rows, _ = flat_kv_row_view(kv_cache, block_size)
        out, _ = metadata.step.attend(q_nope, q_pe, paged_cache(rows[:, None]), topk_indices, self.scale)
        return out, None
