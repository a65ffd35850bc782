"""A guard that is down, slow or unscored: closed by default, open only where it is asked for, and then logged each time."""

import asyncio
import json
import logging
import threading
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.pipeline.serving.scripted_upstream import Upstream, Wait, events, finish_of, staged, text_of

from ballast.errors import ConfigError
from ballast.guardrails.scripted import ScriptedGuardrail
from ballast.guardrails.types import RiskTrace
from ballast.pipeline.config_serve import ServeConfig, ServeGuard
from ballast.pipeline.serving.app import create_app
from ballast.pipeline.serving.judging import Failure, Judge, Workers
from ballast.pipeline.serving.metrics import Metrics

WORDS = {"segments": {"unit": "words", "size": 2}, "timeout_s": 0.2}


def figure(stage, name, **labels):
    """A figure of /metrics."""
    for family in text_string_to_metric_families(stage.client.get("/metrics").text):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return sample.value
    return 0.0


class Faulty:
    """A guard without sessions whose `assess` is the given function."""

    name = "faulty"

    def __init__(self, assess):
        self.assess = assess


def hang(exchanges, cuts):
    time.sleep(1.0)
    return [RiskTrace((c[-1],), (0.0,)) for c in cuts]


def crash(exchanges, cuts):
    raise ConnectionError("the guard's server quotes: a b")


def leave(exchanges, cuts):
    raise SystemExit(1)


FAULTS = {
    "hangs": (hang, "timeout"),
    "raises": (crash, "error"),
    "raises what ends a thread": (leave, "error"),
    "leaves it unscored": (lambda e, cuts: [RiskTrace.unscored(c, "down") for c in cuts], "unscored"),
    "gives no trace": (lambda e, cuts: [], "broken"),
    "gives other cuts": (lambda e, cuts: [RiskTrace((0,), (0.0,))], "broken"),
    "gives None": (lambda e, cuts: None, "broken"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_guard_that_fails_blocks_the_answer(what):
    assess, kind = FAULTS[what]
    upstream = Upstream(["a b c", Wait(30)])
    with staged(Faulty(assess), upstream, guarding=WORDS) as stage:
        for stream in (True, False):
            answer = stage.ask(stream=stream)
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "guard_unavailable"
        stage.until(lambda: upstream.aborted == 2)
        assert figure(stage, "ballast_gateway_guard_failures_total", kind=kind) == 2
        assert stage.client.get("/health").json()["guard"] == "failing"


@pytest.mark.parametrize("what", FAULTS)
def test_failing_open_is_asked_for_and_logged_for_each_segment(what, caplog):
    assess, kind = FAULTS[what]
    guarding = {**WORDS, "on_failure": "release", "timeout_s": 0.05}
    with caplog.at_level(logging.WARNING), staged(Faulty(assess), Upstream(["a b c d e"]), guarding=guarding) as stage:
        assert text_of(stage.ask().text) == "a b c d e"
        assert figure(stage, "ballast_gateway_segments_total", decision="unguarded") == 3
    told = [record.getMessage() for record in caplog.records if "unguarded" in record.getMessage()]
    assert len(told) == 3
    assert kind in told[0]
    assert "quotes" not in caplog.text


def test_a_session_that_raises_or_is_slow_blocks_too():
    def script(exchange, prefix):
        if "slow" in prefix:
            time.sleep(0.6)
        return 0.1

    with staged(ScriptedGuardrail(script), Upstream(["a b c", " slow d e"]), guarding=WORDS) as stage:
        answer = stage.ask()
        assert text_of(answer.text) == "a b"
        assert finish_of(answer.text) is None
        assert events(answer.text)[-1]["error"]["code"] == "guard_unavailable"


def test_after_a_failure_that_was_let_pass_a_fresh_session_judges_the_whole_answer():
    seen = []

    class Guard(ScriptedGuardrail):
        def open(self, messages):
            session, opened = super().open(messages), len(seen)
            seen.append([])

            class Session:
                def push(self, text):
                    seen[opened].append(text)
                    if text == " c d":
                        raise RuntimeError
                    return session.push(text)

            return Session()

    guarding = {**WORDS, "on_failure": "release"}
    guard = Guard(lambda e, prefix: 0.9 if prefix == "a b c d e f" else 0.1)
    with staged(guard, Upstream(["a b c", " d e", " f g h"]), guarding=guarding) as stage:
        answer = stage.ask()
        assert text_of(answer.text) == f"a b c d\n\n{ServeGuard().safe_message}"
    assert seen == [["a b", " c d"], ["a b c d", " e f"]]


def test_hanging_guards_hold_no_more_than_their_workers_and_the_others_time_out():
    inside, most, lock = [0], [0], threading.Lock()

    def script(exchange, prefix):
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        time.sleep(0.3)
        with lock:
            inside[0] -= 1
        return 0.1

    guarding = {**WORDS, "workers": 2, "timeout_s": 0.45}
    with staged(ScriptedGuardrail(script), Upstream(["a"]), guarding=guarding) as stage:
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(stage.ask().status_code)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most[0] == 2
        assert sorted(set(answers)) == [200, 503]
        # Who gave up while waiting never reaches the guard: 2 at once, .3 s each, .45 s of patience.
        time.sleep(0.5)
        assert stage.gateway.judge.guard.calls <= 4


def test_a_guard_that_hangs_does_not_hold_up_who_asks_for_something_else():
    with staged(Faulty(hang), Upstream(["a"]), guarding={**WORDS, "timeout_s": 5}) as stage:
        thread = threading.Thread(target=stage.ask)
        thread.start()
        time.sleep(0.1)
        started = time.monotonic()
        assert stage.client.get("/health").status_code == 200
        assert time.monotonic() - started < 0.5
        thread.join()


def test_a_guard_that_raises_a_time_out_of_its_own_has_raised():
    def give_up(exchanges, cuts):
        raise TimeoutError

    async def judged():
        judge = Judge(Faulty(give_up), ServeGuard(), Metrics())
        try:
            return await judge.open([]).risks("", ["a"])
        finally:
            judge.close()

    assert asyncio.run(judged()) == [Failure("error", "TimeoutError")]


def test_work_that_nobody_waits_for_is_not_begun():
    done, hold = [], threading.Event()

    async def play():
        workers = Workers(1)
        first = asyncio.ensure_future(workers.run(lambda: hold.wait(5)))
        second = asyncio.ensure_future(workers.run(lambda: done.append("second")))
        await asyncio.sleep(0.05)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        hold.set()
        await first
        await workers.run(lambda: done.append("third"))
        workers.close()

    asyncio.run(play())
    assert done == ["third"]


def test_without_a_guard_nothing_is_served_unless_it_is_asked_for():
    with pytest.raises(ConfigError, match=r"serve\.unguarded"):
        create_app(ServeConfig(), "http://127.0.0.1:1", None, api_keys=["k"])
    with staged(None, Upstream(["a b", " c"]), unguarded=True) as stage:
        assert text_of(stage.ask().text) == "a b c"


def test_segments_of_tokens_are_refused_since_a_server_streams_text():
    with pytest.raises(ValueError, match="words or sentences"):
        ServeGuard(segments={"unit": "tokens", "size": 3})


@pytest.mark.parametrize("text", [False, True])
def test_the_audit_log_tells_each_decision_and_no_text_unless_it_is_asked_for(tmp_path, text):
    path = tmp_path / "audit" / "decisions.jsonl"
    guard = ScriptedGuardrail(lambda e, p: 0.9 if "c" in p else 0.25)
    with staged(guard, Upstream(["ab ab c"]), guarding=WORDS, audit={"path": str(path), "text": text}) as stage:
        stage.ask()
        stage.until(lambda: "ended" in path.read_text())
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    told = [{k: line.get(k) for k in ("event", "begin", "end", "risk")} for line in lines]
    assert told == [
        {"event": "released", "begin": 0, "end": 5, "risk": 0.25},
        {"event": "blocked", "begin": 5, "end": 7, "risk": 0.9},
        {"event": "ended", "begin": None, "end": "content_filter", "risk": None},
    ]
    assert len({line["request"] for line in lines}) == 1
    assert lines[2]["client"].startswith("key-")
    assert lines[2]["released_chars"] == 5
    assert [line.get("text") for line in lines] == (["ab ab", " c", None] if text else [None] * 3)


def test_an_audit_log_that_cannot_be_opened_is_said_before_anything_is_served(tmp_path):
    settings = ServeConfig(audit={"path": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"serve\.audit\.path"):
        create_app(settings, "http://127.0.0.1:1", ScriptedGuardrail({}), api_keys=["k"])
