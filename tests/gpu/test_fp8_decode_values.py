"""Decode over FP8 caches on the GPU: stored values and scales that are extreme, zero, subnormal or unused."""

import functools
import math

import pytest
import torch
from fp8_decode_case import BF16, BOTH_Q, EVERY_KERNEL, EVERY_LAYOUT, FP16, make
from gpu_helpers import check_fp8 as check
from gpu_helpers import same_bits

import mla_cute
from mla_cute import quant
from mla_cute.testing.fp8 import LAYOUTS, Fp8Case, expected_fp8, judge_fp8

SCALED = pytest.mark.parametrize("layout", LAYOUTS[1:])
LENGTHS = [1, 65, 1000, 5000]


def put_bytes(fp8: Fp8Case, b: int, values: torch.Tensor) -> None:
    """`values` [length, 512] uint8 as the ckv of request b."""
    fp8.case.ckv_cache.view(torch.uint8)[fp8.slots(b)] = values.to("cuda")


def put_scales(fp8: Fp8Case, b: int, values: torch.Tensor) -> None:
    """`values` [length] or [length, 1 or n] as the scales of request b."""
    array = fp8.scales["ckv_scale_arr"]
    array[fp8.slots(b)] = values.to("cuda").reshape(len(values), -1).expand(-1, array.shape[-1])


@EVERY_KERNEL
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


@EVERY_KERNEL
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


@EVERY_KERNEL
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
@EVERY_KERNEL
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


@EVERY_KERNEL
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


@EVERY_KERNEL
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


@EVERY_KERNEL
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
@EVERY_KERNEL
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


@EVERY_KERNEL
@EVERY_LAYOUT
def test_outlier_channels(layout, num_heads):
    """A few channels 50 times as large as the others, as real latents have them."""

    def prepare(case):
        for c in (3, 130, 131, 400, 511):
            case.ckv_cache[..., c] *= 50

    check(make(layout, False, LENGTHS, num_heads, prepare=prepare, fp8={"ckv_scale": 250 / 448}))


@EVERY_KERNEL
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
