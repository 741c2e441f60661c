"""`warmup`: workers, progress, failures, arguments; that it leaves the driver alone; and what it selects by calls. No
GPU: see jit_case."""

import json
import os
import subprocess
import sys

import pytest
import torch
from jit_case import HERE, ROOT, assert_works, forget, forget_everything, result_of, start_process
from limits import PROCESS_S
from tuned_case import FILE, NAME, SMS, entry, write

import mla_cute
from mla_cute import _visible_gpus, warmup
from mla_cute.compile import jit
from mla_cute.compile import warmup as warmup_module
from mla_cute.config import KernelConfig
from mla_cute.kernels import registry
from toy_keys import TOY, ToyConfig, ToyKey


@pytest.fixture
def cache(tmp_path, monkeypatch):
    return forget_everything(tmp_path, monkeypatch)


@pytest.fixture
def initialised(monkeypatch):
    """A process that has used CUDA."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)


VARIANTS = [(TOY, ToyKey(), ToyConfig(num_threads=n)) for n in (32, 64, 128)]


@pytest.mark.slow
def test_warmup_compiles_in_workers_and_loads_here(cache, initialised):
    reports = []
    warmed = warmup(
        variants=[*VARIANTS, VARIANTS[0]],
        num_workers=2,
        progress=lambda done, total, w: reports.append((done, total, w)),
    )
    assert [(w.kernel, w.key, w.config) for w in warmed] == [("toy", key, config) for _, key, config in VARIANTS]
    assert all(w.seconds > 0 and not w.cached for w in warmed)
    assert [r[:2] for r in reports] == [(1, 3), (2, 3), (3, 3)]
    assert {r[2] for r in reports} == set(warmed)
    assert jit.counters() == {"compiled": 0, "loaded": 3}
    assert_works(jit.get(*VARIANTS[0]))
    assert all(w.cached for w in warmup(variants=VARIANTS, progress=False))
    forget()
    assert all(w.cached for w in warmup(variants=VARIANTS, progress=False))
    assert jit.counters() == {"compiled": 0, "loaded": 6}


@pytest.mark.slow
def test_warmup_prints_lines_without_a_terminal(cache, capsys):
    warmup(variants=VARIANTS[:1], num_workers=1)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("[1/1] toy ToyKey(dtype='float32') ToyConfig(num_threads=32, fail=''): ")


@pytest.mark.slow
def test_warmup_works_from_an_unguarded_script(cache, tmp_path):
    script = tmp_path / "server.py"
    warm = "print(len(mla_cute.warmup(variants=[(TOY, ToyKey(), ToyConfig())])))"
    script.write_text(f"import mla_cute\nfrom toy_keys import *\n{warm}\n")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(HERE)))}
    command = [sys.executable, str(script)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PROCESS_S, check=False)
    assert (run.returncode, run.stdout) == (0, "1\n"), run.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fail", "message"), [("raise", "ValueError: toy kernel asked to fail"), ("exit", "ended with exit status 7")]
)
def test_warmup_names_what_failed_and_compiles_the_rest(cache, fail, message):
    bad = (TOY, ToyKey("bfloat16"), ToyConfig(fail=fail))
    with pytest.raises(RuntimeError) as caught:
        warmup(variants=[bad, *VARIANTS], num_workers=1, progress=False)
    text = str(caught.value)
    assert text.startswith("1 of 4 kernels did not compile")
    assert f"toy {bad[1]!r} {bad[2]!r}" in text
    assert message in text
    assert len(list(cache.glob("*.o"))) == 3


def test_warmup_without_a_disk_compiles_here(cache, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLA_CUTE_CACHE_DIR", str(tmp_path / "file" / "kernels"))
    with pytest.warns(RuntimeWarning, match="MLA_CUTE_CACHE_DIR"):
        (warmed,) = warmup(variants=VARIANTS[:1], progress=False)
    assert not warmed.cached
    assert jit.counters() == {"compiled": 1, "loaded": 0}


# ------------------------------------------------------------------------------------------------ the driver


@pytest.mark.slow
def test_without_cuda_kernels_stay_on_disk_for_the_first_call(cache):
    assert not torch.cuda.is_initialized()
    warmed = warmup(variants=VARIANTS[:1], progress=False)
    assert [w.cached for w in warmed] == [False]
    assert jit.counters() == {"compiled": 0, "loaded": 0}
    assert_works(jit.get(*VARIANTS[0]))
    assert jit.counters() == {"compiled": 0, "loaded": 1}


# Every function of torch.cuda that would initialise the driver raises in the parent, and tvm_ffi, whose import calls
# one, is not imported. The child that the parent forks afterwards finds them as they were.
FORK = """
import os, pathlib
import torch

functions = ("is_available", "device_count", "current_device", "get_device_properties", "get_device_name",
             "get_device_capability", "mem_get_info", "set_device", "init", "_lazy_init")
kept = {name: getattr(torch.cuda, name) for name in functions}
def poisoned(*args, **kwargs):
    raise AssertionError("the driver was asked")
for name in functions:
    setattr(torch.cuda, name, poisoned)
torch.version.cuda = "13.0"

import mla_cute
from mla_cute import _visible_gpus
_visible_gpus.__file__ = os.environ["GPU_SCRIPT"]
variants = [(TOY, ToyKey(), ToyConfig()), (TOY, ToyKey("bfloat16"), ToyConfig())]
mla_cute.warmup(variants=variants, progress=False)
is_cached = jit.is_cached
jit.is_cached = lambda *variant: True
warmed = mla_cute.warmup(page_sizes=(64,), progress=False)
jit.is_cached = is_cached
no_pdl = [w.kernel for w in warmed if w.config is not None and not w.config.use_pdl]
imported = [name for name in ("tvm_ffi", "cutlass") if name in sys.modules]
counted = jit.counters()
pid = os.fork()
if pid == 0:
    for name, function in kept.items():
        setattr(torch.cuda, name, function)
    for variant in variants:
        jit.get(*variant)
    os._exit(0 if jit.counters() == {"compiled": 0, "loaded": 2} else 3)
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(json.dumps({"status": status, "no_pdl": no_pdl, "imported": imported, "counted": counted,
                  "initialised": torch.cuda.is_initialized()}))
"""


@pytest.mark.slow
def test_a_process_that_warms_up_can_fork(cache, tmp_path):
    write(tmp_path / "tuned" / FILE, entry(KernelConfig(use_pdl=False)))
    script = tmp_path / "gpus.py"
    script.write_text(f"print({json.dumps([[NAME, SMS]] * 2)!r})")
    found = result_of(start_process(FORK, GPU_SCRIPT=str(script), MLA_CUTE_TUNED_DIR=str(tmp_path / "tuned")))
    assert found == {
        "status": 0,
        "no_pdl": ["decode_tile16", "planner", "planner", "planner"],
        "imported": [],
        "counted": {"compiled": 0, "loaded": 0},
        "initialised": False,
    }


def test_the_gpus_are_asked_for_in_a_process_of_their_own(monkeypatch, tmp_path, caplog):
    script = tmp_path / "gpus.py"
    monkeypatch.setattr(_visible_gpus, "__file__", str(script))
    script.write_text("import json, os; print(json.dumps([[os.environ['CUDA_VISIBLE_DEVICES'], 3]]))")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert warmup_module._ask_for_gpus() == [("7", 3)]
    assert not caplog.records
    script.write_text("import sys; sys.exit('cuInit returned CUDA error 803')")
    assert warmup_module._ask_for_gpus() == []
    assert caplog.records[-1].levelname == "WARNING"
    assert caplog.records[-1].getMessage().endswith("the GPU is not known: cuInit returned CUDA error 803")


def test_the_script_runs_here():
    command = [sys.executable, "-I", "-S", _visible_gpus.__file__]
    run = subprocess.run(command, capture_output=True, text=True, timeout=PROCESS_S, check=False)
    assert run.returncode == 0 or "CUDA error" in run.stderr
    assert isinstance(json.loads(run.stdout or "[]"), list)


class Driver:
    """libcuda with two GPUs, or with an error of cuInit."""

    GPUS = ((b"NVIDIA H200", 132), (b"NVIDIA H20", 78))

    def __init__(self, status=0):
        self.status = status

    def cuInit(self, flags):
        assert flags == 0
        return self.status

    def cuDeviceGetCount(self, count):
        count._obj.value = len(self.GPUS)
        return 0

    def cuDeviceGet(self, device, index):
        device._obj.value = 40 + index
        return 0

    def cuDeviceGetName(self, name, length, device):
        assert length == 256
        name.value = self.GPUS[device.value - 40][0]
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):
        assert attribute == 16
        value._obj.value = self.GPUS[device.value - 40][1]
        return 0


def test_gpus_by_the_driver():
    assert _visible_gpus.visible(Driver()) == [("NVIDIA H200", 132), ("NVIDIA H20", 78)]
    assert _visible_gpus.visible(Driver(100)) == []
    with pytest.raises(RuntimeError, match="cuInit returned CUDA error 803"):
        _visible_gpus.visible(Driver(803))


# ------------------------------------------------------------------------------------------------ arguments


def test_a_server_needs_nothing_else():
    """Every kernel of every public call, for the dtypes and formats that were asked for."""
    found = warmup_module.selected(("bfloat16",), (64,), warmup_module.OPS, ("", "tensor"))
    of = {ref: {key for kernel, key, _ in found if kernel == ref} for ref in dict.fromkeys(v[0] for v in found)}
    assert of.keys() == {ref for ref in vars(registry).values() if isinstance(ref, registry.KernelRef)}
    slots = ("int32", "int64")
    assert of[registry.APPEND] == {registry.AppendKey("bfloat16", f, s) for f in ("", "tensor") for s in slots}
    assert of[registry.MERGE_STATES] == {registry.MergeStatesKey(dtype) for dtype in ("bfloat16", "float32")}
    only = warmup_module.selected(("float16",), (64,), ("append",), ("group",))
    assert only == [(registry.APPEND, registry.AppendKey("float16", "group", s), None) for s in slots]


def test_dtypes_of_torch_are_names_too():
    both = (torch.bfloat16, "float16")
    asked = ((64,), warmup_module.OPS, ("",))
    assert warmup_module.selected(both, *asked) == warmup_module.selected(registry.DTYPES, *asked)
    assert warmup_module.selected(
        iter(both), iter((64,)), iter(warmup_module.OPS), iter(("",))
    ) == warmup_module.selected(both, *asked)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtypes": "bfloat16"}, TypeError, "dtypes: expected a sequence of names from ..., got 'bfloat16'"),
        ({"dtypes": torch.bfloat16}, TypeError, "dtypes: expected a sequence of names from ..., got torch.bfloat16"),
        ({"dtypes": None}, TypeError, "dtypes: expected a sequence of names from ..., got None"),
        ({"dtypes": (torch.float32,)}, ValueError, "dtypes: expected names from ..., got ['float32']"),
        ({"dtypes": ("bfloat16", 16, [])}, ValueError, "dtypes: expected names from ..., got [16, []]"),
        ({"ops": "decode"}, TypeError, "ops: expected a sequence of names from ..., got 'decode'"),
        ({"ops": ("attend",)}, ValueError, "ops: expected names from ..., 'append', 'merge_states'), got ['attend']"),
        ({"kv_formats": "tensor"}, TypeError, "kv_formats: expected a sequence of names from ..., got 'tensor'"),
        ({"kv_formats": ""}, TypeError, "kv_formats: expected a sequence of names from ..., got ''"),
        ({"kv_formats": (None,)}, ValueError, "kv_formats: expected names from ..., got [None]"),
        ({"page_sizes": 64}, TypeError, "page_sizes: expected a sequence of ints, got 64"),
        ({"page_sizes": "64"}, TypeError, "page_sizes: expected a sequence of ints, got '64'"),
        ({"page_sizes": ("64", 1)}, TypeError, "page_sizes: expected ints, got ['64']"),
        ({"page_sizes": (True, 64.0)}, TypeError, "page_sizes: expected ints, got [True, 64.0]"),
        ({"page_sizes": (0, 64)}, ValueError, "page_sizes: expected values >= 1, got [0]"),
        ({"page_sizes": (0,), "ops": ("append",)}, ValueError, "page_sizes: expected values >= 1, got [0]"),
        ({"num_workers": "a"}, TypeError, "num_workers: expected an int, got 'a'"),
        ({"num_workers": 2.0}, TypeError, "num_workers: expected an int, got 2.0"),
        ({"num_workers": 0}, ValueError, "num_workers: expected >= 1, got 0"),
        ({"progress": 1}, TypeError, "progress: expected True, False, None or a callable, got 1"),
        ({"variants": TOY}, TypeError, "variants: expected a sequence of (kernel, key, config) triples, got ..."),
        ({"variants": (TOY, None, None)}, TypeError, "variants: expected a sequence of (kernel, key, config) ..."),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(cache, arguments, error, message):
    begin, _, end = message.partition("...")
    with pytest.raises(error) as raised:
        mla_cute.warmup(**arguments)
    assert str(raised.value).startswith(begin)
    assert str(raised.value).endswith(end)
    assert not cache.exists()
