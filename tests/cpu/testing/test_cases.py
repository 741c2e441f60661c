"""The case generator poisons what it says, and `compare` accepts rounding and rejects small faults."""

import math
import time

import pytest
import torch
from call_case import check_decode, check_decode_block_table, verify_block_table_on_device, verify_on_device

from mla_cute import reference
from mla_cute.call import Cache, Call
from mla_cute.reference import decode_reference
from mla_cute.testing.cases import (
    ABSURD_PAGE_IDS,
    CACHE_LAYOUTS,
    OUT_LAYOUTS,
    Q_LAYOUTS,
    SWEEP_DTYPES,
    SWEEP_HEADS,
    SWEEP_PAGE_SIZES,
    DecodeCase,
    expected_of,
    make_case,
    sweep,
)
from mla_cute.testing.verdict import compare

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def run_in_dtype(case: DecodeCase, pages=None, lengths=None) -> tuple[torch.Tensor, torch.Tensor]:
    """What a correct kernel might give: blocks of 64 tokens, P rounded to the input dtype, sums in another order."""
    true_pages, true_lengths = reference.requests_of(case.pages, case.page_size)
    call = Call(*case.tensors[:2], Cache(*case.tensors[2:]), case.pages, case.sm_scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_CHUNK_TOKENS", 64)
        return reference.attention(call, case.q_nope.dtype, (pages or true_pages, lengths or true_lengths))


def pages_of(case: DecodeCase) -> list[torch.Tensor]:
    pages, _ = reference.requests_of(case.pages, case.page_size)
    return [ids.clone() for ids in pages]


# ------------------------------------------------------------------------------------------------ the generator


@pytest.mark.parametrize("layout", CACHE_LAYOUTS)
@pytest.mark.parametrize("page_size", [1, 3, 64])
def test_only_rows_in_use_are_finite(page_size, layout):
    lengths = [0, 1, 3, 64, 65, 130]
    case = make_case(lengths, num_heads=2, page_size=page_size, cache_layout=layout)
    used = torch.zeros(case.ckv_cache.shape[:2], dtype=torch.bool)
    for ids, n in zip(pages_of(case), lengths, strict=True):
        for token in range(n):
            used[ids[token // page_size], token % page_size] = True
    assert int(used.sum()) == sum(lengths)
    for cache in (case.ckv_cache, case.kpe_cache):
        assert cache[used].isfinite().all()
        assert cache[~used].isnan().all()
    assert not used.any(1).all(), "a page that no request owns"
    order = torch.cat(pages_of(case))
    assert not torch.equal(order, order.sort().values)


def test_gaps_around_views_are_poison():
    case = make_case([5, 9], num_heads=2, page_size=4, cache_layout="padded", q_layout="batch_strided")
    for x in (case.ckv_cache, case.q_nope):
        everything = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
        inside = torch.zeros(everything.shape, dtype=torch.bool)
        inside.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(True)
        if x is case.ckv_cache:
            inside.as_strided(case.kpe_cache.shape, x.stride(), case.kpe_cache.storage_offset()).fill_(True)
        assert everything[~inside].isnan().all()
        assert int((~inside).sum()) > 0


def test_page_ids_that_no_request_owns_are_absurd():
    case = make_case([5, 0, 9], num_heads=2, page_size=4, index_offset=2)
    start, end = int(case.kv_indptr[0]), int(case.kv_indptr[-1])
    assert (start, end) == (2, 2 + 2 + 0 + 3)
    outside = torch.cat((case.kv_indices[:start], case.kv_indices[end:])).tolist()
    assert len(outside) == 9
    assert set(outside) == set(ABSURD_PAGE_IDS)
    for b, n in enumerate((2, 0, 3)):
        assert torch.equal(case.block_table[b, :n], pages_of(case)[b])
        padding = case.block_table[b, n:].tolist()
        assert len(padding) >= 3
        assert set(padding) == set(ABSURD_PAGE_IDS)


def test_metadata_is_only_four_byte_aligned():
    case = make_case([5, 0, 9], num_heads=2, page_size=4)
    for x in (case.kv_indptr, case.kv_indices, case.kv_last_page_len, case.seq_lens, case.lse):
        assert x.is_contiguous()
        assert x.data_ptr() % 8 == 4
    assert case.block_table.stride(0) % 2 == 1


def test_shared_pages_are_shared_and_the_rest_is_not():
    case = make_case([17, 9, 3, 16], num_heads=1, page_size=4, shared_pages=3)
    first, second, third, fourth = (set(ids.tolist()) for ids in pages_of(case))
    assert len(first & second) == 2
    assert len(first & fourth) == 3
    assert not first & third
    verdict = compare(*run_in_dtype(case), expected_of(case))
    assert verdict.ok, verdict


def test_drift_moves_the_weight_to_one_end():
    for drift, heavy in ((60.0, slice(98, 130)), (-60.0, slice(0, 32))):
        case = make_case([130], num_heads=4, page_size=16, drift=drift)
        keys = torch.cat((case.ckv_cache, case.kpe_cache), -1)[case.kv_indices[:9]].flatten(0, 1)[:130].float()
        weights = (case.sm_scale * torch.cat((case.q_nope[0], case.q_pe[0]), -1).float() @ keys.T).softmax(-1)
        assert (weights[:, heavy].sum(-1) > 0.99).all(), f"drift {drift}"


def test_is_deterministic_and_depends_on_the_seed():
    one, same, other = (make_case([70, 3], num_heads=2, page_size=16, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.q_nope, same.q_nope)
    assert torch.equal(one.kv_indices, same.kv_indices)
    assert torch.equal(one.ckv_cache.nan_to_num(), same.ckv_cache.nan_to_num())
    assert not torch.equal(one.q_nope, other.q_nope)


def test_load_overwrites_in_place():
    shapes = {"num_heads": 2, "page_size": 4, "num_pages": 20, "num_indices": 30, "max_pages": 15}
    case, other = make_case([5, 9], seed=1, **shapes), make_case([0, 41], seed=2, **shapes)
    pointers = [x.data_ptr() for x in (*case.csr_args[:-1], case.block_table, case.seq_lens)]
    case.load(other)
    assert pointers == [x.data_ptr() for x in (*case.csr_args[:-1], case.block_table, case.seq_lens)]
    assert case.lengths == [0, 41]
    assert torch.equal(expected_of(case).output, expected_of(other).output)


@pytest.mark.parametrize("out_layout", OUT_LAYOUTS)
def test_guards_notice_a_write(out_layout):
    case = make_case([5, 9], num_heads=2, page_size=4, out_layout=out_layout)
    assert case.guarded_out.untouched()
    assert case.guarded_lse.untouched()
    case.out.zero_()
    case.lse.zero_()
    assert not case.guarded_out.untouched()
    assert not case.guarded_lse.untouched()
    assert case.guarded_out.intact()
    assert case.guarded_lse.intact()
    inside = torch.zeros_like(case.guarded_out.buffer)
    inside.as_strided(case.out.shape, case.out.stride(), case.out.storage_offset()).fill_(1)
    for position in (0, int(inside.argmax()) - 1, len(inside) - int(inside.flip(0).argmax()), len(inside) - 1):
        case.guarded_out.reset()
        case.guarded_out.buffer[position] = 0
        assert not case.guarded_out.intact()
    if out_layout == "batch_strided":
        case.guarded_out.reset()
        case.guarded_out.buffer[4096 + 2 * 512] = 0
        assert not case.guarded_out.intact()
    case.guarded_lse.buffer[1020] = 0
    assert not case.guarded_lse.intact()


def test_cases_are_legal_and_verify():
    for spec in sweep()[::7]:
        case = spec.make("cpu")
        problem = check_decode(*case.csr_args, case.kv_last_page_len, case.out, case.lse, 2)
        assert problem == check_decode_block_table(*case.block_table_args, case.out, case.lse, 2)
        verify_on_device(problem, case.kv_indptr, case.kv_indices, case.kv_last_page_len)
        verify_block_table_on_device(problem, case.block_table, case.seq_lens)


def test_a_case_of_20000_tokens_is_quick():
    start = time.process_time()  # a busy machine takes more of the clock
    make_case([20000, 0, 1], num_heads=16, page_size=1)
    assert time.process_time() - start < 5.0, "0.2 s on two idle cores"


def test_sweep_covers_what_it_says():
    specs = sweep()
    assert {spec.num_heads for spec in specs} == set(SWEEP_HEADS)
    assert {(s.page_size, s.dtype) for s in specs} == {(p, d) for p in SWEEP_PAGE_SIZES for d in SWEEP_DTYPES}
    assert {s.drift for s in specs} == {0.0, 60.0, -60.0}
    assert {s.shared_pages for s in specs} == {0, 1, 1000}
    assert {(s.page_size, s.cache_layout) for s in specs} == {(p, c) for p in SWEEP_PAGE_SIZES for c in CACHE_LAYOUTS}
    assert {s.q_layout for s in specs} == set(Q_LAYOUTS)
    assert {s.out_layout for s in specs} == set(OUT_LAYOUTS)
    for length in (0, 1, 63, 64, 65, 127, 129, 1000, 20000):
        assert any(length in spec.lengths for spec in specs)
    assert len({str(spec) for spec in specs}) == len(specs)


# ------------------------------------------------------------------------------------------------ the verdict


@DTYPES
@pytest.mark.parametrize("drift", [0.0, 60.0, -60.0])
def test_accepts_rounding(dtype, drift):
    case = make_case([0, 1, 64, 129, 1000, 5000], num_heads=8, page_size=16, dtype=dtype, drift=drift)
    verdict = compare(*run_in_dtype(case), expected_of(case))
    assert verdict.ok, verdict
    assert 0 < verdict.relative_error < (3e-3 if dtype is torch.bfloat16 else 5e-4)


def test_accepts_the_reference_itself():
    case = make_case([0, 3, 700], num_heads=8, page_size=16)
    for base in (2, "e"):
        output, lse = decode_reference(*case.csr_args, kv_last_page_len=case.kv_last_page_len, lse_base=base)
        verdict = compare(output, lse, expected_of(case, lse_base=base))
        assert verdict.ok, verdict
        assert verdict.lse_error == 0.0


LENGTHS = [0, 1, 65, 300, 1000]


def faulty(case: DecodeCase, fault: str) -> tuple[torch.Tensor, torch.Tensor]:
    pages, lengths = pages_of(case), list(case.lengths)
    if fault == "last token dropped":
        return run_in_dtype(case, lengths=[*lengths[:-1], lengths[-1] - 1])
    if fault == "first page dropped":
        pages[-1], lengths[-1] = pages[-1][1:], lengths[-1] - case.page_size
        return run_in_dtype(case, pages, lengths)
    if fault == "a page of another request":
        pages[3][2] = pages[4][7]
        return run_in_dtype(case, pages)
    if fault == "a page counted twice":
        pages[4][1] = pages[4][0]
        return run_in_dtype(case, pages)
    if fault == "a row past the end":
        return run_in_dtype(case, lengths=[*lengths[:2], 66, *lengths[3:]])
    output, lse = run_in_dtype(case)
    if fault == "NaN row":
        output[4, 3] = math.nan
    elif fault == "one NaN element":
        output[4, 3, 77] = math.nan
    elif fault == "one element off":
        output[4, 3, 77] += 0.3 * output[4, 3].float().square().mean().sqrt().to(output.dtype)
    elif fault == "output 2 % too large":
        output *= 1.02
    elif fault == "two heads swapped":
        output[3, [0, 1]] = output[3, [1, 0]]
    elif fault == "64 columns not written":
        output[4, 3, 64:128] = case.out[4, 3, 64:128]
    elif fault == "empty request not zeroed":
        output[0, 0, 0] = 1e-3
    elif fault == "empty request NaN":
        output[0] = math.nan
    elif fault == "infinity for a finite value":
        output[2, 0, 0] = math.inf
    elif fault == "lse off by 1e-2":
        lse[4, 3] += 1e-2
    elif fault == "lse of one row off by 5e-4":
        lse[2, 7] -= 5e-4
    elif fault == "lse in base e":
        lse *= math.log(2)
    elif fault == "lse of an empty request 0":
        lse[0] = 0.0
    elif fault == "lse NaN":
        lse[3, 0] = math.nan
    else:
        raise AssertionError(fault)
    return output, lse


@DTYPES
@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("last token dropped", "lse: error"),
        ("first page dropped", "kv_len 1000"),
        ("a page of another request", "kv_len 300"),
        ("a page counted twice", "kv_len 1000"),
        ("a row past the end", "output: inf or NaN"),
        ("NaN row", "output: inf or NaN"),
        ("one NaN element", "output: inf or NaN"),
        ("one element off", "output: largest error"),
        ("output 2 % too large", "output: error norm"),
        ("two heads swapped", "output: 1 - cosine"),
        ("64 columns not written", "output: error norm"),
        ("empty request not zeroed", "kv_len 0"),
        ("empty request NaN", "kv_len 0"),
        ("infinity for a finite value", "output: inf or NaN"),
        ("lse off by 1e-2", "request 4 (kv_len 1000), head 3; 1 of"),
        ("lse of one row off by 5e-4", "request 2 (kv_len 65), head 7; 1 of"),
        ("lse in base e", "lse: error"),
        ("lse of an empty request 0", "lse: inf or NaN"),
        ("lse NaN", "lse: inf or NaN"),
    ],
)
def test_rejects_a_planted_fault(fault, named, dtype):
    case = make_case(LENGTHS, num_heads=8, page_size=16, dtype=dtype, seed=3)
    expected = expected_of(case)
    assert compare(*run_in_dtype(case), expected).ok
    verdict = compare(*faulty(case, fault), expected)
    assert not verdict.ok
    assert named in str(verdict), verdict


def test_rejects_shape_and_dtype():
    case = make_case([5], num_heads=2, page_size=4)
    expected = expected_of(case)
    output, lse = run_in_dtype(case)
    assert "output: expected torch.bfloat16" in str(compare(output.float(), lse, expected))
    assert "output: expected" in str(compare(output[:, :1], lse, expected))
    assert "lse: expected torch.float32" in str(compare(output, lse.double(), expected))
