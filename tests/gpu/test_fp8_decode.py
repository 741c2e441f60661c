"""Decode over FP8 caches on the GPU against the float32 reference on the dequantised cache: batches, arguments."""

import dataclasses
import math
import random

import pytest
import torch
from fp8_decode_case import BF16, BOTH_Q, EVERY_KERNEL, EVERY_LAYOUT, FP16, VARIANTS, make
from gpu_helpers import ENTRIES, bits, plan_of, same_bits
from gpu_helpers import check_fp8 as check

import mla_cute
from mla_cute.testing.cases import CACHE_LAYOUTS, OUT_LAYOUTS, Q_LAYOUTS, make_case, run_case
from mla_cute.testing.fp8 import LAYOUTS, Fp8Case, compare_fp8, expected_fp8

PAGE_SIZES = {64: (64, 128), 32: (32,), 16: (16,), 8: (8, 24), 0: (1,)}
HEADS = {"tile64": (24, 64, 100, 32, 128), "tile16": (1, 8, 16)}
ROWS = mla_cute.KernelConfig(fp8_kernel="tile64")
BOTH_ENTRIES = pytest.mark.parametrize("entry", ENTRIES)


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
    assert {spec.num_heads for spec in specs} == {*HEADS["tile64"], *HEADS["tile16"]}
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
    check(fp8, config=mla_cute.KernelConfig(fp8_kernel="tile16"))


@pytest.mark.parametrize("num_heads", [17, 32, 100, 128])
@BOTH_Q
@EVERY_LAYOUT
def test_the_tile16_kernel_with_many_heads(layout, q_fp8, num_heads):
    """In tiles of 16, the last one not full; by plans made for the kernel and for the other one."""
    fp8 = make(layout, q_fp8, [0, 1, 65, 1000, 5000, 128], num_heads)
    config = mla_cute.KernelConfig(fp8_kernel="tile16")
    check(fp8, config=config)
    check(fp8, config=config, batch_invariant=True)
    case = fp8.case
    sizes = {"num_heads": num_heads, "page_size": 64, "kv_last_page_len": case.kv_last_page_len, "config": config}
    check(fp8, plan=mla_cute.plan_decode(case.kv_indptr, **sizes))


@pytest.mark.parametrize("batch_invariant", [False, True], ids=["balanced", "invariant"])
@EVERY_KERNEL
@pytest.mark.parametrize(("layout", "q_fp8"), [("tensor", False), ("tensor", True), ("token", False), ("group", True)])
def test_one_long_request(layout, q_fp8, num_heads, batch_invariant):
    check(make(layout, q_fp8, [131072], num_heads), batch_invariant=batch_invariant)


@pytest.mark.parametrize("batch_invariant", [False, True], ids=["balanced", "invariant"])
@EVERY_KERNEL
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


@EVERY_KERNEL
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


@EVERY_KERNEL
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


@EVERY_KERNEL
@BOTH_Q
@EVERY_LAYOUT
def test_one_plan_for_16_bit_and_fp8_caches(layout, q_fp8, num_heads):
    """Layers of a model may have caches of either kind, and the same page lists."""
    lengths = [1000, 0, 129, 20000, 1]
    case = make_case(lengths, num_heads=num_heads, page_size=64, device="cuda")
    plan = plan_of(case, other_metadata=True)  # each layer's case has tensors of its own, of the same values
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
