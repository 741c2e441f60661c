"""The correctness sweep behind `mla-cute check` and the CPU half of `mla-cute demo`; needs what the library needs."""

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from .. import gpu as gpu_facts
from ..testing.cases import CaseSpec, DecodeCase, expected_of, run_case, sweep
from ..testing.fp8 import Fp8Case, Fp8Expected
from ..testing.runs import plan_of
from ..testing.verdict import Expected, Verdict

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
# What goes first in a narrow terminal.
DROP = ("cases", "in dtype", "worst max err", "worst lse err", "calls")
_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
TIMEOUT_S = 180.0
TIMEOUT_HELP = "seconds one case may take on the GPU before it counts as hung"
# Cases multiply a seed, and torch's seeds have 64 bits.
_LARGEST_SEED = 2**40
_MOST_LINES = 20


def check_seed(value: int) -> int:
    """`value`, a seed. Raises ValueError for one that no case can have."""
    if not -_LARGEST_SEED <= value <= _LARGEST_SEED:
        raise ValueError(f"expected at most {_LARGEST_SEED} either way, got {value}")
    return value


def parse_seed(text: str) -> int:
    """`check_seed` of an option's text, for argparse."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an integer, got {text!r}") from None
    try:
        return check_seed(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


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


@dataclass(frozen=True)
class Run:
    """A sweep on this machine; `why_cpu` is why no kernel runs here, None where they do."""

    seed: int
    specs: Sequence[CaseSpec]
    device: torch.device
    why_cpu: str | None

    @classmethod
    def of(cls, quick: bool, seed: int) -> "Run":
        why = gpu_facts.why_not_hopper()
        device = torch.device("cpu") if why else torch.device("cuda", torch.cuda.current_device())
        return cls(seed, specs(quick, seed, on_gpu=not why), device, why)

    @property
    def on_gpu(self) -> bool:
        return self.why_cpu is None

    @property
    def title(self) -> str:
        return f"{len(self.specs)} cases, seed {self.seed}, on {self.device.type}"

    def introduction(self) -> str:
        """What is checked, and what not."""
        if self.on_gpu:
            return f"Checking the kernels on {torch.cuda.get_device_name(self.device)} against the float32 reference."
        return (
            f"Checking the CPU path ({self.why_cpu}): what runs is the float32 reference, judged by an independent "
            "float64 computation; the kernels are not checked."
        )

    def check(
        self, step: Callable[[int, int, str], None], feed: Callable[[str], None]
    ) -> tuple[list[Group], list[str]]:
        """The verdicts by page size and dtype, and a line for each call that failed. In front of each case `step` gets
        (done, total, case) and `feed` the case."""
        groups: dict[tuple[int, torch.dtype], Group] = {}
        failures = []
        for done, spec in enumerate(self.specs):
            step(done, len(self.specs), str(spec))
            feed(str(spec))
            group = groups.setdefault((spec.page_size, spec.dtype), Group(spec.page_size, spec.dtype))
            group.cases += 1
            for what, verdict in run_spec(spec, self.device):
                group.verdicts.append(verdict)
                failures += [f"FAILED {spec}, {what}: {failure}" for failure in verdict.failures]
        return list(groups.values()), failures


def closing(failures: Sequence[str]) -> list[str]:
    """The lines under the table."""
    if not failures:
        return ["all correct"]
    more = len(failures) - _MOST_LINES
    return [*failures[:_MOST_LINES], *([f"... and {more} more"] if more > 0 else [])]


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


def independent(case: DecodeCase, fp8: Fp8Case | None = None) -> Expected:
    """A case, decode or prefill, in float64 from its metadata, sharing no code with `reference.py`; lse in base 2.

    `fp8`: its twin, whose dequantised values are taken."""
    real = case if fp8 is None else fp8.real()
    queries = list(case.queries)
    rows, heads, device = queries[-1], case.num_heads, case.out.device
    output = torch.zeros(rows, heads, case.ckv_cache.shape[-1], dtype=torch.float64, device=device)
    in_dtype = output.clone()
    lse = torch.full((rows, heads), -math.inf, dtype=torch.float64, device=device)
    rounding = torch.zeros(rows, heads, dtype=torch.float64, device=device)
    for b, length in enumerate(case.lengths):
        begin, end = queries[b], queries[b + 1]
        token = torch.arange(length, device=device)
        page = real.kv_indices[real.kv_indptr[b] + token // case.page_size].long()
        v = real.ckv_cache[page, token % case.page_size].double()
        k = torch.cat([v, real.kpe_cache[page, token % case.page_size].double()], dim=-1)
        for row in range(begin, end):
            visible = length - (end - begin) + (row - begin) + 1 if case.causal else length
            if visible <= 0:
                continue
            q = torch.cat([real.q_nope[row], real.q_pe[row]], dim=-1).double()
            scores = case.sm_scale * q @ k[:visible].T
            lse[row] = torch.logsumexp(scores, dim=-1) / math.log(2)
            output[row] = torch.softmax(scores, dim=-1) @ v[:visible]
            p = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
            in_dtype[row] = p.to(case.out.dtype).double() @ v[:visible] / p.sum(dim=-1, keepdim=True)
            largest = k[:visible].norm(dim=-1).amax()
            rounding[row] = q.norm(dim=-1) * largest * (case.sm_scale / math.log(2) * 2.0**-23)
    common = (output.float(), lse.float(), rounding.float())
    if fp8 is None:
        return Expected(*common, in_dtype.to(case.out.dtype), case.out.dtype, case.lengths, queries)
    return Fp8Expected(*common, output.float(), fp8.dtype, case.lengths, queries, torch.zeros_like(common[1]))


def run_spec(spec: CaseSpec, device: torch.device) -> Iterator[tuple[str, Verdict]]:
    """Every way to call the library on one case: (what was called, verdict)."""
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
    yield "CSR, plan", run_case(case, plan=plan_of(case), expected=expected)
    plan = plan_of(case, "block_table")
    yield "block table, plan", run_case(case, entry="block_table", plan=plan, expected=expected)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = torch.int16 if a.element_size() == 2 else torch.int32
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))
