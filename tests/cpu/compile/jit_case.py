"""A process that has compiled nothing, with a cache directory and a temporary one of its own; processes like it."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest
import torch
from limits import PROCESS_S

from mla_cute.compile import jit, turn

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[2]


def forget_everything(tmp_path, monkeypatch):
    """An empty cache directory, which is returned, and the jit module as in a process that has compiled nothing. Tests
    that run beside this one compile without waiting for it."""
    directory = tmp_path / "kernels"
    monkeypatch.setenv("MLA_CUTE_CACHE_DIR", str(directory))
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # of processes
    monkeypatch.setattr(turn, "lock_path", lambda: tmp_path / "compiling.lock")
    monkeypatch.setattr(jit, "_memory", {})
    monkeypatch.setattr(jit, "_by_digest", {})
    monkeypatch.setattr(jit, "_counters", {"compiled": 0, "loaded": 0})
    monkeypatch.setattr(jit, "_warned", False)
    return directory


def forget():
    """What a new process does not know."""
    jit._memory.clear()
    jit._by_digest.clear()


def assert_works(function):
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="expected device_type=cuda"):
        function(x, x, 1.0)
    with pytest.raises(TypeError, match="Expects 3 parameters"):
        function(x)


def start_process(script, *path, **env):
    code = "import json, sys, time\nfrom mla_cute.compile import jit\nfrom toy_keys import *\n" + textwrap.dedent(
        script
    )
    python_path = os.pathsep.join(map(str, (*path, ROOT, HERE)))
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": python_path, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result_of(process):
    out, err = process.communicate(timeout=PROCESS_S)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])
