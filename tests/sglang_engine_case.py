"""What the tests of SGLang's engines share: whether there are any, and a run in a process of its own."""

import contextlib
import importlib.util
import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys

import sglang_engine
from sglang_engine import LIMIT_S

RELEASE = "0.5.23"
SPARE_S = 30  # for a process to start and to end


def why_not():
    """Why there is nothing to test, or None. SGLang itself is not imported, which would take seconds."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or spec.origin is None:
        return f'SGLang is not installed: pip install "sglang=={RELEASE}", then mla_cute'
    file = pathlib.Path(spec.origin).with_name("_version.py")
    version = runpy.run_path(str(file))["__version__"] if file.is_file() else "of no known release"
    return None if version.split("+")[0] == RELEASE else f"the backend is written for SGLang {RELEASE}, not {version}"


def run_engine(name, folder):
    """The report of a run, or what went wrong."""
    report, log = folder / f"{name}.json", folder / f"{name}.log"
    command = [sys.executable, sglang_engine.__file__, name, str(report)]
    with log.open("w") as file:
        # a session of its own, so that nothing of an engine outlives the run
        run = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            ended = run.wait(LIMIT_S + SPARE_S)
        except subprocess.TimeoutExpired:
            ended = "none in time"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    if ended != 0:
        lines = [line[:300] for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return "\n".join([f"{name}: exit status {ended}, {log} ends with", *lines[-40:]])
    return json.loads(report.read_text())
