"""What the tests of SGLang's engines share: whether there are any, a run in a process of its own, and comparisons."""

import contextlib
import importlib.util
import json
import math
import os
import pathlib
import runpy
import signal
import subprocess
import sys

import sglang_engine
from sglang_engine import LIMIT_S

RELEASE = "0.5.23"
SPARE_S = 30  # for a process to start and to end

# With this model, sums in another order reach 0.12 in 170 tokens. Errors of 5 % in attention, or one wrong head of one
# token in each call, reach 0.8 and more.
LOGPROB_LIMIT = 0.4


def why_not():
    """Why there is nothing to test, or None. SGLang itself is not imported, which would take seconds."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or spec.origin is None:
        return f'SGLang is not installed: pip install "sglang=={RELEASE}", then mla_cute'
    file = pathlib.Path(spec.origin).with_name("_version.py")
    version = runpy.run_path(str(file))["__version__"] if file.is_file() else "of no known release"
    return None if version.split("+")[0] == RELEASE else f"the backend is written for SGLang {RELEASE}, not {version}"


def run_engine(name, folder):
    """The report of a run, or what went wrong."""
    report, log = folder / f"{name}.json", folder / f"{name}.log"
    command = [sys.executable, sglang_engine.__file__, name, str(report)]
    with log.open("w") as file:
        # a session of its own, so that nothing of an engine outlives the run
        run = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            ended = run.wait(LIMIT_S + SPARE_S)
        except subprocess.TimeoutExpired:
            ended = "none in time"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    if ended != 0:
        lines = [line[:300] for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return "\n".join([f"{name}: exit status {ended}, {log} ends with", *lines[-40:]])
    return json.loads(report.read_text())


def difference(first, second, tokens):
    """(largest difference of logprobs, tokens compared) of two rounds of requests with `tokens` tokens each.

    Requests are compared up to and with the token where they part. A token that only one lists among the likeliest is
    for the other at most as likely as the last that it lists.
    """
    worst, compared = 0.0, 0
    for a, b in zip(first, second, strict=True):
        assert len(a["tokens"]) == len(b["tokens"]) == tokens
        for i, (of_a, of_b) in enumerate(zip(a["logprobs"], b["logprobs"], strict=True)):
            least = min(of_a.values()), min(of_b.values())
            for token in of_a.keys() | of_b.keys():
                x, y = of_a.get(token), of_b.get(token)
                apart = x - least[1] if y is None else y - least[0] if x is None else abs(x - y)
                assert math.isfinite(apart), (i, of_a, of_b)
                worst = max(worst, apart)
            compared += 1
            if a["tokens"][i] != b["tokens"][i]:
                break
    return worst, compared


def check_same(first, second, tokens):
    worst, compared = difference(first, second, tokens)
    print(f"logprobs differ by at most {worst:.4f} in {compared} of {len(first) * tokens} tokens")
    assert worst < LOGPROB_LIMIT
    assert compared >= len(first) * tokens / 10
