"""CudaTimer against a simulated GPU: whether samples hold kernel time only, and how captures end."""

import contextlib
import functools
import types

import pytest
import torch

from mla_cute.bench import timing


class FakeCuda:
    """torch.cuda as CudaTimer uses it, with a clock of the host and one of the stream."""

    def __init__(self, host_us=10.0, kernel_us=25.0):
        self.host_us, self.kernel_us = host_us, kernel_us
        self.host = self.stream = 0.0  # us: now on the host; when the stream will be idle
        self.begun, self.ended, self.spins = 0, 0, []

    def enqueue(self, us):
        self.host += self.host_us
        self.stream = max(self.stream, self.host) + us

    def _sleep(self, cycles):
        self.spins.append(cycles)
        self.enqueue(cycles / 2000)

    def synchronize(self, device=None):
        self.host = max(self.host, self.stream)

    def stream_context(self, stream):
        return contextlib.nullcontext()

    def namespace(self):
        cuda = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                cuda.enqueue(0)
                self.at = cuda.stream

            def query(self):
                return cuda.host >= self.at

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e-3

        class CUDAGraph:
            def capture_begin(self, capture_error_mode):
                cuda.begun += 1

            def capture_end(self):
                cuda.ended += 1
                if cuda.ended == 1:
                    raise RuntimeError("the capture was invalidated")

            def replay(self):
                cuda.enqueue(cuda.kernel_us)

        return types.SimpleNamespace(
            Event=Event,
            CUDAGraph=CUDAGraph,
            Stream=lambda device: None,
            stream=self.stream_context,
            synchronize=self.synchronize,
            _sleep=self._sleep,
        )


@pytest.fixture
def fake_cuda(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr(timing.torch, "cuda", cuda.namespace())
    return cuda


def test_samples_hold_kernel_time_and_no_host_time(fake_cuda):
    # The host takes 30 us per sample, more than the kernel: without the spin every sample would hold 10 us of it.
    timer = timing.CudaTimer(torch.device("cpu"))
    samples = timer.samples([lambda: fake_cuda.enqueue(25.0)], 1e-3)
    assert len(samples) == 40
    assert samples == pytest.approx([25.0] * 40)
    assert set(fake_cuda.spins) == {2_000_000}


def test_the_spin_grows_until_the_host_is_ahead(fake_cuda):
    fake_cuda.host_us = 60.0
    timer = timing.CudaTimer(torch.device("cpu"))
    samples = timer.samples([lambda: fake_cuda.enqueue(5.0)], 1.0)
    assert samples == pytest.approx([5.0] * timer.max_samples)
    assert max(fake_cuda.spins) == 16_000_000  # 32 * 3 * 60 us = 5.8 ms, rounded up to a power of two of 1 ms


def test_samples_cycle_through_the_slots(fake_cuda):
    seen = []
    timer = timing.CudaTimer(torch.device("cpu"))

    def replay(slot):
        seen.append(slot)
        fake_cuda.enqueue(50.0)

    timer.samples([functools.partial(replay, slot) for slot in range(7)], 0, at_least=40)
    assert seen[:7] == list(range(7))
    assert [slot - seen[7] for slot in seen[7:]] == [i % 7 for i in range(48)]


def test_a_failing_capture_ends_and_raises_its_own_error(fake_cuda):
    timer = timing.CudaTimer(torch.device("cpu"))
    with pytest.raises(ZeroDivisionError):
        timer.capture(lambda: 1 / 0)
    assert (fake_cuda.begun, fake_cuda.ended) == (1, 1)
    timer.capture(lambda: None)()
    assert (fake_cuda.begun, fake_cuda.ended) == (2, 2)
