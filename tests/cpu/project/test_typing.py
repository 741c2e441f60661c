"""What a strict type checker says of code that uses the public calls."""

import pathlib

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


# What --strict is beyond the project's settings, for the code and the package alone: with --strict, mypy would read all
# of torch again, 20 s and 1.6 GB, instead of taking it from the cache that `make lint` has filled.
STRICT = """
[[tool.mypy.overrides]]
module = ["__main__", "mla_cute", "mla_cute.*"]
disallow_any_generics = true
disallow_subclassing_any = true
disallow_untyped_calls = true
disallow_untyped_decorators = true
warn_return_any = true
implicit_reexport = false
extra_checks = true
"""
PROJECT = pathlib.Path(__file__).resolve().parents[3] / "pyproject.toml"


@pytest.fixture
def complaints(tmp_path):
    def run(code: str) -> list[str]:
        settings = tmp_path / "pyproject.toml"
        settings.write_text(PROJECT.read_text() + STRICT)
        # The code stands in the project's folder, where the cache is.
        output, errors, _ = mypy.run(["--config-file", str(settings), "--no-error-summary", "-c", HEAD + code])
        assert not errors
        # Complaints about the package itself are `make lint`'s. mypy makes them here or not by whether the package's
        # folder is on sys.path, which differs between `pytest`, `python -m pytest` and workers of xdist.
        return [line for line in output.splitlines() if line.startswith("<string>")]

    return run


def test_strict_code_passes(complaints):
    code = "".join(USES.format(name=name, arguments=arguments) for name, arguments in ARGUMENTS.items())
    assert complaints(code + PLANS) == []


def test_wrong_code_does_not(complaints):
    code = "out: torch.Tensor = mla_cute.mla_paged_decode(q, q, c, c, i, i, 0.1)\n"
    (line,) = complaints(code)
    assert "Incompatible types in assignment" in line


def test_it_is_as_strict_as_can_be(complaints):
    code = """
def untyped(argument): ...

def loose(pairs: dict) -> int:
    untyped(1)
    return mla_cute.api
"""
    found = "\n".join(complaints(code))
    assert "no-untyped-def" in found
    assert "type-arg" in found
    assert "no-untyped-call" in found
