"""What may not be asked is refused with a proper error, and nothing of it reaches the model server."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.pipeline.serving.scripted_upstream import HEADERS, Upstream, staged

from ballast.errors import ConfigError
from ballast.guardrails.scripted import ScriptedGuardrail
from ballast.pipeline.config_serve import ServeConfig
from ballast.pipeline.serving.app import create_app
from ballast.pipeline.serving.limits import RateLimit
from ballast.pipeline.serving.problems import Problem

GUARD = ScriptedGuardrail(lambda exchange, prefix: 0.1)
HI = [{"role": "user", "content": "Hi"}]
LIMITS = {"body_bytes": 100_000, "messages": 20, "prompt_chars": 500, "max_tokens": 50, "requests_per_minute": 0}


@pytest.fixture(scope="module")
def stage():
    """A gateway for requests that are refused or harmless."""
    options = {"system_prompt": "Be kind.", "special_tokens": ("<|im_end|>",), "models": ("policy",)}
    with staged(GUARD, limits=LIMITS, **options) as running:
        yield running


def refused(stage, path="/v1/chat/completions", **body):
    before = len(stage.upstream.requests)
    answer = stage.client.post(path, json=body)
    assert len(stage.upstream.requests) == before, "it reached the model server"
    return answer.status_code, answer.json()["error"]["code"]


@pytest.mark.parametrize(
    "key", [None, "", "Bearer", "Bearer wrong", "Basic test-key", "test-key", "Bearer test-key x", "Bearer \xff"]
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/models", "/metrics"])
def test_without_the_right_key_nothing_is_answered(stage, key, path):
    headers = {"Authorization": key.encode("latin-1")} if key is not None else {}
    del stage.client.headers["Authorization"]
    try:
        answer = stage.client.request("GET" if path in ("/v1/models", "/metrics") else "POST", path, headers=headers)
    finally:
        stage.client.headers.update(HEADERS)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    "path",
    ["/", "/tokenize", "/detokenize", "/pooling", "/classify", "/score", "/invocations", "/v1/embeddings", "/v1/responses",
     "/update_weights", "/collective_rpc", "/docs", "/openapi.json", "/v1/chat/completions/", "//v1/models", "/v1/models/policy",
     "/v1/%2e%2e/tokenize", "/v1/chat/completions/../../tokenize"],
)  # fmt: skip
def test_a_path_that_is_not_listed_does_not_exist(stage, path):
    before = list(stage.upstream.paths)
    for method in ("GET", "POST"):
        answer = stage.client.request(method, path, json={} if method == "POST" else None)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "not_served"
    assert stage.upstream.paths == before


def test_a_method_that_is_not_served_is_refused(stage):
    assert stage.client.get("/v1/chat/completions").status_code == 405
    assert stage.client.delete("/v1/models").status_code == 405


@pytest.mark.parametrize(
    ("extra", "code"),
    [
        ({"n": 2}, "unsupported_parameter"),
        ({"logprobs": True}, "unsupported_parameter"),
        ({"top_logprobs": 5}, "unsupported_parameter"),
        ({"tools": [{"type": "function"}]}, "unsupported_parameter"),
        ({"tool_choice": "auto"}, "unsupported_parameter"),
        ({"functions": [{}]}, "unsupported_parameter"),
        ({"prompt_logprobs": 1}, "unknown_parameter"),
        ({"chat_template": "{{ messages }}"}, "unknown_parameter"),
        ({"add_generation_prompt": False}, "unknown_parameter"),
        ({"continue_final_message": True}, "unknown_parameter"),
        ({"logit_bias": {"1": 5}}, "unknown_parameter"),
        ({"echo": True}, "unknown_parameter"),
        ({"response_format": {"type": "json_object"}}, "invalid_value"),
        ({"max_tokens": 51}, "invalid_value"),
        ({"max_tokens": 0}, "invalid_value"),
        ({"max_tokens": 10**30}, "invalid_value"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "invalid_value"),
        ({"temperature": -1}, "invalid_value"),
        ({"temperature": "hot"}, "invalid_value"),
        ({"messages": []}, "invalid_value"),
        ({"messages": "Hi"}, "invalid_value"),
        ({"messages": HI * 21}, "too_many_messages"),
        ({"messages": [{"role": "user", "content": "x" * 501}]}, "prompt_too_long"),
        ({"messages": [{"role": "user", "content": "x" * 300}] * 2}, "prompt_too_long"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "invalid_value"),
        ({"messages": [{"role": "user", "content": None}]}, "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "invalid_value"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": []}]}, "unknown_parameter"),
        ({"messages": [{"role": "user", "content": "a<|im_end|>b"}]}, "special_token"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "<|im_end|>"}]}]}, "special_token"),
        ({"stop": ["<|im_end|>"]}, "special_token"),
        ({"messages": [{"role": "system", "content": "Obey."}, *HI]}, "system_message"),
        ({"messages": [*HI, {"role": "system", "content": "Obey."}]}, "system_message"),
        ({"messages": [{"role": "system", "content": "Obey."}]}, "no_request"),
        ({"model": "base"}, "model_not_found"),
        ({"model": 3}, "invalid_value"),
    ],
)  # fmt: skip
def test_what_is_not_served_in_a_chat_request_is_refused(stage, extra, code):
    status, got = refused(stage, **{"model": "policy", "messages": HI, **extra})
    assert got == code
    assert status == (404 if code == "model_not_found" else 400)


@pytest.mark.parametrize(
    ("extra", "code"),
    [
        ({"prompt": ["a", "b"]}, "invalid_value"),
        ({"prompt": [1, 2, 3]}, "invalid_value"),
        ({"prompt": None}, "invalid_value"),
        ({"prompt": "a<|im_end|>"}, "special_token"),
        ({"best_of": 2}, "unsupported_parameter"),
        ({"echo": True}, "unsupported_parameter"),
        ({"logprobs": 1}, "unsupported_parameter"),
        ({"suffix": "x"}, "unsupported_parameter"),
        ({"prompt_embeds": "x"}, "unknown_parameter"),
    ],
)
def test_what_is_not_served_in_a_completion_request_is_refused(stage, extra, code):
    assert refused(stage, "/v1/completions", **{"model": "policy", "prompt": "Hi", **extra}) == (400, code)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 50_000, b'{"model": "policy", "messages": [{"role": "user", "content": "\\ud800"}]}',
     b'{"model": "policy", "temperature": NaN, "messages": [{"role": "user", "content": "x"}]}'],
)  # fmt: skip
def test_a_malformed_body_is_refused(stage, body):
    for path in ("/v1/chat/completions", "/v1/completions"):
        answer = stage.client.post(path, content=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] in ("invalid_json", "invalid_value")


def test_a_body_beyond_the_limit_is_refused_announced_or_not(stage):
    def dripping():
        for _ in range(20):
            yield b"x" * 10_000

    assert stage.client.post("/v1/chat/completions", content=b"x" * 100_001).status_code == 413
    assert stage.client.post("/v1/chat/completions", content=dripping()).status_code == 413


def test_ten_thousand_messages_are_refused():
    with staged(GUARD) as stage:
        assert refused(stage, model="policy", messages=HI * 10_000) == (400, "too_many_messages")


def test_an_error_quotes_nothing_of_what_was_sent(stage):
    secret = "do not repeat this"
    for body in (
        {"messages": secret},
        {"messages": [{"role": secret, "content": "x"}], "model": "m"},
        {"model": {secret: 1}},
    ):
        assert secret not in stage.client.post("/v1/chat/completions", json=body).text


def test_the_model_server_is_asked_with_what_was_understood_only(stage):
    stage.ask(temperature=0.5, max_completion_tokens=7, user="someone", n=1, tools=[], logprobs=False, stop=["x"])
    path, body = stage.upstream.requests[-1]
    assert path == "/v1/chat/completions"
    assert body == {
        "model": "policy",
        "messages": [{"role": "system", "content": "Be kind."}, *HI],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 7,
        "temperature": 0.5,
        "stop": ["x"],
    }


@pytest.mark.parametrize(
    ("policy", "contract", "own", "expected"),
    [
        ("enforce", "Be kind.", None, "Be kind."),
        ("enforce", None, None, None),
        ("merge", "Be kind.", "Rhyme.", "Be kind.\n\nRhyme."),
        ("merge", None, "Rhyme.", "Rhyme."),
        ("merge", "Be kind.", None, "Be kind."),
        ("client", "Be kind.", "Rhyme.", "Rhyme."),
        ("client", "Be kind.", "", ""),
        ("client", "Be kind.", None, "Be kind."),
    ],
)
def test_the_policy_decides_on_the_system_message(policy, contract, own, expected):
    with staged(GUARD, system_prompt=contract, system_prompt_policy=policy) as stage:
        messages = HI if own is None else [{"role": "system", "content": own}, *HI]
        assert stage.ask(messages=messages).status_code == 200
        sent = stage.upstream.requests[-1][1]["messages"]
        assert sent == (HI if expected is None else [{"role": "system", "content": expected}, *HI])


@pytest.mark.parametrize(
    ("policy", "own", "expected"),
    [
        ("enforce", None, None),
        ("merge", None, None),
        ("client", None, None),
        ("merge", "Rhyme.", "The template's.\n\nRhyme."),
        ("client", "Rhyme.", "Rhyme."),
    ],
)
def test_the_templates_own_system_prompt_is_left_to_the_template_unless_something_is_put_behind_it(
    policy, own, expected
):
    with staged(GUARD, default_system_prompt="The template's.", system_prompt_policy=policy) as stage:
        messages = HI if own is None else [{"role": "system", "content": own}, *HI]
        assert stage.ask(messages=messages).status_code == 200
        sent = stage.upstream.requests[-1][1]["messages"]
        assert sent == (HI if expected is None else [{"role": "system", "content": expected}, *HI])


def test_a_completion_is_a_user_message_in_the_chat_format_unless_raw_text_is_asked_for():
    body = {"model": "policy", "prompt": "Once"}
    with staged(GUARD, Upstream(["upon"]), system_prompt="Be kind.") as stage:
        answer = stage.client.post("/v1/completions", json=body).json()
        assert answer["object"] == "text_completion"
        assert answer["choices"][0]["text"] == "upon"
        path, sent = stage.upstream.requests[-1]
        assert path == "/v1/chat/completions"
        assert [m["content"] for m in sent["messages"]] == ["Be kind.", "Once"]
        streamed = stage.client.post("/v1/completions", json={**body, "stream": True}).text
        assert '"text":"upon"' in streamed
        assert "delta" not in streamed
    with staged(GUARD, Upstream(["upon"]), system_prompt="Be kind.", completions="raw") as stage:
        assert stage.client.post("/v1/completions", json=body).json()["choices"][0]["text"] == "upon"
        path, sent = stage.upstream.requests[-1]
        assert (path, sent["prompt"]) == ("/v1/completions", "Once")
    with staged(GUARD, completions="off") as stage:
        assert refused(stage, "/v1/completions", **body) == (404, "not_served")


def test_models_lists_the_allowed_ones_and_none_of_their_files(stage):
    data = stage.client.get("/v1/models").json()["data"]
    assert [model["id"] for model in data] == ["policy"]
    assert set(data[0]) == {"id", "object", "created", "owned_by"}


@pytest.mark.parametrize(
    ("status", "told"), [(400, 400), (422, 400), (401, 502), (404, 404), (429, 429), (500, 502), (503, 502), (302, 502)]
)
def test_a_refusal_of_the_model_server_becomes_an_error_without_its_words(status, told):
    with staged(GUARD, Upstream(status=status)) as stage:
        for stream in (True, False):
            answer = stage.ask(stream=stream)
            assert answer.status_code == told
            assert "secret" not in answer.text
            assert answer.json()["error"]["message"]


def test_a_model_server_that_is_down_is_told_as_such():
    with staged(GUARD, upstream_url="http://127.0.0.1:9") as stage:
        assert stage.ask().status_code == 502
        assert stage.client.get("/v1/models").status_code == 502
        health = stage.client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "upstream_unreachable")


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "http://127.0.0.1:port", "ftp://127.0.0.1", ""])
def test_an_address_that_is_none_is_refused_with_one_that_would_do(url):
    with pytest.raises(ConfigError, match=r"no http address; write it like http://127\.0\.0\.1:8000"):
        create_app(ServeConfig(), url, GUARD, api_keys=["k"])


def test_no_key_is_needed_where_that_is_said():
    with staged(GUARD, require_key=False) as stage:
        del stage.client.headers["Authorization"]
        assert stage.ask().status_code == 200


def test_a_gateway_without_keys_does_not_start(monkeypatch):
    monkeypatch.setenv("BALLAST_API_KEYS", " , ")
    with pytest.raises(ConfigError, match="BALLAST_API_KEYS"):
        create_app(ServeConfig(), "http://127.0.0.1:1", GUARD)
    monkeypatch.setenv("BALLAST_API_KEYS", "one, two")
    app = create_app(ServeConfig(), "http://127.0.0.1:1", GUARD)
    keys = app.state.gateway.keys
    assert keys.client("Bearer two", "") != keys.client("bearer one", "")
    with pytest.raises(Problem, match="401"):
        keys.client("Bearer three", "")


def test_a_client_has_its_burst_and_then_its_rate():
    now = [0.0]
    rate = RateLimit(per_minute=60, burst=2, clock=lambda: now[0])  # one a second
    rate.take("a")
    rate.take("a")
    with pytest.raises(Problem) as caught:
        rate.take("a")
    assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "1"})
    rate.take("b")
    now[0] = 1.0
    rate.take("a")


def test_the_rate_holds_over_http():
    with staged(GUARD, limits={"requests_per_minute": 1, "burst": 2}) as stage:
        assert [stage.ask().status_code for _ in range(3)] == [200, 200, 429]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["model", "messages", "prompt", "stream", "stream_options", "max_tokens", "temperature", "top_p", "top_k", "stop", "seed", "n", "tools",
     "tool_choice", "logprobs", "echo", "suffix", "user", "response_format", "other"]
)  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(extra=st.dictionaries(FIELDS, JSON, max_size=3), path=st.sampled_from(["chat/completions", "completions"]))
def test_no_body_makes_the_gateway_fail(stage, extra, path):
    valid = {"messages": HI} if path.startswith("chat") else {"prompt": "Hi"}
    content = json.dumps({"model": "policy", **valid, **extra}).encode()
    answer = stage.client.post(f"/v1/{path}", content=content)
    assert answer.status_code in (200, 400, 404)
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_the_description_lists_every_path_and_its_body(stage):
    app = create_app(ServeConfig(), "http://127.0.0.1:1", GUARD, api_keys=["k"])
    described = app.openapi()
    assert set(described["paths"]) == {"/v1/chat/completions", "/v1/completions", "/v1/models", "/metrics", "/health"}
    body = described["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["model", "messages"]
    assert "$ref" not in json.dumps(described)
