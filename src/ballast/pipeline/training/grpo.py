"""GRPO with per-token advantages from a guardrail: TRL's trainer, its loss, and our signal.

Read against TRL 1.16. Two hooks are overridden and nothing is copied:

* `_generate_and_score_completions`: TRL's own, after which `(N,)` advantages become `(N, T)`;
* `_tokenize_prompts`: special tokens in a prompt's text stay text.

A contract test fails when upstream moves them (`tests/pipeline/test_trl_seams.py`).

    N completions on this process, in groups of G   T policy tokens   K segments   R reward terms
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from trl import GRPOConfig, GRPOTrainer

from ballast.errors import ConfigError, GuardError
from ballast.pipeline.config import ShapingConfig
from ballast.pipeline.prompting import PromptFormat
from ballast.pipeline.training.step_metrics import group_metrics, reward_metrics, row_mean, signal_metrics
from ballast.rewards.advantages import sum_of_zscores
from ballast.rewards.guard_reward import GuardReward, ScoredBatch
from ballast.rewards.outage import stop_above_limit
from ballast.rewards.shaping import drop_advantage, drop_scale, drops, gate
from ballast.rewards.star import pad_segments, spread_to_tokens
from ballast.rewards.terms import checked_terms

DEFAULT_SHAPING = ShapingConfig()
_OVER_ROWS = ("grpo", "sapo", "dr_grpo")  # losses of TRL's that divide by the number of rows


@dataclass(frozen=True)
class StepRecord:
    """Everything about the completions of one batch, for tables and reports.

    Attributes:
        step: optimizer step that these completions are for, from 0.
        prompts: (N,) conversations.
        kinds: (N,) kind of each prompt.
        scored: the guard's judgement.
        rewards: term name to (N,) values, None where a term does not apply.
        advantage_NT: what the loss got; 0 at padding.
        completion_ids: (N, T_n) sampled tokens.
    """

    step: int
    prompts: Sequence[Any]
    kinds: Sequence[str | None]
    scored: ScoredBatch
    rewards: dict[str, list[float | None]]
    advantage_NT: torch.Tensor
    completion_ids: Sequence[Sequence[int]]


class ShapedGRPOTrainer(GRPOTrainer):
    """`GRPOTrainer` whose advantages are shaped token by token by a guardrail.

    Args:
        guard_reward: the guard as a reward; scored once a batch, also read for the per-token signal.
        reward_funcs: further terms: `RefusalReward`, `CoherenceReward`, and callables of TRL's form, each under a
            name of its own; the latter become a `CheckedReward`, which does not apply to `harmful` prompts.
        shaping: which shaping terms apply, and how strongly; None leaves TRL's own advantages, the same at every
            token of a completion. In a batch with unscored completions TRL would count them into the baseline with
            whatever the other terms gave them; there the sum of our z-scores takes their place.
        star_on: kinds of prompts whose reward includes the guard's STAR; on others the STAR only gates and
            charges drops. With `shaping=None` the STAR counts on every kind, as in TRL's own sum.
        over_batch: names of terms that are normalised over the whole batch instead of each group.
        std_floor: smallest spread that a reward is divided by.
        max_unscored_share: share of unscored completions of a batch above which the run stops.
        prompt_format: encodes prompts; None leaves it to TRL.
        on_batch: called with a `StepRecord` after every scored batch.
        args.reward_weights: (1 + R,) weights, the guard's first; 1 each where not given.
        **kwargs: as for `GRPOTrainer`.

    Raises:
        ConfigError: an option of TRL's that is wrong with per-token advantages, or what `checked_terms` refuses.
    """

    def __init__(
        self,
        *,
        guard_reward: GuardReward,
        reward_funcs: Sequence[Any] = (),
        args: GRPOConfig,
        shaping: ShapingConfig | None = DEFAULT_SHAPING,
        star_on: Sequence[str] = ("harmful",),
        over_batch: Sequence[str] = (),
        std_floor: float = 0.1,
        max_unscored_share: float = 0.25,
        prompt_format: PromptFormat | None = None,
        on_batch: Callable[[StepRecord], None] | None = None,
        **kwargs: Any,
    ) -> None:
        check_options(args)
        self.guard_reward = guard_reward
        self.terms = [guard_reward, *checked_terms(reward_funcs)]
        self.shaping = shaping
        self.star_on = frozenset(star_on)
        self.over_batch = [n for n, term in enumerate(self.terms) if term.__name__ in over_batch]
        self.std_floor = std_floor
        self.max_unscored_share = max_unscored_share
        self.prompt_format = prompt_format
        self.on_batch = on_batch
        super().__init__(reward_funcs=list(self.terms), args=args, **kwargs)

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        if self.prompt_format is None or isinstance(prompts[0], str):
            return super()._tokenize_prompts(prompts)
        return [self.prompt_format.encode(prompt) for prompt in prompts], None, {}

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        scored = self.guard_reward.last
        if scored is None or len(scored.texts) != len(inputs):
            raise GuardError("the guard's scores do not belong to this batch; use one GuardReward for one trainer only")
        scored_all_N = self._gather(scored.scores.scored_N)
        self._stop_above_limit(scored, scored_all_N)
        kinds = [row.get("kind") for row in inputs]
        rewards = self._rewards(scored, kinds)
        missing = float("nan")
        reward_NR = torch.tensor([[missing if v is None else v for v in column] for column in rewards.values()]).T
        reward_all_NR = self._gather(reward_NR)
        segment_NT = pad_segments(scored.segments, output["completion_ids"].size(1))
        if self.shaping is None and scored_all_N.all():
            advantage_NT = output["advantages"].cpu()[:, None].masked_fill(segment_NT < 0, 0.0)
        else:
            advantage_NT = self._advantages(scored, reward_all_NR, segment_NT, scored_all_N)
        if not scored_all_N.all():
            advantage_NT = advantage_NT * self._leave_out_unscored(output, scored, scored_all_N)
        output["advantages"] = advantage_NT.to(output["completion_ids"].device)
        self._report(scored, reward_all_NR, scored_all_N, (advantage_NT, segment_NT))
        if self.on_batch is not None and self.model.training:
            ids = [
                row[keep].tolist()
                for row, keep in zip(output["completion_ids"], output["completion_mask"].bool(), strict=True)
            ]
            prompts = [row["prompt"] for row in inputs]
            self.on_batch(StepRecord(self.state.global_step, prompts, kinds, scored, rewards, advantage_NT, ids))
        return output

    def _rewards(self, scored: ScoredBatch, kinds: Sequence[str | None]) -> dict[str, list[float | None]]:
        everywhere = self.shaping is None  # as TRL adds them up
        star = [
            None if value != value or not (everywhere or kind is None or kind in self.star_on) else value
            for value, kind in zip(scored.lowest_star_N.tolist(), kinds, strict=True)
        ]
        return {"star": star, **{term.__name__: list(term.last) for term in self.terms[1:]}}

    def _advantages(
        self,
        scored: ScoredBatch,
        reward_all_NR: torch.Tensor,
        segment_NT: torch.Tensor,
        scored_all_N: torch.Tensor,
    ) -> torch.Tensor:
        """(N, T) advantages of this process's rows; statistics are over all processes' rows."""
        G, shaping, N = self._group_size, self.shaping, len(segment_NT)
        own = slice(self.accelerator.process_index * N, (self.accelerator.process_index + 1) * N)
        weights = self.reward_weights.cpu()
        z_N = sum_of_zscores(reward_all_NR, weights, scored_all_N, G, self.std_floor, self.over_batch)[own]
        clean_NK = scored.clean_NK
        advantage_NK = z_N[:, None].expand_as(clean_NK)
        if shaping is not None and shaping.gate.enabled:
            advantage_NK = gate(z_N, clean_NK, shaping.gate.tau)
        if shaping is not None and shaping.drop.weight > 0:
            drop_NK = drops(clean_NK, scored.scores.start_N, scored.scores.segment_mask_NK, shaping.drop.slack)
            scale_N = drop_scale(self._gather(drop_NK.sum(1)), scored_all_N, G, shaping.drop.std_floor)[own]
            advantage_NK = advantage_NK + drop_advantage(drop_NK, scale_N, shaping.drop.weight)
        return spread_to_tokens(advantage_NK.masked_fill(~scored.scores.scored_N[:, None], 0.0), segment_NT)

    def _stop_above_limit(self, scored: ScoredBatch, scored_all_N: torch.Tensor) -> None:
        stop_above_limit(
            unscored=int((~scored_all_N).sum()),
            total=len(scored_all_N),
            limit=self.max_unscored_share,
            guard=self.guard_reward.guard.name,
            reason=next((trace.reason for trace in scored.traces if trace.reason), "on another process"),
            where=f"at step {self.state.global_step}",
        )

    def _leave_out_unscored(self, output: dict[str, Any], scored: ScoredBatch, scored_all_N: torch.Tensor) -> float:
        """Take the tokens of unscored rows out of the loss and out of its normaliser.

        Returns:
            What the advantages must be multiplied by: 1 for losses that divide by the number of unmasked tokens,
            N / N_scored for those that divide by the number of rows, where an unscored row would shrink the step.
            A KL penalty (`beta` > 0) is no advantage: under the latter it stays divided by all N rows.
        """
        keep = scored.scores.scored_N[:, None].long()
        # `completion_mask` is the attention mask too, so the loss is masked by `tool_mask`.
        mask = output["completion_mask"]
        output["tool_mask"] = keep.to(mask.device) * output.get("tool_mask", torch.ones_like(mask))
        output["num_items_in_batch"] = self.accelerator.gather((mask * output["tool_mask"]).sum()).sum()
        return len(scored_all_N) / max(1, int(scored_all_N.sum())) if self.loss_type in _OVER_ROWS else 1.0

    def _report(
        self, scored: ScoredBatch, reward_NR: torch.Tensor, scored_all_N: torch.Tensor, signal: tuple[Any, Any]
    ) -> None:
        row_mean_N = self._gather(row_mean(*signal))
        values = {
            **signal_metrics(scored, *signal),
            **reward_metrics([t.__name__ for t in self.terms], reward_NR, self.reward_weights.cpu(), scored_all_N),
            **group_metrics(row_mean_N, scored_all_N, self._group_size),
        }
        for name, value in values.items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)

    @property
    def _group_size(self) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval

    def _gather(self, value: torch.Tensor) -> torch.Tensor:
        """Rows of all processes, on the CPU: groups straddle processes, and statistics are over whole groups."""
        return self.accelerator.gather(value.to(self.accelerator.device)).cpu()


def check_options(args: GRPOConfig) -> None:
    """Refuse options of TRL's that are wrong with per-token advantages.

    Raises:
        ConfigError: names the option, its value and the reason.
    """
    default = {
        field: GRPOConfig.__dataclass_fields__[field].default
        for field in ("scale_rewards", "multi_objective_aggregation")
    }
    wrong = [
        (args.loss_type in ("vespo", "luspo"), "loss_type", args.loss_type, "it weighs whole sequences", "dapo"),
        (
            args.importance_sampling_level == "sequence",
            "importance_sampling_level",
            "sequence",
            "one ratio for a sequence cannot follow per-token advantages",
            "token",
        ),
        (
            args.off_policy_mask_threshold is not None,
            "off_policy_mask_threshold",
            args.off_policy_mask_threshold,
            "it reads one advantage a sequence",
            None,
        ),
        (
            args.mask_truncated_completions,
            "mask_truncated_completions",
            True,
            "it empties the attention mask that segments are laid over",
            False,
        ),
        (
            args.top_entropy_quantile < 1.0,
            "top_entropy_quantile",
            args.top_entropy_quantile,
            "it would drop the tokens that a drop is charged to",
            1.0,
        ),
        (
            args.scale_rewards != default["scale_rewards"],
            "scale_rewards",
            args.scale_rewards,
            "our group normalisation replaces it",
            default["scale_rewards"],
        ),
        (
            args.multi_objective_aggregation != default["multi_objective_aggregation"],
            "multi_objective_aggregation",
            args.multi_objective_aggregation,
            "our group normalisation replaces it",
            default["multi_objective_aggregation"],
        ),
        (
            args.use_vllm
            and args.vllm_importance_sampling_correction
            and (args.top_p != 1.0 or args.top_k > 0 or bool(args.min_p)),
            "top_p, top_k, min_p",
            (args.top_p, args.top_k, args.min_p),
            "truncated sampling biases the importance ratio",
            "1.0, 0, None",
        ),
    ]
    for is_wrong, name, value, reason, instead in wrong:
        if is_wrong:
            raise ConfigError(
                f"GRPOConfig.{name} = {value!r} does not work with per-token advantages: {reason}; set {name}={instead!r}"
            )
