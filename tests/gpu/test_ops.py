"""The ops on CUDA tensors: torch.compile, CUDA graphs that plan inside, and the merge of states against float64.

Compiled with the backend "aot_eager": it needs no Triton, and what the ops have to get right (schemas, fakes,
functionalisation) is the same under inductor.
"""

import math

import pytest
import torch
from gpu_helpers import capture

import mla_cute
from mla_cute.testing.cases import expected_of, make_case
from mla_cute.testing.fp8 import compare_fp8, expected_fp8, make_fp8
from mla_cute.testing.verdict import compare

# No two sizes are equal by chance: dynamic shapes make one symbol of those that are.
BATCHES = ([1000, 0, 129, 64, 5000, 1, 33], [8000, 7, 3], [0, 65] * 6)
SIZES = {"num_heads": 16, "page_size": 64, "num_pages": 201, "num_indices": 203, "max_pages": 157, "device": "cuda"}


def compile_once(function):
    torch._dynamo.reset()
    run = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    stance = ["default"]

    def call(*args, **kwargs):
        with torch.compiler.set_stance(stance[0]):
            result = run(*args, **kwargs)
        stance[0] = "fail_on_recompile"
        return result

    return call


@pytest.mark.parametrize("entry", ["csr", "block_table"])
def test_compiled_decode(entry):
    names = ("q_nope", "q_pe", "ckv_cache", "kpe_cache")

    def layer(tensors, pages, sm_scale):
        if entry == "csr":
            out, lse = mla_cute.mla_paged_decode(*tensors, *pages[:2], sm_scale, kv_last_page_len=pages[2])
        else:
            out, lse = mla_cute.mla_paged_decode_block_table(*tensors, *pages, sm_scale)
        return out.clone(), lse.clone()

    run = compile_once(layer)
    for seed, lengths in enumerate(BATCHES):
        case = make_case(lengths, seed=seed, **SIZES)
        csr = (case.kv_indptr, case.kv_indices, case.kv_last_page_len)
        pages = csr if entry == "csr" else (case.block_table, case.seq_lens)
        out, lse = run([getattr(case, name) for name in names], pages, case.sm_scale)
        verdict = compare(out, lse, expected_of(case))
        assert verdict.ok, f"{lengths}: {verdict}"


def test_compiled_decode_over_an_fp8_cache():
    run = compile_once(lambda keywords: mla_cute.mla_paged_decode(**keywords))
    for seed, lengths in enumerate(BATCHES):
        fp8 = make_fp8(make_case(lengths, seed=seed, **SIZES), "tensor")
        case = fp8.case
        names = ("q_nope", "q_pe", "ckv_cache", "kpe_cache", "kv_indptr", "kv_indices", "kv_last_page_len", "sm_scale")
        out, lse = run({name: getattr(case, name) for name in names} | fp8.scales)
        verdict = compare_fp8(out, lse, expected_fp8(fp8))
        assert verdict.ok, f"{lengths}: {verdict}"


@pytest.mark.parametrize("shared", [False, True], ids=["plans_inside", "shared_plan"])
def test_graph_around_the_op_follows_new_lengths(shared):
    case = make_case(BATCHES[0], **SIZES)
    plan = None
    if shared:
        plan = mla_cute.plan_decode(case.kv_indptr, num_heads=16, page_size=64, kv_last_page_len=case.kv_last_page_len)

    def step():
        if plan is not None:
            plan.update()
        mla_cute.ops.mla_paged_decode(
            *case.csr_args, kv_last_page_len=case.kv_last_page_len, out=case.out, lse=case.lse, plan=plan
        )

    graph, _ = capture(step)
    for seed, lengths in enumerate((BATCHES[0], [0] * 7, [8000, 1, 2, 3, 64, 65, 0])):
        case.load(make_case(lengths, seed=10 + seed, **SIZES))
        case.guarded_out.reset()
        case.guarded_lse.reset()
        graph.replay()
        verdict = compare(case.out, case.lse, expected_of(case))
        assert verdict.ok, f"{lengths}: {verdict}"
        assert case.guarded_out.intact()
        assert case.guarded_lse.intact()


# ------------------------------------------------------------------------------------------------ merge_states


def make_states(shape, dtype, layout, seed=0):
    """o_a, lse_a, o_b, lse_b on the GPU; every third row of either state saw no key, and its output is NaN."""
    generator = torch.Generator().manual_seed(seed)
    states = []
    for first in (0, 1):
        o = torch.randn(shape, generator=generator).to("cuda", dtype)
        lse = (10 * torch.randn(shape[:-1], generator=generator)).cuda()
        empty = torch.arange(lse.numel(), device="cuda").view(lse.shape) % 3 == 0
        if first:  # both are empty in every ninth row
            empty = torch.arange(lse.numel(), device="cuda").view(lse.shape) % 9 < 3
        lse[empty] = -torch.inf
        o[empty] = torch.nan
        if layout == "strided":
            wide = torch.full((*shape[:-2], shape[-2] + 1, shape[-1] + 16), torch.nan, dtype=dtype, device="cuda")
            wide[..., :-1, 8:-8] = o
            o = wide[..., :-1, 8:-8]
            lse = torch.stack((lse, torch.full_like(lse, torch.nan)), dim=-1)[..., 0]
        states += [o, lse]
    return states


def in_float64(o_a, lse_a, o_b, lse_b, lse_base):
    base = 2.0 if lse_base == 2 else math.e
    a, b = (base ** lse.double() for lse in (lse_a, lse_b))
    total = (a + b).unsqueeze(-1)
    parts = [
        torch.where(w.unsqueeze(-1) > 0, w.unsqueeze(-1) * o.double(), 0.0) for w, o in ((a, o_a), (b, o_b))
    ]  # fmt: skip
    return torch.where(total > 0, sum(parts) / total, 0.0), (a + b).log() / math.log(base)


@pytest.mark.parametrize("lse_base", [2, "e"])
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape", [(37, 16, 512), (3, 128, 512), (1, 1, 8), (5, 3, 72), (4, 24), (2, 3, 5, 1040)], ids=str
)
def test_merge_states(shape, dtype, layout, lse_base):
    if layout == "strided" and len(shape) > 3:
        shape = shape[1:]  # the leading dimensions of a padded tensor are no view
    args = make_states(shape, dtype, layout)
    before = [x.clone() for x in args]
    memory = torch.full((*shape[:-2], shape[-2] + 2, shape[-1]), 7.0, dtype=dtype, device="cuda")
    lse_memory = torch.full((*shape[:-2], shape[-2] + 2), 7.0, device="cuda")
    if len(shape) > 3:
        memory, lse_memory = memory[..., 1:-1, :].contiguous(), lse_memory[..., 1:-1].contiguous()
        out, lse = memory, lse_memory
    else:
        out, lse = memory[..., 1:-1, :], lse_memory[..., 1:-1]
    mla_cute.merge_states(*args, lse_base=lse_base, out=out, lse=lse)
    want, want_lse = in_float64(*args, lse_base)
    assert torch.equal(lse.isneginf(), want_lse.isneginf())
    kept = ~want_lse.isneginf()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), want, rtol=eps / 2 + 2e-6, atol=4e-6)
    torch.testing.assert_close(lse.double()[kept], want_lse[kept], rtol=1e-6, atol=2e-6)
    assert (out[~kept] == 0).all()
    for x, y in zip(args, before, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    if len(shape) <= 3:
        assert (memory[..., (0, -1), :] == 7).all()
        assert (lse_memory[..., (0, -1)] == 7).all()


def test_merge_states_of_rows_of_more_than_2_to_the_31_bytes():
    """One row, so that only the offsets in it are large."""
    width = 2**30 + 1024
    free = torch.cuda.mem_get_info()[0]
    if free < 8 * width:
        pytest.skip(f"needs {8 * width / 1e9:.1f} GB of free GPU memory, there are {free / 1e9:.1f}")
    o_a, o_b = (torch.full((1, 1, width), value, dtype=torch.bfloat16, device="cuda") for value in (2.0, 6.0))
    out = torch.full_like(o_a, float("nan"))
    lse = torch.zeros(1, 1, device="cuda")
    o_a[..., -8:], o_b[..., -16:] = 10.0, -2.0
    mla_cute.merge_states(o_a, lse, o_b, lse, out=out)
    assert out[0, 0, :-16].eq(4).all()
    assert out[0, 0, -16:].tolist() == [0.0] * 8 + [4.0] * 8


def test_merge_states_in_place_and_captured():
    o_a, lse_a, o_b, lse_b = make_states((64, 16, 512), torch.bfloat16, "contiguous")
    want = mla_cute.merge_states(o_a, lse_a, o_b, lse_b)
    for _ in range(20):
        for into in ((o_a.clone(), lse_a.clone(), o_b, lse_b), (o_a, lse_a, o_b.clone(), lse_b.clone())):
            out, lse = into[:2] if into[0] is not o_a else into[2:]
            mla_cute.merge_states(*into, out=out, lse=lse)
            assert torch.equal(out.view(torch.int16), want[0].view(torch.int16))
            assert torch.equal(lse, want[1])
    captured = [x.clone() for x in (o_a, lse_a, o_b, lse_b, *want)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mla_cute.merge_states(*captured[:4], out=captured[4], lse=captured[5])
    captured[0].normal_()
    captured[1].zero_()
    graph.replay()
    assert torch.equal(captured[4], mla_cute.merge_states(*captured[:4])[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: o[..., :12], "o_a: expected a last dimension that is a multiple of 8, got 12"),
        (lambda o: o[..., 4:-4], r"o_a: expected a base address that is a multiple of 16 bytes"),
        (lambda o: o.transpose(1, 2), r"o_a: expected stride 1 in the last dimension"),
    ],
)
def test_merge_states_refuses_what_the_kernel_cannot_load(change, message):
    o = change(torch.zeros(4, 64, 64, dtype=torch.bfloat16, device="cuda"))
    lse = torch.zeros(o.shape[:-1], device="cuda")
    with pytest.raises(ValueError, match=message):
        mla_cute.merge_states(o, lse, o.contiguous(), lse)
