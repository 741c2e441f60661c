"""Host time of a call, of two or more checkouts side by side on one GPU's host.

    python tune/host_time.py --out record.json before=/path/to/checkout after=.

Each checkout is imported in processes of its own, which take turns (`--rounds`), so that all meet the same host. A
process measures every case in bursts of 50 calls with the device idle before each, which the launch queue takes without
making the host wait, and all cases eight times in turn, since a host is slower in a process's first second. A case's
time is the median of its bursts, the record's the median over the rounds. The cases are
small (4 requests of 128 tokens), so that the GPU is done before the host is. Kernels come from the cache directory or
are compiled in the first round.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

BATCH, HEADS, PAGE, TOKENS = 4, 16, 64, 128
CALLS, BURSTS, PASSES = 50, 4, 8


def cases() -> dict[str, Callable[[], Any]]:
    import torch

    import mla_cute

    cuda = torch.device("cuda", torch.cuda.current_device())
    generator = torch.Generator(cuda).manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=cuda, generator=generator)

    q = randn(BATCH, HEADS, 512), randn(BATCH, HEADS, 64)
    pool = randn(64, PAGE, 576)
    cache = pool[..., :512], pool[..., 512:]
    pages = TOKENS // PAGE
    indptr = torch.arange(BATCH + 1, dtype=torch.int32, device=cuda) * pages
    indices = torch.randperm(64, device=cuda)[: BATCH * pages].int()
    table, lens = indices.view(BATCH, pages), torch.full((BATCH,), TOKENS, dtype=torch.int32, device=cuda)
    queries = torch.arange(BATCH + 1, dtype=torch.int32, device=cuda)
    scale = 192**-0.5
    sizes = {"num_heads": HEADS, "page_size": PAGE}
    out, lse = torch.empty_like(q[0]), torch.empty(BATCH, HEADS, device=cuda)
    found: dict[str, Callable[[], Any]] = {}

    plan = mla_cute.plan_decode(indptr, **sizes)
    found["bf16, plan"] = lambda: mla_cute.mla_paged_decode(*q, *cache, indptr, indices, scale, plan=plan)
    found["bf16, plan, outputs given"] = lambda: mla_cute.mla_paged_decode(
        *q, *cache, indptr, indices, scale, plan=plan, out=out, lse=lse
    )
    found["bf16, no plan"] = lambda: mla_cute.mla_paged_decode(*q, *cache, indptr, indices, scale)
    table_plan = mla_cute.plan_decode_block_table(lens, max_pages=pages, **sizes)
    found["bf16 block table, plan"] = lambda: mla_cute.mla_paged_decode_block_table(
        *q, *cache, table, lens, scale, plan=table_plan
    )
    found["bf16 block table, no plan"] = lambda: mla_cute.mla_paged_decode_block_table(*q, *cache, table, lens, scale)
    prefill_plan = mla_cute.plan_prefill(queries, indptr, total_q=BATCH, **sizes)
    found["bf16 prefill, plan"] = lambda: mla_cute.mla_paged_prefill(
        *q, *cache, queries, indptr, indices, scale, plan=prefill_plan
    )
    found["bf16 prefill, no plan"] = lambda: mla_cute.mla_paged_prefill(*q, *cache, queries, indptr, indices, scale)

    q8 = tuple(x.to(torch.float8_e4m3fn) for x in q)
    pool8 = pool.to(torch.float8_e4m3fn)
    cache8 = pool8[..., :512], pool8[..., 512:]
    rows = torch.zeros(64, PAGE, 656, dtype=torch.uint8, device=cuda)
    ckv, array, kpe = mla_cute.quant.group_rows(rows)
    for name, queries8, format_cache, scales in (
        ("fp8 tensor, e4m3 q", q8, cache8, {"ckv_scale": 0.5, "kpe_scale": 0.25, "q_scale": 2.0}),
        ("fp8 tensor, bf16 q", q, cache8, {"ckv_scale": 0.5, "kpe_scale": 0.25}),
        ("fp8 group, bf16 q", q, (ckv, kpe), {"ckv_scale_arr": array}),
    ):
        made = mla_cute.plan_decode(indptr, kv_format=name.split()[1].strip(","), q_fp8="e4m3" in name, **sizes)

        def call(plan: Any, queries8: Any = queries8, cache: Any = format_cache, scales: Any = scales) -> Any:
            return mla_cute.mla_paged_decode(*queries8, *cache, indptr, indices, scale, plan=plan, **scales)

        found[f"{name}, plan"] = lambda call=call, made=made: call(made)
        found[f"{name}, no plan"] = lambda call=call: call(None)
    found["plan_decode"] = lambda: mla_cute.plan_decode(indptr, **sizes)
    found["plan.update"] = plan.update
    return found


def measure() -> None:
    import torch

    found = cases()
    bursts: dict[str, list[float]] = {name: [] for name in found}
    for call in found.values():
        call()
    for _ in range(PASSES):
        for name, call in found.items():
            for _ in range(BURSTS):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(CALLS):
                    call()
                bursts[name].append((time.perf_counter() - start) / CALLS * 1e6)
    times = {name: statistics.median(of) for name, of in bursts.items()}
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "times": times}))


def cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.*)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    checkouts = dict(checkout.partition("=")[::2] for checkout in options.checkouts)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    facts: dict[str, Any] = {}
    for _ in range(options.rounds):
        for name, folder in checkouts.items():
            path = os.pathsep.join([str(pathlib.Path(folder).resolve()), os.environ.get("PYTHONPATH", "")])
            command = [sys.executable, str(pathlib.Path(__file__).resolve()), "--measure"]
            environment = os.environ | {"PYTHONPATH": path}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name}: {done.stderr[-3000:]}")
            found = json.loads(done.stdout.splitlines()[-1])
            facts = {"gpu": found["gpu"], "torch": found["torch"]}
            runs[name].append(found["times"])
    names = list(next(iter(runs.values()))[0])
    table = {
        case: {name: round(statistics.median(run[case] for run in of), 2) for name, of in runs.items()}
        for case in names
    }
    first = next(iter(checkouts))
    for case, row in table.items():
        shown = "  ".join(f"{name} {us:7.2f} ({us / row[first]:.2f})" for name, us in row.items())
        print(f"{case:32s} {shown}")
    record = {
        "what": "host time of a call, us, median",
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **facts,
        "cpu": cpu_name(),
        "python": platform.python_version(),
        "rounds": options.rounds,
        "us": table,
    }
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    measure() if "--measure" in sys.argv else main()
