"""FP8 cache formats against the definition of e4m3, value by value."""

import fractions
import math

import numpy
import pytest
import torch

from mla_cute import quant

NAN, INF = math.nan, math.inf
QUANTIZE = pytest.mark.parametrize(("quantize", "groups"), [(quant.quantize_token, 1), (quant.quantize_group, 4)])
E4M3 = torch.float8_e4m3fn


def e4m3_values() -> torch.Tensor:
    """Every finite e4m3 value from its definition (bias 7, subnormals of 2^-9, no infinities), ascending."""
    positive = [m * 2.0**-9 for m in range(8)]
    positive += [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    return torch.tensor(sorted({-v for v in positive} | set(positive)))


def nearest_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Distance of each value to the closest e4m3 value."""
    return (x.double().unsqueeze(-1) - e4m3_values().double()).abs().amin(dim=-1)


def latents(*lead: int, seed: int = 0) -> torch.Tensor:
    """Rows whose sizes vary by 1e4, and one outlier channel."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, 512, generator=generator)
    x *= 10 ** (4 * torch.rand(*lead, 1, generator=generator) - 2)
    x[..., 37] *= 50
    return x


def test_values_are_the_nearest_and_saturate():
    x = torch.cat([torch.randn(4096) * 100, torch.linspace(-0.02, 0.02, 400), torch.tensor([449.0, 1e30, -1e9])])
    stored = quant.to_e4m3(x, 1.0).float()
    inside = x.abs() <= 448
    torch.testing.assert_close((stored - x).abs().double()[inside], nearest_e4m3(x[inside]), rtol=0, atol=1e-7)
    assert stored[~inside].abs().eq(448).all()
    assert (stored[~inside] > 0).equal(x[~inside] > 0)


def test_every_e4m3_value_is_kept_subnormals_included():
    values = e4m3_values()
    assert len(values) == 253  # 2 * 126 and one zero
    for scale in (1.0, 2.0**-7, 2.0**5):
        assert torch.equal(quant.to_e4m3(values * scale, scale).float(), values)


def test_nan_stays_nan_and_only_there():
    x = torch.zeros(3, 512)
    x[1, 5] = math.nan
    assert quant.to_e4m3(x, 1.0).float().isnan().nonzero().tolist() == [[1, 5]]


def group_scales(amax: torch.Tensor) -> torch.Tensor:
    """The scales that quantize_group gives to 128 channels of these magnitudes."""
    ckv = torch.zeros(len(amax), 512, dtype=amax.dtype)
    ckv[:, 130] = -amax
    stored, scales = quant.quantize_group(ckv)
    assert scales[:, [0, 2, 3]].eq(1).all()
    assert not stored[:, :130].float().any()
    return scales[:, 1]


def assert_least_powers_of_two(scales: torch.Tensor, amax: torch.Tensor) -> None:
    """In float64, where 448 * 2^k is exact."""
    assert scales.dtype is torch.float32
    assert (scales.view(torch.int32) & 0x007FFFFF).eq(0).all()
    assert torch.equal(scales.bfloat16().float(), scales)
    large, least = scales.double() * 448, 2.0**-126
    assert (large >= amax.double()).all()
    assert ((large / 2 < amax.double()) | (scales == least)).all()
    assert (scales >= least).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_group_scales_are_the_least_powers_of_two_for_every_16_bit_magnitude(dtype):
    patterns = torch.arange(2**15).to(torch.int16).view(dtype)
    usable = patterns.isfinite() & (patterns > 0)
    scales = group_scales(patterns)
    assert scales[~usable].eq(1).all()
    assert_least_powers_of_two(scales[usable], patterns[usable])
    if dtype is torch.bfloat16:
        assert scales[1] == 2.0**-126
        assert scales[usable].amax() == 2.0**120


def test_group_scales_of_float32_next_to_448_times_powers_of_two():
    at = 448 * 2.0 ** torch.arange(-134.0, 119.0)
    above, below = (torch.nextafter(at, torch.full_like(at, end)) for end in (INF, 0.0))
    amax = torch.cat([at, above, below, torch.tensor([1e-45, 1e-38, 3e38])])
    scales = group_scales(amax)
    assert_least_powers_of_two(scales, amax)
    normal = at >= 448 * 2.0**-126
    found = scales[: 3 * len(at)].view(3, -1)[:, normal]
    assert torch.equal(found[0], at[normal] / 448)
    assert torch.equal(found[1], at[normal] / 224)
    assert found[0, 0] == found[2, 0] == 2.0**-126  # the least scale is both for it and for what is below it
    assert torch.equal(found[2], found[0])


@QUANTIZE
def test_an_infinity_saturates_and_the_rest_keeps_its_size(quantize, groups):
    ckv = torch.ones(4, 512, dtype=torch.float64)
    ckv[0, :4] = torch.tensor([INF, -INF, 448.0, -600.0])
    ckv[1, 5:7] = torch.tensor([NAN, INF])
    ckv[2, 7] = 1e39  # infinite in float32
    stored, scales = quantize(ckv)
    real = quant.dequantize(stored, scales)
    assert scales[:3, 0].eq(1).all()
    assert scales.isfinite().all()
    assert real[0, :5].tolist() == [448.0, -448.0, 448.0, -448.0, 1.0]
    assert real.isnan().nonzero().tolist() == [[1, 5]]
    assert real[1, 6:8].tolist() == [448.0, 1.0]
    assert real[2, 6:9].tolist() == [1.0, 448.0, 1.0]
    torch.testing.assert_close(real[3].double(), ckv[3], rtol=2**-4, atol=0)


@QUANTIZE
def test_magnitudes_whose_448th_is_0_in_float32(quantize, groups):
    ckv = torch.zeros(1, 512)
    ckv[0, 3] = 1e-45
    stored, scales = quantize(ckv)
    assert (scales > 0).all()
    assert stored.float().eq(0).all()


def test_tensor_scale_is_one_that_quantize_tensor_takes():
    kpe = torch.zeros(2, 64)
    for largest, want in ((INF, 1.0), (-INF, 1.0), (NAN, 1.0), (0.0, 1.0), (1e-40, 2.0**-126), (1e-45, 2.0**-126)):
        ckv = torch.zeros(2, 512)
        ckv[1, 7] = largest
        scale = quant.tensor_scale(ckv)
        if not (largest == 1e-45 and scale == 1.0):  # 448 times less is 0
            assert scale == want, largest
        stored, _ = quant.quantize_tensor(ckv, kpe, scale, quant.tensor_scale(kpe))
        assert stored.float().isnan().any() == math.isnan(largest)


@pytest.mark.parametrize("scale", [numpy.float32(0.5), numpy.float64(0.5), fractions.Fraction(1, 2), 0.5], ids=repr)
def test_every_real_number_is_a_scale(scale):
    ckv, kpe = latents(2), torch.randn(2, 64)
    want = quant.quantize_tensor(ckv, kpe, 0.5, 2.0)
    for got, x in zip(quant.quantize_tensor(ckv, kpe, scale, numpy.int64(2)), want, strict=True):
        assert torch.equal(got.view(torch.uint8), x.view(torch.uint8))
    for got, x, s in zip(quant.dequantize_tensor(*want, scale, 2), want, (0.5, 2.0), strict=True):
        assert torch.equal(got, x.float() * s)
    assert torch.equal(quant.to_e4m3(ckv, scale).float(), want[0].float())


def test_to_e4m3_takes_tensors_of_scales():
    x = latents(3, 2)
    scale = torch.tensor([[[0.5], [0.25]]])
    want = quant.to_e4m3(x[:, 1], 0.25).float()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        stored = quant.to_e4m3(x, scale.to(dtype))
        assert stored.shape == x.shape
        assert torch.equal(stored[:, 1].float(), want)
    assert torch.equal(quant.to_e4m3(x[:, 1], torch.tensor(0.25)).float(), want)
    assert torch.equal(quant.to_e4m3(x[:, 1], torch.tensor(2.0**-140)).float().abs(), 448.0 * (x[:, 1] != 0))


def test_to_e4m3_can_be_compiled():
    compiled = torch.compile(quant.to_e4m3, fullgraph=True, backend="eager")
    x = latents(2)
    for scale in (0.5, torch.tensor([[0.5], [2.0]])):
        assert torch.equal(compiled(x, scale).float(), quant.to_e4m3(x, scale).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@QUANTIZE
def test_scaled_formats(quantize, groups, dtype):
    ckv = latents(7, 3).to(dtype)
    stored, scale = quantize(ckv)
    assert stored.dtype is torch.float8_e4m3fn
    assert stored.shape == (7, 3, 512)
    assert scale.dtype is torch.float32
    assert scale.shape == (7, 3, groups)
    parts = ckv.float().view(7, 3, groups, -1)
    largest = parts.abs().amax(dim=-1)
    if groups == 1:
        torch.testing.assert_close(scale, largest / 448)
    else:
        assert_least_powers_of_two(scale, largest)
    back = quant.dequantize(stored, scale).view_as(parts)
    # Half a unit in the last place of 3 mantissa bits, or half of the smallest subnormal.
    bound = torch.maximum(parts.abs() * 2**-4, scale.unsqueeze(-1) * 2**-10)
    assert ((back - parts).abs() <= bound * 1.0001).all()
    # 448 times a float32 scale may be one rounding off the largest value it was made from; with a power of two the
    # largest is stored as another number, from 224 to 448.
    torch.testing.assert_close(back.abs().amax(dim=-1), largest, rtol=1e-6 if groups == 1 else 2**-4, atol=0)


def test_groups_are_nearer_than_tokens_where_a_channel_sticks_out():
    ckv = latents(64)
    errors = [(quant.dequantize(*f(ckv)) - ckv)[:, 128:].norm() for f in (quant.quantize_token, quant.quantize_group)]
    assert errors[1] <= errors[0]


def test_tensor_format():
    ckv, kpe = latents(5, 2), torch.randn(5, 2, 64) * 1e3
    scales = quant.tensor_scale(ckv), quant.tensor_scale(kpe)
    assert scales[0] == pytest.approx(ckv.abs().max().item() / 448)
    stored = quant.quantize_tensor(ckv, kpe, *scales)
    assert all(x.dtype is torch.float8_e4m3fn for x in stored)
    for got, want, scale in zip(quant.dequantize_tensor(*stored, *scales), (ckv, kpe), scales, strict=True):
        assert ((got - want).abs() <= torch.clamp(want.abs() * 2**-4, min=scale * 2**-10) * 1.0001).all()
    small = quant.quantize_tensor(ckv, kpe, scales[0] / 4, scales[1] / 4)
    assert all(x.float().abs().max() == 448 for x in small)


def test_zero_rows_and_empty_tensors():
    ckv = torch.zeros(2, 512)
    for quantize in (quant.quantize_token, quant.quantize_group):
        stored, scale = quantize(ckv)
        assert scale.eq(1).all()
        assert quant.dequantize(stored, scale).eq(0).all()
    assert quant.tensor_scale(ckv) == 1.0
    assert quant.tensor_scale(ckv[:0]) == 1.0
    assert quant.quantize_group(ckv[:0])[1].shape == (0, 4)


def test_group_rows_are_views_of_the_pool():
    pool = torch.full((6, 16, 656), 0x7F, dtype=torch.uint8)  # NaN in e4m3
    ckv, scale, kpe = quant.group_rows(pool)
    assert [x.shape for x in (ckv, scale, kpe)] == [(6, 16, 512), (6, 16, 4), (6, 16, 64)]
    latent, rope = latents(6, 16), torch.randn(6, 16, 64).bfloat16()
    stored, scales = quant.quantize_group(latent)
    ckv[2], scale[2], kpe[2] = stored[2], scales[2], rope[2]
    row = pool[2, 5]
    assert bytes(row[:512].tolist()) == bytes(stored[2, 5].view(torch.uint8).tolist())
    assert torch.equal(row[512:528].view(torch.float32), scales[2, 5])
    assert torch.equal(row[528:].view(torch.bfloat16), rope[2, 5])
    assert pool[[0, 1, 3, 4, 5]].eq(0x7F).all()
    torch.testing.assert_close(quant.dequantize(ckv[2], scale[2]), quant.dequantize(stored[2], scales[2]))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: quant.quantize_token(torch.zeros(3, 500)),
            ValueError,
            r"ckv: expected a last dimension of 512.*\[3, 500\]",
        ),
        (lambda: quant.quantize_group([1.0]), TypeError, r"ckv: expected a torch.Tensor, got list \[1.0\]"),
        (lambda: quant.quantize_token(torch.zeros(512, dtype=torch.int32)), TypeError, "ckv: .*floating.*int32"),
        (
            lambda: quant.quantize_tensor(torch.zeros(1, 512), torch.zeros(1, 63), 1.0, 1.0),
            ValueError,
            "kpe: expected a last dimension of 64",
        ),
        (
            lambda: quant.quantize_tensor(torch.zeros(1, 512), torch.zeros(1, 64), 0.0, 1.0),
            ValueError,
            r"ckv_scale: expected a positive number from 2\^-126 to 2\^126, got 0.0",
        ),
        (
            lambda: quant.dequantize_tensor(stored(1, 512), stored(1, 64), 1.0, "1"),
            TypeError,
            "kpe_scale: expected a Python number, got str '1'",
        ),
        (
            lambda: quant.dequantize_tensor(stored(1, 512), torch.zeros(1, 64), 1.0, 1.0),
            TypeError,
            "kpe: expected dtype torch.float8_e4m3fn, got torch.float32",
        ),
        (
            lambda: quant.dequantize_tensor(stored(1, 512).view(torch.float8_e5m2), stored(1, 64), 1.0, 1.0),
            TypeError,
            "ckv: expected dtype torch.float8_e4m3fn, got torch.float8_e5m2",
        ),
        (
            lambda: quant.dequantize(torch.zeros(2, 512), torch.ones(2, 4)),
            TypeError,
            "ckv: expected dtype torch.float8_e4m3fn, got torch.float32",
        ),
        (
            lambda: quant.dequantize(stored(2, 512), torch.zeros(2, 3)),
            ValueError,
            r"ckv_scale_arr: expected shape \[2, 1 or 4\], got \[2, 3\]",
        ),
        (
            lambda: quant.dequantize(stored(2, 512), torch.zeros(2, 4, dtype=torch.float64)),
            TypeError,
            "ckv_scale_arr: expected a float32 tensor, got torch.float64",
        ),
        (
            lambda: quant.dequantize(stored(2, 512), torch.zeros(2, 4).to_sparse()),
            TypeError,
            "ckv_scale_arr: expected a dense torch.Tensor, got a tensor of layout torch.sparse_coo",
        ),
        (
            lambda: quant.quantize_token(torch.zeros(2, 512).to_sparse()),
            TypeError,
            "ckv: expected a dense torch.Tensor, got a tensor of layout torch.sparse_coo",
        ),
        (
            lambda: quant.quantize_group(torch.nested.nested_tensor([torch.zeros(2, 512), torch.zeros(1, 512)])),
            TypeError,
            "ckv: expected a dense torch.Tensor, got a nested tensor",
        ),
        (
            lambda: quant.group_rows(torch.zeros(2, 656, dtype=torch.uint8).to_sparse()),
            TypeError,
            "pool: expected a dense torch.Tensor, got a tensor of layout torch.sparse_coo",
        ),
        (lambda: quant.tensor_scale([1.0]), TypeError, "x: expected a torch.Tensor, got list"),
        (lambda: quant.tensor_scale(torch.ones(3, dtype=torch.int32)), TypeError, "x: .*floating.*int32"),
        (
            lambda: quant.tensor_scale(torch.ones(3, device="meta")),
            ValueError,
            "x: expected a tensor that has values, got one on the meta device",
        ),
        (lambda: quant.group_rows(torch.zeros(2, 656)), TypeError, "pool: expected a uint8 tensor, got torch.float32"),
        (
            lambda: quant.group_rows(torch.zeros(2, 640, dtype=torch.uint8)),
            ValueError,
            r"pool: expected a last dimension of 656, got shape \[2, 640\]",
        ),
        (
            lambda: quant.group_rows(torch.zeros(2, 657, dtype=torch.uint8)[:, :656]),
            ValueError,
            r"pool: .*multiples of 4 bytes, got strides \[657, 1\]",
        ),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()


def stored(*shape):
    return torch.zeros(shape).to(E4M3)


NUMBER = r"expected a positive number from 2\^-126 to 2\^126, got "


@pytest.mark.parametrize(
    ("x", "scale", "error", "message"),
    [
        ([1.0], 1.0, TypeError, "x: expected a torch.Tensor, got list"),
        (1.0, 1.0, TypeError, "x: expected a torch.Tensor, got float 1.0"),
        (None, 1.0, TypeError, "x: expected a torch.Tensor, got NoneType"),
        (torch.ones(2, dtype=torch.int32), 1.0, TypeError, "x: expected a floating-point dtype, got torch.int32"),
        (torch.ones(2).to_sparse(), 1.0, TypeError, "x: expected a dense torch.Tensor"),
        (torch.ones(2), None, TypeError, "scale: expected a Python number, got NoneType None"),
        (torch.ones(2), "1", TypeError, "scale: expected a Python number, got str '1'"),
        (torch.ones(2), True, TypeError, "scale: expected a Python number, got bool True"),
        (torch.ones(2), [1.0], TypeError, "scale: expected a Python number, got list"),
        (torch.ones(2), 0, ValueError, f"scale: {NUMBER}0"),
        (torch.ones(2), 0.0, ValueError, f"scale: {NUMBER}0.0"),
        (torch.ones(2), -1, ValueError, f"scale: {NUMBER}-1"),
        (torch.ones(2), NAN, ValueError, f"scale: {NUMBER}nan"),
        (torch.ones(2), INF, ValueError, f"scale: {NUMBER}inf"),
        (torch.ones(2), 2.0**-127, ValueError, f"scale: {NUMBER}5.87"),
        (torch.ones(2), 10**400, ValueError, f"scale: {NUMBER}1000"),
        (torch.ones(2), torch.tensor([1.0, 0.0]), ValueError, "scale: expected positive finite numbers, got 0.0"),
        (torch.ones(2), torch.tensor(-2.0), ValueError, "scale: expected positive finite numbers, got -2.0"),
        (torch.ones(2), torch.tensor([NAN, 1.0]), ValueError, "scale: expected positive finite numbers, got nan"),
        (torch.ones(2), torch.tensor(INF), ValueError, "scale: expected positive finite numbers, got inf"),
        # 0 as float32
        (torch.ones(2), torch.tensor(1e-60).double() * 1e-30, ValueError, "scale: expected positive finite numbers"),
        (torch.ones(2), torch.ones(2).int(), TypeError, "scale: expected a floating-point dtype, got torch.int32"),
        (torch.ones(2), torch.ones(2).to_sparse(), TypeError, "scale: expected a dense torch.Tensor"),
        (torch.ones(2), torch.ones(3), ValueError, r"scale: expected a shape that broadcasts to \[2\], got \[3\]"),
        (torch.ones(1), torch.ones(2), ValueError, r"scale: expected a shape that broadcasts to \[1\], got \[2\]"),
        (torch.ones(2), torch.ones(1, 1), ValueError, r"scale: expected a shape that .* \[2\], got \[1, 1\]"),
        (torch.ones(2), torch.ones(2).to("meta"), ValueError, r"scale: expected device cpu \(that of x\), got meta"),
    ],
    ids=repr,
)
def test_to_e4m3_names_what_is_wrong(x, scale, error, message):
    with pytest.raises(error, match=f"^{message}"):
        quant.to_e4m3(x, scale)
