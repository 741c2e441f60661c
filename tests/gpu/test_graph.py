"""CUDA graphs, streams, and the order of work around a call."""

import pytest
import torch
from gpu_helpers import ENTRIES, capture, decode, judge_outputs, plan_of, same_bits

from mla_cute.testing.cases import make_case

# ragged, all empty, one long, all full: what a replay has to follow without being captured again
REPLAYS = ([1000, 0, 129, 64, 5000, 1], [0] * 6, [0, 0, 30000, 0, 0, 1], [8000, 8001, 7, 8063, 8064, 8065])


def make(lengths, seed, num_heads, page_size, **kwargs):
    shape = {"num_pages": 45000 // page_size, "num_indices": 45000 // page_size, "max_pages": 31000 // page_size}
    return make_case(
        lengths, num_heads=num_heads, page_size=page_size, device="cuda", seed=seed, drift=20.0, **shape, **kwargs
    )


@pytest.mark.parametrize("with_plan", [True, False], ids=["plan", "no_plan"])
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(("num_heads", "page_size"), [(16, 64), (128, 64), (16, 1), (65, 16)])
def test_replay_follows_lengths_pages_and_queries(num_heads, page_size, entry, with_plan):
    case = make(REPLAYS[0], 0, num_heads, page_size)
    plan = plan_of(case, entry) if with_plan else None
    outputs = {"out": case.out, "lse": case.lse}

    def step():
        if plan is not None:
            plan.update()
        decode(case, entry, plan=plan, **outputs)

    graph, _ = capture(step)
    for seed, lengths in enumerate((*REPLAYS, REPLAYS[0])):
        case.load(make(lengths, 100 + seed, num_heads, page_size))
        case.guarded_out.reset()
        case.guarded_lse.reset()
        graph.replay()
        verdict = judge_outputs(case)
        assert verdict.ok, f"replay {seed}, lengths {lengths}: {verdict}"


def test_captured_layers_share_one_update():
    """What a model does: plan once, then one decode per layer, all in one graph."""
    layers = [make(REPLAYS[0], 7, 16, 64, cache_layout=layout) for layout in ("fused", "split", "padded")]
    for layer in layers:
        layer.q_nope.normal_()
    plan = plan_of(layers[0], other_metadata=True)

    def step():
        plan.update()
        for layer in layers:
            decode(layer, plan=plan, out=layer.out, lse=layer.lse)

    graph, _ = capture(step)
    for seed, lengths in enumerate(REPLAYS):
        for layer in layers:
            layer.load(make(lengths, 50 + seed, 16, 64))
            layer.q_nope.normal_()
            layer.guarded_out.reset()
            layer.guarded_lse.reset()
        graph.replay()
        for layer in layers:
            verdict = judge_outputs(layer)
            assert verdict.ok, f"lengths {lengths}: {verdict}"


@pytest.mark.parametrize("batch_invariant", [False, True], ids=["balanced", "invariant"])
def test_two_plans_on_two_streams(batch_invariant):
    cases = [make(REPLAYS[0], 1, 16, 64), make(REPLAYS[3], 2, 128, 16)]
    plans = [plan_of(case, batch_invariant=batch_invariant) for case in cases]
    want = [decode(case, plan=plan) for case, plan in zip(cases, plans, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    results = [[], []]
    for _ in range(25):
        for case, plan, stream, got in zip(cases, plans, streams, results, strict=True):
            with torch.cuda.stream(stream):
                plan.update()
                got.append(decode(case, plan=plan))
    torch.cuda.synchronize()
    for (want_out, want_lse), got in zip(want, results, strict=True):
        for out, lse in got:
            assert same_bits(out, want_out)
            assert same_bits(lse, want_lse)


def test_calls_without_a_plan_on_two_streams():
    cases = [make(REPLAYS[0], 1, 16, 64), make(REPLAYS[3], 2, 128, 16)]
    want = [decode(case) for case in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    results = [[], []]
    for _ in range(25):
        for case, stream, got in zip(cases, streams, results, strict=True):
            with torch.cuda.stream(stream):
                got.append(decode(case))
    torch.cuda.synchronize()
    for (want_out, want_lse), got in zip(want, results, strict=True):
        for out, lse in got:
            assert same_bits(out, want_out)
            assert same_bits(lse, want_lse)


@pytest.mark.parametrize("with_plan", [True, False], ids=["plan", "no_plan"])
@pytest.mark.parametrize("default_stream", [True, False], ids=["default_stream", "side_stream"])
def test_inputs_written_right_before_the_call(default_stream, with_plan):
    """Queries, new tokens and metadata come from kernels on the same stream that are still running at the launch."""
    case, source = make(REPLAYS[0], 3, 16, 64), make(REPLAYS[3], 4, 16, 64)
    want = decode(source)
    plan = plan_of(case) if with_plan else None
    stream = torch.cuda.current_stream() if default_stream else torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for x in (case.q_nope, case.q_pe, case.ckv_cache, case.kpe_cache):
            x.fill_(float("nan"))
        torch.cuda._sleep(20_000_000)  # 10 ms: everything below is queued before any of it runs
        case.load(source)
        if plan is not None:
            plan.update()
            # the last thing before the call is the slow copy of a cache and of a query
            case.ckv_cache.copy_(source.ckv_cache)
            case.q_nope.copy_(source.q_nope)
        output, lse = decode(case, plan=plan)
        # and what comes after may overwrite the inputs at once
        for x in (case.q_nope, case.q_pe, case.ckv_cache, case.kpe_cache):
            x.fill_(float("nan"))
        for x in (case.kv_indptr, case.kv_indices, case.kv_last_page_len):
            x.zero_()
    stream.synchronize()
    assert same_bits(output, want[0])
    assert same_bits(lse, want[1])


@pytest.mark.parametrize("num_heads", [16, 128])
def test_layers_back_to_back(num_heads):
    """Calls that share a plan's workspace, queued without a gap; each layer reads what the layer before it wrote."""
    case = make(REPLAYS[0], 5, num_heads, 64)
    plan = plan_of(case)
    rounds = 30

    def run(between):
        q, outputs = case.q_nope.clone(), []
        for layer in range(rounds):
            if layer % 7 == 3:
                plan.update()
            result = decode_q(q)
            outputs.append(result)
            q = (q + 0.5 * result[0]).mul_(0.9)
            between()
        return outputs

    def decode_q(q):
        saved, case.q_nope = case.q_nope, q
        try:
            return decode(case, plan=plan)
        finally:
            case.q_nope = saved

    slow = run(torch.cuda.synchronize)
    torch.cuda._sleep(20_000_000)
    fast = run(lambda: None)
    torch.cuda.synchronize()
    for layer, ((out, lse), (want_out, want_lse)) in enumerate(zip(fast, slow, strict=True)):
        assert same_bits(out, want_out), f"layer {layer}"
        assert same_bits(lse, want_lse), f"layer {layer}"
