"""What the gateway costs: time to the first token and throughput of streamed answers, against bare vLLM.

    python benchmarks/gateway.py --out benchmarks/results/gateway.json

One vLLM server of the embedded model; in front of it, each in a process of its own, gateways with no guard, with the
rules guard and with the embedded guard. In each round every way is asked by `--clients` clients at once for the same
greedy answers, in an order that turns, so that ratios are of neighbours in time. Answers have `--tokens` tokens each,
so that all ways write as much. The gateways' threshold is above any risk that occurs, so that no answer is cut.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from demo_seeds import hardware

KEY = "key-of-this-benchmark"
MODEL = "model"
WAYS: dict[str, dict[str, Any] | None] = {
    "bare vLLM": None,
    "gateway, no guard": {"unguarded": True},
    "gateway, rules": {"guard": {"type": "rules"}},
    "gateway, embedded": {"guard": {"type": "embedded"}},
}
QUESTIONS = (
    "Why is the sky blue?", "Name three fruits.", "Explain why bread rises.", "Write a poem about rain.",
    "What is a prime number?", "Why do cats purr?", "How do I sleep better?", "Who wrote Hamlet?",
)  # fmt: skip


@dataclass
class Round:
    """One way in one round: wall seconds, tokens of all answers, seconds to each answer's first text."""

    seconds: float
    tokens: int
    first: list[float]

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="JSON to write")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--answers", type=int, default=2, help="answers a client and round")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gateway", nargs=2, metavar=("UPSTREAM", "SETTINGS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.gateway:
        run_gateway(*args.gateway)
        return
    from ballast.models import embedded_model
    from ballast.pipeline.serving.model_server import ModelServer, ServerOptions

    options = ServerOptions(model=str(embedded_model()), name=MODEL, max_model_len=512, enforce_eager=True)
    with tempfile.TemporaryDirectory() as folder, ModelServer(options, Path(folder) / "vllm.log") as vllm:
        vllm.wait(600)
        gateways = {name: Gateway(vllm, settings) for name, settings in WAYS.items() if settings is not None}
        try:
            urls = {name: (gateways[name].url, KEY) if name in gateways else (vllm.url, vllm.key) for name in WAYS}
            rounds = asyncio.run(measure(urls, args))
        finally:
            for gateway in gateways.values():
                gateway.close()
    result = {
        "command": " ".join(["python", *sys.argv]),
        "hardware": hardware(),
        "clients": args.clients,
        "answers_a_round": args.clients * args.answers,
        "tokens_an_answer": args.tokens,
        "ways": {name: summary(rounds, name) for name in WAYS},
    }
    print(table(result["ways"]))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


class Gateway:
    """A gateway in a process of its own, without a contract: what is measured is the way, not the check."""

    def __init__(self, vllm: Any, settings: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--gateway", vllm.url, json.dumps(settings)],
            env={**os.environ, "BALLAST_API_KEYS": KEY, "UPSTREAM_KEY": vllm.key},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()
        if not self.url:
            raise SystemExit("the gateway did not start; see above")

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(30)


def run_gateway(upstream: str, settings: str) -> None:
    """What the child process does."""
    from ballast.guardrails.registry import load_guardrail
    from ballast.pipeline.config_serve import ServeConfig
    from ballast.pipeline.serving.app import create_app
    from ballast.pipeline.serving.server import listen, serve

    limits = {"requests_per_minute": 0, "concurrent": 256}
    config = ServeConfig.model_validate(
        {"limits": limits, "guarding": {"threshold": 1.0, "timeout_s": 60}, **json.loads(settings)}
    )
    guard = None if config.guard is None else load_guardrail(config.guard)
    app = create_app(config, upstream, guard, models=[MODEL], upstream_key=os.environ["UPSTREAM_KEY"])
    sock = listen("127.0.0.1", 0, 30)
    serve(app, sock, lambda: print(f"http://127.0.0.1:{sock.getsockname()[1]}", flush=True))


async def measure(urls: dict[str, tuple[str, str]], args: argparse.Namespace) -> list[dict[str, Round]]:
    """Every way in every round, after one round that is not counted."""
    rounds, names = list[dict[str, Round]](), list(urls)
    for number in range(args.rounds + 1):
        turned = names[number % len(names) :] + names[: number % len(names)]
        found = {name: await one_round(*urls[name], args) for name in turned}
        if number:
            rounds.append(found)
        rates = ", ".join(f"{name} {found[name].rate:.0f}" for name in names)
        print(f"round {number}{'' if number else ' (not counted)'}, tokens/s: {rates}", flush=True)
    return rounds


async def one_round(url: str, key: str, args: argparse.Namespace) -> Round:
    """All clients ask one way for their answers, one after the other."""
    first, tokens = list[float](), 0
    began = time.perf_counter()

    async def client_of(number: int) -> None:
        nonlocal tokens
        async with httpx.AsyncClient(
            base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=300, trust_env=False
        ) as client:
            for answer in range(args.answers):
                question = QUESTIONS[(number + answer) % len(QUESTIONS)]
                seconds, count = await ask(client, question, args.tokens)
                first.append(seconds)
                tokens += count

    await asyncio.gather(*(client_of(number) for number in range(args.clients)))
    return Round(time.perf_counter() - began, tokens, first)


async def ask(client: httpx.AsyncClient, question: str, tokens: int) -> tuple[float, int]:
    """Seconds to the first text of one streamed answer, and its tokens."""
    body = {
        "model": MODEL, "messages": [{"role": "user", "content": question}], "max_tokens": tokens, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    began, first, count = time.perf_counter(), None, 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise SystemExit(f"an answer failed: {event['error']}")
            if first is None and any(choice["delta"].get("content") for choice in event["choices"]):
                first = time.perf_counter() - began
            count = (event.get("usage") or {}).get("completion_tokens", count)
    if first is None:
        raise SystemExit("an answer was empty")
    return first, count


def summary(rounds: Sequence[dict[str, Round]], name: str) -> dict[str, Any]:
    """Medians over rounds, and of the ratios to bare vLLM in the same round."""
    bare = next(iter(WAYS))
    slower = [found[bare].rate / found[name].rate for found in rounds]
    first = [statistics.median(found[name].first) for found in rounds]
    later = [one / statistics.median(found[bare].first) for one, found in zip(first, rounds, strict=True)]
    return {
        "tokens_per_second": round(statistics.median(found[name].rate for found in rounds), 1),
        "time_over_bare": round(statistics.median(slower), 3),
        "time_over_bare_rounds": [round(one, 3) for one in slower],
        "first_text_seconds": round(statistics.median(first), 3),
        "first_text_over_bare": round(statistics.median(later), 3),
    }


def table(ways: dict[str, dict[str, Any]]) -> str:
    """As in the docs."""
    lines = ["| | tokens/s | time over bare (rounds) | first text | over bare |", "|---|---|---|---|---|"]
    for name, row in ways.items():
        low, high = min(row["time_over_bare_rounds"]), max(row["time_over_bare_rounds"])
        lines.append(
            f"| {name} | {row['tokens_per_second']:.0f} | {row['time_over_bare']:.2f} ({low:.2f}-{high:.2f}) | "
            f"{row['first_text_seconds']:.2f} s | {row['first_text_over_bare']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
