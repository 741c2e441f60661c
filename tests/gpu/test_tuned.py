"""Every configuration of the tuned file that calls on this GPU go by gives the right results."""

import pytest
import torch
from gpu_helpers import make_prefill

from mla_cute.testing.cases import make_case, run_case
from mla_cute.testing.fp8 import make_fp8, run_fp8
from mla_cute.tuned import select

LENGTHS = [1, 64, 0, 65, 1000, 20000, 129]
CHUNKS = [(1, 1000), (70, 70), (0, 50), (4, 129), (200, 3000), (1, 64), (2, 9000)]


def entries() -> list[select.Entry]:
    """One per configuration and kind of call; the first of a sorted file has the fewest heads, batch and keys."""
    if not torch.cuda.is_available():
        return []
    found = select.located(torch.cuda.get_device_properties(0).name)
    kinds = {}
    for entry in select.load(found[1]).entries if found else ():
        when = entry.when
        key = (when.op, when.kv_format, when.q_fp8, when.num_heads, when.page_size, entry.config)
        kinds.setdefault(key, entry)
    return list(kinds.values())


def name(entry: select.Entry) -> str:
    when = entry.when
    cache = f"{when.kv_format or '16bit'}{'-q_e4m3' if when.q_fp8 else ''}"
    return f"{when.op}-{cache}-h{when.num_heads}-page{when.page_size}-b{when.batch}-n{when.kv_len}"


@pytest.mark.parametrize("entry", entries(), ids=name)
def test_configurations_give_the_right_results(entry):
    when = entry.when
    shape = {"num_heads": when.num_heads, "page_size": when.page_size}
    case = make_case(LENGTHS, device="cuda", **shape) if when.op == "decode" else make_prefill(CHUNKS, **shape)
    if when.kv_format:
        verdict = run_fp8(make_fp8(case, when.kv_format, when.q_fp8), config=entry.config)
    else:
        verdict = run_case(case, config=entry.config)
    assert verdict.ok, verdict
