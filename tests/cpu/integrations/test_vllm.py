"""The backend for vLLM on CPU tensors, against attention in plain torch.

Where vLLM is installed the backend runs with that release's classes, whose Python part imports without a GPU too;
elsewhere with stand-ins (vllm_case.py). tests/data/vllm_0.33.0.json has the signatures of the release, recorded from
the sources in its wheel (tests/recorded_signatures.py); backend, stand-ins and installed release are held against it.
"""

import importlib
import importlib.metadata
import math
import sys
from types import SimpleNamespace

import pytest
import torch
import vllm_case
from integration_case import ABSURD, SM_SCALE, Case, rows_of_656
from recorded_signatures import of
from vllm_case import LAYER, RECORD, make_builder, make_config, make_impl, make_metadata

from mla_cute import quant
from mla_cute.integrations import _engine_steps, _vllm_plugin
from mla_cute.plan import Plan
from mla_cute.plan_decode import DecodePlan
from mla_cute.plan_prefill import PrefillPlan

E4M3 = torch.float8_e4m3fn
DECODE = [(1, 17), (1, 64), (1, 1), (1, 8)]
SPECULATIVE = [(3, 17), (3, 64), (3, 3), (3, 8)]
RAGGED = [(1, 17), (3, 30), (5, 5), (2, 9), (4, 64)]
OUT_TOLERANCE = {"rtol": 2**-7, "atol": 2**-8}  # the output is rounded to bf16; values are around 1


@pytest.fixture
def backend(monkeypatch):
    """The module, imported beside the release or stand-ins for it; `is_release` says which."""
    name = "mla_cute.integrations.vllm"
    is_release = vllm_case.install(monkeypatch)
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    monkeypatch.setattr(module, "is_release", is_release, raising=False)
    yield module
    sys.modules.pop(name, None)


def make_layer(name=LAYER, k_scale=1.0, q_scale=1.0):
    return SimpleNamespace(layer_name=name, _k_scale_float=k_scale, _q_scale_float=q_scale)


def metadata_of(case, **kwargs):
    return make_metadata(case.block_table, case.kv_len_arr, case.qo_indptr, **kwargs)


def make_step(backend, case, cache_dtype="auto", **kwargs):
    """(impl, metadata) of a batch."""
    kwargs = {"block_size": case.page_size, "heads": case.q.shape[1], "dtype": case.q.dtype} | kwargs
    config = make_config(cache_dtype, **kwargs)
    builder = make_builder(backend.MlaCuteMetadataBuilder, config)
    impl = make_impl(backend.MlaCuteImpl, config, SM_SCALE)
    impl.need_to_return_lse_for_decode = True
    return impl, builder.build(0, metadata_of(case))


def parts(q):
    return q[..., :512], q[..., 512:]


def check(case, result, cache=None, rtol=1e-5):
    out, lse = case.expected(True, cache=cache)
    got, got_lse = result
    torch.testing.assert_close(got.float(), out, **OUT_TOLERANCE)
    torch.testing.assert_close(got_lse, lse, rtol=rtol, atol=rtol)


# ------------------------------------------------------------------------------------------------ the release


RECORDED = {name: parameters for file in RECORD["files"].values() for name, parameters in file.items()}
OURS = {"MLACommonMetadataBuilder": "MlaCuteMetadataBuilder", "AttentionMetadataBuilder": "MlaCuteMetadataBuilder",
        "AttentionBackend": "MlaCuteBackend", "MLACommonImpl": "MlaCuteImpl"}  # fmt: skip


def names_of(parameters):
    return [p["name"] for p in parameters if p["name"] not in ("self", "cls")]


@pytest.mark.parametrize("name", [name for name in RECORDED if name.partition(".")[0] in OURS])
def test_methods_take_what_the_release_passes(backend, name):
    assert f"vLLM {RECORD['version']}" in backend.__doc__
    cls, _, method = name.partition(".")
    function = getattr(getattr(backend, OURS[cls]), method)
    ours, recorded = of(function), names_of(RECORDED[name])
    if method == "__init__":  # of the optional arguments vLLM passes those that an implementation has
        required = [p["name"] for p in RECORDED[name][1:] if "default" not in p]
        takes_any = any(p["kind"] == "VAR_KEYWORD" for p in ours)
        assert names_of(ours)[:4] == recorded[:4]
        assert takes_any or set(names_of(ours)) == set(required)
    else:
        assert names_of(ours) == recorded


def test_metadata_fields_are_the_recorded_ones(backend):
    for cls, name in (
        (backend.MlaCuteDecodeMetadata, "MLACommonDecodeMetadata"), (backend.MlaCuteMetadata, "MLACommonMetadata"),
    ):  # fmt: skip
        recorded = RECORDED[name]
        assert of(cls)[: len(recorded)] == recorded


def test_stand_ins_have_the_recorded_signatures():
    for name, recorded in RECORDED.items():
        cls, _, method = name.partition(".")
        stand_in = getattr(vllm_case, cls, None)
        if stand_in is None or (method and not hasattr(stand_in, method)):
            continue
        assert names_of(of(getattr(stand_in, method) if method else stand_in)) == names_of(recorded), name


def test_record_is_the_installed_release(backend):
    if not backend.is_release:
        pytest.skip("vLLM is not installed")
    if importlib.metadata.version("vllm") != RECORD["version"]:
        pytest.skip(f"vLLM {importlib.metadata.version('vllm')} is installed, the record is of {RECORD['version']}")
    for file, names in RECORD["files"].items():
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        for name, recorded in names.items():
            cls, _, method = name.partition(".")
            live = getattr(module, cls)
            if cls == "AttentionLayer":  # a protocol: attributes that a layer has
                assert {p["name"] for p in recorded} == set(live.__annotations__)
            else:
                assert names_of(of(getattr(live, method) if method else live)) == names_of(recorded), name


def test_plugin_names_the_backend(backend):
    _vllm_plugin.register()
    registry = sys.modules["vllm.v1.attention.backends.registry"]
    custom = registry.AttentionBackendEnum.CUSTOM
    path = custom.get_path() if backend.is_release else vllm_case.REGISTERED[custom]
    module, _, name = path.rpartition(".")
    assert getattr(importlib.import_module(module), name).get_name() == custom.name
    if backend.is_release:
        custom.clear_override()


def test_entry_point_is_declared():
    tomllib = pytest.importorskip("tomllib", reason="Python before 3.11 has no tomllib")
    project = tomllib.loads((vllm_case.load.__globals__["DATA"].parents[1] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["mla_cute"].partition(":")
    assert getattr(importlib.import_module(module), name) is _vllm_plugin.register


def test_without_vllm_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "mla_cute.integrations.vllm", raising=False)
    with pytest.raises(ImportError, match=r'pip install "vllm==0\.33\.0"'):
        importlib.import_module("mla_cute.integrations.vllm")


# ------------------------------------------------------------------------------------------------ selection


HOPPER, BLACKWELL = SimpleNamespace(major=9, minor=0), SimpleNamespace(major=10, minor=0)


def reason(backend, dtype=torch.bfloat16, kv_cache_dtype="auto", capability=HOPPER):
    cls = backend.MlaCuteBackend
    return cls.supports_combination(576, dtype, kv_cache_dtype, 64, True, False, False, False, capability)


def test_selection(backend):
    assert reason(backend) is None
    assert reason(backend, kv_cache_dtype="fp8_ds_mla") is None
    assert reason(backend, torch.float16, "fp8") is None
    assert "compute capability 9.0, this device has 10.0" in reason(backend, capability=BLACKWELL)
    assert "a model of torch.bfloat16" in reason(backend, torch.float16, "fp8_ds_mla")
    assert "a model of torch.float16" in reason(backend, kv_cache_dtype="float16")
    cls = backend.MlaCuteBackend
    assert cls.supports_compute_capability(HOPPER)
    assert not cls.supports_compute_capability(BLACKWELL)
    assert [cls.get_preferred_block_size(n) for n in (16, 64, 128)] == [64, 64, 128]


def test_selection_through_the_release(backend):
    if not backend.is_release:
        pytest.skip("vLLM is not installed")
    cls = backend.MlaCuteBackend
    given = {
        "head_size": 576, "dtype": torch.bfloat16, "kv_cache_dtype": "fp8", "block_size": 64, "use_mla": True,
        "has_sink": False, "use_sparse": False, "use_mm_prefix": False, "use_per_head_quant_scales": False,
        "device_capability": HOPPER, "attn_type": "decoder", "use_batch_invariant": True, "use_dcp": True,
        "use_adaptive_verification": True,
    }  # fmt: skip
    assert cls.validate_configuration(**given) == []
    for changed, why in (
        ({"use_pcp": True}, "PCP not supported"), ({"use_sparse": True}, "sparse not supported"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype not supported"),
        ({"use_non_causal": True}, "non-causal attention not supported"),
        ({"device_capability": BLACKWELL}, "compute capability not supported"),
    ):  # fmt: skip
        assert why in cls.validate_configuration(**given | changed)


# ------------------------------------------------------------------------------------------------ results


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("requests", [DECODE, SPECULATIVE, RAGGED], ids=["decode", "speculative", "ragged"])
def test_result_is_attention(backend, requests, dtype, packed):
    case = Case(requests, dtype=dtype)
    impl, metadata = make_step(backend, case)
    kind = DecodePlan if requests is DECODE else PrefillPlan
    assert type(metadata.decode.step.plan) is kind
    assert metadata.num_decode_tokens == len(case.q)
    result = impl.forward_mqa(case.q if packed else parts(case.q), case.cache, metadata, make_layer())
    assert result[0].dtype is dtype
    check(case, result)


@pytest.mark.parametrize("page_size", [1, 5, 64])
def test_block_sizes(backend, page_size):
    case = Case(RAGGED, page_size=page_size, num_pages=200, num_indices=200)
    impl, metadata = make_step(backend, case)
    check(case, impl.forward_mqa(parts(case.q), case.cache, metadata, make_layer()))


def test_prompts_are_left_to_vllm(backend):
    """The first 2 of 3 requests are decodes; query tokens and pages of the prompt behind them are not looked at."""
    if backend.is_release:
        pytest.skip("the builder of the release needs a prompt backend, which needs a GPU")
    case, prompt = Case([(1, 17), (3, 30)]), 200
    config = make_config(heads=3)
    builder = make_builder(backend.MlaCuteMetadataBuilder, config)
    lens = torch.cat((case.kv_len_arr, torch.tensor([ABSURD], dtype=torch.int32)))
    indptr = torch.cat((case.qo_indptr, case.qo_indptr[-1:] + prompt))
    table = torch.cat((case.block_table, torch.full_like(case.block_table[:1], ABSURD)))
    metadata = builder.build(0, make_metadata(table, lens, indptr))
    assert (metadata.num_decodes, metadata.num_decode_tokens, metadata.num_prefills) == (2, 4, 1)
    impl = make_impl(backend.MlaCuteImpl, config, SM_SCALE)
    impl.need_to_return_lse_for_decode = True
    check(case, impl.forward_mqa(parts(case.q), case.cache, metadata, make_layer()))


def test_single_tokens_beside_a_prompt_run_the_decode_kernels(backend):
    """vLLM promises no more than the threshold there, 128 tokens."""
    if backend.is_release:
        pytest.skip("the builder of the release needs a prompt backend, which needs a GPU")
    case, prompt = Case(DECODE), 200
    config = make_config(heads=3)
    builder = make_builder(backend.MlaCuteMetadataBuilder, config)
    lens = torch.cat((case.kv_len_arr, torch.tensor([ABSURD], dtype=torch.int32)))
    indptr = torch.cat((case.qo_indptr, case.qo_indptr[-1:] + prompt))
    table = torch.cat((case.block_table, torch.full_like(case.block_table[:1], ABSURD)))
    metadata = builder.build(0, make_metadata(table, lens, indptr))
    assert (metadata.num_decodes, metadata.num_prefills) == (len(DECODE), 1)
    assert type(metadata.decode.step.plan) is DecodePlan
    impl = make_impl(backend.MlaCuteImpl, config, SM_SCALE)
    impl.need_to_return_lse_for_decode = True
    check(case, impl.forward_mqa(parts(case.q), case.cache, metadata, make_layer()))
    # Without a prompt what vLLM promises holds: the step may be a graph's, which has the kernels of drafts.
    assert type(builder.build(0, metadata_of(case, max_query_len=3)).decode.step.plan) is PrefillPlan


@pytest.mark.parametrize("max_query_len", [1, 3])
def test_steps_without_requests(backend, max_query_len):
    if backend.is_release:
        pytest.skip("the builder of the release makes no decode metadata without decodes")
    case, config = Case(DECODE), make_config(heads=3)
    metadata = make_builder(backend.MlaCuteMetadataBuilder, config).build(
        0, make_metadata(case.block_table[:0], case.kv_len_arr[:0], case.qo_indptr[:1], max_query_len=max_query_len)
    )
    impl = make_impl(backend.MlaCuteImpl, config, SM_SCALE)
    impl.need_to_return_lse_for_decode = True
    for _ in range(2):
        out, lse = impl.forward_mqa(parts(case.q[:0]), case.cache, metadata, make_layer())
        assert out.shape == (0, 3, 512)
        assert out.dtype is torch.bfloat16
        assert lse.shape == (0, 3)


def test_lse_only_where_it_is_asked_for(backend):
    case = Case(DECODE)
    impl, metadata = make_step(backend, case)
    impl.need_to_return_lse_for_decode = False
    assert impl.forward_mqa(parts(case.q), case.cache, metadata, make_layer())[1] is None
    assert impl.can_return_lse_for_decode
    assert impl.lse_base_on_e


def test_ranks_of_a_dcp_group_merge_to_the_whole(backend):
    """Tokens dealt out to two ranks in turn, one per block, and merged by their log-sum-exps as vLLM does it."""
    case = Case(DECODE, page_size=1, num_heads=6, num_pages=128, num_indices=128)
    results = []
    for rank in range(2):
        table = case.block_table[:, rank::2].contiguous()
        lens = (case.kv_len_arr + 1 - rank) // 2
        config = make_config(heads=3, dcp=2, block_size=1)
        builder = make_builder(backend.MlaCuteMetadataBuilder, config)
        builder.dcp_world_size = 2  # the release asks a process group, of which there is none
        assert builder.reorder_batch_threshold == 1
        assert not builder.supports_draft_decode_metadata_update
        metadata = builder.build(0, make_metadata(table, case.kv_len_arr, case.qo_indptr, local_lens=lens))
        impl = make_impl(backend.MlaCuteImpl, config, SM_SCALE)
        impl.need_to_return_lse_for_decode = True
        out, lse = impl.forward_mqa(case.q, case.cache, metadata, make_layer())
        if rank == 1:  # the request of one token has none here
            assert (out[2] == 0).all()
            assert (lse[2] == -math.inf).all()
        results.append((out.float(), lse))
    check(case, merged(results))


def merged(results):
    """As vLLM merges what the ranks return."""
    lse = torch.stack([part for _, part in results]).logsumexp(0)
    return sum(out * (part - lse).exp()[..., None] for out, part in results), lse


DRAFTED = [(3, 17), (3, 3), (1, 9), (2, 64), (3, 8)]  # of up to 2 drafts


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("interleave", [1, 2, 4])
@pytest.mark.parametrize("world", [2, 3])
def test_drafts_see_their_own_keys_on_every_rank(backend, monkeypatch, world, interleave, invariant):
    """Tokens dealt out to the ranks, `interleave` in turn; a captured step of padded tokens is refilled for each."""
    monkeypatch.setattr(backend.envs, "VLLM_BATCH_INVARIANT", invariant, raising=False)
    case = Case(DRAFTED, page_size=1, num_heads=6, num_pages=256, num_indices=256, spare_q=3)
    slots, tokens = len(DRAFTED) + 1, len(case.q)
    results = []
    for rank in range(world):
        monkeypatch.setattr(backend, "get_dcp_world_size_and_rank", lambda rank=rank: (world, rank))
        mine = [p for p in range(64) if p // interleave % world == rank]
        table = torch.full((slots, len(mine)), ABSURD, dtype=torch.int32)
        for row, owned, n in zip(table, case.block_table, case.kv_lens, strict=False):
            held = [p for p in mine if p < n]
            row[: len(held)] = owned[held]
        config = make_config(heads=6 // world, dcp=world, block_size=1, drafts=2)
        config.parallel_config.cp_kv_cache_interleave_size = interleave
        builder = make_builder(backend.MlaCuteMetadataBuilder, config)
        builder.dcp_world_size = world  # the release asks a process group, of which there is none
        assert builder.reorder_batch_threshold == 3
        assert builder.get_varlen_cudagraph_max_query_len(config, None) == 3
        lens, local = torch.full((slots,), 3, dtype=torch.int32), torch.full((slots,), -7, dtype=torch.int32)
        indptr = torch.arange(slots + 1, dtype=torch.int32) * 3
        indptr.clamp_(max=tokens)
        common = make_metadata(table, lens, indptr, total=tokens, max_query_len=3, local_lens=local)
        captured = builder.build_for_cudagraph_capture(common)
        builder._tokens.room(4 * tokens, table)  # a larger step replaces the buffers, not those of the graph
        lens[: len(DRAFTED)], lens[len(DRAFTED) :] = case.kv_len_arr, 0
        indptr[: len(case.qo_indptr)], indptr[len(case.qo_indptr) :] = case.qo_indptr, case.qo_indptr[-1]
        assert type(captured.decode.step.plan) is (PrefillPlan if invariant else DecodePlan)
        impl = make_impl(backend.MlaCuteImpl, config, SM_SCALE)
        impl.need_to_return_lse_for_decode = True
        out, lse = impl.forward_mqa(case.q.nan_to_num(0.5), case.cache, captured, make_layer())
        assert (out[case.qo_indptr[-1] :] == 0).all()
        assert (lse[case.qo_indptr[-1] :] == -math.inf).all()
        results.append((out[: case.qo_indptr[-1]].float(), lse[: case.qo_indptr[-1]]))
    check(case, merged(results))


# ------------------------------------------------------------------------------------------------ FP8


@pytest.mark.parametrize("q_fp8", [False, True])
@pytest.mark.parametrize("requests", [DECODE, RAGGED], ids=["decode", "ragged"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cache_with_a_scale(backend, requests, dtype, q_fp8):
    case = Case(requests, dtype=dtype)
    stored, q = quant.to_e4m3(case.cache, 0.02), parts(case.q)
    impl, metadata = make_step(backend, case, "fp8")
    layer = make_layer(k_scale=0.02, q_scale=0.25)
    if q_fp8:
        q = quant.to_e4m3(case.q, 0.25)
        case.q = q.float() * 0.25
    out, lse = impl.forward_mqa(q, stored, metadata, layer)
    assert out.dtype is dtype
    check(case, (out, lse), cache=stored.float() * 0.02)


@pytest.mark.parametrize("requests", [DECODE, RAGGED], ids=["decode", "ragged"])
def test_rows_of_656_bytes(backend, requests):
    case = Case(requests)
    pool, real = rows_of_656(case)
    impl, metadata = make_step(backend, case, "fp8_ds_mla")
    layer = make_layer(k_scale=7.0)  # of no meaning there
    check(case, impl.forward_mqa(parts(case.q), pool, metadata, layer), cache=real)


def test_layers_outside_the_fp8_cache_plan_for_their_own(backend, monkeypatch):
    seen = []
    monkeypatch.setattr(backend, "StepPlans", lambda **facts: seen.append(facts))
    config = make_config("fp8", heads=128)
    for cache_dtype in ("fp8", "auto"):
        make_builder(backend.MlaCuteMetadataBuilder, config, cache_dtype)
    assert [(facts["kv_format"], facts["q_fp8"]) for facts in seen] == [("tensor", True), ("", False)]


@pytest.mark.parametrize(
    ("cache_dtype", "heads", "drafts", "expected"),
    [
        ("auto", 128, 0, False), ("fp8", 64, 0, False), ("fp8", 65, 0, True), ("fp8_e4m3", 128, 0, True),
        ("fp8_ds_mla", 128, 0, False), ("fp8", 64, 1, True), ("fp8", 16, 3, False), ("fp8", 16, 4, True),
        ("fp8_ds_mla", 64, 3, False), ("auto", 64, 3, False),
    ],
)  # fmt: skip
def test_who_quantizes_queries(backend, monkeypatch, cache_dtype, heads, drafts, expected):
    """Layers, and the plans of their steps, by the rows of a request: heads times a token and its drafts."""
    seen = []
    monkeypatch.setattr(backend, "StepPlans", lambda **facts: seen.append(facts))
    config = make_config(cache_dtype, heads=heads, drafts=drafts)
    make_builder(backend.MlaCuteMetadataBuilder, config)
    assert make_impl(backend.MlaCuteImpl, config, SM_SCALE).supports_quant_query_input is expected
    assert seen[0]["q_fp8"] is expected


# ------------------------------------------------------------------------------------------------ CUDA graphs


@pytest.fixture
def updates(monkeypatch):
    """The plans that were updated, in order, but for the update at the end of making one."""
    found = []
    monkeypatch.setattr(Plan, "update", lambda plan: found.append(plan) or plan)
    return found


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_captured_step_is_found_again_and_refilled(backend, tokens):
    """A graph for 6 requests replays with 4: its tensors are overwritten, metadata are built, and what the graph
    recorded (the captured metadata, here) runs on the captured plan. Rows of no request come out finite,
    without being written again by every layer."""
    case, padded = Case([(tokens, n) for n in (17, 64, 8, 5)], spare_q=2 * tokens), 6
    config = make_config(heads=3)
    builder = make_builder(backend.MlaCuteMetadataBuilder, config)
    impl = make_impl(backend.MlaCuteImpl, config, SM_SCALE)
    impl.need_to_return_lse_for_decode = True
    table = torch.zeros(8, case.block_table.shape[1], dtype=torch.int32)
    lens, indptr = torch.ones(8, dtype=torch.int32), torch.arange(9, dtype=torch.int32)
    indptr.mul_(tokens)
    lens.fill_(tokens)

    def common(**kwargs):
        tensors = (table[:padded], lens[:padded], indptr[: padded + 1])
        return make_metadata(*tensors, total=padded * tokens, max_query_len=tokens, **kwargs)

    captured = builder.build_for_cudagraph_capture(common())
    table[: len(case.block_table)] = case.block_table
    table[len(case.block_table) :] = ABSURD
    lens.zero_()
    lens[:4] = case.kv_len_arr
    indptr[:5] = case.qo_indptr
    indptr[5:] = case.qo_indptr[-1]
    assert builder.build(0, common()).decode.step.plan is captured.decode.step.plan
    q = case.q.nan_to_num(0.5)
    out, lse = impl.forward_mqa(parts(q), case.cache, captured, make_layer())
    rows = 4 * tokens
    check(case, (out[:rows], lse[:rows]))
    assert len(out) == padded * tokens
    assert out.isfinite().all()
    other, _ = impl.forward_mqa(parts(q), case.cache, captured, make_layer("layers.1"))
    assert (captured.decode.output is None) is (tokens == 1)  # the decode kernels write every row
    if tokens > 1:
        assert other.data_ptr() == out.data_ptr() == captured.decode.output.data_ptr()


def test_captured_plans_stay_and_others_go(backend, monkeypatch):
    monkeypatch.setattr(_engine_steps.StepPlans, "RECENT", 2)
    builder = make_builder(backend.MlaCuteMetadataBuilder, make_config())
    table, indptr = torch.zeros(8, 4, dtype=torch.int32), torch.arange(9, dtype=torch.int32)
    lens = torch.ones(8, dtype=torch.int32)

    def build(n, lens=lens, capture=False):
        common = make_metadata(table[:n], lens[:n], indptr[: n + 1])
        return (builder.build_for_cudagraph_capture(common) if capture else builder.build(0, common)).decode.step.plan

    graphs = {n: build(n, capture=True) for n in (8, 4, 2)}
    eager = build(3)
    others = [build(n, torch.ones(8, dtype=torch.int32)) for n in (1, 2, 3)]
    assert len({id(plan) for plan in (*graphs.values(), eager, *others)}) == 7
    assert build(3) is not eager
    assert {n: build(n) for n in graphs} == graphs


def test_the_first_layer_plans_whenever_it_runs(backend, updates):
    case = Case(RAGGED)
    impl, metadata = make_step(backend, case)
    plan = metadata.decode.step.plan
    updates.clear()
    layers = [make_layer(f"layers.{n}") for n in (7, 8, 9)]
    for layer in layers:
        impl.forward_mqa(parts(case.q), case.cache, metadata, layer)
    assert updates == [plan]
    for layer in layers:  # the capture after a warm-up, or the next step of a draft
        impl.forward_mqa(parts(case.q), case.cache, metadata, layer)
    assert updates == [plan, plan]


def test_a_promise_of_longer_queries_decides_the_kernels(backend):
    """A graph for mixed lengths is captured from single tokens."""
    case = Case(DECODE)
    builder = make_builder(backend.MlaCuteMetadataBuilder, make_config(heads=3))
    assert type(builder.build(0, metadata_of(case)).decode.step.plan) is DecodePlan
    assert type(builder.build(0, metadata_of(case, max_query_len=3)).decode.step.plan) is PrefillPlan
    longest = type(builder).get_varlen_cudagraph_max_query_len
    assert longest(make_config(), None) == builder.reorder_batch_threshold
    assert longest(make_config(dcp=2), None) == 1
    assert longest(make_config(dcp=2, drafts=3), None) == 4


def test_batch_invariance_has_one_kind_of_kernel(backend, monkeypatch):
    monkeypatch.setattr(backend.envs, "VLLM_BATCH_INVARIANT", True, raising=False)
    case = Case(DECODE)
    impl, metadata = make_step(backend, case)
    plan = metadata.decode.step.plan
    assert type(plan) is PrefillPlan
    assert plan.batch_invariant
    check(case, impl.forward_mqa(parts(case.q), case.cache, metadata, make_layer()))


@pytest.mark.parametrize(
    ("changed", "shares"),
    [({}, True), ({"use_ubatching": True}, False), ({"dspark": True}, False), ({"sms": 0}, False)],
)
def test_partials_are_vllms_workspace(backend, monkeypatch, changed, shares):
    """Claimed by a layer while memory is profiled, found by builders later."""
    if backend.is_release:
        pytest.skip("the release's workspace needs its platform")
    workspace = vllm_case.WorkspaceManager()
    monkeypatch.setattr(vllm_case, "WORKSPACES", [workspace] if "sms" not in changed else [])
    monkeypatch.setattr(backend, "num_sms", lambda device: 132)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    config = make_config(drafts=2)
    config.parallel_config.use_ubatching = changed.get("use_ubatching", False)
    config.speculative_config.use_dspark = lambda: changed.get("dspark", False)
    make_impl(backend.MlaCuteImpl, config, SM_SCALE).reserve_workspace()
    held = list(workspace.held.values())
    assert [tuple(x.shape) for x in held] == ([(132 * 4 * 64, 288)] if shares else [])
    found = backend.workspace_for_partials(config, torch.device("cuda", 0))
    assert (found is held[0]) if shares else found is None
    monkeypatch.setattr(backend.envs, "VLLM_BATCH_INVARIANT", True, raising=False)
    assert backend.workspace_for_partials(config, torch.device("cuda", 0)) is None
    assert backend.workspace_for_partials(config, torch.device("cpu")) is None


@pytest.mark.parametrize("invariant", [False, True])
def test_vllm_compiles_what_steps_run(backend, monkeypatch, invariant):
    if backend.is_release:
        pytest.skip("the release registers providers in a set of its own")
    monkeypatch.setattr(backend.envs, "VLLM_BATCH_INVARIANT", invariant, raising=False)
    warmed = []
    monkeypatch.setattr(backend, "warmup", lambda variants, progress: warmed.append((variants, progress)))
    config = make_config("fp8", heads=128)
    builder = make_builder(backend.MlaCuteMetadataBuilder, config)
    assert vllm_case.PROVIDERS[-1] is builder
    (unit,) = builder.get_cutedsl_warmup_compile_units()
    unit.compile()
    ((variants, progress),) = warmed
    assert progress is False
    assert unit.key == ("mla_cute", tuple(variants))
    kernels = {kernel.name for kernel, _, _ in variants}
    assert kernels >= {"decode_tile64_fp8", "prefill_tile64_fp8"}
    assert {key.batch_invariant for _, key, _ in variants if hasattr(key, "batch_invariant")} == {invariant}
    assert {key.q_fp8 for _, key, _ in variants if hasattr(key, "q_fp8")} == {True}


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"num_heads": 129}, ValueError, "num_heads: expected 1 to 128 .* got 129"),
        ({"kv_cache_dtype": "fp8_e5m2"}, ValueError, "kv_cache_dtype: expected one of auto"),
        ({"kv_lora_rank": 256}, ValueError, "kv_lora_rank, qk_rope_head_dim: expected 512, 64, got 256, 64"),
        ({"logits_soft_cap": 30.0}, NotImplementedError, "logits_soft_cap: expected None"),
        ({"sliding_window": 512}, NotImplementedError, "sliding_window: expected None"),
        ({"attn_type": "encoder"}, NotImplementedError, "attn_type: expected 'decoder'"),
    ],
)
def test_refuses(backend, changed, error, message):
    with pytest.raises(error, match=message):
        make_impl(backend.MlaCuteImpl, make_config(), SM_SCALE, **changed)


def test_heads_of_another_number_than_planned(backend):
    case = Case(DECODE)
    impl, metadata = make_step(backend, case, heads=4)
    with pytest.raises(ValueError, match="plan: expected a plan for num_heads 3, got one for num_heads 4"):
        impl.forward_mqa(parts(case.q), case.cache, metadata, make_layer())
