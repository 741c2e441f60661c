"""Stand-ins for the parts of SGLang that its backend uses, with the signatures of tests/data/sglang_0.5.23.json."""

import enum
import sys
import types
from types import SimpleNamespace

import torch
from recorded_signatures import load

RECORD = load("sglang_0.5.23.json")
STATE = SimpleNamespace(dcp_enabled=False, topk=1, draft_tokens=3)


class ForwardMode(enum.Enum):
    EXTEND = "extend"
    DECODE = "decode"
    IDLE = "idle"
    TARGET_VERIFY = "target_verify"

    def is_decode_or_idle(self):
        return self in (ForwardMode.DECODE, ForwardMode.IDLE)

    def is_target_verify(self):
        return self is ForwardMode.TARGET_VERIFY


class FlashInferMLAAttnBackend:
    """The parent: remembers what it was called for."""

    def __init__(self, model_runner, skip_prefill=False, kv_indptr_buf=None, q_indptr_decode_buf=None):
        self.max_context_len = model_runner.model_config.context_len
        self.page_size, self.device = model_runner.page_size, model_runner.device
        self.req_to_token_pool, self.token_to_kv_pool = model_runner.req_to_token_pool, model_runner.token_to_kv_pool
        self.calls = []

    def init_forward_metadata(self, forward_batch):
        self.calls.append("init_forward_metadata")

    def init_forward_metadata_out_graph(self, forward_batch, in_capture=False):
        self.calls.append("init_forward_metadata_out_graph")

    def init_forward_metadata_in_graph(self, forward_batch):
        self.calls.append("init_forward_metadata_in_graph")

    def init_cuda_graph_state(self, max_bs, max_num_tokens, kv_indices_buf=None):
        raise AssertionError("the parent's graph buffers are not used")

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, q_rope=None, k_rope=None):
        self.calls.append("forward_extend")
        return "of the parent"

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, q_rope=None, k_rope=None):
        raise AssertionError("decode is not the parent's")


class KVWriteLoc:
    def __init__(self, loc):
        self.loc = loc

    @classmethod
    def for_batch(cls, forward_batch, *, swa_loc=None, full_loc=None):
        return cls(forward_batch.out_cache_loc)


class MLATokenToKVPool:
    """One layer's pool [slots, 1, 576]."""

    def __init__(self, rows):
        self.rows = rows.flatten(0, 1)[:, None]

    def get_key_buffer(self, layer_id):
        return self.rows

    def set_kv_buffer(self, layer, loc_info, cache_k, cache_v, layer_id_override=None):
        self.rows[loc_info.loc] = cache_k.to(self.rows.dtype)

    def set_mla_kv_buffer(self, layer, loc_info, cache_k_nope, cache_k_rope, layer_id_override=None):
        self.rows[loc_info.loc] = torch.cat((cache_k_nope, cache_k_rope), -1).to(self.rows.dtype)


HANDLERS = {}


class AttentionBackendRegistry:
    @classmethod
    def register(cls, backend_name, handler_func):
        HANDLERS[backend_name] = handler_func


def handle_attention_flashmla(attn, forward_batch):
    raise NotImplementedError


def get_num_kv_index_blocks_flashmla(kv_indices_width, page_size):
    raise AssertionError("of the CUDA path")


def get_cuda_graph_max_batch_size(max_batch_size):
    return max_batch_size


def install(monkeypatch):
    """Makes the imports of the backend and its plugin work. Returns (choices, registered backends)."""
    modules = {
        name: types.ModuleType(name)
        for name in (
            "sglang", "sglang.kernels", "sglang.kernels.ops", "sglang.kernels.ops.attention",
            "sglang.kernels.ops.attention.kv_indices", "sglang.srt", "sglang.srt.arg_groups",
            "sglang.srt.arg_groups.choices", "sglang.srt.layers", "sglang.srt.layers.attention",
            "sglang.srt.layers.attention.attention_registry", "sglang.srt.layers.attention.flashinfer_mla_backend",
            "sglang.srt.mem_cache", "sglang.srt.mem_cache.memory_pool", "sglang.srt.models",
            "sglang.srt.models.deepseek_common", "sglang.srt.models.deepseek_common.attention_backend_handler",
            "sglang.srt.models.deepseek_common.utils", "sglang.srt.runtime_context", "sglang.srt.utils",
        )
    }  # fmt: skip
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    srt = modules["sglang.srt"]
    indices = modules["sglang.kernels.ops.attention.kv_indices"]
    indices.create_flashmla_kv_indices_triton = None
    indices.get_num_kv_index_blocks_flashmla = get_num_kv_index_blocks_flashmla
    srt.layers.attention.flashinfer_mla_backend.FlashInferMLAAttnBackend = FlashInferMLAAttnBackend
    srt.mem_cache.memory_pool.KVWriteLoc = KVWriteLoc
    srt.utils.get_cuda_graph_max_batch_size = get_cuda_graph_max_batch_size
    srt.runtime_context.get_parallel = lambda: SimpleNamespace(attn_tp_size=2, dcp_enabled=STATE.dcp_enabled)
    srt.runtime_context.get_spec = lambda: SimpleNamespace(
        speculative_num_draft_tokens=STATE.draft_tokens, speculative_eagle_topk=STATE.topk
    )
    handler = srt.models.deepseek_common.attention_backend_handler
    handler.AttentionBackendRegistry = AttentionBackendRegistry
    handler.handle_attention_flashmla = handle_attention_flashmla
    srt.models.deepseek_common.utils.FORWARD_ABSORB_CORE_ATTENTION_BACKENDS = ["fa3"]
    choices, registered = srt.arg_groups.choices, {}
    choices.ATTENTION_BACKEND_CHOICES = ["triton"]
    choices.add_attention_backend_choices = choices.ATTENTION_BACKEND_CHOICES.extend
    choices.CHUNKED_PREFIX_CACHE_SUPPORTED_ATTENTION_BACKENDS = ["flashinfer"]
    choices.add_chunked_prefix_cache_attention_backend = (
        choices.CHUNKED_PREFIX_CACHE_SUPPORTED_ATTENTION_BACKENDS.append
    )
    srt.layers.attention.attention_registry.register_attention_backend = lambda name: (
        lambda fn: registered.setdefault(name, fn)
    )
    return choices, registered


def make_runner(case, pool, *, max_requests=8, context_len=80, kv_cache_dtype=None, **changed):
    """A ModelRunner whose pool has the pages of `case`; request b is in row 7 - b of req_to_token."""
    page_size = case.page_size
    slots = torch.full((max_requests, context_len + 16), -(2**20), dtype=torch.int32)
    for row, pages in enumerate(case.block_table):
        owned = pages[: -(-case.kv_lens[row] // page_size)]
        tokens = (owned[:, None] * page_size + torch.arange(page_size)).flatten()
        slots[max_requests - 1 - row, : len(tokens)] = tokens
    runner = SimpleNamespace(
        model_config=SimpleNamespace(
            num_attention_heads=2 * case.q.shape[1], context_len=context_len, kv_lora_rank=512, qk_rope_head_dim=64
        ),
        device="cpu", dtype=case.q.dtype, kv_cache_dtype=kv_cache_dtype or case.q.dtype, page_size=page_size,
        req_to_token_pool=SimpleNamespace(req_to_token=slots, size=max_requests), token_to_kv_pool=pool,
        kv_index_translator=SimpleNamespace(is_translating=False), use_mla_backend=True,
    )  # fmt: skip
    vars(runner).update(changed)
    return runner


def make_batch(case, mode, *, draft_tokens=0, host_lens=True, max_requests=8):
    lens = case.kv_len_arr.long() - draft_tokens
    return SimpleNamespace(
        forward_mode=mode, batch_size=len(lens), seq_lens=lens, seq_lens_cpu=lens.clone() if host_lens else None,
        req_pool_indices=max_requests - 1 - torch.arange(len(lens)), out_cache_loc=None,
    )  # fmt: skip


def make_layer(case, scaling):
    return SimpleNamespace(
        layer_id=0, tp_q_head_num=case.q.shape[1], scaling=scaling, logit_cap=0.0, sliding_window_size=-1
    )
