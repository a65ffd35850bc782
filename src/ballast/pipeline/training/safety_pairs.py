"""Contrastive safety rows: a harmful prompt, the refusal that is right, and the compliance that is not.

B pairs   T positions
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ballast.errors import DataError
from ballast.pipeline.prompting import PromptFormat


@dataclass(frozen=True)
class SafetyPair:
    """Token ids of one prompt and of its two answers, the end-of-turn token included where the answer ends."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


def encode_pairs(
    rows: Sequence[Mapping[str, Any]], prompt_format: PromptFormat, max_length: int = 256
) -> list[SafetyPair]:
    """Token ids of rows of TRL's preference form.

    Args:
        rows: `prompt` (messages, or a text), `chosen` (the refusal) and `rejected` (the harmful answer, or how it would
            begin), each a text or a list with one assistant message.
        prompt_format: the run's.
        max_length: tokens of prompt and answer; longer answers are cut.

    Raises:
        DataError: no row, one that lacks an answer, has the same one twice, or whose prompt leaves no room for it.
    """
    if not rows:
        raise DataError("there are no safety pairs; give at least one row with prompt, chosen and rejected")
    return [_pair(row, n, prompt_format, max_length) for n, row in enumerate(rows)]


def _pair(row: Mapping[str, Any], n: int, prompt_format: PromptFormat, max_length: int) -> SafetyPair:
    name = f"safety pair {row.get('id', n)}"
    lacking = [key for key in ("prompt", "chosen", "rejected") if not row.get(key)]
    if lacking:
        raise DataError(f"{name} has no {lacking[0]}; a row needs prompt, chosen and rejected")
    asked = row["prompt"]
    prompt = tuple(prompt_format.encode(prompt_format.messages(asked) if isinstance(asked, str) else asked))
    room = max_length - len(prompt)
    if room < 1:
        raise DataError(
            f"{name}: its prompt has {len(prompt)} tokens, so max_length = {max_length} leaves no room for an answer; raise it or "
            "drop the row"
        )
    tokenizer = prompt_format.tokenizer

    def answer(text: Any) -> tuple[int, ...]:
        words = text if isinstance(text, str) else text[-1]["content"]
        ids = tokenizer(words, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return tuple([*ids, tokenizer.eos_token_id][:room])

    pair = SafetyPair(prompt, answer(row["chosen"]), answer(row["rejected"]))
    if pair.chosen == pair.rejected:
        raise DataError(
            f"{name}: chosen and rejected are the same within max_length = {max_length}, so they show no direction; mend the row"
        )
    return pair


def contrastive_loss(
    model: Any, pairs: Sequence[SafetyPair], temperature: float = 1.0, pad_token_id: int = 0
) -> torch.Tensor:
    """Mean over pairs of -log sigmoid((log p(chosen) - log p(rejected)) / temperature), answers teacher-forced.

    The log-prob of an answer is the sum over its tokens, each after the prompt and the answer's tokens before it.

    Args:
        model: a causal model; gradients flow into what of it is trained.
        pairs: (B,) the pairs.
        temperature: above 0.
        pad_token_id: what stands where a row is shorter; it changes nothing.

    Returns:
        A scalar in fp32 or finer; above log 2 where the model rather complies.
    """
    answers = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    rows = [[*pair.prompt, *answer] for pair, answer in zip([*pairs, *pairs], answers, strict=True)]
    width, kept = max(map(len, rows)), max(map(len, answers)) + 1
    device = next(model.parameters()).device
    # Padded on the left: the answers end together, and logits are needed of the last positions alone.
    ids = torch.tensor([[pad_token_id] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False, logits_to_keep=kept
    ).logits[:, :-1]
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    log_prob = torch.log_softmax(logits, dim=-1).gather(2, ids[:, -kept + 1 :, None])[..., 0]
    back = torch.arange(kept - 1, 0, -1, device=device)  # 1 is a row's last token
    in_answer = back[None] <= torch.tensor([len(answer) for answer in answers], device=device)[:, None]
    total = log_prob.masked_fill(~in_answer, 0.0).sum(1)
    chosen, rejected = total[: len(pairs)], total[len(pairs) :]
    return -torch.nn.functional.logsigmoid((chosen - rejected) / temperature).mean()
