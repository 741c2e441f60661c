"""Entry point of SGLang's plugin group `sglang.srt.plugins`: names the backend, imports nothing of it."""

from __future__ import annotations

from typing import Any

NAME = "mla_cute"


def register() -> None:
    """Make `--attention-backend mla_cute` (and `--decode-attention-backend`) mean the backend of
    :mod:`mla_cute.integrations.sglang`.

    SGLang calls this in every process. It succeeds on any machine: `create` says why the kernels cannot run.
    """
    from sglang.srt.arg_groups import choices
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    if NAME not in choices.ATTENTION_BACKEND_CHOICES:
        choices.add_attention_backend_choices([NAME])
        choices.add_chunked_prefix_cache_attention_backend(NAME)
    register_attention_backend(NAME)(create)


def create(runner: Any) -> Any:
    """The backend of a ModelRunner.

    Raises:
        ValueError, NotImplementedError: the model or the server's options ask for what is not supported.
        RuntimeError: a CUDA device that is not Hopper.
    """
    if not runner.use_mla_backend:
        raise ValueError(f"attention backend {NAME}: expected an MLA model")
    from sglang.srt.models.deepseek_common import attention_backend_handler, utils

    from .sglang import MlaCuteAttnBackend

    # Prompts take the path they take beside SGLang's FlashMLA backend, whose parent is this one's too.
    attention_backend_handler.AttentionBackendRegistry.register(
        NAME, attention_backend_handler.handle_attention_flashmla
    )
    # Queries and keys come in two parts instead of concatenated.
    if NAME not in utils.FORWARD_ABSORB_CORE_ATTENTION_BACKENDS:
        utils.FORWARD_ABSORB_CORE_ATTENTION_BACKENDS.append(NAME)
    return MlaCuteAttnBackend(runner)
