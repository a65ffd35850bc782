"""ShapedGRPOTrainer on a tiny model with transformers generation and a scripted guard."""

import inspect
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer, rloo_trainer

from ballast.errors import ConfigError, GuardError
from ballast.guardrails.scripted import ScriptedGuardrail
from ballast.guardrails.types import RiskTrace
from ballast.pipeline.config import ShapingConfig
from ballast.pipeline.training.grpo import ShapedGRPOTrainer, StepRecord, check_options
from ballast.rewards.guard_reward import GuardReward
from ballast.rewards.terms import CheckedReward

pytestmark = pytest.mark.model

ROWS = [
    {"prompt": [{"role": "user", "content": "How are you?"}], "kind": "harmful"},
    {"prompt": [{"role": "user", "content": "What is tea?"}], "kind": "harmful"},
]


def arguments(folder: Path, **changes: Any) -> GRPOConfig:
    settings: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 8, "num_generations": 4,
        "max_completion_length": 12, "learning_rate": 1e-2, "bf16": False, "report_to": "none", "save_strategy": "no",
        "logging_steps": 1, "disable_tqdm": True, "gradient_checkpointing": False, "use_cpu": True, "seed": 3,
    }  # fmt: skip
    return GRPOConfig(**(settings | changes))


def shaped(
    folder: Path, model: Any, tokenizer: Any, guard: Any, records: list[StepRecord], **changes: Any
) -> ShapedGRPOTrainer:
    options = {"shaping": ShapingConfig()} | changes
    return ShapedGRPOTrainer(
        model=model,
        args=arguments(folder, **options.pop("args", {})),
        guard_reward=GuardReward(guard, tokenizer),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        on_batch=records.append,
        **options,
    )


def by_length(exchange: Any, prefix: str) -> float:
    """Risk that rises with the length of the text: each completion another, each segment riskier."""
    return min(1.0, len(prefix) / 100)


def test_advantages_are_per_token_and_a_fall_is_charged_where_it_happens(
    tmp_path: Path, tiny_model: Any, tokenizer: Any
) -> None:
    records: list[StepRecord] = []
    shaped(tmp_path, tiny_model, tokenizer, ScriptedGuardrail(by_length), records, args={"max_steps": 1}).train()
    advantage = records[0].advantage_NT
    assert advantage.dim() == 2
    for n, segments in enumerate(records[0].scored.segments):
        for k in set(segments):
            values = {round(advantage[n, t].item(), 6) for t, segment in enumerate(segments) if segment == k}
            assert len(values) == 1  # one value a segment
    assert any(len({round(v, 6) for v in row.tolist()}) > 1 for row in advantage)


def test_shaping_off_equals_trl_bit_for_bit(tmp_path: Path, tiny_model: Any, tokenizer: Any) -> None:
    start = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    plain = GRPOTrainer(
        model=tiny_model,
        reward_funcs=[GuardReward(ScriptedGuardrail(by_length), tokenizer)],
        args=arguments(tmp_path),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
    )
    plain.train()
    after_plain = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    tiny_model.load_state_dict(start)
    ours = shaped(tmp_path, tiny_model, tokenizer, ScriptedGuardrail(by_length), [], shaping=None)
    ours.train()
    for name, value in tiny_model.state_dict().items():
        assert torch.equal(value, after_plain[name]), name


class FailsOnFirst:
    """`by_length`, with the first completion of every batch unscored."""

    name = "fails"

    def assess(self, exchanges: Any, cuts: Any) -> Any:
        traces = ScriptedGuardrail(by_length).assess(exchanges, cuts)
        return [RiskTrace.unscored(cuts[0], "planted"), *traces[1:]]


def test_unscored_rows_get_advantage_zero_and_leave_the_normaliser(
    tmp_path: Path, tiny_model: Any, tokenizer: Any
) -> None:
    records: list[StepRecord] = []
    trainer = shaped(tmp_path, tiny_model, tokenizer, FailsOnFirst(), records, args={"max_steps": 1})
    seen: dict[str, Any] = {}
    original = trainer._compute_loss

    def spy(model: Any, inputs: Any) -> Any:
        seen.update({key: inputs[key] for key in ("advantages", "completion_mask", "tool_mask", "num_items_in_batch")})
        return original(model, inputs)

    trainer._compute_loss = spy  # type: ignore[method-assign]
    trainer.train()
    unscored = (records[0].advantage_NT == 0).all(dim=1).nonzero().flatten().tolist()
    assert 0 in unscored
    mask = seen["completion_mask"] * seen["tool_mask"]
    assert seen["num_items_in_batch"] == mask.sum()
    assert (seen["tool_mask"].sum(1) == 0).sum() == 1


def constant(completion_ids: Any, **_: Any) -> list[float]:
    return [5.0] * len(completion_ids)


@pytest.mark.parametrize(("loss_type", "scale"), [("dapo", 1.0), ("grpo", 8 / 7), ("dr_grpo", 8 / 7)])
def test_unscored_completion_leaves_the_baseline_alone_with_shaping_off(
    tmp_path: Path, tiny_model: Any, tokenizer: Any, loss_type: str, scale: float
) -> None:
    # A loss that divides by 8 rows, one of them unscored, would be 7/8 of the mean over those that count.
    records: list[StepRecord] = []
    # The second term scores every row, so that TRL counts the unscored one as 0 + 5 beside star + 5.
    trainer = shaped(
        tmp_path,
        tiny_model,
        tokenizer,
        FailsOnFirst(),
        records,
        shaping=None,
        reward_funcs=[CheckedReward(constant, "constant", not_on=())],
        args={"max_steps": 1, "loss_type": loss_type},
    )
    trainer.train()
    star = records[0].rewards["star"]
    assert star[0] is None
    scored = [value for value in star[1:4] if value is not None]
    mean, spread = statistics.mean(scored), max(statistics.stdev(scored), 0.1)
    expected = [0.0, *(scale * (value - mean) / spread for value in scored)]
    assert records[0].advantage_NT[:4, 0].tolist() == pytest.approx(expected, abs=1e-5)
    logged = trainer.state.log_history[0]
    # Every row's weighted mean is (star + 5) / 2, over the seven scored rows.
    mean_star = statistics.mean(value for value in star if value is not None)
    assert logged["reward/star"] == pytest.approx(mean_star, abs=1e-5)
    assert logged["reward/total"] == pytest.approx((mean_star + 5) / 2, abs=1e-5)
    # Without shaping every group is centred.
    assert logged["advantage/group_mean_min"] == pytest.approx(0, abs=1e-5)
    assert logged["advantage/group_mean_max"] == pytest.approx(0, abs=1e-5)


def test_above_the_limit_of_unscored_completions_the_run_stops_with_the_cause(
    tmp_path: Path, tiny_model: Any, tokenizer: Any
) -> None:
    guard = ScriptedGuardrail(lambda exchange, prefix: float("nan"))
    with pytest.raises(GuardError, match=r"8 of 8 completions \(100%\) unscored at step 0.*nan"):
        shaped(tmp_path, tiny_model, tokenizer, guard, []).train()


def test_star_rewards_only_the_kinds_it_is_meant_for(tmp_path: Path, tiny_model: Any, tokenizer: Any) -> None:
    records: list[StepRecord] = []
    shaped(
        tmp_path,
        tiny_model,
        tokenizer,
        ScriptedGuardrail(by_length),
        records,
        star_on=("ordinary",),
        args={"max_steps": 1},
    ).train()
    assert records[0].rewards["star"] == [None] * 8


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("loss_type", "vespo"),
        ("loss_type", "luspo"),
        ("importance_sampling_level", "sequence"),
        ("off_policy_mask_threshold", 0.5),
        ("mask_truncated_completions", True),
        ("top_entropy_quantile", 0.5),
        ("scale_rewards", "batch"),
        ("multi_objective_aggregation", "normalize_then_sum"),
    ],
)
def test_options_that_are_wrong_with_per_token_advantages_are_refused(tmp_path: Path, option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=option):
        check_options(arguments(tmp_path, **{option: value}))


def test_truncated_sampling_under_importance_correction_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="top_p"):
        check_options(arguments(tmp_path, use_vllm=True, vllm_mode="colocate", top_p=0.9))


@pytest.mark.parametrize("module", [grpo_trainer, rloo_trainer])
def test_trls_warning_about_unscored_rows_begins_as_we_know_it(module: Any) -> None:
    assert 'f"All reward functions returned None' in inspect.getsource(module)


def test_the_losses_that_divide_by_rows_are_those_we_rescale() -> None:
    source = inspect.getsource(GRPOTrainer._compute_loss)
    assert 'if self.loss_type in ["grpo", "sapo"]:' in source
    assert "(per_token_loss.size(0) * self.max_completion_length)" in source
