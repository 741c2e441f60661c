"""Runs of tests/vllm_engine.py side by side, each a process, and their reports."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pathlib
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import vllm_engine
from vllm_engine import LIMIT_S, Run

RELEASE = "0.33.0"
SPARE_S = 30  # for a process to start and to end


def why_not() -> str | None:
    """Why there is nothing to test, or None. vLLM itself is not imported, which would take the GPU and seconds."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return f'vLLM is not installed: pip install "vllm=={RELEASE}", then mla_cute'
    file = pathlib.Path(spec.origin).with_name("_version.py")
    version = runpy.run_path(str(file))["__version__"] if file.is_file() else "of no known release"
    return None if version.split("+")[0] == RELEASE else f"the backend is written for vLLM {RELEASE}, not {version}"


def workers_of(runs: Mapping[str, Run]) -> int:
    """How many run at a time: one per core."""
    return max(1, min(len(runs), (os.cpu_count() or 1) // max(run.ranks for run in runs.values())))


def limit_of(runs: Mapping[str, Run]) -> int:
    """Seconds that all of them may take."""
    return (LIMIT_S + SPARE_S) * -(-len(runs) // workers_of(runs)) + SPARE_S


def run_engine(name: str, folder: pathlib.Path) -> dict[str, Any] | str:
    """The report of a run, or why there is none."""
    report, log = folder / f"{name}.json", folder / f"{name}.log"
    command = [sys.executable, vllm_engine.__file__, name, str(report)]
    with log.open("w") as file:
        try:
            ended: object = subprocess.call(command, stdout=file, stderr=subprocess.STDOUT, timeout=LIMIT_S + SPARE_S)
        except subprocess.TimeoutExpired:
            ended = "none in time"
    if ended != 0:
        tail = "\n".join(line[:300] for line in log.read_text(errors="replace").splitlines()[-40:])
        return f"{name}: exit status {ended}, {log} ends with\n{tail}"
    return json.loads(report.read_text())


def asked_for(request: pytest.FixtureRequest, runs: Mapping[str, Run]) -> list[str]:
    """The runs that tests of the requesting module name among their parameters, if these tests were chosen to run."""
    items = [item for item in request.session.items if item.path == request.path]
    named = {str(value) for item in items if hasattr(item, "callspec") for value in item.callspec.params.values()}
    return [name for name in runs if name in named]


@contextlib.contextmanager
def reports_of(
    runs: Mapping[str, Run], folder: pathlib.Path, first: Iterable[str]
) -> Iterator[Callable[[str], dict[str, Any]]]:
    """A function that waits for the report of a run, and fails where there is none. Runs of `first` start now, others
    when they are asked for."""
    pool = ThreadPoolExecutor(workers_of(runs))
    started: dict[str, Any] = {}

    def start(name: str) -> Any:
        if name not in started:
            started[name] = pool.submit(run_engine, name, folder)
        return started[name]

    for name in first:
        start(name)

    def report(name: str) -> dict[str, Any]:
        result = start(name).result()
        if isinstance(result, str):
            pytest.fail(result, pytrace=False)
        return result

    yield report
    pool.shutdown(cancel_futures=True)
