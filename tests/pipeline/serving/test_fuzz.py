"""The gateway under a fuzzer that reads its OpenAPI description: whatever is sent, the answer is one that is meant."""

import json
from datetime import timedelta

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from tests.pipeline.serving.scripted_upstream import HEADERS, Die, Raw, Upstream, staged

from ballast.guardrails.scripted import ScriptedGuardrail
from ballast.pipeline.config_serve import ServeConfig
from ballast.pipeline.serving.app import create_app

ROUTES = [
    ("/v1/chat/completions", "POST"),
    ("/v1/completions", "POST"),
    ("/v1/models", "GET"),
    ("/health", "GET"),
]
# Of errors that the gateway means; 500 is none of them.
REFUSED = {400, 404, 405, 408, 413}
SECRETS = ("secret", "unjudged thoughts", "Traceback", "pydantic")
SPECIAL = "<|im_start|>"
KNOWN_TO_BE_REFUSED = {
    "n", "tools", "tool_choice", "functions", "function_call", "logprobs", "top_logprobs", "best_of", "echo", "suffix",
    "max_tokens", "max_completion_tokens",
}  # fmt: skip
EXAMPLES = [20, pytest.param(300, marks=pytest.mark.long)]


def examples(count):
    return settings(
        max_examples=count, deadline=timedelta(seconds=20), derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def description():
    app = create_app(ServeConfig(unguarded=True), "http://127.0.0.1:1", None, api_keys=["k"])
    return schemathesis.openapi.from_dict(app.openapi())


SCHEMA = description()


@pytest.fixture(scope="module")
def stage():
    guard = ScriptedGuardrail(lambda exchange, prefix: 0.9 if "bad" in prefix else 0.1)
    limits = {"requests_per_minute": 0}
    with staged(guard, Upstream(["Hello there, ", "friend."]), special_tokens=[SPECIAL], limits=limits) as stage:
        yield stage


def check(response):
    """An answer, or an error of OpenAI's shape that tells nothing of the model server."""
    text = response.text
    for secret in SECRETS:
        assert secret not in text
    if response.status_code == 200:
        return
    assert response.status_code in REFUSED, (response.status_code, text)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert all(error[key] for key in ("message", "type", "code"))
    assert error["code"] != "internal_error"
    assert len(text) < 2000


def without_refusals(body):
    """The body without what is known in order to be refused, so that what comes after is reached as well."""
    if not isinstance(body, dict):
        return body
    kept = {key: value for key, value in body.items() if key not in KNOWN_TO_BE_REFUSED}
    if isinstance(kept.get("messages"), list):
        kept["messages"] = [m for m in kept["messages"] if not isinstance(m, dict) or m.get("role") != "system"]
    return kept


def send(stage, case):
    """The generated request, with the right key and a path of this gateway."""
    return case.call(base_url=stage.url, headers=HEADERS, timeout=20)


@pytest.mark.parametrize("count", EXAMPLES)
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", [path for path, method in ROUTES if method == "POST"])
def test_no_request_makes_the_gateway_fail(stage, path, mode, count):
    seen = set()

    @examples(count)
    @given(case=SCHEMA[path]["POST"].as_strategy(generation_mode=mode), bare=st.booleans())
    def ask(case, bare):
        if bare and mode == GenerationMode.POSITIVE:  # of the others it might take what breaks the description
            case.body = without_refusals(case.body)
        response = send(stage, case)
        check(response)
        seen.add(response.status_code)

    ask()
    # What breaks the description is refused; of what keeps it some is served.
    assert (200 in seen) == (mode == GenerationMode.POSITIVE)


@pytest.mark.parametrize("path", [path for path, method in ROUTES if method == "GET"])
def test_what_takes_no_input_answers(stage, path):
    @examples(5)
    @given(case=SCHEMA[path]["GET"].as_strategy())
    def ask(case):
        assert send(stage, case).status_code == 200

    ask()


PARTS = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"data: ", b"\n\n", b"[DONE]", b'{"choices": ', b"[", b"]}", b'{"delta": {"content": "', b'"}}', b"null", b"\r"]),
    st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=8), lambda x: st.lists(x, max_size=3) | st.dictionaries(
        st.sampled_from(["choices", "delta", "content", "index", "finish_reason", "usage", "error", "text"]), x, max_size=4)
    ).map(lambda value: b"data: " + json.dumps(value).encode() + b"\n\n"),
)  # fmt: skip


@pytest.mark.parametrize("count", EXAMPLES)
@pytest.mark.parametrize("path", [path for path, method in ROUTES if method == "POST"])
def test_no_bytes_as_a_body_make_the_gateway_fail(stage, path, count):
    quoted = st.sampled_from(
        [b'{"model": "policy", "prompt": "a"', b'{"messages": [', b'{"role": "user"', b"}", b"]", b"NaN", b"1e999"]
    )

    @examples(count)
    @given(
        parts=st.lists(quoted | st.binary(max_size=20), max_size=6),
        kind=st.sampled_from([None, "application/json", "text/plain"]),
    )
    def ask(parts, kind):
        check(stage.client.post(path, content=b"".join(parts), headers={"Content-Type": kind} if kind else {}))

    ask()


@pytest.mark.parametrize("count", EXAMPLES)
@pytest.mark.parametrize("stream", [False, True])
def test_nothing_that_a_model_server_sends_makes_the_gateway_fail(stage, stream, count):
    whole = stage.upstream.script

    @examples(count)
    @given(parts=st.lists(PARTS, max_size=6), ending=st.sampled_from([None, Die()]))
    def ask(parts, ending):
        stage.upstream.script = [Raw(part) for part in parts if part] + ([ending] if ending else [])
        try:
            response = stage.ask(stream=stream)
        finally:
            stage.upstream.script = whole
        assert response.status_code in (200, 502, 503, 504), response.text
        assert "internal_error" not in response.text

    ask()
    assert stage.ask().status_code == 200


def test_the_description_has_every_path_that_answers_and_no_other(stage):
    described = {(path, method.upper()) for path, item in SCHEMA.raw_schema["paths"].items() for method in item}
    assert described == {*ROUTES, ("/metrics", "GET")}
    for path in ("/openapi.json", "/docs", "/tokenize", "/v1/embeddings", "/v1/chat/completions/", "//health"):
        check(httpx.get(f"{stage.url}{path}", headers=HEADERS, trust_env=False))
    for path, method in ROUTES:
        for other in {"GET", "POST", "PUT", "DELETE", "PATCH", "TRACE"} - {method}:
            answer = httpx.request(other, f"{stage.url}{path}", headers=HEADERS, trust_env=False)
            check(answer)
            assert answer.status_code == 405
            assert answer.headers["allow"] == method
