"""An attention backend of vLLM: the decode path of its MLA layers over the kernels of this library.

    vllm serve deepseek-ai/DeepSeek-V3 --attention-backend CUSTOM

Written for vLLM 0.33.0. With both packages installed vLLM finds it by itself (entry point `vllm.general_plugins`).
That release pins nvidia-cutlass-dsl[cu13] 4.8.0 and apache-tvm-ffi 0.1.11, which this library takes too;
docs/engines.md says how far 4.8.0 and the compiler that [cu13] brings are verified.

What has run: engines of vLLM 0.33.0 on an H200, small models with random weights (tests/gpu/test_vllm_engine.py; torch
2.11 instead of the release's 2.14, inductor off), and the backend with stand-ins on CPU tensors. On two H200s, with
bf16 caches, tensor and decode context parallelism of 2 generated what FLASH_ATTN_MLA does (test_vllm_two_gpus.py).
Decode context parallelism with drafts or FP8 caches is not verified there; docs/engines.md says what is known of it,
and which NCCL vLLM needs.

* `forward_mqa` is this library's; prompts (`forward_mha`) stay vLLM's. Requests of up to 128 new tokens come to
  `forward_mqa`, in batches of mixed lengths: absorbed attention of q tokens over L keys takes q L H 2176 FLOP, vLLM's
  prompt path q L H 640 + L H 262144 to expand the keys, and that is more below q = 171.
* Caches: the dtype of the model; "fp8" and "fp8_e4m3", scaled by the layer's k_scale; "fp8_ds_mla", rows of 656 bytes.
  Queries stay 16-bit while a request has up to 64 rows (heads times a token and its drafts); with "fp8" and more rows
  vLLM hands over e4m3 ones (q_scale), as it does to its own backends. As 16-bit ones they would cost what they cost
  over a bf16 cache.
* Every block size; 64 is preferred.
* Decode context parallelism with natural log-sum-exps. There a token and its drafts are requests of their own, whose
  lengths are what the rank has of the keys that they see.
* Models that attend to lists of tokens (DeepSeek-V3.2) have a backend of their own under the same name: vllm_sparse.py.
* No prefill context parallelism and no non-causal attention. Other layers of a model (those of an EAGLE3
  drafter, linear attention) need backends of their own:
  `--attention-config '{"backend_per_kind": {"mla_attention": "CUSTOM"}}'` instead of `--attention-backend`.
* CUDA graphs of uniform and of mixed decode batches: the plan of a captured batch keeps its buffers, and the first
  layer of a step plans again on the GPU from the present lengths, in the graph. Building metadata launches nothing.
* Kernels compile while vLLM warms up (its CuTe DSL providers), partial outputs are part of its workspace, claimed while
  it profiles memory.
* VLLM_BATCH_INVARIANT=1 cuts requests by their own lengths alone.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..check import DTYPE_NAMES, FP8
from ..compile.warmup import warmup
from ..dims import CKV_DIM, KPE_DIM, MAX_HEADS, PART_ROW
from ..kernels.registry import Variant
from ..plan import num_sms
from ._engine_steps import (
    MAX_ROWS_OF_16BIT_QUERIES,
    Share,
    Step,
    StepPlans,
    TokenRequests,
    most_partial_rows,
    paged_cache,
)

try:
    from vllm import envs
    from vllm.config import get_current_vllm_config
    from vllm.distributed.parallel_state import get_dcp_world_size_and_rank
    from vllm.model_executor.layers.attention.mla_attention import (
        MLACommonBackend,
        MLACommonDecodeMetadata,
        MLACommonImpl,
        MLACommonMetadata,
        MLACommonMetadataBuilder,
        QueryLenSupport,
    )
    from vllm.model_executor.warmup.cutedsl_warmup import CuTeDSLCompileUnit, register_cutedsl_warmup_provider
    from vllm.v1.attention.backend import AttentionCGSupport, AttentionType, MultipleOf, max_decode_query_len
    from vllm.v1.worker.workspace import current_workspace_manager, is_workspace_manager_initialized
except ImportError as error:
    raise ImportError(
        f'mla_cute.integrations.vllm needs vLLM, written for 0.33.0: pip install "vllm==0.33.0" ({error})'
    ) from error

__all__ = ["MlaCuteBackend", "MlaCuteDecodeMetadata", "MlaCuteImpl", "MlaCuteMetadata", "MlaCuteMetadataBuilder"]

_FORMATS = {
    "auto": "", "float16": "", "bfloat16": "", "fp8": "tensor", "fp8_e4m3": "tensor", "fp8_ds_mla": "group",
}  # fmt: skip
_CACHE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "fp8_ds_mla": torch.bfloat16}
_BLOCK_SIZE = 64
# Requests of more new tokens take or may take vLLM's path for prompts.
MAX_DECODE_QUERY_LEN = 128


def _takes_e4m3_queries(kv_format: str, num_heads: int, vllm_config: Any) -> bool:
    # With decode context parallelism each token of a request is a request of its own.
    is_shared = vllm_config.parallel_config.decode_context_parallel_size > 1
    tokens = 1 if is_shared else max_decode_query_len(vllm_config)
    return kv_format == "tensor" and num_heads * tokens > MAX_ROWS_OF_16BIT_QUERIES


def expect_layer(
    impl: Any,
    alibi_slopes: list[float] | None,
    sliding_window: int | None,
    logits_soft_cap: float | None,
    attn_type: str,
    cache_dtypes: list[str],
) -> None:
    """Raises where an implementation, as its class in vLLM has set it up, is for a layer that is not supported:
    NotImplementedError of what MLA does not have, ValueError of sizes and cache dtypes."""
    unsupported = {
        "alibi_slopes": alibi_slopes, "sliding_window": sliding_window, "logits_soft_cap": logits_soft_cap,
    }  # fmt: skip
    for name, value in unsupported.items():
        if value:
            raise NotImplementedError(f"{name}: expected None, not supported, got {value}")
    if attn_type != AttentionType.DECODER:
        raise NotImplementedError(f"attn_type: expected 'decoder', others are not supported, got {attn_type!r}")
    if impl.kv_cache_dtype not in cache_dtypes:
        raise ValueError(f"kv_cache_dtype: expected one of {', '.join(cache_dtypes)}, got {impl.kv_cache_dtype!r}")
    dims = (impl.kv_lora_rank, impl.qk_rope_head_dim)
    if dims != (CKV_DIM, KPE_DIM):
        raise ValueError(f"kv_lora_rank, qk_rope_head_dim: expected {CKV_DIM}, {KPE_DIM}, got {dims[0]}, {dims[1]}")


def workspace_for_partials(vllm_config: Any, device: torch.device) -> torch.Tensor | None:
    """Where all plans write partial outputs, in vLLM's workspace: claimed while it profiles memory, found again by
    builders of metadata. None: plans have buffers of their own, because steps may overlap (micro-batches, drafts of
    DSpark) or because batch invariance needs larger ones."""
    speculative = vllm_config.speculative_config
    overlaps = vllm_config.parallel_config.use_ubatching or (speculative is not None and speculative.use_dspark())
    if device.type != "cuda" or overlaps or envs.VLLM_BATCH_INVARIANT or not is_workspace_manager_initialized():
        return None
    shape = (most_partial_rows(num_sms(device)), PART_ROW)
    return current_workspace_manager().get_persistent("mla_cute: partial outputs", shape, torch.float32)


class PlanningBuilder(abc.ABC):
    """What builders of metadata have in common: the kernels that steps run, and whether a step is captured."""

    _captures = False

    @abc.abstractmethod
    def variants(self) -> list[Variant]:
        """Every kernel that a step may run."""

    def get_cutedsl_warmup_compile_units(self) -> list[Any]:
        """What vLLM compiles before it serves: `variants`. Ranks of one machine take turns."""
        variants = self.variants()

        def compile_all() -> None:
            warmup(variants=variants, progress=False)

        return [CuTeDSLCompileUnit("mla_cute", ("mla_cute", tuple(variants)), compile_all)]

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        self._captures = True
        try:
            return super().build_for_cudagraph_capture(common_attn_metadata)  # type: ignore[misc]
        finally:
            self._captures = False


class PlannedImpl:
    """What implementations of layers have in common."""

    _vllm_config: Any

    def reserve_workspace(self) -> None:
        """Claims what plans will need; vLLM calls it while it profiles memory."""
        workspace_for_partials(self._vllm_config, torch.device("cuda", torch.cuda.current_device()))


def is_first_layer(metadata: Any, layer: Any) -> bool:
    """Whether `layer` is the one that ran first with `metadata`, the first that asks. Whenever it runs, it plans."""
    if metadata.first_layer is None:
        metadata.first_layer = layer.layer_name
    return metadata.first_layer == layer.layer_name


class MlaCuteBackend(MLACommonBackend):
    """What vLLM asks before it takes the backend."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = list(_FORMATS)

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # vLLM looks members of its AttentionBackendEnum up by this name

    @staticmethod
    def get_impl_cls() -> type[MlaCuteImpl]:
        return MlaCuteImpl

    @staticmethod
    def get_builder_cls() -> type[MlaCuteMetadataBuilder]:
        return MlaCuteMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(1)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return default_block_size if default_block_size % _BLOCK_SIZE == 0 else _BLOCK_SIZE

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [CKV_DIM + KPE_DIM]

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return (capability.major, capability.minor) == (9, 0)

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
        if not cls.supports_compute_capability(device_capability):
            has = f"{device_capability.major}.{device_capability.minor}"
            return f"mla_cute kernels need a Hopper GPU of compute capability 9.0, this device has {has}"
        needed = _CACHE_DTYPES.get(kv_cache_dtype, dtype)
        if dtype is not needed:
            return f"mla_cute needs a model of {needed} with kv_cache_dtype {kv_cache_dtype!r}, this one is of {dtype}"
        return None


@dataclass
class MlaCuteDecodeMetadata(MLACommonDecodeMetadata):
    """Decode metadata of a step, shared by its layers.

    Attributes:
        step: pages, lengths and plan.
        output_dtype: of the model.
        output: [tokens, H, 512] that each layer writes in turn, where query tokens of no request may follow those of
            the last one: their outputs are what is there, which is finite. None: a layer allocates its own.
        first_layer: name of the layer that ran first with these metadata. Whenever it runs, it plans.
    """

    step: Step
    output_dtype: torch.dtype
    output: torch.Tensor | None
    first_layer: str | None = None


@dataclass
class MlaCuteMetadata(MLACommonMetadata[MlaCuteDecodeMetadata]):
    pass


class MlaCuteMetadataBuilder(PlanningBuilder, MLACommonMetadataBuilder[MlaCuteMetadata]):
    """Finds the plan of a step. Launches nothing where there is one."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    query_len_support: ClassVar[QueryLenSupport] = QueryLenSupport.VARLEN
    reorder_batch_threshold: int = MAX_DECODE_QUERY_LEN

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        dcp_size = vllm_config.parallel_config.decode_context_parallel_size
        if dcp_size > 1:
            self.reorder_batch_threshold = 1  # which vLLM raises to a token and its drafts
        super().__init__(
            kv_cache_spec, layer_names, vllm_config, device, MlaCuteMetadata, supports_dcp_with_varlen=True
        )
        # the layers gather the query heads of the group
        num_heads = self.num_heads * dcp_size
        # of these layers: kv_cache_dtype_skip_layers keeps some out of an FP8 cache
        kv_format = _FORMATS.get(kv_cache_spec.cache_dtype_str or vllm_config.cache_config.cache_dtype, "")
        self._batch_invariant = bool(envs.VLLM_BATCH_INVARIANT)
        self._plans = StepPlans(
            num_heads=num_heads,
            page_size=self.page_size,
            kv_format=kv_format,
            q_fp8=_takes_e4m3_queries(kv_format, num_heads, vllm_config),
            batch_invariant=self._batch_invariant,
            partials=workspace_for_partials(vllm_config, device),
        )
        register_cutedsl_warmup_provider(self)
        self._has_prompt = False
        self._tokens: TokenRequests | None = None
        if dcp_size > 1:
            _, rank = get_dcp_world_size_and_rank()
            interleave = vllm_config.parallel_config.cp_kv_cache_interleave_size
            self._tokens = TokenRequests(Share(rank, dcp_size, interleave))
        # The lengths of a rank's share are not advanced between the steps of a draft.
        self.supports_draft_decode_metadata_update = dcp_size == 1

    @classmethod
    def get_varlen_cudagraph_max_query_len(cls, vllm_config: Any, kv_cache_spec: Any) -> int | None:
        """The prefill kernels read each request's query tokens from query_start_loc on the GPU."""
        if vllm_config.parallel_config.decode_context_parallel_size > 1:
            return max_decode_query_len(vllm_config)
        return MAX_DECODE_QUERY_LEN

    def variants(self) -> list[Variant]:
        return self._plans.variants(DTYPE_NAMES[self.model_config.dtype], self.device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> MlaCuteMetadata:
        # No captured graph has a prompt in it, so the decodes of a step with one may be planned by what they are.
        self._has_prompt = common_attn_metadata.max_query_len > self.reorder_batch_threshold
        return super().build(common_prefix_len, common_attn_metadata, fast_build)

    def update_draft_decode_metadata(self, metadata: MlaCuteMetadata) -> None:
        """Nothing to do: the first layer plans from the tensors that the draft steps advance."""

    def _build_decode(
        self,
        block_table_tensor: torch.Tensor,
        seq_lens_device: torch.Tensor,
        max_seq_len: int,
        query_start_loc_cpu: torch.Tensor,
        query_start_loc_device: torch.Tensor,
        num_decode_tokens: int,
        max_query_len: int,
        dcp_tot_seq_lens_device: torch.Tensor | None,
    ) -> MlaCuteDecodeMetadata:
        # max_query_len is what vLLM promises, not the longest of this batch: a graph captured from a batch of single
        # tokens may be for more, and beside a prompt it is the threshold. Decode and prefill kernels have other bits,
        # hence one kind with batch invariance.
        if self._has_prompt and len(query_start_loc_cpu) > 1:
            max_query_len = int(query_start_loc_cpu.diff().max())
        is_decode = max_query_len == 1 and num_decode_tokens == seq_lens_device.shape[0] and not self._batch_invariant
        queries = (None, 0) if is_decode else (query_start_loc_device, num_decode_tokens)
        max_q_len = max_query_len
        if self._tokens is not None and max_query_len > 1:
            max_q_len = 1
            assert dcp_tot_seq_lens_device is not None
            is_decode = not self._batch_invariant
            room = self._tokens.room(num_decode_tokens, block_table_tensor)
            queries = (None, 0) if is_decode else (room[2], num_decode_tokens)
            tables, is_padded = room[:2], False
            refill = self._tokens.filler(room, block_table_tensor, dcp_tot_seq_lens_device, query_start_loc_device)
        else:
            tables, refill = (block_table_tensor, seq_lens_device), None
            is_padded = not is_decode and (self._captures or int(query_start_loc_cpu[-1]) < num_decode_tokens)
        step = self._plans.step(*tables, *queries, max_kv_len=max_seq_len, max_q_len=max_q_len, keep=self._captures)
        output = None
        if is_padded:
            output = self._plans.padded_output(num_decode_tokens, self.model_config.dtype, seq_lens_device.device)
        return MlaCuteDecodeMetadata(
            block_table=block_table_tensor,
            seq_lens=seq_lens_device,
            dcp_tot_seq_lens=dcp_tot_seq_lens_device,
            step=step._replace(refill=refill),
            output_dtype=self.model_config.dtype,
            output=output,
        )


class MlaCuteImpl(PlannedImpl, MLACommonImpl[MlaCuteMetadata]):
    """Decode attention of one layer.

    Raises:
        ValueError: more than 128 heads (times the size of decode context parallelism), latent dimensions other than
            512 and 64, an unknown kv_cache_dtype.
        NotImplementedError: alibi slopes, a sliding window, a soft cap, or an attention that is not a decoder's.
    """

    can_return_lse_for_decode: bool = True
    lse_base_on_e: bool = True
    supports_dcp: bool = True
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
        gathered_heads = num_heads * self.dcp_world_size
        if gathered_heads > MAX_HEADS:
            raise ValueError(f"num_heads: expected 1 to {MAX_HEADS} on all ranks of a DCP group, got {gathered_heads}")
        self._kv_format, self._vllm_config = _FORMATS[kv_cache_dtype], get_current_vllm_config()
        self.supports_quant_query_input = _takes_e4m3_queries(self._kv_format, gathered_heads, self._vllm_config)

    def forward_mqa(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: MlaCuteMetadata,
        layer: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of the decode tokens of a step.

        Args:
            q: ([tokens, H, 512], [tokens, H, 64]) of the model's dtype, or both in one tensor [tokens, H, 576], which
                may be float8_e4m3fn.
            kv_c_and_k_pe_cache: [num_blocks, block_size, 576], or [num_blocks, block_size, 656] uint8.
            attn_metadata: of :class:`MlaCuteMetadataBuilder`.
            layer: has layer_name, and for an fp8 cache _k_scale_float and _q_scale_float.

        Returns:
            (output [tokens, H, 512] of the model's dtype, natural log-sum-exp [tokens, H] float32, or None where
            decode context parallelism does not ask for it)
        """
        decode = attn_metadata.decode
        assert decode is not None
        q_nope, q_pe = q if isinstance(q, tuple) else (q[..., :CKV_DIM], q[..., CKV_DIM:])
        options: dict[str, Any] = {}
        if q_nope.dtype is FP8:
            options["q_scale"] = layer._q_scale_float
        scale = layer._k_scale_float if self._kv_format == "tensor" else 1.0
        out = decode.output
        if out is None:
            out = torch.empty((*q_nope.shape[:2], CKV_DIM), dtype=decode.output_dtype, device=q_nope.device)
        if is_first_layer(decode, layer):
            decode.step.update()
        cache = paged_cache(kv_c_and_k_pe_cache, scale)
        out, lse = decode.step.attend(q_nope, q_pe, cache, self.scale, out=out, **options)
        return out, lse if self.need_to_return_lse_for_decode else None
