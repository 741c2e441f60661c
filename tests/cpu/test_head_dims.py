"""Head dimensions other than 512 + 64, on the CPU: results, what is refused, ops, appends, variants."""

import dataclasses
import math

import pytest
import torch
from head_dims_case import BF16, EVERY_PAIR, FP16, OTHER_PAIR, WITHOUT_ROPE, as_none, decode_case, prefill_case
from torch._subclasses.fake_tensor import FakeTensorMode

import mla_cute
from mla_cute import quant
from mla_cute.append import append_reference
from mla_cute.call import call_of
from mla_cute.compile import warmup
from mla_cute.dims import HEAD_DIMS, HeadDims
from mla_cute.kernels import registry
from mla_cute.reference import requests_of
from mla_cute.testing.cases import expected_of, run_case
from mla_cute.testing.fp8 import E4M3, make_fp8, run_fp8
from mla_cute.testing.sparse import lists_of, run_sparse, sinks_of

PAIRS = "512 + 64, 512 + 32, 512 + 0, 256 + 64, 256 + 32, 256 + 0"


def accepted(verdict):
    assert verdict.ok, verdict


def naive(case, causal):
    """Output and natural lse in float64, from the definition, of the rows that requests own."""
    pages, lengths = requests_of(case.pages, case.page_size)
    outputs, lses = [], []
    queries = list(case.queries)
    for b, (ids, kv_len) in enumerate(zip(pages, lengths, strict=True)):
        nope, pe = (x[queries[b] : queries[b + 1]].double() for x in (case.q_nope, case.q_pe))
        ckv, kpe = (x[ids.long()].flatten(0, 1)[:kv_len].double() for x in (case.ckv_cache, case.kpe_cache))
        scores = torch.einsum("qhc,kc->qhk", nope, ckv) + torch.einsum("qhc,kc->qhk", pe, kpe)
        scores *= case.sm_scale
        if causal:
            q_len = nope.shape[0]
            sees = torch.arange(kv_len - q_len + 1, kv_len + 1)
            scores.masked_fill_(torch.arange(kv_len) >= sees[:, None, None], -math.inf)
        lse = scores.logsumexp(-1)
        weights = (scores - lse[..., None]).exp().nan_to_num(0.0)
        outputs.append(torch.einsum("qhk,kc->qhc", weights, ckv))
        lses.append(lse)
    return torch.cat(outputs), torch.cat(lses)


@EVERY_PAIR
@pytest.mark.parametrize("cache_layout", ["fused", "split", "padded"])
@pytest.mark.parametrize("make", [decode_case, prefill_case])
def test_the_reference_is_the_definition(make, cache_layout, dims):
    case = make(dims, cache_layout=cache_layout, q_layout="fused")
    want, want_lse = naive(case, case.causal)
    out = torch.empty(case.out.shape, dtype=torch.float32)
    call = call_of(case.pages.form, *case.csr_args, out=out, lse_base="e", kv_last_page_len=case.kv_last_page_len)
    got, got_lse = mla_cute.reference.attention(call)
    rows = case.queries[-1]
    assert got.shape[2] == dims.ckv
    torch.testing.assert_close(got[:rows].double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got_lse[:rows].double(), want_lse, rtol=1e-6, atol=1e-5)


@EVERY_PAIR
@pytest.mark.parametrize("entry", ["csr", "block_table"])
@pytest.mark.parametrize("make", [decode_case, prefill_case])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_public_calls(make, entry, dtype, dims):
    case = make(dims, dtype=dtype)
    accepted(run_case(case, entry=entry))
    if not dims.kpe:
        accepted(run_case(as_none(case), entry=entry, expected=expected_of(case)))
    allocated, lse = case.call(entry)
    rows = case.queries[-1]
    assert (allocated.dtype, allocated.shape) == (dtype, (case.q_nope.shape[0], 3, dims.ckv))
    assert torch.equal(allocated[:rows], case.out[:rows])


@EVERY_PAIR
@pytest.mark.parametrize("entry", ["csr", "block_table"])
@pytest.mark.parametrize("make", [decode_case, prefill_case])
@pytest.mark.parametrize("q_fp8", [False, True], ids=["q16", "q8"])
def test_public_calls_of_fp8_caches(make, entry, q_fp8, dims):
    fp8 = make_fp8(make(dims, dtype=FP16), "tensor", q_fp8)
    accepted(run_fp8(fp8, entry=entry))
    out = fp8.case.out.clone()
    if not dims.kpe:
        none = dataclasses.replace(fp8, case=as_none(fp8.case))
        none.reset()
        none.call(entry, out=none.case.out)
        assert torch.equal(none.case.out.view(torch.int16), out.view(torch.int16))
        allocated, _ = none.call(entry)
        assert allocated.dtype is (BF16 if q_fp8 else FP16), "as where both queries are e4m3"


@EVERY_PAIR
def test_sparse(dims):
    case = decode_case(dims)
    lists = lists_of(case)
    accepted(run_sparse(case, lists, sink=sinks_of(case)))
    accepted(run_sparse(make_fp8(case, "tensor", True), lists))
    if not dims.kpe:
        accepted(run_sparse(as_none(case), lists, expected=expected_of(case)))


@WITHOUT_ROPE
@pytest.mark.parametrize("make", [decode_case, prefill_case])
def test_plans_serve_every_pair(make, dims):
    """CPU plans; the metadata are the same."""
    case = make(dims)
    of = {"num_heads": 3, "page_size": 16, "kv_last_page_len": case.kv_last_page_len}
    if make is decode_case:
        made = mla_cute.plan_decode(case.kv_indptr, **of)
    else:
        made = mla_cute.plan_prefill(case.qo_indptr, case.kv_indptr, total_q=case.total_q, **of)
    accepted(run_case(case, plan=made))
    accepted(run_case(as_none(case), plan=made, expected=expected_of(case)))


# ------------------------------------------------------------------------------------------------ what is refused


def zeros(*shape, dtype=BF16):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "q_nope",
            lambda c: zeros(6, 3, 384),
            f"[batch, H, 512 or 256], got [6, 3, 384] (head dimensions are {PAIRS})",
        ),
        ("q_nope", lambda c: c.q_nope[..., :0], f"[batch, H, 512 or 256], got [6, 3, 0] (head dimensions are {PAIRS})"),
        (
            "ckv_cache",
            lambda c: zeros(*c.ckv_cache.shape[:2], 512),
            f"[num_pages, page_size, 256], got [20, 16, 512] (q_nope has 256; head dimensions are {PAIRS})",
        ),
        ("q_pe", lambda c: zeros(6, 3, 128), f"[6, 3, 64 or 32 or 0], got [6, 3, 128] (head dimensions are {PAIRS})"),
        ("q_pe", lambda c: c.q_pe[:5], "expected shape [6, 3, 32], got [5, 3, 32]"),
        (
            "kpe_cache",
            lambda c: zeros(20, 16, 64),
            f"expected shape [20, 16, 32], got [20, 16, 64] (q_pe has 32; head dimensions are {PAIRS})",
        ),
        (
            "kpe_cache",
            lambda c: c.kpe_cache[..., :0],
            f"expected shape [20, 16, 32], got [20, 16, 0] (q_pe has 32; head dimensions are {PAIRS})",
        ),
        ("out", lambda c: zeros(6, 3, 512), "out: expected shape [6, 3, 256], got [6, 3, 512]"),
    ],
)
def test_widths_are_named(name, change, message):
    case = decode_case(HeadDims(256, 32), num_pages=20)
    keywords = {}
    if name == "out":
        keywords["out"] = change(case)
    else:
        case = dataclasses.replace(case, **{name: change(case)})
    for entry in ("csr", "block_table"):
        with pytest.raises(ValueError, match=f"^{name}: ") as found:
            case.call(entry, **keywords)
        assert message in str(found.value)


@WITHOUT_ROPE
@pytest.mark.parametrize("name", ["q_pe", "kpe_cache"])
def test_one_of_the_two_alone_is_no_rope_part(name, dims):
    for case in (decode_case(dims), decode_case(HeadDims(dims.ckv, 64)), prefill_case(dims)):
        with pytest.raises(TypeError, match=f"^{name}: expected a torch.Tensor, got NoneType None") as found:
            dataclasses.replace(case, **{name: None}).call()
        assert ("kpe_cache" if name == "q_pe" else "q_pe") + " is None too" in str(found.value)


@WITHOUT_ROPE
def test_zero_width_tensors_are_checked_like_others(dims):
    case = decode_case(dims)
    for name, x, error, message in (
        ("q_pe", case.q_pe[:1], ValueError, "expected shape [6, 3, 0], got [1, 3, 0]"),
        ("q_pe", case.q_pe.half(), TypeError, "expected dtype torch.bfloat16 (that of q_nope)"),
        ("q_pe", case.q_pe.to("meta"), ValueError, "expected device cpu"),
        ("kpe_cache", case.kpe_cache[1:], ValueError, "expected shape"),
        ("kpe_cache", case.kpe_cache.half(), TypeError, "expected dtype torch.bfloat16 (that of q_nope)"),
    ):
        with pytest.raises(error, match=f"^{name}: ") as found:
            dataclasses.replace(case, **{name: x}).call()
        assert message in str(found.value)


@WITHOUT_ROPE
def test_a_scale_of_no_rope_part_is_one(dims):
    fp8 = make_fp8(decode_case(dims), "tensor", True)
    for wrong in (2.0, 0.5):
        with pytest.raises(ValueError, match=r"^kpe_scale: expected 1.0 with a kpe_cache of width 0, got"):
            fp8.call(kpe_scale=wrong)
    with pytest.raises(TypeError, match=r"^kpe_scale: expected a Python number"):
        fp8.call(kpe_scale=torch.ones(1))
    with pytest.raises(ValueError, match=r"^kpe_scale: expected 1.0 with a 16-bit ckv_cache, got"):
        decode_case(dims).call(kpe_scale=2.0)
    assert fp8.call(kpe_scale=1)[0].shape[2] == dims.ckv


@OTHER_PAIR
def test_formats_with_arrays_of_scales_are_refused(dims):
    case = decode_case(dims)
    shape = case.ckv_cache.shape[:2]
    ckv = case.ckv_cache.to(E4M3)
    cases = [dataclasses.replace(case, ckv_cache=ckv)]
    if not dims.kpe:
        cases.append(as_none(cases[0]))
    for scales in (1, 4):
        for each in cases:
            with pytest.raises(ValueError, match=r"^ckv_scale_arr: expected None with head dimensions") as found:
                each.call(ckv_scale_arr=torch.ones(*shape, scales))
            assert f"{dims} (those with arrays of scales are 512 + 64)" in str(found.value)
    with pytest.raises(TypeError, match=r"^kpe_cache: expected dtype torch.float8_e4m3fn \(that of ckv_cache\) with"):
        cases[0].call()


@OTHER_PAIR
def test_values_are_verified(dims):
    case = decode_case(dims)
    case.kv_indices[case.kv_indptr[1]] = 10000
    with pytest.raises(ValueError, match=r"^kv_indices: expected page ids in"):
        case.call()


# ------------------------------------------------------------------------------------------------ ops


def keywords_of(case, entry):
    names = ("q_nope", "q_pe", "ckv_cache", "kpe_cache", "sm_scale")
    lists, table = ("kv_indptr", "kv_indices", "kv_last_page_len"), ("block_table", "seq_lens")
    names += lists if entry == "mla_paged_decode" else table
    return {name: getattr(case, name) for name in names}


@OTHER_PAIR
@pytest.mark.parametrize("entry", ["mla_paged_decode", "mla_paged_decode_block_table"])
def test_ops(entry, dims):
    case = decode_case(dims)
    want, want_lse = getattr(mla_cute, entry)(**keywords_of(case, entry))
    for each in (case, as_none(case))[: 1 if dims.kpe else 2]:
        keywords = keywords_of(each, entry)
        out, lse = getattr(mla_cute.ops, entry)(**keywords)
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)
        given = torch.zeros_like(want)
        getattr(mla_cute.ops, entry)(**keywords, out=given)
        assert torch.equal(given, want)
        with FakeTensorMode() as mode:
            fake = {k: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for k, x in keywords.items()}
            out, lse = getattr(torch.ops.mla_cute, entry)(**fake)
            assert (out.dtype, out.shape, lse.shape) == (want.dtype, want.shape, want_lse.shape)
            fake["kpe_cache"] = torch.zeros(*case.kpe_cache.shape[:2], 64 if dims.kpe == 32 else 32, dtype=BF16)
            with pytest.raises((TypeError, ValueError), match=r"^(kpe_cache|q_pe): "):
                getattr(torch.ops.mla_cute, entry)(**fake)


@WITHOUT_ROPE
def test_ops_of_e4m3_queries(dims):
    fp8 = make_fp8(decode_case(dims, dtype=FP16), "tensor", True)
    keywords = keywords_of(as_none(fp8.case), "mla_paged_decode") | fp8.scales
    out, _ = mla_cute.ops.mla_paged_decode(**keywords)
    assert out.dtype is BF16
    with FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for k, x in keywords.items()}
        assert torch.ops.mla_cute.mla_paged_decode(**fake)[0].dtype is BF16


@pytest.mark.slow
def test_opcheck_without_rope():
    case = decode_case(HeadDims(256, 0))
    args = (case.q_nope, None, case.ckv_cache, None, case.kv_indptr, case.kv_indices, case.sm_scale)
    last = {"kv_last_page_len": case.kv_last_page_len}
    outputs = {"out": torch.zeros_like(case.q_nope), "lse": torch.zeros(case.q_nope.shape[:2])}
    ckv, cache, slots = torch.ones(3, 256).to(BF16), zeros(2, 4, 256), torch.arange(3)
    for op, given, options in (
        (torch.ops.mla_cute.mla_paged_decode.default, args, last),
        (torch.ops.mla_cute.mla_paged_decode.out, args, last | outputs),
        (torch.ops.mla_cute.append_to_cache.default, (ckv, None, cache, None, slots), {}),
    ):
        assert set(torch.library.opcheck(op, given, options).values()) == {"SUCCESS"}


@pytest.mark.slow
def test_calls_without_rope_compile():
    case = decode_case(HeadDims(256, 0))
    want = case.call()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(q_nope, ckv_cache):
        return mla_cute.mla_paged_decode(
            q_nope, None, ckv_cache, None, case.kv_indptr, case.kv_indices, case.sm_scale,
            kv_last_page_len=case.kv_last_page_len,
        )  # fmt: skip

    for got, expected in zip(step(case.q_nope, case.ckv_cache), want, strict=True):
        assert torch.equal(got, expected)


# ------------------------------------------------------------------------------------------------ appending


@pytest.mark.parametrize(
    ("dims", "none"), [(dims, none) for dims in HEAD_DIMS for none in (False, True)[: 1 if dims.kpe else 2]], ids=str
)
@pytest.mark.parametrize("kv_format", ["", "tensor"])
def test_append(kv_format, dims, none):
    tokens = torch.randn(9, sum(dims), generator=torch.Generator().manual_seed(1)).to(BF16)
    ckv, kpe = tokens[:, : dims.ckv], tokens[:, dims.ckv :]
    rows = torch.zeros(4, 5, sum(dims), dtype=E4M3 if kv_format else BF16)
    scales = {"ckv_scale": 0.07, "kpe_scale": 0.3 if dims.kpe else 1.0} if kv_format else {}
    slots = torch.tensor([0, 19, -1, 7, 3, -5, 12, 1, 2])
    caches = rows[..., : dims.ckv], rows[..., dims.ckv :]
    if none:
        mla_cute.append_to_cache(ckv, None, caches[0], None, slots, **scales)
    else:
        mla_cute.append_to_cache(ckv, kpe, *caches, slots, **scales)
    stored = torch.cat(quant.quantize_tensor(ckv, kpe, **scales) if kv_format else (ckv, kpe), dim=-1)
    flat = rows.view(20, sum(dims))
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            assert torch.equal(flat[slot].float(), stored[token].float())
    left = sorted(set(range(20)) - set(slots.tolist()))
    assert not flat[left].float().any()
    again = torch.zeros_like(rows)
    append_reference(ckv, kpe, again[..., : dims.ckv], again[..., dims.ckv :], slots, kv_format, **scales)
    assert torch.equal(again.view(torch.uint8), rows.view(torch.uint8))
    if kv_format:
        real = quant.dequantize_tensor(*caches, **scales)
        assert [x.shape[-1] for x in real] == list(dims)


def test_what_append_refuses():
    ckv, cache, slots = zeros(3, 256), zeros(2, 4, 256), torch.arange(3)
    kpe, kpe_cache = zeros(3, 32), zeros(2, 4, 32)
    for args, error, message in (
        (
            (zeros(3, 300), kpe, cache, kpe_cache), ValueError,
            f"ckv: expected shape [n, 512 or 256], got [3, 300] (head dimensions are {PAIRS})",
        ),
        ((ckv, zeros(3, 48), cache, kpe_cache), ValueError, "kpe: expected shape [3, 64 or 32 or 0], got [3, 48]"),
        (
            (ckv, kpe, zeros(2, 4, 512), kpe_cache), ValueError,
            "ckv_cache: expected shape [num_pages, page_size, 256], got [2, 4, 512] (ckv has 256",
        ),
        (
            (ckv, kpe, cache, zeros(2, 4, 64)), ValueError,
            "kpe_cache: expected shape [2, 4, 32], got [2, 4, 64] (kpe has 32",
        ),
        ((ckv, None, cache, kpe_cache), TypeError, "kpe: expected a torch.Tensor, got NoneType None"),
        ((ckv, kpe, cache, None), TypeError, "kpe_cache: expected a torch.Tensor, got NoneType None"),
    ):  # fmt: skip
        with pytest.raises(error) as found:
            mla_cute.append_to_cache(*args, slots)
        assert str(found.value).startswith(message)
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(x) if x is not None else None for x in (*args, slots)]
            with pytest.raises(error) as found:
                torch.ops.mla_cute.append_to_cache(*fake)
        assert str(found.value).startswith(message.split(":")[0])
    with pytest.raises(ValueError, match=r"^kpe_scale: expected 1.0 with a kpe_cache of width 0, got 2.0"):
        mla_cute.append_to_cache(ckv, None, cache.to(E4M3), None, slots, kpe_scale=2.0)
    with pytest.raises(ValueError, match=r"^ckv_scale_arr: expected None with head dimensions 256 \+ 32"):
        mla_cute.append_to_cache(ckv, kpe, cache.to(E4M3), kpe_cache, slots, ckv_scale_arr=torch.ones(2, 4, 1))
    assert not cache.any()


def test_quantise_refuses_other_widths():
    with pytest.raises(ValueError, match=r"^ckv: expected a last dimension of 512 or 256, got shape \[2, 128\]"):
        quant.quantize_tensor(zeros(2, 128), zeros(2, 64), 1.0, 1.0)
    with pytest.raises(ValueError, match=r"^kpe: expected a last dimension of 64 or 32 or 0, got shape \[2, 16\]"):
        quant.quantize_tensor(zeros(2, 256), zeros(2, 16), 1.0, 1.0)
    for quantize in (quant.quantize_token, quant.quantize_group):
        with pytest.raises(ValueError, match=r"^ckv: expected a last dimension of 512, got shape \[2, 256\]"):
            quantize(zeros(2, 256))


# ------------------------------------------------------------------------------------------------ variants


@pytest.mark.parametrize("of", [registry.variants, registry.sparse_variants, registry.append_variants])
def test_variants(of):
    every = {"kv_formats": ("", *registry.KV_FORMATS)}
    default = of(**every)
    assert of(**every, head_dims=[(512, 64)]) == default
    assert all(getattr(key, "dims", HeadDims()) == HeadDims() for _, key, _ in default)
    found = of(**every, head_dims=HEAD_DIMS)
    assert len(set(found)) == len(found)
    assert set(default) <= set(found)
    pairs = {(key.dims, getattr(key, "kv_format", "")) for _, key, _ in found if hasattr(key, "dims")}
    assert pairs == {
        *((dims, kv_format) for dims in HEAD_DIMS for kv_format in ("", "tensor")),
        (HeadDims(), "token"),
        (HeadDims(), "group"),
    }
    one = [key for _, key, _ in of(**every, head_dims=[[256, 0]]) if hasattr(key, "dims")]
    assert {key.dims for key in one} == {HeadDims(256, 0)}
    same = [key for _, key, _ in default if hasattr(key, "dims") and getattr(key, "kv_format", "") in ("", "tensor")]
    assert [dataclasses.replace(key, dims=HeadDims(256, 0)) for key in same] == one


@pytest.mark.parametrize(
    ("head_dims", "error", "message"),
    [
        ("512", TypeError, "head_dims: expected a sequence of (ckv, kpe), got '512'"),
        (512, TypeError, "head_dims: expected a sequence of (ckv, kpe), got 512"),
        ((512, 64), TypeError, "head_dims: expected pairs of ints (ckv, kpe), got [512, 64]"),
        ([(512, "64")], TypeError, "head_dims: expected pairs of ints (ckv, kpe), got [(512, '64')]"),
        ([(256, 64), (128, 64)], ValueError, "head_dims: expected pairs from [(512, 64), (512, 32), (512, 0), (2"),
    ],
)  # fmt: skip
def test_other_head_dims_of_variants_are_refused(head_dims, error, message):
    for of in (registry.variants, registry.sparse_variants, registry.append_variants, mla_cute.warmup):
        with pytest.raises(error) as found:
            of(head_dims=head_dims)
        assert str(found.value).startswith(message)


def test_warmup_selects_head_dims():
    selected = warmup.selected(("bfloat16",), (64,), warmup.OPS, ("", "tensor", "group"), [(512, 0), (256, 64)])
    dims = {key.dims for _, key, _ in selected if hasattr(key, "dims")}
    assert dims == {HeadDims(512, 0), HeadDims(256, 64)}
    assert "group" not in {getattr(key, "kv_format", "") for _, key, _ in selected}
    default = warmup.selected(("bfloat16",), (64,), warmup.OPS, ("",))
    assert {key.dims for _, key, _ in default if hasattr(key, "dims")} == {HeadDims()}
