"""A tuned model behind a gateway in which the guardrail works while the answer is being written.

`app.create_app` builds the gateway over any OpenAI-compatible model server, `server.serve` runs it.
`release` holds the rule that everything else is built around: text reaches a client only after the guardrail
has passed it. FastAPI, uvicorn and the Prometheus client come with the extra `serve`.
"""
