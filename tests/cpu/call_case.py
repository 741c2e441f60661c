"""Checks of calls by the arguments of the public calls, and problems by what they are of."""

from mla_cute.call import DECODE, DECODE_TABLE, PREFILL, PREFILL_TABLE, Pages, call_of
from mla_cute.check import Problem, check
from mla_cute.check_device import verify


def check_decode(*args, **options):
    return check(call_of(DECODE, *args, **options))


def check_decode_block_table(*args, **options):
    return check(call_of(DECODE_TABLE, *args, **options))


def check_prefill(*args, **options):
    return check(call_of(PREFILL, *args, **options))


def check_prefill_block_table(*args, **options):
    return check(call_of(PREFILL_TABLE, *args, **options))


def decode_problem(batch, num_heads, page_size, num_pages, dtype, device, *of_fp8):
    return Problem("decode", batch, batch, num_heads, page_size, num_pages, False, dtype, device, *of_fp8)


def prefill_problem(*facts):
    return Problem("prefill", *facts)


def verify_on_device(problem, kv_indptr, kv_indices, kv_last_page_len=None, spare_pages=False):
    verify(problem, Pages(DECODE, kv_indptr, kv_indices, kv_last_page_len), spare_pages)


def verify_block_table_on_device(problem, block_table, seq_lens):
    verify(problem, Pages(DECODE_TABLE, seq_lens, block_table))


def verify_prefill_on_device(problem, qo_indptr, kv_indptr, kv_indices, kv_last_page_len=None, spare_pages=False):
    verify(problem, Pages(PREFILL, kv_indptr, kv_indices, kv_last_page_len, qo_indptr), spare_pages)


def verify_prefill_block_table_on_device(problem, qo_indptr, block_table, seq_lens):
    verify(problem, Pages(PREFILL_TABLE, seq_lens, block_table, None, qo_indptr))
