"""Checks of calls by the arguments of the public calls, and problems by what they are of."""

from mla_cute.call import DECODE, DECODE_TABLE, METADATA, PREFILL, PREFILL_TABLE, Pages, call_of
from mla_cute.check import Problem, check
from mla_cute.check_device import verify


def checked(form, args, options):
    """`args` may go on behind sm_scale with causal, kv_last_page_len, out, lse, lse_base, where the form has them."""
    required = len(METADATA[form]) + 5
    optional = (
        ["causal"] * (form.op == "prefill") + ["kv_last_page_len"] * (not form.by_table) + ["out", "lse", "lse_base"]
    )
    return check(call_of(form, *args[:required], **dict(zip(optional, args[required:], strict=False)), **options))


def check_decode(*args, **options):
    return checked(DECODE, args, options)


def check_decode_block_table(*args, **options):
    return checked(DECODE_TABLE, args, options)


def check_prefill(*args, **options):
    return checked(PREFILL, args, options)


def check_prefill_block_table(*args, **options):
    return checked(PREFILL_TABLE, args, options)


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
