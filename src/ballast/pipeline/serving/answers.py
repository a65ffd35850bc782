"""Answers in OpenAI's shapes, written anew from what was released: nothing of the model server's own passes through."""

import json
import time
from typing import Any

from ballast.pipeline.serving.problems import Problem
from ballast.pipeline.serving.release import Ended
from ballast.pipeline.serving.requests import Ask

DONE = b"data: [DONE]\n\n"


class Shape:
    """One answer's shape: chat or completion, whole or in chunks."""

    def __init__(self, ask: Ask, request_id: str) -> None:
        self._ask = ask
        self._head = {"id": request_id, "created": int(time.time()), "model": ask.model}

    def first(self) -> bytes:
        """What a streamed chat answer begins with."""
        return self._chunk({"role": "assistant", "content": ""}, None) if self._ask.chat else b""

    def text(self, text: str) -> bytes:
        """A chunk with released text."""
        return self._chunk({"content": text}, None) if self._ask.chat else self._chunk(text, None)

    def last(self, end: Ended) -> bytes:
        """The chunks that end a streamed answer."""
        chunks = self._chunk({} if self._ask.chat else "", end.finish)
        if self._ask.include_usage and end.usage is not None:
            chunks += event({**self._head, "object": self._object, "choices": [], "usage": end.usage.model_dump()})
        return chunks + DONE

    def whole(self, text: str, end: Ended) -> dict[str, Any]:
        """The answer in one piece."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": end.finish, "logprobs": None}
        if self._ask.chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        answer = {**self._head, "object": self._object.removesuffix(".chunk"), "choices": [choice]}
        return answer if end.usage is None else {**answer, "usage": end.usage.model_dump()}

    @property
    def _object(self) -> str:
        return "chat.completion.chunk" if self._ask.chat else "text_completion"

    def _chunk(self, content: Any, finish: str | None) -> bytes:
        choice = {"index": 0, "finish_reason": finish, "logprobs": None}
        choice["delta" if self._ask.chat else "text"] = content
        return event({**self._head, "object": self._object, "choices": [choice]})


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def failure(problem: Problem) -> bytes:
    """How a client is told of a failure in the middle of a streamed answer; no [DONE] follows."""
    return event(problem.body)
