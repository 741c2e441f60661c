"""Stand-ins of the peers' modules, of the releases whose signatures tests/data has: a call must fit the recorded
signature, is kept, and is answered by this library's references."""

import inspect
import types

import torch
from recorded_signatures import load

from mla_cute.quant import group_rows
from mla_cute.reference import prefill_reference, prefill_reference_block_table, sparse_reference

_VLLM = load("peers_vllm_0.33.0.json")["files"]
FLASH_ATTN = _VLLM["vllm/vllm_flash_attn/flash_attn_interface.py"]
FLASH_MLA = _VLLM["vllm/third_party/flashmla/flash_mla_interface.py"]
FLASH_MLA_FP8 = _VLLM["vllm/v1/attention/ops/flashmla.py"]
(SGL_FLASH_MLA,) = load("peers_sgl_flash_mla_1.0.0.json")["files"].values()
FLASHINFER = load("flashinfer_0.7.4.json")["files"]["flashinfer/mla/_batch_mla/_wrapper.py"]


class Calls(list):
    """(name, arguments by name) of each call, in order."""

    def of(self, name):
        return [arguments for called, arguments in self if called == name]


def recorded(calls, name, parameters, answer):
    """A function with recorded parameters that keeps its arguments and returns `answer` of them."""

    def parameter(p):
        default = (
            {"default": p.get("default", p.get("default_source"))} if p.keys() & {"default", "default_source"} else {}
        )
        return inspect.Parameter(p["name"], inspect.Parameter.__dict__[p["kind"]], **default)

    signature = inspect.Signature([parameter(p) for p in parameters])

    def function(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        calls.append((name, dict(bound.arguments)))
        bound.apply_defaults()
        return answer(**bound.arguments)

    function.__signature__ = signature
    return function


def module_of(name, **attributes):
    module = types.ModuleType(name)
    vars(module).update(attributes)
    return module


class Metadata:
    """FlashMLA's FlashMLASchedMeta: empty until a call or its caller fills it."""

    tile_scheduler_metadata = num_splits = None


def _flash_mla(q, k_cache, block_table, cache_seqlens, softmax_scale, causal, **scales):
    """[batch, q_len, H, 512], as FlashMLA's functions return it."""
    batch, q_len = q.shape[:2]
    assert k_cache.shape[1:] == (64, 1, 576)
    assert block_table.shape[0] == batch
    q, cache = q.flatten(0, 1), k_cache.squeeze(2)
    qo_indptr = torch.arange(batch + 1, dtype=torch.int32) * q_len
    out, lse = prefill_reference_block_table(
        q[..., :512], q[..., 512:], cache[..., :512], cache[..., 512:], qo_indptr, block_table, cache_seqlens,
        softmax_scale, causal=causal, **scales,
    )  # fmt: skip
    return out.unflatten(0, (batch, q_len)), lse


def _descaled(descale_q, descale_k):
    for scale in (descale_q, descale_k):
        assert scale.dtype is torch.float32
        assert scale.shape == (1,)
    return {"q_scale": descale_q.item(), "ckv_scale": descale_k.item(), "kpe_scale": descale_k.item()}


def _answer_flash_mla(q, k_cache, block_table, cache_seqlens, softmax_scale, causal, tile_scheduler_metadata, **rest):
    assert isinstance(tile_scheduler_metadata, Metadata)
    assert rest["num_splits"] is None
    assert rest["head_dim_v"] == 512
    if rest.get("indices") is not None:
        assert rest["is_fp8_kvcache"]
        assert block_table is cache_seqlens is None
        assert q.shape[2] in (64, 128)
        ckv, scales, kpe = group_rows(k_cache.squeeze(2))
        q = q.squeeze(1)
        out, lse = sparse_reference(
            q[..., :512],
            q[..., 512:],
            ckv,
            kpe,
            rest["indices"].squeeze(1),
            softmax_scale,
            ckv_scale_arr=scales,
        )
        return out.unsqueeze(1), lse
    assert not rest["is_fp8_kvcache"]
    return _flash_mla(q, k_cache, block_table, cache_seqlens, softmax_scale, causal)


def _answer_flash_mla_sparse(q, kv, indices, sm_scale, **rest):
    assert q.dtype is kv.dtype is torch.bfloat16
    assert kv.shape[1:] == (1, 576)
    assert indices.shape[1] == 1
    q_nope, q_pe, ckv, kpe = q[..., :512], q[..., 512:], kv[..., :512], kv[..., 512:]
    out, lse = sparse_reference(q_nope, q_pe, ckv, kpe, indices.squeeze(1), sm_scale)
    return out, None, lse


def _answer_flash_mla_fp8(q, k_cache, block_table, cache_seqlens, softmax_scale, causal, **rest):
    assert q.dtype is k_cache.dtype is torch.float8_e4m3fn
    assert (rest["tile_scheduler_metadata"], rest["num_splits"]) == ("fp8 tiles", "fp8 splits")
    scales = _descaled(rest["descale_q"], rest["descale_k"])
    return _flash_mla(q, k_cache, block_table, cache_seqlens, softmax_scale, causal, **scales)


def _answer_sgl(use_legacy, is_fp8_kvcache, descale_q, descale_k, tile_scheduler_metadata, **rest):
    assert use_legacy
    assert isinstance(tile_scheduler_metadata, Metadata)
    if not is_fp8_kvcache:
        assert descale_q is descale_k is None
        return _answer_flash_mla(**rest, tile_scheduler_metadata=tile_scheduler_metadata, is_fp8_kvcache=False)
    of = tile_scheduler_metadata
    rest |= {"tile_scheduler_metadata": of.tile_scheduler_metadata, "num_splits": of.num_splits}
    return _answer_flash_mla_fp8(**rest, descale_q=descale_q, descale_k=descale_k)


def _answer_sgl_metadata(use_legacy, is_fp8_kvcache, topk, **rest):
    assert use_legacy
    assert is_fp8_kvcache
    assert topk is None
    return "fp8 tiles", "fp8 splits"


def _answer_flash_attn(q, k, v, q_v, **rest):
    assert rest["fa_version"] == 3
    assert rest["cu_seqlens_k"] is None
    assert k.shape[2:] == (1, 64)
    assert v.shape[2:] == (1, 512)
    assert k.shape[:2] == v.shape[:2]
    assert rest["scheduler_metadata"] == f"{rest['num_splits']} splits"
    lengths = rest["seqused_k"]
    assert rest["max_seqlen_k"] == lengths.max()
    assert rest["max_seqlen_q"] == rest["cu_seqlens_q"].diff().max()
    out, _ = prefill_reference_block_table(
        q_v, q, v.squeeze(2), k.squeeze(2), rest["cu_seqlens_q"], rest["block_table"], lengths, rest["softmax_scale"],
        causal=rest["causal"],
    )  # fmt: skip
    return out


def vllm_modules(calls, flash_attn_3="", flash_mla=True):
    """vLLM's by name; `flash_attn_3`: why this GPU has no FlashAttention-3."""
    names = ("vllm", "vllm.third_party", "vllm.third_party.flashmla", "vllm.v1", "vllm.v1.attention")
    modules = {name: module_of(name) for name in (*names, "vllm.v1.attention.ops")}
    attn = {
        "get_scheduler_metadata": lambda num_splits, **rest: f"{num_splits} splits",
        "flash_attn_varlen_func": _answer_flash_attn,
        "is_fa_version_supported": lambda fa_version: not flash_attn_3,
        "fa_version_unsupported_reason": lambda fa_version: flash_attn_3 or None,
    }
    mla = {"get_mla_metadata": lambda **ignored: (Metadata(), None), "flash_mla_with_kvcache": _answer_flash_mla}
    mla["flash_mla_sparse_fwd"] = _answer_flash_mla_sparse
    fp8 = {
        "get_mla_metadata_dense_fp8": lambda **lengths: ("fp8 tiles", "fp8 splits"),
        "flash_mla_with_kvcache_fp8": _answer_flash_mla_fp8,
    }
    for name, signatures, answers in (
        ("vllm.vllm_flash_attn", FLASH_ATTN, attn),
        ("vllm.third_party.flashmla.flash_mla_interface", FLASH_MLA, mla),
        ("vllm.v1.attention.ops.flashmla", FLASH_MLA_FP8, fp8),
    ):
        assert signatures.keys() == answers.keys()
        functions = {key: recorded(calls, key, signatures[key], answer) for key, answer in answers.items()}
        modules[name] = module_of(name, **functions)
    return modules


def sgl_flash_mla_module(calls):
    answers = {
        "get_mla_metadata": lambda **ignored: (Metadata(), None),
        "get_mla_decoding_metadata": _answer_sgl_metadata,
        "flash_mla_with_kvcache": _answer_sgl,
    }
    assert SGL_FLASH_MLA.keys() == answers.keys()
    functions = {f"{name}": recorded(calls, f"sgl {name}", SGL_FLASH_MLA[name], answers[name]) for name in answers}
    return {"flash_mla": module_of("flash_mla", __version__="1.0.0", **functions)}


def flashinfer_modules(calls):
    def plan(self, **options):
        self.options = options

    def run(self, q_nope, q_pe, ckv_cache, kpe_cache, out, ckv_scale, kpe_scale, **rest):
        o = self.options
        assert (o["q_data_type"], o["kv_data_type"]) == (q_nope.dtype, ckv_cache.dtype)
        assert (o["num_heads"], o["page_size"]) == (q_nope.shape[1], ckv_cache.shape[1])
        assert (o["head_dim_ckv"], o["head_dim_kpe"]) == (512, 64)
        assert q_pe.dtype is q_nope.dtype
        assert kpe_cache.dtype is ckv_cache.dtype
        is_fp8 = ckv_cache.dtype is torch.float8_e4m3fn
        assert is_fp8 is (ckv_scale is not None) is (kpe_scale is not None)
        last = o["kv_len_arr"] - (o["kv_indptr"].diff() - 1) * o["page_size"]
        scales = {"ckv_scale": ckv_scale, "kpe_scale": kpe_scale} if is_fp8 else {}
        prefill_reference(
            q_nope, q_pe, ckv_cache, kpe_cache, o["qo_indptr"], o["kv_indptr"], o["kv_indices"], o["sm_scale"],
            causal=o["causal"], kv_last_page_len=last, out=out, **scales,
        )  # fmt: skip

    methods = {"__init__": lambda self, **options: None, "plan": plan, "run": run}
    wrapper = type("Wrapper", (), {})
    for key, answer in methods.items():
        function = recorded(calls, key, FLASHINFER[f"BatchMLAPagedAttentionWrapper.{key}"], answer)
        setattr(wrapper, key, function)
    mla = module_of("flashinfer.mla", BatchMLAPagedAttentionWrapper=wrapper)
    return {"flashinfer": module_of("flashinfer", __version__="0.7.4", mla=mla), "flashinfer.mla": mla}


def install(monkeypatch, *modules):
    """Make the modules importable."""
    import sys

    for by_name in modules:
        for name, module in by_name.items():
            monkeypatch.setitem(sys.modules, name, module)
