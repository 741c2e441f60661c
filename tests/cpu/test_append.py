"""append_to_cache on CPU tensors against token-by-token quantisation, and its checks."""

import math

import pytest
import torch
from append_case import DTYPES, E4M3, LAYOUTS, NUM_SLOTS, SLOT_DTYPES, Cache, make_slots, make_tokens

import mla_cute
from mla_cute import append, quant
from mla_cute.dims import HeadDims

NAN, INF = math.nan, math.inf


def write_one(cache, ckv, kpe, slot):
    """One token, from the table of formats in quant.py."""
    page, row = divmod(slot, cache.page_size)
    if cache.kv_format == "tensor":
        ckv, kpe = quant.quantize_tensor(ckv, kpe, *cache.keywords().values())
    elif cache.kv_format:
        ckv, scale = {"token": quant.quantize_token, "group": quant.quantize_group}[cache.kv_format](ckv)
        cache.scales[page, row] = scale
    for target, values in zip(cache.args(), (ckv, kpe), strict=True):
        raw = torch.int16 if target.element_size() == 2 else torch.uint8
        target.view(raw)[page, row] = values.view(raw)


@pytest.mark.parametrize("slot_dtype", SLOT_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_token_lands_in_its_slot_and_nothing_else_changes(layout, dtype, slot_dtype):
    cache = Cache(layout, dtype)
    ckv, kpe = make_tokens(NUM_SLOTS - 2, dtype)
    slots = make_slots(len(ckv), slot_dtype)
    expected = cache.to("cpu")
    for i, slot in enumerate(slots.tolist()):
        if slot >= 0:
            write_one(expected, ckv[i], kpe[i], slot)
    result = mla_cute.append_to_cache(ckv, kpe, *cache.args(), slots, **cache.keywords())
    assert result is None
    cache.assert_equal(expected)
    # that the comparison can fail: a padding token's slot, and a written one
    for token in (4, 0):
        broken = cache.to("cpu")
        write_one(broken, ckv[1], kpe[1], slots[token].item() if token == 0 else free_slot(slots))
        with pytest.raises(AssertionError, match=r"differ|ckv|kpe"):
            broken.assert_equal(expected)


def free_slot(slots):
    return next(slot for slot in range(NUM_SLOTS) if slot not in slots.tolist())


def test_tokens_and_slots_may_be_strided():
    cache, n = Cache("group_656", torch.bfloat16), 12
    ckv, kpe = make_tokens(n, torch.bfloat16)
    slots = make_slots(n, torch.int64)
    expected = cache.appended(ckv, kpe, slots)
    fused = torch.full((2 * n, 576), NAN, dtype=torch.bfloat16)
    fused[::2] = torch.cat([ckv, kpe], dim=1)
    spread = torch.full((3 * n,), NUM_SLOTS)
    spread[::3] = slots
    mla_cute.append_to_cache(fused[::2, :512], fused[::2, 512:], *cache.args(), spread[::3], **cache.keywords())
    cache.assert_equal(expected)


def test_scale_is_the_float32_division():
    """The reciprocal of 448 would be off in the last bit for a third of these."""
    ckv = torch.zeros(128, 512, dtype=torch.bfloat16)
    ckv[:, 9] = -(torch.arange(128) + 128.0).bfloat16()
    cache = Cache("token", torch.bfloat16, pages=2, page_size=64)
    mla_cute.append_to_cache(ckv, ckv[:, :64], *cache.args(), torch.arange(128), **cache.keywords())
    want = [torch.tensor(value / 448, dtype=torch.float64).float().item() for value in range(128, 256)]
    assert cache.scales.flatten().tolist() == want
    assert cache.ckv.float()[..., 9].eq(-448).all()
    by_reciprocal = (torch.arange(128) + 128.0) * torch.tensor(1 / 448)
    assert (by_reciprocal != torch.tensor(want)).sum() > 20


def test_scales_of_groups_are_powers_of_two():
    """Rows that other kernels may read with scales and products rounded to bf16, to the same numbers."""
    ckv = torch.zeros(9, 512).bfloat16()
    above = 448 + 2  # one ulp of bf16
    ckv[:, 0] = torch.tensor([448.0, above, 446.0, 1.0, 448 * 2.0**-126, above * 2.0**-126, 2.0**-133, 0.0, INF])
    ckv[:, 1:] = torch.linspace(-1, 1, 511) * ckv[:, :1].nan_to_num(posinf=3.0).clamp(max=448)
    cache = Cache("group_656", torch.bfloat16, pages=1, page_size=9)
    cache.scales.fill_(NAN)
    mla_cute.append_to_cache(ckv, ckv[:, :64], *cache.args(), torch.arange(9), **cache.keywords())
    scales, stored = cache.scales[0], cache.ckv[0]
    want = [1.0, 2.0, 1.0, 2.0**-8, 2.0**-126, 2.0**-125, 2.0**-126, 1.0, 1.0]
    assert scales[:, 0].tolist() == want
    groups = stored.bfloat16().view(9, 4, 128)
    in_bf16 = (groups * scales.bfloat16()[..., None]).view(9, 512)
    assert torch.equal(in_bf16.float(), quant.dequantize(stored.contiguous(), scales.contiguous()))
    assert stored[0, 0].float() == 448
    assert stored[1, 0].float() == 224  # 225 is nearer to it than to 240


@pytest.mark.parametrize("layout", ["token", "group"])
def test_special_values(layout):
    ckv = torch.zeros(5, 512).bfloat16()
    ckv[0, :3] = torch.tensor([NAN, 500.0, -1.0])
    ckv[1, :5] = torch.tensor([INF, 2.0, -INF, 448.0, -500.0])
    ckv[2, 0] = -0.0
    ckv[3, :4] = torch.tensor([448.0, -1.0625, 1.1875, 2**-10])  # ties, and half of the least subnormal
    ckv[4, 200] = 7.0
    kpe = torch.zeros(5, 64).bfloat16()
    kpe[0, :3] = torch.tensor([NAN, -INF, -0.0])
    cache = Cache(layout, torch.bfloat16)
    mla_cute.append_to_cache(ckv, kpe, *cache.args(), torch.arange(5), **cache.keywords())
    stored, scales = cache.ckv[0].float(), cache.scales[0]
    assert stored[0, 0].isnan()
    assert stored[0, 1:].tolist() == [448.0, -1.0] + [0.0] * 509
    assert scales[0].eq(1).all()
    assert stored[1].tolist() == [448.0, 2.0, -448.0, 448.0, -448.0] + [0.0] * 507
    assert scales[1].eq(1).all()
    assert cache.ckv[0, 2, :2].view(torch.uint8).tolist() == [0x80, 0]
    assert scales[2].eq(1).all()
    assert stored[3, :4].tolist() == [448.0, -1.0, 1.25, 0.0]
    assert scales[3, 0] == 1
    # 7 / 448 is a power of two
    assert scales[4].tolist() == ([1.0, 7 / 448, 1.0, 1.0] if layout == "group" else [7 / 448])
    assert cache.kpe[0, 0, :3].view(torch.int16).tolist() == kpe[0, :3].view(torch.int16).tolist()


def test_a_copy_keeps_the_bits_of_nan():
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(128, 512)
    ckv = patterns.view(torch.bfloat16)
    cache = Cache("16bit_fused", torch.bfloat16, pages=2, page_size=64)
    mla_cute.append_to_cache(ckv, ckv[:, :64], *cache.args(), torch.arange(128))
    assert torch.equal(cache.ckv.reshape(128, 512).view(torch.int16), patterns)
    assert torch.equal(cache.kpe.reshape(128, 64).view(torch.int16), patterns[:, :64])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_to_write(layout):
    cache = Cache(layout, torch.float16)
    before = cache.to("cpu")
    ckv, kpe = make_tokens(3, torch.float16)
    mla_cute.append_to_cache(ckv[:0], kpe[:0], *cache.args(), torch.tensor([], dtype=torch.int32), **cache.keywords())
    mla_cute.append_to_cache(ckv, kpe, *cache.args(), torch.tensor([-1, -2, -(2**40)]), **cache.keywords())
    cache.assert_equal(before)


def test_no_gradient_is_recorded():
    cache = Cache("16bit", torch.bfloat16)
    ckv, kpe = make_tokens(3, torch.bfloat16)
    expected = cache.appended(ckv, kpe, torch.arange(3))
    mla_cute.append_to_cache(ckv.requires_grad_(), kpe, *cache.args(), torch.arange(3))
    cache.assert_equal(expected)


# ------------------------------------------------------------------------------------------------ checks


def call(layout="group", n=4, **changes):
    """The arguments of a good call by name, with changes: a value, or a function of what it was."""
    cache = Cache(layout, torch.bfloat16)
    ckv, kpe = make_tokens(n, torch.bfloat16)
    arguments = {
        "ckv": ckv,
        "kpe": kpe,
        "ckv_cache": cache.ckv,
        "kpe_cache": cache.kpe,
        "slot_mapping": torch.arange(n),
        "ckv_scale": 1.0,
        "kpe_scale": 1.0,
        "ckv_scale_arr": None,
    } | cache.keywords()
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    return cache, arguments


def half(x):
    return x.to(torch.float16)


def fp8(x):
    return x.to(E4M3)


WRONG = [
    ("group", {"ckv": [1.0]}, TypeError, r"ckv: expected a torch.Tensor, got list"),
    ("group", {"ckv": lambda x: x.float()}, TypeError, r"ckv: expected dtype torch.bfloat16 or torch.float16, got"),
    ("group", {"ckv": fp8}, TypeError, r"ckv: expected dtype torch.bfloat16 or torch.float16, got torch.float8"),
    ("group", {"ckv": lambda x: x[:, :500]}, ValueError, r"ckv: expected shape \[n, 512 or 256\], got \[4, 500\]"),
    ("group", {"ckv": lambda x: x[0]}, ValueError, r"ckv: expected shape \[n, 512 or 256\], got \[512\]"),
    ("group", {"ckv": lambda x: x.to("meta")}, ValueError, r"ckv: expected a tensor on a cuda device or the cpu, got"),
    (
        "group",
        {"ckv": torch.zeros(1, 512, dtype=torch.bfloat16).expand(2**31, 512)},
        ValueError,
        r"ckv: expected at most 2147483644 tokens \(dimension 0\), got 2147483648",
    ),
    (
        "group",
        {"ckv": lambda x: x.to_sparse()},
        TypeError,
        r"ckv: expected a dense torch.Tensor, got a tensor of layout torch.sparse_coo",
    ),
    ("group", {"kpe": lambda x: x.to_sparse()}, TypeError, r"kpe: expected a dense torch.Tensor, got"),
    ("group", {"slot_mapping": lambda x: x.to_sparse()}, TypeError, r"slot_mapping: expected a dense torch.Tensor"),
    ("group", {"ckv_scale_arr": lambda x: x.to_sparse()}, TypeError, r"ckv_scale_arr: expected a dense torch.Tensor"),
    ("16bit", {"ckv_cache": lambda x: x.to_sparse()}, TypeError, r"ckv_cache: expected a dense torch.Tensor, got"),
    ("16bit", {"kpe_cache": lambda x: x.to_sparse()}, TypeError, r"kpe_cache: expected a dense torch.Tensor, got"),
    ("group", {"kpe": None}, TypeError, r"kpe: expected a torch.Tensor, got NoneType"),
    ("group", {"kpe": half}, TypeError, r"kpe: expected dtype torch.bfloat16 \(that of ckv\), got torch.float16"),
    ("group", {"kpe": lambda x: x[:3]}, ValueError, r"kpe: expected shape \[4, 64\], got \[3, 64\]"),
    ("group", {"kpe": lambda x: x.to("meta")}, ValueError, r"kpe: expected device cpu \(that of ckv\), got meta"),
    ("group", {"ckv_cache": None}, TypeError, r"ckv_cache: expected a torch.Tensor, got"),
    (
        "16bit",
        {"ckv_cache": half},
        TypeError,
        r"ckv_cache: expected dtype torch.bfloat16 \(that of ckv\) or torch.float8_e4m3fn, got torch.float16",
    ),
    ("group", {"ckv_cache": lambda x: x.view(torch.uint8)}, TypeError, r"ckv_cache: expected dtype .* got torch.uint8"),
    (
        "group",
        {"ckv_cache": lambda x: x[0]},
        ValueError,
        r"ckv_cache: expected shape \[num_pages, page_size, 512\], got",
    ),
    ("group", {"ckv_cache": lambda x: x[:0]}, ValueError, r"ckv_cache: expected num_pages >= 1"),
    ("group", {"ckv_cache": lambda x: x[:, :0]}, ValueError, r"ckv_cache: expected page_size >= 1"),
    (
        "group",
        {"ckv_cache": lambda x: x[:1].expand(2**31, 7, 512)},
        ValueError,
        r"ckv_cache: expected num_pages <= 2147483644 \(dimension 0\), got 2147483648",
    ),
    (
        "group",
        {"ckv_cache": lambda x: x[:, :1].expand(5, 2**31, 512)},
        ValueError,
        r"ckv_cache: expected page_size <= 2147483644 \(dimension 1\), got 2147483648",
    ),
    ("group", {"ckv_cache": lambda x: x[:1].expand(5, 7, 512)}, ValueError, r"ckv_cache: expected memory for every"),
    (
        "group",
        {"ckv_cache": lambda x: x.to("meta")},
        ValueError,
        r"ckv_cache: expected device cpu \(that of ckv\), got",
    ),
    ("group", {"kpe_cache": None}, TypeError, r"kpe_cache: expected a torch.Tensor, got"),
    (
        "group",
        {"kpe_cache": half},
        TypeError,
        r"kpe_cache: expected dtype torch.bfloat16 \(that of kpe\) or torch.float8_e4m3fn, got torch.float16",
    ),
    ("16bit", {"kpe_cache": fp8}, TypeError, r"kpe_cache: expected dtype torch.bfloat16 \(that of ckv_cache\), got"),
    (
        "group",
        {"kpe_cache": lambda x: x[:, 1:]},
        ValueError,
        r"kpe_cache: expected shape \[5, 7, 64\], got \[5, 6, 64\]",
    ),
    (
        "group",
        {"kpe_cache": lambda x: x.to("meta")},
        ValueError,
        r"kpe_cache: expected device cpu \(that of ckv\), got",
    ),
    ("group", {"slot_mapping": [0, 1, 2, 3]}, TypeError, r"slot_mapping: expected a torch.Tensor, got list"),
    (
        "group",
        {"slot_mapping": lambda x: x.short()},
        TypeError,
        r"slot_mapping: expected dtype torch.int32 or torch.int64",
    ),
    ("group", {"slot_mapping": lambda x: x[:3]}, ValueError, r"slot_mapping: expected shape \[4\], got \[3\]"),
    (
        "group",
        {"slot_mapping": lambda x: x.view(2, 2)},
        ValueError,
        r"slot_mapping: expected shape \[4\], got \[2, 2\]",
    ),
    (
        "group",
        {"slot_mapping": lambda x: x.to("meta")},
        ValueError,
        r"slot_mapping: expected device cpu \(that of ckv\)",
    ),
    (
        "group",
        {"slot_mapping": torch.tensor([0, -1, 35, 34])},
        ValueError,
        r"slot_mapping: expected values below 35 \(num_pages \* page_size\), got 35 at position 2",
    ),
    ("group", {"ckv_scale_arr": None}, ValueError, r"ckv_scale_arr: expected a tensor of scales with a ckv_cache of"),
    ("group", {"ckv_scale_arr": lambda x: x.double()}, TypeError, r"ckv_scale_arr: expected dtype torch.float32, got"),
    (
        "group",
        {"ckv_scale_arr": lambda x: x[..., :2]},
        ValueError,
        r"ckv_scale_arr: expected shape \[5, 7, 1 or 4\], got",
    ),
    ("group", {"ckv_scale_arr": lambda x: x[0]}, ValueError, r"ckv_scale_arr: expected shape \[5, 7, 1 or 4\], got"),
    (
        "group",
        {"ckv_scale_arr": lambda x: x.to("meta")},
        ValueError,
        r"ckv_scale_arr: expected device cpu \(that of ckv\)",
    ),
    (
        "group",
        {"ckv_scale_arr": lambda x: x[..., :1].expand(5, 7, 4)},
        ValueError,
        r"ckv_scale_arr: expected memory for every element",
    ),
    ("tensor", {"ckv_scale_arr": torch.ones(5, 7, 1)}, ValueError, r"ckv_scale_arr: expected None with a kpe_cache of"),
    (
        "16bit",
        {"ckv_scale_arr": torch.ones(5, 7, 1)},
        ValueError,
        r"ckv_scale_arr: expected None with a 16-bit ckv_cache",
    ),
    ("group", {"ckv_scale": 0.5}, ValueError, r"ckv_scale: expected 1.0 with ckv_scale_arr, got 0.5"),
    ("token", {"kpe_scale": 2}, ValueError, r"kpe_scale: expected 1.0 with ckv_scale_arr, got 2"),
    ("16bit", {"ckv_scale": 0.5}, ValueError, r"ckv_scale: expected 1.0 with a 16-bit ckv_cache, got 0.5"),
    ("16bit", {"kpe_scale": NAN}, ValueError, r"kpe_scale: expected 1.0 with a 16-bit ckv_cache, got nan"),
    (
        "tensor",
        {"ckv_scale": 0.0},
        ValueError,
        r"ckv_scale: expected a positive number from 2\^-126 to 2\^126, got 0.0",
    ),
    ("tensor", {"kpe_scale": -1.0}, ValueError, r"kpe_scale: expected a positive number"),
    ("tensor", {"kpe_scale": INF}, ValueError, r"kpe_scale: expected a positive number"),
    ("tensor", {"ckv_scale": NAN}, ValueError, r"ckv_scale: expected a positive number"),
    ("tensor", {"ckv_scale": torch.ones(())}, TypeError, r"ckv_scale: expected a Python number, got a torch.Tensor"),
    ("tensor", {"kpe_scale": True}, TypeError, r"kpe_scale: expected a Python number, got bool"),
    ("group", {"ckv_scale": torch.ones(())}, TypeError, r"ckv_scale: expected a Python number, got a torch.Tensor"),
]


@pytest.mark.parametrize(("layout", "changes", "error", "message"), WRONG)
def test_wrong_arguments_are_named_and_nothing_is_written(layout, changes, error, message):
    cache, arguments = call(layout, **changes)
    before = cache.to("cpu")
    with pytest.raises(error, match="^" + message):
        mla_cute.append_to_cache(**arguments)
    cache.assert_equal(before)


def test_the_early_exit_refuses_what_the_explanation_refuses():
    for layout, changes, _, _ in WRONG:
        _, arguments = call(layout, **changes)
        if "35" in str(changes):  # slots are looked at elsewhere
            continue
        try:
            found = append._usual(**arguments)
        except (AttributeError, TypeError, ValueError):
            found = None
        assert found is None, changes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_early_exit_takes_the_usual_calls(layout):
    _, arguments = call(layout)
    expected = LAYOUTS[layout].kv_format, HeadDims()
    assert append._usual(**arguments) == append._explain(**arguments) == expected


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("tensor", {"ckv_scale": 2}),
        ("group", {"ckv_scale": 1, "kpe_scale": 1}),
        ("token", {"ckv_scale_arr": lambda x: x.repeat(1, 1, 3)[..., ::3]}),
        ("group", {"ckv_cache": lambda x: x.repeat(1, 1, 2)[..., ::2]}),
    ],
)
def test_what_is_legal_without_being_usual(layout, changes):
    cache, arguments = call(layout, **changes)
    assert append._usual(**arguments) is None
    mla_cute.append_to_cache(**arguments)
    expected = cache.appended(
        arguments["ckv"],
        arguments["kpe"],
        arguments["slot_mapping"],
        **{name: arguments[name] for name in ("ckv_scale", "kpe_scale")},
    )
    got = arguments["ckv_cache"].view(torch.uint8)
    assert torch.equal(got[0, :4] & 0x7F, expected.ckv.view(torch.uint8)[0, :4] & 0x7F)
    if expected.scales is not None:
        assert torch.equal(arguments["ckv_scale_arr"][0, :4], expected.scales[0, :4])


@pytest.mark.parametrize("slot_dtype", SLOT_DTYPES, ids=str)
def test_slots_of_a_cache_with_more_than_32_bits_of_them(slot_dtype):
    """Rows that overlap all but an element: 2^32 + 64 slots in little memory."""
    pages, page_size = 2**26 + 1, 64
    ckv_cache, kpe_cache = (
        torch.zeros(pages + page_size + width, dtype=torch.bfloat16).as_strided((pages, page_size, width), (1, 1, 1))
        for width in (512, 64)
    )
    ckv, kpe = make_tokens(12, torch.bfloat16, seed=5)
    ckv, kpe = ckv[2:3], kpe[2:3]
    num_slots = pages * page_size
    for slot in (1000, 2**31 - 1, 2**32 + 1, num_slots - 1):
        if slot > torch.iinfo(slot_dtype).max:
            continue
        slots = torch.tensor([slot], dtype=slot_dtype)
        mla_cute.append_to_cache(ckv, kpe, ckv_cache, kpe_cache, slots)
        assert torch.equal(ckv_cache[slot // page_size, slot % page_size], ckv[0])
    if slot_dtype is torch.int64:
        with pytest.raises(ValueError, match=f"^slot_mapping: expected values below {num_slots} .* got {num_slots} at"):
            mla_cute.append_to_cache(ckv, kpe, ckv_cache, kpe_cache, torch.tensor([num_slots]))


def test_one_token_one_page_of_one_row():
    """Dimensions of size 1 may have any stride."""
    ckv, kpe = make_tokens(1, torch.bfloat16, seed=3)
    ckv_cache = torch.zeros(512, dtype=torch.uint8).view(E4M3).as_strided((1, 1, 512), (3, 5, 1))
    kpe_cache = torch.zeros(64, dtype=torch.bfloat16).as_strided((1, 1, 64), (0, 7, 1))
    scales = torch.zeros(1).as_strided((1, 1, 1), (9, 0, 4))
    mla_cute.append_to_cache(
        ckv.as_strided((1, 512), (3, 1)),
        kpe,
        ckv_cache,
        kpe_cache,
        torch.zeros(1, dtype=torch.int32),
        ckv_scale_arr=scales,
    )
    stored, scale = quant.quantize_token(ckv)
    assert torch.equal(ckv_cache.view(torch.uint8)[0], stored.view(torch.uint8))
    assert scales.item() == scale.item()
    assert torch.equal(kpe_cache[0], kpe)
