"""Messages of the checks of single arguments."""

import re

import pytest
import torch

from mla_cute.expect import expect_shape


@pytest.mark.parametrize(
    ("expected", "form", "shown"),
    [
        ((4, None), "[batch, max_pages]", "[4, max_pages]"),
        ((None, None, 512), "[batch, H, 512]", "[batch, H, 512]"),
        ((9, 8, None), "[num_pages, page_size, 1 or 4]", "[9, 8, 1 or 4]"),
        ((None, 3), "[batch + 1, n]", "[batch + 1, 3]"),
        ((0, None), "[batch, max_pages]", "[0, max_pages]"),
        ((4, 16), "[batch, H]", "[4, 16]"),
        ((4, 16), "", "[4, 16]"),
        ((None,), "[batch + 1]", "[batch + 1]"),
        ((None, None, None), "of three dimensions", "of three dimensions"),
        ((), "", "[]"),
    ],
)
def test_a_wrong_shape_is_held_against_the_sizes_that_are_known(expected, form, shown):
    message = re.escape(f"x: expected shape {shown}, got [5, 5, 5, 5]")
    with pytest.raises(ValueError, match=f"^{message}$"):
        expect_shape("x", torch.zeros(5, 5, 5, 5), expected, form)
    expect_shape("x", torch.zeros([7 if size is None else size for size in expected]), expected, form)
