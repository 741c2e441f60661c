"""The wheel holds the package's data, works where it is unpacked, and its page has links that lead somewhere."""

import email
import importlib.util
import os
import pathlib
import re
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
# The project's own may change or be empty.
ADDRESS = "https://example.org/them/mla_cute"
PAGE_SOURCE = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def setup():
    """setup.py as a module, which as such runs nothing."""
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("package_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    code = (ROOT / "setup.py").read_text(encoding="utf-8")
    code, found = re.subn(r'^REPOSITORY = ".*"$', f'REPOSITORY = "{ADDRESS}"', code, flags=re.MULTILINE)
    assert found == 1
    (source / "setup.py").write_text(code, encoding="utf-8")
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
        [sys.executable, ROOT / "tests/installed_wheel.py", str(tmp_path)],
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


def test_its_page_links_to_the_release(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_string(archive.read(name).decode())
    tag = f"v{mla_cute.__version__}"
    assert dict(line.split(", ") for line in metadata.get_all("Project-URL")) == {
        "Homepage": ADDRESS,
        "Documentation": f"{ADDRESS}/tree/{tag}/docs",
        "Changelog": f"{ADDRESS}/blob/{tag}/CHANGELOG.md",
        "Issues": f"{ADDRESS}/issues",
    }
    assert metadata["Description-Content-Type"] == "text/markdown"
    page = metadata.get_payload()
    targets = re.findall(r"\]\(([^)]*)\)", page)
    assert len(targets) == len(re.findall(r"\]\(", PAGE_SOURCE)) > 20
    for target in targets:
        kind, at, file = target.removeprefix(f"{ADDRESS}/").split("/", 2)
        assert (kind, at) == ("raw" if file.endswith(".png") else "blob", tag), target
        assert (ROOT / file.partition("#")[0]).is_file(), target


def test_a_page_without_an_address_has_no_dead_links(setup):
    assert not re.findall(r"\]\((?!https?://)", setup.description(PAGE_SOURCE, "", "1.2.3"))
    assert setup.description("[`a`](b) [c](https://d.e) ![f](g.png)", "", "1.2.3") == "`a` [c](https://d.e) f"
    assert setup.urls("", "1.2.3") == {}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[a `b`](docs/c.md#d)", "[a `b`](A/blob/v1/docs/c.md#d)"),
        ("[a](#b)", "[a](A/blob/v1/README.md#b)"),
        ("![a](b/c.png)", "![a](A/raw/v1/b/c.png)"),
        ("(\n[a](b),\n[c](d))", "(\n[a](A/blob/v1/b),\n[c](A/blob/v1/d))"),
        ("[a](https://b.c/d) [e](mailto:f)", "[a](https://b.c/d) [e](mailto:f)"),
        ("x[1](2)\n```\nx[1](2)\n```\n", "x[1](A/blob/v1/2)\n```\nx[1](2)\n```\n"),
    ],
)
def test_relative_links_become_absolute(setup, text, wanted):
    assert setup.description(text, "A", "1") == wanted


def test_version_has_one_place(setup):
    assert setup.version() == mla_cute.__version__


def test_pythons_of_the_page_are_those_that_are_tested():
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', settings)
    (tested,) = re.findall(r"^        python: \[(.*)\]$", (ROOT / ".github/workflows/ci.yml").read_text(), re.MULTILINE)
    assert named == re.findall(r"3\.\d+", tested)
    assert re.findall(r'^requires-python = ">=(.*)"$', settings, re.MULTILINE) == named[:1]
