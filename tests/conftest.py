"""Shared test setup: where kernels are cached, which tests need a GPU, and a watchdog for those."""

import faulthandler
import functools
import os
import pathlib
import tempfile

import pytest

GPU_TIMEOUT_S = 120
_stderr_fd = pytest.StashKey[int]()
_gpu_limit_s = pytest.StashKey[float]()


def pytest_configure(config):
    # One disk cache for all workers and runs, so that no kernel compiles twice; its entries are keyed by the sources.
    # Set before xdist starts its workers, which inherit it.
    cache = getattr(config, "cache", None)
    directory = cache.mkdir("kernels") if cache else pathlib.Path(tempfile.mkdtemp(prefix="mla_cute_test_kernels_"))
    os.environ.setdefault("MLA_CUTE_CACHE_DIR", str(directory))
    # torch takes every core in every worker, and its threads spin while they wait for each other: with two workers on
    # two cores the FP8 references took three times the CPU time. Inherited by workers and by processes of tests.
    workers = config.getoption("numprocesses", None) or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))
    # Output capture is suspended here, so this is the terminal; the watchdog writes to it while tests are captured.
    config.stash[_stderr_fd] = os.dup(2)
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout(seconds): limit of one test")


def pytest_unconfigure(config):
    if _stderr_fd in config.stash:
        os.close(config.stash[_stderr_fd])
        del config.stash[_stderr_fd]


@functools.cache
def _why_no_gpu():
    """Why GPU tests cannot run here, or None."""
    import torch

    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        name = torch.cuda.get_device_name()
        return f"{name} has compute capability {capability[0]}.{capability[1]}, the kernels need 9.0"
    return None


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "gpu" in item.path.relative_to(config.rootpath).parts:
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") is None:
            continue
        if reason := _why_no_gpu():
            item.add_marker(pytest.mark.skip(reason=f"needs a Hopper GPU: {reason}"))
            continue
        limit = item.get_closest_marker("timeout")
        item.stash[_gpu_limit_s] = float(limit.args[0]) if limit and limit.args else GPU_TIMEOUT_S
        # pytest-timeout's thread needs the GIL, which a launch that hangs may hold; the watchdog below does not.
        item.add_marker(pytest.mark.timeout(0), append=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """A GPU test that hangs ends the run: the stacks of all threads are printed and the process exits with status 1."""
    if _gpu_limit_s not in item.stash:
        return (yield)
    stderr = item.config.stash[_stderr_fd]
    faulthandler.dump_traceback_later(item.stash[_gpu_limit_s], exit=True, file=stderr)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
