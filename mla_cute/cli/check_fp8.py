"""`mla-cute check --fp8`: what FP8 caches cost in accuracy, by the kernel and by the format.

Each row is one decode call. Its output and lse are compared with float32 twice: on the dequantised cache and the
queries given (what the kernel adds), with accuracy "fast" on the queries as that rounds them, and on the 16-bit data
before anything was quantised (what the format, and "fast", add as well).
"""

import dataclasses
import datetime
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import gpu as gpu_facts
from .. import quant
from ..bench.runner import source_digest
from ..config import KernelConfig
from ..dims import TILE16_M
from ..reference import decode_reference
from ..testing.cases import DecodeCase, make_case
from ..testing.fp8 import Fp8Case, compare_fp8, expected_fp8, make_fp8

SCHEMA = 1
PAGE_SIZE = 64
HEADS = (16, 128)
FORMATS = ("tensor", "token", "group")
GPU_LENGTHS = (8192, 3000, 1000, 64, 1)
# The reference of 128 heads takes a second for these on two cores.
CPU_LENGTHS = (1000, 300, 64, 1)

OUTLIER_CHANNELS = (3, 77, 200, 301, 450, 511)
OUTLIER = 50.0
ROPE_MAX = 1000.0

COLUMNS = (
    "data",
    "format",
    "q",
    "H",
    "accuracy",
    "kernel: rel err",
    "max err",
    "1 - cos",
    "lse err",
    "format: rel err",
    "max err",
    "1 - cos",
    "lse err",
    "result",
)
# What goes first in a narrow terminal.
DROP = ("1 - cos", "max err", "lse err", "format: rel err", "kernel: rel err")


def normal(case: DecodeCase) -> None:
    """As it is made."""


def outlier_channels(case: DecodeCase) -> None:
    """Six channels of ckv 50 times as large."""
    case.ckv_cache[..., list(OUTLIER_CHANNELS)] *= OUTLIER


def large_rope(case: DecodeCase) -> None:
    """Channels of kpe from 1 to 230 times as large, none beyond 1000; queries as much smaller, to keep the scores."""
    factor = torch.logspace(0, math.log10(230), case.kpe_cache.shape[-1], device=case.kpe_cache.device)
    case.kpe_cache.copy_((case.kpe_cache.float() * factor).clamp(-ROPE_MAX, ROPE_MAX))
    case.q_pe.copy_(case.q_pe.float() / factor)


DATA: dict[str, Callable[[DecodeCase], None]] = {
    "normal": normal,
    "6 channels x 50": outlier_channels,
    "rope to 1000": large_rope,
}


@dataclass(frozen=True)
class Spec:
    """One row of the table."""

    data: str
    kv_format: str
    q_fp8: bool
    num_heads: int
    accuracy: str = "high"

    def __str__(self) -> str:
        accuracy = "" if self.accuracy == "high" else f", accuracy {self.accuracy}"
        return f"{self.data}, {self.kv_format}, {self.q}, {self.num_heads} heads{accuracy}"

    @property
    def q(self) -> str:
        return "e4m3" if self.q_fp8 else "bf16"


def specs() -> list[Spec]:
    """Every accuracy where it is another kernel."""
    return [
        Spec(*facts, accuracy)
        for facts in itertools.product(DATA, FORMATS, (False, True), HEADS)
        for accuracy in _accuracies(*facts[1:])
    ]


def _accuracies(kv_format: str, q_fp8: bool, num_heads: int) -> tuple[str, ...]:
    """Those whose results differ, as config.py has it."""
    if num_heads <= TILE16_M:
        return ("high",)
    return ("high", *(() if kv_format == "group" else ("native",)), *(() if q_fp8 else ("fast",)))


def make(spec: Spec, device: torch.device, lengths: Sequence[int], seed: int) -> tuple[DecodeCase, Fp8Case]:
    """The 16-bit case, and its FP8 twin with the scales that such a cache would be given: largest value over 448."""
    case = make_case(lengths, num_heads=spec.num_heads, page_size=PAGE_SIZE, device=device, seed=seed)
    DATA[spec.data](case)
    # unused rows are NaN
    ckv_scale, kpe_scale = (quant.tensor_scale(x.nan_to_num(0.0)) for x in (case.ckv_cache, case.kpe_cache))
    queries = (case.q_nope, case.q_pe) if spec.kv_format == "tensor" else (case.q_nope,)
    scales = {"ckv_scale": ckv_scale, "kpe_scale": kpe_scale, "q_scale": max(map(quant.tensor_scale, queries))}
    return case, make_fp8(case, spec.kv_format, spec.q_fp8, spread=1.0, **scales)


def figures(
    output: torch.Tensor, lse: torch.Tensor, want: torch.Tensor, want_lse: torch.Tensor
) -> dict[str, float | None]:
    """Relative Frobenius and largest error of output, smallest cosine of a row, largest error of lse (base 2); None
    where it is not finite."""
    got, want = output.double(), want.double()
    norms = got.norm(dim=-1) * want.norm(dim=-1)
    found = {
        "rel_err": (got - want).norm() / want.norm(),
        "max_err": (got - want).abs().max(),
        "cosine": ((got * want).sum(-1) / norms.clamp(min=1e-300)).min(),
        "lse_err": (lse.double() - want_lse.double()).abs().max(),
    }
    return {name: value if math.isfinite(value := float(x)) else None for name, x in found.items()}


def rows(
    device: torch.device, seed: int, lengths: Sequence[int] | None = None
) -> Iterator[tuple[Spec, dict[str, Any]]]:
    """(spec, row of the record) of each spec; "failures" are what `compare_fp8` says of the kernel's error."""
    if lengths is None:
        lengths = GPU_LENGTHS if device.type == "cuda" else CPU_LENGTHS
    for spec in specs():
        case, fp8 = make(spec, device, lengths, seed)
        # The reference, which CPU tensors run, has one accuracy.
        expected = expected_fp8(fp8, accuracy=spec.accuracy if device.type == "cuda" else "high")
        options: dict[str, Any] = {} if spec.accuracy == "high" else {"config": KernelConfig(accuracy=spec.accuracy)}
        output, lse = fp8.call(**options)
        verdict = compare_fp8(output, lse, expected)
        names = ("q_nope", "q_pe", "ckv_cache", "kpe_cache")
        before = dataclasses.replace(case, **{name: getattr(case, name).float() for name in names})
        data, data_lse = decode_reference(*before.csr_args, kv_last_page_len=case.kv_last_page_len)
        row = {
            "data": spec.data,
            "kv_format": spec.kv_format,
            "q": spec.q,
            "num_heads": spec.num_heads,
            "accuracy": spec.accuracy,
            "kernel_error": figures(output, lse, expected.output, expected.lse),
            "format_error": figures(output, lse, data, data_lse),
            "failures": list(verdict.failures),
        }
        yield spec, row


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the record as strings, in the order of COLUMNS."""
    head = (row["data"], row["kv_format"], row["q"], str(row["num_heads"]), row["accuracy"])
    errors = []
    for which in ("kernel_error", "format_error"):
        found = dict(row[which])
        if found["cosine"] is not None:
            # above 1 by rounding
            found["cosine"] = max(0.0, 1 - found["cosine"])
        errors += ["nan" if value is None else f"{value:.1e}" for value in found.values()]
    return (*head, *errors, "FAILED" if row["failures"] else "ok")


def record(found: list[dict[str, Any]], device: torch.device, seed: int, why: str | None) -> dict[str, Any]:
    """The JSON record; `why` no kernel ran, or None."""
    gpu = gpu_facts.facts()
    return {
        "schema": SCHEMA,
        "kind": "mla_cute.check.fp8",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "gpu": gpu.to_dict() if gpu is not None else None,
        "versions": gpu_facts.versions(),
        "git": gpu_facts.git_state(),
        "source_sha256": source_digest(),
        "computed_by": "kernels" if why is None else f"float32 reference on the CPU: {why}",
        "method": {
            "kernel_error": "against float32 on the dequantised cache and the queries given; of accuracy fast on the "
            "queries as it rounds them, to one e4m3 part under a scale per row",
            "format_error": "against float32 on the bf16 data before cache and queries were quantised",
            "figures": "relative Frobenius error and largest error of the output, smallest cosine of a row (query, "
            "head), largest error of lse in base 2",
            "data": "standard normal; with channels of ckv multiplied; with kpe up to 1000 and q_pe divided by as much",
            "scales": "largest absolute value / 448 of the tensor, the token or the group, of a group rounded up to a "
            "power of two",
        },
        "page_size": PAGE_SIZE,
        "lengths": list(GPU_LENGTHS if device.type == "cuda" else CPU_LENGTHS),
        "seed": seed,
        "rows": found,
        "failed": sum(bool(row["failures"]) for row in found),
    }
