"""Engines of vLLM with a model of sparse attention over the backend on the GPU: every call, in CUDA graphs too, against
float32 attention over the tokens that the indexer chose.

Each run of tests/vllm_sparse_engine.py is a process; all start with the first test, unless -k chooses some.
"""

import pytest
import vllm_sparse_engine
from engine_case import TOKENS
from engine_runs import fixture_of, marks_of, why_not
from vllm_engine import LIMIT_S, RELEASE
from vllm_sparse_engine import RUNS

from mla_cute.integrations._vllm_plugin import BACKEND

OUTPUT_LIMIT = 2e-2  # of one token's head in the Frobenius norm, 2e-3 of which is the output's rounding to bf16

pytestmark = marks_of(why_not("vLLM", RELEASE), RUNS, LIMIT_S)
report_of = fixture_of(vllm_sparse_engine.__file__, RUNS, LIMIT_S)


@pytest.mark.parametrize("name", RUNS)
def test_every_call_is_attention_to_the_chosen_tokens(report_of, name):
    report, run = report_of(name), RUNS[name]
    assert report["backend"] == BACKEND
    print({key: report[key] for key in ("kinds", "chosen", "from_all_keys", "errors", "steps", "replays")})
    assert report["wrong_lists"] == 0
    assert report["chosen"] > 0
    error, what = report["errors"]["output"]
    assert 0 <= error < OUTPUT_LIMIT, f"{error:.2e} in {what}"
    kinds = {kind for kind, calls in report["kinds"].items() if calls}
    assert kinds >= ({"several", "prefix"} if run.drafts or name != "short" else {"decode"})
    assert ("replayed" in kinds) is run.graphs
    if not run.graphs:
        assert report["python_steps"] >= (TOKENS - 1) / (1 + run.drafts)


@pytest.mark.parametrize("name", [name for name in RUNS if name != "short"])
def test_the_choice_matters(report_of, name):
    assert report_of(name)["from_all_keys"] > 5 * OUTPUT_LIMIT


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run.graphs])
def test_decode_steps_are_replayed(report_of, name):
    report = report_of(name)
    assert "FULL" in report["cudagraph_mode"]
    assert report["calls_before"] > 0, "the backend was not captured"
    print({key: report[key] for key in ("steps", "replays", "python_steps")})
    assert report["replays"] >= report["steps"] / 2
    assert report["python_steps"] <= report["steps"] / 2


def test_nothing_compiles_after_vllms_warm_up(report_of):
    report = report_of("warmed")
    before, after = report["kernels_before"], report["kernels"]
    print(before, report["compiled_by"])
    assert sum(before.values()) > 0
    assert after == before
    assert not [backend for backend in report["compiled_by"] if "cute" in backend.lower()]
