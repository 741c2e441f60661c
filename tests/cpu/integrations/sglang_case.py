"""Stand-ins for the parts of SGLang that its backend uses, with the signatures of tests/data/sglang_0.5.23.json."""

import abc
import enum
import sys
import types
from types import SimpleNamespace

import torch
from recorded_signatures import load

RECORD = load("sglang_0.5.23.json")
STATE = SimpleNamespace(
    dcp_enabled=False, enable_prefill_cp=False, topk=1, draft_tokens=3, deterministic=False, captured=False,
    disable_chunked_prefix_cache=False,
)  # fmt: skip


class ForwardMode(enum.Enum):
    EXTEND = "extend"
    DECODE = "decode"
    MIXED = "mixed"
    IDLE = "idle"
    TARGET_VERIFY = "target_verify"
    DRAFT_EXTEND_V2 = "draft_extend_v2"

    def is_decode_or_idle(self):
        return self in (ForwardMode.DECODE, ForwardMode.IDLE)

    def is_target_verify(self):
        return self is ForwardMode.TARGET_VERIFY

    def is_draft_extend_v2(self):
        return self is ForwardMode.DRAFT_EXTEND_V2

    def is_extend_without_speculative(self):
        return self in (ForwardMode.EXTEND, ForwardMode.MIXED)


def build_inner_fb_view(forward_batch, *, bs, forward_mode, encoder_lens=None):
    return SimpleNamespace(**vars(forward_batch) | {"batch_size": bs, "forward_mode": forward_mode})


class AttentionBackend(abc.ABC):  # noqa: B024
    forward_metadata = None


class FlashMLABackend(AttentionBackend):
    """SGLang captures the extension of drafts of its instances."""


class FlashAttentionBackend:
    """FlashAttention-3 for prompts in the expanded form: remembers what it was called for."""

    def __init__(
        self, model_runner, skip_prefill=False, speculative_step_id=0, topk=0, speculative_num_steps=0, fa_impl_ver=3
    ):
        self.calls = []

    def init_forward_metadata(self, forward_batch):
        self.calls.append("init_forward_metadata")

    def forward_extend(
        self, q, k, v, layer, forward_batch, save_kv_cache=True, q_rope=None, k_rope=None, sinks=None, q_descale=None,
        k_descale=None, v_descale=None, score_mod=None, aux_tensors=None, rel_bias=None, rel_bias_event=None,
        return_lse=False,
    ):  # fmt: skip
        assert q_rope is None
        assert k_rope is None
        self.calls.append("forward_extend")
        return "expanded"


def maybe_create_verify_mask(
    *, is_draft_runner, skip_prefill, max_bs, max_context_len, num_draft_tokens, device, is_read, dtype=torch.bool
):
    assert not is_read
    return None if is_draft_runner or skip_prefill or not num_draft_tokens else ("mask", max_bs)


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
# Lists of names, and what adds one.
CHOICES = {
    "ATTENTION_BACKEND_CHOICES": "add_attention_backend_choices",
    "DRAFT_ATTENTION_BACKEND_CHOICES": "add_draft_attention_backend_choices",
    "CHUNKED_PREFIX_CACHE_SUPPORTED_ATTENTION_BACKENDS": "add_chunked_prefix_cache_attention_backend",
    "DETERMINISTIC_ATTENTION_BACKEND_CHOICES": "add_deterministic_attention_backend_choices",
    "RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND": "add_radix_supported_deterministic_attention_backend_choices",
}


class AttentionBackendRegistry:
    @classmethod
    def register(cls, backend_name, handler_func):
        HANDLERS[backend_name] = handler_func


class AttnForwardMethod(enum.Enum):
    MLA = "mla"
    MHA_ONE_SHOT = "one shot"
    MHA_CHUNKED_KV = "chunked"


class HookType(enum.Enum):
    AROUND = "around"


class DraftBackendFactory:
    """The table and the lookup in it; hooks stand around `_create_backend` where `install` is told so."""

    def __init__(self, draft_model_runner, choice, topk=1, speculative_num_steps=4):
        self.draft_model_runner, self.choice = draft_model_runner, choice
        self.topk, self.speculative_num_steps = topk, speculative_num_steps

    def _create_backend(self, backend_name, backend_map, error_template, stamps_children=False):
        if self.choice not in backend_map:
            raise ValueError(error_template.format(backend_type=self.choice))
        return backend_map[self.choice]()


def get_num_kv_index_blocks_flashmla(kv_indices_width, page_size):
    raise AssertionError("of the CUDA path")


def get_cuda_graph_max_batch_size(max_batch_size):
    return max_batch_size


def install(monkeypatch):
    """Makes the imports of the backend and its plugin work. Returns what the plugin writes to."""
    modules = {name: types.ModuleType(name) for name in _modules()}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    srt = modules["sglang.srt"]
    indices = modules["sglang.kernels.ops.attention.kv_indices"]
    indices.create_flashmla_kv_indices_triton = None
    indices.get_num_kv_index_blocks_flashmla = get_num_kv_index_blocks_flashmla
    attention = srt.layers.attention
    attention.base_attn_backend.AttentionBackend = AttentionBackend
    attention.verify_mask.VerifyMask = tuple
    attention.verify_mask.maybe_create_verify_mask = maybe_create_verify_mask
    attention.flashattention_backend.FlashAttentionBackend = FlashAttentionBackend
    attention.flashmla_backend.FlashMLABackend = FlashMLABackend
    batches = srt.model_executor.forward_batch_info
    batches.ForwardMode, batches.build_inner_fb_view = ForwardMode, build_inner_fb_view
    graphs = srt.model_executor.runner_backend_utils
    graphs.breakable_cuda_graph.is_in_breakable_cuda_graph = lambda: STATE.captured
    graphs.tc_piecewise_cuda_graph.is_in_tc_piecewise_cuda_graph = lambda: STATE.captured
    srt.mem_cache.memory_pool.KVWriteLoc = KVWriteLoc
    srt.utils.get_cuda_graph_max_batch_size = get_cuda_graph_max_batch_size
    srt.runtime_context.get_parallel = lambda: SimpleNamespace(
        attn_tp_size=2, dcp_enabled=STATE.dcp_enabled, enable_prefill_cp=STATE.enable_prefill_cp
    )
    srt.runtime_context.get_exec = lambda: SimpleNamespace(
        deterministic=SimpleNamespace(enable_deterministic_inference=STATE.deterministic)
    )
    srt.runtime_context.get_schedule = lambda: SimpleNamespace(
        disable_chunked_prefix_cache=STATE.disable_chunked_prefix_cache
    )
    srt.runtime_context.get_spec = lambda: SimpleNamespace(
        speculative_num_draft_tokens=STATE.draft_tokens, speculative_eagle_topk=STATE.topk
    )
    common = srt.models.deepseek_common
    common.attention_backend_handler.AttentionBackendRegistry = AttentionBackendRegistry
    common.attention_forward_methods.forward_methods.AttnForwardMethod = AttnForwardMethod
    common.attention_forward_methods.forward_mha.resolve_attn_backend = lambda batch: batch.backend
    common.utils.FORWARD_ABSORB_CORE_ATTENTION_BACKENDS = ["fa3"]
    registries = _install_registries(srt)
    srt.layers.attention.attention_registry.register_attention_backend = lambda name: (
        lambda fn: registries.backends.setdefault(name, fn)
    )
    return registries


def _modules():
    """Every module that the backend or its plugin imports, and those that these are in."""
    leaves = (
        "kernels.ops.attention.kv_indices", "srt.arg_groups.choices", "srt.arg_groups.overrides",
        "srt.arg_groups.resolution_hooks", "srt.layers.attention.attention_registry",
        "srt.layers.attention.base_attn_backend", "srt.layers.attention.flashattention_backend",
        "srt.layers.attention.flashmla_backend",
        "srt.layers.attention.verify_mask", "srt.mem_cache.memory_pool", "srt.model_executor.forward_batch_info",
        "srt.model_executor.runner_backend_utils.breakable_cuda_graph",
        "srt.model_executor.runner_backend_utils.tc_piecewise_cuda_graph",
        "srt.models.deepseek_common.attention_backend_handler",
        "srt.models.deepseek_common.attention_forward_methods.forward_methods",
        "srt.models.deepseek_common.attention_forward_methods.forward_mha", "srt.models.deepseek_common.utils",
        "srt.plugins.hook_registry", "srt.runtime_context", "srt.utils",
    )  # fmt: skip
    found = []
    for leaf in leaves:
        parts = ["sglang", *leaf.split(".")]
        found += [".".join(parts[: n + 1]) for n in range(len(parts))]
    return sorted(set(found))


def _install_registries(srt):
    """Lists and tables that the plugin writes to."""
    choices, hooks, resolution = srt.arg_groups.choices, {}, {}
    for name, adder in CHOICES.items():
        values = ["fa3"]
        setattr(choices, name, values)
        method = values.append if adder == "add_chunked_prefix_cache_attention_backend" else values.extend
        setattr(choices, adder, method)
    srt.arg_groups.resolution_hooks.register_resolution_hook = lambda name: (
        lambda fn: resolution.setdefault(name, []).append(fn)
    )
    srt.arg_groups.overrides.resolved_view = lambda server_args: server_args
    srt.arg_groups.overrides.attention_backends_of = lambda view: view.backends
    srt.arg_groups.overrides.declare_resolution = lambda server_args, source, **fields: vars(server_args).update(fields)

    def register(target, hook, hook_type, *, source=None):
        hooks.setdefault(target, []).append((hook_type, hook))

    srt.plugins.hook_registry.HookType = HookType
    srt.plugins.hook_registry.HookRegistry = SimpleNamespace(register=register)
    return SimpleNamespace(choices=choices, backends={}, hooks=hooks, resolution=resolution)


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
            num_attention_heads=2 * case.q.shape[1], context_len=context_len, kv_lora_rank=512, qk_rope_head_dim=64,
            hf_config=SimpleNamespace(),
        ),
        device="cpu", dtype=case.q.dtype, kv_cache_dtype=kv_cache_dtype or case.q.dtype, page_size=page_size,
        req_to_token_pool=SimpleNamespace(req_to_token=slots, size=max_requests), token_to_kv_pool=pool,
        kv_index_translator=SimpleNamespace(is_translating=False), use_mla_backend=True,
        is_draft_worker=False,
    )  # fmt: skip
    vars(runner).update(changed)
    return runner


def make_batch(case, mode, *, uncounted=0, counted=0, host_lens=True, max_requests=8):
    """A batch whose requests have `uncounted` keys more than it says, or `counted` fewer."""
    lens = case.kv_len_arr.long() - uncounted + counted
    tokens = [q for q, _ in case.requests]
    extends = mode.is_extend_without_speculative() or mode.is_draft_extend_v2()
    prefixes = [kv - q for q, kv in case.requests] if extends else None
    return SimpleNamespace(
        forward_mode=mode, batch_size=len(lens), seq_lens=lens, seq_lens_cpu=lens.clone() if host_lens else None,
        req_pool_indices=max_requests - 1 - torch.arange(len(lens)), out_cache_loc=None,
        extend_prefix_lens_cpu=prefixes, extend_seq_lens_cpu=tokens if extends else None,
        extend_seq_lens=torch.tensor(tokens) if extends else None, attn_attend_prefix_cache=None,
        get_max_chunk_capacity=lambda: 128,
    )  # fmt: skip


def make_layer(case, scaling):
    return SimpleNamespace(
        layer_id=0, tp_q_head_num=case.q.shape[1], scaling=scaling, logit_cap=0.0, sliding_window_size=-1
    )
