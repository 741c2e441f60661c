"""Machine code of kernel variants as checksums, of whatever checkout of the package is imported.

`dev.same` runs this file by its path with another checkout in front, so it goes by what older ones have too.

    python fingerprint.py PATTERN...   prints {variant: {"text": [checksums of kernels' code], "facts": {...}}} as JSON

Compared are the `.text` sections in their order, with the resources beside them, and not whole cubins: symbols embed
module paths, class and field names, so a move or a rename changes a cubin and not the code.
"""

import fnmatch
import hashlib
import importlib
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def variants() -> dict:
    """Every shipped variant in the default configuration by its name: kernel, then the fields of its key."""
    from mla_cute.config import KernelConfig
    from mla_cute.kernels import registry

    default = KernelConfig()
    found = [
        *registry.variants(config=default, kv_formats=("", *registry.KV_FORMATS)),
        *(registry.sparse_variants() if hasattr(registry, "sparse_variants") else []),
        *(registry.conversion_variants(config=default) if hasattr(registry, "conversion_variants") else []),
        *registry.append_variants(),
        *registry.merge_states_variants(),
    ]
    return {name_of(*variant[:2]): variant for variant in found}


# What kernels were called before 0.1.0.
_OLD_NAMES = {
    "decode_rows_sm90": "decode_tile64",
    "decode_few_sm90": "decode_tile16",
    "decode_fp8_sm90": "decode_tile64_fp8",
    "decode_few_fp8_sm90": "decode_tile16_fp8",
    "prefill_rows_sm90": "prefill_tile64",
    "prefill_fp8_sm90": "prefill_tile64_fp8",
}


def name_of(kernel: Any, key: Any) -> str:
    facts = dict(vars(key))
    last = [fact for fact in ("sparse", "converted") if facts.pop(fact, False)]
    dims = facts.pop("dims", None)
    if dims not in (None, (512, 64)):  # the only ones there were
        last.append("{}+{}".format(*dims))
    return "-".join(
        [_OLD_NAMES.get(kernel.name, kernel.name), *(str(value) or "16bit" for value in facts.values()), *last]
    )


def matching(patterns: Sequence[str]) -> list[str]:
    """Names of the variants that match a shell pattern, or begin with it."""
    return [
        name
        for name in variants()
        if not patterns or any(fnmatch.fnmatchcase(name, p) or name.startswith(p) for p in patterns)
    ]


def _module(name: str) -> Any:
    """A module of mla_cute.compile; before 0.1.0 it lay in mla_cute."""
    try:
        return importlib.import_module(f"mla_cute.compile.{name}")
    except ModuleNotFoundError:
        return importlib.import_module(f"mla_cute.{name}")


def fingerprint(name: str) -> dict:
    elf, jit = (_module(name) for name in ("elf", "jit"))

    variant = variants()[name]
    texts = []
    for cubin in jit.cubins(*variant):
        for section in elf.sections(cubin):
            if section.name.startswith(".text."):
                code = cubin[section.offset : section.offset + section.size]
                texts.append(hashlib.sha256(code).hexdigest()[:16])
    facts = jit.compile_info(*variant)
    kept = ("registers", "spill_bytes", "static_smem_bytes", "dynamic_smem_bytes", "threads")
    return {"text": texts, "facts": {fact: facts[fact] for fact in kept}}


def main(patterns: Sequence[str]) -> None:
    names = matching(patterns)
    with ProcessPoolExecutor(min(16, len(os.sched_getaffinity(0)))) as pool:
        json.dump(dict(zip(names, pool.map(fingerprint, names), strict=True)), sys.stdout)


if __name__ == "__main__":
    sys.path[:] = [p for p in sys.path if p != os.path.dirname(os.path.abspath(__file__))]
    main(sys.argv[1:])
