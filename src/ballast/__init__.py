"""Ballast keeps a language model upright while it learns: guardrail-driven RL alignment with TRL and vLLM.

The public names below are loaded when they are first used, so that `import ballast` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ballast.guardrails.contract import check_guardrail
    from ballast.guardrails.registry import load_guardrail
    from ballast.guardrails.types import Exchange, Guardrail, RiskTrace
    from ballast.pipeline.config import RunConfig
    from ballast.pipeline.localization.localize import localize_safety_layers
    from ballast.pipeline.monitoring.callback import SafetyMonitor
    from ballast.pipeline.restoration.lox import lox
    from ballast.pipeline.restoration.nlsr.realign import nlsr
    from ballast.pipeline.run import run
    from ballast.pipeline.training.freezing import freeze_layers
    from ballast.pipeline.training.grpo import ShapedGRPOTrainer
    from ballast.pipeline.training.probing import SafetyProbing
    from ballast.pipeline.training.safegrad.callback import SafeGrad
    from ballast.pipeline.training.sft import ShapedSFTTrainer
    from ballast.rewards.guard_reward import GuardReward

__version__ = "0.1.0.dev0"

__all__ = [
    "Exchange",
    "GuardReward",
    "Guardrail",
    "RiskTrace",
    "RunConfig",
    "SafeGrad",
    "SafetyMonitor",
    "SafetyProbing",
    "ShapedGRPOTrainer",
    "ShapedSFTTrainer",
    "check_guardrail",
    "freeze_layers",
    "load_guardrail",
    "localize_safety_layers",
    "lox",
    "nlsr",
    "run",
]

_HOMES = {
    "Exchange": "ballast.guardrails.types",
    "GuardReward": "ballast.rewards.guard_reward",
    "Guardrail": "ballast.guardrails.types",
    "RiskTrace": "ballast.guardrails.types",
    "RunConfig": "ballast.pipeline.config",
    "SafeGrad": "ballast.pipeline.training.safegrad.callback",
    "SafetyMonitor": "ballast.pipeline.monitoring.callback",
    "SafetyProbing": "ballast.pipeline.training.probing",
    "ShapedGRPOTrainer": "ballast.pipeline.training.grpo",
    "ShapedSFTTrainer": "ballast.pipeline.training.sft",
    "check_guardrail": "ballast.guardrails.contract",
    "freeze_layers": "ballast.pipeline.training.freezing",
    "load_guardrail": "ballast.guardrails.registry",
    "localize_safety_layers": "ballast.pipeline.localization.localize",
    "lox": "ballast.pipeline.restoration.lox",
    "nlsr": "ballast.pipeline.restoration.nlsr.realign",
    "run": "ballast.pipeline.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ballast' has no attribute '{name}'; its public names are {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
