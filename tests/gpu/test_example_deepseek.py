"""examples/deepseek_decode.py with the kernels: every cache format within its limits."""

import pathlib
import re
import subprocess
import sys

import pytest

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "deepseek_decode.py"


@pytest.mark.timeout(400)  # a fresh cache compiles some ten kernels
@pytest.mark.parametrize("heads", [16, 128])
def test_within_limits(heads):
    done = subprocess.run(
        [sys.executable, EXAMPLE, "--device", "cuda", "--heads", str(heads), "--layers", "2"],
        capture_output=True, text=True, check=False, timeout=380, cwd=EXAMPLE.parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"^2 layers of {heads} heads on cuda", done.stdout), done.stdout
    assert done.stdout.splitlines()[-1] == "ok"
