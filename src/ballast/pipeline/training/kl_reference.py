"""How far the policy has moved from its reference, token by token. Read against TRL 1.16.

Calls TRL's `_get_per_token_logps_and_entropies`; a contract test fails when upstream changes it.
"""

from typing import Any

import torch
from trl.models.utils import disable_gradient_checkpointing

from ballast.errors import ConfigError


def check_reference(model: Any) -> None:
    """The reference is the policy with its adapter off: that needs an adapter, and one that begins at zero.

    Args:
        model: what the trainer was given, before it put an adapter on it.

    Raises:
        ConfigError: the model brings a trained adapter, without which it is not what this run starts from.
    """
    if hasattr(model, "peft_config"):
        raise ConfigError(
            "shaping.kl.weight > 0 with a model that already has an adapter: with the adapter off it is not the model that "
            "this run starts from; merge the adapter first and give peft_config for a new one"
        )


def log_ratio_to_reference(trainer: Any, output: dict[str, Any], batch_size: int) -> torch.Tensor:
    """(N, T) log pi_old(y_t) - log pi_ref(y_t) of the sampled tokens, on the CPU, without a gradient.

    Costs a forward with the adapter off, and one with it on where TRL has not computed it already.

    Args:
        trainer: a `GRPOTrainer` with an adapter.
        output: what its `_generate_and_score_completions` returns.
        batch_size: completions per forward.

    Raises:
        ConfigError: the trainer's model has no adapter.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not hasattr(model, "disable_adapter"):
        raise ConfigError("shaping.kl.weight > 0 trains against the model with its adapter off; give peft_config")
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    attention = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)

    def log_probs() -> torch.Tensor:
        width = output["completion_ids"].size(1)
        scores: torch.Tensor = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, attention, width, batch_size=batch_size
        )[0]
        return scores

    with torch.no_grad(), disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs):
        old_NT = output.get("old_per_token_logps")
        if old_NT is None:
            old_NT = log_probs()
        with model.disable_adapter():
            reference_NT = log_probs()
    return (old_NT - reference_NT).float().cpu()
