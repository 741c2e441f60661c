"""CUDA graphs of FP8 calls: replays follow lengths, pages, caches, queries and the contents of ckv_scale_arr."""

import dataclasses

import pytest
import torch
from gpu_helpers import ENTRIES, capture, plan_of, same_bits

from mla_cute.testing.cases import make_case
from mla_cute.testing.fp8 import Fp8Case, expected_fp8, judge_fp8, make_fp8
from mla_cute.testing.prefill import make_prefill_case

# Variants that test_fp8_decode.py and test_fp8_prefill.py compile too: (layout, e4m3 queries, page size, heads).
DECODE = (
    ("tensor", False, 64, 16),
    ("tensor", True, 64, 128),
    ("token", False, 64, 128),
    ("token", False, 1, 16),
    ("group", True, 64, 16),
    ("group656", False, 64, 16),
)
PREFILL = (
    ("tensor", True, 64, 16),
    ("token", False, 64, 128),
    ("group656", False, 64, 16),
    ("token", True, 1, 16),
)
# ragged, all empty, one long, all full: what a replay has to follow without being captured again
REPLAYS = ([1000, 0, 129, 64, 5000, 1], [0] * 6, [0, 0, 30000, 0, 0, 1], [8000, 8001, 7, 8063, 8064, 8065])
PREFILL_REPLAYS = (
    [(1, 1000), (300, 300), (0, 64), (5, 129), (128, 5000), (1, 1)],
    [(0, 0)] * 6,
    [(0, 0), (0, 9), (97, 30000), (0, 0), (600, 600), (3, 1)],
    [(300, 8000), (200, 8001), (7, 7), (93, 90), (99, 99), (1, 64)],
)


def make(variant, lengths, seed) -> Fp8Case:
    layout, q_fp8, page_size, num_heads = variant
    shape = {"num_pages": 45000 // page_size, "num_indices": 45000 // page_size, "max_pages": 31000 // page_size}
    shape |= {"num_heads": num_heads, "page_size": page_size, "device": "cuda", "seed": seed, "drift": 10.0}
    if lengths and isinstance(lengths[0], tuple):
        return make_fp8(make_prefill_case(lengths, total_q=750, **shape), layout, q_fp8)
    return make_fp8(make_case(lengths, **shape), layout, q_fp8)


def replay_follows(fp8: Fp8Case, steps, plan, entry: str, variant) -> None:
    case = fp8.case

    def step():
        if plan is not None:
            plan.update()
        fp8.call(entry, out=case.out, lse=case.lse, plan=plan)

    graph, _ = capture(step)
    for seed, lengths in enumerate(steps):
        fp8.load(make(variant, lengths, 100 + seed))
        fp8.reset()
        graph.replay()
        verdict = judge_fp8(fp8, expected_fp8(fp8))
        assert verdict.ok, f"replay {seed}, lengths {lengths}: {verdict}"
        if "ckv_scale_arr" not in fp8.scales:
            continue
        # other scales and the same bytes: a replay reads them again
        before = case.out.clone()
        fp8.scales["ckv_scale_arr"].mul_(0.5)
        fp8.reset()
        graph.replay()
        verdict = judge_fp8(fp8, expected_fp8(fp8))
        assert verdict.ok, f"replay {seed} with other scales, lengths {lengths}: {verdict}"
        assert same_bits(before, case.out) is (sum(case.lengths) == 0)


@pytest.mark.parametrize("with_plan", [True, False], ids=["plan", "no_plan"])
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("variant", DECODE, ids=str)
def test_decode_replays_follow(variant, entry, with_plan):
    fp8 = make(variant, REPLAYS[0], 0)
    plan = plan_of(fp8.case, entry) if with_plan else None
    replay_follows(fp8, (*REPLAYS, REPLAYS[0]), plan, entry, variant)


@pytest.mark.parametrize("with_plan", [True, False], ids=["plan", "no_plan"])
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("variant", PREFILL, ids=str)
def test_prefill_replays_follow(variant, entry, with_plan):
    fp8 = make(variant, PREFILL_REPLAYS[0], 0)
    plan = plan_of(fp8.case, entry) if with_plan else None
    replay_follows(fp8, (*PREFILL_REPLAYS, PREFILL_REPLAYS[0]), plan, entry, variant)


def test_layers_of_every_format_in_one_graph_share_one_update():
    """What a model does: plan once, then one decode per layer, all in one graph."""
    variants = (("tensor", False), ("tensor", True), ("token", False), ("group", True), ("group656", False))
    layers = [make((*variant, 64, 16), REPLAYS[0], 7) for variant in variants]
    plan = plan_of(layers[0].case, other_metadata=True)

    def step():
        plan.update()
        for layer in layers:
            layer.call(out=layer.case.out, lse=layer.case.lse, plan=plan)

    graph, _ = capture(step)
    for seed, lengths in enumerate(REPLAYS):
        for variant, layer in zip(variants, layers, strict=True):
            layer.load(make((*variant, 64, 16), lengths, 50 + seed))
            layer.reset()
        graph.replay()
        for layer in layers:
            verdict = judge_fp8(layer, expected_fp8(layer))
            assert verdict.ok, f"{layer.layout}, lengths {lengths}: {verdict}"


@pytest.mark.parametrize("variant", DECODE, ids=str)
def test_inputs_written_right_before_the_call(variant):
    """Cache, scales and queries come from kernels on the same stream that still run at the launch, and what comes after
    may overwrite them at once."""
    fp8, source = make(variant, REPLAYS[0], 3), make(variant, REPLAYS[3], 4)
    want = source.call()
    plan = plan_of(fp8.case)
    inputs = [x for x in (*fp8.case.tensors, *fp8.scales.values()) if isinstance(x, torch.Tensor)]

    def poison():
        for x in inputs:
            if x.dtype is torch.float8_e4m3fn:
                x.view(torch.uint8).fill_(0x7F)
            else:
                x.fill_(float("nan"))

    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        poison()
        torch.cuda._sleep(20_000_000)  # 10 ms: everything below is queued before any of it runs
        fp8.load(source)
        plan.update()
        for x, y in zip(fp8.case.tensors, source.case.tensors, strict=True):
            x.copy_(y)
        for name, value in fp8.scales.items():
            if isinstance(value, torch.Tensor):
                value.copy_(source.scales[name])
        output, lse = fp8.call(plan=plan)
        poison()
        for x in (fp8.case.kv_indptr, fp8.case.kv_indices, fp8.case.kv_last_page_len):
            x.zero_()
    stream.synchronize()
    assert same_bits(output, want[0])
    assert same_bits(lse, want[1])


@pytest.mark.parametrize("variant", DECODE, ids=str)
def test_layers_back_to_back(variant):
    """Calls that share a plan's workspace, queued without a gap, give the bits of calls one by one."""
    fp8 = make(variant, REPLAYS[0], 5)
    plan = plan_of(fp8.case)
    layers = [fp8, dataclasses.replace(fp8, case=dataclasses.replace(fp8.case, sm_scale=0.5 * fp8.case.sm_scale))]
    want = []
    for layer in layers:
        want.append(layer.call(plan=plan))
        torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)
    got = [layers[i % 2].call(plan=plan) for i in range(40)]
    torch.cuda.synchronize()
    assert not same_bits(want[0][0], want[1][0])
    for i, (output, lse) in enumerate(got):
        assert same_bits(output, want[i % 2][0]), f"call {i}"
        assert same_bits(lse, want[i % 2][1]), f"call {i}"
