"""From options to an engine: loads the model, refuses an engine that would not be exact on it, picks for `auto`."""

import logging
from typing import Any

from ballast.errors import GuardError, ModelError
from ballast.guardrails.engines.interface import Labels, VerdictEngine
from ballast.guardrails.engines.options import (
    AutoEngine,
    EngineOptions,
    KVForkOptions,
    OnePassOptions,
    PerPrefixOptions,
    ServerOptions,
    VLLMEngineOptions,
)
from ballast.models import resolve_model

_log = logging.getLogger(__name__)


def build_engine(
    options: EngineOptions,
    *,
    model: str,
    revision: str | None,
    labels: Labels,
    dtype: str,
    device: str,
    batch_size: int,
    guard: str,
) -> VerdictEngine:
    """The engine that `options` name, ready to score.

    Args:
        options: which engine, and its settings.
        model: `embedded:smollm2-135m`, a local folder or a hub id.
        revision: commit or tag of a hub id; None takes its default branch.
        labels: token ids that begin a verdict.
        dtype: `bfloat16`, `float16` or `float32`.
        device: `auto` takes cuda where there is one; a server and vLLM see to that themselves.
        batch_size: prompts a forward, where an engine runs prompts side by side.
        guard: the guard's name, for messages.

    Raises:
        GuardError: the engine would not be exact on this model; the message names one that is.
        ModelError: the model cannot be loaded.
    """
    engine = _build(options, model, revision, labels, dtype, device, batch_size, guard)
    if options.cache is None:
        return engine
    from ballast.guardrails.engines.cache import CachedEngine, weights_identity

    served = (
        (*sorted(options.addresses), options.model or model)
        if isinstance(options, ServerOptions)
        else weights_identity(model, revision)
    )
    return CachedEngine(engine, options.cache, (*served, dtype, labels.safe, labels.unsafe), guard=guard)


def _build(
    options: EngineOptions,
    model: str,
    revision: str | None,
    labels: Labels,
    dtype: str,
    device: str,
    batch_size: int,
    guard: str,
) -> VerdictEngine:
    if isinstance(options, ServerOptions):
        from ballast.guardrails.engines.server import ServerEngine

        return ServerEngine(options, labels, guard=guard, model=model)
    if isinstance(options, VLLMEngineOptions):
        from ballast.guardrails.engines.vllm import VLLMVerdictEngine

        return VLLMVerdictEngine(model, options, labels, dtype, revision)
    loaded, context = load_causal(model, revision, dtype=dtype, device=device, guard=guard)
    return local_engine(options, loaded, labels, batch_size=batch_size, context=context, guard=guard)


def local_engine(
    options: AutoEngine | PerPrefixOptions | OnePassOptions | KVForkOptions,
    model: Any,
    labels: Labels,
    *,
    batch_size: int,
    context: int,
    guard: str,
) -> VerdictEngine:
    """The engine that `options` name, over a causal model that is loaded already; see `build_engine`.

    Args:
        context: tokens that the model can read.

    Raises:
        GuardError: the engine would not be exact on this model.
    """
    from ballast.guardrails.engines.exactness import check_exact
    from ballast.guardrails.engines.kv_fork import KVForkEngine
    from ballast.guardrails.engines.one_pass import OnePassEngine
    from ballast.guardrails.engines.per_prefix import PerPrefixEngine

    reference = PerPrefixEngine(model, labels, batch_size, context)
    engine: OnePassEngine | KVForkEngine
    match options:
        case PerPrefixOptions():
            return reference
        case KVForkOptions():
            engine = KVForkEngine(reference, options.max_tokens)
        case OnePassOptions():
            engine = OnePassEngine(reference, options.max_tokens)
        case AutoEngine():
            engine = OnePassEngine(reference, OnePassOptions().max_tokens)
    try:
        check_exact(engine, reference, guard)
    except GuardError as error:
        if not isinstance(options, AutoEngine):
            raise
        _log.info("%s: engine per_prefix on %s, since one_pass is refused (%s)", guard, model.device, error)
        return reference
    if isinstance(options, AutoEngine):
        _log.info("%s: engine one_pass on %s, checked against per_prefix", guard, model.device)
    return engine


def load_causal(name: str, revision: str | None, *, dtype: str, device: str, guard: str) -> tuple[Any, int]:
    """A frozen causal language model in evaluation mode, and the tokens that it can read.

    Args:
        name: `embedded:smollm2-135m`, a local folder or a hub id.
        revision: commit or tag of a hub id; None takes its default branch.
        dtype: `bfloat16`, `float16` or `float32`.
        device: where it goes; `auto` takes cuda where there is one.
        guard: the guard's name, for messages.

    Raises:
        ModelError: it cannot be found or loaded.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = resolve_model(name, revision)
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        config = AutoConfig.from_pretrained(source)
        # Gemma 2's soft-capping: sdpa, the default, leaves it out without a word.
        capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            attn_implementation="eager" if capped else None,
        )
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
        context = context or AutoTokenizer.from_pretrained(source).model_max_length
    except (OSError, ValueError) as error:
        raise ModelError(
            f"guardrail '{guard}': model '{name}' could not be loaded ({error}); check its name, folder or access"
        ) from error
    return model.to(place).eval().requires_grad_(False), int(context)
