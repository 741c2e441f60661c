"""Engines of SGLang over the backend on the GPU: every call against float32 attention, and what is generated with CUDA
graphs, drafts, cached prefixes, in chunks, in other batches and by SGLang's own backend.

Each run of tests/sglang_engine.py is a process with SGLang's own below it; all start with the first test, unless -k
chooses some.
"""

import pytest
import sglang_engine
from engine_case import TOKENS, check_same
from engine_runs import fixture_of, marks_of, why_not
from sglang_engine import LIMIT_S, RELEASE, RUNS

# An engine is three processes, whose imports and kernels' compilation take cores.
CORES_EACH = 2
OUTPUT_LIMIT = 2e-2  # of one token's head in the Frobenius norm, 2e-3 of which is the output's rounding to bf16

pytestmark = marks_of(why_not("SGLang", RELEASE), RUNS, LIMIT_S, CORES_EACH)
report_of = fixture_of(sglang_engine.__file__, RUNS, LIMIT_S, CORES_EACH)

DRAFTING = {"extend", "target_verify", "draft model: extend", "draft model: decode", "draft model: draft_extend_v2"}


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("eager", {"decode"}), ("fp8", {"decode"}), ("page_size_1", {"decode"}), ("prefix", {"decode"}),
        ("chunks", {"decode", "extend", "prefix"}), ("drafts", DRAFTING), ("drafts_accepted", DRAFTING),
        ("drafts_fp8", DRAFTING), ("deterministic", {"decode", "extend"}), ("one_token", {"decode"}),
    ],
)  # fmt: skip
def test_every_call_is_attention(report_of, name, kinds):
    """Prompts that SGLang's FlashAttention-3 takes are no calls, so no kind of those that it may take is asked for."""
    report = report_of(name)
    print(report["kinds"], report["errors"])
    found = {kind for kind, calls in report["kinds"].items() if calls}
    assert kinds - {"extend", "prefix", "draft model: extend"} <= found
    assert kinds & {"extend", "draft model: extend"} <= found or report["kinds"]["expanded"]
    assert report["python_steps"] >= (TOKENS - 1) / (1 + RUNS[name].drafts)
    assert report["page_size"] == RUNS[name].engine.get("page_size", 64)
    error, what = report["errors"]
    assert 0 <= error < OUTPUT_LIMIT, f"{error:.2e} in {what}"


@pytest.mark.parametrize("eager", ["eager", "fp8", "page_size_1", "drafts"])
def test_graphs_generate_what_eager_steps_do(report_of, eager):
    graphs = report_of("graphs" if eager == "eager" else f"{eager}_graphs")
    assert graphs["calls_before"] > 0, "the backend was not captured"
    print({key: graphs[key] for key in ("steps", "replays", "python_steps")})
    assert graphs["replays"] >= graphs["steps"] / 2
    assert graphs["python_steps"] <= graphs["steps"] / 2
    check_same(graphs["rounds"][0], report_of(eager)["rounds"][0])


def test_cached_prefixes_change_nothing(report_of):
    first, second = report_of("prefix")["rounds"]
    cached = [request["cached"] for request in second]
    assert cached[0] >= 256, cached
    assert sum(cached) > sum(request["cached"] for request in first)
    check_same(second, first)


def test_page_sizes_generate_the_same(report_of):
    check_same(report_of("page_size_1")["rounds"][0], report_of("eager")["rounds"][0])


def test_drafts_change_nothing(report_of):
    check_same(report_of("drafts")["rounds"][0], report_of("eager")["rounds"][0])


def test_deterministic_inference(report_of):
    report = report_of("deterministic")
    assert report["kinds"]["expanded"] == 0
    assert len(report["alone"]) == len(RUNS["deterministic"].alone) > 0
    for i, alone in report["alone"].items():
        batched = report["rounds"][0][int(i)]
        assert alone["tokens"] == batched["tokens"]
        assert alone["logprobs"] == batched["logprobs"]


def test_the_backend_of_sglang_generates_the_same(report_of):
    theirs = report_of("one_token_triton")
    assert theirs["kinds"] == {}, "the backend of this library ran"
    check_same(report_of("one_token")["rounds"][0], theirs["rounds"][0])
