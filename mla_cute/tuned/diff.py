"""Two tuned files compared: `mla-cute tune --diff A B`."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence

from ..config import KernelConfig, differences
from .file import Entry, TunedFile

COLUMNS = ("entry", "shape", "configuration", "us A", "us B", "A over B")
TEXT_COLUMNS = 3  # of these, the first


@dataclasses.dataclass(frozen=True)
class Difference:
    """What two files say of one GPU or of two; pairs are (of A, of B) for the same shape, in the order of A.

    only_a, only_b   entries of shapes that the other file has not
    changed          pairs with another configuration
    kept             pairs with the same one. Their times may differ, as those of two runs always do
    other_gpu        "NVIDIA H200 (132 SMs) and NVIDIA H20 (78 SMs)", or "" where both are of one
    gain_a, gain_b   geometric means of default_us / us of all entries of a file; None of a file without entries
    """

    only_a: tuple[Entry, ...]
    only_b: tuple[Entry, ...]
    changed: tuple[tuple[Entry, Entry], ...]
    kept: tuple[tuple[Entry, Entry], ...]
    other_gpu: str
    gain_a: float | None
    gain_b: float | None

    @property
    def is_none(self) -> bool:
        """Whether calls on that GPU choose the same from either: shapes, configurations and GPU are."""
        return not (self.only_a or self.only_b or self.changed or self.other_gpu)

    def rows(self) -> list[tuple[str, ...]]:
        """Rows of COLUMNS. A configuration is told by what is not KernelConfig's own value, a change by its fields."""
        rows: list[tuple[str, ...]] = []
        for a, b in self.changed:
            times = f"{a.us:.1f}", f"{b.us:.1f}", f"{a.us / b.us:.3f}"
            rows.append(("changed", str(a.when), _change(a.config, b.config), *times))
        rows += [("only in A", str(a.when), _named(a.config), f"{a.us:.1f}", "-", "-") for a in self.only_a]
        rows += [("only in B", str(b.when), _named(b.config), "-", f"{b.us:.1f}", "-") for b in self.only_b]
        return rows

    def lines(self) -> list[str]:
        """What there is in a few sentences."""
        lines = [
            f"{len(self.only_a)} shapes are only in A, {len(self.only_b)} only in B; {len(self.changed)} have another "
            f"configuration, {len(self.kept)} the same."
        ]
        if self.other_gpu:
            lines.append(f"WARNING: of different GPUs, {self.other_gpu}: times compare cards.")
        for name, pairs in (("changed", self.changed), ("kept", self.kept)):
            if (ratio := _mean(a.us / b.us for a, b in pairs)) is not None:
                lines.append(f"Time in A over time in B, geometric mean of what is {name}: {ratio:.3f}x.")
            if (ratio := _mean(b.default_us / b.us / (a.default_us / a.us) for a, b in pairs)) is not None:
                lines.append(f"Gain over the default in B over that in A, of what is {name}: {ratio:.3f}x.")
        lines += [
            f"Gain over the default of all entries, geometric mean: {name} {gain:.3f}x."
            for name, gain in (("A", self.gain_a), ("B", self.gain_b))
            if gain is not None
        ]
        return lines


def compare(a: TunedFile, b: TunedFile) -> Difference:
    """What is different in `b`."""
    of_a, of_b = ({entry.when: entry for entry in file.entries} for file in (a, b))
    pairs = [(entry, of_b[when]) for when, entry in of_a.items() if when in of_b]
    gpus = [f"{file.gpu['name']} ({file.gpu['sm_count']} SMs)" for file in (a, b)]
    return Difference(
        only_a=tuple(entry for when, entry in of_a.items() if when not in of_b),
        only_b=tuple(entry for when, entry in of_b.items() if when not in of_a),
        changed=tuple(pair for pair in pairs if pair[0].config != pair[1].config),
        kept=tuple(pair for pair in pairs if pair[0].config == pair[1].config),
        other_gpu="" if gpus[0] == gpus[1] else " and ".join(gpus),
        gain_a=_gain(a.entries),
        gain_b=_gain(b.entries),
    )


def _gain(entries: Sequence[Entry]) -> float | None:
    return _mean(entry.default_us / entry.us for entry in entries)


def _mean(ratios: Iterable[float]) -> float | None:
    found = list(ratios)
    return statistics.geometric_mean(found) if found else None


def _change(a: KernelConfig, b: KernelConfig) -> str:
    old = differences(a, b)
    return ", ".join(f"{name} {old[name]} -> {value}" for name, value in differences(b, a).items())


def _named(config: KernelConfig) -> str:
    """In what it differs from what `KernelConfig()` is."""
    return ", ".join(f"{name}={value}" for name, value in differences(config, KernelConfig()).items()) or "-"
