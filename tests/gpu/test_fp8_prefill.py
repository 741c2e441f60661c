"""Prefill over FP8 caches on the GPU against the float32 reference on the dequantised cache: poisoned inputs and
guarded outputs in every test."""

import dataclasses
import math
import random

import pytest
import torch
from gpu_helpers import ENTRIES, MIXED, capture, owned, plan_of, same_bits
from gpu_helpers import check_fp8 as check

import mla_cute
from mla_cute.kernels.registry import box_rows_of
from mla_cute.testing.cases import CACHE_LAYOUTS, OUT_LAYOUTS, Q_LAYOUTS, DecodeCase, run_case
from mla_cute.testing.fp8 import LAYOUTS, Fp8Case, compare_fp8, expected_fp8, judge_fp8, make_fp8
from mla_cute.testing.prefill import make_prefill_case

# What these tests compile: (dtype, box rows, format, e4m3 queries).
BF16, FP16 = torch.bfloat16, torch.float16
VARIANTS = (
    (BF16, 64, "tensor", False),
    (BF16, 64, "tensor", True),
    (BF16, 64, "token", False),
    (BF16, 64, "group", False),
    (BF16, 64, "group", True),
    (BF16, 16, "tensor", True),
    (FP16, 16, "token", False),
    (BF16, 0, "tensor", False),
    (BF16, 0, "token", True),
    (FP16, 0, "group", False),
)
PAGE_SIZES = {64: 64, 16: 16, 0: 1}
HEADS = (8, 16, 128)
# Of full boxes, in every layout.
FULL = (
    ("tensor", False),
    ("tensor", True),
    ("token", False),
    ("group", False),
    ("group", True),
    ("group656", False),
    ("group656", True),
)

BOTH_ENTRIES = pytest.mark.parametrize("entry", ENTRIES)
BOTH_MODES = pytest.mark.parametrize("batch_invariant", [False, True], ids=["balanced", "invariant"])
EVERY_FULL = pytest.mark.parametrize(("layout", "q_fp8"), FULL)
# Converting the cache rounds products with scales that are no powers of two (test_convert.py).
OVER_FP8 = mla_cute.KernelConfig(fp8_kernel="tile64")


def make(layout, q_fp8, requests, num_heads=16, page_size=64, dtype=BF16, prepare=None, fp8=None, **kwargs) -> Fp8Case:
    """A case of one of VARIANTS; `prepare` changes the 16-bit case before it is quantised."""
    assert (dtype, box_rows_of(page_size), layout.removesuffix("656"), q_fp8) in VARIANTS
    sizes = {"num_heads": num_heads, "page_size": page_size}
    case = make_prefill_case(requests, dtype=dtype, device="cuda", **sizes, **kwargs)
    if prepare is not None:
        prepare(case)
    return make_fp8(case, layout, q_fp8, **fp8 or {})


def check_same(fp8: Fp8Case, want, **kwargs) -> None:
    """Run again: same bits, and no row written that nobody owns."""
    fp8.reset()
    case = fp8.case
    fp8.call(out=case.out, lse=case.lse, **kwargs)
    for got, expected in zip(owned(case), want, strict=True):
        assert same_bits(got, expected)
    assert case.guarded_out.intact(case.queries[-1])
    assert case.guarded_lse.intact(case.queries[-1])


def put_scales(fp8: Fp8Case, b: int, values: torch.Tensor) -> None:
    """`values` [length] or [length, 1 or n] as the scales of request b."""
    array = fp8.scales["ckv_scale_arr"]
    array[fp8.slots(b)] = values.to("cuda").reshape(len(values), -1).expand(-1, array.shape[-1])


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("num_heads", "q_len"), [(16, 2), (8, 4), (5, 6), (32, 1)])
@EVERY_FULL
def test_drafts_of_few_rows(layout, q_fp8, num_heads, q_len, causal):
    """By the kernel for up to 32 rows of a request, which the plan is told of, and by the other: right; uncut and cut
    requests, some of fewer tokens or none, through both forms of metadata, repeated and updated."""
    q_lens = [q_len, 1, q_len, 0, q_len, q_len, 1, q_len]
    requests = list(zip(q_lens, [8192, 1, 65, 70, 0, q_len, 1000, 20000], strict=True))
    fp8 = make(layout, q_fp8, requests, num_heads, causal=causal)
    expected = expected_fp8(fp8)
    for entry in ENTRIES:
        hints = {"kv_format": fp8.kv_format, "q_fp8": q_fp8}
        for options in ({"max_q_len": q_len}, {}, {"max_q_len": q_len, "batch_invariant": True}):
            plan = plan_of(fp8.case, entry, **hints | options)
            assert plan.has_few_rows == (options == {"max_q_len": q_len})
            check(fp8, expected=expected, entry=entry, plan=plan)
            want = owned(fp8.case)
            check_same(fp8, want, entry=entry, plan=plan.update())


@pytest.mark.parametrize("layout", ["tensor", "token", "group"])
def test_drafts_of_few_rows_in_a_graph(layout):
    """A captured step with few rows follows lengths and queries."""
    room = {"total_q": 80, "num_pages": 2000, "num_indices": 2000, "max_pages": 50}
    first, second = (
        make(layout, False, [(1 + (b + i) % 2, 700 * ((b + i) % 5) + 2) for b in range(40)], 16, seed=i, **room)
        for i in range(2)
    )
    plan = plan_of(first.case, "block_table", kv_format=first.kv_format, max_q_len=2)
    assert plan.has_few_rows

    def run():
        plan.update()
        return first.call("block_table", plan=plan, out=first.case.out, lse=first.case.lse)

    graph, _ = capture(run)
    for fp8 in (first, second):
        first.load(fp8)
        first.reset()
        graph.replay()
        assert judge_fp8(first, expected_fp8(first)).ok


@dataclasses.dataclass(frozen=True)
class Spec:
    """A case by its parameters; `make` builds it."""

    dtype: torch.dtype
    page_size: int
    layout: str
    q_fp8: bool
    num_heads: int
    causal: bool
    requests: tuple[tuple[int, int], ...]
    drift: float
    cache_layout: str
    q_layout: str
    out_layout: str
    seed: int

    def __str__(self) -> str:
        dtype = "bf16" if self.dtype is BF16 else "fp16"
        name = f"{self.layout}-{'q_e4m3-' if self.q_fp8 else ''}{dtype}-h{self.num_heads}-page{self.page_size}"
        mask = "causal" if self.causal else "full"
        return f"{name}-{mask}-{self.cache_layout}-q_{self.q_layout}-out_{self.out_layout}-drift{self.drift:g}"

    def make(self) -> Fp8Case:
        own = ("layout", "q_fp8", "requests")
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in own}
        return make(self.layout, self.q_fp8, self.requests, **options)


def sweep() -> list[Spec]:
    """Every variant with every head count, causal and not: 60 steps of prompts, chunks, MTP and single tokens."""
    specs = []
    for v, (dtype, box, kv_format, q_fp8) in enumerate(VARIANTS):
        for i, (num_heads, causal) in enumerate((h, c) for h in HEADS for c in (True, False)):
            k = 6 * v + i
            page_size = PAGE_SIZES[box]
            long = (129, 3000) if num_heads < 128 else (65, 1500)
            edges = [(5, page_size), (9, page_size + 1), (33, 3 * page_size + 32)]
            mtp = [(2 + k % 7, 2000), (2 + (k + 3) % 7, 127 + k), (8, 8)]
            single = [(1, 0), (1, 1), (1, 64), (1, 129), (1, 1000)]
            blind = [(0, 0), (0, 77), (33, 0), (90, 60), (3, 1)]
            requests = [(300, 300) if i % 2 else (131, 131), (65, 65), long, *edges, *mtp, *single, *blind]
            random.Random(k).shuffle(requests)
            specs.append(
                Spec(
                    dtype=dtype,
                    page_size=page_size,
                    layout="group656" if kv_format == "group" and (i + v) % 3 == 0 else kv_format,
                    q_fp8=q_fp8,
                    num_heads=num_heads,
                    causal=causal,
                    requests=tuple(requests),
                    drift=(0.0, 0.0, 60.0, 0.0, -60.0)[k % 5],
                    cache_layout=CACHE_LAYOUTS[(k + k // 4) % len(CACHE_LAYOUTS)],
                    q_layout=Q_LAYOUTS[(k + k // 6) % len(Q_LAYOUTS)],
                    out_layout=OUT_LAYOUTS[(k // 3) % len(OUT_LAYOUTS)],
                    seed=k,
                )
            )
    assert {spec.layout for spec in specs} == set(LAYOUTS)
    assert len({str(spec) for spec in specs}) == len(specs) == 60
    return specs


@pytest.mark.parametrize("spec", sweep(), ids=str)
def test_sweep(spec):
    """Right, with a plan and through the block table the same bits, and right when batch-invariant."""
    fp8 = spec.make()
    expected = expected_fp8(fp8)
    check(fp8, expected=expected)
    want = owned(fp8.case)
    check_same(fp8, want, entry="block_table", plan=plan_of(fp8.case, "block_table"))
    ln2 = math.log(2)
    in_e = dataclasses.replace(expected, lse=expected.lse * ln2, score_rounding=expected.score_rounding * ln2)
    check(fp8, expected=in_e, batch_invariant=True, lse_base="e")


@pytest.mark.parametrize("num_heads", [8, 12, 128])
@EVERY_FULL
def test_every_mask_edge(layout, q_fp8, num_heads):
    """The diagonal at every offset inside a pair of blocks; 12 heads split tokens between row tiles."""
    check(make(layout, q_fp8, [(1 + d % 17, 100 + d % 17 + d) for d in range(140)], num_heads))


@BOTH_MODES
@pytest.mark.parametrize(("layout", "q_fp8"), [("tensor", False), ("tensor", True), ("token", False), ("group", True)])
def test_long_contexts(layout, q_fp8, batch_invariant):
    requests = [(q, n) for q in range(2, 9) for n in (q, 64, 65, 2000)] + [(257, 5000), (33, 20000), (4, 30000)]
    check(make(layout, q_fp8, requests), batch_invariant=batch_invariant)


@EVERY_FULL
def test_more_row_tiles_than_a_round(layout, q_fp8):
    """512 row tiles of 4096 keys and less: several whole rounds and a tail."""
    check(make(layout, q_fp8, [(256, 4096)], 128))


@BOTH_ENTRIES
@pytest.mark.parametrize(
    "requests",
    [[], [(0, 0)], [(0, 500)] * 3, [(5, 0)], [(1, 0)] * 200, [(0, 70), (200, 0), (0, 0)]],
    ids=lambda requests: f"b{len(requests)}q{sum(q for q, _ in requests)}",
)
@pytest.mark.parametrize(("layout", "q_fp8"), [("tensor", True), ("token", False)])
def test_nothing_to_attend(layout, q_fp8, requests, entry):
    fp8 = make(layout, q_fp8, requests)
    check(fp8, entry=entry, plan=plan_of(fp8.case, entry))
    rows = fp8.case.queries[-1]
    assert (fp8.case.out[:rows] == 0).all()
    assert fp8.case.lse[:rows].isneginf().all()


@BOTH_ENTRIES
@EVERY_FULL
def test_allocated_results(layout, q_fp8, entry):
    for q_layout in Q_LAYOUTS:
        # rows (token, head) that are not evenly spaced are copied by the call
        fp8 = make(layout, q_fp8, MIXED, 12, q_layout=q_layout)
        rows = fp8.case.queries[-1]
        output, lse = fp8.call(entry)
        assert output.is_contiguous()
        assert output.dtype is BF16
        verdict = compare_fp8(output[:rows], lse[:rows], expected_fp8(fp8))
        assert verdict.ok, verdict
        assert same_bits(fp8.call(entry, return_lse=False)[:rows], output[:rows])


@EVERY_FULL
def test_one_plan_for_16_bit_and_fp8_caches(layout, q_fp8):
    case = make_prefill_case(MIXED, num_heads=16, page_size=64, device="cuda")
    plan = plan_of(case, other_metadata=True)  # each layer's case has tensors of its own, of the same values
    fp8 = make(layout, q_fp8, MIXED)
    for _ in range(2):
        check(fp8, plan=plan)
        verdict = run_case(case, plan=plan)
        assert verdict.ok, verdict


@EVERY_FULL
def test_twenty_repeats(layout, q_fp8):
    fp8 = make(layout, q_fp8, [*MIXED, (100, 20000)] * 2)
    plan = plan_of(fp8.case)
    check(fp8, plan=plan)
    want = owned(fp8.case)
    for i in range(20):
        check_same(fp8, want, plan=plan if i % 2 else None)


def as_decode(fp8: Fp8Case) -> Fp8Case:
    """The same tensors as a decode call; every request has one query token and no row is spare."""
    case = fp8.case
    assert case.q_lens == [1] * len(case.lengths)
    decode = DecodeCase(**{f.name: getattr(case, f.name) for f in dataclasses.fields(DecodeCase)})
    return dataclasses.replace(fp8, case=decode)


@pytest.mark.parametrize("num_heads", [8, 64, 128])
@EVERY_FULL
def test_one_query_token_is_decode(layout, q_fp8, num_heads):
    """Of one row tile, of as many rows, with batch_invariant on both sides, the same bits."""
    lengths = [1, 63, 64, 65, 129, 1000, 1024, 1025, 5000, 0, 2047]
    fp8 = make(layout, q_fp8, [(1, n) for n in lengths], num_heads, total_q=len(lengths))
    expected = expected_fp8(fp8)
    for mode in (False, True):
        check(fp8, expected=expected, batch_invariant=mode)
    out, lse = fp8.case.out.clone(), fp8.case.lse.clone()
    check(as_decode(fp8), expected=expected)
    check(as_decode(fp8), expected=expected, batch_invariant=True, config=mla_cute.KernelConfig(fp8_kernel="tile64"))
    if num_heads == 64:  # decode of up to 32 heads has tiles of 32 rows
        assert same_bits(fp8.case.out, out)
        assert same_bits(fp8.case.lse, lse)


# ------------------------------------------------------------------------------------------------ values

REQUESTS = [(50, 300), (129, 129), (9, 5000), (64, 64), (1, 1000)]


@pytest.mark.parametrize("num_heads", [16, 128])
@pytest.mark.parametrize(("layout", "q_fp8", "page_size", "dtype"), [
    ("token", False, 64, BF16),
    ("group", False, 64, BF16),
    ("group656", True, 64, BF16),
    ("token", True, 1, BF16),
    ("group", False, 1, FP16),
])  # fmt: skip
def test_zero_scales_and_scales_from_1_to_1e4(layout, q_fp8, page_size, dtype, num_heads):
    for drift in (0.0, 60.0, -60.0):
        fp8 = make(layout, q_fp8, REQUESTS, num_heads, page_size, dtype, drift=drift)
        generator = torch.Generator().manual_seed(0)
        groups = fp8.scales["ckv_scale_arr"].shape[-1]
        for b, (_, n) in enumerate(REQUESTS):
            scales = 0.0172 * 10.0 ** (-4 * torch.rand(n, groups, generator=generator))
            scales[torch.rand(n, generator=generator) < 0.2] = 0
            if b == 2:
                scales = scales.clamp(max=0.0172e-2)
                scales[-40:] = 0.0172
            put_scales(fp8, b, scales)
        check(fp8, config=OVER_FP8)
    put_scales(fp8, 0, torch.zeros(300))
    check(fp8, config=OVER_FP8)
    assert (fp8.case.out[:50] == 0).all()


@EVERY_FULL
def test_rope_up_to_1000(layout, q_fp8):
    def prepare(case):
        case.kpe_cache.copy_((case.kpe_cache.float() * 230).clamp(-1000, 1000))

    check(make(layout, q_fp8, REQUESTS, prepare=prepare, fp8={"kpe_scale": 1000 / 448}))


@EVERY_FULL
def test_saturated_values(layout, q_fp8):
    generator = torch.Generator().manual_seed(0)
    fp8 = make(layout, q_fp8, REQUESTS, fp8={"ckv_scale": 1 / 300, "kpe_scale": 1 / 500, "q_scale": 1 / 900})
    for b, (_, n) in enumerate(REQUESTS):
        values = torch.randint(0, 2, (n, 512), generator=generator, dtype=torch.uint8) << 7 | 0x7E
        fp8.case.ckv_cache.view(torch.uint8)[fp8.slots(b)] = values.to("cuda")
        if layout != "tensor":
            put_scales(fp8, b, (torch.rand(n, 1, generator=generator) + 0.5) / 300)
    check(fp8, config=OVER_FP8)


@pytest.mark.parametrize("num_heads", [16, 128])
@EVERY_FULL
def test_nan_in_a_query_stays_in_its_row(layout, q_fp8, num_heads):
    fp8 = make(layout, q_fp8, REQUESTS, num_heads)
    rows = fp8.case.queries[-1]
    for name, at in (("q_nope", (60, 5, 100)), ("q_pe", (180, 0, 3))):
        x = getattr(fp8.case, name)
        if x.dtype is torch.float8_e4m3fn:
            x.view(torch.uint8)[at] = 0x7F
        else:
            x[at] = math.nan
    check(fp8)
    assert fp8.case.out[:rows].isnan().any(-1).nonzero().tolist() == [[60, 5], [180, 0]]


@pytest.mark.parametrize("layout", ["token", "group", "group656"])
def test_scales_of_unused_rows_do_not_matter(layout):
    fp8 = make(layout, False, [(3, 63), (65, 65), (1, 0), (40, 1000), (1, 1)])
    check(fp8)
    want = owned(fp8.case)
    array = fp8.scales["ckv_scale_arr"]
    dead = array.isnan()
    assert int(dead.sum()) > 0
    for value in (math.inf, -math.inf, 3e38, 0.0):
        array.masked_fill_(dead, value)
        check_same(fp8, want)
