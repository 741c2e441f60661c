"""A process that warms up can fork: CUDA is not initialised, and its children compile nothing."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

# CUDA_ERROR_NOT_INITIALIZED is what the driver answers to everything before cuInit.
WARM_AND_FORK = """
import ctypes, json, os, sys
import torch
import mla_cute
from mla_cute.compile import jit

def status():
    return ctypes.CDLL("libcuda.so.1").cuDeviceGetCount(ctypes.byref(ctypes.c_int()))

found = {"before": status()}
warmed = mla_cute.warmup(dtypes=(torch.bfloat16,), page_sizes=(64,), progress=False)
found |= {"after": status(), "initialised": torch.cuda.is_initialized(), "loaded": jit.counters(),
          "kernels": sorted({w.kernel for w in warmed})}

def child():
    from mla_cute.testing.cases import make_case, run_case
    verdict = run_case(make_case([1, 64, 0, 65, 5000], num_heads=16, page_size=64, device="cuda"))
    many = run_case(make_case([1, 1000, 8192], num_heads=128, page_size=64, device="cuda"), entry="block_table")
    a, lse = torch.ones(3, 16, 512, dtype=torch.bfloat16, device="cuda"), torch.zeros(3, 16, device="cuda")
    merged, total = mla_cute.merge_states(a, lse, 3 * a, lse)
    cache = torch.full((2, 64, 576), torch.nan, dtype=torch.bfloat16, device="cuda")
    slots = torch.tensor([70, -1, 3], dtype=torch.int32, device="cuda")
    tokens = torch.ones(3, 576, dtype=torch.bfloat16, device="cuda")
    mla_cute.append_to_cache(tokens[:, :512], tokens[:, 512:], cache[..., :512], cache[..., 512:], slots)
    rows = cache.view(128, 576)
    others = [row for row in range(128) if row not in (70, 3)]
    return {
        "decode": [verdict.ok, many.ok],
        "merged": bool((merged == 2).all() and (total == 1).all()),
        "appended": bool((rows[[70, 3]] == 1).all() and rows[others].isnan().all()),
        "counters": jit.counters(),
        "status": status(),
    }

reading, writing = os.pipe()
pid = os.fork()
if pid == 0:
    try:
        os.write(writing, json.dumps(child()).encode())
    except BaseException as error:
        os.write(writing, json.dumps({"error": repr(error)}).encode())
    os._exit(0)
os.close(writing)
with os.fdopen(reading) as answer:
    found["child"] = json.loads(answer.read() or "{}")
os.waitpid(pid, 0)
print(json.dumps(found))
"""


@pytest.mark.timeout(600)
def test_a_process_that_warms_up_can_fork():
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    env.pop("MLA_CUTE_TUNED", None)  # the shipped configurations of this GPU are warmed up too
    command = [sys.executable, "-c", WARM_AND_FORK]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=580, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["before"] == found["after"] == 3
    assert found["initialised"] is False
    assert found["loaded"] == {"compiled": 0, "loaded": 0}
    assert {"append", "decode_tile16", "decode_tile64", "merge_states", "planner"} <= set(found["kernels"])
    child = found["child"]
    assert "error" not in child, child
    assert child["decode"] == [True, True]
    assert child["merged"]
    assert child["appended"]
    assert child["counters"]["compiled"] == 0
    assert child["counters"]["loaded"] >= 5
    assert child["status"] == 0


def test_the_gpu_that_a_process_of_its_own_sees_is_torchs():
    import torch

    from mla_cute.compile import warmup

    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    assert warmup._ask_for_gpus() == [(gpu.name, gpu.multi_processor_count) for gpu in properties]
    assert torch.cuda.current_device() == 0
    torch.zeros(1, device="cuda")
    assert warmup._gpus() == warmup._ask_for_gpus()[:1]
