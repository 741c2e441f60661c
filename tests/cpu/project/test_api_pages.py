"""The pages of the API reference name every public call and nothing that has gone, and the site has every page."""

import ast
import pathlib
import re

import mla_cute

ROOT = pathlib.Path(__file__).resolve().parents[3]
DOCS = ROOT / "docs"
NAMED = [
    name
    for page in sorted((DOCS / "api").glob("*.md"))
    for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
]
# Names on the page of ops, which shows no members: calls make them.
OPS = re.compile(r"`(?:mla_cute\.ops\.)?(\w+)`")


def module_of(parts):
    """The file of a module or package of these names, or None."""
    path = ROOT.joinpath(*parts)
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def defined(file):
    """Names that a module's own code binds at its top: by definitions, imports and assignments."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign):
            found.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return found


def exists(name):
    parts = name.split(".")
    if module_of(parts):
        return True
    module = module_of(parts[:-1])
    return module is not None and parts[-1] in defined(module)


def test_every_public_name_is_in_the_reference():
    assert set(mla_cute.__all__) <= {name.rpartition(".")[2] for name in NAMED}


def test_every_module_of_the_integrations_is_in_the_reference():
    files = (ROOT / "mla_cute" / "integrations").glob("[!_]*.py")
    assert {f"mla_cute.integrations.{file.stem}" for file in files} <= set(NAMED)


def test_what_the_reference_names_exists():
    assert len(NAMED) == len(set(NAMED)) > 20
    assert not [name for name in NAMED if not exists(name)]


def test_a_function_is_not_taken_for_its_module():
    """Beside `mla_cute/plan_decode.py`, `mla_cute.plan_decode` is the module to who reads the sources."""
    modules = {"mla_cute.quant", "mla_cute.ops"}
    assert {name for name in NAMED if name.count(".") == 1 and module_of(name.split("."))} == modules


def test_ops_of_the_page_are_the_modules():
    page = (DOCS / "api" / "ops.md").read_text(encoding="utf-8")
    named = set(OPS.findall(page.partition("The functions are")[2]))
    assert len(named) == 6
    assert all(callable(getattr(mla_cute.ops, name)) for name in named)


def test_the_site_has_every_page():
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    beside = {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"}
    for path in DOCS.glob("*.md"):
        beside |= set(re.findall(r"\]\(\.\./([^)#]+\.md)", path.read_text(encoding="utf-8")))
    assert pages | beside == set(re.findall(r": (\S+\.md)$", config, re.M))
