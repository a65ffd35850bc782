"""A moderation endpoint as a guard, on a real server that misbehaves: no fault makes a risk or costs another row its own."""

import json
import re
import time
import zlib

import pytest
from tests.guardrails.fault_server import HANG_UP, Reply, serving

from ballast.errors import ConfigError
from ballast.guardrails.contract import check_guardrail
from ballast.guardrails.families.moderation import ModerationGuard, ModerationOptions
from ballast.guardrails.registry import load_guardrail
from ballast.guardrails.types import Exchange
from ballast.pipeline.config_guards import guard_identity

MESSAGES = ({"role": "user", "content": "hello"},)


def guard(url, **settings):
    return load_guardrail("moderation", base_url=url, **{"timeout_s": 5.0, "retries": 2, "backoff_s": 0.01, **settings})


def scores(**by_category):
    return {"results": [{"flagged": False, "categories": {}, "category_scores": by_category}]}


def sound(request, attempt=0):
    """A text of n characters scores n / 100 for violence, and 0.05 for hate."""
    return Reply(scores(violence=min(len(request["input"]) / 100, 1.0), hate=0.05))


def assess(moderation, *responses, cuts=None):
    exchanges = [Exchange(MESSAGES, response) for response in responses]
    return moderation.assess(exchanges, cuts or [(len(response),) for response in responses])


SAFE = scores(violence=0.01, hate=0.01)
FAULTS = {
    "slow": (Reply(SAFE, delay_s=30), "did not answer within 1 s"),
    "a byte at a time": (Reply(SAFE, drip_s=0.2), "did not answer within 1 s"),
    "429 for ever": (Reply(SAFE, 429), r"HTTP 429 Too Many Requests \(3 attempts\)"),
    "500 for ever": (Reply(SAFE, 500), r"HTTP 500 Internal Server Error \(3 attempts\)"),
    "400": (Reply(SAFE, 400), "HTTP 400 Bad Request; the text may be longer"),
    "401": (Reply(SAFE, 401), "HTTP 401 Unauthorized; set api_key_env"),
    "a redirect": (Reply(SAFE, 307, {"Location": "http://127.0.0.1:1/"}), "HTTP 307"),
    "garbage bytes": (Reply(b"\x00\xff\xfe"), "does not fit .json_invalid"),
    "an empty body": (Reply(b""), "does not fit .json_invalid"),
    "half of the body": (Reply(json.dumps(SAFE).encode()[:40]), "does not fit .json_invalid"),
    "a body that breaks off": (Reply(SAFE, sent=40), "broke off the connection"),
    "hangs up": (HANG_UP, "broke off the connection"),
    "a list": (Reply([SAFE]), "does not fit"),
    "an error as 200": (Reply({"error": "overloaded"}), "results: missing"),
    "no result": (Reply({"results": []}), "results: too_short"),
    "two results": (Reply({"results": SAFE["results"] * 2}), "results: too_long"),
    "flags without scores": (Reply({"results": [{"flagged": False}]}), "category_scores: missing"),
    "no category": (Reply(scores()), "no category at all"),
    "null": (Reply(scores(violence=None, hate=0.01)), "category_scores.violence: float_type"),
    "false": (Reply(scores(violence=False)), "float_type"),
    "numbers as text": (Reply(scores(violence="0.01")), "float_type"),
    "NaN": (Reply(scores(violence=float("nan"), hate=0.01)), "category_scores.violence"),
    "below 0": (Reply(scores(violence=-0.5, hate=0.01)), "greater_than_equal"),
    "above 1": (Reply(scores(violence=1.5, hate=0.01)), "less_than_equal"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_leaves_its_row_unscored_and_the_others_scored(fault):
    reply, reason = FAULTS[fault]
    patience = {"timeout_s": 1.0, "retries": 0} if reply.delay_s or reply.drip_s else {}
    with serving(lambda request, attempt: reply if request["input"] == "bad" else sound(request)) as server:
        first, bad, second = assess(guard(server.url, **patience), "a" * 10, "bad", "b" * 20)
    assert (bad.risk, bad.category) == ((None,), (None,))
    assert re.search(reason, bad.reason), bad.reason
    assert [first.risk, second.risk] == [(0.1,), (0.2,)]


@pytest.mark.parametrize("reply", [Reply({}, 429), Reply({}, 500), HANG_UP])
def test_a_fault_that_passes_costs_nothing(reply):
    with serving(lambda request, attempt: sound(request) if attempt else reply) as server:
        assert [trace.risk for trace in assess(guard(server.url), "a" * 10, "b" * 20)] == [(0.1,), (0.2,)]


def test_a_server_that_is_down_leaves_every_cut_unscored_within_seconds():
    with serving(sound) as server:
        url = server.url
    started = time.monotonic()
    [trace] = assess(guard(url), "a" * 400, cuts=[tuple(range(1, 401))])
    assert time.monotonic() - started < 15
    assert trace.risk == (None,) * 400
    assert "cannot be reached" in trace.reason


def test_the_highest_score_is_the_risk_and_its_category_is_named():
    with serving(sound) as server:
        [trace] = assess(guard(server.url), "a" * 40, cuts=[(3, 20, 40)])
    assert trace.risk == (0.05, 0.2, 0.4)  # max(0.03, 0.05), max(0.2, 0.05), max(0.4, 0.05)
    assert trace.category == ("hate", "violence", "violence")


def test_only_the_chosen_categories_count_and_one_that_is_not_scored_is_named():
    with serving(sound) as server:
        [trace] = assess(guard(server.url, categories=("hate",)), "a" * 40)
        [missing] = assess(guard(server.url, categories=("hate", "arson")), "a" * 40)
    assert (trace.risk, trace.category) == ((0.05,), ("hate",))
    assert missing.risk == (None,)
    assert "no score for arson" in missing.reason


def test_each_distinct_prefix_is_sent_once_with_the_model_and_without_the_prompt():
    with serving(sound) as server:
        named = guard(server.url, model="mod-1")
        assess(named, "ab", "ab", "abc", cuts=[(1, 2), (2,), (1, 3)])
        sent = [(path, request) for path, _, request in server.requests]
    assert sorted(request["input"] for _, request in sent) == ["a", "ab", "abc"]
    assert all(path == "/v1/moderations" for path, _ in sent)
    assert all(request == {"model": "mod-1", "input": request["input"]} for _, request in sent)
    assert named.name == "moderation:mod-1"


def test_it_keeps_the_contract():
    def by_checksum(request, attempt):
        return Reply(scores(violence=zlib.crc32(request["input"].encode()) / 2**32))

    with serving(by_checksum) as server:
        report = check_guardrail(guard(server.url))
    assert set(report.unscored) == {"a lone surrogate"}


def test_the_text_appears_in_no_message(caplog):
    with serving(lambda request, attempt: Reply({"error": request["input"]}, 400)) as server:
        [trace] = assess(guard(server.url), "marzipan")
    assert "marzipan" not in trace.reason + caplog.text
    assert "1 of 1 requests have no usable answer" in caplog.text


def test_a_missing_key_is_named(monkeypatch):
    monkeypatch.delenv("MODERATION_KEY", raising=False)
    with pytest.raises(
        ConfigError, match="guardrail 'moderation': api_key_env names the environment variable MODERATION"
    ):
        ModerationGuard(ModerationOptions(base_url="http://localhost/v1", api_key_env="MODERATION_KEY"))


def test_two_endpoints_are_two_guards_and_time_outs_make_no_other():
    one = ModerationOptions(base_url="http://localhost/v1")
    assert guard_identity(one) == guard_identity(ModerationOptions(base_url="http://localhost/v1/", timeout_s=1))
    assert guard_identity(one) != guard_identity(ModerationOptions(base_url="http://elsewhere/v1"))
