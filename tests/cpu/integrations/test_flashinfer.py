"""The FlashInfer wrapper on CPU tensors, against attention in plain torch; its signatures against a release's.

tests/data/flashinfer_0.7.4.json was recorded from the sources in the release's wheel
(tests/recorded_signatures.py). Where that release is installed, the record is held against the real classes as well.
"""

import importlib.metadata
import math
from types import SimpleNamespace

import pytest
import torch
from integration_case import SM_SCALE, Case, spare_ids
from recorded_signatures import load, of

from mla_cute import quant
from mla_cute.integrations import flashinfer
from mla_cute.integrations.flashinfer import BatchMLAPagedAttentionWrapper, MLAPlanMetadata
from mla_cute.plan_decode import DecodePlan

RECORD = load("flashinfer_0.7.4.json")
RECORDED = {name: parameters for file in RECORD["files"].values() for name, parameters in file.items()}
E4M3 = torch.float8_e4m3fn
RAGGED = [(1, 17), (3, 30), (0, 9), (5, 5), (2, 1), (4, 64), (1, 0), (0, 0)]
DECODE = [(1, 17), (1, 64), (1, 0), (1, 1), (1, 8)]
OUT_TOLERANCE = {"rtol": 2**-7, "atol": 2**-8}  # the output is rounded to bf16; values are around 1


def make_wrapper(**kwargs):
    return BatchMLAPagedAttentionWrapper(torch.empty(1), **kwargs)


def sizes_of(case):
    return {
        "num_heads": case.q.shape[1], "head_dim_ckv": 512, "head_dim_kpe": 64, "page_size": case.page_size,
        "causal": True, "sm_scale": SM_SCALE, "q_data_type": case.q.dtype, "kv_data_type": case.cache.dtype,
    }  # fmt: skip


def plan(wrapper, case, causal=True, form="csr", **kwargs):
    wrapper.plan(**getattr(case, form), **sizes_of(case) | {"causal": causal} | kwargs)


def operands(case, layout="split"):
    if layout == "packed":
        return {"query": case.q, "kv_cache": case.cache}
    parts = (case.q[..., :512], case.q[..., 512:], case.cache[..., :512], case.cache[..., 512:])
    if layout == "separate":
        return dict(zip(("q_nope", "q_pe", "ckv_cache", "kpe_cache"), parts, strict=True))
    return {"query": parts[:2], "kv_cache": parts[2:]}


def check(case, result, causal=True, base_e=False, **kwargs):
    out, lse = case.expected(causal, **kwargs)
    got, got_lse = (x[: case.qo_indptr[-1]] for x in result)
    torch.testing.assert_close(got.float(), out, **OUT_TOLERANCE)
    torch.testing.assert_close(got_lse, lse if base_e else lse / math.log(2), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ signatures


OURS = {
    f"{cls.__name__}.{name}": getattr(cls, name)
    for cls, names in (
        (BatchMLAPagedAttentionWrapper, ("__init__", "plan", "run")), (MLAPlanMetadata, ("csr", "dense", "dual")),
    )
    for name in names
} | {"MLAPlanMetadata": MLAPlanMetadata}  # fmt: skip


def parameters_of(function, recorded):
    """Bound class methods have no first parameter, the record has it."""
    return (recorded[:1] if recorded[0]["name"] == "cls" else []) + of(function)


@pytest.mark.parametrize("name", RECORDED)
def test_signature_is_the_recorded_one(name):
    assert f"{RECORD['package']} {RECORD['version']}" in flashinfer.__doc__
    assert parameters_of(OURS[name], RECORDED[name]) == RECORDED[name]


@pytest.mark.parametrize("name", RECORDED)
def test_record_is_the_installed_release(name):
    try:
        version = importlib.metadata.version("flashinfer-python")
        from flashinfer.mla._batch_mla import _wrapper as theirs
    except ImportError as error:
        pytest.skip(f"flashinfer cannot be imported: {error}")
    if version != RECORD["version"]:
        pytest.skip(f"flashinfer {version} is installed, the record is of {RECORD['version']}")
    cls, _, method = name.partition(".")
    live = getattr(theirs, cls)
    assert parameters_of(getattr(live, method) if method else live, RECORDED[name]) == RECORDED[name]


# ------------------------------------------------------------------------------------------------ results


@pytest.mark.parametrize("layout", ["split", "packed", "separate"])
@pytest.mark.parametrize("form", ["csr", "dense"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("requests", [RAGGED, DECODE], ids=["ragged", "decode"])
def test_result_is_attention(requests, causal, form, layout):
    case = Case(requests, spare_q=2)
    wrapper = make_wrapper()
    plan(wrapper, case, causal, form)
    check(case, wrapper.run(**operands(case, layout), return_lse=True), causal)


@pytest.mark.parametrize("page_size", [1, 5, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_page_sizes_and_dtypes(page_size, dtype):
    case = Case(RAGGED, page_size=page_size, dtype=dtype, num_pages=200, num_indices=200)
    wrapper = make_wrapper()
    plan(wrapper, case)
    check(case, wrapper.run(**operands(case), return_lse=True))


@pytest.mark.parametrize("requests", [RAGGED, DECODE], ids=["ragged", "decode"])
def test_lengths_may_leave_whole_pages_unused(requests):
    case = Case(requests, spare_pages=2)
    wrapper = make_wrapper()
    plan(wrapper, case)
    check(case, wrapper.run(**operands(case), return_lse=True))


@pytest.mark.parametrize("check_mode", ["0", "1"])
@pytest.mark.parametrize("requests", [RAGGED, DECODE], ids=["ragged", "decode"])
def test_ids_of_spare_pages_are_not_looked_at(monkeypatch, requests, check_mode):
    """Requests without a key own spare pages too."""
    monkeypatch.setenv("MLA_CUTE_CHECK", check_mode)
    case = Case(requests, spare_pages=3)
    spare_ids(case)
    wrapper = make_wrapper()
    plan(wrapper, case)
    check(case, wrapper.run(**operands(case), return_lse=True))
    owner = next(b for b, n in enumerate(case.kv_lens) if n > 8)
    case.kv_indices[case.kv_indptr[owner] + 1] = 64
    with pytest.raises(ValueError, match=r"^kv_indices: expected page ids in \[0, 64\), got 64 at position "):
        wrapper.run(**operands(case))


@pytest.mark.parametrize("rows", [0, 2])
@pytest.mark.parametrize("batch", [0, 3])
@pytest.mark.parametrize("form", ["csr", "dense"])
@pytest.mark.parametrize("graph", [False, True])
def test_steps_without_queries(graph, form, batch, rows):
    """No request, or requests without query tokens; the rows there are belong to nobody."""
    case = Case([(0, 9)] * max(batch, 1))
    known = getattr(case, form) if batch else {
        name: x[:1] * 0 if name in ("qo_indptr", "cum_seq_lens_q", "kv_indptr") else x[:0]
        for name, x in getattr(case, form).items()
    }  # fmt: skip
    wrapper = make_wrapper(use_cuda_graph=True) if graph else make_wrapper()
    if graph and form == "csr":
        wrapper = graph_wrapper(batch)
    q = torch.full((rows, 3, 576), torch.nan, dtype=torch.bfloat16)
    out, lse = torch.full_like(q[..., :512], 7.0), torch.full((rows, 3), 7.0)
    for _ in range(2):
        wrapper.plan(**known, **sizes_of(case))
        wrapper.run(query=q, kv_cache=case.cache, out=out, lse=lse)
        assert wrapper.run(query=q, kv_cache=case.cache).shape == (rows, 3, 512)
    assert (out == 7).all()
    assert (lse == 7).all()


def test_positional_arguments_in_flashinfers_order():
    case = Case(RAGGED)
    wrapper = make_wrapper()
    sizes = (case.q.shape[1], 512, 64, case.page_size, True, SM_SCALE, torch.bfloat16, torch.bfloat16)
    wrapper.plan(*case.csr.values(), *sizes)
    out, lse = torch.empty_like(case.q[..., :512]), torch.empty(case.q.shape[:2])
    result = wrapper.run(*operands(case, "separate").values(), out, lse, True)
    assert result[0] is out
    assert result[1] is lse
    check(case, result)


def test_metadata_objects():
    case = Case(RAGGED)
    csr, dense = case.csr, case.dense
    foreign = SimpleNamespace(**vars(MLAPlanMetadata.csr(**csr)))
    dual = MLAPlanMetadata.dual(**csr, **dense)
    for metadata in (MLAPlanMetadata.csr(**csr), MLAPlanMetadata.dense(**dense, max_q_len=9), dual, foreign):
        wrapper = make_wrapper()
        wrapper.plan(metadata=metadata, **sizes_of(case))
        check(case, wrapper.run(**operands(case), return_lse=True))


@pytest.mark.parametrize("lse_mode", ["none", "base2", "basee"])
def test_lse_bases(lse_mode):
    case = Case(RAGGED)
    wrapper = make_wrapper()
    plan(wrapper, case, lse_mode=lse_mode)
    assert isinstance(wrapper.run(**operands(case)), torch.Tensor)
    for base_e in (False, True):
        given = {"return_lse": True, "return_lse_base_on_e": base_e}
        if lse_mode != "none" and base_e != (lse_mode == "basee"):
            with pytest.raises(ValueError, match=r"return_lse_base_on_e: .*lse_mode"):
                wrapper.run(**operands(case), **given)
        else:
            check(case, wrapper.run(**operands(case), **given), base_e=base_e)


def test_rows_past_the_last_query_are_not_written():
    case = Case(RAGGED, spare_q=3)
    wrapper = make_wrapper()
    plan(wrapper, case)
    out, lse = torch.full_like(case.q[..., :512], 7.0), torch.full(case.q.shape[:2], 7.0)
    wrapper.run(**operands(case), out=out, lse=lse)
    check(case, (out, lse))
    rows = case.qo_indptr[-1]
    assert (out[rows:] == 7).all()
    assert (lse[rows:] == 7).all()


def test_decode_only_where_every_request_has_one_query():
    """Two requests of 2 and 0 tokens have as many query tokens as a decode step of two."""
    kinds = {}
    for name, requests, spare in (
        ("decode", DECODE, 0), ("spare rows", DECODE, 1), ("uneven", [(2, 9), (0, 30)], 0), ("ragged", RAGGED, 0),
    ):  # fmt: skip
        case = Case(requests, spare_q=spare)
        wrapper = make_wrapper()
        plan(wrapper, case)
        check(case, wrapper.run(**operands(case), return_lse=True))
        kinds[name] = isinstance(wrapper._plan_of(len(case.q)), DecodePlan)
    assert kinds == {"decode": True, "spare rows": False, "uneven": False, "ragged": False}


def test_plan_again_with_other_metadata():
    wrapper = make_wrapper()
    for seed, requests in enumerate((RAGGED, DECODE, [(7, 20)], RAGGED[::-1])):
        case = Case(requests, seed=seed, page_size=8 >> (seed % 2))
        plan(wrapper, case, causal=seed % 2 == 0)
        check(case, wrapper.run(**operands(case), return_lse=True), causal=seed % 2 == 0)


def test_metadata_may_be_refilled_after_plan():
    case = Case(RAGGED)
    wrapper = make_wrapper()
    plan(wrapper, case)
    expected = case.expected(True)
    for name in ("qo_indptr", "kv_indptr", "kv_len_arr"):
        getattr(case, name).fill_(-1)
    out = wrapper.run(**operands(case))
    torch.testing.assert_close(out.float(), expected[0], **OUT_TOLERANCE)


# ------------------------------------------------------------------------------------------------ CUDA-graph mode


def graph_wrapper(batch, num_indices=72):
    def empty(n):
        return torch.full((n,), -1, dtype=torch.int32)

    return make_wrapper(
        use_cuda_graph=True, qo_indptr=empty(batch + 1), kv_indptr=empty(batch + 1), kv_indices=empty(num_indices),
        kv_len_arr=empty(batch),
    )  # fmt: skip


def test_graph_mode_plans_into_the_same_memory():
    wrapper = graph_wrapper(len(RAGGED))
    memory, plans = None, None
    for seed, requests in enumerate((RAGGED, RAGGED[::-1], [(2, 11)] * 8)):
        case = Case(requests, seed=seed, spare_q=seed, num_indices=72 - seed)
        plan(wrapper, case)
        pages = wrapper._pages
        rows = {"query": case.q[:16], "kv_cache": case.cache}
        check(case, wrapper.run(**rows, return_lse=True))
        pointers = [x.data_ptr() for x in (pages.queries, pages.lengths, pages.ids, pages.last_len)]
        memory, plans = memory or pointers, plans or dict(wrapper._plans)
        assert pointers == memory
        assert all(wrapper._plans[rows] is made for rows, made in plans.items())
    assert [b.data_ptr() for b in list(wrapper._buffers.values())[:3]] == memory[:3]


def test_graph_mode_updates_its_plans(monkeypatch):
    """On the CPU plans hold nothing; that `plan` updates them is seen at their method."""
    wrapper = graph_wrapper(len(DECODE))
    case = Case(DECODE)
    plan(wrapper, case)
    wrapper.run(**operands(case))
    updated = []

    def update(self):
        updated.append(self)

    monkeypatch.setattr(DecodePlan, "update", update)
    plan(wrapper, case)
    assert updated == [wrapper._plans[len(DECODE)]]


def test_graph_mode_keeps_what_graphs_depend_on():
    wrapper = graph_wrapper(len(DECODE))
    case = Case(DECODE)
    plan(wrapper, case)
    wrapper.run(**operands(case))
    with pytest.raises(ValueError, match=r"causal: expected True .*got False"):
        plan(wrapper, case, causal=False)
    with pytest.raises(ValueError, match=r"form: expected 'csr' .*got 'dense'"):
        plan(wrapper, case, form="dense")
    with pytest.raises(ValueError, match=r"qo_indptr: expected 0, 1, .*decode"):
        plan(wrapper, Case([(2, 17), (1, 64), (1, 0), (0, 1), (1, 8)]))
    with pytest.raises(ValueError, match="batch: expected 5"):
        plan(wrapper, Case(RAGGED))
    with pytest.raises(ValueError, match="kv_indices: expected metadata for the buffer of 72"):
        plan(wrapper, Case(DECODE, num_indices=73))
    check(case, wrapper.run(**operands(case), return_lse=True))


def test_graph_mode_with_dense_metadata_reads_its_tensors():
    wrapper = make_wrapper(use_cuda_graph=True)
    case, other = Case(RAGGED), Case(RAGGED[::-1], seed=1)
    plan(wrapper, case, form="dense")
    check(case, wrapper.run(**operands(case), return_lse=True))
    with pytest.raises(ValueError, match="cum_seq_lens_q: expected the tensor of the first plan"):
        plan(wrapper, other, form="dense")
    for name, x in other.dense.items():
        case.dense[name].copy_(x)
    plan(wrapper, case, form="dense")
    check(other, wrapper.run(**operands(other), return_lse=True))


def test_graph_mode_needs_buffers():
    with pytest.raises(ValueError, match="qo_indptr: expected a buffer in the constructor"):
        plan(make_wrapper(use_cuda_graph=True), Case(DECODE))


# ------------------------------------------------------------------------------------------------ FP8


def fp8_case():
    """A case, its e4m3 cache (ckv, kpe) under the scales, and what that stands for in float32."""
    case = Case(RAGGED)
    scales = {"ckv_scale": 0.02, "kpe_scale": 0.013}
    ckv, kpe = quant.quantize_tensor(case.cache[..., :512], case.cache[..., 512:], **scales)
    real = torch.cat((ckv.float() * 0.02, kpe.float() * 0.013), -1)
    return case, scales, (ckv, kpe), real


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("as_tensors", [False, True])
def test_fp8_cache_with_scales_of_tensors(packed, as_tensors):
    case, scales, cache, real = fp8_case()
    if as_tensors:
        scales = {"ckv_scale": torch.tensor(scales["ckv_scale"]), "kpe_scale": torch.tensor([scales["kpe_scale"]])}
    wrapper = make_wrapper()
    plan(wrapper, case, kv_data_type=E4M3)
    kv_cache = torch.cat([x.view(torch.uint8) for x in cache], -1).view(E4M3) if packed else cache
    result = wrapper.run(query=case.q, kv_cache=kv_cache, return_lse=True, **scales)
    check(case, result, cache=real)


@pytest.mark.parametrize("num_scales", [1, 4])
def test_fp8_cache_with_an_array_of_scales(num_scales):
    case = Case(RAGGED)
    ckv, array = (quant.quantize_token if num_scales == 1 else quant.quantize_group)(case.cache[..., :512])
    kpe = case.cache[..., 512:]
    wrapper = make_wrapper()
    plan(wrapper, case, kv_data_type=E4M3)
    result = wrapper.run(query=case.q, kv_cache=(ckv, kpe), ckv_scale_arr=array, return_lse=True)
    check(case, result, cache=torch.cat((quant.dequantize(ckv, array), kpe.float()), -1))
    with pytest.raises(NotImplementedError, match=r"ckv_scale_arr: .*kpe_cache"):
        wrapper.run(query=case.q, kv_cache=(ckv, kpe.to(E4M3)), ckv_scale_arr=array, kpe_scale=1.0)
    with pytest.raises(ValueError, match="kpe_scale: expected 1"):
        wrapper.run(query=case.q, kv_cache=(ckv, kpe), ckv_scale_arr=array, kpe_scale=0.5)


@pytest.mark.parametrize(("q_fp8", "scale_mode"), [(False, "bmm-scalar"), (True, "bmm-scalar"), (True, "bmm-tensor")])
def test_bmm_scales(q_fp8, scale_mode):
    """Scores are multiplied by bmm1_scale, the output by bmm2_scale."""
    case, _, (ckv, kpe), _ = fp8_case()
    if q_fp8:
        case.q = (case.q * 20).to(E4M3)
    wrapper = make_wrapper()
    plan(wrapper, case, kv_data_type=E4M3, scale_mode=scale_mode, output_dtype=torch.bfloat16)
    bmm1, bmm2 = (2e-5 if q_fp8 else 4e-4), 0.02
    made = (lambda x: torch.tensor([x])) if scale_mode == "bmm-tensor" else float
    result = wrapper.run(
        query=case.q, kv_cache=(ckv, kpe), return_lse=True, bmm1_scale=made(bmm1), bmm2_scale=made(bmm2)
    )
    real = torch.cat((ckv.float(), kpe.float()), -1)
    result = (result[0] / bmm2, result[1])
    out, lse = case.expected(True, sm_scale=bmm1, cache=real)
    torch.testing.assert_close(result[0].float(), out, rtol=2**-6, atol=0.2)  # stored values are up to 448
    torch.testing.assert_close(result[1], lse / math.log(2), rtol=1e-4, atol=1e-4)


def test_bmm_scales_of_16bit_caches():
    case = Case(RAGGED)
    wrapper = make_wrapper()
    plan(wrapper, case, scale_mode="bmm-scalar")
    check(case, wrapper.run(**operands(case), return_lse=True, bmm1_scale=0.1, bmm2_scale=1.0), sm_scale=0.1)
    with pytest.raises(NotImplementedError, match="bmm2_scale: expected 1"):
        wrapper.run(**operands(case), bmm1_scale=0.1, bmm2_scale=2.0)
    with pytest.raises(TypeError, match="bmm1_scale: expected a number"):
        wrapper.run(**operands(case), bmm1_scale=torch.ones(()), bmm2_scale=1.0)


# ------------------------------------------------------------------------------------------------ errors

INT32 = {"dtype": torch.int32}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"num_heads": None}, TypeError, "missing required arguments: num_heads"),
        ({"num_heads": 129}, ValueError, "num_heads: expected 1 to 128"),
        ({"head_dim_ckv": 256}, NotImplementedError, "head_dim_ckv: expected 512"),
        ({"head_dim_kpe": 0}, NotImplementedError, "head_dim_kpe: expected 64"),
        ({"page_size": 0}, ValueError, "page_size: expected >= 1"),
        ({"causal": 1}, TypeError, "causal: expected True or False"),
        ({"sm_scale": -1.0}, ValueError, "sm_scale"),
        ({"sm_scale": torch.ones(())}, TypeError, "sm_scale"),
        ({"q_data_type": "bfloat16"}, TypeError, "q_data_type: expected a torch.dtype"),
        ({"q_data_type": torch.float32}, NotImplementedError, "q_data_type: .*got torch.float32"),
        ({"kv_data_type": torch.float16}, NotImplementedError, "kv_data_type: .*got torch.float16"),
        ({"output_dtype": torch.float16}, NotImplementedError, "output_dtype: .*got torch.float16"),
        ({"q_data_type": E4M3, "kv_data_type": E4M3}, NotImplementedError, "output_dtype: expected .*queries of"),
        ({"scale_mode": "kv-per-tensor"}, ValueError, "scale_mode: expected 'default'"),
        ({"scale_mode": "bmm-tensor"}, NotImplementedError, "scale_mode: expected 'bmm-tensor' with queries"),
        ({"lse_mode": "base10"}, ValueError, "lse_mode: expected one of 'none'"),
        ({"query_layout": "fused"}, ValueError, "query_layout: expected one of"),
        ({"use_profiler": True}, NotImplementedError, "use_profiler"),
        ({"use_profiler": "no"}, TypeError, "use_profiler: expected True or False, got str 'no'"),
        ({"use_sinks": True}, NotImplementedError, "use_sinks"),
        ({"use_sinks": 0}, TypeError, "use_sinks: expected True or False, got int 0"),
        ({"skip_softmax": True}, NotImplementedError, "skip_softmax"),
        ({"output_scale": "per-tensor"}, NotImplementedError, "output_scale"),
        ({"metadata": MLAPlanMetadata()}, ValueError, "metadata: expected None beside"),
        ({"seq_lens": torch.ones(8, **INT32)}, ValueError, "metadata: expected flat arguments of one form"),
        ({"kv_len_arr": None}, ValueError, "kv_len_arr: expected a tensor"),
        ({"kv_len_arr": torch.ones(8)}, TypeError, "kv_len_arr: expected dtype torch.int32"),
        ({"kv_len_arr": torch.ones(7, **INT32)}, ValueError, "kv_len_arr: expected shape"),
        ({"kv_len_arr": torch.full((8,), 99, **INT32)}, ValueError, "kv_len_arr: .*got 99 at position 0"),
        ({"kv_indptr": torch.arange(9, **INT32) + 1}, ValueError, "kv_indptr: expected values that start at 0"),
        ({"qo_indptr": torch.tensor([0, 2, 1, *[9] * 6], **INT32)}, ValueError, "qo_indptr: .*never decrease"),
        ({"kv_indices": torch.zeros(5, **INT32)}, ValueError, "kv_indptr: expected values <= 5"),
    ],
)
def test_plan_refuses(changed, error, message):
    case = Case(RAGGED)
    wrapper = make_wrapper()
    plan(wrapper, case)
    with pytest.raises(error, match=message):
        wrapper.plan(**case.csr | sizes_of(case) | changed)
    check(case, wrapper.run(**operands(case), return_lse=True))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"query": None}, TypeError, "query: expected it, or q_nope and q_pe, got neither"),
        ({"q_pe": torch.zeros(1)}, TypeError, "query: expected None beside q_pe"),
        ({"query": torch.zeros(16, 3, 512)}, ValueError, r"query: expected shape \[n, m, 576\]"),
        ({"query": (torch.zeros(1), torch.zeros(1))}, ValueError, "q_nope: expected shape"),
        ({"query": (torch.zeros(16, 3, 256), torch.zeros(16, 3, 64))}, ValueError, r"q_nope: expected .*\[n, m, 512\]"),
        ({"query": (torch.zeros(16, 3, 512), torch.zeros(16, 3, 0))}, ValueError, r"q_pe: expected .*\[n, m, 64\]"),
        (
            {"kv_cache": (torch.zeros(64, 8, 512), torch.zeros(64, 8, 32))},
            ValueError,
            r"kpe_cache: expected shape \[n, m, 64\]",
        ),
        ({"query": torch.zeros(16, 3, 576)}, ValueError, r"q_nope: expected dtype torch.bfloat16 \(q_data_type"),
        ({"query": torch.zeros(16, 4, 576, dtype=torch.bfloat16)}, ValueError, "q_nope: expected 3 heads"),
        ({"kv_cache": [1, 2]}, TypeError, "kv_cache: expected a torch.Tensor"),
        ({"kv_cache": torch.zeros(64, 4, 576, dtype=torch.bfloat16)}, ValueError, "ckv_cache: expected 8 tokens"),
        ({"out": torch.zeros(16, 3, 512)}, ValueError, r"out: expected dtype torch.bfloat16 \(output_dtype"),
        ({"lse": torch.zeros(16, 4)}, ValueError, "lse: expected shape"),
        ({"return_lse_base_on_e": 1}, TypeError, "return_lse_base_on_e"),
        ({"ckv_scale": 1.0}, ValueError, "ckv_scale: expected None"),
        ({"bmm1_scale": 1.0}, ValueError, "bmm1_scale: expected None"),
        ({"profiler_buffer": torch.zeros(1)}, NotImplementedError, "profiler_buffer"),
        ({"kv_len": torch.zeros(1)}, NotImplementedError, "kv_len"),
        ({"page_table": torch.zeros(1)}, NotImplementedError, "page_table"),
        ({"o_scale": 1.0}, NotImplementedError, "o_scale"),
        ({"sinks": torch.zeros(3)}, NotImplementedError, "sinks"),
        ({"skip_softmax_threshold_scale_factor": 1.0}, NotImplementedError, "skip_softmax_threshold_scale_factor"),
    ],
)
def test_run_refuses(changed, error, message):
    case = Case(RAGGED)
    wrapper = make_wrapper()
    plan(wrapper, case)
    with pytest.raises(error, match=message):
        wrapper.run(**{"query": case.q, "kv_cache": case.cache} | changed)


def test_fp8_plans_need_their_scales():
    case, scales, cache, _ = fp8_case()
    wrapper = make_wrapper()
    plan(wrapper, case, kv_data_type=E4M3)
    for given, message in (({}, "ckv_scale: "), ({"ckv_scale": 1.0}, "kpe_scale: expected a number")):
        with pytest.raises(ValueError, match=message):
            wrapper.run(query=case.q, kv_cache=cache, **given)
    with pytest.raises(TypeError, match=r"ckv_scale: expected a number or a tensor of dtype torch.float32"):
        wrapper.run(query=case.q, kv_cache=cache, ckv_scale=torch.ones((), dtype=torch.float64), kpe_scale=1.0)


@pytest.mark.parametrize("backend", ["auto", "autotune", "cute-dsl-rubin-mtp", "fa3"])
def test_backends_change_nothing(backend):
    case = Case(RAGGED)
    wrapper = make_wrapper(backend=backend)
    plan(wrapper, case)
    check(case, wrapper.run(**operands(case), return_lse=True))


def test_constructor_refuses():
    with pytest.raises(TypeError, match=r"float_workspace_buffer: expected a torch.Tensor"):
        BatchMLAPagedAttentionWrapper(None)
    with pytest.raises(ValueError, match=r"backend: expected one of 'auto'.*got 'fa4'"):
        make_wrapper(backend="fa4")
    with pytest.raises(RuntimeError, match="before plan"):
        make_wrapper().run(query=torch.zeros(1, 3, 576), kv_cache=torch.zeros(1, 8, 576))


# ------------------------------------------------------------------------------------------------ SGLang's fast plan


def fast_plan(wrapper, case, causal=True, **changed):
    """What `fast_mla_decode_plan` of SGLang 0.5.23 does with a wrapper, on metadata of the host."""
    wrapper._causal, wrapper._page_size, wrapper._sm_scale = causal, case.page_size, SM_SCALE
    csr = {name: case.csr[name] for name in ("qo_indptr", "kv_indptr", "kv_len_arr")}
    others = {"num_heads": case.q.shape[1], "head_dim_ckv": 512, "causal": causal} | changed
    return wrapper._cached_module.plan(
        wrapper._float_workspace_buffer, wrapper._int_workspace_buffer, wrapper._pin_memory_int_workspace_buffer,
        *csr.values(), *others.values(),
    )  # fmt: skip


@pytest.mark.parametrize("requests", [DECODE, RAGGED], ids=["decode", "drafts"])
def test_fast_plan_of_sglang(requests):
    """Its names are FlashInfer's; page ids are in the buffer, other metadata come from the host."""
    first = Case(requests)
    longer = Case([(q, n + 7 if n else 0) for q, n in requests])
    wrapper = graph_wrapper(len(requests), 200)
    plan(wrapper, first)
    buffer = wrapper._kv_indices_buf
    assert buffer is wrapper._buffers["kv_indices"]
    for case in (longer, first):
        buffer[: len(case.csr["kv_indices"])] = case.csr["kv_indices"]
        fast_plan(wrapper, case)
        check(case, wrapper.run(**operands(case), return_lse=True))


def test_fast_plan_refuses_what_it_cannot_follow():
    case = Case(DECODE)
    wrapper = graph_wrapper(len(DECODE), 200)
    with pytest.raises(RuntimeError, match=r"^_cached_module.plan: expected use_cuda_graph and an earlier plan"):
        fast_plan(wrapper, case)
    without = make_wrapper()
    plan(without, case)
    with pytest.raises(RuntimeError, match=r"^_cached_module.plan: expected use_cuda_graph"):
        fast_plan(without, case)
    plan(wrapper, case)
    with pytest.raises(ValueError, match=r"^causal: expected True as in the first plan"):
        fast_plan(wrapper, case, causal=False)
    with pytest.raises(NotImplementedError, match=r"^head_dim_ckv: expected 512, got 256"):
        fast_plan(wrapper, case, head_dim_ckv=256)
