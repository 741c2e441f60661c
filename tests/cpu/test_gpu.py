"""Why there is no GPU, told without initialising CUDA, and what the default configuration follows from."""

import types

import pytest
import torch

from mla_cute import gpu, gpu_speed


@pytest.fixture
def asked(monkeypatch):
    """Answers in place of the process that asks the driver, and how often it was asked."""
    calls = []

    def answer(found):
        def visible():
            calls.append(None)
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(gpu, "visible", visible)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("that initialises the driver"))
        return calls

    return answer


def test_a_torch_without_cuda_is_told_from_a_machine_without_a_gpu(asked, monkeypatch):
    calls = asked([])
    assert gpu.why_no_gpu() == f"torch {torch.__version__} sees no CUDA GPU"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert gpu.why_no_gpu() == f"torch {torch.__version__} is built without CUDA"
    assert len(calls) == 1


@pytest.mark.parametrize("found", [[("NVIDIA H200", 132)], RuntimeError("cuInit returned CUDA error 803")])
def test_a_gpu_and_a_driver_that_does_not_answer_are_no_reason(found, asked):
    calls = asked(found)
    assert gpu.why_no_gpu() is None
    assert len(calls) == 1


def test_a_process_that_uses_cuda_asks_nobody(asked, monkeypatch):
    calls = asked([])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert gpu.why_no_gpu() is None
    assert calls == []


# ---------------------------------------------------------------------------------------------------------------------
# GpuSpeed


class Driver:
    """A libcuda of two GPUs, the second by `attributes`; a number that it lacks is an error of the driver."""

    def __init__(self, attributes):
        self._gpus = ({}, attributes)

    def cuDeviceGet(self, device, index):
        device._obj.value = 40 + index
        return 0

    def cuDeviceGetAttribute(self, value, number, device):
        value._obj.value = self._gpus[device.value - 40].get(number, 0)
        return 0 if number in self._gpus[device.value - 40] else 1


@pytest.fixture
def gpus(monkeypatch):
    """A GPU of that name, with 132 SMs and these attributes, as number 1 of two; None: no driver."""

    def make(name, attributes):
        properties = types.SimpleNamespace(name=name, multi_processor_count=132)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)

        def load(library):
            assert library == "libcuda.so.1"
            if attributes is None:
                raise OSError
            return Driver(attributes)

        monkeypatch.setattr(gpu._visible_gpus.ctypes, "CDLL", load)
        monkeypatch.setattr(gpu.subprocess, "run", lambda *command, **options: pytest.fail("that starts a process"))

    return make


H200_ATTRIBUTES = {13: 1_980_000, 36: 3_201_000, 37: 6016}


@pytest.mark.parametrize("device", ["cuda:1", "cuda"])
def test_the_speed_of_an_h200(gpus, device):
    gpus("NVIDIA H200", H200_ATTRIBUTES)
    assert gpu.speed(torch.device(device)) == gpu_speed.H200


def test_the_numbers_of_attributes_are_cudas():
    numbers = pytest.importorskip("cuda.bindings.driver").CUdevice_attribute
    asked = gpu._visible_gpus
    assert asked.CLOCK_RATE == numbers.CU_DEVICE_ATTRIBUTE_CLOCK_RATE
    assert asked.MEMORY_CLOCK_RATE == numbers.CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE
    assert asked.GLOBAL_MEMORY_BUS_WIDTH == numbers.CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH


@pytest.mark.parametrize(
    ("attributes", "memory_gbps", "sm_mhz"),
    [
        (None, None, None),
        ({}, None, None),
        ({13: 0, 36: 3_201_000, 37: 0}, None, None),
        ({13: 1_755_000, 36: 3_201_000}, None, 1755.0),
        ({36: 2_619_000, 37: 5120}, 3352.3, None),
    ],
)
def test_what_the_driver_does_not_say_is_not_known(gpus, attributes, memory_gbps, sm_mhz):
    gpus("NVIDIA H100 80GB HBM3", attributes)
    found = gpu.speed(torch.device("cuda", 1))
    assert found == gpu_speed.GpuSpeed(132, memory_gbps, sm_mhz)
    assert found.gbps_per_sm == pytest.approx((memory_gbps or 4814.3) / 132)
    assert found.clock_mhz == (sm_mhz or 1980)


@pytest.mark.parametrize(
    ("name", "share"),
    [("NVIDIA H20", 0.25), ("NVIDIA H20-3e", 0.25), ("NVIDIA H200", 1.0), ("NVIDIA H200 NVL", 1.0), ("GH200", 1.0)],
)
def test_an_h20_has_slow_tensor_cores(gpus, name, share):
    gpus(name, H200_ATTRIBUTES)
    assert gpu.speed(torch.device("cuda", 1)).tensor_share == share
