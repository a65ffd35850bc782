"""From an adapter to an ordinary model folder: weights merged in fp32 and cast once, with a record of both."""

from pathlib import Path
from typing import Any

import torch

from ballast.errors import ModelError
from ballast.pipeline.model_record import write_record
from ballast.pipeline.prompting import PromptFormat
from ballast.pipeline.training.weight_sync import iterate_policy_weights


def save_merged(model: Any, tokenizer: Any, prompt_format: PromptFormat, folder: Path) -> None:
    """Write the policy with its adapter applied as a plain model folder; the live model is not changed.

    The folder holds safetensors, config, generation config, tokenizer, and the record that
    `model_record.check_record` reads.

    Raises:
        ModelError: the merged weights are not those of the base's architecture.
        EngineError: the adapter is not plain LoRA (see `iterate_policy_weights`).
    """
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    weights = {name: tensor.to("cpu", base.dtype) for name, tensor in iterate_policy_weights(model)}
    if base.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    # On the meta device nothing is allocated or initialised: the weights below become the parameters themselves.
    with torch.device("meta"):
        plain = type(base)(base.config)
    try:
        missing, unexpected = plain.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:  # a shape that does not fit
        raise _misfit(base, str(error).strip().splitlines()[-1].strip()) from error
    lost = set(missing) - set(getattr(plain, "_tied_weights_keys", None) or ())
    if base.config.tie_word_embeddings:
        lost.discard("lm_head.weight")
    if lost or unexpected:
        raise _misfit(base, f"missing {sorted(lost)}, unexpected {sorted(unexpected)}")
    plain.tie_weights()
    plain.generation_config = base.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_record(folder, prompt_format)


def _misfit(base: Any, what: str) -> ModelError:
    return ModelError(
        f"the merged weights do not fit {type(base).__name__} ({what}); the adapter must only add LoRA matrices to layers of the "
        "base: check lora.target_modules"
    )
