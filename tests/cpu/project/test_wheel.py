"""The wheel holds the package's data, and works where it is unpacked."""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest
from limits import PROCESS_S

import mla_cute

ROOT = pathlib.Path(__file__).resolve().parents[3]
# A tuned file of no GPU: whether the package has real ones or not, the pattern for them is tested.
TUNED = "mla_cute/tuned/data/No_GPU.json"
CODE = """
import math, pathlib, sys, torch, mla_cute
from mla_cute.tuning import recipes
here = pathlib.Path(sys.argv[1])
assert pathlib.Path(mla_cute.__file__).is_relative_to(here), mla_cute.__file__
assert "small" in recipes.names()
q = torch.ones(1, 2, 576, dtype=torch.bfloat16)
cache = torch.ones(2, 4, 576, dtype=torch.bfloat16)
indptr, indices = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
parts = q[..., :512], q[..., 512:], cache[..., :512], cache[..., 512:]
out, lse = mla_cute.mla_paged_decode(*parts, indptr, indices, 0.5)
assert torch.equal(out, torch.ones_like(out))
assert torch.allclose(lse, torch.full_like(lse, 288 / math.log(2) + 2), rtol=1e-6), lse
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # A folder build/ beside the sources imports as a package, too.
    for package, module in (("build", "build.__main__"), ("setuptools", "setuptools")):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {package}: pip install build 'setuptools>=77'")
    # from a copy: setuptools writes build/ and *.egg-info beside the sources
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "mla_cute", source / "mla_cute", ignore=shutil.ignore_patterns("__pycache__"))
    (source / TUNED).parent.mkdir(exist_ok=True)
    (source / TUNED).write_text("{}", encoding="utf-8")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source],
        capture_output=True, text=True, check=False, timeout=PROCESS_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("mla_cute-*.whl")
    return path


def test_every_file_of_the_package_is_inside(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "mla_cute"
    wanted = {TUNED} | {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.py", "*.toml", "*.json", "py.typed")
        for path in package.rglob(pattern)
    }
    assert "mla_cute/tuning/recipes/small.toml" in wanted
    assert "mla_cute/py.typed" in wanted
    assert wanted <= held
    assert not [name for name in held if name.startswith(("tests", "examples", "tune/"))]


def test_its_version_is_the_packages(wheel):
    assert wheel.name.split("-")[1] == mla_cute.__version__


@pytest.mark.slow
def test_it_runs_where_it_is_unpacked(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # what is installed beside this environment's own packages, without the sources
    paths = [str(tmp_path), *(path for path in sys.path if path.endswith("site-packages"))]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=PROCESS_S, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_entry_points_lead_to_functions(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
    targets = [line.split("=")[1].strip() for line in archive.read(name).decode().splitlines() if "=" in line]
    assert len(targets) == 3
    for target in targets:
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function)), target
