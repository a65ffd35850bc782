"""How a verdict guard's prompts are run: one model of options an engine, chosen by `type`.

    engine: one_pass                                     the short form
    engine: {type: one_pass, max_tokens: 4096}           with settings

`docs/guard-engines.md` says which engine fits which model and machine.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt

from ballast.guardrails.engines.endpoint import EndpointOptions


class _Engine(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    cache: Path | None = Field(
        default=None,
        description="file that keeps verdicts between runs, made at first use; None keeps none. Unscored prompts are never kept",
    )


class AutoEngine(_Engine):
    """one_pass where it is exact for the model, else per_prefix; what was picked, and why, is logged at INFO."""

    type: Literal["auto"] = "auto"


class PerPrefixOptions(_Engine):
    """The reference: every prompt is run from its first token. Any causal model."""

    type: Literal["per_prefix"] = "per_prefix"


class OnePassOptions(_Engine):
    """Every distinct token of an exchange is run once, all its cuts in one forward, under a mask of its own."""

    type: Literal["one_pass"] = "one_pass"
    max_tokens: int = Field(
        default=4096,
        ge=64,
        description="tokens a forward; the mask's memory grows with its square (fp32: 64 MiB at 4096). A longer prompt is run by itself",
    )


class KVForkOptions(_Engine):
    """The longest prompt is run once into a cache, and the other prompts' own endings over it: for long responses."""

    type: Literal["kv_fork"] = "kv_fork"
    max_tokens: int = Field(
        default=1024,
        ge=64,
        description="tokens a forward over the cache; the mask's memory is this times the whole prompt's length",
    )


class VLLMEngineOptions(_Engine):
    """vLLM in this process, with prefix caching: large models on a GPU of their own, and sliding windows."""

    type: Literal["vllm"] = "vllm"
    max_model_len: PositiveInt | None = Field(
        default=None, description="longest rendered prompt plus one, in tokens; None takes the model's own limit"
    )
    gpu_memory_utilization: float = Field(
        default=0.3, gt=0, lt=1, description="share of the GPU that vLLM may take beside trainer and policy"
    )
    cpu_kv_cache_gib: PositiveInt = Field(default=1, description="size of the KV cache on a CPU, in GiB")
    enforce_eager: bool = Field(
        default=True, description="true starts in seconds; false compiles for a minute, then runs faster"
    )


class ServerOptions(_Engine, EndpointOptions):
    """OpenAI-compatible completions endpoints that take token ids, such as vLLM servers."""

    type: Literal["server"] = "server"
    model: str | None = Field(default=None, description="the model's name on the servers; None takes the guard's own")


def _from_name(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


EngineOptions = Annotated[
    Annotated[
        AutoEngine | PerPrefixOptions | OnePassOptions | KVForkOptions | VLLMEngineOptions | ServerOptions,
        Field(discriminator="type"),
    ],
    BeforeValidator(_from_name),
]
