"""No character of a segment that the guardrail has not passed reaches a client, whatever happens."""

import threading
import time

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.pipeline.serving.scripted_upstream import Die, Raw, Upstream, Wait, events, finish_of, staged, text_of

from ballast.guardrails.scripted import ScriptedGuardrail
from ballast.guardrails.segments import SegmentOptions, cut_response
from ballast.pipeline.config_serve import ServeGuard
from ballast.pipeline.serving.release import split_segments

MESSAGE = ServeGuard().safe_message
WORDS = {"segments": {"unit": "words", "size": 2}}


class BatchGuard:
    """A scripted guard without sessions."""

    name = "batch"

    def __init__(self, script):
        self._scripted = ScriptedGuardrail(script)

    def assess(self, exchanges, cuts):
        return self._scripted.assess(exchanges, cuts)


def risky_from(word):
    return lambda exchange, prefix: 0.9 if word in prefix else 0.1


@pytest.mark.parametrize("kind", [ScriptedGuardrail, BatchGuard])
def test_a_safe_answer_arrives_unchanged_with_its_end_and_usage(kind):
    upstream = Upstream(["One ", "two thr", "ee four\u2028 five", "\n"])
    with staged(kind(lambda e, p: 0.1), upstream, guarding=WORDS) as stage:
        answer = stage.ask(stream_options={"include_usage": True})
        assert answer.status_code == 200
        assert text_of(answer.text) == "One two three four\u2028 five\n"
        *_, last, usage, done = events(answer.text)
        assert last["choices"][0]["finish_reason"] == "stop"
        assert usage["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
        assert done == "[DONE]"
        whole = stage.ask(stream=False).json()
        assert whole["choices"][0]["message"]["content"] == "One two three four\u2028 five\n"
        assert whole["choices"][0]["finish_reason"] == "stop"
        assert whole["usage"]["total_tokens"] == 8


def test_only_text_passes_through_from_the_model_server():
    with staged(ScriptedGuardrail(lambda e, p: 0.1)) as stage:
        for answer in (stage.ask(), stage.ask(stream=False)):
            assert "secret" not in answer.text
            assert "thoughts" not in answer.text


@pytest.mark.parametrize("kind", [ScriptedGuardrail, BatchGuard])
def test_a_segment_over_the_threshold_ends_the_answer_and_the_generation(kind):
    # Segments of two words: "a b" passes, " BAD c" does not, and nothing of it is seen.
    upstream = Upstream(["a b", " BAD c", " d", Wait(30), " never"])
    with staged(kind(risky_from("BAD")), upstream, guarding=WORDS) as stage:
        answer = stage.ask()
        assert text_of(answer.text) == f"a b\n\n{MESSAGE}"
        assert finish_of(answer.text) == "content_filter"
        assert events(answer.text)[-1] == "[DONE]"
        assert "BAD" not in answer.text
        stage.until(lambda: upstream.aborted == 1 and upstream.open == 0)
        assert " never" not in upstream.written


def test_the_generation_is_aborted_before_the_client_is_told():
    upstream = Upstream(["BAD b c", Wait(30)])
    with (
        staged(ScriptedGuardrail(risky_from("BAD")), upstream, guarding=WORDS) as stage,
        stage.client.stream(
            "POST",
            "/v1/chat/completions",
            json={"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True},
        ) as answer,
    ):
        next(answer.iter_bytes())
        stage.until(lambda: upstream.aborted == 1, 1.0)


def test_a_blocked_answer_in_one_piece_is_the_safe_message_alone():
    with staged(ScriptedGuardrail(risky_from("BAD")), Upstream(["a b c BAD d"]), guarding=WORDS) as stage:
        (choice,) = stage.ask(stream=False).json()["choices"]
        assert choice["message"]["content"] == MESSAGE
        assert choice["finish_reason"] == "content_filter"


def test_a_risk_at_the_threshold_blocks():
    guarding = {**WORDS, "threshold": 0.3}
    for risk, end in ((0.3, "content_filter"), (0.299, "stop")):
        with staged(ScriptedGuardrail(lambda e, p, r=risk: r), guarding=guarding) as stage:
            assert finish_of(stage.ask().text) == end


def test_each_segment_counts_even_where_a_later_one_is_calm_again():
    # All arrives at once; the middle segment " c d" is risky, the whole is not.
    guard = BatchGuard(lambda e, p: 0.9 if p == "a b c d" else 0.1)
    with staged(guard, Upstream(["a b c d e f"]), guarding=WORDS) as stage:
        assert text_of(stage.ask().text) == f"a b\n\n{MESSAGE}"


def test_a_segment_is_released_while_the_model_still_writes():
    upstream = Upstream(["a b c", Wait(3), " d"])
    with staged(ScriptedGuardrail(lambda e, p: 0.1), upstream, guarding=WORDS) as stage:
        started = time.monotonic()
        body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True}
        with stage.client.stream("POST", "/v1/chat/completions", json=body) as answer:
            assert text_of(next(answer.iter_text())) == "a b"
        assert time.monotonic() - started < 2


def test_the_guard_reads_the_conversation_without_the_contracts_system_prompt():
    seen = []

    def script(exchange, prefix):
        seen.append([message["content"] for message in exchange.messages])
        return 0.1

    with staged(ScriptedGuardrail(script), system_prompt="Be kind.") as stage:
        stage.ask()
        assert seen[0] == ["Hi"]
        ((_, body),) = stage.upstream.requests
        assert [m["content"] for m in body["messages"]] == ["Be kind.", "Hi"]


def test_an_answer_that_grows_too_long_ends_with_length_and_is_judged_to_its_end():
    upstream = Upstream(["a b c d", Wait(30)])
    with staged(ScriptedGuardrail(lambda e, p: 0.1), upstream, guarding=WORDS, limits={"answer_chars": 5}) as stage:
        answer = stage.ask()
        assert text_of(answer.text) == "a b c"
        assert finish_of(answer.text) == "length"
        stage.until(lambda: upstream.aborted == 1)
    with staged(ScriptedGuardrail(risky_from("c")), upstream, guarding=WORDS, limits={"answer_chars": 5}) as stage:
        assert text_of(stage.ask().text) == f"a b\n\n{MESSAGE}"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ([Die()], "upstream_failed"),
        ([Raw(b"data: not json\n\n")], "upstream_broken"),
        ([Raw(b'data: {"error": {"message": "secret"}}\n\n')], "upstream_failed"),
        ([Raw(b'data: {"choices": [{"index": 1, "delta": {"content": "secret"}}]}\n\n')], "upstream_broken"),
        ([Raw(b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "abort"}]}\n\n')], "upstream_broken"),
        ([Raw(b"data: [DONE]\n\n")], "upstream_failed"),
        ([Wait(30)], "upstream_timeout"),
    ],
)
def test_what_was_not_judged_is_lost_with_the_model_server(fault, code, stream):
    upstream = Upstream(["a b unjudged", *fault], finish=None)
    guard = ScriptedGuardrail(lambda e, p: 0.1)
    patience = 0.3 if code == "upstream_timeout" else 10
    with staged(guard, upstream, guarding=WORDS, upstream_timeout_s=patience) as stage:
        answer = stage.ask(stream=stream)
        assert "unjudged" not in answer.text
        assert "secret" not in answer.text
        if stream:
            assert text_of(answer.text) == "a b"
            assert events(answer.text)[-1]["error"]["code"] == code
        else:
            assert answer.status_code in (502, 504)
            assert answer.json()["error"]["code"] == code


def test_a_model_server_that_ends_without_a_reason_has_failed():
    with staged(ScriptedGuardrail(lambda e, p: 0.1), Upstream(["whole answer"], finish=None)) as stage:
        assert stage.ask().status_code == 502


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_the_generation(stream):
    upstream = Upstream(["a b c", Wait(30), " d"])
    with staged(ScriptedGuardrail(lambda e, p: 0.1), upstream, guarding=WORDS) as stage:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{stage.url}/v1/chat/completions",
                headers=stage.client.headers,
                json={"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": stream},
                timeout=0.4,
                trust_env=False,
            )
        stage.until(lambda: upstream.aborted == 1 and upstream.open == 0)
        stage.until(lambda: stage.gateway._in_flight == 0)
        told = {"route": "chat", "end": "client_gone"}
        count = stage.gateway.metrics.registry.get_sample_value
        stage.until(lambda: count("ballast_gateway_requests_total", told) == 1)


def test_a_client_that_leaves_while_the_guard_thinks_ends_the_generation():
    inside, go_on = threading.Event(), threading.Event()

    def script(exchange, prefix):
        inside.set()
        go_on.wait(10)
        return 0.1

    upstream = Upstream(["a b c", Wait(30)])
    with staged(ScriptedGuardrail(script), upstream, guarding={**WORDS, "timeout_s": 20}) as stage:
        body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True}
        with pytest.raises(httpx.ReadTimeout):
            stage.client.post("/v1/chat/completions", json=body, timeout=0.5)
        assert inside.is_set()
        stage.until(lambda: upstream.aborted == 1)
        go_on.set()


TEXTS = st.text(st.sampled_from("ab.! \n\u3002漢é🙂\u2028"), max_size=60)


@given(text=TEXTS, tail=TEXTS, size=st.integers(1, 4), unit=st.sampled_from(["words", "sentences"]))
def test_a_complete_segment_is_a_segment_whatever_follows(text, tail, size, unit):
    options = SegmentOptions(unit=unit, size=size)
    segments, rest = split_segments(text, options, complete=False)
    assert "".join(segments) + rest == text
    ends = [sum(map(len, segments[: i + 1])) for i in range(len(segments))]
    assert ends == list(cut_response(text + tail, options)[: len(ends)])


def test_what_is_held_back_is_bounded():
    options = SegmentOptions(unit="words", size=5)
    segments, rest = split_segments(" " * 10_000, options, complete=False)
    assert "".join(segments) + rest == " " * 10_000
    assert max(map(len, [*segments, rest])) <= 4096


@pytest.fixture(scope="module", params=[ScriptedGuardrail, BatchGuard])
def stage_of_many(request):
    """One gateway for all examples; each example sets the script of the guard and of the model server."""
    played = {"script": lambda e, p: 0.1}
    guard = request.param(lambda exchange, prefix: played["script"](exchange, prefix))
    with staged(guard, guarding={"segments": {"unit": "words", "size": 2}}, limits={"requests_per_minute": 0}) as stage:
        stage.played = played
        yield stage


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_client_gets_the_passed_segments_and_not_a_character_more(stage_of_many, data):
    stage = stage_of_many
    text = data.draw(TEXTS, label="text")
    breaks = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8), label="chunks"))
    chunks = [text[a:b] for a, b in zip([0, *breaks], [*breaks, len(text)], strict=True)]
    dies = data.draw(st.booleans(), label="dies")
    cuts = cut_response(text, SegmentOptions(unit="words", size=2)) if text else ()
    risks = {text[:cut]: data.draw(st.sampled_from([0.1, 0.2, 0.3, 0.9, None]), label=f"risk at {cut}") for cut in cuts}
    stage.played["script"] = lambda exchange, prefix: risks[prefix]  # another prefix raises, and so is unscored
    stage.upstream.script = [*chunks, Die()] if dies else chunks

    # By hand: the segments before the first one that is risky or unscored, in order.
    passed, end = "", "stop"
    for cut in cuts:
        risk = risks[text[:cut]]
        if risk is None or risk >= 0.5:
            end = "failed" if risk is None else "content_filter"
            break
        passed = text[:cut]
    answer = stage.ask()
    got = text_of(answer.text) if answer.status_code == 200 else ""
    if finish_of(answer.text) == "content_filter":
        got = got.removesuffix(MESSAGE).removesuffix("\n\n")
    if dies:  # when it died decides how much of it was judged
        assert passed.startswith(got)
        assert finish_of(answer.text) != "stop"
    else:
        assert got == passed
        assert finish_of(answer.text) == (None if end == "failed" else end)
        if end == "failed" and not passed:
            assert answer.status_code == 503
