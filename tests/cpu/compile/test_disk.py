"""The directory of compiled kernels as files: its entries, emptying it beside other processes, whether it can be
written."""

import os
import pathlib
import tempfile

import filelock
import pytest
from disk_case import entry, stem

from mla_cute.compile import disk


@pytest.fixture
def others(tmp_path):
    """What is no entry: a tuned file, a folder of tuned files, names that are nearly an entry's."""
    names = ("NVIDIA_H200.json", "README.txt", f"{stem('planner', 'a')}.txt", f"planner-{'a' * 23}.o", "planner.lock")
    for name in names:
        (tmp_path / name).write_text("mine")
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / f"{stem('planner', 'b')}.json").write_text("mine")
    (tmp_path / f"{stem('folder', 'c')}.o").mkdir()
    return {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}


def test_entries_are_told_by_their_sidecars(tmp_path, others):
    entry(tmp_path, "planner", "1", size=1000, made_with={"nvidia-cutlass-dsl": "4.8.1"})
    entry(tmp_path, "merge", "2")
    (tmp_path / f"{stem('merge', '2')}.json").write_text("{")
    (tmp_path / f"{stem('append', '3')}.lock").touch()  # nothing was ever written
    (tmp_path / f".{stem('append', '4')}.{'e' * 32}.tmp").write_bytes(bytes(7))
    append, merge, planner = disk.kept(tmp_path)
    assert (append.kernel, append.sidecar, append.size_bytes) == ("append", None, 7)
    assert (merge.kernel, merge.sidecar, merge.size_bytes) == ("merge", None, 101)
    assert planner.kernel == "planner"
    assert planner.sidecar["made_with"] == {"nvidia-cutlass-dsl": "4.8.1"}
    assert planner.size_bytes > 1000
    assert disk.kept(tmp_path / "none") == []
    with pytest.raises(NotADirectoryError):
        disk.kept(tmp_path / "README.txt")


def test_removing_takes_entries_and_nothing_else(tmp_path, others):
    for digit in "12":
        entry(tmp_path, "planner", digit)
    (tmp_path / f".{stem('planner', '1')}.{'e' * 32}.tmp").write_bytes(bytes(7))
    (tmp_path / f"{stem('planner', '3')}.lock").touch()
    removed = disk.remove(tmp_path)
    assert (removed.entries, removed.files, removed.busy) == (2, 3 + 3 + 1 + 1, [])
    assert removed.size_bytes > 207
    assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == others
    assert disk.remove(tmp_path).files == 0
    assert disk.remove(tmp_path / "none").files == 0


def test_what_is_locked_stays_whole(tmp_path):
    busy = entry(tmp_path, "planner", "1")
    entry(tmp_path, "planner", "2")
    with filelock.FileLock(str(tmp_path / f"{busy}.lock")):
        removed = disk.remove(tmp_path)
        assert (removed.entries, removed.busy) == (1, [busy])
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"{busy}.{kind}" for kind in ("json", "lock", "o")]
    assert disk.remove(tmp_path).entries == 1
    assert list(tmp_path.iterdir()) == []


def test_the_sidecar_goes_before_the_object_and_the_lock_last(tmp_path, monkeypatch):
    name = entry(tmp_path, "planner", "1")
    gone = []
    unlink = pathlib.Path.unlink
    monkeypatch.setattr(
        pathlib.Path, "unlink", lambda self, **options: (gone.append(self.name), unlink(self, **options))
    )
    disk.remove(tmp_path)
    assert [text.removeprefix(f"{name}.") for text in gone][:3] == ["json", "o", "lock"]


def test_whether_a_directory_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    before = list(tmp_path.rglob("*"))
    assert disk.why_not_writable(tmp_path) is None
    assert disk.why_not_writable(tmp_path / "not" / "yet") is None
    assert disk.why_not_writable(tmp_path / "file") == f"{tmp_path / 'file'} is not a directory"
    assert disk.why_not_writable(tmp_path / "file" / "in") == f"{tmp_path / 'file'} is not a directory"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert (
        disk.why_not_writable(tmp_path / "not" / "yet")
        == f"{tmp_path} is not writable, so not/yet cannot be made in it"
    )
    assert list(tmp_path.rglob("*")) == before

    def full(**options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    assert disk.why_not_writable(tmp_path) == "No space left on device"
