"""Which models an engine that shares tokens can run exactly: read from the config, then tried.

Sharing rests on two things: a token's hidden state depends on the tokens that its mask lets it see and on
their positions, and the model honours that mask. What breaks either is refused by name. What the config does
not tell, a trial does: a few random prompts through the engine and through the reference.
"""

from typing import TYPE_CHECKING, Any

from ballast.errors import GuardError

if TYPE_CHECKING:
    from ballast.guardrails.engines.kv_fork import KVForkEngine
    from ballast.guardrails.engines.one_pass import OnePassEngine
    from ballast.guardrails.engines.per_prefix import PerPrefixEngine

# Largest relative error of the logits in the trial. Rounding stays a decade below; a mask that is not
# honoured or a shifted position gives an error near 1.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.15, "float16": 0.05}


def check_exact(engine: "OnePassEngine | KVForkEngine", reference: "PerPrefixEngine", guard: str) -> None:
    """Refuse an engine that does not give the reference's logits on its model.

    Raises:
        GuardError: why it does not, and which engines to use instead.
    """
    model = reference.model
    problem, cause = obstacle(model, reference.context), None
    if problem is None:
        try:
            problem = _trial(engine, reference)
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, NotImplementedError) as error:
            problem, cause = f"its forward fails ({type(error).__name__}: {error})", error
    if problem is not None:
        raise GuardError(
            f"guardrail '{guard}': engine {engine.name} is not exact on a model of type '{model.config.model_type}': {problem}; "
            "set engine to per_prefix, or to vllm where it runs this model"
        ) from cause


def obstacle(model: Any, context: int) -> str | None:
    """What in a model's build forbids sharing tokens under a mask, or None.

    Args:
        model: a causal language model (transformers).
        context: tokens that it reads at most; a window that holds them all is none.
    """
    config = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        return "it is an encoder-decoder, whose prompt is no prefix of anything"
    kinds = set(getattr(config, "layer_types", None) or ())
    recurrent = sorted(kinds - {"full_attention", "sliding_attention", "chunked_attention"})
    if recurrent or getattr(model, "_is_stateful", False):
        return f"its layers carry a state from token to token ({', '.join(recurrent) or 'state-space'}), which a mask cannot fork"
    if softcap := getattr(config, "attn_logit_softcapping", None):
        return f"its attention logits are soft-capped at {softcap:g}, which only eager attention does, over a mask of the model's own making"
    if (window := _window(config, kinds)) and window < context:
        return f"its attention reaches back over a window of {window} tokens only (of {context}), which a mask of our own would widen"
    rope = _rope_types(config)
    if moving := sorted(rope & {"dynamic", "longrope"}):
        return f"its rotary frequencies ({', '.join(moving)}) depend on the longest prompt of the forward"
    attention = getattr(config, "_attn_implementation", None) or "eager"
    if attention not in ("sdpa", "eager"):
        return f"its attention is '{attention}', which takes no mask of our own (sdpa and eager do)"
    return None


def _window(config: Any, kinds: set[str]) -> int | None:
    """Tokens of the narrowest window that is in use, or None."""
    if kinds and not kinds & {"sliding_attention", "chunked_attention"}:
        return None
    if getattr(config, "use_sliding_window", True) is False:
        return None
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((window for window in windows if window), default=None)


def _rope_types(config: Any) -> set[str]:
    """Kinds of rotary embedding, of all layers or of each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in rope:
        return {rope["rope_type"]}
    return {part.get("rope_type", "default") for part in rope.values() if isinstance(part, dict)}


def _trial(engine: "OnePassEngine | KVForkEngine", reference: "PerPrefixEngine") -> str | None:
    """What is wrong with the engine's logits on random prompts that fork early, late and not at all, or None."""
    import torch

    length = min(48, reference.context)
    vocabulary = reference.model.config.get_text_config().vocab_size
    draw = torch.Generator().manual_seed(0)
    long, tail = torch.randint(vocabulary, (2, length), generator=draw).tolist()
    rows = sorted({tuple(long), *(tuple(long[:cut] + tail[cut : cut + 5]) for cut in (1, length // 3, length // 2))})
    got = {
        row: logits for part, logits_RV in engine.logits([rows]) for row, logits in zip(part, logits_RV, strict=True)
    }
    for row, logits in got.items():
        want = reference.logits([row])[0].float()
        error = ((logits.float() - want).norm() / (want - want.mean()).norm()).item()
        # A model without sound weights gives NaN either way: the self-check's business, not ours.
        if error > _TOLERANCE.get(str(reference.model.dtype).removeprefix("torch."), 1e-3):
            return f"in a trial on random prompts its logits are off by {error:.2g} of their size, so it does not honour a mask of our own"
    return None
