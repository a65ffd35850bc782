"""The policy's current weights, as the rollout engine takes them.

The one module that touches TRL's `VLLMGeneration` (read in TRL 1.16). TRL merges the adapter into the base
weights before every sync and takes it out again afterwards; in bfloat16 each round loses bits of the base,
and an exception in between leaves it merged. Here the base is never written to: every tensor that goes to
the engine is a fresh `W + scale * B A`, summed in fp32 and cast once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import trl.trainer.grpo_trainer as grpo_module
from torch import nn
from trl.generation.vllm_generation import VLLMGeneration

from ballast.errors import EngineError
from ballast.pipeline.vllm_engine import VLLMEngine


def iterate_policy_weights(model: nn.Module, adapter: str = "default") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every weight of the policy with its adapter applied, under the plain architecture's names.

    Args:
        model: a transformers model, or a PEFT model around one whose only trained parts are LoRA matrices and
            `modules_to_save`.
        adapter: name of the adapter to apply.

    Yields:
        Name and tensor; each tensor owns its memory, and the model's own tensors are not changed.

    Raises:
        EngineError: an adapter that is not linear LoRA, or one that is already merged into its base.
    """
    deltas = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    wrapped = hasattr(model, "peft_config")
    for name, parameter in model.named_parameters():
        if any(part in name for part in (".lora_", "original_module", ".lora_magnitude_vector")):
            continue
        module_name, _, leaf = name.rpartition(".")
        layer = deltas.get(module_name.removesuffix(".base_layer"))
        tensor = parameter.detach()
        tensor = (
            _with_adapter(layer, tensor, adapter, name) if layer is not None and leaf == "weight" else tensor.clone()
        )
        if wrapped:
            name = (
                name.removeprefix("base_model.model.")
                .replace(".base_layer", "")
                .replace(f".modules_to_save.{adapter}", "")
            )
        yield name, tensor


def _with_adapter(layer: Any, weight: torch.Tensor, adapter: str, name: str) -> torch.Tensor:
    if layer.merged:
        raise EngineError(
            f"'{name}': an adapter is already merged into this weight, so it would count twice; call unmerge_adapter() first"
        )
    if adapter not in layer.lora_A:
        return weight.clone()
    if getattr(layer, "use_dora", {}).get(adapter) or not isinstance(layer.lora_A[adapter], nn.Linear):
        raise EngineError(
            f"'{name}': only plain LoRA on linear layers can be synced to vLLM; set use_dora=False and adapt linear modules"
        )
    a, b = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
    delta = (b.float() @ a.float()) * layer.scaling[adapter]
    if getattr(layer, "fan_in_fan_out", False):
        delta = delta.T
    return (weight.float() + delta).to(weight.dtype)


class BallastVLLMGeneration(VLLMGeneration):
    """TRL's colocated generation on an engine that the whole run shares, with a sync that keeps the base intact."""

    engine: VLLMEngine  # set by `shared_engine` before TRL constructs this class

    def _init_vllm(self) -> None:
        self.llm = self.engine.llm
        self._llm_weights_sleeping = False
        self.accelerator.wait_for_everyone()

    def sync_weights(self) -> None:
        """Send the policy's current weights to the engine and drop its cached prefixes."""
        self.engine.load_weights(iterate_policy_weights(self.accelerator.unwrap_model(self.model)))


@contextmanager
def shared_engine(engine: VLLMEngine) -> Iterator[None]:
    """While a `GRPOTrainer` is constructed in this block, it generates with `engine`.

    TRL names its generation class in its module and offers no argument for another one.
    """
    original = grpo_module.VLLMGeneration
    grpo_module.VLLMGeneration = type("SharedVLLMGeneration", (BallastVLLMGeneration,), {"engine": engine})
    try:
        yield
    finally:
        grpo_module.VLLMGeneration = original
