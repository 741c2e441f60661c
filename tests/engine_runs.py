"""Runs of serving engines, each a process of tests/vllm_engine.py or tests/sglang_engine.py: whether the engine is
there, how many run side by side, their reports."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

SPARE_S = 30  # for a process to start and to end


def why_not(name: str, release: str) -> str | None:
    """Why there is nothing to test with engine `name` ("vLLM"), or None. The engine itself is not imported, which would
    take the GPU and seconds."""
    package = name.lower()
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return f'{name} is not installed: pip install "{package}=={release}", then mla_cute'
    file = Path(spec.origin).with_name("_version.py")
    version = runpy.run_path(str(file))["__version__"] if file.is_file() else "of no known release"
    return None if version.split("+")[0] == release else f"the backend is written for {name} {release}, not {version}"


def run_engine(script: str, name: str, folder: Path, limit_s: float) -> dict[str, Any] | str:
    """The report that `script NAME REPORT` writes, or what went wrong."""
    report, log = folder / f"{name}.json", folder / f"{name}.log"
    with log.open("w") as file:
        # a session of its own, so that nothing of an engine outlives the run
        run = subprocess.Popen(
            [sys.executable, script, name, str(report)], stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        ended: object = "none in time"
        with contextlib.suppress(subprocess.TimeoutExpired):
            ended = run.wait(limit_s + SPARE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    if ended != 0:
        lines = [line[:300] for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return "\n".join([f"{name}: exit status {ended}, {log} ends with", *lines[-40:]])
    return json.loads(report.read_text())


def workers_of(runs: Collection[str], cores_each: int = 1) -> int:
    """How many run at a time."""
    return max(1, min(len(runs), (os.cpu_count() or 1) // cores_each))


def limit_of(runs: Collection[str], limit_s: float, cores_each: int = 1) -> float:
    """Seconds that all of them may take, each `limit_s`."""
    return (limit_s + SPARE_S) * -(-len(runs) // workers_of(runs, cores_each)) + SPARE_S


def marks_of(why: str | None, runs: Collection[str], limit_s: float, cores_each: int = 1) -> list[pytest.MarkDecorator]:
    """Of a module that tests `runs`: `why`, if any, skips its tests; each may take as long as all runs together."""
    return [
        pytest.mark.skipif(why is not None, reason=str(why)),
        pytest.mark.timeout(limit_of(runs, limit_s, cores_each)),
    ]


def asked_for(request: pytest.FixtureRequest, runs: Iterable[str]) -> list[str]:
    """The runs that tests of the requesting module name among their parameters, if these tests were chosen to run."""
    items = [item for item in request.session.items if item.path == request.path]
    named = {str(value) for item in items if hasattr(item, "callspec") for value in item.callspec.params.values()}
    return [name for name in runs if name in named]


@contextlib.contextmanager
def reports_of(
    script: str, folder: Path, limit_s: float, workers: int, first: Iterable[str] = ()
) -> Iterator[Callable[[str], dict[str, Any]]]:
    """A function that waits for the report of a run, and fails where there is none. Runs of `first` start now, others
    when they are asked for."""
    pool = ThreadPoolExecutor(workers)
    started: dict[str, Any] = {}

    def start(name: str) -> Any:
        if name not in started:
            started[name] = pool.submit(run_engine, script, name, folder, limit_s)
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


def fixture_of(script: str, runs: Collection[str], limit_s: float, cores_each: int = 1) -> Any:
    """A module's fixture: the report of a run of `script` by its name. Where tests are left out (-k), a run starts when
    it is asked for."""

    @pytest.fixture(scope="module")
    def report_of(
        tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
    ) -> Iterator[Callable[[str], dict[str, Any]]]:
        first = () if pytestconfig.option.keyword else runs
        folder = tmp_path_factory.mktemp(Path(script).stem)
        with reports_of(script, folder, limit_s, workers_of(runs, cores_each), first) as report:
            yield report

    return report_of
