"""`mla-cute` without typer and rich: info, check and --version in plain text, and what to install for the rest."""

import dataclasses
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
from importlib import metadata

import pytest
from limits import PROCESS_S

import mla_cute
from mla_cute import extras
from mla_cute import gpu as gpu_facts
from mla_cute.cli import check as checking
from mla_cute.cli import plain
from mla_cute.cli.stages import Stages

ROOT = pathlib.Path(mla_cute.__file__).resolve().parents[1]
NEEDS = extras.install_command("typer", "rich")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(gpu_facts, "why_not_hopper", lambda: "there is no GPU in this test")


def test_the_command_to_install_is_of_packages_pip_knows(monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda name: ["torch>=2.4", 'rich<15,>=13; extra == "cli"', "x[y]"])
    assert extras.install_command("typer", "rich") == "pip install typer 'rich<15,>=13'"
    assert shlex.split(extras.install_command("rich"))[2] == "rich<15,>=13"

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert extras.install_command("typer", "rich") == "pip install typer rich"


def test_no_message_names_this_package_to_pip():
    """pip does not find it anywhere yet."""
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "mla_cute").rglob("*.py")}
    assert not [path for path, text in texts.items() if re.search(r"pip install[^\n]*mla[-_]cute\[", text)]


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_info_works_in_a_process_that_lacks_them(missing, tmp_path):
    (tmp_path / f"{missing}.py").write_text(f"raise ModuleNotFoundError('gone', name={missing!r})\n")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "CUDA_VISIBLE_DEVICES": ""}
    for arguments, status in ((["info"], 0), (["demo"], 2)):
        done = subprocess.run(
            [sys.executable, "-m", "mla_cute", *arguments],
            env=env, capture_output=True, text=True, check=False, timeout=PROCESS_S,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        if status:
            wanted = f"mla-cute: without typer and rich there are info and check; for `demo`: {NEEDS}\n"
            assert (done.stdout, done.stderr) == ("", wanted)
        else:
            assert re.search(r"^kernels run here +no: torch", done.stdout, re.MULTILINE)


def test_info(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MLA_CUTE_CACHE_DIR", str(tmp_path / "kernels"))
    assert plain.main(["info"]) == 0
    lines = dict(re.split(r" {2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines() if line)
    assert lines["kernels run here"] == "no: there is no GPU in this test"
    assert lines["mla_cute"] == mla_cute.__version__
    assert lines["kernel cache"] == lines["MLA_CUTE_CACHE_DIR"] == str(tmp_path / "kernels")
    assert plain.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cache"]["directory"] == str(tmp_path / "kernels")


@pytest.mark.parametrize("wrong", [False, True])
def test_check_judges_as_the_other_command_does(wrong, capsys, monkeypatch):
    spec = dataclasses.replace(checking.sweep()[0], lengths=(3, 70))
    monkeypatch.setattr(checking, "specs", lambda quick, seed, on_gpu: [spec])
    real = checking.run_spec

    def judged(spec, device):
        for what, verdict in real(spec, device):
            yield what, dataclasses.replace(verdict, failures=("off",)) if wrong else verdict

    monkeypatch.setattr(checking, "run_spec", judged)
    assert plain.main(["check", "--quick", "--seed", "3"]) == wrong
    out, err = capsys.readouterr()
    assert out.startswith("Checking the CPU path (there is no GPU in this test)")
    assert "1 cases, seed 3, on cpu" in out
    assert err == f"checking, 0 of 1 done: {spec}\n"
    lines = out.splitlines()
    if wrong:
        assert lines[-1].startswith("FAILED h1-page1")
        assert "6 FAILED" in out
    else:
        assert lines[-1] == "all correct"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "quick"], f"for `bench`: {NEEDS}"),
        (["check", "--fp8"], f"for `check --fp8`: {NEEDS}"),
        (["info", "more"], f"for `info more`: {NEEDS}"),
    ],
)
def test_what_it_lacks_is_named_with_what_to_install(arguments, message, capsys):
    assert plain.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "--seed", "x"], "argument --seed: expected an integer, got 'x'"),
        (["check", "--seed", str(10**20)], "argument --seed: expected at most 1099511627776 either way"),
        (["check", "--timeout", "nan"], "argument --timeout: expected seconds"),
    ],
)
def test_usage_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        plain.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_version_and_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        plain.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"mla-cute {mla_cute.__version__}\n"
    assert plain.main(["--"]) == plain.main([]) == 2
    assert "python -m mla_cute.bench" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("total", "wanted"), [(3, [0, 1, 2]), (20, [*range(0, 20, 2)]), (0, [])])
def test_stages_are_a_line_each_tenth(total, wanted, capsys):
    stages = Stages("timing")
    for done in range(total + 1):
        stages.step(done, total, f"case {done}")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [f"timing, {done} of {total} done: case {done}" for done in wanted]
