"""What the default configuration follows from, read from a real driver."""

import pytest
import torch

from mla_cute import gpu, gpu_speed
from mla_cute.tuned import select

pytestmark = pytest.mark.gpu


def test_the_driver_says_what_nvidia_smi_says():
    facts, found = gpu.facts(), gpu.speed(torch.device("cuda", torch.cuda.current_device()))
    assert found.sm_count == facts.sm_count
    if facts.max_sm_mhz is not None:
        assert found.sm_mhz == facts.max_sm_mhz
    if facts.max_memory_mhz is not None:
        # A bus of up to six stacks of 1024 bits; an H200's driver says 6016.
        bits = found.memory_gbps * 8e3 / (2 * facts.max_memory_mhz)
        assert bits == pytest.approx(64 * round(bits / 64), abs=1)
        assert 4096 <= bits <= 6144
    if facts.name == "NVIDIA H200":
        assert found == gpu_speed.H200


def test_a_default_may_be_chosen_under_capture():
    """The first call of a server may be captured, and asks for these facts."""
    select.clear()
    select.gpu_of.cache_clear()
    device = torch.device("cuda", torch.cuda.current_device())
    word, graph = torch.zeros(1, device=device), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = select.choose("decode", "", False, 128, 64, 1, 3, 1024, device)
        word += 1
    graph.replay()
    torch.cuda.synchronize()
    assert word.item() == 1
    assert found.config == select.choose("decode", "", False, 128, 64, 1, 3, 1024, device).config
