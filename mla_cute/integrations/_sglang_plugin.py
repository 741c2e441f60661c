"""Entry point of SGLang's plugin group `sglang.srt.plugins`: names the backend, imports nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

NAME = "mla_cute"
PAGE_SIZE = 64


def register() -> None:
    """Make `--attention-backend mla_cute` (and `--prefill-`, `--decode-` and `--speculative-draft-attention-backend`)
    mean the backend of :mod:`mla_cute.integrations.sglang`.

    SGLang calls this in every process. It succeeds on any machine: `create` says why the kernels cannot run.
    """
    from sglang.srt.arg_groups import choices, resolution_hooks
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if NAME not in choices.ATTENTION_BACKEND_CHOICES:
        choices.add_attention_backend_choices([NAME])
        choices.add_draft_attention_backend_choices([NAME])
        choices.add_chunked_prefix_cache_attention_backend(NAME)
        choices.add_deterministic_attention_backend_choices([NAME])
        choices.add_radix_supported_deterministic_attention_backend_choices([NAME])
        resolution_hooks.register_resolution_hook("handle_attention_backend_compatibility")(prefer_page_size)
        HookRegistry.register(
            "sglang.srt.speculative.draft_utils.DraftBackendFactory._create_backend", create_draft, HookType.AROUND
        )
    register_attention_backend(NAME)(create)


def prefer_page_size(server_args: Any, previous: Callable[[Any], None]) -> None:
    """A step of SGLang's resolution of its options: pages of 64 tokens where nobody said what size, instead of 1."""
    from sglang.srt.arg_groups.overrides import attention_backends_of, declare_resolution, resolved_view

    previous(server_args)
    view = resolved_view(server_args)
    if view.page_size is None and NAME in attention_backends_of(view):
        declare_resolution(server_args, NAME, page_size=PAGE_SIZE)


def create(runner: Any) -> Any:
    """The backend of a ModelRunner.

    Raises:
        ValueError, NotImplementedError: the model or the server's options ask for what is not supported.
        RuntimeError: a CUDA device that is not Hopper.
    """
    return _backend_module(runner).MlaCuteAttnBackend(runner)


def create_draft(
    create_backend: Callable[..., Any],
    factory: Any,
    backend_name: str,
    backend_map: dict[str, Any],
    error_template: str,
    stamps_children: bool = False,
) -> Any:
    """Stands around `DraftBackendFactory._create_backend`, which looks its choice up in a table: adds this backend.

    Args:
        stamps_children: the table is for the steps of a draft, whose backends get the name too.
    """
    runner = factory.draft_model_runner

    def steps() -> tuple[str, Any]:
        module = _backend_module(runner)
        return NAME, module.MlaCuteMultiStepDraftBackend(runner, factory.topk, factory.speculative_num_steps)

    def extension() -> tuple[str, Any]:
        backend = create(runner)
        _capture_extensions_of(type(backend))
        return NAME, backend

    backends = backend_map | {NAME: steps if stamps_children else extension}
    return create_backend(factory, backend_name, backends, error_template, stamps_children)


def _capture_extensions_of(backend_class: Any) -> None:
    """Let SGLang capture the extension of drafts, which it does of instances of the classes that it lists. FlashMLA's
    is one of them and has no other meaning to it, so that this one may count as such."""
    try:
        from sglang.srt.layers.attention.flashmla_backend import FlashMLABackend
    except ImportError:  # SGLang will say so itself
        return
    FlashMLABackend.register(backend_class)


def _backend_module(runner: Any) -> Any:
    if not runner.use_mla_backend:
        raise ValueError(f"attention backend {NAME}: expected an MLA model")
    from sglang.srt.models.deepseek_common import attention_backend_handler, utils

    from . import sglang

    attention_backend_handler.AttentionBackendRegistry.register(NAME, choose_form)
    # Queries and keys come in two parts instead of concatenated.
    if NAME not in utils.FORWARD_ABSORB_CORE_ATTENTION_BACKENDS:
        utils.FORWARD_ABSORB_CORE_ATTENTION_BACKENDS.append(NAME)
    return sglang


def choose_form(layer: Any, forward_batch: Any) -> Any:
    """In which form a DeepSeek layer attends: SGLang asks the attention backend's handler in every layer."""
    from sglang.srt.models.deepseek_common.attention_forward_methods import forward_methods, forward_mha

    method = forward_methods.AttnForwardMethod
    if not forward_mha.resolve_attn_backend(forward_batch).expands(forward_batch):
        return method.MLA
    tokens = sum(forward_batch.extend_prefix_lens_cpu) + sum(forward_batch.extend_seq_lens_cpu)
    return method.MHA_ONE_SHOT if tokens <= forward_batch.get_max_chunk_capacity() else method.MHA_CHUNKED_KV
