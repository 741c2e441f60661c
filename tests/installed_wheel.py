"""python installed_wheel.py FOLDER: checks the package that this Python imports, which must lie in FOLDER.

`make check-wheel` runs it with the Python of an environment that has the wheel alone, tests/cpu/project/test_wheel.py
beside an unpacked one. It needs no pytest and no GPU.
"""

import importlib.metadata
import math
import pathlib
import re
import subprocess
import sys

import torch

import mla_cute
from mla_cute.tuned import file
from mla_cute.tuning import recipes


def check_place(folder: pathlib.Path) -> None:
    assert pathlib.Path(mla_cute.__file__).resolve().is_relative_to(folder.resolve()), mla_cute.__file__
    assert importlib.metadata.version("mla-cute") == mla_cute.__version__


def check_data() -> None:
    package = pathlib.Path(mla_cute.__file__).parent
    assert (package / "py.typed").is_file()
    assert file.load(package / "tuned/data/NVIDIA_H200.json").entries
    assert {"small", "deepseek-v3-tp8"} <= set(recipes.names())
    assert all(recipes.load(name) for name in recipes.names())


def check_page() -> None:
    """The long description: README, without a link to a file beside it."""
    page = importlib.metadata.metadata("mla-cute").get_payload()
    assert "## Install" in page
    assert not re.findall(r"\]\((?!https?://)[^)]*\)", page)


def check_calls() -> None:
    """Equal keys of ones: the output is ones, and the log-sum-exp the score and the logarithm of how many there are."""
    q = torch.ones(1, 2, 576, dtype=torch.bfloat16)
    cache = torch.ones(2, 4, 576, dtype=torch.bfloat16)
    parts = q[..., :512], q[..., 512:], cache[..., :512], cache[..., 512:]
    indptr, indices = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    for out, lse in (
        mla_cute.mla_paged_decode(*parts, indptr, indices, 0.5),
        mla_cute.mla_paged_prefill(*parts, indptr, indptr, indices, 0.5),
    ):
        assert torch.equal(out, torch.ones_like(out))
        assert torch.allclose(lse, torch.full_like(lse, 288 / math.log(2) + 2), rtol=1e-6), lse


def check_commands() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mla_cute", "info"], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert mla_cute.__version__ in done.stdout, done.stdout


def main(folder: str) -> None:
    check_place(pathlib.Path(folder))
    check_data()
    check_page()
    check_calls()
    check_commands()
    print(f"mla-cute {mla_cute.__version__} in {folder}: works")


if __name__ == "__main__":
    main(*sys.argv[1:])
