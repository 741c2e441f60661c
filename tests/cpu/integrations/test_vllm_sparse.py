"""The backend for vLLM's sparse MLA layers on CPU tensors, against attention in plain torch; with the release's classes
where it is installed, as in test_vllm.py."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
import vllm_case
from integration_case import ABSURD, SM_SCALE, Case, rows_of_656
from recorded_signatures import of
from vllm_case import LAYER, RECORD, TOPK, make_builder, make_impl, make_metadata, make_sparse_config
from vllm_sparse_engine import SparseCalls

from mla_cute.gpu_speed import H200
from mla_cute.integrations import _vllm_plugin
from mla_cute.plan import Plan
from mla_cute.tuned import select

DECODE = [(1, 17), (1, 64), (1, 1), (1, 8)]
DRAFTS = [(3, 17), (3, 64), (3, 3), (3, 8)]
MIXED = [(1, 17), (3, 30), (5, 5), (2, 9), (4, 64)]
OUT_TOLERANCE = {"rtol": 2**-7, "atol": 2**-8}
RECORDED = {name: parameters for file in RECORD["files"].values() for name, parameters in file.items()}
OURS = {
    "SparseMLACommonMetadataBuilder": "MlaCuteSparseMetadataBuilder", "SparseMLACommonImpl": "MlaCuteSparseImpl",
}  # fmt: skip


@pytest.fixture
def backend(monkeypatch):
    """The module, imported beside the release or stand-ins for it; `is_release` says which."""
    is_release = vllm_case.install(monkeypatch)
    names = ("mla_cute.integrations.vllm", "mla_cute.integrations.vllm_sparse")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(names[1])
    monkeypatch.setattr(module, "is_release", is_release, raising=False)
    if is_release:
        sparse = sys.modules["vllm.model_executor.layers.attention.sparse_mla_attention"]
        convert = vllm_case.triton_convert_req_index_to_global_index
        monkeypatch.setattr(sparse, convert.__name__, convert)
        monkeypatch.setattr(sparse, "get_current_vllm_config", vllm_case.current_config)
        monkeypatch.setattr(sparse, "get_tensor_model_parallel_world_size", lambda: 1)
        monkeypatch.setattr(sparse, "PIN_MEMORY", False)  # which needs a driver
        monkeypatch.setattr(module, "compute_token_to_req_indices", vllm_case.compute_token_to_req_indices)
    yield module
    for name in names:
        sys.modules.pop(name, None)


def make_layer(name=LAYER):
    return SimpleNamespace(layer_name=name)


def lists_of(case, seed=0):
    """What an indexer would choose: positions of each token's request, [tokens, TOPK], and what they say of `case`."""
    generator = torch.Generator().manual_seed(seed)
    lists = []
    for begin, (q_len, kv_len) in zip(case.qo_indptr.tolist(), case.requests, strict=False):
        assert begin == len(lists)
        for i in range(q_len):
            seen = kv_len - q_len + i + 1
            lists.append(torch.randperm(seen, generator=generator)[:TOPK])
    buffer = torch.full((len(lists), TOPK), -1, dtype=torch.int32)
    for row, chosen in zip(buffer, lists, strict=True):
        row[: len(chosen)] = chosen
    return buffer


def expected(case, lists, cache=None):
    cache = (case.cache if cache is None else cache).float()
    rows, found = iter(range(len(lists))), []
    for b, (q_len, _) in enumerate(case.requests):
        for _ in range(q_len):
            t = next(rows)
            chosen = lists[t][lists[t] >= 0]
            keys = cache[case.block_table[b, chosen // case.page_size].long(), chosen % case.page_size]
            scores = case.q[t].float() @ keys.T * SM_SCALE
            found.append(scores.softmax(-1) @ keys[:, :512])
    return torch.stack(found)


def make_layer_impl(backend, config, buffer):
    group = SimpleNamespace(num_layers=1)
    groups = SimpleNamespace(register_layer=lambda *args, **kwargs: (group, 0))
    return make_impl(
        backend.MlaCuteSparseImpl, config, SM_SCALE, topk_indices_buffer=buffer, index_group_builder=groups
    )


def make_step(backend, case, cache_dtype="auto", seed=0):
    """(impl, metadata, lists) of a batch."""
    config = make_sparse_config(cache_dtype, block_size=case.page_size, heads=case.q.shape[1], dtype=case.q.dtype)
    builder = make_builder(backend.MlaCuteSparseMetadataBuilder, config)
    lists = lists_of(case, seed)
    buffer = torch.full((len(lists) + 5, TOPK), ABSURD, dtype=torch.int32)
    buffer[: len(lists)] = lists
    common = make_metadata(case.block_table, case.kv_len_arr, case.qo_indptr)
    return make_layer_impl(backend, config, buffer), builder.build(0, common), lists


def parts(q):
    return q[..., :512], q[..., 512:]


def check(case, result, lists, cache=None):
    out, lse = result
    assert lse is None
    assert out.dtype is case.q.dtype
    torch.testing.assert_close(out.float(), expected(case, lists, cache), **OUT_TOLERANCE)


# ------------------------------------------------------------------------------------------------ the release


@pytest.mark.parametrize("name", [name for name in RECORDED if name.partition(".")[0] in OURS])
def test_methods_take_what_the_release_passes(backend, name):
    assert f"vLLM {RECORD['version']}" in backend.__doc__
    cls, _, method = name.partition(".")
    ours = [p["name"] for p in of(getattr(getattr(backend, OURS[cls]), method))]
    recorded = [p["name"] for p in RECORDED[name]]
    if name == "SparseMLACommonImpl.__init__":
        assert ours[:11] == recorded[:11]
        assert ours[11:] == ["mla_args"]
    else:
        assert ours == recorded


def test_the_model_says_which_backend(backend, monkeypatch):
    for config, cls in (
        (make_sparse_config(), backend.MlaCuteSparseBackend),
        (vllm_case.make_config(), backend.MlaCuteBackend),
    ):
        monkeypatch.setattr(vllm_case, "CURRENT", [config])
        module, _, name = _vllm_plugin.BACKEND.rpartition(".")
        found = getattr(importlib.import_module(module), name)
        assert found is cls
        assert found.get_name() == "CUSTOM"
    with pytest.raises(AttributeError, match="has no attribute 'Backend'"):
        importlib.import_module("mla_cute.integrations._vllm_plugin").Backend  # noqa: B018


HOPPER = SimpleNamespace(major=9, minor=0)


def test_selection(backend, monkeypatch):
    cls = backend.MlaCuteSparseBackend

    def reason(kv_cache_dtype="auto", dtype=torch.bfloat16):
        return cls.supports_combination(576, dtype, kv_cache_dtype, 64, True, False, True, False, HOPPER)

    assert cls.is_sparse()
    assert not cls.supports_batch_invariance()
    assert reason() is None
    assert reason("fp8_ds_mla") is None
    assert "a model of torch.bfloat16" in reason("fp8_ds_mla", torch.float16)
    config = make_sparse_config()
    config.attention_config.hisparse_config = object()
    monkeypatch.setattr(vllm_case, "CURRENT", [config])
    assert "no HiSparse" in reason()


def test_selection_through_the_release(backend):
    if not backend.is_release:
        pytest.skip("vLLM is not installed")
    given = {
        "head_size": 576, "dtype": torch.bfloat16, "kv_cache_dtype": "fp8_ds_mla", "block_size": 64, "use_mla": True,
        "has_sink": False, "use_sparse": True, "use_mm_prefix": False, "use_per_head_quant_scales": False,
        "device_capability": HOPPER, "attn_type": "decoder",
    }  # fmt: skip
    validate = backend.MlaCuteSparseBackend.validate_configuration
    assert validate(**given) == []
    for changed, why in (
        ({"use_sparse": False}, "non-sparse not supported"), ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype not supp"),
        ({"has_sink": True}, "attention sinks not supported"), ({"use_dcp": True}, "DCP not supported"),
        ({"use_pcp": True}, "PCP not supported"), ({"use_batch_invariant": True}, "batch invariance not supported"),
    ):  # fmt: skip
        assert any(why in reason for reason in validate(**given | changed)), why


# ------------------------------------------------------------------------------------------------ results


@pytest.mark.parametrize("requests", [DECODE, DRAFTS, MIXED], ids=["decode", "drafts", "mixed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_result_is_attention_to_the_lists(backend, requests, dtype):
    case = Case(requests, dtype=dtype)
    impl, metadata, lists = make_step(backend, case)
    check(case, impl.forward_mqa(parts(case.q), case.cache, metadata, make_layer()), lists)
    check(case, impl.forward_mqa(case.q, case.cache, metadata, make_layer()), lists)


@pytest.mark.parametrize("requests", [DECODE, MIXED], ids=["decode", "mixed"])
def test_engines_are_checked_by_this(backend, monkeypatch, requests):
    """What tests/gpu/test_vllm_sparse_engine.py sees of a call."""
    for name in ("capture_begin", "replay"):  # which are undone with the test
        monkeypatch.setattr(torch.cuda.CUDAGraph, name, getattr(torch.cuda.CUDAGraph, name))
    calls = SparseCalls.of_engine()
    case = Case(requests, dtype=torch.bfloat16)
    impl, metadata, _ = make_step(backend, case)
    layer = SimpleNamespace(layer_name=LAYER, _k_scale_float=1.0)
    impl.forward_mqa(parts(case.q), case.cache, metadata, layer)
    assert calls.report()["errors"]["output"][0] < 0, "checked before the first request"
    calls.begin()
    impl.forward_mqa(parts(case.q), case.cache, metadata, layer)
    report = calls.report()
    assert calls.layers == {LAYER: 1}
    assert 0 <= report["errors"]["output"][0] < 5e-3
    assert report["wrong_lists"] == 0
    assert report["chosen"] == sum(kv_len - i > TOPK for q_len, kv_len in requests for i in range(q_len))
    assert report["kinds"] == {
        "decode": requests is DECODE, "several": requests is MIXED, "prefix": requests is MIXED, "replayed": 0,
    }  # fmt: skip


@pytest.mark.parametrize("requests", [DECODE, MIXED], ids=["decode", "mixed"])
def test_rows_of_656_bytes(backend, requests):
    case = Case(requests)
    pool, real = rows_of_656(case)
    impl, metadata, lists = make_step(backend, case, "fp8_ds_mla")
    check(case, impl.forward_mqa(parts(case.q), pool, metadata, make_layer()), lists, cache=real)


def test_blocks_with_others_between_them(backend):
    """Two layers in one tensor, block by block."""
    case = Case(MIXED)
    both = torch.full((len(case.cache), 2, *case.cache.shape[1:]), torch.nan, dtype=case.cache.dtype)
    both[:, 1] = case.cache
    impl, metadata, lists = make_step(backend, case)
    check(case, impl.forward_mqa(parts(case.q), both[:, 1], metadata, make_layer()), lists)


def test_layers_have_lists_of_their_own(backend, monkeypatch):
    """And one plan, made by the first of them whenever it runs."""
    updates = []
    update = Plan.update
    monkeypatch.setattr(Plan, "update", lambda plan: updates.append(plan) or update(plan))
    case = Case(MIXED)
    impl, metadata, lists = make_step(backend, case)
    other = lists_of(case, seed=1)
    for _ in range(2):
        impl.topk_indices_buffer[: len(lists)] = lists
        check(case, impl.forward_mqa(parts(case.q), case.cache, metadata, make_layer("layers.3")), lists)
        impl.topk_indices_buffer[: len(lists)] = other
        check(case, impl.forward_mqa(parts(case.q), case.cache, metadata, make_layer("layers.4")), other)
    assert updates == [metadata.step.plan] * 3  # one at the end of making it


def test_a_captured_step_is_found_again_and_refilled(backend):
    """A graph for 6 requests replays with 4: what it recorded (the captured metadata, here) runs on its own plan."""
    case, slots = Case(DECODE), 6
    config = make_sparse_config(block_size=case.page_size, heads=3)
    builder = make_builder(backend.MlaCuteSparseMetadataBuilder, config)
    table = torch.zeros(slots, case.block_table.shape[1], dtype=torch.int32)
    lens, indptr = torch.ones(slots, dtype=torch.int32), torch.arange(slots + 1, dtype=torch.int32)
    captured = builder.build_for_cudagraph_capture(make_metadata(table, lens, indptr))
    assert captured.keep
    (plan,) = builder._plans._kept.values()
    table[:4], lens[:4], lens[4:] = case.block_table, case.kv_len_arr, 0
    indptr[5:] = 4
    builder.build(0, make_metadata(table, lens, indptr, total=slots, max_query_len=1))
    lists = lists_of(case)
    buffer = torch.full((slots, TOPK), -1, dtype=torch.int32)
    buffer[:4] = lists
    impl = make_layer_impl(backend, config, buffer)
    q = torch.cat((case.q, case.q[:2]))
    out, _ = impl.forward_mqa(parts(q), case.cache, captured, make_layer())
    assert captured.step.plan is plan
    check(case, (out[:4], None), lists)
    assert not out[4:].any()


def test_drafts_find_their_requests_again(backend):
    case = Case(DRAFTS)
    impl, metadata, lists = make_step(backend, case)
    metadata.req_id_per_token.fill_(3)
    metadata.num_decode_tokens = len(case.q)
    config = make_sparse_config(block_size=case.page_size, heads=3)
    make_builder(backend.MlaCuteSparseMetadataBuilder, config).update_draft_decode_metadata(metadata)
    check(case, impl.forward_mqa(parts(case.q), case.cache, metadata, make_layer()), lists)


def test_vllm_compiles_what_steps_run(backend, monkeypatch):
    warmed = []
    dense = sys.modules[backend.PlanningBuilder.__module__]
    monkeypatch.setattr(dense, "warmup", lambda variants, progress: warmed.append(variants))
    builder = make_builder(backend.MlaCuteSparseMetadataBuilder, make_sparse_config("fp8_ds_mla"))
    (unit,) = builder.get_cutedsl_warmup_compile_units()
    unit.compile()
    (variants,) = warmed
    steps = [key for _, key, _ in variants if hasattr(key, "sparse")]
    assert {(key.kv_format, key.q_fp8, key.sparse) for key in steps} == {("group", False, True)}
    assert len(variants) == len(steps) + 1
    [planner] = [key for _, key, _ in variants if not hasattr(key, "sparse")]
    assert (planner.lengths, planner.batch_invariant) == ("seq_lens", False)


def test_vllm_compiles_the_configurations_that_steps_choose(backend, monkeypatch):
    """With more than 16 heads both kernels: how many query tokens there are says which."""
    asked = []

    def choose(*facts):
        asked.append(facts)
        op, kv_format, q_fp8, num_heads, page_size, q_len, batch, kv_len, device, invariant = facts
        when = select.When(op, kv_format, q_fp8, num_heads, page_size, q_len, batch, kv_len)
        return select.Selection(select.default_for(when, H200, invariant), "made up", None, when)

    monkeypatch.setattr(select, "choose", choose)
    builder = make_builder(backend.MlaCuteSparseMetadataBuilder, make_sparse_config("fp8_ds_mla", heads=128))
    names = {kernel.name for kernel, key, _ in builder.variants() if hasattr(key, "sparse")}
    assert names == {"decode_tile16_fp8", "decode_tile64_fp8"}
    assert {facts[:6] for facts in asked} == {("sparse", "group", False, 128, 1, 1)}
    assert {facts[8] for facts in asked} == {builder.device}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"num_heads": 129}, ValueError, "num_heads: expected 1 to 128, got 129"),
        ({"kv_cache_dtype": "fp8"}, ValueError, "kv_cache_dtype: expected one of auto, float16, bfloat16, fp8_ds_mla"),
        ({"kv_lora_rank": 256}, ValueError, "kv_lora_rank, qk_rope_head_dim: expected 512, 64, got 256, 64"),
        ({"qk_rope_head_dim": 0}, ValueError, "kv_lora_rank, qk_rope_head_dim: expected 512, 64, got 512, 0"),
        ({"sliding_window": 512}, NotImplementedError, "sliding_window: expected None"),
        ({"attn_type": "encoder"}, NotImplementedError, "attn_type: expected 'decoder'"),
    ],
)
def test_refuses(backend, changed, error, message):
    groups = SimpleNamespace(register_layer=lambda *args, **kwargs: (None, 0))
    with pytest.raises(error, match=message):
        make_impl(backend.MlaCuteSparseImpl, make_sparse_config(), SM_SCALE, index_group_builder=groups, **changed)
