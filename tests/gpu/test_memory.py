"""What runs out of memory raises and leaves the library usable; two processes share a GPU."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from gpu_helpers import ENTRIES, check, make_prefill, plan_of

import mla_cute
from mla_cute.testing.cases import make_case

MIB = 2**20
ROOT = pathlib.Path(mla_cute.__file__).resolve().parents[1]
CHILD_CASES = 25


@pytest.fixture
def leave():
    """leave(bytes): torch may reserve no more than this beyond what tensors hold now; undone after the test."""

    def limit(free_bytes):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + free_bytes) / total)

    # tensors of the test then get blocks of their own, and no free rest of a larger one is left to allocate from
    torch.cuda.empty_cache()
    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)


def small_case():
    return make_case([100, 0, 1, 700], num_heads=16, page_size=64, device="cuda")


def big_plan():
    """A batch-invariant plan of 4096 requests and 128 heads has 512 MiB of partial rows."""
    kv_indptr = torch.arange(4097, dtype=torch.int32, device="cuda")
    return mla_cute.plan_decode(kv_indptr, num_heads=128, page_size=64, batch_invariant=True)


@pytest.mark.parametrize("with_plan", [True, False], ids=["plan", "no_plan"])
def test_a_plan_that_cannot_be_allocated(leave, with_plan):
    case = small_case()
    plan = plan_of(case) if with_plan else None
    check(case, plan=plan)
    leave(256 * MIB)
    for _ in range(3):  # what failed must not stay allocated
        with pytest.raises(torch.OutOfMemoryError):
            big_plan()
    check(case, plan=plan)
    check(case, entry="block_table")
    plan_of(case)


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_output_that_cannot_be_allocated(leave, entry):
    """96 MiB of queries are there, as much again for the output is not."""
    case = make_case([1] * 768, num_heads=128, page_size=64, device="cuda", num_pages=800)
    plan = plan_of(case, entry)
    check(case, entry=entry, plan=plan)
    leave(32 * MIB)
    with pytest.raises(torch.OutOfMemoryError):
        case.call(entry, plan=plan)
    # the room that is left is enough for a call that writes to given tensors
    case.guarded_out.reset()
    case.guarded_lse.reset()
    case.call(entry, plan=plan, out=case.out, lse=case.lse)
    torch.cuda.set_per_process_memory_fraction(1.0)
    check(case, entry=entry, plan=plan)


def test_prefill_that_cannot_copy_its_queries(leave):
    """Queries that are not evenly spaced are copied in the call: 75 MiB."""
    case = make_prefill([(600, 600)], num_heads=128, q_layout="batch_strided")
    plan = plan_of(case)
    check(case, plan=plan)
    leave(16 * MIB)
    case.guarded_out.reset()
    case.guarded_lse.reset()
    with pytest.raises(torch.OutOfMemoryError):
        case.call(plan=plan, out=case.out, lse=case.lse)
    torch.cuda.synchronize()
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert case.guarded_out.untouched()
    assert case.guarded_lse.untouched()
    check(case, plan=plan)


@pytest.mark.timeout(600)
def test_two_processes_share_a_gpu():
    """Two soaks with cases of their own at once, each with its own context: both right."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "mla_cute.cli.soak", "--cases", str(CHILD_CASES), "--first"]
    # 0 and 10 are of one variant, so the second process waits for what the first one compiles
    children = [
        subprocess.Popen([*command, first], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for first in ("0", "10")
    ]
    try:
        outputs = [child.communicate(timeout=550)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    for child, output in zip(children, outputs, strict=True):
        assert child.returncode == 0, output
        assert "Soaking the kernels on" in output
        assert re.search(rf"^{CHILD_CASES} cases .* 0 failed$", output, re.MULTILINE), output
