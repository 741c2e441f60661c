"""The command lines of tuning, through argparse and through typer, and the report."""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import shlex
import subprocess
import sys

import pytest
from limits import PROCESS_S
from test_session import faster, run, task
from tune_case import DECODE, GPU, FakeMeasurer
from tuned_case import entry, tuned_file
from typer.testing import CliRunner

import mla_cute
from mla_cute.cli import app as app_module
from mla_cute.cli import tune as cli_tune
from mla_cute.config import KernelConfig
from mla_cute.extras import install_command
from mla_cute.gpu_speed import H200
from mla_cute.tuned import select
from mla_cute.tuned.select import When
from mla_cute.tuning import command, cost, options, recipes, report, session, space, store

ROOT = pathlib.Path(mla_cute.__file__).resolve().parents[1]
SCRIPT = ROOT / "tune" / "autotune.py"


class FakeChild(FakeMeasurer):
    """ChildMeasurer without a process."""

    made = ()  # a list while a test runs

    def __init__(self, make, timeout_s):
        super().__init__(faster)
        self.make, self.timeout_s = make, timeout_s
        self.made.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def facts(self):
        return {"gpu": GPU, "speed": H200, "driver": "580.1"}


@pytest.fixture
def fake_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(FakeChild, "made", [])
    monkeypatch.setattr(command, "ChildMeasurer", FakeChild)
    monkeypatch.setattr(command.gpu_facts, "why_no_gpu", lambda: None)
    monkeypatch.setattr(command, "compile_variants", lambda variants, workers, step: {})
    monkeypatch.setattr(command, "source_digest", lambda: "abc")
    monkeypatch.setenv("MLA_CUTE_CACHE_DIR", str(tmp_path / "cache"))
    return FakeChild.made


def typer_run(*arguments):
    return CliRunner().invoke(app_module.app, ["tune", *map(str, arguments)])


def both(*arguments):
    """The exit status of each command line."""
    return command.main([str(x) for x in arguments]), typer_run(*arguments).exit_code


# -------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    "arguments",
    [
        ["--recipe", "small"],
        ["--recipe", "small", "--recipe", "a b.toml", "--budget", "1.5h", "--dtype", "fp16"],
        ["--from-log", "x.jsonl", "--kv-len", "64,128", "--policy", "eager"],
        ["--op", "decode,prefill", "--heads", "16", "--batch", "1,4", "--kv-format", "none,tensor", "--q-fp8"],
    ],
)
def test_the_command_that_a_file_names_asks_for_the_same(arguments):
    def read(words):
        return command.options_of(vars(command.parser().parse_args(words)))

    asked = read(arguments)
    named = shlex.split(command.command_of(asked))
    assert named[:2] == ["mla-cute", "tune"]
    assert read(named[2:]) == asked
    beside = ["--out", "x.json", "--report", "y", "--workers", "3", "--measurements", "z.json"]
    assert command.command_of(read([*arguments, *beside])) == command.command_of(asked), "not where to"


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), ("1.5h", 5400), (" 8m ", 480), ("0.5m", 30)]
)
def test_budgets(text, seconds):
    assert options.parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "10 minutes", "-3m", "0", "0m", "1e3"])
def test_no_budgets(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"expected a time as 90s, 10m or 1\.5h"):
        options.parse_budget(text)


def test_flags_are_one_table_with_the_recipes_defaults():
    values = vars(command.parser().parse_args(["--heads", "16,128", "--batch", "1,4", "--kv-len", "1024"]))
    whens = command.shapes_of(command.options_of(values))
    assert whens == [When("decode", "", False, h, 64, 1, b, 1024) for h in (16, 128) for b in (1, 4)]


def test_fp8_flags():
    flags = ["--op", "decode", "--heads", "16", "--batch", "1", "--kv-len", "64", "--page-size", "1,64"]
    flags += ["--kv-format", "none,group", "--q-fp8"]
    whens = command.shapes_of(command.options_of(vars(command.parser().parse_args(flags))))
    # e4m3 queries need an FP8 cache
    assert whens == [When("decode", "group", True, 16, page, 1, 1, 64) for page in (1, 64)]


def test_recipes_flags_and_a_log_add_up(tmp_path):
    log = tmp_path / "log"
    unknown = dataclasses.replace(DECODE, batch=7, kv_len=None)
    log.write_text(json.dumps({"when": dataclasses.asdict(unknown), "count": 3}) + "\n")

    def shapes(*arguments):
        return command.shapes_of(command.options_of(vars(command.parser().parse_args(arguments))))

    small = recipes.load("small")
    assert shapes("--recipe", "small", "--recipe", "small") == small
    assert shapes("--from-log", str(log)) == [dataclasses.replace(unknown, kv_len=8192)]
    # alone, lengths are those of the calls that did not know theirs
    assert shapes("--from-log", str(log), "--kv-len", "64,128") == [
        dataclasses.replace(unknown, kv_len=n) for n in (64, 128)
    ]
    one = ["--heads", "8", "--batch", "1", "--kv-len", "64"]
    found = shapes("--recipe", "small", "--from-log", str(log), *one)
    assert found == [*small, dataclasses.replace(unknown, kv_len=64), When("decode", "", False, 8, 64, 1, 1, 64)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to tune: give --recipe (deepseek-v3-dp"),
        (("--recipe", "nope"), "recipe: expected a .toml file or one of"),
        (("--recipe", "none.toml"), "none.toml"),
        (("--heads", "16"), "flags.batch: missing"),
        (("--heads", "129", "--batch", "1", "--kv-len", "1"), "flags.heads: expected at most 128, got 129"),
        (("--recipe", "small", "--workers", "0"), "--workers: expected at least 1, got 0"),
        (("--recipe", "small", "--timeout", "0"), "--timeout: expected more than 0 s, got 0"),
        (("--recipe", "small", "--timeout", "nan"), "--timeout: expected more than 0 s, got nan"),
        (("report", "none.json"), "none.json"),
    ],
)
def test_usage_errors_are_one_line_and_status_2(arguments, message, capsys):
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    done = typer_run(*arguments)
    assert done.exit_code == 2
    assert message in done.output


def test_a_recipe_that_is_no_text_is_named(tmp_path, capsys):
    path = tmp_path / "a.toml"
    path.write_bytes(b"\x89PNG")
    assert both("--recipe", path, "--dry-run") == (2, 2)
    assert capsys.readouterr().err.startswith(f"autotune.py: {path}: not TOML: 'utf-8' codec")


def test_what_cannot_be_written_is_said_before_anything_is_timed(fake_gpu, measured, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(session, "run", lambda *args: pytest.fail("it ran"))
    file = tmp_path / "file"
    file.write_text("mine")
    run_it = ("--recipe", "small", "--out", tmp_path / "X.json")
    for arguments, message in (
        ((*run_it, "--measurements", file / "Y.json"), "Y.json: cannot be written: "),
        ((*run_it, "--report", file), "file: expected a folder, got a file"),
        (("report", measured, "--out", file), "file: expected a folder, got a file"),
    ):
        assert both(*arguments) == (2, 2)
        *before, error = capsys.readouterr().err.splitlines()
        assert message in error
        assert before == ([] if arguments[0] == "report" else ["[0/7] starting the process that measures"])
    assert file.read_text() == "mine"


def test_an_option_that_does_not_parse_is_named():
    for arguments in (("--budget", "soon"), ("--heads", "x"), ("--dtype", "fp64")):
        done = typer_run(*arguments)
        assert done.exit_code == 2
        assert f"{arguments[0]}: expected" in done.output


def test_a_policy_is_one_of_two(fake_gpu, tmp_path, capsys):
    arguments = ("--recipe", "small", "--out", tmp_path / "X.json", "--policy")
    with pytest.raises(SystemExit):
        command.main([str(x) for x in (*arguments, "fast")])
    assert "invalid choice: 'fast'" in capsys.readouterr().err
    done = typer_run(*arguments, "fast")
    assert (done.exit_code, "--policy: expected one of graph, eager, got 'fast'" in done.output) == (2, True)
    assert both(*arguments, "eager") == (0, 0)
    assert {shape.policy for shape in store.load(tmp_path / "X.measurements.json")[1]} == {"eager"}
    assert select.load(tmp_path / "X.json").made_with["command"] == "mla-cute tune --recipe small --policy eager"


def test_without_a_gpu_no_process_is_started(monkeypatch, capsys):
    monkeypatch.setattr(command, "ChildMeasurer", lambda *args: pytest.fail("it was started"))
    monkeypatch.setattr(command.gpu_facts, "why_no_gpu", lambda: "there is no GPU in this test")
    assert both("--recipe", "small") == (2, 2)
    assert capsys.readouterr().err == "autotune.py: nothing to tune on: there is no GPU in this test\n"


@pytest.mark.slow
def test_without_a_gpu_it_says_so(monkeypatch):
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--recipe", "small"],
        env=env,
        capture_output=True,
        text=True,
        timeout=PROCESS_S,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("autotune.py: nothing to tune on: torch")


# ---------------------------------------------------------------------------------------------------------- dry run


def test_a_dry_run_counts_and_starts_nothing(monkeypatch, capsys):
    monkeypatch.setattr(command, "ChildMeasurer", None)
    monkeypatch.setattr(command.gpu_facts, "facts", lambda: None)
    assert both("--recipe", "small", "--dry-run") == (0, 0)
    text = capsys.readouterr().out
    small = recipes.load("small")
    counts = [len(cost.choose(when, space.candidates(when, H200), H200).timed) for when in small]
    assert f"7 shapes, {sum(counts)} candidates; nothing was run" in text
    assert "an H200 of 132 SMs (no GPU is seen here)" in text
    assert ["decode,", "16-bit", "cache", "4"] in [row.split()[:4] for row in text.splitlines()]
    assert both("--op", "sparse", "--heads", "16", "--batch", "1,64", "--kv-len", "2048", "--dry-run") == (0, 0)
    rows = [row.split()[:4] for row in capsys.readouterr().out.splitlines()]
    assert ["sparse,", "16-bit", "cache", "2"] in rows


@pytest.mark.slow
def test_the_script_needs_neither_typer_nor_rich(tmp_path):
    (tmp_path / "typer.py").write_text("raise ImportError('hidden')")
    (tmp_path / "rich.py").write_text("raise ImportError('hidden')")
    (tmp_path / "matplotlib.py").write_text("raise ImportError('hidden')")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--recipe", "small", "--dry-run"],
        env=os.environ | {"PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PROCESS_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "nothing was run" in done.stdout


# ------------------------------------------------------------------------------------------------------------- runs


def test_a_run_with_named_files(fake_gpu, tmp_path, capsys):
    out, raw = tmp_path / "X.json", tmp_path / "Y.json"
    arguments = ("--recipe", "small", "--budget", "8m", "--out", out, "--measurements", raw, "--timeout", "7")
    assert command.main([str(x) for x in arguments]) == 0
    printed = capsys.readouterr()
    whens = recipes.load("small")
    file = select.load(out)
    assert {entry.when for entry in file.entries} == set(whens)
    assert file.made_with["driver"] == "580.1"
    assert (file.made_with["command"], file.made_with["seed"]) == ("mla-cute tune --recipe small --budget 480s", 0)
    versions = command.gpu_facts.versions()
    assert (file.made_with["torch"], file.made_with["toolkit"]) == (versions["torch"], versions["cutlass_dsl_toolkit"])
    assert fake_gpu[0].timeout_s == 7
    assert fake_gpu[0].make.args == (whens, "bfloat16")
    assert "7 shapes tuned, 0 were done before, 0 failed" in printed.out
    assert "tuned against default on Test GPU" in printed.out
    assert "[0/7]" in printed.err
    # the other command line goes on where this one ended
    done = typer_run(*arguments)
    assert done.exit_code == 0, done.output
    assert "0 shapes tuned, 7 were done before, 0 failed" in done.output
    assert done.stderr.startswith("[0/7] starting the process that measures\n")  # no terminal, so no bar


def test_the_default_files_are_the_users(fake_gpu, tmp_path):
    assert typer_run("--recipe", "small").exit_code == 0
    folder = tmp_path / "cache" / "tuned"
    assert select.load(folder / "Test_GPU.json").entries
    assert store.load(folder / "Test_GPU.measurements.json")[1]
    assert ("user", folder / "Test_GPU.json") in select.search_path("Test GPU")


def test_a_failed_shape_is_status_1(fake_gpu, monkeypatch, tmp_path):
    real = FakeChild.open

    def failing(self, when, default):
        self.fails_open[recipes.load("small")[0]] = "the default configuration: wrong"
        real(self, when, default)

    monkeypatch.setattr(FakeChild, "open", failing)
    arguments = ("--recipe", "small", "--out", tmp_path / "X.json")
    assert both(*arguments) == (1, 1)


def test_ctrl_c_is_status_130_and_keeps_what_is_done(fake_gpu, monkeypatch, tmp_path):
    real = FakeChild.samples

    def interrupted(self, configs, rounds):
        if len(self.opened) > 2:
            raise KeyboardInterrupt
        return real(self, configs, rounds)

    monkeypatch.setattr(FakeChild, "samples", interrupted)
    assert command.main(["--recipe", "small", "--out", str(tmp_path / "X.json")]) == 130
    assert len(select.load(tmp_path / "X.json").entries) == 2
    assert typer_run("--recipe", "small", "--out", tmp_path / "X.json").exit_code == 130
    assert len(select.load(tmp_path / "X.json").entries) == 4


def test_a_damaged_measurements_file_is_a_usage_error(fake_gpu, tmp_path):
    (tmp_path / "Y.json").write_text("{")
    arguments = ("--recipe", "small", "--out", tmp_path / "X.json", "--measurements", tmp_path / "Y.json")
    assert both(*arguments) == (2, 2)
    assert not (tmp_path / "X.json").exists()


def test_options_are_the_same_on_both_command_lines():
    flags = {flag for action in command.parser()._actions for flag in action.option_strings} - {"-h", "--help"}
    helped = CliRunner().invoke(app_module.app, ["tune", "--help"], env={"COLUMNS": "200"}).output
    assert all(flag in helped for flag in flags)
    parameters = cli_tune.tune.__annotations__.keys() - {"context", "wide", "return"}
    assert parameters == {action.dest for action in command.parser()._actions} - {"help"}


# ------------------------------------------------------------------------------------------------------------- diff


def test_two_files_are_compared(tmp_path, capsys):
    a, b = tmp_path / "A.json", tmp_path / "B.json"
    select.merge(a, tuned_file(entry(batch=1), entry(batch=2)))
    select.merge(b, tuned_file(entry(batch=1, us=20.0), entry(KernelConfig(min_blocks=8), batch=2, us=20.0)))
    assert both("--diff", a, a) == (0, 0)
    capsys.readouterr()
    assert command.main(["--diff", str(a), str(b)]) == 1
    plain = capsys.readouterr().out
    done = typer_run("--diff", a, b)
    assert done.exit_code == 1
    for text in (plain, done.output):
        assert f"A {a}, B {b}" in text
        assert "min_blocks 2 -> 8" in text
        assert "Time in A over time in B, geometric mean of what is changed: 2.000x." in text


@pytest.mark.parametrize("content", ["{", None, '{"schema": 1}'])
def test_a_file_that_cannot_be_compared_is_named(content, tmp_path, capsys):
    good, bad = tmp_path / "A.json", tmp_path / "B.json"
    select.merge(good, tuned_file(entry()))
    if content is not None:
        bad.write_text(content)
    for pair in ((good, bad), (bad, good)):
        assert both("--diff", *pair) == (2, 2)
        assert capsys.readouterr().err.startswith(f"autotune.py: {bad}: ")
        assert str(bad) in "".join(typer_run("--diff", *pair).output.split("\n"))


# ----------------------------------------------------------------------------------------------------------- report


@pytest.fixture
def measured(tmp_path):
    whens = [*recipes.load("small"), dataclasses.replace(DECODE, batch=3)]
    todo, measurer = task(tmp_path, whens=whens), FakeMeasurer(faster)
    measurer.fails_open[whens[-1]] = "needs 300.0 GB of GPU memory, 100.0 GB are there"
    run(todo, measurer)
    return todo.measurements


def test_the_report_counts_what_was_won(measured):
    made = report.Report(*store.load(measured))
    # What is faster is evict_first=False, which prefill's default has.
    gains = [1.0] * 4 + [100 / 90] * 3
    lines = made.lines()
    assert f"{math.prod(gains) ** (1 / 7):.3f}x the speed of the default (geometric mean), 4 keep" in lines[0]
    assert lines[1].startswith("Worst case 1.000x: decode, ")
    assert lines[2].startswith("Best case 1.111x: ")
    assert lines[3].endswith("1 shapes could not be tuned.")
    rows = {row[0]: row[1:] for row in made.group_rows()}
    assert rows["decode, 16-bit cache"] == ("4", "2", f"{(100 / 90) ** 0.5:.3f}", "1.000", "1.111", "1")
    assert rows["prefill, 16-bit cache"] == ("1", "0", "1.000", "1.000", "1.000", "0")
    assert {row[-1] for row in made.shape_rows()} == {"-", "evict_first=False"}


def test_the_report_is_written_as_markdown_and_png(measured, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    folder = tmp_path / "report"
    assert command.main(["report", str(measured), "--out", str(folder)]) == 0
    assert (folder / "tuning.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "tuning.md").read_text()
    assert "](tuning.png)" in text
    assert "needs 300.0 GB" in text
    tables = [row for row in text.splitlines() if row.startswith("|")]
    assert len(tables) == (2 + 3) + (2 + 7)
    assert f"report: {folder / 'tuning.md'}" in capsys.readouterr().out
    done = typer_run("report", measured, "--out", tmp_path / "again")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "again" / "tuning.md").read_text() == text


def test_without_matplotlib_the_page_has_no_picture_and_says_what_it_needs(measured, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert command.main(["report", str(measured), "--out", str(tmp_path / "report")]) == 0
    assert not (tmp_path / "report" / "tuning.png").exists()
    assert "tuning.png" not in (tmp_path / "report" / "tuning.md").read_text()
    assert f"no picture: it needs matplotlib, {install_command('matplotlib')}" in capsys.readouterr().out


def test_a_report_of_nothing_says_so(tmp_path, capsys):
    todo, measurer = task(tmp_path, whens=[DECODE]), FakeMeasurer()
    measurer.fails_open[DECODE] = "the default configuration: wrong"
    run(todo, measurer)
    assert command.main(["report", str(todo.measurements), "--out", str(tmp_path / "report")]) == 0
    assert "No shape is tuned on Test GPU." in capsys.readouterr().out
    assert not (tmp_path / "report" / "tuning.png").exists()


def test_a_run_writes_its_report(fake_gpu, tmp_path):
    assert typer_run("--recipe", "small", "--out", tmp_path / "X.json", "--report", tmp_path / "r").exit_code == 0
    assert (tmp_path / "r" / "tuning.md").exists()
