"""Hypothesis over the arguments of append_to_cache, merge_states and mla_cute.quant, as test_fuzz.py does."""

import functools
import math

import pytest
import torch
from fuzz_case import FLOATS_OF_NO_CACHE, NO_BASES, NO_SCALES, assert_all_refused, snapshot, written, wrong_tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mla_cute
from mla_cute import quant

FP8 = torch.float8_e4m3fn
DTYPES = (torch.bfloat16, torch.float16)

fuzz = functools.partial(
    settings, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)

# ------------------------------------------------------------------------------------------------ append

# Finite magnitudes of e4m3 in order: their position is their code, so that an even code has an even mantissa.
E4M3 = torch.arange(127, dtype=torch.uint8).view(FP8).double()


def nearest_e4m3(x):
    """x (float64) rounded to e4m3 by search: nearest, ties to the even code, saturating. float64."""
    above = torch.searchsorted(E4M3, x.abs().clamp(max=448.0).contiguous()).clamp(max=126)
    below = (above - 1).clamp(min=0)
    magnitude = x.abs().clamp(max=448.0)
    up, down = E4M3[above] - magnitude, magnitude - E4M3[below]
    code = torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return E4M3[code] * x.sign()


def scales_of(parts):
    """amax / 448 as float32 divides, of 128 channels rounded up to a power of two."""
    scales = parts.abs().amax(-1) / torch.full((), 448.0)
    if parts.shape[-1] == 512:
        return scales
    mantissa, exponent = torch.frexp(scales)
    return torch.ldexp(torch.ones(()), torch.where(mantissa == 0.5, exponent - 1, exponent))


def quotient(x, scale):
    """x / scale as float32 divides, in float64."""
    return (x.float() / torch.as_tensor(scale, dtype=torch.float32)).double()


@st.composite
def append_args(draw):
    kv_format = draw(st.sampled_from(("", "tensor", "token", "group")))
    dtype = draw(st.sampled_from(DTYPES))
    pages, page_size = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    n = draw(st.integers(1, pages * page_size))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    tokens = torch.randn(n, 576, generator=generator) * 10 ** draw(st.integers(-2, 2))
    slots = torch.randperm(pages * page_size, generator=generator)[:n]
    slots[draw(st.integers(0, n - 1))] = draw(st.sampled_from((-1, -7, int(slots[0]))))
    slots[1:][slots[1:] == slots[0]] = -1
    ckv_dtype = FP8 if kv_format else dtype
    kpe_dtype = FP8 if kv_format == "tensor" else dtype
    width = {"token": 1, "group": 4}.get(kv_format)
    pool = torch.zeros(pages, page_size, 576)
    return kv_format, {
        "ckv": tokens[:, :512].to(dtype),
        "kpe": tokens[:, 512:].to(dtype),
        "ckv_cache": pool.to(ckv_dtype)[..., :512],
        "kpe_cache": pool.to(kpe_dtype)[..., 512:],
        "slot_mapping": slots.to(draw(st.sampled_from((torch.int32, torch.int64)))),
        "ckv_scale": 0.013 if kv_format == "tensor" else 1.0,
        "kpe_scale": 0.7 if kv_format == "tensor" else 1.0,
        "ckv_scale_arr": torch.full((pages, page_size, width), 5.0) if width else None,
    }


@fuzz(max_examples=60)
@given(append_args())
def test_a_valid_append_is_right(drawn):
    kv_format, args = drawn
    ckv, kpe, slots = args["ckv"], args["kpe"], args["slot_mapping"]
    page_size = args["ckv_cache"].shape[1]
    mla_cute.append_to_cache(**args)
    touched = torch.zeros(args["ckv_cache"].shape[:2], dtype=torch.bool)
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        at = divmod(slot, page_size)
        touched[at] = True
        want_ckv, want_kpe = ckv[token].double(), kpe[token].double()
        if kv_format == "tensor":
            want_ckv = nearest_e4m3(quotient(ckv[token], args["ckv_scale"]))
            want_kpe = nearest_e4m3(quotient(kpe[token], args["kpe_scale"]))
        elif kv_format:
            groups = ckv[token].view(args["ckv_scale_arr"].shape[-1], -1)
            scales = scales_of(groups.float())
            assert torch.equal(args["ckv_scale_arr"][at], scales)
            want_ckv = nearest_e4m3(quotient(groups, scales[:, None])).flatten()
        assert torch.equal(args["ckv_cache"][at].double(), want_ckv)
        assert torch.equal(args["kpe_cache"][at].double(), want_kpe)
    for name, untouched in (("ckv_cache", 0.0), ("kpe_cache", 0.0), ("ckv_scale_arr", 5.0)):
        if args[name] is not None:
            assert (args[name][~touched].float() == untouched).all()


def wrong_append(kv_format, args):
    for name in ("ckv", "kpe", "ckv_cache", "kpe_cache"):
        # a cache with other pages is refused for what it lies beside
        yield from ((name, *x) for x in wrong_tensors(args[name], dtypes=FLOATS_OF_NO_CACHE))
    yield from (("slot_mapping", *x) for x in wrong_tensors(args["slot_mapping"], dtypes=(torch.int16, torch.float32))
                if x[0] != "torch.int64")  # fmt: skip
    for name in ("ckv_scale", "kpe_scale"):
        yield from ((name, repr(x)[:40], x) for x in NO_SCALES)
        if kv_format != "tensor":
            yield name, "2.0", 2.0
    array = args["ckv_scale_arr"]
    if array is not None:
        yield from (("ckv_scale_arr", *x) for x in wrong_tensors(array, dtypes=(torch.bfloat16,)))
        if array.shape[0] > 1:
            yield "ckv_scale_arr", "expanded", array[:1].expand(array.shape)
    else:
        yield "ckv_scale_arr", "not of this format", torch.ones(*args["ckv_cache"].shape[:2], 1)
    for name in ("ckv_cache", "kpe_cache"):
        if args[name].shape[1] > 1:
            yield name, "expanded", args[name][:, :1].expand(args[name].shape)
    slots = args["slot_mapping"].clone()
    slots[-1] = args["ckv_cache"].shape[0] * args["ckv_cache"].shape[1]
    yield "slot_mapping", "beyond the cache", slots


@fuzz(max_examples=30)
@given(append_args())
def test_a_wrong_argument_of_append_is_refused(drawn):
    kv_format, args = drawn
    assert_all_refused(mla_cute.append_to_cache, args, wrong_append(kv_format, args))


# ------------------------------------------------------------------------------------------------ merge_states


@st.composite
def states(draw):
    dtype = draw(st.sampled_from((*DTYPES, torch.float32)))
    lead = draw(st.lists(st.integers(1, 3), max_size=2))
    shape = (*lead, draw(st.integers(1, 4)), draw(st.sampled_from((1, 8, 512))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    o_a, o_b = torch.randn(2, *shape, generator=generator).to(dtype)
    lse_a, lse_b = 20 * torch.randn(2, *shape[:-1], generator=generator)
    for o, lse in ((o_a, lse_a), (o_b, lse_b)):
        unseen = torch.rand(shape[:-1], generator=generator) < 0.2
        lse[unseen], o[unseen] = -math.inf, math.nan
    gives = draw(st.booleans())
    return {
        "o_a": o_a,
        "lse_a": lse_a,
        "o_b": o_b,
        "lse_b": lse_b,
        "lse_base": draw(st.sampled_from((2, "e"))),
        "out": torch.full_like(o_a, 7.0) if gives else None,
        "lse": torch.full_like(lse_a, 7.0) if gives else None,
    }


@fuzz(max_examples=60)
@given(states())
def test_a_valid_merge_is_right(args):
    inputs = snapshot({name: args[name] for name in ("o_a", "lse_a", "o_b", "lse_b")})
    out, lse = mla_cute.merge_states(**args)
    assert not written(inputs)
    unit = math.log(2) if args["lse_base"] == 2 else 1.0
    stack = torch.stack([args["lse_a"], args["lse_b"]]).double() * unit
    want_lse = stack.logsumexp(0)
    weights = (stack - want_lse).exp().nan_to_num(0.0).unsqueeze(-1)
    values = torch.stack([args["o_a"], args["o_b"]]).double()
    want = torch.where(weights > 0, weights * values, 0.0).sum(0)
    eps = torch.finfo(out.dtype).eps
    # float32 exponentials of arguments up to 100
    torch.testing.assert_close(out.double(), want, rtol=max(eps, 2e-5), atol=max(eps, 2e-5))
    torch.testing.assert_close(lse.double(), want_lse / unit, rtol=1e-6, atol=1e-5)


def wrong_merge(args):
    for name in ("o_a", "o_b", "out"):
        x = args[name] if args[name] is not None else args["o_a"]
        wrong = wrong_tensors(x, dtypes=(torch.float64, FP8), optional=name == "out")
        yield from ((name, *pair) for pair in wrong)
        if name == "out" and x.shape[0] > 1:
            yield name, "expanded", x[:1].expand(x.shape)
    for name in ("lse_a", "lse_b", "lse"):
        x = args[name] if args[name] is not None else args["lse_a"]
        wrong = wrong_tensors(x, dtypes=(torch.float64, torch.bfloat16), optional=name == "lse")
        yield from ((name, *pair) for pair in wrong)
        if name == "lse" and x.shape[0] > 1:
            yield name, "expanded", x[:1].expand(x.shape)
    yield from (("lse_base", repr(x), x) for x in NO_BASES)


@fuzz(max_examples=30)
@given(states())
def test_a_wrong_argument_of_merge_is_refused(args):
    assert_all_refused(mla_cute.merge_states, args, wrong_merge(args))


# ------------------------------------------------------------------------------------------------ quant

TOKENS = st.builds(
    lambda shape, dtype, seed: (3 * torch.randn(*shape, 576, generator=torch.Generator().manual_seed(seed))).to(dtype),
    st.lists(st.integers(1, 3), max_size=3),
    st.sampled_from((*DTYPES, torch.float32)),
    st.integers(0, 1000),
)


def wrong_floats(x):
    """A tensor of any float dtype and leading dimensions."""
    kept = ("one more dimension", "one dimension fewer", "fewer rows", "no rows", "more rows", "on the meta device")
    if x.dim() == 1:
        kept = ("one more dimension", "no rows", "on the meta device")  # kpe may have no channels
    return (pair for pair in wrong_tensors(x) if pair[0] not in kept)


@fuzz(max_examples=40)
@given(TOKENS)
def test_quantise_tensor(tokens):
    ckv, kpe = tokens[..., :512], tokens[..., 512:]
    args = {"ckv": ckv, "kpe": kpe, "ckv_scale": 0.013, "kpe_scale": 1}
    wrong = [("ckv", *x) for x in wrong_floats(ckv)] + [("kpe", *x) for x in wrong_floats(kpe)]
    wrong += [(name, repr(x), x) for name in ("ckv_scale", "kpe_scale") for x in NO_SCALES]
    stored = quant.quantize_tensor(**args)
    for x, got, scale in zip((ckv, kpe), stored, (0.013, 1), strict=True):
        assert torch.equal(got.double(), nearest_e4m3(quotient(x, scale)))
    assert_all_refused(quant.quantize_tensor, args, wrong)
    args |= {"ckv": stored[0], "kpe": stored[1]}
    for got, x, scale in zip(quant.dequantize_tensor(**args), stored, (0.013, 1), strict=True):
        assert torch.equal(got, x.float() * scale)
    assert_all_refused(quant.dequantize_tensor, args, wrong)


@pytest.mark.parametrize("groups", [1, 4])
def test_quantise_by_token_and_group(groups):
    quantize = quant.quantize_token if groups == 1 else quant.quantize_group

    @fuzz(max_examples=30)
    @given(TOKENS)
    def check(tokens):
        ckv = tokens[..., :512]
        stored, array = quantize(ckv)
        parts = ckv.reshape(-1, groups, 512 // groups).float()
        scales = scales_of(parts)
        assert torch.equal(array, scales.view(array.shape))
        want = nearest_e4m3(quotient(parts, scales[..., None])).view(ckv.shape)
        assert torch.equal(stored.double(), want)
        assert_all_refused(quantize, {"ckv": ckv}, [("ckv", *x) for x in wrong_floats(ckv)])

        args = {"ckv": stored, "ckv_scale_arr": array}
        real = quant.dequantize(**args)
        assert torch.equal(real, (stored.float().view(parts.shape) * scales[..., None]).view(ckv.shape))
        # not yet refused, finding "quant devices": one of the two on the meta device
        wrong = [("ckv", *x) for x in wrong_floats(stored)]
        wrong += [("ckv_scale_arr", *x) for x in wrong_tensors(array, dtypes=(torch.float64, torch.bfloat16))]
        if ckv.dim() > 1:
            wrong.append(("ckv", "fewer rows", stored[:-1]))
        assert_all_refused(quant.dequantize, args, wrong)

    check()


@fuzz(max_examples=20)
@given(st.lists(st.integers(1, 3), max_size=3))
def test_group_rows(lead):
    pool = torch.zeros(*lead, 656, dtype=torch.uint8)
    ckv, array, kpe = quant.group_rows(pool)
    array.fill_(1.0)
    kpe.fill_(2.0)
    assert (ckv.float() == 0).all()
    assert pool[..., 512:528].contiguous().view(torch.float32).eq(1.0).all()
    wrong = [x for x in wrong_floats(pool) if x[0] != "torch.uint8"]
    wrong += [("float32", pool.float()), ("int8", pool.view(torch.int8))]
    wrong.append(("every other byte", torch.zeros(*lead, 1312, dtype=torch.uint8)[..., ::2]))
    wrong.append(("odd offset", torch.zeros(*lead, 660, dtype=torch.uint8)[..., 2:658]))
    assert_all_refused(quant.group_rows, {"pool": pool}, [("pool", *x) for x in wrong])
