"""MkDocs hook: pages and records that lie outside of docs/, which the site has beside those of docs/.

README.md becomes the first page. Links in pages are written as they work in the repository; those that lead out of
docs/ are rewritten, and what they lead to is added to the site.
"""

import pathlib
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).resolve().parents[2]
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
# The target of [text](target) and of [name]: target.
_TARGET = re.compile(r"(?<=\]\()[^)\s]+|(?<=\]: )\S+")


def _rewritten(target: str, page: str) -> str:
    """A link of a page, from where the site has it: docs/ is its root, and what is beside docs/ lies there too."""
    if page in OUTSIDE:
        return target.removeprefix("docs/")
    return target if "/" in page else target.removeprefix("../")


def _targets(path: pathlib.Path) -> list[pathlib.Path]:
    """The files outside of docs/ that a page links to, from the repository's root."""
    found = [path.parent / target.split("#")[0] for target in _TARGET.findall(path.read_text(encoding="utf-8"))]
    files = [file.resolve().relative_to(ROOT) for file in found if file.is_file()]
    return [file for file in files if file.parts[0] != "docs"]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of OUTSIDE, and the records that pages link to."""
    pages = [ROOT / name for name in OUTSIDE] + sorted((ROOT / "docs").glob("*.md"))
    records = {target.as_posix() for page in pages for target in _targets(page)} - set(OUTSIDE)
    for name in (*OUTSIDE, *sorted(records)):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return _TARGET.sub(lambda match: _rewritten(match.group(), page.file.src_uri), markdown)
