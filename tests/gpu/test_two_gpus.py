"""Two GPUs: tensors, plans and graphs on cuda:1, mostly while cuda:0 is the current device; one cache for processes on
both; the context-parallel example over NCCL."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from gpu_helpers import MIXED, check, check_fp8, plan_of, same_bits

import mla_cute
from mla_cute.testing.cases import make_case
from mla_cute.testing.fp8 import make_fp8
from mla_cute.testing.prefill import make_prefill_case

ROOT = pathlib.Path(__file__).resolve().parents[2]
OTHER = torch.device("cuda:1")
pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
LENGTHS = [1000, 0, 129, 64, 5000]


def make(kind, num_heads):
    if kind == "prefill":
        return make_prefill_case(MIXED, num_heads=num_heads, page_size=64, device=OTHER)
    return make_case(LENGTHS, num_heads=num_heads, page_size=64, device=OTHER)


@pytest.mark.parametrize("entry", ["csr", "block_table"])
@pytest.mark.parametrize("num_heads", [16, 128])
@pytest.mark.parametrize("kind", ["decode", "prefill"])
@pytest.mark.parametrize("current", [0, 1])
def test_calls_run_where_their_tensors_are(kind, num_heads, entry, current):
    case = make(kind, num_heads)
    with torch.cuda.device(current):
        for plan in (None, plan_of(case, entry)):
            for _ in range(3):  # the first call goes the long way
                check(case, entry=entry, plan=plan)
            out, lse = case.call(entry, plan=plan)
            assert out.device == lse.device == OTHER
        assert torch.cuda.current_device() == current


@pytest.mark.parametrize("num_heads", [16, 128])
@pytest.mark.parametrize("layout", ["tensor", "token", "group656"])
def test_fp8(layout, num_heads):
    fp8 = make_fp8(make("decode", num_heads), layout, layout == "tensor")
    with torch.cuda.device(0):
        for plan in (None, plan_of(fp8.case, kv_format=fp8.kv_format, q_fp8=fp8.q_fp8)):
            for _ in range(2):
                check_fp8(fp8, plan=plan)


@pytest.mark.parametrize("num_heads", [16, 128])
def test_both_at_once_have_the_same_bits(num_heads):
    """The same case on both, launched in turns: neither writes to the other's workspace."""
    cases = [make_case(LENGTHS, num_heads=num_heads, page_size=64, device=f"cuda:{i}") for i in range(2)]
    for name in ("q_nope", "q_pe", "ckv_cache", "kpe_cache"):
        getattr(cases[1], name).copy_(getattr(cases[0], name))
    plans = [plan_of(case) for case in cases]
    for _ in range(5):
        results = [case.call(plan=plan) for case, plan in zip(cases, plans, strict=True)]
        for mine, theirs in zip(*results, strict=True):
            assert same_bits(mine, theirs.to(mine.device))


@pytest.mark.parametrize("num_heads", [16, 128])
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_a_graph_there_replays_while_another_device_is_current(kind, num_heads):
    case = make(kind, num_heads)
    plan = plan_of(case)
    with torch.cuda.device(OTHER):
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            case.call(plan=plan.update(), out=case.out, lse=case.lse)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                case.call(plan=plan.update(), out=case.out, lse=case.lse)
    want = case.out.clone(), case.lse.clone()
    with torch.cuda.device(0):
        case.out.zero_()
        case.lse.zero_()
        torch.cuda.synchronize(OTHER)
        graph.replay()
        torch.cuda.synchronize(OTHER)
    rows = case.queries[-1]
    assert same_bits(case.out[:rows], want[0][:rows])
    assert same_bits(case.lse[:rows], want[1][:rows])


def test_a_plan_of_another_gpu_is_refused():
    case = make("decode", 16)
    plan = plan_of(make_case(LENGTHS, num_heads=16, page_size=64, device="cuda:0"))
    with pytest.raises(ValueError, match=r"^plan: expected a plan for device cuda:1, got one for device cuda:0$"):
        case.call(plan=plan)


def test_append_and_merge_there():
    case = make("decode", 16)
    with torch.cuda.device(0):
        new = torch.randn(3, 576, device=OTHER).bfloat16()
        slots = torch.tensor([5, 0, 70], device=OTHER)
        mla_cute.append_to_cache(new[:, :512], new[:, 512:], case.ckv_cache, case.kpe_cache, slots)
        got = torch.cat((case.ckv_cache, case.kpe_cache), dim=-1).flatten(0, 1)[slots]
        assert same_bits(got, new)
        states = [torch.randn(4, 16, 512, device=OTHER), torch.randn(4, 16, device=OTHER)]
        out, lse = mla_cute.merge_states(*states, *states)
    assert out.device == lse.device == OTHER
    assert torch.allclose(out, states[0], atol=1e-5)
    assert torch.allclose(lse, states[1] + 1, atol=1e-5)


COLD = """
import json, torch, mla_cute
from mla_cute.compile import jit
from mla_cute.testing.cases import make_case
case = make_case([1000, 0, 129], num_heads=16, page_size=64, device="cuda")
out, lse = case.call()
torch.cuda.synchronize()
print(json.dumps({"counters": jit.counters(), "sum": out.double().sum().item(), "lse": lse[0].double().sum().item()}))
"""


@pytest.mark.timeout(600)
def test_processes_on_both_share_one_cold_cache(tmp_path):
    """Each variant is compiled by one of them, and the other waits for it and loads it."""
    path = os.pathsep.join([str(ROOT), *sys.path])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", COLD], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "MLA_CUTE_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": str(i)},
        )
        for i in range(2)
    ]  # fmt: skip
    found = []
    for process in started:
        printed, errors = process.communicate(timeout=580)
        assert process.returncode == 0, errors
        found.append(json.loads(printed.splitlines()[-1]))
    assert (found[0]["sum"], found[0]["lse"]) == (found[1]["sum"], found[1]["lse"])
    compiled = [one["counters"]["compiled"] for one in found]
    loaded = [one["counters"]["loaded"] for one in found]
    assert sum(compiled) == len(list(tmp_path.glob("*.o"))) > 0
    assert [a + b for a, b in zip(compiled, loaded, strict=True)] == [sum(compiled)] * 2


@pytest.mark.timeout(300)
@pytest.mark.parametrize("options", [[], ["--fp8"]], ids=["bf16", "fp8"])
def test_the_example_over_nccl(options):
    command = [sys.executable, str(ROOT / "examples/context_parallel.py"), "--ranks", "2", "--port", "29541", *options]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, verdict = done.stdout.splitlines()
    assert verdict == "ok"
    assert [re.match(r"rank (\d) of 2 \(cuda\)", line)[1] for line in lines] == ["0", "1"]
