"""TRL's hooks that we override: a change upstream fails here, by name. Read against TRL 1.16."""

import inspect

from trl import GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import grpo_trainer


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_generation_and_scoring_is_one_overridable_method() -> None:
    assert parameters(GRPOTrainer._generate_and_score_completions) == ["self", "inputs"]
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    for key in ("advantages", "completion_ids", "completion_mask", "num_items_in_batch", "tool_mask"):
        assert f'"{key}"' in source


def test_the_loss_takes_advantages_per_token_and_a_second_mask() -> None:
    source = inspect.getsource(GRPOTrainer._compute_loss)
    assert "if advantages.dim() == 1:" in source
    assert 'completion_mask * inputs["tool_mask"]' in source


def test_rewards_are_calculated_in_one_method_and_asynchronous_ones_last() -> None:
    method = GRPOTrainer._calculate_rewards
    assert parameters(method) == ["self", "inputs", "prompts", "completions", "completion_ids_list"]
    source = inspect.getsource(method)
    assert source.index("output_reward_func = reward_func(") < source.index("asyncio.gather(")
    assert "rewards_per_func = gather(rewards_per_func)" in source
    scoring = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert "unscorable_mask = torch.isnan(rewards_per_func).all(dim=1)" in scoring


def test_log_probs_of_tokens_come_from_one_method() -> None:
    names = parameters(GRPOTrainer._get_per_token_logps_and_entropies)
    assert names[:6] == ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]


def test_prompts_are_tokenised_in_one_method_that_returns_three_things() -> None:
    assert parameters(GRPOTrainer._tokenize_prompts) == ["self", "prompts"]
    assert "return prompt_ids, images, multimodal_fields" in inspect.getsource(GRPOTrainer._tokenize_prompts)


def test_generation_by_vllm_is_named_in_the_trainers_module() -> None:
    assert grpo_trainer.VLLMGeneration is VLLMGeneration
    assert "self.vllm_generation = VLLMGeneration(" in inspect.getsource(GRPOTrainer.__init__)


def test_vllm_generation_has_the_two_methods_that_are_replaced() -> None:
    assert parameters(VLLMGeneration._init_vllm) == ["self"]
    assert parameters(VLLMGeneration.sync_weights) == ["self"]
    assert "self.llm.generate(" in inspect.getsource(VLLMGeneration.generate)
