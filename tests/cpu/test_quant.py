"""FP8 cache formats against the definition of e4m3, value by value."""

import math

import pytest
import torch

from mla_cute import quant


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("quantize", "groups"), [(quant.quantize_token, 1), (quant.quantize_group, 4)])
def test_scaled_formats(quantize, groups, dtype):
    ckv = latents(7, 3).to(dtype)
    stored, scale = quantize(ckv)
    assert stored.dtype is torch.float8_e4m3fn
    assert stored.shape == (7, 3, 512)
    assert scale.dtype is torch.float32
    assert scale.shape == (7, 3, groups)
    parts = ckv.float().view(7, 3, groups, -1)
    torch.testing.assert_close(scale, parts.abs().amax(dim=-1) / 448)
    back = quant.dequantize(stored, scale).view_as(parts)
    # Half a unit in the last place of 3 mantissa bits, or half of the smallest subnormal.
    bound = torch.maximum(parts.abs() * 2**-4, scale.unsqueeze(-1) * 2**-10)
    assert ((back - parts).abs() <= bound * 1.0001).all()
    # 448 times a float32 scale may be one rounding off the largest value it was made from.
    torch.testing.assert_close(back.abs().amax(dim=-1), parts.abs().amax(dim=-1), rtol=1e-6, atol=0)


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
        (lambda: quant.quantize_group([1.0]), TypeError, "ckv: expected a tensor, got list"),
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
            lambda: quant.dequantize_tensor(torch.zeros(1, 512), torch.zeros(1, 64), 1.0, "1"),
            TypeError,
            "kpe_scale: expected a float, got '1'",
        ),
        (
            lambda: quant.dequantize(torch.zeros(2, 512), torch.zeros(2, 3)),
            ValueError,
            r"ckv_scale_arr: expected shape \[2, 1 or 4\], got \[2, 3\]",
        ),
        (
            lambda: quant.dequantize(torch.zeros(2, 512), torch.zeros(2, 4, dtype=torch.float64)),
            TypeError,
            "ckv_scale_arr: expected a float32 tensor, got torch.float64",
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
    with pytest.raises(error, match=message):
        call()
