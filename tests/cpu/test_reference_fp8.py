"""FP8 caches and queries on CPU tensors: against the float32 reference on the numbers that they stand for."""

import math

import pytest
import torch
from fp8_case import LAYOUTS, Fp8Operands, make_fp8
from hypothesis import given, settings
from hypothesis import strategies as st
from prefill_case import SmallPrefill, make_prefill

import mla_cute
from mla_cute import quant, reference
from mla_cute.testing import cases
from mla_cute.testing.cases import DecodeCase, make_case

E4M3 = torch.float8_e4m3fn
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
Q_FP8 = pytest.mark.parametrize("q_fp8", [False, True], ids=["q16", "q8"])
FORMS = pytest.mark.parametrize("form", ["csr", "table"])
CAUSAL = pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
DECODE = {
    "csr": (mla_cute.mla_paged_decode, reference.decode_reference),
    "table": (mla_cute.mla_paged_decode_block_table, reference.decode_reference_block_table),
}
PREFILL = {
    "csr": (mla_cute.mla_paged_prefill, reference.prefill_reference),
    "table": (mla_cute.mla_paged_prefill_block_table, reference.prefill_reference_block_table),
}


def decode_metadata(case: DecodeCase, form: str) -> dict:
    names = ("kv_indptr", "kv_indices", "kv_last_page_len") if form == "csr" else ("block_table", "seq_lens")
    return {name: getattr(case, name) for name in names} | {"sm_scale": case.sm_scale}


def prefill_metadata(case: SmallPrefill, form: str) -> dict:
    operands = ("q_nope", "q_pe", "ckv_cache", "kpe_cache")
    return {name: value for name, value in getattr(case, form).items() if name not in operands}


def fp8_of(case: SmallPrefill, layout: str, q_fp8: bool) -> Fp8Operands:
    return make_fp8(case.caches, layout, q_fp8, (case.q_nope, case.q_pe))


def assert_is_real(functions, fp8: Fp8Operands, metadata: dict, rows: int, **options) -> None:
    """The call and its reference have the bits of the reference on the real numbers; `rows` of them are somebody's."""
    call, reference_of_form = functions
    real_out = torch.empty(*fp8.real["q_nope"].shape)
    want, want_lse = reference_of_form(**fp8.real, **metadata, **options, out=real_out)
    assert want[:rows].isfinite().all()
    for function in functions:
        got, got_lse = function(**fp8.tensors, **fp8.scales, **metadata, **options)
        assert got.dtype is fp8.dtype
        assert torch.equal(got[:rows], want[:rows].to(fp8.dtype))
        assert torch.equal(got_lse[:rows], want_lse[:rows])


@FORMS
@LAYOUT
@Q_FP8
@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_decode_is_attention_over_the_real_numbers(form, layout, q_fp8, page_size):
    lengths = [0, 1, page_size - 1, page_size, page_size + 1, 37, 2 * page_size, 0]
    case = make_case(lengths, num_heads=3, page_size=page_size, seed=page_size)
    fp8 = make_fp8(case, layout, q_fp8)
    metadata = decode_metadata(case, form)
    assert_is_real(DECODE[form], fp8, metadata, len(lengths))
    assert_is_real(DECODE[form], fp8, metadata, len(lengths), lse_base="e")


@FORMS
@LAYOUT
@Q_FP8
@CAUSAL
def test_prefill_is_attention_over_the_real_numbers(form, layout, q_fp8, causal):
    q_lens, kv_lens = zip((9, 9), (5, 40), (7, 3), (1, 17), (0, 6), (4, 0), (3, 33), strict=True)
    case = make_prefill(q_lens, kv_lens, num_heads=2, page_size=8, fused_q=True, spare_q=3)
    assert_is_real(PREFILL[form], fp8_of(case, layout, q_fp8), prefill_metadata(case, form), sum(q_lens), causal=causal)


@pytest.mark.parametrize("layout", ["tensor", "token", "group"])  # rows of 656 bytes have bfloat16 rope values
@Q_FP8
def test_float16(layout, q_fp8):
    case = make_case([9, 0, 24], num_heads=2, page_size=8, dtype=torch.float16)
    fp8 = make_fp8(case, layout, q_fp8)
    assert fp8.dtype is (torch.bfloat16 if layout == "tensor" and q_fp8 else torch.float16)
    assert_is_real(DECODE["csr"], fp8, decode_metadata(case, "csr"), 3)


@settings(max_examples=40, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), max_size=4),
    layout=st.sampled_from(LAYOUTS),
    q_fp8=st.booleans(),
    causal=st.booleans(),
    form=st.sampled_from(["csr", "table"]),
    page_size=st.integers(1, 20),
    num_heads=st.integers(1, 3),
    cache_layout=st.sampled_from(cases.CACHE_LAYOUTS),
    spare_q=st.integers(0, 2),
    shared_pages=st.integers(0, 2),
    index_offset=st.integers(0, 3),
    chunk_rows=st.integers(1, 16),
    chunk_tokens=st.integers(1, 64),
    seed=st.integers(0, 1000),
)
def test_random_ragged_batches(pairs, layout, q_fp8, causal, form, chunk_rows, chunk_tokens, **parameters):
    case = make_prefill([q for q, _ in pairs], [kv for _, kv in pairs], **parameters)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_CHUNK_ROWS", chunk_rows)
        patch.setattr(reference, "_CHUNK_TOKENS", chunk_tokens)
        assert_is_real(
            PREFILL[form],
            fp8_of(case, layout, q_fp8),
            prefill_metadata(case, form),
            sum(q for q, _ in pairs),
            causal=causal,
        )


@LAYOUT
@Q_FP8
def test_where_the_process_allows_shortcuts(layout, q_fp8):
    """The reference multiplies in float64 then."""
    case = make_case([50, 3], num_heads=2, page_size=16)
    fp8, metadata = make_fp8(case, layout, q_fp8), decode_metadata(case, "csr")
    want, want_lse = reference.decode_reference(**fp8.tensors, **fp8.scales, **metadata)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        got, got_lse = reference.decode_reference(**fp8.tensors, **fp8.scales, **metadata)
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got_lse, want_lse, rtol=1e-6, atol=1e-5)


# ------------------------------------------------------------------------------------------------ exact values


CHANNEL = torch.arange(512).float()
VALUES = {
    "normal": (CHANNEL % 15) - 7.0,
    "subnormal": ((CHANNEL % 15) - 7.0) * 2.0**-9,
    "largest": torch.where(CHANNEL % 2 > 0, 448.0, -448.0),
    "zero": torch.zeros(512),
}


def call_on_one_token(values: torch.Tensor, scales: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    ckv = torch.full((2, 8, 512), torch.nan).to(E4M3)
    kpe = torch.full((2, 8, 64), torch.nan, dtype=torch.bfloat16)
    array = torch.full((2, 8, len(scales)), torch.nan)
    ckv[1, 0], kpe[1, 0], array[1, 0] = values.to(E4M3), 2.0, torch.tensor(scales)
    ints = {"seq_lens": [1], "block_table": [[1]]}
    return mla_cute.mla_paged_decode_block_table(
        torch.ones(1, 4, 512, dtype=torch.bfloat16), torch.ones(1, 4, 64, dtype=torch.bfloat16), ckv, kpe,
        **{name: torch.tensor(value, dtype=torch.int32) for name, value in ints.items()},
        sm_scale=0.25, lse_base="e", ckv_scale_arr=array,
    )  # fmt: skip


@pytest.mark.parametrize("scales", [[0.5], [3.0], [0.0], [1.0, 2.0, 0.0, 0.125]], ids=str)
@pytest.mark.parametrize("name", VALUES)
def test_one_token_returns_its_value_times_its_scales(name, scales):
    out, lse = call_on_one_token(VALUES[name], scales)
    real = VALUES[name] * torch.tensor(scales).repeat_interleave(512 // len(scales))
    assert torch.equal(out[0], real.to(torch.bfloat16).expand(4, -1))
    assert lse[0].tolist() == pytest.approx([0.25 * (real.sum().item() + 128.0)] * 4, rel=1e-6)


def test_tensor_scales_and_query_scale_multiply_what_they_should():
    """One channel of each part is not zero, so the score is a sum of two products of exact numbers."""
    ckv, kpe = torch.zeros(1, 1, 512), torch.zeros(1, 1, 64)
    q_nope, q_pe = torch.zeros(1, 1, 512), torch.zeros(1, 1, 64)
    ckv[..., 3], kpe[..., 5], q_nope[..., 3], q_pe[..., 5] = 7.0, 11.0, 13.0, -5.0
    metadata = {"block_table": torch.zeros(1, 1, dtype=torch.int32), "seq_lens": torch.ones(1, dtype=torch.int32)}
    out, lse = mla_cute.mla_paged_decode_block_table(
        q_nope.to(E4M3), q_pe.to(E4M3), ckv.to(E4M3), kpe.to(E4M3), **metadata, sm_scale=0.5, lse_base="e",
        ckv_scale=2, kpe_scale=4.0, q_scale=0.25,
    )  # fmt: skip
    assert lse.item() == 0.5 * 0.25 * (13 * 2 * 7 - 5 * 4 * 11)
    assert out[0, 0, 3] == 14.0
    assert out.count_nonzero() == 1
    mixed_out, mixed_lse = mla_cute.mla_paged_decode_block_table(
        q_nope.to(E4M3), q_pe.to(torch.float16), ckv.to(E4M3), kpe.to(torch.float16), **metadata, sm_scale=0.5,
        lse_base="e", q_scale=0.25, ckv_scale_arr=torch.full((1, 1, 1), 2.0),
    )  # fmt: skip
    assert mixed_lse.item() == 0.5 * (0.25 * 13 * 2 * 7 - 5 * 11), "q_scale does not multiply a 16-bit q_pe"
    assert mixed_out.dtype is torch.float16
    assert mixed_out[0, 0, 3] == 14.0


def test_scales_of_unused_tokens_do_not_matter():
    """NaN, infinity and huge scales past the end, in a page in use and in pages of nobody."""
    case = make_case([5, 12], num_heads=2, page_size=8)
    fp8, metadata = make_fp8(case, "token", False), decode_metadata(case, "csr")
    want, want_lse = mla_cute.mla_paged_decode(**fp8.tensors, **fp8.scales, **metadata)
    dead = fp8.scales["ckv_scale_arr"].isnan()
    assert 0 < dead.sum() < dead.numel()
    for poison in (math.inf, -math.inf, 3e38, 0.0):
        fp8.scales["ckv_scale_arr"][dead] = poison
        got, got_lse = mla_cute.mla_paged_decode(**fp8.tensors, **fp8.scales, **metadata)
        assert torch.equal(got, want)
        assert torch.equal(got_lse, want_lse)


def test_quantised_cache_is_near_the_original():
    """The formats' own error, through the whole call: 2^-4 of an element at most, a fiftieth or so of a result."""
    case = make_case([300, 64], num_heads=4, page_size=16)
    want, _ = reference.decode_reference(**decode_metadata(case, "csr"), **dict(
        zip(("q_nope", "q_pe", "ckv_cache", "kpe_cache"), case.tensors, strict=True)
    ))  # fmt: skip
    dead = case.ckv_cache[..., 0].isnan()
    clean = case.ckv_cache.nan_to_num(0.0), case.kpe_cache.nan_to_num(0.0)
    scales = {"ckv_scale": quant.tensor_scale(clean[0]), "kpe_scale": quant.tensor_scale(clean[1])}
    ckv, kpe = quant.quantize_tensor(*clean, **scales)
    calls = [(ckv, kpe, scales)]
    for quantize in (quant.quantize_token, quant.quantize_group):
        ckv, array = quantize(clean[0])
        calls.append((ckv, case.kpe_cache, {"ckv_scale_arr": array}))
    for ckv, kpe, scales in calls:
        ckv.view(torch.uint8)[dead] = 0x7F
        got, _ = mla_cute.mla_paged_decode(case.q_nope, case.q_pe, ckv, kpe, **decode_metadata(case, "csr"), **scales)
        error = ((got.float() - want.float()).norm() / want.float().norm()).item()
        assert 1e-3 < error < 0.06


# ------------------------------------------------------------------------------------------------ results


@FORMS
@LAYOUT
@Q_FP8
def test_writes_to_the_given_tensors_and_nowhere_else(form, layout, q_fp8):
    case = make_case([9, 0, 1, 24], num_heads=3, page_size=8, out_layout="batch_strided")
    fp8, metadata = make_fp8(case, layout, q_fp8), decode_metadata(case, form)
    call, _ = DECODE[form]
    want, want_lse = call(**fp8.tensors, **fp8.scales, **metadata)
    got, got_lse = call(**fp8.tensors, **fp8.scales, **metadata, out=case.out, lse=case.lse)
    assert got is case.out
    assert got_lse is case.lse
    assert torch.equal(got, want)
    assert torch.equal(got_lse, want_lse)
    assert (got[1] == 0).all()
    assert got_lse[1].isneginf().all()
    assert case.guarded_out.intact()
    assert case.guarded_lse.intact()
    alone = call(**fp8.tensors, **fp8.scales, **metadata, return_lse=False)
    assert torch.equal(alone, want)


@FORMS
def test_prefill_leaves_rows_of_nobody(form):
    case = make_prefill([4, 2], [9, 1], num_heads=3, page_size=8, spare_q=2)
    fp8 = fp8_of(case, "group", True)
    PREFILL[form][0](**fp8.tensors, **fp8.scales, **prefill_metadata(case, form), **case.results)
    assert case.guarded_out.intact(6)
    assert case.guarded_lse.intact(6)
    assert case.results["out"][:6].isfinite().all()


def test_output_of_e4m3_queries_takes_the_dtype_of_out():
    case = make_case([9, 3], num_heads=2, page_size=8)
    fp8, metadata = make_fp8(case, "tensor", True), decode_metadata(case, "csr")
    in_bf16, _ = mla_cute.mla_paged_decode(**fp8.tensors, **fp8.scales, **metadata)
    assert in_bf16.dtype is torch.bfloat16
    out = torch.empty(2, 2, 512, dtype=torch.float16)
    in_fp16, _ = mla_cute.mla_paged_decode(**fp8.tensors, **fp8.scales, **metadata, out=out)
    assert in_fp16 is out
    torch.testing.assert_close(out.float(), in_bf16.float(), rtol=2.0**-8, atol=1e-6)
    assert not torch.equal(out.to(torch.bfloat16).float(), out.float()), "fp16 keeps three more bits"


@LAYOUT
@Q_FP8
def test_batches_without_tokens(layout, q_fp8):
    for lengths in ([], [0, 0]):
        case = make_case(lengths, num_heads=2, page_size=4)
        fp8 = make_fp8(case, layout, q_fp8)
        out, lse = mla_cute.mla_paged_decode(**fp8.tensors, **fp8.scales, **decode_metadata(case, "csr"))
        assert out.shape == (len(lengths), 2, 512)
        assert (out == 0).all()
        assert lse.isneginf().all()


@FORMS
@LAYOUT
def test_one_plan_serves_16_bit_and_fp8_calls(form, layout):
    case = make_prefill([4, 2, 0, 9], [9, 0, 1, 24], num_heads=16, page_size=8)
    fp8, metadata = fp8_of(case, layout, True), prefill_metadata(case, form)
    sizes = {"num_heads": 16, "page_size": 8, "total_q": 15}
    if form == "csr":
        lengths = {name: metadata[name] for name in ("qo_indptr", "kv_indptr", "kv_last_page_len")}
        plan = mla_cute.plan_prefill(**lengths, **sizes)
    else:
        lengths = {name: metadata[name] for name in ("qo_indptr", "seq_lens")}
        table = metadata["block_table"]
        sizes |= {"max_pages": table.shape[1], "table_stride": table.stride(0)}
        plan = mla_cute.plan_prefill_block_table(**lengths, **sizes)
    call, _ = PREFILL[form]
    for tensors, scales in ((fp8.tensors, fp8.scales), (getattr(case, form), {}), (fp8.tensors, fp8.scales)):
        arguments = metadata | tensors | scales
        want, want_lse = call(**arguments)
        got, got_lse = call(**arguments, plan=plan)
        assert torch.equal(got, want)
        assert torch.equal(got_lse, want_lse)


@pytest.mark.parametrize("form", ["csr", "table"])
def test_page_ids_are_verified(form):
    case = make_case([9, 0, 1, 24], num_heads=3, page_size=8)
    fp8, metadata = make_fp8(case, "group", False), decode_metadata(case, form)
    call, _ = DECODE[form]
    call(**fp8.tensors, **fp8.scales, **metadata)
    name, position = ("kv_indices", 1) if form == "csr" else ("block_table", (0, 1))
    metadata[name][position] = 99
    with pytest.raises(ValueError, match=f"^{name}: expected page ids in "):
        call(**fp8.tensors, **fp8.scales, **metadata, out=case.out, lse=case.lse)
    assert case.guarded_out.untouched()
    assert case.guarded_lse.untouched()
