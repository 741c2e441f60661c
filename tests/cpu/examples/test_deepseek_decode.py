"""examples/deepseek_decode.py: YaRN as DeepSeek-V3 has it, a run within limits, and runs that have to be refused."""

import dataclasses
import importlib.util
import math
import pathlib
import sys

import pytest
import torch

EXAMPLE = pathlib.Path(__file__).resolve().parents[3] / "examples" / "deepseek_decode.py"
SMALL = ["--device", "cpu", "--heads", "4", "--layers", "2", "--prompts", "70", "1", "3", "--chunk", "48"]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("deepseek_decode", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["deepseek_decode"] = module  # where dataclasses look annotations up
    spec.loader.exec_module(module)
    return module


def test_within_limits_in_every_format(example, capsys):
    assert example.main(SMALL) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["step", "new", "tokens", "bf16", "tensor", "token", "group"]
    # two chunks, of which the second leaves two requests out, then four decode steps
    news = ["48 1 3", "22 0 0", *["1 1 1"] * 4]
    for row, new in zip(lines[2:8], news, strict=True):
        _, *cells = row.split()
        assert cells[:3] == new.split()
        bf16, *fp8 = map(float, cells[3:])
        assert 0 < bf16 <= 2e-2
        # e4m3 is seen: an FP8 cache that is as good as bf16 would not be one
        assert all(2 * bf16 < error <= 8e-2 for error in fp8)
    assert lines[-1] == "ok"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chunk", "0"], "argument --chunk: expected an integer, at least 1, got '0'"),
        (["--chunk", "many"], "argument --chunk: expected an integer, at least 1, got 'many'"),
        (["--layers", "0"], "argument --layers: expected an integer, at least 1, got '0'"),
        (["--heads", "129"], "argument --heads: expected an integer, 1 to 128, got '129'"),
        (["--prompts", "3", "0"], "argument --prompts: expected an integer, at least 1, got '0'"),
        (["--decode-steps", "-1"], "argument --decode-steps: expected an integer, at least 0, got '-1'"),
        (["--device", "gpu"], "argument --device: expected cpu or a device of this machine, got 'gpu'"),
        (["--device", "cuda:99"], "argument --device: expected cpu or a device of this machine, got 'cuda:99'"),
    ],
)
def test_sizes_that_cannot_be_are_named(example, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        example.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_no_decode_steps_is_a_size(example, capsys):
    assert example.main([*SMALL, "--formats", "bf16", "--decode-steps", "0"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 2 + 2


def refused(example, capsys):
    status = example.main([*SMALL, "--formats", "bf16"])
    return status == 1 and capsys.readouterr().out.splitlines()[-1] == "WRONG: bf16"


def test_a_softmax_scale_without_mscale_is_refused(example, monkeypatch, capsys):
    attend = example.Step.attend

    def without_mscale(*args):
        with monkeypatch.context() as patch:
            patch.setattr(example, "softmax_scale", lambda config: 192**-0.5)
            return attend(*args)

    monkeypatch.setattr(example.Step, "attend", without_mscale)
    assert refused(example, capsys)


def test_positions_off_by_one_after_the_first_chunk_are_refused(example, monkeypatch, capsys):
    grow = example.PageTable.grow

    def shifted(self, counts):
        first = max(self.kv_lens) == 0
        positions, slots = grow(self, counts)
        return positions if first else [position + 1 for position in positions], slots

    monkeypatch.setattr(example.PageTable, "grow", shifted)
    assert refused(example, capsys)


def test_keys_that_are_not_appended_are_refused(example, monkeypatch, capsys):
    monkeypatch.setattr(example.mla_cute, "append_to_cache", lambda *args, **kwargs: None)
    assert refused(example, capsys)


def test_softmax_scale_and_mscale_are_deepseek_v3s(example):
    config = example.Config()
    assert example.yarn_mscale(40, 1.0) == pytest.approx(1 + 0.1 * math.log(40))
    assert example.yarn_mscale(1, 1.0) == 1
    assert example.softmax_scale(config) == pytest.approx(0.1352337788608801, rel=1e-12)
    assert example.softmax_scale(dataclasses.replace(config, factor=1.0)) == pytest.approx(192**-0.5)


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones(example):
    config = example.Config()
    frequencies = example.yarn_frequencies(config)
    plain = 10000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)
    turns = 4096 * plain / (2 * math.pi)  # in the original context
    assert torch.equal(frequencies[turns > 35], plain[turns > 35])
    torch.testing.assert_close(frequencies[turns < 0.8], plain[turns < 0.8] / 40, rtol=1e-14, atol=0)
    between = (turns > 1.5) & (turns < 25)
    assert between.any()
    assert ((frequencies < plain) & (frequencies > plain / 40))[between].all()
    assert (frequencies.diff() < 0).all()


def test_rope_turns_pairs_by_distance(example):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 64, generator=generator, dtype=torch.float64)

    def dot(at_q, at_k):
        turned = [
            example.rotate(x, example.rope_angles(example.Config(), torch.tensor([at])))
            for x, at in ((q, at_q), (k, at_k))
        ]
        return float((turned[0] * turned[1]).sum())

    assert dot(905, 900) == pytest.approx(dot(5, 0), rel=1e-9)
    assert abs(dot(905, 900) - dot(905, 890)) > 1e-2
    assert dot(0, 0) == pytest.approx(float((q * k).sum()), rel=1e-12)


@pytest.mark.parametrize("kv_format", ["bf16", "tensor", "token", "group"])
def test_an_empty_cache_is_nan(example, kv_format):
    cache = example.LatentCache.empty(kv_format, 2, torch.device("cpu"))
    parts = [cache.ckv, cache.kpe, *(x for x in cache.scales.values() if isinstance(x, torch.Tensor))]
    assert [tuple(x.shape[-1:]) for x in parts[:2]] == [(512,), (64,)]
    assert all(x.float().isnan().all() for x in parts)


def test_pages_hold_each_token_once(example):
    table = example.PageTable(2, 4, torch.Generator().manual_seed(1))
    slots = []
    for counts in ([64, 3], [1, 0], [63, 61], [0, 1]):
        before = list(table.kv_lens)
        positions, new = table.grow(counts)
        assert positions == [b + i for b, n in zip(before, counts, strict=True) for i in range(n)]
        slots += new
    assert table.kv_lens == [128, 65]
    assert len(set(slots)) == len(slots) == 193
    assert {slot // 64 for slot in slots} == {page for pages in table.pages for page in pages}
