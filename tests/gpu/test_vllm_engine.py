"""Engines of vLLM over the backend on the GPU: every call against float32 attention, and what is generated with CUDA
graphs, drafts, cached prefixes, in other batches and by vLLM's own backend.

Each run of tests/vllm_engine.py is a process; all start with the first test, unless -k chooses some.
"""

import pytest
import vllm_engine
from engine_case import TOKENS, check_same
from engine_runs import fixture_of, marks_of, why_not
from vllm_engine import LIMIT_S, RELEASE, RUNS

from mla_cute.integrations._vllm_plugin import BACKEND

# Of one token's head in the Frobenius norm, 2e-3 of which is the output's rounding to bf16; absolute.
OUTPUT_LIMIT, LSE_LIMIT = 2e-2, 2e-2

pytestmark = marks_of(why_not("vLLM", RELEASE), RUNS, LIMIT_S)
report_of = fixture_of(vllm_engine.__file__, RUNS, LIMIT_S)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("eager", {"decode", "prefill"}), ("fp8", {"decode", "prefill"}), ("fp8_ds_mla", {"decode", "prefill"}),
        ("prefix", {"decode", "prefill", "prefix"}), ("long_prompts", {"decode", "prefill", "beside_prompts"}),
        ("drafts", {"decode", "prefill", "prefix"}),
        ("warmed_eager", {"decode", "prefill", "prefix"}), ("batch_invariant", {"prefill"}), ("one_token", {"decode"}),
    ],
)  # fmt: skip
def test_every_call_is_attention(report_of, name, kinds):
    report = report_of(name)
    assert report["backend"] == BACKEND
    print(report["kinds"], report["errors"])
    assert kinds <= {kind for kind, calls in report["kinds"].items() if calls}
    assert report["python_steps"] >= (TOKENS - 1) / (1 + RUNS[name].drafts)
    for of, limit in (("output", OUTPUT_LIMIT), ("lse", LSE_LIMIT)):
        error, what = report["errors"][of]
        assert 0 <= error < limit, f"{of}: {error:.2e} in {what}"


@pytest.mark.parametrize("eager", ["eager", "fp8", "drafts"])
def test_graphs_generate_what_eager_steps_do(report_of, eager):
    graphs = report_of("graphs" if eager == "eager" else f"{eager}_graphs")
    assert "FULL" in graphs["cudagraph_mode"]
    assert graphs["calls_before"] > 0, "the backend was not captured"
    print({key: graphs[key] for key in ("steps", "replays", "python_steps")})
    assert graphs["replays"] >= graphs["steps"] / 2
    assert graphs["python_steps"] <= graphs["steps"] / 2
    check_same(graphs["rounds"][0], report_of(eager)["rounds"][0])


@pytest.mark.parametrize("name", ["warmed", "warmed_eager"])
def test_nothing_compiles_after_vllms_warm_up(report_of, name):
    """Not even from disk: every kernel is there before the first request, and vLLM's monitor, which eager engines do
    not have, hears of nothing in the CuTe DSL. (It does of Triton's kernels, for logprobs.)"""
    report = report_of(name)
    before, after = report["kernels_before"], report["kernels"]
    print(before)
    assert sum(before.values()) > 0
    assert after == before
    assert report["monitored"] is RUNS[name].graphs
    print(report["compiled_by"])
    assert not [backend for backend in report["compiled_by"] if "cute" in backend.lower()]
    same = "graphs" if RUNS[name].graphs else "drafts"
    check_same(report["rounds"][0], report_of(same)["rounds"][0])


@pytest.mark.parametrize("drafts", ["", "drafts_"])
def test_the_first_model_runner(report_of, drafts):
    report = report_of(f"first_runner_{drafts}".rstrip("_"))
    assert "FULL" in report["cudagraph_mode"]
    check_same(report["rounds"][0], report_of(f"{drafts}graphs")["rounds"][0])


def test_without_a_cache_directory(report_of):
    report = report_of("no_cache")
    assert report["kernels"]["compiled"] > 0
    assert report["kernels"]["loaded"] == 0
    check_same(report["rounds"][0], report_of("eager")["rounds"][0][: len(RUNS["no_cache"].prompts)])


def test_cached_prefixes_change_nothing(report_of):
    first, second = report_of("prefix")["rounds"]
    cached = [request["cached"] for request in second]
    assert cached[0] >= 256, cached
    assert sum(cached) > sum(request["cached"] for request in first)
    check_same(second, first)


def test_drafts_change_nothing(report_of):
    check_same(report_of("drafts")["rounds"][0], report_of("eager")["rounds"][0])


def test_batch_invariance(report_of):
    report = report_of("batch_invariant")
    assert report["kinds"]["decode"] == 0  # prefill's plan for every step
    assert len(report["alone"]) == len(RUNS["batch_invariant"].alone) > 0
    for i, alone in report["alone"].items():
        batched = report["rounds"][0][int(i)]
        assert alone["tokens"] == batched["tokens"]
        assert alone["logprobs"] == batched["logprobs"]


def test_the_backend_of_vllm_generates_the_same(report_of):
    theirs = report_of("one_token_triton")
    assert "triton" in theirs["backend"]
    check_same(report_of("one_token")["rounds"][0], theirs["rounds"][0])
