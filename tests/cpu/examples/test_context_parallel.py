"""examples/context_parallel.py: three gloo ranks get the unsharded answer, and shards partition a context."""

import importlib.util
import pathlib
import re
import socket
import subprocess
import sys

import pytest
import torch
from limits import PROCESS_S

EXAMPLE = pathlib.Path(__file__).resolve().parents[3] / "examples" / "context_parallel.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("context_parallel", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
@pytest.mark.parametrize("options", [[], ["--fp8"]], ids=["bf16", "fp8"])
def test_three_ranks_get_the_unsharded_answer(options):
    done = subprocess.run(
        [sys.executable, EXAMPLE, "--ranks", "3", "--port", str(free_port()), *options],
        capture_output=True, text=True, check=False, timeout=PROCESS_S, cwd=EXAMPLE.parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, verdict = done.stdout.splitlines()
    assert verdict == "ok"
    found = [re.fullmatch(r"rank (\d) of 3 \(\w+\): output differs by (\S+), lse by (\S+)", x).groups() for x in lines]
    assert [rank for rank, *_ in found] == ["0", "1", "2"]
    assert len({tuple(errors) for _, *errors in found}) == 1, "ranks merge in the same order, so have the same bits"
    for _, out_error, lse_error in found:
        # not 0: the parts were rounded on the way, which a run that ignores the other ranks would not show
        assert 0 < float(out_error) <= 3 * 2**-9
        assert float(lse_error) <= 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "0"], "argument --ranks: expected an integer, at least 1, got '0'"),
        (["--ranks", "two"], "argument --ranks: expected an integer, at least 1, got 'two'"),
        (["--port", "65536"], "argument --port: expected an integer, 1 to 65535, got '65536'"),
        (["--heads", "0"], "argument --heads: expected an integer, 1 to 128, got '0'"),
        (["--time", "0"], "argument --time: expected an integer, at least 1, got '0'"),
        (["--ranks", "3", "--time", "64"], "argument --time: expected a GPU for each of 3 ranks, got 2"),
    ],
)
def test_sizes_that_cannot_be_are_named(example, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["context_parallel.py", *arguments])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(example.mp, "spawn", lambda *args, **options: pytest.fail("it ran"))
    with pytest.raises(SystemExit) as stopped:
        example.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("page_size", [1, 4])
def test_shards_partition_the_tokens(example, num_ranks, page_size):
    lengths = [0, 1, 3, 4, 5, 8, 9, 12, 13, 27, 28, 29]
    max_pages = -(-max(lengths) // page_size)
    table = torch.arange(len(lengths) * max_pages, dtype=torch.int32).view(len(lengths), max_pages)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    held = [[] for _ in lengths]
    for rank in range(num_ranks):
        own_table, own_lens = example.shard_pages(table, seq_lens, page_size, rank, num_ranks)
        assert own_lens.dtype is own_table.dtype is torch.int32
        for tokens, row, n in zip(held, own_table.tolist(), own_lens.tolist(), strict=True):
            tokens += [(row[i // page_size], i % page_size) for i in range(n)]
    for b, (tokens, n) in enumerate(zip(held, lengths, strict=True)):
        whole = [(table[b, i // page_size].item(), i % page_size) for i in range(n)]
        assert sorted(tokens) == whole, (b, n)
