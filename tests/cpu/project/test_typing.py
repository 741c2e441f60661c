"""What a strict type checker says of code that uses the public calls."""

import pytest

mypy = pytest.importorskip("mypy.api", reason="mypy is not installed")

HEAD = """
import torch
import mla_cute

q, c, i = torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.int32)

"""
ARGUMENTS = {
    "mla_paged_decode": "q, q, c, c, i, i, 0.1",
    "mla_paged_decode_block_table": "q, q, c, c, i, i, 0.1",
    "mla_paged_prefill": "q, q, c, c, i, i, i, 0.1",
    "mla_paged_prefill_block_table": "q, q, c, c, i, i, i, 0.1",
}
USES = """
def both_{name}() -> torch.Tensor:
    out, lse = mla_cute.{name}({arguments})
    out, lse = mla_cute.{name}({arguments}, return_lse=True, ckv_scale=torch.ones(()), plan=None)
    return out + lse

def one_{name}() -> torch.Tensor:
    return mla_cute.{name}({arguments}, return_lse=False, out=q, q_scale=2.0)

def either_{name}(flag: bool) -> torch.Tensor:
    result = mla_cute.{name}({arguments}, return_lse=flag)
    return result if isinstance(result, torch.Tensor) else result[0]
"""
PLANS = """
def plans() -> tuple[int, str]:
    plan = mla_cute.plan_decode(i, num_heads=16, page_size=64)
    out, _ = mla_cute.mla_paged_decode(q, q, c, c, i, i, 0.1, plan=plan.update())
    return plan.workspace_bytes, str(mla_cute.explain(num_heads=16, page_size=64, batch=1))
"""


def complaints(code: str) -> list[str]:
    output, errors, _ = mypy.run(["--strict", "--follow-imports=silent", "--no-error-summary", "-c", HEAD + code])
    return [line for line in (output + errors).splitlines() if line]


def test_strict_code_passes():
    code = "".join(USES.format(name=name, arguments=arguments) for name, arguments in ARGUMENTS.items())
    assert complaints(code + PLANS) == []


def test_wrong_code_does_not():
    code = "out: torch.Tensor = mla_cute.mla_paged_decode(q, q, c, c, i, i, 0.1)\n"
    (line,) = complaints(code)
    assert "Incompatible types in assignment" in line
