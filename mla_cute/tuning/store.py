"""The measurements file: every candidate of every shape, and what was chosen. A run resumes from it.

JSON with one shape a line, written by rename after each shape. A shape counts as done for the same sources, dtype and
GPU; shapes of other sources or another dtype stay in the file until they are measured again.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from ..config import KernelConfig
from ..jit import replace_file
from ..tuned import Entry, When
from .search import GAIN, KEEP_WITHIN, RUNGS, Result

SCHEMA = 1
KIND = "mla_cute.tuning"
METHOD = {
    "us": "median of CUDA-graph replays, one call with a plan per graph (main kernel and merge), each replay between "
    "two CUDA events; candidates interleaved in random order over disjoint page sets",
    "search": f"rungs of up to {', '.join(map(str, RUNGS))} rounds; kept are the better half, what is within "
    f"{KEEP_WITHIN:.0%} of the best, and the default",
    "choice": f"the default, unless another is more than {GAIN:.0%} faster over all rounds and each half of them, "
    "and over new rounds after it was picked; us and default_us of a shape are the medians of these",
    "rung": "number of rungs the candidate was timed in; 0: not timed",
}

Key = tuple[When, str]


@dataclasses.dataclass(frozen=True)
class Measured:
    """One shape of the file. `chosen` is None where it could not be tuned, `why` says so; times in microseconds."""

    when: When
    dtype: str
    source_sha256: str
    made_with: dict[str, Any]
    seconds: float
    chosen: KernelConfig | None
    why: str
    us: float | None
    default_us: float | None
    runner_up_us: float | None
    candidates: tuple[dict[str, Any], ...]

    @classmethod
    def of(
        cls, when: When, dtype: str, digest: str, made_with: dict[str, Any], seconds: float, result: Result
    ) -> Measured:
        chosen, runner_up = result.chosen, result.runner_up_us
        tried = tuple(
            {
                "config": trial.config.to_dict(),
                "us": round(trial.us, 3) if trial.samples else None,
                "samples": len(trial.samples),
                "rung": trial.rung,
                "verdict": trial.verdict,
            }
            for trial in result.trials
        )
        return cls(
            when=when,
            dtype=dtype,
            source_sha256=digest,
            made_with=made_with,
            seconds=round(seconds, 2),
            chosen=chosen.config if chosen else None,
            why=result.why,
            us=round(result.us, 3) if chosen else None,
            default_us=round(result.default_us, 3) if chosen else None,
            runner_up_us=round(runner_up, 3) if chosen and runner_up is not None else None,
            candidates=tried,
        )

    @property
    def gain(self) -> float:
        """Time of the default over that of the chosen configuration."""
        assert self.us is not None
        assert self.default_us is not None
        return self.default_us / self.us

    def entry(self) -> Entry | None:
        """For the tuned file."""
        if self.chosen is None:
            return None
        assert self.us is not None
        assert self.default_us is not None
        return Entry(self.when, self.chosen, self.us, self.default_us, self.runner_up_us)

    def to_dict(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["when"] = dataclasses.asdict(self.when)
        values["chosen"] = self.chosen.to_dict() if self.chosen else None
        return values

    @classmethod
    def from_dict(cls, values: Any) -> Measured:
        """Raises ValueError, TypeError or KeyError on anything that `to_dict` does not make."""
        when, chosen = When(**values["when"]), values["chosen"]
        config = None if chosen is None else KernelConfig.from_dict(chosen)
        made = cls(**{**values, "when": when, "chosen": config, "candidates": tuple(values["candidates"])})
        times = (made.us, made.default_us)
        if config is not None and not all(isinstance(us, (int, float)) and us > 0 for us in times):
            raise ValueError(f"expected times of a tuned shape, got us {made.us!r}, default_us {made.default_us!r}")
        return made


class Store:
    """The file at `path`, which need not exist yet, for one GPU.

    Raises ValueError, naming the file, when it is no measurements file, is damaged, or is another GPU's.
    """

    def __init__(self, path: pathlib.Path, gpu: dict[str, Any]):
        self.path, self._gpu = path, gpu
        self.shapes: dict[Key, Measured] = {}
        if path.exists():
            found, shapes = load(path)
            if found.get("name") != gpu["name"]:
                raise ValueError(f"{path}: measured on {found.get('name')}, this GPU is {gpu['name']}")
            self.shapes = {(shape.when, shape.dtype): shape for shape in shapes}
        self._lines = {key: json.dumps(shape.to_dict()) for key, shape in self.shapes.items()}

    def add(self, shape: Measured) -> None:
        """Keep a shape, instead of an older one, and write the file."""
        key = (shape.when, shape.dtype)
        self.shapes[key] = shape
        self._lines[key] = json.dumps(shape.to_dict())
        head = {"schema": SCHEMA, "kind": KIND, "gpu": self._gpu, "method": METHOD}
        fields = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in head.items())
        text = f'{{{fields},\n"shapes": [\n' + ",\n".join(self._lines.values()) + "\n]}\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, text.encode())


def load(path: pathlib.Path) -> tuple[dict[str, Any], list[Measured]]:
    """(gpu, shapes) of a measurements file. Raises ValueError that names the file and the shape; OSError."""
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}; delete it to measure anew") from None
    if not isinstance(values, dict) or values.get("kind") != KIND:
        raise ValueError(f"{path}: not a measurements file of `mla-cute tune`")
    if values.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema {values.get('schema')!r}, this version reads {SCHEMA}")
    if not isinstance(values.get("gpu"), dict) or not isinstance(values.get("shapes"), list):
        raise ValueError(f"{path}: expected an object gpu and a list shapes")
    shapes = []
    for index, shape in enumerate(values["shapes"]):
        try:
            shapes.append(Measured.from_dict(shape))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: shapes[{index}]: {type(error).__name__}: {error}") from None
    return values["gpu"], shapes
