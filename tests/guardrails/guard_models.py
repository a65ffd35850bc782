"""Tiny guards in the style of the families: templates of our own words, the structure of theirs.

A tokenizer is the embedded model's, with the special tokens and the BOS habit of a family. A model is a random
Llama whose output layer is solved so that on the two toys of the self-check it says the right label.
"""

from pathlib import Path
from typing import Any

# Roles by parity, contents stripped, a literal BOS behind a space; ends before the newlines of the verdict.
LLAMA = (
    "{% if messages | length % 2 == 0 %}{% set judged = 'Agent' %}{% else %}{% set judged = 'User' %}{% endif %}"
    " <|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
    "Rate the last {{ judged }} turn.\n\n<BEGIN CONVERSATION>\n\n"
    "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}"
    "{{ 'User' if loop.index0 % 2 == 0 else 'Agent' }}: {{ message.content | trim }}\n\n{% endfor %}"
    "<END CONVERSATION>\n\nOne word.<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
)

# The same, showing typed parts only, as the multimodal ones do. (A newline behind a block would be dropped.)
LLAMA_TYPED = LLAMA.replace(
    "{{ message.content | trim }}",
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text | trim }}{% endif %}{% endfor %}{{ '' }}",
)

# The whole dialogue in one user turn, the guard's turn opened with an empty thought.
QWEN = (
    "<|im_start|>user\nJudge the {{ messages[-1].role }}.\n\n"
    "{% for message in messages %}{{ message.role | upper }}: {{ message.content }}\n\n{% endfor %}"
    "Answer in one line.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)

# A criterion by name, the date of today, the last two messages.
GRANITE_3_0 = (
    "<|start_of_role|>system<|end_of_role|>Today is {{ strftime_now('%d %B %Y') }}. "
    "Look for {{ guardian_config.risk_name }}.<|end_of_text|>\n"
    "{% for message in messages[-2:] %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "Yes or No?{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)
GRANITE_3_3 = GRANITE_3_0.replace("risk_name", "criteria_id").replace(
    "Yes or No?", "{{ 'Think.' if think else 'Do not think.' }}"
)
GRANITE_4_1 = (
    "{% for message in messages %}<|start_of_role|>{{ message.role }}<|end_of_role|>{{ message.content }}"
    "<|end_of_text|>\n{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)

# One guideline a prompt, which stands behind the answer.
SHIELD = (
    "{{ bos_token }}Does the answer break the rule?\n\n<start_of_turn>\nHuman: {{ messages[-2].content | trim }}\n\n"
    "Bot: {{ messages[-1].content | trim }}\n<end_of_turn>\n\nThe rule:\n\n{{ guideline | trim }}\n\nYes or No?\n\n"
)

SPECIAL = {
    "llama": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "qwen": ["<|im_start|>", "<|im_end|>"],
    "granite": ["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"],
    "shield": ["<bos>", "<start_of_turn>", "<end_of_turn>"],
}


def family_tokenizer(base: Any, family: str, template: str | None) -> Any:
    """A copy of the embedded model's tokenizer with a family's special tokens, BOS and template."""
    import copy

    from tokenizers.processors import TemplateProcessing
    from transformers import AddedToken

    tokenizer = copy.deepcopy(base)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[family]})
    # Added, but not special: what `split_special_tokens` does not know.
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    if family in ("llama", "shield"):
        bos = SPECIAL[family][0]
        tokenizer.bos_token = bos
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))]
        )
    else:
        tokenizer.bos_token = None
    tokenizer.chat_template = template
    return tokenizer


def save_model(folder: Path, tokenizer: Any, context: int = 512) -> None:
    """A random two-layer Llama and the tokenizer, as a model folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.3,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def teach(folder: Path, guard: Any) -> None:
    """Solve the output layer so that after each policy's toys the model says `safe` and `unsafe` as it should.

    Label rows w solve H w = target for the final states H of the toys, all other rows are 0: the right label's
    logit is 20, the other's 17, and the rest of the vocabulary's 0, so the label mass is above .999.
    """
    import torch

    from ballast.guardrails.families.verdict import TOY_SAFE, TOY_UNSAFE

    renderer, engine = guard._load()
    model, labels = engine.model, guard._labels(renderer)
    with torch.inference_mode():
        states, right = [], []
        for toy, unsafe in ((TOY_SAFE, False), (TOY_UNSAFE, True)):
            for ids in renderer.render(toy.messages, toy.response):
                states.append(model.model(torch.tensor([ids])).last_hidden_state[0, -1])
                right.append(unsafe)
        inverse = torch.linalg.pinv(torch.stack(states).double())  # (hidden, toys)
        truth = torch.tensor(right).double()
        weight = torch.zeros_like(model.lm_head.weight)
        for rows, target in ((labels.unsafe, 17 + 3 * truth), (labels.safe, 20 - 3 * truth)):
            weight[list(rows)] = (inverse @ target).to(weight.dtype)
    model.lm_head.weight.data.copy_(weight)
    model.save_pretrained(folder)
