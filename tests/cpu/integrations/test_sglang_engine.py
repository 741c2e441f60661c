"""Engines of SGLang over the backend on CPU tensors: every call against float32 attention, in a process of its own.

The kernels' stand-in is plain torch, so this is about what SGLang hands over: pools, tables, lengths, modes.
"""

import pytest
import sglang_engine
from engine_case import check_same
from engine_runs import SPARE_S, reports_of, why_not
from sglang_engine import CPU_RUNS, LIMIT_S, RELEASE

OUTPUT_LIMIT = 5e-3  # of one token's head in the Frobenius norm; the output is rounded to bf16, which is 2e-3

WHY_NOT = why_not("SGLang", RELEASE)
pytestmark = [
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    pytest.mark.slow,
    pytest.mark.timeout((LIMIT_S + SPARE_S) * len(CPU_RUNS)),
]


@pytest.fixture(scope="module")
def report_of(tmp_path_factory):
    """The report of a run by its name; one runs at a time."""
    with reports_of(sglang_engine.__file__, tmp_path_factory.mktemp("sglang_engine"), LIMIT_S, 1) as report:
        yield report


@pytest.mark.parametrize("name", CPU_RUNS)
def test_every_call_is_attention(report_of, name):
    report, run = report_of(name), CPU_RUNS[name]
    assert report["kinds"]["expanded"] == 0
    assert report["kinds"]["extend"] >= run.layers
    assert report["kinds"]["decode"] >= run.layers * (run.tokens - 1)
    assert report["page_size"] == run.engine.get("page_size", 64)
    error, what = report["errors"]
    assert 0 <= error < OUTPUT_LIMIT, f"{error:.2e} in {what}"


def test_chunks_and_prefixes_change_nothing(report_of):
    chunks, whole = report_of("cpu_chunks"), report_of("cpu")
    assert chunks["kinds"]["prefix"] > 0
    first, second = chunks["rounds"]
    assert [request["cached"] for request in second] == [n - 1 for n in CPU_RUNS["cpu_chunks"].prompts]
    check_same(second, first, CPU_RUNS["cpu"].tokens)
    # the last prompt of the two runs is another one
    check_same(first[:-1], whole["rounds"][0][:-1], CPU_RUNS["cpu"].tokens)
