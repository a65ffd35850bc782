"""The gateway as a process: its port, its end, clients that do not read, and OpenAI's own client."""

import asyncio
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
from tests.pipeline.serving.scripted_upstream import KEY, Die, Upstream, Wait, events, finish_of, staged, text_of

from ballast.errors import ConfigError, GuardError
from ballast.guardrails.scripted import ScriptedGuardrail
from ballast.pipeline.config_serve import ServeConfig, ServeGuard
from ballast.pipeline.serving.app import create_app
from ballast.pipeline.serving.delivery import Delivery
from ballast.pipeline.serving.release import Ended, Released
from ballast.pipeline.serving.server import listen, server

CALM = ScriptedGuardrail(lambda exchange, prefix: 0.1)
WORDS = {"segments": {"unit": "words", "size": 2}}
BODY = {"model": "policy", "messages": [{"role": "user", "content": "Hi"}], "stream": True}


def collect(stage, into):
    into.append(stage.ask())


def in_background(work, *arguments):
    thread = threading.Thread(target=work, args=arguments)
    thread.start()
    return thread


def test_a_port_in_use_is_told_with_a_remedy():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} on 127.0.0.1 is in use.*serve\.port"):
            listen("127.0.0.1", port, 30)


@pytest.mark.parametrize("host", ["203.0.113.7", "no such host"])
def test_an_address_of_another_machine_is_told(host):
    with pytest.raises(ConfigError, match=r"serve\.host"):
        listen(host, 0, 30)


def test_answers_under_way_end_before_the_gateway_does():
    upstream = Upstream(["a b c", Wait(0.8), " d e"])
    answers = []
    with staged(CALM, upstream, guarding=WORDS, shutdown_s=10) as stage:
        thread = in_background(collect, stage, answers)
        stage.until(lambda: upstream.open == 1)
        stage.server.should_exit = True
        stage.until(lambda: stage.gateway.draining)
        late = httpx.post(f"{stage.url}/v1/chat/completions", headers=stage.client.headers, json=BODY, trust_env=False)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")
        thread.join()
    assert text_of(answers[0].text) == "a b c d e"
    assert finish_of(answers[0].text) == "stop"


def test_answers_that_take_too_long_are_told_that_the_server_ends():
    upstream = Upstream(["a b c", Wait(30), " d e"])
    answers = []
    with staged(CALM, upstream, guarding=WORDS, shutdown_s=0.3) as stage:
        thread = in_background(collect, stage, answers)
        stage.until(lambda: upstream.open == 1)
        started = time.monotonic()
        stage.server.should_exit = True
        thread.join()
        assert time.monotonic() - started < 3
        stage.until(lambda: upstream.aborted == 1)
    assert text_of(answers[0].text) == "a b"
    assert events(answers[0].text)[-1]["error"]["code"] == "shutting_down"


def test_a_second_interrupt_does_not_wait():
    upstream = Upstream(["a b c", Wait(30)])
    with staged(CALM, upstream, guarding=WORDS, shutdown_s=30) as stage:
        thread = in_background(collect, stage, [])
        stage.until(lambda: upstream.open == 1)
        stage.server.should_exit = True
        stage.until(lambda: stage.gateway.draining)
        stage.server.force_exit = True  # what uvicorn does at the second one
        stage.until(lambda: upstream.aborted == 1, 3)
        thread.join()


def test_an_answer_has_a_time_limit():
    upstream = Upstream(["a b c", Wait(30)])
    with staged(CALM, upstream, guarding=WORDS, limits={"request_timeout_s": 0.4}) as stage:
        answer = stage.ask()
        assert events(answer.text)[-1]["error"]["code"] == "request_timeout"
        stage.until(lambda: upstream.aborted == 1)


def test_more_answers_at_once_than_allowed_are_refused_and_the_places_come_back():
    upstream = Upstream(["a b c", Wait(1.0)])
    with staged(CALM, upstream, limits={"concurrent": 2}) as stage:
        threads = [in_background(collect, stage, []) for _ in range(2)]
        stage.until(lambda: upstream.open == 2)
        refused = stage.ask()
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_at_once")
        for thread in threads:
            thread.join()
        upstream.script = ["a"]
        assert [stage.ask().status_code for _ in range(5)] == [200] * 5


def raw_request(stage):
    """A client that sends a request and is in no hurry to read, with small buffers."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", int(stage.url.rpartition(":")[2])))
    content = json.dumps(BODY).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(content)}\r\n\r\n"
    client.sendall(head.encode() + content)
    return client


def test_a_client_that_never_reads_is_given_up_and_so_is_its_generation():
    upstream = Upstream(["word " * 20_000] * 500)  # 50 MB, more than the buffers of the sockets take
    limits = {"stall_timeout_s": 0.5, "answer_chars": 10**8}
    with staged(None, upstream, unguarded=True, limits=limits) as stage, raw_request(stage):
        stage.until(lambda: upstream.open == 1)
        stage.until(lambda: upstream.aborted == 1 and upstream.open == 0, 20)
        stage.until(lambda: stage.gateway._in_flight == 0)
        # What the model server wrote is not piled up for it.
        assert len(upstream.written) < 500


def test_a_body_that_does_not_arrive_is_not_waited_for():
    with staged(CALM, limits={"body_timeout_s": 0.3}) as stage, socket.socket() as client:
        client.connect(("127.0.0.1", int(stage.url.rpartition(":")[2])))
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 50\r\n\r\n{{"
        )
        client.sendall(head.encode())
        assert b" 408 " in client.recv(1000)


def test_many_answers_at_once_are_each_whole_and_their_own():
    def script(exchange, prefix):
        return 0.9 if exchange.messages[0]["content"] == "blocked" and "c" in prefix else 0.1

    upstream = Upstream(["a b", Wait(0.01), " c", Wait(0.01), " d e"])
    guard = ScriptedGuardrail(script)
    limits = {"requests_per_minute": 0}
    with staged(guard, upstream, guarding={**WORDS, "timeout_s": 20}, limits=limits) as stage:
        got = {}

        def one(number):
            content = "blocked" if number % 3 == 0 else "fine"
            got[number] = stage.ask(messages=[{"role": "user", "content": content}]).text

        threads = [in_background(one, number) for number in range(30)]
        for thread in threads:
            thread.join()
        assert len(got) == 30
        for number, content in got.items():
            expected = f"a b\n\n{ServeGuard().safe_message}" if number % 3 == 0 else "a b c d e"
            assert text_of(content) == expected
        stage.until(lambda: upstream.open == 0 and stage.gateway._in_flight == 0)


@pytest.fixture
def client_of():
    def make(stage, key=KEY):
        return openai.OpenAI(
            api_key=key, base_url=f"{stage.url}/v1", max_retries=0, http_client=httpx.Client(trust_env=False)
        )

    return make


def test_openais_client_reads_answers_blocks_and_failures(client_of):
    guard = ScriptedGuardrail(lambda e, p: 0.9 if "BAD" in p else 0.1)
    upstream = Upstream(["a b c", " d"])
    with staged(guard, upstream, guarding=WORDS) as stage, client_of(stage) as client:
        chat = {"model": "policy", "messages": [{"role": "user", "content": "Hi"}]}
        whole = client.chat.completions.create(**chat)
        assert whole.choices[0].message.content == "a b c d"
        assert whole.usage.total_tokens == 8
        chunks = list(client.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True}))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "a b c d"
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].usage.total_tokens == 8
        assert client.completions.create(model="policy", prompt="Hi").choices[0].text == "a b c d"
        text = "".join(c.choices[0].text for c in client.completions.create(model="policy", prompt="Hi", stream=True))
        assert text == "a b c d"
        assert [m.id for m in client.models.list()] == ["policy", "base"]

        upstream.script = ["a b BAD c d"]
        assert client.chat.completions.create(**chat).choices[0].finish_reason == "content_filter"
        upstream.script = ["a b c", Die()]
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(**chat)
        with pytest.raises(openai.APIError, match="broke off"):
            list(client.chat.completions.create(**chat, stream=True))
        with pytest.raises(openai.BadRequestError, match="tool calls"):
            client.chat.completions.create(**chat, tools=[{"type": "function", "function": {"name": "f"}}])
        with client_of(stage, "wrong") as stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()


GATEWAY = """
import sys, time
from ballast.guardrails.types import RiskTrace
from ballast.pipeline.config_serve import ServeConfig
from ballast.pipeline.serving.app import create_app
from ballast.pipeline.serving.server import listen, server, serve

class Hangs:
    name = "hangs"
    def assess(self, exchanges, cuts):
        time.sleep(600)

settings = ServeConfig(shutdown_s=0.2, guarding={"timeout_s": 0.3})
sock = listen("127.0.0.1", 0, 5)
app = create_app(settings, sys.argv[1], Hangs(), api_keys=["test-key"])
serve(app, sock, ready=lambda: print(sock.getsockname()[1], flush=True), warm_up="warm" in sys.argv)
"""


def test_a_signal_ends_the_process_even_while_its_guard_hangs():
    with staged(CALM) as stage:
        process = subprocess.Popen(
            [sys.executable, "-c", GATEWAY, stage.upstream.url], stdout=subprocess.PIPE, text=True
        )
        try:
            port = int(process.stdout.readline())
            answer = httpx.post(
                f"http://127.0.0.1:{port}/v1/chat/completions", json=BODY, headers=stage.client.headers, trust_env=False
            )
            assert answer.status_code == 503
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) in (0, -signal.SIGTERM)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def test_a_signal_ends_the_process_while_its_guard_still_loads():
    command = [sys.executable, "-c", GATEWAY, "http://127.0.0.1:9", "warm"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(3)
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=10)
        assert (out, errors) == ("", "")
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("script", "says"),
    [(lambda e, p: None, "'scripted' does not judge a short plain text (unscored)"), (lambda e, p: 0.0, None)],
)
@pytest.mark.parametrize("stream", [True, False])
def test_a_guard_that_cannot_judge_is_told_before_a_client_comes(script, says, stream):
    guard = ScriptedGuardrail(script)
    if not stream:
        guard = SimpleNamespace(name="scripted", assess=guard.assess)
    app = create_app(ServeConfig(), "http://127.0.0.1:9", guard, api_keys=[KEY])

    running = server(app, ready=lambda: setattr(running, "should_exit", True))
    with listen("127.0.0.1", 0, 5) as sock:
        if says is None:
            running.run(sockets=[sock])
        else:
            with pytest.raises(GuardError, match=re.escape(says)):
                running.run(sockets=[sock])


def test_nothing_is_left_of_a_gateway_that_ended():
    def sockets():
        targets = []
        for entry in Path("/proc/self/fd").iterdir():
            try:
                targets.append(str(entry.readlink()))
            except OSError:
                continue
        return sum(target.startswith("socket:") for target in targets)

    def workers():
        return [thread for thread in threading.enumerate() if thread.name.startswith("guard-")]

    before, started = sockets(), time.monotonic()
    with staged(ScriptedGuardrail(lambda e, p: 0.1), Upstream(["a b c"])) as stage:
        stage.ask()
    while workers() and time.monotonic() < started + 10:
        time.sleep(0.01)
    assert not workers()
    assert sockets() == before


def test_no_text_is_logged(caplog):
    with caplog.at_level(logging.DEBUG, logger="ballast"), staged(CALM, Upstream(["whispered words"])) as stage:
        stage.ask(messages=[{"role": "user", "content": "asked quietly"}])
    assert "whispered" not in caplog.text
    assert "quietly" not in caplog.text


def test_the_command_line_loads_no_web_server():
    code = (
        "import sys, ballast, ballast.pipeline.cli; "
        "print([name for name in ('fastapi', 'starlette', 'uvicorn', 'prometheus_client') if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_the_end_waits_for_a_client_that_has_yet_to_take_the_last_words():
    app = create_app(ServeConfig(), "http://127.0.0.1:9", CALM, api_keys=[KEY])
    gateway, sent = app.state.gateway, []

    async def release(ask, request_id):
        yield Released("All of it.")
        yield Ended("stop")

    async def scenario():
        taken = asyncio.Event()

        async def send(message):
            if b"[DONE]" in message.get("body", b""):
                await taken.wait()  # what came before lies unread
            sent.append(message.get("body", b""))

        async def receive():
            await asyncio.Event().wait()

        gateway.releaser.release = release
        ask = gateway.understanding.chat(json.dumps(BODY).encode())
        answering = asyncio.ensure_future(Delivery(gateway, ask, "id", "client")({}, receive, send))
        await asyncio.sleep(0.05)
        draining = asyncio.ensure_future(gateway.drain(5))
        await asyncio.sleep(0.05)
        waited = not draining.done()
        taken.set()
        await asyncio.gather(answering, draining)
        return waited

    assert asyncio.run(scenario())
    assert sent[-1].endswith(b"data: [DONE]\n\n")
