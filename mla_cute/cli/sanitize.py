"""`mla-cute check --sanitize`: every kernel variant under NVIDIA's compute-sanitizer.

Also `python -m mla_cute.cli.sanitize`, which needs neither typer nor rich. The sanitizer runs a child process,
`python -m mla_cute.cli.sanitize --cases NAME ...`, which launches each kernel a few times on small inputs and judges
the results. The child allocates without torch's caching allocator: memcheck sees the bounds of every tensor then,
where otherwise it would see those of the 2 MB blocks that tensors share.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import pathlib
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import mla_cute

from .. import gpu as gpu_facts
from .. import quant
from ..append import append_reference
from ..bench.report import text_table
from ..check import FP8
from ..config import KernelConfig, with_kernel
from ..dims import CKV_DIM, KPE_DIM, KV_FORMATS, HeadDims
from ..kernels.keys import APPEND, CONVERT, MERGE_STATES, PLANNER, PREFILL_PLANNER, KernelRef
from ..kernels.registry import has_few_rows, step_of
from ..testing.runs import plan_of
from . import soak
from .soak_draw import Request, Scenario
from .watchdog import parse_seconds

TOOLS = ("memcheck", "synccheck", "racecheck")
COLUMNS = ("case", "kernel", "result")
_ERROR_STATUS = 99
_CHILD = ("-m", "mla_cute.cli.sanitize")
_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")

# The longest request is cut among CTAs and merged; 65, 700 and 1130 end in the middle of a block, 130 of a page.
_DECODE = ((1, 0), (1, 1), (1, 65), (1, 1130), (1, 130))
_PREFILL = ((5, 70), (0, 3), (3, 0), (1, 700), (20, 20))
# Heads, main kernel, min_blocks and requests. Pieces of decode's longest request are longer than the rings of tiles in
# shared memory; tile16's begin at an odd block. With 40 heads it has several tiles of heads, the last one not full, and
# more requests than work lists: CTAs go from item to item.
_KERNELS: dict[str, tuple[tuple[int, str, int, tuple[Request, ...]], ...]] = {
    "decode": (
        (16, "tile16", 9, _DECODE),
        (40, "tile16", 9, _DECODE + 60 * ((1, 65),)),
        (128, "tile64", 10, _DECODE),
    ),
    "prefill": ((16, "tile64", 2, _PREFILL),),
}
# Over FP8 caches row tiles of up to 32 heads, or rows of a request, are another kernel.
_FOR_FEW_ROWS = {"decode": ((32, "tile64", 10, _DECODE),), "prefill": ((1, "tile64", 2, _PREFILL),)}
# Lists of at most so many of the tokens that decode's requests have, some of them twice, whatever the page size.
_TOPK = 2260
_SPARSE_KERNELS = {
    "": ((16, "tile16", 9), (128, "tile64", 10)),
    "group": ((16, "tile16", 9), (32, "tile64", 10), (128, "tile64", 10)),
    "group656": ((16, "tile16", 9),),
}
# Format and e4m3 queries of prefills whose cache is converted first.
_CONVERTED = (("tensor", False), ("group", False), ("group", True))
_OTHER_DIMS = ((16, "tile16", 9, HeadDims(256, 64)), (128, "tile64", 10, HeadDims(512, 0)))
_FULL_PAGES = {"decode": ((1, 64), (1, 640)), "prefill": ((5, 64), (1, 640))}


@dataclass(frozen=True)
class Case:
    """`run` launches on a device and says what is wrong with the result."""

    name: str
    kernel: KernelRef
    run: Callable[[torch.device], list[str]]


# ------------------------------------------------------------------------------------------------ the cases


def _scenario(
    op: str,
    num_heads: int,
    page_size: int,
    requests: tuple[Request, ...],
    layout: str = "",
    q_fp8: bool = False,
    config: KernelConfig | None = None,
) -> Scenario:
    return Scenario(
        seed=0,
        op=op,
        kind="repeat",
        num_heads=num_heads,
        page_size=page_size,
        dtype=torch.bfloat16,
        layout=layout,
        q_fp8=q_fp8,
        steps=(requests,),
        causal=op == "prefill",
        cache_layout="fused",
        q_layout="contiguous",
        out_layout="contiguous",
        shared_pages=0,
        drift=0.0,
        index_offset=0,
        entry="block_table" if page_size == 1 else "csr",
        with_plan=True,
        batch_invariant=False,
        lse_base=2,
        config=config,
    )


def _full_pages(op: str, batch_invariant: bool, device: torch.device) -> list[str]:
    """The planner's form without last page lengths, and with batch-invariant cuts."""
    scenario = dataclasses.replace(_scenario(op, 16, 64, _FULL_PAGES[op]), batch_invariant=batch_invariant)
    it = soak.subject(scenario, 0, device)
    plan = plan_of(it.case, kv_last_page_len=None, batch_invariant=batch_invariant)
    it.reset()
    it.call("csr", plan=plan, kv_last_page_len=None)
    return list(it.judge().failures)


def _append(kv_format: str, device: torch.device) -> list[str]:
    """9 tokens, one of them padding, into 3 pages of 5, int32 and int64 slots; against torch."""
    generator = torch.Generator().manual_seed(0)
    new = torch.randn(9, CKV_DIM + KPE_DIM, generator=generator).to(torch.bfloat16)
    slots = torch.tensor([14, 0, 7, -1, 3, 9, 8, 1, 12])
    sizes = (3, 5)
    ckv_dtype = FP8 if kv_format else torch.bfloat16
    kpe_dtype = FP8 if kv_format == "tensor" else torch.bfloat16
    failures = []
    for slot_dtype in (torch.int32, torch.int64):
        results = []
        for where in (torch.device("cpu"), device):
            ckv_cache = torch.zeros(*sizes, CKV_DIM, device=where).to(ckv_dtype)
            kpe_cache = torch.zeros(*sizes, KPE_DIM, device=where).to(kpe_dtype)
            scales: dict[str, Any] = {"ckv_scale": 0.02, "kpe_scale": 0.03} if kv_format == "tensor" else {}
            array = None
            if kv_format in ("token", "group"):
                array = torch.zeros(*sizes, 1 if kv_format == "token" else CKV_DIM // quant.GROUP_DIM, device=where)
            tokens = new.to(where)
            arguments = (tokens[:, :CKV_DIM], tokens[:, CKV_DIM:], ckv_cache, kpe_cache, slots.to(where, slot_dtype))
            if where.type == "cpu":
                append_reference(*arguments, kv_format, **scales, ckv_scale_arr=array)
            else:
                mla_cute.append_to_cache(*arguments, **scales, ckv_scale_arr=array)
            results.append([x.float().cpu() for x in (ckv_cache, kpe_cache, *([] if array is None else [array]))])
        names = ("ckv_cache", "kpe_cache", "ckv_scale_arr")
        failures += [
            f"{name} differs from torch's with {slot_dtype} slots"
            for name, want, got in zip(names, *results, strict=False)
            if not torch.equal(want, got)
        ]
    return failures


def _merge_states(dtype: torch.dtype, device: torch.device) -> list[str]:
    """7 tokens of 3 heads, one state that saw nothing; against torch on the CPU."""
    generator = torch.Generator().manual_seed(0)
    o_a, o_b = torch.randn(2, 7, 3, CKV_DIM, generator=generator).to(dtype)
    lse_a, lse_b = torch.randn(2, 7, 3, generator=generator)
    lse_a[2] = -torch.inf
    want = mla_cute.merge_states(o_a, lse_a, o_b, lse_b)
    got = mla_cute.merge_states(*(x.to(device) for x in (o_a, lse_a, o_b, lse_b)))
    eps = torch.finfo(dtype).eps
    names = ("output", "lse")
    return [
        f"{name} is off by {float((a.float() - b.float().cpu()).abs().max()):.2e}"
        for name, a, b in zip(names, want, got, strict=True)
        if not torch.allclose(a.float(), b.float().cpu(), rtol=eps, atol=max(eps, 1e-5))
    ]


def _attention(scenario: Scenario, device: torch.device) -> list[str]:
    return soak.run_scenario(scenario, device)


def _config(layout: str, kernel: str, min_blocks: int) -> KernelConfig:
    """Kernel and cuts are named, not left to the GPU's tuned file and to what is known of the lengths."""
    return dataclasses.replace(with_kernel(KernelConfig(), layout, kernel), min_blocks=min_blocks, split_penalty=0)


def _attention_case(name: str, scenario: Scenario) -> Case:
    assert scenario.config is not None
    few_rows = has_few_rows(scenario.op, scenario.num_heads, scenario.max_q_len)
    step = step_of(scenario.op, scenario.layout, scenario.num_heads, scenario.config, few_rows)
    return Case(name, step, functools.partial(_attention, scenario))


def _sparse_cases() -> Iterator[Case]:
    for layout, kernels in _SPARSE_KERNELS.items():
        for num_heads, kernel, min_blocks in kernels:
            config = _config(layout, kernel, min_blocks)
            scenario = _scenario("sparse", num_heads, 64, _DECODE, layout, config=config)
            scenario = dataclasses.replace(scenario, topk=_TOPK, entry="topk_lens", sinks=True)
            yield _attention_case(f"sparse-{layout or 'bf16'}-h{num_heads}", scenario)


def _converted_cases() -> Iterator[Case]:
    for layout, q_fp8 in _CONVERTED:
        config = _config(layout, "convert", 2)
        scenario = _scenario("prefill", 16, 64, _PREFILL, layout, q_fp8, config)
        name = f"prefill-{layout}{'-q_e4m3' if q_fp8 else ''}-converted"
        yield Case(name, CONVERT, functools.partial(_attention, scenario))


def _other_dims_cases() -> Iterator[Case]:
    for num_heads, kernel, min_blocks, dims in _OTHER_DIMS:
        scenario = _scenario("decode", num_heads, 64, _DECODE, config=_config("", kernel, min_blocks))
        name = f"decode-bf16-h{num_heads}-page64-{dims.ckv}+{dims.kpe}"
        yield _attention_case(name, dataclasses.replace(scenario, dims=dims))


@functools.cache
def cases() -> dict[str, Case]:
    """Every kernel, of the main ones each cache format and both ways to load: TMA (page size 64), gather (1). Lists of
    tokens, and other head dimensions than 512 + 64, by a few cases each."""
    found = []
    for op in ("decode", "prefill"):
        for layout, q_fp8 in (("", False), *((layout, q) for layout in KV_FORMATS for q in (False, True))):
            fp8_only = _FOR_FEW_ROWS[op] if layout else ()
            for num_heads, kernel, min_blocks, requests in (*_KERNELS[op], *fp8_only):
                config = _config(layout, kernel, min_blocks)
                for page_size in (64, 1):
                    scenario = _scenario(op, num_heads, page_size, requests, layout, q_fp8, config)
                    name = f"{op}-{layout or 'bf16'}{'-q_e4m3' if q_fp8 else ''}-h{num_heads}-page{page_size}"
                    found.append(_attention_case(name, scenario))
        planner = PLANNER if op == "decode" else PREFILL_PLANNER
        for invariant in (False, True):
            name = f"{op}-planner-csr{'-invariant' if invariant else ''}"
            found.append(Case(name, planner, functools.partial(_full_pages, op, invariant)))
    found += [*_sparse_cases(), *_converted_cases(), *_other_dims_cases()]
    for kv_format in ("", *KV_FORMATS):
        found.append(Case(f"append-{kv_format or 'bf16'}", APPEND, functools.partial(_append, kv_format)))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = f"merge_states-{str(dtype).removeprefix('torch.')}"
        found.append(Case(name, MERGE_STATES, functools.partial(_merge_states, dtype)))
    return {case.name: case for case in found}


def run_cases(names: Sequence[str], device: torch.device) -> int:
    """What the child does: a line "ok NAME" or "wrong NAME: ..." per case. Returns the exit status."""
    status = 0
    for name in names:
        print(f"case {name}", flush=True)
        failures = cases()[name].run(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        status = 1 if failures else status
        print(f"wrong {name}: {failures[0]}" if failures else f"ok {name}", flush=True)
    return status


# ------------------------------------------------------------------------------------------------ the parent


class MissingTool(Exception):
    """compute-sanitizer is not installed; one sentence."""


@dataclass(frozen=True)
class Outcome:
    """Of one child. `result` is "ok" or says what was wrong; `lines` is what it printed."""

    result: str
    lines: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return self.result == "ok"


def find_sanitizer() -> str:
    """The path of compute-sanitizer: on PATH, under CUDA_HOME or CUDA_PATH, or in /usr/local/cuda.

    Raises MissingTool when it is in none of them.
    """
    roots = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)] + ["/usr/local/cuda"]
    places = [pathlib.Path(root) / folder for root in roots for folder in ("bin", "compute-sanitizer")]
    for path in (None, *map(str, places)):
        if (found := shutil.which("compute-sanitizer", path=path)) is not None:
            return found
    raise MissingTool(
        "compute-sanitizer is neither on PATH nor in " + ", ".join(map(str, places)) + "; it is part of the CUDA "
        "toolkit (package cuda-sanitizer), CUDA_HOME says where that is"
    )


def command_of(names: Sequence[str], tool: str | None, sanitizer: str) -> list[str]:
    """The child's command line; `tool` None runs it without the sanitizer."""
    child = [sys.executable, *_CHILD, "--cases", *names]
    if tool is None:
        return child
    # Both kinds of a launch that fails show in the child: as an exception, and as an error of the tool.
    return [sanitizer, "--tool", tool, "--error-exitcode", str(_ERROR_STATUS), "--target-processes", "all", *child]


def run_child(command: Sequence[str], tool: str | None, names: Sequence[str], silence: float) -> Outcome:
    """Run a child to its end, or kill it with all its processes when it prints nothing for `silence` seconds."""
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    package_root = str(pathlib.Path(mla_cute.__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([package_root, *filter(None, [environment.get("PYTHONPATH")])])
    lines: list[str] = []
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            for line in _lines_of(process, silence):
                lines.append(line)
        except TimeoutError:
            at = next((line.removeprefix("case ") for line in reversed(lines) if line.startswith("case ")), "the start")
            return Outcome(f"hung: nothing printed for {silence:g} s, at {at}", tuple(lines))
        finally:
            # Also when the caller was interrupted: nothing of the child may keep the GPU.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
    return Outcome(_result(lines, status, tool, names), tuple(lines))


def _lines_of(process: subprocess.Popen[str], silence: float) -> Iterator[str]:
    """The child's lines; TimeoutError when the next one takes longer than `silence` seconds."""
    arrived: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            arrived.put(line.rstrip("\n"))
        arrived.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = arrived.get(timeout=silence)
        except queue.Empty:
            raise TimeoutError from None
        if line is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=silence)
            return
        yield line


def _result(lines: Sequence[str], status: int, tool: str | None, names: Sequence[str]) -> str:
    found = [int(match[1] or match[2]) for line in lines if (match := _SUMMARY.search(line))]
    if errors := sum(found):
        first = next((line.lstrip("= ") for line in lines if line.startswith("========= ") and _is_error(line)), "")
        return f"{errors} errors of {tool}{f': {first}' if first else ''}"
    if wrong := next((line for line in lines if line.startswith("wrong ")), None):
        return wrong.replace("wrong", "wrong result of", 1)
    if status != 0:
        last = next((line for line in reversed(lines) if line.strip() and not line.startswith("=====")), "")
        return f"exit status {status}{f': {last}' if last else ''}"
    if missing := set(names) - {line.removeprefix("ok ") for line in lines if line.startswith("ok ")}:
        return f"no result of {', '.join(sorted(missing))}"
    if tool is not None and not found:
        return f"{tool} printed no summary: it saw no kernel"
    return "ok"


def _is_error(line: str) -> bool:
    text = line.lstrip("= ")
    return not text.startswith(("COMPUTE-SANITIZER", "ERROR SUMMARY", "RACECHECK SUMMARY", "Target application"))


def settle(
    names: Sequence[str], run_once: Callable[[Sequence[str]], Outcome], said: Callable[[str, Outcome], None]
) -> None:
    """Call `said` with every case's outcome. All run in one child; halves of a child that was not clean run again,
    down to the case."""
    outcome = run_once(names)
    if outcome.ok or len(names) == 1:
        for name in names:
            said(name, outcome)
        return
    middle = len(names) // 2
    settle(names[:middle], run_once, said)
    settle(names[middle:], run_once, said)


def run(
    *,
    tool: str = "memcheck",
    names: Sequence[str] | None = None,
    silence: float = 300.0,
    say: Callable[[str], None] = print,
) -> tuple[list[tuple[str, str, str]], int]:
    """Run the cases `names` (None: all) under `tool`. Returns rows of COLUMNS and the exit status, 1 for a failure.

    Args:
        silence: seconds without a line after which a child is hung.
        say: gets lines about the progress, and what the tool printed of cases that failed.

    Raises:
        MissingTool: without compute-sanitizer. ValueError: an unknown tool or case, naming it.
    """
    if tool not in TOOLS:
        raise ValueError(f"tool: expected one of {', '.join(TOOLS)}, got {tool!r}")
    names = list(cases()) if names is None else list(names)
    if unknown := [name for name in names if name not in cases()]:
        raise ValueError(f"cases: expected some of {', '.join(cases())}, got {', '.join(unknown)}")
    sanitizer = find_sanitizer()
    rows: list[tuple[str, str, str]] = []

    def run_once(some: Sequence[str], tool: str | None = tool) -> Outcome:
        say(f"{len(some)} cases{'' if tool is None else f' under {tool}'}, {some[0]} first")
        return run_child(command_of(some, tool, sanitizer), tool, some, silence)

    def said(name: str, outcome: Outcome) -> None:
        rows.append((name, cases()[name].kernel.name, outcome.result))
        if not outcome.ok:
            say("\n".join([f"FAILED {name}: {outcome.result}", *(f"    {line}" for line in outcome.lines[-40:])]))

    # Compiles everything: under the sanitizer the compiler would only be slower. What fails here fails there too.
    plain = run_once(names, None)
    if not plain.ok:
        say(f"without a sanitizer: {plain.result}")
    settle(names, run_once, said)
    return rows, 1 if any(result != "ok" for *_, result in rows) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mla_cute.cli.sanitize", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tool", choices=TOOLS, help="run all cases under this tool of compute-sanitizer")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="only these; without --tool: launch them, no more")
    parser.add_argument("--timeout", type=parse_seconds, default=300.0, help="a run without a line for so long is hung")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    chosen = parser.parse_args(arguments)
    if chosen.list:
        print("\n".join(cases()))
        return 0
    if (why := gpu_facts.why_not_hopper()) is not None:
        print(f"mla-cute: nothing to sanitize: {why}", file=sys.stderr)
        return 2
    if chosen.tool is None and chosen.cases is not None:
        return run_cases(chosen.cases, torch.device("cuda", torch.cuda.current_device()))
    try:
        rows, status = run(tool=chosen.tool or "memcheck", names=chosen.cases, silence=chosen.timeout)
    except (MissingTool, ValueError) as error:
        print(f"mla-cute: {error}", file=sys.stderr)
        return 2
    print(text_table([COLUMNS, *rows]))
    return status


if __name__ == "__main__":
    sys.exit(main())
