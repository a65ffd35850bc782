"""GRPO with a guard on two servers that fail while it trains."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tests.guardrails.fault_server import Reply, serving
from trl import GRPOConfig

from ballast.guardrails.registry import load_guardrail
from ballast.pipeline.config_shaping import ShapingConfig
from ballast.pipeline.training.grpo import ShapedGRPOTrainer, StepRecord
from ballast.rewards.guard_reward import GuardReward

pytestmark = pytest.mark.model


def moderate(request: dict[str, Any], attempt: int = 0) -> Reply:
    """The longer the riskier; a sound server scores the empty response too."""
    return Reply({"results": [{"category_scores": {"violence": min(1.0, len(request["input"]) / 100)}}]})


def test_the_training_goes_on_with_one_server_killed_and_one_slow(
    tmp_path: Path, tiny_model: Any, tokenizer: Any
) -> None:
    records: list[StepRecord] = []
    with serving(moderate) as killed, serving(moderate) as slow:

        def fail(record: StepRecord) -> None:
            records.append(record)
            if len(records) == 1:
                killed.kill()
                slow.script = lambda request, attempt: Reply(moderate(request).body, delay_s=0.2)

        guard = load_guardrail("moderation", base_url=[killed.url, slow.url], backoff_s=0.01)
        trainer = ShapedGRPOTrainer(
            model=tiny_model,
            args=GRPOConfig(
                output_dir=str(tmp_path),
                max_steps=3,
                per_device_train_batch_size=4,
                num_generations=4,
                max_completion_length=12,
                bf16=False,
                report_to="none",
                save_strategy="no",
                logging_steps=1,
                disable_tqdm=True,
                gradient_checkpointing=False,
                use_cpu=True,
                seed=3,
            ),
            guard_reward=GuardReward(guard, tokenizer),
            train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "How are you?"}]}]),
            processing_class=tokenizer,
            on_batch=fail,
            shaping=ShapingConfig(),
        )
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "guard/requests" in entry]
    assert len(records) == len(logged) == 3
    assert all(trace.scored for record in records for trace in record.scored.traces)
    assert [entry["risk/unscored_share"] for entry in logged] == [0.0, 0.0, 0.0]
    assert [entry["guard/servers_left_out"] for entry in logged] == [0.0, 1.0, 1.0]
    assert logged[0]["guard/failed_requests"] == 0.0
    assert logged[1]["guard/failed_requests"] >= 3.0
