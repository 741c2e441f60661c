"""Decode over 16-bit caches by the kernel that the default does not take: row tiles with few heads, tile16 with many.

The other decode tests run the default: tile16 up to 16 heads, row tiles beyond.
"""

import dataclasses
import math

import pytest
import torch
from gpu_helpers import ENTRIES, capture, check, decode, plan_of, same_bits

import mla_cute
from mla_cute.config import with_kernel
from mla_cute.testing.cases import expected_of, make_case

# One page size for each way of loading: gather, boxes of 8, 16, 32 and 64 rows.
LOADS = (1, 24, 16, 32, 64)
HEADS = {"tile64": (1, 8, 16), "tile16": (17, 32, 100, 128)}
KERNELS = [(kernel, num_heads) for kernel, counts in HEADS.items() for num_heads in counts]
BOTH = pytest.mark.parametrize(("kernel", "num_heads"), KERNELS, ids=[f"{kernel}-{h}" for kernel, h in KERNELS])
# With cut_unit: tile16 take 1, row tiles 2 and, when a configuration says so, 1.
UNITS = [(kernel, h, unit) for kernel, h in KERNELS for unit in ((1, 2) if kernel == "tile64" else (1,))]
IN_UNITS = pytest.mark.parametrize(
    ("kernel", "num_heads", "unit"), UNITS, ids=[f"{kernel}-{h}-unit{unit}" for kernel, h, unit in UNITS]
)


def of(kernel: str, unit: int | None = None) -> mla_cute.KernelConfig:
    """Cut in units of the kernel's own (tile16 1, row tiles 2) or of `unit` blocks."""
    config = with_kernel(mla_cute.KernelConfig(), "", kernel)
    return config if unit is None else dataclasses.replace(config, cut_unit=unit, min_blocks=unit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("page_size", LOADS)
@IN_UNITS
def test_right_and_repeatable(kernel, num_heads, unit, page_size, dtype):
    config = of(kernel, unit)
    # In units of 1 the pieces of 17000 tokens are of 3 blocks (row tiles) and of 17 (batch-invariant).
    case = make_case([70, 0, 4097, 1, 17000], num_heads=num_heads, page_size=page_size, dtype=dtype, device="cuda")
    expected = expected_of(case)
    check(case, expected=expected, config=config)
    out, lse = case.out.clone(), case.lse.clone()
    for entry in ENTRIES:
        check(case, expected=expected, entry=entry, plan=plan_of(case, entry, config=config))
        assert same_bits(case.out, out)
        assert same_bits(case.lse, lse)
    check(case, expected=expected, config=config, batch_invariant=True)


@pytest.mark.parametrize("page_size", LOADS)
@pytest.mark.parametrize(("kernel", "num_heads"), [("tile64", 6), ("tile16", 6), ("tile16", 20)])
def test_every_length_around_the_tile(kernel, num_heads, page_size):
    case = make_case(list(range(1, 260)), num_heads=num_heads, page_size=page_size, device="cuda")
    check(case, config=of(kernel))


@pytest.mark.parametrize("drift", [0.0, 60.0, -60.0])
@IN_UNITS
def test_cut_and_whole(kernel, num_heads, unit, drift):
    # 21000 tokens: in units of 1 pieces are of 3, 5, 19 or 21 blocks.
    for lengths in ([21000], [8192, 5000, 0, 65, 1, 129, 3000], [1500] * 300):
        case = make_case(lengths, num_heads=num_heads, page_size=64, device="cuda", drift=drift)
        expected = expected_of(case)
        for invariant in (False, True):
            check(case, expected=expected, config=of(kernel, unit), batch_invariant=invariant)


@pytest.mark.parametrize(("sm_scale", "drift"), [(4.0, 2000.0), (4.0, -2000.0), (1e-30, 0.0)])
@BOTH
def test_scores_of_any_size(kernel, num_heads, sm_scale, drift):
    case = make_case([3000, 65, 1], num_heads=num_heads, page_size=64, sm_scale=sm_scale, drift=drift, device="cuda")
    check(case, config=of(kernel))


@BOTH
def test_nan_in_a_query_stays_in_its_row(kernel, num_heads):
    case = make_case([300, 129, 20000, 64], num_heads=num_heads, page_size=64, device="cuda")
    last = num_heads - 1
    case.q_nope[1, last, 100] = math.nan
    case.q_pe[2, 0, 3] = math.nan
    check(case, config=of(kernel))
    assert case.out.isnan().any(-1).nonzero().tolist() == [[1, last], [2, 0]]


@pytest.mark.parametrize("page_size", [1, 64])
@BOTH
def test_replay_follows_the_metadata(kernel, num_heads, page_size):
    shape = {"num_heads": num_heads, "page_size": page_size, "num_pages": 25000 // page_size + 400, "device": "cuda"}
    lists = {"num_indices": shape["num_pages"], "max_pages": shape["num_pages"]}
    case = make_case([100, 20000, 0, 7], seed=0, **shape, **lists)
    plan = plan_of(case, config=of(kernel))
    graph, _ = capture(lambda: (plan.update(), decode(case, plan=plan, out=case.out, lse=case.lse)))
    for seed, lengths in enumerate(([3000, 64, 65, 20000], [0, 0, 1, 0], [5000] * 4), start=1):
        case.load(make_case(lengths, seed=seed, **shape, **lists))
        eager = decode(case, config=of(kernel))
        case.out.fill_(math.nan)
        case.lse.fill_(math.nan)
        graph.replay()
        assert same_bits(case.out, eager[0])
        assert same_bits(case.lse, eager[1])
        check(case, config=of(kernel))


@pytest.mark.parametrize("num_heads", [16, 64, 128])
def test_tile16_of_a_model_in_one_batch(num_heads):
    """More requests than SMs, lengths of every kind, some of which are cut: the bits do not depend on the entry."""
    lengths = torch.randint(0, 300, (500,), generator=torch.Generator().manual_seed(num_heads)).tolist()
    lengths[250] = 30000
    case = make_case(lengths, num_heads=num_heads, page_size=16, device="cuda")
    check(case, config=of("tile16"))
    out = case.out.clone()
    check(case, entry="block_table", config=of("tile16"))
    assert same_bits(case.out, out)
