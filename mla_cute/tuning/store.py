"""The measurements file: every candidate of every shape, and what was chosen. A run resumes from it.

JSON with one shape a line, written by rename after each shape. A shape counts as done for the same sources, dtype and
GPU; shapes of other sources or another dtype stay in the file until they are measured again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from ..compile.jit import replace_file
from ..config import KernelConfig
from ..tuned.file import values_of, when_of
from ..tuned.select import Entry, When
from .search import GAIN, KEEP_WITHIN, POLICIES, RUNGS, Result

SCHEMA = 1
KIND = "mla_cute.tuning"
METHOD = {
    "us": "median of CUDA-graph replays, one call with a plan per graph (main kernel and merge), each replay between "
    "two CUDA events; candidates interleaved in random order over disjoint page sets",
    "search": f"rungs of up to {', '.join(map(str, RUNGS))} rounds; kept are the better half, what is within "
    f"{KEEP_WITHIN:.0%} of the best, and the default",
    "choice": f"the default, unless another is more than {GAIN:.0%} faster over all rounds and each half of them, "
    "and over new rounds after it was picked; us and default_us of a shape are the medians of these",
    "policy": "graph: us is what is compared; eager: us and host_us, the host's time of a call with a plan",
    "us_chained": "of what was timed to the end: a call in a graph of several, back to back over the slots, L2 emptied "
    "in front of the first; nothing is chosen by it",
    "sm_mhz, watts, throttled": "means of NVML after each burst of the last rung, and what kept the clock down; a rung "
    "that was kept down is timed once more after a rest, and that counts; null without nvidia-ml-py",
    "model_us": "what the tuner's model has for it; candidates of the longest times there are left out but for a tenth",
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
    runner_up: KernelConfig | None = None
    policy: str = "graph"

    @classmethod
    def of(
        cls,
        when: When,
        dtype: str,
        digest: str,
        made_with: dict[str, Any],
        seconds: float,
        result: Result,
        policy: str = "graph",
    ) -> Measured:
        chosen, runner_up = result.chosen, result.runner_up if result.chosen else None
        tried = tuple(
            {
                "config": trial.config.to_dict(),
                "us": round(trial.us, 3) if trial.samples else None,
                "samples": len(trial.samples),
                "rung": trial.rung,
                "verdict": trial.verdict,
                "us_chained": None if trial.us_chained is None else round(trial.us_chained, 3),
                "host_us": None if trial.host_us is None else round(trial.host_us, 2),
                "model_us": None if trial.model_us is None else round(trial.model_us, 2),
                "sm_mhz": trial.conditions and trial.conditions.sm_mhz,
                "watts": trial.conditions and trial.conditions.watts,
                "throttled": None if trial.conditions is None else list(trial.conditions.throttled),
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
            runner_up_us=round(runner_up.us, 3) if runner_up else None,
            candidates=tried,
            runner_up=runner_up.config if runner_up else None,
            policy=policy,
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
        return Entry(self.when, self.chosen, self.us, self.default_us, self.runner_up_us, self.runner_up)

    def to_dict(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["when"] = values_of(self.when)
        for name in ("chosen", "runner_up"):
            config = getattr(self, name)
            values[name] = config.to_dict() if config else None
        return values

    @classmethod
    def from_dict(cls, values: Any) -> Measured:
        """Raises ValueError, which names the field, on anything that `to_dict` does not make."""
        names = [field.name for field in dataclasses.fields(cls)]
        # Records from before these were there do without.
        _object("", values, [name for name in names if name not in ("runner_up", "policy")])
        _expect(values.get("policy", "graph") in POLICIES, "policy", f"one of {POLICIES}", values.get("policy"))
        if unknown := sorted(set(values) - set(names)):
            raise ValueError(f"unknown fields {unknown}; known are {names}")
        when = when_of(values["when"])
        if when.kv_len is None:
            raise ValueError("when.kv_len: expected the length that was timed, got None")
        for name in ("dtype", "source_sha256", "why"):
            _expect(isinstance(values[name], str), name, "a text", values[name])
        _object("made_with", values["made_with"], ())
        _expect(_is_time(values["seconds"], 0.0), "seconds", "a number >= 0", values["seconds"])
        candidates = values["candidates"]
        _expect(isinstance(candidates, list), "candidates", "a list", candidates)
        for index, trial in enumerate(candidates):
            _check_trial(f"candidates[{index}]", trial)
        config, next_best = (
            None if values.get(name) is None else _config(name, values[name]) for name in ("chosen", "runner_up")
        )
        if config is not None:
            _expect(bool(candidates), "candidates", "the default first", candidates)
            for name in ("us", "default_us"):
                _expect(_is_time(values[name]), name, "a number > 0 of a tuned shape", values[name])
        runner_up = values["runner_up_us"]
        _expect(runner_up is None or _is_time(runner_up), "runner_up_us", "a number > 0 or null", runner_up)
        configs = {"chosen": config, "runner_up": next_best}
        return cls(**{**values, **configs, "when": when, "candidates": tuple(candidates)})


def _expect(is_right: bool, name: str, what: str, got: object) -> None:
    if not is_right:
        raise ValueError(f"{name}: expected {what}, got {got!r:.80}")


def _object(name: str, values: object, required: Sequence[str]) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{name}: expected an object, got {values!r:.80}".removeprefix(": "))
    if missing := [field for field in required if field not in values]:
        raise ValueError(f"{name}: missing fields {missing}".removeprefix(": "))


def _is_time(value: object, least: float = math.ulp(0.0)) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and least <= value < math.inf


def _config(name: str, values: Any) -> KernelConfig:
    _object(name, values, ())
    try:
        return KernelConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None


def _check_trial(name: str, trial: Any) -> None:
    """One of `candidates`."""
    _object(name, trial, ("config", "us", "samples", "rung", "verdict"))
    _config(f"{name}.config", trial["config"])
    _expect(isinstance(trial["verdict"], str), f"{name}.verdict", "a text", trial["verdict"])
    _expect(trial["us"] is None or _is_time(trial["us"]), f"{name}.us", "a number > 0 or null", trial["us"])
    for field in ("us_chained", "host_us", "model_us", "sm_mhz", "watts"):  # of newer records
        value = trial.get(field)
        _expect(value is None or _is_time(value), f"{name}.{field}", "a number > 0 or null", value)
    for field in ("samples", "rung"):
        _expect(type(trial[field]) is int, f"{name}.{field}", "an integer", trial[field])


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
    except (RecursionError, ValueError) as error:
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
        except ValueError as error:
            raise ValueError(f"{path}: shapes[{index}]: {error}") from None
    _expect(isinstance(values["gpu"].get("name"), str), f"{path}: gpu.name", "a text", values["gpu"].get("name"))
    return values["gpu"], shapes
