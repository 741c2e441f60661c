"""FP8 cases are poison where they say, stand for what they say, and the verdict on them rejects what a kernel may do
wrong with scales, formats and tails."""

import math

import pytest
import torch
from call_case import check_decode, check_decode_block_table, check_prefill

from mla_cute import reference
from mla_cute.call import Cache, Call
from mla_cute.quant import to_e4m3
from mla_cute.testing.cases import CACHE_LAYOUTS, Q_LAYOUTS, make_case
from mla_cute.testing.fp8 import (
    FAST_ERROR,
    LAYOUTS,
    LSE_LIMIT,
    OUTPUT_LIMIT,
    ROW_LIMIT,
    Fp8Case,
    compare_fp8,
    expected_fp8,
    judge_fp8,
    make_fp8,
    one_e4m3_part,
    run_fp8,
)
from mla_cute.testing.prefill import make_prefill_case

EVERY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
BOTH_Q = pytest.mark.parametrize("q_fp8", [False, True], ids=["q16", "q_e4m3"])
LENGTHS = [0, 1, 65, 300, 1000]
REQUESTS = [(3, 200), (0, 9), (40, 40), (1, 65), (5, 3), (2, 0), (0, 0), (8, 300)]


def make(layout, q_fp8=False, lengths=LENGTHS, num_heads=8, page_size=16, **kwargs) -> Fp8Case:
    return make_fp8(make_case(lengths, num_heads=num_heads, page_size=page_size, seed=3, **kwargs), layout, q_fp8)


def used_rows(fp8: Fp8Case) -> torch.Tensor:
    used = torch.zeros(fp8.case.ckv_cache.shape[:2], dtype=torch.bool)
    for b in range(len(fp8.case.lengths)):
        used[fp8.slots(b)] = True
    return used


def split_q(x: torch.Tensor) -> torch.Tensor:
    """x as high + low e4m3 parts under a scale per row, in float32: what a 16-bit query keeps of itself."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-30).nan_to_num(448.0) / 448
    high = to_e4m3(x, scale).float()
    return (high + to_e4m3(x.float() / scale - high, 1.0).float()) * scale


def round_q(x: torch.Tensor) -> torch.Tensor:
    """x as one e4m3 part under a scale per row. 448 / amax is multiplied, as `one_e4m3_part` says."""
    amax = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return to_e4m3(x.float() * (torch.full_like(amax, 448) / amax), 1.0).float() * amax / 448


def as_a_kernel(fp8: Fp8Case, lengths=None, pages=None, parts_of=split_q) -> tuple[torch.Tensor, torch.Tensor]:
    """What a correct kernel might give: queries of two e4m3 parts (`parts_of` makes them), blocks of 64 keys, P in
    float16."""
    real = fp8.real()
    true_pages, true_lengths = reference.requests_of(real.pages, real.page_size)
    q_nope, q_pe = real.q_nope, real.q_pe
    if not fp8.q_fp8:
        q_nope = parts_of(q_nope)
        q_pe = parts_of(q_pe) if fp8.kv_format == "tensor" else q_pe
    rows = real.queries[-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_CHUNK_TOKENS", 64)
        call = Call(q_nope[:rows], q_pe[:rows], Cache(real.ckv_cache, real.kpe_cache), real.pages, real.sm_scale)
        requests = (pages or true_pages, lengths or true_lengths)
        output, lse = reference.attention(call, torch.float16, requests)
    return output.to(fp8.dtype), lse


# ------------------------------------------------------------------------------------------------ the cases


@BOTH_Q
@EVERY_LAYOUT
@pytest.mark.parametrize("page_size", [1, 3, 64])
def test_only_rows_in_use_are_finite(page_size, layout, q_fp8):
    fp8 = make(layout, q_fp8, [0, 1, 3, 64, 65, 130], page_size=page_size)
    used = used_rows(fp8)
    assert int(used.sum()) == 0 + 1 + 3 + 64 + 65 + 130
    assert not used.any(1).all(), "a page that no request owns"
    parts = [fp8.case.ckv_cache.float(), fp8.case.kpe_cache.float()]
    if fp8.kv_format != "tensor":
        parts.append(fp8.scales["ckv_scale_arr"])
        assert (parts[-1][used] > 0).all()
    for part in parts:
        assert part[used].isfinite().all()
        assert part[~used].isnan().all()
    assert fp8.case.q_nope.float().isfinite().all()


@EVERY_LAYOUT
def test_gaps_around_views_are_poison(layout):
    case = make_case([5, 9], num_heads=2, page_size=4, cache_layout="padded", q_layout="batch_strided")
    fp8 = make_fp8(case, layout, True)
    tensors = [fp8.case.q_nope]
    if layout != "group656":
        tensors.append(fp8.case.ckv_cache)
        tensors += [fp8.scales["ckv_scale_arr"]] if layout != "tensor" else [fp8.case.kpe_cache, fp8.case.q_pe]
    for x in tensors:
        everything = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
        inside = torch.zeros(everything.shape, dtype=torch.bool)
        inside.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(True)
        assert int((~inside).sum()) > 0
        assert everything.float()[~inside].isnan().all()


def test_strides_are_those_of_the_16_bit_case_and_the_656_byte_rows_have_their_own():
    for cache_layout in CACHE_LAYOUTS:
        for q_layout in Q_LAYOUTS:
            case = make_case(LENGTHS, num_heads=2, page_size=8, cache_layout=cache_layout, q_layout=q_layout)
            fp8 = make_fp8(case, "tensor", True).case
            for name in ("q_nope", "q_pe", "ckv_cache", "kpe_cache"):
                old, new = getattr(case, name), getattr(fp8, name)
                assert (old.shape, old.stride(), old.storage_offset()) == (
                    new.shape,
                    new.stride(),
                    new.storage_offset(),
                )
    fp8 = make("group656")
    strides = [x.stride()[:2] for x in (fp8.case.ckv_cache, fp8.scales["ckv_scale_arr"], fp8.case.kpe_cache)]
    assert strides == [(16 * 656, 656), (16 * 164, 164), (16 * 328, 328)]
    assert len({x.untyped_storage().data_ptr() for x in (fp8.case.ckv_cache, fp8.case.kpe_cache)}) == 1


def test_scales_are_not_trivial():
    fp8 = make("tensor", True)
    assert len({1.0, *fp8.scales.values()}) == 4
    for layout in ("token", "group"):
        array = make(layout).scales["ckv_scale_arr"]
        live = array[~array.isnan()]
        assert live.amax() / live.amin() > 6
        assert array.is_contiguous() is False
    assert make("token").scales["ckv_scale_arr"].data_ptr() % 8 == 4


@BOTH_Q
@EVERY_LAYOUT
def test_a_case_is_legal_and_near_the_data_it_was_made_from(layout, q_fp8):
    for dtype in (torch.bfloat16, torch.float16):
        case = make_case(LENGTHS, num_heads=8, page_size=16, dtype=dtype)
        fp8 = make_fp8(case, layout, q_fp8, spread=1.0)
        call = fp8.case
        problem = check_decode(*call.csr_args, call.kv_last_page_len, call.out, call.lse, 2, **fp8.scales)
        assert problem == check_decode_block_table(*call.block_table_args, call.out, call.lse, 2, **fp8.scales)
        assert (problem.kv_format, problem.q_fp8, problem.dtype) == (fp8.kv_format, q_fp8, dtype)
        real = fp8.real()
        for name in ("q_nope", "q_pe", "ckv_cache", "kpe_cache"):
            want, got = getattr(case, name).float().nan_to_num(), getattr(real, name).nan_to_num()
            assert (got - want).norm() < 0.04 * want.norm(), name
    prefill = make_fp8(make_prefill_case(REQUESTS, num_heads=4, page_size=16), layout, q_fp8)
    call = prefill.case
    check_prefill(*call.csr_args, causal=True, kv_last_page_len=call.kv_last_page_len, out=call.out, **prefill.scales)
    assert prefill.case.q_nope.float()[call.queries[-1] :].isnan().all()


def test_unknown_layout():
    with pytest.raises(ValueError, match="layout: expected one of"):
        make("row")


@EVERY_LAYOUT
def test_load_overwrites_in_place(layout):
    shapes = {"num_pages": 20, "num_indices": 30, "max_pages": 15, "page_size": 4, "num_heads": 2}
    one = make_fp8(make_case([5, 9], seed=1, **shapes), layout, True)
    other = make_fp8(make_case([0, 41], seed=2, **shapes), layout, True)
    tensors = [x for x in (*one.case.tensors, *one.scales.values()) if isinstance(x, torch.Tensor)]
    pointers = [x.data_ptr() for x in tensors]
    one.load(other)
    assert [x.data_ptr() for x in tensors] == pointers
    assert one.case.lengths == [0, 41]
    assert torch.equal(expected_fp8(one).output, expected_fp8(other).output)
    if layout == "tensor":
        other.scales["kpe_scale"] = 0.5
        with pytest.raises(AssertionError):
            one.load(other)


# ------------------------------------------------------------------------------------------------ the verdict


@BOTH_Q
@EVERY_LAYOUT
@pytest.mark.parametrize("drift", [0.0, 60.0, -60.0])
def test_accepts_what_a_correct_kernel_gives(drift, layout, q_fp8):
    for dtype in (torch.bfloat16, torch.float16):
        case = make_case([0, 1, 64, 129, 1000, 3000], num_heads=8, page_size=16, dtype=dtype, drift=drift)
        fp8 = make_fp8(case, layout, q_fp8)
        expected = expected_fp8(fp8)
        verdict = compare_fp8(*as_a_kernel(fp8), expected)
        assert verdict.ok, verdict
        assert 0 < verdict.relative_error < OUTPUT_LIMIT
        if drift == 0:
            # what the noise is beside the limits, on data that is not special
            assert verdict.dtype_error < 0.7 * OUTPUT_LIMIT
            assert 3 * expected.noise.amax() < 1.5 * ROW_LIMIT
            assert 3 * expected.score_rounding.amax() < 3 * LSE_LIMIT


@EVERY_LAYOUT
@pytest.mark.parametrize("drift", [0.0, 60.0, -60.0])
def test_fast_is_judged_by_queries_of_one_part(drift, layout):
    """By the same limits: its own rounding is no error, that of two parts is one, and the other way round."""
    case = make_case([1000, 3000], num_heads=32, page_size=16, drift=drift)
    fp8 = make_fp8(case, layout, spread=1.0)
    high, fast = (expected_fp8(fp8, accuracy=accuracy) for accuracy in ("high", "fast"))
    verdict = compare_fp8(*as_a_kernel(fp8, parts_of=round_q), fast)
    assert verdict.ok, verdict
    assert 0 < verdict.relative_error < OUTPUT_LIMIT
    if drift == 0:
        lost = compare_fp8(*as_a_kernel(fp8, parts_of=round_q), high)
        assert FAST_ERROR[0] < lost.relative_error < FAST_ERROR[1]
        for wrong in (lost, compare_fp8(*as_a_kernel(fp8), fast)):
            assert any(text.startswith("output: relative error") for text in wrong.failures)


def test_one_part_is_the_nearest_e4m3_of_a_row():
    rows = torch.tensor([[3.5, 0.126953125, 0.119140625, -0.0, 1e-4], [0.0] * 5, [448e30, 1e30, -17e30, 3e30, 0.0]])
    got = one_e4m3_part(rows.bfloat16())
    # Under 3.5 / 448 = 2^-7 the second and third are 16.25 and 15.25, and steps there are 2 and 1.
    assert got[0].tolist() == [3.5, 16 / 128, 15 / 128, 0.0, 2.0**-9 * 7 / 128]
    assert not got[1].any()
    ratio = got[2] / rows[2].bfloat16().float()
    assert (ratio[:4] - 1).abs().max() < 2.0**-4
    # Halves go to the even neighbour: 17 and 19 lie between 16, 18 and 20.
    halves = one_e4m3_part(torch.tensor([[448.0, 17.0, 19.0, -17.0]]).half() / 128)
    assert (halves * 128).tolist() == [[448.0, 16.0, 20.0, -16.0]]
    assert one_e4m3_part(torch.empty(3, 2, 0)).shape == (3, 2, 0)


def test_fast_changes_no_e4m3_query_and_no_16_bit_rope():
    for layout in LAYOUTS:
        given, e4m3 = make(layout), make(layout, True)
        for a, b in zip(e4m3.real().tensors, e4m3.real("fast").tensors, strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())
        high, fast = given.real(), given.real("fast")
        assert not torch.equal(high.q_nope, fast.q_nope)
        assert torch.equal(high.q_pe, fast.q_pe) == (given.kv_format != "tensor")


@BOTH_Q
@EVERY_LAYOUT
def test_the_public_call_is_right_in_both_forms(layout, q_fp8):
    fp8 = make(layout, q_fp8)
    for entry in ("csr", "block_table"):
        for lse_base in (2, "e"):
            verdict = run_fp8(fp8, entry=entry, lse_base=lse_base)
            assert verdict.ok, verdict
    for causal in (True, False):
        prefill = make_fp8(make_prefill_case(REQUESTS, num_heads=4, page_size=16, causal=causal), layout, q_fp8)
        for entry in ("csr", "block_table"):
            verdict = run_fp8(prefill, entry=entry)
            assert verdict.ok, verdict
        verdict = compare_fp8(*as_a_kernel(prefill), expected_fp8(prefill))
        assert verdict.ok, verdict


def test_large_rope_is_given_the_noise_of_its_scores():
    """Scores of hundreds of nats: e4m3 rope may move them by tenths, and 16-bit rope may not."""
    found = {}
    for layout in ("tensor", "token"):
        case = make_case([1000], num_heads=8, page_size=16)
        case.kpe_cache.mul_(100)
        fp8 = make_fp8(case, layout, kpe_scale=1.0)
        expected = expected_fp8(fp8)
        verdict = compare_fp8(*as_a_kernel(fp8), expected)
        assert verdict.ok, verdict
        found[layout] = float(expected.score_rounding.amax())
    assert found["tensor"] > 0.1
    assert found["token"] < 0.01


@pytest.mark.parametrize(
    ("layout", "wrong"),
    [
        ("tensor", {"ckv_scale": 0.0175}),
        ("tensor", {"kpe_scale": 0.085}),
        ("tensor", {"ckv_scale": 0.09, "kpe_scale": 0.0171875}),
        ("tensor", {"q_scale": 0.068}),
        ("token", {"q_scale": 0.068}),
        ("group", {"q_scale": 1.0}),
    ],
    ids=str,
)
def test_rejects_a_wrong_scale(layout, wrong):
    fp8 = make(layout, True)
    expected = expected_fp8(fp8)
    assert judge(fp8, expected).ok
    fp8.scales |= wrong
    assert not judge(fp8, expected).ok


def judge(fp8: Fp8Case, expected):
    fp8.call(out=fp8.case.out, lse=fp8.case.lse)
    return judge_fp8(fp8, expected)


def change_scales(fp8: Fp8Case, fault: str) -> None:
    array = fp8.scales["ckv_scale_arr"]
    page, row = fp8.slots(4)
    values = array[page, row]
    if fault == "of the next token":
        values = values.roll(1, 0)
    elif fault == "of the token 64 later":
        values = values.roll(-64, 0)
    elif fault == "1":
        values = torch.ones_like(values)
    elif fault == "of one token twice as large":
        values[500] *= 4
    elif fault == "of the first group":
        values = values[:, :1].expand_as(values)
    elif fault == "groups reversed":
        values = values.flip(-1)
    else:
        raise AssertionError(fault)
    array[page, row] = values


@pytest.mark.parametrize(
    ("layout", "fault"),
    [
        *((layout, f) for layout in ("token", "group", "group656") for f in ("of the next token", "1")),
        *((layout, "of the token 64 later") for layout in ("token", "group")),
        *((layout, "of one token twice as large") for layout in ("token", "group")),
        *((layout, f) for layout in ("group", "group656") for f in ("of the first group", "groups reversed")),
    ],
)
def test_rejects_a_wrong_scale_array(layout, fault):
    fp8 = make(layout)
    expected = expected_fp8(fp8)
    change_scales(fp8, fault)
    verdict = compare_fp8(*as_a_kernel(fp8), expected)
    assert not verdict.ok
    assert "request 4 (kv_len 1000)" in str(verdict)


def faulty(fp8: Fp8Case, fault: str) -> tuple[torch.Tensor, torch.Tensor]:
    case = fp8.case
    lengths = list(case.lengths)
    if fault == "last token dropped":
        return as_a_kernel(fp8, [*lengths[:2], lengths[2] - 1, *lengths[3:]])
    if fault == "a row past the end":
        return as_a_kernel(fp8, [*lengths[:2], lengths[2] + 1, *lengths[3:]])
    if fault == "a page of another request":
        pages, _ = reference.requests_of(case.pages, case.page_size)
        pages = [ids.clone() for ids in pages]
        pages[3][2] = pages[4][7]
        return as_a_kernel(fp8, pages=pages)
    output, lse = as_a_kernel(fp8)
    rms = output[4, 3].float().square().mean().sqrt().to(output.dtype)
    if fault == "one NaN element":
        output[4, 3, 77] = math.nan
    elif fault == "one element off":
        output[4, 3, 77] += 0.3 * rms
    elif fault == "output 1 % too large":
        output *= 1.01
    elif fault == "one row 3 % too large":
        output[4, 3] *= 1.03
    elif fault == "two heads swapped":
        output[3, [0, 1]] = output[3, [1, 0]]
    elif fault == "P in e4m3":
        # as it measures: 1.3 % of a row, in no direction
        output += 0.013 * output.float().norm(dim=-1, keepdim=True).to(output.dtype) * torch.randn_like(output) / 22.6
    elif fault == "empty request not zeroed":
        output[0, 0, 0] = 1e-3
    elif fault == "lse in base e":
        lse *= math.log(2)
    elif fault == "lse of one row off by 3e-2":
        lse[2, 7] -= 3e-2
    elif fault == "lse of an empty request 0":
        lse[0] = 0.0
    elif fault == "lse NaN":
        lse[3, 0] = math.nan
    else:
        raise AssertionError(fault)
    return output, lse


@EVERY_LAYOUT
@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("last token dropped", "request 2 (kv_len 65)"),
        ("a row past the end", "output: inf or NaN"),
        ("a page of another request", "request 3 (kv_len 300)"),
        ("one NaN element", "output: inf or NaN"),
        ("one element off", "output: largest error"),
        ("output 1 % too large", "output: relative error"),
        ("one row 3 % too large", "request 4 (kv_len 1000), head 3; 1 of"),
        ("two heads swapped", "output: error norm"),
        ("P in e4m3", "output: relative error"),
        ("empty request not zeroed", "request 0 (kv_len 0)"),
        ("lse in base e", "lse: error"),
        ("lse of one row off by 3e-2", "request 2 (kv_len 65), head 7; 1 of"),
        ("lse of an empty request 0", "lse: inf or NaN"),
        ("lse NaN", "lse: inf or NaN"),
    ],
)
def test_rejects_a_planted_fault(fault, named, layout):
    torch.manual_seed(0)
    fp8 = make(layout)
    expected = expected_fp8(fp8)
    assert compare_fp8(*as_a_kernel(fp8), expected).ok
    verdict = compare_fp8(*faulty(fp8, fault), expected)
    assert not verdict.ok
    assert named in str(verdict), verdict


def test_a_wrong_mask_is_rejected():
    fp8 = make_fp8(make_prefill_case(REQUESTS, num_heads=4, page_size=16), "token")
    expected = expected_fp8(fp8)
    output, lse = fp8.call(causal=False)
    rows = fp8.case.queries[-1]
    assert "request 2 (kv_len 40)" in str(compare_fp8(output[:rows], lse[:rows], expected))


def test_writes_around_the_outputs_and_into_rows_that_no_request_owns_are_named():
    fp8 = make_fp8(make_prefill_case(REQUESTS, num_heads=4, page_size=16), "token")
    expected = expected_fp8(fp8)
    assert judge(fp8, expected).ok
    fp8.case.out[-1, 0, 0] = 0
    fp8.case.guarded_lse.buffer[0] = 0
    failures = str(judge_fp8(fp8, expected))
    assert "output: memory around out, or a row that no request owns" in failures
    assert "lse: memory around lse" in failures


def test_rejects_shape_and_dtype():
    fp8 = make("token", lengths=[5])
    expected = expected_fp8(fp8)
    output, lse = as_a_kernel(fp8)
    assert "output: expected torch.bfloat16" in str(compare_fp8(output.float(), lse, expected))
    assert "output: expected" in str(compare_fp8(output[:, :1], lse, expected))
    assert "lse: expected torch.float32" in str(compare_fp8(output, lse.double(), expected))
