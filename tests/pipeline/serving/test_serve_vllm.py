"""The real thing: `ballast serve` with vLLM and the embedded model, asked by the openai client."""

import json
import shutil
import signal
import time
from pathlib import Path

import httpx
import pytest
from tests.pipeline.serving.live_server import KEY, descendants, started

from ballast.pipeline.model_record import write_record
from ballast.pipeline.prompting import PromptFormat

# A vLLM of its own takes a minute or two to start, beside the engine that the other tests share.
pytestmark = [pytest.mark.long, pytest.mark.model, pytest.mark.vllm, pytest.mark.timeout(600)]

SYSTEM = "You are a helpful assistant."
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def served(embedded_folder, tokenizer, tmp_path_factory):
    """A server of a model folder with a contract, as a user starts it; gives its process and address."""
    pytest.importorskip("openai")
    folder = tmp_path_factory.mktemp("served") / "tuned"
    shutil.copytree(embedded_folder, folder)
    write_record(folder, PromptFormat(tokenizer, SYSTEM))
    with started(folder, "serve.guard=embedded") as server:
        yield server


def test_the_openai_client_gets_the_same_answer_whole_and_in_pieces(served, tokenizer):
    from openai import OpenAI

    _, url = served
    client = OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
    asked = {"model": "tuned", "messages": QUESTION, "max_tokens": 16, "temperature": 0, "seed": 0}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content.strip()
    # As many as the contract's; the next test compares the ids.
    assert whole.usage.prompt_tokens == len(PromptFormat(tokenizer, SYSTEM).encode(QUESTION))
    pieces = [
        piece.choices[0].delta.content or ""
        for piece in client.chat.completions.create(**asked, stream=True)
        if piece.choices
    ]
    assert "".join(pieces) == whole.choices[0].message.content
    assert [model.id for model in client.models.list()] == ["tuned"]


def test_vllm_sees_the_ids_of_the_contract(served, tokenizer):
    process, _ = served
    pid, line = next(
        (p, words)
        for p, words in descendants(process.pid)
        if "vllm.entrypoints.openai.api_server" in words and "-P" not in words
    )
    assert line[line.index("--host") + 1] == "127.0.0.1"
    environment = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    key = next(entry.partition("=")[2] for entry in environment if entry.startswith("VLLM_API_KEY="))
    assert key not in line  # others may list it
    prompt_format = PromptFormat(tokenizer, SYSTEM)
    body = {
        "model": "tuned",
        "messages": prompt_format.messages(QUESTION[0]["content"]),
        "max_tokens": 1,
        "return_token_ids": True,
    }
    answer = httpx.post(
        f"http://127.0.0.1:{line[line.index('--port') + 1]}/v1/chat/completions",
        content=json.dumps(body),
        headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
        trust_env=False,
        timeout=60,
    )
    assert answer.json()["prompt_token_ids"] == prompt_format.encode(QUESTION)


def test_the_end_leaves_no_process(served):
    process, _ = served
    below = [pid for pid, _ in descendants(process.pid)]
    assert len(below) >= 3  # the keeper, the server, its engine
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    time.sleep(0.5)
    assert [pid for pid in below if Path(f"/proc/{pid}").exists()] == []
