"""The verdict on a result: how far it may be from the float32 reference, by the error that the same computation has in
the input dtype."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# lse is a float32 sum of float32 exponentials of float32-accumulated scores: its rounding is about 1e-5 where |lse| is
# 10.
LSE_ATOL = 1e-4
LSE_RTOL = 2e-6


@dataclass
class Expected:
    """Reference of a case: float32 output and lse, and the output of the computation with P and output in `dtype`.

    `score_rounding` [rows, H] is one float32 unit of the row's largest |q| |k|, in units of lse: what summing a score
    in float32 may lose however it is summed (a score can be small while its terms are not).
    """

    output: torch.Tensor
    lse: torch.Tensor
    score_rounding: torch.Tensor
    in_dtype: torch.Tensor
    dtype: torch.dtype
    lengths: list[int]
    queries: Sequence[int]

    def place(self, row: int) -> str:
        """Request and query of a row of output."""
        b = bisect.bisect_right(self.queries, row) - 1
        first, q_len = self.queries[b], self.queries[b + 1] - self.queries[b]
        query = "" if q_len == 1 else f", query {row - first} of {q_len}"
        return f"request {b} (kv_len {self.lengths[b]}){query}"


@dataclass(frozen=True)
class Verdict:
    """Error figures of a result. `failures` says what is wrong, worst row first; empty means the result is accepted.

    `relative_error` and `dtype_error` are Frobenius norms of the error over that of the reference, of the result and of
    the same computation in the input dtype; `cosine` is the smallest over rows; errors are taken where both are finite.
    """

    failures: tuple[str, ...]
    relative_error: float
    dtype_error: float
    max_error: float
    cosine: float
    lse_error: float

    @property
    def ok(self) -> bool:
        return not self.failures

    def __str__(self) -> str:
        figures = (
            f"relative error {self.relative_error:.2e} (in dtype: {self.dtype_error:.2e}), "
            f"max error {self.max_error:.2e}, cosine {self.cosine:.7f}, lse error {self.lse_error:.2e}"
        )
        return "\n".join((*self.failures, figures))


def form_failures(output: torch.Tensor, lse: torch.Tensor | None, expected: Expected) -> list[str]:
    """Dtypes and shapes that are not the reference's."""
    failures: list[str] = []
    if output.dtype is not expected.dtype or output.shape != expected.output.shape:
        failures.append(
            f"output: expected {expected.dtype} {list(expected.output.shape)}, got {output.dtype} {list(output.shape)}"
        )
    if lse is not None and (lse.dtype is not torch.float32 or lse.shape != expected.lse.shape):
        failures.append(f"lse: expected torch.float32 {list(expected.lse.shape)}, got {lse.dtype} {list(lse.shape)}")
    return failures


def compare(output: torch.Tensor, lse: torch.Tensor | None, expected: Expected) -> Verdict:
    """Judge the rows of a result that requests own; `lse` None leaves lse out.

    Accepted is, for every (query, head) row: inf and NaN where the reference has them and nowhere else; an error, in
    norm and in the largest element, of at most twice that of the same computation in the input dtype plus rounding
    (eps / 4 of the row's norm, eps / 2 of its largest element); a cosine that such an error allows; an lse error of at
    most 1e-4 + 2e-6 * |lse| + one float32 unit of |q| |k|, the rounding of a score's sum.
    """
    failures = form_failures(output, lse, expected)
    if failures or output.numel() == 0:
        return Verdict(tuple(failures), 0.0, 0.0, 0.0, 1.0, 0.0)

    want, got, base = expected.output.double(), output.double(), expected.in_dtype.double()
    masks_differ = (kind(output) != kind(expected.output.to(expected.dtype))).any(-1)
    failures += worst(
        "output: inf or NaN where the reference has none, or the reverse", masks_differ.double(), expected
    )

    finite = want.isfinite() & got.isfinite() & base.isfinite()
    want, got, base = (x.where(finite, torch.zeros_like(x)) for x in (want, got, base))
    error, base_error = got - want, base - want
    norm, error_norm, base_norm = want.norm(dim=-1), error.norm(dim=-1), base_error.norm(dim=-1)
    largest, error_max, base_max = want.abs().amax(-1), error.abs().amax(-1), base_error.abs().amax(-1)
    eps = torch.finfo(expected.dtype).eps

    allowed = 2 * base_norm + eps / 4 * norm
    failures += over("output: error norm", error_norm, allowed, expected)
    failures += over("output: largest error", error_max, 2 * base_max + eps / 2 * largest, expected)
    cosine = torch.where(
        norm > 0, (got * want).sum(-1) / (got.norm(dim=-1) * norm).clamp(min=1e-300), torch.ones_like(norm)
    )
    # an error of relative norm r turns a row by at most asin(r), and 1 - cos(asin(r)) < r^2 for r < 1
    allowed_turn = (allowed / norm.clamp(min=1e-300)).square().clamp(max=1) + 1e-12
    failures += over("output: 1 - cosine", 1 - cosine, allowed_turn, expected)

    lse_error = torch.zeros_like(norm)
    if lse is not None:
        lse_masks_differ = kind(lse) != kind(expected.lse)
        failures += worst(
            "lse: inf or NaN where the reference has none, or the reverse", lse_masks_differ.double(), expected
        )
        lse_finite = lse.isfinite() & expected.lse.isfinite()
        lse_error = (lse.double() - expected.lse.double()).abs().where(lse_finite, lse_error)
        allowed_lse = LSE_ATOL + LSE_RTOL * expected.lse.double().abs().where(lse_finite, torch.zeros_like(norm))
        allowed_lse += expected.score_rounding.double().nan_to_num(0.0, 0.0)
        failures += over("lse: error", lse_error, allowed_lse, expected)

    total = norm.norm().clamp(min=1e-300)
    return Verdict(
        failures=tuple(failures),
        relative_error=float(error_norm.norm() / total),
        dtype_error=float(base_norm.norm() / total),
        max_error=float(error_max.max()),
        cosine=float(cosine.min()),
        lse_error=float(lse_error.max()),
    )


def kind(x: torch.Tensor) -> torch.Tensor:
    """0 finite, 1 NaN, 2 +inf, 3 -inf."""
    return x.isnan().int() + 2 * x.isposinf().int() + 3 * x.isneginf().int()


def over(what: str, value: torch.Tensor, allowed: torch.Tensor, expected: Expected) -> list[str]:
    excess = (value - allowed).where(value > allowed, torch.zeros_like(value))
    return worst(what, excess, expected, lambda b, h: f" {float(value[b, h]):.3e}, allowed {float(allowed[b, h]):.3e}")


def worst(
    what: str, badness: torch.Tensor, expected: Expected, figures: Callable[[int, int], str] = lambda b, h: ""
) -> list[str]:
    """A message for the largest positive entry of `badness` [rows, H], none if there is none."""
    count = int((badness > 0).sum())
    if count == 0:
        return []
    row, h = divmod(int(badness.argmax()), badness.shape[1])
    where = f"{expected.place(row)}, head {h}"
    return [f"{what}{figures(row, h)} in {where}; {count} of {badness.numel()} rows are wrong"]
