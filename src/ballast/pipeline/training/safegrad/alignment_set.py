"""The alignment set: answers that the model should go on giving, as token batches that are the same at every visit.

    B rows   T positions   M completion tokens of a batch

The rows of a batch never change, so that a reference that was computed once is compared with the very same numbers:
before the first update the KL is exactly 0, in bf16 too.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ballast.errors import DataError
from ballast.pipeline.prompting import PromptFormat

_FORMS = "give conversational 'prompt' and 'completion' (lists of messages), both as text, or 'input_ids' with 'completion_mask'"


@dataclass(frozen=True)
class AlignmentBatch:
    """Padded rows.

    Attributes:
        input_ids: (B, T), padded on the right.
        attention_mask: (B, T), 0 at padding.
        predicts: (B, T - 1) where the next token belongs to a completion; M of them.
        labels: (M,) those next tokens.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    predicts: torch.Tensor
    labels: torch.Tensor

    def to(self, device: Any) -> "AlignmentBatch":
        """The batch on a device."""
        return AlignmentBatch(*(tensor.to(device) for tensor in vars(self).values()))


def alignment_batches(
    dataset: Any, tokenizer: Any, batch_size: int, max_length: int | None, context: int | None
) -> list[AlignmentBatch]:
    """Token batches of an alignment set.

    Args:
        dataset: rows as TRL takes them: `prompt` and `completion`, conversational or text; or tokenised, `input_ids` with
            `completion_mask` or `labels`.
        tokenizer: renders and encodes them; tokenised rows need none but for its padding.
        batch_size: rows a batch; the last batch may have fewer.
        max_length: tokens of prompt and completion; a longer completion is cut. None cuts nothing.
        context: positions that the model has; None where it has no limit.

    Raises:
        DataError: no row; a row of another form, without a completion, whose prompt leaves no room for one, or longer
            than the context where nothing is cut.
    """
    rows = [_encoded(number, row, tokenizer) for number, row in enumerate(dataset)]
    if not rows:
        raise DataError(
            "the alignment set of SafeGrad has no rows, so there is no safety gradient; give 10 to 20 harmful prompts with refusals"
        )
    rows = [_fitted(number, *row, max_length, context) for number, row in enumerate(rows)]
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    return [_padded(rows[start : start + batch_size], pad) for start in range(0, len(rows), batch_size)]


def batch_number(visit: int, n_batches: int, seed: int) -> int:
    """Which batch the visit reads: every batch once a pass, in an order that the seed and the pass decide."""
    turn, place = divmod(visit, n_batches)
    return random.Random(f"{seed}/{turn}").sample(range(n_batches), n_batches)[place]


def _encoded(number: int, row: Any, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Token ids, and which of them belong to the completion."""
    if "input_ids" in row:
        return _tokenised(number, row)
    if "prompt" not in row or "completion" not in row:
        raise DataError(f"alignment row {number} has the columns {', '.join(sorted(row))}; {_FORMS}")
    if tokenizer is None:
        raise DataError(
            f"alignment row {number} is text, and the trainer has no tokenizer; give the Trainer a processing_class, or SafeGrad a tokenizer"
        )
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        prompt_ids = tokenizer(prompt)["input_ids"]
        # Many tokenizers end with no end-of-text token; the policy has to know where a refusal ends.
        answer_ids = [*_text_ids(tokenizer, completion), tokenizer.eos_token_id] if completion else []
    elif isinstance(prompt, str) or isinstance(completion, str):
        raise DataError(f"alignment row {number}: prompt and completion have different forms; {_FORMS}")
    else:
        prompt_ids, answer_ids = _conversation(number, prompt, completion, tokenizer)
    return [*prompt_ids, *answer_ids], [False] * len(prompt_ids) + [True] * len(answer_ids)


def _tokenised(number: int, row: Any) -> tuple[list[int], list[bool]]:
    ids = [int(i) for i in row["input_ids"]]
    if "completion_mask" in row:
        mask = [bool(m) for m in row["completion_mask"]]
    elif "labels" in row:
        mask = [label != -100 for label in row["labels"]]
    else:
        raise DataError(f"alignment row {number} has input_ids and neither completion_mask nor labels; {_FORMS}")
    if len(mask) != len(ids):
        raise DataError(
            f"alignment row {number} has {len(ids)} input_ids and a mask of {len(mask)}; make them equally long"
        )
    return ids, mask


def _conversation(
    number: int, prompt: Sequence[Any], completion: Sequence[Any], tokenizer: Any
) -> tuple[list[int], list[int]]:
    if not any(message.get("content") for message in completion):
        return [0], []  # refused with all other rows that have no completion
    prompt_ids = PromptFormat(tokenizer).encode(list(prompt))
    before = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
    if not whole.startswith(before):
        raise DataError(
            f"alignment row {number}: the chat template renders the prompt differently when a completion follows, so the completion "
            "has no clear beginning; give the row as input_ids with completion_mask"
        )
    answer, text = whole[len(before) :], completion[0]["content"]
    if len(completion) > 1 or not answer.startswith(text):
        return prompt_ids, tokenizer(answer, add_special_tokens=False)["input_ids"]
    end = tokenizer(answer[len(text) :], add_special_tokens=False)["input_ids"]
    return prompt_ids, [*_text_ids(tokenizer, text), *end]


def _text_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of text that somebody wrote: the name of a special token in it stays text."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


def _fitted(
    number: int, ids: list[int], mask: list[bool], max_length: int | None, context: int | None
) -> tuple[list[int], list[bool]]:
    if not any(mask[1:]):
        raise DataError(
            f"alignment row {number} has no completion token, and the KL is over completion tokens alone; give it an answer or drop it"
        )
    if max_length is None and context is not None and len(ids) > context:
        raise DataError(
            f"alignment row {number} has {len(ids)} tokens, and the model reads {context}; set max_length to {context} or less to cut "
            "completions there, or drop the row"
        )
    if max_length is not None and context is not None and max_length > context:
        raise DataError(
            f"max_length = {max_length} of the alignment set is beyond the {context} tokens that the model reads; lower it"
        )
    ids, mask = ids[:max_length], mask[:max_length]
    if not any(mask[1:]):
        raise DataError(
            f"alignment row {number}: its prompt fills max_length = {max_length} and leaves no room for its completion; raise "
            "max_length or drop the row"
        )
    # What follows the last completion token changes nothing before it.
    width = len(mask) - mask[::-1].index(True)
    return ids[:width], mask[:width]


def _padded(rows: Sequence[tuple[list[int], list[bool]]], pad: int) -> AlignmentBatch:
    width = max(len(ids) for ids, _ in rows)
    ids_BT = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows])
    attention_BT = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    predicts = torch.tensor([mask[1:] + [False] * (width - len(mask)) for _, mask in rows])
    return AlignmentBatch(ids_BT, attention_BT, predicts, ids_BT[:, 1:][predicts])
