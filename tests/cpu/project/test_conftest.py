"""The watchdog of GPU tests, on a test that hangs without a GPU."""

import os
import pathlib
import subprocess
import sys

import pytest
from limits import PROCESS_S

CONFTEST = pathlib.Path(__file__).parents[2] / "conftest.py"


@pytest.fixture
def project(tmp_path):
    """A project with one passing and one hanging GPU test; run() gives pytest's exit status and output."""
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU\n")
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "test_hang.py").write_text(
        "import time, pytest\n"
        "def test_passes(): pass\n"
        "@pytest.mark.timeout(1)\n"
        "def test_hangs():\n"
        "    print('captured')\n"
        "    time.sleep(6000)\n"
    )

    def run(*arguments):
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        command = [sys.executable, "-m", "pytest", "-v", *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=PROCESS_S, check=False
        )
        return done.returncode, done.stdout, done.stderr

    run.conftest = tmp_path / "conftest.py"
    return run


@pytest.mark.slow
@pytest.mark.parametrize("plugins", [(), ("-p", "no:timeout")], ids=["with pytest-timeout", "without"])
def test_hanging_gpu_test_ends_the_run_with_its_stack(project, plugins):
    with project.conftest.open("a") as file:
        file.write("\n_why_no_gpu = lambda: None\n")
    status, out, err = project(*plugins)
    assert status == 1, out + err
    assert "test_passes PASSED" in out
    assert "Timeout (0:00:01)!" in err
    assert "in test_hangs" in err


@pytest.mark.slow
def test_gpu_tests_are_skipped_with_the_reason(project):
    with project.conftest.open("a") as file:
        file.write("\n_why_no_gpu = lambda: 'no CUDA device'\n")
    status, out, err = project("-rs")
    assert status == 0, out + err
    assert "2 skipped" in out
    assert "needs a Hopper GPU: no CUDA device" in out
