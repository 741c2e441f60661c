"""`mla-cute check --soak 5m`: random calls, each judged, until the time is over.

Also `python -m mla_cute.cli.soak 5m`, which needs neither typer nor rich.

A case follows from its seed and from whether there is a GPU, and from nothing else. `_VARIANT_SEEDS` seeds in a row
share page-size class, dtype and cache format, so that a run with an empty kernel cache does not compile all the time.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import mla_cute

from .. import gpu as gpu_facts
from ..config import KERNELS, KernelConfig
from ..testing import runs as testing_runs
from ..testing.cases import CACHE_LAYOUTS, OUT_LAYOUTS, Q_LAYOUTS, DecodeCase, expected_of, judge, make_case
from ..testing.fp8 import LAYOUTS as FP8_LAYOUTS
from ..testing.fp8 import Fp8Case, Fp8Expected, expected_fp8, judge_fp8, make_fp8
from ..testing.prefill import SPARE_QUERIES, make_prefill_case
from ..testing.verdict import Expected, Verdict
from ..tuning.options import parse_budget
from .check import independent
from .watchdog import Watchdog, parse_seconds

KINDS = ("repeat", "replay", "layers", "streams")
ENTRIES = ("csr", "block_table")
HEADS = (1, 2, 5, 8, 12, 16, 17, 24, 32, 48, 64, 65, 80, 96, 127, 128)
# By rows of a TMA box, 0 for the gather (kernels/registry.py).
PAGE_SIZES = {64: (64, 128, 192), 32: (32, 96), 16: (16, 48), 8: (8, 24), 0: (1, 2, 3, 4, 100)}

_VARIANT_SEEDS = 40
_STREAM_ROUNDS = 6
_REPLAYS = 3
_MOST_STEPS = 1 + _REPLAYS
# Products of query rows and keys of a step: the reference takes about 0.1 s for these on an H200, and on two CPU cores.
_MOST_SCORES = {True: 1 << 30, False: 1 << 20}
_MOST_KEYS = {True: 20000, False: 500}
_MOST_REQUESTS = {True: 40, False: 6}
_MOST_FAILURES = 10
_SECONDS_PER_LINE = 10.0
_LN_2 = math.log(2)

Request = tuple[int, int]  # (query tokens, keys)


@dataclass(frozen=True)
class Scenario:
    """What one seed does.

    kind     "repeat": one call, twice. "replay": a CUDA graph of plan update and call, replayed over `steps` with the
             same buffers. "layers": calls over other caches that share a plan. "streams": two calls on two streams at
             once, again and again
    layout   "" for a 16-bit cache, else one of `testing.fp8.LAYOUTS`
    steps    requests of each call; they have as many requests and query tokens each
    """

    seed: int
    op: str
    kind: str
    num_heads: int
    page_size: int
    dtype: torch.dtype
    layout: str
    q_fp8: bool
    steps: tuple[tuple[Request, ...], ...]
    causal: bool
    cache_layout: str
    q_layout: str
    out_layout: str
    shared_pages: int
    drift: float
    index_offset: int
    entry: str
    with_plan: bool
    batch_invariant: bool
    lse_base: int | str
    config: KernelConfig | None

    def __str__(self) -> str:
        longest = max((kv for step in self.steps for _, kv in step), default=0)
        queries = sum(q for q, _ in self.steps[0])
        tokens = "" if self.op == "decode" else f", {queries} query tokens{'' if self.causal else ', not causal'}"
        dtype = str(self.dtype).removeprefix("torch.")
        cache = f"{dtype}, {self.layout or '16-bit'} cache{', e4m3 queries' if self.q_fp8 else ''}"
        options = [
            self.entry,
            "with a plan" if self.with_plan else "without a plan",
            *(["batch-invariant"] if self.batch_invariant else []),
        ]
        if (config := self.config) is not None:
            kernel = config.fp8_kernel if self.layout else config.kernel
            options += [f"kernel {kernel}", f"cut_unit {config.cut_unit}", f"min_blocks {config.min_blocks}"]
        return (
            f"{self.op} {self.kind}, {self.num_heads} heads, page size {self.page_size}, {cache}, "
            f"{len(self.steps[0])} requests{tokens}, up to {longest} keys, {self.cache_layout} caches, "
            f"{self.q_layout} q, {self.out_layout} out, drift {self.drift:g}, {', '.join(options)}"
        )


def draw(seed: int, on_gpu: bool) -> Scenario:
    """The scenario of a seed."""
    variant = random.Random(f"variant {seed // _VARIANT_SEEDS}")
    page_size_of = PAGE_SIZES[variant.choice(list(PAGE_SIZES))]
    dtype = variant.choice((torch.bfloat16, torch.bfloat16, torch.float16))
    layout = variant.choice(("", "", *FP8_LAYOUTS))
    q_fp8 = bool(layout) and variant.random() < 0.4

    rng = random.Random(f"case {seed}")
    op = rng.choice(("decode", "prefill"))
    kind = rng.choice(KINDS)
    page_size, num_heads = rng.choice(page_size_of), rng.choice(HEADS)
    lines = {"repeat": 1, "replay": 1 + _REPLAYS, "layers": 1, "streams": 2}[kind]
    return Scenario(
        seed=seed,
        op=op,
        kind=kind,
        num_heads=num_heads,
        page_size=page_size,
        dtype=dtype,
        layout=layout,
        q_fp8=q_fp8,
        steps=_steps(rng, op, lines, page_size, num_heads, on_gpu),
        causal=op == "prefill" and rng.random() < 0.75,
        cache_layout=rng.choice(CACHE_LAYOUTS),
        q_layout=rng.choice(Q_LAYOUTS),
        out_layout=rng.choice(OUT_LAYOUTS),
        shared_pages=rng.choice((0, 0, 1, 1000)),
        drift=rng.choice((0.0, 0.0, 60.0, -60.0)),
        index_offset=rng.choice((0, 0, 3)),
        entry=rng.choice(ENTRIES),
        with_plan=kind == "layers" or rng.random() < 0.7,
        batch_invariant=rng.random() < 0.25,
        lse_base=rng.choice((2, 2, "e")),
        config=_config(rng),
    )


def _config(rng: random.Random) -> KernelConfig | None:
    """None, or one that has another kernel or cuts requests in another way; the launch configuration stays."""
    if rng.random() < 0.6:
        return None
    kernel, cut_unit = rng.choice(KERNELS), rng.choice((1, 2))
    return KernelConfig(
        kernel=kernel,
        fp8_kernel=kernel,
        cut_unit=cut_unit,
        min_blocks=cut_unit * rng.choice((1, 3, 8)),
        item_overhead=rng.choice((0, 4, 20)),
        split_penalty=rng.choice((0, 6, 50)),
    )


def _steps(
    rng: random.Random, op: str, count: int, page_size: int, num_heads: int, on_gpu: bool
) -> tuple[tuple[Request, ...], ...]:
    batch = max(1, round(math.exp(rng.uniform(0, math.log(_MOST_REQUESTS[on_gpu])))))
    longest = round(math.exp(rng.uniform(0, math.log(_MOST_KEYS[on_gpu]))))
    total_q = batch if op == "decode" else rng.choice((batch, 2 * batch, *((64, 300) if on_gpu else (12, 20))))
    while num_heads * total_q * longest > _MOST_SCORES[on_gpu]:
        longest = max(1, longest // 2)
        total_q = total_q if op == "decode" else max(1, total_q // 2)
    edges = (0, 1, 63, 64, 65, 127, 129, page_size - 1, page_size, page_size + 1, 3 * page_size)
    steps = []
    for _ in range(count):
        kind = rng.choice(("uniform", "edges", "ragged", "one_long"))
        if kind == "uniform":
            kv_lens = [longest] * batch
        elif kind == "edges":
            kv_lens = [min(rng.choice(edges), longest) for _ in range(batch)]
        elif kind == "ragged":
            kv_lens = [
                round(math.exp(rng.uniform(0, math.log(longest + 1)))) - rng.choice((0, 1)) for _ in range(batch)
            ]
        else:
            kv_lens = [0] * batch
            kv_lens[rng.randrange(batch)] = longest
        steps.append(tuple(zip(_q_lens(rng, op, batch, total_q), kv_lens, strict=True)))
    return tuple(steps)


def _q_lens(rng: random.Random, op: str, batch: int, total_q: int) -> list[int]:
    if op == "decode":
        return [1] * batch
    bounds = sorted(rng.randint(0, total_q) for _ in range(batch - 1))
    return [end - begin for begin, end in itertools.pairwise([0, *bounds, total_q])]


# ------------------------------------------------------------------------------------------------ cases and verdicts


@dataclass
class Subject:
    """A case in the form its scenario wants: 16-bit, or the FP8 twin beside the 16-bit one."""

    case: DecodeCase
    fp8: Fp8Case | None
    lse_base: int | str

    def reset(self) -> None:
        self.case.guarded_out.reset()
        self.case.guarded_lse.reset()

    def call(self, entry: str, **options: Any) -> None:
        call = self.fp8.call if self.fp8 is not None else self.case.call
        call(entry, out=self.case.out, lse=self.case.lse, lse_base=self.lse_base, **options)

    def load(self, other: Subject) -> None:
        if self.fp8 is not None:
            assert other.fp8 is not None
            self.fp8.load(other.fp8)
        else:
            self.case.load(other.case)

    def expected(self) -> Expected:
        """Of the float32 reference on a GPU; on the CPU, where that is what runs, of an independent computation."""
        if self.case.out.is_cuda:
            if self.fp8 is not None:
                return expected_fp8(self.fp8, lse_base=self.lse_base)
            return expected_of(self.case, lse_base=self.lse_base)
        found = independent(self.case, self.fp8)
        return found if self.lse_base == 2 else dataclasses.replace(found, lse=found.lse * _LN_2)

    def judge(self, expected: Expected | None = None) -> Verdict:
        expected = self.expected() if expected is None else expected
        if self.fp8 is not None:
            assert isinstance(expected, Fp8Expected)
            return judge_fp8(self.fp8, expected)
        return judge(self.case, expected)

    def bits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What is in the outputs now, those parts that no request owns included."""
        return self.case.guarded_out.buffer.clone(), self.case.guarded_lse.buffer.clone()


def subject(scenario: Scenario, step: int, device: torch.device, **change: Any) -> Subject:
    """The case of a step, with room in its metadata and cache for every step of the scenario."""
    pages = [[-(-kv // scenario.page_size) for _, kv in requests] for requests in scenario.steps]
    used = max(sum(of_step) for of_step in pages)
    names = ("num_heads", "page_size", "dtype", "cache_layout", "q_layout", "out_layout", "shared_pages", "drift")
    options: dict[str, Any] = {name: getattr(scenario, name) for name in (*names, "index_offset")}
    options |= {
        "device": device,
        "seed": _MOST_STEPS * scenario.seed + step,
        "num_pages": used + max(3, used // 8),
        "num_indices": scenario.index_offset + used + 7,
        "max_pages": max(map(max, pages)) + 3,
    }
    options |= change
    requests = scenario.steps[step]
    case: DecodeCase
    if scenario.op == "prefill":
        total_q = sum(q for q, _ in requests) + SPARE_QUERIES
        case = make_prefill_case(requests, causal=scenario.causal, total_q=total_q, **options)
    else:
        case = make_case([kv for _, kv in requests], **options)
    fp8 = make_fp8(case, scenario.layout, scenario.q_fp8) if scenario.layout else None
    return Subject(case if fp8 is None else fp8.case, fp8, scenario.lse_base)


def plan_of(scenario: Scenario, case: DecodeCase) -> mla_cute.DecodePlan | mla_cute.PrefillPlan:
    return testing_runs.plan_of(
        case,
        scenario.entry,
        config=scenario.config,
        batch_invariant=scenario.batch_invariant,
        kv_format=scenario.layout.removesuffix("656"),
        q_fp8=scenario.q_fp8,
        other_metadata=scenario.kind == "layers",  # each layer's case has tensors of its own, of the same values
    )


# ------------------------------------------------------------------------------------------------ the kinds


def run_scenario(scenario: Scenario, device: torch.device) -> list[str]:
    """Run and judge a scenario; what is wrong, nothing if all is right."""
    run = {"repeat": _repeat, "replay": _replay, "layers": _layers, "streams": _streams}[scenario.kind]
    failures = list(run(scenario, device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return failures


def _options(scenario: Scenario, case: DecodeCase) -> dict[str, Any]:
    """Keywords of the call: its plan, or what it plans with."""
    if scenario.with_plan:
        return {"plan": plan_of(scenario, case)}
    return {"config": scenario.config, "batch_invariant": scenario.batch_invariant}


def _call(scenario: Scenario, it: Subject, options: dict[str, Any]) -> None:
    it.reset()
    it.call(scenario.entry, **options)


def _repeat(scenario: Scenario, device: torch.device) -> Iterator[str]:
    it = subject(scenario, 0, device)
    options = _options(scenario, it.case)
    _call(scenario, it, options)
    yield from it.judge().failures
    first = it.bits()
    _call(scenario, it, options)
    yield from _differences("the second call", first, it.bits())


def _replay(scenario: Scenario, device: torch.device) -> Iterator[str]:
    it = subject(scenario, 0, device)
    options = _options(scenario, it.case)

    def step() -> None:
        if (plan := options.get("plan")) is not None:
            plan.update()
        it.call(scenario.entry, **options)

    replay = testing_runs.capture(step)[0].replay if device.type == "cuda" else step
    for i in range(1, len(scenario.steps)):
        it.load(subject(scenario, i, device))
        it.reset()
        replay()
        yield from (f"replay {i}: {failure}" for failure in it.judge().failures)


def _layers(scenario: Scenario, device: torch.device) -> Iterator[str]:
    # The seed is the same, and so are the metadata; another layout draws other values.
    layers = [subject(scenario, 0, device, cache_layout=layout) for layout in CACHE_LAYOUTS]
    options = _options(scenario, layers[0].case)
    for layer in layers:
        _call(scenario, layer, options)
    for i, layer in enumerate(layers):
        yield from (f"layer {i}: {failure}" for failure in layer.judge().failures)


def _streams(scenario: Scenario, device: torch.device) -> Iterator[str]:
    both = [subject(scenario, i, device) for i in range(2)]
    options = [_options(scenario, it.case) for it in both]
    first = []
    for i, it in enumerate(both):
        _call(scenario, it, options[i])
        yield from (f"call {i} alone: {failure}" for failure in it.judge().failures)
        first.append(it.bits())
    streams: list[Any] = [None, None]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        streams = [torch.cuda.Stream() for _ in both]
    results: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[], []]
    for _ in range(_STREAM_ROUNDS):
        for i, it in enumerate(both):
            with torch.cuda.stream(streams[i]):
                if scenario.with_plan:
                    options[i]["plan"].update()
                _call(scenario, it, options[i])
                results[i].append(it.bits())
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    for i, found in enumerate(results):
        for turn, bits in enumerate(found):
            yield from _differences(f"call {i} beside the other, round {turn},", first[i], bits)


def _differences(what: str, want: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> Iterator[str]:
    for name, a, b in zip(("output", "lse"), want, got, strict=True):
        if count := int((a != b).sum()):
            yield f"{what} gave other bits in {count} elements of {name}"


# ------------------------------------------------------------------------------------------------ the run


def run(
    first: int,
    *,
    seconds: float = math.inf,
    cases: int | None = None,
    command: str = "mla-cute check --soak-seed {}",
    timeout: float = 180.0,
    say: Callable[[str], None] = print,
) -> int:
    """Run seeds from `first` on until `seconds` or `cases` are over. Returns the exit status: 0, or 1 for a failure.

    Args:
        command: runs one seed again, printed where one fails.
        timeout: seconds that one case may take on a GPU, compiling included, before it counts as hung.
        say: gets each line.
    """
    why = gpu_facts.why_not_hopper()
    device = torch.device("cpu") if why else torch.device("cuda", torch.cuda.current_device())
    if why:
        say(
            f"Soaking the CPU path ({why}): what runs is the float32 reference, judged by an independent float64 "
            "computation; no kernel, graph or stream is tried."
        )
    else:
        say(f"Soaking the kernels on {torch.cuda.get_device_name(device)} against the float32 reference.")
    say(f"first seed {first}")
    start = shown = time.monotonic()
    done: Counter[str] = Counter()
    failed: list[int] = []
    with Watchdog(timeout, enabled=device.type == "cuda") as watchdog:
        for seed in itertools.count(first):
            now = time.monotonic()
            if now - start >= seconds or len(failed) >= _MOST_FAILURES or (cases is not None and done.total() >= cases):
                break
            scenario = draw(seed, device.type == "cuda")
            if now - shown >= _SECONDS_PER_LINE or done.total() == 0:
                shown = now
                say(f"[{now - start:.0f} s] {done.total()} cases, {len(failed)} failed; seed {seed}: {scenario}")
            watchdog.feed(f"seed {seed} ({command.format(seed)})")
            failures, alive = _attempt(scenario, device)
            done.update((scenario.op,))
            if failures:
                failed.append(seed)
                say(f"FAILED seed {seed}: {scenario}")
                for failure in failures[:5]:
                    say(f"    {failure}")
                say(f"    again: {command.format(seed)}")
            if not alive:
                say("the GPU is lost to this process, the run ends")
                break
    counts = ", ".join(f"{name} {count}" for name, count in sorted(done.items()))
    say(f"{done.total()} cases ({counts}) in {time.monotonic() - start:.0f} s, {len(failed)} failed")
    return 1 if failed else 0


def _attempt(scenario: Scenario, device: torch.device) -> tuple[list[str], bool]:
    """(what is wrong, whether the device can go on)."""
    try:
        return run_scenario(scenario, device), True
    except Exception:
        failures = [line for line in traceback.format_exc().splitlines() if line.strip()][-5:]
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return failures, False
    return failures, True


def random_seed() -> int:
    """A seed to begin with, the first of those that share a variant."""
    return random.SystemRandom().randrange(10**6) * _VARIANT_SEEDS


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mla_cute.cli.soak", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("time", nargs="?", type=parse_budget, default=math.inf, help="how long, as 90s, 5m or 1h")
    parser.add_argument("--seed", type=int, help="run this seed alone")
    parser.add_argument("--first", type=int, help="begin with this seed instead of a random one")
    parser.add_argument("--cases", type=int, help="end after so many cases")
    parser.add_argument("--timeout", type=parse_seconds, default=180.0, help="seconds after which a GPU's case is hung")
    chosen = parser.parse_args(arguments)
    first, cases = chosen.first, chosen.cases
    if chosen.seed is not None:
        first, cases = chosen.seed, 1
    elif chosen.time == math.inf and cases is None:
        parser.error("say how long (5m), how many cases (--cases), or which seed (--seed)")
    return run(
        random_seed() if first is None else first,
        seconds=chosen.time,
        cases=cases,
        command="python -m mla_cute.cli.soak --seed {}",
        timeout=chosen.timeout,
        say=lambda text: print(text, flush=True),
    )


if __name__ == "__main__":
    sys.exit(main())
