"""Why there is no GPU, told without initialising CUDA."""

import pytest
import torch

from mla_cute import gpu


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
