"""The package's page and links, which pyproject.toml cannot compute: both follow from one address and the version.

README's links are relative, so that they work in a checkout and on the site; on a package page they would lead nowhere.
"""

from __future__ import annotations

import pathlib
import re

from setuptools import setup

# The repository's public address, https://github.com/OWNER/NAME without a slash at its end; "" while there is none.
# .github/workflows/release.yml wants it.
REPOSITORY = ""

ROOT = pathlib.Path(__file__).resolve().parent
# [text](target) or ![text](target), the target without a scheme; a text may be code, and holds no brackets.
_RELATIVE = re.compile(r"(!?)\[([^\[\]]*)\]\((?![a-z][a-z0-9+.-]*:)([^()\s]+)\)")


def version() -> str:
    [found] = re.findall(r'^__version__ = "(.+)"$', (ROOT / "mla_cute/__init__.py").read_text("utf-8"), re.MULTILINE)
    return found


def urls(address: str, release: str) -> dict[str, str]:
    """What a package page links to in its margin; nothing without an address."""
    if not address:
        return {}
    return {
        "Homepage": address,
        "Documentation": f"{address}/tree/v{release}/docs",
        "Changelog": f"{address}/blob/v{release}/CHANGELOG.md",
        "Issues": f"{address}/issues",
    }


def description(readme: str, address: str, release: str) -> str:
    """README for a package page: relative links and pictures lead to the release's tag. Without an address only their
    text is left.

    A link into README itself becomes one to README's place in the repository, since package pages give headings no
    anchors. Blocks of code stay as they are.
    """

    def absolute(link: re.Match[str]) -> str:
        picture, text, target = link.groups()
        if not address:
            return text
        if target.startswith("#"):
            target = f"README.md{target}"
        return f"{picture}[{text}]({address}/{'raw' if picture else 'blob'}/v{release}/{target})"

    parts = re.split(r"(^```.*?^```$)", readme, flags=re.DOTALL | re.MULTILINE)  # the odd ones are code
    return "".join(part if i % 2 else _RELATIVE.sub(absolute, part) for i, part in enumerate(parts))


if __name__ == "__main__":
    setup(
        long_description=description((ROOT / "README.md").read_text(encoding="utf-8"), REPOSITORY, version()),
        long_description_content_type="text/markdown",
        project_urls=urls(REPOSITORY, version()),
    )
