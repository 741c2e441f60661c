"""The correctness sweep behind `mla-cute check` and the CPU half of `mla-cute demo`."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from .._testing import CaseSpec, DecodeCase, Expected, Verdict, expected_of, run_case, sweep

COLUMNS = (
    "page size",
    "dtype",
    "cases",
    "calls",
    "worst rel err",
    "in dtype",
    "worst max err",
    "worst lse err",
    "result",
)
_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass
class Group:
    """Verdicts of all calls with one page size and dtype."""

    page_size: int
    dtype: torch.dtype
    cases: int = 0
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def failures(self) -> int:
        return sum(not verdict.ok for verdict in self.verdicts)

    def cells(self) -> tuple[str, ...]:
        def worst(name: str) -> str:
            values = [getattr(verdict, name) for verdict in self.verdicts]
            return f"{max(values):.1e}" if values else "-"

        return (
            str(self.page_size),
            _DTYPE_NAMES[self.dtype],
            str(self.cases),
            str(len(self.verdicts)),
            *map(worst, ("relative_error", "dtype_error", "max_error", "lse_error")),
            f"{self.failures} FAILED" if self.failures else "ok",
        )


def specs(quick: bool, seed: int, on_gpu: bool) -> list[CaseSpec]:
    """The release sweep with other random numbers per seed; `quick` takes a seventh of it.

    Requests of 20000 tokens are left out on the CPU (they are most of its time) and by `quick`, which stops at 1000.
    """
    chosen = [dataclasses.replace(spec, seed=spec.seed + 1_000_003 * seed) for spec in sweep()]
    if quick:
        # 72 cases in steps of 7 meet each page size or its neighbour, both dtypes and most head counts.
        chosen = chosen[::7]
    elif on_gpu:
        return chosen
    limit = 1000 if quick else 4097
    return [dataclasses.replace(s, lengths=tuple(n for n in s.lengths if n <= limit)) for s in chosen]


def independent(case: DecodeCase) -> Expected:
    """The case computed token by token from its metadata in float64, sharing no code with `reference.py`."""
    dtype, device = case.q_nope.dtype, case.q_nope.device
    shape = case.q_nope.shape
    expected = Expected(
        output=torch.zeros(shape, dtype=torch.float32, device=device),
        lse=torch.full(shape[:2], -math.inf, dtype=torch.float32, device=device),
        score_rounding=torch.zeros(shape[:2], dtype=torch.float32, device=device),
        in_dtype=torch.zeros(shape, dtype=dtype, device=device),
        dtype=dtype,
        lengths=case.lengths,
        queries=case.queries,
    )
    for b, length in enumerate(case.lengths):
        if length == 0:
            continue
        token = torch.arange(length, device=device)
        page = case.kv_indices[case.kv_indptr[b] + token // case.page_size].long()
        slot = token % case.page_size
        v = case.ckv_cache[page, slot].double()
        k = torch.cat([v, case.kpe_cache[page, slot].double()], dim=-1)
        q = torch.cat([case.q_nope[b], case.q_pe[b]], dim=-1).double()
        scores = case.sm_scale * q @ k.T
        expected.score_rounding[b] = (
            q.norm(dim=-1) * k.norm(dim=-1).amax() * (case.sm_scale * math.log2(math.e) * 2.0**-23)
        )
        expected.output[b] = torch.softmax(scores, dim=-1) @ v
        expected.lse[b] = torch.logsumexp(scores, dim=-1) / math.log(2)
        p = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
        expected.in_dtype[b] = (p.to(dtype).double() @ v / p.sum(dim=-1, keepdim=True)).to(dtype)
    return expected


def run_spec(spec: CaseSpec, device: torch.device) -> Iterator[tuple[str, Verdict]]:
    """Every way to call the library on one case: (what was called, verdict)."""
    import mla_cute

    case = spec.make(device)
    # On the GPU the kernels are judged by the reference; on the CPU the reference is what runs, so by something else.
    expected = expected_of(case) if device.type == "cuda" else independent(case)
    in_e = dataclasses.replace(expected, lse=expected.lse * math.log(2))
    yield "CSR", run_case(case, expected=expected)
    first_out, first_lse = case.out.clone(), case.lse.clone()
    again = run_case(case, expected=expected)
    if not (_same_bits(case.out, first_out) and _same_bits(case.lse, first_lse)):
        again = dataclasses.replace(again, failures=("a second call gave other bits", *again.failures))
    yield "CSR again", again
    yield "block table, lse in e", run_case(case, entry="block_table", lse_base="e", expected=in_e)
    yield "CSR, batch invariant", run_case(case, batch_invariant=True, expected=expected)
    heads, page_size = case.num_heads, case.page_size
    plan = mla_cute.plan_decode(
        case.kv_indptr, num_heads=heads, page_size=page_size, kv_last_page_len=case.kv_last_page_len
    )
    yield "CSR, plan", run_case(case, plan=plan, expected=expected)
    plan = mla_cute.plan_decode_block_table(
        case.seq_lens,
        num_heads=heads,
        page_size=page_size,
        max_pages=case.block_table.shape[1],
        table_stride=case.block_table.stride(0),
    )
    yield "block table, plan", run_case(case, entry="block_table", plan=plan, expected=expected)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = torch.int16 if a.element_size() == 2 else torch.int32
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))
