"""Solutions for flashinfer-bench: their files, their source against the definitions' references, and the real package's
build and evaluation of them on the CPU.

Its evaluator calls torch.cuda.synchronize on any device: here that does nothing. It times with CUDA events, so only
correctness is evaluated; tests/gpu has the whole benchmark.
"""

import importlib.util
import inspect
import json

import pytest
import torch
from flashinfer_bench_case import (
    NAMES,
    RECORD,
    SM_SCALE,
    WHY_MISSING,
    dataset,
    dataset_definition,
    definition,
    make_trace_set,
    tensors,
)
from typer.testing import CliRunner

import mla_cute
from mla_cute.cli.app import app
from mla_cute.integrations import flashinfer_bench as exporter

needs_package = pytest.mark.skipif(importlib.util.find_spec("flashinfer_bench") is None, reason=WHY_MISSING)


def command(*arguments):
    return CliRunner().invoke(app, ["export-solution", *map(str, arguments)])


def entry(source, name="run"):
    namespace = {}
    exec(compile(source, "main.py", "exec"), namespace)
    return namespace[name]


# ------------------------------------------------------------------------------------------------ files


def test_the_definitions_are_the_recorded_ones():
    assert exporter.DEFINITIONS == NAMES
    assert f"flashinfer-bench {RECORD['version']}" in exporter.__doc__


@pytest.mark.skipif(dataset() is None, reason="FIB_DATASET_PATH names no copy of the flashinfer-trace dataset")
@pytest.mark.parametrize("name", NAMES)
def test_recorded_definitions_are_the_datasets(name):
    """Order of inputs and outputs included: it is that of the arguments."""
    real, recorded = dataset_definition(name), RECORD["definitions"][name]
    for part in ("axes", "inputs", "outputs"):
        bare = {key: {k: v for k, v in value.items() if k != "description"} for key, value in real[part].items()}
        assert list(bare.items()) == list(recorded[part].items())
    assert [real[key] for key in ("name", "op_type", "constraints")] == [
        recorded[key] for key in ("name", "op_type", "constraints")
    ]


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_the_definitions_inputs_and_outputs(name):
    recorded = RECORD["definitions"][name]
    found = exporter.solution(name)
    path, _, function = found["spec"]["entry_point"].partition("::")
    (source,) = found["sources"]
    assert source["path"] == path
    run = entry(source["content"], function)
    assert list(inspect.signature(run).parameters) == [*recorded["inputs"], *recorded["outputs"]]
    assert found["spec"]["destination_passing_style"]
    assert found["spec"]["dependencies"] == [f"mla-cute=={mla_cute.__version__}"]


def test_export_writes_every_definition_where_a_dataset_keeps_it(tmp_path):
    done = command("--out", tmp_path / "new" / "solutions")
    assert done.exit_code == 0, done.output
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert sorted(done.output.split()) == [str(path) for path in files]
    assert len(files) == len(NAMES)
    for path in files:
        text = path.read_text()
        found = json.loads(text)
        place = (found["author"], RECORD["definitions"][found["definition"]]["op_type"], found["definition"])
        assert path == tmp_path.joinpath("new", "solutions", *place, f"{found['name']}.json")
        assert text == json.dumps(found, sort_keys=True, indent=2) + "\n"
    assert len({json.loads(path.read_text())["name"] for path in files}) == len(NAMES)


def test_two_exports_are_the_same_bytes(tmp_path):
    first, second = (exporter.export(tmp_path / part) for part in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_export_of_chosen_definitions(tmp_path):
    done = command(NAMES[1], NAMES[3], NAMES[1], "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert done.output.split() == [str(tmp_path / exporter.path_of(name)) for name in (NAMES[1], NAMES[3])]


def test_files_are_written_over_only_with_force(tmp_path):
    (path,) = exporter.export(tmp_path, [NAMES[2]])
    path.write_text("mine")
    done = command("--out", tmp_path)
    assert done.exit_code == 2
    assert str(path) in done.stderr
    assert "--force" in done.stderr
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]
    assert path.read_text() == "mine"
    assert command("--out", tmp_path, "--force").exit_code == 0
    assert json.loads(path.read_text()) == exporter.solution(NAMES[2])


def test_an_unknown_definition_is_named_and_nothing_is_written(tmp_path):
    unknown = "mla_paged_decode_h128_ckv512_kpe64_ps1"
    done = command(NAMES[0], unknown, "--out", tmp_path)
    assert done.exit_code == 2
    assert repr(unknown) in done.stderr
    assert all(name in done.stderr for name in NAMES)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="definition: expected one of"):
        exporter.path_of(unknown)


def test_help_names_the_definitions():
    words = command("--help").output.replace(",", " ").replace(".", " ").split()
    assert set(NAMES) <= set(words)


def test_out_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    done = command("--out", tmp_path / "file")
    assert done.exit_code == 2
    assert str(tmp_path / "file") in done.stderr


def test_without_out_nothing_happens():
    done = command()
    assert done.exit_code == 2
    assert "--out" in done.stderr


# ------------------------------------------------------------------------------------------------ results


@pytest.mark.parametrize("name", NAMES)
def test_source_gives_what_the_reference_gives(name):
    arguments = dict.fromkeys(RECORD["definitions"][name]["inputs"], SM_SCALE) | tensors(name)
    output, lse = entry(definition(name)["reference"])(**arguments)
    assert output.isfinite().all()
    found, found_lse = torch.full_like(output, torch.nan), torch.full_like(lse, torch.nan)
    run = entry(exporter.solution(name)["sources"][0]["content"])
    assert run(*arguments.values(), found, found_lse) is None
    torch.testing.assert_close(found, output, rtol=2**-7, atol=2**-9)  # one step of bf16
    torch.testing.assert_close(found_lse, lse, rtol=1e-5, atol=1e-5)


@pytest.fixture
def trace_set(tmp_path, monkeypatch):
    monkeypatch.setenv("FIB_CACHE_PATH", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    from flashinfer_bench.compile import BuilderRegistry

    yield make_trace_set(tmp_path / "dataset")
    BuilderRegistry.get_instance().cleanup()


def evaluate(trace_set, name, solution):
    """(correctness, evaluation); evaluation is None where the solution is correct."""
    from flashinfer_bench import BenchmarkConfig
    from flashinfer_bench.bench.evaluators import resolve_evaluator
    from flashinfer_bench.compile import BuilderRegistry

    spec, (trace,) = trace_set.definitions[name], trace_set.workloads[name]
    evaluator = resolve_evaluator(spec)
    config = BenchmarkConfig(num_trials=2, profile_baseline=False)
    baseline = evaluator.build_baseline(spec, trace.workload, config, "cpu", trace_set.root)
    runnable = BuilderRegistry.get_instance().build(spec, solution)
    return evaluator.check_correctness(spec, runnable, baseline.inputs, baseline.outputs, config, "", "cpu")


@needs_package
@pytest.mark.parametrize("name", NAMES)
def test_package_builds_and_accepts_the_solution(trace_set, name):
    """At flashinfer-bench's own tolerance, with every element inside it."""
    (solution,) = trace_set.solutions[name]
    correctness, evaluation = evaluate(trace_set, name, solution)
    assert evaluation is None, evaluation
    assert correctness.max_absolute_error < 2e-2  # one step of bf16 at values up to 4


def changed(name, original, replacement):
    from flashinfer_bench import Solution

    found = exporter.solution(name)
    (source,) = found["sources"]
    assert source["content"].count(original) == 1
    source["content"] = source["content"].replace(original, replacement)
    return Solution.model_validate(found)


@needs_package
@pytest.mark.parametrize(
    ("name", "original", "replacement"),
    [
        (NAMES[1], "sm_scale,\n", "sm_scale * 1.1,\n"),
        (NAMES[1], "lse=lse", "lse=lse, lse_base='e'"),
        (NAMES[1], "kv_last_page_len=kv_last_page_len,", ""),
        (NAMES[5], "sm_scale, out=", "sm_scale * 1.1, out="),
        (NAMES[5], "kpe_cache, sparse_indices, sm_scale, out=", "kpe_cache, sparse_indices[:, 1000:], sm_scale, out="),
    ],
    ids=["sm_scale", "lse", "length", "sparse_sm_scale", "sparse_columns"],
)
def test_package_refuses_wrong_results(trace_set, name, original, replacement):
    _, evaluation = evaluate(trace_set, name, changed(name, original, replacement))
    assert evaluation.status.value == "INCORRECT_NUMERICAL"


@needs_package
def test_package_refuses_wrong_arguments(trace_set):
    from flashinfer_bench.compile import BuildError

    with pytest.raises(BuildError, match="expected 10 parameters"):
        evaluate(trace_set, NAMES[1], changed(NAMES[1], "run(q_nope", "run(extra, q_nope"))
