"""ShapedGRPOTrainer on a tiny model with transformers generation and a scripted guard."""

import inspect
import statistics
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer, rloo_trainer

from ballast.errors import ConfigError, GuardError
from ballast.guardrails.scripted import ScriptedGuardrail
from ballast.guardrails.segments import SegmentOptions
from ballast.guardrails.types import RiskTrace
from ballast.pipeline.config_shaping import ShapingConfig
from ballast.pipeline.training.grpo import ShapedGRPOTrainer, StepRecord
from ballast.pipeline.training.kl_reference import log_ratio_to_reference
from ballast.pipeline.training.options import check_options
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


def word_count(completion_ids: Any, **_: Any) -> list[float]:
    return [len(ids) / 12 for ids in completion_ids]


def test_two_steps_with_shaping_off_equal_trls_losses_and_weights_exactly(
    tmp_path: Path, tiny_model: Any, tokenizer: Any
) -> None:
    start = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    plain = GRPOTrainer(
        model=tiny_model,
        reward_funcs=[GuardReward(ScriptedGuardrail(by_length), tokenizer), word_count],
        args=arguments(tmp_path),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
    )
    plain.train()
    after_plain = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    tiny_model.load_state_dict(start)
    ours = shaped(
        tmp_path,
        tiny_model,
        tokenizer,
        ScriptedGuardrail(by_length),
        [],
        shaping=None,
        reward_funcs=[CheckedReward(word_count, "word_count", not_on=())],
    )
    ours.train()
    for key in ("loss", "grad_norm", "reward", "reward_std", "rewards/star/mean", "entropy"):
        logged = [[step[key] for step in trainer.state.log_history if key in step] for trainer in (ours, plain)]
        assert len(logged[0]) == 2, key
        assert logged[0] == logged[1], key
    for name, value in tiny_model.state_dict().items():
        assert torch.equal(value, after_plain[name]), name


def first_word(completion_ids: Any, **_: Any) -> list[float]:
    return [float(n % 2) for n in range(len(completion_ids))]


def test_a_term_of_the_opening_leaves_the_rest_of_a_completion_alone(
    tmp_path: Path, tiny_model: Any, tokenizer: Any
) -> None:
    records: list[StepRecord] = []
    shaped(
        tmp_path,
        tiny_model,
        tokenizer,
        ScriptedGuardrail(lambda exchange, prefix: 0.1),  # equal risks: the only advantage is the reward's
        records,
        reward_funcs=[CheckedReward(first_word, "first_word", not_on=())],
        opening={"first_word": 1},
        args={"max_steps": 1},
    ).train()
    for row, segments in zip(records[0].advantage_NT.tolist(), records[0].scored.segments, strict=True):
        assert all((value != 0) == (k == 0) for value, k in zip(row, segments, strict=False))


@pytest.mark.parametrize("option", [{"opening": {"refusl": 2}}, {"over_batch": ["refusl"]}])
def test_a_term_that_does_not_exist_is_refused_by_name(
    tmp_path: Path, tiny_model: Any, tokenizer: Any, option: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"no reward term 'refusl', .*the terms are star"):
        shaped(tmp_path, tiny_model, tokenizer, ScriptedGuardrail(by_length), [], **option)


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
    mean, spread = statistics.mean(scored), statistics.stdev(scored) + 1e-4  # TRL's own
    expected = [0.0, *(scale * (value - mean) / spread for value in scored)]
    assert records[0].advantage_NT[:4, 0].tolist() == pytest.approx(expected, abs=1e-5)
    logged = trainer.state.log_history[0]
    # Every row's weighted mean is (star + 5) / 2, over the seven scored rows.
    mean_star = statistics.mean(value for value in star if value is not None)
    assert logged["reward/star"] == pytest.approx(mean_star, abs=1e-5)
    assert logged["reward/total"] == pytest.approx((mean_star + 5) / 2, abs=1e-5)
    # TRL's own figure, a sum, leaves the unscored row out as well.
    assert logged["reward"] == pytest.approx(mean_star + 5, abs=1e-5)
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


def test_the_guard_works_in_a_thread_once_a_batch_while_the_other_rewards_are_computed(
    tmp_path: Path, tiny_model: Any, tokenizer: Any
) -> None:
    main, others_began = threading.get_ident(), threading.Event()
    threads: dict[str, int] = {}

    class Waits:
        """Answers once another reward function is at work; in the same thread it would wait in vain."""

        name = "waits"
        calls = 0

        def assess(self, exchanges: Any, cuts: Any) -> Any:
            self.calls += 1
            threads["guard"] = threading.get_ident()
            assert others_began.wait(timeout=60)
            return ScriptedGuardrail(by_length).assess(exchanges, cuts)

    def other(completion_ids: Any, **_: Any) -> list[float]:
        threads["other"] = threading.get_ident()
        others_began.set()
        return [float(len(ids)) for ids in completion_ids]

    records: list[StepRecord] = []
    guard = Waits()
    term = CheckedReward(other, "other", not_on=())
    shaped(tmp_path, tiny_model, tokenizer, guard, records, reward_funcs=[term], args={"max_steps": 1}).train()
    assert guard.calls == 1
    assert threads["other"] == main != threads["guard"]
    # Rows are in their order: every reward belongs to the completion beside it.
    assert records[0].rewards["other"] == [float(len(ids)) for ids in records[0].completion_ids]
    lengths = [len(text) for text in records[0].scored.texts]
    assert [trace.cuts[-1] for trace in records[0].scored.traces] == lengths


def test_after_an_early_stop_tokens_leave_the_loss_and_the_charge_stays(
    tmp_path: Path, tiny_model: Any, tokenizer: Any
) -> None:
    # Two tokens a segment, and the risk is 0 before the first and 1 from it on. The first segment keeps its own score
    # under the debounce (s~_1 = s_1 = 0), so it is the one to stop after.
    records: list[StepRecord] = []
    shaping = ShapingConfig.model_validate({"early_stop": {"enabled": True}})
    guard = ScriptedGuardrail(lambda exchange, prefix: 1.0 if prefix else 0.0)
    trainer = shaped(tmp_path, tiny_model, tokenizer, guard, records, shaping=shaping, args={"max_steps": 1})
    trainer.guard_reward.segments = SegmentOptions(unit="tokens", size=2)
    seen: dict[str, Any] = {}
    original = trainer._compute_loss

    def spy(model: Any, inputs: Any) -> Any:
        seen.update(inputs)
        return original(model, inputs)

    trainer._compute_loss = spy  # type: ignore[method-assign]
    trainer.train()
    record = records[0]
    for n, ids in enumerate(record.completion_ids):
        left = [k == 0 for k in record.scored.segments[n]]
        assert record.in_loss_NT[n, : len(ids)].tolist() == left
        assert not record.in_loss_NT[n, len(ids) :].any()
        assert (record.advantage_NT[n][~record.in_loss_NT[n]] == 0).all()
    assert seen["num_items_in_batch"] == record.in_loss_NT.sum()
    assert (seen["completion_mask"] * seen["tool_mask"]).sum() == record.in_loss_NT.sum()
    # What was sampled stays in the attention mask: cut off, not ended.
    assert seen["completion_mask"].sum() == sum(len(ids) for ids in record.completion_ids)
    assert trainer.state.log_history[0]["loss/masked_share"] == 1.0


ADAPTER = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
WITH_KL = ShapingConfig.model_validate({"kl": {"weight": 0.1}})


def test_the_kl_reference_is_the_model_with_its_adapter_off(tmp_path: Path, tiny_model: Any, tokenizer: Any) -> None:
    records: list[StepRecord] = []
    trainer = shaped(
        tmp_path, tiny_model, tokenizer, ScriptedGuardrail(by_length), records,
        shaping=WITH_KL, peft_config=ADAPTER, args={"max_steps": 2},
    )  # fmt: skip
    trainer.train()
    logged = [step["shaping/log_ratio_to_reference"] for step in trainer.state.log_history[:2]]
    assert logged[0] == 0.0  # a fresh adapter changes nothing
    assert logged[1] != 0.0

    ids = torch.tensor([[5, 6, 7, 8, 9]])
    output = {"prompt_ids": ids[:, :2], "completion_ids": ids[:, 2:]}
    output |= {"prompt_mask": torch.ones(1, 2).long(), "completion_mask": torch.ones(1, 3).long()}
    ratio = log_ratio_to_reference(trainer, output, batch_size=1)
    model = trainer.model.eval()
    with torch.no_grad():
        policy = model(ids).logits.log_softmax(-1)
        with model.disable_adapter():
            reference = model(ids).logits.log_softmax(-1)
    expected = (policy - reference)[:, 1:-1].gather(2, ids[:, 2:, None])[..., 0]
    torch.testing.assert_close(ratio, expected, atol=1e-5, rtol=0)


def test_a_kl_without_a_reference_of_its_own_is_refused(tmp_path: Path, tiny_model: Any, tokenizer: Any) -> None:
    guard = ScriptedGuardrail(by_length)
    with pytest.raises(ConfigError, match="give peft_config"):
        shaped(tmp_path, tiny_model, tokenizer, guard, [], shaping=WITH_KL, args={"max_steps": 1}).train()
    trained = get_peft_model(tiny_model, ADAPTER)
    assert isinstance(trained, PeftModel)
    with pytest.raises(ConfigError, match="merge the adapter first"):
        shaped(tmp_path, trained, tokenizer, guard, [], shaping=WITH_KL)
    with pytest.raises(ConfigError, match="twice"):
        check_options(arguments(tmp_path, beta=0.1), WITH_KL)


def test_after_an_outage_training_resumes_with_the_price_it_had(
    tmp_path: Path, tiny_model: Any, tokenizer: Any
) -> None:
    class FailsAtThird:
        """Risky in every batch, and silent from the third on."""

        name = "fails-at-third"

        def __init__(self) -> None:
            self.calls = 0

        def assess(self, exchanges: Any, cuts: Any) -> Any:
            self.calls += 1
            if self.calls == 3:
                return [RiskTrace.unscored(row, "server down") for row in cuts]
            return [RiskTrace(tuple(row), (0.9,) * len(row)) for row in cuts]

    shaping = ShapingConfig.model_validate({"lagrangian": {"enabled": True, "target": 0.2, "ema": 0.0}})
    changes = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    trainer = shaped(tmp_path, tiny_model, tokenizer, FailsAtThird(), [], shaping=shaping, args=changes)
    with pytest.raises(GuardError, match=r"8 of 8 completions.*at step 2.*server down"):
        trainer.train()
    # Every completion is unsafe: 1 + .05 * (1 - .2) = 1.04 after the first batch, 1.08 after the second.
    assert [step["lagrangian/price"] for step in trainer.state.log_history] == pytest.approx([1.0, 1.04])
    risky = ScriptedGuardrail(lambda exchange, prefix: 0.9)
    again = shaped(tmp_path, tiny_model, tokenizer, risky, [], shaping=shaping, args=changes)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 3
    assert again.state.log_history[-2]["lagrangian/price"] == pytest.approx(1.08)


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
