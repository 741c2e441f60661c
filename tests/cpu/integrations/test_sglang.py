"""The backend for SGLang on CPU tensors, against attention in plain torch.

It runs with stand-ins for SGLang's classes (sglang_case.py). Their signatures and the backend's are held against
tests/data/sglang_0.5.23.json, recorded from the sources in the release's wheel (tests/recorded_signatures.py).
"""

import importlib
import sys

import pytest
import sglang_case
import torch
from integration_case import ABSURD, SM_SCALE, Case
from recorded_signatures import DATA, of
from sglang_case import RECORD, STATE, ForwardMode, MLATokenToKVPool, make_batch, make_layer, make_runner

from mla_cute.integrations import _engine_steps, _sglang_plugin
from mla_cute.plan import Plan
from mla_cute.plan_decode import DecodePlan
from mla_cute.plan_prefill import PrefillPlan

KV_LENS = (17, 64, 3, 8, 5)
DRAFTS = 3
OUT_TOLERANCE = {"rtol": 2**-7, "atol": 2**-8}  # the output is rounded to bf16; values are around 1


@pytest.fixture
def registries(monkeypatch):
    for name, value in (("dcp_enabled", False), ("topk", 1), ("draft_tokens", DRAFTS)):
        monkeypatch.setattr(STATE, name, value)
    monkeypatch.delitem(sys.modules, "mla_cute.integrations.sglang", raising=False)
    yield sglang_case.install(monkeypatch)
    sys.modules.pop("mla_cute.integrations.sglang", None)


@pytest.fixture
def module(registries):
    return importlib.import_module("mla_cute.integrations.sglang")


def make(mode=ForwardMode.DECODE, lens=KV_LENS, **kwargs):
    tokens = DRAFTS if mode is ForwardMode.TARGET_VERIFY else 1
    return Case([(tokens, n) for n in lens], **kwargs)


def batch_of(case, mode, **kwargs):
    return make_batch(case, mode, draft_tokens=DRAFTS if mode is ForwardMode.TARGET_VERIFY else 0, **kwargs)


def run(backend, case, batch, q=None, split=True, **kwargs):
    """Attention of one layer: [tokens, H * 512]."""
    q = case.q if q is None else q
    forward = backend.forward_extend if batch.forward_mode.is_target_verify() else backend.forward_decode
    given = {"q": q[..., :512], "q_rope": q[..., 512:]} if split else {"q": q.flatten(1)}
    given |= {"k": None, "v": None, "layer": make_layer(case, SM_SCALE), "forward_batch": batch}
    return forward(**given | kwargs)


def check(case, out, cache=None):
    expected, _ = case.expected(True, cache=cache)
    assert out.shape == (expected.shape[0], expected.shape[1] * 512)
    torch.testing.assert_close(out.float(), expected.flatten(1), **OUT_TOLERANCE)


# ------------------------------------------------------------------------------------------------ the release


RECORDED = {name: parameters for file in RECORD["files"].values() for name, parameters in file.items()}


def names_of(parameters):
    return [p["name"] for p in parameters if p["name"] not in ("self", "cls")]


@pytest.mark.parametrize("name", [name for name in RECORDED if "AttnBackend." in name or "AttentionBackend." in name])
def test_methods_take_what_the_release_passes(module, name):
    assert f"SGLang {RECORD['version']}" in module.__doc__
    method = name.partition(".")[2]
    ours, recorded = names_of(of(getattr(module.MlaCuteAttnBackend, method))), names_of(RECORDED[name])
    if method == "__init__":  # buffers for drafts go on to the parent
        recorded = [*recorded[:2], "buffers"]
    assert ours == recorded


def test_stand_ins_have_the_recorded_signatures():
    names = {"AttentionBackend": "FlashInferMLAAttnBackend"}
    checked = set()
    for name, recorded in RECORDED.items():
        cls, _, method = name.partition(".")
        stand_in = getattr(sglang_case, names.get(cls, cls), None)
        if stand_in is not None:
            assert names_of(of(getattr(stand_in, method) if method else stand_in)) == names_of(recorded), name
            checked.add(name)
    assert set(RECORDED) - checked == {"create_flashmla_kv_indices_triton", "register_attention_backend"}


def test_the_table_kernel_takes_what_it_is_given():
    expected = ["req_to_token_ptr", "req_pool_indices_ptr", "page_kernel_lens_ptr", "kv_start_idx", "kv_indices_ptr",
                "req_to_token_ptr_stride", "kv_indices_ptr_stride", "PAGED_SIZE"]  # fmt: skip
    assert names_of(RECORDED["create_flashmla_kv_indices_triton"]) == expected


def test_plugin_registers_and_creates(registries, module):
    choices, registered = registries
    for _ in range(2):
        _sglang_plugin.register()
    assert choices.ATTENTION_BACKEND_CHOICES == ["triton", "mla_cute"]
    assert choices.CHUNKED_PREFIX_CACHE_SUPPORTED_ATTENTION_BACKENDS == ["flashinfer", "mla_cute"]
    case = make()
    runner = make_runner(case, MLATokenToKVPool(case.cache))
    for _ in range(2):
        assert type(registered["mla_cute"](runner)).__name__ == "MlaCuteAttnBackend"
    common = sys.modules["sglang.srt.models.deepseek_common"]
    assert common.utils.FORWARD_ABSORB_CORE_ATTENTION_BACKENDS == ["fa3", "mla_cute"]
    assert sglang_case.HANDLERS["mla_cute"] is sglang_case.handle_attention_flashmla
    runner.use_mla_backend = False
    with pytest.raises(ValueError, match="expected an MLA model"):
        registered["mla_cute"](runner)


def test_entry_point_is_declared():
    tomllib = pytest.importorskip("tomllib", reason="Python before 3.11 has no tomllib")
    project = tomllib.loads((DATA.parents[1] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["sglang.srt.plugins"]["mla_cute"].partition(":")
    assert getattr(importlib.import_module(module), name) is _sglang_plugin.register


def test_without_sglang_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sglang", None)
    monkeypatch.delitem(sys.modules, "mla_cute.integrations.sglang", raising=False)
    with pytest.raises(ImportError, match=r'pip install "sglang==0\.5\.23"'):
        importlib.import_module("mla_cute.integrations.sglang")


# ------------------------------------------------------------------------------------------------ results


@pytest.mark.parametrize("host_lens", [True, False])
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("mode", [ForwardMode.DECODE, ForwardMode.TARGET_VERIFY])
def test_result_is_attention(module, mode, page_size, host_lens):
    case = make(mode, page_size=page_size, num_pages=128, num_indices=128)
    backend = module.MlaCuteAttnBackend(make_runner(case, MLATokenToKVPool(case.cache)))
    batch = batch_of(case, mode, host_lens=host_lens)
    backend.init_forward_metadata(batch)
    kind = DecodePlan if mode is ForwardMode.DECODE else PrefillPlan
    assert type(backend.forward_metadata.plan) is kind
    for split in (True, False):
        check(case, run(backend, case, batch, split=split))
    assert backend.calls == []


def test_new_rows_are_written_first(module):
    """In two parts and in one; not where the caller says they are written."""
    case = make()
    last = torch.cat([case.block_table[b, (n - 1) // 8, None] * 8 + (n - 1) % 8 for b, n in enumerate(KV_LENS)]).long()
    new = case.cache.flatten(0, 1)[last][:, None].clone()
    for parts in (True, False):
        pool = MLATokenToKVPool(case.cache.clone())
        pool.rows[last] = torch.nan
        backend = module.MlaCuteAttnBackend(make_runner(case, pool))
        batch = batch_of(case, ForwardMode.DECODE)
        batch.out_cache_loc = last
        backend.init_forward_metadata(batch)
        given = {"k": new[..., :512], "v": new[..., :512]} | ({"k_rope": new[..., 512:]} if parts else {"k": new})
        assert run(backend, case, batch, save_kv_cache=False, **given).isnan().any()
        check(case, run(backend, case, batch, **given))


@pytest.mark.parametrize("mode", [ForwardMode.DECODE, ForwardMode.TARGET_VERIFY])
def test_fp8_pool(module, mode):
    case = make(mode)
    stored = case.cache.to(torch.float8_e4m3fn)
    runner = make_runner(case, MLATokenToKVPool(stored), kv_cache_dtype=torch.float8_e4m3fn)
    backend, batch = module.MlaCuteAttnBackend(runner), batch_of(case, mode)
    backend.init_forward_metadata(batch)
    check(case, run(backend, case, batch), cache=stored.float())


def test_prompts_are_the_parents(module):
    case = make()
    backend = module.MlaCuteAttnBackend(make_runner(case, MLATokenToKVPool(case.cache)))
    batch = batch_of(case, ForwardMode.EXTEND)
    backend.init_forward_metadata(batch)
    backend.init_forward_metadata_out_graph(batch)
    backend.init_forward_metadata_in_graph(batch)
    assert backend.forward_extend(case.q, None, None, make_layer(case, SM_SCALE), batch) == "of the parent"
    assert backend.calls == [
        "init_forward_metadata", "init_forward_metadata_out_graph", "init_forward_metadata_in_graph", "forward_extend",
    ]  # fmt: skip


def test_idle(module):
    case = make()
    backend = module.MlaCuteAttnBackend(make_runner(case, MLATokenToKVPool(case.cache)))
    batch = batch_of(case, ForwardMode.IDLE)
    batch.batch_size, batch.seq_lens_cpu = 0, batch.seq_lens_cpu[:0]
    backend.init_forward_metadata(batch)
    assert backend.calls == []


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("host_lens", [True, False])
@pytest.mark.parametrize("before", [None, ForwardMode.DECODE, ForwardMode.TARGET_VERIFY])
@pytest.mark.parametrize("mode", [ForwardMode.DECODE, ForwardMode.TARGET_VERIFY])
def test_steps_without_requests(module, mode, before, host_lens, graph):
    """In a fresh backend, and after a step whose plan is of other sizes."""
    case = make(before or mode)
    pool = MLATokenToKVPool(case.cache.clone())
    backend = module.MlaCuteAttnBackend(make_runner(case, pool))
    if before is not None:
        batch = batch_of(case, before)
        backend.init_forward_metadata(batch)
        check(case, run(backend, case, batch))
    batch = batch_of(case, mode, host_lens=host_lens)
    batch.batch_size, batch.out_cache_loc = 0, torch.zeros(0, dtype=torch.long)
    for name in ("seq_lens", "req_pool_indices", *(["seq_lens_cpu"] if host_lens else [])):
        setattr(batch, name, getattr(batch, name)[:0])
    if graph:
        backend.init_cuda_graph_state(8, 8 * DRAFTS)
        backend.init_forward_metadata_out_graph(batch, in_capture=True)
        backend.init_forward_metadata_in_graph(batch)
    else:
        backend.init_forward_metadata(batch)
    rows = case.q.new_empty(0, 1, 576)
    for split in (True, False):
        given = {"k": rows[..., :512], "k_rope": rows[..., 512:]} if split else {"k": rows, "v": rows[..., :512]}
        out = run(backend, case, batch, q=case.q[:0], split=split, **given)
        assert out.shape == (0, case.q.shape[1] * 512)
        assert out.dtype is case.q.dtype
    assert torch.equal(pool.rows.view(torch.int16), case.cache.view(torch.int16).view(-1, 1, 576))
    assert backend.calls == []


def test_block_tables_of_eager_steps_grow(module):
    case = make(lens=(70, 3, 9))
    backend = module.MlaCuteAttnBackend(make_runner(case, MLATokenToKVPool(case.cache)))
    shapes = []
    for lens in ((3, 5), (70, 3, 9), (3,)):
        batch = batch_of(case, ForwardMode.DECODE)
        batch.batch_size = len(lens)
        batch.seq_lens = batch.seq_lens_cpu = torch.tensor(lens)
        backend.init_forward_metadata(batch)
        shapes.append(tuple(backend._block_tables.shape))
    assert shapes == [(2, 1), (3, 11), (3, 11)]
    batch = batch_of(case, ForwardMode.DECODE)
    backend.init_forward_metadata(batch)
    check(case, run(backend, case, batch))


# ------------------------------------------------------------------------------------------------ CUDA graphs


@pytest.mark.parametrize("mode", [ForwardMode.DECODE, ForwardMode.TARGET_VERIFY])
def test_a_captured_step_is_refilled_in_the_graph(module, mode, monkeypatch):
    """A graph for 6 requests is captured with other lengths and replays with 5: the batch's tensors are overwritten,
    and what was recorded runs again."""
    updates = []
    monkeypatch.setattr(_engine_steps.StepPlans, "RECENT", 1)
    update = Plan.update
    monkeypatch.setattr(Plan, "update", lambda plan: updates.append(plan) or update(plan))
    tokens = DRAFTS if mode is ForwardMode.TARGET_VERIFY else 1
    case, slots = make(mode, spare_q=tokens), 6
    backend = module.MlaCuteAttnBackend(make_runner(case, MLATokenToKVPool(case.cache)))
    backend.init_cuda_graph_state(slots, slots * tokens)
    backend._graph_block_tables.fill_(ABSURD)
    static = batch_of(case, mode)
    static.batch_size, static.seq_lens_cpu = slots, None
    static.seq_lens, static.req_pool_indices = torch.ones(slots, dtype=torch.long), torch.full((slots,), 7)

    backend.init_forward_metadata_out_graph(static, in_capture=True)
    captured = backend.forward_metadata
    backend.init_forward_metadata_in_graph(static)
    assert updates[-1] is captured.plan

    live = batch_of(case, mode)
    backend.init_forward_metadata(live)  # a step without a graph, whose plan is the only other one that stays
    static.seq_lens[:5], static.req_pool_indices[:5] = live.seq_lens, live.req_pool_indices
    backend.init_forward_metadata_out_graph(static)
    assert backend.forward_metadata.plan is captured.plan
    assert backend.forward_metadata.pages.ids.data_ptr() == captured.pages.ids.data_ptr()
    updates.clear()
    backend.init_forward_metadata_in_graph(static)  # the replay
    assert updates == [captured.plan]
    out = run(backend, case, static, q=case.q.nan_to_num(0.5))
    check(case, out[: 5 * tokens])


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("state", "changed", "error", "message"),
    [
        ({"dcp_enabled": True}, {}, NotImplementedError, "dcp_size: expected 1"),
        ({"topk": 4}, {}, NotImplementedError, "speculative_eagle_topk: expected 1, .* got 4"),
        ({}, {"page_size": 48}, ValueError, "page_size: expected a power of two, got 48"),
        ({}, {"kv_cache_dtype": torch.float8_e5m2}, ValueError, "kv_cache_dtype: expected torch.float8_e4m3fn"),
        ({}, {"dtype": torch.float32}, ValueError, "kv_cache_dtype: .* with a model of torch.float32"),
    ],
)
def test_refuses(module, monkeypatch, state, changed, error, message):
    for name, value in state.items():
        monkeypatch.setattr(STATE, name, value)
    case = make()
    with pytest.raises(error, match=message):
        module.MlaCuteAttnBackend(make_runner(case, MLATokenToKVPool(case.cache), **changed))


def test_refuses_pools_and_models(module):
    case = make()
    runner = make_runner(case, MLATokenToKVPool(case.cache))
    runner.kv_index_translator.is_translating = True
    with pytest.raises(NotImplementedError, match="unified memory pool"):
        module.MlaCuteAttnBackend(runner)
    runner.kv_index_translator.is_translating = False
    runner.model_config.kv_lora_rank = 256
    with pytest.raises(ValueError, match="kv_lora_rank, qk_rope_head_dim: expected 512, 64, got 256, 64"):
        module.MlaCuteAttnBackend(runner)


@pytest.mark.parametrize("changed", [{"logit_cap": 30.0}, {"sliding_window_size": 128}])
def test_refuses_layers(module, changed):
    case = make()
    pool = MLATokenToKVPool(case.cache.clone())
    backend = module.MlaCuteAttnBackend(make_runner(case, pool))
    batch, layer = batch_of(case, ForwardMode.DECODE), make_layer(case, SM_SCALE)
    batch.out_cache_loc = torch.arange(5)
    vars(layer).update(changed)
    backend.init_forward_metadata(batch)
    rows = torch.full((5, 1, 576), 7.0, dtype=case.cache.dtype)
    with pytest.raises(NotImplementedError, match="logit_cap, sliding_window_size"):
        run(backend, case, batch, layer=layer, k=rows, v=rows[..., :512], split=False)
    assert not (pool.rows == 7).any()


def test_ragged_verification_is_refused(module):
    """Fewer draft tokens than planned."""
    case = make(ForwardMode.TARGET_VERIFY)
    backend = module.MlaCuteAttnBackend(make_runner(case, MLATokenToKVPool(case.cache)))
    batch = batch_of(case, ForwardMode.TARGET_VERIFY)
    backend.init_forward_metadata(batch)
    assert not backend.supports_ragged_verify_graph
    with pytest.raises(ValueError, match="plan: expected a plan for total_q 13, got one for total_q 15"):
        run(backend, case, batch, q=case.q[:13])
