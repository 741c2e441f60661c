"""Processes of one server, each with a GPU of its own, that read one tuned file: all choose the same."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys

import pytest
from limits import PROCESS_S
from tuned_case import FILE, entry, when, write

from mla_cute.config import KernelConfig
from mla_cute.tuned import select

RANKS = 4
# As a rank has it: device number RANK, and nothing that the others do not see.
RANK = """
import json, os, sys
import torch
from mla_cute import gpu_speed
from mla_cute.tuned import select

NAME = "NVIDIA Test/1 X"
select.gpu_of = lambda device: (NAME, gpu_speed.H200)
device = torch.device("cuda", int(os.environ["RANK"]))
chosen = []
for values in json.load(sys.stdin):
    found = select.select(select.When(**values), device)
    chosen.append((found.source, found.config.to_dict()))
json.dump(chosen, sys.stdout)
"""


def chosen_by_ranks(folder, calls, orders=None):
    """What each of RANKS processes, started together, chooses for `calls`, which it sees in its own order."""
    orders = orders or [list(range(len(calls)))] * RANKS
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLA_CUTE")}
    environment |= {"MLA_CUTE_TUNED_DIR": str(folder), "MLA_CUTE_CACHE_DIR": str(folder / "cache")}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            # Ties must not go by the order of a set of texts.
            env=environment | {"RANK": str(rank), "PYTHONHASHSEED": str(rank)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    found = []
    for rank, order in zip(ranks, orders, strict=True):
        asked = json.dumps([dataclasses.asdict(calls[i]) for i in order])
        out, errors = rank.communicate(asked, timeout=PROCESS_S)
        assert rank.returncode == 0, errors
        by_call = dict(zip(order, json.loads(out), strict=True))
        found.append([by_call[i] for i in range(len(calls))])
    return found


def entries():
    """On a grid whose middles are as far from one entry as from the next, each with a configuration of its own."""
    grid = itertools.product((16, 64), (1, 4, 16, 64), (1024, 4096, 16384), (64, 128))
    return [
        entry(KernelConfig(item_overhead=n), num_heads=heads, batch=batch, kv_len=kv_len, page_size=page)
        for n, (heads, batch, kv_len, page) in enumerate(grid)
    ]


@pytest.mark.slow
def test_ranks_that_read_one_file_choose_the_same(tmp_path):
    """Whatever each has been asked before: sampling and drafting differ between ranks."""
    write(tmp_path / FILE, *entries())
    shapes = itertools.product((16, 64, 100), (1, 2, 8, 30, 500), (None, 1, 1024, 2048, 8192, 10**6), (64, 96))
    calls = [when(num_heads=h, batch=b, kv_len=n, page_size=p) for h, b, n, p in shapes]
    forward = list(range(len(calls)))
    orders = [
        forward,
        forward[::-1],
        forward[1::2] + forward[::2],
        forward[len(calls) // 2 :] + forward[: len(calls) // 2],
    ]
    first, *others = chosen_by_ranks(tmp_path, calls, orders)
    assert all(other == first for other in others)
    sources = {source for source, _ in first}
    assert any(source.startswith("MLA_CUTE_TUNED_DIR ") for source in sources), "the file was read"
    assert f"default: no entry of MLA_CUTE_TUNED_DIR {FILE} is near" in sources, "and not for all of them"
    assert len({json.dumps(config) for _, config in first}) > 20


@pytest.mark.slow
def test_ranks_read_a_whole_file_while_it_is_replaced(tmp_path):
    """A tuner that writes while the ranks start: each has the file from before or from after, and no part of it."""
    file = tmp_path / FILE
    old = [entry(KernelConfig(item_overhead=1), batch=batch) for batch in (1, 4, 16, 64)]
    write(file, *old)
    calls = [when(batch=batch) for batch in (1, 4, 16, 64)]
    newer = dataclasses.replace(select.load(file), entries=tuple(
        dataclasses.replace(at, config=KernelConfig(item_overhead=2)) for at in old
    ))  # fmt: skip
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        writer.stdin.write(json.dumps([select.dump(newer), file.read_text()]))
        writer.stdin.close()
        assert writer.stdout.readline() == "writing\n"
        for rank in chosen_by_ranks(tmp_path, calls):
            assert len({config["item_overhead"] for _, config in rank}) == 1
    finally:
        writer.kill()
        writer.wait(PROCESS_S)


WRITER = """
import json, pathlib, sys
from mla_cute.compile.jit import replace_file
texts = json.load(sys.stdin)
print("writing", flush=True)
while True:
    for text in texts:
        replace_file(pathlib.Path(sys.argv[1]), text.encode())
"""
