"""Block tables of any width: their rows as one list of page ids, and the calls on a table without columns."""

import itertools

import pytest
import torch

import mla_cute
from mla_cute.launch import flat_table, table_stride
from mla_cute.testing.cases import make_case

SIZES = {"num_heads": 3, "page_size": 8}


def table_of(rows, columns, stride):
    """Of page ids row * 100 + column, absurd ones between the rows."""
    table = torch.full((rows, max(stride, columns, 1)), -1, dtype=torch.int32)[:, :columns]
    table[:] = torch.arange(rows)[:, None] * 100 + torch.arange(columns)
    return table


def plan_of(table, **kwargs):
    lengths = torch.zeros(table.shape[0], dtype=torch.int32)
    return mla_cute.plan_decode_block_table(lengths, max_pages=table.shape[1], **SIZES, **kwargs)


@pytest.mark.parametrize(("rows", "columns"), [*itertools.product((0, 1, 2, 5), (0, 1, 3))])
@pytest.mark.parametrize("extra", [0, 4])
def test_rows_lie_a_stride_apart_in_the_list(rows, columns, extra):
    table = table_of(rows, columns, columns + extra)
    stride = table_stride(table)
    if rows > 1 and columns:
        assert stride == table.stride(0)
    else:
        assert stride == columns
    flat = flat_table(table, plan_of(table, table_stride=stride))
    assert flat.dim() == 1
    assert flat.dtype is torch.int32
    for row in range(rows):
        assert flat[row * stride : row * stride + columns].tolist() == table[row].tolist()
    assert flat.numel() == ((rows - 1) * stride + columns if rows and columns else 0)
    if flat.numel():
        assert flat.data_ptr() == table.data_ptr()


@pytest.mark.parametrize("shape", [(3, 0), (0, 0), (0, 4)])
@pytest.mark.parametrize("table_stride", [None, 0, 1, 7])
def test_a_table_without_memory_has_no_stride(shape, table_stride):
    table = torch.zeros(shape, dtype=torch.int32)
    assert flat_table(table, plan_of(table, table_stride=table_stride)).shape == (0,)
    assert flat_table(table[:, :0], plan_of(table, table_stride=table_stride)).shape == (0,)


def test_a_plan_for_another_stride_is_refused():
    table = table_of(3, 2, 5)
    with pytest.raises(
        ValueError, match=r"^plan: expected a plan for block_table rows 5 elements apart, got one for 2$"
    ):
        flat_table(table, plan_of(table))
    assert flat_table(table[:1], plan_of(table[:1])).tolist() == [0, 1]
    assert flat_table(table[:, :0], plan_of(table[:, :0])).shape == (0,)


@pytest.mark.parametrize("with_plan", [False, True], ids=["no_plan", "plan"])
@pytest.mark.parametrize("op", ["decode", "prefill"])
@pytest.mark.parametrize("sliced", [False, True])
def test_requests_without_keys_need_no_columns(op, sliced, with_plan):
    case = make_case([0, 0, 0], **SIZES)
    table = case.block_table[:, :0] if sliced else torch.zeros(3, 0, dtype=torch.int32)
    lengths, plan = case.seq_lens, None
    sizes = SIZES | {"max_pages": 0}
    tensors = (case.q_nope, case.q_pe, case.ckv_cache, case.kpe_cache)
    if op == "decode":
        if with_plan:
            plan = mla_cute.plan_decode_block_table(lengths, **sizes)
        call, args = mla_cute.mla_paged_decode_block_table, (*tensors, table, lengths, 0.1)
    else:
        queries = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
        if with_plan:
            plan = mla_cute.plan_prefill_block_table(queries, lengths, total_q=3, **sizes)
        call, args = mla_cute.mla_paged_prefill_block_table, (*tensors, queries, table, lengths, 0.1)
    call(*args, out=case.out, lse=case.lse, plan=plan)
    assert (case.out == 0).all()
    assert (case.lse == -torch.inf).all()
    lengths[2] = 1
    with pytest.raises(ValueError, match=r"^seq_lens: expected values in \[0, 0\] .* got 1 at position 2$"):
        call(*args, plan=plan)
