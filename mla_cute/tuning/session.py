"""A tuning run: many shapes, one after the other, under a budget; what is done is kept, whatever comes."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from ..bench.cases import TOKEN_BYTES
from ..config import KernelConfig, differences
from ..gpu_speed import GpuSpeed
from ..tuned import select
from ..tuned.select import TunedFile, When
from . import cost, pairs, search, space
from .recipes import coarse_first
from .search import Measurer, StartError
from .space import Variant
from .store import Measured, Store

# How long a shape is taken to need while none has been timed: decides whether another one fits the budget.
FIRST_SHAPE_S = 4.0
# The share of the budget that compiling may take; what is not compiled by then is left out. The kernels of the default
# configurations may take more, since a shape cannot be tuned without its default.
COMPILE_SHARE = 0.5
DEFAULTS_SHARE = 0.8

Compile = Callable[[Iterable[Variant], Callable[[int, int], bool]], Mapping[Variant, str]]


class Screen(Protocol):
    """Where a run says how far it is."""

    def say(self, text: str) -> None:
        """A line that stays."""

    def step(self, done: int, total: int, label: str, seconds_left: float | None) -> None:
        """The state of the moment; `seconds_left` is None while nothing is known."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What to tune and where to.

    speed       of the GPU, which its default configurations follow from
    budget_s    wall time for everything; math.inf: no end
    digest      of the sources; a shape measured with another one is measured again
    policy      of search.POLICIES; as digest
    """

    whens: Sequence[When]
    dtype: str
    out: pathlib.Path
    measurements: pathlib.Path
    gpu: dict[str, Any]
    speed: GpuSpeed
    made_with: dict[str, Any]
    digest: str
    budget_s: float = math.inf
    policy: str = "graph"


@dataclasses.dataclass
class Outcome:
    """Shapes by what became of them."""

    tuned: list[Measured] = dataclasses.field(default_factory=list)
    failed: list[Measured] = dataclasses.field(default_factory=list)
    resumed: list[When] = dataclasses.field(default_factory=list)
    left_out: list[When] = dataclasses.field(default_factory=list)
    interrupted: bool = False
    error: str = ""  # what ended the run early


def open_store(task: Task) -> Store:
    """The measurements file of a task. ValueError when that or the tuned file is damaged or another GPU's."""
    store = Store(task.measurements, task.gpu)
    if task.out.exists():
        select.merge(task.out, TunedFile(task.gpu, task.made_with, ()))
    return store


def run(
    task: Task,
    store: Store,
    measurer: Measurer,
    compile_variants: Compile,
    screen: Screen,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Tune the shapes of `task` that are not done, coarsely first. Every shape is in both files when the next begins;
    Ctrl-C, the budget or a measuring process that cannot be started again end the run."""
    deadline = clock() + task.budget_s
    ordered = coarse_first(task.whens)
    outcome = Outcome(resumed=[when for when in ordered if _is_done(store, task, when)])
    _merge(task, store, [store.shapes[when, task.dtype] for when in outcome.resumed])
    outcome.left_out = [when for when in ordered if when not in set(outcome.resumed)]
    if outcome.resumed:
        screen.say(f"{len(outcome.resumed)} of {len(ordered)} shapes are in {task.measurements} already")
    try:
        _tune(task, store, outcome, measurer, compile_variants, screen, clock, deadline)
    except KeyboardInterrupt:
        outcome.interrupted = True
    except StartError as error:
        outcome.error = str(error)
    return outcome


def _is_done(store: Store, task: Task, when: When) -> bool:
    shape = store.shapes.get((when, task.dtype))
    if shape is None or shape.chosen is None:
        return False
    return (shape.source_sha256, shape.policy) == (task.digest, task.policy)


def _merge(task: Task, store: Store, shapes: Sequence[Measured]) -> None:
    if entries := pairs.entries(shapes, store.shapes, task.speed.sm_count):
        select.merge(task.out, TunedFile(task.gpu, task.made_with, entries))


def _tune(
    task: Task,
    store: Store,
    outcome: Outcome,
    measurer: Measurer,
    compile_variants: Compile,
    screen: Screen,
    clock: Callable[[], float],
    deadline: float,
) -> None:
    todo = list(outcome.left_out)
    if not todo:
        return
    found = {when: cost.choose(when, space.candidates(when, task.speed), task.speed) for when in todo}
    timed = {when: chosen.timed for when, chosen in found.items()}
    missing = _compile(task, timed, compile_variants, screen, clock, deadline)
    took: list[float] = []
    for done, when in enumerate(todo):
        each = sum(took) / len(took) if took else FIRST_SHAPE_S
        now = clock()
        if now + each > deadline:
            return
        left = min((len(todo) - done) * each, deadline - now) if took else None
        unfit = {config: why for config in timed[when] if (why := _why_missing(task, when, config, missing))}

        def step(live: int) -> None:
            screen.step(done, len(todo), f"{when}: {live} of {len(timed[when])} candidates", left)

        if unfit.get(timed[when][0]) == search.NO_TIME:
            continue  # left out: the same command goes on with it
        step(len(timed[when]) - len(unfit))
        pruned, model_us = found[when].pruned, found[when].us
        unfit |= dict.fromkeys(pruned, search.PRUNED)
        result = search.tune_shape(measurer, when, [*timed[when], *pruned], unfit, step, task.policy, model_us)
        shape = Measured.of(when, task.dtype, task.digest, task.made_with, clock() - now, result, task.policy)
        store.add(shape)
        outcome.left_out.remove(when)
        (outcome.failed if shape.chosen is None else outcome.tuned).append(shape)
        _merge(task, store, [shape])
        screen.say(line(shape))
        took.append(clock() - now)
    screen.step(len(todo), len(todo), "done", 0.0)


def _compile(
    task: Task,
    candidates: Mapping[When, Sequence[KernelConfig]],
    compile_variants: Compile,
    screen: Screen,
    clock: Callable[[], float],
    deadline: float,
) -> Mapping[Variant, str]:
    """Kernels of the defaults first: a shape without its default cannot be tuned."""
    defaults = [v for when, found in candidates.items() for v in space.variants_of(when, found[0], task.dtype)]
    others = [v for when, found in candidates.items() for c in found for v in space.variants_of(when, c, task.dtype)]
    begin, num_defaults = clock(), len(dict.fromkeys(defaults))

    def step(done: int, total: int) -> bool:
        spent = clock() - begin
        screen.step(done, total, "compiling kernels", spent / done * (total - done))
        share = DEFAULTS_SHARE if done < num_defaults else COMPILE_SHARE
        return clock() < begin + share * (deadline - begin)

    missing = compile_variants([*defaults, *others], step)
    for (kernel, key, launch), why in missing.items():
        screen.say(f"{getattr(kernel, 'name', kernel)} {key!r} {launch!r}: {why}")
    return missing


def _why_missing(task: Task, when: When, config: KernelConfig, missing: Mapping[Variant, str]) -> str:
    return next((missing[v] for v in space.variants_of(when, config, task.dtype) if v in missing), "")


def line(shape: Measured) -> str:
    """One tuned shape in one line."""
    if shape.chosen is None:
        return f"FAILED {shape.when}: {shape.why}"
    bad = sum(not trial["verdict"].startswith(search.ORDINARY) for trial in shape.candidates)
    tail = f"; {bad} candidates failed" if bad else ""
    default = KernelConfig.from_dict(shape.candidates[0]["config"])
    if shape.chosen == default:
        return f"{shape.when}: the default, {shape.us:.1f} us{tail}"
    changed = ", ".join(f"{name}={value!r}" for name, value in differences(shape.chosen, default).items())
    return f"{shape.when}: {shape.default_us:.1f} -> {shape.us:.1f} us ({shape.gain:.3f}x), {changed}{tail}"


def summary(outcome: Outcome) -> list[str]:
    """What became of the shapes, for the end of a run."""
    lines = [
        f"{len(outcome.tuned)} shapes tuned, {len(outcome.resumed)} were done before, {len(outcome.failed)} failed"
    ]
    if outcome.left_out:
        why = "interrupted" if outcome.interrupted else outcome.error or "the budget is spent"
        lines.append(f"{len(outcome.left_out)} shapes left out, {why}; the same command goes on with them:")
        groups: dict[str, int] = {}
        for when in outcome.left_out:
            name = group_of(when)
            groups[name] = groups.get(name, 0) + 1
        lines += [f"  {count} of {name}" for name, count in groups.items()]
    return lines


def group_of(when: When) -> str:
    """Op and cache of a shape: "decode, 16-bit cache", "decode, group FP8, q e4m3"."""
    assert when.kv_format in TOKEN_BYTES
    cache = f"{when.kv_format} FP8, q {'e4m3' if when.q_fp8 else '16 bit'}" if when.kv_format else "16-bit cache"
    return f"{when.op}, {cache}" + (", ragged" if when.lengths == "ragged" else "")
