"""Sixteen clients at once for two minutes, with real vLLM: nothing unguarded, nothing lost, nothing left over."""

import asyncio
import json
import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from tests.pipeline.serving.live_server import KEY, descendants, resident_mb, sockets, started

from ballast.pipeline.model_record import write_record
from ballast.pipeline.prompting import PromptFormat

pytestmark = [pytest.mark.long, pytest.mark.model, pytest.mark.vllm, pytest.mark.timeout(900)]

CLIENTS, SECONDS = 16, 120.0
FORBIDDEN = "because"  # a word that the model writes now and then
SAFE = "I can't continue with this answer."
QUESTIONS = (
    "Why is the sky blue?", "Name three fruits.", "Explain why bread rises.", "Write a line about rain.",
    "What is a prime number?", "Why do cats purr?", "Give me a tip for a good night's sleep.", "Who wrote Hamlet?",
)  # fmt: skip


@dataclass
class Answer:
    """What one client got: the text, how it ended, and the id under which the gateway recorded it."""

    request: str = ""
    text: str = ""
    finish: str | None = None
    done: bool = False
    left: bool = False
    first_s: float = 0.0


async def ask(client, url, rng):
    """One streamed answer; one in eight clients leaves in the middle."""
    leaves_after = rng.randint(1, 4) if rng.random() < 1 / 8 else None
    body = {
        "model": "tuned", "stream": True, "max_tokens": 48, "temperature": 1.0, "seed": rng.randrange(2**31),
        "messages": [{"role": "user", "content": rng.choice(QUESTIONS)}],
    }  # fmt: skip
    answer, pieces, began = Answer(), 0, time.monotonic()
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        answer.request = response.headers["x-request-id"]
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                answer.done = True
                continue
            if not line.startswith("data: "):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            for choice in event["choices"]:
                answer.text += choice["delta"].get("content") or ""
                answer.finish = choice["finish_reason"] or answer.finish
                pieces += bool(choice["delta"].get("content"))
            answer.first_s = answer.first_s or (time.monotonic() - began if pieces else 0.0)
            if leaves_after is not None and pieces >= leaves_after:
                answer.left = True
                return answer
    return answer


async def load(url, pid):
    """Answers of all clients, and the gateway's resident memory after a minute and at the end."""
    answers, began, memory = [], time.monotonic(), {}
    headers = {"Authorization": f"Bearer {KEY}"}
    limits = httpx.Limits(max_connections=None)

    async def client_of(number):
        rng = random.Random(number)
        async with httpx.AsyncClient(headers=headers, timeout=120, trust_env=False, limits=limits) as client:
            while time.monotonic() - began < SECONDS:
                answers.append(await ask(client, url, rng))

    async def watch():
        await asyncio.sleep(SECONDS / 2)
        memory["middle"] = resident_mb(pid)
        await asyncio.sleep(SECONDS / 2 - 1)
        memory["end"] = resident_mb(pid)

    await asyncio.gather(watch(), *(client_of(number) for number in range(CLIENTS)))
    return answers, memory


def audited(path):
    """By request: the segments with their decisions, and how it ended."""
    segments, ends = {}, {}
    for line in path.read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "ended":
            ends[event["request"]] = event
        else:
            segments.setdefault(event["request"], []).append(event)
    return segments, ends


def test_two_minutes_of_sixteen_clients(embedded_folder, tokenizer, tmp_path):
    folder, audit = tmp_path / "tuned", tmp_path / "audit.jsonl"
    shutil.copytree(embedded_folder, folder)
    write_record(folder, PromptFormat(tokenizer, "You are a helpful assistant."))
    guards = [{"type": "embedded"}, {"type": "rules", "patterns": [{"pattern": FORBIDDEN}]}]
    guard = json.dumps({"type": "ensemble", "members": guards, "combine": "max"})
    words = [f"serve.guard={guard}", f"serve.audit.path={audit}", "serve.audit.text=true"]
    words += ["serve.limits.requests_per_minute=0", "serve.guarding.timeout_s=60"]
    with started(folder, *words) as (process, url):
        idle = sockets(process.pid)
        answers, memory = asyncio.run(load(url, process.pid))
        time.sleep(2)
        metrics = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {KEY}"}, trust_env=False).text
        assert "ballast_gateway_in_flight 0.0" in metrics
        assert sockets(process.pid) <= idle + 32  # at most the connections to vLLM that are kept for the next request
        below = [pid for pid, _ in descendants(process.pid)]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        time.sleep(2)  # a killed process is gone once its parent, or init in its place, has seen it end
    segments, ends = audited(audit)
    stayed = [answer for answer in answers if not answer.left]
    first = sorted(answer.first_s for answer in stayed)
    print(
        f"\n{len(answers)} answers, {len(answers) - len(stayed)} left by their clients, "
        f"{sum(a.finish == 'content_filter' for a in stayed)} blocked; median time to the first segment {first[len(first) // 2]:.2f} s; "
        f"gateway {memory['middle']:.0f} MB after a minute, {memory['end']:.0f} MB at the end"
    )
    assert len(stayed) > CLIENTS
    assert any(answer.left for answer in answers)
    # No request is lost: each was answered to its end, and recorded once.
    assert all(answer.done and answer.finish in ("stop", "length", "content_filter") for answer in stayed)
    assert set(ends) == {answer.request for answer in answers}
    # No unguarded byte: what a client got is what was judged and released, in order, and nothing else.
    for answer in answers:
        judged = segments.get(answer.request, [])
        released = "".join(one["text"] for one in judged if one["event"] == "released")
        assert all(one["risk"] < 0.5 for one in judged if one["event"] == "released")
        assert {one["event"] for one in judged} <= {"released", "blocked"}
        if answer.left:
            assert released.startswith(answer.text.removesuffix(SAFE).removesuffix("\n\n"))
        elif answer.finish == "content_filter":
            assert judged[-1]["event"] == "blocked"
            assert answer.text == (f"{released}\n\n{SAFE}" if released else SAFE)
        else:
            assert answer.text == released
        assert FORBIDDEN not in answer.text.lower()
    assert any(answer.finish == "content_filter" for answer in stayed)
    # Nothing grows, and nothing stays.
    assert memory["end"] - memory["middle"] < 20
    assert [pid for pid in below if Path(f"/proc/{pid}").exists()] == []
