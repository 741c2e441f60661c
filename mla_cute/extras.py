"""How to install what a command or a picture needs beyond the library: a line that works wherever pip does.

It names the packages and not the extra that has them, since the library itself may have come from a checkout or a wheel
and not from where pip looks for `mla-cute`.
"""

import re
import shlex
from importlib import metadata


def install_command(*packages: str) -> str:
    """ "pip install 'typer>=0.12.4' 'rich>=13'": `packages` with the versions that the library's metadata asks for."""
    try:
        requirements = metadata.requires("mla-cute") or []
    except metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
        requirements = []
    wanted: dict[str, str] = {}
    for line in requirements:
        requirement = line.partition(";")[0].strip()
        wanted.setdefault(re.split(r"[^\w.-]", requirement)[0], requirement)
    return shlex.join(["pip", "install", *(wanted.get(name, name) for name in packages)])
