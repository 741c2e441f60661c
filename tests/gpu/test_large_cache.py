"""Caches of more than 2^31 and 2^32 elements with pages at both ends in use: offsets have to be 64-bit."""

import pytest
import torch

from mla_cute._testing import expected_of, make_case, run_case

WIDTH = 576


@pytest.mark.parametrize("log2_elements", [31, 32])
@pytest.mark.parametrize(("page_size", "num_heads"), [(64, 16), (64, 128), (1, 16), (16, 64)])
def test_pages_beyond_the_limit(page_size, num_heads, log2_elements):
    case = make_case([3000, 129, 0, 5000, 1], num_heads=num_heads, page_size=page_size, device="cuda")
    expected = expected_of(case)
    small = case.ckv_cache.shape[0]
    # so that every page of the upper half of the small cache begins beyond the limit
    num_pages = 2**log2_elements // (page_size * WIDTH) + small + 1
    needed = num_pages * page_size * WIDTH * 2
    free = torch.cuda.mem_get_info()[0]
    if free < needed + 2**30:
        pytest.skip(f"needs {(needed + 2**30) / 1e9:.1f} GB of free GPU memory, there are {free / 1e9:.1f}")

    # allocated but not written: only the used ends are
    big = torch.empty(num_pages, page_size, WIDTH, dtype=torch.bfloat16, device="cuda")
    half = small // 2
    shift = num_pages - small
    for cache, columns in ((case.ckv_cache, slice(0, 512)), (case.kpe_cache, slice(512, WIDTH))):
        big[:half, :, columns] = cache[:half]
        big[half + shift :, :, columns] = cache[half:]
    for ids in (case.kv_indices, case.block_table):
        ids[(ids >= half) & (ids < small)] += shift
    assert (half + shift) * page_size * WIDTH > 2**log2_elements
    case.ckv_cache, case.kpe_cache = big[..., :512], big[..., 512:]
    for entry in ("csr", "block_table"):
        verdict = run_case(case, entry=entry, expected=expected)
        assert verdict.ok, verdict
