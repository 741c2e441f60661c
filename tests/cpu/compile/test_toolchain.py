"""What a kernel's place in the cache depends on: the files its module imports, read without importing anything."""

import ast
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest
from limits import PROCESS_S

from mla_cute.compile import jit, toolchain
from mla_cute.kernels import registry
from toy_keys import TOY

ROOT = pathlib.Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "mla_cute"
MODULES = sorted({ref.module for ref in vars(registry).values() if isinstance(ref, registry.KernelRef)})
STEPS = {f"mla_cute.kernels.{wing}.setup" for wing in ("tile64", "tile64_fp8", "tile16")}


def closure(module):
    return set(toolchain.closure(module, {}))


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the package, of which digests are made."""
    folder = tmp_path / "mla_cute"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__", "data"))
    monkeypatch.setattr(toolchain, "_folder", str(folder))
    return folder


def digests():
    return {module: toolchain.read_sources(module) for module in MODULES}


def changed_by(path, old="", new="# changed\n"):
    before, text = digests(), path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1) if old else text + new)
    after = digests()
    path.write_text(text)
    assert digests() == before
    return {module for module in MODULES if after[module] != before[module]}


def test_a_copy_has_the_same_digests(copy):
    of_copy = digests()
    assert len(set(of_copy.values())) == len(MODULES) >= 7
    assert of_copy == {module: jit._sources_at_first_use(module) for module in MODULES}


def test_dims_are_part_of_what_depends_on_them(copy):
    dependent = {module for module in MODULES if "mla_cute.dims" in closure(module)}
    assert dependent >= STEPS
    assert changed_by(copy / "dims.py", "TILE16_M = 16", "TILE16_M = 32") == dependent


def test_the_planner_is_not_part_of_the_steps(copy):
    assert changed_by(copy / "kernels/planner/decode.py") == {"mla_cute.kernels.planner.decode"}
    assert changed_by(copy / "kernels" / "append.py") == {"mla_cute.kernels.append"}
    others = {"mla_cute.kernels.merge_states", "mla_cute.kernels.convert"}
    assert changed_by(copy / "kernels" / "lib/softmax.py") == STEPS | others
    assert changed_by(copy / "kernels" / "tile16/tiles_16bit.py") == {"mla_cute.kernels.tile16.setup"}


def test_host_code_is_part_of_no_kernel(copy):
    for name in (
        "__init__",
        "api",
        "plan",
        "compile/jit",
        "config",
        "kernels/registry",
        "kernels/planner/model",
        "kernels/planner/model_prefill",
        "tuned/select",
        "check",
        "compile/warmup",
        "compile/toolchain",
    ):
        assert changed_by(copy / f"{name}.py") == set(), name
    assert changed_by(copy / "kernels" / "__init__.py") == set(MODULES)


@pytest.mark.parametrize("name", ["model", "model_prefill"])
def test_the_planners_models_are_plain_python(name):
    modules = closure(f"mla_cute.kernels.planner.{name}")
    assert "mla_cute.kernels.keys" in modules
    for module in modules:
        for node in ast.walk(ast.parse(pathlib.Path(importlib.util.find_spec(module).origin).read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names, module


# Importing the package runs its __init__ and so all host code; an empty package in its place shows what a kernel needs.
REAL = """
import importlib, json, sys, types

def forget():
    for name in [n for n in sys.modules if n == "mla_cute" or n.startswith("mla_cute.")]:
        del sys.modules[name]
    package = sys.modules["mla_cute"] = types.ModuleType("mla_cute")
    package.__path__ = [sys.argv[1]]

found = {}
for module in sys.argv[2:]:
    forget()
    importlib.import_module(module)
    found[module] = sorted(n for n in sys.modules if n.startswith("mla_cute."))
print(json.dumps(found))
"""


def test_nothing_that_kernels_import_is_missing():
    command = [sys.executable, "-c", REAL, str(PACKAGE), *MODULES]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "cpu")}
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PROCESS_S, check=False)
    assert run.returncode == 0, run.stderr
    real = json.loads(run.stdout)
    for module in MODULES:
        assert module in real[module]
        assert set(real[module]) == closure(module), module


def imports_by_ast(path, package):
    """(module, names) of the imports that may be the package's, `if TYPE_CHECKING:` left out."""
    found = set()

    def visit(node):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            found.update((alias.name, ()) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            name = ".".join(filter(None, (*parts, node.module)))
            found.add((name, tuple(alias.name for alias in node.names)))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return {(name, names) for name, names in found if name.split(".")[0] == "mla_cute"}


def test_no_import_of_a_syntax_tree_is_missed():
    """Of the text too many may be found: a docstring's example looks like a statement."""
    number = 0
    for path in PACKAGE.rglob("*.py"):
        package = ".".join(path.relative_to(ROOT).parts[:-1])
        by_tree = imports_by_ast(path, package)
        number += len(by_tree)
        assert by_tree <= set(toolchain._imports(path.read_bytes(), package)), path
    assert number > 400


TEXTS = {
    "from .a import b": {("mla_cute.kernels.a", ("b",))},
    "from . import a, b as c": {("mla_cute.kernels", ("a", "b"))},
    "from ..a import (  # one (of) two\n    b,  # not c\n    # nor d\n    e as f,\n)\n": {("mla_cute.a", ("b", "e"))},
    "from .. import \\\n    a, \\\n    b\n": {("mla_cute", ("a", "b"))},
    "def f():\n    from ..a import *\n": {("mla_cute.a", ("*",))},
    "import mla_cute": {("mla_cute", ())},
    "import os, mla_cute.a.b as c  # why\n": {("mla_cute.a.b", ())},
    "import mla_cute.a": {("mla_cute.a", ()), ("mla_cute", ())},
    "from mla_cute.a import b": {("mla_cute.a", ("b",))},
    "from mla_cuter.a import b\nimport mla_cuter\nfrom a.mla_cute import b\nimport os\n": set(),
    "if TYPE_CHECKING:\n    from .a import b\n\n    from .c import d\nfrom .e import f\n": {
        ("mla_cute.kernels.e", ("f",))
    },
    "if typing.TYPE_CHECKING:\n    import mla_cute.a\nelse:\n    from .b import c\n": {("mla_cute.kernels.b", ("c",))},
    "if not TYPE_CHECKING:\n    from .a import b\n": {("mla_cute.kernels.a", ("b",))},
    "x = 'import mla_cute'\nimportant = 1\n": set(),
}


@pytest.mark.parametrize("text", TEXTS)
def test_imports_of_a_text(text):
    assert set(toolchain._imports(text.encode(), "mla_cute.kernels")) == TEXTS[text]


def test_names_of_packages(tmp_path, monkeypatch):
    """A name is a module, which counts, or is defined in the __init__, which counts then with what it imports."""
    monkeypatch.setattr(toolchain, "_folder", str(tmp_path))
    for name, text in {
        "__init__": "from .host import x",
        "host": "",
        "dims": "",
        "sub/__init__": "from .deep import y",
        "sub/deep": "from ..dims import z",
        "sub/leaf": "def f():\n    from .. import kernels_only",
        "kernels_only": "",
        "takes_module": "from . import dims",
        "takes_name": "from . import __version__",
        "takes_leaf": "from .sub import leaf",
        "takes_y": "from mla_cute.sub import y",
        "missing": "from .nothing import x\nfrom . import host",
    }.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    def names(module):
        return {name.removeprefix("mla_cute.") for name in closure(f"mla_cute.{module}")}

    assert names("takes_module") == {"takes_module", "dims"}
    assert names("takes_name") == {"takes_name", "mla_cute", "host"}
    sub = {"sub", "sub.deep", "dims"}
    assert names("takes_leaf") == {"takes_leaf", "sub.leaf", "kernels_only"} | sub
    assert names("takes_y") == {"takes_y"} | sub
    assert names("missing") == {"missing", "host"}


def test_a_kernel_from_elsewhere_counts_with_what_it_imports_of_the_package(tmp_path, monkeypatch, copy):
    source = tmp_path / "elsewhere_kernel.py"
    source.write_text("import os\nfrom .beside import x\nfrom mla_cute.kernels.lib.ptx import asm\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    module = "elsewhere_kernel"
    assert closure(module) == {module, "mla_cute.kernels", "mla_cute.kernels.lib", "mla_cute.kernels.lib.ptx"}
    assert module not in sys.modules
    before = toolchain.read_sources(module)
    for path, counts in (
        (source, True),
        (copy / "kernels" / "lib/ptx.py", True),
        (copy / "kernels" / "lib/softmax.py", False),
        (copy / "compile/jit.py", False),
    ):
        text = path.read_text()
        path.write_text(text + "# changed\n")
        assert (toolchain.read_sources(module) != before) is counts, path
        path.write_text(text)
    assert closure(TOY.module) == {TOY.module}


def test_files_are_read_once(copy):
    known = {}
    first = {module: toolchain.read_sources(module, known) for module in MODULES}
    assert first == digests()
    (copy / "kernels" / "keys.py").write_text("")
    assert {module: toolchain.read_sources(module, known) for module in MODULES} == first
    assert digests() != first


def test_digests_are_cheap():
    """2 ms for the largest on a quiet machine; a first kernel from disk takes 24 ms."""

    def seconds():
        start = time.perf_counter()
        toolchain.read_sources("mla_cute.kernels.tile64.setup")
        return time.perf_counter() - start

    assert min(seconds() for _ in range(20)) < 0.01


def test_compile_options_are_part_of_every_entry(monkeypatch):
    plain = toolchain.environment.__wrapped__()
    monkeypatch.setattr(toolchain, "COMPILE_OPTIONS", f"{toolchain.COMPILE_OPTIONS} --opt-level 2")
    assert toolchain.environment.__wrapped__() != plain


@pytest.mark.parametrize("package", ["nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-base", "apache-tvm-ffi"])
def test_another_version_of_the_compiler_finds_none_of_the_entries(monkeypatch, package):
    """Two releases of the DSL are allowed, and a folder of kernels outlives what was installed when it was filled."""
    plain, installed = toolchain.environment.__wrapped__(), toolchain.version
    assert importlib.metadata.version(package) in plain
    monkeypatch.setattr(toolchain, "version", lambda name: "0.0.1" if name == package else installed(name))
    assert toolchain.environment.__wrapped__() != plain


def test_the_toolkit_of_the_compiler_is_part_of_every_entry(monkeypatch, tmp_path):
    """The DSL's libraries for CUDA 12 and 13 bring a compiler each, and may both be installed."""
    plain = toolchain.environment.__wrapped__()
    library = tmp_path / "cu99" / "lib" / "libcute_dsl_runtime.so"
    monkeypatch.setattr(toolchain, "runtime_library", lambda: str(library))
    assert toolchain.environment.__wrapped__() != plain


def test_references_are_found_where_they_were():
    assert jit.KernelRef is registry.KernelRef
