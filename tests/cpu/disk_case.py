"""Files of compiled kernels that never were: of the tests of the cache directory and of its command."""

import json


def stem(kernel, digit):
    return f"{kernel}-{digit * 24}"


def entry(directory, kernel, digit, size=100, **sidecar):
    """Files as `jit` writes them; returns the stem."""
    name = stem(kernel, digit)
    (directory / f"{name}.o").write_bytes(bytes(size))
    (directory / f"{name}.json").write_text(json.dumps({"kernel": kernel, **sidecar}))
    (directory / f"{name}.lock").touch()
    return name
