"""`mla-cute cache`: the list by kernel and versions, and deleting, which asks."""

import filelock
import pytest
from disk_case import entry
from typer.testing import CliRunner

from mla_cute.cli import app as app_module
from mla_cute.compile import disk

MADE_WITH = {"mla_cute": "0.1.0", "nvidia-cutlass-dsl": "4.8.1", "apache-tvm-ffi": "0.1.15"}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLA_CUTE_CACHE_DIR", str(tmp_path))
    for digit, day in (("1", "2026-11-02"), ("2", "2026-11-03")):
        entry(tmp_path, "planner", digit, size=1 << 20, made_with=MADE_WITH, created=day)
    entry(tmp_path, "planner", "3", made_with=MADE_WITH | {"nvidia-cutlass-dsl": "4.7.0"}, created="2026-11-01")
    (tmp_path / f"{entry(tmp_path, 'merge', '4')}.json").unlink()
    (tmp_path / "NVIDIA_H200.json").write_text("mine")
    return tmp_path


def run(*arguments, **options):
    return CliRunner().invoke(app_module.app, ["cache", *arguments], **options)


def test_list_is_by_kernel_and_versions(cache):
    done = run("list")
    assert done.exit_code == 0
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in done.output.splitlines() if line[0] == "│"
    ]
    assert rows == [
        ["merge", "-", "-", "-", "1", "0.0", "-"],
        ["planner", "0.1.0", "4.7.0", "0.1.15", "1", "0.0", "2026-11-01"],
        ["planner", "0.1.0", "4.8.1", "0.1.15", "2", "2.0", "2026-11-03"],
    ]
    assert f"4 compiled kernels, 2.0 MiB, in {cache}" in done.output


def test_list_keeps_kernel_dsl_and_number_in_a_narrow_terminal(cache, monkeypatch):
    env = {"FORCE_COLOR": "1", "NO_COLOR": "1", "COLUMNS": "50"}
    text = run("list", env=env).output
    assert all(name in text for name in ("kernel", "cutlass_dsl", "variants", "MiB"))
    assert "left out in 50 columns: tvm_ffi, newest" in text
    assert "tvm_ffi" in run("list", "--wide", env=env).output.partition("│")[0]


def test_clear_asks(cache):
    before = sorted(cache.iterdir())
    refused = run("clear", input="n\n")
    assert refused.exit_code == 0
    assert f"Delete 4 compiled kernels, 2.0 MiB, in {cache}?" in refused.output
    nobody = run("clear", input="")
    assert nobody.exit_code == 2
    assert "nothing was deleted; --yes deletes without asking" in nobody.output
    assert sorted(cache.iterdir()) == before
    done = run("clear", input="y\n")
    assert done.exit_code == 0
    assert f"deleted 4 compiled kernels, 2.0 MiB, in {cache}" in done.output
    assert [path.name for path in cache.iterdir()] == ["NVIDIA_H200.json"]


def test_clear_yes_leaves_what_is_locked(cache):
    busy = disk.kept(cache)[0].stem
    with filelock.FileLock(str(cache / f"{busy}.lock")):
        done = run("clear", "--yes")
    assert done.exit_code == 0
    assert "deleted 3 compiled kernels" in done.output
    assert f"left, as another process holds their locks: {busy}" in done.output
    assert [one.stem for one in disk.kept(cache)] == [busy]


@pytest.mark.parametrize("command", ["list", "clear"])
def test_an_empty_cache_and_one_that_is_a_file(command, tmp_path, monkeypatch):
    monkeypatch.setenv("MLA_CUTE_CACHE_DIR", str(tmp_path / "none"))
    done = run(command)
    assert (done.exit_code, done.output) == (0, f"no compiled kernels in {tmp_path / 'none'}\n")
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLA_CUTE_CACHE_DIR", str(tmp_path / "file"))
    done = run(command)
    assert done.exit_code == 2
    assert "Not a directory" in done.output


def test_clear_says_what_it_may_not_delete(cache, monkeypatch):
    def refused(directory):
        raise PermissionError(13, "Permission denied", str(directory))

    monkeypatch.setattr(disk, "remove", refused)
    done = run("clear", "--yes")
    assert done.exit_code == 2
    assert "mla-cute: cache clear: [Errno 13] Permission denied" in done.output
