"""The bench's command line without a GPU: comparison, selection of cases, wrong arguments, peers."""

import importlib.metadata
import sys
import types
import weakref

import pytest
from bench_case import CEILINGS, SMALL, FakeLibrary, FakeTimer, bench, wrong_page

from mla_cute.bench import command, report, runner
from mla_cute.bench import peers as peers_module
from mla_cute.bench.cases import PRESETS, Case
from mla_cute.reference import decode_reference, decode_reference_block_table


def test_compare(tmp_path, small_rotation, capsys):
    old, new = bench(SMALL[:3], timer=FakeTimer(us=200)), bench(SMALL[1:], timer=FakeTimer(us=100))
    for name, record in (("a.json", old), ("b.json", new)):
        runner.write_json(tmp_path / name, record)
    assert command.main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    text = capsys.readouterr().out
    ratio = 203.6 / 103.6
    assert text.count(f"{ratio:.3f}") == 2 + 3  # two cells; mean, lowest, highest
    assert "only in a: H=4 B=2 L=100 page 16 bfloat16" in text
    assert "only in b: H=1 B=1 L=128 page 64 bfloat16" in text


def test_compare_warns_of_different_gpus(small_rotation):
    a, b = bench(SMALL[:1]), bench(SMALL[:1])
    a["gpu"], b["gpu"] = {"name": "NVIDIA H200"}, {"name": "NVIDIA H100"}
    assert any("different GPUs" in text for text in report.compare(a, b)[1])


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ("[]", "not a record"), ('{"kind": "mla_cute.bench.decode", "schema": 99}', "schema 99")],
)
def test_compare_names_the_file_that_is_no_record(tmp_path, text, message, capsys):
    bad = tmp_path / "bad.json"
    bad.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        command.main(["--compare", str(bad), str(bad)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert str(bad) in error
    assert message in error


def test_select_cases():
    assert command.select_cases([]) == list(PRESETS["quick"])
    assert command.select_cases(["table"]) == list(PRESETS["table"])
    assert command.select_cases(["bars", "bars"]) == list(dict.fromkeys(PRESETS["bars"]))
    assert command.select_cases(
        [], heads=[8], batches=[1, 2], kv_lens=[64], page_sizes=[32], dtype_names=["float16"]
    ) == [
        Case(8, 1, 64, 32, "float16"),
        Case(8, 2, 64, 32, "float16"),
    ]
    lists = command.select_cases(["sparse"])
    assert lists == list(dict.fromkeys(PRESETS["sparse"]))  # FP8 rows are fused there, and stay so
    sizes = command.select_cases(["table"], page_sizes=[1, 16], layout="fused")
    assert len(sizes) == 60
    assert {c.page_size for c in sizes} == {1, 16}
    assert {c.layout for c in sizes} == {"fused"}
    both = command.select_cases(["quick"], heads=[7])
    assert both[: len(PRESETS["quick"])] == list(PRESETS["quick"])
    assert both[-1].num_heads == 7


def test_select_fp8_cases():
    options = {"kv_format": "group", "q_fp8": True}
    assert command.select_cases([], heads=[8], batches=[2], kv_lens=[64], **options) == [Case(8, 2, 64, **options)]
    assert all(case.kv_format == "group" and case.q_fp8 for case in command.select_cases(["quick"], **options))
    assert command.select_cases(["fp8"]) == list(PRESETS["fp8"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["nonsense"],
            "fp8, fp8_prefill, fp8_fast, fp8_32_rows, grid, drafts, sparse, dims, ragged, quick, got",
        ),
        (["--heads", "129"], "num_heads: expected 1..128, got 129"),
        (["--heads", "16,x"], "expected integers separated by commas, got '16,x'"),
        (["--page-size", "0", "--heads", "16"], "page_size: expected at least 1, got 0"),
        (["--dtype", "fp8"], "got 'fp8'"),
        (["--config", '{"speed": 11}'], "config: unknown fields ['speed']"),
        (["--config", "{"], "expected a KernelConfig as JSON, got '{': Expecting property name"),
        (["--config", "[]"], "expected a KernelConfig as a JSON object, got '[]'"),
        (["--config", '{"kernel": "x"}'], "kernel: expected one of"),
        (["--kv-format", "row"], "invalid choice: 'row'"),
        (["--q-fp8"], "q_fp8: expected a kv_format beside e4m3 queries, got none"),
    ],
)
def test_bad_arguments_are_usage_errors(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_command_writes_table_and_record(tmp_path, monkeypatch, small_rotation, capsys):
    monkeypatch.setattr(runner.Library, "installed", classmethod(lambda cls, *options: FakeLibrary.make()))
    monkeypatch.setattr(command.gpu_facts, "why_not_hopper", lambda: None)
    monkeypatch.setattr(command, "CudaTimer", FakeTimer)
    monkeypatch.setattr(
        command, "run", lambda *args, **options: runner.run(*args, **options, ceilings=lambda _: CEILINGS)
    )
    out = tmp_path / "record.json"
    argv = ["--heads", "4", "--batch", "2", "--kv-len", "100,64", "--page-size", "16", "--out", str(out)]
    assert command.main(argv) == 0
    text = capsys.readouterr().out
    assert "103.5" in text
    assert "peer flashinfer: absent" in text
    assert "peer flash_mla: absent" in text
    record = report.load(out)
    assert [row["case"]["kv_len"] for row in record["rows"]] == [100, 64]
    assert record["peers"]["flashinfer"]["present"] is False
    assert "ModuleNotFoundError" in record["peers"]["flashinfer"]["why"]
    monkeypatch.setattr(runner.Library, "installed", classmethod(lambda cls, *options: FakeLibrary.make(wrong_page)))
    assert command.main(argv) == 1
    assert "WRONG" in capsys.readouterr().out


def test_where_the_record_cannot_be_written_nothing_is_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command.gpu_facts, "why_not_hopper", lambda: None)
    monkeypatch.setattr(command, "run", lambda *args, **options: pytest.fail("it ran"))
    (tmp_path / "file").write_text("mine")
    for out, message in (
        (tmp_path, "expected a file, got a folder"),
        (tmp_path / "file" / "a.json", "cannot be written"),
    ):
        with pytest.raises(SystemExit) as stopped:
            command.main(["quick", "--no-peers", "--out", str(out)])
        assert stopped.value.code == 2
        assert f"error: --out: {out}: {message}" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_help_shows_that_compare_takes_two_records(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    assert "--compare A B" in " ".join(capsys.readouterr().out.split())


def test_command_without_a_hopper_gpu(monkeypatch, capsys):
    monkeypatch.setattr(command.gpu_facts, "why_not_hopper", lambda: "torch sees no CUDA GPU")
    assert command.main(["quick"]) == 2
    assert "nothing to time: torch sees no CUDA GPU" in capsys.readouterr().err


def fake_flash_mla():
    def flash_mla_with_kvcache(q, cache, block_table, seq_lens, head_dim_v, metadata, num_splits, scale, causal):
        assert head_dim_v == 512
        assert metadata == "metadata"
        assert num_splits == "splits"
        assert causal is False
        q, cache = q.squeeze(1), cache.squeeze(2)
        out, lse = decode_reference_block_table(
            q[..., :512], q[..., 512:], cache[..., :512], cache[..., 512:], block_table, seq_lens, scale, lse_base="e"
        )
        return out.unsqueeze(1), lse

    module = types.ModuleType("flash_mla")
    module.__version__ = "1.0.0"
    module.flash_mla_with_kvcache = flash_mla_with_kvcache
    module.get_mla_metadata = lambda seq_lens, heads_per_kv_head, kv_heads: ("metadata", "splits")
    return module


def fake_flashinfer():
    class Wrapper:
        def __init__(self, workspace):
            assert workspace.numel() == 128 << 20

        def plan(self, **options):
            self.options = options

        def run(self, q_nope, q_pe, ckv_cache, kpe_cache, *, out):
            o = self.options
            assert o["page_size"] == ckv_cache.shape[1]
            assert o["num_heads"] == q_nope.shape[1]
            assert o["causal"] is False
            pages = o["kv_indptr"][1:] - o["kv_indptr"][:-1]
            last = (o["kv_len_arr"] - (pages - 1) * o["page_size"]).int()
            decode_reference(
                q_nope,
                q_pe,
                ckv_cache,
                kpe_cache,
                o["kv_indptr"],
                o["kv_indices"],
                o["sm_scale"],
                kv_last_page_len=last,
                out=out,
            )

    module, mla = types.ModuleType("flashinfer"), types.ModuleType("flashinfer.mla")
    module.__version__ = "0.6.0"
    module.mla = mla
    mla.BatchMLAPagedAttentionWrapper = Wrapper
    return module


def test_peers_are_timed_and_checked(monkeypatch, small_rotation):
    monkeypatch.setitem(sys.modules, "flash_mla", fake_flash_mla())
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer())
    monkeypatch.setitem(sys.modules, "flashinfer.mla", sys.modules["flashinfer"].mla)
    found, status = peers_module.installed()
    assert {name: one["version"] for name, one in status.items() if one["present"]} == {
        "flashinfer": "0.6.0",
        "flash_mla": "1.0.0",
    }
    # Separate caches hold other values than the pool read as one fused buffer: a peer is checked on what it reads.
    cases = [Case(4, 2, 100, 16), Case(2, 2, 200, 64, layout="fused"), Case(2, 2, 200, 64)]
    record = bench(cases, peers=(found, status))
    paged, fused, separate = record["rows"]
    assert paged["peers"]["flash_mla"] == {"unsupported": "page size 16: FlashMLA has 64 only"}
    for peer in (
        paged["peers"]["flashinfer"],
        fused["peers"]["flashinfer"],
        fused["peers"]["flash_mla"],
        separate["peers"]["flash_mla"],
    ):
        assert peer["us"] == 103.5
        assert peer["check"]["ok"]
        assert peer["check"]["lse_err"] is None
    names = ["flashinfer", "flash_mla"]
    assert report.cells(fused, names)[-2:] == ("103.5 (1.00x)", "103.5 (1.00x)")
    assert report.cells(paged, names)[-1] == "unsupported"


def test_flash_mla_of_vllm_stands_in_for_the_package(monkeypatch, small_rotation):
    module = fake_flash_mla()
    del module.__version__
    for name in ("vllm", "vllm.third_party", "vllm.third_party.flashmla"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.third_party.flashmla.flash_mla_interface", module)
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.20.2" if name == "vllm" else version(name))
    found, status = peers_module.installed()
    assert status["flash_mla"] == {"present": True, "version": "of vllm 0.20.2"}
    assert status["flashinfer"]["present"] is False
    [row] = bench([Case(2, 2, 200, 64)], peers=(found, status))["rows"]
    assert row["peers"]["flash_mla"]["check"]["ok"]


def test_a_peer_that_raises_is_recorded(monkeypatch, small_rotation):
    module = fake_flash_mla()

    def out_of_date(*args):
        raise TypeError("another interface\nof two lines")

    module.get_mla_metadata = out_of_date
    monkeypatch.setitem(sys.modules, "flash_mla", module)
    found, status = peers_module.installed()
    row = bench([Case(2, 2, 200, 64)], peers=(found, status))["rows"][0]
    assert row["peers"]["flash_mla"] == {"error": "TypeError: another interface"}
    assert row["check"]["ok"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_peers_graphs_are_gone_when_their_memory_is_given_back(fails, monkeypatch, small_rotation):
    """Else the next peer captures beside them: under capture the allocator frees nothing."""
    captured, of_others, alive = [], [], []

    class Timer(FakeTimer):
        def capture(self, fn):
            def replay():
                return fn()

            captured.append(weakref.ref(replay))
            return replay

        def samples(self, replays, seconds, at_least=24, cold=False):
            if fails and cold and of_others:
                raise RuntimeError("out of memory")
            return super().samples(replays, seconds, at_least, cold)

        def free_graphs(self):
            alive.append([ref() is not None for ref in captured[of_others[0] :]])

    def counted(*args, time_peer=runner._time_peer):
        of_others.append(len(captured))
        return time_peer(*args)

    monkeypatch.setattr(runner, "_time_peer", counted)
    monkeypatch.setitem(sys.modules, "flash_mla", fake_flash_mla())
    [row] = bench([Case(2, 2, 200, 64)], peers=peers_module.installed(), timer=Timer())["rows"]
    [of_peer] = alive
    assert of_peer
    assert not any(of_peer)
    assert ("error" in row["peers"]["flash_mla"]) is fails
