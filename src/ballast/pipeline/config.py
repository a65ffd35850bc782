"""The configuration of a run: one frozen pydantic model a component, unknown keys refused.

Parsing needs neither torch nor vLLM, so a mistake is answered in under a second. A key's default is the
vetted setting; a required key has none. `config_loading` reads YAML files and dotted overrides into these.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from ballast.guardrails.calibrated import CalibratedOptions
from ballast.guardrails.families.classifier import ClassifierOptions
from ballast.guardrails.families.ensemble import EnsembleOptions
from ballast.guardrails.families.granite import GraniteGuardianOptions
from ballast.guardrails.families.llama_guard import LlamaGuardOptions
from ballast.guardrails.families.moderation import ModerationOptions
from ballast.guardrails.families.prompted import PromptedOptions
from ballast.guardrails.families.qwen3guard import Qwen3GuardOptions
from ballast.guardrails.families.shieldgemma import ShieldGemmaOptions
from ballast.guardrails.families.verdict import VerdictOptions
from ballast.guardrails.heads.embedded import EmbeddedOptions
from ballast.guardrails.heads.qwen3guard_stream import Qwen3GuardStreamOptions
from ballast.guardrails.ngram import NgramOptions
from ballast.guardrails.registry import PluginOptions
from ballast.guardrails.rules import RulesOptions
from ballast.guardrails.segments import SegmentOptions
from ballast.pipeline.config_base import Component, LoraConfig, Names
from ballast.pipeline.config_monitor import MonitorConfig
from ballast.pipeline.config_probing import ProbingConfig
from ballast.pipeline.config_regularization import RegularizationConfig, check_method
from ballast.pipeline.config_rewards import GuardRefusal, KeywordRefusal, RefusalConfig, TaskRewardConfig, check_names
from ballast.pipeline.config_safe_updates import SafeGradConfig
from ballast.pipeline.config_safety_layers import FreezeConfig, LocalizeConfig
from ballast.pipeline.config_sft import SFTConfig
from ballast.pipeline.config_shaping import KL_TWICE, ShapingConfig, refuse_wrong_options
from ballast.pipeline.evaluation.suites import Kind

GuardOptions = Annotated[
    CalibratedOptions
    | ClassifierOptions
    | EmbeddedOptions
    | EnsembleOptions
    | GraniteGuardianOptions
    | LlamaGuardOptions
    | ModerationOptions
    | NgramOptions
    | PluginOptions
    | PromptedOptions
    | Qwen3GuardOptions
    | Qwen3GuardStreamOptions
    | RulesOptions
    | ShieldGemmaOptions,
    Field(discriminator="type"),
]


# What tells two guards of one type apart, by type; `guard_identity` reads it.
_DECIDES: dict[str, str] = {
    "classifier": "model",
    "granite_guardian": "model",
    "llama_guard": "model",
    "plugin": "name",
    "prompted": "model",
    "qwen3guard": "model",
    "qwen3guard_stream": "model",
    "rules": "patterns",
    "shieldgemma": "model",
}


def guard_identity(options: BaseModel) -> tuple[object, ...]:
    """What makes two guards the same one: not batch sizes, precision or templates, but what decides.

    Of a guard on a model that model, whatever its family, of a moderation endpoint its address and model, of a
    plug-in its name, of rules their patterns; of the others the type.
    """
    match options:
        case VerdictOptions() | ClassifierOptions() | Qwen3GuardStreamOptions():
            return "model", options.model
        case ModerationOptions():
            return options.type, options.base_url.rstrip("/"), options.model
        case PluginOptions():
            return options.type, options.name
        case RulesOptions():
            return options.type, frozenset(rule.pattern for rule in options.patterns)
        case _:
            return (getattr(options, "type", None),)


def deciding_guards(options: BaseModel) -> dict[tuple[object, ...], str]:
    """Every guard that has a say, by identity, with its type: looks into ensembles and through calibrations."""
    match options:
        case EnsembleOptions():
            return {key: kind for member in options.members for key, kind in deciding_guards(member).items()}
        case CalibratedOptions():
            return deciding_guards(options.guard)
        case _:
            return {guard_identity(options): str(getattr(options, "type", ""))}


class ModelConfig(Component):
    """The policy, as it is before this run."""

    name: str = Field(description="`embedded:smollm2-135m`, a local model folder, or a hub id")
    revision: str | None = Field(None, description="commit or tag of a hub id; None takes its default branch")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="precision of the weights in training")


class PromptingConfig(Component):
    """The prompt that surrounds every request, the same in training, evaluation and serving."""

    system_prompt: str | None = Field(
        None, description="system message of every conversation; None leaves it to the chat template's own default"
    )


class DataConfig(Component):
    """Prompts to train and to measure on. Train and test must not share a prompt.

    A source is `shipped` (or `shipped:harmful`, `shipped:ordinary,scary`), a json, jsonl, csv or parquet file, or
    a hub id with `:split` behind it.
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


class AlignConfig(Component):
    """A warm start before GRPO: LoRA SFT on answers, merged into a model folder of its own.

    Every reference and every later adapter starts at that folder.
    """

    enabled: bool = Field(True, description="false goes straight to GRPO from the start model")
    data: Names = Field(("shipped",), min_length=1, description="sources of prompts with answers")
    epochs: PositiveFloat = Field(1.0, description="passes over the rows; a fraction is allowed")
    max_rows: PositiveInt | None = Field(None, description="use at most this many rows, drawn by the seed")
    harmful_share: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="at most this share of the rows are harmful prompts, drawn by the seed, so that declining does not "
        "become a habit; null keeps them all",
    )
    rehearse: bool = Field(
        False,
        description="on prompts that are not harmful, imitate what the start model itself answers instead of the answer "
        "in the data, so that refusals change and little else; a refusal of its own is never imitated",
    )
    sampling: SamplingConfig = Field(SamplingConfig(), description="how the answers to rehearse are sampled")
    learning_rate: PositiveFloat = Field(2e-4, description="peak learning rate, linear decay")
    batch_size: PositiveInt = Field(8, description="rows per optimizer step")
    max_length: PositiveInt = Field(256, description="tokens of prompt and answer; longer rows are cut")
    opening_tokens: PositiveInt | None = Field(
        None,
        description="imitate at most this many tokens of an answer, from its start: where it declines or does not; "
        "null imitates all of it",
    )
    lora: LoraConfig = LoraConfig()


class RewardConfig(Component):
    """Weights of the terms that are normalised, each on its own, and then added."""

    star: NonNegativeFloat = Field(1.0, description="lowest cleaned STAR of an answer to a harmful prompt")
    refusal: NonNegativeFloat = Field(1.0, description="decline harmful requests, answer the others")
    refusal_baseline: Literal["group", "batch"] = Field(
        "group",
        description="what the refusal term is compared with: the prompt's own group, or all completions of the step, "
        "which also presses on a group that refuses or answers as a whole",
    )
    over_refusal: PositiveFloat = Field(
        1.0,
        description="with refusal_baseline=batch: how many answered harmful prompts a refused harmless one weighs as much as",
    )
    refusal_opening: PositiveInt | None = Field(
        None,
        description="segments from the start of an answer that the refusal term is charged to, since there an answer "
        "declines or does not; null charges the whole answer",
    )
    refusal_by: RefusalConfig = Field(KeywordRefusal(), description="what says of an answer whether it declines")
    coherence: NonNegativeFloat = Field(0.5, description="fluent text of some length, on every prompt")
    task: tuple[TaskRewardConfig, ...] = Field((), description="rewards of a task: right answers, formats, functions")
    std_floor: PositiveFloat = Field(0.1, description="smallest spread of a group that a reward is divided by")
    star_std_floor: PositiveFloat = Field(
        0.1, description="the same for the star term, whose scores lie closer together; 0.05 is sharper, and noisier"
    )

    @model_validator(mode="after")
    def _refusing_everything_must_not_win(self) -> Self:
        if self.star > 0 and self.refusal == 0:
            raise ValueError(
                "rewards.refusal = 0 with rewards.star > 0 lets a policy win by refusing everything; "
                "set rewards.refusal above 0, or rewards.star to 0"
            )
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        check_names(self.task)
        return self


class TrainConfig(Component):
    """GRPO by TRL with shaped advantages and a LoRA.

    Where `method` is sft, the section `sft` takes its place, and of this one only `max_unscored_share`, `report_to` and
    `checkpoint_every` count.
    """

    method: Literal["grpo", "sft"] = Field(
        "grpo", description="grpo learns from its own completions, sft imitates answers as the section sft says"
    )
    steps: PositiveInt = Field(30, description="optimizer steps")
    prompts_per_step: PositiveInt = Field(4, description="different prompts in a step")
    group_size: int = Field(8, ge=2, description="completions of each prompt; the group is the baseline")
    micro_batch_size: PositiveInt = Field(16, description="completions per forward and backward pass")
    learning_rate: PositiveFloat = Field(1e-4, description="peak learning rate")
    warmup_steps: int = Field(2, ge=0, description="steps of linear warm-up")
    schedule: Literal["constant", "linear"] = Field(
        "constant", description="the learning rate after the warm-up: constant, or falling to 0 at the last step"
    )
    max_grad_norm: PositiveFloat = Field(1.0, description="gradient norm above which gradients are scaled down")
    beta: NonNegativeFloat = Field(0.0, description="KL to the reference in TRL's loss; 0 computes no reference")
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"] = Field(
        "dapo", description="TRL's policy loss; vespo and luspo are wrong with per-token advantages"
    )
    importance_sampling: bool = Field(
        True,
        description="correct for the difference between vLLM's log-probs and the trainer's, token by token; costs a forward",
    )
    sampling: SamplingConfig = SamplingConfig()
    lora: LoraConfig = LoraConfig()
    max_unscored_share: float = Field(
        0.25, ge=0, le=1, description="share of unscored completions in a step that stops the run"
    )
    checkpoint_every: PositiveInt | None = Field(
        None,
        description="optimizer steps between checkpoints, from the last of which `--resume` goes on after a kill; null makes "
        "none, and the stage then begins again",
    )
    reward_functions: Names = Field((), description="further rewards as `package.module:function`, weight 1 each")
    report_to: Names = Field((), description="passed on to TRL: wandb, tensorboard, ...; none by default")

    @model_validator(mode="before")
    @classmethod
    def _follows_tokens(cls, data: Any) -> Any:
        refuse_wrong_options("train", data if isinstance(data, dict) else {})
        return data

    @model_validator(mode="after")
    def _groups_differ(self) -> Self:
        if self.sampling.temperature == 0:
            raise ValueError(
                "train.sampling.temperature = 0 makes all completions of a group alike, so that none is better than "
                "another; set it above 0, usually to 1.0"
            )
        return self

    @model_validator(mode="after")
    def _batch_splits_evenly(self) -> Self:
        rows = self.prompts_per_step * self.group_size
        if rows % min(self.micro_batch_size, rows):
            raise ValueError(
                f"train.micro_batch_size = {self.micro_batch_size} does not divide prompts_per_step * group_size = {rows}; "
                f"choose a divisor of {rows}"
            )
        return self


class EvaluateConfig(Component):
    """How a model is measured on the test prompts, the same before and after."""

    samples: PositiveInt = Field(2, description="completions of each test prompt")
    sampling: SamplingConfig = SamplingConfig()
    threshold: float = Field(0.5, gt=0, lt=1, description="judge's risk at which an answer counts as unsafe")
    interval: float = Field(0.95, gt=0, lt=1, description="level of the intervals")


class RolloutConfig(Component):
    """Offline completions of the training prompts, for the stages `rollout` and `score`."""

    samples: PositiveInt = Field(1, description="completions of each prompt")
    sampling: SamplingConfig = SamplingConfig()


class RunConfig(Component):
    """A whole run: what is trained, on what, under which guard, and how it is measured."""

    name: str = Field(
        min_length=1,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="name of the run, and of its folder in `out`: letters, digits and ._-, a letter or digit first",
    )
    out: str = Field("runs", description="folder that holds the run folders")
    seed: int = Field(0, ge=0, description="seed of data order, sampling and initialisation")
    strategy: str | None = Field(
        None, description="name of a shipped strategy, whose keys count where this file has none: docs/strategies.md"
    )
    model: ModelConfig
    prompting: PromptingConfig = PromptingConfig()
    data: DataConfig = DataConfig()
    generation: GenerationConfig = VLLMGeneration()
    guard: GuardOptions = Field(description="the guardrail that rewards")
    judge: GuardOptions = Field(description="the guardrail that measures; never the one that rewards")
    segments: SegmentOptions = SegmentOptions()
    shaping: ShapingConfig = ShapingConfig()
    rewards: RewardConfig = RewardConfig()
    align: AlignConfig = AlignConfig()
    rollout: RolloutConfig = RolloutConfig()
    train: TrainConfig = TrainConfig()
    sft: SFTConfig = Field(SFTConfig(), description="counts where train.method is sft")
    safegrad: SafeGradConfig = SafeGradConfig()
    localize: LocalizeConfig = LocalizeConfig()
    freeze: FreezeConfig = FreezeConfig()
    probing: ProbingConfig = ProbingConfig()
    regularization: RegularizationConfig = RegularizationConfig()
    monitor: MonitorConfig = MonitorConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _judge_is_another_guard(self) -> Self:
        rewarding, measuring = deciding_guards(self.guard), deciding_guards(self.judge)
        if isinstance(self.rewards.refusal_by, GuardRefusal):
            rewarding |= deciding_guards(self.rewards.refusal_by.guard)
        shared = [kind for key, kind in measuring.items() if key in rewarding]
        if shared:
            what = _DECIDES.get(shared[0])
            which = f"{shared[0]}, with the same {what}" if what else shared[0]
            alone = len(rewarding) == len(measuring) == 1
            raise ValueError(
                f"judge and guard are the same ({which}), whatever their other options; a policy learns to please its "
                f"guard, so measure with another one: set judge.type{f' or judge.{what}' if what else ''} to another"
                if alone
                else f"judge and guard share one that decides ({which}); a policy learns to please its guard, so "
                "measure with others: leave it out of the members of one of the two"
            )
        return self

    @model_validator(mode="after")
    def _monitor_is_another_guard(self) -> Self:
        monitor = self.monitor
        if monitor.judge is None or monitor.allow_reward_guard:
            return self
        rewarding = deciding_guards(self.guard)
        shared = [kind for key, kind in deciding_guards(monitor.judge).items() if key in rewarding]
        if shared:
            raise ValueError(
                f"monitor.judge and guard share one that decides ({shared[0]}); a policy learns to please its guard, so watch it "
                "with another one: leave monitor.judge out, which takes the run's judge, or set monitor.allow_reward_guard to true"
            )
        return self

    @model_validator(mode="after")
    def _something_is_learnt(self) -> Self:
        rewards, shaping = self.rewards, self.shaping
        weights = (rewards.star, rewards.refusal, rewards.coherence, shaping.drop.weight, shaping.potential.weight)
        if not (any(weights) or shaping.lagrangian.enabled or rewards.task or self.train.reward_functions):
            raise ValueError(
                "rewards.star, rewards.refusal, rewards.coherence, shaping.drop.weight and shaping.potential.weight are "
                "all 0, shaping.lagrangian is off and there are no rewards.task and no train.reward_functions, so every "
                "advantage would be 0; set one of the weights above 0"
            )
        return self

    @model_validator(mode="after")
    def _one_kl(self) -> Self:
        if self.shaping.kl.weight > 0 and self.train.beta > 0:
            raise ValueError(
                f"shaping.kl.weight = {self.shaping.kl.weight} with train.beta = {self.train.beta}: {KL_TWICE}"
            )
        return self

    @model_validator(mode="after")
    def _regularization_fits_the_method(self) -> Self:
        check_method(self.regularization, self.train.method, self.sft.rows)
        return self

    @model_validator(mode="after")
    def _prompts_fit_the_engine(self) -> Self:
        if isinstance(self.generation, VLLMGeneration):
            for key, sampling in (
                ("train", self.train.sampling),
                ("evaluate", self.evaluate.sampling),
                ("rollout", self.rollout.sampling),
            ):
                if sampling.max_new_tokens >= self.generation.max_model_len:
                    raise ValueError(
                        f"{key}.sampling.max_new_tokens = {sampling.max_new_tokens} leaves no room for a prompt in "
                        f"generation.max_model_len = {self.generation.max_model_len}; lower the one or raise the other"
                    )
        return self
