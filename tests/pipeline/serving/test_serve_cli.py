"""`ballast serve` up to its end, with a model server that is a few lines of Python in place of vLLM."""

import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time

import httpx
import pytest
from typer.testing import CliRunner

from ballast.pipeline import cli
from ballast.pipeline.model_record import write_record
from ballast.pipeline.prompting import PromptFormat
from ballast.pipeline.serving import model_server

pytestmark = pytest.mark.model

SYSTEM = "Be kind."
# Answers /health and /v1/models, and tokenises by a table; ends with `exit` after the first request of a client.
SERVER = """
import http.server, json, os, sys
port, table, exit_code = int(sys.argv[1]), json.load(open(sys.argv[2])), sys.argv[3]
assert os.environ["VLLM_API_KEY"]
if exit_code == "at once":
    sys.exit("no memory left")
class Handler(http.server.BaseHTTPRequestHandler):
    def send(self, data):
        body = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        if exit_code == "later" and self.path != "/health":
            os._exit(7)
        self.send({"data": [{"id": "model"}]})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send({"tokens": table[json.dumps(asked["messages"])]})
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
OPEN = ("serve.unguarded=true", "serve.require_key=false")


@pytest.fixture
def folder(tmp_path, embedded_folder, tokenizer):
    """A model folder with a contract; what stands in for vLLM reads no weights."""
    made = tmp_path / "model"
    tokenizer.save_pretrained(made)
    (made / "config.json").write_text((embedded_folder / "config.json").read_text())
    (made / "model.safetensors").write_bytes(b"weights")
    write_record(made, PromptFormat(tokenizer, SYSTEM))
    return made


@pytest.fixture(autouse=True)
def temporary_files(monkeypatch, tmp_path):
    """Logs of what failed are kept; here they go with the test."""
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "logs"))
    return tmp_path / "logs"


@pytest.fixture
def stand_in(monkeypatch, tmp_path, tokenizer):
    """Put a server in vLLM's place that tokenises as `prompt_format` does; gives the processes that were started."""
    started = []

    def put(exit_code="never", prompt_format=None, asked=None):
        ours = PromptFormat(tokenizer, SYSTEM)
        asked, answering = asked or ours, prompt_format or ours
        table = {json.dumps(m): answering.encode_naively(m) for m in asked.probes().values()}
        (tmp_path / "table.json").write_text(json.dumps(table))
        start = model_server.ModelServer._start

        def of_script(self, handle):
            port = self.url.rpartition(":")[2]
            self._command = [sys.executable, "-c", SERVER, port, str(tmp_path / "table.json"), exit_code]
            process = start(self, handle)
            started.append(process)
            return process

        monkeypatch.setattr(model_server.ModelServer, "_start", of_script)
        return started

    # The command takes the signal for itself; it is given back.
    before = signal.getsignal(signal.SIGTERM)
    yield put
    signal.signal(signal.SIGTERM, before)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(folder, port, *words):
    return CliRunner().invoke(cli.app, ["serve", str(folder), f"serve.port={port}", *words])


def when_up(port, do):
    """Do something in a thread once the gateway answers; gives the list of its results."""
    results = []

    def wait():
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as client:
            for _ in range(200):
                try:
                    client.get("/metrics")
                    break
                except httpx.TransportError:
                    time.sleep(0.1)
            results.extend(do(client))

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return results, thread


def test_it_serves_listed_paths_alone_until_it_is_told_to_end(folder, stand_in):
    started, port = stand_in(), free_port()

    def ask(client):
        answers = [client.get("/v1/models"), client.post("/tokenize", json={}), client.get("/version")]
        os.kill(os.getpid(), signal.SIGTERM)
        return [answer.status_code for answer in answers]

    answers, thread = when_up(port, ask)
    result = serve(folder, port, *OPEN)
    thread.join(5)
    assert (result.exit_code, answers) == (0, [200, 404, 404]), result.output
    assert "tokenises as the contract says" in result.stderr
    assert "every answer is released unjudged" in result.stderr
    assert f"serving 'model' at http://127.0.0.1:{port}/v1" in result.stderr
    assert started[0].poll() is not None


@pytest.fixture
def as_in_a_terminal():
    """SIGINT interrupts: a shell that starts the tests in the background has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_is_an_orderly_end_and_leaves_no_log(folder, stand_in, temporary_files, as_in_a_terminal):
    started, port = stand_in(), free_port()
    _, thread = when_up(port, lambda client: [os.kill(os.getpid(), signal.SIGINT)])
    result = serve(folder, port, *OPEN)
    thread.join(5)
    assert result.exit_code == 0, result.output
    assert "stopped" in result.stderr
    assert "--resume" not in result.stderr
    assert started[0].poll() is not None
    assert list(temporary_files.iterdir()) == []


def test_a_default_system_prompt_with_the_date_in_it_is_left_to_the_template(folder, stand_in, tokenizer, monkeypatch):
    import copy

    from ballast.pipeline.serving import app

    dated = copy.deepcopy(tokenizer)
    dated.chat_template = (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nIt is {{ strftime_now('%Y') }}.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    dated.save_pretrained(folder)
    write_record(folder, PromptFormat(dated))
    given, port = {}, free_port()
    made = app.create_app
    monkeypatch.setattr(app, "create_app", lambda *words, **named: given.update(named) or made(*words, **named))
    stand_in(prompt_format=PromptFormat(dated), asked=PromptFormat(dated))
    when_up(port, lambda client: [os.kill(os.getpid(), signal.SIGTERM)])
    result = serve(folder, port, *OPEN)
    assert result.exit_code == 0, result.output
    # The contract's own date is fixed, so it must not be what a model is told.
    assert given["system_prompt"] is None
    assert given["default_system_prompt"] == f"It is {time.strftime('%Y')}."


def test_a_server_that_tokenises_otherwise_is_never_opened(folder, stand_in, tokenizer):
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = other.chat_template.replace("<|im_start|>assistant\n", "<|im_start|>Assistant\n")
    started = stand_in(prompt_format=PromptFormat(other))
    result = serve(folder, free_port(), *OPEN)
    assert result.exit_code == 2
    assert "U+0061 in the contract, U+0041 here" in result.stderr
    assert "serving" not in result.stderr
    assert started[0].poll() is not None


def test_a_server_that_does_not_start_is_an_error_with_its_last_words(folder, stand_in, temporary_files):
    stand_in("at once")
    result = serve(folder, free_port(), *OPEN)
    assert result.exit_code == 1
    assert "exit code 1 before it answered; its last words: no memory left" in result.stderr
    assert [log.read_text() for log in temporary_files.iterdir()] == ["no memory left\n"]


def test_a_server_that_ends_ends_the_gateway(folder, stand_in):
    stand_in("later")
    port = free_port()
    _, thread = when_up(port, lambda client: [client.get("/v1/models").status_code])
    result = serve(folder, port, *OPEN)
    thread.join(5)
    assert result.exit_code == 1
    assert "exit code 7 while it served" in result.stderr


def test_a_port_in_use_is_an_error_before_anything_starts(folder, stand_in, temporary_files):
    started = stand_in()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = serve(folder, taken.getsockname()[1], *OPEN)
    assert (result.exit_code, started) == (2, [])
    assert "is in use" in result.stderr
    assert list(temporary_files.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "serve.guard"),  # a model folder names no guard
        (("serve.guard=embedded",), "BALLAST_API_KEYS"),
        (("serve.prot=1",), "serve.port"),
        (("serve.guard=embedded", "serve.unguarded=true"), "the guard would judge nothing"),
        (("--adapter",), "--adapter belongs to a run"),
    ],
)
def test_what_is_missing_is_an_error_before_anything_starts(folder, stand_in, words, said, monkeypatch):
    monkeypatch.delenv("BALLAST_API_KEYS", raising=False)
    started = stand_in()
    result = serve(folder, free_port(), *words)
    assert (result.exit_code, started) == (2, [])
    assert said in result.stderr


def test_a_model_without_a_contract_is_an_error_with_its_remedy(folder, stand_in):
    (folder / "prompt_format.json").unlink()
    started = stand_in()
    result = serve(folder, free_port(), *OPEN)
    assert (result.exit_code, started) == (2, [])
    assert "has no template contract" in result.stderr
    assert "--adopt-template" in result.stderr
