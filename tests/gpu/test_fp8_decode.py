"""Decode over FP8 caches on the GPU against the float32 reference on the dequantised cache: poisoned inputs and guarded
outputs in every test."""

import dataclasses
import functools
import math
import random

import pytest
import torch
from gpu_helpers import ENTRIES, bits, plan_of, same_bits

import mla_cute
from mla_cute import quant
from mla_cute._testing import CACHE_LAYOUTS, OUT_LAYOUTS, Q_LAYOUTS, make_case, run_case
from mla_cute._testing_fp8 import LAYOUTS, Fp8Case, compare_fp8, expected_fp8, judge_fp8, make_fp8, run_fp8
from mla_cute.config import FEW_ROWS
from mla_cute.kernels.registry import KV_FORMATS, box_rows_of

# What these tests compile: (kernel, dtype, box rows, format, e4m3 queries). Full boxes in bfloat16 with every format
# and query; every other way of loading, which both kernels share, with every format.
BF16, FP16 = torch.bfloat16, torch.float16
VARIANTS = (
    *(
        (kernel, BF16, 64, kv_format, q_fp8)
        for kernel in ("rows", "few_rows")
        for kv_format in KV_FORMATS
        for q_fp8 in (False, True)
    ),
    ("rows", FP16, 32, "tensor", True),
    ("rows", BF16, 16, "group", False),
    ("rows", FP16, 8, "token", False),
    ("rows", BF16, 0, "tensor", True),
    ("rows", BF16, 0, "token", False),
    ("rows", FP16, 0, "group", False),
    ("few_rows", BF16, 32, "token", False),
    ("few_rows", FP16, 16, "tensor", False),
    ("few_rows", FP16, 8, "group", True),
    ("few_rows", BF16, 0, "tensor", False),
    ("few_rows", BF16, 0, "token", False),
    ("few_rows", FP16, 0, "group", False),
)
PAGE_SIZES = {64: (64, 128), 32: (32,), 16: (16,), 8: (8, 24), 0: (1,)}
HEADS = {"rows": (24, 64, 100, 128), "few_rows": (1, 8, 16)}
ROWS = mla_cute.KernelConfig(fp8_kernel="rows")

BOTH_Q = pytest.mark.parametrize("q_fp8", [False, True], ids=["q16", "q_e4m3"])
EVERY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
# One head count for each kernel.
BOTH_KERNELS = pytest.mark.parametrize("num_heads", [16, 128])
SCALED = pytest.mark.parametrize("layout", LAYOUTS[1:])
BOTH_ENTRIES = pytest.mark.parametrize("entry", ENTRIES)


def make(layout, q_fp8, lengths, num_heads=16, page_size=64, dtype=BF16, prepare=None, fp8=None, **kwargs) -> Fp8Case:
    """A case of one of VARIANTS; `prepare` changes the 16-bit case before it is quantised."""
    kernel = "few_rows" if num_heads <= FEW_ROWS else "rows"
    assert (kernel, dtype, box_rows_of(page_size), layout.removesuffix("656"), q_fp8) in VARIANTS
    case = make_case(lengths, num_heads=num_heads, page_size=page_size, dtype=dtype, device="cuda", **kwargs)
    if prepare is not None:
        prepare(case)
    return make_fp8(case, layout, q_fp8, **fp8 or {})


def check(fp8: Fp8Case, **kwargs) -> None:
    verdict = run_fp8(fp8, **kwargs)
    assert verdict.ok, verdict


def put_bytes(fp8: Fp8Case, b: int, values: torch.Tensor) -> None:
    """`values` [length, 512] uint8 as the ckv of request b."""
    fp8.case.ckv_cache.view(torch.uint8)[fp8.slots(b)] = values.to("cuda")


def put_scales(fp8: Fp8Case, b: int, values: torch.Tensor) -> None:
    """`values` [length] or [length, 1 or n] as the scales of request b."""
    array = fp8.scales["ckv_scale_arr"]
    array[fp8.slots(b)] = values.to("cuda").reshape(len(values), -1).expand(-1, array.shape[-1])


# ------------------------------------------------------------------------------------------------ the sweep


@dataclasses.dataclass(frozen=True)
class Spec:
    """A case by its parameters; `make` builds it."""

    dtype: torch.dtype
    page_size: int
    layout: str
    q_fp8: bool
    num_heads: int
    lengths: tuple[int, ...]
    drift: float
    cache_layout: str
    q_layout: str
    out_layout: str
    shared_pages: int
    seed: int

    def __str__(self) -> str:
        dtype = "bf16" if self.dtype is BF16 else "fp16"
        name = f"{self.layout}-{'q_e4m3-' if self.q_fp8 else ''}{dtype}-h{self.num_heads}-page{self.page_size}"
        return f"{name}-{self.cache_layout}-q_{self.q_layout}-out_{self.out_layout}-drift{self.drift:g}"

    def make(self) -> Fp8Case:
        own = ("layout", "q_fp8", "lengths")
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in own}
        return make(self.layout, self.q_fp8, self.lengths, **options)


def sweep() -> list[Spec]:
    """Five ragged batches of each variant, 120 cases: all head counts, page sizes and strides, scores that drift."""
    specs = []
    for v, (kernel, dtype, box, kv_format, q_fp8) in enumerate(VARIANTS):
        for i in range(5):
            k = 5 * v + i
            page_size = PAGE_SIZES[box][i % len(PAGE_SIZES[box])]
            lengths = [0, 1, 63, 64, 65, 128, 1000, 5000, page_size, 3 * page_size + 1, max(page_size - 1, 0)]
            random.Random(k).shuffle(lengths)
            specs.append(
                Spec(
                    dtype=dtype,
                    page_size=page_size,
                    layout="group656" if kv_format == "group" and i // 2 % 2 == v % 2 else kv_format,
                    q_fp8=q_fp8,
                    num_heads=HEADS[kernel][(i + v) % len(HEADS[kernel])],
                    lengths=tuple(lengths),
                    drift=(0.0, 0.0, 60.0, 0.0, -60.0)[i],
                    cache_layout=CACHE_LAYOUTS[(k + k // 4) % len(CACHE_LAYOUTS)],
                    q_layout=Q_LAYOUTS[(k + k // 6) % len(Q_LAYOUTS)],
                    out_layout=OUT_LAYOUTS[(k + k // 6) % len(OUT_LAYOUTS)],
                    shared_pages=(0, 1, 1000)[k % 3],
                    seed=k,
                )
            )
    assert len({str(spec) for spec in specs}) == len(specs) == 120
    assert {spec.num_heads for spec in specs} == {*HEADS["rows"], *HEADS["few_rows"]}
    assert {spec.layout for spec in specs} == set(LAYOUTS)
    return specs


@pytest.mark.parametrize("spec", sweep(), ids=str)
def test_sweep(spec):
    """Right, and with a plan, through the block table and in base e the same bits; right when batch-invariant."""
    fp8 = spec.make()
    case = fp8.case
    expected = expected_fp8(fp8)
    check(fp8, expected=expected)
    out, lse = case.out.clone(), case.lse.clone()

    check(fp8, expected=expected, entry="block_table", plan=plan_of(case, "block_table"))
    assert same_bits(case.out, out)
    assert same_bits(case.lse, lse)

    ln2 = math.log(2)
    in_e = dataclasses.replace(expected, lse=expected.lse * ln2, score_rounding=expected.score_rounding * ln2)
    check(fp8, expected=in_e, lse_base="e")
    assert same_bits(case.out, out)

    check(fp8, expected=expected, batch_invariant=True)


# ------------------------------------------------------------------------------------------------ batches and lengths


@pytest.mark.parametrize("num_heads", [8, 24])
@BOTH_Q
@EVERY_LAYOUT
def test_every_length_around_the_tile(layout, q_fp8, num_heads):
    """Every tail of the last 64-token block, in both halves of a pair of blocks."""
    check(make(layout, q_fp8, list(range(1, 260)), num_heads))


@pytest.mark.parametrize(
    ("layout", "q_fp8", "num_heads", "page_size", "dtype"),
    [
        ("tensor", False, 8, 1, BF16),
        ("token", False, 8, 1, BF16),
        ("group", False, 8, 1, FP16),
        ("token", False, 8, 32, BF16),
        ("group656", True, 8, 24, FP16),
        ("tensor", True, 24, 1, BF16),
        ("token", False, 24, 1, BF16),
        ("group656", False, 24, 1, FP16),
        ("token", False, 24, 24, FP16),
    ],
)
def test_every_length_around_the_tile_of_other_loads(layout, q_fp8, num_heads, page_size, dtype):
    check(make(layout, q_fp8, list(range(1, 260)), num_heads, page_size, dtype))


@pytest.mark.parametrize("num_heads", [1, 8, 16])
@BOTH_Q
@EVERY_LAYOUT
def test_the_row_tile_kernel_with_few_heads(layout, q_fp8, num_heads):
    fp8 = make(layout, q_fp8, [0, 1, 65, 1000, 5000], num_heads)
    check(fp8, config=ROWS)
    check(fp8, config=ROWS, batch_invariant=True)
    check(fp8, config=mla_cute.KernelConfig(fp8_kernel="few_rows"))


@pytest.mark.parametrize("num_heads", [17, 32, 100, 128])
@BOTH_Q
@EVERY_LAYOUT
def test_the_few_rows_kernel_with_many_heads(layout, q_fp8, num_heads):
    """In tiles of 16, the last one not full; by plans made for the kernel and for the other one."""
    fp8 = make(layout, q_fp8, [0, 1, 65, 1000, 5000, 128], num_heads)
    config = mla_cute.KernelConfig(fp8_kernel="few_rows")
    check(fp8, config=config)
    check(fp8, config=config, batch_invariant=True)
    case = fp8.case
    sizes = {"num_heads": num_heads, "page_size": 64, "kv_last_page_len": case.kv_last_page_len, "config": config}
    check(fp8, plan=mla_cute.plan_decode(case.kv_indptr, **sizes))


@pytest.mark.parametrize("batch_invariant", [False, True], ids=["balanced", "invariant"])
@BOTH_KERNELS
@pytest.mark.parametrize(("layout", "q_fp8"), [("tensor", False), ("tensor", True), ("token", False), ("group", True)])
def test_one_long_request(layout, q_fp8, num_heads, batch_invariant):
    check(make(layout, q_fp8, [131072], num_heads), batch_invariant=batch_invariant)


@pytest.mark.parametrize("batch_invariant", [False, True], ids=["balanced", "invariant"])
@BOTH_KERNELS
@BOTH_Q
@EVERY_LAYOUT
def test_more_requests_than_sms(layout, q_fp8, num_heads, batch_invariant):
    lengths = torch.randint(0, 200, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    lengths[::50] = [0] * 6
    lengths[133] = 3000
    check(make(layout, q_fp8, lengths, num_heads), batch_invariant=batch_invariant)


@BOTH_ENTRIES
@pytest.mark.parametrize("lengths", [[], [0], [0] * 200], ids=lambda lengths: f"b{len(lengths)}")
@EVERY_LAYOUT
def test_batches_without_tokens(layout, lengths, entry):
    fp8 = make(layout, False, lengths)
    for plan in (None, plan_of(fp8.case, entry)):
        check(fp8, entry=entry, plan=plan)
        assert (fp8.case.out == 0).all()
        assert fp8.case.lse.isneginf().all()


def picked(fp8: Fp8Case, rows: list[int]) -> Fp8Case:
    """The case with these requests only, over the same cache."""
    case = fp8.case
    index = torch.tensor(rows, device="cuda")
    starts, ends = case.kv_indptr[:-1].tolist(), case.kv_indptr[1:].tolist()
    counts = torch.tensor([0] + [ends[b] - starts[b] for b in rows])
    chosen = dataclasses.replace(
        case,
        lengths=[case.lengths[b] for b in rows],
        q_nope=torch.cat([case.q_nope[b : b + 1].view(torch.uint8) for b in rows]).view(case.q_nope.dtype),
        q_pe=torch.cat([case.q_pe[b : b + 1].view(torch.uint8) for b in rows]).view(case.q_pe.dtype),
        kv_indices=torch.cat([case.kv_indices[starts[b] : ends[b]] for b in rows]),
        kv_indptr=counts.cumsum(0).to(device="cuda", dtype=torch.int32),
        kv_last_page_len=case.kv_last_page_len[index],
        seq_lens=case.seq_lens[index],
        block_table=case.block_table[index],
    )
    return dataclasses.replace(fp8, case=chosen)


@BOTH_ENTRIES
@pytest.mark.parametrize(
    ("layout", "q_fp8", "num_heads"), [("tensor", True, 16), ("token", False, 128), ("group", False, 16)]
)
def test_a_row_does_not_see_its_neighbours(layout, q_fp8, num_heads, entry):
    """batch_invariant=True: a request's row has the same bits whatever else is in the batch."""
    generator = random.Random(num_heads)
    lengths = [generator.randint(0, 2500) for _ in range(200)]
    targets = {0: 20000, 17: 1, 60: 65, 100: 1024, 101: 1025, 150: 5000, 199: 2047}
    for b, n in targets.items():
        lengths[b] = n
    fp8 = make(layout, q_fp8, lengths, num_heads)
    check(fp8, entry=entry, batch_invariant=True)
    out, lse = fp8.case.out.clone(), fp8.case.lse.clone()
    for b in targets:
        for size in (1, 3, 37):
            others = generator.sample([r for r in range(200) if r != b], size - 1)
            at = generator.randrange(size)
            sub = picked(fp8, [*others[:at], b, *others[at:]])
            plan = plan_of(sub.case, entry, batch_invariant=True) if size == 3 else None
            got, got_lse = sub.call(entry, batch_invariant=True, plan=plan)
            where = f"request of {lengths[b]} tokens at {at} of {size}"
            assert same_bits(got[at], out[b]), where
            assert same_bits(got_lse[at], lse[b]), where


@BOTH_KERNELS
@BOTH_Q
@EVERY_LAYOUT
def test_twenty_repeats(layout, q_fp8, num_heads):
    fp8 = make(layout, q_fp8, [8192, 1000, 129, 0, 20000, 64, 1, 65, 3000, 127] * 3, num_heads)
    case, plan = fp8.case, plan_of(fp8.case)
    check(fp8, plan=plan)
    out, lse = bits(case.out).clone(), bits(case.lse).clone()
    wrong = torch.zeros(20, dtype=torch.int64, device="cuda")
    for i in range(20):
        case.out.fill_(math.nan)
        case.lse.fill_(math.nan)
        fp8.call(out=case.out, lse=case.lse, plan=plan if i % 2 else None)
        wrong[i] = (bits(case.out) != out).sum() + (bits(case.lse) != lse).sum()
    assert wrong.count_nonzero() == 0, f"elements that differ, by repeat: {wrong.tolist()}"
    assert case.guarded_out.intact()
    assert case.guarded_lse.intact()


# ------------------------------------------------------------------------------------------------ arguments


@BOTH_ENTRIES
@BOTH_Q
@EVERY_LAYOUT
def test_allocated_results(layout, q_fp8, entry):
    fp8 = make(layout, q_fp8, [129, 0, 1000], q_layout="batch_strided")
    expected = expected_fp8(fp8)
    output, lse = fp8.call(entry)
    assert output.is_contiguous()
    assert output.dtype is BF16
    verdict = compare_fp8(output, lse, expected)
    assert verdict.ok, verdict
    alone = fp8.call(entry, return_lse=False)
    assert isinstance(alone, torch.Tensor)
    assert same_bits(alone, output)
    assert fp8.call(entry, return_lse=False, out=fp8.case.out) is fp8.case.out
    assert same_bits(fp8.case.out, output)
    _, in_e = fp8.call(entry, lse_base="e")
    torch.testing.assert_close(in_e[[0, 2]], lse[[0, 2]] * math.log(2), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("page_size", [64, 1])
def test_full_last_pages_by_default(page_size):
    fp8 = make("token", False, [page_size * n for n in (1, 0, 3, 700, 64)], page_size=page_size)
    want = fp8.call()
    case = fp8.case
    output, lse = mla_cute.mla_paged_decode(*case.csr_args, **fp8.scales)
    assert same_bits(output, want[0])
    assert same_bits(lse, want[1])
    verdict = compare_fp8(output, lse, expected_fp8(fp8))
    assert verdict.ok, verdict


@BOTH_KERNELS
@BOTH_Q
def test_both_caches_in_one_buffer_of_576_bytes(q_fp8, num_heads):
    fp8 = make("tensor", q_fp8, [1000, 0, 65, 5000], num_heads)
    want = fp8.call()
    case = fp8.case
    rows = torch.full((*case.ckv_cache.shape[:2], 576), 0xFF, dtype=torch.uint8, device="cuda").view(
        torch.float8_e4m3fn
    )
    for name, part in (("ckv_cache", rows[..., :512]), ("kpe_cache", rows[..., 512:])):
        part.copy_(getattr(case, name))
        setattr(case, name, part)
    check(fp8)
    assert same_bits(case.out, want[0])
    assert same_bits(case.lse, want[1])


@pytest.mark.parametrize("layout", ["tensor", "token"])
def test_strides_of_size_one_dimensions_do_not_matter(layout):
    fp8 = make(layout, False, [1], num_heads=1, page_size=1, num_pages=1)
    want = fp8.call()
    case = fp8.case
    for name in ("q_nope", "q_pe", "ckv_cache", "kpe_cache"):
        x = getattr(case, name)
        setattr(case, name, x.as_strided(x.shape, (7, 3, 1), x.storage_offset()))
    if layout == "token":
        array = fp8.scales["ckv_scale_arr"]
        fp8.scales["ckv_scale_arr"] = array.as_strided(array.shape, (5, 11, 1), array.storage_offset())
    for entry in ENTRIES:
        for got, expected in zip(fp8.call(entry), want, strict=True):
            assert same_bits(got, expected)


@BOTH_KERNELS
@BOTH_Q
@EVERY_LAYOUT
def test_one_plan_for_16_bit_and_fp8_caches(layout, q_fp8, num_heads):
    """Layers of a model may have caches of either kind, and the same page lists."""
    lengths = [1000, 0, 129, 20000, 1]
    case = make_case(lengths, num_heads=num_heads, page_size=64, device="cuda")
    plan = plan_of(case)
    fp8 = make(layout, q_fp8, lengths, num_heads)
    for _ in range(2):
        check(fp8, plan=plan)
        verdict = run_case(case, plan=plan)
        assert verdict.ok, verdict
    out = fp8.case.out.clone()
    check(fp8)
    assert same_bits(fp8.case.out, out)


def misaligned(x: torch.Tensor, elements: int) -> torch.Tensor:
    """A copy whose address is `elements` past a multiple of 16 bytes."""
    buffer = torch.empty((x.numel() + 16) * x.element_size(), dtype=torch.uint8, device="cuda").view(x.dtype)
    return buffer[elements:][: x.numel()].view(x.shape).copy_(x)


@pytest.mark.parametrize(
    ("layout", "name", "elements"),
    [
        ("tensor", "ckv_cache", 8),
        ("tensor", "kpe_cache", 8),
        ("tensor", "q_nope", 8),
        ("tensor", "q_pe", 1),
        ("token", "kpe_cache", 4),
        ("group", "ckv_scale_arr", 1),
    ],
)
def test_misaligned_operands_are_refused(layout, name, elements):
    fp8 = make(layout, True, [100, 3])
    if name == "ckv_scale_arr":
        fp8.scales[name] = misaligned(fp8.scales[name], elements)
    else:
        setattr(fp8.case, name, misaligned(getattr(fp8.case, name), elements))
    for entry in ENTRIES:
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            fp8.call(entry, out=fp8.case.out, lse=fp8.case.lse)
    torch.cuda.synchronize()
    assert fp8.case.guarded_out.untouched()
    assert fp8.case.guarded_lse.untouched()


# ------------------------------------------------------------------------------------------------ values

LENGTHS = [1, 65, 1000, 5000]


@BOTH_KERNELS
@BOTH_Q
@EVERY_LAYOUT
def test_saturated_values(layout, q_fp8, num_heads):
    """Every stored value +-448: ckv, and where they are e4m3 rope and queries."""
    generator = torch.Generator().manual_seed(0)
    fp8 = make(layout, q_fp8, LENGTHS, num_heads, fp8={"ckv_scale": 1 / 300, "kpe_scale": 1 / 500, "q_scale": 1 / 900})

    def saturated(*shape):
        return (torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8) << 7 | 0x7E).to("cuda")

    for b, n in enumerate(LENGTHS):
        put_bytes(fp8, b, saturated(n, 512))
        if layout == "tensor":
            fp8.case.kpe_cache.view(torch.uint8)[fp8.slots(b)] = saturated(n, 64)
        else:
            put_scales(fp8, b, (torch.rand(n, 1, generator=generator) + 0.5) / 300)
    for q in (fp8.case.q_nope, fp8.case.q_pe):
        if q.dtype is torch.float8_e4m3fn:
            q.view(torch.uint8).copy_(saturated(*q.shape))
    assert fp8.real().ckv_cache[fp8.slots(0)].abs().amin() > 0.5
    check(fp8)


@BOTH_KERNELS
@pytest.mark.parametrize("page_size", [64, 1])
@SCALED
def test_zero_scales(layout, page_size, num_heads):
    """A token whose scale is 0 has its score from the rope alone and a V of 0."""
    dtype = FP16 if layout != "token" and page_size == 1 else BF16
    fp8 = make(layout, False, LENGTHS + [777], num_heads, page_size, dtype)
    array = fp8.scales["ckv_scale_arr"]
    for b, n in enumerate(LENGTHS):
        values = array[fp8.slots(b)]
        values[torch.rand(n, generator=torch.Generator().manual_seed(b)).to("cuda") < 0.5] = 0
        put_scales(fp8, b, values)
    put_scales(fp8, 4, torch.zeros(777))
    check(fp8)
    assert (fp8.case.out[4] == 0).all()
    assert fp8.case.lse[4].isfinite().all()


@BOTH_KERNELS
def test_one_group_of_zero_scales(num_heads):
    for layout in ("group", "group656"):
        fp8 = make(layout, False, LENGTHS, num_heads)
        fp8.scales["ckv_scale_arr"][..., 2] = 0
        check(fp8)
        assert (fp8.case.out[..., 256:384] == 0).all()
        assert (fp8.case.out[..., 384:] != 0).any()


@pytest.mark.parametrize("scale", [0.375, 3.0, 2.0**-7])
@pytest.mark.parametrize(
    ("layout", "q_fp8", "num_heads", "page_size", "dtype"),
    [
        *(
            (layout, q_fp8, num_heads, 64, BF16)
            for layout, q_fp8 in (("tensor", False), ("tensor", True), ("token", False), ("group", False))
            for num_heads in (16, 128)
        ),
        ("group656", True, 16, 64, BF16),
        ("group656", True, 128, 64, BF16),
        ("token", False, 16, 1, BF16),
        ("token", False, 128, 1, BF16),
        ("group", False, 16, 1, FP16),
        ("group", False, 128, 1, FP16),
        ("tensor", False, 16, 16, FP16),
        ("tensor", True, 128, 32, FP16),
    ],
)
def test_subnormal_values_are_exact(layout, q_fp8, num_heads, page_size, dtype, scale):
    """One token of nothing but subnormal e4m3 is the output, multiplied by its scale."""
    fp8 = make(layout, q_fp8, [1] * 40, num_heads, page_size, dtype, fp8={"ckv_scale": scale})
    generator = torch.Generator().manual_seed(0)
    stored = torch.randint(0, 8, (40, 512), generator=generator, dtype=torch.uint8)
    stored |= torch.randint(0, 2, (40, 512), generator=generator, dtype=torch.uint8) << 7
    assert stored.unique().numel() == 16
    for b in range(40):
        put_bytes(fp8, b, stored[b : b + 1])
        if layout != "tensor":
            put_scales(fp8, b, torch.full((1,), scale))
    check(fp8)
    # from the format: a subnormal is (-1)^sign * mantissa * 2^-9
    value = (stored & 7).float() * 2.0**-9 * torch.where(stored > 127, -1.0, 1.0)
    want = (value * scale).to(dtype).to("cuda")
    assert (want.float().cpu() == value * scale).all()
    assert (fp8.case.out == want[:, None]).all()


@pytest.mark.parametrize("large", ["nowhere", "start", "end", "everywhere"])
@pytest.mark.parametrize("drift", [0.0, 60.0, -60.0])
@BOTH_KERNELS
@BOTH_Q
@SCALED
def test_scales_from_1_to_1e4(layout, q_fp8, num_heads, drift, large):
    """Scales between 1e-4 and 1 of the usual one, the large ones also together at one end of the request, where a drift
    of the scores gives them all the weight or none."""
    lengths = [5000, 300, 64, 20000]
    fp8 = make(layout, q_fp8, lengths, num_heads, drift=drift)
    generator = torch.Generator().manual_seed(0)
    groups = fp8.scales["ckv_scale_arr"].shape[-1]
    for b, n in enumerate(lengths):
        small = 0.0172 * 10.0 ** (-4 * torch.rand(n, groups, generator=generator))
        if large != "everywhere":
            small = small.clamp(max=0.0172e-2)
        if large == "start":
            small[:40] = 0.0172
        elif large == "end":
            small[-40:] = 0.0172
        put_scales(fp8, b, small)
    check(fp8)


@BOTH_KERNELS
@BOTH_Q
@SCALED
def test_large_scales_of_tokens_without_weight(layout, q_fp8, num_heads):
    """40 tokens with scales 1e4 times those of the others and scores 30 nats below: nothing of them is in the output,
    and what is has to survive beside them."""

    def prepare(case):
        case.q_pe[..., 0] = 8.0
        case.kpe_cache[..., 0].mul_(0)

    lengths = [5000, 300, 64, 1000]
    fp8 = make(layout, q_fp8, lengths, num_heads, prepare=prepare)
    for at in ("start", "end"):
        for b, n in enumerate(lengths):
            page, row = fp8.slots(b)
            token = torch.arange(n, device="cuda")
            large = token < 40 if at == "start" else token >= n - 40
            # q_nope * ckv of a large scale would have more weight than any rope
            fp8.case.ckv_cache.view(torch.uint8)[page[large], row[large]] &= 0x87
            fp8.case.kpe_cache[page, row, 0] = torch.where(large, -60.0, 0.0).to(BF16)
            put_scales(fp8, b, torch.where(large, 0.0172, 0.0172e-4))
        check(fp8)


@BOTH_KERNELS
@SCALED
def test_scores_and_scales_that_rise_together(layout, num_heads):
    """Tokens whose P is 2^12 of those before and whose scales are 57 times as large: their product is no float16, and
    there are too few of them for the sum of P to say so."""
    lengths = [300] * 150 + [4096]

    def prepare(case):
        case.q_nope.mul_(0.01)
        case.q_pe.zero_()
        case.q_pe[..., 0] = 8.0

    fp8 = make(layout, False, lengths, num_heads, prepare=prepare, sm_scale=0.125)
    for rise in (7.5, 9.5, 12.0, 13.2):
        for b, n in enumerate(lengths):
            page, row = fp8.slots(b)
            token = torch.arange(n, device="cuda")
            late = token >= n // 2
            # q_pe * kpe * sm_scale is the score in nats
            fp8.case.kpe_cache[page, row] = 0
            fp8.case.kpe_cache[page, row, 0] = torch.where(late & (token % 13 == 5), rise * math.log(2), 0.0).to(BF16)
            put_scales(fp8, b, torch.where(late, 57 / 1024, 1.0 / 1024))
        check(fp8)


@BOTH_KERNELS
@pytest.mark.parametrize("page_size", [64, 1])
@SCALED
def test_scales_of_unused_rows_do_not_matter(layout, page_size, num_heads):
    dtype = FP16 if layout != "token" and page_size == 1 else BF16
    fp8 = make(layout, False, [1, 63, 65, 0, 1000, 5001], num_heads, page_size, dtype)
    check(fp8)
    out, lse = fp8.case.out.clone(), fp8.case.lse.clone()
    array = fp8.scales["ckv_scale_arr"]
    dead = array.isnan()
    assert int(dead.sum()) > 0
    for value in (math.inf, -math.inf, 3e38, 0.0):
        array.masked_fill_(dead, value)
        check(fp8)
        assert same_bits(fp8.case.out, out)
        assert same_bits(fp8.case.lse, lse)


@pytest.mark.parametrize(("page_size", "num_heads"), [(64, 16), (64, 128), (1, 16)])
@pytest.mark.parametrize("what", ["ckv_cache", "kpe_cache", "ckv_scale_arr"])
@pytest.mark.parametrize("layout", ["tensor", "token"])
def test_nan_in_a_token_stays_in_its_request(layout, what, page_size, num_heads):
    fp8 = make(layout, False, [300, 129, 20000, 64], num_heads, page_size)
    if layout == "tensor" and what == "ckv_scale_arr":
        pytest.skip("a format without an array of scales")
    page, row = (x[7000] for x in fp8.slots(2))
    x = fp8.scales[what] if what == "ckv_scale_arr" else getattr(fp8.case, what)
    if x.dtype is torch.float8_e4m3fn:
        x = x.view(torch.uint8)
    x[page, row, 0] = 0x7F if x.dtype is torch.uint8 else math.nan
    output, lse = fp8.call()
    assert output.isnan().all(-1).all(-1).tolist() == [False, False, True, False]
    assert lse.isnan().all(-1).tolist() == [False, False, True, False]
    others = [0, 1, 3]
    assert output[others].isfinite().all()


@pytest.mark.parametrize("channels", [64, 4], ids=["all_channels", "four_channels"])
@BOTH_KERNELS
@BOTH_Q
@EVERY_LAYOUT
def test_rope_up_to_1000(layout, q_fp8, num_heads, channels):
    def prepare(case):
        live = case.kpe_cache[..., :channels].float()
        case.kpe_cache[..., :channels] = (live * 230).clamp(-1000, 1000).to(BF16)

    fp8 = make(layout, q_fp8, LENGTHS + [20000], num_heads, prepare=prepare, fp8={"kpe_scale": 1000 / 448})
    largest = fp8.real().kpe_cache[fp8.slots(3)].abs().amax()
    assert 700 < largest <= 1001
    check(fp8)


@BOTH_KERNELS
@EVERY_LAYOUT
def test_outlier_channels(layout, num_heads):
    """A few channels 50 times as large as the others, as real latents have them."""

    def prepare(case):
        for c in (3, 130, 131, 400, 511):
            case.ckv_cache[..., c] *= 50

    check(make(layout, False, LENGTHS, num_heads, prepare=prepare, fp8={"ckv_scale": 250 / 448}))


@BOTH_KERNELS
@BOTH_Q
@EVERY_LAYOUT
@pytest.mark.parametrize("exponent", [-20, 20])
def test_scales_of_any_size(layout, q_fp8, exponent, num_heads):
    """The same stored numbers with scales 2^20 larger or smaller, and sm_scale the other way: the same scores."""
    factor = 2.0**exponent
    fp8 = make(layout, q_fp8, LENGTHS, num_heads)
    want, want_lse = fp8.call()
    if layout == "tensor":
        fp8.scales["ckv_scale"] *= factor
        fp8.scales["kpe_scale"] *= factor
    else:
        fp8.scales["ckv_scale_arr"].mul_(factor)
        fp8.case.kpe_cache.mul_(factor)
    fp8.case.sm_scale /= factor
    check(fp8)
    torch.testing.assert_close(fp8.case.lse, want_lse, rtol=1e-5, atol=1e-5)
    assert ((fp8.case.out.float() - want.float() * factor).norm() < 1e-3 * factor * want.float().norm()).item()


@functools.cache
def quantised_normal(layout):
    x = torch.randn(2000, 512, generator=torch.Generator().manual_seed(9))
    return quant.quantize_token(x) if layout == "token" else quant.quantize_group(x)


@pytest.mark.parametrize("layout", ["token", "group"])
def test_what_quant_makes_is_what_the_kernel_reads(layout):
    """The softmax of one request against plain torch in float64, through quant.dequantize and nothing of the cases."""
    stored, scales = quantised_normal(layout)
    ckv = stored.view(torch.uint8).view(2000, 1, 512).to("cuda").view(torch.float8_e4m3fn)
    array = scales.view(2000, 1, -1).to("cuda")
    generator = torch.Generator("cuda").manual_seed(1)
    kpe = torch.randn(2000, 1, 64, device="cuda", generator=generator).to(BF16)
    q_nope, q_pe = (torch.randn(1, 16, n, device="cuda", generator=generator).to(BF16) for n in (512, 64))
    if layout == "group":
        # of the group format page size 1 is there in float16
        kpe, q_nope, q_pe = kpe.half(), q_nope.half(), q_pe.half()
    order = torch.randperm(2000, device="cuda", generator=generator).int()
    indptr = torch.tensor([0, 2000], dtype=torch.int32, device="cuda")
    out, lse = mla_cute.mla_paged_decode(
        q_nope, q_pe, ckv, kpe, indptr, order, 192**-0.5, ckv_scale_arr=array, lse_base="e"
    )
    v = quant.dequantize(stored, scales).double().to("cuda")[order.long()]
    scores = (q_nope[0].double() @ v.T + q_pe[0].double() @ kpe[order.long(), 0].double().T) * 192**-0.5
    want = scores.softmax(-1) @ v
    assert (out[0].double() - want).norm() < 3e-3 * want.norm()
    assert (lse[0].double() - scores.logsumexp(-1)).abs().max() < 1e-2


def test_guards_hold_after_a_call_into_strided_outputs():
    fp8 = make("token", False, LENGTHS, out_layout="batch_strided")
    expected = expected_fp8(fp8)
    fp8.reset()
    fp8.call(out=fp8.case.out, lse=fp8.case.lse)
    assert judge_fp8(fp8, expected).ok
