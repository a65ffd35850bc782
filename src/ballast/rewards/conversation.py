"""Prompts as TRL hands them over, in the form that guards read."""

from typing import Any

from ballast.guardrails.types import Message


def as_messages(prompt: Any) -> tuple[Message, ...]:
    """A conversation: of a list of role/content messages, or of a plain string as the user's one message."""
    if isinstance(prompt, str):
        return ({"role": "user", "content": prompt},)
    return tuple({"role": str(m["role"]), "content": str(m["content"])} for m in prompt)
