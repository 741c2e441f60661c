"""Values of metadata: which are found, and which may be anything."""

import pytest
import torch

from mla_cute.check_device import block_table_findings, csr_findings, raise_first

PAGE_SIZE, NUM_PAGES = 8, 10
LARGEST = 2**31 - 1


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def verify_csr(kv_indptr, kv_indices, last=None, spare_pages=False):
    last = None if last is None else ints(*last)
    raise_first(csr_findings(PAGE_SIZE, NUM_PAGES, ints(*kv_indptr), ints(*kv_indices), last, spare_pages))


def last_of(kv_indptr, kv_lens):
    """kv_last_page_len as FlashInfer's wrapper has it for these key counts."""
    return [n - (end - begin - 1) * PAGE_SIZE for begin, end, n in zip(kv_indptr, kv_indptr[1:], kv_lens, strict=False)]


def test_ids_outside_of_the_lists_are_not_looked_at():
    verify_csr([2, 3, 3, 5], [-1, LARGEST, 9, 0, 9, NUM_PAGES, -1], [1, LARGEST, 8])
    verify_csr([2, 2], [-1, LARGEST, -1])
    verify_csr([0], [-1])
    verify_csr([0], [])


@pytest.mark.parametrize("position", [2, 3, 4])
@pytest.mark.parametrize("value", [-1, NUM_PAGES, LARGEST, -(2**31)])
@pytest.mark.parametrize("last", [None, [1, 8]])
def test_every_id_of_the_lists_is_looked_at(position, value, last):
    ids = [-1, -1, 9, 0, 9, -1]
    ids[position] = value
    says = rf"^kv_indices: expected page ids in \[0, 10\), got {value} at position {position}$"
    with pytest.raises(ValueError, match=says):
        verify_csr([2, 3, 5], ids, last)


@pytest.mark.parametrize(
    ("kv_indptr", "says"),
    [
        ([-1, 2, 3], "expected values >= 0, got -1 at position 0"),
        ([0, 2, 1], "expected values that never decrease, got 1 at position 2 after a larger one"),
        ([0, 2, 9], r"expected values <= 4 \(the length of kv_indices\), got 9 at position 2"),
        ([0, LARGEST, 0], "expected values that never decrease, got 0 at position 2 after a larger one"),
        ([5], r"expected values <= 4 \(the length of kv_indices\), got 5 at position 0"),
    ],
)
@pytest.mark.parametrize("spare_pages", [False, True])
def test_bounds_of_the_lists(kv_indptr, says, spare_pages):
    for last in (None, [8] * (len(kv_indptr) - 1)):
        with pytest.raises(ValueError, match=f"^kv_indptr: {says}$"):
            verify_csr(kv_indptr, [0] * 4, last, spare_pages)


def test_spare_pages():
    """Requests of 3, 2, 0 and 1 pages."""
    indptr, ids = [1, 4, 6, 6, 7], [LARGEST, 9, 0, -1, LARGEST, -1, 3, -1]
    verify_csr(indptr, ids, last_of(indptr, (9, 0, 0, 8)), spare_pages=True)
    verify_csr(indptr, [0] * 8, last_of(indptr, (24, 16, 0, 8)), spare_pages=True)
    with pytest.raises(ValueError, match=r"^kv_indices: .* got -1 at position 3$"):
        verify_csr(indptr, ids, last_of(indptr, (17, 0, 0, 8)), spare_pages=True)
    with pytest.raises(ValueError, match=rf"^kv_indices: .* got {LARGEST} at position 4$"):
        verify_csr(indptr, ids, last_of(indptr, (16, 1, 0, 8)), spare_pages=True)
    with pytest.raises(
        ValueError, match=r"^kv_last_page_len: expected values in \[1, 8\] for requests with pages, got -7"
    ):
        verify_csr(indptr, ids, last_of(indptr, (9, 16, 0, 8)))


@pytest.mark.parametrize("kv_lens", [(25, 0, 0, 0), (0, -1, 0, 0), (0, 0, 1, 0), (0, 0, -3, 0), (0, 0, 0, 9)])
def test_key_counts_with_spare_pages(kv_lens):
    at = next(b for b, n in enumerate(kv_lens) if n)
    indptr = [1, 4, 6, 6, 7]
    says = rf"^kv_len_arr: expected lengths from 0 to .* \(page_size 8\), got {kv_lens[at]} at position {at}$"
    with pytest.raises(ValueError, match=says):
        verify_csr(indptr, [0] * 8, last_of(indptr, kv_lens), spare_pages=True)


def test_strided_metadata():
    """Tensors on the CPU may have any strides."""
    indptr, ids = ints(0, 9, 1, 9, 3, 9)[::2], ints(0, -1, 9, -1, 4, -1)[::2]
    raise_first(csr_findings(PAGE_SIZE, NUM_PAGES, indptr, ids, None))
    with pytest.raises(ValueError, match=r"^kv_indices: expected page ids in \[0, 4\), got 9 at position 1$"):
        raise_first(csr_findings(PAGE_SIZE, 4, indptr, ids, None))


def test_tables_without_rows_or_columns():
    for rows, columns in ((0, 0), (0, 3), (3, 0)):
        table = torch.full((rows, columns), -1, dtype=torch.int32)
        raise_first(block_table_findings(PAGE_SIZE, NUM_PAGES, table, torch.zeros(rows, dtype=torch.int32)))
    with pytest.raises(ValueError, match=r"^seq_lens: expected values in \[0, 0\] .* got 1 at position 2$"):
        raise_first(block_table_findings(PAGE_SIZE, NUM_PAGES, table, ints(0, 0, 1)))
