"""Engines of SGLang over the backend on CPU tensors: every call against float32 attention, in a process of its own.

The kernels' stand-in is plain torch, so this is about what SGLang hands over: pools, tables, lengths, modes.
"""

import pytest
from engine_case import check_same
from sglang_engine import CPU_RUNS, LIMIT_S
from sglang_engine_case import SPARE_S, run_engine, why_not

OUTPUT_LIMIT = 5e-3  # of one token's head in the Frobenius norm; the output is rounded to bf16, which is 2e-3

WHY_NOT = why_not()
pytestmark = [
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    pytest.mark.slow,
    pytest.mark.timeout((LIMIT_S + SPARE_S) * len(CPU_RUNS)),
]


@pytest.fixture(scope="module")
def report_of(tmp_path_factory):
    """A function that returns the report of a run, and fails where there is none."""
    folder, reports = tmp_path_factory.mktemp("sglang_engine"), {}

    def report(name):
        if name not in reports:
            reports[name] = run_engine(name, folder)
        if isinstance(reports[name], str):
            pytest.fail(reports[name], pytrace=False)
        return reports[name]

    return report


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
