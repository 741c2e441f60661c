"""`mla-cute check --soak 5m`: random calls, each judged, until the time is over.

Also `python -m mla_cute.cli.soak 5m`, which needs neither typer nor rich.

soak_draw.py says what a seed does; here are its cases, what is done with them, and the run.
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
from ..testing import runs as testing_runs
from ..testing.cases import CACHE_LAYOUTS, DecodeCase, make_case
from ..testing.fp8 import Fp8Case, make_fp8
from ..testing.prefill import SPARE_QUERIES, make_prefill_case
from ..testing.sparse import (
    Lists,
    as_page_lists,
    call_sparse,
    expected_sparse,
    judge_sparse,
    random_lists,
    sinks_of,
    with_sink,
)
from ..testing.verdict import Expected, Verdict
from ..tuning.options import parse_budget
from .check import independent
from .soak_draw import MOST_STEPS, VARIANT_SEEDS, Scenario, draw
from .watchdog import Watchdog, parse_seconds

_STREAM_ROUNDS = 6
_MOST_FAILURES = 10
_SECONDS_PER_LINE = 10.0
_LN_2 = math.log(2)


# ------------------------------------------------------------------------------------------------ cases and verdicts


@dataclass
class Subject:
    """A case in the form its scenario wants: 16-bit, or the FP8 twin beside the 16-bit one. `lists` and `sink` are
    those of "sparse"."""

    case: DecodeCase
    fp8: Fp8Case | None
    lse_base: int | str
    as_none: bool = False
    lists: Lists | None = None
    sink: torch.Tensor | None = None

    @property
    def given(self) -> DecodeCase | Fp8Case:
        return self.case if self.fp8 is None else self.fp8

    def reset(self) -> None:
        self.case.guarded_out.reset()
        self.case.guarded_lse.reset()

    def call(self, entry: str, **options: Any) -> None:
        options |= {"out": self.case.out, "lse": self.case.lse, "lse_base": self.lse_base}
        given = _without_rope(self.given) if self.as_none else self.given
        if self.lists is None:
            given.call(entry, **options)
            return
        if entry == "all_columns":
            options["topk_lens"] = None
        call_sparse(given, self.lists, sink=self.sink, **options)

    def load(self, other: Subject) -> None:
        if self.fp8 is not None:
            assert other.fp8 is not None
            self.fp8.load(other.fp8)
        else:
            self.case.load(other.case)
        if self.lists is not None:
            assert other.lists is not None
            self.lists.load(other.lists)
        if self.sink is not None:
            assert other.sink is not None
            self.sink.copy_(other.sink)

    def expected(self) -> Expected:
        """Of the float32 reference on a GPU; on the CPU, where that is what runs, of an independent computation. It
        knows nothing of sinks."""
        given = self.given if self.lists is None else as_page_lists(self.given, self.lists)
        if self.case.out.is_cuda:
            return expected_sparse(given, lse_base=self.lse_base)
        found = independent(given.case, given) if isinstance(given, Fp8Case) else independent(given)
        return found if self.lse_base == 2 else dataclasses.replace(found, lse=found.lse * _LN_2)

    def judge(self, expected: Expected | None = None) -> Verdict:
        expected = self.expected() if expected is None else expected
        if self.sink is not None:
            expected = with_sink(expected, self.sink, self.lse_base, of_lse=self.case.lse)
        return judge_sparse(self.given, expected)

    def bits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What is in the outputs now, those parts that no request owns included."""
        return self.case.guarded_out.buffer.clone(), self.case.guarded_lse.buffer.clone()


def _without_rope(given: DecodeCase | Fp8Case) -> DecodeCase | Fp8Case:
    """With None in the place of tensors of width 0."""
    rope: dict[str, Any] = {"q_pe": None, "kpe_cache": None}
    if isinstance(given, Fp8Case):
        return dataclasses.replace(given, case=dataclasses.replace(given.case, **rope))
    return dataclasses.replace(given, **rope)


def subject(scenario: Scenario, step: int, device: torch.device, layer: int = 0, **change: Any) -> Subject:
    """The case of a step, with room in its metadata and cache for every step of the scenario. Lists of other `layer`s
    are as long and of other tokens."""
    pages = [[-(-kv // scenario.page_size) for _, kv in requests] for requests in scenario.steps]
    used = max(sum(of_step) for of_step in pages)
    names = ("num_heads", "page_size", "dtype", "cache_layout", "q_layout", "out_layout", "shared_pages", "drift")
    options: dict[str, Any] = {name: getattr(scenario, name) for name in (*names, "index_offset", "dims")}
    seed = MOST_STEPS * scenario.seed + step
    options |= {
        "device": device,
        "seed": seed,
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
    it = Subject(case if fp8 is None else fp8.case, fp8, scenario.lse_base, scenario.as_none)
    if scenario.op == "sparse":
        ragged = scenario.entry == "topk_lens"
        it.lists = random_lists(it.case, scenario.topk, ragged=ragged, seed=seed, layer=layer)
        it.sink = sinks_of(it.case, seed + layer) if scenario.sinks else None
    return it


def plan_of(scenario: Scenario, it: Subject) -> mla_cute.DecodePlan | mla_cute.PrefillPlan:
    options: dict[str, Any] = {
        "config": scenario.config,
        "batch_invariant": scenario.batch_invariant,
        "kv_format": scenario.layout.removesuffix("656"),
        "q_fp8": scenario.q_fp8,
        "other_metadata": scenario.kind == "layers",  # each layer's case has tensors of its own, of the same values
    }
    if scenario.op == "prefill":
        options["max_q_len"] = scenario.max_q_len
    if it.lists is None:
        return testing_runs.plan_of(it.case, scenario.entry, **options)
    topk_lens = None if scenario.entry == "all_columns" else it.lists.topk_lens
    return mla_cute.plan_sparse(it.lists.indices, num_heads=scenario.num_heads, topk_lens=topk_lens, **options)


# ------------------------------------------------------------------------------------------------ the kinds


def run_scenario(scenario: Scenario, device: torch.device) -> list[str]:
    """Run and judge a scenario; what is wrong, nothing if all is right."""
    run = {"repeat": _repeat, "replay": _replay, "layers": _layers, "streams": _streams}[scenario.kind]
    failures = list(run(scenario, device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return failures


def _options(scenario: Scenario, it: Subject) -> dict[str, Any]:
    """Keywords of the call: its plan, or what it plans with."""
    if scenario.with_plan:
        return {"plan": plan_of(scenario, it)}
    return {"config": scenario.config, "batch_invariant": scenario.batch_invariant}


def _call(scenario: Scenario, it: Subject, options: dict[str, Any]) -> None:
    it.reset()
    it.call(scenario.entry, **options)


def _repeat(scenario: Scenario, device: torch.device) -> Iterator[str]:
    it = subject(scenario, 0, device)
    options = _options(scenario, it)
    _call(scenario, it, options)
    yield from it.judge().failures
    first = it.bits()
    _call(scenario, it, options)
    yield from _differences("the second call", first, it.bits())


def _replay(scenario: Scenario, device: torch.device) -> Iterator[str]:
    it = subject(scenario, 0, device)
    options = _options(scenario, it)

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
    layers = [subject(scenario, 0, device, layer, cache_layout=layout) for layer, layout in enumerate(CACHE_LAYOUTS)]
    options = _options(scenario, layers[0])
    for layer in layers:
        _call(scenario, layer, options)
    for i, layer in enumerate(layers):
        yield from (f"layer {i}: {failure}" for failure in layer.judge().failures)


def _streams(scenario: Scenario, device: torch.device) -> Iterator[str]:
    both = [subject(scenario, i, device) for i in range(2)]
    options = [_options(scenario, it) for it in both]
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
    return random.SystemRandom().randrange(10**6) * VARIANT_SEEDS


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
