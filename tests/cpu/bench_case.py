"""A timer and a library that stand in for a GPU's, and cases to run with them: of the tests of the bench."""

import torch

from mla_cute.bench import cases as cases_module
from mla_cute.bench import runner, timing
from mla_cute.bench.cases import PUBLIC_BEST_GPU, Case
from mla_cute.config import KernelConfig
from mla_cute.gpu import GpuFacts
from mla_cute.reference import decode_reference, prefill_reference, sparse_reference

CEILINGS = {"read_gbps": 4000.0, "cublas_bf16_tflops": 800.0}
H200 = GpuFacts(0, PUBLIC_BEST_GPU, (9, 0), 132, 141 << 30, 60 << 20, "580.1", 1980, 3201, None)
SMALL = [Case(4, 2, 100, 16), Case(2, 1, 64, 64, "float16", "fused"), Case(3, 3, 7, 1), Case(1, 1, 128, 64)]
FP8_CASES = [
    Case(4, 2, 100, page_size, dtype, layout, kv_format, q_fp8)
    for kv_format, page_size in (("tensor", 16), ("token", 1), ("group", 64))
    for layout in ("separate", "fused")
    for dtype, q_fp8 in (("bfloat16", False), ("bfloat16", True), ("float16", False))
]


class FakeTimer:
    """Runs what it is given once and answers with given times; a captured graph says what it holds."""

    device = torch.device("cpu")

    def __init__(self, us=100.0, plan_us=6.1):
        self.us, self.plan_us, self.measured = us, plan_us, []

    def capture(self, fn):
        return fn

    def samples(self, replays, seconds, at_least=24, cold=False):
        if cold:
            return [self.us + 10.0] * at_least
        for replay in replays:
            replay()
        self.measured.append(len(replays))
        if getattr(replays[0], "__name__", "") == "update":
            return [self.plan_us] * at_least
        return [self.us + i for i in range(-1, 9)]  # median us + 3.5, 90 % at us + 8

    def host_us(self, fn, calls=50, chunks=20):
        fn()
        return 12.5

    def enqueue(self, replays, first, count):
        for i in range(first, first + count):
            replays[i % len(replays)]()
        return lambda: None

    def free_graphs(self):
        pass

    def synchronize(self):
        pass


class Plan:
    def __init__(self, config=None):
        self.updates, self.config = 0, config or KernelConfig()

    def update(self):
        self.updates += 1


class FakeLibrary(runner.Library):
    """The references behind the library's functions, with a record of what the bench asked of its planners."""

    @classmethod
    def make(cls, decode=decode_reference, prefill=prefill_reference, sparse=sparse_reference):
        plans, asked = [], []

        def plan(*indptrs, **options):
            asked.append((*indptrs, options))
            plans.append(Plan(options["config"]))
            return plans[-1]

        def calling(function):
            def call(*args, plan, config, batch_invariant, **options):
                assert config is None
                assert batch_invariant is False
                assert plan is None or plan in plans
                return function(*args, **options)

            return call

        library = cls(calling(decode), plan, calling(prefill), plan, calling(sparse), plan)
        object.__setattr__(library, "asked", asked)
        return library


def shrink_rotation(monkeypatch):
    monkeypatch.setattr(cases_module, "ROTATION_BYTES", 500_000)
    monkeypatch.setattr(cases_module, "ROTATION_TARGET", 500_000)


def bench(cases, library=None, timer=None, **options):
    options = {
        "timer": FakeTimer(),
        "library": library or FakeLibrary.make(),
        "ceilings": lambda _: dict(CEILINGS),
        # 8192^3 in bf16 is minutes of work for a CPU without bf16 instructions.
        "cublas": lambda timer: timing.cublas_tflops(timer, n=64),
        **({"timer": timer} if timer else {}),
        **options,
    }
    return runner.run(cases, **options)


def row_of(case, us, read=0.5, cublas=0.5):
    return {"case": vars(case), "us_amortised": us, "read_share": read, "cublas_share": cublas}


def record_of(rows, gpu=PUBLIC_BEST_GPU):
    """As much of a record as its targets are judged by; `gpu` is a name."""
    return {"rows": rows, "gpu": None if gpu is None else {"name": gpu}}


def wrong_page(q_nope, q_pe, ckv_cache, kpe_cache, kv_indptr, kv_indices, sm_scale, **options):
    return decode_reference(q_nope, q_pe, ckv_cache, kpe_cache, kv_indptr, kv_indices.roll(1), sm_scale, **options)
