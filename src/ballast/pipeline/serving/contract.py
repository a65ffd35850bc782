"""The contract at the door: what a model server really makes of conversations, against what the contract says."""

from collections.abc import Callable, Sequence
from pathlib import Path

from ballast.errors import DataError, ModelError
from ballast.guardrails.types import Message
from ballast.pipeline.model_record import RECORD, check_record, read_contract
from ballast.pipeline.prompting import PromptFormat
from ballast.pipeline.template_contract import probe_differences


def served_format(folder: Path, adopt: bool = False, system_prompt: str | None = None) -> PromptFormat:
    """The prompt format of a model folder, which is still the one of its training.

    Args:
        folder: with tokenizer, weights and record.
        adopt: where there is no record, take the folder's tokenizer as it is.
        system_prompt: the system prompt in that case.

    Returns:
        The format of training; its `serving()` is what is served.

    Raises:
        ModelError: there is no record, or the folder is not what it says.
    """
    from transformers import AutoTokenizer

    contract = read_contract(folder)
    if contract is None and not adopt:
        raise ModelError(
            f"model folder '{folder}' has no template contract ({RECORD}), so nothing says under which template and system prompt it "
            "is safe; serve a folder that `ballast run` has made, or take its tokenizer as it is with --adopt-template (and "
            "--system-prompt TEXT)"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the tokenizer of '{folder}' cannot be loaded ({str(error).splitlines()[0]}); save it beside the weights"
        ) from error
    if contract is None:
        return PromptFormat(tokenizer, system_prompt)
    if system_prompt is not None and system_prompt != contract.served_system_prompt:
        raise ModelError(
            f"'{folder}' has a contract, whose system prompt is served; leave --system-prompt out, or train under the other one"
        )
    serving = contract.serving_system_prompt if contract.policy == "ptst" else None
    found = PromptFormat(tokenizer, contract.system_prompt, contract.policy, serving)
    check_record(folder, found, serving=True)
    return found


def check_served(prompt_format: PromptFormat, tokenize: Callable[[Sequence[Message]], Sequence[int]]) -> bool:
    """A model server must give the probe conversations the ids that the contract gives them.

    Args:
        prompt_format: the format of serving.
        tokenize: what the server makes of a conversation, generation prompt included.

    Returns:
        Whether the server reads special tokens in a user's text as special tokens. Such text must then be kept from it:
        a user could end the own turn and begin another's.

    Raises:
        ModelError: an ordinary conversation has other ids, or one with special tokens in its text has ids that come
            from neither reading; with the difference.
    """
    spoofed = False
    expected: dict[str, list[int] | str] = {}
    reported: dict[str, list[int] | str] = {}
    for name, messages in prompt_format.probes().items():
        special = any(prompt_format.holds_special(message["content"]) for message in messages)
        try:
            ours = prompt_format.encode_exactly(messages)
        except DataError:  # the template rewrites text, so that only the other reading is left
            ours = []
        except ModelError:  # the template takes no such conversation
            continue
        ids = list(tokenize(messages))
        if special and ids != ours:
            ours, spoofed = prompt_format.encode_naively(messages), True
        expected[name], reported[name] = ours, ids
    told = probe_differences(expected, reported, prompt_format.decode)
    if told:
        raise ModelError(
            "the model server does not tokenise as the contract says (here: what it reports):\n  "
            + "\n  ".join(told)
            + "\nIt would answer under a template that the model was not trained with. Give it the folder's own tokenizer and chat "
            "template, and no --chat-template or --tokenizer of another model"
        )
    return spoofed
