"""vLLM for the tests of its backend: the installed release if it imports, else stand-ins for the classes that are used.

The stand-ins do what the release's classes do with what the backend overrides or reads, and have its signatures
(tests/data/vllm_0.33.0.json). Both take the same configuration and metadata, which are plain namespaces.
"""

import dataclasses
import enum
import importlib.util
import itertools
import sys
import types
from collections.abc import Callable, Hashable
from types import SimpleNamespace
from typing import Generic, TypeVar

import torch
from recorded_signatures import load

RECORD = load("vllm_0.33.0.json")
LAYER = "model.layers.0.self_attn.attn"
TOPK = 40
_MLA = "vllm.model_executor.layers.attention.mla_attention"
_SPARSE = "vllm.model_executor.layers.attention.sparse_mla_attention"
_ROWS = "vllm.v1.attention.backends.mla.sparse_utils"
_METADATA = "vllm.v1.attention.ops.metadata"


def install(monkeypatch) -> bool:
    """Makes `import vllm` work; whether it is the release."""
    if importlib.util.find_spec("vllm") is not None:
        import vllm.config
        import vllm.model_executor.layers.attention.mla_attention as mla

        for module in (mla, vllm.config):
            monkeypatch.setattr(module, "get_current_vllm_config", current_config)
        monkeypatch.setattr(vllm.config, "get_current_vllm_config_or_none", current_config)
        return True
    for name in (
        "vllm", "vllm.model_executor", "vllm.model_executor.layers", "vllm.model_executor.layers.attention", _MLA,
        "vllm.v1", "vllm.v1.attention", "vllm.v1.attention.backend", "vllm.v1.attention.backends",
        "vllm.v1.attention.backends.registry", "vllm.v1.worker", "vllm.v1.worker.workspace",
        "vllm.model_executor.warmup", "vllm.model_executor.warmup.cutedsl_warmup", "vllm.distributed",
        "vllm.distributed.parallel_state", "vllm.envs", "vllm.config", _SPARSE, _ROWS, _METADATA,
        "vllm.v1.attention.backends.mla", "vllm.v1.attention.ops",
    ):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    envs = sys.modules["vllm"].envs = sys.modules["vllm.envs"]
    envs.VLLM_BATCH_INVARIANT = False
    sys.modules["vllm.config"].get_current_vllm_config = current_config
    sys.modules["vllm.config"].get_current_vllm_config_or_none = current_config
    for name, found in (
        (_SPARSE, SparseMLACommonMetadata), (_SPARSE, SparseMLACommonMetadataBuilder), (_SPARSE, SparseMLACommonImpl),
        (_SPARSE, triton_convert_req_index_to_global_index), (_ROWS, align_blocks_to_rows), (_ROWS, flat_kv_row_view),
        (_METADATA, compute_token_to_req_indices),
    ):  # fmt: skip
        setattr(sys.modules[name], found.__name__, found)
    for cls in (
        QueryLenSupport, MLACommonBackend, MLACommonDecodeMetadata, MLACommonMetadata, MLACommonMetadataBuilder,
        MLACommonImpl,
    ):  # fmt: skip
        setattr(sys.modules[_MLA], cls.__name__, cls)
    for found in (AttentionCGSupport, AttentionType, MultipleOf, max_decode_query_len):
        setattr(sys.modules["vllm.v1.attention.backend"], found.__name__, found)
    sys.modules["vllm.distributed.parallel_state"].get_dcp_world_size_and_rank = get_dcp_world_size_and_rank
    warmup = sys.modules["vllm.model_executor.warmup.cutedsl_warmup"]
    warmup.CuTeDSLCompileUnit, warmup.register_cutedsl_warmup_provider = CuTeDSLCompileUnit, PROVIDERS.append
    workspace = sys.modules["vllm.v1.worker.workspace"]
    workspace.current_workspace_manager = lambda: WORKSPACES[-1]
    workspace.is_workspace_manager_initialized = lambda: bool(WORKSPACES)
    registry = sys.modules["vllm.v1.attention.backends.registry"]
    registry.AttentionBackendEnum, registry.register_backend = AttentionBackendEnum, register_backend
    return False


# ------------------------------------------------------------------------------------------------ what both are given

CURRENT = []


def make_config(cache_dtype="auto", *, heads=4, dcp=1, block_size=8, dtype=torch.bfloat16, drafts=0):
    prefill_backend = SimpleNamespace(clone=lambda: None)
    layer = SimpleNamespace(
        q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        prefill_backend=prefill_backend,
    )  # fmt: skip
    return SimpleNamespace(
        model_config=SimpleNamespace(
            dtype=dtype,
            max_model_len=64,
            get_num_attention_heads=lambda _: heads,
            get_head_size=lambda: 576,
            hf_text_config=SimpleNamespace(
                q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
            ),
            model_arch_config=SimpleNamespace(total_num_attention_heads=heads),
        ),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=dcp,
            prefill_context_parallel_size=1,
            cp_kv_cache_interleave_size=1,
            use_ubatching=False,
        ),
        compilation_config=SimpleNamespace(static_forward_context={LAYER: layer}),
        cache_config=SimpleNamespace(cache_dtype=cache_dtype, block_size=block_size),
        scheduler_config=SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=64),
        attention_config=SimpleNamespace(
            use_prefill_query_quantization=False, hisparse_config=None, sparse_mla_force_mqa=False
        ),
        speculative_config=SimpleNamespace(
            num_speculative_tokens=drafts, method="mtp", use_dspark=lambda: False, parallel_drafting=False
        )
        if drafts
        else None,
    )


def make_sparse_config(*args, **kwargs):
    """Of a model whose lists have TOPK tokens; no prompt takes vLLM's own path."""
    config = make_config(*args, **kwargs)
    config.model_config.hf_text_config.index_topk = TOPK
    config.compilation_config.static_forward_context[LAYER].prefill_backend = None
    return config


def current_config():
    return CURRENT[-1] if CURRENT else make_config()


def make_builder(cls, config, cache_dtype=None):
    """`cache_dtype`: of the layers at hand, where it is not the configured one."""
    cache = config.cache_config
    spec = SimpleNamespace(block_size=cache.block_size, cache_dtype_str=cache_dtype or cache.cache_dtype)
    return cls(spec, [LAYER], config, torch.device("cpu"))


def make_impl(cls, config, scale, **changed):
    """The configuration is current meanwhile, as vLLM has it while a model is built."""
    given = {
        "num_heads": config.model_config.get_num_attention_heads(None), "head_size": 576, "scale": scale,
        "num_kv_heads": 1, "alibi_slopes": None, "sliding_window": None,
        "kv_cache_dtype": config.cache_config.cache_dtype, "logits_soft_cap": None, "attn_type": "decoder",
        "kv_sharing_target_layer_name": None, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "qk_head_dim": 192, "v_head_dim": 128, "kv_b_proj": None,
    }  # fmt: skip
    CURRENT.append(config)
    try:
        return cls(**given | changed)
    finally:
        CURRENT.pop()


def make_metadata(block_table, seq_lens, query_start_loc, *, total=None, max_query_len=None, local_lens=None):
    """CommonAttentionMetadata; `total` counts padding, `max_query_len` is a promise, `local_lens` are a rank's keys."""
    host = query_start_loc.clone()
    total = int(host[-1]) if total is None else total
    return SimpleNamespace(
        query_start_loc=query_start_loc, query_start_loc_cpu=host, seq_lens=seq_lens, num_reqs=len(seq_lens),
        num_actual_tokens=total, max_query_len=max_query_len or int(host.diff().max()), max_seq_len=64,
        block_table_tensor=block_table, slot_mapping=torch.zeros(total, dtype=torch.int64), causal=True,
        dcp_local_seq_lens=local_lens, seq_lens_cpu_upper_bound=seq_lens.clone(), is_prefilling=None,
        max_logits_per_req=None, token_to_req_indices=lambda out: _owners(query_start_loc, out, total),
    )  # fmt: skip


def _owners(query_start_loc, out, tokens):
    """Which request each token is of; 0 past the last one."""
    owner = torch.searchsorted(query_start_loc[1:], torch.arange(tokens, dtype=torch.int32), right=True)
    out[:tokens] = owner.masked_fill(owner >= len(query_start_loc) - 1, 0)
    return out[:tokens]


# ------------------------------------------------------------------------------------------------ stand-ins


PROVIDERS = []
WORKSPACES = []


@dataclasses.dataclass(frozen=True)
class CuTeDSLCompileUnit:
    name: str
    key: Hashable
    compile: Callable[[], None]


class WorkspaceManager:
    """Hands the same tensor out for the same key."""

    def __init__(self):
        self.held = {}

    def get_persistent(self, key, shape, dtype, *, zero_init=False):
        made = self.held.setdefault(key, torch.empty(shape, dtype=dtype))
        assert (made.shape, made.dtype) == (torch.Size(shape), dtype)
        return made


class AttentionCGSupport(enum.Enum):
    ALWAYS = 3
    UNIFORM_BATCH = 2


class AttentionType(str, enum.Enum):
    DECODER = "decoder"
    ENCODER = "encoder"


@dataclasses.dataclass(frozen=True)
class MultipleOf:
    base: int


class QueryLenSupport(enum.Enum):
    VARLEN = "varlen"


class AttentionBackendEnum(enum.Enum):
    CUSTOM = None


REGISTERED = {}


def get_dcp_world_size_and_rank(enabled=True):
    return 1, 0


def max_decode_query_len(vllm_config):
    speculative = vllm_config.speculative_config
    return 1 if speculative is None else 1 + speculative.num_speculative_tokens


def register_backend(backend, class_path=None, is_mamba=False):
    REGISTERED[backend] = class_path


class MLACommonBackend:
    pass


@dataclasses.dataclass
class MLACommonDecodeMetadata:
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    dcp_tot_seq_lens: torch.Tensor | None


D = TypeVar("D")


@dataclasses.dataclass
class MLACommonMetadata(Generic[D]):
    num_reqs: int
    max_query_len: int
    max_seq_len: int
    num_actual_tokens: int
    query_start_loc: torch.Tensor
    slot_mapping: torch.Tensor
    num_decodes: int
    num_decode_tokens: int
    num_prefills: int
    causal: bool = True
    head_dim: int | None = None
    prefill: object | None = None
    decode: D | None = None


M = TypeVar("M")


class MLACommonMetadataBuilder(Generic[M]):
    def __init__(
        self, kv_cache_spec, layer_names, vllm_config, device, metadata_cls=None, supports_dcp_with_varlen=False
    ):
        self.metadata_cls, self.device, self.page_size = metadata_cls, device, kv_cache_spec.block_size
        self.model_config = vllm_config.model_config
        self.num_heads = self.model_config.get_num_attention_heads(vllm_config.parallel_config)
        self.reorder_batch_threshold = max(self.reorder_batch_threshold, max_decode_query_len(vllm_config))
        self.dcp_world_size = vllm_config.parallel_config.decode_context_parallel_size
        if self.dcp_world_size > 1 and not supports_dcp_with_varlen:
            self.reorder_batch_threshold = 1

    def _build_decode(
        self, block_table_tensor, seq_lens_device, max_seq_len, query_start_loc_cpu, query_start_loc_device,
        num_decode_tokens, max_query_len, dcp_tot_seq_lens_device,
    ):  # fmt: skip
        raise NotImplementedError

    def build_for_cudagraph_capture(self, common_attn_metadata):
        assert common_attn_metadata.max_query_len <= self.reorder_batch_threshold
        return self.build(0, common_attn_metadata)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        m, threshold = common_attn_metadata, self.reorder_batch_threshold
        lens = m.query_start_loc_cpu.diff().tolist()
        decodes = len(list(itertools.takewhile(lambda n: n <= threshold, lens)))
        tokens = m.num_actual_tokens if decodes == len(lens) else int(m.query_start_loc_cpu[decodes])
        is_shared = self.dcp_world_size > 1
        decode = self._build_decode(
            block_table_tensor=m.block_table_tensor[:decodes],
            seq_lens_device=(m.dcp_local_seq_lens if is_shared else m.seq_lens)[:decodes],
            max_seq_len=m.max_seq_len,
            query_start_loc_cpu=m.query_start_loc_cpu[: decodes + 1],
            query_start_loc_device=m.query_start_loc[: decodes + 1],
            num_decode_tokens=tokens,
            max_query_len=min(m.max_query_len, threshold),
            dcp_tot_seq_lens_device=m.seq_lens[:decodes] if is_shared else None,
        )
        return self.metadata_cls(
            m.num_reqs, m.max_query_len, m.max_seq_len, m.num_actual_tokens, m.query_start_loc, m.slot_mapping,
            num_decodes=decodes, num_decode_tokens=tokens, num_prefills=len(lens) - decodes, decode=decode,
        )  # fmt: skip


class MLACommonImpl(Generic[M]):
    need_to_return_lse_for_decode = False
    dcp_world_size = 1

    def __init__(
        self, num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype, logits_soft_cap,
        attn_type, kv_sharing_target_layer_name, q_lora_rank, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim,
        qk_head_dim, v_head_dim, kv_b_proj, indexer=None, q_pad_num_heads=None,
    ):  # fmt: skip
        self.scale, self.kv_cache_dtype = float(scale), kv_cache_dtype
        self.kv_lora_rank, self.qk_rope_head_dim = kv_lora_rank, qk_rope_head_dim
        self.supports_quant_query_input = True

    def forward_mqa(self, q, kv_c_and_k_pe_cache, attn_metadata, layer):
        raise NotImplementedError


# ------------------------------------------------------------------------------------------------ lists


def align_blocks_to_rows(spec, rows=1):
    return dataclasses.replace(spec, block_stride_alignment=rows * spec.state_content_size_bytes)


def flat_kv_row_view(kv_cache, block_size):
    blocks, _, width = kv_cache.shape
    stride = kv_cache.stride(0) // width
    return kv_cache.as_strided(((blocks - 1) * stride + block_size, width), (width, 1)), stride


def compute_token_to_req_indices(query_start_loc, out, num_mapped_tokens, num_tokens):
    return _owners(query_start_loc, out, num_tokens)


def triton_convert_req_index_to_global_index(
    req_id, block_table, token_indices, BLOCK_SIZE=64, BLOCK_STRIDE_ROWS=None, NUM_TOPK_TOKENS=2048,
    return_valid_counts=False, **more,
):  # fmt: skip
    """The release's for CPU tensors: rows of the cache, those that are none behind the others."""
    assert return_valid_counts
    assert token_indices.shape[1] == NUM_TOPK_TOKENS
    rows = torch.full_like(token_indices, -1)
    counts = torch.zeros(len(rows), dtype=torch.int32)
    for t, (request, tokens) in enumerate(zip(req_id.tolist(), token_indices.tolist(), strict=True)):
        found = [
            int(block_table[request, i // BLOCK_SIZE]) * (BLOCK_STRIDE_ROWS or BLOCK_SIZE) + i % BLOCK_SIZE
            for i in tokens
            if 0 <= i < block_table.shape[1] * BLOCK_SIZE
        ]
        rows[t, : len(found)] = torch.tensor(found, dtype=torch.int32)
        counts[t] = len(found)
    return rows, counts


@dataclasses.dataclass(kw_only=True)
class SparseMLACommonMetadata(MLACommonMetadata[MLACommonDecodeMetadata]):
    block_table: torch.Tensor
    req_id_per_token: torch.Tensor
    seq_lens: torch.Tensor | None = None
    block_size: int = 64
    topk_tokens: int = 2048
    num_decodes: int = 0
    num_prefills: int = 0
    num_decode_tokens: int = 0
    decode_max_query_len: int = 0
    prefill_max_seq_len: int = 0
    prefill: object | None = None
    cp_kv_cache_interleave_size: int = 1


class SparseMLACommonMetadataBuilder(Generic[M]):
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        self.kv_cache_spec, self.vllm_config, self.device = kv_cache_spec, vllm_config, device
        self.model_config = vllm_config.model_config
        self.topk_tokens = self.model_config.hf_text_config.index_topk
        self.req_id_per_token_buffer = torch.empty(
            vllm_config.scheduler_config.max_num_batched_tokens, dtype=torch.int32
        )

    def _init_reorder_batch_threshold(
        self, reorder_batch_threshold=1, supports_spec_as_decode=False, supports_dcp_with_varlen=False
    ):
        self.reorder_batch_threshold = reorder_batch_threshold

    def build_for_cudagraph_capture(self, common_attn_metadata):
        return self.build(common_prefix_len=0, common_attn_metadata=common_attn_metadata)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        m, threshold = common_attn_metadata, self.reorder_batch_threshold
        lens = m.query_start_loc_cpu.diff().tolist()
        decodes = len(list(itertools.takewhile(lambda n: n <= threshold, lens)))
        return self.metadata_cls(
            num_reqs=m.num_reqs, max_query_len=m.max_query_len, max_seq_len=m.max_seq_len,
            num_actual_tokens=m.num_actual_tokens, query_start_loc=m.query_start_loc, slot_mapping=m.slot_mapping,
            block_table=m.block_table_tensor, req_id_per_token=m.token_to_req_indices(self.req_id_per_token_buffer),
            seq_lens=m.seq_lens, block_size=self.kv_cache_spec.block_size, topk_tokens=self.topk_tokens,
            num_decodes=decodes, num_prefills=len(lens) - decodes,
            num_decode_tokens=m.num_actual_tokens if decodes == len(lens) else int(m.query_start_loc_cpu[decodes]),
        )  # fmt: skip


class SparseMLACommonImpl(Generic[M]):
    is_sparse = True

    def __init__(
        self, num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype, logits_soft_cap,
        attn_type, kv_sharing_target_layer_name, q_lora_rank, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim,
        qk_head_dim, v_head_dim, kv_b_proj, indexer=None, topk_indices_buffer=None, index_group_builder=None,
        q_pad_num_heads=None,
    ):  # fmt: skip
        self.scale, self.kv_cache_dtype = float(scale), kv_cache_dtype
        self.kv_lora_rank, self.qk_rope_head_dim = kv_lora_rank, qk_rope_head_dim
        self.topk_indices_buffer = topk_indices_buffer

    def forward_mqa(self, q, kv_c_and_k_pe_cache, attn_metadata, layer):
        tokens = q[0].shape[0] if isinstance(q, tuple) else q.shape[0]
        topk, block_size = self.topk_indices_buffer[:tokens], attn_metadata.block_size
        _, stride = flat_kv_row_view(kv_c_and_k_pe_cache, block_size)
        rows, counts = triton_convert_req_index_to_global_index(
            attn_metadata.req_id_per_token[:tokens], attn_metadata.block_table, topk, BLOCK_SIZE=block_size,
            BLOCK_STRIDE_ROWS=stride, NUM_TOPK_TOKENS=topk.shape[1], return_valid_counts=True,
        )  # fmt: skip
        return self._forward_mqa_kernel(
            q, kv_c_and_k_pe_cache, rows, counts, layer=layer, block_size=block_size,
            is_decode=attn_metadata.num_decode_tokens >= tokens,
        )  # fmt: skip

    def _forward_mqa_kernel(
        self, q, kv_cache, topk_indices, valid_counts, *, layer, block_size, is_decode
    ):  # fmt: skip
        raise NotImplementedError
