"""GPU tests: every test ends with its kernels finished, so that a fault is reported by the test that caused it."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _default_configurations(monkeypatch):
    """What a tuned file chooses may differ between entry points, of which one knows the lengths: other bits."""
    from mla_cute import tuned

    monkeypatch.setenv("MLA_CUTE_TUNED", "0")
    tuned.clear()


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
