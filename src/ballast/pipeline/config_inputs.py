"""What a run starts from, in its configuration: the model, the prompts, and how text is sampled."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from ballast.pipeline.config_base import Component, Names
from ballast.pipeline.evaluation.suites import Kind
from ballast.pipeline.prompting import check_policy
from ballast.pipeline.template_contract import Policy


class ModelConfig(Component):
    """The policy, as it is before this run."""

    name: str = Field(description="`embedded:smollm2-135m`, a local model folder, or a hub id")
    revision: str | None = Field(None, description="commit or tag of a hub id; None takes its default branch")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="precision of the weights in training")


class PromptingConfig(Component):
    """The prompt that surrounds every request: docs/template-contract.md."""

    system_prompt: str | None = Field(
        None,
        description="system message of every conversation in training; None leaves it to the chat template's own default",
    )
    policy: Policy = Field(
        "consistent",
        description="consistent measures and serves with system_prompt; ptst with serving_system_prompt, without which it trains",
    )
    serving_system_prompt: str | None = Field(
        None, description="system message of measured and served conversations where policy is ptst"
    )

    @model_validator(mode="after")
    def _prompts_fit_the_policy(self) -> Self:
        check_policy(self.policy, self.system_prompt, self.serving_system_prompt)
        return self


class DataConfig(Component):
    """Prompts to train and to measure on. Train and test must not share a prompt.

    A source is `shipped` (or `shipped:harmful`, `shipped:ordinary,scary`), a json, jsonl, csv or parquet file, a hub
    id with `:split` behind it, or a published set, which knows its columns and kinds: `advbench` from the hub,
    `xstest:rows.csv` from a file. docs/evaluation.md has the names.
    """

    train: Names = Field(("shipped",), min_length=1, description="sources of training prompts")
    test: Names = Field(("shipped",), min_length=1, description="sources of the held-out prompts")
    prompt_column: str = Field("prompt", description="column of the request, in files and hub data sets")
    response_column: str = Field("response", description="column of the answer to imitate, read by `align` alone")
    kind_column: str = Field("kind", description="column that says harmful, scary or ordinary")
    kind: Kind | None = Field(None, description="kind of the rows of a source that has no kind column")
    max_train: PositiveInt | None = Field(
        None, description="keep at most this many training prompts, drawn by the seed"
    )
    max_train_per_kind: PositiveInt | None = Field(
        None,
        description="keep at most this many training prompts of each kind, so that a large source of one kind does not drown the others",
    )
    max_test: PositiveInt | None = Field(
        None, description="keep at most this many test prompts, the same ones for every seed"
    )


class SamplingConfig(Component):
    """How completions are sampled."""

    max_new_tokens: PositiveInt = Field(64, description="tokens after which an answer is cut off")
    temperature: NonNegativeFloat = Field(1.0, description="0 is greedy decoding")


class VLLMGeneration(Component):
    """Generation by vLLM inside this process, on a GPU or on the CPU."""

    type: Literal["vllm"] = "vllm"
    max_model_len: PositiveInt = Field(1024, description="longest prompt plus completion, in tokens")
    enforce_eager: bool = Field(
        True, description="true starts in seconds; false compiles for a minute, then runs faster"
    )
    gpu_memory_utilization: float = Field(
        0.3, gt=0, lt=1, description="share of the GPU that vLLM may take beside the trainer"
    )
    cpu_kv_cache_gib: PositiveInt = Field(1, description="size of the KV cache on a CPU, in GiB")
    max_num_seqs: PositiveInt = Field(64, description="completions that are written at the same time")


class TransformersGeneration(Component):
    """Generation by transformers: slower, for models that vLLM lacks and for exact resume on a CPU."""

    type: Literal["transformers"] = "transformers"
    batch_size: PositiveInt = Field(16, description="completions that are written at the same time")


GenerationConfig = Annotated[VLLMGeneration | TransformersGeneration, Field(discriminator="type")]
