"""GRPO with per-token advantages from a guardrail: TRL's trainer, its loss, and our signal.

Read against TRL 1.16. Three hooks are overridden and nothing is copied:

* `_generate_and_score_completions`: TRL's own, after which `(N,)` advantages become `(N, T)`;
* `_calculate_rewards`: TRL's own, while the guard works in a thread; unscored rows then leave TRL's statistics;
* `_tokenize_prompts`: special tokens in a prompt's text stay text.

A contract test fails when upstream moves them (`tests/pipeline/test_trl_seams.py`).

    N completions on this process, in groups of G   T policy tokens   K segments   R reward terms
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from trl import GRPOConfig, GRPOTrainer

from ballast.errors import ConfigError, GuardError
from ballast.guardrails.remote import over_processes
from ballast.pipeline import ranks
from ballast.pipeline.config_shaping import ShapingConfig
from ballast.pipeline.prompting import PromptFormat
from ballast.pipeline.training.kl_reference import check_reference, log_ratio_to_reference
from ballast.pipeline.training.logged_means import Sums, means_over_processes
from ballast.pipeline.training.options import check_options
from ballast.pipeline.training.overlap import OverlappedGuard
from ballast.pipeline.training.shaped_advantages import shaped_advantages, violation_rate
from ballast.pipeline.training.step_metrics import NAN, group_metrics, reward_metrics, row_mean, signal_sums
from ballast.rewards.advantages import charged, weighted_zscores
from ballast.rewards.dual import DualVariable
from ballast.rewards.early_stop import stopped_early, tokens_in_loss
from ballast.rewards.guard_reward import GuardReward, ScoredBatch
from ballast.rewards.outage import stop_above_limit
from ballast.rewards.shaping import before, token_kl
from ballast.rewards.star import pad_segments, spread_to_tokens
from ballast.rewards.terms import checked_terms

DEFAULT_SHAPING = ShapingConfig()
_OVER_ROWS = ("grpo", "sapo", "dr_grpo")  # losses of TRL's that divide by the number of rows
_DUAL = "ballast_lagrangian"  # where the trainer's state, and so every checkpoint, keeps the dual variable


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
        in_loss_NT: False at padding, in unscored rows, and after an early stop.
    """

    step: int
    prompts: Sequence[Any]
    kinds: Sequence[str | None]
    scored: ScoredBatch
    rewards: dict[str, list[float | None]]
    advantage_NT: torch.Tensor
    completion_ids: Sequence[Sequence[int]]
    in_loss_NT: torch.Tensor


class ShapedGRPOTrainer(GRPOTrainer):
    """`GRPOTrainer` whose advantages are shaped token by token by a guardrail.

    Args:
        guard_reward: the guard as a reward; scored once a batch, also read for the per-token signal.
        reward_funcs: further terms: `RefusalReward`, `CoherenceReward`, and callables of TRL's form, each under a
            name of its own; the latter become a `CheckedReward`, which does not apply to `harmful` prompts.
        shaping: which shaping terms apply, and how strongly; None leaves TRL's own advantages, the same at every
            token of a completion.
        star_on: kinds of prompts whose reward includes the guard's STAR; on others the STAR only gates and
            charges drops. With `shaping=None` the STAR counts on every kind, as in TRL's own sum.
        over_batch: names of terms that are normalised over the whole batch instead of each group.
        opening: name of a term to the number of segments, from the first, that it is charged to; the others are
            charged to the whole completion. Without shaping it has no meaning.
        std_floor: smallest spread that a reward is divided by.
        star_std_floor: the same for the guard's STAR; None takes `std_floor`.
        max_unscored_share: share of unscored completions of a batch above which the run stops.
        prompt_format: encodes prompts; None leaves it to TRL.
        on_batch: called with a `StepRecord` after every scored batch.
        args.reward_weights: (1 + R,) weights, the guard's first; 1 each where not given.
        **kwargs: as for `GRPOTrainer`.

    Raises:
        ConfigError: an option of TRL's that is wrong with per-token advantages, what `checked_terms` refuses, a name in
            `over_batch` or `opening` that no term has, or a per-token KL without an adapter whose absence is the reference.
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
        opening: Mapping[str, int] | None = None,
        std_floor: float = 0.1,
        star_std_floor: float | None = None,
        max_unscored_share: float = 0.25,
        prompt_format: PromptFormat | None = None,
        on_batch: Callable[[StepRecord], None] | None = None,
        **kwargs: Any,
    ) -> None:
        check_options(args, shaping)
        if shaping is not None and shaping.kl.weight > 0:
            check_reference(kwargs.get("model"))
        self.guard_reward = guard_reward
        self._guard = OverlappedGuard(guard_reward)
        self.terms = [guard_reward, *checked_terms(reward_funcs)]
        self.shaping = shaping
        self.star_on = frozenset(star_on)
        column = {term.__name__: n for n, term in enumerate(self.terms)}
        for option, names in (("over_batch", over_batch), ("opening", opening or {})):
            unknown = [name for name in names if name not in column]
            if unknown:
                raise ConfigError(
                    f"{option}: there is no reward term '{unknown[0]}', so it would change nothing; the terms are {', '.join(column)}"
                )
        self.over_batch = [column[name] for name in over_batch]
        self.opening = {column[name]: segments for name, segments in (opening or {}).items()}
        floor = std_floor if star_std_floor is None else star_std_floor
        self.std_floors = [floor, *[std_floor] * (len(self.terms) - 1)]
        self.max_unscored_share = max_unscored_share
        self.prompt_format = prompt_format
        self.on_batch = on_batch
        super().__init__(reward_funcs=[self._guard, *self.terms[1:]], args=args, **kwargs)

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        if self.prompt_format is None or isinstance(prompts[0], str):
            return super()._tokenize_prompts(prompts)
        return [self.prompt_format.encode(prompt) for prompt in prompts], None, {}

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> torch.Tensor:
        with self._guard.scoring(prompts, completion_ids_list):
            reward_NR: torch.Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        # TRL sums over the terms that did answer; only a row without any is left out of its baseline and its means.
        reward_NR[reward_NR[:, 0].isnan()] = float("nan")
        return reward_NR

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        scored = self.guard_reward.last
        if scored is None or len(scored.texts) != len(inputs):
            raise GuardError("the guard's scores do not belong to this batch; use one GuardReward for one trainer only")
        scored_all_N = self._gather(scored.scores.scored_N)
        self._stop_above_limit(scored, scored_all_N)
        if self.shaping is not None and self.shaping.early_stop.enabled:
            scored = stopped_early(scored, self.shaping.early_stop.tau)
        kinds = [row.get("kind") for row in inputs]
        rewards = self._rewards(scored, kinds)
        missing = float("nan")
        reward_NR = torch.tensor([[missing if v is None else v for v in column] for column in rewards.values()]).T
        reward_all_NR = self._gather(reward_NR)
        token_NT = pad_segments(scored.segments, output["completion_ids"].size(1))
        in_loss_NT = tokens_in_loss(scored, token_NT)
        segment_NT = token_NT.masked_fill(~in_loss_NT, -1)
        if self.shaping is None:
            advantage_NT = output["advantages"].cpu()[:, None].masked_fill(segment_NT < 0, 0.0)
        else:
            advantage_NT = self._advantages(self.shaping, scored, reward_all_NR, segment_NT, scored_all_N)
            if self.shaping.kl.weight > 0:
                advantage_NT = advantage_NT + self._kl_advantage(self.shaping, scored, output, segment_NT)
        if self._gather((in_loss_NT != (token_NT >= 0)).any().view(1)).any():
            self._leave_out(output, in_loss_NT)
            advantage_NT = advantage_NT * self._row_scale(scored_all_N)
        output["advantages"] = advantage_NT.to(output["completion_ids"].device)
        self._report(scored, reward_all_NR, scored_all_N, (advantage_NT, segment_NT, token_NT))
        if self.on_batch is not None and self.model.training:
            ids = [
                row[keep].tolist()
                for row, keep in zip(output["completion_ids"], output["completion_mask"].bool(), strict=True)
            ]
            prompts = [row["prompt"] for row in inputs]
            step = self.state.global_step
            self.on_batch(StepRecord(step, prompts, kinds, scored, rewards, advantage_NT, ids, in_loss_NT))
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
        shaping: ShapingConfig,
        scored: ScoredBatch,
        reward_all_NR: torch.Tensor,
        segment_NT: torch.Tensor,
        scored_all_N: torch.Tensor,
    ) -> torch.Tensor:
        """(N, T) advantages of this process's rows; statistics are over all processes' rows."""
        N = len(segment_NT)
        own = slice(self.accelerator.process_index * N, (self.accelerator.process_index + 1) * N)
        z_NR = weighted_zscores(
            reward_all_NR, self.reward_weights.cpu(), scored_all_N, self._group_size, self.std_floors, self.over_batch
        )[own]
        price, rate = self._price(shaping, scored) if shaping.lagrangian.enabled else (0.0, None)
        advantage_NK = shaped_advantages(
            shaping,
            charged(z_NR, scored.clean_NK.size(1), self.opening),
            scored,
            group_size=self._group_size,
            gather=self._gather,
            own=own,
            price=price,
            rate=rate,
        )
        return spread_to_tokens(advantage_NK, segment_NT)

    def _price(self, shaping: ShapingConfig, scored: ScoredBatch) -> tuple[float, float | None]:
        """The dual variable for this batch, and the batch's rate of violations, which moves it for the next one."""
        options = shaping.lagrangian
        kept = (self.state.stateful_callbacks or {}).get(_DUAL)
        dual = DualVariable(**kept["attributes"]) if kept else DualVariable(options.start)
        rate = violation_rate(scored, options.tau, self._gather)
        if rate is not None and self.model.training:
            after = dual.updated(
                rate, target=options.target, step=options.step, ema=options.ema, maximum=options.maximum
            )
            self.state.stateful_callbacks[_DUAL] = {"args": {}, "attributes": asdict(after)}
        self._log({"lagrangian/price": dual.value, "lagrangian/rate": NAN if rate is None else rate})
        return dual.value, rate

    def _kl_advantage(
        self, shaping: ShapingConfig, scored: ScoredBatch, output: dict[str, Any], segment_NT: torch.Tensor
    ) -> torch.Tensor:
        args = self.args
        size = args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size
        ratio_NT = log_ratio_to_reference(self, output, size)
        before_NT = spread_to_tokens(before(scored.clean_NK, scored.scores.start_N), segment_NT)
        in_loss = ratio_NT[segment_NT >= 0]
        self._log_means({"shaping/log_ratio_to_reference": (in_loss.sum().item(), len(in_loss))})
        kl_NT = token_kl(ratio_NT, before_NT, shaping.kl.weight, shaping.kl.clip)
        return kl_NT.masked_fill(segment_NT < 0, 0.0)

    def _stop_above_limit(self, scored: ScoredBatch, scored_all_N: torch.Tensor) -> None:
        stop_above_limit(
            unscored=int((~scored_all_N).sum()),
            total=len(scored_all_N),
            limit=self.max_unscored_share,
            guard=self.guard_reward.guard.name,
            reason=next((trace.reason for trace in scored.traces if trace.reason), "on another process"),
            where=f"at step {self.state.global_step}",
        )

    def _leave_out(self, output: dict[str, Any], in_loss_NT: torch.Tensor) -> None:
        """Take tokens out of the loss and out of its normaliser."""
        # `completion_mask` is the attention mask too, so the loss is masked by `tool_mask`.
        mask = output["completion_mask"]
        output["tool_mask"] = in_loss_NT.long().to(mask.device) * output.get("tool_mask", torch.ones_like(mask))
        output["num_items_in_batch"] = self.accelerator.gather((mask * output["tool_mask"]).sum()).sum()

    def _row_scale(self, scored_all_N: torch.Tensor) -> float:
        """What advantages are multiplied by where a loss divides by the number of rows, unscored ones among them.

        N / N_scored for such losses, 1 for those that divide by the number of tokens in the loss. A KL penalty
        (`beta` > 0) is no advantage: under the former it stays divided by all N rows.
        """
        return len(scored_all_N) / max(1, int(scored_all_N.sum())) if self.loss_type in _OVER_ROWS else 1.0

    def _report(
        self, scored: ScoredBatch, reward_NR: torch.Tensor, scored_all_N: torch.Tensor, signal: tuple[Any, Any, Any]
    ) -> None:
        row_mean_N = self._gather(row_mean(*signal[:2]))
        self._log_means(signal_sums(scored, *signal))
        self._log(
            {
                **self._guard_figures(scored, signal[2]),
                **reward_metrics([t.__name__ for t in self.terms], reward_NR, self.reward_weights.cpu(), scored_all_N),
                **group_metrics(row_mean_N, scored_all_N, self._group_size),
            }
        )

    def _guard_figures(self, scored: ScoredBatch, token_NT: torch.Tensor) -> dict[str, float]:
        """The policy's tokens that the guards of all processes read, how long the slowest took, what their servers did."""
        tokens = ranks.summed([float((token_NT >= 0).sum())])[0]
        seconds, servers = zip(*ranks.collected([(scored.seconds, dict(scored.servers))]), strict=True)
        return {"guard/seconds": max(seconds), "guard/tokens": tokens, **over_processes(servers)}

    def _log_means(self, sums: Sums) -> None:
        self._log({**dict.fromkeys(sums, NAN), **means_over_processes(sums)})

    def _log(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)

    @property
    def _group_size(self) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval

    def _gather(self, value: torch.Tensor) -> torch.Tensor:
        """Rows of all processes, on the CPU: groups straddle processes, and statistics are over whole groups."""
        return self.accelerator.gather(value.to(self.accelerator.device)).cpu()
