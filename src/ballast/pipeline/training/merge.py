"""From an adapter to an ordinary model folder: weights merged in fp32 and cast once, with their prompt format."""

import json
from pathlib import Path
from typing import Any

from ballast.pipeline.prompting import PromptFormat
from ballast.pipeline.training.weight_sync import iterate_policy_weights


def save_merged(model: Any, tokenizer: Any, prompt_format: PromptFormat, folder: Path) -> None:
    """Write the policy with its adapter applied as a plain model folder; the live model is not changed.

    The folder holds safetensors, config, generation config, tokenizer, and `prompt_format.json` with the
    fingerprint of the format that the model was trained under.
    """
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    weights = {name: tensor.cpu() for name, tensor in iterate_policy_weights(model)}
    if base.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    plain = type(base)(base.config).to(base.dtype)
    missing, unexpected = plain.load_state_dict(weights, strict=False)
    tied = set(getattr(plain, "_tied_weights_keys", None) or ())
    if unexpected or set(missing) - tied - {"lm_head.weight"}:
        raise RuntimeError(
            f"merged weights do not fit {type(base).__name__}: missing {missing}, unexpected {unexpected}"
        )
    plain.tie_weights()
    plain.generation_config = base.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {"fingerprint": prompt_format.fingerprint(), "system_prompt": prompt_format.system_prompt}
    (folder / "prompt_format.json").write_text(json.dumps(record, indent=2))
