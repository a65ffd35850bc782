"""vLLM's OpenAI server as a child: on the loopback address, on a private port, under a private key.

Read against vLLM 0.31. Its key guards the paths under /v1 alone; /tokenize, weight updates and others stay open. So it
listens on 127.0.0.1 only, and whoever is not on this machine reaches the gateway and nothing else.
"""

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import httpx

from ballast.errors import ConfigError, EngineError
from ballast.guardrails.types import Message
from ballast.pipeline.serving import keeper

_HOST = "127.0.0.1"
_ASK_S = 0.25  # between two looks at a server that starts
# What vLLM takes as --max-lora-rank; an adapter of a rank between two is served under the larger.
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_END_S = 15.0  # for the keeper, which itself waits less


@dataclass(frozen=True)
class ServerOptions:
    """What vLLM serves, and with how much memory.

    Attributes:
        model: folder of the weights.
        name: the model's name for clients.
        adapter: folder of a LoRA over them, which is then what is served under the name; None for none.
        lora_rank: its rank.
        dtype: `bfloat16` or `float32`; `auto` takes that of the weights.
        max_model_len: tokens of a prompt and its answer; None takes the model's own limit.
        max_num_seqs: answers at once.
        gpu_memory_utilization: share of the GPU's memory.
        cpu_kv_cache_gib: KV cache on a CPU.
        enforce_eager: start without compiling: sooner up, slower after.
    """

    model: str
    name: str
    adapter: str | None = None
    lora_rank: int = 8
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    gpu_memory_utilization: float = 0.9
    cpu_kv_cache_gib: int = 1
    enforce_eager: bool = False

    def arguments(self, port: int) -> list[str]:
        """Of `vllm.entrypoints.openai.api_server`."""
        words = ["--model", self.model, "--host", _HOST, "--port", str(port), "--dtype", self.dtype]
        words += ["--max-num-seqs", str(self.max_num_seqs), "--disable-log-stats", "--uvicorn-log-level", "warning"]
        words += ["--chat-template-content-format", "string"]  # as the template saw messages in training
        words += ["--gpu-memory-utilization", str(self.gpu_memory_utilization)]
        if self.max_model_len is not None:
            words += ["--max-model-len", str(self.max_model_len)]
        if self.enforce_eager:
            words.append("--enforce-eager")
        if self.adapter is None:
            words += ["--served-model-name", self.name]
        else:  # the bare model has a name that nobody is told: it is not what was measured
            words += ["--served-model-name", secrets.token_hex(8), "--enable-lora"]
            words += ["--max-lora-rank", str(self._max_lora_rank), "--lora-modules", f"{self.name}={self.adapter}"]
        return words

    @property
    def _max_lora_rank(self) -> int:
        rank = next((rank for rank in _LORA_RANKS if rank >= self.lora_rank), None)
        if rank is None:
            raise ConfigError(
                f"the adapter has rank {self.lora_rank}, and vLLM serves adapters up to rank {_LORA_RANKS[-1]}; leave --adapter out to "
                "serve the merged weights"
            )
        return rank


class ModelServer:
    """A vLLM server that runs inside a `with` block, and ends with this process however this process ends.

    Args:
        options: what it serves.
        log: where its output goes; it holds no text of requests.

    Attributes:
        url: where it listens.
        key: its private API key.
        name: of its model.
    """

    def __init__(self, options: ServerOptions, log: Path) -> None:
        self.options = options
        self.log = log
        self.name = options.name
        self.key = secrets.token_urlsafe(32)
        port = _free_port()
        self.url = f"http://{_HOST}:{port}"
        self._command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options.arguments(port)]
        headers = {"Authorization": f"Bearer {self.key}"}
        # No proxy from the environment: this is the loopback address.
        self._client = httpx.Client(base_url=self.url, headers=headers, timeout=30.0, trust_env=False)

    def _start(self, handle: IO[bytes]) -> "subprocess.Popen[bytes]":
        environment = {
            **os.environ,
            "VLLM_API_KEY": self.key,  # not among the arguments, which every user of the machine can list
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
        }
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", str(self.options.cpu_kv_cache_gib))
        environment.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        return subprocess.Popen(
            [sys.executable, "-P", str(keeper.__file__), *self._command],
            stdin=subprocess.PIPE,
            stdout=handle,
            stderr=subprocess.STDOUT,
            env=environment,
            process_group=0,  # Ctrl-C in a terminal reaches the gateway, which ends this in order
        )

    def __enter__(self) -> Self:
        with self.log.open("wb") as handle:
            self._process = self._start(handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def wait(self, timeout_s: float, progress: Callable[[float], None] | None = None) -> None:
        """Wait until it answers.

        Args:
            timeout_s: for how long.
            progress: is told the seconds so far.

        Raises:
            EngineError: it ended, or does not answer in time; with its own last words.
        """
        started = time.monotonic()
        while (seconds := time.monotonic() - started) < timeout_s:
            if not self.running:
                raise self._failed(f"vLLM ended with exit code {self._process.returncode} before it answered")
            try:
                if self._client.get("/health", timeout=2.0).is_success:
                    return
            except httpx.TransportError:
                pass  # not up yet
            if progress is not None:
                progress(seconds)
            time.sleep(_ASK_S)
        raise self._failed(f"vLLM did not answer within {timeout_s:.0f} s")

    def tokenize(self, messages: Sequence[Message]) -> list[int]:
        """What it makes of a conversation, up to where the assistant begins.

        Raises:
            EngineError: it does not say.
        """
        body = {"model": self.name, "messages": list(messages), "add_generation_prompt": True}
        try:
            response = self._client.post("/tokenize", json=body)
            response.raise_for_status()
            ids: list[int] = response.json()["tokens"]
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise self._failed(f"vLLM does not say how it tokenises ({type(error).__name__}: {error})") from error
        return ids

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def ended(self) -> EngineError:
        """The error for a server that ended while it was needed."""
        return self._failed(f"vLLM ended with exit code {self._process.poll()} while it served")

    def close(self) -> None:
        """End it and all its processes. Safe to call twice."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)
            self._process.wait()
        self._client.close()

    def _failed(self, what: str) -> EngineError:
        return EngineError(
            f"{what}; its last words: {_last_words(self.log)} (all of them: {self.log}). Lower --max-model-len or "
            "--gpu-memory-utilization if memory is short, or run `ballast doctor`"
        )


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
    return port


def _last_words(log: Path, lines: int = 3) -> str:
    said = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return " | ".join(said[-lines:]) or "none"
