"""The backend for SGLang on CPU tensors, against attention in plain torch.

It runs with stand-ins for SGLang's classes (sglang_case.py). Their signatures and the backend's are held against
tests/data/sglang_0.5.23.json, recorded from the sources in the release's wheel (tests/recorded_signatures.py).
"""

import importlib
import sys
from types import SimpleNamespace

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
    for name, value in vars(STATE).items():
        monkeypatch.setattr(STATE, name, value)  # what a test changes ends with it
    monkeypatch.delitem(sys.modules, "mla_cute.integrations.sglang", raising=False)
    yield sglang_case.install(monkeypatch)
    sys.modules.pop("mla_cute.integrations.sglang", None)


@pytest.fixture
def module(registries):
    return importlib.import_module("mla_cute.integrations.sglang")


WINDOWS = (ForwardMode.TARGET_VERIFY, ForwardMode.DRAFT_EXTEND_V2)
PROMPT_LENS = (9, 1, 3, 8, 2)  # of KV_LENS: a chunk, a decode, a prompt, a prompt of whole pages, a chunk
MODES = (ForwardMode.DECODE, *WINDOWS, ForwardMode.EXTEND, ForwardMode.MIXED)
GRAPH_MODES = MODES[:3]


def make(mode=ForwardMode.DECODE, lens=KV_LENS, **kwargs):
    tokens = PROMPT_LENS if mode.is_extend_without_speculative() else [DRAFTS if mode in WINDOWS else 1] * len(lens)
    return Case(list(zip(tokens, lens, strict=False)), **kwargs)


def batch_of(case, mode, **kwargs):
    return make_batch(case, mode, uncounted=DRAFTS if mode is ForwardMode.TARGET_VERIFY else 0, **kwargs)


def run(backend, case, batch, q=None, split=True, **kwargs):
    """Attention of one layer: [tokens, H * 512]."""
    q = case.q if q is None else q
    forward = backend.forward_decode if batch.forward_mode.is_decode_or_idle() else backend.forward_extend
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


# Of the methods that SGLang calls, a release's class that has each with the parameters that a caller may pass.
OURS = {
    "AttentionBackend": "MlaCuteAttnBackend", "FlashInferMLAAttnBackend": "MlaCuteAttnBackend",
    "FlashAttentionMultiStepBackend": "MlaCuteMultiStepDraftBackend",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in RECORDED if name.partition(".")[0] in OURS])
def test_methods_take_what_the_release_passes(module, name):
    assert f"SGLang {RECORD['version']}" in module.__doc__
    cls, _, method = name.partition(".")
    ours, recorded = names_of(of(getattr(getattr(module, OURS[cls]), method))), names_of(RECORDED[name])
    assert ours == [name for name in recorded if name != "fa_impl_ver"]


def test_stand_ins_have_the_recorded_signatures():
    checked = set()
    for name, recorded in RECORDED.items():
        cls, _, method = name.partition(".")
        stand_in = getattr(sglang_case, cls, None)
        if stand_in is not None and cls not in OURS:
            assert names_of(of(getattr(stand_in, method) if method else stand_in)) == names_of(recorded), name
            checked.add(name)
    unchecked = {name for name in RECORDED if name.partition(".")[0] not in OURS} - checked
    assert unchecked == {
        "create_flashmla_kv_indices_triton", "register_attention_backend", "handle_attention_flashmla",
        "resolve_attn_backend", "register_resolution_hook", "declare_resolution", "resolved_view",
        "attention_backends_of",
    }  # fmt: skip
    for name, called in (("resolve_attn_backend", 1), ("handle_attention_flashmla", 2), ("declare_resolution", 3)):
        assert len(names_of(RECORDED[name])) == called, name
    assert names_of(RECORDED["handle_attention_flashmla"])[1] == names_of(of(_sglang_plugin.choose_form))[1]
    recorded = names_of(RECORDED["DraftBackendFactory._create_backend"])
    assert names_of(of(_sglang_plugin.create_draft))[2:] == recorded


def test_the_table_kernel_takes_what_it_is_given():
    expected = ["req_to_token_ptr", "req_pool_indices_ptr", "page_kernel_lens_ptr", "kv_start_idx", "kv_indices_ptr",
                "req_to_token_ptr_stride", "kv_indices_ptr_stride", "PAGED_SIZE"]  # fmt: skip
    assert names_of(RECORDED["create_flashmla_kv_indices_triton"]) == expected


def test_plugin_registers_and_creates(registries, module):
    for _ in range(2):
        _sglang_plugin.register()
    for name in sglang_case.CHOICES:
        assert getattr(registries.choices, name) == ["fa3", "mla_cute"]
    assert [len(found) for found in (*registries.resolution.values(), *registries.hooks.values())] == [1, 1]
    runner = runner_of(make())
    for _ in range(2):
        assert type(registries.backends["mla_cute"](runner)).__name__ == "MlaCuteAttnBackend"
    common = sys.modules["sglang.srt.models.deepseek_common"]
    assert common.utils.FORWARD_ABSORB_CORE_ATTENTION_BACKENDS == ["fa3", "mla_cute"]
    assert sglang_case.HANDLERS["mla_cute"] is _sglang_plugin.choose_form
    runner.use_mla_backend = False
    with pytest.raises(ValueError, match="expected an MLA model"):
        registries.backends["mla_cute"](runner)


@pytest.mark.parametrize(
    ("backends", "asked", "resolved"),
    [
        (("mla_cute", "mla_cute"), None, 64),
        (("fa3", "mla_cute"), None, 64),
        (("mla_cute", "mla_cute"), 1, 1),
        (("mla_cute", "mla_cute"), 16, 16),
        (("fa3", "fa3"), None, None),
    ],
)
def test_pages_of_64_unless_asked(registries, backends, asked, resolved):
    _sglang_plugin.register()
    ((hook,),) = registries.resolution.values()
    server_args, order = SimpleNamespace(backends=("triton", "triton"), page_size=asked), []

    def builtin(given):
        order.append(given)
        given.backends = backends  # the step decides the backends, so the hook may look at them only after it

    hook(server_args, builtin)
    assert order == [server_args]
    assert server_args.page_size == resolved


def test_drafts_are_created(registries, module):
    _sglang_plugin.register()
    (((kind, hook),),) = registries.hooks.values()
    assert kind is sglang_case.HookType.AROUND
    (target,) = registries.hooks
    assert target.endswith(".draft_utils.DraftBackendFactory._create_backend")
    original = sglang_case.DraftBackendFactory._create_backend
    factory = sglang_case.DraftBackendFactory(runner_of(make()), "mla_cute")
    stamp, backend = hook(original, factory, "decode_attention_backend", {}, "no {backend_type}", stamps_children=True)
    assert stamp == "mla_cute"
    assert type(backend) is module.MlaCuteMultiStepDraftBackend
    assert len(backend.attn_backends) == 3
    stamp, backend = hook(original, factory, "prefill_attention_backend", {}, "no {backend_type}")
    assert stamp == "mla_cute"
    assert type(backend) is module.MlaCuteAttnBackend
    assert isinstance(backend, sglang_case.FlashMLABackend)  # or its steps are not captured
    factory.choice, table = "fa3", {"fa3": lambda: ("fa3", None)}
    assert hook(original, factory, "prefill_attention_backend", table, "no {backend_type}") == ("fa3", None)
    assert list(table) == ["fa3"]
    factory.choice = "other"
    with pytest.raises(ValueError, match="no other"):
        hook(original, factory, "prefill_attention_backend", table, "no {backend_type}")


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


def runner_of(case, **changed):
    return make_runner(case, MLATokenToKVPool(case.cache), **changed)


@pytest.mark.parametrize("host_lens", [True, False])
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_result_is_attention(module, monkeypatch, mode, deterministic, page_size, host_lens):
    monkeypatch.setattr(STATE, "deterministic", deterministic)
    case = make(mode, page_size=page_size, num_pages=128, num_indices=128)
    backend = module.MlaCuteAttnBackend(runner_of(case))
    batch = batch_of(case, mode, host_lens=host_lens)
    backend.init_forward_metadata(batch)
    plan = backend.forward_metadata.plan
    assert type(plan) is (DecodePlan if mode is ForwardMode.DECODE and not deterministic else PrefillPlan)
    assert plan.batch_invariant is deterministic
    for split in (True, False):
        check(case, run(backend, case, batch, split=split))


def test_draft_extension_counts_a_window(module):
    """The batch counts what was accepted, up to a window; every request has query tokens for a whole one."""
    case = make(ForwardMode.DRAFT_EXTEND_V2)
    backend = module.MlaCuteAttnBackend(runner_of(case))
    batch = batch_of(case, ForwardMode.DRAFT_EXTEND_V2)
    accepted = torch.tensor([1, 3, 2, 1, 3])
    batch.seq_lens -= DRAFTS - accepted
    batch.extend_seq_lens = accepted
    backend.init_forward_metadata(batch)
    check(case, run(backend, case, batch))


@pytest.mark.parametrize("graph", [False, True])
def test_steps_of_a_draft_have_its_keys(module, graph):
    """Step i of a chain sees i + 1 keys more than the batch counts; all steps share one set of plans."""
    cases = [make(lens=[n + i for n in KV_LENS]) for i in range(3)]
    cases[1].cache, cases[0].cache = cases[2].cache, cases[2].cache
    case = cases[2]
    drafts = module.MlaCuteMultiStepDraftBackend(runner_of(case, is_draft_worker=True), 1, 4)
    assert len({id(backend.plans) for backend in drafts.attn_backends}) == 1
    batch = batch_of(case, ForwardMode.DECODE)
    batch.seq_lens = batch.seq_lens_cpu = torch.tensor(KV_LENS) - 1
    if graph:
        drafts.init_cuda_graph_state(8, 8)
        assert drafts.attn_backends[0].verify_mask is None
        batch.forward_mode = ForwardMode.TARGET_VERIFY  # the steps are decodes, whatever the batch is
        drafts.init_forward_metadata_out_graph(batch, in_capture=True)
        drafts.init_forward_metadata_in_graph(batch)
        batch.forward_mode = ForwardMode.DECODE
    else:
        drafts.init_forward_metadata(batch)
    for backend, keys in zip(drafts.attn_backends, range(3), strict=True):
        out = run(backend, case, batch)
        for request, n in enumerate(KV_LENS):
            ids = case.block_table[request, : -(-(n + keys) // case.page_size)].long()
            rows = case.cache[ids].flatten(0, 1)[: n + keys].float()
            q = case.q[request].float()
            expected = (q @ rows.T * SM_SCALE).softmax(-1) @ rows[:, :512]
            torch.testing.assert_close(out[request].float(), expected.flatten(), **OUT_TOLERANCE)


# ------------------------------------------------------------------------------------------------ the expanded form


@pytest.fixture
def expanding(module, monkeypatch):
    """A backend with FlashAttention-3, as on a GPU."""
    monkeypatch.setattr(module, "_expanded_prompts", sglang_case.FlashAttentionBackend)
    return lambda case, **changed: module.MlaCuteAttnBackend(runner_of(case, **changed))


@pytest.mark.parametrize(
    ("requests", "expands", "form"),
    [
        ([(100, 100)], True, "ONE_SHOT"),
        ([(1, 1)], True, "ONE_SHOT"),
        ([(200, 200)], True, "CHUNKED_KV"),  # more tokens than a chunk's 128
        ([(170, 10**6)], False, None),
        ([(172, 10**6)], True, "CHUNKED_KV"),
        ([(1, 10**6), (170, 170)], False, None),
    ],
)
def test_the_form_with_fewer_operations(expanding, requests, expands, form):
    case = make()
    backend = expanding(case)
    batch = batch_of(case, ForwardMode.EXTEND)
    batch.extend_prefix_lens_cpu = [kv - q for q, kv in requests]
    batch.extend_seq_lens_cpu = [q for q, _ in requests]
    batch.backend = backend
    assert backend.expands(batch) is expands
    method = _sglang_plugin.choose_form(None, batch)
    assert method.name == (f"MHA_{form}" if expands else "MLA")


@pytest.mark.parametrize("state", ["captured", "deterministic", "disable_chunked_prefix_cache"])
def test_where_nothing_is_expanded(expanding, monkeypatch, state):
    monkeypatch.setattr(STATE, state, True)
    case = make()
    batch = batch_of(case, ForwardMode.EXTEND)
    batch.extend_seq_lens_cpu, batch.extend_prefix_lens_cpu = [1000], [10]
    assert not expanding(case).expands(batch)
    batch.extend_prefix_lens_cpu = [0]
    assert expanding(case).expands(batch) is (state == "disable_chunked_prefix_cache")


@pytest.mark.parametrize("mode", [ForwardMode.DECODE, ForwardMode.IDLE, *WINDOWS])
def test_only_prompts_are_expanded(expanding, mode):
    case = make(mode)
    batch = batch_of(case, mode)
    batch.extend_seq_lens_cpu, batch.extend_prefix_lens_cpu = [1000], [0]
    assert not expanding(case).expands(batch)


def test_expanded_prompts_are_flash_attentions(expanding):
    case = make(ForwardMode.EXTEND)
    backend = expanding(case)
    batch = batch_of(case, ForwardMode.EXTEND)
    batch.extend_seq_lens_cpu, batch.extend_prefix_lens_cpu = list(KV_LENS), [0] * 5
    backend.init_forward_metadata(batch)
    assert backend.forward_metadata is None
    batch.attn_attend_prefix_cache = False
    layer = make_layer(case, SM_SCALE)
    assert backend.forward_extend(case.q, None, None, layer, batch) == "expanded"
    assert backend._expanded.calls == ["init_forward_metadata", "forward_extend"]
    absorbed = batch_of(case, ForwardMode.EXTEND)
    absorbed.extend_prefix_lens_cpu = [10**6] * 5
    backend.init_forward_metadata(absorbed)
    check(case, run(backend, case, absorbed))
    assert len(backend._expanded.calls) == 2


def test_without_flash_attention_prompts_run_absorbed(module, monkeypatch, caplog):
    runner = runner_of(
        make(), req_to_token_pool=SimpleNamespace(req_to_token=SimpleNamespace(device=SimpleNamespace(type="cuda")))
    )
    expanded = module._expanded_prompts(runner)
    assert type(expanded) is sglang_case.FlashAttentionBackend
    assert expanded.kv_cache_dtype_str == "auto"
    monkeypatch.setitem(sys.modules, "sglang.srt.layers.attention.flashattention_backend", None)
    assert module._expanded_prompts(runner) is None
    assert "prompts run absorbed" in caplog.text


# ------------------------------------------------------------------------------------------------ the pool


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


@pytest.mark.parametrize(("heads", "e4m3"), [(3, False), (22, True)])
@pytest.mark.parametrize("mode", MODES)
def test_fp8_pool(module, mode, heads, e4m3):
    """22 heads of 3 tokens are more than 64 rows, so queries are rounded to e4m3, those beyond 448 to 448."""
    case = make(mode, num_heads=heads)
    stored = case.cache.to(torch.float8_e4m3fn)
    runner = make_runner(case, MLATokenToKVPool(stored), kv_cache_dtype=torch.float8_e4m3fn)
    backend, batch = module.MlaCuteAttnBackend(runner), batch_of(case, mode)
    backend.init_forward_metadata(batch)
    assert backend.plans._facts["q_fp8"] is e4m3
    case.q[0, 0, 0], case.q[0, 0, 1] = 1000.0, -1000.0
    for split in (True, False):
        out = run(backend, case, batch, split=split)
        assert out.dtype is torch.bfloat16
        given = case.q
        if e4m3:
            case.q = given.float().clamp(-448, 448).to(torch.float8_e4m3fn)
        check(case, out, cache=stored.float())
        case.q = given


def test_idle(module):
    case = make()
    backend = module.MlaCuteAttnBackend(make_runner(case, MLATokenToKVPool(case.cache)))
    batch = batch_of(case, ForwardMode.IDLE)
    batch.batch_size, batch.seq_lens_cpu = 0, batch.seq_lens_cpu[:0]
    backend.init_forward_metadata(batch)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("host_lens", [True, False])
@pytest.mark.parametrize("before", [None, *GRAPH_MODES])
@pytest.mark.parametrize("mode", GRAPH_MODES)
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
    batch.extend_seq_lens, batch.extend_seq_lens_cpu = torch.zeros(0, dtype=torch.long), []
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


def test_block_tables_of_eager_steps_grow(module):
    """And a step has the columns that it needs of them, in powers of two."""
    case = make(lens=(70, 3, 9))
    backend = module.MlaCuteAttnBackend(make_runner(case, MLATokenToKVPool(case.cache)))
    shapes, of_steps = [], []
    for lens in ((3, 5), (70, 3, 9), (3,)):
        batch = batch_of(case, ForwardMode.DECODE)
        batch.batch_size = len(lens)
        batch.seq_lens = batch.seq_lens_cpu = torch.tensor(lens)
        backend.init_forward_metadata(batch)
        shapes.append(tuple(backend._block_tables.shape))
        of_steps.append(tuple(backend.forward_metadata.pages.ids.shape))
    assert shapes == [(2, 1), (3, 11), (3, 11)]
    assert of_steps == [(2, 1), (3, 11), (1, 1)]
    batch = batch_of(case, ForwardMode.DECODE)
    backend.init_forward_metadata(batch)
    check(case, run(backend, case, batch))


# ------------------------------------------------------------------------------------------------ CUDA graphs


@pytest.mark.parametrize("mode", GRAPH_MODES)
def test_a_captured_step_is_refilled_in_the_graph(module, mode, monkeypatch):
    """A graph for 6 requests is captured with other lengths and replays with 5: the batch's tensors are overwritten,
    and what was recorded runs again."""
    updates = []
    monkeypatch.setattr(_engine_steps.StepPlans, "RECENT", 1)
    update = Plan.update
    monkeypatch.setattr(Plan, "update", lambda plan: updates.append(plan) or update(plan))
    tokens = DRAFTS if mode in WINDOWS else 1
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
        ({"enable_prefill_cp": True}, {}, NotImplementedError, "enable_prefill_cp: expected False"),
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
    runner.model_config.hf_config.index_topk = 2048
    with pytest.raises(NotImplementedError, match="index_topk: expected none, this model attends to lists of 2048"):
        module.MlaCuteAttnBackend(runner)
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
