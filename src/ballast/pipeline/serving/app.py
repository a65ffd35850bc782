"""The gateway as a FastAPI application: few paths, each with a key and limits, in front of a model server.

    app = create_app(settings, "http://127.0.0.1:8000", guard, system_prompt="You are ...")

`server.serve` runs it. Paths that are not listed here do not exist, whatever the model server offers.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from ballast.guardrails.types import Guardrail
from ballast.pipeline.config_serve import ServeConfig
from ballast.pipeline.serving.delivery import Delivery
from ballast.pipeline.serving.gateway import Gateway
from ballast.pipeline.serving.problems import Problem
from ballast.pipeline.serving.requests import ChatRequest, CompletionRequest


def create_app(
    settings: ServeConfig,
    upstream_url: str,
    guard: Guardrail | None,
    *,
    system_prompt: str | None = None,
    default_system_prompt: str | None = None,
    special_tokens: Sequence[str] = (),
    models: Sequence[str] | None = None,
    api_keys: Sequence[str] | None = None,
    upstream_key: str | None = None,
) -> FastAPI:
    """Build the gateway. It owns no process: who starts the model server also ends it.

    Args:
        settings: the section `serve`.
        upstream_url: the model server's address, with or without /v1.
        guard: who judges answers; None needs `settings.unguarded`.
        system_prompt: the contract's system prompt, applied as `settings.system_prompt_policy` says.
        default_system_prompt: what the chat template writes itself where there is no system message; counts where
            `system_prompt` is None and a client's own system message is merged.
        special_tokens: texts of the tokenizer's special tokens; a request whose text holds one is refused, since
            the model server would read it as part of the chat format.
        models: names that may be asked for and are listed; None takes all that the model server serves.
        api_keys: accepted keys; None reads them from the environment variable `settings.api_key_env`.
        upstream_key: the model server's own key, where it has one.

    Returns:
        The application; `app.state.gateway` is its `Gateway`.

    Raises:
        ConfigError: no guard, no key, an address or a file that cannot be used.
    """
    gateway = Gateway(
        settings,
        upstream_url,
        guard,
        system_prompt=system_prompt,
        default_system_prompt=default_system_prompt,
        special_tokens=special_tokens,
        models=models,
        api_keys=api_keys,
        upstream_key=upstream_key,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await gateway.aclose()

    app = FastAPI(
        title="Ballast gateway",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    app.state.gateway = gateway
    app.add_exception_handler(Problem, _problem)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(Exception, _unexpected)
    _add_routes(app, gateway)
    return app


def _add_routes(app: FastAPI, gateway: Gateway) -> None:
    async def chat(request: Request) -> Response:
        client = _client(request, gateway)
        ask = gateway.understanding.chat(await _body(request, gateway))
        return Delivery(gateway, ask, f"chatcmpl-{uuid.uuid4().hex}", client)

    async def completions(request: Request) -> Response:
        client = _client(request, gateway)
        ask = gateway.understanding.completion(await _body(request, gateway))
        return Delivery(gateway, ask, f"cmpl-{uuid.uuid4().hex}", client)

    async def models(request: Request) -> Response:
        _client(request, gateway)
        listed = await gateway.upstream.models()
        allowed = gateway.understanding.models
        return JSONResponse(
            {"object": "list", "data": [model for model in listed if allowed is None or model["id"] in allowed]}
        )

    async def metrics(request: Request) -> Response:
        gateway.keys.client(request.headers.get("authorization"), "")
        return Response(gateway.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def health() -> Response:
        return await _health(gateway)

    for path, route, body in (
        ("/v1/chat/completions", chat, ChatRequest),
        ("/v1/completions", completions, CompletionRequest),
    ):
        app.add_api_route(path, route, methods=["POST"], response_model=None, openapi_extra=_described(body))
    app.add_api_route("/v1/models", models, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", metrics, methods=["GET"], response_model=None)
    app.add_api_route("/health", health, methods=["GET"], response_model=None)


def _described(body: type[BaseModel]) -> dict[str, Any]:
    # The body is read by hand, so that its size is known before it is parsed.
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _inlined(body)}}}}


def _inlined(body: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema without references, which would point outside of the path's description."""
    schema = body.model_json_schema()
    definitions = schema.pop("$defs", {})

    def resolve(node: Any) -> Any:
        if isinstance(node, list):
            return [resolve(one) for one in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return resolve(definitions[node["$ref"].rpartition("/")[2]])
        return {key: resolve(value) for key, value in node.items()}

    resolved: dict[str, Any] = resolve(schema)
    return resolved


def _client(request: Request, gateway: Gateway) -> str:
    """Who asks.

    Raises:
        Problem: 401 without a valid key, 429 above the rate.
    """
    address = request.client.host if request.client else "unknown"
    client = gateway.keys.client(request.headers.get("authorization"), address)
    gateway.rate.take(client)
    return client


async def _body(request: Request, gateway: Gateway) -> bytes:
    """The body, refused as soon as it is known to be too large.

    Raises:
        Problem: 413, 408 or 400; too large, too slow, or the client left before its end.
    """
    limits = gateway.settings.limits
    too_large = Problem(
        413, "body_too_large", f"the body is larger than {limits.body_bytes} bytes", headers={"Connection": "close"}
    )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > limits.body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.body_bytes:
                    raise too_large
    except TimeoutError:
        raise Problem(
            408,
            "body_too_slow",
            f"the body did not arrive within {limits.body_timeout_s:g} s",
            headers={"Connection": "close"},
        ) from None
    except ClientDisconnect:
        raise Problem(400, "client_gone", "the client left before the end of its body") from None
    return bytes(body)


async def _health(gateway: Gateway) -> Response:
    """200 while requests can be answered; 503 at the end, or while the model server does not answer."""
    status = "draining" if gateway.draining else "ok" if await gateway.upstream.alive() else "upstream_unreachable"
    guard = "none" if gateway.judge is None else "failing" if gateway.judge.failed_in_a_row else "ok"
    return JSONResponse({"status": status, "guard": guard}, status_code=200 if status == "ok" else 503)


async def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return error.response()


async def _http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: "no such path", 405: "this path does not take that method"}.get(error.status_code, "not served")
    return Problem(error.status_code, "not_served", what, headers=dict(error.headers or {})).response()


async def _unexpected(request: Request, error: Exception) -> Response:
    return Problem(500, "internal_error", "the gateway failed; its log says more").response()
