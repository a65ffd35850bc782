"""ShapedGRPOTrainer on a tiny model with transformers generation and a scripted guard."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from ballast.errors import ConfigError, GuardError
from ballast.guardrails.scripted import ScriptedGuardrail
from ballast.pipeline.config import ShapingConfig
from ballast.pipeline.training.grpo import ShapedGRPOTrainer, StepRecord, check_options
from ballast.rewards.guard_reward import GuardReward

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


def test_unscored_rows_get_advantage_zero_and_leave_the_normaliser(
    tmp_path: Path, tiny_model: Any, tokenizer: Any
) -> None:
    calls = iter(range(1000))

    class FailsOnOne:
        name = "fails"

        def __init__(self) -> None:
            self.inner = ScriptedGuardrail(by_length)

        def assess(self, exchanges: Any, cuts: Any) -> Any:
            next(calls)
            traces = self.inner.assess(exchanges, cuts)
            from ballast.guardrails.types import RiskTrace

            traces[0] = RiskTrace.unscored(cuts[0], "planted")
            return traces

    records: list[StepRecord] = []
    trainer = shaped(tmp_path, tiny_model, tokenizer, FailsOnOne(), records, args={"max_steps": 1})
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


def test_above_the_limit_of_unscored_completions_the_run_stops_with_the_cause(
    tmp_path: Path, tiny_model: Any, tokenizer: Any
) -> None:
    guard = ScriptedGuardrail(lambda exchange, prefix: float("nan"))
    with pytest.raises(GuardError, match=r"100% of 8 completions unscored.*nan"):
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
