"""Which speeds to reach a record has met: those that hold on its GPU, of the shapes it measured.

They are judged when a record is shown and are no part of it, so an old record is held to today's. Shares of a run's own
ceilings and ratios between its shapes hold on every GPU; microseconds hold on the GPU they are of, `BARS_GPU`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from . import cases
from .cases import BARS_GPU, MIXED_BAR, MIXED_STEPS, PAGE_ONE_BAR, RAGGED_BAR, Case, case_of


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`reach` is the target, `beyond` what more would be good; `gpu` is the GPU it is of, None where it is a ratio."""

    what: str
    measured: float
    reach: float
    beyond: float | None
    met: bool
    gpu: str | None


def judge(record: dict[str, Any]) -> list[Verdict]:
    """Every target that the rows of this record measure."""
    by_case = {case_of(row): row for row in record["rows"] if "error" not in row}
    judged: list[Verdict] = []

    def add(what: str, measured: float, limits: tuple[float, float | None], less_is_better: bool, us: bool) -> None:
        met = measured <= limits[0] if less_is_better else measured >= limits[0]
        judged.append(Verdict(what, measured, *limits, met, BARS_GPU if us else None))

    on_their_gpu = (record["gpu"] or {}).get("name") == BARS_GPU
    for bar in (*cases.BARS, *cases.PREFILL_BARS, *cases.FP8_BARS):
        if bar.case in by_case and (bar.kind != "us" or on_their_gpu):
            key, unit = {
                "read": ("read_share", "share of read bandwidth"),
                "cublas": ("cublas_share", "share of cuBLAS"),
                "us": ("us_amortised", "us"),
            }[bar.kind]
            in_us = bar.kind == "us"
            add(f"{bar.case.label}, {unit}", by_case[bar.case][key], (bar.reach, bar.beyond), in_us, in_us)
    for case, row in by_case.items():
        twin = by_case.get(dataclasses.replace(case, page_size=64))
        if case.page_size == 1 and twin is not None:
            ratio = twin["us_amortised"] / row["us_amortised"]
            add(f"{case.label}, speed over that of page 64", ratio, PAGE_ONE_BAR, False, False)
        if isinstance(case, Case) and case.longest and not case.sparse and case.uniform in by_case:
            ratio = row["us_amortised"] / by_case[case.uniform]["us_amortised"]
            add(f"{case.label}, time over that of {case.uniform.label}", ratio, (RAGGED_BAR, None), True, False)
    for step in MIXED_STEPS:
        if all(case in by_case for case in (step.together, *step.apart)):
            together, *apart = (by_case[case]["us_amortised"] for case in (step.together, *step.apart))
            what = f"{step.together.label}, time over that of {' and '.join(case.label for case in step.apart)}"
            add(what, together / sum(apart), (MIXED_BAR, None), True, False)
    return judged


def sentence(judged: Sequence[Verdict]) -> str:
    """How many are met, and whose targets they are."""
    parts = []
    for whose, found in (
        ("as shares of this run's ceilings or ratios between its shapes", [one for one in judged if one.gpu is None]),
        (f"in microseconds of an {BARS_GPU}", [one for one in judged if one.gpu is not None]),
    ):
        if found:
            parts.append(f"{sum(one.met for one in found)} of {len(found)} {whose}")
    return f"mla_cute's own targets that are met: {', '.join(parts)}."
