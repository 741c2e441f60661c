"""`mla_sparse` on the GPU against the float32 reference: poisoned inputs and guarded outputs in every test."""

import pytest
import torch
from fp8_decode_case import EVERY_KERNEL as EVERY_FP8_KERNEL
from gpu_helpers import bits, capture, other_bits, same_bits, spread_cache
from hog import beside, compile_hog

import mla_cute
from mla_cute.testing.cases import CACHE_LAYOUTS, expected_of, make_case
from mla_cute.testing.fp8 import LAYOUTS, make_fp8
from mla_cute.testing.sparse import call_sparse, expected_sparse, judge_sparse, lists_of, run_sparse, sinks_of

LENGTHS = [0, 1, 63, 64, 65, 127, 129, 1000, 2048, 20000, 17, 128]
# A tile, a pair and several of them without a token, in front of the others: references are chosen late.
LATE = (0, 64, 130, 0, 700)
BF16, FP16 = torch.bfloat16, torch.float16
BOTH_KERNELS = pytest.mark.parametrize("num_heads", [16, 128])


def accepted(case, lists, **kwargs):
    verdict = run_sparse(case, lists, **kwargs)
    assert verdict.ok, verdict


def plan_for(lists, num_heads, **options):
    return mla_cute.plan_sparse(lists.indices, num_heads=num_heads, topk_lens=lists.topk_lens, **options)


@pytest.mark.parametrize("drift", [0.0, 60.0, -60.0, -200.0])
@pytest.mark.parametrize("page_size", [1, 24, 64])
@pytest.mark.parametrize(
    ("num_heads", "dtype"), [(16, BF16), (128, BF16), (8, FP16), (64, FP16), (1, BF16), (65, BF16)]
)
def test_16_bit_caches(num_heads, dtype, page_size, drift):
    """Right, bitwise the same when repeated, with a plan and batch-invariant; every layout, -1 anywhere."""
    layout = CACHE_LAYOUTS[(num_heads + page_size) % 4]
    case = make_case(
        LENGTHS, num_heads=num_heads, page_size=page_size, dtype=dtype, drift=drift, cache_layout=layout, device="cuda",
        out_layout="batch_strided",
    )  # fmt: skip
    expected = expected_of(case)
    lists = lists_of(case, first_none=LATE)
    accepted(case, lists, expected=expected)
    out, lse = case.out.clone(), case.lse.clone()
    accepted(case, lists, expected=expected, plan=plan_for(lists, num_heads))
    assert same_bits(case.out, out)
    assert same_bits(case.lse, lse)
    accepted(case, lists, expected=expected, sink=sinks_of(case))
    accepted(case, lists, expected=expected, batch_invariant=True, sink=sinks_of(case, 1))
    accepted(case, lists, expected=expected, batch_invariant=True)
    accepted(case, lists_of(case, none_share=0.0, shuffled=False, seed=1), expected=expected)


@pytest.mark.parametrize("drift", [0.0, -60.0])
@pytest.mark.parametrize("q_fp8", [False, True], ids=["q16", "q_e4m3"])
@pytest.mark.parametrize("layout", LAYOUTS)
@EVERY_FP8_KERNEL
def test_fp8_caches(num_heads, layout, q_fp8, drift):
    case = make_case(LENGTHS, num_heads=num_heads, page_size=64, drift=drift, device="cuda")
    fp8 = make_fp8(case, layout, q_fp8)
    expected = expected_sparse(fp8)
    lists = lists_of(case, first_none=LATE)
    accepted(fp8, lists, expected=expected)
    out, lse = case.out.clone(), case.lse.clone()
    accepted(fp8, lists, expected=expected, plan=plan_for(lists, num_heads, kv_format=fp8.kv_format, q_fp8=q_fp8))
    assert same_bits(case.out, out)
    assert same_bits(case.lse, lse)
    accepted(fp8, lists, expected=expected, sink=sinks_of(fp8))
    accepted(fp8, lists, expected=expected, batch_invariant=True, sink=sinks_of(fp8, 1))
    accepted(fp8, lists, expected=expected, batch_invariant=True)


@pytest.mark.parametrize("page_size", [1, 24, 64])
def test_rows_in_one_stretch_have_the_bits_of_rows_in_parts(page_size):
    """tile16 copies the first whole, and the others part by part, to the same places."""
    case = make_case(LENGTHS, num_heads=16, page_size=page_size, device="cuda")
    fp8 = make_fp8(case, "group656")
    lists = lists_of(case, first_none=LATE)
    options = {"config": mla_cute.KernelConfig(fp8_kernel="tile16")}
    out, lse = call_sparse(fp8, lists, **options)
    q_nope, q_pe, ckv, kpe = fp8.case.tensors
    scales = fp8.scales["ckv_scale_arr"]
    assert scales.data_ptr() == ckv.data_ptr() + 512
    apart = [x.clone(memory_format=torch.contiguous_format) for x in (ckv, kpe, scales)]
    for caches in (apart, [ckv, kpe, apart[2]], [ckv, apart[1], scales]):
        in_parts = mla_cute.mla_sparse(
            q_nope, q_pe, *caches[:2], lists.indices, case.sm_scale, topk_lens=lists.topk_lens,
            **fp8.scales | {"ckv_scale_arr": caches[2]}, **options,
        )  # fmt: skip
        assert same_bits(in_parts[0], out)
        assert same_bits(in_parts[1], lse)


@pytest.mark.parametrize("score", [-12.0, -24.0, -80.0], ids=lambda score: f"{score:.0f} nats")
@pytest.mark.parametrize("layout", LAYOUTS)
@EVERY_FP8_KERNEL
def test_lists_of_low_scores(num_heads, layout, score):
    """P relative to 0 would be a float16 with few digits or none: an item's first references have to fall there."""
    case = make_case([5, 40, 70, 700], num_heads=num_heads, page_size=64, sm_scale=0.125, device="cuda")
    case.q_pe[..., 0] = 8.0
    case.kpe_cache[..., 0] = torch.where(case.kpe_cache[..., 0].isnan(), torch.nan, score)
    fp8 = make_fp8(case, layout, kpe_scale=0.25)
    lists = lists_of(case, first_none=LATE)
    accepted(fp8, lists)
    accepted(fp8, lists, batch_invariant=True)


@pytest.mark.parametrize("kernel", ["tile16", "tile64"])
@pytest.mark.parametrize("num_heads", [16, 64])
def test_both_kernels_at_every_head_count(num_heads, kernel):
    case = make_case(LENGTHS, num_heads=num_heads, page_size=64, device="cuda")
    accepted(case, lists_of(case, first_none=LATE), config=mla_cute.KernelConfig(kernel=kernel))


@BOTH_KERNELS
@pytest.mark.parametrize("lengths", [[], [0], [0] * 200], ids=len)
def test_lists_without_tokens(num_heads, lengths):
    case = make_case(lengths, num_heads=num_heads, page_size=64, device="cuda")
    for first_none in ((0,), (1, 300, 64)):
        accepted(case, lists_of(case, first_none=first_none))
        assert (case.out == 0).all()
        assert case.lse.isneginf().all()


@BOTH_KERNELS
def test_every_length_around_the_tile(num_heads):
    case = make_case(list(range(1, 260)), num_heads=num_heads, page_size=16, device="cuda")
    accepted(case, lists_of(case, none_share=0.0))
    accepted(case, lists_of(case, none_share=1.5, first_none=LATE))


@BOTH_KERNELS
@pytest.mark.parametrize("topk", [2048, 512, 77])
def test_many_query_tokens(num_heads, topk):
    """A prefill: thousands of lists, no topk_lens."""
    case = make_case([topk] * 1500, num_heads=num_heads, page_size=64, shared_pages=1000, device="cuda")
    lists = lists_of(case, none_share=0.0, topk=topk)
    accepted(case, lists, topk_lens=None)
    plan = mla_cute.plan_sparse(lists.indices, num_heads=num_heads)
    accepted(case, lists, topk_lens=None, plan=plan)
    for seed in range(3):  # the second call and those after it go the short way
        accepted(case, lists, topk_lens=None, plan=plan, sink=sinks_of(case, seed))
    accepted(case, lists, topk_lens=None, plan=plan)


@BOTH_KERNELS
def test_a_token_that_is_named_twice_counts_twice(num_heads):
    case = make_case([300, 64], num_heads=num_heads, page_size=64, device="cuda")
    lists = lists_of(case, none_share=0.0, shuffled=False)
    twice = torch.cat((lists.indices[:, :64], lists.indices[:, :64]), dim=1)
    args = (*case.tensors, twice, case.sm_scale)
    out, lse = mla_cute.mla_sparse(*args)
    once, once_lse = mla_cute.mla_sparse(*case.tensors, twice[:, :64].contiguous(), case.sm_scale)
    assert (out.float() - once.float()).norm() < 5e-3 * once.float().norm()
    torch.testing.assert_close(lse, once_lse + 1, rtol=0, atol=1e-4)


@BOTH_KERNELS
@pytest.mark.parametrize("layout", ["", "group656"])
def test_graphs_replay_with_other_lists(num_heads, layout):
    def make(lengths, seed):
        room = {"num_pages": 60, "num_indices": 60, "max_pages": 60}
        case = make_case(lengths, num_heads=num_heads, page_size=64, seed=seed, device="cuda", **room)
        return make_fp8(case, layout) if layout else case

    def plain(x):
        return x.case if layout else x

    case = make([1000, 64, 0, 500], 0)
    lists = lists_of(plain(case), topk=3000)
    plan = plan_for(lists, num_heads)

    def step():
        plan.update()
        call_sparse(case, lists, out=plain(case).out, lse=plain(case).lse, plan=plan)

    graph, _ = capture(step)
    for seed, lengths in enumerate(([1, 900, 130, 7], [0, 0, 0, 0], [2000, 64, 65, 3], [1000, 64, 0, 500]), 1):
        other = make(lengths, seed)
        case.load(other)
        lists.load(lists_of(plain(other), topk=3000, first_none=LATE[1:3], seed=seed))
        plain(case).guarded_out.reset()
        plain(case).guarded_lse.reset()
        graph.replay()
        verdict = judge_sparse(case, expected_sparse(case))
        assert verdict.ok, f"replay {seed}: {verdict}"


@BOTH_KERNELS
def test_batch_invariant_lists_have_their_own_bits(num_heads):
    case = make_case([3000, 129, 0, 5000, 1, 2048], num_heads=num_heads, page_size=64, device="cuda")
    lists = lists_of(case)
    out, lse = call_sparse(case, lists, batch_invariant=True)
    for b in range(6):
        args = (
            case.q_nope[b : b + 1],
            case.q_pe[b : b + 1],
            *case.tensors[2:],
            lists.indices[b : b + 1],
            case.sm_scale,
        )
        alone = mla_cute.mla_sparse(*args, topk_lens=lists.topk_lens[b : b + 1], batch_invariant=True)
        assert same_bits(alone[0][0], out[b])
        assert same_bits(alone[1][0], lse[b])


@pytest.mark.parametrize("log2_elements", [31, 32])
@BOTH_KERNELS
def test_tokens_beyond_the_limit(num_heads, log2_elements):
    case = make_case([3000, 129, 0, 5000, 1], num_heads=num_heads, page_size=64, device="cuda")
    expected = expected_of(case)
    spread_cache(case, log2_elements)
    accepted(case, lists_of(case), expected=expected)


def test_values_on_the_device_are_checked_on_request(monkeypatch):
    monkeypatch.setenv("MLA_CUTE_CHECK", "1")
    case = make_case([100, 20], num_heads=16, page_size=64, device="cuda")
    lists = lists_of(case)
    accepted(case, lists)
    lists.indices[1, 3] = case.ckv_cache.shape[0] * 64
    with pytest.raises(ValueError, match=r"indices: expected -1 or tokens in .* at position \[1, 3\]"):
        call_sparse(case, lists)
    lists.indices[1, 3] = -1
    lists.topk_lens[0] = 10_000
    with pytest.raises(ValueError, match="topk_lens: expected values in"):
        call_sparse(case, lists)


@pytest.mark.parametrize("layout", ["", "tensor", "group656"])
@BOTH_KERNELS
def test_repeats_beside_a_bandwidth_hog(num_heads, layout):
    hog, repeats = compile_hog(), 100
    case = make_case([2048] * 20 + [1, 64, 0, 129, 20000], num_heads=num_heads, page_size=64, device="cuda")
    given = make_fp8(case, layout) if layout else case
    lists = lists_of(case, first_none=LATE)
    plan = plan_for(lists, num_heads, kv_format=layout.removesuffix("656"))  # the kernel goes by it
    accepted(given, lists, plan=plan)
    want_out, want_lse = bits(case.out).clone(), bits(case.lse).clone()
    wrong = torch.zeros(repeats + 1, dtype=torch.int64, device="cuda")

    def repeat(i):
        case.out.fill_(float("nan"))
        case.lse.fill_(float("nan"))
        call_sparse(given, lists, out=case.out, lse=case.lse, plan=plan if i % 2 else None)
        wrong[i] = other_bits(case, want_out, want_lse)

    for i in (0, 1):
        repeat(i)
    with beside(hog):
        for i in range(1, repeats + 1):
            repeat(i)
    assert wrong.count_nonzero() == 0, f"elements that differ, by repeat: {wrong.tolist()}"
