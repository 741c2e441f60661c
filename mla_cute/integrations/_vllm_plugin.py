"""Entry point of vLLM's plugin group `vllm.general_plugins`: names the backends, imports nothing of them."""

from __future__ import annotations

from typing import Any

# An attribute of this module, looked up when a layer asks for its backend: `__getattr__`.
BACKEND = "mla_cute.integrations._vllm_plugin.BackendOfModel"


def register() -> None:
    """Make `--attention-backend CUSTOM` mean the backend of :mod:`mla_cute.integrations.vllm`, and for models of sparse
    attention that of :mod:`mla_cute.integrations.vllm_sparse`.

    One name for both, because a name of this library's own would be a member that vLLM adds to an enum: a configuration
    that has it cannot be unpickled in a spawned process, which loads its plugins later.

    vLLM calls this in every process. It succeeds on any machine: where the kernels cannot run, vLLM learns the reason
    from the backend when it is selected.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)


def __getattr__(name: str) -> Any:
    if name != "BackendOfModel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    model = None if config is None else config.model_config
    if model is not None and hasattr(model.hf_text_config, "index_topk"):
        from .vllm_sparse import MlaCuteSparseBackend

        return MlaCuteSparseBackend
    from .vllm import MlaCuteBackend

    return MlaCuteBackend
