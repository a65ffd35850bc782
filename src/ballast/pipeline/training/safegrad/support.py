"""Where SafeGrad cannot be correct, it says so before training instead of doing something else."""

from typing import Any

from ballast.errors import ConfigError


def is_sharded(model: Any) -> bool:
    """Whether the model's parameters are spread over processes."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def is_fsdp() -> bool:
    """Whether the trainer will shard its model; its accelerator knows, whichever way it was asked for."""
    from accelerate import DistributedType
    from accelerate.state import AcceleratorState

    return bool(AcceleratorState().distributed_type == DistributedType.FSDP)


def check_support(args: Any, model: Any) -> None:
    """Refuses trainers whose gradients or updates are out of a callback's reach.

    Args:
        args: `TrainingArguments`.
        model: the policy, as the trainer has prepared it.

    Raises:
        ConfigError: DeepSpeed, FSDP1, tensor, context or sequence parallelism, an optimizer that steps inside the
            backward pass, an encoder-decoder, prompt learning, or a model in which nothing is trained.
    """
    from accelerate import DistributedType
    from accelerate.state import AcceleratorState
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if AcceleratorState().distributed_type == DistributedType.DEEPSPEED:
        raise ConfigError(
            "SafeGrad with DeepSpeed: its engine holds the gradients (`.grad` is None in every ZeRO stage) and updates the weights "
            "inside backward, before any callback runs; use DDP, or FSDP2 (fsdp_version: 2)"
        )
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ConfigError(
            "SafeGrad with FSDP1: its flat parameters have no gradient of a second loss beside the task's; set fsdp_version: 2"
        )
    parallelism = getattr(args, "parallelism_config", None)
    for name in ("tp_size", "cp_size", "sp_size"):
        if (getattr(parallelism, name, 1) or 1) > 1:
            raise ConfigError(
                f"SafeGrad with {name} = {getattr(parallelism, name)}: every process gives it an alignment batch of its own, and these "
                "would share one; use DDP or FSDP2 alone"
            )
    if is_sharded(model) and not any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ConfigError(
            "SafeGrad with a model that is sharded by something else than FSDP2 (tensor parallelism, device_map): load the model "
            "without tp_plan and use DDP or FSDP2"
        )
    optim = str(getattr(args.optim, "value", args.optim))
    if "layerwise" in optim or "lomo" in optim:
        raise ConfigError(
            f"SafeGrad with optim='{optim}': it updates each layer inside backward, before a gradient could be projected; take optim='adamw_torch'"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ConfigError(
            "SafeGrad with an encoder-decoder model: it reads prompt and completion as one text; take a decoder-only model"
        )
    peft = getattr(model, "active_peft_config", None)
    if getattr(peft, "is_prompt_learning", False):
        raise ConfigError("SafeGrad with prompt learning: virtual tokens stand before the alignment rows; take a LoRA")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("SafeGrad with a model in which nothing is trained: no parameter has requires_grad")
