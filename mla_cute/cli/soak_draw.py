"""What a seed of the soak (soak.py) does: `draw` gives its `Scenario`.

A scenario follows from its seed and from whether there is a GPU, and from nothing else. `VARIANT_SEEDS` seeds in a row
share page-size class, dtype, cache format and head dimensions, so that a run with an empty kernel cache does not
compile all the time.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from dataclasses import dataclass

import torch

from ..config import KERNELS, KernelConfig
from ..dims import HEAD_DIMS, HeadDims
from ..kernels.registry import has_format
from ..testing.cases import CACHE_LAYOUTS, OUT_LAYOUTS, Q_LAYOUTS
from ..testing.fp8 import LAYOUTS as FP8_LAYOUTS

OPS = ("decode", "prefill", "sparse")
KINDS = ("repeat", "replay", "layers", "streams")
# The public calls of an op, by the metadata that they are given. "all_columns": lists without topk_lens.
ENTRIES = {
    "decode": ("csr", "block_table"),
    "prefill": ("csr", "block_table"),
    "sparse": ("topk_lens", "all_columns"),
}
HEADS = (1, 2, 5, 8, 12, 16, 17, 24, 32, 48, 64, 65, 80, 96, 127, 128)
# By rows of a TMA box, 0 for the gather (kernels/registry.py).
PAGE_SIZES = {64: (64, 128, 192), 32: (32, 96), 16: (16, 48), 8: (8, 24), 0: (1, 2, 3, 4, 100)}

VARIANT_SEEDS = 40
REPLAYS = 3
MOST_STEPS = 1 + REPLAYS
# Products of query rows and keys of a step: the reference takes about 0.1 s for these on an H200, and on two CPU cores.
MOST_SCORES = {True: 1 << 30, False: 1 << 20}
_MOST_KEYS = {True: 20000, False: 500}
_MOST_REQUESTS = {True: 40, False: 6}

Request = tuple[int, int]  # (query tokens, keys)


@dataclass(frozen=True)
class Scenario:
    """What one seed does.

    op       "decode", "prefill", or "sparse": lists of the tokens that each request has, drawn at random
    kind     "repeat": one call, twice. "replay": a CUDA graph of plan update and call, replayed over `steps` with the
             same buffers. "layers": calls over other caches that share a plan. "streams": two calls on two streams at
             once, again and again
    layout   "" for a 16-bit cache, else one of `testing.fp8.LAYOUTS`
    steps    requests of each call; they have as many requests and query tokens each
    topk     columns of the lists of "sparse"
    as_none  a rope part of no channels is given as None
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
    dims: HeadDims = HeadDims()
    as_none: bool = False
    topk: int = 0
    sinks: bool = False

    @property
    def max_q_len(self) -> int:
        """Query tokens that no request of a step has more of, which plans are told."""
        return max(q for step in self.steps for q, _ in step)

    def __str__(self) -> str:
        longest = max((kv for step in self.steps for _, kv in step), default=0)
        queries = sum(q for q, _ in self.steps[0])
        tokens = {
            "decode": "",
            "prefill": f", {queries} query tokens{'' if self.causal else ', not causal'}",
            "sparse": f", lists of {self.topk}{', sinks' if self.sinks else ''}",
        }[self.op]
        dtype = str(self.dtype).removeprefix("torch.")
        cache = f"{dtype}, {self.layout or '16-bit'} cache{', e4m3 queries' if self.q_fp8 else ''}"
        if self.dims != HeadDims():
            cache += f", {self.dims} channels{', None for the rope part' if self.as_none else ''}"
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
    variant = random.Random(f"variant {seed // VARIANT_SEEDS}")
    page_size_of = PAGE_SIZES[variant.choice(list(PAGE_SIZES))]
    dtype = variant.choice((torch.bfloat16, torch.bfloat16, torch.float16))
    layout = variant.choice(("", "", *FP8_LAYOUTS))
    q_fp8 = bool(layout) and variant.random() < 0.4
    # Half of the variants have DeepSeek's head dimensions where the format of the cache leaves a choice.
    dims = variant.choice((*(HeadDims() for _ in HEAD_DIMS[1:]), *HEAD_DIMS[1:]))
    dims = dims if has_format(dims, layout.removesuffix("656")) else HeadDims()

    rng = random.Random(f"case {seed}")
    op = rng.choice(OPS)
    kind = rng.choice(KINDS)
    page_size, num_heads = rng.choice(page_size_of), rng.choice(HEADS)
    lines = {"repeat": 1, "replay": 1 + REPLAYS, "layers": 1, "streams": 2}[kind]
    steps = _steps(rng, op, lines, page_size, num_heads, on_gpu)
    drift = rng.choice((0.0, 0.0, 60.0, -60.0))
    scenario = Scenario(
        seed=seed,
        op=op,
        kind=kind,
        num_heads=num_heads,
        page_size=page_size,
        dtype=dtype,
        layout=layout,
        q_fp8=q_fp8,
        steps=steps,
        causal=op == "prefill" and rng.random() < 0.75,
        cache_layout=rng.choice(CACHE_LAYOUTS),
        q_layout=rng.choice(Q_LAYOUTS),
        out_layout=rng.choice(OUT_LAYOUTS),
        shared_pages=rng.choice((0, 0, 1, 1000)),
        drift=drift,
        index_offset=rng.choice((0, 0, 3)),
        entry=rng.choice(ENTRIES[op]),
        with_plan=kind == "layers" or rng.random() < 0.7,
        batch_invariant=rng.random() < 0.25,
        lse_base=rng.choice((2, 2, "e")),
        config=_config(rng),
        dims=dims,
        as_none=dims.kpe == 0 and rng.random() < 0.5,
        topk=_topk(rng, len(steps[0]), num_heads, on_gpu) if op == "sparse" else 0,
        sinks=op == "sparse" and _may_have_sinks(dtype, layout, drift) and rng.random() < 0.5,
    )
    if scenario.config is not None and _may_convert(scenario) and rng.random() < 0.5:
        config = dataclasses.replace(scenario.config, fp8_kernel="convert")
        scenario = dataclasses.replace(scenario, config=config)
    return scenario


def _may_convert(scenario: Scenario) -> bool:
    """Not where converting rounds, which verdicts do not allow for: other formats than "group" have scales that are no
    powers of two here, and so have e4m3 queries."""
    return scenario.op == "prefill" and scenario.layout.startswith("group") and not scenario.q_fp8


def _may_have_sinks(dtype: torch.dtype, layout: str, drift: float) -> bool:
    """Not where a sink may lie so far above every score that what it leaves of an output is smaller than the dtype's
    smallest normal number, which a right result would be refused for: float16 over an FP8 cache, whose verdict does not
    allow for the dtype's rounding, and lists that have only tokens of scores down to -60."""
    return not (layout and dtype is torch.float16) and drift >= 0


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


def _topk(rng: random.Random, num_lists: int, num_heads: int, on_gpu: bool) -> int:
    most = min(_MOST_KEYS[on_gpu], MOST_SCORES[on_gpu] // (num_heads * num_lists))
    anywhere = round(math.exp(rng.uniform(0, math.log(most))))
    return min(most, rng.choice((1, 63, 64, 65, 127, 128, 129, 512, 2048, *(5 * (anywhere,)))))


def _steps(
    rng: random.Random, op: str, count: int, page_size: int, num_heads: int, on_gpu: bool
) -> tuple[tuple[Request, ...], ...]:
    batch = max(1, round(math.exp(rng.uniform(0, math.log(_MOST_REQUESTS[on_gpu])))))
    longest = round(math.exp(rng.uniform(0, math.log(_MOST_KEYS[on_gpu]))))
    total_q = rng.choice((batch, 2 * batch, *((64, 300) if on_gpu else (12, 20)))) if op == "prefill" else batch
    while num_heads * total_q * longest > MOST_SCORES[on_gpu]:
        longest = max(1, longest // 2)
        total_q = max(1, total_q // 2) if op == "prefill" else total_q
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
    if op != "prefill":
        return [1] * batch
    bounds = sorted(rng.randint(0, total_q) for _ in range(batch - 1))
    return [end - begin for begin, end in itertools.pairwise([0, *bounds, total_q])]
