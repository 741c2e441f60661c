"""The append kernel against the torch implementation on the CPU, byte for byte, whole pools compared."""

import math

import pytest
import torch
from append_case import DTYPES, E4M3, LAYOUTS, NUM_SLOTS, SCALES, SLOT_DTYPES, Cache, make_slots, make_tokens
from gpu_helpers import capture

import mla_cute
from mla_cute import quant

NAN, INF = math.nan, math.inf
ONE_PER_FORMAT = ("16bit", "tensor", "token", "group")
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def append(cache, ckv, kpe, slots, **scales):
    mla_cute.append_to_cache(ckv, kpe, *cache.args(), slots, **cache.keywords() | scales)


def check(layout, ckv, kpe, slots, pages=5, page_size=7, **scales):
    """One call on copies that are on the GPU in any layout, and its torch twin."""
    cache = Cache(layout, ckv.dtype, pages, page_size)
    expected = cache.appended(ckv, kpe, slots, **scales)
    on_gpu = cache.to("cuda")
    append(on_gpu, ckv.cuda(), kpe.cuda(), slots.cuda(), **scales)
    on_gpu.assert_equal(expected)
    assert any((a != b).any() for a, b in zip(cache.pools, expected.pools, strict=True)), "nothing was written"


@pytest.mark.parametrize("slot_dtype", SLOT_DTYPES, ids=str)
@EVERY_DTYPE
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_torch(layout, dtype, slot_dtype):
    ckv, kpe = make_tokens(NUM_SLOTS - 2, dtype)
    check(layout, ckv, kpe, make_slots(len(ckv), slot_dtype))


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 129, 4099])
@pytest.mark.parametrize("layout", ONE_PER_FORMAT)
def test_any_number_of_tokens(layout, n, page_size):
    ckv, kpe = make_tokens(n, torch.bfloat16, seed=n)
    pages = -(-(n + 3) // page_size)
    check(layout, ckv, kpe, make_slots(n, torch.int64, pages * page_size, seed=n), pages, page_size)


def every_pattern(dtype):
    """All 65536 bit patterns in 128 tokens, in an order that gives every token all magnitudes."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16)
    ckv = patterns.view(512, 128).T.contiguous().view(dtype)
    kpe = patterns.view(64, 1024).T.contiguous().view(dtype)
    return ckv, kpe


@pytest.mark.parametrize("scale", [1.0, 1 / 3, 0.0731, 2.0**-126, 1.1e-38, 2.0**126, 1000.1, 1e-3, 2.0**-9])
@EVERY_DTYPE
def test_every_value_with_a_scale_of_the_tensor(dtype, scale):
    ckv, kpe = every_pattern(dtype)
    scales = {"ckv_scale": max(scale, 2.0**-126), "kpe_scale": max(scale * 0.9, 2.0**-126)}
    check("tensor", ckv, kpe[:128], torch.arange(128), 2, 64, **scales)
    for i in range(1, 8):
        check("tensor", ckv, kpe[128 * i : 128 * (i + 1)], torch.arange(128), 2, 64, **scales)


@pytest.mark.parametrize("layout", ["16bit", "token", "group"])
@EVERY_DTYPE
def test_every_value_as_the_largest_of_its_token(dtype, layout):
    """65536 amaxes, NaN and infinities among them, each over values down to nothing beside it."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    n = len(patterns)
    generator = torch.Generator().manual_seed(0)
    down = torch.rand(4096, 512, generator=generator) * 2.0 ** -torch.randint(0, 14, (4096, 512), generator=generator)
    down *= torch.randint(0, 2, (4096, 512), generator=generator) * 2 - 1
    ckv = (patterns.float().unsqueeze(1) * down.repeat(n // 4096, 1)).to(dtype)
    largest = torch.randint(0, 512, (n,), generator=generator)
    ckv[torch.arange(n), largest] = patterns
    kpe = ckv[:, 64:128].contiguous()
    check(layout, ckv, kpe, torch.randperm(n, generator=generator), n // 64, 64)


def amaxes(dtype):
    """448 times powers of two, their neighbours, subnormals, 0, infinity and NaN."""
    exponents = range(-133, 119) if dtype is torch.bfloat16 else range(-32, 8)
    at = torch.tensor([448 * 2.0**k for k in exponents]).to(dtype)
    bits = at[at > 0].view(torch.int16)
    near = torch.cat([bits - 1, bits, bits + 1]).view(dtype)
    tiny = torch.tensor([1, 2, 3, 63, 64, 127]).to(torch.int16).view(dtype)  # subnormal in either
    return torch.cat([near, tiny, torch.tensor([0.0, INF, NAN]).to(dtype)])


@pytest.mark.parametrize("layout", ["token", "group", "group_656"])
@EVERY_DTYPE
def test_scales_at_and_beside_powers_of_two(dtype, layout):
    """Against the definition in float64 too, where 448 * 2^k is exact, and not only against torch's float32."""
    amax = amaxes(dtype)
    n = len(amax)
    shape = torch.linspace(-1, 1, 128).repeat(4)
    ckv = (amax.nan_to_num(1.0, posinf=600.0).float()[:, None] * shape).to(dtype)
    ckv[:, 3::128] = amax[:, None]
    ckv[:, 5::128] = -amax[:, None]
    pages = -(-n // 64)
    check(layout, ckv, ckv[:, :64].contiguous(), torch.arange(n), pages, 64)

    cache = Cache(layout, dtype, pages, 64).to("cuda")
    cache.scales.fill_(NAN)
    append(cache, ckv.cuda(), ckv[:, :64].contiguous().cuda(), torch.arange(n, device="cuda"))
    scales = cache.scales.cpu().flatten(0, 1)[:n].double()
    stored = cache.ckv.cpu().flatten(0, 1)[:n].float()
    unusable = ~(amax.isfinite() & (amax > 0))
    assert unusable.sum() == 3
    assert scales[unusable].eq(1).all()
    largest = amax.double()[~unusable, None]
    found = scales[~unusable]
    if layout == "token":
        assert torch.equal(found.float(), (largest / 448).float())
    else:
        assert torch.equal(found.float().bfloat16().double(), found)
        assert (found.log2() == found.log2().round()).all()
        assert ((found >= largest / 448) & (found >= 2.0**-126)).all()
        assert ((found / 2 < largest / 448) | (found == 2.0**-126)).all()
    assert stored[-2, [3, 5]].tolist() == [448.0, -448.0]
    assert stored[-2, 127] == 448
    assert stored[-1].isnan().nonzero().flatten().tolist() == [i + 128 * g for g in range(4) for i in (3, 5)]


@pytest.mark.parametrize("layout", ["tensor_fused", "token_fused", "group_656", "16bit_fused"])
def test_tokens_and_slots_may_be_strided(layout):
    n, dtype = 30, torch.bfloat16
    ckv, kpe = make_tokens(n, dtype)
    slots = make_slots(n, torch.int64)
    cache = Cache(layout, dtype)
    expected = cache.appended(ckv, kpe, slots)
    fused = torch.full((3 * n, 576 + 8), float("nan"), dtype=dtype, device="cuda")
    fused[::3, :576] = torch.cat([ckv, kpe], dim=1)
    spread = torch.zeros(2 * n, dtype=torch.int64, device="cuda")
    spread[::2] = slots
    on_gpu = cache.to("cuda")
    append(on_gpu, fused[::3, :512], fused[::3, 512:576], spread[::2])
    on_gpu.assert_equal(expected)
    # one row read by every token
    on_gpu = cache.to("cuda")
    expected = cache.appended(ckv[:1].expand(n, 512), kpe, slots)
    append(on_gpu, ckv[:1].cuda().expand(n, 512), kpe.cuda(), slots.cuda())
    on_gpu.assert_equal(expected)


@pytest.mark.parametrize("layout", ONE_PER_FORMAT)
def test_dimensions_of_size_one_may_have_any_stride(layout):
    cache = Cache(layout, torch.bfloat16, 1, 1)
    ckv, kpe = make_tokens(2, torch.bfloat16)
    ckv, kpe, slots = ckv[1:], kpe[1:], torch.zeros(1, dtype=torch.int32)
    expected = cache.appended(ckv, kpe, slots)
    on_gpu = cache.to("cuda")
    odd = {name: x.as_strided(x.shape, (3, 5, 1)) for name, x in (("ckv", on_gpu.ckv), ("kpe", on_gpu.kpe))}
    keywords = on_gpu.keywords()
    if on_gpu.scales is not None:
        last = 1 if on_gpu.scales.shape[2] > 1 else 7
        keywords["ckv_scale_arr"] = on_gpu.scales.as_strided(on_gpu.scales.shape, (1, 3, last))
    mla_cute.append_to_cache(
        ckv.cuda().as_strided((1, 512), (1, 1)),
        kpe.cuda().as_strided((1, 64), (7, 1)),
        odd["ckv"],
        odd["kpe"],
        slots.cuda().as_strided((1,), (0,)),
        **keywords,
    )
    on_gpu.assert_equal(expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_to_write(layout):
    cache = Cache(layout, torch.bfloat16)
    on_gpu = cache.to("cuda")
    ckv, kpe = (x.cuda() for x in make_tokens(9, torch.bfloat16))
    append(on_gpu, ckv[:0], kpe[:0], torch.tensor([], dtype=torch.int64, device="cuda"))
    append(on_gpu, ckv, kpe, torch.full((9,), -1, device="cuda"))
    append(on_gpu, ckv, kpe, torch.full((9,), -(2**31), dtype=torch.int32, device="cuda"))
    append(on_gpu, ckv, kpe, torch.full((9,), -(2**63), device="cuda"))
    on_gpu.assert_equal(cache)


@pytest.mark.parametrize("slot_dtype", SLOT_DTYPES, ids=str)
@pytest.mark.parametrize("layout", ONE_PER_FORMAT)
def test_graph_replay_follows_tokens_and_slots(layout, slot_dtype):
    n = 23
    cache = Cache(layout, torch.bfloat16)
    on_gpu = cache.to("cuda")
    ckv, kpe = (x.cuda() for x in make_tokens(n, torch.bfloat16))
    slots = torch.full((n,), -1, dtype=slot_dtype, device="cuda")
    graph, _ = capture(lambda: append(on_gpu, ckv, kpe, slots))
    on_gpu.assert_equal(cache)
    expected = cache
    for seed in range(4):
        new_ckv, new_kpe = make_tokens(n, torch.bfloat16, seed=100 + seed)
        new_slots = make_slots(n, slot_dtype, seed=seed)
        ckv.copy_(new_ckv)
        kpe.copy_(new_kpe)
        slots.copy_(new_slots)
        graph.replay()
        expected = expected.appended(new_ckv, new_kpe, new_slots)
        on_gpu.assert_equal(expected)


@pytest.mark.parametrize("default_stream", [True, False], ids=["default_stream", "side_stream"])
def test_inputs_written_right_before_the_call(default_stream):
    n = 30
    cache = Cache("group_656", torch.bfloat16)
    on_gpu = cache.to("cuda")
    new = [*make_tokens(n, torch.bfloat16), make_slots(n, torch.int64)]
    source = [x.cuda() for x in new]
    inputs = [torch.full_like(x, -1) for x in source]
    append(on_gpu, *inputs)  # compiles, loads
    stream = torch.cuda.current_stream() if default_stream else torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # 10 ms: everything below is queued before any of it runs
        for x, y in zip(inputs, source, strict=True):
            x.copy_(y)
        append(on_gpu, *inputs)
        for x in inputs:
            x.fill_(3)
    stream.synchronize()
    on_gpu.assert_equal(cache.appended(*new))


def test_slots_and_offsets_beyond_32_bits():
    """Rows of 512 bytes that begin 16 bytes apart: more than 2^31 slots in 34 GB."""
    page_size, pages = 64, 2**25 + 2
    row_bytes = 16
    size = pages * page_size * row_bytes + 512
    free = torch.cuda.mem_get_info()[0]
    if free < size + 2**32:
        pytest.skip(f"needs {(size + 2**32) / 1e9:.1f} GB of free GPU memory, there are {free / 1e9:.1f}")
    memory = torch.empty(size, dtype=torch.uint8, device="cuda")
    strides = (page_size * row_bytes, row_bytes, 1)
    ckv_cache = memory.as_strided((pages, page_size, 512), strides).view(E4M3)
    # a rope per page and row of it: page p, row r at 64 (p + r)
    kpe_memory = torch.zeros((pages + page_size) * 64 + 64, dtype=torch.uint8, device="cuda")
    kpe_cache = kpe_memory.as_strided((pages, page_size, 64), (64, 64, 1)).view(E4M3)
    # so far apart that their rows do not overlap
    slots = torch.tensor([0, 2**27 + 5, 2**28, 2**31 - 1 - 64, 2**31 + 5, pages * page_size - 1])
    ckv, kpe = make_tokens(12, torch.bfloat16, seed=5)
    ckv, kpe = ckv[1:7], kpe[1:7]
    scales = SCALES["tensor"]
    stored, ropes = quant.quantize_tensor(ckv, kpe, **scales)
    for slot_dtype in SLOT_DTYPES:
        fits = slots <= torch.iinfo(slot_dtype).max
        for slot in slots.tolist():
            memory[slot * row_bytes : slot * row_bytes + 512] = 0xA5
        tokens = ckv[fits].cuda(), kpe[fits].cuda()
        mla_cute.append_to_cache(*tokens, ckv_cache, kpe_cache, slots[fits].to(slot_dtype).cuda(), **scales)
        for slot, want, fit in zip(slots.tolist(), stored.view(torch.uint8), fits.tolist(), strict=True):
            got = memory[slot * row_bytes : slot * row_bytes + 512].cpu()
            assert torch.equal(got, want if fit else torch.full_like(got, 0xA5)), slot
    for slot, want in zip(slots.tolist(), ropes.view(torch.uint8), strict=True):
        at = (slot // page_size + slot % page_size) * 64
        assert torch.equal(kpe_memory[at : at + 64].cpu(), want), slot


@pytest.mark.parametrize(("quantize", "groups"), [(quant.quantize_token, 1), (quant.quantize_group, 4)])
def test_quant_computes_the_same_on_the_gpu(quantize, groups):
    ckv, kpe = make_tokens(999, torch.bfloat16)
    ckv = ckv[~ckv.isnan().any(1)]  # whose sign is free
    for got, want in zip(quantize(ckv.cuda()), quantize(ckv), strict=True):
        assert torch.equal(got.cpu().view(torch.uint8), want.view(torch.uint8))
    stored, want = quant.to_e4m3(ckv.cuda(), 0.0731), quant.to_e4m3(ckv, 0.0731)
    assert torch.equal(stored.cpu().view(torch.uint8), want.view(torch.uint8))


def test_scales_on_the_gpu_are_not_read():
    x, scale = torch.randn(3, 64, device="cuda"), torch.tensor([[0.5], [0.25], [0.0]], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        stored = quant.to_e4m3(x, scale)
        quant.quantize_group(x.new_ones(2, 512))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(stored[:2].float().cpu(), quant.to_e4m3(x.cpu()[:2], scale.cpu()[:2]).float())
    assert stored[2].float().abs().eq(448).all()
    with pytest.raises(ValueError, match=r"^scale: expected device cuda:0 \(that of x\), got cpu"):
        quant.to_e4m3(x, torch.tensor(1.0))


def shifted(x, num_bytes):
    """The same shape at an address `num_bytes` past an aligned one."""
    flat = torch.zeros(x.numel() * x.itemsize + 16, dtype=torch.uint8, device="cuda")
    return flat[num_bytes : num_bytes + x.numel() * x.itemsize].view(x.dtype).view(x.shape)


def wide(x, num_bytes):
    """The same shape with rows `num_bytes` farther apart."""
    extra = num_bytes // x.itemsize
    return torch.zeros((*x.shape[:-1], x.shape[-1] + extra), device="cuda").to(x.dtype)[..., : x.shape[-1]]


BASE = "expected a base address that is a multiple of {} bytes, got 0x"
STRIDES = r"expected strides that are multiples of \d+ elements \({} bytes\), got strides \["
LAST = r"expected stride 1 in the last dimension, got strides \["


@pytest.mark.parametrize("layout", ONE_PER_FORMAT)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: shifted(x, 8), BASE),
        (lambda x: shifted(x, 4), BASE),
        (lambda x: wide(x, 8), STRIDES),
        (lambda x: wide(x, 4), STRIDES),
        (lambda x: x.repeat(*[1] * (x.dim() - 1), 2)[..., ::2], LAST),
        (lambda x: x.cpu(), "expected device cuda:0"),
    ],
    ids=["8_bytes", "4_bytes", "stride_8", "stride_4", "every_other", "cpu"],
)
@pytest.mark.parametrize("name", ["ckv", "kpe", "ckv_cache", "kpe_cache", "ckv_scale_arr"])
def test_wrong_alignment_is_refused(name, change, message, layout):
    cache = Cache(layout, torch.bfloat16).to("cuda")
    before = cache.to("cpu")
    ckv, kpe = (x.cuda() for x in make_tokens(9, torch.bfloat16))
    arguments = {"ckv": ckv, "kpe": kpe, "ckv_cache": cache.ckv, "kpe_cache": cache.kpe} | cache.keywords()
    arguments["slot_mapping"] = torch.arange(9, device="cuda")
    if name not in arguments:
        pytest.skip("the format has no array of scales")
    num_bytes = 16
    if name == "ckv_scale_arr" and layout == "token":
        if "device" not in message:
            pytest.skip("scales of tokens need no alignment of their own")
        num_bytes = 4
    arguments[name] = change(arguments[name])
    named = "kpe" if name == "ckv" and "device" in message else name
    text = message.format(num_bytes)
    if named != name:
        text = "expected device cpu"
    with pytest.raises(ValueError, match=f"^{named}: {text}"):
        mla_cute.append_to_cache(**arguments)
    torch.cuda.synchronize()
    cache.assert_equal(before)


def test_check_mode_looks_at_the_slots(monkeypatch):
    cache = Cache("group", torch.bfloat16).to("cuda")
    before = cache.to("cpu")
    ckv, kpe = make_tokens(3, torch.bfloat16)
    monkeypatch.setenv("MLA_CUTE_CHECK", "1")
    with pytest.raises(ValueError, match=r"^slot_mapping: expected values below 35 .* got 40 at position 1"):
        append(cache, ckv.cuda(), kpe.cuda(), torch.tensor([-1, 40, 0], device="cuda"))
    cache.assert_equal(before)
    slots = torch.tensor([-1, 34, 0])
    append(cache, ckv.cuda(), kpe.cuda(), slots.cuda())
    cache.assert_equal(before.appended(ckv, kpe, slots))
