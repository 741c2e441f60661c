"""The model that leaves candidates out: what it leaves, and what the committed records say of it."""

import json
import re
from pathlib import Path

import pytest

from mla_cute.config import KernelConfig
from mla_cute.gpu_speed import H200
from mla_cute.tuned.select import When
from mla_cute.tuning import cost, report, space
from mla_cute.tuning.search import PRUNED
from mla_cute.tuning.store import load

ROOT = Path(__file__).resolve().parents[3]
RECORDS = ROOT / "tune" / "measurements" / "NVIDIA_H200"
# In which nothing had been left out yet.
UNPRUNED = ("tune_deepseek-v3-formats_2026-11-28", "tune_ragged_2026-11-30")
DECODE = When("decode", "", False, 16, 64, 1, 1, 8192)


def test_the_default_and_a_sample_are_timed_the_nearest_first():
    candidates = space.candidates(DECODE, H200)
    timed, pruned, us = cost.choose(DECODE, candidates, H200)
    assert timed[0] == candidates[0]
    assert sorted(map(str, [*timed, *pruned])) == sorted(map(str, candidates))
    assert [config for config in candidates if config in timed] == timed
    assert us.keys() == set(candidates)
    limit = cost.PRUNED_FROM * min(us.values())
    slow = sorted((config for config in candidates[1:] if us[config] >= limit), key=us.__getitem__)
    assert len(pruned) > 1
    assert [config for config in slow if config in timed] == slow[::10]
    assert all(us[config] >= limit for config in pruned)


def test_of_a_slow_default_nothing_is_pruned_but_what_is_slower():
    slow = KernelConfig(kernel="tile16", cut_unit=1, min_blocks=16, split_penalty=64)
    fast = space.candidates(DECODE, H200)[0]
    timed, pruned, us = cost.choose(DECODE, [slow, fast], H200)
    assert us[slow] > cost.PRUNED_FROM * us[fast]
    assert (timed, pruned) == ([slow, fast], [])


@pytest.mark.parametrize("kv_format", ["", "group"])
def test_prefill_has_no_model(kv_format):
    when = When("prefill", kv_format, False, 16, 64, 512, 4, 8192)
    candidates = space.candidates(when, H200)
    assert cost.step_us(when, candidates[0], H200) is None
    assert cost.choose(when, candidates, H200) == (candidates, [], {})


def test_lists_of_tokens_are_modelled_as_decode():
    when = When("sparse", "group", False, 16, 1, 1, 16, 2048)
    alike = When("decode", "group", False, 16, 1, 1, 16, 2048)
    for config in space.candidates(when, H200):
        assert cost.step_us(when, config, H200) == cost.step_us(alike, config, H200)


@pytest.mark.slow
def test_what_the_model_would_have_left_out_of_the_records():
    """The numbers of the docstring."""
    tried = pruned = shapes = 0
    nearest, ratios = [], []
    for name in UNPRUNED:
        for shape in load(RECORDS / f"{name}.json")[1]:
            if not shape.when.decodes:
                continue
            shapes += 1
            times = {KernelConfig.from_dict(x["config"]): x["us"] for x in shape.candidates if x["us"]}
            default, *_ = times
            model = {config: cost.step_us(shape.when, config, H200) for config in times}
            ratios += [times[config] / us for config, us in model.items()]
            limit = cost.PRUNED_FROM * min(model.values())
            left_out = [config for config, us in model.items() if us >= limit and config != default]
            tried, pruned = tried + len(times), pruned + len(left_out)
            nearest += [min(times[config] for config in left_out) / min(times.values())] if left_out else []
    said = re.sub(r"\s+", " ", cost.__doc__)
    assert f"which is {100 * pruned / tried:.0f} % of those records' candidates" in said
    closest = f"{100 * (min(nearest) - 1) - 0.5:.0f} %"
    assert f"of {shapes} shapes none lost one that was within {closest} of its best" in said
    ratios.sort()
    assert f"{ratios[0]:.1f} to {ratios[-1]:.1f} times what this says" in said
    middle = ratios[len(ratios) // 10], ratios[-len(ratios) // 10]
    assert "for most {:.1f} to {:.1f} times".format(*middle) in said


def shape_of(path, change):
    """A shape of a record in which `change` says of each candidate what the model has, and the verdict."""
    values = json.loads(path.read_text(encoding="utf-8"))
    for i, trial in enumerate(values["shapes"][0]["candidates"]):
        trial |= change(i)
    values["shapes"] = values["shapes"][:1]
    return values


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda i: {}, []),
        (lambda i: {"model_us": 10.0}, []),
        (
            lambda i: {"model_us": 10.0 if i < 3 else 16.0} | ({"verdict": PRUNED, "us": None} if i > 4 else {}),
            ["4 further candidates were not tried: the model has 1.5x of the best's time for them. 2 of their kind "],
        ),
        (
            lambda i: {"model_us": 10.0 if i < 3 else 16.0} | ({"verdict": PRUNED, "us": None} if i > 2 else {}),
            ["6 further candidates were not tried: the model has 1.5x of the best's time for them, and none of their "],
        ),
    ],
)
def test_the_report_says_how_the_sample_did(tmp_path, change, said):
    values = shape_of(RECORDS / "tune_ragged_2026-11-30.json", change)
    path = tmp_path / "some.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    lines = report.Report(*load(path)).lines()[4:]
    assert len(lines) == len(said)
    for line, begin in zip(lines, said, strict=True):
        assert line.startswith(begin)
        if "2 of their kind" in begin:
            times = [trial["us"] for trial in values["shapes"][0]["candidates"] if trial["us"]]
            slowest = min(times[3:5]) / min(times)
            assert "2 of their kind were: 0 of these within 1% of their shape's best, " in line
            assert line.endswith(f"the nearest at {slowest:.2f}x of its time.")
