"""TRL's SFT seams: a change upstream fails here, by name. Read against TRL 1.16."""

import inspect

from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_the_loss_is_summed_from_the_log_probs_of_one_fused_call() -> None:
    assert parameters(SFTTrainer.compute_loss) == ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]
    source = inspect.getsource(SFTTrainer.compute_loss)
    assert (
        "outputs = model(**inputs, fused_lm_head=True)\n                    per_token_loss = -outputs.log_probs"
        in source
    )
    assert "num_tokens = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch" in source
    assert "loss = per_token_loss.sum() / torch.as_tensor(num_tokens).clamp(min=1)" in source


def test_the_columns_that_reach_the_collator_are_a_list_that_can_grow() -> None:
    assert parameters(SFTTrainer._set_signature_columns_if_needed) == ["self"]
    source = inspect.getsource(SFTTrainer._set_signature_columns_if_needed)
    assert 'self._signature_columns = ["input_ids", "labels", "seq_lengths"]' in source


def test_the_collator_pads_on_the_right_in_one_method() -> None:
    assert parameters(DataCollatorForLanguageModeling.torch_call) == ["self", "examples"]
    source = inspect.getsource(DataCollatorForLanguageModeling.torch_call)
    assert source.count('padding_side="right"') == source.count("padding_side=")


def test_the_fused_head_runs_the_backbone_as_a_module_and_the_output_can_be_changed() -> None:
    # A forward hook on `base_model` sees the hidden states that the log-probs are made from.
    source = inspect.getsource(add_fused_lm_head)
    assert 'backbone_attr = "base_model"' in source
    assert "backbone_outputs = getattr(self, backbone_attr)(*args, **kwargs)" in source
    assert "hidden_states = backbone_outputs.last_hidden_state[:, :-1]" in source
    output = FusedCausalLMOutput(log_probs=1)  # type: ignore[arg-type]
    output.log_probs = 2  # type: ignore[assignment]
    assert output.log_probs == 2
