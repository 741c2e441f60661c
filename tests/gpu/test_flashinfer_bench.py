"""The exported solutions in flashinfer-bench on the GPU: built, judged at its own tolerance, and timed."""

import importlib.util

import pytest
import torch
from flashinfer_bench_case import NAMES, WHY_MISSING, make_trace_set

pytestmark = pytest.mark.skipif(importlib.util.find_spec("flashinfer_bench") is None, reason=WHY_MISSING)

REQUESTS = ((37, 1500), (1, 64), (128, 128), (2, 4097), (1, 1), (65, 700))
FEW_RUNS = {"num_trials": 2, "warmup_runs": 2, "iterations": 5}


@pytest.fixture
def trace_set(tmp_path, monkeypatch):
    monkeypatch.setenv("FIB_CACHE_PATH", str(tmp_path / "cache"))
    from flashinfer_bench.compile import BuilderRegistry

    yield make_trace_set(tmp_path / "dataset", REQUESTS)
    BuilderRegistry.get_instance().cleanup()


@pytest.mark.timeout(240)  # compiles up to four kernels
@pytest.mark.parametrize("name", NAMES)
def test_evaluator_passes_the_solution(trace_set, name):
    from flashinfer_bench import BenchmarkConfig
    from flashinfer_bench.bench.evaluators import resolve_evaluator
    from flashinfer_bench.compile import BuilderRegistry

    device = f"cuda:{torch.cuda.current_device()}"
    config = BenchmarkConfig(**FEW_RUNS)
    spec, (trace,), (solution,) = (
        part[name] for part in (trace_set.definitions, trace_set.workloads, trace_set.solutions)
    )
    evaluator = resolve_evaluator(spec)
    baseline = evaluator.build_baseline(spec, trace.workload, config, device, trace_set.root)
    runnable = BuilderRegistry.get_instance().build(spec, solution)
    evaluation = evaluator.evaluate(
        spec, runnable, baseline.inputs, baseline.outputs, baseline.mean_latency_ms, config, "", device
    )
    assert evaluation.status.value == "PASSED", evaluation
    assert 0 < evaluation.performance.latency_ms < baseline.mean_latency_ms


@pytest.mark.timeout(480)  # compiles what the test above has not, in a process of the benchmark's own
def test_benchmark_passes_every_solution(trace_set, tmp_path):
    """`flashinfer-bench run` does this: a worker process per GPU, which loads the library anew."""
    from flashinfer_bench import Benchmark, BenchmarkConfig

    benchmark = Benchmark(trace_set, BenchmarkConfig(log_dir=str(tmp_path / "logs"), **FEW_RUNS))
    try:
        traces = benchmark.run_all(dump_traces=False).traces
    finally:
        benchmark.close()
    results = {name: trace.evaluation for name in NAMES for trace in traces.get(name, [])}
    wrong = {name: (found.status.value, found.log) for name, found in results.items() if found.status.value != "PASSED"}
    assert not wrong
    assert tuple(results) == NAMES
