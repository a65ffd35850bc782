"""Guards as several servers: throughput over 1, 2 and 4 of them, and a training-like loop in which they fail.

    python benchmarks/guard_servers.py --out benchmarks/results/guard_servers.json

Servers are processes of their own that answer as vLLM would: each takes `--slots` requests at a time and `--seconds`
for each, so that servers * slots / seconds rows a second are the most there can be, whatever this machine is. What is
measured is the client: how much of that it makes use of. The loop has two servers. In the middle of a batch one is
killed (SIGKILL), later the other becomes four times slower, then fast again, and at last the first is started on its
port. Every verdict is compared with the one that its prompt must get. Takes
about a minute and a half.
"""

import argparse
import json
import math
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from demo_seeds import hardware

from ballast.guardrails.engines.interface import Labels, Verdict
from ballast.guardrails.engines.options import ServerOptions
from ballast.guardrails.engines.server import ServerEngine

LABELS = Labels(safe=(3,), unsafe=(7,))
CUTS = 4  # prompts of one completion
SLOWER = 4.0


def risk_of(prompt: Sequence[int]) -> float:
    """Another risk for every prompt, so that answers that are mixed up are seen."""
    return 0.01 + 0.98 * (hash(tuple(prompt)) % 9973) / 9973


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="JSON to write")
    parser.add_argument("--seconds", type=float, default=0.1, help="that a server takes for a request")
    parser.add_argument("--slots", type=int, default=8, help="requests that a server works on at a time")
    parser.add_argument("--rows", type=int, default=384, help="of a batch whose throughput is measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step-rows", type=int, default=64, help="rows of a step of the loop")
    parser.add_argument("--generation", type=float, default=0.2, help="seconds of a step before its rows are scored")
    parser.add_argument("--serve", type=int, metavar="PORT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.seconds, args.slots)
        return
    result = {
        "command": " ".join(["python", *sys.argv]),
        "hardware": hardware(),
        "settings": {"seconds": args.seconds, "slots": args.slots, "rows": args.rows, "step_rows": args.step_rows},
        "throughput": throughput(args),
        "loop": loop(args),
    }
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


class Server:
    """A server in a process of its own, on a port that it keeps."""

    def __init__(self, args: argparse.Namespace) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._command = [sys.executable, __file__, "--serve", str(self.port)]
        self._command += ["--seconds", str(args.seconds), "--slots", str(args.slots)]
        self.start()

    @property
    def url(self) -> str:
        """Address up to and including the version."""
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        """Start it, without waiting for it to listen."""
        self._process = subprocess.Popen(self._command)

    def wait(self) -> None:
        """Wait until it listens."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.05)
        raise SystemExit("a server did not start; see above")

    def kill(self) -> None:
        """End it at once, in the middle of whatever it does."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def pace(self, seconds: float) -> None:
        """How long it takes for a request from now on."""
        httpx.post(self.url + "/pace", json={"seconds": seconds}, trust_env=False, timeout=30).raise_for_status()


def serve(port: int, seconds: float, slots: int) -> None:
    """What the child process does."""
    import asyncio

    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    pace, places = {"seconds": seconds}, asyncio.Semaphore(slots)

    async def complete(request: Request) -> JSONResponse:
        prompt = (await request.json())["prompt"]
        async with places:
            await asyncio.sleep(pace["seconds"])
        risk = risk_of(prompt)
        top = {f"token_id:{LABELS.safe[0]}": math.log(1 - risk), f"token_id:{LABELS.unsafe[0]}": math.log(risk)}
        usage = {"prompt_tokens": len(prompt)}
        return JSONResponse({"choices": [{"logprobs": {"top_logprobs": [top]}}], "usage": usage})

    async def set_pace(request: Request) -> JSONResponse:
        pace.update(await request.json())
        return JSONResponse(pace)

    routes = [Route("/v1/completions", complete, methods=["POST"]), Route("/v1/pace", set_pace, methods=["POST"])]
    uvicorn.run(Starlette(routes=routes), host="127.0.0.1", port=port, log_level="critical", access_log=False)


def engine_of(servers: Sequence[Server], args: argparse.Namespace) -> ServerEngine:
    """An engine with the default patience, but for a time-out that fits servers of a tenth of a second."""
    options = ServerOptions(base_url=tuple(server.url for server in servers), connections=args.slots, timeout_s=5.0)
    return ServerEngine(options, LABELS, guard="benchmark", model="model")


def batch(number: int, rows: int) -> list[list[tuple[int, ...]]]:
    """(rows / CUTS, CUTS) prompts that no other batch has; those of a completion share their beginning."""
    return [[(number, n, *range(4 * (cut + 1))) for cut in range(CUTS)] for n in range(rows // CUTS)]


def score(engine: ServerEngine, groups: Sequence[Sequence[tuple[int, ...]]]) -> tuple[float, int, int]:
    """Seconds, rows left unscored, and rows with a verdict that is not their prompt's."""
    began = time.perf_counter()
    verdicts = engine.score(groups)
    seconds = time.perf_counter() - began
    pairs = [
        (row, one) for group, ones in zip(groups, verdicts, strict=True) for row, one in zip(group, ones, strict=True)
    ]
    return seconds, sum(one.risk is None for _, one in pairs), sum(wrong(row, one) for row, one in pairs)


def wrong(row: Sequence[int], verdict: Verdict) -> bool:
    """Whether a verdict is another prompt's."""
    return verdict.risk is not None and not math.isclose(verdict.risk, risk_of(row), abs_tol=1e-6)


def throughput(args: argparse.Namespace) -> dict[str, Any]:
    """Rows a second over 1, 2 and 4 servers, in an order that turns from round to round."""
    servers, counts = [Server(args) for _ in range(4)], [1, 2, 4]
    rates: dict[int, list[float]] = {count: [] for count in counts}
    try:
        for server in servers:
            server.wait()
        for number in range(args.rounds):
            for count in counts[number % 3 :] + counts[: number % 3]:
                engine = engine_of(servers[:count], args)
                score(engine, batch(0, 32))  # the prompts that every server is asked
                seconds, unscored, mistaken = score(engine, batch(1, args.rows))
                if unscored or mistaken:
                    raise SystemExit(f"{unscored} rows are unscored and {mistaken} wrong, though no server failed")
                rates[count].append(args.rows / seconds)
    finally:
        for server in servers:
            server.kill()
    most = {count: count * args.slots / args.seconds for count in counts}
    print("| servers | rows/s (rounds) | the most there can be | share of it |\n|---|---|---|---|")
    found = {}
    for count in counts:
        rate = statistics.median(rates[count])
        print(
            f"| {count} | {rate:.0f} ({min(rates[count]):.0f}-{max(rates[count]):.0f}) | {most[count]:.0f} | "
            f"{rate / most[count]:.0%} |",
            flush=True,
        )
        found[str(count)] = {
            "rows_per_second": round(rate, 1),
            "rounds": [round(one, 1) for one in rates[count]],
            "at_most": round(most[count], 1),
        }
    return found


@dataclass
class Phase:
    """Some steps of the loop, and what happens in the middle of the first of them."""

    name: str
    steps: int
    event: Callable[[], None]
    rates: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)  # seconds from the phase's begin
    unscored: int = 0
    wrong: int = 0
    hedges: int = 0
    left_out: int = 0


def loop(args: argparse.Namespace) -> dict[str, Any]:
    """The training-like loop: wait as for a generation, score, and do it again, whatever happens to the servers."""
    first, second = servers = [Server(args), Server(args)]
    phases = [
        Phase("both in use", 6, lambda: None),
        Phase("one killed", 5, first.kill),
        Phase(f"the other {SLOWER:g} times slower", 5, lambda: second.pace(SLOWER * args.seconds)),
        Phase("fast again", 4, lambda: second.pace(args.seconds)),
        Phase("the killed one is started", 16, first.start),
    ]
    try:
        for server in servers:
            server.wait()
        engine = engine_of(servers, args)
        score(engine, batch(0, 32))
        print("\n| | steps | rows/s | slowest step | unscored | wrong | hedges | left out at the end |")
        print("|---|---|---|---|---|---|---|---|")
        for number, phase in enumerate(phases):
            run_phase(engine, phase, number, args)
    finally:
        for server in servers:
            server.kill()
    before = statistics.median(phases[0].rates)
    recovered = next((n for n, rate in enumerate(phases[-1].rates, 1) if rate >= 0.9 * before), None)
    seconds = None if recovered is None else round(phases[-1].ends[recovered - 1], 1)
    print(f"\nfrom the start of the killed one to 90% of the rate of both: step {recovered}, {seconds} s")
    rows = sum(phase.steps for phase in phases) * args.step_rows
    return {
        "phases": [
            {
                "name": phase.name,
                "steps": phase.steps,
                "rows_per_second": [round(rate, 1) for rate in phase.rates],
                "unscored": phase.unscored,
                "wrong": phase.wrong,
                "hedges": phase.hedges,
                "left_out": phase.left_out,
            }
            for phase in phases
        ],
        "unscored_share": sum(phase.unscored for phase in phases) / rows,
        "steps_to_90_percent": recovered,
        "seconds_to_90_percent": seconds,
    }


def run_phase(engine: ServerEngine, phase: Phase, number: int, args: argparse.Namespace) -> None:
    """The steps of one phase, and its line."""
    hedges, began = sum(health.hedged for health in engine.servers()), time.perf_counter()
    for step in range(phase.steps):
        time.sleep(args.generation)
        event = threading.Timer(args.seconds * 1.5, phase.event)
        if step == 0:
            event.start()
        seconds, unscored, mistaken = score(engine, batch(100 * (number + 1) + step, args.step_rows))
        if step == 0:
            event.join()
        phase.rates.append(args.step_rows / seconds)
        phase.ends.append(time.perf_counter() - began)
        phase.unscored += unscored
        phase.wrong += mistaken
    phase.hedges = sum(health.hedged for health in engine.servers()) - hedges
    phase.left_out = sum(health.state == "left out" for health in engine.servers())
    print(
        f"| {phase.name} | {phase.steps} | {statistics.median(phase.rates):.0f} | "
        f"{args.step_rows / min(phase.rates):.1f} s | {phase.unscored} | {phase.wrong} | {phase.hedges} | "
        f"{phase.left_out} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
