"""The configuration of a run: one frozen pydantic model a component, unknown keys refused.

Parsing needs neither torch nor vLLM, so a mistake is answered in under a second. A key's default is the
vetted setting; a required key has none. `config_loading` reads YAML files and dotted overrides into these.
"""

from typing import Self

from pydantic import (
    Field,
    PositiveInt,
    model_validator,
)

from ballast.guardrails.segments import SegmentOptions
from ballast.pipeline.config_align import AlignConfig
from ballast.pipeline.config_base import Component
from ballast.pipeline.config_evaluate import EvaluateConfig, check_second_judge
from ballast.pipeline.config_guards import DECIDES, GuardOptions, deciding_guards
from ballast.pipeline.config_inputs import (
    DataConfig,
    GenerationConfig,
    ModelConfig,
    PromptingConfig,
    SamplingConfig,
    VLLMGeneration,
)
from ballast.pipeline.config_monitor import MonitorConfig
from ballast.pipeline.config_probing import ProbingConfig
from ballast.pipeline.config_prompts import PromptsConfig
from ballast.pipeline.config_regularization import RegularizationConfig, check_method
from ballast.pipeline.config_report import ReportConfig
from ballast.pipeline.config_restore import RestoreConfig
from ballast.pipeline.config_rewards import GuardRefusal, RewardConfig
from ballast.pipeline.config_safe_updates import SafeGradConfig
from ballast.pipeline.config_safety_layers import FreezeConfig, LocalizeConfig
from ballast.pipeline.config_serve import ServeConfig
from ballast.pipeline.config_sft import SFTConfig
from ballast.pipeline.config_shaping import KL_TWICE, ShapingConfig
from ballast.pipeline.config_train import TrainConfig


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
    prompts: PromptsConfig = PromptsConfig()
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
    restore: RestoreConfig = RestoreConfig()
    report: ReportConfig = ReportConfig()
    serve: ServeConfig = Field(ServeConfig(), description="the gateway of `ballast serve`; no stage reads it")

    @model_validator(mode="after")
    def _judge_is_another_guard(self) -> Self:
        rewarding, measuring = deciding_guards(self.guard), deciding_guards(self.judge)
        if isinstance(self.rewards.refusal_by, GuardRefusal):
            rewarding |= deciding_guards(self.rewards.refusal_by.guard)
        shared = [kind for key, kind in measuring.items() if key in rewarding]
        if shared:
            what = DECIDES.get(shared[0])
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
    def _second_judge_is_of_another_kind(self) -> Self:
        check_second_judge(self.evaluate.second_judge, self.judge, self.guard)
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
