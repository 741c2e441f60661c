"""Entry point of vLLM's plugin group `vllm.general_plugins`: names the backend, imports nothing of it."""

from __future__ import annotations

BACKEND = "mla_cute.integrations.vllm.MlaCuteBackend"


def register() -> None:
    """Make `--attention-backend CUSTOM` mean the backend of :mod:`mla_cute.integrations.vllm`.

    vLLM calls this in every process. It succeeds on any machine: where the kernels cannot run, vLLM learns the reason
    from the backend when it is selected.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
