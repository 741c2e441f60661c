"""Keywords of FP8 calls in all four forms, and a GPU for them that is not there: of the tests of their checks."""

import dataclasses

import pytest
import torch
from call_case import check_decode, check_decode_block_table, check_prefill, check_prefill_block_table
from fp8_case import LAYOUTS, Fp8Operands, make_fp8
from prefill_case import make_prefill

from mla_cute.testing.cases import make_case

E4M3, BF16, FP16 = torch.float8_e4m3fn, torch.bfloat16, torch.float16
TOTAL_Q, HEADS, PAGE_SIZE, NUM_PAGES = 15, 16, 8, 9
CPU = torch.device("cpu")
FORMS = ("decode", "decode_table", "prefill", "prefill_table")
CHECKS = dict(
    zip(FORMS, (check_decode, check_decode_block_table, check_prefill, check_prefill_block_table), strict=True)
)
FORM = pytest.mark.parametrize("form", FORMS)
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
Q_FP8 = pytest.mark.parametrize("q_fp8", [False, True], ids=["q16", "q8"])
ARRAY = torch.ones(NUM_PAGES, PAGE_SIZE, 4)


@dataclasses.dataclass
class Call:
    """Keywords of one call, the FP8 operands behind them, and the guards of its outputs."""

    form: str
    arguments: dict
    fp8: Fp8Operands
    guards: tuple

    def check(self, **change):
        return CHECKS[self.form](**self.arguments | change)

    def untouched(self) -> bool:
        return all(guard.untouched() for guard in self.guards)


def make_call(form: str, layout: str, q_fp8: bool, outputs: bool = True, dtype: torch.dtype = BF16) -> Call:
    """9 pages of 8 tokens; kv_indptr [0, 2, 2, 3, 6], qo_indptr [0, 4, 6, 6, 15]; 4 or 15 query tokens."""
    names = ("kv_indptr", "kv_indices", "kv_last_page_len")
    if "table" in form:
        names = ("block_table", "seq_lens")
    if "prefill" in form:
        names += ("qo_indptr",)
        case = make_prefill([4, 2, 0, 9], [9, 0, 1, 24], num_heads=HEADS, page_size=PAGE_SIZE, dtype=dtype)
        metadata = case.table if "table" in form else case.csr
        fp8 = make_fp8(case.caches, layout, q_fp8, (case.q_nope, case.q_pe))
    else:
        case = make_case([9, 0, 1, 24], num_heads=HEADS, page_size=PAGE_SIZE, dtype=dtype)
        metadata = {name: getattr(case, name) for name in names}
        fp8 = make_fp8(case, layout, q_fp8)
    guards = (case.guarded_out, case.guarded_lse)
    arguments = {name: metadata[name] for name in names} | {"sm_scale": 0.1} | fp8.tensors | fp8.scales
    if outputs:
        out, lse = (guard.tensor for guard in guards)
        # guards are as wide as the case's dtype: any 16-bit one fits
        arguments |= {"out": out.view(fp8.dtype), "lse": lse}
    return Call(form, arguments, fp8, guards)


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is on a GPU, where strides and addresses matter."""

    is_cuda = True


def on_gpu(arguments: dict) -> dict:
    return {name: x.as_subclass(OnGpu) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
