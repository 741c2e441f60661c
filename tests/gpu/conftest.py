"""GPU tests: every test ends with its kernels finished, so that a fault is reported by the test that caused it."""

import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def _default_configurations(monkeypatch):
    """What a tuned file chooses may differ between entry points, of which one knows the lengths: other bits."""
    from mla_cute.tuned import select

    monkeypatch.setenv("MLA_CUTE_TUNED", "0")
    select.clear()


# What torch may keep between tests: processes of pytest-xdist share the GPU, and fifteen filled the 80 GB of an H100.
KEPT_BYTES = 1 << 30


@pytest.fixture(autouse=True)
def _finish_kernels(request):
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        # The context is lost: whatever ran after this would fail for the same reason.
        pytest.exit(f"{request.node.nodeid} left the GPU with an error: {error}", returncode=1)
    if torch.cuda.memory_reserved() > KEPT_BYTES:
        torch.cuda.empty_cache()


@pytest.fixture
def partial_bytes(monkeypatch):
    """partial_bytes(n) bounds the partial rows of a round of the batch-invariant plans made from then on."""
    import mla_cute  # noqa: F401 - the modules below come with it

    # functions of the same names hide the modules
    modules = [sys.modules[f"mla_cute.plan_{op}"] for op in ("decode", "prefill")]

    def bound(n):
        for module in modules:
            monkeypatch.setattr(module, "MOST_PARTIAL_BYTES", n)
            module._invariant_layout.cache_clear()

    yield bound
    for module in modules:
        module._invariant_layout.cache_clear()
