"""`mla-cute dev`: names of variants, code of one, and which differ from another revision."""

import json
import os
import pathlib
import shutil
import subprocess

import pytest
from typer.testing import CliRunner

from mla_cute import dev
from mla_cute.cli.app import app
from mla_cute.compile import fingerprint, sass
from mla_cute.config import KernelConfig
from mla_cute.kernels import registry

ROOT = pathlib.Path(__file__).resolve().parents[2]
# The quickest to compile: under a second.
NAME = "merge_states-float32"


def run(*arguments):
    return CliRunner().invoke(app, ["dev", *arguments])


def test_every_variant_has_a_name_of_its_own():
    """In one configuration: hints and launches change no name."""
    found = fingerprint.variants()
    assert len(found) == (
        len(registry.variants(kv_formats=("", *registry.KV_FORMATS), config=KernelConfig()))
        + len([kernel for kernel, *_ in registry.sparse_variants() if kernel is not registry.PLANNER])
        + len(registry.conversion_variants())
        + len(registry.append_variants())
        + len(registry.merge_states_variants())
    )
    assert found[NAME][0] is registry.MERGE_STATES
    assert "decode_tile64-bfloat16-64" in found
    assert "decode_tile64-bfloat16-0-sparse" in found
    assert "append-bfloat16-16bit-int32" in found


def test_names_by_their_beginning_and_by_pattern():
    assert dev.names(["merge_states"]) == [f"merge_states-{d}" for d in ("bfloat16", "float16", "float32")]
    assert dev.names(["*-float32", "merge_states-float16"]) == ["merge_states-float16", NAME]
    with pytest.raises(ValueError, match=r"^variant: expected the name of a kernel variant or a pattern, got nothing"):
        dev.names(["nothing"])
    listed = run("list", "planner")
    assert listed.stdout.split() == [n for n in fingerprint.variants() if n.startswith("planner")]
    refused = run("list", "nothing")
    assert refused.exit_code == 2
    assert "got nothing" in refused.output


@pytest.mark.skipif(sass.find_nvdisasm() is None, reason="nvdisasm is not installed")
def test_code(tmp_path):
    shown = run("code", NAME, "--sass", str(tmp_path / "out"))
    assert shown.exit_code == 0, shown.output
    assert NAME in shown.output
    assert "STG.E.128" in (tmp_path / "out" / f"{NAME}.sass").read_text()
    before = sass._disassemble.cache_info().misses
    found = dev.code(NAME)
    assert sass._disassemble.cache_info().misses == before, "what has been shown was disassembled again"
    assert found.facts["spill_bytes"] == 0
    assert found.opcodes.total() == found.facts["instructions"]["total"] > 100


def test_what_differs_is_said():
    facts = {"registers": 40, "spill_bytes": 0}
    same = {"text": ["a", "b"], "facts": facts}
    before = {"kept": same, "gone": same, "coded": same, "spilled": same}
    after = {
        "kept": dict(same),
        "new": same,
        "coded": {"text": ["a", "c"], "facts": facts},
        "spilled": {"text": ["a", "b"], "facts": {"registers": 40, "spill_bytes": 8}},
    }
    assert list(map(str, dev.differences(before, after))) == [
        "coded: other code",
        "gone: only in the other revision",
        "new: only in this tree",
        "spilled: spill_bytes 0 -> 8",
    ]


@pytest.fixture
def checkout(tmp_path):
    """A repository of its own that holds the package as it is here."""
    tree = tmp_path / "tree"
    tree.mkdir()
    shutil.copytree(ROOT / "mla_cute", tree / "mla_cute", ignore=shutil.ignore_patterns("__pycache__"))

    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=n@example.org"]
        subprocess.run(["git", "-C", str(tree), *identity, *arguments], check=True, capture_output=True)

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "as it is")
    return tree


@pytest.mark.slow
def test_same(checkout, monkeypatch):
    """A rename changes no code, another constant does."""
    monkeypatch.setattr(dev, "__file__", str(checkout / "mla_cute" / "dev.py"))
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    kernel = checkout / "mla_cute" / "kernels" / "merge_states.py"
    source = kernel.read_text()
    kernel.write_text(source.replace("total", "sum_of_weights"))
    assert dev.same("HEAD", [NAME]) == (1, [])
    kernel.write_text(source.replace("inverse = 1.0 / total", "inverse = 2.0 / total"))
    compared, found = dev.same("HEAD", [NAME])
    assert compared == 1
    assert [str(difference) for difference in found] == [f"{NAME}: other code"]
    worktrees = subprocess.run(
        ["git", "-C", str(checkout), "worktree", "list"], capture_output=True, text=True, check=True
    )
    assert len(worktrees.stdout.splitlines()) == 1, "the other revision's tree is gone"
    with pytest.raises(RuntimeError, match="no-such-revision"):
        dev.same("no-such-revision", [NAME])


def test_fingerprints_are_json(capsys):
    fingerprint.main([NAME])
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [NAME]
    assert found[NAME]["facts"]["threads"] == 128
    assert all(len(text) == 16 for text in found[NAME]["text"])
