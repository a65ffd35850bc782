"""The remote engine on a real server that misbehaves: no fault makes a verdict, and none costs another row its own."""

import asyncio
import json
import logging
import math
import re
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.guardrails.fault_server import HANG_UP, Reply, serving

from ballast.errors import ConfigError
from ballast.guardrails.engines.interface import Labels
from ballast.guardrails.engines.logprobs import verdict_from_logprobs
from ballast.guardrails.engines.options import ServerOptions
from ballast.guardrails.engines.server import ServerEngine

LABELS = Labels(safe=(3, 4), unsafe=(7,))
BAD, GOOD = [5, 6, 9], [[1, 2], [8, 8, 8, 8]]


def engine(url, **settings):
    defaults = {"connections": 4, "timeout_s": 5.0, "retries": 2, "backoff_s": 0.01}
    options = ServerOptions(base_url=url, **{**defaults, **settings})
    return ServerEngine(options, LABELS, guard="remote", model="guard-model")


def body(probabilities, prompt, **changed):
    """A vLLM server's answer: {token id: probability} after a prompt."""
    top = {f"token_id:{token}": math.log(p) for token, p in probabilities.items()}
    return {
        "choices": [{"index": 0, "text": "", "logprobs": {"top_logprobs": [top]}}],
        "usage": {"prompt_tokens": len(prompt)},
        **changed,
    }


def sound(request, attempt=0):
    """risk = 0.3 / (0.5 + 0.1 + 0.3) = 1/3 for every prompt, label mass 0.9."""
    return Reply(body({3: 0.5, 4: 0.1, 7: 0.3}, request["prompt"]))


def saying_safe(**changed):
    """Would be risk 0.01 / 0.99, were it taken."""
    return body({3: 0.9, 4: 0.08, 7: 0.01}, BAD, **changed)


def raw(logprobs):
    """The same answer with any JSON text in the place of its log-probs."""
    return json.dumps(saying_safe()).replace(json.dumps(saying_safe()["choices"][0]["logprobs"]), logprobs).encode()


def choice(logprobs):
    return {"index": 0, "logprobs": logprobs}


def reply_of(logprobs):
    return Reply(saying_safe(choices=[choice(logprobs)]))


FAULTS = {
    "slow": (Reply(saying_safe(), delay_s=30), "did not answer within 1 s"),
    "a byte at a time": (Reply(saying_safe(), drip_s=0.2), "did not answer within 1 s"),
    "429 for ever": (Reply(saying_safe(), 429), r"HTTP 429 Too Many Requests \(3 attempts\)"),
    "500 for ever": (Reply(saying_safe(), 500), r"HTTP 500 Internal Server Error \(3 attempts\)"),
    "503 for ever": (Reply(saying_safe(), 503), "HTTP 503"),
    "400": (Reply(saying_safe(), 400), "HTTP 400 Bad Request; the text may be longer"),
    "401": (Reply(saying_safe(), 401), "HTTP 401 Unauthorized; set api_key_env"),
    "404": (Reply(saying_safe(), 404), "HTTP 404 Not Found; check base_url"),
    "a redirect": (Reply(saying_safe(), 302, {"Location": "http://127.0.0.1:1/"}), "HTTP 302"),
    "garbage bytes": (Reply(b"\x00\xff\xfe safe \x80"), "does not fit .json_invalid"),
    "a web page": (Reply(b"<html>safe</html>"), "does not fit .json_invalid"),
    "an empty body": (Reply(b""), "does not fit .json_invalid"),
    "half of the body": (Reply(json.dumps(saying_safe()).encode()[:60]), "does not fit .json_invalid"),
    "a body that breaks off": (Reply(saying_safe(), sent=60), "broke off the connection"),
    "hangs up": (HANG_UP, "broke off the connection"),
    "broken compression": (Reply(b"safe", headers={"Content-Encoding": "gzip"}), "compression is broken"),
    "larger than 4 MiB": (Reply(b" " * (2**22 + 1) + json.dumps(saying_safe()).encode()), "larger than 4194304 bytes"),
    "a list": (Reply([saying_safe()]), "does not fit"),
    "null": (Reply(None), "does not fit"),
    "an error as 200": (Reply({"error": {"message": "overloaded"}}), "choices: missing"),
    "no choices": (Reply(saying_safe(choices=[])), "choices: too_short"),
    "two choices": (Reply(saying_safe(choices=saying_safe()["choices"] * 2)), "choices: too_long"),
    "no log-probs: above 0": (reply_of(None), "choices.0.logprobs"),
    "two tokens": (reply_of({"top_logprobs": [{"token_id:3": 0.0}] * 2}), "top_logprobs: too_long"),
    "no top": (reply_of({"top_logprobs": [None]}), "top_logprobs.0: dict_type"),
    "numbers as text": (reply_of({"top_logprobs": [{"token_id:3": "-0.1"}]}), "float_type"),
    "true": (reply_of({"top_logprobs": [{"token_id:3": True}]}), "float_type"),
    "NaN": (Reply(raw('{"top_logprobs": [{"token_id:3": -0.1, "token_id:7": NaN}]}')), "finite_number"),
    "infinity": (Reply(raw('{"top_logprobs": [{"token_id:3": Infinity}]}')), "finite_number"),
    "a number too large": (Reply(raw('{"top_logprobs": [{"token_id:3": -1e999}]}')), "finite_number"),
    "logits": (reply_of({"top_logprobs": [{"token_id:3": 12.5, "token_id:7": -3.0}]}), "no log-probs: above 0"),
    "more than 1 in all": (
        reply_of({"top_logprobs": [{"token_id:3": -0.1, "token_id:9": -0.1}]}),
        "no log-probs: above 0",
    ),
    "an empty top": (reply_of({"top_logprobs": [{}]}), "no label of the guard"),
    "no label": (reply_of({"top_logprobs": [{"token_id:9": -0.1}]}), "no label of the guard"),
    "tokens as text": (reply_of({"top_logprobs": [{"safe": -0.1, "unsafe": -3.0}]}), "names tokens by text"),
    "a shortened prompt": (Reply(saying_safe(usage={"prompt_tokens": 2})), "about 2 tokens and the prompt has 3"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_leaves_its_row_unscored_and_the_others_scored(fault):
    reply, reason = FAULTS[fault]
    with serving(lambda request, attempt: reply if request["prompt"] == BAD else sound(request)) as server:
        patience = {"timeout_s": 1.0, "retries": 0} if reply.delay_s or reply.drip_s else {}
        [[first, bad], [second]] = engine(server.url, **patience).score([[GOOD[0], BAD], [GOOD[1]]])
    assert (bad.risk, bad.label_mass) == (None, None)
    assert bad.reason is not None
    assert re.search(reason, bad.reason), bad.reason
    assert [first.risk, second.risk] == pytest.approx([1 / 3, 1 / 3])
    assert first.label_mass == pytest.approx(0.9)


@pytest.mark.parametrize("reply", [Reply({}, 429), Reply({}, 500), Reply({}, 408), HANG_UP, Reply({}, delay_s=30)])
def test_a_fault_that_passes_costs_nothing(reply):
    with serving(lambda request, attempt: sound(request) if attempt else reply) as server:
        verdicts = engine(server.url, timeout_s=1.0).score([GOOD])[0]
    assert [v.risk for v in verdicts] == pytest.approx([1 / 3, 1 / 3])


def test_what_the_server_refuses_for_good_is_not_asked_again():
    with serving(lambda request, attempt: Reply({}, 400)) as server:
        assert engine(server.url).score([GOOD])[0][0].risk is None
        assert len(server.requests) == len(GOOD)


def test_retry_after_is_obeyed_by_every_request_and_bounded():
    arrived = []

    def script(request, attempt):
        arrived.append(time.monotonic())
        return Reply({}, 429, {"Retry-After": "86400"}) if len(arrived) == 1 else sound(request)

    with serving(script) as server:  # asked for a day, it waits timeout_s
        [verdicts] = engine(server.url, connections=1, timeout_s=1.0, retries=5).score([GOOD])
    assert [v.risk for v in verdicts] == pytest.approx([1 / 3, 1 / 3])
    assert 0.99 < arrived[1] - arrived[0] < 10


def test_a_server_that_is_down_leaves_500_rows_unscored_without_waiting_for_each():
    with serving(sound) as server:
        url = server.url
    guard = engine(url, retries=3, backoff_s=0.1)
    [verdicts] = guard.score([[[1, n] for n in range(500)]])
    # 4 rows at once wait 0.1 + 0.2 + 0.4 s each, two rounds of them, then 492 rows are tried once each: 8 * 4 + 492
    # requests. With every attempt of every row it would be 2000, and 500 / 4 * 0.7 = 87 s of waiting.
    assert guard.servers()[0].requests < 700
    assert all(v.risk is None for v in verdicts)
    assert "cannot be reached" in verdicts[-1].reason


def test_a_server_that_only_fails_is_asked_once_a_row_after_five_rows_in_a_row():
    with serving(lambda request, attempt: Reply({}, 500)) as server:
        [verdicts] = engine(server.url, connections=1).score([[[1, n] for n in range(40)]])
        assert all(v.risk is None for v in verdicts)
        assert len(server.requests) == 5 * 3 + 35  # with 3 attempts each, then with one


def test_rows_that_a_server_chokes_on_do_not_cost_the_rest_theirs():
    rows = [[1, n] for n in range(20)]
    choking = rows[:12]
    with serving(lambda r, attempt: Reply({}, 500) if r["prompt"] in choking else sound(r)) as server:
        [verdicts] = engine(server.url, connections=1).score([rows])
    assert [v.risk is None for v in verdicts] == [True] * 12 + [False] * 8


def test_a_server_that_is_back_is_given_every_attempt_again():
    def script(request, attempt):
        number = request["prompt"][1]
        failing = number < 5 or (number == 6 and attempt < 2)  # five in a row, one that is answered, one that is late
        return Reply({}, 500) if failing else sound(request)

    with serving(script) as server:
        [verdicts] = engine(server.url, connections=1).score([[[1, n] for n in range(7)]])
    assert [v.risk is None for v in verdicts] == [True] * 5 + [False] * 2


def test_a_server_that_hangs_ends_the_call_after_its_patience():
    started = time.monotonic()
    with serving(lambda request, attempt: Reply({}, delay_s=30)) as server:
        settings = {"connections": 2, "timeout_s": 0.1, "retries": 1}
        [verdicts] = engine(server.url, **settings).score([[[1, n] for n in range(300)]])
        seconds = time.monotonic() - started
    assert all(v.risk is None for v in verdicts)
    # Patience (2 * 1 + 1) * 0.1 = 0.3 s. Row by row it would be 300 rows * 0.1 s / 2 at the least.
    assert seconds < 8
    assert "nothing was answered for 0.3 s" in verdicts[-1].reason


def test_requests_run_side_by_side_up_to_the_number_of_connections():
    with serving(lambda request, attempt: Reply(sound(request).body, delay_s=0.05)) as server:
        engine(server.url, connections=3).score([[[1, n] for n in range(12)]])
        assert server.most_at_once == 3


def test_a_request_asks_for_one_token_and_the_labels_and_equal_prompts_go_once():
    with serving(sound) as server:
        groups = [[[1], [1, 2, 3], [1, 2]], [[1, 2], [9, 9]], []]
        verdicts = engine(server.url, connections=1).score(groups)
        path, _, first = server.requests[0]
        prompts = [request["prompt"] for _, _, request in server.requests]
    assert [len(group) for group in verdicts] == [3, 2, 0]
    assert prompts == [[1, 2, 3], [1, 2], [1], [9, 9]]  # the longest of each group first
    assert path == "/v1/completions"
    assert first == {
        "model": "guard-model",
        "prompt": [1, 2, 3],
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": 20,
        "logprob_token_ids": [3, 4, 7],
        "return_tokens_as_token_ids": True,
    }


def test_it_answers_inside_a_running_event_loop_and_from_threads():
    async def inside(url):
        return engine(url).score([GOOD])

    with serving(sound) as server:
        results = [asyncio.run(inside(server.url))]
        threads = [threading.Thread(target=lambda: results.append(engine(server.url).score([GOOD]))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [results[0]] * 4


def test_the_key_is_sent_and_appears_in_no_message(monkeypatch, caplog):
    monkeypatch.setenv("GUARD_KEY", "sesame-73")
    caplog.set_level(logging.DEBUG, logger="ballast")
    with serving(lambda request, attempt: Reply({"echo": "sesame-73"}, 401)) as server:
        [[verdict]] = engine(server.url, api_key_env="GUARD_KEY").score([[[1]]])
        assert server.requests[0][1]["Authorization"] == "Bearer sesame-73"
    assert "sesame" not in verdict.reason + caplog.text
    assert "remote: 1 of 1 requests have no usable answer" in caplog.text


def test_a_missing_key_and_a_base_url_that_is_none_are_named(monkeypatch):
    monkeypatch.delenv("GUARD_KEY", raising=False)
    with pytest.raises(ConfigError, match="guardrail 'remote': api_key_env names the environment variable GUARD_KEY"):
        engine("http://localhost/v1", api_key_env="GUARD_KEY")
    for url in ("localhost:8000/v1", "ftp://x", "", "http://", "http://[::1", "http://host:99999/v1"):
        with pytest.raises(ConfigError, match="base_url is"):
            engine(url)
    with pytest.raises(ConfigError, match="base_url holds a user name or password") as refused:
        engine("http://user:sesame@host/v1")
    assert "sesame" not in str(refused.value)


def logs(probabilities):
    return {token: math.log(p) for token, p in probabilities.items()}


@pytest.mark.parametrize(
    ("found", "risk", "mass"),
    [
        ({3: 0.5, 4: 0.1, 7: 0.3}, 0.3 / 0.9, 0.9),
        ({3: 0.5, 7: 0.3, 9: 0.05}, 0.3 / 0.8, 0.8),  # a missing safe label counts as 0
        ({3: 0.5, 4: 0.1, 9: 0.05}, 0.05 / 0.65, 0.6),  # a missing unsafe one as the least that was reported
        ({7: 0.4, 9: 0.3}, 1.0, 0.4),
        ({9: 0.5, 3: 0.02}, 0.02 / 0.04, 0.02),
    ],
)
def test_a_missing_label_counts_for_its_riskier_end(found, risk, mass):
    verdict = verdict_from_logprobs(logs(found), LABELS)
    assert verdict.risk == pytest.approx(risk)
    assert verdict.label_mass == pytest.approx(mass)


@given(st.lists(st.floats(-30, 0), min_size=12, max_size=12), st.integers(1, 12))
def test_a_shortened_distribution_never_lowers_the_risk(logits, top):
    labels = Labels(safe=(0, 1, 2), unsafe=(3, 4))
    total = math.log(sum(map(math.exp, logits)))
    every = {token: logit - total for token, logit in enumerate(logits)}
    shown = dict(sorted(every.items(), key=lambda item: -item[1])[:top])
    true, seen = verdict_from_logprobs(every, labels), verdict_from_logprobs(shown, labels)
    assert (seen.risk is None) == (not shown.keys() & {0, 1, 2, 3, 4})
    if seen.risk is not None:
        assert seen.risk >= true.risk - 1e-9
        assert seen.label_mass <= true.label_mass + 1e-9


def test_labels_without_any_probability_are_unscored():
    for value in (-9999.0, -math.inf):
        verdict = verdict_from_logprobs({3: value, 4: value, 7: value, 9: 0.0}, LABELS)
        assert verdict.risk is None
        assert "no probability at all" in verdict.reason
