"""A guard on several real servers that die, dawdle and lie: no fault makes a verdict, and one sound server is enough."""

import logging
import math
import threading
import time
from contextlib import ExitStack, contextmanager

import pytest
from tests.guardrails.fault_server import Reply, serving

from ballast.errors import ConfigError, GuardError
from ballast.guardrails.engines import replicas, server_state
from ballast.guardrails.engines.interface import Labels
from ballast.guardrails.engines.options import ServerOptions
from ballast.guardrails.engines.server import ServerEngine
from ballast.guardrails.registry import load_guardrail
from ballast.guardrails.remote import ServerMeter, over_processes, servers_of
from ballast.guardrails.types import Exchange

LABELS = Labels(safe=(3,), unsafe=(7,))
ROWS = [[1, n] for n in range(60)]


def engine(*urls, **settings):
    defaults = {"connections": 4, "timeout_s": 5.0, "retries": 3, "backoff_s": 0.01, "hedge_quantile": 0}
    options = ServerOptions(base_url=urls, **{**defaults, **settings})
    return ServerEngine(options, LABELS, guard="remote", model="guard-model")


def risk_of(row):
    """Another risk for every prompt, so that answers that are mixed up are seen."""
    return (row[1] + 1) / 1000 if len(row) > 1 else 0.5


def answer(prompt, *, risk=None):
    """A vLLM server's answer, with a label mass of 1."""
    risk = risk_of(prompt) if risk is None else risk
    top = {"token_id:3": math.log(1 - risk), "token_id:7": math.log(risk)}
    return {"choices": [{"logprobs": {"top_logprobs": [top]}}], "usage": {"prompt_tokens": len(prompt)}}


def sound(request, attempt=0):
    return Reply(answer(request["prompt"]))


def slowly(seconds):
    return lambda request, attempt: Reply(answer(request["prompt"]), delay_s=seconds)


def risks(verdicts):
    return [None if v.risk is None else round(v.risk, 6) for v in verdicts]


EXPECTED = [pytest.approx(risk_of(row)) for row in ROWS]


@contextmanager
def servers(*scripts):
    with ExitStack() as stack:
        yield [stack.enter_context(serving(script)) for script in scripts]


@pytest.fixture
def nothing_compared(monkeypatch):
    """Without the questions that every server is asked at first, so that requests can be counted."""
    monkeypatch.setattr(replicas, "_COMPARED", 0)


@pytest.fixture(autouse=True)
def long_outages(monkeypatch):
    """So that no test hangs on how fast the machine is."""
    monkeypatch.setattr(server_state, "SHORTEST_OUTAGE_S", 60.0)
    monkeypatch.setattr(server_state, "LONGEST_OUTAGE_S", 60.0)


@pytest.fixture
def short_outages(monkeypatch):
    monkeypatch.setattr(server_state, "SHORTEST_OUTAGE_S", 0.05)
    monkeypatch.setattr(server_state, "LONGEST_OUTAGE_S", 0.2)


def states(guard):
    return [health.state for health in guard.servers()]


class Killing:
    """Sound until `after` requests are in, then the server is killed while it answers them."""

    def __init__(self, after):
        self.after, self.server, self._count, self._lock = after, None, 0, threading.Lock()

    def __call__(self, request, attempt):
        with self._lock:
            self._count += 1
            if self._count == self.after:
                threading.Thread(target=self.server.kill).start()
        return Reply(answer(request["prompt"]), delay_s=30.0 if self._count >= self.after else 0.01)


def test_one_killed_and_one_slow_in_the_middle_of_a_batch_cost_no_row(nothing_compared):
    def slow_from_the_tenth(request, attempt):
        slow = len(dawdling.requests) >= 10
        return Reply(answer(request["prompt"]), delay_s=0.1 if slow else 0.01)

    killing = Killing(after=10)
    with servers(killing, slow_from_the_tenth) as (killed, dawdling):
        killing.server = killed
        guard = engine(killed.url, dawdling.url)
        [verdicts] = guard.score([ROWS])
        first, second = guard.servers()
    assert risks(verdicts) == EXPECTED
    assert first.state == "left out"
    assert first.failures >= 3
    assert (second.state, second.failures) == ("in use", 0)


def test_all_killed_in_the_middle_leave_the_rest_unscored_and_keep_what_was_answered(nothing_compared):
    one, other = Killing(after=10), Killing(after=12)
    with servers(one, other) as (first, second):
        one.server, other.server = first, second
        started = time.monotonic()
        [verdicts] = engine(first.url, second.url).score([ROWS])
        seconds = time.monotonic() - started
    scored = [v for v in verdicts if v.risk is not None]
    # Up to 9 and 11 requests were answered before, and those that were under way then were not.
    assert 5 <= len(scored) <= 20
    assert [v.risk for v in scored] == [EXPECTED[n] for n, v in enumerate(verdicts) if v.risk is not None]
    for verdict in verdicts:
        assert (verdict.risk is None) == (verdict.reason is not None)
    last = verdicts[-1].reason
    assert first.url in last
    assert second.url in last
    assert "cannot be reached" in last
    assert seconds < 15


def test_a_server_that_answers_garbage_costs_no_row_and_is_left_out(nothing_compared, caplog):
    with servers(lambda request, attempt: Reply(b"<html>safe</html>"), sound) as (lying, healthy):
        guard = engine(lying.url, healthy.url)
        [verdicts] = guard.score([ROWS])
        asked = len(lying.requests)
    assert risks(verdicts) == EXPECTED
    assert states(guard) == ["left out", "in use"]
    assert asked <= 3 + 3  # three in a row, and those under way then
    assert f"{lying.url} is left out for 60 s after 3 failures in a row" in caplog.text


def test_a_server_that_is_back_on_its_port_is_used_again(short_outages):
    with serving(sound) as healthy:
        with serving(sound) as fallen:
            guard = engine(fallen.url, healthy.url)
            guard.score([ROWS])
        assert risks(guard.score([ROWS])[0]) == EXPECTED
        assert states(guard) == ["left out", "in use"]
        with serving(sound, fallen.port) as risen:
            deadline = time.monotonic() + 10
            while states(guard)[0] == "left out" and time.monotonic() < deadline:
                assert risks(guard.score([ROWS])[0]) == EXPECTED
            assert states(guard) == ["in use", "in use"]
            guard.score([ROWS])
            assert len(risen.requests) > len(ROWS) / 4


def test_a_server_that_comes_back_with_another_model_gets_a_trial_and_no_row(short_outages, caplog):
    with serving(sound) as healthy:
        with serving(sound) as fallen:
            guard = engine(fallen.url, healthy.url)
            guard.score([ROWS])
        guard.score([ROWS])
        with serving(lambda r, attempt: Reply(answer(r["prompt"], risk=0.9)), fallen.port) as other:
            for _ in range(10):
                time.sleep(0.06)
                assert risks(guard.score([ROWS[:8]])[0]) == EXPECTED[:8]
            prompts = {tuple(request["prompt"]) for _, _, request in other.requests}
    # Of the first 32 prompts the last has the risk 32 / 1000, the nearest to one half.
    assert prompts == {(1, 31)}
    assert states(guard) == ["left out", "in use"]
    assert "its risk is 0.900 and not 0.032" in guard.servers()[0].reason


def test_a_trial_takes_no_attempt_from_a_row(nothing_compared, short_outages):
    with serving(sound) as healthy:
        with serving(sound) as fallen:
            guard = engine(fallen.url, healthy.url, retries=0, connections=1)
        guard.score([ROWS[:12]])  # with one attempt a row, those that find out are lost
        assert states(guard) == ["left out", "in use"]
        found = guard.servers()[0].failures
        for _ in range(20):
            time.sleep(0.01)
            # A row that meets a trial of the dead server still has its one attempt.
            assert risks(guard.score([ROWS[:3]])[0]) == EXPECTED[:3]
    assert guard.servers()[0].failures > found


def test_servers_with_other_answers_are_refused_by_name():
    scripts = sound, sound, lambda r, attempt: Reply(answer(r["prompt"], risk=0.4))
    with (
        servers(*scripts) as (one, two, other),
        pytest.raises(GuardError, match="guardrail 'remote'") as refused,
    ):
        engine(one.url, two.url, other.url).score([ROWS])
    assert f"{other.url} answers otherwise: its risk is 0.400 and not 0.0" in str(refused.value)
    assert two.url not in str(refused.value)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Reply({}, 404), "HTTP 404 Not Found; check base_url"),
        (Reply({}, 401), "HTTP 401"),
        (Reply({}, 400), "HTTP 400"),
        (Reply(b"<html>"), "does not fit"),
    ],
)
def test_a_server_that_does_not_know_the_model_is_refused_by_name_at_first_use(reply, said):
    with (
        servers(sound, lambda request, attempt: reply) as (healthy, other),
        pytest.raises(GuardError, match="all servers of a guard must serve the same model") as refused,
    ):
        engine(healthy.url, other.url).score([ROWS[:2]])
    assert other.url in str(refused.value)
    assert said in str(refused.value)
    assert f"{healthy.url} scores the same prompt" in str(refused.value)


def test_rounding_makes_no_other_model():
    with servers(sound, lambda r, attempt: Reply(answer(r["prompt"], risk=risk_of(r["prompt"]) + 0.03))) as both:
        [verdicts] = engine(*(server.url for server in both)).score([ROWS])
    assert all(v.risk is not None for v in verdicts)


def test_only_the_first_prompts_are_asked_of_every_server():
    with servers(sound, sound, sound) as three:
        guard = engine(*(server.url for server in three))
        guard.score([ROWS[:2]])  # as the self-check does
        assert [len(server.requests) for server in three] == [2, 2, 2]
        guard.score([ROWS])
        total = sum(len(server.requests) for server in three)
    # Every server: 32 prompts, two of them before (asked again: verdicts are not kept). Then 60 - 30 others, once.
    assert total == 3 * 32 + 30


def test_a_server_that_is_down_at_first_use_is_left_out_until_it_answers_alike(short_outages):
    with serving(sound) as gone:
        port = gone.port
    with serving(sound) as healthy:
        guard = engine(gone.url, healthy.url)
        assert risks(guard.score([ROWS[:1]])[0]) == EXPECTED[:1]
        assert states(guard) == ["left out", "in use"]  # by one failure: nobody knows what it would answer
        with serving(sound, port):
            deadline = time.monotonic() + 10
            while states(guard)[0] == "left out" and time.monotonic() < deadline:
                guard.score([ROWS])
        assert states(guard) == ["in use", "in use"]


def test_a_hedged_row_has_one_answer_and_the_slow_request_is_cancelled(nothing_compared):
    slow = threading.Event()

    def dawdling(request, attempt):
        return Reply(answer(request["prompt"], risk=0.9), delay_s=30) if slow.is_set() else sound(request)

    with servers(dawdling, sound) as (first, second):
        guard = engine(first.url, second.url, connections=2, hedge_quantile=0.9)
        guard.score([ROWS])  # from these it knows how long an answer takes
        slow.set()
        before = [health.requests - health.hedged for health in guard.servers()]
        started = time.monotonic()
        [verdicts] = guard.score([ROWS])
        seconds = time.monotonic() - started
        one, two = guard.servers()
    assert risks(verdicts) == EXPECTED  # a late 0.9 of the slow server would show
    assert seconds < 5.0  # and not its time-out
    assert (one.state, two.state) == ("left out", "in use")
    assert 3 <= one.lost <= one.hedged
    assert one.under_way == two.under_way == 0
    # Every row is sent once, and each hedge once more.
    assert one.requests - one.hedged + two.requests - two.hedged - sum(before) == len(ROWS)


def test_servers_that_are_all_slow_are_not_hedged_beyond_the_budget(nothing_compared):
    slow = threading.Event()

    def script(request, attempt):
        # From 0.3 to 0.8 s, so that a place is free now and then, for a hedge or for the next row.
        seconds = 0.3 + 0.05 * (7 * request["prompt"][1] % 11)
        return Reply(answer(request["prompt"]), delay_s=seconds if slow.is_set() else 0.0)

    with servers(script, script) as both:
        guard = engine(*(server.url for server in both), hedge_quantile=0.5)
        guard.score([ROWS[:30]])
        warm = sum(health.hedged for health in guard.servers())
        slow.set()
        [verdicts] = guard.score([ROWS])
        hedged = sum(health.hedged for health in guard.servers()) - warm
    assert risks(verdicts) == EXPECTED
    # 10 at once, a tenth of the 60 rows and of the hedges, and at the end those for which places are free: 7 rows at
    # most are under way then. Without a limit there are about 40.
    assert 0 < hedged <= 25


def test_a_request_that_is_itself_at_fault_is_asked_of_nobody_else(nothing_compared):
    with servers(*[lambda request, attempt: Reply({}, 400)] * 2) as both:
        [verdicts] = engine(*(server.url for server in both)).score([ROWS])
        assert sum(len(server.requests) for server in both) == len(ROWS)
    assert all(v.risk is None and "HTTP 400" in v.reason for v in verdicts)


def test_no_server_has_more_under_way_than_its_connections_whatever_the_threads(nothing_compared):
    with servers(slowly(0.1), slowly(0.1)) as both:
        guard = engine(*(server.url for server in both), connections=3)
        found = []
        threads = [threading.Thread(target=lambda: found.append(guard.score([ROWS[:20]])[0])) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [server.most_at_once for server in both] == [3, 3]
    assert [risks(verdicts) for verdicts in found] == [EXPECTED[:20]] * 3


def test_requests_go_to_the_server_with_the_fewest_under_way(nothing_compared):
    with servers(slowly(1.0), slowly(0.02)) as (slow, fast):
        engine(slow.url, fast.url, connections=4).score([ROWS[:30]])
        # While the slow one answers its first 4 the fast one answers up to 200.
        assert len(fast.requests) > 2 * len(slow.requests)


def test_requests_are_spread_where_places_are_free(nothing_compared):
    with servers(slowly(0.5), slowly(0.5)) as both:
        engine(*(server.url for server in both), connections=8).score([ROWS[:8]])
        assert [len(server.requests) for server in both] == [4, 4]


def test_throughput_grows_with_the_servers(nothing_compared):
    def seconds(count):
        with servers(*[slowly(0.3)] * count) as given:
            guard = engine(*(server.url for server in given), connections=2)
            guard.score([ROWS[16:17]])
            started = time.monotonic()
            assert risks(guard.score([ROWS[:16]])[0]) == EXPECTED[:16]
            return time.monotonic() - started

    # 16 requests of 0.3 s, 2 at a time a server: 2.4 s, 1.2 s and 0.6 s.
    one, two, four = seconds(1), seconds(2), seconds(4)
    assert one > 1.3 * two
    assert one > 1.8 * four


def test_a_server_that_is_named_twice_is_refused():
    with pytest.raises(ConfigError, match="base_url names 'http://localhost:1/v1' 2 times"):
        engine("http://localhost:1/v1", "http://localhost:1/v1/")


def test_the_figures_of_a_server_are_what_it_was_sent(nothing_compared):
    with servers(slowly(0.01)) as (only,):
        guard = engine(only.url)
        guard.score([ROWS])
        [health] = guard.servers()
        assert health.requests == len(only.requests) == len(ROWS)
    assert (health.address, health.state, health.failures, health.hedged) == (only.url, "in use", 0, 0)
    assert 0.01 <= health.median_s < 1.0


def test_no_text_and_no_key_is_logged_of_a_server_that_is_left_out(nothing_compared, monkeypatch, caplog):
    monkeypatch.setenv("GUARD_KEY", "sesame-73")
    caplog.set_level(logging.DEBUG, logger="ballast")
    with servers(lambda request, attempt: Reply({"echo": "sesame-73"}, 500), sound) as (failing, healthy):
        engine(failing.url, healthy.url, api_key_env="GUARD_KEY").score([ROWS])
    assert "is left out" in caplog.text
    assert "sesame" not in caplog.text


def labelled(risk_of_length):
    """Answers in the labels that the guard asks for: the first is a safe one, the last an unsafe one."""

    def script(request, attempt):
        safe, *others, unsafe = request["logprob_token_ids"]
        risk = risk_of_length(len(request["prompt"]))
        shares = {**dict.fromkeys(others, 1e-9), safe: 1 - risk, unsafe: risk}
        top = {f"token_id:{token}": math.log(share) for token, share in shares.items()}
        return Reply({"choices": [{"logprobs": {"top_logprobs": [top]}}]})

    return script


# The longer the riskier, so that the self-check's harmful toy has more risk than the harmless one.
by_length = labelled(lambda tokens: min(0.9, tokens / 400))


def prompted(*urls, **options):
    model = {"model": "embedded:smollm2-135m", "engine": {"type": "server", "base_url": list(urls)}}
    return load_guardrail("prompted", **{**model, **options})


@pytest.mark.model
def test_the_self_check_runs_against_every_server():
    with servers(by_length, by_length) as (one, two):
        prompted(one.url, two.url).self_check()
        assert [len(server.requests) for server in (one, two)] == [2, 2]
    with (
        servers(by_length, labelled(lambda tokens: 0.95)) as (one, other),
        pytest.raises(GuardError, match="answers otherwise") as refused,
    ):
        prompted(one.url, other.url).self_check()
    assert f"guardrail 'prompted:smollm2-135m': {other.url}" in str(refused.value)


@pytest.mark.model
def test_servers_are_seen_through_caches_and_other_guards(tmp_path):
    from ballast.guardrails.families.ensemble import EnsembleGuard, EnsembleOptions

    rules = load_guardrail("rules")
    hello = Exchange(({"role": "user", "content": "Hello"},), "Hello there")
    with servers(by_length, by_length) as both:
        urls = [server.url for server in both]
        engine_options = {"type": "server", "base_url": urls, "cache": str(tmp_path / "verdicts.sqlite")}
        guard = prompted(engine=engine_options, self_check="off")
        members = ({"type": "rules"}, {"type": "ngram"})
        together = EnsembleGuard(EnsembleOptions.model_validate({"members": members}), [guard, rules])
        meter = ServerMeter(together)
        together.assess([hello], [(5, 11)])
        figures = meter.read()
        assert [health.address for health in servers_of(together)] == urls
    # Two prompts, each asked of both servers, since they are the first.
    assert figures == {
        "guard/requests": 4.0,
        "guard/failed_requests": 0.0,
        "guard/hedges": 0.0,
        "guard/servers_left_out": 0.0,
    }
    assert meter.read()["guard/requests"] == 0.0
    assert ServerMeter(rules).read() == {}


def test_figures_of_several_processes_are_summed_but_for_the_servers_that_are_left_out():
    one = {"guard/requests": 40.0, "guard/failed_requests": 1.0, "guard/hedges": 2.0, "guard/servers_left_out": 1.0}
    other = {"guard/requests": 30.0, "guard/failed_requests": 0.0, "guard/hedges": 1.0, "guard/servers_left_out": 0.0}
    # Both ask the same servers, so that one left out by both would not be two.
    assert over_processes([one, other]) == {
        "guard/requests": 70.0,
        "guard/failed_requests": 1.0,
        "guard/hedges": 3.0,
        "guard/servers_left_out": 1.0,
    }
    assert over_processes([{}, {}]) == {}


def test_a_moderation_guard_goes_on_with_the_server_that_is_left():
    def moderate(request, attempt):
        scores = {"violence": len(request["input"]) / 100}
        return Reply({"results": [{"category_scores": scores}]})

    texts = ["a" * n for n in range(1, 31)]
    with serving(moderate) as healthy:
        with serving(moderate) as fallen:
            urls = [fallen.url, healthy.url]
        guard = load_guardrail("moderation", base_url=urls, backoff_s=0.01)
        traces = guard.assess([Exchange((), text) for text in texts], [(len(text),) for text in texts])
    assert [trace.risk for trace in traces] == [(pytest.approx(len(text) / 100),) for text in texts]
    assert states(guard) == ["left out", "in use"]
