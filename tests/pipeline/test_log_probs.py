"""Log-probabilities of given answers: what every generator must agree on."""

import pytest
import torch

from ballast.pipeline.generation import ScriptedGenerator, TransformersGenerator, VLLMGenerator

pytestmark = pytest.mark.model

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
ANSWERS = [[20, 21, 22, 23], [24], [25, 26]]


def by_hand(model, prompt, answer):
    """One row alone, without padding: log p(answer token | all tokens before it)."""
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0].float().log_softmax(dim=-1)
    return [logits[len(prompt) + i - 1, token].item() for i, token in enumerate(answer)]


def test_a_padded_batch_gives_what_each_row_gives_alone(tiny_model, tokenizer):
    generator = TransformersGenerator(tiny_model.eval(), tokenizer, batch_size=2)
    done = []
    found = generator.log_probs(PROMPTS, ANSWERS, done.append)
    for row, prompt, answer in zip(found, PROMPTS, ANSWERS, strict=True):
        assert row == pytest.approx(by_hand(tiny_model, prompt, answer), abs=1e-5)
    assert done == [2, 1]


def test_a_script_gives_every_token_of_an_answer_the_same(tokenizer):
    generator = ScriptedGenerator(lambda ids, seed: "", tokenizer, log_prob=lambda ids, text: -float(len(text)))
    answer = tokenizer("Four", add_special_tokens=False)["input_ids"]
    assert generator.log_probs([[5]], [answer]) == [[-4.0] * len(answer)]


@pytest.mark.vllm
def test_vllm_and_transformers_agree(vllm_engine, embedded_folder, tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(embedded_folder, dtype=torch.bfloat16).eval()
    prompts = [tokenizer(text)["input_ids"] for text in ("The capital of France is", "Two plus two is")]
    answers = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" Paris, on the Seine.", " four.")]
    expected = TransformersGenerator(model, tokenizer).log_probs(prompts, answers)
    found = VLLMGenerator(vllm_engine, tokenizer).log_probs(prompts, answers)
    for row, others in zip(found, expected, strict=True):
        assert row == pytest.approx(others, abs=0.2)  # bfloat16 on both sides
