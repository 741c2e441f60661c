"""Caches of more than 2^31 and 2^32 elements with pages at both ends in use: offsets have to be 64-bit."""

import pytest
from gpu_helpers import spread_cache

from mla_cute.testing.cases import expected_of, make_case, run_case


@pytest.mark.parametrize("log2_elements", [31, 32])
@pytest.mark.parametrize(("page_size", "num_heads"), [(64, 16), (64, 128), (1, 16), (16, 64)])
def test_pages_beyond_the_limit(page_size, num_heads, log2_elements):
    case = make_case([3000, 129, 0, 5000, 1], num_heads=num_heads, page_size=page_size, device="cuda")
    expected = expected_of(case)
    spread_cache(case, log2_elements)
    for entry in ("csr", "block_table"):
        verdict = run_case(case, entry=entry, expected=expected)
        assert verdict.ok, verdict
